// SPDX-License-Identifier: Apache-2.0
// cudaStream_t, for headers that are read with and without CUDA's.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#else
struct CUstream_st;
typedef struct CUstream_st* cudaStream_t;
#endif
