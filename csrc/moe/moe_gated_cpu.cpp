// SPDX-License-Identifier: Apache-2.0
// moe_gated_cpu.cpp: a product by groups of rows over gathered tokens, and the gated unit of its columns; and its gradients.
//
// Work       A task has at most kBlockRows rows of one expert and, where those tasks are few for the workers, a part of the
//            width. Its tokens are packed where the gather finds them. A panel of b has kLanes columns of the gate and the
//            same ones of the other half (or 2 kLanes neighbours where they come in turns), so that a tile holds both.
//            Where b lies by columns, and where uses_dot: the blocks of moe_expert_cpu.h.
// Numerics   The chains of moe_product_cpu.h, or of moe_dot.h. Gate and up are not rounded before the unit.
// Cost       4 * rows * inner * width flops.

#include "moe_expert_cpu.h"
#include "moe_gated.h"

namespace fmkernels {
namespace {

constexpr int64_t kMinPartPanels = 8;

// Null: zeros.
template <class T>
const T* row_of(const MoeGatedMmParams& p, int64_t row) {
  const int64_t token = p.pos_to_token == nullptr ? row : p.pos_to_token[row];
  return token < 0 ? nullptr : static_cast<const T*>(p.a.data) + token * p.a.row_stride;
}

struct GatedScratch {
  float *left, *panel, *sums;

  static int64_t sum_floats(int64_t panels) { return kBlockRows * panels * kPanel; }
  static int64_t bytes(int64_t panels) {
    return Arena::array_bytes<float>(kBlockRows * kLongestSum + kLanes) +
           Arena::array_bytes<float>(kLongestSum * kPanel) + Arena::array_bytes<float>(sum_floats(panels));
  }
  GatedScratch(char* memory, int64_t panels) {
    Arena arena(memory);
    left = arena.take<float>(kBlockRows * kLongestSum + kLanes);
    panel = arena.take<float>(kLongestSum * kPanel);
    sums = arena.take<float>(sum_floats(panels));
  }
};

// Rows [first, last) of a group, panels [panel_begin, panel_end) of its width; the rows of b are contiguous.
template <class T>
void gated_block(const MoeGatedMmParams& p, int64_t group, int64_t first, int64_t last, int64_t panel_begin,
                 int64_t panel_end, const GatedScratch& s) {
  const int64_t num_rows = last - first, inner = p.a.columns, width = p.out.columns;
  const int64_t stride = (panel_end - panel_begin) * kPanel;
  const T* rows[kBlockRows];
  for (int64_t r = 0; r < num_rows; ++r) rows[r] = row_of<T>(p, first + r);
  for (int64_t k = 0; k < inner; k += kLongestSum) {
    const int64_t count = min(kLongestSum, inner - k);
    pack_tiles(rows, num_rows, k, count, s.left);
    const T* b = static_cast<const T*>(p.b.data) + group * p.b.batch_stride + k * p.b.row_stride;
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t column = panel * kLanes, columns = min(kLanes, width - column);
      if (p.is_interleaved) {
        pack_panel(b + 2 * column, p.b.row_stride, 1, count, 2 * columns, s.panel);
      } else {
        for (int half = 0; half < 2; ++half) {
          pack_half(b + half * width + column, p.b.row_stride, 1, count, static_cast<int>(columns),
                    s.panel + half * kLanes);
        }
      }
      multiply_panel(s.left, 0, num_rows, s.panel, count, s.sums + (panel - panel_begin) * kPanel, stride,
                     k == 0 ? Chain::kFirst : Chain::kNext, {}, 0);
    }
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    T* out = static_cast<T*>(p.out.data) + (first + r) * width;
    T* gate_up = p.gate_up == nullptr ? nullptr : static_cast<T*>(p.gate_up) + (first + r) * 2 * width;
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t column = panel * kLanes;
      const int columns = static_cast<int>(min(kLanes, width - column));
      VecPair sums{load(s.sums + r * stride + (panel - panel_begin) * kPanel),
                   load(s.sums + r * stride + (panel - panel_begin) * kPanel + kLanes)};
      if (rows[r] == nullptr || inner == 0) sums = VecPair{};
      if (gate_up != nullptr) {
        if (p.is_interleaved) {
          store_lanes(gate_up + 2 * column, sums.a, static_cast<int>(min(kLanes, 2 * columns)));
          if (2 * columns > kLanes) store_lanes(gate_up + 2 * column + kLanes, sums.b, 2 * columns - kLanes);
        } else {
          store_lanes(gate_up + column, sums.a, columns);
          store_lanes(gate_up + width + column, sums.b, columns);
        }
      }
      if (p.is_interleaved) sums = evens_and_odds(sums);
      store_lanes(out + column, gated_unit(sums.a, sums.b), columns);
    }
  }
}

