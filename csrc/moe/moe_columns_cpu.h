// SPDX-License-Identifier: Apache-2.0
// A product x b on one core for a b whose columns are contiguous, as the weights of torch.nn.Linear lie: it is read where it lies,
// once. Internal linkage, as in vec.h.
//
// Halves    The columns of b are two lists of as many, the second one perhaps shorter by one: gate and up, or the first and the
//           second half of them. A tile has the same columns of both, so that what joins them finds them in registers.
// Few rows  Up to 4 of float32: 16 bytes of each of a vector of columns are transposed in registers and multiplied by every row. Lines
//           are asked for kAheadBytes before. Up to kFewRows of bfloat16 and float16: a panel of a vector of columns of each half and
//           kLongestSum inner indices becomes float32, and tiles of 6 rows go over it, which ask for the lines of the next one.
// Many      The rows are the vectors: x is packed in panels of 16 rows (8 where that is enough), [inner][row], and numbers of 3 + 3
//           columns of b are broadcast, of 16 such tiles before the next panel. Nothing of b is transposed or copied, but for
//           bfloat16 and float16, whose numbers become float32 a block at a time, in the second-level cache.
// Numerics  The chains of moe_product_cpu.h: an element has the same bits here as there.
#pragma once

#include "../common/dense_view.h"
#include "moe_product_cpu.h"

namespace fmkernels {
namespace {

constexpr int kHalfColumns = 3;  // of a half in a tile of many rows
constexpr int kTileColumns = 2 * kHalfColumns;
constexpr int64_t kManyRows = 8 * kPanel;  // that are packed together: their sums and x stay in the second-level cache
constexpr int64_t kBlockTiles = 16;        // of columns that are copied together
constexpr int64_t kSquare = 16;            // inner indices
constexpr int64_t kSkew = 2;               // squares
constexpr int64_t kAheadBytes = 1024;      // of each of 16 columns

template <class T>
constexpr int64_t kFewRows = sizeof(T) == 4 ? 4 : 24;  // at most; more are faster as vectors, which they may not fill

template <class T>
struct Halves {
  const T* base[2];
  int64_t step;              // from a column of a half to the next one
  int64_t count[2];          // count[0] is count[1], or one more
  int64_t inner;             // > 0
  int64_t inner_stride = 1;  // another one, of a b that lies by rows, is for multiply_by_dots alone

