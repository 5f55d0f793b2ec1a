// SPDX-License-Identifier: Apache-2.0
// A tile of the codec on the CPU, kMaxBlock elements: the scales of its blocks and its codes. Internal linkage, as in
// common/vec.h.
#pragma once

#include <type_traits>

#include "../common/integers_cpu.h"
#include "block_codec_units_cpu.h"

namespace fmkernels {
namespace {

constexpr int64_t kTile = kMaxBlock;
constexpr int kTileBlocks = kTile / kMinBlock;

// ---- scales ----------------------------------------------------------------------------------------------------------

// Of `count` elements, a multiple of kGroup: the magnitude's bits, then 1 for + and 0 for -, the largest of all.
template <class T>
FM_INLINE uint32_t largest_key(const T* x, int64_t count) {
  constexpr bool kIsWide = sizeof(T) == 4;
  typedef std::conditional_t<kIsWide, uint32_t, uint16_t> Word;
  typedef std::conditional_t<kIsWide, int32_t, int16_t> Signed;
  typedef Word Words __attribute__((vector_size(32)));
  typedef Signed Numbers __attribute__((vector_size(32)));
  constexpr int kWords = 32 / sizeof(Word);
  Numbers largest{};  // among the bits of those with a + the largest number, as integers
  Words smallest{};   // of those with a - the smallest, as integers without sign; else as above
  for (int64_t i = 0; i < count; i += kWords) {
    const Words bits = read<Words>(x + i);
    largest = (Numbers)bits > largest ? (Numbers)bits : largest;
    smallest = bits > smallest ? bits : smallest;
  }
  const Words positive = ((Words)largest << 1) | 1, negative = smallest << 1;
  const Words keys = positive > negative ? positive : negative;
  Word key = 0;
  for (int i = 0; i < kWords; ++i) key = keys[i] > key ? keys[i] : key;
  return key;
}

// The element of largest magnitude; 0 where one is NaN or infinite, and *is_finite false.
template <class T>
FM_INLINE float extreme_of(const T* x, int64_t count, bool* is_finite) {
  const uint32_t key = largest_key(x, count);
  float extreme;
  if constexpr (sizeof(T) == 4) extreme = float_from_bits((key >> 1) | (~key << 31));
  else extreme = to_float(T{static_cast<uint16_t>((key >> 1) | (~key << 15))});
  *is_finite = (float_bits(extreme) & 0x7fffffffu) < kInfinityBits;
  return extreme;
}

// Of 32 elements: places that differ in bit 0 of their number first, in bit 4 last.
FM_INLINE float sum_of(const V8 (&x)[4]) {
#ifdef __AVX2__
  const __m256 pairs[2] = {_mm256_hadd_ps((__m256)x[0], (__m256)x[1]), _mm256_hadd_ps((__m256)x[2], (__m256)x[3])};
  const __m256 quads = _mm256_hadd_ps(pairs[0], pairs[1]);
  const __m128 sums = _mm256_castps256_ps128(quads) + _mm256_extractf128_ps(quads, 1);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
#else
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    V8 sum = x[i] + swap8<1>(x[i]);
    sum += swap8<2>(sum);
    sum += swap8<4>(sum);
    sums[i] = sum[0];
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
#endif
}

// The mean magnitude of `valid` elements. Those behind them are 0, to a multiple of kGroup. The order of the sum: places
// that differ in bit 5 of their number, then in bits 0, 1, 2, 3, 4, then from bit 6 on.
template <class T>
float mean_magnitude(const T* x, int64_t count, int64_t valid, int64_t block) {
  float units[kTile / kUnit] = {};
  for (int64_t u = 0; u * kUnit < count; ++u) {
    auto magnitudes = [&](int64_t at) { return at < count ? (V8)((V8i)load8(x + at) & 0x7fffffff) * 0x1p-11f : V8{}; };
    V8 sums[4];
    for (int i = 0; i < 4; ++i) {
      sums[i] = magnitudes(u * kUnit + 8 * i);
      if (block > kGroup) sums[i] += magnitudes(u * kUnit + kGroup + 8 * i);
    }
    units[u] = sum_of(sums);
  }
  for (int64_t step = 1; step * kUnit < block; step *= 2) {
    for (int64_t u = 0; u < block / kUnit; u += 2 * step) units[u] += units[u + step];
  }
  return units[0] / static_cast<float>(valid) * 0x1p11f;
}

struct BlockScale {
  float scale, inverse;
  bool has_codes;
};
template <int kCode>
FM_INLINE BlockScale scale_of(float extreme, bool is_finite, bool stochastic) {
  if (!is_finite) return {float_from_bits(kNanBits), 0.0f, false};
  if (float_bits(extreme) << 1 < float_bits(kSmallest) << 1) return {0.0f, 0.0f, false};
  if constexpr (kCode == 1) {
    return {extreme, 1.0f, true};
  } else {
    const float levels = -levels_of(kCode, stochastic);
    return {extreme / levels, levels / extreme, true};
  }
}

// ---- quantise --------------------------------------------------------------------------------------------------------

// The codes of kGroup elements. k: what they draw, or null.
template <int kCode, class T>
FM_INLINE Bytes32 encode_group(const T* x, float inverse, const uint16_t* k) {
  V8 v[4];
  for (int i = 0; i < 4; ++i) {
    v[i] = load8(x + 8 * i) * inverse;
    if (k != nullptr) {
      const V8 below = floor_of(v[i]);
      const V8i is_up = Draws::fractions(k + 8 * i) < v[i] - below;
      const V8 code = below + (V8)(is_up & (V8i)(V8{} + 1.0f)), least = V8{} - levels_of(kCode, true);
      v[i] = code < least ? least : code;  // x * inverse of the extreme may be rounded away from 0
    }
  }
  if constexpr (kCode == kFloat8) return float8_of(v);
  else return codes_of<kCode>(v);
}

template <class T>
FM_INLINE uint32_t signs_of(const T* x) {
  uint32_t signs = 0;
  for (int i = 0; i < 4; ++i) {
    const V8 v = load8(x + 8 * i);
#ifdef __AVX2__
    const int bits = _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(-kSmallest), _CMP_LT_OQ));
#else
    int bits = 0;
    for (int j = 0; j < 8; ++j) bits |= (v[j] < -kSmallest) << j;
#endif
    signs |= static_cast<uint32_t>(bits) << (8 * i);
  }
  return signs;
}

