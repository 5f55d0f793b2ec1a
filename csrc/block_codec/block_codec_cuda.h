// SPDX-License-Identifier: Apache-2.0
// A tile of the codec on CUDA. A block of kTileThreads threads has kMaxBlock elements, a warp four units of them, and a lane
// eight of a unit: two quads, 4 t .. 4 t + 3 of each half, t its number among the eight lanes of the unit. A quad of all
// lanes is whole sectors of memory, of the codes as well, and its eight draws are one call of Philox.
#pragma once

#include "../common/launch.h"
#include "../common/philox.h"
#include "../common/ptx.h"
#include "block_codec.h"

namespace fmkernels {
namespace {

constexpr int kTileThreads = 256, kTileWarps = kTileThreads / kWarp;
constexpr int kUnitLanes = 8, kQuad = 4, kLaneElements = 2 * kQuad;
static_assert(kTileThreads * kLaneElements == kMaxBlock);

constexpr float kShifter =
    0x1.8p23f;  // added to a number of small magnitude it leaves its nearest integer in the low bits

// Where a lane is, in a tile of the tensor; of tile 0, where it is in any tile.
struct LanePlace {
  int t;          // its number in the unit
  int64_t unit;   // of the tensor
  int64_t first;  // element of the first quad; the second one is kGroup behind it

  __device__ __forceinline__ explicit LanePlace(int64_t tile) {
    const int lane = threadIdx.x % kUnitLanes, unit_of_tile = threadIdx.x / kUnitLanes;
    t = lane;
    unit = tile * (kMaxBlock / kUnit) + unit_of_tile;
    first = unit * kUnit + kQuad * lane;
  }
};

// ---- elements --------------------------------------------------------------------------------------------------------

template <class T>
struct Quad {
  T lane[kQuad];
};

// Four elements from `at` on as floats, 0 behind `numel`. is_aligned: the tensor begins where a quad may.
template <class T>
__device__ __forceinline__ void load_quad(const T* data, int64_t at, int64_t numel, bool is_aligned, float* x) {
  Quad<T> quad{};
  if (is_aligned && at + kQuad <= numel) {
    using Words = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
    const Words words = *reinterpret_cast<const Words*>(data + at);
    memcpy(&quad, &words, sizeof quad);
  } else {
    for (int i = 0; i < kQuad; ++i) {
      if (at + i < numel) quad.lane[i] = data[at + i];
    }
  }
  for (int i = 0; i < kQuad; ++i) x[i] = to_float(quad.lane[i]);
}
template <class T>
__device__ __forceinline__ void store_quad(T* data, int64_t at, int64_t numel, bool is_aligned, const float* x) {
  Quad<T> quad;
  for (int i = 0; i < kQuad; ++i) quad.lane[i] = from_float<T>(x[i]);
  if (is_aligned && at + kQuad <= numel) {
    using Words = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
    Words words;
    memcpy(&words, &quad, sizeof words);
    __stwb(reinterpret_cast<Words*>(data + at), words);
  } else {
    for (int i = 0; i < kQuad; ++i) {
      if (at + i < numel) data[at + i] = quad.lane[i];
    }
  }
}

inline __device__ bool is_quad_aligned(const void* data, int element) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<unsigned>(kQuad * element) == 0;
}

// H times each group: bits 0 and 1 of a place in the lane, bits 2, 3 and 4 among the lanes of the unit.
__device__ __forceinline__ void rotate_groups(float (&x)[kLaneElements], int t) {
  for (int bit = 1; bit <= 2; bit *= 2) {
    for (int i = 0; i < kLaneElements; ++i) {
      if (i & bit) continue;
      const float a = x[i], b = x[i + bit];
      x[i] = __fadd_rn(a, b);
      x[i + bit] = __fsub_rn(a, b);
    }
  }
  for (int bit = 1; bit <= 4; bit *= 2) {
    for (float& v : x) {
      const float other = __shfl_xor_sync(ptx::kAllLanes, v, bit);
      v = __fadd_rn(other, t & bit ? -v : v);
    }
  }
}

// ---- scales ----------------------------------------------------------------------------------------------------------

// What the warps tell each other of blocks longer than theirs.
struct TileShared {
  uint32_t words[kTileWarps];
};

// Joins a value of each quad over the blocks that the quads lie in: afterwards every lane has that of its quad's block. The
// order is that of the CPU's sum: the quads, the lanes, the warps, neighbours first.
template <class Value, class Join>
__device__ __forceinline__ void join_block(int block_log2, TileShared& shared, Value& a, Value& b, Join&& join) {
  if (block_log2 > 5) a = join(a, b);
  const int last = block_log2 > 8 ? 16 : block_log2 > 6 ? 1 << (block_log2 - 4) : 4;
  for (int step = 1; step <= 16; step *= 2) {
    if (step > last) break;
    a = join(a, __shfl_xor_sync(ptx::kAllLanes, a, step));
    if (block_log2 == 5) b = join(b, __shfl_xor_sync(ptx::kAllLanes, b, step));
  }
  if (block_log2 > 8) {
    const int warp = threadIdx.x / kWarp;
    __syncthreads();  // the values of an earlier call have been read
    if (threadIdx.x % kWarp == 0) memcpy(&shared.words[warp], &a, sizeof a);
    __syncthreads();  // all warps have written theirs
    Value values[kTileWarps];
    for (int w = 0; w < kTileWarps; ++w) memcpy(&values[w], &shared.words[w], sizeof a);
    for (int w = 0; w < kTileWarps; w += 2) values[w] = join(values[w], values[w + 1]);
    Value result = warp < 4 ? warp < 2 ? values[0] : values[2] : warp < 6 ? values[4] : values[6];
    if (block_log2 > 9) {
      const Value low = join(values[0], values[2]), high = join(values[4], values[6]);
      result = block_log2 > 10 ? join(low, high) : warp < 4 ? low : high;
    }
    a = result;
  }
  if (block_log2 > 5) b = a;
}

// Of a quad: the magnitude's bits, then 1 for + and 0 for -, the largest of all.
__device__ __forceinline__ uint32_t largest_key(const float* x) {
  uint32_t key = 0;
  for (int i = 0; i < kQuad; ++i) {
    const uint32_t bits = float_bits(x[i]) ^ 0x80000000u;
    key = max(key, bits << 1 | bits >> 31);
  }
  return key;
}

struct BlockScale {
  float extreme, inverse;
  bool is_finite, has_codes;

