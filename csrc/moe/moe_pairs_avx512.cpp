// SPDX-License-Identifier: Apache-2.0
// moe_pairs_avx512.cpp: vdpbf16ps over pairs of rows: a lane is a column of b, and the pair of a column of a is broadcast.
//
// Tile      12 columns of a x 32 of b: 24 vectors of sums, 2 of b, 1 broadcast. Both are packed as pairs, [pair][column].
// Cache     A panel of 32 columns of b is in the first level, kPairLeft columns of a in the second.
// Numerics  Products are exact, sums rounded to nearest in the order of the rows, subnormal numbers taken for 0: first the second row
//           of a pair, then the first. Sums of kPairChunk rows are added in their order.
#include "moe_bfloat16_avx512.h"
#include "moe_pairs.h"

namespace fmkernels {
namespace {

constexpr int64_t kTile = 12;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline __mmask16 first_of_half(int64_t count) { return static_cast<__mmask16>(first_lanes(count)); }

// Up to 32 columns of `count` rows to out[pair][stride]; behind the last of an odd number of rows is one of zeros.
inline void pack(const BFloat16* from, int64_t row_stride, int64_t count, int64_t num_columns, uint32_t* out,
                 int64_t stride) {
  const RowPairs pairs;
  const __mmask32 mask = first_lanes(num_columns);
  const __mmask16 masks[] = {first_of_half(num_columns), first_of_half(num_columns - 16)};
  for (int64_t k = 0; k < count; k += 2, from += 2 * row_stride, out += stride) {
    const __m512i first = _mm512_maskz_loadu_epi16(mask, from);
    const __m512i second = k + 1 < count ? _mm512_maskz_loadu_epi16(mask, from + row_stride) : _mm512_setzero_si512();
    _mm512_mask_storeu_epi32(out, masks[0], pairs.low(first, second));
    _mm512_mask_storeu_epi32(out + 16, masks[1], pairs.high(first, second));
  }
}

struct Tile {
  const uint32_t *left, *panel;
  int64_t num_pairs;
  float* sums;  // of earlier rows
  int64_t sum_stride;
  BFloat16* out;  // null: more rows come
  int64_t out_stride, num_columns;
  bool is_first;
};

template <int kRows>
__attribute__((noinline)) void multiply(const Tile& t) {
  __m512 acc[kRows][2];
  for (auto& row : acc) row[0] = row[1] = _mm512_setzero_ps();
  const uint32_t *left = t.left, *panel = t.panel;
  for (int64_t k = 0; k < t.num_pairs; ++k, left += kPairLeft, panel += kPairColumns) {
    const __m512bh b0 = (__m512bh)_mm512_load_si512(panel), b1 = (__m512bh)_mm512_load_si512(panel + 16);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(static_cast<int>(left[r]));
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], a, b0);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], a, b1);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      float* sums = t.sums + r * t.sum_stride + 16 * i;
      __m512 sum = acc[r][i];
      if (!t.is_first) sum = _mm512_add_ps(_mm512_load_ps(sums), sum);
      if (t.out == nullptr) {
        _mm512_store_ps(sums, sum);
      } else {
        const __mmask16 is_nan = _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q);
        const __m256i rounded = _mm256_mask_set1_epi16((__m256i)_mm512_cvtneps_pbh(sum), is_nan, 0x7fff);
        _mm256_mask_storeu_epi16(t.out + r * t.out_stride + 16 * i, first_of_half(t.num_columns - 16 * i), rounded);
      }
    }
  }
}

inline void multiply_rows(int64_t rows, const Tile& t) {
  switch (rows) {
    case 1: return multiply<1>(t);
    case 2: return multiply<2>(t);
    case 3: return multiply<3>(t);
    case 4: return multiply<4>(t);
    case 5: return multiply<5>(t);
    case 6: return multiply<6>(t);
    case 7: return multiply<7>(t);
    case 8: return multiply<8>(t);
    case 9: return multiply<9>(t);
    case 10: return multiply<10>(t);
    case 11: return multiply<11>(t);
    default: return multiply<12>(t);
  }
}

}  // namespace

template <>
void run_moe_pairs<kIsa>(const MoePairsParams& p) {
  const int64_t sum_stride = (p.b_columns + kPairColumns - 1) / kPairColumns * kPairColumns;
  for (int64_t row = 0; row < p.rows; row += kPairChunk) {
    const int64_t count = smaller(kPairChunk, p.rows - row), num_pairs = (count + 1) / 2;
    const bool is_last = row + count == p.rows;
    for (int64_t i = 0; i < p.a_columns; i += 32) {
      pack(p.a + row * p.a_stride + i, p.a_stride, count, p.a_columns - i, p.left + i, kPairLeft);
    }
    for (int64_t column = 0; column < p.b_columns; column += kPairColumns) {
      pack(p.b + row * p.b_stride + column, p.b_stride, count, p.b_columns - column, p.panel, kPairColumns);
      for (int64_t i = 0; i < p.a_columns; i += kTile) {
        multiply_rows(
            smaller(kTile, p.a_columns - i),
            {p.left + i, p.panel, num_pairs, p.sums + i * sum_stride + column, sum_stride,
             is_last ? p.out + i * p.out_stride + column : nullptr, p.out_stride, p.b_columns - column, row == 0});
      }
    }
  }
}

}  // namespace fmkernels