// A tile from `first` on, of `valid` elements; behind them x has zeros, to a multiple of kUnit.
template <int kCode, class T>
void encode_tile(const CodecWire& wire, const Draws* draws, const T* x, int64_t first, int64_t valid, uint8_t* out) {
  const int64_t count = round_up(valid, kUnit), block = wire.block(), num_blocks = ceil_div(valid, block);
  float scales[kTileBlocks];
  float inverse[kTileBlocks + 1];
  bool has_codes[kTileBlocks + 1], has_all = true;
  for (int64_t b = 0; b < num_blocks; ++b) {
    const T* begin = x + b * block;
    bool is_finite;
    float extreme = extreme_of(begin, min(block, count - b * block), &is_finite);
    if (kCode == 1 && is_finite) {
      extreme = mean_magnitude(begin, min(block, count - b * block), min(block, valid - b * block), block);
    }
    const BlockScale s = scale_of<kCode>(extreme, is_finite, draws != nullptr);
    scales[b] = s.scale;
    inverse[b] = s.inverse;
    has_codes[b] = s.has_codes;
    has_all &= s.has_codes;
  }
  inverse[num_blocks] = 0.0f;  // of the second half of a unit, where blocks are shorter
  has_codes[num_blocks] = true;
  memcpy(out + wire.scales() + (first >> wire.block_log2) * 4, scales, static_cast<size_t>(num_blocks) * 4);

  for (int64_t u = 0; u * kUnit < count; ++u) {
    const int64_t at = u * kUnit, b0 = at >> wire.block_log2, b1 = (at + kGroup) >> wire.block_log2;
    const Planes<kCode, uint8_t> to(wire, out, first / kUnit + u);
    if constexpr (kCode == 1) {
      auto signs = [&](int half, int64_t b) { return has_codes[b] ? signs_of(x + at + half * kGroup) : 0; };
      write(to.lower, signs(0, b0));
      write(to.lower + 4, signs(1, b1));
    } else {
      auto codes = [&](int half, int64_t b, const uint16_t* k) __attribute__((always_inline)) {
        if (!has_all && !has_codes[b]) return Bytes32{};
        return encode_group<kCode>(x + at + half * kGroup, inverse[b], k == nullptr ? k : k + half * kGroup);
      };
      if (draws == nullptr) {
        write_codes<kCode>(to, codes(0, b0, nullptr), codes(1, b1, nullptr));
      } else {
        uint16_t k[kUnit];
        draws->draw(first / kUnit + u, k);
        write_codes<kCode>(to, codes(0, b0, k), codes(1, b1, k));
      }
    }
  }
}

// ---- the sum of wires ------------------------------------------------------------------------------------------------

// acc[i] += the codes times the scales of a unit of one wire.
template <int kCode>
FM_INLINE void add_unit(const CodecWire& wire, const uint8_t* data, int64_t unit, V8 (&acc)[kUnitVectors]) {
  const int64_t b0 = unit * kUnit >> wire.block_log2, b1 = (unit * kUnit + kGroup) >> wire.block_log2;
  const uint8_t* scales = data + wire.scales();
  const Planes<kCode, const uint8_t> from(wire, data, unit);
  const float s[2] = {read<float>(scales + 4 * b0), read<float>(scales + 4 * min(b1, wire.blocks() - 1))};
  if constexpr (kCode == 1) {
    for (int i = 0; i < kUnitVectors; ++i) acc[i] += with_signs(s[i / 4], from.lower[i]);
  } else {
    int8_t buffer[kUnit];
    const int8_t* codes = read_codes<kCode>(from, buffer);
    for (int i = 0; i < kUnitVectors; ++i) acc[i] += codes_as_floats<kCode>(codes + 8 * i) * s[i / 4];
  }
}

// acc[i] = the sum of the codes times the scales of a unit, of all wires in their order.
template <int kCode>
FM_INLINE void sum_unit(const CodecSum& p, int64_t unit, V8 (&acc)[kUnitVectors]) {
  for (V8& v : acc) v = V8{};
  for (int64_t w = 0; w < p.num_wires; ++w) add_unit<kCode>(p.wire, p.wires + w * p.wire_stride, unit, acc);
}

FM_INLINE void rotate_unit(V8 (&x)[kUnitVectors]) {
  for (int half = 0; half < 2; ++half) {
    V8 group[4];
    for (int i = 0; i < 4; ++i) group[i] = x[4 * half + i];
    rotate_group(group);
    for (int i = 0; i < 4; ++i) x[4 * half + i] = group[i];
  }
}

}  // namespace
}  // namespace fmkernels
