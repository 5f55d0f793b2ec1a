// SPDX-License-Identifier: Apache-2.0
// Stored values of blocks as vectors of floats across the rows of op(S). V is their type: that of the dense operand, or int8_t,
// of which a value stands for its product with the scale of its block, rounded to float32. Internal linkage, as in vec.h.
#pragma once

#include <cstring>

#include "../common/vec.h"
#include "block_sparse_tile_cpu.h"

namespace fmkernels {
namespace {

// kLanes neighbours.
template <class V>
FM_INLINE VecF load_stored(const V* p, float) {
  return load(p);
}
FM_INLINE VecF load_stored(const int8_t* p, float scale) {
#ifdef __AVX2__
  int64_t bytes;
  memcpy(&bytes, p, sizeof bytes);
  return (VecF)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes))) * scale;
#else
  VecF x;
  for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>(p[i]);
  return x * scale;
#endif
}

// `count` neighbours, a multiple of kLanes, as floats.
template <class V>
void convert_stored(const V* from, int64_t count, float scale, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load_stored(from + i, scale));
}

// ---- values whose rows lie along the inner dimension --------------------------------------------------------------------

template <class V>
constexpr int kUnit = 16 / sizeof(V);  // inner indices that are transposed together: 16 bytes of a row
template <class V>
constexpr int kWordValues = 4 / sizeof(V);

// The values of a word of each row, as many vectors.
FM_INLINE void widen(VecI word, float, VecF (&out)[1], const float*) { out[0] = (VecF)word; }
FM_INLINE void widen(VecI word, float, VecF (&out)[2], const BFloat16*) {
  out[0] = (VecF)((VecU)word << 16);
  out[1] = (VecF)((VecU)word & 0xffff0000u);
}
FM_INLINE void widen(VecI word, float, VecF (&out)[2], const Half*) {
#ifdef __AVX2__
  const __m256i low = _mm256_and_si256((__m256i)word, _mm256_set1_epi32(0xffff));
  const __m256i high = _mm256_srli_epi32((__m256i)word, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
  out[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
  out[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(packed, 1));
#else
  Half halves[2 * kLanes];
  float low[kLanes], high[kLanes];
  memcpy(halves, &word, sizeof halves);
  for (int i = 0; i < kLanes; ++i) {
    low[i] = to_float(halves[2 * i]);
    high[i] = to_float(halves[2 * i + 1]);
  }
  out[0] = load(low);
  out[1] = load(high);
#endif
}
FM_INLINE void widen(VecI word, float scale, VecF (&out)[4], const int8_t*) {
  for (int i = 0; i < 4; ++i) out[i] = __builtin_convertvector((VecI)((VecU)word << (24 - 8 * i)) >> 24, VecF) * scale;
}

// f(k, values) for the inner indices k from 0 to `count`, of kLanes rows that lie `stride` elements apart.
template <class V, class F>
FM_INLINE void for_columns(const V* from, int64_t stride, int count, float scale, F&& f) {
  VecI words[4];
  transpose_words(from, stride * static_cast<int64_t>(sizeof(V)), words);
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) {
    VecF values[kWordValues<V>];
    widen(words[w], scale, values, from);
#pragma GCC unroll 4
    for (int i = 0; i < kWordValues<V>; ++i) {
      if (w * kWordValues<V> + i < count) f(w * kWordValues<V> + i, values[i]);
    }
  }
}

// ---- panels -------------------------------------------------------------------------------------------------------------

// How values of a block lie: elements from one row of op(S) to the next, and from one inner index; one of them is 1.
struct Lying {
  int64_t row_stride, inner_stride;
};

// Inner indices [0, num_inner) of kPanel rows from the first that `block` names, to out[k][kPanel]; num_inner is a multiple of
// 16, as that of a block is.
template <class V>
void pack_stored(const V* block, Lying lying, int num_inner, float scale, float* out) {
  for (int half = 0; half < 2; ++half, out += kLanes, block += kLanes * lying.row_stride) {
    if (lying.inner_stride != 1) {
      for (int k = 0; k < num_inner; ++k) store(out + k * kPanel, load_stored(block + k * lying.inner_stride, scale));
      continue;
    }
    for (int k = 0; k < num_inner; k += kUnit<V>) {
      for_columns(block + k, lying.row_stride, kUnit<V>, scale,
                  [&](int i, VecF values) { store(out + (k + i) * kPanel, values); });
    }
  }
}

// ---- few columns: no panel ------------------------------------------------------------------------------------------------

// Rows of a block of a chain.
template <class V>
struct StoredSegment {
  const V* values;  // of the first row and inner index
  const float* x;   // of the first inner index of the first column of dense, of which this is a stretch
  int count;
  float scale;
  const V* ahead;  // as much that is read soon after, as these values lie; or anything
};

// c[column][row] = or, where `adds`, += the sum over all segments of values[row][k] x[column][k], for kColumns columns and
// kVectors * kLanes rows: in the order of multiply_tile, one addition after another, so that it has the same bits.
template <class V, bool kAlongInner, int kColumns, int kVectors>
__attribute__((noinline)) void multiply_stored(const StoredSegment<V>* segments, int num_segments, int64_t first,
                                               int64_t stride, int64_t x_first, int64_t x_stride, float* c,
                                               int64_t c_stride, bool adds) {
  VecF acc[kColumns][kVectors] = {};
  for (int s = 0; s < num_segments; ++s) {
    const V* values = segments[s].values + first;
    const char* ahead = reinterpret_cast<const char*>(segments[s].ahead);
    const float *x = segments[s].x + x_first, scale = segments[s].scale;
    const int count = segments[s].count;
    auto add = [&](const float* x_of_k, int v, VecF w) {
#pragma GCC unroll 4
      for (int column = 0; column < kColumns; ++column) acc[column][v] += broadcast(x_of_k[column * x_stride]) * w;
    };
    if constexpr (kAlongInner) {
      int k = 0;
      while (k + kUnit<V> <= count) {  // a cache line of each row after another
        const int units = count - k < 4 * kUnit<V> ? (count - k) / kUnit<V> : 4;
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const V* line = values + v * kLanes * stride + k;
          for (int u = 0; u < units; ++u, ahead += kLanes * 16) {
            for (int i = 0; i < kLanes / 4; ++i) __builtin_prefetch(ahead + 64 * i, 0, 2);
            for_columns(line + u * kUnit<V>, stride, kUnit<V>, scale,
                        [&](int i, VecF w) { add(x + k + u * kUnit<V> + i, v, w); });
          }
        }
        k += units * kUnit<V>;
      }
      if (k < count) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          for_columns(values + v * kLanes * stride + k, stride, count - k, scale,
                      [&](int i, VecF w) { add(x + k + i, v, w); });
        }
      }
    } else {
      for (int k = 0; k < count; ++k, values += stride, ahead += stride * sizeof(V)) {
        __builtin_prefetch(ahead, 0, 2);
        if (kVectors * kLanes * sizeof(V) > 64) __builtin_prefetch(ahead + 64, 0, 2);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) add(x + k, v, load_stored(values + v * kLanes, scale));
      }
    }
  }
  for (int column = 0; column < kColumns; ++column) {
    for (int v = 0; v < kVectors; ++v) {
      float* sum = c + column * c_stride + v * kLanes;
      store(sum, adds ? load(sum) + acc[column][v] : acc[column][v]);
    }
  }
}

}  // namespace
}  // namespace fmkernels