// Blocks of rows of a group: at most kBlockRows, or those of moe_expert_cpu.h where the columns of b are contiguous.
template <class T>
void gated_mm(const MoeGatedMmParams& p) {
  const int64_t num_rows = p.out.rows, width = p.out.columns, inner = p.a.columns;
  const bool by_columns = (p.b.column_stride != 1 || uses_dot<T>()) && inner > 0;
  T *out = static_cast<T*>(p.out.data), *gate_up = static_cast<T*>(p.gate_up);
  const int64_t end = p.num_groups == 0 ? 0 : p.offsets[p.num_groups - 1];
  const size_t left_over = static_cast<size_t>((num_rows - end) * width) * sizeof(T);
  memset(static_cast<void*>(out + end * width), 0, left_over);
  if (gate_up != nullptr) memset(static_cast<void*>(gate_up + end * 2 * width), 0, 2 * left_over);
  const int workers = workers_for(4 * end * max(1, inner) * width);
  auto rows_of = [&](int64_t group) { return p.offsets[group] - begin_of(p.offsets, group); };
  auto blocks_of = [&](int64_t group) {
    return by_columns ? num_expert_blocks(rows_of(group)) : ceil_div(rows_of(group), kBlockRows);
  };
  int64_t num_blocks = 0;
  for (int64_t g = 0; g < p.num_groups; ++g) num_blocks += blocks_of(g);
  const int64_t panels = ceil_div(width, kLanes);
  const int64_t parts = parts_of(num_blocks, panels / kMinPartPanels, workers);
  const int64_t inner_bytes = Arena::array_bytes<float>(inner_floats<T>(width));
  const int64_t worker_bytes =
      by_columns ? ExpertScratch<T>::bytes(inner, width) + inner_bytes : GatedScratch::bytes(panels);
  const Workspace workspace(workers * worker_bytes);
  parallel_for(num_blocks * parts, workers, [&](int64_t task, int worker) {
    char* memory = workspace.data() + worker * worker_bytes;
    const auto [group, block] = find_block(task / parts, blocks_of);
    const int64_t begin = begin_of(p.offsets, group), part = task % parts;
    if (!by_columns) {
      const int64_t first = begin + block * kBlockRows;
      return gated_block<T>(p, group, first, min(p.offsets[group], first + kBlockRows), panels * part / parts,
                            panels * (part + 1) / parts, GatedScratch(memory, panels));
    }
    const ExpertRows rows = expert_block(rows_of(group), block);
    const T* from[kManyRows];
    for (int64_t r = 0; r < rows.count; ++r) from[r] = row_of<T>(p, begin + rows.first + r);
    Arena arena(memory);
    const ExpertScratch<T> scratch(arena, inner, width);
    float* units = arena.take<float>(0);
    const GateUp<T> product{from,
                            rows.count,
                            width,
                            halves_of<T>(p.b, group, p.is_interleaved),
                            gate_up == nullptr ? nullptr : gate_up + (begin + rows.first) * 2 * width,
                            p.is_interleaved};
    const HalfPart columns(width, part, parts);
    gate_up_block<T>(product, columns, nullptr, scratch, units);
    store_inner(units, rows.count, width, columns, out + (begin + rows.first) * width);
  });
}

