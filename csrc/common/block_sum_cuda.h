// SPDX-License-Identifier: Apache-2.0
// Sums and maxima of 64-bit integers over a warp and a block: the same in every order.
#pragma once

#include <cstdint>

#include "ptx.h"

namespace fmkernels {

struct Add {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Largest {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};
__device__ __forceinline__ uint64_t shuffle_xor(uint64_t x, int step) {
  return static_cast<uint64_t>(__shfl_xor_sync(ptx::kAllLanes, static_cast<unsigned long long>(x), step));
}

// Partial results of the warps of a block, in shared memory.
template <int kWarps>
struct BlockSum {
  uint64_t warp[kWarps];
};

// Every thread holds the result.
template <int kWarps, class Join>
__device__ __forceinline__ uint64_t block_reduce(uint64_t x, BlockSum<kWarps>& smem, Join join) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = join(x, shuffle_xor(x, step));
  __syncthreads();  // the results of the last reduction have been read
  if (threadIdx.x % kWarp == 0) smem.warp[threadIdx.x / kWarp] = x;
  __syncthreads();  // every warp has written
  x = smem.warp[0];
  for (int warp = 1; warp < kWarps; ++warp) x = join(x, smem.warp[warp]);
  return x;
}

// Sum of x over the lanes up to this one.
__device__ __forceinline__ uint64_t warp_scan(uint64_t x) {
  const int lane = threadIdx.x % kWarp;
  for (int step = 1; step < kWarp; step *= 2) {
    const auto before = __shfl_up_sync(ptx::kAllLanes, static_cast<unsigned long long>(x), step);
    if (lane >= step) x += before;
  }
  return x;
}

}  // namespace fmkernels
