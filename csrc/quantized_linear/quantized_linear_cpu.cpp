// SPDX-License-Identifier: Apache-2.0
// quantized_linear_cpu.cpp: the CPU kernels, one for a single row and one for more, which give a row the same bits.
//
// Contract   see quantized_linear.h. x is first copied to float32, [chunk][row][kChunk], padded with zeros.
// Work       A task is a panel: 32 output features, whose words are one stream of memory. One row: a word is decoded in
//            registers and multiplied at once. More rows: a chunk is decoded to a tile of 4 KiB, which is then a matrix
//            product with all rows, 6 rows x 2 vectors of features at a time.
// Numerics   A decoded integer is off by a power of two, which x makes good: shifts and masks that a wider decoding would
//            need are saved, and products have the bits that they would have without, but for the tiniest x of a row
//            (factor_of_range). Deterministic.
// Cost       One row: 3 instructions a vector of weights (4 of nibbles) and a load of its share of the word; bound by
//            memory where the weight does not fit into the caches. More rows: 2 * rows flops a weight.

#include "quantized_linear.h"

#include "../common/dispatch_cpu.h"
#include "../common/parallel.h"
#include "../common/vec.h"

namespace fmkernels {
namespace {

constexpr int kVecs = kPanel / kLanes;
constexpr int kTileVecs = 4;         // vectors of features that one row is multiplied with at a time
constexpr int kTileRows = 6;         // rows that a decoded vector is multiplied with at a time
constexpr int kRowBlock = 60;        // rows that a decoded chunk is used for
constexpr int kRowsOfX = 480;        // rows of x that are copied at a time
constexpr int64_t kPrefetch = 2048;  // bytes ahead

// How the words of kBits are decoded: position i of a word to integers times 2^shift(i), and the column that it is.
template <int kBits>
struct Decoder {
  static constexpr int kColumns = 32 / kBits;  // of a word
  static constexpr int kWords = kChunk / kColumns;

  // Nibbles: the even columns stand in the lower half of a word and the odd ones in the upper.
  static constexpr int column(int i) { return kBits == 8 ? i : i < 4 ? 2 * i : 2 * (i - 4) + 1; }
  static constexpr int shift_of_column(int column) { return kBits == 8 ? 24 : 4 * (column % 8 / 2); }

  // zeros[i % 4] << shift, of nibbles.
  static FM_INLINE VecF decode(VecU word, int i, const VecI* zeros) {
    VecI integers;
    if constexpr (kBits == 8) integers = (VecI)((word << (24 - 8 * i)) & 0xff000000u);
    else integers = (VecI)((i < 4 ? word : word >> 16) & (0xfu << (4 * (i % 4)))) - zeros[i % 4];
    return __builtin_convertvector(integers, VecF);
  }
};

// The zeros of a group of a panel, shifted as the decoder wants them; 8 where the weight has none.
template <int kBits>
FM_INLINE void load_zeros(const PackedWeight& w, int64_t panel, int64_t group, VecI (*zeros)[4]) {
  if constexpr (kBits == 4) {
    for (int v = 0; v < kVecs; ++v) {
      VecI z = VecI{} + 8;
      if (w.zeros != nullptr) {
        const uint8_t* from = w.zeros + (panel * w.num_groups + group) * kPanel + v * kLanes;
        for (int lane = 0; lane < kLanes; ++lane) z[lane] = from[lane] & 15;
      }
      for (int i = 0; i < 4; ++i) zeros[v][i] = z << (4 * i);
    }
  }
}

FM_INLINE VecU load_words(const uint32_t* p) {
  VecU words;
  memcpy(&words, p, sizeof words);
  return words;
}

// A panel of the weight and where the walk over its chunks stands.
template <int kBits>
struct Panel {
  const PackedWeight& w;
  int64_t index;
  VecI zeros[kVecs][4];
  int64_t group = -1, chunks_left = 0;

  const uint32_t* words(int64_t chunk) const { return w.values + (index * w.num_chunks + chunk) * w.words_per_chunk(); }
  const float* scales() const { return w.scales + (index * w.num_groups + group) * kPanel; }

