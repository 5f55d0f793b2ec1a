// SPDX-License-Identifier: Apache-2.0
// block_sparse.h: products of a block-sparse matrix and a dense one.
//
// S is a matrix of which only some blocks of block_rows x block_columns elements are stored: values [num_blocks,
// block_rows, block_columns]. The blocks of a row of blocks are a list (compressed rows), as are those of a column, which
// is how the transpose is read without moving a value.
//
//   dsd    out[i, n] = activation(scale[i] * sum_k op(S)[i, k] dense[k, n] + bias[i]),  op(S) = S or its transpose;
//          out may be written transposed: with dense transposed too, that is the product dense x op(S)^T ("dds")
//   sdd    S[i, j] = activation(scale[j] * sum_k a[i, k] b[k, j] + bias[j]) in the blocks of a topology, zeros past its edge
//
// The set is closed under differentiation: the gradient of a product by S is an sdd, by the dense operand a dsd.
// A block has 16, 32, 64 or 128 rows, and columns. Sizes need not be multiples of it: what a block holds past the edge of the matrix is not read by dsd.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/dense_view.h"
#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/stream.h"

namespace fmkernels {

enum class Activation : int { kNone, kRelu, kGelu, kSilu };  // gelu by erf

// What becomes of a sum, by the row of op(S) (dsd) or the column of S (sdd) that it belongs to. Null: none.
struct Epilogue {
  const float *scale, *bias;
  Activation activation;
};

struct BlockSparseDsdParams {
  DType dtype;
  const void* values;  // [num_blocks, block_rows, block_columns] of S, contiguous, on a 16-byte boundary
  const float*
      block_scales;  // [num_blocks]: values are int8_t, times the scale of their block; null: they are of dtype
  int block_rows, block_columns;
  bool transposed;  // op(S) is the transpose of S
  // The blocks of row r of blocks of op(S), in batch b, where all batches have one list or each its own: list entries
  // offsets[e] .. offsets[e + 1] - 1 for e = b * (block_rows_of_out + 1) + r, or without b.
  const int32_t* offsets;
  const int32_t* indices;    // of an entry: its column of blocks of op(S), ascending
  const int32_t* positions;  // of an entry: where it stands in values; null: as in the list
  const int32_t* order;      // the rows of blocks of op(S) of all lists, longest first: list * rows of blocks + row
  int64_t num_blocks, num_entries;
  int64_t num_lists;                    // 1 or batch
  int64_t batch, rows, inner, columns;  // op(S) [rows, inner], dense [inner, columns]
  DenseView dense;
  DenseView out;  // contiguous [batch, rows, columns], or [batch, columns, rows] as a view
  Epilogue epilogue;

  int tile_rows() const { return transposed ? block_columns : block_rows; }  // of a block of op(S)
  int tile_inner() const { return transposed ? block_rows : block_columns; }
  int64_t num_block_rows() const { return (rows + tile_rows() - 1) / tile_rows(); }
  int64_t num_block_columns() const { return (inner + tile_inner() - 1) / tile_inner(); }
};

struct BlockSparseSddParams {
  DType dtype;
  DenseView a, b;  // [batch, rows, inner], [batch, inner, columns]
  int64_t batch, rows, inner, columns;
  int block_rows, block_columns;
  const int32_t* row_indices;     // [num_blocks]: batch * rows of blocks + row of blocks; -1: no block, zeros
  const int32_t* column_indices;  // [num_blocks]
  int64_t num_blocks;
  void* values;  // [num_blocks, block_rows, block_columns], contiguous
  Epilogue epilogue;

  int64_t num_block_rows() const { return (rows + block_rows - 1) / block_rows; }
  int64_t num_block_columns() const { return (columns + block_columns - 1) / block_columns; }
};

// On CUDA indices are in device memory: entries out of range are skipped by the kernels, and blocks out of range are zeros.
template <Isa>
void run_block_sparse_dsd(const BlockSparseDsdParams& params);
template <Isa>
void run_block_sparse_sdd(const BlockSparseSddParams& params);

void launch_block_sparse_dsd(const BlockSparseDsdParams& params, cudaStream_t stream);
void launch_block_sparse_dsd_int8(const BlockSparseDsdParams& params, cudaStream_t stream);  // with block_scales
void launch_block_sparse_sdd(const BlockSparseSddParams& params, cudaStream_t stream);

}  // namespace fmkernels
