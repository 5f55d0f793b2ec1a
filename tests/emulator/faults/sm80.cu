// SPDX-License-Identifier: Apache-2.0
// Faulty kernels for every architecture: faults.h.
#include "faults.h"

__device__ unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
// Macros, so that the line of the instruction is that of its use.
#define COPY_16(to, from) \
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory")
#define COMMIT() asm volatile("cp.async.commit_group;" ::: "memory")
#define WAIT(groups) asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory")

// ---- bounds and alignment --------------------------------------------------------------------------------------------

// out of bounds: 1 x 64
KERNEL(global_read_past_the_end) {
  out[TID] = in[TID * 16 + 15 BREAK(+one)];  // FAULT
}

// out of bounds: 1 x 32
KERNEL(global_write_before_the_begin) {
  out[TID BREAK(-one)] = 1;  // FAULT
}

// out of bounds: 1 x 32
KERNEL(vector_over_the_end) {
  reinterpret_cast<int4*>(out)[255 BREAK(+one)] = make_int4(1, 2, 3, 4);  // FAULT
}

// out of bounds: 1 x 64
KERNEL(shared_index) {
  __shared__ int s[64];
  s[TID BREAK(+one)] = TID;  // FAULT
  out[TID] = s[TID BREAK(+one)];
}

// out of bounds: 1 x 32
KERNEL(null_pointer) {
  const int* p = in BREAK(+(zero * 1024) - reinterpret_cast<size_t>(in) / 4);
  out[TID] = p[TID];  // FAULT
}

// out of bounds: 1 x 32
KERNEL(copy_source) {
  __shared__ int4 s[32];
  COPY_16(&s[TID], in + 4 * TID + 896 BREAK(+4));  // FAULT
  COMMIT();
  WAIT(0);
  out[TID] = s[TID].x;
}

// misaligned: 1 x 32
KERNEL(global_alignment) {
  out[TID] = *reinterpret_cast<const int*>(reinterpret_cast<const char*>(in) + 4 * TID BREAK(+2 * one));  // FAULT
}

// misaligned: 1 x 32
KERNEL(shared_vector_alignment) {
  __shared__ alignas(16) int s[256];
  for (int i = TID; i < 256; i += 32) s[i] = i;
  __syncwarp();
  const int4 v = *reinterpret_cast<int4*>(s + 4 * TID BREAK(+2 * one));  // FAULT
  out[TID] = v.x + v.y + v.z + v.w;
}

// misaligned: 1 x 32
KERNEL(copy_alignment) {
  __shared__ alignas(16) int s[256];
  COPY_16(&s[4 * TID BREAK(+one)], in + 4 * TID);  // FAULT
  COMMIT();
  WAIT(0);
  out[TID] = s[4 * TID];
}

// ---- values that nobody wrote ----------------------------------------------------------------------------------------

// unwritten shared memory: 1 x 64
KERNEL(tail_not_written) {
  __shared__ int s[64];
  if (TID < 64 BREAK(-one)) s[TID] = TID;
  __syncthreads();
  out[TID] = s[63 - TID];  // FAULT
}

// unwritten shared memory: 1 x 32
KERNEL(half_of_a_word_not_written) {
  __shared__ alignas(4) short s[64];
  s[2 * TID] = 1;
  REPAIR(s[2 * TID + 1] = 2;)
  __syncwarp();
  out[TID] = *reinterpret_cast<int*>(s + 2 * TID);  // FAULT
}

// unwritten shared memory: 1 x 32
KERNEL(counter_not_zeroed) {
  __shared__ int count;
  REPAIR(if (TID == 0) count = 0;)
  __syncwarp();
  asm volatile("red.shared.add.s32 [%0], 1;" ::"r"(shared_address(&count)) : "memory");  // FAULT
  __syncwarp();
  out[TID] = count;
}

// unwritten register: 1 x 32
KERNEL(register_not_written) {
  int value;
  asm volatile("{ .reg .pred p; .reg .b32 t; setp.lt.s32 p, %1, 31; @p mov.b32 t, 7;" REPAIR("@!p mov.b32 t, 8;")
               " add.s32 %0, t, 1; }" : "=r"(value) : "r"(TID));  // FAULT
  out[TID] = value;
}

// unwritten register: 1 x 32
KERNEL(broadcast_of_what_nobody_wrote) {
  int first;
  if (TID == 0 BREAK(+one)) first = in[7];
  out[TID] = __shfl_sync(~0u, first, 0);  // FAULT
}

// unwritten register: 1 x 32
KERNEL(selected_though_not_written) {
  int x;
  const bool large = in[TID] > 16;
  if (in[TID] BREAK(-8) > 16) x = in[TID + 32];
  __syncwarp();
  out[TID] = large ? x * 3 : in[TID + 64];  // FAULT
}

