// SPDX-License-Identifier: Apache-2.0
// quantized_linear.cu: y = x times the transpose of a weight of 8 or 4 bits, which is read once for a tile of rows.
//
// Contract   see quantized_linear.h; the words of the weight are drawn in docs/layouts.md.
// Work       grid (panels of 32 features, tiles of rows). The warps of a block share a panel: warp i takes the chunks
//            i, i + kWarps, ... of 32 columns. Lane 4g + t holds features 4g .. 4g + 3 and columns 8t .. 8t + 7 of a
//            chunk, so a warp reads a chunk as one piece, 16 bytes a lane at a time.
// Fragments  Halves: the order of k is free in a product, so these columns of a lane are its part of an A fragment, 4 of
//            them a step, and 16 bytes of a row of x are its part of B. The integers are exact in both half dtypes.
// Shared     the sums of the warps, added in their order.
// Numerics   float32 accumulation; a chunk of integers times x, then times its scale. A row has the same bits in any
//            tile. Deterministic. A product beyond float32 before its scale makes it smaller is infinity.
// Cost       out_features * in_features * bits / 8 bytes and 2 * rows flops a weight: bound by memory up to many rows.

#include "../common/dispatch.h"
#include "../common/divisor.h"
#include "../common/launch.h"
#include "../common/ptx.h"
#include "../common/vector_cuda.h"
#include "quantized_linear.h"

namespace fmkernels {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kSumStride = kPanel + 4;  // floats; the lanes of a store stand on different banks
constexpr int64_t kMaxGridY = 65535;

struct KernelParams : QuantizedLinearParams {
  bool x_is_aligned;  // every row begins on a 16-byte boundary
  Divisor chunks_per_group;
};

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
  static constexpr int kWordsPerChunk = kPanel * kChunk * kBits / 32;
};

// Eight neighbouring columns of a row of x.
template <class T>
struct Columns {
  uint32_t words[2 * sizeof(T)];
};

// ---- Loads -------------------------------------------------------------------------------------------------------------

