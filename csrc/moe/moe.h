// SPDX-License-Identifier: Apache-2.0
// Mixture of experts: where the tokens go (the mapping), there (permute) and back (combine). Routing: moe_route.h.
//
//   slot      t * num_topk + k: the k-th choice of token t, of expert topk_idx[t, k]; -1 is none
//   mapping   the slots with an expert, counted and stably sorted by it: of one expert in the order of the slots. An expert's
//             rows begin at a multiple of `alignment`; rows that no slot has are padding.
//   permute   out[p] = x[pos_to_token[p]], zeros where that is -1
//   combine   out[t] = sum over k, in this order, of weights[t, k] * y[token_topk_to_pos[t, k]], entries of -1 left out
//   gradients of permute: combine without weights. Of combine: d y[p] = w d out[t] and d w = <d out[t], y[p]> where the
//             row p belongs to a slot of token t; both zero where there is none.
#pragma once

#include <cstdint>

#include "../common/divisor.h"
#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/stream.h"

namespace fmkernels {

constexpr int kMaxExperts = 1024;
constexpr int kMaxTopk = 1024;
constexpr int kMappingChunk = 2048;  // slots that a block counts and ranks on CUDA

constexpr int64_t mapping_chunks(int64_t num_slots) { return (num_slots + kMappingChunk - 1) / kMappingChunk; }

struct MoeMappingParams {
  const void* topk_idx;  // [tokens, topk]; int32, or int64 where `idx_is_long`
  bool idx_is_long;
  int64_t idx_stride;  // of a token
  int64_t num_slots, num_experts, alignment, num_rows;
  Divisor num_topk;
  int32_t* pos_to_token;       // [rows]
  int32_t* token_topk_to_pos;  // [tokens, topk]
  int32_t* expert_offsets;     // [2, experts]: where the expert's rows end, padding and all, and without it
  int32_t* counts;             // CUDA, more than one chunk: [experts + 1, chunks], the last row [experts] of totals
};

// Rows of one tensor.
struct MoeRows {
  void* data;
  int64_t stride;  // in elements
};

struct MoePermuteParams {
  DType dtype;
  int64_t num_tokens, num_rows, hidden;
  MoeRows x;  // [tokens, hidden]
  MoeRows y;  // [rows, hidden], written
  const int32_t* pos_to_token;
};

struct MoeCombineParams {
  DType dtype;
  int64_t num_tokens, num_topk, num_rows, hidden;
  MoeRows y;    // [rows, hidden]
  MoeRows out;  // [tokens, hidden], written
  const int32_t* token_topk_to_pos;
  const float* weights;  // [tokens, topk]; null: all are 1
  int64_t weights_stride;
};

struct MoeCombineBackwardParams {
  DType dtype;
  int64_t num_tokens, num_topk, num_rows, hidden;
  MoeRows grad;    // [tokens, hidden]
  MoeRows y;       // [rows, hidden]
  MoeRows grad_y;  // [rows, hidden], written
  const int32_t* pos_to_token;
  const int32_t* token_topk_to_pos;
  const float* weights;
  int64_t weights_stride;
  float* grad_weights;  // [tokens, topk], zeros before; written where a slot has a row
};

template <Isa isa>
void run_moe_mapping(const MoeMappingParams& p);
template <Isa isa>
void run_moe_permute(const MoePermuteParams& p);
template <Isa isa>
void run_moe_combine(const MoeCombineParams& p);
template <Isa isa>
void run_moe_combine_backward(const MoeCombineBackwardParams& p);

void launch_moe_mapping(const MoeMappingParams& p, cudaStream_t stream);
void launch_moe_permute(const MoePermuteParams& p, cudaStream_t stream);
void launch_moe_combine(const MoeCombineParams& p, cudaStream_t stream);
void launch_moe_combine_backward(const MoeCombineBackwardParams& p, cudaStream_t stream);

}  // namespace fmkernels
