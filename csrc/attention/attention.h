// SPDX-License-Identifier: Apache-2.0
// Fused attention: o = softmax(scores) v without the score matrix in memory.
//
//   score(i, j) = softcap_or_identity(softmax_scale * <q_i, k_j>) + bias(i, j) - alibi_slope * |i + seq_k - seq_q - j|
//   visible     : i + shift - window_left <= j <= i + shift + window_right,  shift = seq_k - seq_q  (bottom-right)
//   lse(i)      = log(sum over visible j of exp(score(i, j)) + exp(sink)),  -inf where nothing is visible
//   o(i)        = sum over visible j of exp(score(i, j) - lse(i)) v_j,      0 where nothing is visible
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace fmkernels {

// A tensor [batch, tokens, heads, dim], dim contiguous; packed sequences are [total_tokens, heads, dim] with a batch
// stride of 0. Strides are in elements.
struct TokenView {
  void* data;
  int64_t batch_stride, token_stride, head_stride;
};

struct AttentionForwardParams {
  DType dtype;
  TokenView q, k, v, o;  // head_dim, head_dim, v_head_dim, v_head_dim wide
  float* lse;            // [batch, heads, seq_q] or [heads, total_q], last dimension contiguous
  int64_t lse_batch_stride, lse_head_stride;

  int64_t batch, heads, kv_heads, seq_q, seq_k;  // seq_q, seq_k: the longest, where cu_seqlens are given
  int64_t head_dim, v_head_dim;                  // multiples of 8, at most 256
  const int32_t* cu_seqlens_q;                   // [batch + 1] or null
  const int32_t* cu_seqlens_k;                   // [batch + 1] or null, together with cu_seqlens_q

  float softmax_scale, softcap;       // softcap 0: none
  int64_t window_left, window_right;  // -1: unlimited; causal is window_right = 0
  DType bias_dtype;                   // float32 or dtype
  const void* bias;                   // null: none
  int64_t bias_stride[4];             // [batch, heads, seq_q, seq_k]; 0 in a broadcast dimension
  const float* alibi_slopes;          // [heads] or [batch, heads]; null: none
  int64_t alibi_batch_stride;
  const float* sinks;  // [heads]; null: none
};

template <Isa isa>
void run_attention_forward(const AttentionForwardParams& p);

}  // namespace fmkernels
