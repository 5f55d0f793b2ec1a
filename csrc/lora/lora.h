// SPDX-License-Identifier: Apache-2.0
// Low-rank adapters of many requests in one batch: every token names the adapter that is added to its layer, or none.
//
//   shrink   h[t, r] = sum_k x[t, k] a[idx[t], r, k]
//   expand   y[t, n] = base[t, n] + scale[idx[t]] sum_r h[t, r] b[idx[t], n, r]
//
// A token without an adapter (idx = -1) has h = 0 and y = base, bit for bit, and reads no adapter. The sums of a token are
// formed in an order that depends on nothing but the sizes: it has the same bits in any batch.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/stream.h"

namespace fmkernels {

// Which adapter each token takes. The CPU kernels want idx from -1 to num_adapters - 1; on CUDA others count as -1.
struct Adapters {
  const int32_t* idx;
  int64_t idx_stride;
  int64_t num_tokens, num_adapters, rank;
};

struct LoraShrinkParams {
  Adapters adapters;
  DType dtype;  // of x and a
  int64_t in_features;
  const void* x;  // [num_tokens, in_features], columns contiguous
  int64_t x_stride;
  const void* a;  // [num_adapters, rank, in_features], columns contiguous
  int64_t a_stride[2];
  float* h;  // [num_tokens, rank], contiguous, written
};

struct LoraExpandParams {
  Adapters adapters;
  DType dtype;  // of base, b and y
  int64_t out_features;
  const void* base;  // [num_tokens, out_features], columns contiguous
  int64_t base_stride;
  const float* h;  // [num_tokens, rank], columns contiguous
  int64_t h_stride;
  const void* b;  // [num_adapters, out_features, rank], columns contiguous
  int64_t b_stride[2];
  const float* scale;  // [num_adapters], contiguous; null: 1
  void* y;             // [num_tokens, out_features], contiguous, written
};

constexpr int kMaxRank = 128;

template <Isa isa>
void run_lora_shrink(const LoraShrinkParams& p);
template <Isa isa>
void run_lora_expand(const LoraExpandParams& p);

void launch_lora_shrink(const LoraShrinkParams& p, cudaStream_t stream);
void launch_lora_expand(const LoraExpandParams& p, cudaStream_t stream);

}  // namespace fmkernels
