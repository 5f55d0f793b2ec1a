// SPDX-License-Identifier: Apache-2.0
// A tile of rows times a panel of a packed weight, by one block on CUDA.
//
// Work       The warps of a block share a panel of 32 features: warp i takes the chunks i, i + kWarps, ... of 32 columns. Lane
//            4g + t holds features 4g .. 4g + 3 and columns 8t .. 8t + 7 of a chunk, so a warp reads a chunk as one piece, 16
//            bytes a lane at a time.
// Fragments  Halves: the order of k is free in a product, so these columns of a lane are its part of an A fragment, 4 of
//            them a step, and 16 bytes of a row of x are its part of B. The integers are exact in both half dtypes.
// Numerics   float32 accumulation; a chunk of integers times x, then times its scale; the sums of the warps are added in their
//            order. A row has the same bits in any tile. A product beyond float32 before its scale makes it smaller is infinity.
#pragma once

#include "divisor.h"
#include "packed_weight.h"
#include "ptx.h"
#include "vector_cuda.h"

namespace fmkernels {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kSumStride = kPackedPanel + 4;  // floats; the lanes of a store stand on different banks

// What one block makes of T, and how.
template <class T, int kBitsOfWord, int kTileSize>
struct Traits {
  using Element = T;
  static constexpr bool kIsHalf = sizeof(T) == 2;
  static constexpr int kBits = kBitsOfWord;
  static constexpr int kTiles = kTileSize;  // of 8 rows (halves, columns of B) or of one
  static constexpr int kRows = kIsHalf ? 8 * kTiles : kTiles;
  static constexpr int kLoads = kBits / 4;  // of 16 bytes a chunk and lane
  // Chunks that are under way at a time: 64 bytes a lane, or 32, so that two blocks share a multiprocessor.
  static constexpr int kStages = (kTiles == 1 ? 4 : 2) / kLoads;
  static constexpr int kWordsPerChunk = kPackedPanel * kPackedChunk * kBits / 32;
};

// Eight neighbouring columns of a row of x.
template <class T>
struct Columns {
  uint32_t words[2 * sizeof(T)];
};

// ---- Loads -------------------------------------------------------------------------------------------------------------

// Columns column .. column + 7 of the row, zeros past its end.
template <class T>
__device__ __forceinline__ Columns<T> load_columns(const T* row, int64_t column, int64_t num_columns, bool is_aligned) {
  Columns<T> columns{};
  if (row == nullptr) return columns;
  if (is_aligned && column + 8 <= num_columns) {
    const uint4* from = reinterpret_cast<const uint4*>(row + column);
    for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) {
      const uint4 bits = __ldg(from + i);
      columns.words[4 * i] = bits.x, columns.words[4 * i + 1] = bits.y;
      columns.words[4 * i + 2] = bits.z, columns.words[4 * i + 3] = bits.w;
    }
    return columns;
  }
  T elements[8];
  for (int i = 0; i < 8; ++i) elements[i] = column + i < num_columns ? row[column + i] : T{};
  memcpy(&columns, elements, sizeof columns);
  return columns;
}

// What a lane needs of one chunk of its panel.
template <int kLoads>
struct ChunkOfLane {
  uint32_t words[kLoads][4];  // [, feature 4g + i]
  float scales[4];            // zeros for a chunk that does not exist
  uint32_t zeros;             // a byte a feature
};

template <class Traits>
__device__ __forceinline__ ChunkOfLane<Traits::kLoads> load_chunk(const PackedWeight& w,
                                                                  const Divisor& chunks_per_group, int64_t panel,
                                                                  int32_t chunk, int g, int t) {
  ChunkOfLane<Traits::kLoads> result{};
  if (chunk >= w.num_chunks) return result;
  const uint32_t* words = w.values + (panel * w.num_chunks + chunk) * Traits::kWordsPerChunk + 4 * g;
  for (int i = 0; i < Traits::kLoads; ++i) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(words + (t * Traits::kLoads + i) * kPackedPanel));
    result.words[i][0] = bits.x, result.words[i][1] = bits.y, result.words[i][2] = bits.z, result.words[i][3] = bits.w;
  }
  const int64_t group = panel * w.num_groups + chunk / chunks_per_group;
  const float4 scales = __ldg(reinterpret_cast<const float4*>(w.scales + group * kPackedPanel + 4 * g));
  result.scales[0] = scales.x, result.scales[1] = scales.y, result.scales[2] = scales.z, result.scales[3] = scales.w;
  result.zeros = 0x08080808u;
  if (w.zeros != nullptr) {
    result.zeros = __ldg(reinterpret_cast<const uint32_t*>(w.zeros + group * kPackedPanel + 4 * g)) & 0x0f0f0f0fu;
  }
  return result;
}

