// SPDX-License-Identifier: Apache-2.0
// Rows of float32 times a panel of a packed weight on a CPU. Internal linkage, as in vec.h.
//
// Few rows   A word is decoded in registers and multiplied at once.
// More rows  A chunk is decoded to a tile of 4 KiB, which is then a matrix product with all rows, 6 rows x 2 vectors of
//            features at a time.
// Numerics   Both give a row the same bits. A decoded integer is off by a power of two, which x makes good: shifts and masks
//            that a wider decoding would need are saved, and products have the bits that they would have without, but for
//            the tiniest x of a row (factor_of_range).
// Cost       Few rows: 3 instructions a vector of weights (4 of nibbles) and a load of its share of the word; bound by
//            memory where the weight does not fit into the caches. More rows: 2 * rows flops a weight.
#pragma once

#include "dispatch_cpu.h"
#include "packed_weight.h"
#include "panel_cpu.h"
#include "vec.h"

namespace fmkernels {
namespace {

constexpr int kVecs = kPackedPanel / kLanes;
constexpr int kRowBlock = 120;       // rows that a decoded chunk is used for, at most
constexpr int64_t kPrefetch = 2048;  // bytes ahead

// How the words of kBits are decoded: position i of a word to integers times 2^shift(i), and the column that it is.
template <int kBits>
struct Decoder {
  static constexpr int kColumns = 32 / kBits;  // of a word
  static constexpr int kWords = kPackedChunk / kColumns;

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
        const uint8_t* from = w.zeros + (panel * w.num_groups + group) * kPackedPanel + v * kLanes;
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

// A panel of a weight and where the walk over its chunks stands.
template <int kBits>
struct PanelWalk {
  const PackedWeight& w;
  int64_t index;
  VecI zeros[kVecs][4];
  int64_t group = -1, chunks_left = 0;

  const uint32_t* words(int64_t chunk) const { return w.values + (index * w.num_chunks + chunk) * w.words_per_chunk(); }
  const float* scales() const { return w.scales + (index * w.num_groups + group) * kPackedPanel; }

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
inline float factor_of_range(float largest) {
  if (largest > 0x1p32f) return 0x1p-64f;
  if (largest < 0x1p-32f && largest > 0.0f) return 0x1p64f;
  return 1.0f;
}

// Copies a row to to[chunk * chunk_stride][kPackedChunk], each column divided by its shift. Returns what the result is to be
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
    for (int c = 0; c < kPackedChunk; c += kLanes)
      store(to + c, load_lanes(chunk * kPackedChunk + c) * factors[c % 8 / kLanes]);
  }
  return 1.0f / factor;
}

// ---- Few rows ----------------------------------------------------------------------------------------------------------

// total[kRows][kPackedPanel] = the panel times x [chunk][x_rows][kPackedChunk], of which kRows are used.
template <int kBits, int kRows>
void multiply_few(const PackedWeight& w, int64_t panel_idx, const float* x, int64_t x_rows, float* total) {
  using D = Decoder<kBits>;
  constexpr int kAtOnce = kRows <= 2 ? 4 : 2;  // vectors of features, so that their sums stay in registers
  PanelWalk<kBits> panel{w, panel_idx, {}};
  for (int i = 0; i < kRows * kPackedPanel; ++i) total[i] = 0.0f;
  for (int64_t chunk = 0; chunk < w.num_chunks; ++chunk) {
    panel.step();
    const float* x_chunk = x + chunk * x_rows * kPackedChunk;
    for (int first = 0; first < kVecs; first += kAtOnce) {
      const uint32_t* words = panel.words(chunk) + first * kLanes;
      VecF acc[kRows][kAtOnce] = {};
      for (int b = 0; b < D::kWords; ++b) {
        VecU word[kAtOnce];
        for (int v = 0; v < kAtOnce; ++v) word[v] = load_words(words + b * kPackedPanel + v * kLanes);
        for (int line = 0; line < kAtOnce * kLanes * 4; line += 64) {
          __builtin_prefetch(reinterpret_cast<const char*>(words + b * kPackedPanel) + kPrefetch + line);
        }
#pragma GCC unroll 8
        for (int i = 0; i < D::kColumns; ++i) {
          VecF x_column[kRows];
          for (int r = 0; r < kRows; ++r) {
            x_column[r] = broadcast(x_chunk[r * kPackedChunk + b * D::kColumns + D::column(i)]);
          }
          for (int v = 0; v < kAtOnce; ++v) {
            const VecF integers = D::decode(word[v], i, panel.zeros[first + v]);
            for (int r = 0; r < kRows; ++r) acc[r][v] += integers * x_column[r];
          }
        }
      }
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kAtOnce; ++v) {
          float* sum = total + r * kPackedPanel + (first + v) * kLanes;
          store(sum, load(sum) + acc[r][v] * load(panel.scales() + (first + v) * kLanes));
        }
      }
    }
  }
}

