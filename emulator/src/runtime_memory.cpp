// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime over host memory: allocations, copies, streams and events. A device pointer is the host address.
// Work on a stream is done when the call returns, so streams order trivially and events have always happened.

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "driver.h"
#include "memory.h"
#include "runtime.h"

struct CUstream_st {
  unsigned flags;
};
struct CUevent_st {
  bool recorded;
  std::chrono::steady_clock::time_point when;
};

namespace emulator {
namespace {

constexpr size_t kAlignment = 256;  // of cudaMalloc
constexpr size_t kPitch = 512;      // bytes
constexpr int kFresh = 0xff;        // new device memory: NaN as a float of any width, -1 as an integer
constexpr uint64_t kChunk = uint64_t{1} << 30;

struct Allocation {
  cudaMemoryType type;
  uint64_t num_bytes;
  bool owned;  // else cudaHostRegister'ed
};

// Allocations of this process by address; never destroyed, as programs free in their own destructors.
struct Allocations {
  std::mutex mutex;
  std::map<const void*, Allocation> by_address;
  uint64_t device_bytes = 0;
};
Allocations& allocations() {
  static auto* const all = new Allocations;
  return *all;
}

const char* name_of(cudaMemoryType type) {
  switch (type) {
    case cudaMemoryTypeDevice: return "cudaMalloc";
    case cudaMemoryTypeManaged: return "cudaMallocManaged";
    default: return "cudaMallocHost";
  }
}

cudaError_t allocate(void** pointer, size_t num_bytes, cudaMemoryType type) {
  if (pointer == nullptr) return set_error(cudaErrorInvalidValue);
  *pointer = nullptr;
  if (num_bytes == 0) return cudaSuccess;
  Allocations& all = allocations();
  const std::lock_guard lock(all.mutex);
  const bool on_device = type != cudaMemoryTypeHost;
  const uint64_t limit = Driver::instance().device().memory_bytes;
  if (num_bytes > limit || (on_device && num_bytes > limit - all.device_bytes)) {
    return set_error(cudaErrorMemoryAllocation);
  }
  void* const data = std::aligned_alloc(kAlignment, (num_bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (data == nullptr) return set_error(cudaErrorMemoryAllocation);
  std::memset(data, kFresh, num_bytes);
  all.by_address[data] = {type, num_bytes, true};
  if (on_device) all.device_bytes += num_bytes;
  device_memory().add(data, num_bytes, std::string(name_of(type)) + " of " + std::to_string(num_bytes) + " bytes");
  *pointer = data;
  return cudaSuccess;
}

cudaError_t release(const void* pointer, bool host, bool owned) {
  if (pointer == nullptr) return cudaSuccess;
  Allocations& all = allocations();
  const std::lock_guard lock(all.mutex);
  const auto found = all.by_address.find(pointer);
  if (found == all.by_address.end() || (found->second.type == cudaMemoryTypeHost) != host ||
      found->second.owned != owned) {
    return set_error(owned ? cudaErrorInvalidValue : cudaErrorHostMemoryNotRegistered);
  }
  device_memory().remove(pointer, found->second.num_bytes);
  if (!host) all.device_bytes -= found->second.num_bytes;
  if (owned) std::free(const_cast<void*>(pointer));
  all.by_address.erase(found);
  return cudaSuccess;
}

cudaError_t fill(void* to, int value, size_t num_bytes) {
  if (num_bytes == 0) return cudaSuccess;
  if (!is_device_memory(to, num_bytes)) return set_error(cudaErrorInvalidValue);
  std::memset(to, value, num_bytes);
  return cudaSuccess;
}

cudaError_t copy_symbol(const void* symbol, size_t offset, size_t num_bytes, void* to, const void* from) {
  uint64_t symbol_bytes = 0;
  auto* const data = static_cast<std::byte*>(Driver::instance().find_variable(symbol, &symbol_bytes));
  if (data == nullptr) return set_error(cudaErrorInvalidSymbol);
  if (offset > symbol_bytes || num_bytes > symbol_bytes - offset) return set_error(cudaErrorInvalidValue);
  std::memmove(to == nullptr ? data + offset : to, from == nullptr ? data + offset : from, num_bytes);
  return cudaSuccess;
}

}  // namespace

bool is_device_memory(const void* begin, uint64_t num_bytes) {
  auto address = reinterpret_cast<uint64_t>(begin);
  while (num_bytes > 0) {
    const auto part = static_cast<uint32_t>(num_bytes < kChunk ? num_bytes : kChunk);
    if (!device_memory().contains(address, part)) return false;
    address += part;
    num_bytes -= part;
  }
  return true;
}

cudaError_t copy(void* to, const void* from, uint64_t num_bytes, cudaMemcpyKind kind) {
  if (num_bytes == 0) return cudaSuccess;
  if (to == nullptr || from == nullptr) return set_error(cudaErrorInvalidValue);
  if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return set_error(cudaErrorInvalidMemcpyDirection);
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if ((to_device && !is_device_memory(to, num_bytes)) || (from_device && !is_device_memory(from, num_bytes))) {
    return set_error(cudaErrorInvalidValue);
  }
  std::memmove(to, from, num_bytes);
  return cudaSuccess;
}

}  // namespace emulator

using namespace emulator;

extern "C" {

// ---- Allocations ----------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** pointer, size_t num_bytes) { return allocate(pointer, num_bytes, cudaMemoryTypeDevice); }
cudaError_t cudaMallocAsync(void** pointer, size_t num_bytes, cudaStream_t) { return cudaMalloc(pointer, num_bytes); }
cudaError_t cudaMallocManaged(void** pointer, size_t num_bytes, unsigned) {
  return allocate(pointer, num_bytes, cudaMemoryTypeManaged);
}
cudaError_t cudaMallocHost(void** pointer, size_t num_bytes) {
  return allocate(pointer, num_bytes, cudaMemoryTypeHost);
}
cudaError_t cudaHostAlloc(void** pointer, size_t num_bytes, unsigned) { return cudaMallocHost(pointer, num_bytes); }
cudaError_t cudaMallocPitch(void** pointer, size_t* pitch, size_t width, size_t height) {
  if (pitch == nullptr) return set_error(cudaErrorInvalidValue);
  size_t num_bytes = 0;
  if (width > SIZE_MAX - kPitch || __builtin_mul_overflow((width + kPitch - 1) / kPitch * kPitch, height, &num_bytes)) {
    return set_error(cudaErrorMemoryAllocation);
  }
  *pitch = (width + kPitch - 1) / kPitch * kPitch;
  return cudaMalloc(pointer, num_bytes);
}
cudaError_t cudaFree(void* pointer) { return release(pointer, false, true); }
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }
cudaError_t cudaFreeHost(void* pointer) { return release(pointer, true, true); }

cudaError_t cudaHostRegister(void* pointer, size_t num_bytes, unsigned) {
  if (pointer == nullptr || num_bytes == 0) return set_error(cudaErrorInvalidValue);
  Allocations& all = allocations();
  const std::lock_guard lock(all.mutex);
  if (!all.by_address.emplace(pointer, Allocation{cudaMemoryTypeHost, num_bytes, false}).second) {
    return set_error(cudaErrorHostMemoryAlreadyRegistered);
  }
  device_memory().add(pointer, num_bytes, "cudaHostRegister of " + std::to_string(num_bytes) + " bytes");
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* pointer) { return release(pointer, true, false); }
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  if (!is_device_memory(host, 1)) return set_error(cudaErrorInvalidValue);
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  Allocations& all = allocations();
  const std::lock_guard lock(all.mutex);
  *total = Driver::instance().device().memory_bytes;
  *free = *total - all.device_bytes;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  if (attributes == nullptr) return set_error(cudaErrorInvalidValue);
  *attributes = {};
  attributes->type = is_device_memory(pointer, 1) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  Allocations& all = allocations();
  const std::lock_guard lock(all.mutex);
  if (const auto after = all.by_address.upper_bound(pointer); after != all.by_address.begin()) {
    const auto& [begin, allocation] = *std::prev(after);
    const auto offset = static_cast<const std::byte*>(pointer) - static_cast<const std::byte*>(begin);
    if (static_cast<uint64_t>(offset) < allocation.num_bytes) attributes->type = allocation.type;
  }
  attributes->hostPointer = attributes->type == cudaMemoryTypeDevice ? nullptr : const_cast<void*>(pointer);
  attributes->devicePointer = attributes->type == cudaMemoryTypeUnregistered ? nullptr : const_cast<void*>(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemPrefetchAsync(const void*, size_t, cudaMemLocation, unsigned, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaMemAdvise(const void*, size_t, cudaMemoryAdvise, cudaMemLocation) { return cudaSuccess; }

// ---- Copies ---------------------------------------------------------------------------------------------------------

cudaError_t cudaMemcpy(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind) {
  return copy(to, from, num_bytes, kind);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind, cudaStream_t) {
  return copy(to, from, num_bytes, kind);
}
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                         cudaMemcpyKind kind) {
  if (width > to_pitch || width > from_pitch) return set_error(cudaErrorInvalidPitchValue);
  for (size_t row = 0; row < height; ++row) {
    const cudaError_t status = copy(static_cast<std::byte*>(to) + row * to_pitch,
                                    static_cast<const std::byte*>(from) + row * from_pitch, width, kind);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy2D(to, to_pitch, from, from_pitch, width, height, kind);
}
cudaError_t cudaMemset(void* to, int value, size_t num_bytes) { return fill(to, value, num_bytes); }
cudaError_t cudaMemsetAsync(void* to, int value, size_t num_bytes, cudaStream_t) { return fill(to, value, num_bytes); }
cudaError_t cudaMemset2D(void* to, size_t pitch, int value, size_t width, size_t height) {
  if (width > pitch) return set_error(cudaErrorInvalidPitchValue);
  for (size_t row = 0; row < height; ++row) {
    const cudaError_t status = fill(static_cast<std::byte*>(to) + row * pitch, value, width);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t num_bytes, size_t offset, cudaMemcpyKind) {
  return copy_symbol(symbol, offset, num_bytes, nullptr, from);
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t num_bytes, size_t offset,
                                    cudaMemcpyKind, cudaStream_t) {
  return copy_symbol(symbol, offset, num_bytes, nullptr, from);
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t num_bytes, size_t offset, cudaMemcpyKind) {
  return copy_symbol(symbol, offset, num_bytes, to, nullptr);
}
cudaError_t cudaMemcpyFromSymbolAsync(void* to, const void* symbol, size_t num_bytes, size_t offset, cudaMemcpyKind,
                                      cudaStream_t) {
  return copy_symbol(symbol, offset, num_bytes, to, nullptr);
}
cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  uint64_t num_bytes = 0;
  *pointer = Driver::instance().find_variable(symbol, &num_bytes);
  return *pointer == nullptr ? set_error(cudaErrorInvalidSymbol) : cudaSuccess;
}
cudaError_t cudaGetSymbolSize(size_t* size, const void* symbol) {
  uint64_t num_bytes = 0;
  if (Driver::instance().find_variable(symbol, &num_bytes) == nullptr) return set_error(cudaErrorInvalidSymbol);
  *size = num_bytes;
  return cudaSuccess;
}

// ---- Streams and events ---------------------------------------------------------------------------------------------

// A handle that stands for a stream of the system and points at nothing.
static bool is_built_in(cudaStream_t stream) {
  return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
}
// There is one priority, 0, to which all others are clamped.
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  if (stream == nullptr) return set_error(cudaErrorInvalidValue);
  *stream = new CUstream_st{flags};
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (is_built_in(stream)) return set_error(cudaErrorInvalidResourceHandle);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  *flags = is_built_in(stream) ? 0 : stream->flags;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  return set_error(cudaErrorStreamCaptureUnsupported);
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned) {
  callback(stream, cudaSuccess, data);
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  function(data);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  if (event == nullptr) return set_error(cudaErrorInvalidValue);
  *event = new CUevent_st{};
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (event == nullptr) return set_error(cudaErrorInvalidResourceHandle);
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t, unsigned) {
  if (event == nullptr) return set_error(cudaErrorInvalidResourceHandle);
  *event = {true, std::chrono::steady_clock::now()};
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
// Time of this machine between the records: how long the emulation took, which says nothing about a GPU.
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  if (milliseconds == nullptr || start == nullptr || end == nullptr || !start->recorded || !end->recorded) {
    return set_error(cudaErrorInvalidResourceHandle);
  }
  *milliseconds = std::chrono::duration<float, std::milli>(end->when - start->when).count();
  return cudaSuccess;
}

}  // extern "C"
