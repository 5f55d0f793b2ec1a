// SPDX-License-Identifier: Apache-2.0
// Products by groups of rows: tensors in, checks, Params out.
#include "../common/tensor.h"
#include "moe_grouped.h"

namespace fmkernels {
namespace {

constexpr int64_t kMaxExtent = int64_t{1} << 31;
constexpr int64_t kMaxGroups = 65536;

// [rows, columns] or [groups, rows, columns], contiguous in its rows or, where it may be, in its columns.
DenseView view_operand(const char* name, const Tensor& t, const Tensor& like, int64_t rank, bool row_major) {
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
const int32_t* view_offsets(const Tensor& offsets, const Tensor& like, int64_t num_groups, int64_t num_rows) {
  FM_CHECK(num_groups <= kMaxGroups, "offsets must have at most ", kMaxGroups, " elements, got ", num_groups);
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

Tensor moe_grouped_mm(const Tensor& a, const Tensor& b, const Tensor& offsets, const std::optional<Tensor>& bias) {
  MoeGroupedMmParams p{};
  p.dtype = dtype_of("a", a);
  p.a = view_operand("a", a, a, 2, true);
  p.b = view_operand("b", b, a, 3, false);
  p.num_groups = b.size(0);
  FM_CHECK(p.b.rows == p.a.columns, "b must have as many rows as a has columns, ", p.a.columns, ", got ", p.b.rows);
  p.offsets = view_offsets(offsets, a, p.num_groups, p.a.rows);
  if (bias.has_value()) {
    check_rank("bias", *bias, 2);
    check_scalar_type("bias", *bias, ScalarType::Float, "float32");
    check_same_device("bias", *bias, a);
    check_size("bias", *bias, 0, p.num_groups);
    check_size("bias", *bias, 1, p.b.columns);
    check_last_dim_contiguous("bias", *bias);
    FM_CHECK(bias->numel() == 0 || bias->size(0) == 1 || bias->stride(0) == bias->size(1), "bias must be contiguous");
    p.bias = static_cast<const float*>(data_of(*bias));
  }
  Tensor out = torch::stable::new_empty(a, {p.a.rows, p.b.columns});
  p.out = view_operand("out", out, a, 2, true);
  if (out.numel() > 0) FM_EXECUTE(moe_grouped_mm, p, a);
  return out;
}

Tensor moe_grouped_mm_inner(const Tensor& a, const Tensor& b, const Tensor& offsets) {
  MoeGroupedMmInnerParams p{};
  p.dtype = dtype_of("a", a);
  p.a = view_operand("a", a, a, 2, true);
  p.b = view_operand("b", b, a, 2, true);
  check_rank("offsets", offsets, 1);
  p.num_groups = offsets.size(0);
  FM_CHECK(p.a.rows == p.b.rows, "a and b must have as many rows, got ", p.a.rows, " and ", p.b.rows);
  p.offsets = view_offsets(offsets, a, p.num_groups, p.a.rows);
  Tensor out = torch::stable::new_empty(a, {p.num_groups, p.a.columns, p.b.columns});
  p.out = view_operand("out", out, a, 3, true);
  if (out.numel() > 0) FM_EXECUTE(moe_grouped_mm_inner, p, a);
  return out;
}

Tensor moe_grouped_sum(const Tensor& x, const Tensor& offsets) {
  MoeGroupedSumParams p{};
  p.dtype = dtype_of("x", x);
  p.x = view_operand("x", x, x, 2, true);
  check_rank("offsets", offsets, 1);
  p.num_groups = offsets.size(0);
  p.offsets = view_offsets(offsets, x, p.num_groups, p.x.rows);
  Tensor out = torch::stable::new_empty(x, {p.num_groups, p.x.columns}, ScalarType::Float);
  p.out = static_cast<float*>(data_of(out));
  if (out.numel() > 0) FM_EXECUTE(moe_grouped_sum, p, x);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) {
  m.impl("moe_grouped_mm", TORCH_BOX(&moe_grouped_mm));
  m.impl("moe_grouped_mm_inner", TORCH_BOX(&moe_grouped_mm_inner));
  m.impl("moe_grouped_sum", TORCH_BOX(&moe_grouped_sum));
}

}  // namespace fmkernels
