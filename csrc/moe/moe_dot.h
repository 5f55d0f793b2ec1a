// SPDX-License-Identifier: Apache-2.0
// Rows times columns of bfloat16 where both lie along the inner dimension, by the processor's own dot product.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace fmkernels {

constexpr int64_t kDotRows = 6;     // that are multiplied together
constexpr int64_t kDotColumns = 4;  // likewise

struct MoeDotParams {
  const BFloat16* const* rows;  // [num_rows], of `inner` elements each
  int64_t num_rows;             // 1 to kDotRows
  const BFloat16* const* columns;
  int64_t num_columns;           // a multiple of kDotColumns
  int64_t inner;                 // > 0
  float* sums;                   // [num_rows][stride], written
  int64_t stride;                // a multiple of kDotColumns
  const BFloat16* const* ahead;  // [num_columns]: what is read next; null: not known
};

// `from`, whose columns are contiguous in a row, as columns of which each lies along the inner dimension.
struct MoeDotColumnsParams {
  const BFloat16* from;
  int64_t row_stride, num_columns, inner;  // > 0
  BFloat16* to;                            // [num_columns][stride], written up to a multiple of kDotPacked
  int64_t stride;                          // such a multiple
};
constexpr int64_t kDotPacked = 32;

// The same sums as MoeDotParams has, of few rows and of columns that are contiguous in a row: each is read where it lies.
constexpr int64_t kDotFewRows = 2;
constexpr int64_t kDotFewColumns = 256;
constexpr int64_t kDotLanes = 16;
struct MoeDotFewParams {
  const BFloat16* const* rows;  // [num_rows]
  int64_t num_rows;             // 1 to kDotFewRows
  const BFloat16* from;
  int64_t row_stride, num_columns;  // 1 to kDotFewColumns
  int64_t inner;                    // > 0
  float* sums;                      // [num_rows][stride], written up to a multiple of 16
  int64_t stride;
  float* lanes;  // [kDotLanes][num_rows][kDotFewColumns], 64-byte aligned
};

// An element of `sums` depends on its row and its column, and nothing else.
template <Isa isa>
void run_moe_dot(const MoeDotParams& p);
template <Isa isa>
void run_moe_dot_few(const MoeDotFewParams& p);
template <Isa isa>
void run_moe_dot_columns(const MoeDotColumnsParams& p);

}  // namespace fmkernels
