// SPDX-License-Identifier: Apache-2.0
// semi_structured_linear on the CPU for a few tokens, where the time is that of reading the weights: half of a dense
// matrix.
//
// Tile       8 rows of W, one a lane, for 4 or 8 tokens; 16 rows for 1 or 2. Values are transposed in registers, 32
//            columns at a time. Of x the four columns of a group stand in both halves of a register, from which a
//            permutation takes the one that each lane's metadata name: a shift of a word makes it.
// Numerics   float32; the order of semi_structured.h: a token has the same bits as among many.
// Cost       columns / 2 elements and columns / 8 bytes of memory a row.
#pragma once

#include "../common/dispatch_cpu.h"
#include "../common/integers_cpu.h"
#include "../common/parallel.h"
#include "../common/vec.h"
#include "semi_structured.h"
#include "semi_structured_panels_cpu.h"

namespace fmkernels {
namespace {

#ifdef __AVX2__

constexpr int64_t kMostFewTokens = 8;
constexpr int64_t kFewRows = 64;  // of a task

// In each lane that of the four columns from x on which the lowest two bits of `place` name.
FM_INLINE VecF pick(__m256 four, VecU place) { return (VecF)_mm256_permutevar_ps(four, (__m256i)place); }

// Tokens [0, kTokens), of which num_tokens exist, times kHalves * 8 rows of W from `row` on; x [token][column].
template <class T, int kTokens, int kHalves>
__attribute__((noinline)) void multiply_few_rows(const SemiStructuredLinearParams& p, int64_t row,
                                                 const float* const* x, int num_tokens) {
  const int64_t column_blocks = p.num_column_blocks(), value_stride = p.columns / 2;
  const uint32_t* tile = p.metadata + row / kRowTile * column_blocks * kTileWords;
  const int first_half = static_cast<int>(row % kRowTile / 8);
  const T* values = static_cast<const T*>(p.values) + row * value_stride;
  constexpr int64_t kAhead = 1024 / sizeof(T);  // elements that are asked for before they are needed
  VecF total[kHalves][kTokens] = {};
  for (int64_t first_block = 0; first_block < column_blocks; first_block += kChainBlocks) {
    VecF acc[kHalves][kTokens] = {};
    for (int64_t block = first_block; block < min(column_blocks, first_block + kChainBlocks); ++block) {
      VecI words[4];  // lane g of words[w] is word 4 g + w of the tile
      transpose_words(tile + block * kTileWords, 16, words);
      const int64_t block_column = block * kColumnBlock;
      const int num_words = static_cast<int>(min(kColumnBlock, p.columns - block_column) / kWordColumns);
      for (int pair = 0; pair < num_words; pair += 2) {
        const int64_t first_column = block_column + pair * kWordColumns;
        const int count = static_cast<int>(min(2, num_words - pair));
        VecF columns[kHalves][2][kLanes];  // [half of the tile, word, kept value of a row], a row a lane
        for (int h = 0; h < kHalves; ++h) {
          VecF rows[2][kLanes];
          for (int i = 0; i < kLanes; ++i) {
            const T* from = values + (h * 8 + i) * value_stride + first_column / 2;
            __builtin_prefetch(from + kAhead, 0, 2);  // to the second level: rows share few sets of the first
            for (int w = 0; w < count; ++w) rows[w][i] = load(from + w * kLanes);
          }
          for (int w = 0; w < count; ++w) transpose_to(rows[w], reinterpret_cast<float*>(columns[h][w]), kLanes);
        }
        for (int w = 0; w < count; ++w) {
          const int64_t column = first_column + w * kWordColumns;
          VecU places[kHalves];
          for (int h = 0; h < kHalves; ++h) places[h] = (VecU)words[pair + w] >> (16 * (first_half + h));
#pragma GCC unroll 4
          for (int group = 0; group < kWordColumns / 4; ++group) {
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 8
              for (int t = 0; t < kTokens; ++t) {
                const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x[t] + column + 4 * group));
#pragma GCC unroll 2
                for (int h = 0; h < kHalves; ++h) {
                  acc[h][t] += columns[h][w][2 * group + i] * pick(four, places[h] >> (4 * group + 2 * i));
                }
              }
            }
          }
        }
      }
    }
    for (int h = 0; h < kHalves; ++h) {
      for (int t = 0; t < kTokens; ++t) total[h][t] = first_block == 0 ? acc[h][t] : total[h][t] + acc[h][t];
    }
  }
  for (int h = 0; h < kHalves; ++h) {
    const int64_t first_row = row + h * 8;
    for (int t = 0; t < kTokens; ++t) {
      if (t >= num_tokens) continue;
      const VecF sum = p.bias == nullptr ? total[h][t] : total[h][t] + load(p.bias + first_row);
      store(static_cast<T*>(p.y) + t * p.rows + first_row, sum);
    }
  }
}

template <class T>
void multiply_few(const SemiStructuredLinearParams& p) {
  const int workers = workers_for(p.tokens * p.rows * p.columns);
  const Workspace workspace(sizeof(T) == 4 ? 0 : Arena::array_bytes<float>(p.tokens * p.columns));
  const int num_tokens = static_cast<int>(p.tokens);
  const float* x[kMostFewTokens];
  for (int t = 0; t < kMostFewTokens; ++t) {  // past the last one it stands once more
    if (t >= num_tokens) {
      x[t] = x[0];
      continue;
    }
    const T* from = static_cast<const T*>(p.x) + t * p.x_stride;
    if constexpr (sizeof(T) == 4) {
      x[t] = from;
    } else {
      float* to = reinterpret_cast<float*>(workspace.data()) + t * p.columns;
      for (int64_t column = 0; column < p.columns; column += kLanes) store(to + column, load(from + column));
      x[t] = to;
    }
  }
  parallel_for(ceil_div(p.rows, kFewRows), workers, [&](int64_t task, int) {
    const int64_t end = min(p.rows, (task + 1) * kFewRows);
    auto with = [&]<int kTokens>() {
      constexpr int kHalves = kTokens <= 2 ? 2 : 1;
      for (int64_t row = task * kFewRows; row < end; row += kHalves * 8) {
        multiply_few_rows<T, kTokens, kHalves>(p, row, x, num_tokens);
      }
    };
    dispatch_checked_int<1, 2, 4, 8>(num_tokens > 4 ? 8 : num_tokens > 2 ? 4 : num_tokens, with);
  });
}

#else

// Without its permutations there is nothing to gain over the product for many.
constexpr int64_t kMostFewTokens = 0;
template <class T>
void multiply_few(const SemiStructuredLinearParams&) {}

#endif

}  // namespace
}  // namespace fmkernels
