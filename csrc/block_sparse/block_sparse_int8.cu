// SPDX-License-Identifier: Apache-2.0
// block_sparse_int8.cu: dsd of values in bytes with a float32 scale for each block.
//
// Contract   see block_sparse.h. A value is q * scale in float32, rounded to the dtype of dense.
// Work       that of block_sparse.cu, with its tiles.
// Shared     the same: a chunk of 8 values is copied to the first half of the 16 bytes that it becomes.
// Pipeline   the same, one stage shorter: who copied a chunk converts it in its place, a stage before it is multiplied.
// Edges      Zeros where nothing is, whatever the scale; but in a block whose scale is NaN everything is NaN.
// Numerics   as block_sparse.cu. Deterministic.
// Cost       half the bytes of S; about 4 instructions a value, which a tile of columns reads once.

#include "block_sparse_dsd_kernel_cuda.h"

namespace fmkernels {

void launch_block_sparse_dsd_int8(const BlockSparseDsdParams& p, cudaStream_t stream) { launch_dsd<true>(p, stream); }

}  // namespace fmkernels
