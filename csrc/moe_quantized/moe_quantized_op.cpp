// SPDX-License-Identifier: Apache-2.0
// moe_quantized_mm: tensors in, checks, Params out.
#include "../common/packed_weight_view.h"
#include "../moe/moe_grouped_views.h"
#include "moe_quantized.h"

namespace fmkernels {
namespace {

Tensor moe_quantized_mm(const Tensor& a, const Tensor& values, const Tensor& scales, const std::optional<Tensor>& zeros,
                        const Tensor& offsets, const std::optional<Tensor>& bias, int64_t bits, int64_t group_size,
                        int64_t out_features, int64_t in_features) {
  MoeQuantizedParams p{};
  p.dtype = dtype_of("a", a);
  check_rank("a", a, 2);
  check_size("a", a, 1, in_features);
  check_extent("the rows of a", a.size(0));
  check_last_dim_contiguous("a", a);
  p.weight = view_packed_weight(values, scales, zeros, bits, group_size, out_features, in_features);
  check_same_device("values", values, a);
  p.a = data_of(a);
  p.num_rows = a.size(0);
  p.a_stride = stride_of(a, 0);
  check_rank("offsets", offsets, 1);
  p.num_groups = offsets.size(0);
  FM_CHECK(p.num_groups >= 1 && out_features % p.num_groups == 0 && out_features / p.num_groups % kPackedPanel == 0,
           "out_features must be a multiple of ", kPackedPanel, " for each of the ", p.num_groups, " experts, got ",
           out_features);
  p.columns = out_features / p.num_groups;
  p.offsets = view_offsets(offsets, a, p.num_groups, p.num_rows);
  if (bias.has_value()) {
    check_rank("bias", *bias, 2);
    check_scalar_type("bias", *bias, ScalarType::Float, "float32");
    check_same_device("bias", *bias, a);
    check_size("bias", *bias, 0, p.num_groups);
    check_size("bias", *bias, 1, p.columns);
    FM_CHECK(bias->is_contiguous(), "bias must be contiguous");
    p.bias = static_cast<const float*>(data_of(*bias));
  }
  Tensor out = torch::stable::new_empty(a, {p.num_rows, p.columns});
  p.out = data_of(out);
  if (p.num_rows > 0) FM_EXECUTE(moe_quantized_mm, p, a);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) { m.impl("moe_quantized_mm", TORCH_BOX(&moe_quantized_mm)); }

}  // namespace fmkernels
