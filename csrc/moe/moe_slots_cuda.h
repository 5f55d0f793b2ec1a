// SPDX-License-Identifier: Apache-2.0
// Entries of a mapping as kernels read them.
#pragma once

#include <cstdint>

#include "../common/ptx.h"

namespace fmkernels {

__device__ __forceinline__ bool is_within(int index, int64_t count) { return index >= 0 && index < count; }

// The first k with row `pos` among the positions of a token, -1 for none; in every lane of the warp.
__device__ __forceinline__ int choice_of(const int32_t* positions, int num_topk, int pos) {
  for (int first = 0; first < num_topk; first += kWarp) {
    const int k = first + threadIdx.x % kWarp;
    const uint32_t found = __ballot_sync(ptx::kAllLanes, k < num_topk && positions[k] == pos);
    if (found != 0) return first + __ffs(static_cast<int>(found)) - 1;
  }
  return -1;
}

}  // namespace fmkernels
