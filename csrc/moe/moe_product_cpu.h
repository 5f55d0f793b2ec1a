// SPDX-License-Identifier: Apache-2.0
// A product of two dense matrices on one core, the right one row-major, for as few rows as an expert may have. Internal linkage, as in
// vec.h.
//
// Tile      6 rows x 2 vectors: 12 sums, 2 vectors of the right operand, 1 broadcast of the left one, which is packed in the
//           order in which it is read, [inner][row of the tile].
// Packed    kLongestSum inner indices at a time: a panel of two vectors of columns of b, which takes half of the first-level cache
//           when it is packed, and all rows go over it. The first tile reads b where it lies and packs it meanwhile; it and a few
//           more ask for the lines of the next panel.
// In place  Up to 6 rows: every line of b is read once, where it lies, kStreamRows rows side by side,
//           those a few panels further asked for meanwhile.
// Numerics  Both ways an element is the sum of chains of at most kLongestSum products, each in the order of the inner
//           dimension: its bits do not depend on which way was taken, on its tile, or on the number of rows.
#pragma once

#include "../common/dispatch_cpu.h"
#include "../common/integers_cpu.h"
#include "../common/panel_cpu.h"
#include "../common/parallel.h"
#include "../common/vec.h"

namespace fmkernels {
namespace {

constexpr int64_t kLongestSum = 256;            // products in one chain of additions
constexpr int64_t kBlockRows = 40 * kTileRows;  // of a that are packed together: 240 KiB
constexpr int64_t kStreamRows = 32;             // rows of b that are read side by side where they lie
constexpr int64_t kStreamAhead = 8;             // panels
constexpr int kAheadLines = 16;
constexpr int64_t kLineBytes = 64;

// Memory that is asked for while a tile is multiplied: a line each `every` inner indices, line 16 i + 8 h + k at from[h] + i * step +
// k * stride.
struct Ahead {
  const char* from[2];
  int64_t stride, step, every;

  // Where the next tile goes on, after one with `count` inner indices.
  void advance(int64_t count) {
    const int64_t bytes = count / (every * kAheadLines) * step;
    for (const char*& half : from) half += bytes;
  }
};

// Where the chains of a tile begin, and what becomes of them.
enum class Chain { kFirst, kMore, kNext };  // c = sum; c = c + (the chain goes on); c += sum

// Which lines are asked for: none, one an inner index (`every` is 1, which a tile of few rows has no time to look up), or as `every` says.
enum class Ask { kNone, kAlways, kSpread };

// c[kRows][kPanel] and the sum over `count` inner indices of a[k][row] b[k][.], of which rows of b are b_stride apart. kPacks: what is
// read of b is left in `panel` for the tiles that follow.
template <int kRows, class B, Ask kAsk, bool kPacks = false>
__attribute__((noinline)) void multiply_tile(const float* a, const B* b, int64_t b_stride, int64_t count, float* c,
                                             int64_t c_stride, Chain chain, const Ahead& ahead,
                                             float* panel = nullptr) {
  VecF acc[kRows][2] = {};
  if (chain == Chain::kMore) {
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < 2; ++i) acc[r][i] = load(c + r * c_stride + i * kLanes);
    }
  }
  auto add = [&]() __attribute__((always_inline)) {
    const VecF b0 = load(b), b1 = load(b + kLanes);
    if constexpr (kPacks) {
      store(panel, b0);
      store(panel + kLanes, b1);
      panel += kPanel;
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const VecF x = broadcast(a[r]);
      acc[r][0] += x * b0;
      acc[r][1] += x * b1;
    }
    a += kRows;
    b += b_stride;
  };
  if constexpr (kAsk != Ask::kNone) {
    const int64_t every = kAsk == Ask::kAlways ? 1 : ahead.every;
    for (int64_t left = count, step = 0; left > 0; left -= kAheadLines * every, step += ahead.step) {
      if (left < kAheadLines * every) {
        for (int64_t i = 0; i < left; ++i) add();
        break;
      }
      for (int half = 0; half < 2; ++half) {
        const char* line = ahead.from[half] + step;
        for (int k = 0; k < kAheadLines / 2; ++k, line += ahead.stride) {
          __builtin_prefetch(line, 0, 2);
          for (int64_t i = 0; i < every; ++i) add();
        }
      }
    }
  } else {
    for (int64_t k = 0; k < count; ++k) add();
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < 2; ++i) {
      float* sum = c + r * c_stride + i * kLanes;
      store(sum, chain == Chain::kNext ? load(sum) + acc[r][i] : acc[r][i]);
    }
  }
}

// Tiles of a panel that ask for the lines of the next one, each for a part of them: all at once they wait for each other; one is
// enough where many rows give it time.
inline int64_t asking_tiles(int64_t rows) { return rows <= kTileRows || rows > 96 ? 1 : rows < 4 * kTileRows ? 2 : 4; }

template <class F>
FM_INLINE void dispatch_rows(int64_t rows, F&& f) {
  dispatch_checked_int<1, 2, 3, 4, 5, 6>(static_cast<int>(rows), f);
}

