// SPDX-License-Identifier: Apache-2.0
// paged_kv_attend_float8.cu: the kernels of paged_kv_attend.cu for float8_e4m3fn caches; paged_kv_attend_stored_cuda.h tells
// how they read bytes. A file of its own, as are those for int8: a compiler takes its time over each.

#include "paged_kv_attend_kernel_cuda.h"

namespace fmkernels {

void launch_paged_kv_attend_float8(const PagedAttendCall& call, cudaStream_t stream) {
  dispatch_half(call.p.dtype, [&]<class Element>() { launch_stored<Element, Float8E4M3>(call, stream); });
}

}  // namespace fmkernels
