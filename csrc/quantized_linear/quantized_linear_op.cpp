// SPDX-License-Identifier: Apache-2.0
// quantized_linear_forward, quantized_linear_dequantize: tensors in, checks, Params out.
#include <vector>

#include "../common/packed_weight_view.h"
#include "quantized_linear.h"

namespace fmkernels {
namespace {

Tensor quantized_linear_forward(const Tensor& x, const Tensor& values, const Tensor& scales,
                                const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias, int64_t bits,
                                int64_t group_size, int64_t out_features, int64_t in_features) {
  FM_CHECK(x.dim() >= 1 && x.dim() <= 3, "x must have 1 to 3 dimensions, got ", x.dim());
  const int64_t last = x.dim() - 1;
  QuantizedLinearParams p{};
  p.dtype = dtype_of("x", x);
  check_size("x", x, last, in_features);
  p.weight = view_packed_weight(values, scales, zeros, bits, group_size, out_features, in_features);
  check_same_device("x", x, values);
  check_last_dim_contiguous("x", x);
  p.rows_per_batch = last >= 1 ? x.size(last - 1) : 1;
  p.num_rows = p.rows_per_batch * (last >= 2 ? x.size(0) : 1);
  if (last >= 1) p.x_stride[1] = stride_of(x, last - 1);
  if (last >= 2) p.x_stride[0] = stride_of(x, 0);
  p.x = data_of(x);
  if (bias.has_value()) {
    p.bias_dtype = dtype_of("bias", *bias);
    FM_CHECK(p.bias_dtype == p.dtype || p.bias_dtype == DType::kFloat32, "bias must be float32 or have the dtype of x");
    check_same_device("bias", *bias, values);
    check_rank("bias", *bias, 1);
    check_size("bias", *bias, 0, out_features);
    check_last_dim_contiguous("bias", *bias);
    p.bias = data_of(*bias);
  }
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = out_features;
  Tensor y = torch::stable::new_empty(x, shape);
  p.y = data_of(y);
  if (p.num_rows > 0) FM_EXECUTE(quantized_linear, p, x);
  return y;
}

Tensor quantized_linear_dequantize(const Tensor& values, const Tensor& scales, const std::optional<Tensor>& zeros,
                                   int64_t bits, int64_t group_size, int64_t out_features, int64_t in_features,
                                   ScalarType dtype) {
  DequantizeParams p{};
  p.weight = view_packed_weight(values, scales, zeros, bits, group_size, out_features, in_features);
  Tensor w = torch::stable::new_empty(values, {out_features, in_features}, dtype);
  p.dtype = dtype_of("dtype", w);
  p.w = data_of(w);
  FM_EXECUTE(quantized_linear_dequantize, p, values);
  return w;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) {
  m.impl("quantized_linear_forward", TORCH_BOX(&quantized_linear_forward));
  m.impl("quantized_linear_dequantize", TORCH_BOX(&quantized_linear_dequantize));
}

}  // namespace fmkernels
