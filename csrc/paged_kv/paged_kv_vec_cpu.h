// SPDX-License-Identifier: Apache-2.0
// Stored numbers as vectors of floats. Internal linkage, as in common/vec.h.
#pragma once

#include "../common/vec.h"
#include "paged_kv.h"

namespace fmkernels {
namespace {

FM_INLINE VecF load(const Int8* p) {
#ifdef __AVX2__
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  VecF x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

FM_INLINE VecF load(const Float8E4M3* p) {
#ifdef __AVX2__
  // As halves, which are 2^8 times smaller; NaN by itself.
  const __m128i bits = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i magnitude = _mm_and_si128(bits, _mm_set1_epi16(0x7f));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(bits, _mm_set1_epi16(0x80)), 8);
  const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
  const __m128i half = _mm_or_si128(_mm_or_si128(_mm_slli_epi16(magnitude, 7), sign), nan);
  return _mm256_cvtph_ps(half) * 256.0f;
#else
  VecF x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

// The lanes of x, which are over their scale already where T is quantised.
template <class T>
FM_INLINE void store_as(T* p, VecF x) {
  if constexpr (kIsQuantized<T>) {
    for (int i = 0; i < kLanes; ++i) p[i] = quantize<T>(x[i]);
  } else {
    store(p, x);
  }
}

}  // namespace
}  // namespace fmkernels
