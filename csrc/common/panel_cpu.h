// SPDX-License-Identifier: Apache-2.0
// The right operand of a matrix product on the CPU, in panels of two vectors, and how rows are cut into tiles of 6 rows x 2
// vectors: 12 sums, 2 vectors of the panel and a broadcast. Internal linkage, as in vec.h.
#pragma once

#include <cstring>
#include <type_traits>

#include "integers_cpu.h"
#include "vec.h"

namespace fmkernels {
namespace {

constexpr int kPanel = 2 * kLanes;
constexpr int kTileRows = 6;

// Rows of the next tile of `left` rows: 6, and such a rest that no tile has less than 4 of many.
constexpr int rows_of_tile(int64_t left) {
  return static_cast<int>(left >= 10 || left == 6 ? 6 : left == 9 ? 5 : left > 6 ? 4 : left);
}

// Rows k of a vector of columns, of which there are num_columns, to out[k * kPanel], zeros in the columns past them. Of the strides
// one is 1.
template <class T>
FM_INLINE void pack_half(const T* b, int64_t row_stride, int64_t column_stride, int64_t num_rows, int num_columns,
                         float* out) {
  if (column_stride == 1) {
    for (int64_t k = 0; k < num_rows; ++k) store(out + k * kPanel, load_lanes(b + k * row_stride, num_columns));
    return;
  }
  int64_t k = 0;
  if constexpr (std::is_same_v<T, BFloat16>) {  // two neighbours in a column are moved as one float, then taken apart
    for (; k + 2 * kLanes <= num_rows; k += 2 * kLanes) {
      VecF columns[kLanes];
      for (int c = 0; c < kLanes; ++c) {
        columns[c] = c < num_columns ? load(reinterpret_cast<const float*>(b + c * column_stride + k)) : VecF{};
      }
      float square[kLanes * kLanes];
      transpose_to(columns, square, kLanes);
      for (int i = 0; i < kLanes; ++i) {
        const VecU pairs = (VecU)load(square + i * kLanes);
        store(out + (k + 2 * i) * kPanel, (VecF)(pairs << 16));
        store(out + (k + 2 * i + 1) * kPanel, (VecF)(pairs & 0xffff0000u));
      }
    }
  }
  for (; k < num_rows; k += kLanes) {
    const int length = static_cast<int>(min(kLanes, num_rows - k));
    VecF columns[kLanes];
    for (int c = 0; c < kLanes; ++c) {
      columns[c] = c < num_columns ? load_lanes(b + c * column_stride + k, length) : VecF{};
    }
    float square[kLanes * kLanes];
    transpose_to(columns, length == kLanes ? out + k * kPanel : square, length == kLanes ? kPanel : kLanes);
    for (int i = 0; i < length && length < kLanes; ++i) store(out + (k + i) * kPanel, load(square + i * kLanes));
  }
}

// Rows k of the first kPanel of num_columns columns to out[k][kPanel], zeros in the columns past them. Of the strides one is 1.
template <class T>
void pack_panel(const T* b, int64_t row_stride, int64_t column_stride, int64_t num_rows, int64_t num_columns,
                float* out) {
  if (column_stride == 1 && num_columns >= kPanel) {
    for (int64_t k = 0; k < num_rows; ++k) {
      store(out + k * kPanel, load(b + k * row_stride));
      store(out + k * kPanel + kLanes, load(b + k * row_stride + kLanes));
    }
    return;
  }
  for (int half = 0; half < 2; ++half) {
    const int count = static_cast<int>(max(0, min(kLanes, num_columns - half * kLanes)));
    pack_half(b + half * kLanes * column_stride, row_stride, column_stride, num_rows, count, out + half * kLanes);
  }
}

}  // namespace
}  // namespace fmkernels
