// SPDX-License-Identifier: Apache-2.0
// The product of moe_columns_cpu.h for bfloat16 where the processor has a dot product of it, by moe_dot.h: rows and columns as they
// lie, or where b lies by rows a block of columns that is made of it for all rows of an expert. Internal linkage, as in vec.h.
#pragma once

#include <type_traits>

#include "moe_columns_cpu.h"
#include "moe_dot.h"

namespace fmkernels {
namespace {

template <class T>
constexpr bool kMayUseDot = kIsa == Isa::kAvx2 && std::is_same_v<T, BFloat16>;

template <class T>
bool uses_dot() {
  if constexpr (kMayUseDot<T>) return cpu_isa() == Isa::kAvx512;
  else return false;
}

// Columns of a half that are multiplied by all rows before the next ones: those of both stay in the second-level cache.
constexpr int64_t kMaxDotColumns = 32, kMinDotColumns = 2 * kDotColumns, kDotElements = 32 << 10;
inline int64_t dot_columns(int64_t inner) {
  return max(kMinDotColumns, min(kMaxDotColumns, kDotElements / inner / kMinDotColumns * kMinDotColumns));
}

// Of a column that is made of b by rows; not a power of two apart from the next one.
inline int64_t dot_stride(int64_t inner) { return round_up(inner, 32) + 32; }
// Elements that a product needs whose b lies by rows, and any with a smaller inner dimension: a column is up to 95 elements longer
// than the inner dimension.
inline int64_t dot_packed(int64_t inner) {
  constexpr int64_t kSide = kDotElements + 95 * kMaxDotColumns;
  static_assert(2 * kSide * sizeof(BFloat16) >= kDotLanes * kDotFewRows * kDotFewColumns * sizeof(float));
  return 2 * max(kSide, kMinDotColumns * dot_stride(inner));
}

// Columns that are contiguous in each of `inner` rows, to dot_stride(inner) elements each.
template <class T>
void pack_along(const T* from, int64_t row_stride, int64_t inner, int64_t num_columns, T* to) {
  if constexpr (kMayUseDot<T>) {
    if (num_columns > 0) {
      run_moe_dot_columns<Isa::kAvx512>({from, row_stride, num_columns, inner, to, dot_stride(inner)});
    }
  }
}
// Columns [n, n + count) of both halves of a b that lies by rows, to `packed`; and where they are then, to columns[half][padded].
template <class T>
void pack_halves_along(const Halves<T>& b, int64_t n, int64_t count, T* packed, const T** columns, int64_t padded) {
  const int64_t stride = dot_stride(b.inner);
  const int64_t counts[2] = {min(count, b.count[0] - n), min(count, b.count[1] - n)};
  const bool takes_turns = b.step == 2;  // of columns that are contiguous in a row
  if (takes_turns) {
    pack_along(b.base[0] + 2 * n, b.inner_stride, b.inner, counts[0] + counts[1], packed);
  } else {
    for (int half = 0; half < 2; ++half) {
      pack_along(b.base[half] + n, b.inner_stride, b.inner, counts[half], packed + half * count * stride);
    }
  }
  for (int half = 0; half < 2; ++half) {
    for (int64_t i = 0; i < padded; ++i) {
      const int64_t column = max(0, min(i, counts[half] - 1));
      columns[half * padded + i] = packed + (takes_turns ? 2 * column + half : half * count + column) * stride;
    }
  }
}

// multiply_by_dots for few rows and a b that lies by rows.
template <class T, class Emit>
void multiply_few_by_dots(const T* const* rows, int64_t num_rows, const Halves<T>& b, int64_t first, int64_t last,
                          float* lanes, Emit&& emit) {
  const T *there[kDotFewRows], *some = nullptr;
  for (int64_t r = 0; r < num_rows; ++r) some = rows[r] == nullptr ? some : rows[r];
  for (int64_t r = 0; r < num_rows; ++r) there[r] = rows[r] == nullptr ? some : rows[r];
  const bool takes_turns = b.step == 2;
  const int64_t block = takes_turns ? kDotFewColumns / 2 : kDotFewColumns;
  float sums[2][kDotFewRows * kDotFewColumns + kLanes], apart[2][kDotFewColumns];
  auto multiply = [&](const T* from, int64_t num_columns, float* to) {
    if constexpr (kMayUseDot<T>) {
      if (num_columns <= 0 || some == nullptr) return;
      run_moe_dot_few<Isa::kAvx512>(
          {there, num_rows, from, b.inner_stride, num_columns, b.inner, to, kDotFewColumns, lanes});
    }
  };
  for (int64_t n = first; n < last; n += block) {
    const int64_t count = min(block, last - n), second = min(count, b.count[1] - n);
    multiply(b.base[0] + n * b.step, takes_turns ? count + second : count, sums[0]);
    if (!takes_turns) multiply(b.base[1] + n, second, sums[1]);
    for (int64_t r = 0; r < num_rows; ++r) {
      const float* halves[2] = {sums[0] + r * kDotFewColumns, sums[1] + r * kDotFewColumns};
      for (int half = 0; half < 2 && takes_turns; ++half) {
        for (int64_t i = 0; i < count; ++i) apart[half][i] = sums[0][r * kDotFewColumns + 2 * i + half];
      }
      if (takes_turns) halves[0] = apart[0], halves[1] = apart[1];
      emit(r, n, count, halves);
    }
  }
}

// emit(row, n, count, sums): the sums[half][.] of a row with columns [n, n + count) of both halves, for all of [first, last). After a
// sum a vector can be read. Rows: null for one whose sums mean nothing. packed: dot_packed(b.inner) elements, where b lies by rows.
template <class T, class Emit>
void multiply_by_dots(const T* const* rows, int64_t num_rows, const Halves<T>& b, int64_t first, int64_t last,
                      const Halves<T>* next, T* packed, Emit&& emit) {
  if (b.inner_stride != 1 && num_rows <= kDotFewRows) {
    return multiply_few_by_dots(rows, num_rows, b, first, last, reinterpret_cast<float*>(packed), emit);
  }
  static_assert(kDotRows == kTileRows);
  const int64_t block = dot_columns(b.inner);
  float sums[kDotRows * 2 * kMaxDotColumns + kLanes];
  const T *columns[2 * kMaxDotColumns], *ahead[2 * kMaxDotColumns];
  for (int64_t n = first; n < last; n += block) {
    const int64_t count = min(block, last - n), padded = round_up(count, kDotColumns), stride = 2 * padded;
    const bool is_last = n + block >= last;
    const Halves<T>* after = is_last ? next : &b;
    if (after != nullptr && after->inner_stride != 1) after = nullptr;
    for (int half = 0; half < 2; ++half) {
      for (int64_t i = 0; i < padded; ++i) {
        if (b.inner_stride == 1) columns[half * padded + i] = b.column(half, n + i);
        if (after != nullptr) ahead[half * padded + i] = after->column(half, (is_last ? 0 : n + block) + i);
      }
    }
    if (b.inner_stride != 1) pack_halves_along(b, n, count, packed, columns, padded);
    for (int64_t row = 0, tile; row < num_rows; row += tile) {
      tile = rows_of_tile(num_rows - row);
      const T* there[kDotRows];
      for (int64_t r = 0; r < tile; ++r) there[r] = rows[row + r] == nullptr ? columns[0] : rows[row + r];
      if constexpr (kMayUseDot<T>) {
        run_moe_dot<Isa::kAvx512>(
            {there, tile, columns, stride, b.inner, sums, stride, row == 0 && after != nullptr ? ahead : nullptr});
      }
      for (int64_t r = 0; r < tile; ++r) {
        const float* of_row = sums + r * stride;
        const float* halves[2] = {of_row, of_row + padded};
        emit(row + r, n, count, halves);
      }
    }
  }
}

}  // namespace
}  // namespace fmkernels
