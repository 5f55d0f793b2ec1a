// SPDX-License-Identifier: Apache-2.0
// One vector register of floats on the CPU, and memory in the three storage types as floats.
//
// Everything here has internal linkage on purpose: a file that includes it is compiled once per instruction set, and
// the linker must never hand the AVX2 copy of a function to the portable kernels.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "dtype.h"
#include "isa.h"

namespace fmkernels {
namespace {

constexpr int kLanes = kIsa == Isa::kGeneric ? 4 : 8;

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecU16 __attribute__((vector_size(kLanes * 2)));

#define FM_INLINE inline __attribute__((always_inline))

FM_INLINE VecF load(const float* p) {
  VecF x;
  memcpy(&x, p, sizeof x);
  return x;
}
FM_INLINE void store(float* p, VecF x) { memcpy(p, &x, sizeof x); }

FM_INLINE VecF load(const BFloat16* p) {
#ifdef __AVX2__  // the generic form below becomes two halves and an insertion
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (VecF)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
  VecU16 bits;
  memcpy(&bits, p, sizeof bits);
  return (VecF)(__builtin_convertvector(bits, VecU) << 16);
#endif
}
FM_INLINE void store(BFloat16* p, VecF x) {
  const VecU bits = (VecU)x;
  VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = x != x ? VecU{} + 0x7fffu : rounded;
#ifdef __AVX2__  // the generic form below becomes two shuffles and more
  const __m256i bits32 = (__m256i)rounded;
  const __m128i low = _mm256_castsi256_si128(bits32), high = _mm256_extracti128_si256(bits32, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
#else
  const VecU16 narrow = __builtin_convertvector(rounded, VecU16);
  memcpy(p, &narrow, sizeof narrow);
#endif
}

FM_INLINE VecF load(const Half* p) {
#ifdef __AVX2__
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VecF x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}
FM_INLINE void store(Half* p, VecF x) {
#ifdef __AVX2__
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<Half>(x[i]);
#endif
}

// The first `count` lanes from memory, the others `fill`; and the first `count` lanes to memory.
template <class T>
FM_INLINE VecF load_partial(const T* p, int count, float fill) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? to_float(p[i]) : fill;
  return load(lanes);
}
template <class T>
FM_INLINE void store_partial(T* p, VecF x, int count) {
  for (int i = 0; i < count; ++i) p[i] = from_float<T>(x[i]);
}
// The same of a vector that is often whole.
template <class T>
FM_INLINE VecF load_lanes(const T* p, int count, float fill = 0.0f) {
  return count == kLanes ? load(p) : load_partial(p, count, fill);
}
template <class T>
FM_INLINE void store_lanes(T* p, VecF x, int count) {
  count == kLanes ? store(p, x) : store_partial(p, x, count);
}

FM_INLINE VecF broadcast(float x) { return x - VecF{}; }  // x - 0 is x; 0 + x is not (-0), and costs an addition

// The larger of a and b; b where either is NaN.
FM_INLINE VecF max(VecF a, VecF b) {
#ifdef __AVX2__  // of the generic form the compiler makes a comparison and a choice
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
// The smaller of a and b; b where either is NaN.
FM_INLINE VecF min(VecF a, VecF b) {
#ifdef __AVX2__
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

FM_INLINE VecF absolute(VecF x) { return (VecF)((VecU)x & 0x7fffffffu); }

// 0, 1, ..., kLanes - 1.
FM_INLINE VecI lane_indices() {
  VecI lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// Word w of 16 bytes of row r is lane r of words[w], for kLanes rows.
FM_INLINE void transpose_words(const void* from, int64_t stride_bytes, VecI (&words)[4]) {
  const char* row = static_cast<const char*>(from);
#ifdef __AVX2__
  auto rows = [&](int i) {  // i and i + 4
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i * stride_bytes));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + (i + 4) * stride_bytes));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  };
  const __m256i r0 = rows(0), r1 = rows(1), r2 = rows(2), r3 = rows(3);
  const __m256i a = _mm256_unpacklo_epi32(r0, r1), b = _mm256_unpackhi_epi32(r0, r1);
  const __m256i c = _mm256_unpacklo_epi32(r2, r3), d = _mm256_unpackhi_epi32(r2, r3);
  words[0] = (VecI)_mm256_unpacklo_epi64(a, c);
  words[1] = (VecI)_mm256_unpackhi_epi64(a, c);
  words[2] = (VecI)_mm256_unpacklo_epi64(b, d);
  words[3] = (VecI)_mm256_unpackhi_epi64(b, d);
#else
  VecI rows[kLanes];
  for (int i = 0; i < kLanes; ++i) memcpy(&rows[i], row + i * stride_bytes, sizeof rows[i]);
  for (int w = 0; w < 4; ++w) words[w] = VecI{rows[0][w], rows[1][w], rows[2][w], rows[3][w]};
#endif
}

// out[c * stride][0, kLanes) = rows[.][c] for the columns c, written in their order.
FM_INLINE void transpose_to(const VecF* rows, float* out, int64_t stride) {
#ifdef __AVX2__
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    for (int h = 0; h < 2; ++h) {
      quads[4 * i + 2 * h] = _mm256_shuffle_ps(pairs[4 * i + h], pairs[4 * i + 2 + h], 0x44);
      quads[4 * i + 2 * h + 1] = _mm256_shuffle_ps(pairs[4 * i + h], pairs[4 * i + 2 + h], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + i * stride, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20));
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + (i + 4) * stride, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31));
  }
