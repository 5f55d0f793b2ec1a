// SPDX-License-Identifier: Apache-2.0
// Atomics of every kind, and blocks that depend on each other through memory.
#include <cuda_fp16.h>

#include "program.h"

__global__ void histogram(const uint8_t* in, int n, unsigned* bins) {
  __shared__ unsigned s[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) s[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&s[in[i]], 1u);
  __syncthreads();
  for (int i = threadIdx.x; i < 256; i += blockDim.x) {
    if (s[i] != 0) atomicAdd(&bins[i], s[i]);
  }
}

__global__ void all_of_them(int* i, unsigned* u, unsigned long long* l, float* f, double* d, __half2* h) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&i[0], t);
  atomicSub(&i[1], 2);
  atomicMin(&i[2], 50 - t);
  atomicMax(&i[3], t - 50);
  atomicAnd(&i[4], ~(1 << t % 7));
  atomicOr(&i[5], 1 << t % 11);
  atomicXor(&i[6], 1 << t % 13);
  atomicInc(&u[0], 9u);
  atomicDec(&u[1], 9u);
  atomicMax(&u[2], unsigned(t) << 25);
  atomicAdd(&l[0], 1ull << 33);
  atomicMax(&l[1], static_cast<unsigned long long>(t) << 40);
  atomicAdd(&f[0], 0.5f);
  atomicAdd(&d[0], 0.25);
  atomicAdd(&h[0], __floats2half2_rn(1.0f, 0.5f));
}

__global__ void exchanged(int* slot, int* seen) { seen[threadIdx.x] = atomicExch(slot, threadIdx.x); }

__device__ float product_so_far = 1.0f;
__global__ void multiply(const float* factors) {
  auto* address = reinterpret_cast<unsigned*>(&product_so_far);
  unsigned old = *address, assumed;
  do {
    assumed = old;
    old = atomicCAS(address, assumed, __float_as_uint(__uint_as_float(assumed) * factors[threadIdx.x]));
  } while (old != assumed);
}

// The last block that arrives adds up what all have left.
__device__ unsigned arrived = 0;
__global__ void last_block(float* partial, float* total) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = blockIdx.x + 1;
    __threadfence();
    is_last = atomicAdd(&arrived, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last && threadIdx.x == 0) {
    __threadfence();
    float sum = 0;
    for (int i = 0; i < gridDim.x; ++i) sum += static_cast<volatile float*>(partial)[i];
    *total = sum;
  }
}

// Every block waits for its successor: the first ends only if all are in flight.
__global__ void chain(volatile int* flags) {
  if (threadIdx.x == 0) {
    while (blockIdx.x + 1 < gridDim.x && flags[blockIdx.x + 1] == 0) {
    }
    __threadfence();
    flags[blockIdx.x] = blockIdx.x + 1;
  }
}

__global__ void scopes(int* x) {
  atomicAdd_block(&x[blockIdx.x], 1);
  atomicAdd_system(&x[2], 1);
}

int main() {
  {
    Random random;
    const auto in = generate<uint8_t>(10000, [&](size_t) { return uint8_t(random() % 200); });
    Array<uint8_t> device(in);
    Array<unsigned> bins(256);
    histogram<<<4, 128>>>(device, 10000, bins);
    launched("histogram");
    std::vector<unsigned> truth(256);
    for (const uint8_t value : in) ++truth[value];
    expect_all(bins, [&](size_t i) { return truth[i]; }, "a histogram");
  }
  {
    Array<int> i(std::vector<int>{0, 0, 0, 0, -1, 0, 0});
    Array<unsigned> u(std::vector<unsigned>{0, 5, 0});
    Array<unsigned long long> l(2);
    Array<float> f(1);
    Array<double> d(1);
    Array<__half2> h(1);
    all_of_them<<<2, 64>>>(i, u, l, f, d, h);
    launched("all_of_them");
    int flips = 0;
    for (int t = 0; t < 128; ++t) flips ^= 1 << t % 13;
    const int truth[] = {8128, -256, -77, 77, ~127, 2047, flips};
    expect_all(i, [&](size_t at) { return truth[at]; }, "add, sub, min, max, and, or, xor");
    unsigned up = 0, down = 5;
    for (int t = 0; t < 128; ++t) up = up >= 9 ? 0 : up + 1, down = down == 0 || down > 9 ? 9 : down - 1;
    const unsigned unsigned_truth[] = {up, down, 127u << 25};
    expect_all(u, [&](size_t at) { return unsigned_truth[at]; }, "inc, dec and max");
    expect_all(l, [](size_t at) { return at == 0 ? 128ull << 33 : 127ull << 40; }, "64 bits");
    expect_all(f, [](size_t) { return 64.0f; }, "float");
    expect_all(d, [](size_t) { return 32.0; }, "double");
    expect(__low2float(h.host()[0]) == 128 && __high2float(h.host()[0]) == 64, "a pair of halves");
  }
  {
    Array<int> slot(1, 100), seen(96);
    exchanged<<<1, 96>>>(slot, seen);
    launched("exchanged");
    std::vector<int> times(101);
    for (const int value : seen.host()) ++times[value];
    ++times[slot.host()[0]];
    bool once = times[100] == 1;
    for (int t = 0; t < 96; ++t) once = once && times[t] == 1;
    expect(once, "every value is exchanged once");
  }
  {
    Array<float> factors(generate<float>(64, [](size_t i) { return i % 2 ? 2.0f : 0.5f; }));
    multiply<<<1, 64>>>(factors);
    launched("multiply");
    float product = 0;
    succeed(cudaMemcpyFromSymbol(&product, product_so_far, sizeof product), "copy");
    expect(product == 1, "a loop of compare and swap");
  }
  {
    Array<float> partial(20), total(1);
    last_block<<<20, 32>>>(partial, total);
    launched("last_block");
    expect_all(total, [](size_t) { return 210.0f; }, "the last block adds up");
  }
  {
    Array<int> flags(12);
    chain<<<12, 32>>>(flags);
    launched("chain");
    expect_all(flags, [](size_t i) { return int(i) + 1; }, "blocks that wait for later ones");
  }
  {
    Array<int> x(3);
    scopes<<<2, 32>>>(x);
    launched("scopes");
    expect_all(x, [](size_t i) { return i == 2 ? 64 : 32; }, "scopes of a block and of the system");
  }
  return failures != 0;
}
