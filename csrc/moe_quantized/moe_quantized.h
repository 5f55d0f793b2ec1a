// SPDX-License-Identifier: Apache-2.0
// Products by groups of rows, which are those of the experts, with weights that are stored as small integers.
//
//   out[r, n] = bias[g, n] + sum_k a[r, k] w[g N + n, k] for the rows r of group g; rows of no group are zeros
//
// The matrices [N, K] of the groups stand one below another in one packed weight (common/packed_weight.h), each of whole
// panels. Group g has the rows from where g - 1 ends to offsets[g], as in moe/moe_grouped.h. A row depends on its own row of
// a, its group's matrix and bias, and nothing else: neither on which rows are its neighbours nor on how many they are.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/packed_weight.h"
#include "../common/stream.h"

namespace fmkernels {

struct MoeQuantizedParams {
  PackedWeight weight;  // out_features: num_groups * columns
  DType dtype;          // of a and out
  const void* a;        // [num_rows, in_features], contiguous columns
  int64_t num_rows, a_stride;
  const float* bias;       // [num_groups, columns], contiguous; null: none
  void* out;               // [num_rows, columns], contiguous, written
  const int32_t* offsets;  // [num_groups]
  int64_t num_groups, columns;

  constexpr int64_t panels_of_group() const { return columns / kPackedPanel; }
};

// On the CPU offsets are checked before. On CUDA they are in device memory: a group ends at the largest offset up to its own,
// and at the last row at most.
template <Isa isa>
void run_moe_quantized_mm(const MoeQuantizedParams& p);

void launch_moe_quantized_mm(const MoeQuantizedParams& p, cudaStream_t stream);

}  // namespace fmkernels
