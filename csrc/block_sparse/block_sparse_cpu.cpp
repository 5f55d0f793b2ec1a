// SPDX-License-Identifier: Apache-2.0
// block_sparse_cpu.cpp: the CPU kernels of both products, over one register tile.
//
// Contract   see block_sparse.h.
// Tile       6 rows x 2 vectors: 12 sums, 2 vectors of the right operand, 1 broadcast of the left one. The left operand is
//            read where it lies, by rows or by columns; the right one in panels of kPanel columns.
// dsd        Panels of the dense operand are packed for a group of columns, which stay in the second-level cache while
//            all rows of blocks go over them. Out transposed: the panels are the blocks, packed where they do not lie
//            so already, and a group of columns of the dense operand goes over all of them.
// sdd        b is packed in panels, so much of the inner dimension at a time as the caches hold; a block is a sum over it.
// Numerics   float32 accumulation. A sum runs over its blocks in the order of their list and is cut where kLongestSum
//            columns would be passed: it does not depend on other rows, columns or workers. Deterministic.
// Cost       2 * block_rows * block_columns * columns flops a block; packing reads and writes the dense operand once.

#include "block_sparse.h"

#include <cmath>
#include <cstring>

#include "../common/dispatch_cpu.h"
#include "../common/integers_cpu.h"
#include "../common/parallel.h"
#include "../common/vec.h"

