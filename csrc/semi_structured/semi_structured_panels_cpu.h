// SPDX-License-Identifier: Apache-2.0
// semi_structured_linear on the CPU for many tokens: a kept weight times a row of tokens.
//
// Operands   x is packed once, transposed, in panels of up to 12 vectors of tokens: [panel][column][token]. A kept
//            weight picks the row of its column, whichever that is, at the price of an address.
// Tile       A row of W x 12 vectors (fewer vectors: two or four rows): the sums stay in registers, and 12 loads and a
//            broadcast feed 12 multiplications, where a dense product has twice as many of those.
// Schedule   64 columns of a panel, 24 KiB, stay in the first-level cache while a block of rows goes over them; the
//            sums of the block wait in the second-level cache. After 256 columns they are added to the total.
//            Narrow panels take 128 or 256 columns a step, and so read W in longer pieces.
// Numerics   float32; the order of semi_structured.h, the same as that of semi_structured_few_cpu.h.
// Cost       tokens * rows * columns flops, half of those of a dense product.
#pragma once

#include <cstring>

#include "../common/dispatch_cpu.h"
#include "../common/integers_cpu.h"
#include "../common/parallel.h"
#include "../common/vec.h"
#include "semi_structured.h"

namespace fmkernels {
namespace {

constexpr int kMaxVectors = 12;
constexpr int64_t kChainBlocks = 4;  // column blocks of a chain of additions
constexpr int64_t kPanelRows = 256;  // of a task
constexpr int64_t kRowsAhead = 12;   // whose values are asked for before they are needed

// Column blocks of a step, whose x [columns][tokens] is at most 24 KiB; a divisor of those of a chain.
constexpr int step_blocks_of(int num_vectors) { return num_vectors > 6 ? 1 : num_vectors > 3 ? 2 : 4; }

// Rows of a tile with so many vectors: enough sums under way to hide the latency of one.
constexpr int tile_rows_of(int num_vectors) {
  return num_vectors > 6 ? 1 : num_vectors > 3 ? 2 : num_vectors > 1 ? 4 : 8;
}

// sums[row][token] = from[row][token] + the products of rows of W with x [columns of a step][tokens], one after
// another. Rows are neighbours in a half of a row tile: their values are value_stride apart, their places are bits of
// words four apart, from `shift` on; those of a column block, of which there may be several, are kTileWords apart.
template <int kVectors, int kRows>
FM_INLINE void multiply_step(const float* values, int64_t value_stride, const uint32_t* words, int shift,
                             const float* x, int num_words, const float* from, float* sums) {
  constexpr int kTokens = kVectors * kLanes, kBlockWords = kColumnBlock / kWordColumns;
  VecF acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) acc[r][v] = load(from + r * kTokens + v * kLanes);
  }
  auto multiply_word = [&](int w) __attribute__((always_inline)) {
    uint32_t bits[kRows];
    for (int r = 0; r < kRows; ++r) bits[r] = words[4 * r + w] >> shift;
    for (int group = 0; group < kWordColumns / 4; ++group) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const float* of_column = x + (bits[r] >> 2 * i & 3u) * kTokens;
          const VecF weight = broadcast(values[r * value_stride + i]);
#pragma GCC unroll 12
          for (int v = 0; v < kVectors; ++v) acc[r][v] += weight * load(of_column + v * kLanes);
        }
        bits[r] >>= 4;
      }
      x += 4 * kTokens;
      values += 2;
    }
  };
  if constexpr (step_blocks_of(kVectors) == 1) {
    for (int w = 0; w < num_words; ++w) multiply_word(w);
  } else {
    for (; num_words > 0; num_words -= kBlockWords, words += kTileWords) {
      for (int w = 0; w < min(num_words, kBlockWords); ++w) multiply_word(w);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store(sums + r * kTokens + v * kLanes, acc[r][v]);
  }
}

// A step from column block `block` on, of num_rows rows of W from `first_row` on, whole row tiles: times x, into sums
// [row][token].
template <class T, int kVectors>
__attribute__((noinline)) void multiply_rows(const SemiStructuredLinearParams& p, int64_t first_row, int64_t num_rows,
                                             int64_t block, const float* x, bool is_first, float* sums) {
  static constexpr float kZeros[kMaxVectors * kLanes] = {};
  constexpr int kRows = tile_rows_of(kVectors), kTokens = kVectors * kLanes;
  constexpr int kStepColumns = step_blocks_of(kVectors) * kColumnBlock;
  static_assert(kRows * kVectors <= kMaxVectors && 8 % kRows == 0, "zeros for all, and one half of a row tile");
  const int64_t column = block * kColumnBlock, stride = p.columns / 2;
  const int num_words = static_cast<int>(min(kStepColumns, p.columns - column) / kWordColumns);
  const int num_values = num_words * kWordColumns / 2;
  const T* values = static_cast<const T*>(p.values) + first_row * stride + column / 2;
  const uint32_t* words = p.metadata + (first_row / kRowTile * p.num_column_blocks() + block) * kTileWords;
  for (int64_t tile = 0; tile < num_rows; tile += kRowTile, words += p.num_column_blocks() * kTileWords) {
    for (int r = 0; r < kRowTile; r += kRows, values += kRows * stride, sums += kRows * kTokens) {
      const float* of_rows;
      int64_t of_rows_stride;
      float converted[kRows][kStepColumns / 2];
      if constexpr (sizeof(T) == 4) {
        of_rows = values;
        of_rows_stride = stride;
      } else {
        for (int i = 0; i < kRows; ++i) {
          for (int k = 0; k < num_values; k += kLanes) store(converted[i] + k, load(values + i * stride + k));
        }
        of_rows = converted[0];
        of_rows_stride = kStepColumns / 2;
      }
      for (int i = 0; i < kRows; ++i) {
        const T* ahead = values + (kRowsAhead + i) * stride;
        for (int k = 0; k < kStepColumns / 2; k += 64 / sizeof(T)) __builtin_prefetch(ahead + k);
      }
      multiply_step<kVectors, kRows>(of_rows, of_rows_stride, words + r % 8 * 4, r < 8 ? 0 : 16, x, num_words,
                                     is_first ? kZeros : sums, sums);
    }
  }
}

