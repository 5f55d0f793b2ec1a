// SPDX-License-Identifier: Apache-2.0
// moe_choice.cu: the tokens that an expert takes, where experts choose and where their capacity is limited.
//
// Contract   see moe_route.h. The kept items are those of a full sort, ties by place; none is sorted.
// Work       keys: of every item, laid out expert by expert, which a block turns in shared memory for 8 tokens at a time. cut: a
//            block per expert finds the last key that is kept, a radix select of 4 digits, and the place of the last item that
//            has it. apply: 8 tokens a block again, turned back.
// Shared     structs CutSmem and TurnSmem.
// Numerics   integers, but for the scores; atomics only count. Deterministic.
// Cost       the keys of an expert five times at most, from L2.

#include "moe_route.h"

#include "../common/block_sum_cuda.h"
#include "../common/launch.h"
#include "moe_warp_cuda.h"

namespace fmkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kDigits = 256;
constexpr int kDigitBits = 8;
static_assert(kDigits == kThreads, "a thread per digit");

struct CutSmem {
  BlockSum<kWarps> block;
  int32_t count[kDigits];
  int32_t chosen_digit, chosen_above;
  int32_t warp_ties[kWarps];
  int32_t last;
};

// By the block: of `num_items` keys the cut that keeps `capacity`.
__device__ __forceinline__ MoeCut find_cut(const uint32_t* keys, int num_items, int64_t capacity, CutSmem& smem) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint64_t found = 0;
  for (int i = threadIdx.x; i < num_items; i += kThreads) found += keys[i] != 0;
  found = block_reduce(found, smem.block, Add{});
  if (static_cast<int64_t>(found) <= capacity) return {0, -1};
  if (capacity == 0) return {0xffffffffu, -1};

  uint32_t prefix = 0, mask = 0;
  int wanted = static_cast<int>(capacity);
#pragma unroll 1
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    smem.count[threadIdx.x] = 0;
    __syncthreads();  // the digits are cleared
    for (int i = threadIdx.x; i < num_items; i += kThreads) {
      const uint32_t key = keys[i];
      if (key != 0 && (key & mask) == prefix) atomicAdd(&smem.count[key >> shift & (kDigits - 1)], 1);
    }
    __syncthreads();  // and counted
    if (warp == 0) {  // the digit at which the count from the highest down reaches `wanted`; a lane has 8 of them
      constexpr int kPerLane = kDigits / kWarp;
      const int first = kDigits - 1 - lane * kPerLane;
      int own = 0;
      for (int i = 0; i < kPerLane; ++i) own += smem.count[first - i];
      const int up_to = static_cast<int>(warp_scan(static_cast<uint64_t>(own)));
      int above = up_to - own;
      if (above < wanted && wanted <= up_to) {  // in one lane
        int digit = first;
        while (above + smem.count[digit] < wanted) above += smem.count[digit--];
        smem.chosen_digit = digit;
        smem.chosen_above = above;
      }
    }
    __syncthreads();  // the digit is chosen
    prefix |= static_cast<uint32_t>(smem.chosen_digit) << shift;
    mask |= uint32_t{kDigits - 1} << shift;
    wanted -= smem.chosen_above;
    __syncthreads();  // and read
  }

  // Of the items with the last key the place of number `wanted`.
  int before = 0;
#pragma unroll 1
  for (int first = 0; first < num_items && before < wanted; first += kThreads) {
    const int i = first + threadIdx.x;
    const bool is_tie = i < num_items && keys[i] == prefix;
    const uint32_t ties = __ballot_sync(ptx::kAllLanes, is_tie);
    if (lane == 0) smem.warp_ties[warp] = __popc(ties);
    __syncthreads();  // every warp has counted
    int rank = before + __popc(ties & ((1u << lane) - 1)) + 1;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) rank += smem.warp_ties[w];
      before += smem.warp_ties[w];
    }
    if (is_tie && rank == wanted) smem.last = i;
    __syncthreads();  // and read
  }
  return {prefix, smem.last};
}