namespace fmkernels {
namespace {

constexpr int kPanel = 2 * kLanes;
constexpr int kTileRows = 6;
constexpr int kLongestSum = 256;                // of the inner dimension in one chain of additions
constexpr int kMaxSegments = kLongestSum / 16;  // blocks of a chain
constexpr int kGroupColumns = 96;               // of dense that are packed together
constexpr int64_t kInnerStep = 512;             // rows of dense that are packed at a time: 192 KiB of a group
constexpr int64_t kSumBytes = 1 << 20;          // of the sums of a group that wait for the next step
constexpr int kGroupRows = 10 * kTileRows;      // columns of dense that go over the blocks together
constexpr int64_t kPackedFloats = 4 << 20;      // of b that sdd packs at a time
constexpr int64_t kRunBlocks = 8;               // blocks of a task of sdd

// ---- the register tile -------------------------------------------------------------------------------------------------

// A stretch of the inner dimension: of the left operand its first row and column, of the right one its first row.
struct Segment {
  const float *a, *b;
  int count;
};

// c[kRows][kPanel] = or, where `adds`, += the sum over all segments of a[r][k] b[k][.]. Rows of a are a_stride apart, or
// its columns where they are contiguous (kByColumns); rows of b are b_stride apart. Offsets are added to every segment.
template <int kRows, bool kByColumns>
__attribute__((noinline)) void multiply_tile(const Segment* segments, int num_segments, int64_t a_offset,
                                             int64_t a_stride, int64_t b_offset, int64_t b_stride, float* c,
                                             int64_t c_stride, bool adds) {
  VecF acc[kRows][2] = {};
  for (int s = 0; s < num_segments; ++s) {
    const float *a = segments[s].a + a_offset, *b = segments[s].b + b_offset;
    const float* const end = b + segments[s].count * b_stride;
    for (; b != end; b += b_stride) {
      const VecF b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const VecF x = broadcast(kByColumns ? a[r] : a[r * a_stride]);
        acc[r][0] += x * b0;
        acc[r][1] += x * b1;
      }
      a += kByColumns ? a_stride : 1;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < 2; ++i) {
      float* sum = c + r * c_stride + i * kLanes;
      store(sum, adds ? load(sum) + acc[r][i] : acc[r][i]);
    }
  }
}

// Rows of the next tile of `left` rows: 6, and such a rest that no tile has less than 4 of many.
constexpr int rows_of_tile(int64_t left) { return left >= 10 || left == 6 ? 6 : left == 9 ? 5 : left > 6 ? 4 : left; }

// The same for any number of rows.
template <bool kByColumns>
void multiply_rows(const Segment* segments, int num_segments, int64_t num_rows, int64_t a_stride, int64_t b_offset,
                   int64_t b_stride, float* c, int64_t c_stride, bool adds) {
  for (int64_t row = 0, count; row < num_rows; row += count) {
    count = rows_of_tile(num_rows - row);
    const int64_t a_offset = kByColumns ? row : row * a_stride;
    auto tile = [&]<int kRows>() {
      multiply_tile<kRows, kByColumns>(segments, num_segments, a_offset, a_stride, b_offset, b_stride,
                                       c + row * c_stride, c_stride, adds);
    };
    dispatch_checked_int<1, 2, 3, 4, 5, 6>(static_cast<int>(count), tile);
  }
}

// ---- operands ----------------------------------------------------------------------------------------------------------

// Rows k of num_columns columns to out[k][kPanel], zeros in the columns past them. Elements of a row, or of a column, are
// contiguous: one of the strides is 1.
template <class T>
void pack_panel(const T* data, int64_t row_stride, int64_t column_stride, int64_t num_rows, int64_t num_columns,
                float* out) {
  for (int half = 0; half < 2; ++half) {
    const int count = static_cast<int>(max(0, min(kLanes, num_columns - half * kLanes)));
    const T* from = data + half * kLanes * column_stride;
    float* to = out + half * kLanes;
    if (column_stride == 1) {
      for (int64_t k = 0; k < num_rows; ++k) store(to + k * kPanel, load_lanes(from + k * row_stride, count));
      continue;
    }
    for (int64_t k = 0; k < num_rows; k += kLanes) {
      const int length = static_cast<int>(min(kLanes, num_rows - k));
      VecF columns[kLanes];
      for (int c = 0; c < kLanes; ++c) {
        columns[c] = c < count ? load_lanes(from + c * column_stride + k, length) : VecF{};
      }
      if (length == kLanes) {
        transpose_to(columns, to + k * kPanel, kPanel);
        continue;
      }
      float square[kLanes * kLanes];
      transpose_to(columns, square, kLanes);
      for (int i = 0; i < length; ++i) store(to + (k + i) * kPanel, load(square + i * kLanes));
    }
  }
}

// The panels of num_columns columns, one after another; line by line, so that a page of memory is looked up once.
template <class T>
void pack_panels(const T* data, int64_t row_stride, int64_t column_stride, int64_t num_rows, int64_t num_columns,
                 float* out) {
  const int64_t num_whole = column_stride == 1 ? num_columns / kPanel * kPanel : 0;
  for (int64_t k = 0; k < num_rows && num_whole > 0; ++k) {
    const T* row = data + k * row_stride;
    float* to = out + k * kPanel;
    for (int64_t column = 0; column < num_whole; column += kPanel, to += num_rows * kPanel) {
      store(to, load(row + column));
      store(to + kLanes, load(row + column + kLanes));
    }
  }
  for (int64_t column = num_whole; column < num_columns; column += kPanel) {
    pack_panel(data + column * column_stride, row_stride, column_stride, num_rows, num_columns - column,
               out + column * num_rows);
  }
}

// `count` elements as floats.
template <class T>
void convert(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

// A left operand as floats: rows [0, num_rows) and columns [0, num_columns) of a view that is contiguous one way or the
// other. Read where it lies if it is float, else converted to `scratch`, which keeps its order.
struct Left {
  const float* data;
  int64_t stride;
  bool by_columns;
};
template <class T>
Left left_operand(const T* data, int64_t row_stride, int64_t column_stride, int64_t num_rows, int64_t num_columns,
                  float* scratch) {
  const bool by_columns = column_stride != 1;
  if constexpr (sizeof(T) == 4) return {data, by_columns ? column_stride : row_stride, by_columns};
  const int64_t num_lines = by_columns ? num_columns : num_rows, length = by_columns ? num_rows : num_columns;
  for (int64_t line = 0; line < num_lines; ++line) {
    convert(data + line * (by_columns ? column_stride : row_stride), length, scratch + line * length);
  }
  return {scratch, length, by_columns};
}

template <class F>
FM_INLINE void dispatch_order(bool by_columns, F&& f) {
  by_columns ? f.template operator()<true>() : f.template operator()<false>();
}

// ---- epilogue ----------------------------------------------------------------------------------------------------------

float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kRelu: return x < 0.0f ? 0.0f : x;  // NaN stays
    case Activation::kGelu: return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
    case Activation::kSilu: return x / (1.0f + std::exp(-x));
    default: return x;
  }
}

