// SPDX-License-Identifier: Apache-2.0
// Linear layers whose weight is stored as small integers (common/packed_weight.h), and the weight as numbers again.
//
//   y[m, n] = bias[n] + sum_k x[m, k] w[n, k]
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/packed_weight.h"
#include "../common/stream.h"

namespace fmkernels {

struct QuantizedLinearParams {
  PackedWeight weight;
  DType dtype;  // of x and y
  const void* x;
  int64_t num_rows, rows_per_batch;
  int64_t x_stride[2];  // batch, row of it; columns are contiguous
  const void* bias;     // [out_features], or null
  DType bias_dtype;     // dtype or float32
  void* y;              // [num_rows, out_features], contiguous, written
};

FM_HOST_DEVICE float bias_of(const QuantizedLinearParams& p, int64_t feature) {
  if (p.bias_dtype == DType::kFloat32) return static_cast<const float*>(p.bias)[feature];
  if (p.bias_dtype == DType::kFloat16) return to_float(static_cast<const Half*>(p.bias)[feature]);
  return to_float(static_cast<const BFloat16*>(p.bias)[feature]);
}

struct DequantizeParams {
  PackedWeight weight;
  DType dtype;
  void* w;  // [out_features, in_features], contiguous, written
};

template <Isa isa>
void run_quantized_linear(const QuantizedLinearParams& p);
template <Isa isa>
void run_quantized_linear_dequantize(const DequantizeParams& p);

void launch_quantized_linear(const QuantizedLinearParams& p, cudaStream_t stream);
void launch_quantized_linear_dequantize(const DequantizeParams& p, cudaStream_t stream);

}  // namespace fmkernels
