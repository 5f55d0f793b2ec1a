// SPDX-License-Identifier: Apache-2.0
// Routing of a mixture of experts: the experts of each token, or the tokens of each expert, and the losses that balance.
//
//   score     s(x) of a logit x: softmax over the experts, sigmoid, or sqrt(softplus)
//   route     the num_topk experts of the highest score + bias, lower ids first among equals; without a bias, and without
//             sums over groups, they are compared by their logits, with which every score rises
//   weights   s, or s / (sum of the chosen s); the latter is exp(g - max g) / (sum of such), g = log s, so that it is a
//             number however small all scores are
//   groups    experts in num_groups equal parts; a token may only use the topk_groups of the largest sums of their
//             group_best best, in falling order
// +inf counts as the largest float; -inf is never chosen; NaN among a token's logits or in the bias: the token has no
// expert. An entry without an expert is -1, with weight 0.
#pragma once

#include "moe.h"

namespace fmkernels {

constexpr int kMaxRoutedTopk = 32;
constexpr int kMaxGroups = 32;

enum class MoeScoring : int { kSoftmax, kSigmoid, kSqrtSoftplus };

struct MoeLogits {
  DType dtype;
  const void* data;  // [tokens, experts]
  int64_t stride;    // of a token
  int64_t num_tokens;
  int num_experts;
};

struct MoeRouteParams {
  MoeLogits logits;
  const float* bias;  // [experts], or null
  MoeScoring scoring;
  bool renormalize;
  int num_topk, num_groups, topk_groups, group_best;
  Divisor group_size;
  float* topk_weights;  // [tokens, topk], written
  int32_t* topk_idx;    // [tokens, topk], written
};
// Whether experts are compared by their scores.
inline bool compares_scores(const MoeRouteParams& p) {
  return p.bias != nullptr || (p.num_groups > 1 && p.group_best > 1);
}

struct MoeRouteBackwardParams {
  MoeLogits logits;
  MoeScoring scoring;
  bool renormalize;
  int64_t num_topk;
  const float* grad_weights;  // [tokens, topk]
  int64_t grad_stride;
  const float* topk_weights;  // [tokens, topk], contiguous
  const int32_t* topk_idx;    // [tokens, topk], contiguous; no expert twice
  void* grad_logits;          // [tokens, experts], contiguous, written
};

// loss = sum_e coefficient[e] * (sum over tokens of P), P the score over the sum of the token's scores, coefficient[e] =
// experts * (share of the slots that have e) / tokens. Tokens without an expert do not count.
struct MoeBalanceParams {
  MoeLogits logits;
  MoeScoring scoring;
  const int32_t* topk_idx;  // [tokens, topk], contiguous
  int64_t num_topk;
  float* loss;              // one number
  float* coefficients;      // [experts]
  float* partial_scores;    // CUDA: [blocks + 1, experts]
  int32_t* partial_counts;  // CUDA: [blocks + 1, experts + 1]; the last column counts tokens
};
struct MoeBalanceBackwardParams {
  MoeLogits logits;
  MoeScoring scoring;
  const int32_t* topk_idx;
  int64_t num_topk;
  const float* grad;  // one number
  const float* coefficients;
  void* grad_logits;  // contiguous, written
};
constexpr int kBalanceTokens = 64;  // of a block on CUDA
constexpr int64_t balance_blocks(int64_t num_tokens) { return (num_tokens + kBalanceTokens - 1) / kBalanceTokens; }

// loss = mean over tokens of lse^2, lse = log(sum_e exp(x)).
struct MoeZLossParams {
  MoeLogits logits;
  float* loss;  // one number
  float* lse;   // [tokens]
};
struct MoeZLossBackwardParams {
  MoeLogits logits;
  const float* grad;  // one number
  const float* lse;
  void* grad_logits;  // contiguous, written
};

// Of each expert's list of items, the `capacity` of the highest key, of equal keys the first ones: those with a key above
// the cut's, and those with the cut's key up to its last item. Key 0: not to be had.
struct MoeCut {
  uint32_t key;
  int32_t last;  // item of the list
};

FM_HOST_DEVICE bool is_kept(const MoeCut& cut, uint32_t key, int64_t item) {
  return key > cut.key || (key == cut.key && item <= cut.last);
}

// Items are tokens, keys their scores. The result is that of route with one column an expert.
struct MoeChoiceParams {
  MoeLogits logits;
  MoeScoring scoring;
  int64_t capacity;
  uint32_t* keys;       // [experts, tokens], of the scores
  MoeCut* cuts;         // [experts]
  float* topk_weights;  // [tokens, experts], written
  int32_t* topk_idx;    // [tokens, experts], written
};

// Items are the rows of a mapping without alignment.
struct MoeCapacityParams {
  MoeMappingParams mapping;  // made before
  int64_t capacity;
  const float* topk_weights;  // [tokens, topk], or null: the first items are kept
  int64_t weights_stride;
  uint32_t* keys;     // [rows]
  MoeCut* cuts;       // [experts]
  int32_t* kept_idx;  // [tokens, topk], written
};

template <Isa isa>
void run_moe_route(const MoeRouteParams& p);
template <Isa isa>
void run_moe_route_backward(const MoeRouteBackwardParams& p);
template <Isa isa>
void run_moe_balance(const MoeBalanceParams& p);
template <Isa isa>
void run_moe_balance_backward(const MoeBalanceBackwardParams& p);
template <Isa isa>
void run_moe_z_loss(const MoeZLossParams& p);
template <Isa isa>
void run_moe_z_loss_backward(const MoeZLossBackwardParams& p);
template <Isa isa>
void run_moe_choice(const MoeChoiceParams& p);
template <Isa isa>
void run_moe_capacity(const MoeCapacityParams& p);

void launch_moe_route(const MoeRouteParams& p, cudaStream_t stream);
void launch_moe_route_backward(const MoeRouteBackwardParams& p, cudaStream_t stream);
void launch_moe_balance(const MoeBalanceParams& p, cudaStream_t stream);
void launch_moe_balance_backward(const MoeBalanceBackwardParams& p, cudaStream_t stream);
void launch_moe_z_loss(const MoeZLossParams& p, cudaStream_t stream);
void launch_moe_z_loss_backward(const MoeZLossBackwardParams& p, cudaStream_t stream);
void launch_moe_choice(const MoeChoiceParams& p, cudaStream_t stream);
void launch_moe_capacity(const MoeCapacityParams& p, cudaStream_t stream);

}  // namespace fmkernels