bool is_plain(const Epilogue& e) {
  return e.scale == nullptr && e.bias == nullptr && e.activation == Activation::kNone;
}

// to[i] = activation(scale * from[i] + bias), of which scale and bias lie `step` apart (0: all have the same).
template <class T>
void finish(const Epilogue& e, int64_t feature, int step, const float* from, int64_t count, T* to) {
  int64_t i = 0;
  if (is_plain(e)) {
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  }
  for (; i < count; ++i) {
    const int64_t f = feature + i * step;
    const float scaled = e.scale == nullptr ? from[i] : from[i] * e.scale[f];
    to[i] = from_float<T>(activate(e.activation, e.bias == nullptr ? scaled : scaled + e.bias[f]));
  }
}

// ---- dsd ---------------------------------------------------------------------------------------------------------------

// Blocks of op(S) whose inner columns are at most kLongestSum together.
struct Chain {
  int num_segments;
  int64_t position[kMaxSegments], inner[kMaxSegments];
  int count[kMaxSegments];
};

// Calls f(chain) for the blocks of a row of blocks of op(S) that lie in a range of the inner dimension.
template <class F>
void for_chains(const BlockSparseDsdParams& p, int64_t list, int64_t block_row, int64_t begin, int64_t end, F&& f) {
  const int32_t* offsets = p.offsets + list * (p.num_block_rows() + 1) + block_row;
  const int tile_inner = p.tile_inner(), longest = kLongestSum / tile_inner;
  Chain chain;
  chain.num_segments = 0;
  for (int64_t entry = offsets[0]; entry < offsets[1]; ++entry) {
    const int64_t inner = int64_t{p.indices[entry]} * tile_inner;
    if (inner < begin || inner >= end) continue;
    const int s = chain.num_segments++;
    chain.position[s] = p.positions == nullptr ? entry : p.positions[entry];
    chain.inner[s] = inner;
    chain.count[s] = static_cast<int>(min(tile_inner, p.inner - inner));
    if (chain.num_segments < longest) continue;
    f(chain);
    chain.num_segments = 0;
  }
  if (chain.num_segments > 0) f(chain);
}

// Tasks of a product: groups of columns of dense, and parts of the rows of blocks where those are too few for the workers.
struct Tasks {
  int64_t groups, parts;
  Tasks(int64_t num_groups, int64_t batch, int64_t block_rows, int workers)
      : groups(num_groups),
        parts(workers == 1 ? 1 : max(1, min(block_rows, ceil_div(4 * workers, max(1, num_groups * batch))))) {}
};

int workers_of(const BlockSparseDsdParams& p) {
  const int64_t lists = p.num_lists == 1 ? p.batch : 1;
  return workers_for(2 * p.num_entries * lists * p.block_rows * p.block_columns * p.columns);
}

