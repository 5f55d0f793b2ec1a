// SPDX-License-Identifier: Apache-2.0
// block_codec_avx512.cpp: sums of wires of 4 bits, as wires of 4 bits or as tensors; whole tiles.
//
// Decode    A code is looked up: vpermps takes the low 4 bits of a word for the index of one of the 16 products of a block, each
//           rounded once. For a wire, words come from memory at four offsets, so that each byte is the lowest of one once; high
//           halves are shifted. Blocks shorter than a pair of units look up the code itself, and multiply.
// Order     Of a pair, 64 bytes: vector j has the low halves of the bytes 4 i + j, vector 4 + j the high ones. Packing that
//           saturates leaves bytes that one vpshufb puts in order.
// Extremes  vrangeps keeps the larger magnitude with its sign, of two the positive one. It drops NaN: there may be none.
//           The extremes of 16 blocks are joined together, and so are their two divisions.
// Numerics  The operations are those of block_codec_tiles_cpu.h in their order, compiled without contraction.
// Cost      For a pair: a wire 8 looks-up, 4 shifts and 8 sums, the result 8 extremes, 8 products, 8 conversions, 8 to pack.
#include <immintrin.h>

#include "../common/vec.h"
#include "block_codec.h"

namespace fmkernels {
namespace {

constexpr int64_t kTile = kMaxBlock, kTileBlocks = kTile / kMinBlock;
constexpr int64_t kPair = 2 * kUnit;
constexpr int64_t kAhead = kTile;  // bytes that codes are asked for before they are read: two tiles
constexpr int kVector = 16, kHalf = 4, kPairVectors = kPair / kVector;

FM_INLINE __m512 broadcast(const void* p) {
  float x;
  memcpy(&x, p, sizeof x);
  return _mm512_set1_ps(x);
}

// What the 16 codes stand for, before the scale.
FM_INLINE __m512 code_levels() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1); }

// The larger magnitude, with its sign; of two the positive number.
FM_INLINE __m512 extreme_of(__m512 a, __m512 b) { return _mm512_range_ps(a, b, 7); }

// Which of the blocks of a pair the elements of a vector belong to.
struct Places {
  __mmask16 there;  // of a pair
  __m512i low, high;

  explicit Places(int block_log2) {
    const __m512i unit =
        _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, kUnit, kUnit, kUnit, kUnit, kUnit, kUnit, kUnit, kUnit);
    there = static_cast<__mmask16>((1u << (kPair >> block_log2)) - 1);
    low = _mm512_srl_epi32(unit, _mm_cvtsi32_si128(block_log2));
    high = _mm512_srl_epi32(_mm512_add_epi32(unit, _mm512_set1_epi32(kGroup)), _mm_cvtsi32_si128(block_log2));
  }
  // What each element of a pair has of the numbers of its blocks.
  FM_INLINE void spread(const void* p, __m512 (&x)[2]) const {
    const __m512 of_blocks = _mm512_maskz_loadu_ps(there, p);
    x[0] = _mm512_permutexvar_ps(low, of_blocks);
    x[1] = _mm512_permutexvar_ps(high, of_blocks);
  }
};

// emit(i, x) for the vectors of a pair of a wire.
template <bool kIsWide, class Emit>
FM_INLINE void decode_pair(const uint8_t* codes, const uint8_t* scale, const Places& places, Emit&& emit) {
  const __m512 levels = code_levels();
  __m512 scales[2], table = levels;
  __builtin_prefetch(codes + kAhead);
  if constexpr (kIsWide) table = _mm512_mul_ps(levels, broadcast(scale));
  else places.spread(scale, scales);
#pragma GCC unroll 4
  for (int j = 0; j < kHalf; ++j) {
    const __m512i words = _mm512_loadu_si512(codes + j);  // at the end of the last pair 3 bytes of the scales, too
    __m512 low = _mm512_permutexvar_ps(words, table);
    // Twice by a product of 16 bits, which other units of the processor make.
    const __m512i shifted = j & 1 ? _mm512_srli_epi32(words, 4) : _mm512_mulhi_epu16(words, _mm512_set1_epi16(1 << 12));
    __m512 high = _mm512_permutexvar_ps(shifted, table);
    if constexpr (!kIsWide) {
      low = _mm512_mul_ps(low, scales[0]);
      high = _mm512_mul_ps(high, scales[1]);
    }
    emit(j, low);
    emit(kHalf + j, high);
  }
}

