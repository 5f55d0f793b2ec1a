// SPDX-License-Identifier: Apache-2.0
// Faulty kernels as of faults.h, with what came with sm_90: mbarriers that are waited for, election.
#include <cstdint>

#include "faults.h"

__device__ unsigned address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
// Macros, so that the line of the instruction is that of its use.
#define INIT(barrier, count) \
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(&barrier)), "r"(count) : "memory")
#define ARRIVE(barrier) asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(address(&barrier)) : "memory")
#define WAIT(barrier, parity)                                                                                   \
  asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @!p bra again; }" ::"r"( \
                   address(&barrier)),                                                                          \
               "r"(parity) : "memory")
#define COPY_16(to, from) \
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to)), "l"(from) : "memory")

// race: 1 x 64
KERNEL(barrier_used_before_it_is_made_known) {
  __shared__ uint64_t ready;
  if (TID == 0) INIT(ready, 64);  // FAULT
  REPAIR(__syncthreads();)
  BREAK(if (TID < 32) __syncwarp();)
  ARRIVE(ready);  // FAULT
  WAIT(ready, 0);  // FAULT
  out[TID] = TID;
}

// barrier: 1 x 32
KERNEL(barrier_never_made) {
  __shared__ uint64_t ready;
  BREAK(if (TID == 0) ready = 0;)
  REPAIR(if (TID == 0) INIT(ready, 32);)
  __syncwarp();
  ARRIVE(ready);  // FAULT
}

// barrier: 1 x 32
KERNEL(too_many_arrivals) {
  __shared__ uint64_t ready;
  if (TID == 0) INIT(ready, 31 REPAIR(+1));
  __syncwarp();
  BREAK(if (TID == 0) asm volatile("mbarrier.expect_tx.shared.b64 [%0], 16;" ::"r"(address(&ready)) : "memory");)
  ARRIVE(ready);  // FAULT
}

// race: 1 x 64
KERNEL(elected_arrival_without_syncwarp) {
  __shared__ int s[32];
  __shared__ uint64_t full;
  if (TID == 0) INIT(full, 1);
  __syncthreads();
  if (TID < 32) {
    s[TID] = TID;  // FAULT
    REPAIR(__syncwarp();)
    if (TID == 0) ARRIVE(full);
  } else {
    WAIT(full, 0);
    out[TID] = s[TID - 32];  // FAULT
  }
}

// race: 1 x 64
KERNEL(elected_wait_without_syncwarp) {
  __shared__ int s[32];
  __shared__ uint64_t full;
  if (TID == 0) INIT(full, 32);
  __syncthreads();
  if (TID < 32) {
    s[TID] = TID;
    ARRIVE(full);
  } else {
    if (TID == 32) WAIT(full, 0);
    REPAIR(__syncwarp();)
    BREAK(while (*reinterpret_cast<volatile int*>(out + 900) == 0) { if (in[900] == 900) break; })
    out[TID] = s[TID - 32];  // FAULT
  }
}

// race, deadlock: 1 x 64
KERNEL(stage_refilled_before_it_is_empty) {
  __shared__ int s[32];
  __shared__ uint64_t barriers[2];
  uint64_t &full = barriers[0], &empty = barriers[1];
  if (TID < 2) INIT(barriers[TID], 32);
  __syncthreads();
  for (int i = 0; i < 3; i++) {
    if (TID < 32) {
      REPAIR(if (i > 0) WAIT(empty, (i - 1) & 1);)
      s[TID] = TID + i;  // FAULT
      ARRIVE(full);
    } else {
      WAIT(full, i & 1);  // FAULT
      out[32 * i + TID] = s[63 - TID];  // FAULT
      ARRIVE(empty);
    }
  }
}

// copy in flight: 1 x 64
KERNEL(copy_that_arrives_is_not_waited_for) {
  __shared__ alignas(16) int s[128];
  __shared__ uint64_t full;
  if (TID == 0) INIT(full, 32);
  __syncthreads();
  if (TID < 32) {
    COPY_16(s + 4 * TID, in + 4 * TID);
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address(&full)) : "memory");
  }
  BREAK(__syncthreads();)
  REPAIR(WAIT(full, 0);)
  out[TID] = s[127 - TID];  // FAULT
}

// deadlock, livelock: 1 x 32
KERNEL(one_arrival_missing) {
  __shared__ uint64_t full;
  if (TID == 0) INIT(full, 32 BREAK(+one));
  __syncwarp();
  ARRIVE(full);
  WAIT(full, 0);  // FAULT
}

// race within a warp: 1 x 32
KERNEL(elected_reader) {
  __shared__ int s[32];
  s[TID] = TID;
  unsigned leader;
  REPAIR(__syncwarp();)
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p; }" : "=r"(leader));
  if (leader) {
    int sum = 0;
    for (int i = 0; i < 32; i++) sum += s[i];  // FAULT
    out[0] = sum;
  }
}
