// SPDX-License-Identifier: Apache-2.0
// moe_mapping.cu: slots to rows, a stable counting sort by expert.
//
// Contract   see moe.h. Any number of experts to 1024; ids out of range are skipped like -1, and so are slots whose row
//            would lie past num_rows.
// Work       count: a block counts the experts of a chunk of slots. scan: a warp per expert adds up its counts before each
//            chunk. rank: a block adds up the experts' totals, which gives where each begins, and walks its chunk again; a
//            warp has a part of the chunk, and 32 slots of it at a time. One chunk is counted and ranked by one launch.
// Shared     struct CountSmem, struct RankSmem.
// Numerics   integers; atomics only count, and counts have no order. The result follows from the slots alone.
// Cost       the slots twice, both lists once; for few slots the latency of one launch.

#include "moe.h"

#include "../common/dispatch.h"
#include "../common/launch.h"
#include "../common/ptx.h"

namespace fmkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPart = kMappingChunk / kWarps;  // slots of a warp
constexpr int kOwn = kMaxExperts / kThreads;   // experts of a thread, one after another
constexpr int kScanThreads = 128;
static_assert(kPart % kWarp == 0, "a warp takes 32 slots at a time");

struct CountSmem {
  int32_t count[kMaxExperts];
};
struct RankSmem {
  int32_t next[kWarps][kMaxExperts];  // counts of the warps' parts, then the row that the warp's next slot has
  int32_t warp_total[kWarps];
};

// The expert of a slot, -1 for none.
__device__ __forceinline__ int expert_of(const MoeMappingParams& p, int slot) {
  const int token = slot / p.num_topk, k = slot - token * p.num_topk.value();
  const int64_t at = token * p.idx_stride + k;
  const int64_t id = p.idx_is_long ? static_cast<const int64_t*>(p.topk_idx)[at]
                                   : int64_t{static_cast<const int32_t*>(p.topk_idx)[at]};
  return id >= 0 && id < p.num_experts ? static_cast<int>(id) : -1;
}

__device__ __forceinline__ void clear_rows(const MoeMappingParams& p) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x; row < p.num_rows; row += step) {
    p.pos_to_token[row] = -1;
  }
}

__device__ __forceinline__ int warp_scan(int x) {  // over the lanes up to this one
  const int lane = threadIdx.x % kWarp;
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(ptx::kAllLanes, x, step);
    if (lane >= step) x += before;
  }
  return x;
}

__global__ void __launch_bounds__(kThreads) moe_mapping_count_kernel(MoeMappingParams p) {
  auto& smem = dynamic_smem<CountSmem>();
  clear_rows(p);
  for (int e = threadIdx.x; e < p.num_experts; e += kThreads) smem.count[e] = 0;
  __syncthreads();  // the counters are cleared
  const int begin = blockIdx.x * kMappingChunk;
  for (int i = threadIdx.x; i < kMappingChunk && begin + i < p.num_slots; i += kThreads) {
    const int e = expert_of(p, begin + i);
    if (e >= 0) atomicAdd(&smem.count[e], 1);
  }
  __syncthreads();  // all slots of the chunk are counted
  for (int e = threadIdx.x; e < p.num_experts; e += kThreads) {
    p.counts[int64_t{e} * gridDim.x + blockIdx.x] = smem.count[e];
  }
}

__global__ void __launch_bounds__(kScanThreads) moe_mapping_scan_kernel(MoeMappingParams p) {
  const int lane = threadIdx.x % kWarp;
  const int e = blockIdx.x * (kScanThreads / kWarp) + threadIdx.x / kWarp;
  if (e >= p.num_experts) return;  // whole warps
  const int chunks = static_cast<int>(mapping_chunks(p.num_slots));
  int32_t* counts = p.counts + int64_t{e} * chunks;
  int before = 0;
  for (int first = 0; first < chunks; first += kWarp) {
    const int chunk = first + lane;
    const int own = chunk < chunks ? counts[chunk] : 0, up_to = warp_scan(own);
    if (chunk < chunks) counts[chunk] = before + up_to - own;
    before += __shfl_sync(ptx::kAllLanes, up_to, kWarp - 1);
  }
  if (lane == 0) p.counts[p.num_experts * chunks + e] = before;
}

