// SPDX-License-Identifier: Apache-2.0
// block_sparse.cu: dsd, out = activation(scale * (op(S) dense) + bias), one row of blocks and one tile of columns a block.
//
// Contract   see block_sparse.h. Half elements. Any sizes and strides; where operands are not of whole 16-byte chunks on
//            16-byte boundaries another kernel copies them, chunk by chunk or dense element by element, which is slow.
// Work       grid: rows of blocks by their `order`, the longest first, of each the batches (where they share a list), of
//            each the tiles of columns. A block walks the list of its row, each entry in steps of 32 of its inner columns,
//            or, where blocks are of 16 x 16, two entries a step.
// Shared     union Smem, tile_cuda.h.         128 x 128: 64 KiB, 64 x 256: 80 KiB, 32 x 256: 72, 16 x 256: 68
// Pipeline   that of tile_cuda.h; the index and the position of the next entry come one entry ahead.
// Edges      Values of S past the edge of the matrix are zeroed on their way along the inner dimension; along its rows they
//            make sums that are not stored. An entry out of range is a stage of zeros.
// Numerics   float32 accumulation in the order of the list, one rounding. Deterministic.
// Cost       2 * block_rows * block_columns * columns flops a block, and its rows of dense once for each row of blocks.

#include "block_sparse_dsd_kernel_cuda.h"

namespace fmkernels {

void launch_block_sparse_dsd(const BlockSparseDsdParams& p, cudaStream_t stream) {
  if (p.block_scales != nullptr) launch_block_sparse_dsd_int8(p, stream);
  else launch_dsd<false>(p, stream);
}

}  // namespace fmkernels
