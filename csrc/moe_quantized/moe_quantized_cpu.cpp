// SPDX-License-Identifier: Apache-2.0
// moe_quantized_cpu.cpp: the rows of an expert times its panels, by common/packed_weight_cpu.h.
//
// Work       A task has rows of one expert, at most kRowBlock and as many as half of the second-level cache holds, and, where
//            those tasks are few for the workers, a part of its panels. Its rows are copied to float32 once, [chunk][row]
//            [kPackedChunk]; then a panel after another takes all of them, so the weight is one stream of memory.
// Cost       2 * rows flops a weight of an expert with rows. Few rows: bound by reading the weights of those experts.

#include "moe_quantized.h"

#include "../common/packed_weight_cpu.h"
#include "../common/parallel.h"

namespace fmkernels {
namespace {

constexpr int64_t kLeastTaskRows = 4 * kTileRows;
constexpr int64_t kTaskFloats = 512 * 1024 / 4;  // of the copied rows, where that is more than kLeastTaskRows
constexpr int64_t kMinPartPanels = 4;

struct Task {
  int32_t group, first_row, count;
};

// The most rows of a task.
int64_t task_rows(int64_t padded_columns) {
  return max(kLeastTaskRows, min(kRowBlock, kTaskFloats / padded_columns)) / kTileRows * kTileRows;
}

int64_t begin_of(const int32_t* offsets, int64_t group) { return group == 0 ? 0 : offsets[group - 1]; }

// Calls f(group, first row, number of rows) for every task; the tasks of a group are as even as tiles of rows are.
template <class F>
void for_each_task(const MoeQuantizedParams& p, int64_t most_rows, F&& f) {
  for (int64_t g = 0; g < p.num_groups; ++g) {
    const int64_t begin = begin_of(p.offsets, g), end = p.offsets[g], tiles = ceil_div(end - begin, kTileRows);
    const int64_t count = ceil_div(end - begin, most_rows);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = begin + tiles * i / count * kTileRows;
      f(g, first, min(end, begin + tiles * (i + 1) / count * kTileRows) - first);
    }
  }
}

// out[row][the panel's features] = total * factor + bias.
template <class T>
void write_row(const float* total, float factor, const float* bias, T* out) {
  for (int i = 0; i < kPackedPanel; i += kLanes) {
    const VecF sum = load(total + i) * factor;
    store(out + i, bias == nullptr ? sum : sum + load(bias + i));
  }
}

template <class T, int kBits>
void grouped_mm(const MoeQuantizedParams& p) {
  const PackedWeight& w = p.weight;
  const int64_t padded = w.num_chunks * kPackedChunk, most_rows = task_rows(padded), panels = p.panels_of_group();
  const int64_t end = p.offsets[p.num_groups - 1];
  T* out = static_cast<T*>(p.out);
  prefer_huge_pages(out, p.num_rows * p.columns * static_cast<int64_t>(sizeof(T)));
  memset(static_cast<void*>(out + end * p.columns), 0, static_cast<size_t>((p.num_rows - end) * p.columns) * sizeof(T));
  int64_t num_tasks = 0, largest = 0;
  for_each_task(p, most_rows, [&](int64_t, int64_t, int64_t count) {
    ++num_tasks;
    largest = max(largest, count);
  });
  if (num_tasks == 0) return;

  const int workers = workers_for(2 * end * w.in_features * p.columns);
  const int64_t parts = parts_of(num_tasks, panels / kMinPartPanels, workers);
  const int64_t x_bytes = Arena::array_bytes<float>(largest * padded);
  const Workspace workspace(Arena::array_bytes<Task>(num_tasks) + workers * x_bytes);
  Arena arena(workspace.data());
  Task *tasks = arena.take<Task>(num_tasks), *next = tasks;
  for_each_task(p, most_rows, [&](int64_t group, int64_t first, int64_t count) {
    *next++ = {static_cast<int32_t>(group), static_cast<int32_t>(first), static_cast<int32_t>(count)};
  });
  char* copies = arena.take<char>(workers * x_bytes);

  parallel_for(num_tasks * parts, workers, [&](int64_t item, int worker) {
    const Task& task = tasks[item / parts];
    const int64_t part = item % parts, group = task.group;
    float *x = reinterpret_cast<float*>(copies + worker * x_bytes), factors[kRowBlock];
    for (int64_t row = 0; row < task.count; ++row) {
      const T* a = static_cast<const T*>(p.a) + (task.first_row + row) * p.a_stride;
      factors[row] = copy_row<T, kBits>(a, w.in_features, w.num_chunks, x + row * kPackedChunk,
                                        int64_t{task.count} * kPackedChunk);
    }
    alignas(64) float total[kRowBlock * kPackedPanel];
    for (int64_t panel = panels * part / parts; panel < panels * (part + 1) / parts; ++panel) {
      const float* bias = p.bias == nullptr ? nullptr : p.bias + group * p.columns + panel * kPackedPanel;
      multiply_rows<kBits>(w, group * panels + panel, x, task.count, task.count, total);
      for (int64_t row = 0; row < task.count; ++row) {
        T* to = out + (task.first_row + row) * p.columns + panel * kPackedPanel;
        write_row(total + row * kPackedPanel, factors[row], bias, to);
      }
    }
  });
}

}  // namespace

template <>
void run_moe_quantized_mm<kIsa>(const MoeQuantizedParams& p) {
  dispatch_packed(p.dtype, p.weight.bits, [&]<class T, int kBits>() { grouped_mm<T, kBits>(p); });
}

}  // namespace fmkernels