// ---- gradients -------------------------------------------------------------------------------------------------------

template <class T>
void gated_row_backward(const MoeGatedBackwardParams& p, int64_t row) {
  const int64_t width = p.width;
  T* grad_gate_up = static_cast<T*>(p.grad_gate_up) + row * 2 * width;
  T* inner = p.inner == nullptr ? nullptr : static_cast<T*>(p.inner) + row * width;
  const int64_t token = p.pos_to_token == nullptr ? 0 : p.pos_to_token[row];
  int64_t slot = 0;
  bool is_there = token >= 0;
  if (is_there && p.weights != nullptr) {
    int64_t k = 0;
    while (k < p.num_topk && p.token_topk_to_pos[token * p.num_topk + k] != row) ++k;
    is_there = k < p.num_topk;
    slot = token * p.num_topk + k;
  }
  if (!is_there) {
    memset(static_cast<void*>(grad_gate_up), 0, static_cast<size_t>(2 * width) * sizeof(T));
    if (inner != nullptr) memset(static_cast<void*>(inner), 0, static_cast<size_t>(width) * sizeof(T));
    return;
  }
  const float weight = p.weights == nullptr ? 1.0f : p.weights[token * p.weights_stride + slot - token * p.num_topk];
  const T* grad = static_cast<const T*>(p.grad_inner) + row * p.grad_stride;
  const T* gate_up = static_cast<const T*>(p.gate_up) + row * 2 * width;
  VecF dots[4] = {};  // short chains of additions: less rounding than one long one
  for (int64_t c = 0; c < width; c += kLanes) {
    const int count = static_cast<int>(min(kLanes, width - c));
    const VecF d = load_lanes(grad + c, count);
    VecPair gu;
    if (p.is_interleaved) {
      gu = evens_and_odds({load_lanes(gate_up + 2 * c, static_cast<int>(min(kLanes, 2 * count))),
                           2 * count > kLanes ? load_lanes(gate_up + 2 * c + kLanes, 2 * count - kLanes) : VecF{}});
    } else {
      gu = {load_lanes(gate_up + c, count), load_lanes(gate_up + width + c, count)};
    }
    const Sigmoid s = sigmoid(gu.a);
    const VecF active = gu.a * s.value, unit = active * gu.b, dw = d * weight;
    VecPair result{dw * gu.b * (s.value * (1.0f + gu.a * s.rest)), dw * active};
    if (inner != nullptr) store_lanes(inner + c, unit * weight, count);
    dots[c / kLanes % 4] += d * unit;
    if (p.is_interleaved) {
      result = interleaved(result);
      store_lanes(grad_gate_up + 2 * c, result.a, static_cast<int>(min(kLanes, 2 * count)));
      if (2 * count > kLanes) store_lanes(grad_gate_up + 2 * c + kLanes, result.b, 2 * count - kLanes);
    } else {
      store_lanes(grad_gate_up + c, result.a, count);
      store_lanes(grad_gate_up + width + c, result.b, count);
    }
  }
  if (p.grad_weights != nullptr) p.grad_weights[slot] = horizontal_sum((dots[0] + dots[1]) + (dots[2] + dots[3]));
}

}  // namespace

template <>
void run_moe_gated_mm<kIsa>(const MoeGatedMmParams& p) {
  dispatch_dtype(p.dtype, [&]<class T>() { gated_mm<T>(p); });
}

template <>
void run_moe_gated_backward<kIsa>(const MoeGatedBackwardParams& p) {
  constexpr int64_t kTaskRows = 16;
  dispatch_dtype(p.dtype, [&]<class T>() {
    parallel_for(ceil_div(p.num_rows, kTaskRows), workers_for(p.num_rows * p.width * 24), [&](int64_t task, int) {
      const int64_t end = min(p.num_rows, (task + 1) * kTaskRows);
      for (int64_t row = task * kTaskRows; row < end; ++row) gated_row_backward<T>(p, row);
    });
  });
}

}  // namespace fmkernels