// out[rows of a part][columns of a group], a step of the inner dimension after another, a panel of dense at a time.
template <class T>
void dsd_by_rows(const BlockSparseDsdParams& p) {
  const int workers = workers_of(p), tile_rows = p.tile_rows(), block_elements = p.block_rows * p.block_columns;
  const int64_t num_block_rows = p.num_block_rows(), affordable = kSumBytes / 4 / kGroupColumns / tile_rows;
  Tasks tasks(ceil_div(p.columns, kGroupColumns), p.batch, num_block_rows, workers);
  tasks.parts = max(tasks.parts, ceil_div(num_block_rows, affordable));
  const int64_t inner_step = min(p.inner, kInnerStep);  // whole blocks, or all of it
  const int64_t packed_floats = inner_step * kGroupColumns;
  const int64_t sum_floats = ceil_div(num_block_rows, tasks.parts) * tile_rows * kGroupColumns;
  const int64_t block_floats = sizeof(T) == 4 ? 0 : kLongestSum * tile_rows;
  const int64_t worker_bytes = Arena::array_bytes<float>(packed_floats) + Arena::array_bytes<float>(sum_floats) +
                               Arena::array_bytes<float>(block_floats);
  const Workspace workspace(workers * worker_bytes);

  parallel_for(p.batch * tasks.groups * tasks.parts, workers, [&](int64_t task, int worker) {
    Arena arena(workspace.data() + worker * worker_bytes);
    float *packed = arena.take<float>(packed_floats), *sums = arena.take<float>(sum_floats);
    float* blocks = arena.take<float>(block_floats);
    const int64_t part = task % tasks.parts, group = task / tasks.parts % tasks.groups;
    const int64_t batch = task / tasks.parts / tasks.groups, first_column = group * kGroupColumns;
    const int64_t num_columns = min(kGroupColumns, p.columns - first_column);
    const int64_t list = p.num_lists == 1 ? 0 : batch;
    const int64_t begin = num_block_rows * part / tasks.parts, end = num_block_rows * (part + 1) / tasks.parts;
    const T* dense =
        static_cast<const T*>(p.dense.data) + batch * p.dense.batch_stride + first_column * p.dense.column_stride;
    memset(sums, 0, static_cast<size_t>((end - begin) * tile_rows * kGroupColumns) * sizeof(float));

    for (int64_t inner = 0; inner < p.inner; inner += inner_step) {
      const int64_t length = min(inner_step, p.inner - inner);
      pack_panels(dense + inner * p.dense.row_stride, p.dense.row_stride, p.dense.column_stride, length, num_columns,
                  packed);
      for (int64_t block_row = begin; block_row < end; ++block_row) {
        const int64_t num_rows = min(tile_rows, p.rows - block_row * tile_rows);
        float* block_sums = sums + (block_row - begin) * tile_rows * kGroupColumns;
        for_chains(p, list, block_row, inner, inner + length, [&](const Chain& chain) {
          Segment segments[kMaxSegments];
          for (int s = 0; s < chain.num_segments; ++s) {
            const T* block = static_cast<const T*>(p.values) + chain.position[s] * block_elements;
            const float* a;
            if constexpr (sizeof(T) == 4) {
              a = block;
            } else {
              convert(block, block_elements, blocks + s * block_elements);
              a = blocks + s * block_elements;
            }
            segments[s] = {a, packed + (chain.inner[s] - inner) * kPanel, chain.count[s]};
          }
          for (int64_t column = 0; column < num_columns; column += kPanel) {
            dispatch_order(p.transposed, [&]<bool kByColumns>() {
              multiply_rows<kByColumns>(segments, chain.num_segments, num_rows, p.block_columns, column * length,
                                        kPanel, block_sums + column, kGroupColumns, true);
            });
          }
        });
      }
    }
    for (int64_t row = begin * tile_rows; row < min(end * tile_rows, p.rows); ++row) {
      T* out = static_cast<T*>(p.out.data) + batch * p.out.batch_stride + row * p.out.row_stride + first_column;
      finish(p.epilogue, row, 0, sums + (row - begin * tile_rows) * kGroupColumns, num_columns, out);
    }
  });
}

