// SPDX-License-Identifier: Apache-2.0
// One function per instruction of the PTX ISA, its contract above it; inline assembly stands here and nowhere else.
//
// A lane of a warp is 4 * g + t. Fragments of m16n8k16 hold two 16-bit elements a register:
//   A [16 x 16]  a[0] row g, columns 2t, 2t+1;  a[1] row g+8;  a[2] row g, columns 2t+8, 2t+9;  a[3] row g+8
//   B [16 x 8]   b[0] rows 2t, 2t+1 of column g;  b[1] rows 2t+8, 2t+9
//   C [16 x 8]   c[0], c[1] row g, columns 2t, 2t+1;  c[2], c[3] row g+8
// The accumulators of two neighbouring C tiles, rounded, are therefore an A fragment of the next product.
// Fragments of m16n8k8 hold one tf32 element a register:
//   A [16 x 8]   a[0] row g, column t;  a[1] row g+8;  a[2] row g, column t+4;  a[3] row g+8
//   B [8 x 8]    b[0] row t of column g;  b[1] row t+4
//   C [16 x 8]   as above
// The order of k is free, so the accumulators of a C tile are an A fragment too: k = t is its column 2t, k = t+4 its 2t+1.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fmkernels {
constexpr int kWarp = 32;  // lanes
}

namespace fmkernels::ptx {

constexpr uint32_t kAllLanes = 0xffffffffu;

// mov.u32 of %tid.x: the thread of its block, read where it stands. What is computed from it in a loop is computed in every turn,
// and takes no registers from one to the next.
__device__ __forceinline__ uint32_t tid_x() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Address of shared memory as the instructions below take it.
__device__ __forceinline__ uint32_t smem_address(const void* smem) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}

// cp.async.cg: 16 bytes from gmem + kGmem to smem + kSmem where wanted and count > kCount, both 16-byte aligned. They are
// there for this thread after a cp_async_wait that covers them, for the others after a barrier that follows it.
template <int kSmem, int kGmem, int kCount>
__device__ __forceinline__ void cp_async_16_if(bool wanted, int count, uint32_t smem, const void* gmem) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.s32 p, %0, 0;\n setp.gt.and.s32 p, %1, %2, p;\n"
      " @p cp.async.cg.shared.global [%3 + %4], [%5 + %6], 16;\n}" ::"r"(static_cast<int>(wanted)),
      "r"(count), "n"(kCount), "r"(smem), "n"(kSmem), "l"(gmem), "n"(kGmem)
      : "memory");
}
// The same, always.
template <int kSmem, int kGmem>
__device__ __forceinline__ void cp_async_16(uint32_t smem, const void* gmem) {
  asm volatile("cp.async.cg.shared.global [%0 + %1], [%2 + %3], 16;" ::"r"(smem), "n"(kSmem), "l"(gmem), "n"(kGmem)
               : "memory");
}
// The same from gmem to smem, or 16 bytes of zeros where !valid; gmem is not read then.
__device__ __forceinline__ void cp_async_16_or_zero(uint32_t smem, const void* gmem, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "r"(valid ? 16 : 0) : "memory");
}
// The same from gmem to smem + kSmem, or zeros where !valid.
template <int kSmem>
__device__ __forceinline__ void cp_async_16_or_zero(uint32_t smem, const void* gmem, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0 + %1], [%2], 16, %3;" ::"r"(smem), "n"(kSmem), "l"(gmem),
               "r"(valid ? 16 : 0)
               : "memory");
}
// The same from gmem to smem of the first num_bytes, 0 to 16, and zeros behind them. Where num_bytes is neither 0 nor 16 for
// the compiler to see, that takes it six instructions.
__device__ __forceinline__ void cp_async_16_padded(uint32_t smem, const void* gmem, int num_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "r"(num_bytes) : "memory");
}
// cp.async.ca: the first num_bytes, 0 to 8, from gmem to smem + kSmem, and zeros behind them; both 8-byte aligned.
template <int kSmem>
__device__ __forceinline__ void cp_async_8_padded(uint32_t smem, const void* gmem, int num_bytes) {
  asm volatile("cp.async.ca.shared.global [%0 + %1], [%2], 8, %3;" ::"r"(smem), "n"(kSmem), "l"(gmem), "r"(num_bytes)
               : "memory");
}
// cp.async.commit_group: what this thread has issued since the last one becomes a group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// cp.async.wait_group: all groups of this thread but the newest kPending have landed.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ld.shared and st.shared of 4 bytes at smem + kOffset.
template <int kOffset = 0>
__device__ __forceinline__ uint32_t ld_shared(uint32_t smem) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(x) : "r"(smem), "n"(kOffset) : "memory");
  return x;
}
template <int kOffset = 0>
__device__ __forceinline__ void st_shared(uint32_t smem, uint32_t x) {
  asm volatile("st.shared.u32 [%0 + %1], %2;" ::"r"(smem), "n"(kOffset), "r"(x) : "memory");
}

