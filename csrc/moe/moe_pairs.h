// SPDX-License-Identifier: Apache-2.0
// The sum over rows of the products of bfloat16 in them, by the processor's own dot product of pairs.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace fmkernels {

constexpr int64_t kPairChunk = 256;   // rows that are packed together
constexpr int64_t kPairLeft = 120;    // columns of a likewise
constexpr int64_t kPairColumns = 32;  // columns of b likewise

// out[i][j] = the sum of a[r][i] b[r][j] over `rows` rows.
struct MoePairsParams {
  const BFloat16 *a, *b;
  int64_t a_stride, b_stride;  // of a row
  int64_t rows;                // > 0
  int64_t a_columns;           // 1 to kPairLeft
  int64_t b_columns;           // > 0
  BFloat16* out;
  int64_t out_stride;
  uint32_t* left;   // [kPairChunk / 2][kPairLeft]
  uint32_t* panel;  // [kPairChunk / 2][kPairColumns], 64-byte aligned as `left` and `sums`
  float* sums;      // [kPairLeft][b_columns, rounded up to kPairColumns]; not used for kPairChunk rows and fewer
};

template <Isa isa>
void run_moe_pairs(const MoePairsParams& p);

}  // namespace fmkernels
