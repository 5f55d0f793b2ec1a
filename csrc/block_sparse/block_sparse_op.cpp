// SPDX-License-Identifier: Apache-2.0
// block_sparse_dsd, block_sparse_sdd: tensors in, checks, Params out.
#include "../common/tensor.h"
#include "block_sparse.h"

namespace fmkernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

void check_block(int64_t rows, int64_t columns) {
  auto is_block = [](int64_t size) { return size == 16 || size == 32 || size == 64 || size == 128; };
  FM_CHECK(is_block(rows) && is_block(columns), "a block must have 16, 32, 64 or 128 rows and columns, got ", rows,
           " x ", columns);
}

DenseView view_dense(const char* name, const Tensor& t, const Tensor& like) {
  check_rank(name, t, 3);
  check_same_device(name, t, like);
  DenseView v{};
  v.data = data_of(t);
  v.batch_stride = stride_of(t, 0);
  v.rows = t.size(1);
  v.columns = t.size(2);
  v.row_stride = stride_of(t, 1);
  v.column_stride = stride_of(t, 2);
  check_extent(name, v.rows);
  check_extent(name, v.columns);
  if (v.columns <= 1 || v.column_stride == 1) v.column_stride = 1;
  else if (v.rows <= 1) v.row_stride = 1;
  FM_CHECK(v.column_stride == 1 || v.row_stride == 1 || t.numel() == 0, name,
           " must be contiguous in its rows or in its columns");
  return v;
}

void check_same_dtype(const char* name, const Tensor& t, const Tensor& like) {
  FM_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of the first argument");
}

const int32_t* list_of(const char* name, const Tensor& t, int64_t length, const Tensor& like) {
  return view_vector<int32_t>(name, t, like, ScalarType::Int, "int32", length);
}

// Null where it is left out.
const float* vector_of(const char* name, const OptionalTensor& t, int64_t length, const Tensor& like) {
  return t.has_value() ? view_vector<float>(name, *t, like, ScalarType::Float, "float32", length) : nullptr;
}

Epilogue view_epilogue(const OptionalTensor& scale, const OptionalTensor& bias, int64_t activation, int64_t length,
                       const Tensor& like) {
  FM_CHECK(activation >= 0 && activation <= 3, "activation must be from 0 to 3, got ", activation);
  return {vector_of("scale", scale, length, like), vector_of("bias", bias, length, like),
          static_cast<Activation>(activation)};
}

#ifndef FM_CUDA  // on CUDA the kernels skip what is out of range
void check_lists(const BlockSparseDsdParams& p) {
  const int64_t num_rows = p.num_block_rows(), num_columns = p.num_block_columns();
  int64_t previous = 0;
  for (int64_t list = 0; list < p.num_lists; ++list) {
    for (int64_t row = 0; row <= num_rows; ++row) {
      const int64_t offset = p.offsets[list * (num_rows + 1) + row];
      FM_CHECK(offset >= previous && offset <= p.num_entries, "offsets must not decrease and be at most ",
               p.num_entries, ", got ", offset, " after ", previous);
      previous = offset;
    }
  }
  for (int64_t list = 0; list < p.num_lists; ++list) {  // an order in which a sum is the same in all kernels
    for (int64_t row = 0; row < num_rows; ++row) {
      const int32_t* of_row = p.offsets + list * (num_rows + 1) + row;
      for (int64_t i = of_row[0] + 1; i < of_row[1]; ++i) {
        FM_CHECK(p.indices[i] > p.indices[i - 1], "indices must ascend within a row of blocks, got ", p.indices[i],
                 " after ", p.indices[i - 1]);
      }
    }
  }
  for (int64_t i = 0; i < previous; ++i) {
    FM_CHECK(p.indices[i] >= 0 && p.indices[i] < num_columns, "indices must be from 0 to ", num_columns - 1, ", got ",
             p.indices[i]);
    const int64_t position = p.positions == nullptr ? i : p.positions[i];
    FM_CHECK(position >= 0 && position < p.num_blocks, "positions must be from 0 to ", p.num_blocks - 1, ", got ",
             position);
  }
  for (int64_t i = 0; i < p.num_lists * num_rows; ++i) {
    FM_CHECK(p.order[i] >= 0 && p.order[i] < p.num_lists * num_rows, "order must be from 0 to ",
             p.num_lists * num_rows - 1, ", got ", p.order[i]);
  }
}
#endif

