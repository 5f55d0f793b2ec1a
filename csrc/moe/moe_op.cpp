// SPDX-License-Identifier: Apache-2.0
// The mapping, permute and combine of a mixture of experts: tensors in, checks, Params out.
#include "moe.h"
#include "moe_mapping_views.h"

namespace fmkernels {
namespace {

std::tuple<Tensor, Tensor, Tensor> moe_build_mapping(const Tensor& topk_idx, int64_t num_experts, int64_t alignment,
                                                     int64_t num_rows) {
  const Mapping mapping = view_mapping(topk_idx, num_experts, alignment, num_rows);
  FM_EXECUTE(moe_mapping, mapping.p, topk_idx);
  return {mapping.pos_to_token, mapping.token_topk_to_pos, mapping.expert_offsets};
}

Tensor moe_permute(const Tensor& x, const Tensor& pos_to_token) {
  MoePermuteParams p{};
  p.dtype = dtype_of("x", x);
  p.x = view_matrix("x", x, x);
  p.num_tokens = x.size(0);
  p.hidden = x.size(1);
  check_rank("pos_to_token", pos_to_token, 1);
  p.num_rows = pos_to_token.size(0);
  p.pos_to_token = view_positions("pos_to_token", pos_to_token, x, p.num_tokens);
  Tensor y = torch::stable::new_empty(x, {p.num_rows, p.hidden});
  p.y = view_matrix("y", y, x);
  if (y.numel() > 0) FM_EXECUTE(moe_permute, p, x);
  return y;
}

template <class Params>
void view_combined(Params& p, const Tensor& y, const Tensor& token_topk_to_pos) {
  p.dtype = dtype_of("y", y);
  p.y = view_matrix("y", y, y);
  p.num_rows = y.size(0);
  p.hidden = y.size(1);
  check_rank("token_topk_to_pos", token_topk_to_pos, 2);
  p.num_tokens = token_topk_to_pos.size(0);
  p.num_topk = token_topk_to_pos.size(1);
  FM_CHECK(p.num_topk <= kMaxTopk, "token_topk_to_pos must have at most ", kMaxTopk, " columns, got ", p.num_topk);
  p.token_topk_to_pos = view_positions("token_topk_to_pos", token_topk_to_pos, y, p.num_rows);
}

Tensor moe_combine(const Tensor& y, const Tensor& token_topk_to_pos, const std::optional<Tensor>& topk_weights) {
  MoeCombineParams p{};
  view_combined(p, y, token_topk_to_pos);
  if (topk_weights.has_value()) {
    p.weights = view_weights(*topk_weights, token_topk_to_pos, y);
    p.weights_stride = stride_of(*topk_weights, 0);
  }
  Tensor out = torch::stable::new_empty(y, {p.num_tokens, p.hidden});
  p.out = view_matrix("out", out, y);
  if (out.numel() > 0) FM_EXECUTE(moe_combine, p, y);
  return out;
}

std::tuple<Tensor, Tensor> moe_combine_backward(const Tensor& grad, const Tensor& y, const Tensor& pos_to_token,
                                                const Tensor& token_topk_to_pos, const Tensor& topk_weights) {
  MoeCombineBackwardParams p{};
  view_combined(p, y, token_topk_to_pos);
  p.grad = view_matrix("grad", grad, y);
  check_size("grad", grad, 0, p.num_tokens);
  check_size("grad", grad, 1, p.hidden);
  check_rank("pos_to_token", pos_to_token, 1);
  check_size("pos_to_token", pos_to_token, 0, p.num_rows);
  p.pos_to_token = view_positions("pos_to_token", pos_to_token, y, p.num_tokens);
  p.weights = view_weights(topk_weights, token_topk_to_pos, y);
  p.weights_stride = stride_of(topk_weights, 0);
  Tensor grad_y = torch::stable::new_empty(y, {p.num_rows, p.hidden});
  Tensor grad_weights = torch::stable::new_zeros(topk_weights, {p.num_tokens, p.num_topk});
  p.grad_y = view_matrix("grad_y", grad_y, y);
  p.grad_weights = static_cast<float*>(data_of(grad_weights));
  if (grad_y.numel() > 0) FM_EXECUTE(moe_combine_backward, p, y);
  return {grad_y, grad_weights};
}

Tensor moe_capacity(const Tensor& topk_idx, const std::optional<Tensor>& topk_weights, int64_t num_experts,
                    int64_t capacity) {
  FM_CHECK(capacity >= 0, "capacity must be at least 0, got ", capacity);
  const Mapping mapping = view_mapping(topk_idx, num_experts, 1, -1);
  MoeCapacityParams p{};
  p.mapping = mapping.p;
  p.capacity = capacity;
  const bool by_weight = topk_weights.has_value();
  if (by_weight) {
    p.topk_weights = view_weights(*topk_weights, mapping.token_topk_to_pos, topk_idx);
    p.weights_stride = stride_of(*topk_weights, 0);
  }
  const Tensor keys = torch::stable::new_empty(topk_idx, {by_weight ? p.mapping.num_slots : 0}, ScalarType::Int);
  const Tensor cuts = torch::stable::new_empty(topk_idx, {by_weight ? 2 * num_experts : 0}, ScalarType::Int);
  p.keys = static_cast<uint32_t*>(data_of(keys));
  p.cuts = static_cast<MoeCut*>(data_of(cuts));
  Tensor kept_idx = torch::stable::new_empty(topk_idx, {topk_idx.size(0), topk_idx.size(1)}, ScalarType::Int);
  p.kept_idx = static_cast<int32_t*>(data_of(kept_idx));
  if (kept_idx.numel() > 0) {
    FM_EXECUTE(moe_mapping, p.mapping, topk_idx);
    FM_EXECUTE(moe_capacity, p, topk_idx);
  }
  return kept_idx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) {
  m.impl("moe_build_mapping", TORCH_BOX(&moe_build_mapping));
  m.impl("moe_permute", TORCH_BOX(&moe_permute));
  m.impl("moe_combine", TORCH_BOX(&moe_combine));
  m.impl("moe_combine_backward", TORCH_BOX(&moe_combine_backward));
  m.impl("moe_capacity", TORCH_BOX(&moe_capacity));
}

}  // namespace fmkernels
