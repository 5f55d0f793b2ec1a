// SPDX-License-Identifier: Apache-2.0
// Probabilities as integers, and draws from them: the same bits on every device, in every order of addition.
//
// A weight is floor(w * 2^40) of a float w from 0 to 1. Sums of up to 2^23 of them are exact in 64 bits, whatever the
// order, so that a sum over a vocabulary is a number and not an approximation. What is below 2^-40 of the largest is 0.
// Every operation on floats here is one that IEEE 754 rounds, and each fused product is written as one: compilers neither
// fuse nor split them.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtype.h"
#include "philox.h"

namespace fmkernels {

constexpr int kWeightBits = 40;
constexpr uint64_t kWeightOne = uint64_t{1} << kWeightBits;
constexpr int64_t kMaxWeights = int64_t{1} << 23;  // in a sum

FM_HOST_DEVICE float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// e^x for x <= 0, -infinity included: within 2 units in the last place, 1 at 0, 0 below -87.6.
FM_HOST_DEVICE float exp_bits(float x) {
  const float shifter = 0x1.8p23f + 127.0f;  // adding it leaves n + 127 in the low bits
  x = x < -88.0f ? -88.0f : x;
  const float shifted = fused(x, 1.442695041f, shifter), n = shifted - shifter;
  const float r = fused(n, 2.121944401e-4f, fused(n, -0.693359375f, x));
  float p = fused(r, 1.383684614e-3f, 8.374815799e-3f);
  p = fused(p, r, 4.166822557e-2f);
  p = fused(p, r, 1.666642017e-1f);
  p = fused(p, r, 4.999999208e-1f);
  p = fused(p, r, 1.0f);
  p = fused(p, r, 1.0f);
  return p * float_from_bits(float_bits(shifted) << 23);
}

// floor(w * 2^40) for w from 0 to 1.
FM_HOST_DEVICE uint64_t weight_of(float w) {
  const uint32_t bits = float_bits(w), exponent = bits >> 23;
  const uint64_t mantissa = static_cast<uint64_t>((bits & 0x7fffffu) | 0x800000u) << (kWeightBits - 23);
  const uint32_t shift = 127u - exponent;  // 1.0 is not shifted
  return mantissa >> (shift > 63u ? 63u : shift);
}

// 64 random bits: a function of all arguments, without a state. `stream` tells apart who draws.
FM_HOST_DEVICE uint64_t random_bits(int64_t seed, int64_t offset, uint32_t index, uint32_t stream) {
  const uint64_t key = static_cast<uint64_t>(seed), counter = static_cast<uint64_t>(offset);
  uint32_t x[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), index, stream};
  philox(x, [&](int half, int round) { return philox_round_key(key, half, round); });
  return uint64_t{x[1]} << 32 | x[0];
}

// floor(total * bits / 2^64): uniform below total.
FM_HOST_DEVICE uint64_t uniform_below(uint64_t total, uint64_t bits) {
#ifdef __CUDA_ARCH__
  return __umul64hi(total, bits);
#else
  return static_cast<uint64_t>(static_cast<unsigned __int128>(total) * bits >> 64);
#endif
}

// ceil(share * total), from 1 to total; share from 0 to 1.
FM_HOST_DEVICE uint64_t share_of(float share, uint64_t total) {
  const double exact = ceil(static_cast<double>(share) * static_cast<double>(total));
  const uint64_t part = exact < 1.0 ? 1 : static_cast<uint64_t>(exact);
  return part < total ? part : total;
}

}  // namespace fmkernels
