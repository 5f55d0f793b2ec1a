// SPDX-License-Identifier: Apache-2.0
// launch(kernel, ...): the one place where a kernel is started and its launch checked.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
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

// Lets a kernel have so many bytes of dynamic shared memory.
inline void opt_in(const char* name, const void* kernel, int smem_bytes) {
  if (smem_bytes <= kDefaultSharedBytes) return;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
  FM_CHECK(status == cudaSuccess, name, ": this GPU cannot give a block ", smem_bytes, " bytes of shared memory (",
           cudaGetErrorString(status), ")");
}

// Blocks of a kernel that the current GPU can have at one time, if it has no others.
template <class Params>
int64_t resident_blocks(const char* name, void (*kernel)(Params), int block_threads, int smem_bytes) {
  int device = 0, num_sms = 0, blocks_per_sm = 0;
  opt_in(name, reinterpret_cast<const void*>(kernel), smem_bytes);
  check_cuda(name, cudaGetDevice(&device));
  check_cuda(name, cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  check_cuda(name, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, block_threads,
                                                                 static_cast<size_t>(smem_bytes)));
  return int64_t{num_sms} * blocks_per_sm;
}

template <class Params>
void launch(const char* name, void (*kernel)(Params), dim3 grid, dim3 block, int smem_bytes, cudaStream_t stream,
            const Params& params) {
  opt_in(name, reinterpret_cast<const void*>(kernel), smem_bytes);
  void* arguments[] = {const_cast<Params*>(&params)};  // copied by the launch
  // Not <<<>>> and cudaGetLastError: that would also report what an earlier call of this thread has left behind.
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.stream = stream;
  const cudaError_t status = cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
  FM_CHECK(status == cudaSuccess, name, ": the launch of ", grid.x, " x ", grid.y, " x ", grid.z, " blocks of ",
           block.x, " threads failed: ", cudaGetErrorString(status));
}

// Starts a kernel whose blocks take `num_items` by turns: a block for each, or as many as are resident at one time.
template <class Params>
void launch_by_turns(const char* name, void (*kernel)(Params), int64_t num_items, int block_threads, int smem_bytes,
                     cudaStream_t stream, const Params& params) {
  const int64_t resident = resident_blocks(name, kernel, block_threads, smem_bytes);
  const int64_t blocks = std::min(num_items, std::max(resident, int64_t{1}));  // of none, the launch says why
  launch(name, kernel, grid_of(name, blocks, 1), dim3(static_cast<unsigned>(block_threads)), smem_bytes, stream,
         params);
}

}  // namespace fmkernels
