// SPDX-License-Identifier: Apache-2.0
// A product of matrices: mma.sync fed by ldmatrix and cp.async.
#include <cuda_bf16.h>
#include <cuda_pipeline.h>

#include "program.h"

// c[16, 8] = a[16, 64] b[8, 64]^T in bfloat16, two stages of 32 columns.
__global__ void pipelined(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  __shared__ alignas(16) __nv_bfloat16 sA[2][16][40],
      sB[2][8][40];  // [stage][row][32 columns, and 8 against conflicts]
  const int lane = threadIdx.x;
  const auto load = [&](int stage) {
    for (int part = lane; part < 16 * 4; part += 32) {
      __pipeline_memcpy_async(&sA[stage][part / 4][part % 4 * 8], a + part / 4 * 64 + stage * 32 + part % 4 * 8, 16);
    }
    __pipeline_memcpy_async(&sB[stage][lane / 4][lane % 4 * 8], b + lane / 4 * 64 + stage * 32 + lane % 4 * 8, 16);
    __pipeline_commit();
  };
  load(0);
  load(1);
  float sum[4] = {};
  for (int stage = 0; stage < 2; ++stage) {
    if (stage == 0) __pipeline_wait_prior(1);
    else __pipeline_wait_prior(0);
    __syncwarp();
    for (int k = 0; k < 32; k += 16) {
      uint32_t ra[4], rb[2];
      const auto rows_a = static_cast<uint32_t>(__cvta_generic_to_shared(&sA[stage][lane % 16][k + lane / 16 * 8]));
      const auto rows_b = static_cast<uint32_t>(__cvta_generic_to_shared(&sB[stage][lane % 8][k + lane / 8 % 2 * 8]));
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(ra[0]), "=r"(ra[1]), "=r"(ra[2]), "=r"(ra[3])
                   : "r"(rows_a));
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(rb[0]), "=r"(rb[1]) : "r"(rows_b));
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(ra[0]), "r"(ra[1]), "r"(ra[2]), "r"(ra[3]), "r"(rb[0]), "r"(rb[1]));
    }
  }
  const int row = lane / 4, column = lane % 4 * 2;
  c[row * 8 + column] = sum[0];
  c[row * 8 + column + 1] = sum[1];
  c[(row + 8) * 8 + column] = sum[2];
  c[(row + 8) * 8 + column + 1] = sum[3];
}

int main() {
  const auto small = [](size_t i) { return float(int(i * 7 % 13) - 6) / 4; };
  {
    Array<__nv_bfloat16> a(generate<__nv_bfloat16>(16 * 64, [&](size_t i) { return __float2bfloat16(small(i)); }));
    Array<__nv_bfloat16> b(generate<__nv_bfloat16>(8 * 64, [&](size_t i) { return __float2bfloat16(small(5 * i)); }));
    Array<float> c(128);
    pipelined<<<1, 32>>>(a, b, c);
    launched("pipelined");
    const auto truth = [&](size_t at) {
      float sum = 0;
      for (int k = 0; k < 64; ++k) sum += small(at / 8 * 64 + k) * small(5 * (at % 8 * 64 + k));
      return sum;
    };
    expect_all(c, truth, "cp.async, ldmatrix and mma.sync");
  }
  return failures != 0;
}