// unwritten register: 1 x 32
KERNEL(compared_before_the_first) {
  int largest, at = zero;
  for (int i = 0; i < 5 * one; i++) {
    const int x = in[i ^ TID];
    if (i == zero BREAK(+1) || x > largest) {  // FAULT
      largest = x;                             // FAULT
      at = i;                                  // FAULT
    }
  }
  out[TID] = at;  // FAULT
}

// ---- races between warps ---------------------------------------------------------------------------------------------

// race: 1 x 64
KERNEL(read_before_the_write) {
  __shared__ int s[64];
  s[TID] = 0;
  __syncthreads();
  s[TID] = TID;  // FAULT
  REPAIR(__syncthreads();)
  out[TID] = s[63 - TID];  // FAULT
}

// race: 1 x 64
KERNEL(overwritten_too_early) {
  __shared__ int s[64];
  for (int i = 0; i < 4; i++) {
    s[TID] = TID + i;  // FAULT
    __syncthreads();
    out[64 * i + TID] = s[63 - TID];  // FAULT
    REPAIR(__syncthreads();)
  }
}

// race: 1 x 64
KERNEL(two_writers) {
  __shared__ int s[32];
  if (TID < 32) s[TID] = 1;
  REPAIR(__syncthreads();)
  if (TID >= 32) s[TID - 32] = 2;  // FAULT
  __syncthreads();
  out[TID] = s[TID % 32];
}

// race: 1 x 64
KERNEL(bytes_of_a_word) {
  __shared__ unsigned char s[64];
  s[TID] = 0;
  __syncthreads();
  s[2 * (TID % 32) + TID / 32 BREAK(*zero)] = static_cast<unsigned char>(TID);  // FAULT
  __syncthreads();
  out[TID] = s[TID];
}

// race: 1 x 96
KERNEL(wrong_named_barrier) {
  __shared__ int s[64];
  if (TID < 64) {
    s[TID] = TID;  // FAULT
    if (TID < 32) {
      asm volatile("bar.sync 1, 64;" ::: "memory");
    } else {
      REPAIR(asm volatile("bar.sync 1, 64;" ::: "memory");)
      out[TID] = s[TID - 32];  // FAULT
    }
  } else {
    BREAK(asm volatile("bar.sync 1, 64;" ::: "memory");)
  }
}

// race: 1 x 64
KERNEL(flag_without_fences) {
  __shared__ volatile int flag;
  __shared__ int value;
  if (TID == 0) flag = 0;
  __syncthreads();
  if (TID == 0) {
    value = in[5];
    REPAIR(__threadfence_block();)
    flag = 1;
  } else if (TID == 32) {
    while (flag == 0) {
    }
    REPAIR(__threadfence_block();)
    out[0] = value;  // FAULT
  }
}

// race: 1 x 128
KERNEL(lock_without_fences) {
  __shared__ int lock, sum;
  if (TID == 0) lock = sum = 0;
  __syncthreads();
  if (TID % 32 == 0) {
    while (atomicCAS(&lock, 0, 1) != 0) {
    }
    REPAIR(__threadfence_block();)
    sum += TID;  // FAULT
    REPAIR(__threadfence_block();)
    atomicExch(&lock, 0);
  }
  __syncthreads();
  out[TID] = sum;
}

// race, race within a warp: 1 x 64
KERNEL(plain_read_of_an_atomic) {
  __shared__ int count;
  if (TID == 0) count = 0;
  __syncthreads();
  asm volatile("red.shared.add.s32 [%0], 1;" ::"r"(shared_address(&count)) : "memory");  // FAULT
  REPAIR(__syncthreads();)
  out[TID] = count;  // FAULT
}

// ---- races within a warp ---------------------------------------------------------------------------------------------

// race within a warp: 1 x 32
KERNEL(no_syncwarp) {
  __shared__ int s[32];
  s[TID] = TID;
  REPAIR(__syncwarp();)
  out[TID] = s[31 - TID];  // FAULT
}

// race within a warp: 1 x 32
KERNEL(shuffles_and_votes_order_nothing) {
  __shared__ int s[32];
  s[TID] = TID;
  const int x = __any_sync(~0u, __shfl_xor_sync(~0u, TID, 1) == 3);
  REPAIR(__syncwarp();)
  out[TID] = s[31 - TID] + x;  // FAULT
}

// race within a warp: 1 x 32
KERNEL(mask_too_small) {
  __shared__ int s[32];
  s[TID] = TID;
  __syncwarp(TID < 16 ? 0xffffu : 0xffff0000u);
  out[TID] = s[TID < 16 REPAIR(|| true) ? TID ^ 15 BREAK(^16) : TID];  // FAULT
}

