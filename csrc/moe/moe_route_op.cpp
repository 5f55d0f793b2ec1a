// SPDX-License-Identifier: Apache-2.0
// The routing of a mixture of experts: tensors in, checks, Params out.
#include "moe_route.h"
#include "moe_views.h"

namespace fmkernels {
namespace {

std::tuple<Tensor, Tensor> moe_route(const Tensor& logits, const std::optional<Tensor>& bias, int64_t num_topk,
                                     int64_t scoring, bool renormalize, int64_t num_groups, int64_t topk_groups,
                                     int64_t group_best) {
  MoeRouteParams p{};
  p.logits = view_logits(logits);
  p.scoring = scoring_of(scoring);
  p.renormalize = renormalize;
  const int64_t num_experts = p.logits.num_experts;
  FM_CHECK(num_groups >= 1 && num_groups <= kMaxGroups && num_experts % num_groups == 0, "num_groups must divide the ",
           num_experts, " experts and be at most ", kMaxGroups, ", got ", num_groups);
  FM_CHECK(topk_groups >= 1 && topk_groups <= num_groups, "topk_groups must be from 1 to num_groups, got ",
           topk_groups);
  const int64_t group_size = num_experts / num_groups, available = group_size * topk_groups;
  const int64_t largest = available < kMaxRoutedTopk ? available : kMaxRoutedTopk;
  FM_CHECK(num_topk >= 1 && num_topk <= largest, "num_topk must be from 1 to ", largest, ", got ", num_topk);
  FM_CHECK(group_best >= 1 && group_best <= kMaxRoutedTopk, "group_best must be from 1 to ", kMaxRoutedTopk, ", got ",
           group_best);
  if (bias.has_value()) {
    p.bias = view_vector<float>("bias", *bias, logits, ScalarType::Float, "float32", num_experts);
  }
  p.num_topk = static_cast<int>(num_topk);
  p.num_groups = static_cast<int>(num_groups);
  p.topk_groups = static_cast<int>(topk_groups);
  p.group_best = static_cast<int>(group_best < group_size ? group_best : group_size);
  p.group_size = Divisor(static_cast<int32_t>(group_size));
  Tensor topk_weights = torch::stable::new_empty(logits, {p.logits.num_tokens, num_topk}, ScalarType::Float);
  Tensor topk_idx = torch::stable::new_empty(logits, {p.logits.num_tokens, num_topk}, ScalarType::Int);
  p.topk_weights = static_cast<float*>(data_of(topk_weights));
  p.topk_idx = static_cast<int32_t*>(data_of(topk_idx));
  if (topk_idx.numel() > 0) FM_EXECUTE(moe_route, p, logits);
  return {topk_weights, topk_idx};
}

Tensor moe_route_backward(const Tensor& grad_weights, const Tensor& logits, const Tensor& topk_weights,
                          const Tensor& topk_idx, int64_t scoring, bool renormalize) {
  MoeRouteBackwardParams p{};
  p.logits = view_logits(logits);
  p.scoring = scoring_of(scoring);
  p.renormalize = renormalize;
  check_rank("topk_idx", topk_idx, 2);
  check_size("topk_idx", topk_idx, 0, p.logits.num_tokens);
  p.num_topk = topk_idx.size(1);
  p.topk_idx = view_positions("topk_idx", topk_idx, logits, p.logits.num_experts);
  for (const auto& [name, t] : {std::pair{"grad_weights", &grad_weights}, {"topk_weights", &topk_weights}}) {
    check_rank(name, *t, 2);
    check_scalar_type(name, *t, ScalarType::Float, "float32");
    check_same_device(name, *t, logits);
    check_last_dim_contiguous(name, *t);
    for (int64_t dim = 0; dim < 2; ++dim) check_size(name, *t, dim, topk_idx.size(dim));
  }
  FM_CHECK(topk_weights.size(0) <= 1 || topk_weights.stride(0) == p.num_topk, "topk_weights must be contiguous");
  p.grad_weights = static_cast<const float*>(data_of(grad_weights));
  p.grad_stride = stride_of(grad_weights, 0);
  p.topk_weights = static_cast<const float*>(data_of(topk_weights));
  Tensor grad_logits = empty_contiguous(logits);
  p.grad_logits = data_of(grad_logits);
  if (grad_logits.numel() > 0) FM_EXECUTE(moe_route_backward, p, logits);
  return grad_logits;
}

// The experts of the tokens that count.
template <class Params>
void view_balance(Params& p, const Tensor& logits, const Tensor& topk_idx, int64_t scoring) {
  p.logits = view_logits(logits);
  p.scoring = scoring_of(scoring);
  check_rank("topk_idx", topk_idx, 2);
  check_size("topk_idx", topk_idx, 0, p.logits.num_tokens);
  FM_CHECK(topk_idx.numel() < kMaxRows, "topk_idx must have fewer than 2^31 elements, got ", topk_idx.numel());
  p.num_topk = topk_idx.size(1);
  p.topk_idx = view_positions("topk_idx", topk_idx, logits, p.logits.num_experts);
}

// One float32.
float* view_number(const char* name, const Tensor& t, const Tensor& like) {
  FM_CHECK(t.numel() == 1, name, " must be one number, got ", t.numel(), " elements");
  check_scalar_type(name, t, ScalarType::Float, "float32");
  check_same_device(name, t, like);
  return static_cast<float*>(data_of(t));
}

std::tuple<Tensor, Tensor> moe_load_balance(const Tensor& logits, const Tensor& topk_idx, int64_t scoring) {
  MoeBalanceParams p{};
  view_balance(p, logits, topk_idx, scoring);
  Tensor loss = torch::stable::new_empty(logits, {}, ScalarType::Float);
  Tensor coefficients = torch::stable::new_empty(logits, {p.logits.num_experts}, ScalarType::Float);
  p.loss = view_number("loss", loss, logits);
  p.coefficients = static_cast<float*>(data_of(coefficients));
#ifdef FM_CUDA
  const int64_t rows = balance_blocks(p.logits.num_tokens) + 1;
  const Tensor scores = torch::stable::new_empty(logits, {rows, p.logits.num_experts}, ScalarType::Float);
  const Tensor counts = torch::stable::new_empty(logits, {rows, p.logits.num_experts + 1}, ScalarType::Int);
  p.partial_scores = static_cast<float*>(data_of(scores));
  p.partial_counts = static_cast<int32_t*>(data_of(counts));
#endif
  FM_EXECUTE(moe_balance, p, logits);
  return {loss, coefficients};
}

Tensor moe_load_balance_backward(const Tensor& grad, const Tensor& logits, const Tensor& topk_idx,
                                 const Tensor& coefficients, int64_t scoring) {
  MoeBalanceBackwardParams p{};
  view_balance(p, logits, topk_idx, scoring);
  p.grad = view_number("grad", grad, logits);
  p.coefficients =
      view_vector<float>("coefficients", coefficients, logits, ScalarType::Float, "float32", p.logits.num_experts);
  Tensor grad_logits = empty_contiguous(logits);
  p.grad_logits = data_of(grad_logits);
  if (grad_logits.numel() > 0) FM_EXECUTE(moe_balance_backward, p, logits);
  return grad_logits;
}

std::tuple<Tensor, Tensor> moe_z_loss(const Tensor& logits) {
  MoeZLossParams p{};
  p.logits = view_logits(logits);
  Tensor loss = torch::stable::new_empty(logits, {}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(logits, {p.logits.num_tokens}, ScalarType::Float);
  p.loss = view_number("loss", loss, logits);
  p.lse = static_cast<float*>(data_of(lse));
  FM_EXECUTE(moe_z_loss, p, logits);
  return {loss, lse};
}

Tensor moe_z_loss_backward(const Tensor& grad, const Tensor& logits, const Tensor& lse) {
  MoeZLossBackwardParams p{};
  p.logits = view_logits(logits);
  p.grad = view_number("grad", grad, logits);
  p.lse = view_vector<float>("lse", lse, logits, ScalarType::Float, "float32", p.logits.num_tokens);
  Tensor grad_logits = empty_contiguous(logits);
  p.grad_logits = data_of(grad_logits);
  if (grad_logits.numel() > 0) FM_EXECUTE(moe_z_loss_backward, p, logits);
  return grad_logits;
}

std::tuple<Tensor, Tensor> moe_route_expert_choice(const Tensor& logits, int64_t capacity, int64_t scoring) {
  MoeChoiceParams p{};
  p.logits = view_logits(logits);
  p.scoring = scoring_of(scoring);
  FM_CHECK(capacity >= 0, "capacity must be at least 0, got ", capacity);
  const int64_t num_tokens = p.logits.num_tokens, num_experts = p.logits.num_experts;
  FM_CHECK(num_tokens * num_experts < kMaxRows, "logits must have fewer than 2^31 elements, got ",
           num_tokens * num_experts);
  p.capacity = capacity;
  const Tensor keys = torch::stable::new_empty(logits, {num_experts, num_tokens}, ScalarType::Int);
  const Tensor cuts = torch::stable::new_empty(logits, {num_experts, 2}, ScalarType::Int);
  p.keys = static_cast<uint32_t*>(data_of(keys));
  p.cuts = static_cast<MoeCut*>(data_of(cuts));
  Tensor topk_weights = torch::stable::new_empty(logits, {num_tokens, num_experts}, ScalarType::Float);
  Tensor topk_idx = torch::stable::new_empty(logits, {num_tokens, num_experts}, ScalarType::Int);
  p.topk_weights = static_cast<float*>(data_of(topk_weights));
  p.topk_idx = static_cast<int32_t*>(data_of(topk_idx));
  if (num_tokens > 0) FM_EXECUTE(moe_choice, p, logits);
  return {topk_weights, topk_idx};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) {
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_route_backward", TORCH_BOX(&moe_route_backward));
  m.impl("moe_load_balance", TORCH_BOX(&moe_load_balance));
  m.impl("moe_load_balance_backward", TORCH_BOX(&moe_load_balance_backward));
  m.impl("moe_z_loss", TORCH_BOX(&moe_z_loss));
  m.impl("moe_z_loss_backward", TORCH_BOX(&moe_z_loss_backward));
  m.impl("moe_route_expert_choice", TORCH_BOX(&moe_route_expert_choice));
}

}  // namespace fmkernels
