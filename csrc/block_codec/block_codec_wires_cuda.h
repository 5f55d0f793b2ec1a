// SPDX-License-Identifier: Apache-2.0
// The sum of wires on CUDA, for the elements of a lane.
#pragma once

#include "block_codec_cuda.h"

namespace fmkernels {
namespace {

// A code from byte kByte of a word of codes that are 2^(kCode - 1) too large, so that none is negative.
template <int kCode, int kByte>
__device__ __forceinline__ float code_as_float(uint32_t word) {
  constexpr float kBias = 0x1p23f + (1 << (kCode - 1));
  return __fsub_rn(float_from_bits(__byte_perm(word, 0x4b000000u, 0x7540 + kByte)), kBias);
}

template <int kCode>
__device__ __forceinline__ void load_codes(const CodecWire& wire, const LanePlace& place, const uint8_t* data,
                                           uint32_t (&words)[2]) {
  const uint8_t* lower = data + place.unit * lower_plane_bytes(kCode) + kQuad * place.t;
  if constexpr (bits_of(kCode) == 8) {
    words[0] = load_word(lower);
    words[1] = load_word(lower + kGroup);
  } else if constexpr (kCode == 1) {
    const uint2 both = *reinterpret_cast<const uint2*>(data + place.unit * lower_plane_bytes(1));
    words[0] = both.x >> (kQuad * place.t);
    words[1] = both.y >> (kQuad * place.t);
  } else {
    constexpr uint32_t kLow = 0x0f0f0f0fu, kPair = 0x03030303u;
    const uint32_t both = load_word(lower);
    words[0] = both & kLow;
    words[1] = both >> 4 & kLow;
    if constexpr (kCode == 6) {
      const uint8_t* upper = data + wire.upper_plane() + place.unit * upper_plane_bytes(6) + kQuad * (place.t & 3);
      const uint32_t pairs = load_word(upper) >> (place.t & 4 ? 2 : 0);
      words[0] |= (pairs & kPair) << 4;
      words[1] |= (pairs >> 4 & kPair) << 4;
    }
  }
}

// acc += the codes of the words, as load_codes has them, times the scales of the two quads.
template <int kCode>
__device__ __forceinline__ void add_codes(const uint32_t (&words)[2], const float (&s)[2],
                                          float (&acc)[kLaneElements]) {
  for (int i = 0; i < 2; ++i) {
    float q[kQuad];
    if constexpr (kCode == 1) {
      for (int j = 0; j < kQuad; ++j) q[j] = words[i] >> j & 1 ? -1.0f : 1.0f;
    } else if constexpr (kCode == kFloat8) {
      for (int j = 0; j < kQuad; ++j) q[j] = float8_as_float(words[i] >> (8 * j));
    } else {
      constexpr uint32_t kSigns = 0x01010101u << (kCode - 1);
      const uint32_t word = words[i] ^ kSigns;
      q[0] = code_as_float<kCode, 0>(word);
      q[1] = code_as_float<kCode, 1>(word);
      q[2] = code_as_float<kCode, 2>(word);
      q[3] = code_as_float<kCode, 3>(word);
    }
    for (int j = 0; j < kQuad; ++j) acc[i * kQuad + j] = __fadd_rn(acc[i * kQuad + j], __fmul_rn(q[j], s[i]));
  }
}

// acc = the sum of the codes times the scales, of all wires in their order; 0 behind the last unit.
template <int kCode>
__device__ __forceinline__ void sum_wires(const CodecSum& p, const LanePlace& place, float (&acc)[kLaneElements]) {
  for (float& v : acc) v = 0.0f;
  if (place.unit >= p.wire.units()) return;
  const int64_t b0 = place.first >> p.wire.block_log2, b1 = (place.first + kGroup) >> p.wire.block_log2;
  const bool has_second = b1 != b0 && b1 < p.wire.blocks();
  const uint8_t* data = p.wires;
  const int64_t scales = p.wire.scales();
  for (int w = 0; w < p.num_wires; ++w, data += p.wire_stride) {
    uint32_t words[2];
    load_codes<kCode>(p.wire, place, data, words);
    const float* of = reinterpret_cast<const float*>(data + scales);
    float s[2] = {of[b0], 0.0f};
    s[1] = has_second ? of[b1] : s[0];
    add_codes<kCode>(words, s, acc);
  }
}

}  // namespace
}  // namespace fmkernels