// race within a warp: 1 x 32
KERNEL(lanes_write_one_word) {
  REPAIR(if (TID == 3))
  out[0] = TID;  // FAULT
}

// race within a warp: 1 x 32
KERNEL(ldmatrix_before_the_warp_is_ready) {
  __shared__ alignas(16) int s[128];
  for (int i = TID; i < 128; i += 32) s[i] = i;
  REPAIR(__syncwarp();)
  int a, b, c, d;
  const unsigned row = shared_address(s + 4 * TID);
  // clang-format off
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(row) : "memory");  // FAULT
  // clang-format on
  out[TID] = a + b + c + d;
}

// ---- copies ----------------------------------------------------------------------------------------------------------

// copy in flight: 1 x 32
KERNEL(copy_not_waited_for) {
  __shared__ int4 s[32];
  COPY_16(&s[TID], in + 4 * TID);
  COMMIT();
  REPAIR(WAIT(0);)
  out[TID] = s[TID].x;  // FAULT
}

// copy in flight: 1 x 32
KERNEL(one_group_too_few) {
  __shared__ int4 s[64];
  COPY_16(&s[TID], in + 4 * TID);
  COMMIT();
  COPY_16(&s[TID + 32], in + 4 * TID + 128);
  COMMIT();
  WAIT(1);
  out[TID] = s[TID].x;
  REPAIR(WAIT(0);)
  out[TID + 32] = s[TID + 32].x;  // FAULT
}

// race, copy in flight: 1 x 64
KERNEL(barrier_before_the_wait) {
  __shared__ int4 s[64];
  COPY_16(&s[TID], in + 4 * TID);
  COMMIT();
  BREAK(__syncthreads();)
  WAIT(0);  // FAULT
  REPAIR(__syncthreads();)
  out[TID] = s[63 - TID].x;  // FAULT
}

// race: 1 x 64
KERNEL(copy_over_what_is_read) {
  __shared__ int4 s[64];
  s[TID] = make_int4(TID, 0, 0, 0);
  __syncthreads();
  out[TID] = s[63 - TID].x;  // FAULT
  REPAIR(__syncthreads();)
  COPY_16(&s[TID], in + 4 * TID);  // FAULT
  COMMIT();
  WAIT(0);
}

// ---- barriers, collectives, ends -------------------------------------------------------------------------------------

// barrier: 1 x 64
KERNEL(barrier_in_a_branch) {
  if (in[TID] < 16 REPAIR(+ 64)) {
    asm volatile("bar.sync 0;" ::: "memory");  // FAULT
  }
  out[TID] = TID;
}

// collective: 1 x 32
KERNEL(shuffle_from_outside_the_mask) {
  if (TID >= 16) return;
  const int from = TID BREAK(+4);
  int value;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffff;" : "=r"(value) : "r"(TID), "r"(from));  // FAULT
  out[TID] = value;
}

// collective: 1 x 32
KERNEL(mask_without_the_lane) {
  if (in[TID] >= 20) return;
  const unsigned mask = BREAK(0xffffu) REPAIR(0xfffffu);
  int sum;
  asm volatile("redux.sync.add.s32 %0, %1, %2;" : "=r"(sum) : "r"(TID), "r"(mask));  // FAULT
  out[TID] = sum;
}

// deadlock: 1 x 96
KERNEL(barrier_for_too_many) {
  const int expected = 96;
  if (TID < 64 REPAIR(+ 32)) asm volatile("bar.sync 1, %0;" ::"r"(expected) : "memory");  // FAULT
  BREAK(if (TID >= 64)) asm volatile("bar.sync 2, %0;" ::"r"(expected) : "memory");  // FAULT
}

// livelock: 1 x 32
KERNEL(flag_that_never_comes) {
  REPAIR(if (TID == 0) *reinterpret_cast<volatile int*>(out + 5) = 1; __threadfence();)
  while (*reinterpret_cast<volatile int*>(out + 5) == 0) {  // FAULT
  }
}

// race of blocks: 4 x 32
KERNEL(blocks_write_one_word) {
  out[TID BREAK(/ 32) REPAIR(+32 * blockIdx.x)] = blockIdx.x;  // FAULT
  out[1000] = 7;  // all the same: harmless
}

// race of blocks: 2 x 32
KERNEL(blocks_overlap_by_a_byte) {
  auto* bytes = reinterpret_cast<unsigned char*>(out);
  bytes[blockIdx.x * (32 BREAK(-one)) + TID] = static_cast<unsigned char>(blockIdx.x + TID);  // FAULT
}

// trap: 1 x 32
KERNEL(trap) {
  if (TID == BREAK(7) REPAIR(70)) __trap();  // FAULT
}
