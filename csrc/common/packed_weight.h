// SPDX-License-Identifier: Apache-2.0
// A weight that is stored as small integers, as the products read it: quantized_linear, and the experts of moe_quantized.
//
//   w[n, k] = scale[n, k / group_size] * (q[n, k] - zero[n, k / group_size])
//
// A product sums in chunks of kPackedChunk columns: integers times x within a chunk, then the chunk times its scale, chunk
// after chunk. The order depends on neither the number of rows nor the threads, so a row has the same bits in any batch.
#pragma once

#include <cstdint>

namespace fmkernels {

constexpr int kPackedPanel = 32;  // output features whose words lie side by side
constexpr int kPackedChunk = 32;  // columns that share a scale in any case, and that columns are padded to

// Drawn in docs/layouts.md. Everything is contiguous. Rows are padded to whole panels and columns to whole chunks; what
// stands in the padding reaches no output.
struct PackedWeight {
  const uint32_t* values;  // [panels, words of a row, kPackedPanel]: a word is 4 columns (bits = 8) or 8 (bits = 4)
  const float* scales;     // [panels, groups, kPackedPanel]
  const uint8_t* zeros;    // [panels, groups, kPackedPanel], of bits = 4: the lower 4 bits of each; null: 8
  int bits;                // 8: signed bytes; 4: nibbles from 0 to 15
  int64_t out_features, in_features;
  int64_t num_chunks, num_groups, chunks_per_group;

  constexpr int64_t num_panels() const { return (out_features + kPackedPanel - 1) / kPackedPanel; }
  constexpr int64_t words_per_chunk() const { return int64_t{kPackedPanel} * kPackedChunk * bits / 32; }  // of a panel
};

}  // namespace fmkernels
