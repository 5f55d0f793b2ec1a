// SPDX-License-Identifier: Apache-2.0
// Faulty kernels as of faults.h: blocks that hand data to each other through global memory, as ranks do through peers'.
#include "faults.h"
#define BLOCK (static_cast<int>(blockIdx.x))

// Macros, so that the line of the instruction is that of its use.
#define STORE(how, p, value) asm volatile("st." how ".global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory")
#define LOAD(how, p) \
  ([](const int* from) { int v; asm volatile("ld." how ".global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory"); return v; }(p))
#define ADD(how, p) \
  ([](int* to) { int v; asm volatile("atom." how ".global.add.u32 %0, [%1], 1;" : "=r"(v) : "l"(to) : "memory"); return v; }(p))
#define FENCE(how) asm volatile("fence." how ";" ::: "memory")

// What every kernel does but for one thing: block 0 writes data, all its threads do, and a flag; block 1 waits for the
// flag and reads the data, all its threads do.
#define DATA (out + TID)
#define FLAG (out + 512)
#define BACK (out + 513)

// ---- one thing is missing --------------------------------------------------------------------------------------------

// race of blocks: 2 x 64
KERNEL(no_release) {
  if (BLOCK == 0) {
    *DATA = TID;
    __syncthreads();
    BREAK(if (TID == 0) STORE("relaxed.gpu", FLAG, 1);)
    REPAIR(if (TID == 0) STORE("release.gpu", FLAG, 1);)
  } else {
    if (TID == 0)
      while (LOAD("acquire.gpu", FLAG) == 0) {
      }
    __syncthreads();
    out[64 + TID] = *DATA;  // FAULT
  }
}

// race of blocks: 2 x 64
KERNEL(no_acquire) {
  if (BLOCK == 0) {
    *DATA = TID;
    __syncthreads();
    if (TID == 0) STORE("release.gpu", FLAG, 1);
  } else {
    BREAK(if (TID == 0) while (LOAD("relaxed.gpu", FLAG) == 0) {})
    REPAIR(if (TID == 0) while (LOAD("acquire.gpu", FLAG) == 0) {})
    __syncthreads();
    out[64 + TID] = *DATA;  // FAULT
  }
}

// race of blocks: 2 x 64
KERNEL(weak_flag) {
  if (BLOCK == 0) {
    *DATA = TID;
    __syncthreads();
    if (TID == 0) BREAK(*FLAG = 1) REPAIR(STORE("release.gpu", FLAG, 1));  // FAULT
  } else {
    if (TID == 0)
      while (LOAD("acquire.gpu", FLAG) == 0) {  // FAULT
      }
    __syncthreads();
    out[64 + TID] = *DATA;  // FAULT
  }
}

// race of blocks: 2 x 64
KERNEL(weakly_read_flag) {
  if (BLOCK == 0) {
    *DATA = TID;
    __syncthreads();
    if (TID == 0) STORE("release.gpu", FLAG, 1);  // FAULT
  } else {
    if (TID == 0)
      while (LOAD(BREAK("weak") REPAIR("acquire.gpu"), FLAG) == 0) {  // FAULT
      }
    __syncthreads();
    out[64 + TID] = *DATA;  // FAULT
  }
}

// race of blocks: 2 x 64
KERNEL(flag_before_the_data) {
  if (BLOCK == 0) {
    REPAIR(*DATA = TID;)
    __syncthreads();
    if (TID == 0) STORE("release.gpu", FLAG, 1);
    BREAK(*DATA = TID;)  // FAULT
  } else {
    if (TID == 0)
      while (LOAD("acquire.gpu", FLAG) == 0) {
      }
    __syncthreads();
    out[64 + TID] = *DATA;  // FAULT
  }
}

// race of blocks: 2 x 64
KERNEL(no_barrier_before_the_release) {
  if (BLOCK == 0) {
    *DATA = TID;  // FAULT
    REPAIR(__syncthreads();)
    if (TID == 0) STORE("release.gpu", FLAG, 1);
  } else {
    if (TID == 0)
      while (LOAD("acquire.gpu", FLAG) == 0) {
      }
    __syncthreads();
    out[64 + TID] = *DATA;  // FAULT
  }
}

// race of blocks: 2 x 32
KERNEL(no_syncwarp_before_the_release) {
  if (BLOCK == 0) {
    *DATA = TID;
    REPAIR(__syncwarp();)
    if (TID == 0) STORE("release.gpu", FLAG, 1);
  } else {
    if (TID == 0)
      while (LOAD("acquire.gpu", FLAG) == 0) {
      }
    __syncwarp();
    out[64 + TID] = *DATA;  // FAULT
  }
}