// ---- More rows ---------------------------------------------------------------------------------------------------------

// tile[column position][kPackedPanel] = the integers of a chunk, in the order in which they are added.
template <int kBits>
void decode_chunk(const PanelWalk<kBits>& panel, int64_t chunk, float* tile) {
  using D = Decoder<kBits>;
  const uint32_t* words = panel.words(chunk);
  for (int b = 0; b < D::kWords; ++b) {
    for (int v = 0; v < kVecs; ++v) {
      const VecU word = load_words(words + b * kPackedPanel + v * kLanes);
      if (v * kLanes % 16 == 0) {
        __builtin_prefetch(reinterpret_cast<const char*>(words + b * kPackedPanel + v * kLanes) + kPrefetch);
      }
#pragma GCC unroll 8
      for (int i = 0; i < D::kColumns; ++i) {
        store(tile + (b * D::kColumns + i) * kPackedPanel + v * kLanes, D::decode(word, i, panel.zeros[v]));
      }
    }
  }
}

// total[kRows][kPackedPanel] += scales * (x[kRows][kPackedChunk] times the tile).
template <int kBits, int kRows>
void multiply_tile(const float* x, const float* tile, const float* scales, float* total) {
  using D = Decoder<kBits>;
  for (int v = 0; v < kVecs; v += 2) {
    VecF acc[kRows][2] = {};
    for (int b = 0; b < D::kWords; ++b) {
#pragma GCC unroll 8
      for (int i = 0; i < D::kColumns; ++i) {
        const float* column = tile + (b * D::kColumns + i) * kPackedPanel + v * kLanes;
        const VecF w0 = load(column), w1 = load(column + kLanes);
        for (int r = 0; r < kRows; ++r) {
          const VecF x_column = broadcast(x[r * kPackedChunk + b * D::kColumns + D::column(i)]);
          acc[r][0] += w0 * x_column;
          acc[r][1] += w1 * x_column;
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int h = 0; h < 2; ++h) {
        float* sum = total + r * kPackedPanel + (v + h) * kLanes;
        store(sum, load(sum) + acc[r][h] * load(scales + (v + h) * kLanes));
      }
    }
  }
}

// total[num_rows][kPackedPanel] likewise, by tiles; num_rows at most kRowBlock.
template <int kBits>
void multiply_many(const PackedWeight& w, int64_t panel_idx, const float* x, int64_t x_rows, int num_rows,
                   float* total) {
  alignas(64) float tile[kPackedChunk * kPackedPanel];
  PanelWalk<kBits> panel{w, panel_idx, {}};
  for (int64_t i = 0; i < int64_t{num_rows} * kPackedPanel; ++i) total[i] = 0.0f;
  for (int64_t chunk = 0; chunk < w.num_chunks; ++chunk) {
    panel.step();
    decode_chunk(panel, chunk, tile);
    const float *x_chunk = x + chunk * x_rows * kPackedChunk, *scales = panel.scales();
    for (int row = 0, rows; row < num_rows; row += rows) {
      rows = rows_of_tile(num_rows - row);
      dispatch_checked_int<1, 2, 3, 4, 5, 6>(rows, [&]<int kRows>() {
        multiply_tile<kBits, kRows>(x_chunk + row * kPackedChunk, tile, scales, total + row * kPackedPanel);
      });
    }
  }
}

// ---- Any number --------------------------------------------------------------------------------------------------------

// total[num_rows][kPackedPanel] = the panel times x [chunk][x_rows][kPackedChunk], of which num_rows <= kRowBlock are used.
template <int kBits>
void multiply_rows(const PackedWeight& w, int64_t panel_idx, const float* x, int64_t x_rows, int num_rows,
                   float* total) {
  constexpr int kFewRows = kBits == 8 ? 5 : 4;  // whose sums stay in registers beside what decoding needs
  if (num_rows > kFewRows) return multiply_many<kBits>(w, panel_idx, x, x_rows, num_rows, total);
  dispatch_checked_int<1, 2, 3, 4, 5>(num_rows, [&]<int kRows>() {
    if constexpr (kRows <= kFewRows) multiply_few<kBits, kRows>(w, panel_idx, x, x_rows, total);
  });
}

// f.template operator()<T, kBits>().
template <class F>
void dispatch_packed(DType dtype, int bits, F&& f) {
  dispatch_dtype(dtype, [&]<class T>() {
    dispatch_checked_int<4, 8>(bits, [&]<int kBits>() { f.template operator()<T, kBits>(); });
  });
}

}  // namespace
}  // namespace fmkernels