  const T* column(int half, int64_t i) const { return base[half] + min(i, count[half] - 1) * step; }
};

// Columns that are a list of gate and up, or of any two halves.
template <class T>
Halves<T> halves_of(const DenseView& b, int64_t group, bool is_interleaved) {
  const T* const base = static_cast<const T*>(b.data) + group * b.batch_stride;
  const int64_t stride = b.column_stride, first = ceil_div(b.columns, 2);
  return {{base, base + (is_interleaved ? 1 : first) * stride},
          is_interleaved ? 2 * stride : stride,
          {first, b.columns - first},
          b.rows,
          stride == 1 ? b.row_stride : 1};
}

// `count` inner indices from `first` on of up to kTileRows rows, null for one of zeros, to out[inner][row] and up to a vector behind.
template <class T>
void pack_gathered(const T* const* from, int rows, int64_t first, int64_t count, float* out) {
  int64_t k = 0;
  if constexpr (kLanes == 8) {
    for (; k + kLanes <= count; k += kLanes) {
      VecF lines[kLanes];
      for (int r = 0; r < kLanes; ++r) lines[r] = r < rows && from[r] != nullptr ? load(from[r] + first + k) : VecF{};
      transpose_to(lines, out + k * rows, rows);  // in this order: what is written behind the rows is overwritten
    }
  }
  for (; k < count; ++k) {
    for (int r = 0; r < rows; ++r) out[k * rows + r] = from[r] == nullptr ? 0.0f : to_float(from[r][first + k]);
  }
}

// The same of any number of rows, [tile][inner][row of the tile], and up to a vector behind.
template <class T>
void pack_tiles(const T* const* rows, int64_t num_rows, int64_t first, int64_t count, float* out) {
  for (int64_t row = 0, tile; row < num_rows; row += tile) {
    tile = rows_of_tile(num_rows - row);
    pack_gathered(rows + row, static_cast<int>(tile), first, count, out + row * count);
  }
}

// ---- few rows ----------------------------------------------------------------------------------------------------------

// Few rows, null for one of zeros, in the order in which they are read: [kLongestSum inner indices][tile][inner][row of the tile], and
// up to a vector behind.
template <class T>
void pack_few(const T* const* rows, int64_t num_rows, int64_t inner, float* left) {
  for (int64_t k = 0; k < inner; k += kLongestSum) {
    pack_tiles(rows, num_rows, k, min(kLongestSum, inner - k), left + k * num_rows);
  }
}

// c[kRows][kPanel]: the products of the rows, left [inner][kRows], with columns [first, first + kLanes) of both halves. The
// columns that are read after these are those of `next` from next_first on; null: none.
template <int kRows>
__attribute__((noinline)) void multiply_few(const Halves<float>& b, int64_t first, const Halves<float>* next,
                                            int64_t next_first, const float* left, float* c) {
  const float* const from[2] = {b.base[0] + first * b.step, b.base[1] + first * b.step};
  const int count[2] = {static_cast<int>(min(kLanes, b.count[0] - first)),
                        static_cast<int>(max(0, min(kLanes, b.count[1] - first)))};
  const int64_t step = b.step, inner = b.inner;
  constexpr int64_t kAhead = kAheadBytes / static_cast<int64_t>(sizeof(float));
  constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(float));
  for (int64_t begin = 0; begin < inner; begin += kLongestSum) {
    VecF acc[2][kRows] = {};
    const int64_t end = min(inner, begin + kLongestSum);
    auto add = [&](int half, const float* a, VecF numbers) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[half][r] += broadcast(a[r]) * numbers;
    };
    auto add_square = [&](int half, int64_t at) __attribute__((always_inline)) {
      for (int64_t i = at; i < at + kSquare; i += 4) {
        VecI words[4];
        transpose_words(from[half] + i, step * static_cast<int64_t>(sizeof(float)), words);
#pragma GCC unroll 4
        for (int w = 0; w < 4; ++w) add(half, left + (i + w) * kRows, (VecF)words[w]);
      }
    };
    // Of four neighbours each another line: columns that are a power of two apart would be asked of one channel of the memory
    // together.
    auto ask = [&](int64_t at) __attribute__((always_inline)) {
      const int64_t further = at + kAhead;
      auto ask_of = [&](const float* const* base, int64_t column_step, auto&& is_wanted)
                        __attribute__((always_inline)) {
                          for (int half = 0; half < 2; ++half) {
                            for (int i = 0; i < kLanes; ++i) {
                              if (is_wanted(i % 4 * kLine))
                                __builtin_prefetch(base[half] + i * column_step + i % 4 * kLine, 0, 2);
                            }
                          }
                        };
      const float* here[2] = {from[0] + further, from[1] + further};
      if (further + 3 * kLine < inner) return ask_of(here, step, [](int64_t) { return true; });
      if (further < inner) ask_of(here, step, [&](int64_t skew) { return further + skew < inner; });
      if (next == nullptr) return;
      const int64_t begin_of_next = next_first * next->step + further - inner;
      const float* there[2] = {next->base[0] + begin_of_next, next->base[1] + begin_of_next};
      if (further >= inner) return ask_of(there, next->step, [](int64_t) { return true; });
      ask_of(there, next->step, [&](int64_t skew) { return further + skew >= inner; });
    };
    int64_t k = begin;
    if (count[0] == kLanes && count[1] == kLanes) {
      // The second half follows kSkew squares behind: columns that are a power of two apart share their sets of the cache.
      const int64_t num_squares = (end - begin) / kSquare;
      for (int64_t i = 0; i < num_squares + kSkew; ++i) {
        if (i < num_squares) {
          const int64_t at = begin + i * kSquare;
          if (at % kLine == 0) ask(at);
          add_square(0, at);
        }
        if (i >= kSkew) add_square(1, begin + (i - kSkew) * kSquare);
      }
      k += num_squares * kSquare;
    }
    for (; k < end; k += kSquare) {
      float square[kSquare * kPanel];
      const int64_t indices = min(kSquare, end - k);
      for (int half = 0; half < 2; ++half) {
        pack_half(from[half] + k, 1, step, indices, count[half], square + half * kLanes);
        for (int64_t i = 0; i < indices; ++i) {
          add(half, left + (k + i) * kRows, load(square + i * kPanel + half * kLanes));
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < 2; ++i) {
        float* sum = c + r * kPanel + i * kLanes;
        store(sum, begin == 0 ? acc[i][r] : load(sum) + acc[i][r]);
      }
    }
  }
}

// The same of any number of rows, packed by pack_few, and of columns [first, last) of both halves, by way of a panel
// [kLongestSum][kPanel]: sums [panel][row][kPanel]. All columns for kLongestSum inner indices before the next ones.
template <class T>
void multiply_by_panels(const Halves<T>& b, int64_t first, int64_t last, const Halves<T>* next, int64_t rows,
                        const float* left, float* panel, float* sums) {
  constexpr int64_t kBytes = sizeof(T);
  const int64_t num_asking = asking_tiles(rows);
  for (int64_t k = 0; k < b.inner; k += kLongestSum) {
    const int64_t count = min(kLongestSum, b.inner - k);
    for (int64_t n = first; n < last; n += kLanes) {
      // Of the columns that are read next the lines of twice as many inner indices, half of which are then near for the next pass.
      const bool is_last = n + kLanes >= last, is_end = is_last && k + count == b.inner;
      const Halves<T>& after = is_end && next != nullptr ? *next : b;
      const int64_t at = is_end ? 0 : is_last ? first * b.step + k + count : (n + kLanes) * b.step + k;
      const Ahead ahead{
          {reinterpret_cast<const char*>(after.base[0] + at), reinterpret_cast<const char*>(after.base[1] + at)},
          after.step * kBytes,
          kLineBytes,
          num_asking};
      for (int half = 0; half < 2; ++half) {
        const int num_columns = static_cast<int>(max(0, min(kLanes, b.count[half] - n)));
        pack_half(b.base[half] + n * b.step + k, 1, b.step, count, num_columns, panel + half * kLanes);
      }
      multiply_panel(left + k * rows, 0, rows, panel, count, sums + (n - first) / kLanes * rows * kPanel, kPanel,
                     k == 0 ? Chain::kFirst : Chain::kNext, ahead, is_end && next == nullptr ? 0 : num_asking);
    }
  }
}

// emit(n, c): the sums c[row][kPanel] of a few rows and columns [n, n + kLanes) of both halves, for all of [first, last).
template <class T, class Emit>
void multiply_few_rows(const Halves<T>& b, int64_t first, int64_t last, const Halves<T>* next, int64_t rows,
                       const float* left, float* panel, float* sums, Emit&& emit) {
  if constexpr (sizeof(T) == 4) {
    for (int64_t n = first; n < last; n += kLanes) {
      const bool is_last = n + kLanes >= last;
      dispatch_checked_int<1, 2, 3, 4>(static_cast<int>(rows), [&]<int kRows>() {
        multiply_few<kRows>(b, n, is_last ? next : &b, is_last ? 0 : n + kLanes, left, sums);
      });
      emit(n, sums);
    }
  } else {
    multiply_by_panels(b, first, last, next, rows, left, panel, sums);
    for (int64_t n = first; n < last; n += kLanes) emit(n, sums + (n - first) / kLanes * rows * kPanel);
  }
}

// ---- many rows ---------------------------------------------------------------------------------------------------------

// Lines that are asked for while a tile is multiplied: of each of its columns those at the same inner indices, so many columns
// further; null: none.
template <class T>
struct ColumnsAhead {
  const T* from[2];
  int64_t step;
};

// c[kTileColumns][kPanel] (+)= the products of the columns, kTileColumns pointers, with the rows x[count][kVectors * kLanes].
template <int kVectors, class T>
__attribute__((noinline)) void multiply_many(const float* const* columns, const float* x, int64_t count, float* c,
                                             bool is_first, const ColumnsAhead<T>& ahead) {
  const float *b0 = columns[0], *b1 = columns[1], *b2 = columns[2], *b3 = columns[3], *b4 = columns[4],
              *b5 = columns[5];
  VecF acc[kTileColumns][kVectors] = {};
  auto add = [&](int j, VecF number, const VecF* rows) __attribute__((always_inline)) {
    for (int v = 0; v < kVectors; ++v) acc[j][v] += number * rows[v];
  };
  auto add_indices = [&](int64_t k, int64_t end) __attribute__((always_inline)) {
    for (; k < end; ++k) {
      VecF rows[kVectors];
      for (int v = 0; v < kVectors; ++v) rows[v] = load(x + (k * kVectors + v) * kLanes);
      add(0, broadcast(b0[k]), rows);
      add(1, broadcast(b1[k]), rows);
      add(2, broadcast(b2[k]), rows);
      add(3, broadcast(b3[k]), rows);
      add(4, broadcast(b4[k]), rows);
      add(5, broadcast(b5[k]), rows);
    }
  };
  if (ahead.from[0] == nullptr) {
    add_indices(0, count);
  } else {
    constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(T));
    for (int64_t k = 0; k < count; k += kLine) {
      for (int j = 0; j < kTileColumns; ++j) {  // of each column another line, as above; within the same indices
        int64_t line = k + j * kLine;
        if (line >= count) line -= count;
        __builtin_prefetch(ahead.from[j / kHalfColumns] + j % kHalfColumns * ahead.step + line, 0, 2);
      }
      add_indices(k, min(count, k + kLine));
    }
  }
#pragma GCC unroll 6
  for (int j = 0; j < kTileColumns; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* sum = c + j * kPanel + v * kLanes;
      if (!is_first) acc[j][v] += load(sum);
      store(sum, acc[j][v]);
    }
  }
}