// race of blocks: 2 x 64
KERNEL(no_barrier_after_the_acquire) {
  if (BLOCK == 0) {
    *DATA = TID;  // FAULT
    __syncthreads();
    if (TID == 0) STORE("release.gpu", FLAG, 1);
  } else {
    if (TID == 0)
      while (LOAD("acquire.gpu", FLAG) == 0) {
      }
    REPAIR(__syncthreads();)
    out[64 + TID] = *DATA;  // FAULT
  }
}

// race of blocks: 2 x 64
KERNEL(release_of_the_block_alone) {
  if (BLOCK == 0) {
    *DATA = TID;
    __syncthreads();
    __threadfence();
    if (TID == 0) STORE("release." BREAK("cta") REPAIR("gpu"), FLAG, 1);  // FAULT
  } else {
    if (TID == 0)
      while (LOAD("acquire.gpu", FLAG) == 0) {  // FAULT
      }
    __syncthreads();
    out[64 + TID] = *DATA;  // FAULT
  }
}

// race of blocks: 2 x 64
KERNEL(fence_of_the_block_alone) {
  if (BLOCK == 0) {
    *DATA = TID;
    __syncthreads();
    if (TID == 0) {
      FENCE("acq_rel." BREAK("cta") REPAIR("sys"));
      STORE("volatile", FLAG, 1);
    }
  } else {
    if (TID == 0) {
      while (LOAD("volatile", FLAG) == 0) {
      }
      FENCE("acq_rel.gpu");
    }
    __syncthreads();
    out[64 + TID] = *DATA;  // FAULT
  }
}

// race of blocks: 2 x 64
KERNEL(fence_after_the_flag) {
  if (BLOCK == 0) {
    *DATA = TID;
    __syncthreads();
    if (TID == 0) {
      REPAIR(__threadfence();)
      STORE("volatile", FLAG, 1);
      BREAK(__threadfence();)
    }
  } else {
    if (TID == 0) {
      while (LOAD("volatile", FLAG) == 0) {
      }
      __threadfence();
    }
    __syncthreads();
    out[64 + TID] = *DATA;  // FAULT
  }
}

// race of blocks: 2 x 64
KERNEL(prefetched_before_the_flag) {
  if (BLOCK == 0) {
    *DATA = TID;  // FAULT
    __syncthreads();
    if (TID == 0) STORE("release.sys", FLAG, 1);
  } else {
    BREAK(const int value = LOAD("weak", DATA);)  // FAULT
    if (TID == 0)
      while (LOAD("acquire.sys", FLAG) == 0) {
      }
    __syncthreads();
    REPAIR(const int value = LOAD("weak", DATA);)
    out[64 + TID] = value;
  }
}

// race of blocks: 2 x 64
KERNEL(rewritten_without_a_closing_barrier) {
  if (BLOCK == 0) {
    *DATA = TID;
    __syncthreads();
    if (TID == 0) STORE("release.sys", FLAG, 1);
    REPAIR(if (TID == 0) while (LOAD("acquire.sys", BACK) == 0) {})
    __syncthreads();
    *DATA = TID + 1;  // FAULT
  } else {
    if (TID == 0)
      while (LOAD("acquire.sys", FLAG) == 0) {
      }
    __syncthreads();
    out[64 + TID] = *DATA;  // FAULT
    REPAIR(__syncthreads();)
    if (TID == 0) STORE("release.sys", BACK, 1);
  }
}

// race of blocks: 2 x 64
KERNEL(read_after_telling) {
  if (BLOCK == 0) {
    *DATA = TID;
    __syncthreads();
    if (TID == 0) {
      STORE("release.sys", FLAG, 1);
      while (LOAD("acquire.sys", BACK) == 0) {
      }
    }
    __syncthreads();
    *DATA = TID + 1;  // FAULT
  } else {
    if (TID == 0)
      while (LOAD("acquire.sys", FLAG) == 0) {
      }
    __syncthreads();
    BREAK(if (TID == 0) STORE("release.sys", BACK, 1);)
    out[64 + TID] = *DATA;  // FAULT
    REPAIR(__syncthreads(); if (TID == 0) STORE("release.sys", BACK, 1);)
  }
}

