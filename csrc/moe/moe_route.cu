// SPDX-License-Identifier: Apache-2.0
// moe_route.cu: the experts of each token and their weights, and the gradient of the logits.
//
// Contract   see moe_route.h. Any number of experts to 1024, num_topk to 32 (backward: any); kPer * 32 is at least the experts.
// Work       a warp per token. Lane l has the experts l, l + 32, ... as integer keys in registers; num_topk times the warp
//            takes the largest, the lower id among equals. Lane k then has choice k, and computes its weight.
// Shared     none.
// Numerics   float32; sums over lanes in a fixed order: a token's result depends on its logits alone. Deterministic.
// Cost       the logits once; num_topk * kPer comparisons a lane.

#include "moe_route.h"

#include "../common/dispatch.h"
#include "../common/launch.h"
#include "../common/vector_cuda.h"
#include "moe_warp_cuda.h"

namespace fmkernels {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

// The largest key of a warp and the lowest expert that has it; `own` in each lane its experts' keys.
struct Winner {
  uint32_t key;
  int expert;
};
template <int kPer>
__device__ __forceinline__ Winner largest(const uint32_t (&own)[kPer]) {
  uint32_t best = 0;
  int at = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (own[i] > best) best = own[i], at = i;
  }
  const uint32_t key = __reduce_max_sync(ptx::kAllLanes, best);
  const int expert = at * kWarp + threadIdx.x % kWarp;
  return {key, static_cast<int>(__reduce_min_sync(ptx::kAllLanes, best == key ? expert : 0x7fffffff))};
}

// Not to be had from now on.
template <int kPer>
__device__ __forceinline__ void remove(uint32_t (&own)[kPer], int expert) {
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (i * kWarp + static_cast<int>(threadIdx.x % kWarp) == expert) own[i] = 0;
  }
}

// Leaves the experts of the best groups. Lane g has the score of group g.
template <int kPer>
__device__ __forceinline__ void limit_to_groups(const MoeRouteParams& p, uint32_t (&keys)[kPer]) {
  const int lane = threadIdx.x % kWarp, size = p.group_size.value();
  uint32_t score = 0;
#pragma unroll 1
  for (int group = 0; group < p.num_groups; ++group) {
    uint32_t members[kPer];
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      members[i] = static_cast<unsigned>(i * kWarp + lane - group * size) < static_cast<unsigned>(size) ? keys[i] : 0;
    }
    float sum = 0.0f;
    uint32_t found = 0;
#pragma unroll 1
    for (int n = 0; n < p.group_best; ++n) {
      const Winner winner = largest(members);
      if (winner.key == 0) break;
      sum = found == 0 ? value_of(winner.key) : sum + value_of(winner.key);
      found = 1;
      remove(members, winner.expert);
    }
    if (lane == group && found != 0) score = key_of(sum);
  }
  uint32_t allowed = 0;
  for (int n = 0; n < p.topk_groups; ++n) {
    const uint32_t best = __reduce_max_sync(ptx::kAllLanes, score);
    if (best == 0) break;
    const int group = static_cast<int>(__reduce_min_sync(ptx::kAllLanes, score == best ? lane : kWarp));
    allowed |= 1u << group;
    if (lane == group) score = 0;
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int expert = i * kWarp + lane;
    if (expert < p.logits.num_experts && (allowed >> (expert / p.group_size) & 1) == 0) keys[i] = 0;
  }
}

template <int kPer>
__global__ void __launch_bounds__(kThreads) moe_route_kernel(MoeRouteParams p) {
  const int lane = threadIdx.x % kWarp, num_experts = p.logits.num_experts;
  const int64_t token = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (token >= p.logits.num_tokens) return;  // whole warps: below, all lanes of one work together
  const LogitRow row(p.logits, token);

  // The logits as keys; their largest, and the sum of their exponentials where it is of use.
  uint32_t keys[kPer];
  bool is_nan = false;
  float max = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int expert = i * kWarp + lane;
    const float x = expert < num_experts ? row.raw(expert) : -INFINITY;
    is_nan = is_nan || x != x;
    keys[i] = key_of(fminf(x, kLargestFloat));
    max = fmaxf(max, fminf(x, kLargestFloat));
  }
  const bool by_score = p.bias != nullptr || (p.num_groups > 1 && p.group_best > 1);
  float inverse = 1.0f;
  if (p.scoring == MoeScoring::kSoftmax && (by_score || !p.renormalize)) {
    max = warp_max(max);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPer; ++i) sum += keys[i] != 0 ? expf(value_of(keys[i]) - max) : 0.0f;
    inverse = 1.0f / warp_sum(sum);
  }
  const auto score = [&](float x) {
    return p.scoring == MoeScoring::kSoftmax ? expf(x - max) * inverse : score_of(p.scoring, x);
  };
  if (by_score) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int expert = i * kWarp + lane;
      const float bias = p.bias != nullptr && expert < num_experts ? p.bias[expert] : 0.0f;
      is_nan = is_nan || bias != bias;
      if (keys[i] != 0) keys[i] = key_of(fminf(score(value_of(keys[i])) + bias, kLargestFloat));
    }
  }
  is_nan = __any_sync(ptx::kAllLanes, is_nan);

  // The choices, one after another; lane k keeps choice k.
  if (p.num_groups > 1) limit_to_groups(p, keys);
  int chosen = -1;
