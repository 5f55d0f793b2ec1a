// SPDX-License-Identifier: Apache-2.0
// norm_forward, norm_forward_out, norm_backward: tensors in, checks, Params out.
#include "../common/row_tensors.h"
#include "norm.h"

namespace fmkernels {
namespace {

// weight or bias [hidden], in float32 or the dtype of x; both in one dtype.
const void* view_weight(const char* name, const Tensor& t, const Tensor& x, DType& weight_dtype, bool is_first) {
  check_rank(name, t, 1);
  check_size(name, t, 0, x.size(x.dim() - 1));
  check_same_device(name, t, x);
  check_last_dim_contiguous(name, t);
  const DType dtype = dtype_of(name, t);
  FM_CHECK(dtype == DType::kFloat32 || dtype == dtype_of("x", x), name, " must be float32 or have the dtype of x");
  FM_CHECK(is_first || dtype == weight_dtype, name, " must have the dtype of weight");
  weight_dtype = dtype;
  return data_of(t);
}

template <class Params>
void view_common(Params& p, const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                 double eps, bool centred) {
  p.dtype = p.weight_dtype = dtype_of("x", x);
  FM_CHECK(x.dim() >= 1, "x must have at least 1 dimension, got 0");
  p.hidden = x.size(x.dim() - 1);
  FM_CHECK(p.hidden > 0, "x must have a last dimension of at least 1");
  p.eps = static_cast<float>(eps);
  p.is_centred = centred;
  if (weight.has_value()) p.weight = view_weight("weight", *weight, x, p.weight_dtype, true);
  if (bias.has_value()) {
    const void* data = view_weight("bias", *bias, x, p.weight_dtype, !weight.has_value());
    if constexpr (requires { p.bias; }) p.bias = data;
  }
}

void check_hidden(const char* name, const Tensor* t, int64_t hidden) {
  if (t != nullptr) check_size(name, *t, t->dim() - 1, hidden);
}

void execute_forward(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
                     const std::optional<Tensor>& bias, double eps, bool centred, const Tensor& y,
                     const Tensor* summed) {
  NormForwardParams p{};
  view_common(p, x, weight, bias, eps, centred);
  FM_CHECK(residual.has_value() == (summed != nullptr), "residual and its sum must be given together");
  p.rows = view_rows(x, {{"x", &x, &p.x},
                         {"residual", pointer_to(residual), &p.residual},
                         {"y", &y, &p.y},
                         {"summed", summed, &p.summed}});
  check_hidden("residual", pointer_to(residual), p.hidden);
  check_hidden("y", &y, p.hidden);
  check_hidden("summed", summed, p.hidden);
  if (p.rows.count > 0) FM_EXECUTE(norm_forward, p, x);
}

std::tuple<Tensor, Tensor> norm_forward(const Tensor& x, const std::optional<Tensor>& residual,
                                        const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                        double eps, bool centred) {
  Tensor y = empty_contiguous(x);
  Tensor summed = residual.has_value() ? empty_contiguous(x) : torch::stable::new_empty(x, {0});
  execute_forward(x, residual, weight, bias, eps, centred, y, residual.has_value() ? &summed : nullptr);
  return {y, summed};
}

void norm_forward_out(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
                      const std::optional<Tensor>& bias, double eps, bool centred, const Tensor& y,
                      const std::optional<Tensor>& summed) {
  check_written("y", y);
  if (summed.has_value()) check_written("summed", *summed);
  execute_forward(x, residual, weight, bias, eps, centred, y, pointer_to(summed));
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& grad_y, const std::optional<Tensor>& grad_summed,
                                                 const Tensor& summed, const std::optional<Tensor>& weight,
                                                 const std::optional<Tensor>& bias, double eps, bool centred,
                                                 bool weight_grad) {
  NormBackwardParams p{};
  view_common(p, summed, weight, bias, eps, centred);
  Tensor grad_x = empty_contiguous(summed);
  p.rows = view_rows(summed, {{"summed", &summed, &p.summed},
                              {"grad_y", &grad_y, &p.grad_y},
                              {"grad_summed", pointer_to(grad_summed), &p.grad_summed},
                              {"grad_x", &grad_x, &p.grad_x}});
  check_hidden("grad_y", &grad_y, p.hidden);
  check_hidden("grad_summed", pointer_to(grad_summed), p.hidden);
  p.rows_per_chunk = rows_per_chunk_of(p.rows.count, p.hidden);
  p.sums_stride = (p.hidden + kSumsBlock - 1) / kSumsBlock * kSumsBlock;
  p.num_chunks = (p.rows.count + p.rows_per_chunk - 1) / p.rows_per_chunk;

  // An output and its sums of chunks; empty tensors where no gradient is wanted.
  const auto make = [&](const std::optional<Tensor>& of, void*& grad, float*& sums) {
    const bool wanted = of.has_value() && weight_grad;
    const Tensor& like = of.has_value() ? *of : summed;
    Tensor output = p.rows.count > 0 ? torch::stable::new_empty(like, {wanted ? p.hidden : 0})
                                     : torch::stable::new_zeros(like, {wanted ? p.hidden : 0});
    Tensor partial = torch::stable::new_empty(summed, {wanted ? p.num_chunks : 0, p.sums_stride}, ScalarType::Float);
    if (wanted) {
      grad = data_of(output);
      sums = static_cast<float*>(data_of(partial));
    }
    return std::tuple{output, partial};
  };
  const auto [grad_weight, weight_sums] = make(weight, p.grad_weight, p.weight_sums);
  const auto [grad_bias, bias_sums] = make(bias, p.grad_bias, p.bias_sums);
  if (p.rows.count > 0) FM_EXECUTE(norm_backward, p, summed);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) {
  m.impl("norm_forward", TORCH_BOX(&norm_forward));
  m.impl("norm_forward_out", TORCH_BOX(&norm_forward_out));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
}

}  // namespace fmkernels
