// SPDX-License-Identifier: Apache-2.0
// Tensors as rows (rows.h). Included by op files only.
#pragma once

#include "rows.h"
#include "tensor.h"

namespace fmkernels {

// [batch], contiguous: an element for each row of `like`.
template <class T>
const T* view_one_a_row(const char* name, const Tensor& t, const Tensor& like, ScalarType type, const char* type_name) {
  return view_vector<T>(name, t, like, type, type_name, like.size(0));
}

// One tensor of a call and the view that is made of it; a null tensor gives a view without data.
struct RowTensor {
  const char* name;
  const Tensor* tensor;
  RowView* view;
};

// The views of all tensors, which have the dtype and device of `like` and its shape but for the last dimension, and the
// rows that they share. Each must have a contiguous last dimension.
template <size_t kCount>
Rows view_rows(const Tensor& like, const RowTensor (&tensors)[kCount]) {
  FM_CHECK(like.dim() >= 1, "a tensor must have at least 1 dimension, got 0");
  const int64_t last = like.dim() - 1;
  for (const RowTensor& t : tensors) {
    *t.view = {};
    if (t.tensor == nullptr) continue;
    check_rank(t.name, *t.tensor, like.dim());
    check_last_dim_contiguous(t.name, *t.tensor);
    check_same_device(t.name, *t.tensor, like);
    FM_CHECK(t.tensor->scalar_type() == like.scalar_type(), t.name, " must have the dtype of the first argument");
    for (int64_t dim = 0; dim < last; ++dim) check_size(t.name, *t.tensor, dim, like.size(dim));
    t.view->data = data_of(*t.tensor);
  }
  Rows rows{1, {1, 1, 1, 1}, true};
  int at = kMaxRowDims;  // of the outermost merged dimension so far
  for (int64_t dim = last - 1; dim >= 0; --dim) {
    const int64_t size = like.size(dim);
    rows.count *= size;
    if (size == 1) continue;
    bool merges = at < kMaxRowDims;
    for (const RowTensor& t : tensors) {
      merges = merges && (t.tensor == nullptr || stride_of(*t.tensor, dim) == t.view->stride[at] * rows.dims[at]);
    }
    if (!merges) {
      FM_CHECK(at > 0, "the strides of the leading dimensions must merge into at most ", kMaxRowDims, " dimensions");
      --at;
      for (const RowTensor& t : tensors) {
        if (t.tensor != nullptr) t.view->stride[at] = stride_of(*t.tensor, dim);
      }
    }
    rows.dims[at] *= size;
  }
  rows.is_flat = at >= kMaxRowDims - 1;
  return rows;
}

}  // namespace fmkernels