// acc = the sum of a pair, a zero with any sign. codes, scale: of the first wire.
template <bool kIsWide>
FM_INLINE void sum_pair(const CodecSum& p, const uint8_t* codes, const uint8_t* scale, const Places& places,
                        __m512 (&acc)[kPairVectors]) {
  decode_pair<kIsWide>(codes, scale, places, [&](int i, __m512 x) __attribute__((always_inline)) { acc[i] = x; });
  for (int32_t w = 1; w < p.num_wires; ++w) {
    codes += p.wire_stride, scale += p.wire_stride;
    decode_pair<kIsWide>(codes, scale, places,
                         [&](int i, __m512 x) __attribute__((always_inline)) { acc[i] = _mm512_add_ps(acc[i], x); });
  }
  if (p.factor == 1.0f) return;
  for (__m512& x : acc) x = _mm512_mul_ps(x, _mm512_set1_ps(p.factor));
}

// Lane i is the extreme of block i of sixteen, of vectors that hold one of their blocks, or two.
template <bool kIsWide>
FM_INLINE __m512 extremes_of(const __m512* x) {
  __m512 octets[8], quads[4], pairs[2];
  for (int i = 0; i < 8; ++i) {  // 8 numbers of two blocks
    octets[i] = kIsWide ? extreme_of(_mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0x44),
                                     _mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0xee))
                        : x[i];
  }
  for (int i = 0; i < 4; ++i) {  // 4 numbers of four
    const __m512 a = octets[2 * i], b = octets[2 * i + 1];
    quads[i] = extreme_of(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  for (int i = 0; i < 2; ++i) {  // 2 numbers of eight
    const __m512 a = quads[2 * i], b = quads[2 * i + 1];
    pairs[i] = extreme_of(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  const __m512 all =
      extreme_of(_mm512_shuffle_ps(pairs[0], pairs[1], 0x44), _mm512_shuffle_ps(pairs[0], pairs[1], 0xee));
  // Lane 4 i + j is that of block i + 4 j.
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), all);
}

// Of the blocks that are `there` scales to `out`, and what their elements are multiplied by: 0 where codes are 0.
FM_INLINE __m512 scale_blocks(__m512 extremes, __mmask16 there, uint8_t* out) {
  const __m512 levels = _mm512_set1_ps(-levels_of(4, false)), magnitudes = _mm512_abs_ps(extremes);
  const __m512 infinity = _mm512_castsi512_ps(_mm512_set1_epi32(kInfinityBits));
  const __mmask16 is_infinite = _mm512_cmp_ps_mask(magnitudes, infinity, _CMP_EQ_OQ);
  const __mmask16 has_codes = _mm512_mask_cmp_ps_mask(~is_infinite, magnitudes, _mm512_set1_ps(kSmallest), _CMP_GE_OQ);
  const __m512 without = _mm512_castsi512_ps(_mm512_maskz_set1_epi32(is_infinite, kNanBits));
  _mm512_mask_storeu_ps(out, there, _mm512_mask_div_ps(without, has_codes, extremes, levels));
  return _mm512_maskz_div_ps(has_codes, levels, extremes);
}

// The codes of the four vectors of one half in the low 4 bits of bytes, of which 16 l + 4 i + j is that of element 4 l + j of
// vector i. An infinity times 0 becomes the least integer, whose low bits are those of the code 0.
FM_INLINE __m512i codes_of(const float* x, __m512 inverse) {
  __m512i q[kHalf];
#pragma GCC unroll 4
  for (int j = 0; j < kHalf; ++j) {
    q[j] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(x + kVector * j), inverse));
  }
  const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
  return _mm512_min_epi8(packed, _mm512_set1_epi8(static_cast<char>(levels_of(4, false) - 1)));
}
FM_INLINE void encode_pair(const float* x, const __m512 (&inverse)[2], uint8_t* out) {
  const __m512i low = codes_of(x, inverse[0]), high = codes_of(x + kPair / 2, inverse[1]);
  // (0xf & low) | (~0xf & high)
  const __m512i bytes = _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), low, _mm512_slli_epi16(high, 4), 0xca);
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  _mm512_storeu_si512(out, _mm512_shuffle_epi8(bytes, order));
}

