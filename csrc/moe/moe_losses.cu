// SPDX-License-Identifier: Apache-2.0
// moe_losses.cu: the losses that balance the experts, and their gradients.
//
// Contract   see moe_route.h. Numbers that lie on the device stay there: nothing waits for it.
// Work       A warp per token. Balance: a block adds up the shares of kBalanceTokens tokens in shared memory, a warp an array,
//            and counts their experts; then a warp per expert adds up the blocks; one block makes the loss of that. z loss:
//            one block adds up the squares. The gradients compute a token's shares again.
// Shared     struct BalanceSmem.
// Numerics   float32; every sum has a fixed order, and only counts are added by atomics. Deterministic.
// Cost       the logits once from memory, and three times from the cache.

#include "moe_route.h"

#include "../common/launch.h"
#include "moe_warp_cuda.h"

namespace fmkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kWarpTokens = kBalanceTokens / kWarps;
static_assert(kBalanceTokens % kWarps == 0, "a warp has whole tokens");

struct BalanceSmem {
  float share[kWarps][kMaxExperts];
  int32_t count[kMaxExperts + 1];
};
struct SumSmem {
  float warp[kWarps];
};

__device__ __forceinline__ int64_t own_token() { return int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; }

// Whether a token has an expert, in every lane of its warp.
__device__ __forceinline__ bool has_expert(const int32_t* idx, int64_t num_topk, int num_experts) {
  bool found = false;
  for (int64_t k = threadIdx.x % kWarp; k < num_topk; k += kWarp)
    found = found || (idx[k] >= 0 && idx[k] < num_experts);
  return __any_sync(ptx::kAllLanes, found);
}

// Sum over the block, in thread 0.
__device__ __forceinline__ float block_sum(float x, SumSmem& smem) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) smem.warp[threadIdx.x / kWarp] = x;
  __syncthreads();  // every warp has written
  for (int warp = 1; warp < kWarps; ++warp) x += smem.warp[warp];
  return x;
}

__global__ void __launch_bounds__(kThreads) moe_balance_partial_kernel(MoeBalanceParams p) {
  auto& smem = dynamic_smem<BalanceSmem>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_experts = p.logits.num_experts;
  for (int e = lane; e < num_experts; e += kWarp) smem.share[warp][e] = 0.0f;
  for (int e = threadIdx.x; e <= num_experts; e += kThreads) smem.count[e] = 0;
  __syncthreads();  // the counters are cleared
#pragma unroll 1
  for (int i = 0; i < kWarpTokens; ++i) {
    const int64_t token = int64_t{blockIdx.x} * kBalanceTokens + warp * kWarpTokens + i;
    if (token >= p.logits.num_tokens) break;
    const int32_t* idx = p.topk_idx + token * p.num_topk;
    if (!has_expert(idx, p.num_topk, num_experts)) continue;
    for (int64_t k = lane; k < p.num_topk; k += kWarp) {
      if (idx[k] >= 0 && idx[k] < num_experts) atomicAdd(&smem.count[idx[k]], 1);
    }
    if (lane == 0) atomicAdd(&smem.count[num_experts], 1);
    const LogitRow row(p.logits, token);
    const LogSum over = row.log_sum(p.scoring);
    for (int e = lane; e < num_experts; e += kWarp) smem.share[warp][e] += over.share(row.log_score_at(p.scoring, e));
  }
  __syncthreads();  // all tokens of the block are added
  for (int e = threadIdx.x; e <= num_experts; e += kThreads) {
    p.partial_counts[int64_t{blockIdx.x} * (num_experts + 1) + e] = smem.count[e];
    if (e == num_experts) continue;
    float sum = smem.share[0][e];
    for (int w = 1; w < kWarps; ++w) sum += smem.share[w][e];
    p.partial_scores[int64_t{blockIdx.x} * num_experts + e] = sum;
  }
}

// To the row behind those of the blocks.
__global__ void __launch_bounds__(kThreads) moe_balance_total_kernel(MoeBalanceParams p) {
  const int lane = threadIdx.x % kWarp, num_experts = p.logits.num_experts;
  const int e = static_cast<int>(own_token());
  if (e > num_experts) return;  // whole warps
  const int64_t blocks = balance_blocks(p.logits.num_tokens);
  int count = 0;
  float sum = 0.0f;
  for (int64_t block = lane; block < blocks; block += kWarp) {
    count += p.partial_counts[block * (num_experts + 1) + e];
    if (e < num_experts) sum += p.partial_scores[block * num_experts + e];
  }
  count = __reduce_add_sync(ptx::kAllLanes, count);
  sum = warp_sum(sum);
  if (lane != 0) return;
  p.partial_counts[blocks * (num_experts + 1) + e] = count;
  if (e < num_experts) p.partial_scores[blocks * num_experts + e] = sum;
}