// c[row][.]: rows [row, rows) of `left`, [tile][inner][row of the tile], over a packed panel. The first `asking` tiles ask.
inline void multiply_panel(const float* left, int64_t row, int64_t rows, const float* panel, int64_t count, float* c,
                           int64_t c_stride, Chain chain, Ahead ahead, int64_t asking) {
  for (int64_t tile; row < rows; row += tile, --asking) {
    tile = rows_of_tile(rows - row);
    dispatch_rows(tile, [&]<int kRows>() {
      const float* a = left + row * count;
      float* to = c + row * c_stride;
      if (asking > 0) multiply_tile<kRows, float, Ask::kSpread>(a, panel, kPanel, count, to, c_stride, chain, ahead);
      else multiply_tile<kRows, float, Ask::kNone>(a, panel, kPanel, count, to, c_stride, chain, ahead);
    });
    if (asking > 0) ahead.advance(count);
  }
}

// The first row of a group.
inline int64_t begin_of(const int32_t* offsets, int64_t group) { return group == 0 ? 0 : offsets[group - 1]; }

// A block of rows of a group, by its number among those of all groups, of which each has blocks_of(group).
struct GroupBlock {
  int64_t group, block;
};
template <class BlocksOf>
GroupBlock find_block(int64_t block, BlocksOf&& blocks_of) {
  int64_t group = 0;
  for (int64_t blocks; block >= (blocks = blocks_of(group)); ++group) block -= blocks;
  return {group, block};
}

// ---- operands --------------------------------------------------------------------------------------------------------

// Of a left operand `rows` rows, `count` inner indices of each, to out[inner][row], and up to a vector behind it. Of the
// strides one is 1. has_more: a whole vector can be read at any row, where rows are contiguous.
template <class T>
void pack_left(const T* a, int64_t row_stride, int64_t inner_stride, int rows, int64_t count, bool has_more,
               float* out) {
  int64_t k = 0;
  if (inner_stride == 1 && kLanes == 8) {
    for (; k + kLanes <= count; k += kLanes) {
      VecF lines[kLanes];
      for (int r = 0; r < kLanes; ++r) lines[r] = r < rows ? load(a + r * row_stride + k) : VecF{};
      transpose_to(lines, out + k * rows, rows);  // in this order: what is written behind the rows is overwritten
    }
  } else if (row_stride == 1 && kLanes == 8 && has_more) {
    for (; k < count; ++k) store(out + k * rows, load(a + k * inner_stride));
  }
  for (; k < count; ++k) {
    for (int r = 0; r < rows; ++r) out[k * rows + r] = to_float(a[r * row_stride + k * inner_stride]);
  }
}

// ---- the product -----------------------------------------------------------------------------------------------------

// out [rows, columns] = a [rows, inner] b [inner, columns] + bias, with at most kBlockRows rows.
template <class T>
struct Product {
  const T* a;
  int64_t a_row_stride, a_inner_stride;
  int64_t a_rows;  // where rows are contiguous: that can be read from `a` on
  const T* b;      // rows contiguous
  int64_t b_inner_stride;
  T* out;
  int64_t out_stride;
  const float* bias;  // null: none
  int64_t rows, inner, columns;

  bool is_in_place() const { return rows <= kTileRows; }
};

// What a worker needs beside its operands.
struct Scratch {
  float *left, *panel, *sums, *chains;

  static constexpr int64_t kPanelFloats = kLongestSum * kPanel;
  static int64_t left_floats(int64_t inner) { return max(kBlockRows * kLongestSum, kTileRows * inner) + kLanes; }
  static int64_t sum_floats(int64_t columns) { return kBlockRows * round_up(columns, kPanel); }
  static int64_t chain_floats(int64_t columns) { return kTileRows * round_up(columns, kPanel); }
  static int64_t bytes(int64_t inner, int64_t columns) {
    return Arena::array_bytes<float>(left_floats(inner)) + Arena::array_bytes<float>(kPanelFloats) +
           Arena::array_bytes<float>(sum_floats(columns)) + Arena::array_bytes<float>(chain_floats(columns));
  }
  Scratch(char* memory, int64_t inner, int64_t columns) {
    Arena arena(memory);
    left = arena.take<float>(left_floats(inner));
    panel = arena.take<float>(kPanelFloats);
    sums = arena.take<float>(sum_floats(columns));
    chains = arena.take<float>(chain_floats(columns));
  }
};

// to[i] = from[i] + bias[i], rounded.
template <class T>
void finish_row(const float* from, const float* bias, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = static_cast<int>(min(kLanes, count - i));
    const VecF sum = load(from + i);  // whole panels
    store_lanes(to + i, bias == nullptr ? sum : sum + load_lanes(bias + i, lanes), lanes);
  }
}

