// SPDX-License-Identifier: Apache-2.0
// attention_backward_queries.cu: d_q; the keys stream past. See attention_backward.cu.

#include "attention_backward_kernel_cuda.h"

namespace fmkernels {

void launch_attention_backward_queries(const AttentionBackwardCall& call, cudaStream_t stream) {
  dispatch_backward(call.b.forward,
                    [&]<class Element, int kDim>() { launch_pass<Traits<Element, kDim, Pass::kQuery>>(call, stream); });
}

}  // namespace fmkernels
