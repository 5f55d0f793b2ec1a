// SPDX-License-Identifier: Apache-2.0
// What the files of the CUDA runtime share. The functions themselves are declared by CUDA's own header.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace emulator {

// The status of a call: what cudaGetLastError() of this thread returns next, unless it is a success.
cudaError_t set_error(cudaError_t status);
// The last error of this thread; `clear` as cudaGetLastError does.
cudaError_t last_error(bool clear);

// Whether kernels may touch all these bytes.
bool is_device_memory(const void* begin, uint64_t num_bytes);
// Copies after checking that the device's side of a copy is memory of the device.
cudaError_t copy(void* to, const void* from, uint64_t num_bytes, cudaMemcpyKind kind);

}  // namespace emulator
