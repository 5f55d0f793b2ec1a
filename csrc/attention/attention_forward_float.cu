// SPDX-License-Identifier: Apache-2.0
// attention_forward_float.cu: the kernel of attention_forward.cu for float32. See there.

#include "attention_forward_kernel_cuda.h"

namespace fmkernels {

void launch_attention_forward_float(const AttentionForwardCall& call, cudaStream_t stream) {
  launch_forward<float, 64, 128, 256>(call, stream);
}

}  // namespace fmkernels