__global__ void __launch_bounds__(kThreads) moe_balance_loss_kernel(MoeBalanceParams p) {
  auto& smem = dynamic_smem<SumSmem>();
  const int num_experts = p.logits.num_experts;
  const int64_t blocks = balance_blocks(p.logits.num_tokens);
  const int32_t* counts = p.partial_counts + blocks * (num_experts + 1);
  const float* scores = p.partial_scores + blocks * num_experts;
  float num_slots = 0.0f, loss = 0.0f;  // exact below 2^24, and rounded alike in every thread above
  for (int e = 0; e < num_experts; ++e) num_slots += static_cast<float>(counts[e]);
  const float num_tokens = static_cast<float>(counts[num_experts]);
  for (int e = threadIdx.x; e < num_experts; e += kThreads) {
    const float share = num_slots == 0.0f ? 0.0f : static_cast<float>(counts[e]) / num_slots;
    const float coefficient = num_slots == 0.0f ? 0.0f : share * static_cast<float>(num_experts) / num_tokens;
    p.coefficients[e] = coefficient;
    if (num_slots != 0.0f) loss += coefficient * scores[e];
  }
  loss = block_sum(loss, smem);
  if (threadIdx.x == 0) *p.loss = loss;
}

__global__ void __launch_bounds__(kThreads) moe_balance_backward_kernel(MoeBalanceBackwardParams p) {
  const int lane = threadIdx.x % kWarp, num_experts = p.logits.num_experts;
  const int64_t token = own_token();
  if (token >= p.logits.num_tokens) return;  // whole warps
  const bool counts = has_expert(p.topk_idx + token * p.num_topk, p.num_topk, num_experts);
  const LogitRow row(p.logits, token);
  float mean = 0.0f;
  LogSum over{};
  if (counts) {
    over = row.log_sum(p.scoring);
    for (int e = lane; e < num_experts; e += kWarp) {
      mean += over.share(row.log_score_at(p.scoring, e)) * p.coefficients[e];
    }
    mean = warp_sum(mean);
  }
  for (int e = lane; e < num_experts; e += kWarp) {
    const float x = row.raw(e);
    float grad = 0.0f;
    if (counts && x != INFINITY) {
      grad = *p.grad * over.share(row.log_score_at(p.scoring, e)) * (p.coefficients[e] - mean);
      grad *= log_score_slope(p.scoring, x);
    }
    store_logit(p.logits.dtype, p.grad_logits, token * num_experts + e, grad);
  }
}

__global__ void __launch_bounds__(kThreads) moe_z_loss_lse_kernel(MoeZLossParams p) {
  const int64_t token = own_token();
  if (token >= p.logits.num_tokens) return;  // whole warps
  const LogSum over = LogitRow(p.logits, token).log_sum(MoeScoring::kSoftmax);
  const float lse = over.inverse_sum == 0.0f ? -INFINITY : over.max - logf(over.inverse_sum);
  if (threadIdx.x % kWarp == 0) p.lse[token] = lse;
}

__global__ void __launch_bounds__(kThreads) moe_z_loss_kernel(MoeZLossParams p) {
  auto& smem = dynamic_smem<SumSmem>();
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t token = threadIdx.x; token < p.logits.num_tokens; token += kThreads) {
    sum += p.lse[token] * p.lse[token];
  }
  sum = block_sum(sum, smem);
  if (threadIdx.x == 0) *p.loss = p.logits.num_tokens == 0 ? 0.0f : sum / static_cast<float>(p.logits.num_tokens);
}

__global__ void __launch_bounds__(kThreads) moe_z_loss_backward_kernel(MoeZLossBackwardParams p) {
  const int num_experts = p.logits.num_experts;
  const int64_t token = own_token();
  if (token >= p.logits.num_tokens) return;  // whole warps
  const LogitRow row(p.logits, token);
  const float lse = p.lse[token], factor = *p.grad * 2.0f * lse / static_cast<float>(p.logits.num_tokens);
  for (int e = threadIdx.x % kWarp; e < num_experts; e += kWarp) {
    const float x = row.raw(e);
    store_logit(p.logits.dtype, p.grad_logits, token * num_experts + e, x == INFINITY ? 0.0f : factor * expf(x - lse));
  }
}

}  // namespace

void launch_moe_balance(const MoeBalanceParams& p, cudaStream_t stream) {
  const char* name = "moe.load_balance_loss";
  const int64_t blocks = balance_blocks(p.logits.num_tokens);
  if (blocks > 0) {
    launch(name, moe_balance_partial_kernel, dim3(static_cast<unsigned>(blocks)), kThreads, sizeof(BalanceSmem), stream,
           p);
  }
  launch(name, moe_balance_total_kernel, grid_of(name, p.logits.num_experts + 1, kWarps), kThreads, 0, stream, p);
  launch(name, moe_balance_loss_kernel, dim3(1), kThreads, sizeof(SumSmem), stream, p);
}

void launch_moe_balance_backward(const MoeBalanceBackwardParams& p, cudaStream_t stream) {
  const char* name = "moe.load_balance_loss";
  launch(name, moe_balance_backward_kernel, grid_of(name, p.logits.num_tokens, kWarps), kThreads, 0, stream, p);
}

void launch_moe_z_loss(const MoeZLossParams& p, cudaStream_t stream) {
  const char* name = "moe.z_loss";
  if (p.logits.num_tokens > 0) {
    launch(name, moe_z_loss_lse_kernel, grid_of(name, p.logits.num_tokens, kWarps), kThreads, 0, stream, p);
  }
  launch(name, moe_z_loss_kernel, dim3(1), kThreads, sizeof(SumSmem), stream, p);
}

void launch_moe_z_loss_backward(const MoeZLossBackwardParams& p, cudaStream_t stream) {
  const char* name = "moe.z_loss";
  launch(name, moe_z_loss_backward_kernel, grid_of(name, p.logits.num_tokens, kWarps), kThreads, 0, stream, p);
}

}  // namespace fmkernels
