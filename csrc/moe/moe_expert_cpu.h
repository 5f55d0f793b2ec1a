// SPDX-License-Identifier: Apache-2.0
// The two products of an expert for a block of its rows, over the kernels of moe_columns_cpu.h: gate, up and the gated unit of gathered
// tokens; and the product behind it, of what the first one has left in the order in which it is read; and a plain product
// (grouped_mm). Internal linkage, as in vec.h.
#pragma once

#include "moe_dot_cpu.h"

#include "../common/sigmoid_cpu.h"
#include "../common/vec_pair.h"

namespace fmkernels {
namespace {

FM_INLINE VecF gated_unit(VecF g, VecF u) { return silu(g) * u; }

// x as it is after a store in T.
template <class T>
FM_INLINE VecF rounded(VecF x) {
  return rounded_to<T>(VecPair{x, x}).a;
}

// Rows of an expert that are computed together: up to kFewRows, or whole panels and, at the end of the expert, a part of one.
struct ExpertRows {
  int64_t first, count;
};
inline int64_t num_expert_blocks(int64_t num_rows) { return ceil_div(num_rows, kManyRows); }
inline ExpertRows expert_block(int64_t num_rows, int64_t block) {
  const int64_t blocks = num_expert_blocks(num_rows), panels = ceil_div(num_rows, kPanel);
  const int64_t first = panels * block / blocks * kPanel;
  return {first, min(num_rows, panels * (block + 1) / blocks * kPanel) - first};
}

// A part of the columns of each half: [first, last), whole tiles of many rows and vectors of few.
struct HalfPart {
  int64_t first, last;
  static constexpr int64_t kUnit = kHalfColumns * kLanes;
  static int64_t units(int64_t half_columns) { return ceil_div(half_columns, kUnit); }
  HalfPart(int64_t half_columns, int64_t part, int64_t parts) {
    const int64_t all = units(half_columns);
    first = all * part / parts * kUnit;
    last = min(half_columns, all * (part + 1) / parts * kUnit);
  }
  int64_t first_tile() const { return first / kHalfColumns; }
  int64_t last_tile() const { return ceil_div(last, kHalfColumns); }
};

// What a worker needs for blocks of products with up to so many inner indices and columns of a half.
template <class T>
struct ExpertScratch {
  // Few rows: as pack_few has them; many: [panel][inner][lanes]. Where uses_dot, T: columns that are made of b by rows.
  float* x;
  float* few_sums;  // [panel of columns][row][kPanel], of float32 those of one panel; none where uses_dot
  ManyScratch many;

  static int64_t sum_floats(int64_t half_columns) {
    return uses_dot<T>() ? 0 : kFewRows<T> * (sizeof(T) == 4 ? kPanel : 2 * round_up(half_columns, kLanes));
  }
  static int64_t bytes(int64_t inner, int64_t half_columns) {
    return Arena::array_bytes<float>(x_floats(inner)) + Arena::array_bytes<float>(sum_floats(half_columns)) +
           ManyScratch::kBytes;
  }
  static int64_t x_floats(int64_t inner) { return uses_dot<T>() ? dot_packed(inner) / 2 : kManyRows * inner; }
  T* packed() const { return reinterpret_cast<T*>(x); }
  ExpertScratch(Arena& arena, int64_t inner, int64_t half_columns)
      : x(arena.take<float>(x_floats(inner))), few_sums(arena.take<float>(sum_floats(half_columns))), many(arena) {}
};

// The inner rows of a block as floats that T holds, inner_floats: few: [row][inner_row_stride(width)]; many:
// [panel][width][lanes]. Where uses_dot: as T, [row][width].
inline int64_t inner_row_stride(int64_t width) { return round_up(width, kLanes); }
template <class T>
int64_t inner_floats(int64_t width) {
  if (uses_dot<T>()) return kManyRows * ceil_div(width, 2);
  return max(kManyRows * width, kFewRows<T> * inner_row_stride(width));
}

// Of a panel the vectors at(i, lane), i < count, of the rows from `lane` on, to rows of T: to(row) + i * step for the first num_rows.
template <class T, class At, class To>
void store_panel(int64_t num_rows, int64_t count, int64_t step, At&& at, To&& to) {
  for (int64_t lane = 0; lane < num_rows; lane += kLanes) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const int length = static_cast<int>(min(kLanes, count - i));
      VecF lines[kLanes] = {};
      for (int j = 0; j < length; ++j) lines[j] = at(i + j, lane);
      float square[kLanes * kLanes];
      transpose_to(lines, square, kLanes);
      for (int64_t r = 0; r < min(kLanes, num_rows - lane); ++r) {
        T* out = to(lane + r) + i * step;
        if (step == 1) {
          store_lanes(out, load(square + r * kLanes), length);
        } else {
          for (int j = 0; j < length; ++j) out[j * step] = from_float<T>(square[r * kLanes + j]);
        }
      }
    }
  }
}

