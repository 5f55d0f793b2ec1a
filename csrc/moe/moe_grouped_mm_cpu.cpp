// SPDX-License-Identifier: Apache-2.0
// moe_grouped_mm_cpu.cpp: products by groups of rows, one product of moe_product_cpu.h a task.
//
// Work       A task has at most kBlockRows rows of the result of one group (mm_inner: columns of a), or where b lies by columns a
//            block of moe_expert_cpu.h, of kManyRows; and, where those tasks are few for the workers, a part of the columns.
//            Groups without rows make no task in mm, and zeros in mm_inner. bfloat16 takes the kernels for AVX-512 where they run.
// Cost       2 * rows * inner * columns flops. With few rows a group bound by reading b, each of its lines once.

#include "moe_expert_cpu.h"
#include "moe_grouped.h"
#include "moe_pairs.h"

namespace fmkernels {
namespace {

constexpr int64_t kMinPartColumns = 128;

// The columns of a part: whole panels but for the last one.
struct Columns {
  int64_t first, count;
  Columns(int64_t columns, int64_t part, int64_t parts) {
    const int64_t panels = ceil_div(columns, kPanel);
    first = panels * part / parts * kPanel;
    count = min(columns, panels * (part + 1) / parts * kPanel) - first;
  }
};

// b by rows.
template <class T>
void grouped_mm_by_rows(const MoeGroupedMmParams& p, int workers) {
  const int64_t columns = p.out.columns, inner = p.a.columns;
  auto blocks_of = [&](int64_t group) { return ceil_div(p.offsets[group] - begin_of(p.offsets, group), kBlockRows); };
  int64_t num_blocks = 0;
  for (int64_t g = 0; g < p.num_groups; ++g) num_blocks += blocks_of(g);
  const int64_t parts = parts_of(num_blocks, columns / kMinPartColumns, workers);
  const int64_t worker_bytes = Scratch::bytes(inner, columns);
  const Workspace workspace(workers * worker_bytes);
  parallel_for(num_blocks * parts, workers, [&](int64_t task, int worker) {
    const Scratch scratch(workspace.data() + worker * worker_bytes, inner, columns);
    const auto [group, block] = find_block(task / parts, blocks_of);
    const int64_t begin = begin_of(p.offsets, group), tiles = ceil_div(p.offsets[group] - begin, kTileRows);
    const int64_t num_blocks_of_group = ceil_div(tiles, kBlockRows / kTileRows);  // as even as tiles are
    const int64_t first = begin + tiles * block / num_blocks_of_group * kTileRows;
    const int64_t last = min(p.offsets[group], begin + tiles * (block + 1) / num_blocks_of_group * kTileRows);
    const Columns part(columns, task % parts, parts);
    const T* b = static_cast<const T*>(p.b.data) + group * p.b.batch_stride + part.first;
    const float* bias = p.bias == nullptr ? nullptr : p.bias + group * columns + part.first;
    T* out = static_cast<T*>(p.out.data) + first * columns + part.first;
    multiply<T>({static_cast<const T*>(p.a.data) + first * p.a.row_stride, p.a.row_stride, 1, 0, b, p.b.row_stride, out,
                 columns, bias, last - first, inner, part.count},
                scratch);
  });
}

// b by columns, or where uses_dot: those of its first and of its second half side by side.
template <class T>
void grouped_mm_by_columns(const MoeGroupedMmParams& p, int workers) {
  const int64_t columns = p.out.columns, inner = p.a.columns;
  auto blocks_of = [&](int64_t group) { return num_expert_blocks(p.offsets[group] - begin_of(p.offsets, group)); };
  int64_t num_blocks = 0;
  for (int64_t g = 0; g < p.num_groups; ++g) num_blocks += blocks_of(g);
  const int64_t parts = parts_of(num_blocks, columns / kMinPartColumns, workers);
  const int64_t worker_bytes = ExpertScratch<T>::bytes(inner, ceil_div(columns, 2));
  const Workspace workspace(workers * worker_bytes);
  auto matrix = [&](int64_t group) { return halves_of<T>(p.b, group, false); };
  parallel_for(num_blocks * parts, workers, [&](int64_t task, int worker) {
    Arena arena(workspace.data() + worker * worker_bytes);
    const ExpertScratch<T> scratch(arena, inner, ceil_div(columns, 2));
    const auto [group, block] = find_block(task / parts, blocks_of);
    const int64_t begin = begin_of(p.offsets, group), num_rows = p.offsets[group] - begin;
    const ExpertRows rows = expert_block(num_rows, block);
    const T* from[kManyRows];
    for (int64_t r = 0; r < rows.count; ++r) {
      from[r] = static_cast<const T*>(p.a.data) + (begin + rows.first + r) * p.a.row_stride;
    }
    int64_t after = block + 1 < blocks_of(group) ? group : group + 1;  // whose b is read next
    while (after < p.num_groups && blocks_of(after) == 0) ++after;
    const Halves<T> b = matrix(group), next = matrix(min(after, p.num_groups - 1));
    rows_block<T>(from, rows.count, b, HalfPart(b.count[0], task % parts, parts),
                  parts == 1 && after < p.num_groups ? &next : nullptr, scratch,
                  p.bias == nullptr ? nullptr : p.bias + group * columns,
                  static_cast<T*>(p.out.data) + (begin + rows.first) * columns, columns);
  });
}

template <class T>
void grouped_mm(const MoeGroupedMmParams& p) {
  const int64_t rows = p.out.rows, columns = p.out.columns, inner = p.a.columns;
  const int64_t end = p.num_groups == 0 ? 0 : p.offsets[p.num_groups - 1];
  T* out = static_cast<T*>(p.out.data);
  prefer_huge_pages(out, rows * columns * static_cast<int64_t>(sizeof(T)));
  memset(static_cast<void*>(out + end * columns), 0, static_cast<size_t>((rows - end) * columns) * sizeof(T));
  const int workers = workers_for(2 * end * max(1, inner) * columns);
  const bool by_columns = (p.b.column_stride != 1 || uses_dot<T>()) && inner > 0;
  by_columns ? grouped_mm_by_columns<T>(p, workers) : grouped_mm_by_rows<T>(p, workers);
}

// Where uses_dot: a task has kPairLeft columns of a.
inline void grouped_mm_inner_by_pairs(const MoeGroupedMmInnerParams& p) {
  const int64_t rows = p.a.columns, columns = p.b.columns;
  BFloat16* out = static_cast<BFloat16*>(p.out.data);
  const int workers = workers_for(2 * max(1, p.offsets[p.num_groups - 1]) * rows * columns);
  const int64_t blocks = ceil_div(rows, kPairLeft);
  const int64_t parts = parts_of(p.num_groups * blocks, columns / kMinPartColumns, workers);
  const int64_t left_size = kPairChunk / 2 * kPairLeft, panel_size = kPairChunk / 2 * kPairColumns;
  const int64_t sum_size = kPairLeft * round_up(columns, kPairColumns);
  const int64_t worker_bytes = Arena::array_bytes<uint32_t>(left_size) + Arena::array_bytes<uint32_t>(panel_size) +
                               Arena::array_bytes<float>(sum_size);
  const Workspace workspace(workers * worker_bytes);
  parallel_for(p.num_groups * blocks * parts, workers, [&](int64_t task, int worker) {
    Arena arena(workspace.data() + worker * worker_bytes);
    const int64_t group = task / parts / blocks, first = task / parts % blocks * kPairLeft;
    const Columns part(columns, task % parts, parts);
    const int64_t begin = begin_of(p.offsets, group), count = p.offsets[group] - begin;
    const int64_t num_rows = min(kPairLeft, rows - first);
    BFloat16* to = out + (group * rows + first) * columns + part.first;
    if (count == 0) {
      for (int64_t r = 0; r < num_rows; ++r) memset(to + r * columns, 0, static_cast<size_t>(part.count) * sizeof *to);
      return;
    }
    uint32_t *left = arena.take<uint32_t>(left_size), *panel = arena.take<uint32_t>(panel_size);
    run_moe_pairs<Isa::kAvx512>({static_cast<const BFloat16*>(p.a.data) + begin * p.a.row_stride + first,
                                 static_cast<const BFloat16*>(p.b.data) + begin * p.b.row_stride + part.first,
                                 p.a.row_stride, p.b.row_stride, count, num_rows, part.count, to, columns, left, panel,
                                 arena.take<float>(sum_size)});
  });
}

template <class T>
void grouped_mm_inner(const MoeGroupedMmInnerParams& p) {
  const int64_t rows = p.a.columns, columns = p.b.columns;
  T* out = static_cast<T*>(p.out.data);
  prefer_huge_pages(out, p.num_groups * rows * columns * static_cast<int64_t>(sizeof(T)));
  if constexpr (kMayUseDot<T>) {
    if (uses_dot<T>()) return grouped_mm_inner_by_pairs(p);
  }
  const int64_t end = p.offsets[p.num_groups - 1];
  const int workers = workers_for(2 * max(1, end) * rows * columns);
  const int64_t blocks = ceil_div(rows, kBlockRows);
  const int64_t parts = parts_of(p.num_groups * blocks, columns / kMinPartColumns, workers);
  const int64_t worker_bytes = Scratch::bytes(kLongestSum, columns);
  const Workspace workspace(workers * worker_bytes);
  parallel_for(p.num_groups * blocks * parts, workers, [&](int64_t task, int worker) {
    const Scratch scratch(workspace.data() + worker * worker_bytes, kLongestSum, columns);
    const int64_t group = task / parts / blocks, first = task / parts % blocks * kBlockRows;
    const Columns part(columns, task % parts, parts);
    const int64_t begin = begin_of(p.offsets, group), count = p.offsets[group] - begin;
    const Product<T> product{static_cast<const T*>(p.a.data) + begin * p.a.row_stride + first,
                             1,
                             p.a.row_stride,
                             rows - first,
                             static_cast<const T*>(p.b.data) + begin * p.b.row_stride + part.first,
                             p.b.row_stride,
                             out + (group * rows + first) * columns + part.first,
                             columns,
                             nullptr,
                             min(kBlockRows, rows - first),
                             count,
                             part.count};
    if (count == 0) multiply(product, scratch);
    else multiply_packed(product, scratch);
  });
}

// Rows in four chains of additions by turns, so that rounding grows with a quarter of their number.
template <class T>
void grouped_sum(const MoeGroupedSumParams& p) {
  constexpr int64_t kTaskColumns = 8 * kLanes;
  const int64_t columns = p.x.columns, pieces = ceil_div(columns, kTaskColumns);
  const int workers = workers_for(p.x.rows * columns);
  parallel_for(p.num_groups * pieces, workers, [&](int64_t task, int) {
    const int64_t group = task / pieces, first = task % pieces * kTaskColumns;
    const int64_t begin = begin_of(p.offsets, group), count = min(kTaskColumns, columns - first);
    float sums[4][kTaskColumns] = {};
    for (int64_t row = begin; row < p.offsets[group]; ++row) {
      const T* x = static_cast<const T*>(p.x.data) + row * p.x.row_stride + first;
      float* sum = sums[(row - begin) % 4];
      for (int64_t i = 0; i < count; i += kLanes) {
        store(sum + i, load(sum + i) + load_lanes(x + i, static_cast<int>(min(kLanes, count - i))));
      }
    }
    float* out = p.out + group * columns + first;
    for (int64_t i = 0; i < count; ++i) out[i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
  });
}

}  // namespace

template <>
void run_moe_grouped_mm<kIsa>(const MoeGroupedMmParams& p) {
  dispatch_dtype(p.dtype, [&]<class T>() { grouped_mm<T>(p); });
}

template <>
void run_moe_grouped_mm_inner<kIsa>(const MoeGroupedMmInnerParams& p) {
  dispatch_dtype(p.dtype, [&]<class T>() { grouped_mm_inner<T>(p); });
}

template <>
void run_moe_grouped_sum<kIsa>(const MoeGroupedSumParams& p) {
  dispatch_dtype(p.dtype, [&]<class T>() { grouped_sum<T>(p); });
}

}  // namespace fmkernels