// Keys of kWarps tokens and kTurned experts, on their way from the order of one to that of the other: a sector of global memory
// has the keys of 8 tokens for one expert.
constexpr int kTurned = 256;
struct TurnSmem {
  uint32_t keys[kWarps][kTurned + 4];  // [token, expert]; read by 8 tokens of 4 experts, on banks of their own

  // f(token, expert of these, key) for the keys of `count` tokens and `num_experts` experts, tokens first.
  template <class F>
  __device__ __forceinline__ void for_each_by_expert(int count, int num_experts, F&& f) {
    const int token = threadIdx.x % kWarps;
    for (int e = threadIdx.x / kWarps; e < num_experts; e += kThreads / kWarps) {
      if (token < count) f(token, e, keys[token][e]);
    }
  }
};
static_assert(kWarps == 8, "a sector");

__global__ void __launch_bounds__(kThreads) moe_choice_keys_kernel(MoeChoiceParams p) {
  auto& smem = dynamic_smem<TurnSmem>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_experts = p.logits.num_experts;
  const int64_t first_token = int64_t{blockIdx.x} * kWarps;
  const int count = static_cast<int>(min(p.logits.num_tokens - first_token, int64_t{kWarps}));
  const LogitRow row(p.logits, first_token + min(warp, count - 1));
  const LogSum over = row.log_sum(MoeScoring::kSoftmax);
  bool is_nan = false;
  for (int e = lane; e < num_experts; e += kWarp) is_nan = is_nan || row.raw(e) != row.raw(e);
  is_nan = __any_sync(ptx::kAllLanes, is_nan);
#pragma unroll 1
  for (int first = 0; first < num_experts; first += kTurned) {
    const int experts = min(num_experts - first, kTurned);
    for (int e = lane; e < experts; e += kWarp) {
      const float x = row.clamped(first + e);
      const float score = p.scoring == MoeScoring::kSoftmax ? over.share(x) : score_of(p.scoring, x);
      smem.keys[warp][e] = is_nan || x == -INFINITY ? 0u : key_of(score);
    }
    __syncthreads();  // the keys of all tokens are there
    smem.for_each_by_expert(count, experts, [&](int token, int e, uint32_t& key) {
      p.keys[(first + e) * p.logits.num_tokens + first_token + token] = key;
    });
    __syncthreads();  // and read
  }
}

__global__ void __launch_bounds__(kThreads) moe_choice_cut_kernel(MoeChoiceParams p) {
  auto& smem = dynamic_smem<CutSmem>();
  const int num_tokens = static_cast<int>(p.logits.num_tokens);
  const MoeCut cut = find_cut(p.keys + int64_t{blockIdx.x} * num_tokens, num_tokens, p.capacity, smem);
  if (threadIdx.x == 0) p.cuts[blockIdx.x] = cut;
}

__global__ void __launch_bounds__(kThreads) moe_choice_apply_kernel(MoeChoiceParams p) {
  auto& smem = dynamic_smem<TurnSmem>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_experts = p.logits.num_experts;
  const int64_t first_token = int64_t{blockIdx.x} * kWarps, token = first_token + warp;
  const int count = static_cast<int>(min(p.logits.num_tokens - first_token, int64_t{kWarps}));
#pragma unroll 1
  for (int first = 0; first < num_experts; first += kTurned) {
    const int experts = min(num_experts - first, kTurned);
    smem.for_each_by_expert(count, experts, [&](int token, int e, uint32_t& key) {
      key = p.keys[(first + e) * p.logits.num_tokens + first_token + token];
    });
    __syncthreads();  // the keys are there
    for (int e = lane; warp < count && e < experts; e += kWarp) {
      const uint32_t key = smem.keys[warp][e];
      const uint2 words = reinterpret_cast<const uint2*>(p.cuts)[first + e];  // in one access
      const bool kept = key != 0 && is_kept({words.x, static_cast<int32_t>(words.y)}, key, token);
      const int64_t at = token * num_experts + first + e;
      p.topk_idx[at] = kept ? first + e : -1;
      p.topk_weights[at] = kept ? value_of(key) : 0.0f;
    }
    __syncthreads();  // and read
  }
}

