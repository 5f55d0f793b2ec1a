// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels of both products share: the register tile, its operands as floats, and the epilogue. Internal linkage,
// as in vec.h.
#pragma once

#include <cmath>
#include <cstring>

#include "../common/dispatch_cpu.h"
#include "../common/integers_cpu.h"
#include "../common/panel_cpu.h"
#include "../common/vec.h"
#include "block_sparse.h"

namespace fmkernels {
namespace {

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

}  // namespace
}  // namespace fmkernels
