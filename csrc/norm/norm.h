// SPDX-License-Identifier: Apache-2.0
// RMSNorm and LayerNorm over the last dimension, of x or of x + residual.
//
//   s     = x + residual, rounded to the dtype of x: what a separate addition would have stored
//   mean  = sum(s) / n for LayerNorm, 0 for RMSNorm;  rstd = 1 / sqrt(sum((s - mean)^2) / n + eps)
//   y     = (s - mean) * rstd * weight + bias
//   ds    = rstd * (g - mean(g) - h * mean(g * h)) + the gradient that flows into s itself, with g = dy * weight and
//           h = (s - mean) * rstd; without mean(g) for RMSNorm. It is the gradient of x and of residual.
//   dweight = sum over the rows of dy * h,  dbias = sum over the rows of dy: the rows of a chunk first, then the chunks,
//           both in their order
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/rows.h"
#include "../common/stream.h"

namespace fmkernels {

struct NormForwardParams {
  DType dtype, weight_dtype;  // that of the weights is float32 or dtype
  Rows rows;
  int64_t hidden;
  float eps;
  bool is_centred;            // LayerNorm
  RowView x, residual;        // no residual: null, and so is summed
  const void *weight, *bias;  // [hidden] or null
  RowView y, summed;          // written; either may be x or residual
};

struct NormBackwardParams {
  DType dtype, weight_dtype;
  Rows rows;
  int64_t hidden;
  float eps;
  bool is_centred;
  RowView summed, grad_y, grad_summed;  // the last is null where no gradient flows into s itself
  const void* weight;                   // [hidden] or null
  RowView grad_x;                       // written
  void *grad_weight, *grad_bias;        // written; [hidden] of weight_dtype, or null where they are not wanted
  float *weight_sums, *bias_sums;       // written; [num_chunks, sums_stride] or null, as grad_weight and grad_bias
  int64_t sums_stride;                  // hidden, rounded up to kSumsBlock
  int64_t rows_per_chunk, num_chunks;
};

constexpr int64_t kSumsBlock = 256;  // columns among which a kernel may choose the order of its sums

// Chunks depend on the sizes alone, and so do the bits of dweight and dbias. More of them where rows are short.
constexpr int64_t rows_per_chunk_of(int64_t num_rows, int64_t hidden) {
  constexpr int64_t kMinRows = 16, kMinChunks = 256, kMaxChunks = 4096, kSums = 1 << 20;
  const int64_t by_memory = kSums / hidden, above = by_memory > kMinChunks ? by_memory : kMinChunks;
  const int64_t num_chunks = above < kMaxChunks ? above : kMaxChunks, rows = (num_rows + num_chunks - 1) / num_chunks;
  return rows > kMinRows ? rows : kMinRows;
}

template <Isa isa>
void run_norm_forward(const NormForwardParams& p);
template <Isa isa>
void run_norm_backward(const NormBackwardParams& p);

void launch_norm_forward(const NormForwardParams& p, cudaStream_t stream);
void launch_norm_backward(const NormBackwardParams& p, cudaStream_t stream);

}  // namespace fmkernels
