// SPDX-License-Identifier: Apache-2.0
// Symmetric memory on CUDA: how the blocks of one number on all ranks meet, each of which can read the memory of the others.
#pragma once

#include <cstdint>

#include "ptx.h"

namespace fmkernels {

constexpr unsigned kNapNanoseconds = 64;  // between two looks at a flag

// Whether a flag has reached an epoch. Epochs count modulo 2^32; a peer is at most a step ahead.
__device__ __forceinline__ bool has_reached(const uint32_t* flag, uint32_t epoch) {
  return static_cast<int32_t>(ptx::ld_acquire_sys(flag) - epoch) >= 0;
}

// All threads of a block together, at least world_size of them: what they wrote before is there for the blocks of the
// peers afterwards, and what those wrote for them. flag(of, by): in the memory of rank `of`, written by rank `by` alone.
// False, in every thread, where a peer has not come for timeout_ns, or until is_broken() said that it need not be waited
// for; its thread has called late(peer). Nobody stops on the way, since a warp that is apart where a thread may end stays so.
template <class Flag, class Broken, class Late>
__device__ __forceinline__ bool meet_peers(int world_size, int rank, uint32_t epoch, int64_t timeout_ns, Flag&& flag,
                                           Broken&& is_broken, Late&& late) {
  __syncthreads();  // all threads have written, and have read what the peers may now write again
  const int peer = threadIdx.x;
  bool is_late = false;
  if (peer < world_size) {
    ptx::st_release_sys(flag(peer, rank), epoch);
    const uint32_t* own = flag(rank, peer);
    if (!has_reached(own, epoch)) {
      const uint64_t begin = ptx::globaltimer();
      while (!is_late && !has_reached(own, epoch)) {
        is_late = is_broken() || static_cast<int64_t>(ptx::globaltimer() - begin) > timeout_ns;  // it may be set back
        __nanosleep(kNapNanoseconds);
      }
      if (is_late) late(peer);
    }
  }
  return !__syncthreads_or(is_late);  // all peers have come
}

}  // namespace fmkernels
