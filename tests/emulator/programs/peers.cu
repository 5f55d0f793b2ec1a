// SPDX-License-Identifier: Apache-2.0
// Blocks that wait for each other, as GPUs that share memory do: flags, counters, timeouts; and two processes that do.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "program.h"

constexpr int kRanks = 4, kThreads = 64, kEpochs = 100;

__device__ void store_release(int* flag, int value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ int load_acquire(const int* flag) {
  int value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
__device__ unsigned long long nanoseconds() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// One rank's buffers: `values` for its peers to read, `ready[from]` and `done[from]`, which peer `from` writes.
struct Buffers {
  int values[kThreads];
  int ready[kRanks], done[kRanks];
};

// Thread r tells rank r, and hears from it. False: it took too long.
template <bool kVolatile>
__device__ bool meet(Buffers* all, int rank, int epoch, int (Buffers::*flags)[kRanks]) {
  __syncthreads();
  bool heard = true;
  if (threadIdx.x < kRanks) {
    const int peer = threadIdx.x;
    int* const tell = &(all[peer].*flags)[rank];
    int* const hear = &(all[rank].*flags)[peer];
    const unsigned long long begin = nanoseconds();
    if (kVolatile) {
      __threadfence_system();
      *reinterpret_cast<volatile int*>(tell) = epoch;
      while (*reinterpret_cast<volatile int*>(hear) < epoch && heard) heard = nanoseconds() - begin < 100000000000ull;
      __threadfence_system();
    } else {
      store_release(tell, epoch);
      while (load_acquire(hear) < epoch && heard) {
        __nanosleep(100);
        heard = nanoseconds() - begin < 100000000000ull;
      }
    }
  }
  return __syncthreads_and(heard);
}

template <bool kVolatile>
__global__ void all_reduce(Buffers* all, int* out) {
  const int rank = blockIdx.x;
  int sum = 0;
  for (int epoch = 1; epoch <= kEpochs; epoch++) {
    all[rank].values[threadIdx.x] = epoch * (rank + 1) + threadIdx.x;
    if (!meet<kVolatile>(all, rank, epoch, &Buffers::ready)) return;
    for (int r = 0; r < kRanks; r++) sum += all[(rank + r) % kRanks].values[threadIdx.x];
    if (!meet<kVolatile>(all, rank, epoch, &Buffers::done)) return;
  }
  out[rank * kThreads + threadIdx.x] = sum;
}

__global__ void grid_barriers(int* count, int* values, int turns) {
  for (int turn = 1; turn <= turns; turn++) {
    if (threadIdx.x == 0) values[blockIdx.x] += turn;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(count, 1);
      while (*reinterpret_cast<volatile int*>(count) < turn * static_cast<int>(gridDim.x)) {
      }
      __threadfence();
    }
    __syncthreads();
    if (threadIdx.x == 0 && values[(blockIdx.x + 1) % gridDim.x] % 1000 != turn * (turn + 1) / 2) __trap();
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(count + 1, 1);
      while (atomicAdd(count + 1, 0) < turn * static_cast<int>(gridDim.x)) {
      }
      __threadfence();
    }
    __syncthreads();
  }
}

__global__ void sum_by_the_last(int* count, int* parts, int* total) {
  __shared__ bool last;
  parts[blockIdx.x * kThreads + threadIdx.x] = blockIdx.x;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(count, 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  int sum = 0;
  for (int block = 0; block < static_cast<int>(gridDim.x); block++) sum += parts[block * kThreads + threadIdx.x];
  total[threadIdx.x] = sum;
  if (threadIdx.x == 0) *count = 0;
}

// One of two processes: its turn is when the flag says so.
__global__ void take_turns(int* flag, int* value, int me, int turns) {
  for (int turn = me; turn < turns; turn += 2) {
    while (load_acquire(flag) != turn) {
    }
    *value = *value * 3 + turn;
    store_release(flag, turn + 1);
    atomicAdd_system(flag + 1, 1);
  }
}
__global__ void nothing() {}

void processes() {
  constexpr int kTurns = 200;
  auto* const shared =
      static_cast<int*>(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  std::fflush(stdout);
  const pid_t child = fork();
  const int me = child == 0;
  succeed(cudaHostRegister(shared, 4096, 0), "cudaHostRegister");
  take_turns<<<1, 1>>>(shared, shared + 8, me, kTurns);
  launched("take_turns");
  if (me) _exit(failures);
  int status = -1;
  waitpid(child, &status, 0);
  int value = 0;
  for (int turn = 0; turn < kTurns; turn++) value = static_cast<int>(static_cast<unsigned>(value) * 3u + turn);
  expect(status == 0 && shared[8] == value && shared[1] == kTurns, "two processes take turns");
  succeed(cudaHostUnregister(shared), "cudaHostUnregister");
}

int main(int argc, char** argv) {
  if (argc > 1) {  // for measurements
    for (int i = std::atoi(argv[1]); i > 0; i--) nothing<<<1, 32>>>();
    launched("nothing");
    return failures;
  }
  processes();
  auto expected = [](size_t i) {
    int sum = 0;
    for (int epoch = 1; epoch <= kEpochs; epoch++)
      for (int r = 0; r < kRanks; r++) sum += epoch * (r + 1) + static_cast<int>(i % kThreads);
    return sum;
  };
  {
    Array<Buffers> all(kRanks);
    Array<int> out(kRanks * kThreads, 0);
    all_reduce<false><<<kRanks, kThreads>>>(all, out);
    launched("all_reduce with release and acquire");
    expect_all(out, expected, "all_reduce with release and acquire");
  }
  {
    Array<Buffers> all(kRanks);
    Array<int> out(kRanks * kThreads, 0);
    all_reduce<true><<<kRanks, kThreads>>>(all, out);
    launched("all_reduce with volatile flags and fences");
    expect_all(out, expected, "all_reduce with volatile flags and fences");
  }
  Array<int> count(2, 0), values(40, 0), total(kThreads, 0);
  grid_barriers<<<40, 32>>>(count, values, 5);
  launched("grid_barriers");
  expect_all(values, [](size_t) { return 15; }, "grid_barriers");
  Array<int> parts(300 * kThreads, 0), done(1, 0);
  for (int i = 0; i < 2; i++) sum_by_the_last<<<300, kThreads>>>(done, parts, total);
  launched("sum_by_the_last");
  expect_all(total, [](size_t) { return 299 * 150; }, "sum_by_the_last");
  return failures;
}
