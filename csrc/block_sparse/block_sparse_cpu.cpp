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

#include <cstring>
#include <type_traits>

#include "../common/dispatch_cpu.h"
#include "../common/integers_cpu.h"
#include "../common/parallel.h"
#include "block_sparse_stored_cpu.h"
#include "block_sparse_tile_cpu.h"

namespace fmkernels {
namespace {

constexpr int kLongestSum = 256;                // of the inner dimension in one chain of additions
constexpr int kMaxSegments = kLongestSum / 16;  // blocks of a chain
constexpr int kDirectColumns = 8;               // of dense that go over the values without a panel of them: from rows
constexpr int kDirectColumnsAcross = 16;        // that lie along the inner dimension, or across it
constexpr int kDirectGroup = 4;                 // of them at a time
constexpr int64_t kBytesAhead = 16 << 10;       // of values, between what is read and what is asked for
constexpr int kFewColumns = 48;                 // of dense for which no block is packed ahead
constexpr int kFewColumnsByRows = 16;           // the same where out is row-major
constexpr int kGroupColumns = 96;               // of dense that are packed together
constexpr int64_t kInnerStep = 512;             // rows of dense that are packed at a time: 192 KiB of a group
constexpr int64_t kSumBytes = 1 << 20;          // of the sums of a group that wait for the next step
constexpr int kGroupRows = 10 * kTileRows;      // columns of dense that go over the blocks together
constexpr int64_t kPackedFloats = 4 << 20;      // of b that sdd packs at a time
constexpr int64_t kRunBlocks = 8;               // blocks of a task of sdd

// ---- dsd ---------------------------------------------------------------------------------------------------------------

// Blocks of op(S) whose inner columns are at most kLongestSum together.
struct Chain {
  int num_segments;
  int64_t position[kMaxSegments], inner[kMaxSegments];
  int count[kMaxSegments];
  float scale[kMaxSegments];
  int64_t next_entry;  // of the list
};

int64_t position_of(const BlockSparseDsdParams& p, int64_t entry) {
  return p.positions == nullptr ? entry : p.positions[entry];
}
float scale_of(const BlockSparseDsdParams& p, int64_t position) {
  return p.block_scales == nullptr ? 1.0f : p.block_scales[position];
}

// Calls f(chain) for the blocks of a row of blocks of op(S) that lie in [begin, end) of the inner dimension. A chain ends
// where a multiple of `step` is passed.
template <class F>
void for_chains(const BlockSparseDsdParams& p, int64_t list, int64_t block_row, int64_t begin, int64_t end,
                int64_t step, F&& f) {
  const int32_t* offsets = p.offsets + list * (p.num_block_rows() + 1) + block_row;
  const int tile_inner = p.tile_inner(), longest = kLongestSum / tile_inner;
  int64_t entry = offsets[0];
  while (entry < offsets[1]) {
    Chain chain = {};
    int64_t end_of_step = end;
    for (; entry < offsets[1] && chain.num_segments < longest; ++entry) {
      const int64_t inner = int64_t{p.indices[entry]} * tile_inner;
      if (inner < begin || inner >= end) continue;
      if (inner >= end_of_step) break;
      end_of_step = inner / step * step + step;
      const int s = chain.num_segments++;
      chain.position[s] = position_of(p, entry);
      chain.inner[s] = inner;
      chain.count[s] = static_cast<int>(min(tile_inner, p.inner - inner));
      chain.scale[s] = scale_of(p, chain.position[s]);
    }
    chain.next_entry = entry;
    if (chain.num_segments > 0) f(chain);
  }
}

// Tasks of a product: groups of columns of dense, and parts of the rows of blocks where those are too few for the workers.
struct Tasks {
  int64_t groups, parts;
  Tasks(int64_t num_groups, int64_t batch, int64_t block_rows, int workers)
      : groups(num_groups),
        parts(workers == 1 ? 1 : max(1, min(block_rows, ceil_div(4 * workers, max(1, num_groups * batch))))) {}
};

template <class V>
constexpr bool kIsFloat = std::is_same_v<V, float>;

// How the values of a block lie.
Lying lying_of(const BlockSparseDsdParams& p) {
  return p.transposed ? Lying{1, p.tile_rows()} : Lying{p.tile_inner(), 1};
}

int workers_of(const BlockSparseDsdParams& p) {
  const int64_t lists = p.num_lists == 1 ? p.batch : 1;
  return workers_for(2 * p.num_entries * lists * p.block_rows * p.block_columns * p.columns);
}

// out[rows of a part][columns of a group], a step of the inner dimension after another, a panel of dense at a time.
template <class T, class V>
void dsd_by_rows(const BlockSparseDsdParams& p) {
  const int workers = workers_of(p), tile_rows = p.tile_rows(), block_elements = p.block_rows * p.block_columns;
  const int64_t num_block_rows = p.num_block_rows(), affordable = kSumBytes / 4 / kGroupColumns / tile_rows;
  Tasks tasks(ceil_div(p.columns, kGroupColumns), p.batch, num_block_rows, workers);
  tasks.parts = max(tasks.parts, ceil_div(num_block_rows, affordable));
  const int64_t inner_step = min(p.inner, kInnerStep);  // whole blocks, or all of it
  const int64_t packed_floats = inner_step * kGroupColumns;
  const int64_t sum_floats = ceil_div(num_block_rows, tasks.parts) * tile_rows * kGroupColumns;
  const int64_t block_floats = kIsFloat<V> ? 0 : kLongestSum * tile_rows;
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
        for_chains(p, list, block_row, inner, inner + length, inner_step, [&](const Chain& chain) {
          Segment segments[kMaxSegments];
          for (int s = 0; s < chain.num_segments; ++s) {
            const V* block = static_cast<const V*>(p.values) + chain.position[s] * block_elements;
            float* converted = blocks + s * block_elements;
            segments[s] = {nullptr, packed + (chain.inner[s] - inner) * kPanel, chain.count[s]};
            if constexpr (kIsFloat<V>) {
              segments[s].a = block;
            } else {
              convert_stored(block, block_elements, chain.scale[s], converted);
              segments[s].a = converted;
            }
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
template <class T, class V>
void dsd_by_columns(const BlockSparseDsdParams& p) {
  const int workers = workers_of(p), tile_rows = p.tile_rows(), tile_inner = p.tile_inner();
  const int block_elements = p.block_rows * p.block_columns;
  const int64_t num_block_rows = p.num_block_rows();
  const Tasks tasks(ceil_div(p.columns, kGroupRows), p.batch, num_block_rows, workers);
  const bool packs = !kIsFloat<V> || !p.transposed;  // else a block lies as [inner][rows]
  const int64_t packed_floats = packs ? p.num_blocks * block_elements : 0, c_floats = kGroupRows * tile_rows;
  const int64_t left_floats = sizeof(T) == 4 ? 0 : kGroupRows * p.inner;
  const int64_t worker_bytes = Arena::array_bytes<float>(c_floats) + Arena::array_bytes<float>(left_floats);
  const Workspace workspace(Arena::array_bytes<float>(packed_floats) + workers * worker_bytes);
  Arena arena(workspace.data());
  float* packed = arena.take<float>(packed_floats);
  char* scratch = arena.take<char>(workers * worker_bytes);
  parallel_for(packs ? p.num_blocks : 0, workers, [&](int64_t position, int) {
    const V* block = static_cast<const V*>(p.values) + position * block_elements;
    const Lying lying = lying_of(p);
    for (int row = 0; row < tile_rows; row += kPanel) {
      pack_stored(block + row * lying.row_stride, lying, tile_inner, scale_of(p, position),
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
      for_chains(p, list, block_row, 0, p.inner, p.inner, [&](const Chain& chain) {
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

// ---- dsd, few columns ----------------------------------------------------------------------------------------------------

// Columns of dense as lines along the inner dimension.
template <class T>
void lines_of(const T* dense, int64_t column_stride, int64_t row_stride, int64_t num_columns, int64_t inner,
              float* out) {
  for (int64_t column = 0; column < num_columns; ++column, dense += column_stride, out += inner) {
    if (row_stride == 1) convert(dense, inner, out);
    else {
      for (int64_t k = 0; k < inner; ++k) out[k] = to_float(dense[k * row_stride]);
    }
  }
}

// sums[column][row of a row of blocks] += or = of a chain, where dense has few columns, which lie as lines.
// A stretch of num_stored rows of a block is read after another; what is kBytesAhead further on its way comes meanwhile.
template <class V>
void add_direct(const BlockSparseDsdParams& p, const Chain& chain, int64_t end_of_list, const Left& left,
                int64_t num_rows, float* sums, bool adds) {
  const Lying lying = lying_of(p);
  const int tile_rows = p.tile_rows(), num_segments = chain.num_segments;
  auto block_at = [&](int64_t position) {
    return static_cast<const V*>(p.values) + position * p.block_rows * p.block_columns;
  };
  StoredSegment<V> segments[kMaxSegments];
  for (int s = 0; s < num_segments; ++s) {
    segments[s] = {block_at(chain.position[s]), left.data + chain.inner[s], chain.count[s], chain.scale[s], nullptr};
  }
  const int64_t num_groups = ceil_div(p.columns, kDirectGroup), most_columns = ceil_div(p.columns, num_groups);
  dispatch_checked_int<1, 2, 3, 4>(static_cast<int>(most_columns), [&]<int kColumns>() {
    auto run = [&]<int kVectors>() {
      constexpr int kRows = kVectors * kLanes;
      const int64_t stretches = ceil_div(num_rows, kRows);
      const int64_t further = max(1, kBytesAhead / (kRows * p.tile_inner() * static_cast<int64_t>(sizeof(V))));
      for (int64_t i = 0; i < stretches; ++i) {
        const int64_t first = i * kRows * lying.row_stride;
        for (int s = 0; s < num_segments; ++s) {
          const int64_t place = i * num_segments + s + further, beyond = place - stretches * num_segments;
          segments[s].ahead =
              beyond < 0 ? segments[place % num_segments].values + place / num_segments * kRows * lying.row_stride
                         : block_at(position_of(p, min(chain.next_entry + beyond, end_of_list - 1)));
        }
        for (int64_t group = 0; group < num_groups; ++group) {  // of kColumns, or of one less
          const int64_t column = p.columns * group / num_groups, next = p.columns * (group + 1) / num_groups;
          float* c = sums + column * tile_rows + i * kRows;
          const int64_t x_first = column * left.stride;
          auto multiply = [&]<int kCount>() {
            if (lying.inner_stride == 1) {
              multiply_stored<V, true, kCount, kVectors>(segments, num_segments, first, lying.row_stride, x_first,
                                                         left.stride, c, tile_rows, adds);
            } else {
              multiply_stored<V, false, kCount, kVectors>(segments, num_segments, first, lying.inner_stride, x_first,
                                                          left.stride, c, tile_rows, adds);
            }
          };
          if (next - column == kColumns) multiply.template operator()<kColumns>();
          else if constexpr (kColumns > 1) multiply.template operator()<kColumns - 1>();
        }
      }
    };
    constexpr int kMost = kColumns <= 2 ? 4 : 2;  // sums for the latency of an addition, and registers for them
    if (tile_rows >= kMost * kLanes) run.template operator()<kMost>();
    else run.template operator()<2>();
  });
}

// The same for more columns: the values of a panel of rows become floats beside it, all columns go over them.
template <class V>
void add_packed(const BlockSparseDsdParams& p, const Chain& chain, const Left& left, int64_t num_rows, float* packed,
                float* sums, bool adds) {
  const Lying lying = lying_of(p);
  const int block_elements = p.block_rows * p.block_columns, tile_rows = p.tile_rows(), tile_inner = p.tile_inner();
  const bool packs = !kIsFloat<V> || lying.inner_stride == 1;
  for (int row = 0; row < num_rows; row += kPanel) {
    Segment segments[kMaxSegments];
    for (int s = 0; s < chain.num_segments; ++s) {
      const V* block = static_cast<const V*>(p.values) + chain.position[s] * block_elements + row * lying.row_stride;
      const float* panel = packed + s * tile_inner * kPanel;
      if (packs) pack_stored(block, lying, tile_inner, chain.scale[s], packed + s * tile_inner * kPanel);
      else if constexpr (kIsFloat<V>) panel = block;
      segments[s] = {left.data + chain.inner[s] * (left.by_columns ? left.stride : 1), panel, chain.count[s]};
    }
    dispatch_order(left.by_columns, [&]<bool kByColumns>() {
      multiply_rows<kByColumns>(segments, chain.num_segments, p.columns, left.stride, 0,
                                packs ? kPanel : lying.inner_stride, sums + row, tile_rows, adds);
    });
  }
}

// Every value is read once, where it lies. The sums are those of dsd_by_rows or dsd_by_columns, in their order.
template <class T, class V>
void dsd_few(const BlockSparseDsdParams& p) {
  const int workers = workers_of(p), tile_rows = p.tile_rows();
  const int64_t num_block_rows = p.num_block_rows(), num_columns = p.columns;
  const Tasks tasks(1, p.batch, num_block_rows, workers);
  const bool is_direct = num_columns <= (p.transposed ? kDirectColumnsAcross : kDirectColumns);
  const bool copies = !kIsFloat<T> || (is_direct && p.dense.row_stride != 1);
  const int64_t left_floats = copies ? num_columns * p.inner : 0, sum_floats = num_columns * tile_rows;
  const int64_t panel_floats = is_direct ? 0 : kLongestSum * kPanel;
  const int64_t worker_bytes = Arena::array_bytes<float>(sum_floats) + Arena::array_bytes<float>(panel_floats);
  const Workspace workspace(Arena::array_bytes<float>(p.batch * left_floats) + workers * worker_bytes);
  Arena arena(workspace.data());
  float* lefts = arena.take<float>(p.batch * left_floats);
  char* scratch = arena.take<char>(workers * worker_bytes);
  auto dense_of = [&](int64_t batch) { return static_cast<const T*>(p.dense.data) + batch * p.dense.batch_stride; };
  auto convert_left = [&](int64_t batch) -> Left {
    float* to = lefts + batch * left_floats;
    if (!is_direct || !copies) {
      return left_operand(dense_of(batch), p.dense.column_stride, p.dense.row_stride, num_columns, p.inner, to);
    }
    lines_of(dense_of(batch), p.dense.column_stride, p.dense.row_stride, num_columns, p.inner, to);
    return {to, p.inner, false};
  };
  const Left first_left = convert_left(0);
  parallel_for(copies ? p.batch - 1 : 0, workers, [&](int64_t i, int) { convert_left(i + 1); });

  const bool is_row_major = p.out.is_row_major();
  const int64_t step = is_row_major ? kInnerStep : p.inner;
  parallel_for(p.batch * tasks.parts, workers, [&](int64_t task, int worker) {
    Arena of_worker(scratch + worker * worker_bytes);
    float *sums = of_worker.take<float>(sum_floats), *packed = of_worker.take<float>(panel_floats);
    const int64_t part = task % tasks.parts, batch = task / tasks.parts, list = p.num_lists == 1 ? 0 : batch;
    const int64_t end_of_list = p.offsets[list * (num_block_rows + 1) + num_block_rows];
    Left left = first_left;
    left.data = copies ? lefts + batch * left_floats : reinterpret_cast<const float*>(dense_of(batch));
    T* out = static_cast<T*>(p.out.data) + batch * p.out.batch_stride;
    const int64_t end = num_block_rows * (part + 1) / tasks.parts;
    for (int64_t block_row = num_block_rows * part / tasks.parts; block_row < end; ++block_row) {
      const int64_t first_row = block_row * tile_rows, num_rows = min(tile_rows, p.rows - first_row);
      bool adds = is_row_major;
      if (adds) memset(sums, 0, static_cast<size_t>(sum_floats) * sizeof(float));
      for_chains(p, list, block_row, 0, p.inner, step, [&](const Chain& chain) {
        if (is_direct) add_direct<V>(p, chain, end_of_list, left, num_rows, sums, adds);
        else add_packed<V>(p, chain, left, num_rows, packed, sums, adds);
        adds = true;
      });
      if (!adds) memset(sums, 0, static_cast<size_t>(sum_floats) * sizeof(float));
      if (!is_row_major || num_columns == 1) {
        for (int64_t column = 0; column < num_columns; ++column) {
          finish(p.epilogue, first_row, 1, sums + column * tile_rows, num_rows,
                 out + column * p.out.column_stride + first_row);
        }
        continue;
      }
      for (int64_t row = 0; row < num_rows; ++row) {
        float line[kFewColumns];
        for (int64_t column = 0; column < num_columns; ++column) line[column] = sums[column * tile_rows + row];
        finish(p.epilogue, first_row + row, 0, line, num_columns, out + (first_row + row) * p.out.row_stride);
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
  auto run = [&]<class T, class V>() {
    if (p.columns <= (p.out.is_row_major() ? kFewColumnsByRows : kFewColumns)) dsd_few<T, V>(p);
    else if (p.out.is_row_major()) dsd_by_rows<T, V>(p);
    else dsd_by_columns<T, V>(p);
  };
  dispatch_dtype(p.dtype, [&]<class T>() {
    if (p.block_scales == nullptr) run.template operator()<T, T>();
    else run.template operator()<T, int8_t>();
  });
}

template <>
void run_block_sparse_sdd<kIsa>(const BlockSparseSddParams& p) {
  dispatch_dtype(p.dtype, [&]<class T>() { sdd<T>(p); });
}

}  // namespace fmkernels