  // What the wire has; once a block and not in each lane, since it may be a division.
  template <int kCode>
  __device__ __forceinline__ float scale(bool stochastic) const {
    if (!is_finite) return float_from_bits(kNanBits);
    if (!has_codes) return 0.0f;
    if constexpr (kCode == 1) return extreme;
    if (stochastic || kCode == kFloat8) return __fdiv_rn(extreme, -levels_of(kCode, stochastic));
    return extreme * (-1.0f / levels_of(kCode, false));  // a power of two: as the division
  }
};

template <int kCode>
__device__ __forceinline__ BlockScale block_scale(float extreme, bool is_finite, bool stochastic) {
  BlockScale s{extreme, 0.0f, is_finite, is_finite && fabsf(extreme) >= kSmallest};
  if (kCode != 1 && s.has_codes) s.inverse = __fdiv_rn(-levels_of(kCode, stochastic), extreme);
  return s;
}

// The scales of the two quads.
template <int kCode>
__device__ __forceinline__ void find_scales(const float (&x)[kLaneElements], const CodecWire& wire, int64_t counted,
                                            const LanePlace& place, bool stochastic, TileShared& shared,
                                            BlockScale (&s)[2]) {
  uint32_t key[2] = {largest_key(x), largest_key(x + kQuad)};
  join_block(wire.block_log2, shared, key[0], key[1], [](uint32_t a, uint32_t b) { return max(a, b); });
  float extreme[2];
  bool is_finite[2];
  for (int i = 0; i < 2; ++i) {
    extreme[i] = float_from_bits(key[i] >> 1 | ~key[i] << 31);
    is_finite[i] = key[i] >> 1 < kInfinityBits;
  }
  if constexpr (kCode == 1) {
    float m[kLaneElements];
    for (int i = 0; i < kLaneElements; ++i) m[i] = fabsf(x[i]) * 0x1p-11f;
    if (wire.block_log2 > 5) {
      for (int i = 0; i < kQuad; ++i) m[i] = __fadd_rn(m[i], m[i + kQuad]);
    }
    float sum[2];
    for (int i = 0; i < 2; ++i) {
      const float* of = m + i * kQuad;
      sum[i] = __fadd_rn(__fadd_rn(of[0], of[1]), __fadd_rn(of[2], of[3]));
    }
    if (wire.block_log2 > 5) sum[1] = -0.0f;  // the first one has both quads already
    join_block(wire.block_log2, shared, sum[0], sum[1], [](float a, float b) { return __fadd_rn(a, b); });
    for (int i = 0; i < 2; ++i) {
      const int64_t left = counted - ((place.first + i * kGroup) >> wire.block_log2 << wire.block_log2);
      const int64_t valid = left < wire.block() ? left : wire.block();
      extreme[i] = __fdiv_rn(sum[i], static_cast<float>(static_cast<int>(valid))) * 0x1p11f;
    }
  }
  for (int i = 0; i < 2; ++i) {
    if (i == 0 || wire.block_log2 == 5) s[i] = block_scale<kCode>(extreme[i], is_finite[i], stochastic);
    else s[i] = s[0];
  }
}

// ---- codes -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void draw(const CodecRounding& rounding, const LanePlace& place,
                                     float (&fractions)[kLaneElements]) {
  const uint64_t call = static_cast<uint64_t>(rounding.offset / kUnit + place.unit) * kUnitLanes + place.t;
  uint32_t x[4] = {static_cast<uint32_t>(call), static_cast<uint32_t>(call >> 32), static_cast<uint32_t>(rounding.step),
                   static_cast<uint32_t>(rounding.step >> 32)};
  philox(x, [&](int half, int round) { return philox_round_key(rounding.seed, half, round); });
  for (int i = 0; i < kLaneElements; ++i) {
    const uint32_t k = i % 2 == 0 ? x[i / 2] & 0xffffu : x[i / 2] >> 16;
    fractions[i] = (static_cast<float>(k) + 0.5f) * 0x1p-16f;
  }
}