// Rows of T, null for one of zeros, to s.x as it says. Of many rows those of a panel are then at panel_of.
template <class T>
void pack_block(const T* const* rows, int64_t num_rows, int64_t inner, const ExpertScratch<T>& s) {
  if (num_rows <= kFewRows<T>) return pack_few(rows, num_rows, inner, s.x);
  const RowPanels panels(num_rows);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    pack_rows(rows + panel * kPanel, panels.rows(panel), panels.lanes(panel), inner, s.x + panel * kPanel * inner);
  }
}
inline const float* panel_of(const float* x, const RowPanels& panels, int64_t inner, int64_t panel, int64_t k) {
  return x + panel * kPanel * inner + k * panels.lanes(panel);
}

// ---- gate, up and their unit -----------------------------------------------------------------------------------------

template <class T>
struct GateUp {
  const T* const* rows;  // of the block; null: zeros
  int64_t num_rows, width;
  Halves<T> b;
  T* kept;  // [row][2 * width], as the columns of b come: g | u or by turns; null: not wanted
  bool is_interleaved;

  int64_t kept_step() const { return is_interleaved ? 2 : 1; }
  T* kept_at(int64_t row, int half) const { return kept + row * 2 * width + (is_interleaved ? half : half * width); }
  // The columns [n, n + lanes) of both halves of a row.
  FM_INLINE void keep(int64_t row, int64_t n, const VecF (&both)[2], int lanes) const {
    const int64_t step = kept_step();
    for (int half = 0; half < 2 && kept != nullptr; ++half) {
      T* to = kept_at(row, half) + n * step;
      if (step == 1) store_lanes(to, both[half], lanes);
      else
        for (int i = 0; i < lanes; ++i) to[2 * i] = from_float<T>(both[half][i]);
    }
  }
};

template <class T>
void gate_up_few(const GateUp<T>& p, const HalfPart& part, const Halves<T>* next, const ExpertScratch<T>& s,
                 float* inner) {
  const int64_t stride = inner_row_stride(p.width);
  auto emit = [&](int64_t n, const float* c) {
    const int count = static_cast<int>(min(kLanes, part.last - n));
    for (int64_t r = 0; r < p.num_rows; ++r) {
      const bool is_there = p.rows[r] != nullptr;
      const VecF both[2] = {is_there ? load(c + r * kPanel) : VecF{},
                            is_there ? load(c + r * kPanel + kLanes) : VecF{}};
      p.keep(r, n, both, count);
      store(inner + r * stride + n, rounded<T>(gated_unit(both[0], both[1])));
    }
  };
  multiply_few_rows(p.b, part.first, part.last, next, p.num_rows, s.x, s.many.copy, s.few_sums, emit);
}