// Rows in panels: whole ones of kPanel, and a last one of kLanes where that is enough.
struct RowPanels {
  int64_t num_rows, count;

  explicit RowPanels(int64_t rows) : num_rows(rows), count(ceil_div(rows, kPanel)) {}
  int64_t rows(int64_t panel) const { return min(kPanel, num_rows - panel * kPanel); }
  int64_t lanes(int64_t panel) const { return rows(panel) <= kLanes ? kLanes : kPanel; }
};

// The first `count` inner indices of each row of a panel, `from` null for one of zeros, to x[inner][lanes], zeros in the rows past them.
template <class T>
void pack_rows(const T* const* from, int64_t rows, int64_t lanes, int64_t count, float* x) {
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
      VecF lines[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        const bool is_there = lane + r < rows && from[lane + r] != nullptr;
        lines[r] = is_there ? load(from[lane + r] + k) : VecF{};
      }
      transpose_to(lines, x + k * lanes + lane, lanes);
    }
    for (; k < count; ++k) {
      for (int r = 0; r < kLanes; ++r) {
        const bool is_there = lane + r < rows && from[lane + r] != nullptr;
        x[k * lanes + lane + r] = is_there ? to_float(from[lane + r][k]) : 0.0f;
      }
    }
  }
}

// What many rows need beside their operands: the sums of a block of tiles, [panel][tile][kTileColumns][kPanel], and the block as
// float32 where the numbers in it cannot be broadcast.
struct ManyScratch {
  float *sums, *copy;