// A tile between its two passes.
struct Tile {
  alignas(64) float h[kTile], inverses[kTileBlocks];
};

// The sums of a tile, and its scales to the result.
template <bool kIsWide>
FM_INLINE void sum_tile(const BlockCodecReduceParams& p, int64_t number, const Places& places, Tile& tile) {
  __m512 extremes[kTileBlocks / 2];  // of a block, or of two
  const int log2 = p.wire.block_log2;
  const int64_t num_blocks = kTile >> log2, codes_at = number * kTile / 2;
  const int64_t scales_at = p.wire.scales() + number * num_blocks * 4;
  const uint8_t *codes = p.sum.wires + codes_at, *scales = p.sum.wires + scales_at;
  for (int64_t at = 0; at < kTile;) {
    const int64_t b = at >> log2;
    __m512 low = _mm512_setzero_ps(), high = low;
    for (const int64_t end = at + (kIsWide ? int64_t{1} << log2 : kPair); at < end; at += kPair, codes += kPair / 2) {
      __m512 acc[kPairVectors];
      __builtin_prefetch(p.out + codes_at + at / 2, 1);
      sum_pair<kIsWide>(p.sum, codes, scales + 4 * b, places, acc);
      for (int i = 0; i < kPairVectors; ++i) _mm512_store_ps(tile.h + at + kVector * i, acc[i]);
      const __m512 of_low = extreme_of(extreme_of(acc[0], acc[1]), extreme_of(acc[2], acc[3]));
      high = extreme_of(extreme_of(acc[4], acc[5]), extreme_of(acc[6], acc[7]));
      low = kIsWide ? extreme_of(low, extreme_of(of_low, high)) : of_low;
    }
    if constexpr (kIsWide) {
      extremes[b] = low;
    } else if (log2 == 6) {
      extremes[b / 2] = extreme_of(low, high);
    } else {
      extremes[b / 2] = _mm512_shuffle_f32x4(low, high, 0x44);
      extremes[b / 2 + 1] = _mm512_shuffle_f32x4(low, high, 0xee);
    }
  }
  for (int64_t b = num_blocks; b < kVector; ++b) extremes[b] = _mm512_setzero_ps();
  for (int64_t b = 0; b < num_blocks; b += kVector) {
    const int64_t left = num_blocks - b;
    const __mmask16 there = static_cast<__mmask16>(left < kVector ? (1u << left) - 1 : 0xffffu);
    _mm512_store_ps(tile.inverses + b, scale_blocks(extremes_of<kIsWide>(extremes + (kIsWide ? b : b / 2)), there,
                                                    p.out + scales_at + 4 * b));
  }
}

template <bool kIsWide>
FM_INLINE void encode_tile(const Tile& tile, int block_log2, const Places& places, uint8_t* out) {
  for (int64_t at = 0; at < kTile; at += kPair, out += kPair / 2) {
    __m512 inverse[2];
    if constexpr (kIsWide) inverse[0] = inverse[1] = broadcast(tile.inverses + (at >> block_log2));
    else places.spread(tile.inverses + (at >> block_log2), inverse);
    encode_pair(tile.h + at, inverse, out);
  }
}

