// SPDX-License-Identifier: Apache-2.0
// attention_backward_keys.cu: d_k and d_v; the queries of all heads of the group stream past. See attention_backward.cu.

#include "attention_backward_kernel_cuda.h"

namespace fmkernels {

void launch_attention_backward_keys(const AttentionBackwardCall& call, cudaStream_t stream) {
  dispatch_backward(call.b.forward, [&]<class Element, int kDim>() { launch_keys<Element, kDim>(call, stream); });
}

}  // namespace fmkernels