#pragma unroll 1
  for (int k = 0; k < p.num_topk && !is_nan; ++k) {
    const Winner winner = largest(keys);
    if (winner.key == 0) break;
    if (lane == k) chosen = winner.expert;
    remove(keys, winner.expert);
  }

  // Their weights.
  const float x = chosen >= 0 ? row.clamped(chosen) : 0.0f;
  float weight = 0.0f;
  if (p.renormalize) {
    const float log = chosen >= 0 ? log_score(p.scoring, x) : -INFINITY, largest_log = warp_max(log);
    weight = chosen >= 0 ? expf(log - largest_log) : 0.0f;
    const float sum = warp_sum(weight);
    if (chosen >= 0) weight /= sum;
  } else if (chosen >= 0) {
    weight = score(x);
  }
  if (lane < p.num_topk) {
    p.topk_idx[token * p.num_topk + lane] = chosen;
    p.topk_weights[token * p.num_topk + lane] = weight;
  }
}

__global__ void __launch_bounds__(kThreads) moe_route_backward_kernel(MoeRouteBackwardParams p) {
  const int lane = threadIdx.x % kWarp, num_experts = p.logits.num_experts;
  const int num_topk = static_cast<int>(p.num_topk);
  const int64_t token = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (token >= p.logits.num_tokens) return;  // whole warps
  const LogitRow row(p.logits, token);
  const int32_t* idx = p.topk_idx + token * p.num_topk;
  const float* weights = p.topk_weights + token * p.num_topk;
  const float* grads = p.grad_weights + token * p.grad_stride;
  const auto expert_at = [&](int k) { return idx[k] < num_experts ? idx[k] : -1; };

  float dot = 0.0f;
  bool has_expert = false;
  for (int k = lane; k < num_topk; k += kWarp) {
    if (expert_at(k) < 0) continue;
    has_expert = true;
    dot += weights[k] * grads[k];
  }
  dot = warp_sum(dot);
  has_expert = __any_sync(ptx::kAllLanes, has_expert);

  // Where no expert is chosen: 0, but of softmax without renormalisation, whose sum is over all.
  const bool is_dense = has_expert && p.scoring == MoeScoring::kSoftmax && !p.renormalize;
  const LogSum over = is_dense ? row.log_sum(MoeScoring::kSoftmax) : LogSum{};
  for (int e = lane; e < num_experts; e += kWarp) {
    const float x = is_dense ? row.raw(e) : INFINITY;
    const float grad = x != INFINITY ? -dot * over.share(x) : 0.0f;
    store_logit(p.logits.dtype, p.grad_logits, token * num_experts + e, grad);
  }
  __syncwarp();  // before the chosen ones are written over
  for (int k = lane; k < num_topk; k += kWarp) {
    const int expert = expert_at(k);
    if (expert < 0) continue;
    const float x = row.raw(expert);
    float grad = grads[k];
    if (p.renormalize || p.scoring == MoeScoring::kSoftmax) grad = weights[k] * (grad - dot);
    grad *=
        p.renormalize || p.scoring == MoeScoring::kSoftmax ? log_score_slope(p.scoring, x) : score_slope(p.scoring, x);
    store_logit(p.logits.dtype, p.grad_logits, token * num_experts + expert, x == INFINITY ? 0.0f : grad);
  }
}

}  // namespace

void launch_moe_route(const MoeRouteParams& p, cudaStream_t stream) {
  const char* name = "moe.route";
  const dim3 grid = grid_of(name, p.logits.num_tokens, kWarps);
  int per = 2;
  while (per * kWarp < p.logits.num_experts) per *= 2;
  dispatch_int<2, 4, 8, 16, 32>("experts of a lane", per, [&]<int kPer>() {
    launch(name, moe_route_kernel<kPer>, grid, kThreads, 0, stream, p);
  });
}

void launch_moe_route_backward(const MoeRouteBackwardParams& p, cudaStream_t stream) {
  const char* name = "moe.route";
  launch(name, moe_route_backward_kernel, grid_of(name, p.logits.num_tokens, kWarps), kThreads, 0, stream, p);
}

}  // namespace fmkernels
