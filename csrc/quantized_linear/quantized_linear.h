// SPDX-License-Identifier: Apache-2.0
// Linear layers whose weight is stored as small integers, and the weight as numbers again.
//
//   w[n, k] = scale[n, k / group_size] * (q[n, k] - zero[n, k / group_size])
//   y[m, n] = bias[n] + sum_k x[m, k] w[n, k]
//
// The sum is formed in chunks of kChunk columns: integers times x within a chunk, then the chunk times its scale, chunk
// after chunk. The order depends on neither the number of rows nor the threads, so a row has the same bits in any batch.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/stream.h"

namespace fmkernels {

constexpr int kPanel = 32;  // output features whose words lie side by side
constexpr int kChunk = 32;  // columns that share a scale in any case, and that columns are padded to

// The weight; drawn in docs/layouts.md. Everything is contiguous. Rows are padded to whole panels and columns to whole
// chunks; what stands in the padding reaches no output.
struct PackedWeight {
  const uint32_t* values;  // [panels, words of a row, kPanel]: a word is 4 columns (bits = 8) or 8 (bits = 4)
  const float* scales;     // [panels, groups, kPanel]
  const uint8_t* zeros;    // [panels, groups, kPanel], of bits = 4: the lower 4 bits of each; null: 8
  int bits;                // 8: signed bytes; 4: nibbles from 0 to 15
  int64_t out_features, in_features;
  int64_t num_chunks, num_groups, chunks_per_group;

  constexpr int64_t num_panels() const { return (out_features + kPanel - 1) / kPanel; }
  constexpr int64_t words_per_chunk() const { return int64_t{kPanel} * kChunk * bits / 32; }  // of a panel
};

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
