// SPDX-License-Identifier: Apache-2.0
// Of faulty kernels, each with its repair. Above a kernel: the fault it must be reported for, its blocks and threads. Compiled
// without REPAIRED every report must be on a line marked FAULT, and there must be one; with it there must be none.
#ifdef REPAIRED
#define REPAIR(...) __VA_ARGS__
#define BREAK(...)
#else
#define REPAIR(...)
#define BREAK(...) __VA_ARGS__
#endif
// in[i] = i, 1024 of them; out as long; one = 1 and zero = 0, which the compiler does not know.
#define KERNEL(name) \
  extern "C" __global__ void name(int* out, const int* in, [[maybe_unused]] int zero, [[maybe_unused]] int one)
#define TID (static_cast<int>(threadIdx.x))
