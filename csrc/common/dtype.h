// SPDX-License-Identifier: Apache-2.0
// Storage types of the kernels and their conversions to float, bit-equal on device and host: rounding is to
// nearest even, subnormals are kept, NaN stays NaN. Arithmetic is done in float only.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FM_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fmkernels {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

template <class T>
constexpr DType kDType = DType::kFloat32;
template <>
inline constexpr DType kDType<Half> = DType::kFloat16;
template <>
inline constexpr DType kDType<BFloat16> = DType::kBFloat16;

constexpr int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

FM_HOST_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
FM_HOST_DEVICE float float_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

FM_HOST_DEVICE float to_float(float x) { return x; }
FM_HOST_DEVICE float to_float(BFloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }

FM_HOST_DEVICE float to_float(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  // No step has a subnormal float in it, which a processor may be told to flush.
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | (magnitude << 13) | 0x7f800000u);  // infinity, NaN
  if (magnitude < 0x0400u) return float_from_bits(sign | float_bits(static_cast<float>(magnitude) * 0x1p-24f));
  return float_from_bits(sign | ((magnitude << 13) + 0x38000000u));
#endif
}

template <class T>
FM_HOST_DEVICE T from_float(float x);

template <>
FM_HOST_DEVICE float from_float<float>(float x) {
  return x;
}

template <>
FM_HOST_DEVICE BFloat16 from_float<BFloat16>(float x) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // the NaN that the device instruction gives
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
FM_HOST_DEVICE Half from_float<Half>(float x) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = float_bits(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};  // the NaN that the device instruction gives
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the subnormal, rounded to nearest even, in the low mantissa bits.
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

}  // namespace fmkernels