// The expert of a slot that has a row, else -1.
__device__ __forceinline__ int expert_of(const MoeCapacityParams& p, int slot) {
  if (p.mapping.token_topk_to_pos[slot] < 0) return -1;
  const int token = slot / p.mapping.num_topk, k = slot - token * p.mapping.num_topk.value();
  const int64_t at = token * p.mapping.idx_stride + k;
  return p.mapping.idx_is_long ? static_cast<int>(static_cast<const int64_t*>(p.mapping.topk_idx)[at])
                               : static_cast<const int32_t*>(p.mapping.topk_idx)[at];
}

__global__ void __launch_bounds__(kThreads) moe_capacity_keys_kernel(MoeCapacityParams p) {
  const int64_t slot = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (slot >= p.mapping.num_slots) return;
  const int pos = p.mapping.token_topk_to_pos[slot], token = static_cast<int>(slot) / p.mapping.num_topk;
  const int k = static_cast<int>(slot) - token * p.mapping.num_topk.value();
  if (pos >= 0) p.keys[pos] = capacity_key(p.topk_weights[token * p.weights_stride + k]);
}

__global__ void __launch_bounds__(kThreads) moe_capacity_cut_kernel(MoeCapacityParams p) {
  auto& smem = dynamic_smem<CutSmem>();
  const int32_t* ends = p.mapping.expert_offsets;
  const int begin = blockIdx.x == 0 ? 0 : ends[blockIdx.x - 1];
  const MoeCut cut = find_cut(p.keys + begin, ends[blockIdx.x] - begin, p.capacity, smem);
  if (threadIdx.x == 0) p.cuts[blockIdx.x] = cut;
}

__global__ void __launch_bounds__(kThreads) moe_capacity_apply_kernel(MoeCapacityParams p) {
  const int64_t slot = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (slot >= p.mapping.num_slots) return;
  const int e = expert_of(p, static_cast<int>(slot));
  bool kept = false;
  if (e >= 0) {
    const int pos = p.mapping.token_topk_to_pos[slot], item = pos - (e == 0 ? 0 : p.mapping.expert_offsets[e - 1]);
    kept = p.topk_weights == nullptr ? item < p.capacity : is_kept(p.cuts[e], p.keys[pos], item);
  }
  p.kept_idx[slot] = kept ? e : -1;
}

}  // namespace

void launch_moe_choice(const MoeChoiceParams& p, cudaStream_t stream) {
  const char* name = "moe.route_expert_choice";
  const dim3 blocks(static_cast<unsigned>(p.logits.num_experts));
  const dim3 tokens = grid_of(name, p.logits.num_tokens, kWarps);
  launch(name, moe_choice_keys_kernel, tokens, kThreads, sizeof(TurnSmem), stream, p);
  launch(name, moe_choice_cut_kernel, blocks, kThreads, sizeof(CutSmem), stream, p);
  launch(name, moe_choice_apply_kernel, tokens, kThreads, sizeof(TurnSmem), stream, p);
}

void launch_moe_capacity(const MoeCapacityParams& p, cudaStream_t stream) {
  const char* name = "moe.apply_capacity";
  const dim3 slots = grid_of(name, p.mapping.num_slots, kThreads);
  if (p.topk_weights != nullptr) {
    launch(name, moe_capacity_keys_kernel, slots, kThreads, 0, stream, p);
    launch(name, moe_capacity_cut_kernel, dim3(static_cast<unsigned>(p.mapping.num_experts)), kThreads, sizeof(CutSmem),
           stream, p);
  }
  launch(name, moe_capacity_apply_kernel, slots, kThreads, 0, stream, p);
}

}  // namespace fmkernels