// race of blocks: 4 x 64
KERNEL(counted_without_fences) {
  __shared__ int last;
  out[64 * BLOCK + TID] = TID;  // FAULT
  BREAK(__syncthreads();)
  REPAIR(__threadfence(); __syncthreads();)
  if (TID == 0) last = ADD("relaxed.gpu", FLAG) == 3;
  __syncthreads();
  if (last) {
    __threadfence();
    int sum = 0;
    for (int b = 0; b < 4; b++) sum += out[64 * b + TID];  // FAULT
    out[600 + TID] = sum;
  }
}

// race of blocks: 4 x 32
KERNEL(counter_reset_too_early) {
  if (TID == 0 && BLOCK REPAIR(* 0) == BREAK(3) REPAIR(1)) out[520] = zero;  // FAULT
  if (TID == 0) ADD("acq_rel.gpu", out + 520);  // FAULT
}

// race of blocks: 4 x 64
KERNEL(grid_barrier_passed_by_one_thread) {
  for (int turn = 1; turn < 4; turn++) {
    out[64 * BLOCK + TID] = turn * TID;  // FAULT
    __syncthreads();
    if (TID == 0) {
      ADD("release.gpu", FLAG);
      while (LOAD("acquire.gpu", FLAG) < 8 * turn - 4) {
      }
    }
    REPAIR(__syncthreads();)
    out[600 + 64 * BLOCK + TID] = out[64 * (BLOCK ^ 1) + TID];  // FAULT
    __syncthreads();
    if (TID == 0) {
      ADD("release.gpu", FLAG);
      while (LOAD("acquire.gpu", FLAG) < 8 * turn) {
      }
    }
    __syncthreads();
  }
}

// race of blocks: 2 x 32
KERNEL(read_by_a_copy) {
  __shared__ int4 s[32];
  if (BLOCK == 0) {
    if (TID < 4) STORE("weak", out + TID, 3);  // FAULT
    __syncwarp();
    if (TID == 0) STORE("release.gpu", FLAG, 1);
  } else {
    REPAIR(while (LOAD("acquire.gpu", FLAG) == 0) {})
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(s + TID));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(out) : "memory");  // FAULT
    BREAK(while (LOAD("acquire.gpu", FLAG) == 0) {})
    asm volatile("cp.async.wait_all;" ::: "memory");
    out[64 + TID] = s[TID].x;
  }
}

// race of blocks: 2 x 32
KERNEL(copy_that_lands_after_telling) {
  __shared__ int4 s[32];
  if (BLOCK == 0) {
    if (TID == 0)
      while (LOAD("acquire.gpu", BACK) == 0) {
      }
    __syncwarp();
    STORE("weak", DATA, 5);  // FAULT
  } else {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(s + TID));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(out + TID / 4 * 4) : "memory");  // FAULT
    REPAIR(asm volatile("cp.async.wait_all;" ::: "memory");)
    __syncwarp();
    if (TID == 0) STORE("release.gpu", BACK, 1);
    for (int i = 0; i < 3000 * one; i++) __nanosleep(1);
    asm volatile("cp.async.wait_all;" ::: "memory");
    out[64 + TID] = s[TID].x;
  }
}

// ---- without any release ---------------------------------------------------------------------------------------------

// race of blocks: 2 x 32
KERNEL(read_of_what_another_writes) {
  out[TID + 32 * BLOCK] = TID;  // FAULT
  out[TID + 64 + 32 * BLOCK] = in[TID] + out[TID + 32 BREAK(*one) REPAIR(*BLOCK)];  // FAULT
}

// race of blocks: 3 x 32
KERNEL(written_where_others_read) {
  const int x = in[TID] + out[TID];  // FAULT
  if (BLOCK == 2) out[TID REPAIR(+512)] = TID + 3;  // FAULT
  out[64 + 32 * BLOCK + TID] = x;
}

// race of blocks: 2 x 32
KERNEL(plain_read_of_what_others_count) {
  atomicAdd(out + TID REPAIR(+32 * BLOCK), 1);  // FAULT
  out[64 + 32 * BLOCK + TID] = out[TID REPAIR(+32 * BLOCK)];  // FAULT
}

// race of blocks: 2 x 32
KERNEL(halves_of_a_word) {
  auto* halves = reinterpret_cast<unsigned short*>(out);
  const int at = 2 * TID + (BLOCK BREAK(&zero));
  halves[at] = static_cast<unsigned short>(halves[at] + TID + BLOCK + 1);  // FAULT
}
