// SPDX-License-Identifier: Apache-2.0
// Draws from weights on a CPU, and the operations of fixed_weight.h on its vectors. Internal linkage, as in vec.h.
#pragma once

#include "fixed_weight.h"
#include "vec.h"

namespace fmkernels {
namespace {

// The first v from 0 up at which the sum of weight_at(v) exceeds `number`, which is below the sum up to `count`. kBlock
// weights are added at once, by vectors, while it is not among them.
template <int64_t kBlock, class F>
FM_INLINE int64_t first_above(int64_t count, uint64_t number, const F& weight_at) {
  uint64_t sum = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    uint64_t of_block = 0;
    for (int64_t v = begin; v < end; ++v) of_block += weight_at(v);
    if (sum + of_block <= number) {
      sum += of_block;
      continue;
    }
    for (int64_t v = begin; v < end; ++v) {
      sum += weight_at(v);
      if (sum > number) return v;
    }
  }
  return -1;  // not reached
}

#ifdef __AVX2__

struct Weights8 {
  __m256i low, high;  // of lanes 0 to 3, and 4 to 7
};

FM_INLINE __m256i weights_of(__m128i mantissa, __m128i shift) {
  return _mm256_srlv_epi64(_mm256_slli_epi64(_mm256_cvtepu32_epi64(mantissa), kWeightBits - 23),
                           _mm256_cvtepu32_epi64(shift));
}
// weight_of of eight lanes from 0 to 1.
FM_INLINE Weights8 weights_of(__m256 w) {
  const __m256i bits = _mm256_castps_si256(w);
  const __m256i fraction = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffff));
  const __m256i mantissa = _mm256_or_si256(fraction, _mm256_set1_epi32(0x800000));
  const __m256i shift = _mm256_sub_epi32(_mm256_set1_epi32(127), _mm256_srli_epi32(bits, 23));
  return {weights_of(_mm256_castsi256_si128(mantissa), _mm256_castsi256_si128(shift)),
          weights_of(_mm256_extracti128_si256(mantissa, 1), _mm256_extracti128_si256(shift, 1))};
}
// Writes eight weights; the sums of lanes i and i + 4.
FM_INLINE __m256i store_weights(uint64_t* to, const Weights8& w) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), w.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 4), w.high);
  return _mm256_add_epi64(w.low, w.high);
}
FM_INLINE uint64_t sum_of_lanes(__m256i x) {
  uint64_t lanes[4];
  memcpy(lanes, &x, sizeof lanes);
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

#endif

}  // namespace
}  // namespace fmkernels
