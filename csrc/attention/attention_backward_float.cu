// SPDX-License-Identifier: Apache-2.0
// attention_backward_float.cu: d_q, d_k and d_v of float32. See attention_backward.cu.

#include "attention_backward_kernel_cuda.h"

namespace fmkernels {

void launch_attention_backward_float(const AttentionBackwardCall& call, cudaStream_t stream) {
  dispatch_backward_float(call.b.forward, [&]<class Element, int kDim>() {
    launch_keys<Element, kDim>(call, stream);
    launch_pass<Traits<Element, kDim, Pass::kQuery>>(call, stream);
  });
}

}  // namespace fmkernels
