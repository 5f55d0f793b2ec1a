// SPDX-License-Identifier: Apache-2.0
// quantized_linear_forward, quantized_linear_dequantize: tensors in, checks, Params out.
#include <vector>

#include "../common/tensor.h"
#include "quantized_linear.h"

namespace fmkernels {
namespace {

PackedWeight view_weight(const Tensor& values, const Tensor& scales, const std::optional<Tensor>& zeros, int64_t bits,
                         int64_t group_size, int64_t out_features, int64_t in_features) {
  FM_CHECK(bits == 8 || bits == 4, "bits must be 8 or 4, got ", bits);
  FM_CHECK(group_size == 0 || group_size == 32 || group_size == 64 || group_size == 128,
           "group_size must be 0, 32, 64 or 128, got ", group_size);
  FM_CHECK(out_features >= 1 && out_features < int64_t{1} << 31, "out_features must be from 1 to 2^31 - 1, got ",
           out_features);
  FM_CHECK(in_features >= 1 && in_features < int64_t{1} << 31, "in_features must be from 1 to 2^31 - 1, got ",
           in_features);
  FM_CHECK(!zeros.has_value() || bits == 4, "zeros are of bits = 4 alone");
  PackedWeight w{};
  w.bits = static_cast<int>(bits);
  w.out_features = out_features;
  w.in_features = in_features;
  w.num_chunks = (in_features + kChunk - 1) / kChunk;
  w.chunks_per_group = group_size == 0 ? w.num_chunks : group_size / kChunk;
  w.num_groups = (w.num_chunks + w.chunks_per_group - 1) / w.chunks_per_group;
  auto check = [&](const char* name, const Tensor& t, ScalarType type, const char* type_name, int64_t per_row) {
    check_scalar_type(name, t, type, type_name);
    check_same_device(name, t, values);
    check_rank(name, t, 3);
    check_size(name, t, 0, w.num_panels());
    check_size(name, t, 1, per_row);
    check_size(name, t, 2, kPanel);
    FM_CHECK(t.is_contiguous(), name, " must be contiguous");
    const void* data = data_of(t);
    FM_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0 || t.element_size() == 1, name,
             " must begin on a 16-byte boundary");
    return data;
  };
  w.values = static_cast<const uint32_t*>(
      check("values", values, ScalarType::Int, "int32", w.num_chunks * (w.words_per_chunk() / kPanel)));
  w.scales = static_cast<const float*>(check("scales", scales, ScalarType::Float, "float32", w.num_groups));
  if (zeros.has_value()) {
    w.zeros = static_cast<const uint8_t*>(check("zeros", *zeros, ScalarType::Byte, "uint8", w.num_groups));
    FM_CHECK(reinterpret_cast<uintptr_t>(w.zeros) % 4 == 0, "zeros must begin on a 4-byte boundary");
  }
  return w;
}

Tensor quantized_linear_forward(const Tensor& x, const Tensor& values, const Tensor& scales,
                                const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias, int64_t bits,
                                int64_t group_size, int64_t out_features, int64_t in_features) {
  FM_CHECK(x.dim() >= 1 && x.dim() <= 3, "x must have 1 to 3 dimensions, got ", x.dim());
  const int64_t last = x.dim() - 1;
  QuantizedLinearParams p{};
  p.dtype = dtype_of("x", x);
  check_size("x", x, last, in_features);
  p.weight = view_weight(values, scales, zeros, bits, group_size, out_features, in_features);
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
  p.weight = view_weight(values, scales, zeros, bits, group_size, out_features, in_features);
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
