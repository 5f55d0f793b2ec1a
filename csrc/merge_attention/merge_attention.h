// SPDX-License-Identifier: Apache-2.0
// Merges the results of attention over two disjoint sets of keys, as if over their union.
//
//   lse   = log(exp(lse_a) + exp(lse_b)),  w_a = exp(lse_a - lse),  w_b = exp(lse_b - lse)
//   o     = w_a o_a + w_b o_b;  a side with lse = -inf has seen no key and is not read; both: o = 0, lse = -inf
//   d o_a = w_a do,  d lse_a = w_a (dlse + w_b <do, o_a - o_b>), and likewise for b
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/stream.h"

namespace fmkernels {

// o [batch, tokens, heads, dim] with dim contiguous, lse [batch, heads, tokens]; strides in elements. Packed tensors
// [tokens, heads, dim] and [heads, tokens] have a batch of 1. Data pointers may be null where nothing is read or
// written.
struct MergeSide {
  void* o;
  float* lse;
  int64_t o_stride[3];    // batch, token, head
  int64_t lse_stride[3];  // batch, token, head
};

struct MergeAttentionParams {
  DType dtype;
  int64_t batch, num_tokens, heads, dim;
  MergeSide a, b;
  MergeSide merged;  // written
};

struct MergeAttentionBackwardParams {
  DType dtype;
  int64_t batch, num_tokens, heads, dim;
  MergeSide a, b;
  MergeSide grad;            // of the merged side; its lse is null where no gradient flows into lse
  MergeSide grad_a, grad_b;  // written
};

template <Isa isa>
void run_merge_attention(const MergeAttentionParams& p);
template <Isa isa>
void run_merge_attention_backward(const MergeAttentionBackwardParams& p);

void launch_merge_attention(const MergeAttentionParams& p, cudaStream_t stream);
void launch_merge_attention_backward(const MergeAttentionBackwardParams& p, cudaStream_t stream);

}  // namespace fmkernels
