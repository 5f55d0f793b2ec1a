// SPDX-License-Identifier: Apache-2.0
// glu_forward, glu_forward_out, glu_backward: tensors in, checks, Params out.
#include "../common/row_tensors.h"
#include "glu.h"

namespace fmkernels {
namespace {

GluActivation activation_of(int64_t activation) {
  FM_CHECK(activation >= 0 && activation <= 2, "activation must be 0, 1 or 2, got ", activation);
  return static_cast<GluActivation>(activation);
}

// The columns of gate and up: up is a tensor of its own, or the second half of the last dimension of gate.
int64_t width_of(const Tensor& gate, const std::optional<Tensor>& up) {
  FM_CHECK(gate.dim() >= 1, "gate must have at least 1 dimension, got 0");
  const int64_t columns = gate.size(gate.dim() - 1);
  if (!up.has_value()) {
    FM_CHECK(columns % 2 == 0, "gate must have an even last dimension where there is no up, got ", columns);
    return columns / 2;
  }
  FM_CHECK(up->dim() >= 1, "up must have at least 1 dimension, got 0");
  check_size("up", *up, up->dim() - 1, columns);
  return columns;
}

// The second half of packed rows.
RowView second_half(const RowView& view, int64_t width, int64_t element) {
  RowView half = view;
  half.data = static_cast<char*>(view.data) + width * element;
  return half;
}

Tensor empty_rows(const Tensor& like, int64_t width) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = width;
  return torch::stable::new_empty(like, sizes);
}

void execute_forward(const Tensor& gate, const std::optional<Tensor>& up, int64_t activation, const Tensor& out) {
  GluForwardParams p{};
  p.dtype = dtype_of("gate", gate);
  p.activation = activation_of(activation);
  p.width = width_of(gate, up);
  p.rows = view_rows(gate, {{"gate", &gate, &p.gate}, {"up", pointer_to(up), &p.up}, {"out", &out, &p.out}});
  check_size("out", out, out.dim() - 1, p.width);
  if (!up.has_value()) p.up = second_half(p.gate, p.width, element_bytes(p.dtype));
  if (p.rows.count * p.width > 0) FM_EXECUTE(glu_forward, p, gate);
}

Tensor glu_forward(const Tensor& gate, const std::optional<Tensor>& up, int64_t activation) {
  Tensor out = empty_rows(gate, width_of(gate, up));
  execute_forward(gate, up, activation, out);
  return out;
}

void glu_forward_out(const Tensor& gate, const std::optional<Tensor>& up, int64_t activation, const Tensor& out) {
  check_written("out", out);
  execute_forward(gate, up, activation, out);
}

std::tuple<Tensor, Tensor> glu_backward(const Tensor& grad, const Tensor& gate, const std::optional<Tensor>& up,
                                        int64_t activation) {
  GluBackwardParams p{};
  p.dtype = dtype_of("gate", gate);
  p.activation = activation_of(activation);
  p.width = width_of(gate, up);
  Tensor grad_gate = empty_rows(gate, gate.size(gate.dim() - 1));
  Tensor grad_up = up.has_value() ? empty_rows(gate, p.width) : torch::stable::new_empty(gate, {0});
  p.rows = view_rows(gate, {{"gate", &gate, &p.gate},
                            {"up", pointer_to(up), &p.up},
                            {"grad", &grad, &p.grad},
                            {"grad_gate", &grad_gate, &p.grad_gate},
                            {"grad_up", up.has_value() ? &grad_up : nullptr, &p.grad_up}});
  check_size("grad", grad, grad.dim() - 1, p.width);
  if (!up.has_value()) {
    p.up = second_half(p.gate, p.width, element_bytes(p.dtype));
    p.grad_up = second_half(p.grad_gate, p.width, element_bytes(p.dtype));
  }
  if (p.rows.count * p.width > 0) FM_EXECUTE(glu_backward, p, gate);
  return {grad_gate, grad_up};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) {
  m.impl("glu_forward", TORCH_BOX(&glu_forward));
  m.impl("glu_forward_out", TORCH_BOX(&glu_forward_out));
  m.impl("glu_backward", TORCH_BOX(&glu_backward));
}

}  // namespace fmkernels
