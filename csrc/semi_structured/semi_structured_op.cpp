// SPDX-License-Identifier: Apache-2.0
// semi_structured_mask, semi_structured_pack, semi_structured_linear: tensors in, checks, Params out.
#include "../common/tensor.h"
#include "semi_structured.h"

namespace fmkernels {
namespace {

void check_multiple(const char* name, int64_t size, int64_t divisor) {
  check_extent(name, size);
  FM_CHECK(size % divisor == 0, name, " must be a multiple of ", divisor, ", got ", size);
}

Tensor semi_structured_mask(const Tensor& x, bool both_directions) {
  SemiStructuredMaskParams p{};
  p.dtype = dtype_of("x", x);
  check_rank("x", x, 2);
  check_last_dim_contiguous("x", x);
  p.x = data_of(x);
  p.rows = x.size(0);
  p.columns = x.size(1);
  p.row_stride = stride_of(x, 0);
  check_multiple("the rows of x", p.rows, both_directions ? 4 : 1);
  check_multiple("the columns of x", p.columns, 4);
  p.both_directions = both_directions;
  Tensor mask = torch::stable::new_empty(x, {p.rows, p.columns}, ScalarType::Bool);
  p.mask = static_cast<bool*>(data_of(mask));
  if (mask.numel() > 0) FM_EXECUTE(semi_structured_mask, p, x);
  return mask;
}

#ifndef FM_CUDA  // on CUDA the first two of four count
void check_mask(const SemiStructuredPackParams& p) {
  auto check = [&](int64_t row, int64_t column) {
    const uint8_t* kept = p.mask + row * p.mask_row_stride + column * p.mask_column_stride;
    int count = 0;
    for (int64_t i = 0; i < 4; ++i) count += kept[i * p.mask_column_stride] != 0 ? 1 : 0;
    FM_CHECK(count <= 2, "mask must keep at most 2 of each 4, got ", count, " in row ", row, " from column ", column,
             " on");
  };
  if (p.mask_column_stride == 1) {
    for (int64_t row = 0; row < p.rows; ++row) {
      for (int64_t column = 0; column < p.columns; column += 4) check(row, column);
    }
  } else {  // of a transpose: along memory
    for (int64_t column = 0; column < p.columns; column += 4) {
      for (int64_t row = 0; row < p.rows; ++row) check(row, column);
    }
  }
}
#endif

std::tuple<Tensor, Tensor> semi_structured_pack(const Tensor& x, const Tensor& mask, bool transposed) {
  SemiStructuredPackParams p{};
  p.dtype = dtype_of("x", x);
  check_rank("x", x, 2);
  check_last_dim_contiguous("x", x);
  check_rank("mask", mask, 2);
  check_size("mask", mask, 0, x.size(0));
  check_size("mask", mask, 1, x.size(1));
  check_same_device("mask", mask, x);
  check_scalar_type("mask", mask, ScalarType::Bool, "bool");
  check_last_dim_contiguous("mask", mask);
  check_multiple("the rows of x", x.size(0), kRowTile);
  check_multiple("the columns of x", x.size(1), kRowTile);
  p.x = data_of(x);
  p.mask = static_cast<const uint8_t*>(data_of(mask));
  p.rows = x.size(transposed ? 1 : 0);
  p.columns = x.size(transposed ? 0 : 1);
  p.row_stride = transposed ? 1 : stride_of(x, 0);
  p.column_stride = transposed ? stride_of(x, 0) : 1;
  p.mask_row_stride = transposed ? 1 : stride_of(mask, 0);
  p.mask_column_stride = transposed ? stride_of(mask, 0) : 1;
#ifndef FM_CUDA
  check_mask(p);
#endif
  Tensor values = torch::stable::new_empty(x, {p.rows, p.columns / 2});
  Tensor metadata =
      torch::stable::new_empty(x, {p.num_row_tiles(), p.num_column_blocks(), kTileWords}, ScalarType::Int);
  p.values = data_of(values);
  p.metadata = static_cast<uint32_t*>(data_of(metadata));
  if (x.numel() > 0) FM_EXECUTE(semi_structured_pack, p, x);
  return {values, metadata};
}

Tensor semi_structured_linear(const Tensor& x, const Tensor& values, const Tensor& metadata,
                              const std::optional<Tensor>& bias) {
  SemiStructuredLinearParams p{};
  p.dtype = dtype_of("x", x);
  check_rank("x", x, 2);
  check_last_dim_contiguous("x", x);
  check_rank("values", values, 2);
  check_same_device("values", values, x);
  FM_CHECK(values.scalar_type() == x.scalar_type(), "values must have the dtype of x");
  FM_CHECK(values.is_contiguous(), "values must be contiguous");
  p.tokens = x.size(0);
  p.columns = x.size(1);
  p.rows = values.size(0);
  check_extent("the rows of x", p.tokens);
  check_multiple("the columns of x", p.columns, kRowTile);
  check_multiple("the rows of values", p.rows, kRowTile);
  check_size("values", values, 1, p.columns / 2);
  check_rank("metadata", metadata, 3);
  check_same_device("metadata", metadata, x);
  check_scalar_type("metadata", metadata, ScalarType::Int, "int32");
  FM_CHECK(metadata.is_contiguous(), "metadata must be contiguous");
  check_size("metadata", metadata, 0, p.num_row_tiles());
  check_size("metadata", metadata, 1, p.num_column_blocks());
  check_size("metadata", metadata, 2, kTileWords);
  p.x = data_of(x);
  p.x_stride = stride_of(x, 0);
  p.values = data_of(values);
  p.metadata = static_cast<const uint32_t*>(data_of(metadata));
  for (const void* data : {p.values, static_cast<const void*>(p.metadata)}) {
    FM_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0 || values.numel() == 0,
             "values and metadata must begin on 16-byte boundaries");
  }
  if (bias.has_value()) p.bias = view_vector<float>("bias", *bias, x, ScalarType::Float, "float32", p.rows);
  Tensor y = torch::stable::new_empty(x, {p.tokens, p.rows});
  p.y = data_of(y);
  if (y.numel() > 0) FM_EXECUTE(semi_structured_linear, p, x);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) {
  m.impl("semi_structured_mask", TORCH_BOX(&semi_structured_mask));
  m.impl("semi_structured_pack", TORCH_BOX(&semi_structured_pack));
  m.impl("semi_structured_linear", TORCH_BOX(&semi_structured_linear));
}

}  // namespace fmkernels
