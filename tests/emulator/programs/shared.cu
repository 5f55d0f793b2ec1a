// SPDX-License-Identifier: Apache-2.0
// Shared memory and barriers of a block.
#include "program.h"

constexpr int kTile = 16;

__global__ void matmul(const float* a, const float* b, float* c, int m, int n, int k) {
  __shared__ float sA[kTile][kTile], sB[kTile][kTile + 1];
  const int row = blockIdx.y * kTile + threadIdx.y, column = blockIdx.x * kTile + threadIdx.x;
  float sum = 0;
  for (int begin = 0; begin < k; begin += kTile) {
    const int ka = begin + threadIdx.x, kb = begin + threadIdx.y;
    sA[threadIdx.y][threadIdx.x] = row < m && ka < k ? a[row * k + ka] : 0;
    sB[threadIdx.y][threadIdx.x] = column < n && kb < k ? b[kb * n + column] : 0;
    __syncthreads();
    for (int i = 0; i < kTile; ++i) sum += sA[threadIdx.y][i] * sB[i][threadIdx.x];
    __syncthreads();
  }
  if (row < m && column < n) c[row * n + column] = sum;
}

template <class T>
__global__ void block_sum(const T* in, T* out, int n) {
  extern __shared__ char raw[];
  T* s = reinterpret_cast<T*>(raw);
  s[threadIdx.x] = threadIdx.x < n ? in[threadIdx.x] : T{};
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) s[threadIdx.x] += s[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *out = s[0];
}

__global__ void bitonic_sort(uint32_t* values) {
  __shared__ uint32_t s[512];
  const int i = threadIdx.x;
  s[i] = values[i];
  for (int size = 2; size <= 512; size *= 2) {
    for (int step = size / 2; step > 0; step /= 2) {
      __syncthreads();
      const int other = i ^ step;
      if (other > i && (s[i] > s[other]) == ((i & size) == 0)) {
        const uint32_t t = s[i];
        s[i] = s[other];
        s[other] = t;
      }
    }
  }
  __syncthreads();
  values[i] = s[i];
}

__global__ void barriers_that_count(int* out) {
  const int odd = threadIdx.x % 2, last = threadIdx.x == blockDim.x - 1;
  out[threadIdx.x] = __syncthreads_count(odd) + 1000 * __syncthreads_or(last) + 10000 * __syncthreads_and(odd);
}

// Warps 0 and 1 hand values to warps 2 and 3 through two named barriers.
__global__ void named_barriers(int* out) {
  __shared__ int s[64];
  const int t = threadIdx.x;
  for (int round = 0; round < 3; ++round) {
    if (t < 64) {
      s[t] = t * t + round;
      asm volatile("bar.arrive 1, 128;" ::: "memory");
      asm volatile("bar.sync 2, 128;" ::: "memory");
    } else {
      asm volatile("bar.sync 1, 128;" ::: "memory");
      out[round * 64 + t - 64] = s[t - 64];
      asm volatile("bar.arrive 2, 128;" ::: "memory");
    }
  }
}

__global__ void early_exit(int* out) {
  __shared__ int s[96];
  if (threadIdx.x >= 96) return;  // a whole warp: the barriers below need it no more
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = s[95 - threadIdx.x];
}

__global__ void large(int* out, int count) {
  extern __shared__ int big[];
  for (int i = threadIdx.x; i < count; i += blockDim.x) big[i] = i;
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = big[count - 1 - i];
}

struct Plan {
  float4 rows[8][4];
  uint8_t bytes[5];
  double last;
};
__global__ void plan(double* out) {
  extern __shared__ __align__(16) char raw[];
  auto& smem = *reinterpret_cast<Plan*>(raw);
  if (threadIdx.x < 32) smem.rows[threadIdx.x / 4][threadIdx.x % 4] = make_float4(threadIdx.x, 1, 2, 3);
  if (threadIdx.x < 5) smem.bytes[threadIdx.x] = 250 + threadIdx.x;
  if (threadIdx.x == 33) smem.last = 0.125;
  __syncthreads();
  out[threadIdx.x] = smem.rows[threadIdx.x % 8][0].x + smem.bytes[threadIdx.x % 5] + smem.last;
}

int main() {
  {
    const int m = 37, n = 50, k = 29;
    const auto a = generate<float>(m * k, [](size_t i) { return float(i % 7) - 3; });
    const auto b = generate<float>(k * n, [](size_t i) { return float(i % 5) - 2; });
    Array<float> da(a), db(b), c(m * n);
    matmul<<<dim3((n + kTile - 1) / kTile, (m + kTile - 1) / kTile), dim3(kTile, kTile)>>>(da, db, c, m, n, k);
    launched("matmul");
    const auto truth = [&](size_t at) {
      float sum = 0;
      for (int i = 0; i < k; ++i) sum += a[at / n * k + i] * b[i * n + at % n];
      return sum;
    };
    expect_all(c, truth, "a tiled product");
  }
  {
    Array<double> in(generate<double>(100, [](size_t i) { return i * 0.5; })), out(1);
    block_sum<<<1, 128, 128 * sizeof(double)>>>(static_cast<const double*>(in), static_cast<double*>(out), 100);
    launched("block_sum");
    expect_all(out, [](size_t) { return 2475.0; }, "a sum in dynamic shared memory");
    Array<int> few(generate<int>(64, [](size_t i) { return int(i); })), sum(1);
    block_sum<<<1, 64, 64 * sizeof(int)>>>(static_cast<const int*>(few), static_cast<int*>(sum), 64);
    launched("block_sum");
    expect_all(sum, [](size_t) { return 2016; }, "the same of integers");
  }
  {
    Random random;
    auto values = generate<uint32_t>(512, [&](size_t) { return random(); });
    Array<uint32_t> device(values);
    bitonic_sort<<<1, 512>>>(device);
    launched("bitonic_sort");
    const auto sorted = device.host();
    uint64_t before = 0, after = 0;
    bool ascending = true;
    for (int i = 0; i < 512; ++i) {
      before += values[i], after += sorted[i];
      ascending = ascending && (i == 0 || sorted[i - 1] <= sorted[i]);
    }
    expect(ascending && before == after, "a bitonic sort");
  }
  {
    Array<int> out(96);
    barriers_that_count<<<1, 96>>>(out);
    launched("barriers_that_count");
    expect_all(out, [](size_t) { return 48 + 1000; }, "barriers that count, or and and");
  }
  {
    Array<int> out(3 * 64);
    named_barriers<<<1, 128>>>(out);
    launched("named_barriers");
    expect_all(out, [](size_t i) { return int(i % 64 * (i % 64) + i / 64); }, "named barriers");
  }
  {
    Array<int> out(96);
    early_exit<<<1, 128>>>(out);
    launched("early_exit");
    expect_all(out, [](size_t i) { return 95 - int(i); }, "a barrier after some threads have left");
  }
  {
    const int count = 20000;  // 80,000 bytes
    Array<int> out(count);
    succeed(cudaFuncSetAttribute(large, cudaFuncAttributeMaxDynamicSharedMemorySize, count * 4), "opting in");
    large<<<1, 256, count * 4>>>(out, count);
    launched("large");
    expect_all(out, [](size_t i) { return count - 1 - int(i); }, "shared memory beyond 48 KiB");
  }
  {
    Array<double> out(64);
    plan<<<1, 64, sizeof(Plan)>>>(out);
    launched("plan");
    expect_all(
        out, [](size_t i) { return i % 8 * 4 + double((250 + i % 5) % 256) + 0.125; }, "a struct in shared memory");
  }
  return failures != 0;
}
