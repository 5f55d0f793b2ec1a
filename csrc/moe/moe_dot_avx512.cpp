// SPDX-License-Identifier: Apache-2.0
// moe_dot_avx512.cpp: vdpbf16ps, 32 products an instruction, over memory as it lies: nothing is packed or becomes float32.
//
// Tile      6 rows x 4 columns: 24 vectors of sums, 4 of columns, 1 of a row. A lane has every 16th pair of the inner dimension; lanes
//           are added at the end of kChain elements, four columns of a row together.
// Cache     The rows of a chain are in the first level, while columns come from the second, or from memory for the first rows.
// Numerics  Products are exact, sums rounded to nearest, subnormal numbers taken for 0. Lanes are added in a fixed order, and so are
//           chains: an element has the same bits in every tile.
#include "moe_bfloat16_avx512.h"
#include "moe_dot.h"

namespace fmkernels {
namespace {

constexpr int64_t kChain = 2048;  // elements of a row: 24 KiB in all

inline __m512bh load(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh load_first(const BFloat16* p, __mmask32 mask) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, p); }

// The sums of the lanes of four vectors.
inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Four columns and `count` elements from `first` on. kAsks: of what comes next, a line of each column for a line of it.
template <int kRows, bool kAsks>
__attribute__((noinline)) void multiply(const MoeDotParams& p, int64_t column, int64_t first, int64_t count) {
  __m512 acc[kRows][kDotColumns];
  const BFloat16 *rows[kRows], *columns[kDotColumns], *ahead[kDotColumns];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = p.rows[r] + first;
    for (int c = 0; c < kDotColumns; ++c) acc[r][c] = _mm512_setzero_ps();
  }
  for (int c = 0; c < kDotColumns; ++c) {
    columns[c] = p.columns[column + c] + first;
    if constexpr (kAsks) ahead[c] = p.ahead[column + c] + first;
  }
  auto add = [&](auto&& load_at) __attribute__((always_inline)) {
    __m512bh b[kDotColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kDotColumns; ++c) b[c] = load_at(columns[c]);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m512bh a = load_at(rows[r]);
#pragma GCC unroll 4
      for (int c = 0; c < kDotColumns; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], a, b[c]);
    }
  };
  int64_t k = 0;
  for (; k + kVector <= count; k += kVector) {
    if constexpr (kAsks) {
#pragma GCC unroll 4
      for (int c = 0; c < kDotColumns; ++c) __builtin_prefetch(ahead[c] + k, 0, 2);
    }
    add([k](const BFloat16* from) __attribute__((always_inline)) { return load(from + k); });
  }
  if (k < count) {
    const __mmask32 mask = first_lanes(count - k);
    add([k, mask](const BFloat16* from) __attribute__((always_inline)) { return load_first(from + k, mask); });
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    float* to = p.sums + r * p.stride + column;
    __m128 sums = sums_of(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
    if (first > 0) sums = _mm_add_ps(_mm_loadu_ps(to), sums);
    _mm_storeu_ps(to, sums);
  }
}

template <int kRows>
void dot(const MoeDotParams& p) {
  for (int64_t first = 0; first < p.inner; first += kChain) {
    const int64_t count = p.inner - first < kChain ? p.inner - first : kChain;
    for (int64_t column = 0; column < p.num_columns; column += kDotColumns) {
      p.ahead != nullptr ? multiply<kRows, true>(p, column, first, count)
                         : multiply<kRows, false>(p, column, first, count);
    }
  }
}