// out transposed, [columns of a group of dense][rows of a block], a panel of a block at a time.
template <class T>
void dsd_by_columns(const BlockSparseDsdParams& p) {
  const int workers = workers_of(p), tile_rows = p.tile_rows(), tile_inner = p.tile_inner();
  const int block_elements = p.block_rows * p.block_columns;
  const int64_t num_block_rows = p.num_block_rows();
  const Tasks tasks(ceil_div(p.columns, kGroupRows), p.batch, num_block_rows, workers);
  const bool packs = sizeof(T) != 4 || !p.transposed;  // else a block lies as [inner][rows]
  const int64_t packed_floats = packs ? p.num_blocks * block_elements : 0, c_floats = kGroupRows * tile_rows;
  const int64_t left_floats = sizeof(T) == 4 ? 0 : kGroupRows * p.inner;
  const int64_t worker_bytes = Arena::array_bytes<float>(c_floats) + Arena::array_bytes<float>(left_floats);
  const Workspace workspace(Arena::array_bytes<float>(packed_floats) + workers * worker_bytes);
  Arena arena(workspace.data());
  float* packed = arena.take<float>(packed_floats);
  char* scratch = arena.take<char>(workers * worker_bytes);
  parallel_for(packs ? p.num_blocks : 0, workers, [&](int64_t position, int) {
    const T* block = static_cast<const T*>(p.values) + position * block_elements;
    const int64_t inner_stride = p.transposed ? tile_rows : 1, row_stride = p.transposed ? 1 : tile_inner;
    for (int row = 0; row < tile_rows; row += kPanel) {
      pack_panel(block + row * row_stride, inner_stride, row_stride, tile_inner, kPanel,
                 packed + position * block_elements + row * tile_inner);
    }
  });
  const float* panels = packs ? packed : static_cast<const float*>(p.values);
  const int64_t b_stride = packs ? kPanel : tile_rows, panel_stride = packs ? kPanel * tile_inner : kPanel;

  parallel_for(p.batch * tasks.groups * tasks.parts, workers, [&](int64_t task, int worker) {
    Arena of_worker(scratch + worker * worker_bytes);
    float *c = of_worker.take<float>(c_floats), *left_scratch = of_worker.take<float>(left_floats);
    const int64_t part = task % tasks.parts, group = task / tasks.parts % tasks.groups;
    const int64_t batch = task / tasks.parts / tasks.groups, first_column = group * kGroupRows;
    const int64_t num_columns = min(kGroupRows, p.columns - first_column);
    const T* dense =
        static_cast<const T*>(p.dense.data) + batch * p.dense.batch_stride + first_column * p.dense.column_stride;
    const Left left =
        left_operand(dense, p.dense.column_stride, p.dense.row_stride, num_columns, p.inner, left_scratch);
    const int64_t list = p.num_lists == 1 ? 0 : batch;
    const int64_t end = num_block_rows * (part + 1) / tasks.parts;
    for (int64_t block_row = num_block_rows * part / tasks.parts; block_row < end; ++block_row) {
      const int64_t first_row = block_row * tile_rows, num_rows = min(tile_rows, p.rows - first_row);
      bool adds = false;
      for_chains(p, list, block_row, 0, p.inner, [&](const Chain& chain) {
        Segment segments[kMaxSegments];
        for (int s = 0; s < chain.num_segments; ++s) {
          segments[s] = {left.data + chain.inner[s] * (left.by_columns ? left.stride : 1),
                         panels + chain.position[s] * block_elements, chain.count[s]};
        }
        for (int64_t panel = 0; panel * kPanel < num_rows; ++panel) {
          dispatch_order(left.by_columns, [&]<bool kByColumns>() {
            multiply_rows<kByColumns>(segments, chain.num_segments, num_columns, left.stride, panel * panel_stride,
                                      b_stride, c + panel * kPanel, tile_rows, adds);
          });
        }
        adds = true;
      });
      if (!adds) memset(c, 0, static_cast<size_t>(c_floats) * sizeof(float));
      for (int64_t column = 0; column < num_columns; ++column) {
        T* out =
            static_cast<T*>(p.out.data) + batch * p.out.batch_stride + (first_column + column) * p.out.column_stride;
        finish(p.epilogue, first_row, 1, c + column * tile_rows, num_rows, out + first_row);
      }
    }
  });
}

// ---- sdd ---------------------------------------------------------------------------------------------------------------

// One block, as it is or, where T is not float, as floats beside it.
template <class T>
void finish_block(const BlockSparseSddParams& p, int64_t index, const float* sums, T* block) {
  const int64_t row = p.row_indices[index];
  const int64_t num_block_rows = p.num_block_rows();
  const int64_t num_rows = row < 0 ? 0 : min(p.block_rows, p.rows - row % num_block_rows * p.block_rows);
  const int64_t first_column = int64_t{p.column_indices[index]} * p.block_columns;
  const int64_t num_columns = num_rows == 0 ? 0 : min(p.block_columns, p.columns - first_column);
  for (int64_t r = 0; r < p.block_rows; ++r) {
    T* out = block + r * p.block_columns;
    const int64_t count = r < num_rows ? num_columns : 0;
    finish(p.epilogue, first_column, 1, sums + r * p.block_columns, count, out);
    for (int64_t c = count; c < p.block_columns; ++c) out[c] = from_float<T>(0.0f);
  }
}

