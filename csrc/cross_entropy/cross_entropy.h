// SPDX-License-Identifier: Apache-2.0
// Cross-entropy over a vocabulary, from logits x [batch, tokens, vocab]; with t the target of a row:
//
//   s     = softcap * tanh(x / softcap), or x where softcap is 0
//   lse   = log(sum exp(s)) = max + log(sum_exp), kept apart: exp(s - lse) would round what exp(s - max) / sum_exp does not
//   loss  = lse - (1 - label_smoothing) s_t - label_smoothing * mean(s) + z_loss * lse^2
//   d x   = grad_loss * ((1 + 2 z_loss lse) exp(s - lse) - label_smoothing / vocab - (1 - label_smoothing) [v = t])
//           * (1 - (s / softcap)^2)
//
// A row whose target is ignore_index, or no class, is not read; its loss and its gradient are 0.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/stream.h"

namespace fmkernels {

// Strides in elements, of batch and token; vocab is contiguous. [tokens, vocab] has a batch of 1.
struct CrossEntropyParams {
  DType dtype;
  int64_t batch, num_tokens, vocab;
  const void* logits;
  int64_t logits_stride[2];
  const int64_t* target;
  int64_t target_stride[2];
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap;
  float *loss, *max, *sum_exp;  // [batch, tokens]; written by cross_entropy, the last two read by its backward
  const float* grad_loss;       // of the two passes that give gradients
  int64_t grad_loss_stride[2];
  void* grad;  // likewise
  int64_t grad_stride[2];
};

// What is subtracted before s are summed for their mean; 0 where the distance to it would overflow the sum by itself.
FM_HOST_DEVICE float bounded_anchor(float s) { return s < 0x1p90f && s > -0x1p90f ? s : 0.0f; }

template <Isa isa>
void run_cross_entropy(const CrossEntropyParams& p);
template <Isa isa>
void run_cross_entropy_backward(const CrossEntropyParams& p);
// Both at once, without max and sum_exp; grad may be the logits.
template <Isa isa>
void run_cross_entropy_gradient(const CrossEntropyParams& p);

void launch_cross_entropy(const CrossEntropyParams& p, cudaStream_t stream);
void launch_cross_entropy_backward(const CrossEntropyParams& p, cudaStream_t stream);
void launch_cross_entropy_gradient(const CrossEntropyParams& p, cudaStream_t stream);

}  // namespace fmkernels