template <class T>
void gate_up_many(const GateUp<T>& p, const HalfPart& part, const Halves<T>* next, const ExpertScratch<T>& s,
                  float* inner) {
  const RowPanels panels(p.num_rows);
  auto x_at = [&](int64_t panel, int64_t k) { return panel_of(s.x, panels, p.b.inner, panel, k); };
  auto emit = [&](int64_t panel, const BlockSums& sums) {
    const int64_t lanes = panels.lanes(panel), num_rows = panels.rows(panel);
    const T* const* rows = p.rows + panel * kPanel;
    float* to = inner + panel * kPanel * p.width + sums.first * lanes;
    for (int64_t i = 0; i < sums.count; ++i) {
      for (int64_t lane = 0; lane < lanes; lane += kLanes) {
        const VecF g = load(sums.at(0, i) + lane), u = load(sums.at(1, i) + lane);
        store(to + i * lanes + lane, rounded<T>(gated_unit(g, u)));
      }
    }
    for (int half = 0; half < 2 && p.kept != nullptr; ++half) {
      store_panel<T>(
          num_rows, sums.count, p.kept_step(), [&](int64_t i, int64_t lane) { return load(sums.at(half, i) + lane); },
          [&](int64_t r) { return p.kept_at(panel * kPanel + r, half) + sums.first * p.kept_step(); });
    }
    for (int64_t r = 0; r < num_rows; ++r) {  // what is infinite in b makes NaN of a row of zeros
      if (rows[r] != nullptr) continue;
      for (int64_t i = 0; i < sums.count; ++i) to[i * lanes + r] = 0.0f;
      for (int half = 0; half < 2 && p.kept != nullptr; ++half) {
        T* kept = p.kept_at(panel * kPanel + r, half) + sums.first * p.kept_step();
        for (int64_t i = 0; i < sums.count; ++i) kept[i * p.kept_step()] = from_float<T>(0.0f);
      }
    }
  };
  multiply_many_rows(p.b, next, panels, part.first_tile(), part.last_tile(), s.many, x_at, emit);
}

template <class T>
void gate_up_dots(const GateUp<T>& p, const HalfPart& part, const Halves<T>* next, const ExpertScratch<T>& s,
                  T* inner) {
  auto emit = [&](int64_t r, int64_t n, int64_t count, const float* const* sums) {
    const bool is_there = p.rows[r] != nullptr;
    for (int64_t i = 0; i < count; i += kLanes) {
      const int lanes = static_cast<int>(min(kLanes, count - i));
      const VecF both[2] = {is_there ? load(sums[0] + i) : VecF{}, is_there ? load(sums[1] + i) : VecF{}};
      p.keep(r, n + i, both, lanes);
      store_lanes(inner + r * p.width + n + i, gated_unit(both[0], both[1]), lanes);
    }
  };
  multiply_by_dots(p.rows, p.num_rows, p.b, part.first, part.last, next, s.packed(), emit);
}

// inner: of the columns of the part.
template <class T>
void gate_up_block(const GateUp<T>& p, const HalfPart& part, const Halves<T>* next, const ExpertScratch<T>& s,
                   float* inner) {
  if (uses_dot<T>()) return gate_up_dots(p, part, next, s, reinterpret_cast<T*>(inner));
  pack_block(p.rows, p.num_rows, p.b.inner, s);
  p.num_rows <= kFewRows<T> ? gate_up_few(p, part, next, s, inner) : gate_up_many(p, part, next, s, inner);
}

// The inner rows of a block, of the columns of the part, as rows of T.
template <class T>
void store_inner(const float* inner, int64_t num_rows, int64_t width, const HalfPart& part, T* out) {
  if (uses_dot<T>()) {
    for (int64_t r = 0; r < num_rows; ++r) {
      const int64_t at = r * width + part.first;
      memcpy(out + at, reinterpret_cast<const T*>(inner) + at, static_cast<size_t>(part.last - part.first) * sizeof(T));
    }
    return;
  }
  if (num_rows <= kFewRows<T>) {
    for (int64_t r = 0; r < num_rows; ++r) {
      for (int64_t n = part.first; n < part.last; n += kLanes) {
        store_lanes(out + r * width + n, load(inner + r * inner_row_stride(width) + n),
                    static_cast<int>(min(kLanes, part.last - n)));
      }
    }
    return;
  }
  const RowPanels panels(num_rows);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t lanes = panels.lanes(panel);
    const float* from = inner + panel * kPanel * width + part.first * lanes;
    auto at = [&](int64_t i, int64_t lane) { return load(from + i * lanes + lane); };
    auto to = [&](int64_t r) { return out + (panel * kPanel + r) * width + part.first; };
    store_panel<T>(panels.rows(panel), part.last - part.first, 1, at, to);
  }
}

// ---- a plain product -------------------------------------------------------------------------------------------------

