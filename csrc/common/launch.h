// SPDX-License-Identifier: Apache-2.0
// launch(kernel, ...): the one place where a kernel is started and its launch checked.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "check.h"

namespace fmkernels {

constexpr int kDefaultSharedBytes = 48 * 1024;  // more must be opted in to, per kernel

#ifdef __CUDACC__
// The shared memory that a block was launched with, as one struct.
template <class Smem>
__device__ __forceinline__ Smem& dynamic_smem() {
  extern __shared__ __align__(128) unsigned char dynamic_smem_bytes[];
  return *reinterpret_cast<Smem*>(dynamic_smem_bytes);
}
#endif

inline void check_cuda(const char* name, cudaError_t status) {
  FM_CHECK(status == cudaSuccess, name, ": ", cudaGetErrorString(status));
}

// Blocks in x that cover num_items.
inline dim3 grid_of(const char* name, int64_t num_items, int64_t items_per_block) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  const int64_t num_blocks = (num_items + items_per_block - 1) / items_per_block;
  FM_CHECK(num_blocks <= kMaxBlocks, name, ": ", num_blocks, " blocks are more than a grid holds");
  return dim3(static_cast<unsigned>(num_blocks));
}

template <class Params>
void launch(const char* name, void (*kernel)(Params), dim3 grid, dim3 block, int smem_bytes, cudaStream_t stream,
            const Params& params) {
  cudaError_t status = cudaSuccess;
  if (smem_bytes > kDefaultSharedBytes) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
    FM_CHECK(status == cudaSuccess, name, ": this GPU cannot give a block ", smem_bytes, " bytes of shared memory (",
             cudaGetErrorString(status), ")");
  }
  void* arguments[] = {const_cast<Params*>(&params)};  // copied by the launch
  // Not <<<>>> and cudaGetLastError: that would also report what an earlier call of this thread has left behind.
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.stream = stream;
  status = cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
  FM_CHECK(status == cudaSuccess, name, ": the launch of ", grid.x, " x ", grid.y, " x ", grid.z, " blocks of ",
           block.x, " threads failed: ", cudaGetErrorString(status));
}

}  // namespace fmkernels
