// SPDX-License-Identifier: Apache-2.0
// paged_kv_attend_quantized.cu: the kernels of paged_kv_attend.cu for int8 and float8_e4m3fn caches.
//
// Contract   paged_kv.h; head sizes are multiples of 16, whose rows of bytes begin on 16-byte boundaries.
// Stored     Bytes come to shared memory as they are, and become halves in registers, exactly, on their way to a fragment.
//            q k^T is multiplied in the dtype of q. Values are multiplied as bfloat16, which holds every weight times every
//            scale: of float16 a weight is the sum of two.
// Scales     Of keys they multiply scores, of values the weights or, where they are the same for all tokens, the result.

#include "paged_kv_attend_kernel_cuda.h"

namespace fmkernels {

void launch_paged_kv_attend_quantized(const PagedAttendCall& call, cudaStream_t stream) {
  dispatch_half(call.p.dtype, [&]<class Element>() {
    if (call.p.cache.dtype == CacheDType::kInt8) launch_stored<Element, Int8>(call, stream);
    else launch_stored<Element, Float8E4M3>(call, stream);
  });
}

}  // namespace fmkernels
