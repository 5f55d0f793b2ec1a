// SPDX-License-Identifier: Apache-2.0
// Calls, recursion, pointers to functions, switches, loops that diverge, local memory, printf and assert.
#include <cassert>

#include "program.h"

__device__ __noinline__ int fibonacci(int n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }
__global__ void recursion(int* out) { out[threadIdx.x] = fibonacci(threadIdx.x % 12); }

__device__ __noinline__ float square(float x) { return x * x; }
__device__ __noinline__ float negative(float x) { return -x; }
__device__ __noinline__ float half_of(float x) { return x / 2; }
__device__ float (*const functions[])(float) = {square, negative, half_of};
__global__ void pointers_to_functions(float* out) {
  out[threadIdx.x] = functions[threadIdx.x * 7 % 3](static_cast<float>(threadIdx.x));
}

struct Shape {
  __device__ virtual float area() const = 0;
};
struct Square : Shape {
  float side;
  __device__ explicit Square(float s) : side(s) {}
  __device__ float area() const override { return side * side; }
};
struct Circle : Shape {
  float radius;
  __device__ explicit Circle(float r) : radius(r) {}
  __device__ float area() const override { return 3 * radius * radius; }
};
__global__ void virtual_functions(float* out) {
  Square square(threadIdx.x);
  Circle circle(threadIdx.x);
  const Shape* shapes[] = {&square, &circle};
  out[threadIdx.x] = shapes[threadIdx.x % 2]->area();
}

__global__ void switches(int* out) {
  int x = threadIdx.x;
  for (int i = 0; i < 5; ++i) {
    switch (x % 9) {
      case 0: x = x * 3 + 1; break;
      case 1: x += 5; [[fallthrough]];
      case 2: x ^= 0x55; break;
      case 3: x = x / 2; break;
      case 4: x = 7 - x; break;
      case 5: x *= x; break;
      case 6: x -= 11; break;
      case 7: x = ~x & 0xffff; break;
      default: x += 2;
    }
  }
  out[threadIdx.x] = x;
}
int host_switches(int x) {
  for (int i = 0; i < 5; ++i) {
    switch (x % 9) {
      case 0: x = x * 3 + 1; break;
      case 1: x += 5; [[fallthrough]];
      case 2: x ^= 0x55; break;
      case 3: x = x / 2; break;
      case 4: x = 7 - x; break;
      case 5: x *= x; break;
      case 6: x -= 11; break;
      case 7: x = ~x & 0xffff; break;
      default: x += 2;
    }
  }
  return x;
}

__host__ __device__ int collatz(unsigned n) {
  int steps = 0;
  while (true) {
    if (n == 1) break;
    ++steps;
    if (n % 2 == 0) {
      n /= 2;
      continue;
    }
    for (unsigned i = 0; i < 3; ++i) {
      if (i == n % 3) break;
      n += 0;
    }
    n = 3 * n + 1;
  }
  return steps;
}
__global__ void loops(int* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = collatz(blockIdx.x * blockDim.x + threadIdx.x + 1);
}

__global__ void local_arrays(int* out) {
  int values[20];
  for (int i = 0; i < 20; ++i) values[i] = i * threadIdx.x;
  for (int round = 0; round < 10; ++round) {
    const int at = (round * 7 + threadIdx.x) % 20, other = (at * 3 + 1) % 20;
    const int t = values[at];
    values[at] = values[other] + 1;
    values[other] = t;
  }
  int sum = 0;
  for (int i = 0; i < 20; ++i) sum += values[i] * (i + 1);
  out[threadIdx.x] = sum;
}
int host_local_arrays(int thread) {
  int values[20];
  for (int i = 0; i < 20; ++i) values[i] = i * thread;
  for (int round = 0; round < 10; ++round) {
    const int at = (round * 7 + thread) % 20, other = (at * 3 + 1) % 20;
    const int t = values[at];
    values[at] = values[other] + 1;
    values[other] = t;
  }
  int sum = 0;
  for (int i = 0; i < 20; ++i) sum += values[i] * (i + 1);
  return sum;
}

template <class F>
__global__ void apply(F f, int* out) {
  out[threadIdx.x] = f(threadIdx.x);
}

__global__ void prints() {
  if (threadIdx.x == 3) {
    printf("%d %u %5.2f|%-6s|%c %lld %x %%\n", -5, 7u, 3.14159, "text", 'z', 1ll << 40, 255);
    printf("%p %08.3e %+d no argument\n", nullptr, 12345.678, 9);
  }
}

__global__ void asserts(int limit) { assert(static_cast<int>(threadIdx.x) < limit); }

int main() {
  Array<int> out(64);
  recursion<<<1, 64>>>(out);
  launched("recursion");
  const int fib[] = {0, 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89};
  expect_all(out, [&](size_t i) { return fib[i % 12]; }, "recursion");
  {
    Array<float> values(64);
    pointers_to_functions<<<1, 64>>>(values);
    launched("pointers_to_functions");
    const auto truth = [](size_t i) { return i * 7 % 3 == 0 ? float(i * i) : i * 7 % 3 == 1 ? -float(i) : i / 2.0f; };
    expect_all(values, truth, "pointers to functions");
    virtual_functions<<<1, 64>>>(values);
    launched("virtual_functions");
    expect_all(values, [](size_t i) { return float((i % 2 ? 3 : 1) * i * i); }, "virtual functions");
  }
  switches<<<1, 64>>>(out);
  launched("switches");
  expect_all(out, [](size_t i) { return host_switches(i); }, "a switch");
  loops<<<2, 32>>>(out);
  launched("loops");
  expect_all(out, [](size_t i) { return collatz(i + 1); }, "loops of different lengths");
  local_arrays<<<1, 64>>>(out);
  launched("local_arrays");
  expect_all(out, [](size_t i) { return host_local_arrays(i); }, "arrays indexed at run time");
  const int offset = 5;
  apply<<<1, 64>>>([offset] __device__(int i) { return 2 * i + offset; }, out);
  launched("apply");
  expect_all(out, [](size_t i) { return int(2 * i + 5); }, "a lambda");
  prints<<<1, 32>>>();
  launched("prints");
  asserts<<<1, 32>>>(32);
  launched("asserts");
  expect(true, "an assertion that holds");
  return failures != 0;
}