// ---- Integers as elements ----------------------------------------------------------------------------------------------

template <class T>
constexpr uint32_t kMagic = 0x64006400u;  // 1024 twice: an integer below 1024 in the low bits is added to it
template <>
inline constexpr uint32_t kMagic<BFloat16> = 0x43004300u;  // 128 twice: an integer below 128
template <class T>
constexpr uint32_t kOne = 0x3c003c00u;
template <>
inline constexpr uint32_t kOne<BFloat16> = 0x3f803f80u;
constexpr uint32_t kSigns = 0x80008000u;

// Columns 2i and 2i + 1 of eight, of one feature, as a pair of halves.
template <class T, int kBits, int kLoads>
__device__ __forceinline__ uint32_t decode_pair(const uint32_t (&words)[kLoads][4], int feature, int i, uint32_t zero) {
  if constexpr (kBits == 4) {
    const uint32_t biased = ((words[0][feature] >> (4 * i)) & 0x000f000fu) | kMagic<T>;
    return ptx::fma_x2<T>(biased, kOne<T>, (kMagic<T> ^ kSigns) | zero | zero << 16);
  } else {
    const uint32_t pair = __byte_perm(words[i / 2][feature], 0, i % 2 == 0 ? 0x4140 : 0x4342);  // a byte each
    const uint32_t low = (pair & 0x007f007fu) | kMagic<T>, sign = (pair & 0x00800080u) | kMagic<T>;
    return ptx::fma_x2<T>(sign, kOne<T> ^ kSigns, low);  // low 7 bits - 128 * sign
  }
}

// Column i of eight, of one feature.
template <int kBits, int kLoads>
__device__ __forceinline__ float decode_float(const uint32_t (&words)[kLoads][4], int feature, int i, uint32_t zero) {
  constexpr uint32_t kTwo23 = 0x4b000000u;  // 2^23: an integer in the low bits is added to it
  if constexpr (kBits == 4) {
    const uint32_t nibble = (words[0][feature] >> (4 * (i / 2 + i % 2 * 4))) & 15u;
    return float_from_bits(nibble | kTwo23) - float_from_bits(zero | kTwo23);
  } else {
    const uint32_t biased = __byte_perm(words[i / 4][feature] ^ 0x80808080u, kTwo23, 0x7650 + i % 4);
    return float_from_bits(biased) - (8388608.0f + 128.0f);
  }
}

__device__ __forceinline__ uint32_t zero_of(uint32_t zeros, int feature) { return zeros >> (8 * feature) & 255u; }

// ---- Products ----------------------------------------------------------------------------------------------------------

// Halves: total[tile] holds two C fragments, of features 4g, 4g + 1 and of 4g + 2, 4g + 3; their columns are rows of x.
template <class Traits>
__device__ __forceinline__ void multiply_chunk(const ChunkOfLane<Traits::kLoads>& w,
                                               const Columns<typename Traits::Element> (&x)[Traits::kTiles],
                                               float (&total)[Traits::kTiles][8]) {
  using T = typename Traits::Element;
  if constexpr (Traits::kIsHalf) {
    for (int h = 0; h < 2; ++h) {
      uint32_t a[2][4];  // [step of k][register]
      for (int row = 0; row < 2; ++row) {
        const uint32_t zero = zero_of(w.zeros, 2 * h + row);
        for (int i = 0; i < 4; ++i) {
          a[i / 2][i % 2 * 2 + row] = decode_pair<T, Traits::kBits>(w.words, 2 * h + row, i, zero);
        }
      }
      for (int tile = 0; tile < Traits::kTiles; ++tile) {
        float c[4];
        ptx::mma_m16n8k16<T>(c, a[0], x[tile].words[0], x[tile].words[1], make_float4(0, 0, 0, 0));
        ptx::mma_m16n8k16<T>(c, a[1], x[tile].words[2], x[tile].words[3]);
        for (int i = 0; i < 4; ++i) total[tile][4 * h + i] += c[i] * w.scales[2 * h + i / 2];
      }
    }
  } else {  // total[row][feature 4g + i], of this lane's columns
    for (int feature = 0; feature < 4; ++feature) {
      const uint32_t zero = zero_of(w.zeros, feature);
      float acc[Traits::kTiles] = {};
      for (int i = 0; i < 8; ++i) {
        const float integer = decode_float<Traits::kBits>(w.words, feature, i, zero);
        for (int row = 0; row < Traits::kTiles; ++row) acc[row] += integer * float_from_bits(x[row].words[i]);
      }
      for (int row = 0; row < Traits::kTiles; ++row) total[row][feature] += acc[row] * w.scales[feature];
    }
  }
}