// Tokens [first, first + kLanes) of x to out[column][kLanes of num_tokens]; zeros past the last token.
template <class T>
void pack_tokens(const SemiStructuredLinearParams& p, int64_t first, int64_t num_tokens, float* out) {
  const T* x = static_cast<const T*>(p.x) + first * p.x_stride;
  const int count = static_cast<int>(min(kLanes, p.tokens - first));
  for (int64_t column = 0; column < p.columns; column += kLanes) {
    VecF rows[kLanes] = {};
    for (int i = 0; i < count; ++i) rows[i] = load(x + i * p.x_stride + column);
    transpose_to(rows, out + column * num_tokens, num_tokens);
  }
}

// y[token][row] = sums[row][token] + bias[row], for 8 rows, or 4.
template <class T>
FM_INLINE void store_transposed(const SemiStructuredLinearParams& p, const float* sums, int64_t sum_stride, int64_t row,
                                int64_t token) {
  VecF rows[kLanes], columns[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = load(sums + i * sum_stride);
  transpose_to(rows, reinterpret_cast<float*>(columns), kLanes);
  const VecF bias = p.bias == nullptr ? VecF{} : load(p.bias + row);
  const int count = static_cast<int>(min(kLanes, p.tokens - token));
  T* y = static_cast<T*>(p.y) + token * p.rows + row;
  for (int i = 0; i < count; ++i) store(y + i * p.rows, p.bias == nullptr ? columns[i] : columns[i] + bias);
}

template <class T>
void multiply_panels(const SemiStructuredLinearParams& p) {
  const int64_t num_vectors = ceil_div(p.tokens, kLanes), num_panels = ceil_div(num_vectors, kMaxVectors);
  const int64_t column_blocks = p.num_column_blocks();
  const int workers = workers_for(p.tokens * p.rows * p.columns);
  int64_t task_rows = kPanelRows;
  if (workers > 1) {
    task_rows = max(kRowTile, min(kPanelRows, round_up(ceil_div(p.rows * num_panels, 4 * workers), kRowTile)));
  }
  const int64_t row_parts = ceil_div(p.rows, task_rows);
  const int64_t packed_floats = num_vectors * kLanes * p.columns, sum_floats = task_rows * kMaxVectors * kLanes;
  const int64_t worker_bytes = 2 * Arena::array_bytes<float>(sum_floats);
  prefer_huge_pages(p.y, p.tokens * p.rows * static_cast<int64_t>(sizeof(T)));
  const Workspace workspace(Arena::array_bytes<float>(packed_floats) + workers * worker_bytes);
  Arena arena(workspace.data());
  float* packed = arena.take<float>(packed_floats);
  char* scratch = arena.take<char>(workers * worker_bytes);
  auto first_vector = [&](int64_t panel) { return num_vectors * panel / num_panels; };  // panels of nearly one width

  parallel_for(num_vectors, workers, [&](int64_t vector, int) {
    int64_t panel = vector * num_panels / num_vectors;
    while (first_vector(panel) > vector) --panel;
    while (first_vector(panel + 1) <= vector) ++panel;
    const int64_t begin = first_vector(panel), num_tokens = (first_vector(panel + 1) - begin) * kLanes;
    pack_tokens<T>(p, vector * kLanes, num_tokens, packed + (begin * p.columns + vector - begin) * kLanes);
  });
  parallel_for(num_panels * row_parts, workers, [&](int64_t task, int worker) {
    Arena of_worker(scratch + worker * worker_bytes);
    float *chain = of_worker.take<float>(sum_floats), *total = of_worker.take<float>(sum_floats);
    const int64_t panel = task % num_panels, begin = first_vector(panel);
    const int64_t width = first_vector(panel + 1) - begin, num_tokens = width * kLanes;
    const int64_t first_row = task / num_panels * task_rows, num_rows = min(task_rows, p.rows - first_row);
    const float* x = packed + begin * kLanes * p.columns;
    if (column_blocks == 0) memset(total, 0, static_cast<size_t>(num_rows * num_tokens) * sizeof(float));
    const int step_blocks = step_blocks_of(static_cast<int>(width));
    for (int64_t block = 0; block < column_blocks; block += step_blocks) {
      float* sums = block < kChainBlocks ? total : chain;  // the first chain is the total itself
      dispatch_checked_int<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>(static_cast<int>(width), [&]<int kVectors>() {
        multiply_rows<T, kVectors>(p, first_row, num_rows, block, x + block * kColumnBlock * num_tokens,
                                   block % kChainBlocks == 0, sums);
      });
      const int64_t next = block + step_blocks;
      if (block < kChainBlocks || (next % kChainBlocks != 0 && next < column_blocks)) continue;
      for (int64_t i = 0; i < num_rows * num_tokens; i += kLanes) store(total + i, load(total + i) + load(chain + i));
    }
    for (int64_t token = 0; token < num_tokens; token += kLanes) {
      for (int64_t row = 0; row < num_rows; row += kLanes) {
        store_transposed<T>(p, total + row * num_tokens + token, num_tokens, first_row + row, begin * kLanes + token);
      }
    }
  });
}

}  // namespace
}  // namespace fmkernels