// x becomes its codes, as floats; words[i]: those of quad i as bytes.
template <int kCode>
__device__ __forceinline__ void encode(float (&x)[kLaneElements], const BlockScale (&s)[2],
                                       const CodecRounding& rounding, const LanePlace& place, uint32_t (&words)[2]) {
  constexpr float kMost = (1 << (kCode - 1)) - 1.0f;
  float fractions[kLaneElements];
  if (rounding.stochastic) draw(rounding, place, fractions);
  for (int i = 0; i < kLaneElements; ++i) {
    const float v = s[i / kQuad].has_codes ? __fmul_rn(x[i], s[i / kQuad].inverse) : 0.0f;
    float q = fminf(v, kMost);
    if (rounding.stochastic) {
      const float below = floorf(v);
      q = fmaxf(fminf(fractions[i] < __fsub_rn(v, below) ? below + 1.0f : below, kMost), -kMost);
    }
    x[i] = __fadd_rn(q, kShifter);
  }
  for (int i = 0; i < 2; ++i) {
    const float* of = x + i * kQuad;
    const uint32_t low = __byte_perm(float_bits(of[0]), float_bits(of[1]), 0x0040);
    const uint32_t high = __byte_perm(float_bits(of[2]), float_bits(of[3]), 0x0040);
    words[i] = __byte_perm(low, high, 0x5410);
  }
  for (float& v : x) v = __fsub_rn(v, kShifter);
}
// float8 e4m3: of |x| up to 448, and back.
__device__ __forceinline__ uint32_t float8_of(float x) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - kFloat8Rebias;
  const uint32_t small = float_bits(__fadd_rn(float_from_bits(magnitude), kFloat8Shifter)) - float_bits(kFloat8Shifter);
  const uint32_t code = magnitude < kFloat8SmallestNormal ? small : normal;
  return code == 0 ? 0 : code | (bits >> 24 & 0x80u);
}
__device__ __forceinline__ float float8_as_float(uint32_t code) {
  const uint32_t magnitude = code & 0x7fu;
  const float small = static_cast<float>(magnitude) * 0x1p-9f;
  return float_from_bits((magnitude < 8 ? float_bits(small) : (magnitude + kFloat8Rebias) << 20) | (code & 0x80u)
                                                                                                       << 24);
}
__device__ __forceinline__ void encode_float8(const float (&x)[kLaneElements], const BlockScale (&s)[2],
                                              uint32_t (&words)[2]) {
  words[0] = words[1] = 0;
  for (int i = 0; i < kLaneElements; ++i) {
    const float v = s[i / kQuad].has_codes ? __fmul_rn(x[i], s[i / kQuad].inverse) : 0.0f;
    words[i / kQuad] |= float8_of(v) << (8 * (i % kQuad));
  }
}
// 1 bit: words[i] has the four signs of quad i.
__device__ __forceinline__ void encode_signs(float (&x)[kLaneElements], const BlockScale (&s)[2],
                                             uint32_t (&words)[2]) {
  words[0] = words[1] = 0;
  for (int i = 0; i < kLaneElements; ++i) {
    const bool is_minus = s[i / kQuad].has_codes && x[i] < -kSmallest;
    if (is_minus) words[i / kQuad] |= 1u << i % kQuad;
    x[i] = is_minus ? -1.0f : 1.0f;
  }
}