// sum[row][feature] of a warp to shared memory.
template <class Traits>
__device__ __forceinline__ void store_sums(float (*sum)[kSumStride], float (&total)[Traits::kTiles][8], int g, int t) {
  for (int tile = 0; tile < Traits::kTiles; ++tile) {
    const float (&c)[8] = total[tile];
    if constexpr (Traits::kIsHalf) {
      float* to = &sum[8 * tile + 2 * t][4 * g];
      *reinterpret_cast<float4*>(to) = make_float4(c[0], c[2], c[4], c[6]);
      *reinterpret_cast<float4*>(to + kSumStride) = make_float4(c[1], c[3], c[5], c[7]);
    } else {
      float row[4];
      for (int i = 0; i < 4; ++i) {
        const float pair = c[i] + __shfl_xor_sync(ptx::kAllLanes, c[i], 1);
        row[i] = pair + __shfl_xor_sync(ptx::kAllLanes, pair, 2);
      }
      if (t == 0) *reinterpret_cast<float4*>(&sum[tile][4 * g]) = make_float4(row[0], row[1], row[2], row[3]);
    }
  }
}

// ---- The tile ----------------------------------------------------------------------------------------------------------

// total = what the chunks of this warp give it, for the rows of x that begin at `rows`, null where there is none.
template <class Traits>
__device__ __forceinline__ void multiply_panel(const PackedWeight& w, const Divisor& chunks_per_group, int64_t panel,
                                               const typename Traits::Element* (&rows)[Traits::kTiles],
                                               bool x_is_aligned, float (&total)[Traits::kTiles][8]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  for (int32_t first = warp; first < w.num_chunks; first += kWarps * Traits::kStages) {
    ChunkOfLane<Traits::kLoads> chunks[Traits::kStages];
#pragma unroll
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      chunks[stage] = load_chunk<Traits>(w, chunks_per_group, panel, first + stage * kWarps, g, t);
    }
#pragma unroll
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      const int64_t column = int64_t{first + stage * kWarps} * kPackedChunk + 8 * t;
      Columns<typename Traits::Element> x[Traits::kTiles];
      for (int tile = 0; tile < Traits::kTiles; ++tile) {
        x[tile] = load_columns(rows[tile], column, w.in_features, x_is_aligned);
      }
      multiply_chunk<Traits>(chunks[stage], x, total);
    }
  }
}

// The row of a tile whose columns this lane takes into its part of B, for halves; every lane has all rows, for float32.
template <class Traits>
__device__ __forceinline__ int row_of_lane(int tile) {
  const int lane = threadIdx.x % kWarp;
  return Traits::kIsHalf ? 8 * tile + lane / 4 : tile;
}

// Element i of a tile of sums [warp][row][feature], i counting features, then rows.
template <int kRows>
__device__ __forceinline__ float sum_of_warps(const float (&sums)[kWarps][kRows][kSumStride], int i) {
  float y = sums[0][i / kPackedPanel][i % kPackedPanel];
  for (int part = 1; part < kWarps; ++part) y += sums[part][i / kPackedPanel][i % kPackedPanel];
  return y;
}

}  // namespace
}  // namespace fmkernels
