// SPDX-License-Identifier: Apache-2.0
// Products of fragments in the forward and the backward kernels of attention, a warp's work. Half elements are multiplied as
// they are. float32 is split: x = high + low, two tf32, and of the four products of two numbers three are added up in
// float32, the small ones first; what is left out is 2^-22 of the product. docs/attention.md tells why.
#pragma once

#include "attention_fragments_cuda.h"

namespace fmkernels {
namespace {

// ---- operands -------------------------------------------------------------------------------------------------------

// Four registers as a fragment: the same or, split, x = high + low, high the nearest tf32 and low, whose last bit the
// product ignores, within 2^-23 of x. Of what is not finite, or 0x1.ffep127 and more, high or low is not finite either. In
// three instructions where cvt.rna.tf32, which minds NaN, makes five.
template <class T>
__device__ __forceinline__ void split(uint32_t (&r)[T::kFragment], const uint32_t (&whole)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (T::kSplits) {
      r[i] = (whole[i] + 0x1000) & 0xffffe000;
      r[4 + i] = float_bits(float_from_bits(whole[i]) - float_from_bits(r[i]));
    } else {
      r[i] = whole[i];
    }
  }
}
// The same of finite numbers, all of which stay finite: high is cut off, and low is rounded.
template <class T>
__device__ __forceinline__ void split_finite(uint32_t (&r)[T::kFragment], const uint32_t (&whole)[4]) {
  static_assert(T::kSplits);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    r[i] = whole[i] & 0xffffe000;
    r[4 + i] = float_bits(float_from_bits(whole[i]) - float_from_bits(r[i])) + 0x1000;
  }
}

// ldmatrix.x4 of the fragment at row `row` and column step `step`. Rows are whole multiples of what the swizzle permutes.
template <class T, int row, int step>
constexpr int kFragmentOffset = row * T::kRowBytes + step * T::kStepBytes / T::kPermutedBytes * T::kPermutedBytes;
template <class T, int row, int step, class Steps>
__device__ __forceinline__ void load_fragment(uint32_t (&r)[T::kFragment], const Steps& columns) {
  uint32_t matrices[4];
  ptx::ldmatrix_x4<kFragmentOffset<T, row, step>>(matrices, columns.template of<step>());
  split<T>(r, matrices);
}
// The fragment of the transposed operand at row `row` and columns 16 * pair. One that is split is finite.
template <class T, int row, int pair>
__device__ __forceinline__ void load_transposed(uint32_t (&r)[T::kFragment], const Columns<T, false>& columns) {
  if constexpr (T::kSplits) {
    uint32_t whole[4];
    static_for<2>([&]<int i>() {
      constexpr int step = 2 * pair + i, kOffset = kFragmentOffset<T, row, step>;
      const uint32_t even = columns.template of<step>(), odd = even ^ 16;  // the swizzle of the row after it
      whole[2 * i] = *static_cast<const uint32_t*>(__cvta_shared_to_generic(even + kOffset));
      whole[2 * i + 1] = *static_cast<const uint32_t*>(__cvta_shared_to_generic(odd + kOffset + T::kRowBytes));
    });
    split_finite<T>(r, whole);
  } else {
    ptx::ldmatrix_x4_trans<kFragmentOffset<T, row, pair>>(r, columns.template of<pair>());
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

// sum += a b of fragments, b the first or the second of the two that b holds.
template <class T, int which>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[T::kFragment],
                                             const uint32_t (&b)[T::kFragment]) {
  constexpr int i = 2 * which;
  if constexpr (T::kSplits) {
    ptx::mma_m16n8k8_tf32(sum, a[4], a[5], a[6], a[7], b[i], b[i + 1]);
    ptx::mma_m16n8k8_tf32(sum, a[0], a[1], a[2], a[3], b[4 + i], b[5 + i]);
    ptx::mma_m16n8k8_tf32(sum, a[0], a[1], a[2], a[3], b[i], b[i + 1]);
  } else {
    ptx::mma_m16n8k16<typename T::Element>(sum, a, b[i], b[i + 1]);
  }
}
// Of split products the sums of a few steps, which become a part of x by an addition that rounds. A tensor core cuts sums
// off, always towards zero, and would do so at the size of the whole sum, at each of many steps.
constexpr int kStepsOfPart = 4;
template <class T, int step, int kTiles>
__device__ __forceinline__ void add_part(float (&x)[T::kRowTiles][kTiles][4], float (&part)[T::kRowTiles][kTiles][4]) {
  if constexpr (step % kStepsOfPart == kStepsOfPart - 1) {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[m][n][i] += part[m][n][i], part[m][n][i] = 0.0f;
      }
    }
  }
  if constexpr (step % 2 == 1) __syncwarp();  // no load of the next steps comes earlier: what it holds would be spilled
}

