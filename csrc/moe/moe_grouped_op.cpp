// SPDX-License-Identifier: Apache-2.0
// Products by groups of rows: tensors in, checks, Params out.
#include "moe_grouped.h"
#include "moe_grouped_views.h"

namespace fmkernels {
namespace {

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
