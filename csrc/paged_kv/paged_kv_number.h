// SPDX-License-Identifier: Apache-2.0
// What a cache stores besides float, Half and BFloat16: e4m3 numbers and signed bytes, bit-equal on device and host.
#pragma once

#include "../common/dtype.h"

namespace fmkernels {

// 1 sign, 4 exponent (bias 7) and 3 mantissa bits: to 448, subnormals, no infinity; NaN is 0x7f and 0xff.
struct Float8E4M3 {
  uint8_t bits;
};
struct Int8 {
  int8_t value;
};

enum class CacheDType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kInt8 };

constexpr bool is_quantized(CacheDType dtype) { return dtype == CacheDType::kFloat8E4M3 || dtype == CacheDType::kInt8; }

template <class T>
constexpr bool kIsQuantized = false;
template <>
inline constexpr bool kIsQuantized<Float8E4M3> = true;
template <>
inline constexpr bool kIsQuantized<Int8> = true;

// Calls f.template operator()<T>() with what the cache stores.
template <class F>
void dispatch_cache(CacheDType dtype, F&& f) {
  switch (dtype) {
    case CacheDType::kFloat32: return f.template operator()<float>();
    case CacheDType::kFloat16: return f.template operator()<Half>();
    case CacheDType::kBFloat16: return f.template operator()<BFloat16>();
    case CacheDType::kFloat8E4M3: return f.template operator()<Float8E4M3>();
    case CacheDType::kInt8: return f.template operator()<Int8>();
  }
}

// The largest number of a quantised type, which the largest of a row becomes where every row has its own scale.
template <class T>
constexpr float kLargestStored = 448.0f;
template <>
inline constexpr float kLargestStored<Int8> = 127.0f;

FM_HOST_DEVICE float to_float(Int8 x) { return static_cast<float>(x.value); }

// A half with the same bits in its upper exponent and mantissa places is 2^8 times smaller, subnormals included.
FM_HOST_DEVICE float to_float(Float8E4M3 x) {
  const uint32_t magnitude = x.bits & 0x7fu, sign = static_cast<uint32_t>(x.bits & 0x80u) << 24;
  if (magnitude == 0x7fu) return float_from_bits(sign | 0x7fc00000u);
  if (magnitude < 8u) return float_from_bits(sign | float_bits(static_cast<float>(magnitude) * 0x1p-9f));
  return float_from_bits(sign | ((magnitude << 20) + (120u << 23)));
}

// x, which is a number over its scale, to the nearest stored number, ties to even; what is finite saturates.
template <class T>
FM_HOST_DEVICE T quantize(float x);

// NaN, which a byte cannot tell, becomes 0.
template <>
FM_HOST_DEVICE Int8 quantize<Int8>(float x) {
  const float shifter = 0x1.8p23f;  // adding it rounds to an integer
  const float clamped = x > 127.0f ? 127.0f : x > -127.0f ? x : x == x ? -127.0f : 0.0f;
  const float rounded = clamped + shifter;
  return {static_cast<int8_t>(float_bits(rounded))};
}
// Infinities and NaN become NaN.
template <>
FM_HOST_DEVICE Float8E4M3 quantize<Float8E4M3>(float x) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu;
  const auto sign = static_cast<uint8_t>((bits >> 24) & 0x80u);
  if (magnitude >= 0x7f800000u) return {static_cast<uint8_t>(sign | 0x7fu)};
  if (magnitude >= 0x43e00000u) return {static_cast<uint8_t>(sign | 0x7eu)};  // 448 and more
  if (magnitude <
      0x3c800000u) {  // below 2^-6: adding 2^14 leaves the subnormal, rounded to nearest even, at the bottom
    const float shifted = float_from_bits(magnitude) + 0x1p14f;
    return {static_cast<uint8_t>(sign | (float_bits(shifted) - 0x46800000u))};
  }
  const uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
  return {static_cast<uint8_t>(sign | ((rounded - (120u << 23)) >> 20))};
}

// A float to what a cache stores, without a scale where it stores floats.
template <class T>
FM_HOST_DEVICE T to_stored(float x) {
  if constexpr (kIsQuantized<T>) return quantize<T>(x);
  else return from_float<T>(x);
}

// The scale of a row whose largest magnitude is `largest`: 1 where all of it is 0, NaN where it is not finite.
template <class T>
FM_HOST_DEVICE float scale_of_row(float largest) {
  if (!(largest <= 3.40282347e38f)) return float_from_bits(0x7fc00000u);
  const float scale = largest / kLargestStored<T>;
  return scale > 0.0f ? scale : 1.0f;
}

}  // namespace fmkernels