// st.release.sys and ld.acquire.sys of 4 bytes in global memory of any GPU or of the host: what this thread has written, or
// seen written before a barrier, is there for whoever acquires the stored value, and for those behind a barrier with it.
__device__ __forceinline__ void st_release_sys(uint32_t* gmem, uint32_t x) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(gmem), "r"(x) : "memory");
}
__device__ __forceinline__ uint32_t ld_acquire_sys(const uint32_t* gmem) {
  uint32_t x;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(x) : "l"(gmem) : "memory");
  return x;
}
// %globaltimer: nanoseconds; how often it counts on depends on the GPU, from 32 ns to about 1 us.
__device__ __forceinline__ uint64_t globaltimer() {
  uint64_t x;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(x));
  return x;
}

// ldmatrix.x4 at smem + kOffset: four 8 x 8 matrices of 16-bit elements; lanes 8i .. 8i+7 give the rows of matrix i, 16
// bytes each. A lane gets elements 2t, 2t+1 of row g of each. All lanes of the warp together.
template <int kOffset = 0>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem), "n"(kOffset)
               : "memory");
}
// The same with each matrix transposed: a lane gets rows 2t, 2t+1 of column g.
template <int kOffset = 0>
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem), "n"(kOffset)
               : "memory");
}

// mma.m16n8k16: c += a b with float32 accumulators, or d = a b + c. All lanes of the warp together.
template <class Element>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <class Element>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float4 c);

template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                       float4 c) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c.x), "f"(c.y), "f"(c.z), "f"(c.w));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                   float4 c) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c.x), "f"(c.y), "f"(c.z), "f"(c.w));
}

// mma.sp.m16n8k32: c += a b with float32 accumulators, where of each four neighbours in a row of A two are kept: a is the
// A fragment of m16n8k16 of the kept ones. B [32 x 8]: b[i] rows 2t + 8i, 2t + 8i + 1 of column g. Metadata tell the
// places of the kept ones in their four, two bits each, the smaller one first, in the lanes 4g + 2 kSelector (columns
// 0-15 of A) and the one after it (16-31): of row g in the low half, of row g + 8 in the high one. All lanes of the warp
// together. ordered_metadata is there from PTX ISA 8.5 (CUDA 12.5) on; without it later GPUs may be slow.
template <class Element, int kSelector>
__device__ __forceinline__ void mma_sp_m16n8k32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                uint32_t metadata) {
  if constexpr (kDType<Element> == DType::kBFloat16) {
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
          "n"(kSelector));
  } else {
    static_assert(kDType<Element> == DType::kFloat16);
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
          "n"(kSelector));
  }
}

// movmatrix: the transpose of an 8 x 8 matrix of 16-bit elements, of which a lane holds 2t, 2t+1 of row g before and
// after. All lanes of the warp together.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// mma.m16n8k8 of tf32: c += a b with float32 accumulators; of a and b the low 13 bits are ignored. All lanes of the warp
// together.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                 uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// cvt.rn.x2: two floats rounded to nearest even in one register, `low` in the lower half.
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// fma.rn.x2: a * b + c of two elements a register, subnormals kept.
template <class Element>
__device__ __forceinline__ uint32_t fma_x2(uint32_t a, uint32_t b, uint32_t c);

template <>
__device__ __forceinline__ uint32_t fma_x2<BFloat16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <>
__device__ __forceinline__ uint32_t fma_x2<Half>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// mad.wide: address + a * b, in one instruction, which the compiler does not take apart to keep products in registers.
__device__ __forceinline__ const void* mad_wide(int a, int b, const void* address) {
  const void* sum;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(sum) : "r"(a), "r"(b), "l"(address));
  return sum;
}

// ex2.approx.ftz: 2^x within 2 units in the last place; subnormal results are 0, -infinity gives 0.
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// lg2.approx.ftz: log2(x), absolute error below 2^-22; 0 gives -infinity.
__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// rcp.approx.ftz: 1 / x within 1 unit in the last place; infinity gives 0.
__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fmkernels::ptx
