// SPDX-License-Identifier: Apache-2.0
// semi_structured_cpu.cpp: mask and pack on the CPU, and the choice between the two products of semi_structured_linear.
//
// Contract   see semi_structured.h.
// mask       kLanes groups of four, or tiles of 4 x 4, at a time, one a lane. Of a tile, sums of the pairs of each row
//            and of those of two rows are shared by the 90 ways, each of which is one addition and one comparison.
// pack       One row tile after another, one word of metadata (two rows of 16 columns) at a time.
// linear     Few tokens: semi_structured_few_cpu.h, else semi_structured_panels_cpu.h. Both add in the same order.
// Numerics   Magnitudes in float32, an eighth of them, so that their sum is finite. Deterministic.

#include "semi_structured.h"

#include "../common/dispatch_cpu.h"
#include "../common/integers_cpu.h"
#include "../common/parallel.h"
#include "../common/vec.h"
#include "semi_structured_few_cpu.h"
#include "semi_structured_panels_cpu.h"

namespace fmkernels {
namespace {

constexpr int64_t kTaskElements = 1 << 16;

// ---- mask -----------------------------------------------------------------------------------------------------------

// Bits of |x|, which are ordered as its values are; infinity and NaN are the largest finite number.
FM_INLINE uint32_t magnitude_bits(float x) {
  const uint32_t bits = float_bits(x) & 0x7fffffffu;
  return bits < kLargestFinite ? bits : kLargestFinite;
}

// Magnitudes of `count` tiles of kRows x 4 from x on, one a lane, by row and column of the tile.
template <class T, int kRows>
void load_tiles(const T* x, int64_t row_stride, int count, VecU (&magnitudes)[kRows][4]) {
  uint32_t bits[kRows][4][kLanes] = {};
  for (int row = 0; row < kRows; ++row) {
    for (int tile = 0; tile < count; ++tile) {
      for (int i = 0; i < 4; ++i) bits[row][i][tile] = magnitude_bits(to_float(x[row * row_stride + tile * 4 + i]));
    }
  }
  memcpy(magnitudes, bits, sizeof bits);
}

// Of each four the two largest, the lower one where they are equal: those that fewer than two others are ahead of.
void mask_groups(const VecU (&magnitudes)[1][4], int count, bool* mask) {
  VecI ahead[4] = {};
  for (int i = 0; i < 4; ++i) {
    for (int k = i + 1; k < 4; ++k) {
      const VecI second = (VecI)magnitudes[0][k] > (VecI)magnitudes[0][i];  // -1 where k is ahead of i
      ahead[i] -= second;
      ahead[k] += 1 + second;
    }
  }
  for (int group = 0; group < count; ++group) {
    for (int i = 0; i < 4; ++i) mask[group * 4 + i] = ahead[i][group] < 2;
  }
}

void mask_tiles(const VecU (&bits)[4][4], int count, bool* mask, int64_t mask_stride) {
  static constexpr TileWays kWays;
  VecF pairs[4][6], two_rows[2][6][6];
  for (int row = 0; row < 4; ++row) {
    VecF eighth[4];
    for (int i = 0; i < 4; ++i) eighth[i] = (VecF)bits[row][i] * 0.125f;
    int pair = 0;
    for (const uint8_t kept : TileWays::kPairs) {
      const int first = kept & 1 ? 0 : kept & 2 ? 1 : 2, second = kept & 8 ? 3 : kept & 4 ? 2 : 1;
      pairs[row][pair++] = eighth[first] + eighth[second];
    }
  }
  for (int half = 0; half < 2; ++half) {
    for (int a = 0; a < 6; ++a) {
      for (int b = 0; b < 6; ++b) two_rows[half][a][b] = pairs[2 * half][a] + pairs[2 * half + 1][b];
    }
  }
  VecF best = broadcast(-1.0f);
  VecI chosen{};
  for (int way = 0; way < TileWays::kCount; ++way) {
    const uint8_t* pair = kWays.pair[way];
    const VecF sum = two_rows[0][pair[0]][pair[1]] + two_rows[1][pair[2]][pair[3]];
    const VecI is_better = sum > best;
    best = is_better ? sum : best;
    chosen = is_better ? VecI{} + way : chosen;
  }
  for (int tile = 0; tile < count; ++tile) {
    for (int row = 0; row < 4; ++row) {
      const int kept = kWays.kept[chosen[tile]] >> 4 * row;
      for (int i = 0; i < 4; ++i) mask[row * mask_stride + tile * 4 + i] = (kept >> i & 1) != 0;
    }
  }
}

template <class T>
void make_mask(const SemiStructuredMaskParams& p) {
  const int64_t tile_rows = p.both_directions ? 4 : 1, bands = p.rows / tile_rows;
  const int64_t task_bands = max(1, kTaskElements / (p.columns * tile_rows));
  parallel_for(ceil_div(bands, task_bands), workers_for(8 * p.rows * p.columns), [&](int64_t task, int) {
    for (int64_t band = task * task_bands; band < min(bands, (task + 1) * task_bands); ++band) {
      const T* x = static_cast<const T*>(p.x) + band * tile_rows * p.row_stride;
      bool* mask = p.mask + band * tile_rows * p.columns;
      for (int64_t column = 0; column < p.columns; column += 4 * kLanes) {
        const int count = static_cast<int>(min(kLanes, (p.columns - column) / 4));
        if (p.both_directions) {
          VecU tiles[4][4];
          load_tiles(x + column, p.row_stride, count, tiles);
          mask_tiles(tiles, count, mask + column, p.columns);
        } else {
          VecU groups[1][4];
          load_tiles(x + column, p.row_stride, count, groups);
          mask_groups(groups, count, mask + column);
        }
      }
    }
  });
}

// ---- pack -----------------------------------------------------------------------------------------------------------

// The kept two of each four of 16 columns of a row to values; the result is their places, four bits a group.
template <class T>
uint32_t pack_groups(const SemiStructuredPackParams& p, int64_t row, int64_t column) {
  const T* x = static_cast<const T*>(p.x) + row * p.row_stride + column * p.column_stride;
  const uint8_t* mask = p.mask + row * p.mask_row_stride + column * p.mask_column_stride;
  T* values = static_cast<T*>(p.values) + (row * p.columns + column) / 2;
  uint32_t all = 0;
  for (int64_t group = 0; group < kWordColumns; group += 4) {
    uint32_t kept = 0;
    for (int64_t i = 0; i < 4; ++i) kept |= (mask[(group + i) * p.mask_column_stride] ? 1u : 0u) << i;
    const uint32_t two = places_of(kept);
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t place = two >> 2 * i & 3;
      values[group / 2 + i] = kept >> place & 1 ? x[(group + place) * p.column_stride] : T{};
    }
    all |= two << group;
  }
  return all;
}

template <class T>
void pack(const SemiStructuredPackParams& p) {
  const int64_t column_blocks = p.num_column_blocks(), task_blocks = 16;
  const int64_t parts = ceil_div(column_blocks, task_blocks);
  parallel_for(p.num_row_tiles() * parts, workers_for(8 * p.rows * p.columns), [&](int64_t task, int) {
    const int64_t tile = task / parts, first_block = task % parts * task_blocks;
    for (int64_t block = first_block; block < min(column_blocks, first_block + task_blocks); ++block) {
      uint32_t* words = p.metadata + (tile * column_blocks + block) * kTileWords;
      for (int64_t g = 0; g < kRowTile / 2; ++g) {
        for (int64_t w = 0; w < kColumnBlock / kWordColumns; ++w) {
          const int64_t column = block * kColumnBlock + w * kWordColumns, row = tile * kRowTile + g;
          uint32_t word = 0x44444444u;
          if (column < p.columns) {
            word = pack_groups<T>(p, row, column) | pack_groups<T>(p, row + 8, column) << 16;
          }
          words[4 * g + w] = word;
        }
      }
    }
  });
}

}  // namespace

template <>
void run_semi_structured_mask<kIsa>(const SemiStructuredMaskParams& p) {
  dispatch_dtype(p.dtype, [&]<class T>() { make_mask<T>(p); });
}

template <>
void run_semi_structured_pack<kIsa>(const SemiStructuredPackParams& p) {
  dispatch_dtype(p.dtype, [&]<class T>() { pack<T>(p); });
}

template <>
void run_semi_structured_linear<kIsa>(const SemiStructuredLinearParams& p) {
  dispatch_dtype(p.dtype, [&]<class T>() {
    if (p.tokens <= kMostFewTokens) multiply_few<T>(p);
    else multiply_panels<T>(p);
  });
}

}  // namespace fmkernels