// The accumulators of kStepRows columns as the left operand of a product, rounded where elements are half.
template <class T, int step, int kTiles>
__device__ __forceinline__ void pack_step(uint32_t (&a)[T::kFragment], const float (&x)[kTiles][4]) {
  using Element = typename T::Element;
  if constexpr (T::kSplits) {  // k = t is column 2t of the accumulators, k = t+4 is 2t+1
    const auto& tile = x[step];
    split<T>(a, {float_bits(tile[0]), float_bits(tile[2]), float_bits(tile[1]), float_bits(tile[3])});
  } else {
    const auto &left = x[2 * step], &right = x[2 * step + 1];
    a[0] = ptx::pack<Element>(left[0], left[1]);
    a[1] = ptx::pack<Element>(left[2], left[3]);
    a[2] = ptx::pack<Element>(right[0], right[1]);
    a[3] = ptx::pack<Element>(right[2], right[3]);
  }
}

// sum += x y for accumulators x, rounded where elements are half, and y of 8 kTiles rows from row `first` on of what
// `columns` addresses.
template <class T, int first, int kTiles>
__device__ __forceinline__ void add_product(float (&sum)[T::kRowTiles][T::kColumnTiles][4],
                                            const float (&x)[T::kRowTiles][kTiles][4],
                                            const Columns<T, false>& columns) {
  constexpr int kSteps = kTiles * 8 / T::kStepRows;
  if constexpr (
      T::kSplits) {  // columns outside: what the block adds is summed first, and then added by a rounding addition
    uint32_t a[kSteps][T::kRowTiles][T::kFragment];
    static_for<kSteps>([&]<int step>() {
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) pack_step<T, step>(a[step][m], x[m]);
    });
    static_for<T::kColumnTiles / 2>([&]<int pair>() {
      float of_block[T::kRowTiles][2][4] = {};
      static_for<kSteps>([&]<int step>() {
        uint32_t b[T::kFragment];
        load_transposed<T, first + step * T::kStepRows, pair>(b, columns);
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m) {
          multiply_add<T, 0>(of_block[m][0], a[step][m], b);
          multiply_add<T, 1>(of_block[m][1], a[step][m], b);
        }
      });
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
        for (int i = 0; i < 8; ++i) sum[m][2 * pair + i / 4][i % 4] += of_block[m][i / 4][i % 4];
      }
      __syncwarp();  // as in add_part
    });
  } else {
    static_for<kSteps>([&]<int step>() {
      uint32_t a[T::kRowTiles][T::kFragment];
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) pack_step<T, step>(a[m], x[m]);
      static_for<T::kColumnTiles / 2>([&]<int pair>() {
        uint32_t b[T::kFragment];
        load_transposed<T, first + step * T::kStepRows, pair>(b, columns);
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m) {
          multiply_add<T, 0>(sum[m][2 * pair], a[m], b);
          multiply_add<T, 1>(sum[m][2 * pair + 1], a[m], b);
        }
      });
    });
  }
}

// A split product with an infinity is NaN. Those of a warp's products x = first + a b that are not finite are made anew by
// fused multiply-adds; the others keep their bits. a_row, b_row: the rows of the operands that x begins with.
template <class T, int a_row, int b_row, int kTiles, class A, class B, class First>
__device__ __forceinline__ void correct_nonfinite(float (&x)[T::kRowTiles][kTiles][4], const A& a_columns,
                                                  const B& b_columns, First&& first) {
  static_assert(T::kPermutedBytes == 128);
  float zero[4] = {};  // NaN, where something is not finite
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) zero[i] = fmaf(x[m][n][i], 0.0f, zero[i]);
    }
  }
  if (__builtin_expect(!__any_sync(ptx::kAllLanes, (zero[0] + zero[1]) + (zero[2] + zero[3]) != 0.0f), 1)) return;
  const int lane = threadIdx.x % kWarp, row = lane / 4, column = lane % 4 * 2;
  const uint32_t a = a_columns.template of<0>() - lane_offset<T>(true) + row * T::kRowBytes;
  const uint32_t b = b_columns.template of<0>() - lane_offset<T>(false) + column * T::kRowBytes;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float4 start = first(m, n);
      float exact[4] = {start.x, start.y, start.z, start.w};
#pragma unroll 1
      for (int c = 0; c < T::kDim; ++c) {
        const auto value = [&](uint32_t first_row, int r, int more_rows) {
          const uint32_t in_row = (c / 4 ^ r) * 16 + c % 4 * 4;
          return *static_cast<const float*>(__cvta_shared_to_generic(first_row + in_row + more_rows * T::kRowBytes));
        };
#pragma unroll
        for (int i = 0; i < 4; ++i)
          exact[i] = fmaf(value(a, row, a_row + m * 16 + i / 2 * 8), value(b, column + i % 2, b_row + n * 8 + i % 2),
                          exact[i]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!isfinite(x[m][n][i])) x[m][n][i] = exact[i];
      }
    }
  }
}

}  // namespace
}  // namespace fmkernels