template <class T>
void sdd(const BlockSparseSddParams& p) {
  const int64_t num_block_rows = p.num_block_rows(), num_panels = ceil_div(p.columns, kPanel);
  const int block_elements = p.block_rows * p.block_columns;
  const int workers = workers_for(2 * p.num_blocks * block_elements * p.inner);
  const int64_t affordable = kPackedFloats / max(1, p.batch * num_panels * kPanel) / kLongestSum * kLongestSum;
  const int64_t inner_step = min(p.inner, max(kLongestSum, affordable));
  const int64_t packed_floats = p.batch * num_panels * kPanel * inner_step;
  const int64_t sum_floats = sizeof(T) == 4 ? 0 : p.num_blocks * block_elements;
  const int64_t left_bytes = Arena::array_bytes<float>(sizeof(T) == 4 ? 0 : p.block_rows * inner_step);
  const Workspace workspace(Arena::array_bytes<float>(packed_floats) + Arena::array_bytes<float>(sum_floats) +
                            workers * left_bytes);
  Arena arena(workspace.data());
  float *packed = arena.take<float>(packed_floats), *sums = arena.take<float>(sum_floats);
  char* scratch = arena.take<char>(workers * left_bytes);
  if constexpr (sizeof(T) == 4) sums = static_cast<float*>(p.values);

  for (int64_t inner = 0; inner < p.inner; inner += inner_step) {
    const int64_t length = min(inner_step, p.inner - inner);
    parallel_for(p.batch * num_panels, workers, [&](int64_t task, int) {
      const int64_t batch = task / num_panels, column = task % num_panels * kPanel;
      const T* b = static_cast<const T*>(p.b.data) + batch * p.b.batch_stride + inner * p.b.row_stride +
                   column * p.b.column_stride;
      pack_panel(b, p.b.row_stride, p.b.column_stride, length, p.columns - column, packed + task * kPanel * inner_step);
    });
    parallel_for(ceil_div(p.num_blocks, kRunBlocks), workers, [&](int64_t run, int worker) {
      Left left{};
      int64_t row_of_left = -1;
      for (int64_t i = run * kRunBlocks; i < min((run + 1) * kRunBlocks, p.num_blocks); ++i) {
        const int64_t row = p.row_indices[i];
        if (row < 0) continue;
        const int64_t batch = row / num_block_rows, first_row = row % num_block_rows * p.block_rows;
        const int64_t num_rows = min(p.block_rows, p.rows - first_row);
        if (row != row_of_left) {
          const T* a = static_cast<const T*>(p.a.data) + batch * p.a.batch_stride + first_row * p.a.row_stride +
                       inner * p.a.column_stride;
          left = left_operand(a, p.a.row_stride, p.a.column_stride, num_rows, length,
                              reinterpret_cast<float*>(scratch + worker * left_bytes));
          row_of_left = row;
        }
        const int64_t first_panel = batch * num_panels + int64_t{p.column_indices[i]} * p.block_columns / kPanel;
        const int64_t panels = min(p.block_columns / kPanel, (batch + 1) * num_panels - first_panel);
        for (int64_t k = 0; k < length; k += kLongestSum) {
          for (int64_t panel = 0; panel < panels; ++panel) {
            const Segment segment{left.data + k * (left.by_columns ? left.stride : 1),
                                  packed + ((first_panel + panel) * inner_step + k) * kPanel,
                                  static_cast<int>(min(kLongestSum, length - k))};
            dispatch_order(left.by_columns, [&]<bool kByColumns>() {
              multiply_rows<kByColumns>(&segment, 1, num_rows, left.stride, 0, kPanel,
                                        sums + i * block_elements + panel * kPanel, p.block_columns, inner + k > 0);
            });
          }
        }
      }
    });
  }
  if (p.inner == 0) memset(sums, 0, static_cast<size_t>(p.num_blocks * block_elements) * sizeof(float));
  parallel_for(p.num_blocks, workers, [&](int64_t i, int) {
    finish_block(p, i, sums + i * block_elements, static_cast<T*>(p.values) + i * block_elements);
  });
}

}  // namespace

template <>
void run_block_sparse_dsd<kIsa>(const BlockSparseDsdParams& p) {
  dispatch_dtype(p.dtype, [&]<class T>() { p.out.is_row_major() ? dsd_by_rows<T>(p) : dsd_by_columns<T>(p); });
}

template <>
void run_block_sparse_sdd<kIsa>(const BlockSparseSddParams& p) {
  dispatch_dtype(p.dtype, [&]<class T>() { sdd<T>(p); });
}

}  // namespace fmkernels