// At most 6 rows: b where it lies.
template <class T>
void multiply_in_place(const Product<T>& p, const Scratch& s) {
  const int64_t whole = p.columns / kPanel * kPanel, stride = round_up(p.columns, kPanel);
  pack_left(p.a, p.a_row_stride, p.a_inner_stride, static_cast<int>(p.rows), p.inner, p.a_rows >= kLanes, s.left);
  dispatch_rows(p.rows, [&]<int kRows>() {
    for (int64_t k = 0; k < p.inner; k += kStreamRows) {
      const int64_t count = min(kStreamRows, p.inner - k);
      float* c = k < kLongestSum ? s.sums : s.chains;
      const Chain chain = k % kLongestSum == 0 ? Chain::kFirst : Chain::kMore;
      const float* a = s.left + k * kRows;
      const T* b = p.b + k * p.b_inner_stride;
      const int64_t b_bytes = p.b_inner_stride * static_cast<int64_t>(sizeof(T));
      for (int64_t column = 0; column < whole; column += kPanel) {
        const int64_t further = column + kStreamAhead * kPanel;
        const T* next = further < whole ? b + further : b + kStreamRows * p.b_inner_stride + further - whole;
        const char* from = reinterpret_cast<const char*>(next);
        multiply_tile<kRows, T, Ask::kAlways>(
            a, b + column, p.b_inner_stride, count, c + column, stride, chain,
            {{from, from + kAheadLines / 2 * b_bytes}, b_bytes, kAheadLines * b_bytes, 1});
      }
      if (whole < p.columns) {
        pack_panel(b + whole, p.b_inner_stride, 1, count, p.columns - whole, s.panel);
        multiply_tile<kRows, float, Ask::kNone>(a, s.panel, kPanel, count, c + whole, stride, chain, {});
      }
      if (c == s.chains && (k + count == p.inner || (k + count) % kLongestSum == 0)) {
        for (int64_t i = 0; i < kRows * stride; i += kLanes) store(s.sums + i, load(s.sums + i) + load(s.chains + i));
      }
    }
  });
  for (int64_t r = 0; r < p.rows; ++r) {
    finish_row(s.sums + r * stride, p.bias, p.columns, p.out + r * p.out_stride);
  }
}

// Any number of rows: b in panels.
template <class T>
void multiply_packed(const Product<T>& p, const Scratch& s) {
  const int64_t whole = sizeof(T) == 4 && p.bias == nullptr ? p.columns / kPanel * kPanel : 0;  // sums are in out
  const int64_t sum_stride = round_up(p.columns, kPanel) - whole;
  constexpr int64_t kBytes = sizeof(T);
  for (int64_t k = 0; k < p.inner; k += kLongestSum) {
    const int64_t count = min(kLongestSum, p.inner - k);
    const Chain chain = k == 0 ? Chain::kFirst : Chain::kNext;
    for (int64_t row = 0, rows; row < p.rows; row += rows) {
      rows = rows_of_tile(p.rows - row);
      pack_left(p.a + row * p.a_row_stride + k * p.a_inner_stride, p.a_row_stride, p.a_inner_stride,
                static_cast<int>(rows), count, p.a_rows - row >= kLanes, s.left + row * count);
    }
    for (int64_t column = 0; column < p.columns; column += kPanel) {
      const T* b = p.b + k * p.b_inner_stride + column;
      const bool is_whole = p.columns - column >= kPanel, is_last = column + kPanel >= p.columns;
      if (!is_whole) pack_panel(b, p.b_inner_stride, 1, count, p.columns - column, s.panel);
      const char* next = reinterpret_cast<const char*>(is_last ? p.b + (k + count) * p.b_inner_stride : b + kPanel);
      const int64_t line = p.b_inner_stride * kBytes, num_asking = asking_tiles(p.rows);
      Ahead ahead{{next, next + kAheadLines / 2 * line}, line, kAheadLines * line, num_asking};
      float* c = s.sums + column - whole;
      int64_t c_stride = sum_stride, first = 0;
      if constexpr (sizeof(T) == 4) {
        if (column < whole) c = p.out + column, c_stride = p.out_stride;
      }
      if (is_whole) {
        first = rows_of_tile(p.rows);
        dispatch_rows(first, [&]<int kRows>() {
          multiply_tile<kRows, T, Ask::kSpread, true>(s.left, b, p.b_inner_stride, count, c, c_stride, chain, ahead,
                                                      s.panel);
        });
        ahead.advance(count);
      }
      multiply_panel(s.left, first, p.rows, s.panel, count, c, c_stride, chain, ahead, num_asking - (is_whole ? 1 : 0));
    }
  }
  for (int64_t r = 0; r < p.rows && whole < p.columns; ++r) {
    const float* bias = p.bias == nullptr ? nullptr : p.bias + whole;
    finish_row(s.sums + r * sum_stride, bias, p.columns - whole, p.out + r * p.out_stride + whole);
  }
}

template <class T>
void multiply(const Product<T>& p, const Scratch& s) {
  if (p.inner == 0) {
    for (int64_t r = 0; r < p.rows; ++r) {
      T* out = p.out + r * p.out_stride;
      for (int64_t i = 0; i < p.columns; ++i) out[i] = from_float<T>(p.bias == nullptr ? 0.0f : p.bias[i]);
    }
    return;
  }
  p.is_in_place() ? multiply_in_place(p, s) : multiply_packed(p, s);
}

}  // namespace
}  // namespace fmkernels