Tensor block_sparse_dsd(const Tensor& values, const Tensor& dense, const Tensor& offsets, const Tensor& indices,
                        const OptionalTensor& positions, const Tensor& order, const OptionalTensor& scale,
                        const OptionalTensor& bias, int64_t rows, bool transposed, bool transposed_out,
                        int64_t activation, const OptionalTensor& block_scales) {
  BlockSparseDsdParams p{};
  p.dtype = dtype_of("dense", dense);
  if (block_scales.has_value()) check_scalar_type("values", values, ScalarType::Char, "int8, for block_scales");
  else check_same_dtype("dense", dense, values);
  check_rank("values", values, 3);
  FM_CHECK(values.is_contiguous(), "values must be contiguous");
  check_block(values.size(1), values.size(2));
  check_extent("values", values.size(0));
  check_extent("rows", rows);
  p.values = data_of(values);
  FM_CHECK(reinterpret_cast<uintptr_t>(p.values) % 16 == 0 || values.numel() == 0,
           "values must begin on a 16-byte boundary");
  p.block_rows = static_cast<int>(values.size(1));
  p.block_columns = static_cast<int>(values.size(2));
  p.transposed = transposed;
  p.num_blocks = values.size(0);
  p.block_scales = vector_of("block_scales", block_scales, p.num_blocks, values);
  p.dense = view_dense("dense", dense, values);
  p.batch = dense.size(0);
  p.rows = rows;
  p.inner = p.dense.rows;
  p.columns = p.dense.columns;
  check_rank("offsets", offsets, 2);
  p.num_lists = offsets.size(0);
  FM_CHECK(p.num_lists == 1 || p.num_lists == p.batch, "offsets must have 1 or ", p.batch, " lists, got ", p.num_lists);
  check_size("offsets", offsets, 1, p.num_block_rows() + 1);
  check_same_device("offsets", offsets, values);
  check_scalar_type("offsets", offsets, ScalarType::Int, "int32");
  FM_CHECK(offsets.is_contiguous(), "offsets must be contiguous");
  check_extent("offsets", p.num_lists * p.num_block_rows());
  p.offsets = static_cast<const int32_t*>(data_of(offsets));
  check_rank("indices", indices, 1);
  p.num_entries = indices.size(0);
  check_extent("indices", p.num_entries);
  p.indices = list_of("indices", indices, p.num_entries, values);
  if (positions.has_value()) p.positions = list_of("positions", *positions, p.num_entries, values);
  p.order = list_of("order", order, p.num_lists * p.num_block_rows(), values);
  p.epilogue = view_epilogue(scale, bias, activation, rows, values);
#ifndef FM_CUDA
  check_lists(p);
#endif
  Tensor out = transposed_out ? torch::stable::new_empty(dense, {p.batch, p.columns, rows})
                              : torch::stable::new_empty(dense, {p.batch, rows, p.columns});
  p.out.data = data_of(out);
  p.out.batch_stride = rows * p.columns;
  p.out.rows = rows;
  p.out.columns = p.columns;
  p.out.row_stride = transposed_out ? 1 : p.columns;
  p.out.column_stride = transposed_out ? rows : 1;
  if (out.numel() > 0) FM_EXECUTE(block_sparse_dsd, p, values);
  return out;
}

Tensor block_sparse_sdd(const Tensor& a, const Tensor& b, const Tensor& row_indices, const Tensor& column_indices,
                        const OptionalTensor& scale, const OptionalTensor& bias, int64_t block_rows,
                        int64_t block_columns, int64_t activation) {
  BlockSparseSddParams p{};
  p.dtype = dtype_of("a", a);
  check_block(block_rows, block_columns);
  p.a = view_dense("a", a, a);
  p.b = view_dense("b", b, a);
  check_same_dtype("b", b, a);
  p.batch = a.size(0);
  check_size("b", b, 0, p.batch);
  p.rows = p.a.rows;
  p.inner = p.a.columns;
  p.columns = p.b.columns;
  check_size("b", b, 1, p.inner);
  p.block_rows = static_cast<int>(block_rows);
  p.block_columns = static_cast<int>(block_columns);
  check_rank("row_indices", row_indices, 1);
  p.num_blocks = row_indices.size(0);
  check_extent("row_indices", p.num_blocks);
  check_extent("a", p.batch * p.num_block_rows());
  p.row_indices = list_of("row_indices", row_indices, p.num_blocks, a);
  p.column_indices = list_of("column_indices", column_indices, p.num_blocks, a);
  p.epilogue = view_epilogue(scale, bias, activation, p.columns, a);
#ifndef FM_CUDA
  for (int64_t i = 0; i < p.num_blocks; ++i) {
    const int64_t row = p.row_indices[i], column = p.column_indices[i];
    FM_CHECK(row >= -1 && row < p.batch * p.num_block_rows(), "row_indices must be from -1 to ",
             p.batch * p.num_block_rows() - 1, ", got ", row);
    FM_CHECK(row == -1 || (column >= 0 && column < p.num_block_columns()), "column_indices must be from 0 to ",
             p.num_block_columns() - 1, ", got ", column);
  }
#endif
  Tensor values = torch::stable::new_empty(a, {p.num_blocks, block_rows, block_columns});
  p.values = data_of(values);
  if (values.numel() > 0) FM_EXECUTE(block_sparse_sdd, p, a);
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) {
  m.impl("block_sparse_dsd", TORCH_BOX(&block_sparse_dsd));
  m.impl("block_sparse_sdd", TORCH_BOX(&block_sparse_sdd));
}

}  // namespace fmkernels