// The codes of a tile after the sums of the next one: they need not wait for the divisions.
template <bool kIsWide>
void reduce_tiles(const BlockCodecReduceParams& p, int64_t first, int64_t count) {
  Tile tiles[2];
  const Places places(p.wire.block_log2);
  for (int64_t i = 0; i <= count; ++i) {
    if (i < count) sum_tile<kIsWide>(p, first + i, places, tiles[i & 1]);
    if (i > 0) encode_tile<kIsWide>(tiles[~i & 1], p.wire.block_log2, places, p.out + (first + i - 1) * kTile / 2);
  }
}

// ---- the sum as a tensor ---------------------------------------------------------------------------------------------

// 16 elements.
template <bool kStreams>
FM_INLINE void store(float* p, __m512 x) {
  if constexpr (kStreams) _mm512_stream_ps(p, x);
  else _mm512_storeu_ps(p, x);
}
template <bool kStreams>
FM_INLINE void store_halves(void* p, __m256i x) {
  __m256i* to = static_cast<__m256i*>(p);
  if constexpr (kStreams) _mm256_stream_si256(to, x);
  else _mm256_storeu_si256(to, x);
}
template <bool kStreams>
FM_INLINE void store(BFloat16* p, __m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i upper = _mm512_mask_set1_epi32(_mm512_srli_epi32(rounded, 16), is_nan, 0x7fff);
  store_halves<kStreams>(p, _mm512_cvtepi32_epi16(upper));
}
template <bool kStreams>
FM_INLINE void store(Half* p, __m512 x) {
  store_halves<kStreams>(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// Vectors of contiguous elements: bytes are widened to words. The first sum is 0 + x, which is never -0.
template <class T, bool kStreams>
void sum_tiles(const CodecSum& p, int64_t first, int64_t count, T* out) {
  const __m512 levels = code_levels();
  const int log2 = p.wire.block_log2;
  const int64_t second = (int64_t{kGroup} >> log2) * 4, scales = p.wire.scales();
  for (int64_t at = first * kTile; at < (first + count) * kTile; at += kUnit) {
    const uint8_t *codes = p.wires + at / 2, *scale = p.wires + scales + (at >> log2) * 4;
    __m512 acc[4];
    for (__m512& x : acc) x = _mm512_setzero_ps();
    for (int32_t w = 0; w < p.num_wires; ++w, codes += p.wire_stride, scale += p.wire_stride) {
      const __m512 low = _mm512_mul_ps(levels, broadcast(scale));
      const __m512 high = _mm512_mul_ps(levels, broadcast(scale + second));
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes) + i);
        const __m512i words = _mm512_cvtepu8_epi32(bytes);
        acc[i] = _mm512_add_ps(acc[i], _mm512_permutexvar_ps(words, low));
        acc[2 + i] = _mm512_add_ps(acc[2 + i], _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4), high));
      }
    }
    for (int i = 0; i < 4; ++i) {
      if (p.factor != 1.0f) acc[i] = _mm512_mul_ps(acc[i], _mm512_set1_ps(p.factor));
      store<kStreams>(out + at + kVector * i, acc[i]);
    }
  }
}

}  // namespace

template <>
void run_block_codec_sum_tiles<kIsa>(const BlockCodecSumParams& p, int64_t first, int64_t count, bool streams) {
  auto sum = [&]<class T>(T* out) {
    streams ? sum_tiles<T, true>(p.sum, first, count, out) : sum_tiles<T, false>(p.sum, first, count, out);
  };
  switch (p.dtype) {
    case DType::kFloat32: return sum(static_cast<float*>(p.out));
    case DType::kBFloat16: return sum(static_cast<BFloat16*>(p.out));
    default: return sum(static_cast<Half*>(p.out));
  }
}

template <>
void run_block_codec_reduce_tiles<kIsa>(const BlockCodecReduceParams& p, int64_t first, int64_t count) {
  p.wire.block() < kPair ? reduce_tiles<false>(p, first, count) : reduce_tiles<true>(p, first, count);
}

}  // namespace fmkernels
