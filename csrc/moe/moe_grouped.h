// SPDX-License-Identifier: Apache-2.0
// Products by groups of rows, which are those of the experts: group g has the rows from where g - 1 ends to offsets[g].
//
//   mm         out[r] = a[r] b[g] + bias[g] for the rows r of group g; rows of no group are zeros
//   mm_inner   out[g] = the sum of a[r]^T b[r] over the rows of g, in their order; zeros where it has none
//   sum        out[g] = the sum of x[r] over them
//
// The set is closed under differentiation. A row of mm depends on its own row of a, its group's b and bias, and nothing else:
// neither on which rows are its neighbours nor on how many they are.
#pragma once

#include <cstdint>

#include "../common/dense_view.h"
#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/stream.h"

namespace fmkernels {

struct MoeGroupedMmParams {
  DType dtype;
  DenseView a;        // [rows, inner], row-major
  DenseView b;        // [groups, inner, columns]
  DenseView out;      // [rows, columns], contiguous, written
  const float* bias;  // [groups, columns], contiguous; null: none
  const int32_t* offsets;
  int64_t num_groups;
};

struct MoeGroupedMmInnerParams {
  DType dtype;
  DenseView a, b;  // [rows, a columns], [rows, b columns], row-major
  DenseView out;   // [groups, a columns, b columns], contiguous, written
  const int32_t* offsets;
  int64_t num_groups;
};

struct MoeGroupedSumParams {
  DType dtype;
  DenseView x;  // [rows, columns], row-major
  float* out;   // [groups, columns], contiguous, written
  const int32_t* offsets;
  int64_t num_groups;
};

// On the CPU offsets are checked before. On CUDA they are in device memory: a group ends at the largest offset up to its own,
// and at the last row at most.
template <Isa isa>
void run_moe_grouped_mm(const MoeGroupedMmParams& p);
template <Isa isa>
void run_moe_grouped_mm_inner(const MoeGroupedMmInnerParams& p);
template <Isa isa>
void run_moe_grouped_sum(const MoeGroupedSumParams& p);

void launch_moe_grouped_mm(const MoeGroupedMmParams& p, cudaStream_t stream);
void launch_moe_grouped_mm_inner(const MoeGroupedMmInnerParams& p, cudaStream_t stream);
void launch_moe_grouped_sum(const MoeGroupedSumParams& p, cudaStream_t stream);

}  // namespace fmkernels