template <bool kAlone>
__global__ void __launch_bounds__(kThreads) moe_mapping_rank_kernel(MoeMappingParams p) {
  auto& smem = dynamic_smem<RankSmem>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, num_experts = static_cast<int>(p.num_experts);
  const int num_rows = static_cast<int>(p.num_rows);
  const int begin = blockIdx.x * kMappingChunk + warp * kPart;
  if constexpr (kAlone) clear_rows(p);

  // What each warp's part has of each expert.
  for (int e = lane; e < num_experts; e += kWarp) smem.next[warp][e] = 0;
  __syncwarp();  // the warp's counters are cleared
  for (int i = lane; i < kPart && begin + i < p.num_slots; i += kWarp) {
    const int e = expert_of(p, begin + i);
    if (e >= 0) atomicAdd(&smem.next[warp][e], 1);
  }
  __syncthreads();  // all parts are counted, and all rows cleared

  // Where each expert begins: the aligned totals of those before it. A thread has kOwn experts.
  int total[kOwn], own = 0;
  const int first = threadIdx.x * kOwn;
  for (int i = 0; i < kOwn; ++i) {
    const int e = first + i;
    total[i] = 0;
    if (e >= num_experts) continue;
    if constexpr (kAlone) {
      for (int w = 0; w < kWarps; ++w) total[i] += smem.next[w][e];
    } else {
      total[i] = p.counts[p.num_experts * gridDim.x + e];
    }
    const int alignment = static_cast<int>(p.alignment);
    own += (total[i] + alignment - 1) / alignment * alignment;
  }
  const int up_to = warp_scan(own);
  if (lane == kWarp - 1) smem.warp_total[warp] = up_to;
  __syncthreads();  // the totals of all warps are there
  int start = up_to - own;
  for (int w = 0; w < warp; ++w) start += smem.warp_total[w];
  for (int i = 0; i < kOwn; ++i) {
    const int e = first + i;
    if (e >= num_experts) continue;
    const int alignment = static_cast<int>(p.alignment);
    const int end = start + (total[i] + alignment - 1) / alignment * alignment;
    if (blockIdx.x == 0) {
      p.expert_offsets[e] = min(end, num_rows);
      p.expert_offsets[num_experts + e] = min(start + total[i], num_rows);
    }
    int next = start;
    if constexpr (!kAlone) next += p.counts[int64_t{e} * gridDim.x + blockIdx.x];
    for (int w = 0; w < kWarps; ++w) {
      const int count = smem.next[w][e];
      smem.next[w][e] = next;
      next += count;
    }
    start = end;
  }
  __syncthreads();  // every warp's next rows are known

  // The rows of the slots, 32 at a time: lanes of one expert follow each other.
  for (int i = 0; i < kPart && begin + i < p.num_slots; i += kWarp) {
    const int slot = begin + i + lane;
    const bool is_slot = slot < p.num_slots;
    const int e = is_slot ? expert_of(p, slot) : -1;
    const uint32_t peers = __match_any_sync(ptx::kAllLanes, e);
    const int rank = __popc(peers & ((1u << lane) - 1));
    int pos = e >= 0 ? smem.next[warp][e] + rank : -1;
    __syncwarp();  // all lanes have read their next row
    if (e >= 0 && rank == 0) smem.next[warp][e] = pos + __popc(peers);
    __syncwarp();  // and the next 32 see those behind
    if (pos >= num_rows) pos = -1;
    if (is_slot) p.token_topk_to_pos[slot] = pos;
    if (pos >= 0) p.pos_to_token[pos] = slot / p.num_topk;
  }
}

}  // namespace

void launch_moe_mapping(const MoeMappingParams& p, cudaStream_t stream) {
  const char* name = "moe.build_mapping";
  const int64_t chunks = mapping_chunks(p.num_slots);
  if (chunks <= 1) {
    launch(name, moe_mapping_rank_kernel<true>, dim3(1), kThreads, sizeof(RankSmem), stream, p);
    return;
  }
  const dim3 grid(static_cast<unsigned>(chunks));
  launch(name, moe_mapping_count_kernel, grid, kThreads, sizeof(CountSmem), stream, p);
  launch(name, moe_mapping_scan_kernel, grid_of(name, p.num_experts, kScanThreads / kWarp), kScanThreads, 0, stream, p);
  launch(name, moe_mapping_rank_kernel<false>, grid, kThreads, sizeof(RankSmem), stream, p);
}

}  // namespace fmkernels
