// SPDX-License-Identifier: Apache-2.0
// Rows of tensors of one shape [..., n]: all dimensions but the last, at any strides, counted by one index.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fmkernels {

constexpr int kMaxRowDims = 4;

// Sizes of the leading dimensions, outermost first; those that every tensor of the call can step through with one stride
// are merged, so that contiguous tensors have one. Dimensions without use come first and have size 1.
struct Rows {
  int64_t count;
  int64_t dims[kMaxRowDims];
  bool is_flat;  // all dimensions but the last are 1
};

// Rows of one tensor: where they begin. Null data: there is no such tensor.
struct RowView {
  void* data;
  int64_t stride[kMaxRowDims];  // in elements
};

struct RowPlace {
  int64_t at[kMaxRowDims];
  bool is_flat;  // at is of use in its last entry alone
};

FM_HOST_DEVICE RowPlace place_of(const Rows& rows, int64_t row) {
  RowPlace place{{}, rows.is_flat};
  if (!rows.is_flat) {
    for (int dim = kMaxRowDims - 1; dim > 0; --dim) {
      if (rows.dims[dim] == 1) continue;
      const int64_t above = row >> 31 == 0 && rows.dims[dim] >> 31 == 0
                                ? static_cast<uint32_t>(row) / static_cast<uint32_t>(rows.dims[dim])
                                : row / rows.dims[dim];
      place.at[dim] = row - above * rows.dims[dim];
      row = above;
    }
    place.at[0] = row;
  } else {
    place.at[kMaxRowDims - 1] = row;
  }
  return place;
}

FM_HOST_DEVICE int64_t offset_of(const RowView& view, const RowPlace& place) {
  int64_t offset = place.at[kMaxRowDims - 1] * view.stride[kMaxRowDims - 1];
  if (!place.is_flat) {
    for (int dim = 0; dim < kMaxRowDims - 1; ++dim) offset += place.at[dim] * view.stride[dim];
  }
  return offset;
}

template <class T>
FM_HOST_DEVICE T* row_of(const RowView& view, const RowPlace& place) {
  return static_cast<T*>(view.data) + offset_of(view, place);
}

// Whether every row begins on a boundary of `bytes`, for elements of `element` bytes. So does the row that is not there.
inline bool rows_are_aligned(const RowView& view, int64_t element, int64_t bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(bytes) == 0;
  for (const int64_t stride : view.stride) aligned = aligned && stride * element % bytes == 0;
  return aligned;
}

}  // namespace fmkernels