  // To the next chunk, and its group.
  FM_INLINE void step() {
    if (chunks_left == 0) {
      ++group;
      chunks_left = w.chunks_per_group;
      if (group == 0 || w.zeros != nullptr) load_zeros<kBits>(w, index, group, zeros);
    }
    --chunks_left;
  }
};

// ---- x -----------------------------------------------------------------------------------------------------------------

// A power of two that brings the largest finite |x| of a row near to 1 where it is far from it, so that no product with
// an integer leaves the range of float32 that its product with the weight does not leave; else 1. The shift of a column is
// up to 2^24: an |x| below 2^-70 of the largest is rounded by it, by at most 2^-94 of the largest.
float factor_of_range(float largest) {
  if (largest > 0x1p32f) return 0x1p-64f;
  if (largest < 0x1p-32f && largest > 0.0f) return 0x1p64f;
  return 1.0f;
}

template <class T>
const T* row_of_x(const QuantizedLinearParams& p, int64_t row) {
  return static_cast<const T*>(p.x) + row / p.rows_per_batch * p.x_stride[0] + row % p.rows_per_batch * p.x_stride[1];
}

// Copies a row to to[chunk * chunk_stride][kChunk], each column divided by its shift. Returns what the result is to be
// multiplied with.
template <class T, int kBits>
float copy_row(const T* x, int64_t num_columns, int64_t num_chunks, float* to, int64_t chunk_stride) {
  VecF largest{};
  auto load_lanes = [&](int64_t c) {
    if (c + kLanes <= num_columns) return load(x + c);
    return c < num_columns ? load_partial(x + c, static_cast<int>(num_columns - c), 0.0f) : VecF{};
  };
  for (int64_t c = 0; c < num_columns; c += kLanes) {
    const VecF value = load_lanes(c), magnitude = absolute(value);
    const VecF finite = magnitude <= 3.4028234663852886e38f ? magnitude : VecF{};
    largest = max(finite, largest);
  }
  float row_largest = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) row_largest = largest[lane] > row_largest ? largest[lane] : row_largest;
  const float factor = factor_of_range(row_largest);
  VecF factors[8 / kLanes];
  for (int c = 0; c < 8; ++c) {
    factors[c / kLanes][c % kLanes] = factor / static_cast<float>(1 << Decoder<kBits>::shift_of_column(c));
  }
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk, to += chunk_stride) {
    for (int c = 0; c < kChunk; c += kLanes) store(to + c, load_lanes(chunk * kChunk + c) * factors[c % 8 / kLanes]);
  }
  return 1.0f / factor;
}

// ---- One row -----------------------------------------------------------------------------------------------------------

// out[kPanel] = the panel times x [chunk][kChunk].
template <int kBits>
void multiply_row(const PackedWeight& w, int64_t panel_idx, const float* x, float* out) {
  using D = Decoder<kBits>;
  for (int first = 0; first < kVecs; first += kTileVecs) {
    Panel<kBits> panel{w, panel_idx, {}};
    VecF total[kTileVecs] = {};
    for (int64_t chunk = 0; chunk < w.num_chunks; ++chunk) {
      panel.step();
      const uint32_t* words = panel.words(chunk) + first * kLanes;
      const float* x_chunk = x + chunk * kChunk;
      VecF acc[kTileVecs] = {};
      for (int b = 0; b < D::kWords; ++b) {
        VecU word[kTileVecs];
        for (int v = 0; v < kTileVecs; ++v) word[v] = load_words(words + b * kPanel + v * kLanes);
        __builtin_prefetch(reinterpret_cast<const char*>(words + b * kPanel) + kPrefetch);
        __builtin_prefetch(reinterpret_cast<const char*>(words + b * kPanel) + kPrefetch + 64);
#pragma GCC unroll 8
        for (int i = 0; i < D::kColumns; ++i) {
          const VecF x_column = broadcast(x_chunk[b * D::kColumns + D::column(i)]);
          for (int v = 0; v < kTileVecs; ++v) acc[v] += D::decode(word[v], i, panel.zeros[first + v]) * x_column;
        }
      }
      for (int v = 0; v < kTileVecs; ++v) total[v] += acc[v] * load(panel.scales() + (first + v) * kLanes);
    }
    for (int v = 0; v < kTileVecs; ++v) store(out + (first + v) * kLanes, total[v]);
  }
}