// y [num_rows][stride] = x b + bias, of which the columns of the part. Few rows are in s.x, the panels of many at x. bias: of all
// columns; null: none.
template <class T>
void product_block(const float* x, int64_t num_rows, const Halves<T>& b, const HalfPart& part, const Halves<T>* next,
                   const ExpertScratch<T>& s, const float* bias, T* y, int64_t stride) {
  const int64_t second = b.count[0];
  if (num_rows <= kFewRows<T>) {
    auto emit = [&](int64_t n, const float* c) {
      for (int half = 0; half < 2; ++half) {
        const int count = static_cast<int>(min(kLanes, min(part.last, b.count[half]) - n));
        if (count <= 0) continue;
        const VecF more = bias == nullptr ? VecF{} : load_lanes(bias + half * second + n, count);
        for (int64_t r = 0; r < num_rows; ++r) {
          const VecF sum = load(c + r * kPanel + half * kLanes);
          store_lanes(y + r * stride + half * second + n, bias == nullptr ? sum : sum + more, count);
        }
      }
    };
    return multiply_few_rows(b, part.first, part.last, next, num_rows, s.x, s.many.copy, s.few_sums, emit);
  }
  const RowPanels panels(num_rows);
  auto x_at = [&](int64_t panel, int64_t k) { return panel_of(x, panels, b.inner, panel, k); };
  auto emit = [&](int64_t panel, const BlockSums& sums) {
    for (int half = 0; half < 2; ++half) {
      const int64_t first = half * second + sums.first;
      auto at = [&](int64_t i, int64_t lane) {
        const VecF sum = load(sums.at(half, i) + lane);
        return bias == nullptr ? sum : sum + bias[first + i];
      };
      auto to = [&](int64_t r) { return y + (panel * kPanel + r) * stride + first; };
      store_panel<T>(panels.rows(panel), min(sums.count, b.count[half] - sums.first), 1, at, to);
    }
  };
  multiply_many_rows(b, next, panels, part.first_tile(), part.last_tile(), s.many, x_at, emit);
}

template <class T>
void product_by_dots(const T* const* rows, int64_t num_rows, const Halves<T>& b, const HalfPart& part,
                     const Halves<T>* next, const ExpertScratch<T>& s, const float* bias, T* y, int64_t stride) {
  auto emit = [&](int64_t r, int64_t n, int64_t count, const float* const* sums) {
    for (int half = 0; half < 2; ++half) {
      const int64_t first = half * b.count[0] + n, num_columns = min(count, b.count[half] - n);
      for (int64_t i = 0; i < num_columns; i += kLanes) {
        const int lanes = static_cast<int>(min(kLanes, num_columns - i));
        const VecF sum = load(sums[half] + i);
        store_lanes(y + r * stride + first + i, bias == nullptr ? sum : sum + load_lanes(bias + first + i, lanes),
                    lanes);
      }
    }
  };
  multiply_by_dots(rows, num_rows, b, part.first, part.last, next, s.packed(), emit);
}

// The same of rows of T.
template <class T>
void rows_block(const T* const* rows, int64_t num_rows, const Halves<T>& b, const HalfPart& part, const Halves<T>* next,
                const ExpertScratch<T>& s, const float* bias, T* y, int64_t stride) {
  if (uses_dot<T>()) return product_by_dots(rows, num_rows, b, part, next, s, bias, y, stride);
  pack_block(rows, num_rows, b.inner, s);
  product_block<T>(s.x, num_rows, b, part, next, s, bias, y, stride);
}

// The same of the inner rows of a block, where gate_up_block left them.
template <class T>
void down_block(const float* inner, int64_t num_rows, const Halves<T>& b, const HalfPart& part, const Halves<T>* next,
                const ExpertScratch<T>& s, T* y, int64_t stride) {
  if (uses_dot<T>()) {
    const T* rows[kManyRows];
    for (int64_t r = 0; r < num_rows; ++r) rows[r] = reinterpret_cast<const T*>(inner) + r * b.inner;
    return product_by_dots<T>(rows, num_rows, b, part, next, s, nullptr, y, stride);
  }
  if (num_rows <= kFewRows<T>) {
    const float* rows[kFewRows<T>];
    for (int64_t r = 0; r < num_rows; ++r) rows[r] = inner + r * inner_row_stride(b.inner);
    pack_few(rows, num_rows, b.inner, s.x);
  }
  product_block<T>(inner, num_rows, b, part, next, s, nullptr, y, stride);
}

}  // namespace
}  // namespace fmkernels