__device__ __forceinline__ void store_word(uint8_t* to, uint32_t word) { *reinterpret_cast<uint32_t*>(to) = word; }
__device__ __forceinline__ uint32_t load_word(const uint8_t* from) { return *reinterpret_cast<const uint32_t*>(from); }

// x becomes its codes, as floats, but for float8, whose words have them.
template <int kCode>
__device__ __forceinline__ void encode_as(float (&x)[kLaneElements], const BlockScale (&s)[2],
                                          const CodecRounding& rounding, const LanePlace& place, uint32_t (&words)[2]) {
  if constexpr (kCode == 1) encode_signs(x, s, words);
  else if constexpr (kCode == kFloat8) encode_float8(x, s, words);
  else encode<kCode>(x, s, rounding, place, words);
}

// All lanes of the warp together.
template <int kCode>
__device__ __forceinline__ void store_codes(const CodecWire& wire, const LanePlace& place, uint32_t (&words)[2],
                                            uint8_t* out) {
  const bool is_inside = place.unit < wire.units();
  uint8_t* lower = out + place.unit * lower_plane_bytes(kCode) + kQuad * place.t;
  if constexpr (bits_of(kCode) == 8) {
    if (is_inside) {
      store_word(lower, words[0]);
      store_word(lower + kGroup, words[1]);
    }
  } else if constexpr (kCode == 1) {
    for (uint32_t& word : words) {
      word <<= kQuad * place.t;
      for (int step = 1; step < kUnitLanes; step *= 2) word |= __shfl_xor_sync(ptx::kAllLanes, word, step);
    }
    if (is_inside && place.t < 2) store_word(lower, place.t == 0 ? words[0] : words[1]);
  } else {
    constexpr uint32_t kLow = 0x0f0f0f0fu, kPair = 0x03030303u;
    if (is_inside) store_word(lower, (words[0] & kLow) | (words[1] & kLow) << 4);
    if constexpr (kCode == 6) {
      const uint32_t pairs = (words[0] >> 4 & kPair) | (words[1] >> 4 & kPair) << 4;
      const uint32_t later = __shfl_xor_sync(ptx::kAllLanes, pairs, 4);
      uint8_t* upper = out + wire.upper_plane() + place.unit * upper_plane_bytes(6) + kQuad * place.t;
      if (is_inside && place.t < 4) store_word(upper, pairs | later << 2);
    }
  }
}

// The scales of the blocks that begin in this lane.
template <int kCode>
__device__ __forceinline__ void store_own_scales(const CodecWire& wire, const LanePlace& place,
                                                 const BlockScale (&s)[2], bool stochastic, float* scales) {
  for (int i = 0; i < 2; ++i) {
    const int64_t at = place.first + i * kGroup, block = at >> wire.block_log2;
    if ((at & (wire.block() - 1)) == 0 && block < wire.blocks()) scales[block] = s[i].template scale<kCode>(stochastic);
  }
}
// The same in a wire, and once the bytes that hold nothing.
template <int kCode>
__device__ __forceinline__ void store_scales(const CodecWire& wire, const LanePlace& place, const BlockScale (&s)[2],
                                             bool stochastic, uint8_t* out) {
  store_own_scales<kCode>(wire, place, s, stochastic, reinterpret_cast<float*>(out + wire.scales()));
  if (blockIdx.x == 0 && threadIdx.x < 2 * kAlignment) {
    const int i = threadIdx.x % kAlignment;
    const int64_t at = (threadIdx.x < kAlignment ? wire.code_bytes() : wire.scales() + wire.scale_bytes()) + i;
    if (at < (threadIdx.x < kAlignment ? wire.scales() : wire.bytes())) out[at] = 0;
  }
}

// Elements that a scale counts: of rotated groups all.
__device__ __forceinline__ int64_t counted_of(int64_t numel, bool hadamard) {
  return hadamard ? (numel + kGroup - 1) / kGroup * kGroup : numel;
}

}  // namespace
}  // namespace fmkernels