// ---- More rows ---------------------------------------------------------------------------------------------------------

// tile[column position][kPanel] = the integers of a chunk, in the order in which they are added.
template <int kBits>
void decode_chunk(const Panel<kBits>& panel, int64_t chunk, float* tile) {
  using D = Decoder<kBits>;
  const uint32_t* words = panel.words(chunk);
  for (int b = 0; b < D::kWords; ++b) {
    for (int v = 0; v < kVecs; ++v) {
      const VecU word = load_words(words + b * kPanel + v * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < D::kColumns; ++i) {
        store(tile + (b * D::kColumns + i) * kPanel + v * kLanes, D::decode(word, i, panel.zeros[v]));
      }
    }
  }
}

// total[kRows][kPanel] += scales * (x[kRows][kChunk] times the tile).
template <int kBits, int kRows>
void multiply_tile(const float* x, const float* tile, const float* scales, float* total) {
  using D = Decoder<kBits>;
  for (int v = 0; v < kVecs; v += 2) {
    VecF acc[kRows][2] = {};
    for (int b = 0; b < D::kWords; ++b) {
#pragma GCC unroll 8
      for (int i = 0; i < D::kColumns; ++i) {
        const float* column = tile + (b * D::kColumns + i) * kPanel + v * kLanes;
        const VecF w0 = load(column), w1 = load(column + kLanes);
        for (int r = 0; r < kRows; ++r) {
          const VecF x_column = broadcast(x[r * kChunk + b * D::kColumns + D::column(i)]);
          acc[r][0] += w0 * x_column;
          acc[r][1] += w1 * x_column;
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int h = 0; h < 2; ++h) {
        float* sum = total + r * kPanel + (v + h) * kLanes;
        store(sum, load(sum) + acc[r][h] * load(scales + (v + h) * kLanes));
      }
    }
  }
}

// total[num_rows][kPanel] = the panel times x [chunk][x_rows][kChunk], of which num_rows are used.
template <int kBits>
void multiply_rows(const PackedWeight& w, int64_t panel_idx, const float* x, int64_t x_rows, int num_rows,
                   float* total) {
  alignas(64) float tile[kChunk * kPanel];
  Panel<kBits> panel{w, panel_idx, {}};
  for (int64_t i = 0; i < int64_t{num_rows} * kPanel; ++i) total[i] = 0.0f;
  for (int64_t chunk = 0; chunk < w.num_chunks; ++chunk) {
    panel.step();
    decode_chunk(panel, chunk, tile);
    const float *x_chunk = x + chunk * x_rows * kChunk, *scales = panel.scales();
    int row = 0;
    for (; row + kTileRows <= num_rows; row += kTileRows) {
      multiply_tile<kBits, kTileRows>(x_chunk + row * kChunk, tile, scales, total + row * kPanel);
    }
    auto rest = [&]<int kRows>() {
      multiply_tile<kBits, kRows>(x_chunk + row * kChunk, tile, scales, total + row * kPanel);
    };
    if (row < num_rows) dispatch_checked_int<1, 2, 3, 4, 5>(num_rows - row, rest);
  }
}

// ---- Both --------------------------------------------------------------------------------------------------------------

// y[row][the panel's features] = total * factor + bias.
template <class T>
void write_row(const QuantizedLinearParams& p, int64_t panel, int64_t row, const float* total, float factor) {
  const int64_t first = panel * kPanel, n = p.weight.out_features;
  T* y = static_cast<T*>(p.y) + row * n + first;
  const int count = static_cast<int>(n - first < kPanel ? n - first : kPanel);
  for (int i = 0; i < count; ++i) {
    const float sum = total[i] * factor;
    y[i] = from_float<T>(p.bias == nullptr ? sum : sum + bias_of(p, first + i));
  }
}

template <class T, int kBits>
void quantized_linear(const QuantizedLinearParams& p) {
  const PackedWeight& w = p.weight;
  const int64_t block_rows = p.num_rows < kRowsOfX ? p.num_rows : kRowsOfX;
  const int64_t x_floats = block_rows * w.num_chunks * kChunk;
  const Workspace workspace(Arena::array_bytes<float>(x_floats) + Arena::array_bytes<float>(block_rows));
  Arena arena(workspace.data());
  float *x = arena.take<float>(x_floats), *factors = arena.take<float>(block_rows);
  for (int64_t begin = 0; begin < p.num_rows; begin += block_rows) {
    const int64_t count = p.num_rows - begin < block_rows ? p.num_rows - begin : block_rows;
    const int workers = workers_for(count * w.out_features * w.in_features);
    parallel_for(count, count >= 64 ? workers : 1, [&](int64_t row, int) {
      factors[row] = copy_row<T, kBits>(row_of_x<T>(p, begin + row), w.in_features, w.num_chunks, x + row * kChunk,
                                        count * kChunk);
    });
    parallel_for(w.num_panels(), workers, [&](int64_t panel, int) {
      alignas(64) float total[kRowBlock * kPanel];
      if (count == 1) {
        multiply_row<kBits>(w, panel, x, total);
        return write_row<T>(p, panel, begin, total, factors[0]);
      }
      for (int64_t first = 0; first < count; first += kRowBlock) {
        const int rows = static_cast<int>(count - first < kRowBlock ? count - first : kRowBlock);
        multiply_rows<kBits>(w, panel, x + first * kChunk, count, rows, total);
        for (int row = 0; row < rows; ++row) {
          write_row<T>(p, panel, begin + first + row, total + row * kPanel, factors[first + row]);
        }
      }
    });
  }
}

// ---- The weight as numbers ---------------------------------------------------------------------------------------------

template <class T, int kBits>
void dequantize(const DequantizeParams& p) {
  using D = Decoder<kBits>;
  const PackedWeight& w = p.weight;
  parallel_for(w.num_panels(), workers_for(w.out_features * w.in_features), [&](int64_t index, int) {
    alignas(64) float tile[kChunk * kPanel];
    Panel<kBits> panel{w, index, {}};
    for (int64_t chunk = 0; chunk < w.num_chunks; ++chunk) {
      panel.step();
      decode_chunk(panel, chunk, tile);
      for (int64_t row = 0; row < kPanel && index * kPanel + row < w.out_features; ++row) {
        T* to = static_cast<T*>(p.w) + (index * kPanel + row) * w.in_features;
        for (int i = 0; i < kChunk; ++i) {
          const int64_t column = chunk * kChunk + i / D::kColumns * D::kColumns + D::column(i % D::kColumns);
          const float integer = tile[i * kPanel + row] / static_cast<float>(1 << D::shift_of_column(column % 8));
          if (column < w.in_features) to[column] = from_float<T>(integer * panel.scales()[row]);
        }
      }
    }
  });
}

// f.template operator()<T, kBits>().
template <class F>
void dispatch_kinds(DType dtype, int bits, F&& f) {
  dispatch_dtype(dtype, [&]<class T>() {
    dispatch_checked_int<4, 8>(bits, [&]<int kBits>() { f.template operator()<T, kBits>(); });
  });
}

}  // namespace

template <>
void run_quantized_linear<kIsa>(const QuantizedLinearParams& p) {
  dispatch_kinds(p.dtype, p.weight.bits, [&]<class T, int kBits>() { quantized_linear<T, kBits>(p); });
}

template <>
void run_quantized_linear_dequantize<kIsa>(const DequantizeParams& p) {
  dispatch_kinds(p.dtype, p.weight.bits, [&]<class T, int kBits>() { dequantize<T, kBits>(p); });
}

}  // namespace fmkernels