#else
  for (int c = 0; c < kLanes; ++c) {
    for (int i = 0; i < kLanes; ++i) out[c * stride + i] = rows[i][c];
  }
#endif
}

// Lane i is the lanes of x[i] joined by `join` (a sum, a maximum), for kLanes vectors.
template <class Join>
FM_INLINE VecF join_lanes(const VecF* x, Join&& join) {
#ifdef __AVX2__
  __m256 pairs[4], quads[2];
  for (int i = 0; i < 4; ++i) {
    pairs[i] = join(_mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  }
  for (int i = 0; i < 2; ++i) {
    quads[i] = join(_mm256_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0x44),
                    _mm256_shuffle_ps(pairs[2 * i], pairs[2 * i + 1], 0xee));
  }
  return join(_mm256_permute2f128_ps(quads[0], quads[1], 0x20), _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
#else
  VecF column[kLanes];
  for (int c = 0; c < kLanes; ++c) column[c] = VecF{x[0][c], x[1][c], x[2][c], x[3][c]};
  return join(join(column[0], column[1]), join(column[2], column[3]));
#endif
}

// Lanes i and i ^ kStep exchanged.
template <int kStep>
FM_INLINE VecF swap_lanes(VecF x) {
  if constexpr (kLanes == 8) {
    return __builtin_shuffle(
        x, VecI{0 ^ kStep, 1 ^ kStep, 2 ^ kStep, 3 ^ kStep, 4 ^ kStep, 5 ^ kStep, 6 ^ kStep, 7 ^ kStep});
  } else {
    return __builtin_shuffle(x, VecI{0 ^ kStep, 1 ^ kStep, 2 ^ kStep, 3 ^ kStep});
  }
}
FM_INLINE float horizontal_sum(VecF x) {
  if constexpr (kLanes == 8) x += swap_lanes<kLanes / 2>(x);
  x += swap_lanes<2>(x);
  x += swap_lanes<1>(x);
  return x[0];
}

// 2^x for x <= 0: relative error below 1.2e-7, exactly 0 below 2^-126.5 (-infinity included), NaN stays NaN.
// x = n + f with |f| <= 1/2; 2^f is a polynomial fitted for relative error, 2^n is built in the exponent bits.
FM_INLINE VecF exp2_nonpositive(VecF x) {
  // Adding it rounds to an integer; n + 127, the biased exponent, then stands in the low bits of the mantissa.
  const float shifter = 0x1.8p23f + 127.0f;
  x = max(broadcast(-127.0f), x);
  const VecF shifted = x + shifter;
  const VecF f = x - (shifted - shifter);
  VecF p = f * 1.534581216e-4f + 1.339993121e-3f;
  p = p * f + 9.618488957e-3f;
  p = p * f + 5.550328777e-2f;
  p = p * f + 2.402264689e-1f;
  p = p * f + 6.931472057e-1f;
  p = p * f + 1.0f;
  return p * (VecF)((VecU)shifted << 23);
}

// e^x for x <= 0 (and a little above): as exact for a large x as for a small one, where exp2 of a product would round the
// product. 0 below -87.6, -infinity included; NaN stays NaN. x = n log(2) + r, of which log(2) is taken in two parts.
FM_INLINE VecF exp_nonpositive(VecF x) {
  const float shifter = 0x1.8p23f + 127.0f;
  x = max(broadcast(-88.02f), x);
  const VecF shifted = x * 1.442695041f + shifter;
  const VecF n = shifted - shifter;
  const VecF r = (x - n * 0.693359375f) - n * -2.121944401e-04f;
  VecF p = r * 1.383684614e-03f + 8.374815799e-03f;
  p = p * r + 4.166822557e-02f;
  p = p * r + 1.666642017e-01f;
  p = p * r + 4.999999208e-01f;
  p = p * r + 1.000000036e+00f;
  p = p * r + 1.0f;
  return p * (VecF)((VecU)shifted << 23);
}

// tanh to a few units in the last place everywhere: an odd polynomial near zero, where the formula over exp cancels.
FM_INLINE VecF tanh(VecF x) {
  const VecF magnitude = absolute(x);
  const VecF e = exp2_nonpositive(magnitude * (-2.8853900818f));
  const VecF sign = (VecF)((VecI)x & (VecI)broadcast(-0.0f));
  const VecF far = (VecF)((VecI)((1.0f - e) / (1.0f + e)) | (VecI)sign);
  const VecF u = x * x;
  VecF near = u * -5.602740497e-3f + 2.053993824e-2f;
  near = near * u - 5.370532051e-2f;
  near = near * u + 1.333093216e-1f;
  near = near * u - 3.333325220e-1f;
  return magnitude < 0.625f ? near * u * x + x : far;
}

// e^x: as exp_nonpositive, and infinity above 88.4.
FM_INLINE VecF exp(VecF x) { return exp_nonpositive(min(broadcast(88.8f), x)); }  // 2^128 in the exponent bits

}  // namespace
}  // namespace fmkernels