// Row `row` of x, or null where there is none.
template <class T>
__device__ __forceinline__ const T* row_of_x(const KernelParams& p, int64_t row) {
  if (row >= p.num_rows) return nullptr;
  return static_cast<const T*>(p.x) + row / p.rows_per_batch * p.x_stride[0] + row % p.rows_per_batch * p.x_stride[1];
}

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
__device__ __forceinline__ ChunkOfLane<Traits::kLoads> load_chunk(const KernelParams& p, int64_t panel, int32_t chunk,
                                                                  int g, int t) {
  const PackedWeight& w = p.weight;
  ChunkOfLane<Traits::kLoads> result{};
  if (chunk >= w.num_chunks) return result;
  const uint32_t* words = w.values + (panel * w.num_chunks + chunk) * Traits::kWordsPerChunk + 4 * g;
  for (int i = 0; i < Traits::kLoads; ++i) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(words + (t * Traits::kLoads + i) * kPanel));
    result.words[i][0] = bits.x, result.words[i][1] = bits.y, result.words[i][2] = bits.z, result.words[i][3] = bits.w;
  }
  const int64_t group = panel * w.num_groups + chunk / p.chunks_per_group;
  const float4 scales = __ldg(reinterpret_cast<const float4*>(w.scales + group * kPanel + 4 * g));
  result.scales[0] = scales.x, result.scales[1] = scales.y, result.scales[2] = scales.z, result.scales[3] = scales.w;
  result.zeros = 0x08080808u;
  if (w.zeros != nullptr) {
    result.zeros = __ldg(reinterpret_cast<const uint32_t*>(w.zeros + group * kPanel + 4 * g)) & 0x0f0f0f0fu;
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

template <class Traits>
__global__ void __launch_bounds__(kThreads, 2) quantized_linear_kernel(KernelParams p) {
  using T = typename Traits::Element;
  __shared__ float sSum[kWarps][Traits::kRows][kSumStride];  // [warp, row, feature]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const PackedWeight& w = p.weight;
  const int64_t panel = blockIdx.x, num_tiles = (p.num_rows + Traits::kRows - 1) / Traits::kRows;

  for (int64_t row_tile = blockIdx.y; row_tile < num_tiles; row_tile += gridDim.y) {
    const int64_t first_row = row_tile * Traits::kRows;
    const T* rows[Traits::kTiles];
    for (int tile = 0; tile < Traits::kTiles; ++tile) {
      rows[tile] = row_of_x<T>(p, first_row + (Traits::kIsHalf ? 8 * tile + g : tile));
    }

    // The chunks of this warp.
    float total[Traits::kTiles][8] = {};
    for (int32_t first = warp; first < w.num_chunks; first += kWarps * Traits::kStages) {
      ChunkOfLane<Traits::kLoads> chunks[Traits::kStages];
#pragma unroll
      for (int stage = 0; stage < Traits::kStages; ++stage) {
        chunks[stage] = load_chunk<Traits>(p, panel, first + stage * kWarps, g, t);
      }
#pragma unroll
      for (int stage = 0; stage < Traits::kStages; ++stage) {
        const int64_t column = int64_t{first + stage * kWarps} * kChunk + 8 * t;
        Columns<T> x[Traits::kTiles];
        for (int tile = 0; tile < Traits::kTiles; ++tile) {
          x[tile] = load_columns(rows[tile], column, w.in_features, p.x_is_aligned);
        }
        multiply_chunk<Traits>(chunks[stage], x, total);
      }
    }

    // The warps together.
    store_sums<Traits>(sSum[warp], total, g, t);
    __syncthreads();  // the sums of all warps are there
    for (int i = threadIdx.x; i < Traits::kRows * kPanel; i += kThreads) {
      const int64_t row = first_row + i / kPanel, feature = panel * kPanel + i % kPanel;
      if (row >= p.num_rows || feature >= w.out_features) continue;
      float y = sSum[0][i / kPanel][i % kPanel];
      for (int part = 1; part < kWarps; ++part) y += sSum[part][i / kPanel][i % kPanel];
      if (p.bias != nullptr) y += bias_of(p, feature);
      static_cast<T*>(p.y)[row * w.out_features + feature] = from_float<T>(y);
    }
    __syncthreads();  // they have been read, before the next tile of rows
  }
}

// A warp a chunk of a panel, a lane a column of it.
template <class T, int kBits>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(DequantizeParams p) {
  const PackedWeight& w = p.weight;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t panel = item / w.num_chunks, chunk = item % w.num_chunks;
  const int64_t column = chunk * kChunk + threadIdx.x % kWarp;
  if (panel >= w.num_panels() || column >= w.in_features) return;
  constexpr int kColumns = 32 / kBits;  // of a word
  const uint32_t* words = w.values + (panel * w.num_chunks * kChunk + column) / kColumns * kPanel;
  const int64_t group = (panel * w.num_groups + chunk / w.chunks_per_group) * kPanel;
  const int in_word = static_cast<int>(column % kColumns);
  for (int i = 0; i < kPanel && panel * kPanel + i < w.out_features; ++i) {
    int integer;
    if constexpr (kBits == 4) {
      const int zero = w.zeros == nullptr ? 8 : w.zeros[group + i] & 15;
      integer = static_cast<int>(words[i] >> (4 * (in_word / 2 + in_word % 2 * 4)) & 15u) - zero;
    } else {
      integer = static_cast<int8_t>(words[i] >> (8 * in_word));
    }
    const float value = static_cast<float>(integer) * w.scales[group + i];
    static_cast<T*>(p.w)[(panel * kPanel + i) * w.in_features + column] = from_float<T>(value);
  }
}

}  // namespace

void launch_quantized_linear(const QuantizedLinearParams& params, cudaStream_t stream) {
  // Rows may have any length: load_columns looks at their ends.
  const bool aligned =
      is_aligned_16(params.x, element_bytes(params.dtype), 0, {params.x_stride[0], params.x_stride[1]});
  KernelParams p{params, aligned, Divisor(static_cast<int32_t>(params.weight.chunks_per_group))};
  const bool is_small = p.num_rows <= (p.dtype == DType::kFloat32 ? 1 : 8);
  dispatch_dtype(p.dtype, [&]<class T>() {
    dispatch_int<4, 8>("bits", p.weight.bits, [&]<int kBits>() {
      dispatch_int<1, 4>("tiles", is_small ? 1 : 4, [&]<int kTiles>() {
        using Kernel = Traits<T, kBits, kTiles>;
        const int64_t num_tiles = (p.num_rows + Kernel::kRows - 1) / Kernel::kRows;
        const dim3 grid(static_cast<unsigned>(p.weight.num_panels()),
                        static_cast<unsigned>(num_tiles < kMaxGridY ? num_tiles : kMaxGridY));
        launch("quantized_linear", quantized_linear_kernel<Kernel>, grid, kThreads, 0, stream, p);
      });
    });
  });
}

void launch_quantized_linear_dequantize(const DequantizeParams& p, cudaStream_t stream) {
  const dim3 grid = grid_of("dequantize_weight", p.weight.num_panels() * p.weight.num_chunks, kWarps);
  dispatch_dtype(p.dtype, [&]<class T>() {
    dispatch_int<4, 8>("bits", p.weight.bits, [&]<int kBits>() {
      launch("dequantize_weight", dequantize_kernel<T, kBits>, grid, kThreads, 0, stream, p);
    });
  });
}

}  // namespace fmkernels
