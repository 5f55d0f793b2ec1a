// SPDX-License-Identifier: Apache-2.0
// A batch of matrices in memory, as kernels of products read them.
#pragma once

#include <cstdint>

namespace fmkernels {

// [batch, rows, columns]; of the strides of rows and columns one is 1.
struct DenseView {
  void* data;
  int64_t batch_stride, row_stride, column_stride;
  int64_t rows, columns;

  bool is_row_major() const { return column_stride == 1; }
};

}  // namespace fmkernels