// Rows [k, k + 8) of 32 columns: of every eighth column from i on the elements in 16 bytes of out[i]. Rows past the last are zeros.
inline void transpose_eight(const MoeDotColumnsParams& p, int64_t k, int64_t column, __mmask32 mask,
                            __m512i (&out)[8]) {
  __m512i rows[8], pairs[8], quads[8];
  const BFloat16* from = p.from + k * p.row_stride + column;
  for (int64_t i = 0; i < 8; ++i, from += p.row_stride) {
    rows[i] = _mm512_setzero_si512();
    if (k + i >= p.inner) continue;
    rows[i] = _mm512_maskz_loadu_epi16(mask, from);
    __builtin_prefetch(from + p.num_columns, 0, 2);
  }
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm512_unpacklo_epi16(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi16(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int half = 0; half < 2; ++half) {
      quads[i + 2 * half] = _mm512_unpacklo_epi32(pairs[i + half], pairs[i + half + 2]);
      quads[i + 2 * half + 1] = _mm512_unpackhi_epi32(pairs[i + half], pairs[i + half + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = _mm512_unpacklo_epi64(quads[i], quads[i + 4]);
    out[2 * i + 1] = _mm512_unpackhi_epi64(quads[i], quads[i + 4]);
  }
}

// What sums_of adds, of 32 columns by two vectors: what a lane has there is a vector here.
inline __m512 sum_of_lanes(const float* lanes, int64_t stride) {
  __m512 quarters[4];
  for (int64_t q = 0; q < 4; ++q) {
    const float* x = lanes + 4 * q * stride;
    quarters[q] = _mm512_add_ps(_mm512_add_ps(_mm512_load_ps(x), _mm512_load_ps(x + 2 * stride)),
                                _mm512_add_ps(_mm512_load_ps(x + stride), _mm512_load_ps(x + 3 * stride)));
  }
  return _mm512_add_ps(_mm512_add_ps(quarters[0], quarters[2]), _mm512_add_ps(quarters[1], quarters[3]));
}

inline int pair_at(const BFloat16* row, int64_t k, int64_t inner) {
  uint32_t pair = 0;
  __builtin_memcpy(&pair, row + k, k + 1 < inner ? 4 : 2);
  return static_cast<int>(pair);
}

template <int kRows>
void dot_few(const MoeDotFewParams& p) {
  const RowPairs pairs;
  constexpr int64_t kLaneFloats = kRows * kDotFewColumns, kAhead = 16;
  for (int64_t first = 0; first < p.inner; first += kChain) {
    const int64_t end = p.inner - first < kChain ? p.inner : first + kChain;
    for (int64_t i = 0; i < kDotLanes * kLaneFloats; i += 16) _mm512_store_ps(p.lanes + i, _mm512_setzero_ps());
    for (int64_t k = first; k < end; k += 2) {
      float* lane = p.lanes + (k - first) % kVector / 2 * kLaneFloats;
      __m512bh a[kRows];
      for (int r = 0; r < kRows; ++r) a[r] = (__m512bh)_mm512_set1_epi32(pair_at(p.rows[r], k, p.inner));
      const BFloat16* from = p.from + k * p.row_stride;
      for (int64_t column = 0; column < p.num_columns; column += kVector) {
        const __mmask32 mask = first_lanes(p.num_columns - column);
        const __m512i x = _mm512_maskz_loadu_epi16(mask, from + column);
        const __m512i y =
            k + 1 < p.inner ? _mm512_maskz_loadu_epi16(mask, from + p.row_stride + column) : _mm512_setzero_si512();
        __builtin_prefetch(from + kAhead * p.row_stride + column, 0, 2);
        __builtin_prefetch(from + (kAhead + 1) * p.row_stride + column, 0, 2);
        const __m512bh low = (__m512bh)pairs.low(x, y), high = (__m512bh)pairs.high(x, y);
        for (int r = 0; r < kRows; ++r) {
          float* sums = lane + r * kDotFewColumns + column;
          _mm512_store_ps(sums, _mm512_dpbf16_ps(_mm512_load_ps(sums), a[r], low));
          _mm512_store_ps(sums + 16, _mm512_dpbf16_ps(_mm512_load_ps(sums + 16), a[r], high));
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int64_t column = 0; column < p.num_columns; column += 16) {
        float* to = p.sums + r * p.stride + column;
        const __m512 sum = sum_of_lanes(p.lanes + r * kDotFewColumns + column, kLaneFloats);
        _mm512_storeu_ps(to, first > 0 ? _mm512_add_ps(_mm512_loadu_ps(to), sum) : sum);
      }
    }
  }
}

}  // namespace

template <>
void run_moe_dot_few<kIsa>(const MoeDotFewParams& p) {
  p.num_rows == 1 ? dot_few<1>(p) : dot_few<2>(p);
}

template <>
void run_moe_dot<kIsa>(const MoeDotParams& p) {
  switch (p.num_rows) {
    case 1: return dot<1>(p);
    case 2: return dot<2>(p);
    case 3: return dot<3>(p);
    case 4: return dot<4>(p);
    case 5: return dot<5>(p);
    default: return dot<6>(p);
  }
}

template <>
void run_moe_dot_columns<kIsa>(const MoeDotColumnsParams& p) {
  for (int64_t column = 0; column < p.num_columns; column += kVector) {
    const int64_t num_columns = p.num_columns - column;  // and perhaps more than a vector
    const __mmask32 mask = first_lanes(num_columns);
    for (int64_t k = 0; k < p.inner; k += kDotPacked) {
      // eighths[j][i]: of columns i, i + 8, i + 16 and i + 24 the j-th 16 bytes
      __m512i eighths[4][8];
      for (int64_t j = 0; j < 4; ++j) transpose_eight(p, k + 8 * j, column, mask, eighths[j]);
      for (int64_t i = 0; i < 8; ++i) {
        const __m512i a = _mm512_shuffle_i64x2(eighths[0][i], eighths[1][i], 0x88);
        const __m512i b = _mm512_shuffle_i64x2(eighths[2][i], eighths[3][i], 0x88);
        const __m512i c = _mm512_shuffle_i64x2(eighths[0][i], eighths[1][i], 0xdd);
        const __m512i d = _mm512_shuffle_i64x2(eighths[2][i], eighths[3][i], 0xdd);
        const __m512i of_columns[] = {_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(c, d, 0x88),
                                      _mm512_shuffle_i64x2(a, b, 0xdd), _mm512_shuffle_i64x2(c, d, 0xdd)};
        for (int64_t part = 0; part < 4; ++part) {
          const int64_t at = i + 8 * part;
          if (at < num_columns) _mm512_storeu_si512(p.to + (column + at) * p.stride + k, of_columns[part]);
        }
      }
    }
  }
}

}  // namespace fmkernels