  static constexpr int64_t kSumFloats = kManyRows / kPanel * kBlockTiles * kTileColumns * kPanel;
  static constexpr int64_t kCopyFloats = kBlockTiles * kTileColumns * kLongestSum;
  static constexpr int64_t kBytes = Arena::array_bytes<float>(kSumFloats) + Arena::array_bytes<float>(kCopyFloats);
  explicit ManyScratch(Arena& arena) : sums(arena.take<float>(kSumFloats)), copy(arena.take<float>(kCopyFloats)) {}
};

// The sums of a panel and a block of tiles.
struct BlockSums {
  const float* sums;
  int64_t first, count;  // columns of a half

  // Those of a column of the block and all rows.
  const float* at(int half, int64_t i) const {
    return sums + (i / kHalfColumns * kTileColumns + half * kHalfColumns + i % kHalfColumns) * kPanel;
  }
};

// x_at(panel, k) are the rows of a panel from inner index k on; emit(panel, BlockSums) takes what is complete. Of the columns of a
// half those of [first_tile, last_tile) are done. next: the matrix that is read after this one, or null.
template <class T, class XAt, class Emit>
void multiply_many_rows(const Halves<T>& b, const Halves<T>* next, const RowPanels& panels, int64_t first_tile,
                        int64_t last_tile, const ManyScratch& s, XAt&& x_at, Emit&& emit) {
  constexpr bool kIsCopied = sizeof(T) == 2;
  for (int64_t block = first_tile; block < last_tile; block += kBlockTiles) {
    const int64_t num_tiles = min(last_tile - block, kBlockTiles);
    const int64_t first = block * kHalfColumns, num_columns = min(num_tiles * kHalfColumns, b.count[0] - first);
    for (int64_t k = 0; k < b.inner; k += kLongestSum) {
      const int64_t count = min(kLongestSum, b.inner - k);
      const bool is_last = k + count == b.inner;
      auto column = [&](int64_t tile, int j) {
        return b.column(j / kHalfColumns, (block + tile) * kHalfColumns + j % kHalfColumns) + k;
      };
      if constexpr (kIsCopied) {
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
          for (int j = 0; j < kTileColumns; ++j) {
            const T* from = column(tile, j);
            float* to = s.copy + (tile * kTileColumns + j) * count;
            int64_t i = 0;
            for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
            for (; i < count; ++i) to[i] = to_float(from[i]);
          }
        }
      }
      // The first panel asks for what is read next: the same columns at the next inner indices, or the next columns.
      const Halves<T>* ahead_of = !is_last || block + kBlockTiles < last_tile ? &b : next;
      const int64_t ahead_first = !is_last                          ? first
                                  : block + kBlockTiles < last_tile ? first + kBlockTiles * kHalfColumns
                                                                    : 0;
      const int64_t ahead_k = is_last ? 0 : k + count;
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        const float* x = x_at(panel, k);
        const bool is_whole = panels.lanes(panel) == kPanel;
        float* sums = s.sums + panel * kBlockTiles * kTileColumns * kPanel;
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
          float* c = sums + tile * kTileColumns * kPanel;
          ColumnsAhead<T> ahead{{nullptr, nullptr}, b.step};
          if (panel == 0 && ahead_of != nullptr) {
            ahead.step = ahead_of->step;
            for (int half = 0; half < 2; ++half) {
              ahead.from[half] = ahead_of->column(half, ahead_first + tile * kHalfColumns) + ahead_k;
            }
          }
          const float* columns[kTileColumns];
          for (int j = 0; j < kTileColumns; ++j) {
            if constexpr (kIsCopied) columns[j] = s.copy + (tile * kTileColumns + j) * count;
            else columns[j] = column(tile, j);
          }
          if (is_whole) multiply_many<2>(columns, x, count, c, k == 0, ahead);
          else multiply_many<1>(columns, x, count, c, k == 0, ahead);
        }
        if (is_last) emit(panel, BlockSums{sums, first, num_columns});
      }
    }
  }
}

}  // namespace
}  // namespace fmkernels
