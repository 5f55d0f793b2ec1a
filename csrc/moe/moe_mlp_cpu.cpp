// SPDX-License-Identifier: Apache-2.0
// moe_mlp_cpu.cpp: the layer, expert by expert: what is between the two products of a block of rows stays in the cache.
//
// Work       A task is a block of rows of an expert, moe_expert_cpu.h. Where those are few for the workers, both products are
//            cut by columns, and all tasks of the first one come before those of the second one.
// Memory     The rows of the second product, until the tokens are summed; nothing else grows with the number of tokens.
// Cost       6 * rows * hidden * width flops. With few rows an expert bound by reading its weights, once.

#include "moe_expert_cpu.h"
#include "moe_mlp.h"

namespace fmkernels {
namespace {

constexpr int64_t kMinUnits = 2;  // of columns in a part

struct Block {
  int64_t expert, first, count;  // rows
};

template <class T>
void mlp(const MoeMlpParams& p) {
  run_moe_mapping<kIsa>(p.mapping);
  const MoeGatedMmParams& g = p.gated;
  const int64_t hidden = g.a.columns, width = g.out.columns, num_experts = g.num_groups;
  const int64_t num_rows = num_experts == 0 ? 0 : g.offsets[num_experts - 1], half_hidden = ceil_div(hidden, 2);
  if (g.gate_up != nullptr) {
    T* rest = static_cast<T*>(g.gate_up) + num_rows * 2 * width;
    memset(static_cast<void*>(rest), 0, static_cast<size_t>((g.out.rows - num_rows) * 2 * width) * sizeof(T));
  }
  const int workers = workers_for(6 * num_rows * hidden * max(1, width));
  int64_t num_blocks = 0;
  for (int64_t e = 0; e < num_experts; ++e) num_blocks += num_expert_blocks(g.offsets[e] - begin_of(g.offsets, e));
  const int64_t parts = parts_of(num_blocks, HalfPart::units(max(half_hidden, width)) / kMinUnits, workers);
  const bool is_cut = parts > 1;

  const int64_t scratch_bytes = ExpertScratch<T>::bytes(max(hidden, width), max(half_hidden, width));
  const int64_t inner_size = inner_floats<T>(width);
  const int64_t num_inner = is_cut ? num_blocks : workers;
  const Workspace workspace(workers * scratch_bytes + num_inner * Arena::array_bytes<float>(inner_size) +
                            Arena::array_bytes<Block>(num_blocks) + Arena::array_bytes<T>(num_rows * hidden));
  Arena arena(workspace.data());
  Block* blocks = arena.take<Block>(num_blocks);
  char* scratches = arena.take<char>(workers * scratch_bytes);
  char* inners = arena.take<char>(num_inner * Arena::array_bytes<float>(inner_size));
  T* y = arena.take<T>(num_rows * hidden);
  prefer_huge_pages(y, num_rows * hidden * static_cast<int64_t>(sizeof(T)));
  for (int64_t e = 0, i = 0; e < num_experts; ++e) {
    const int64_t begin = begin_of(g.offsets, e), count = g.offsets[e] - begin;
    for (int64_t block = 0; block < num_expert_blocks(count); ++block) {
      const ExpertRows rows = expert_block(count, block);
      blocks[i++] = {e, begin + rows.first, rows.count};
    }
  }

  auto inner_at = [&](int64_t i) {
    return reinterpret_cast<float*>(inners + i * Arena::array_bytes<float>(inner_size));
  };
  auto scratch_of = [&](int worker) {
    Arena memory(scratches + worker * scratch_bytes);
    return ExpertScratch<T>(memory, max(hidden, width), max(half_hidden, width));
  };
  auto gate_up_of = [&](int64_t expert) { return halves_of<T>(g.b, expert, false); };
  auto down_of = [&](int64_t expert) { return halves_of<T>(p.down.b, expert, false); };
  auto run_gate_up = [&](int64_t i, int64_t part, int worker, float* inner) {
    const Block& block = blocks[i];
    const T* rows[kManyRows];
    for (int64_t r = 0; r < block.count; ++r) {
      rows[r] = static_cast<const T*>(g.a.data) + g.pos_to_token[block.first + r] * g.a.row_stride;
    }
    T* kept = g.gate_up == nullptr ? nullptr : static_cast<T*>(g.gate_up) + block.first * 2 * width;
    const GateUp<T> product{rows, block.count, width, gate_up_of(block.expert), kept, false};
    const Halves<T> next = down_of(block.expert);
    gate_up_block<T>(product, HalfPart(width, part, parts), is_cut ? nullptr : &next, scratch_of(worker), inner);
  };
  auto run_down = [&](int64_t i, int64_t part, int worker, const float* inner) {
    const Block& block = blocks[i];
    const bool has_next = !is_cut && i + 1 < num_blocks;
    const Halves<T> next = gate_up_of(blocks[has_next ? i + 1 : i].expert);
    down_block<T>(inner, block.count, down_of(block.expert), HalfPart(half_hidden, part, parts),
                  has_next ? &next : nullptr, scratch_of(worker), y + block.first * hidden, hidden);
  };
  if (is_cut) {
    const int64_t num_tasks = num_blocks * parts;
    parallel_for(num_tasks, workers, [&](int64_t task, int worker) {
      run_gate_up(task / parts, task % parts, worker, inner_at(task / parts));
    });
    parallel_for(num_tasks, workers, [&](int64_t task, int worker) {
      run_down(task / parts, task % parts, worker, inner_at(task / parts));
    });
  } else {
    parallel_for(num_blocks, workers, [&](int64_t block, int worker) {
      run_gate_up(block, 0, worker, inner_at(worker));
      run_down(block, 0, worker, inner_at(worker));
    });
  }
  MoeCombineParams combine = p.combine;
  combine.y = {y, hidden};
  combine.num_rows = num_rows;
  run_moe_combine<kIsa>(combine);
}

// Weights that lie by rows, but for dots: one op after another, of what is between them all rows.
template <class T>
void mlp_by_ops(MoeMlpParams p) {
  run_moe_mapping<kIsa>(p.mapping);
  const int64_t inner_size = p.gated.out.rows * p.gated.out.columns, y_size = p.down.out.rows * p.down.out.columns;
  const Workspace workspace(Arena::array_bytes<T>(inner_size) + Arena::array_bytes<T>(y_size));
  Arena arena(workspace.data());
  p.gated.out.data = p.down.a.data = arena.take<T>(inner_size);
  p.down.out.data = p.combine.y.data = arena.take<T>(y_size);
  run_moe_gated_mm<kIsa>(p.gated);
  run_moe_grouped_mm<kIsa>(p.down);
  run_moe_combine<kIsa>(p.combine);
}

}  // namespace

template <>
void run_moe_mlp<kIsa>(const MoeMlpParams& p) {
  const bool by_columns = p.gated.b.column_stride != 1 && p.down.b.column_stride != 1;
  const bool has_width = p.down.b.rows > 0;
  dispatch_dtype(p.gated.dtype,
                 [&]<class T>() { by_columns || (uses_dot<T>() && has_width) ? mlp<T>(p) : mlp_by_ops<T>(p); });
}

}  // namespace fmkernels
