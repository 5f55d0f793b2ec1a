// SPDX-License-Identifier: Apache-2.0
// Operands and offsets of products by groups of rows, checked. Included by op files only.
#pragma once

#include "../common/dense_view.h"
#include "../common/tensor.h"

namespace fmkernels {

constexpr int64_t kMaxExtent = int64_t{1} << 31;
constexpr int64_t kMaxRowGroups = 65536;

// [rows, columns] or [groups, rows, columns], contiguous in its rows or, where it may be, in its columns.
inline DenseView view_operand(const char* name, const Tensor& t, const Tensor& like, int64_t rank, bool row_major) {
  check_rank(name, t, rank);
  check_same_device(name, t, like);
  FM_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of the first argument");
  DenseView v{};
  v.data = data_of(t);
  v.batch_stride = rank == 3 ? stride_of(t, 0) : 0;
  v.rows = t.size(rank - 2);
  v.columns = t.size(rank - 1);
  v.row_stride = stride_of(t, rank - 2);
  v.column_stride = stride_of(t, rank - 1);
  FM_CHECK(v.rows < kMaxExtent && v.columns < kMaxExtent, name, " must have sizes below 2^31, got ", v.rows, " and ",
           v.columns);
  if (v.columns <= 1 || v.column_stride == 1) v.column_stride = 1;
  else if (v.rows <= 1) v.row_stride = 1;
  FM_CHECK(t.numel() == 0 || v.column_stride == 1 || (v.row_stride == 1 && !row_major), name,
           row_major ? " must have a contiguous last dimension" : " must be contiguous in its rows or in its columns");
  return v;
}

// [groups]; on CUDA the kernels clamp what is out of range.
inline const int32_t* view_offsets(const Tensor& offsets, const Tensor& like, int64_t num_groups, int64_t num_rows) {
  FM_CHECK(num_groups <= kMaxRowGroups, "offsets must have at most ", kMaxRowGroups, " elements, got ", num_groups);
  const int32_t* ends = view_vector<int32_t>("offsets", offsets, like, ScalarType::Int, "int32", num_groups);
#ifndef FM_CUDA
  for (int64_t g = 0, previous = 0; g < num_groups; previous = ends[g], ++g) {
    FM_CHECK(ends[g] >= previous && ends[g] <= num_rows, "offsets must not decrease and be at most ", num_rows,
             ", got ", ends[g], " after ", previous);
  }
#else
  (void)num_rows;
#endif
  return ends;
}

}  // namespace fmkernels
