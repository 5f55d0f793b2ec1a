// SPDX-License-Identifier: Apache-2.0
// Products by groups of rows with a gated unit behind them: tensors in, checks, Params out.
#include "moe_gated.h"
#include "moe_grouped_views.h"
#include "moe_views.h"

namespace fmkernels {
namespace {

std::tuple<Tensor, Tensor> moe_gated_mm(const Tensor& a, const Tensor& b, const Tensor& offsets,
                                        const std::optional<Tensor>& pos_to_token, bool interleaved, bool keeps) {
  MoeGatedMmParams p{};
  p.dtype = dtype_of("a", a);
  p.is_interleaved = interleaved;
  p.a = view_operand("a", a, a, 2, true);
  p.b = view_operand("b", b, a, 3, false);
  p.num_groups = b.size(0);
  FM_CHECK(p.b.rows == p.a.columns, "b must have as many rows as a has columns, ", p.a.columns, ", got ", p.b.rows);
  FM_CHECK(p.b.columns % 2 == 0, "b must have an even number of columns, got ", p.b.columns);
  int64_t num_rows = p.a.rows;
  if (pos_to_token.has_value()) {
    check_rank("pos_to_token", *pos_to_token, 1);
    num_rows = pos_to_token->size(0);
    FM_CHECK(num_rows < kMaxExtent, "pos_to_token must have fewer than 2^31 elements, got ", num_rows);
    p.pos_to_token = view_positions("pos_to_token", *pos_to_token, a, p.a.rows);
  }
  p.offsets = view_offsets(offsets, a, p.num_groups, num_rows);
  Tensor out = torch::stable::new_empty(a, {num_rows, p.b.columns / 2});
  Tensor gate_up = keeps ? torch::stable::new_empty(a, {num_rows, p.b.columns}) : torch::stable::new_empty(a, {0});
  p.out = view_operand("out", out, a, 2, true);
  p.gate_up = keeps ? data_of(gate_up) : nullptr;
  if (out.numel() > 0) FM_EXECUTE(moe_gated_mm, p, a);
  return {out, gate_up};
}

std::tuple<Tensor, Tensor, Tensor> moe_gated_backward(const Tensor& grad_inner, const Tensor& gate_up,
                                                      const std::optional<Tensor>& pos_to_token,
                                                      const std::optional<Tensor>& token_topk_to_pos,
                                                      const std::optional<Tensor>& topk_weights, bool interleaved) {
  MoeGatedBackwardParams p{};
  p.dtype = dtype_of("grad_inner", grad_inner);
  p.is_interleaved = interleaved;
  const MoeRows grad = view_matrix("grad_inner", grad_inner, grad_inner);
  const MoeRows kept = view_matrix("gate_up", gate_up, grad_inner);
  p.num_rows = grad_inner.size(0);
  p.width = grad_inner.size(1);
  check_extent("grad_inner.size(1)", p.width);
  check_size("gate_up", gate_up, 0, p.num_rows);
  check_size("gate_up", gate_up, 1, 2 * p.width);
  FM_CHECK(p.num_rows <= 1 || p.width == 0 || kept.stride == 2 * p.width, "gate_up must be contiguous");
  p.grad_inner = grad.data;
  p.grad_stride = grad.stride;
  p.gate_up = kept.data;
  FM_CHECK(token_topk_to_pos.has_value() == topk_weights.has_value() &&
               (pos_to_token.has_value() || !topk_weights.has_value()),
           "topk_weights must come with pos_to_token and token_topk_to_pos, and token_topk_to_pos with topk_weights");
  int64_t num_tokens = kMaxRows;
  if (topk_weights.has_value()) {
    check_rank("token_topk_to_pos", *token_topk_to_pos, 2);
    num_tokens = p.num_tokens = token_topk_to_pos->size(0);
    p.num_topk = token_topk_to_pos->size(1);
    FM_CHECK(p.num_tokens < kMaxRows, "token_topk_to_pos must have fewer than 2^31 rows, got ", p.num_tokens);
    FM_CHECK(p.num_topk <= kMaxTopk, "token_topk_to_pos must have at most ", kMaxTopk, " columns, got ", p.num_topk);
    p.token_topk_to_pos = view_positions("token_topk_to_pos", *token_topk_to_pos, grad_inner, p.num_rows);
    p.weights = view_weights(*topk_weights, *token_topk_to_pos, grad_inner);
    p.weights_stride = stride_of(*topk_weights, 0);
  }
  if (pos_to_token.has_value()) {
    check_rank("pos_to_token", *pos_to_token, 1);
    check_size("pos_to_token", *pos_to_token, 0, p.num_rows);
    p.pos_to_token = view_positions("pos_to_token", *pos_to_token, grad_inner, num_tokens);
  }
  const bool weighted = topk_weights.has_value();
  Tensor grad_gate_up = torch::stable::new_empty(grad_inner, {p.num_rows, 2 * p.width});
  Tensor inner = weighted ? torch::stable::new_empty(grad_inner, {p.num_rows, p.width})
                          : torch::stable::new_empty(grad_inner, {0});
  Tensor grad_weights = weighted ? torch::stable::new_zeros(*topk_weights, {p.num_tokens, p.num_topk})
                                 : torch::stable::new_empty(grad_inner, {0}, ScalarType::Float);
  p.grad_gate_up = data_of(grad_gate_up);
  p.inner = weighted ? data_of(inner) : nullptr;
  p.grad_weights = weighted ? static_cast<float*>(data_of(grad_weights)) : nullptr;
  if (grad_gate_up.numel() > 0) FM_EXECUTE(moe_gated_backward, p, grad_inner);
  return {grad_gate_up, inner, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) {
  m.impl("moe_gated_mm", TORCH_BOX(&moe_gated_mm));
  m.impl("moe_gated_backward", TORCH_BOX(&moe_gated_backward));
}

}  // namespace fmkernels
