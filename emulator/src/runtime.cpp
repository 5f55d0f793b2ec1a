// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime over the driver: what host objects of nvcc 13.0 call when they are loaded and when they launch, the
// properties of the emulated device, attributes and occupancy of kernels, errors.
#include "runtime.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "driver.h"

namespace emulator {
namespace {

constexpr int kRuntimeVersion = CUDART_VERSION;
// PTX names virtual registers, of which ptxas keeps a part: what it might keep of a kernel without launch bounds.
constexpr uint32_t kAssumedRegisters = 64;

thread_local cudaError_t this_threads_error = cudaSuccess;

struct ErrorText {
  cudaError_t status;
  const char* name;
  const char* text;
};
constexpr ErrorText kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidPitchValue, "cudaErrorInvalidPitchValue", "invalid pitch argument"},
    {cudaErrorInvalidSymbol, "cudaErrorInvalidSymbol", "invalid device symbol"},
    {cudaErrorInvalidMemcpyDirection, "cudaErrorInvalidMemcpyDirection", "invalid copy direction for memcpy"},
    {cudaErrorMissingConfiguration, "cudaErrorMissingConfiguration", "__global__ function call is not configured"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidKernelImage, "cudaErrorInvalidKernelImage", "device kernel image is invalid"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorInvalidPtx, "cudaErrorInvalidPtx", "a PTX JIT compilation failed"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
    {cudaErrorLaunchTimeout, "cudaErrorLaunchTimeout", "the launch timed out and was terminated"},
    {cudaErrorAssert, "cudaErrorAssert", "device-side assert triggered"},
    {cudaErrorHostMemoryAlreadyRegistered, "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {cudaErrorHostMemoryNotRegistered, "cudaErrorHostMemoryNotRegistered",
     "pointer does not correspond to a registered memory region"},
    {cudaErrorMisalignedAddress, "cudaErrorMisalignedAddress", "misaligned address"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorCooperativeLaunchTooLarge, "cudaErrorCooperativeLaunchTooLarge", "too many blocks in cooperative launch"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
};

const ErrorText& text_of(cudaError_t status) {
  constexpr ErrorText kUnknown{cudaErrorUnknown, "unrecognized error code", "unrecognized error code"};
  static const ErrorText unknown = kUnknown;
  const auto* found =
      std::find_if(std::begin(kErrors), std::end(kErrors), [&](const ErrorText& e) { return e.status == status; });
  return found == std::end(kErrors) ? unknown : *found;
}

cudaError_t error_of(Status status) {
  switch (status) {
    case Status::kSuccess: return cudaSuccess;
    case Status::kInvalidConfiguration: return cudaErrorInvalidConfiguration;
    case Status::kInvalidValue: return cudaErrorInvalidValue;
    case Status::kOutOfResources: return cudaErrorLaunchOutOfResources;
    case Status::kCooperativeTooLarge: return cudaErrorCooperativeLaunchTooLarge;
    case Status::kInvalidFunction: return cudaErrorInvalidDeviceFunction;
    case Status::kNoImage: return cudaErrorNoKernelImageForDevice;
    case Status::kInvalidImage: return cudaErrorInvalidPtx;
    case Status::kIllegalAddress: return cudaErrorIllegalAddress;
    case Status::kMisaligned: return cudaErrorMisalignedAddress;
    case Status::kAssert: return cudaErrorAssert;
    case Status::kTimeout: return cudaErrorLaunchTimeout;
    case Status::kFailure: return cudaErrorLaunchFailure;
  }
  return cudaErrorUnknown;
}

cudaError_t launch_stub(const void* stub, dim3 grid, dim3 block, void** args, size_t shared, bool cooperative) {
  Driver& driver = Driver::instance();
  const Kernel* kernel = driver.find_kernel(stub);
  if (kernel == nullptr) return set_error(cudaErrorInvalidDeviceFunction);
  LaunchShape shape;
  shape.grid[0] = grid.x, shape.grid[1] = grid.y, shape.grid[2] = grid.z;
  shape.block[0] = block.x, shape.block[1] = block.y, shape.block[2] = block.z;
  shape.dynamic_shared = shared;
  shape.cooperative = cooperative;
  return set_error(error_of(driver.launch(*kernel, shape, args)));
}

// The kernel behind a host stub, loaded; null, with the error to return, when there is none.
const Function* load(const void* stub, Kernel** kernel, cudaError_t* error) {
  Driver& driver = Driver::instance();
  *kernel = driver.find_kernel(stub);
  Status status = Status::kInvalidFunction;
  const Function* function = *kernel == nullptr ? nullptr : driver.load(**kernel, &status);
  *error = error_of(status);
  return function;
}

uint32_t threads_of(const FunctionInfo& info) { return info.max_threads == 0 ? kMaxThreads : info.max_threads; }

// An assumption: see kAssumedRegisters. Launch bounds are kept, as ptxas keeps them.
uint32_t registers_of(const FunctionInfo& info) {
  const uint32_t wanted = std::clamp<uint32_t>(info.num_registers, 16, kAssumedRegisters);
  const uint32_t bound = kRegisters / (threads_of(info) * std::max(info.min_blocks, 1u));
  return std::max<uint32_t>(std::min(wanted, bound), 1);
}

struct Attribute {
  cudaDeviceAttr attribute;
  int64_t (*value)(const Device&);
};
constexpr Attribute kAttributes[] = {
    {cudaDevAttrMaxThreadsPerBlock, [](const Device&) -> int64_t { return kMaxThreads; }},
    {cudaDevAttrMaxBlockDimX, [](const Device&) -> int64_t { return kMaxBlockDim[0]; }},
    {cudaDevAttrMaxBlockDimY, [](const Device&) -> int64_t { return kMaxBlockDim[1]; }},
    {cudaDevAttrMaxBlockDimZ, [](const Device&) -> int64_t { return kMaxBlockDim[2]; }},
    {cudaDevAttrMaxGridDimX, [](const Device&) -> int64_t { return kMaxGridDim[0]; }},
    {cudaDevAttrMaxGridDimY, [](const Device&) -> int64_t { return kMaxGridDim[1]; }},
    {cudaDevAttrMaxGridDimZ, [](const Device&) -> int64_t { return kMaxGridDim[2]; }},
    {cudaDevAttrMaxSharedMemoryPerBlock, [](const Device&) -> int64_t { return kSharedWithoutOptIn; }},
    {cudaDevAttrTotalConstantMemory, [](const Device&) -> int64_t { return kConstantBytes; }},
    {cudaDevAttrWarpSize, [](const Device&) -> int64_t { return kWarpSize; }},
    {cudaDevAttrMaxPitch, [](const Device&) -> int64_t { return 0x7fffffff; }},
    {cudaDevAttrMaxRegistersPerBlock, [](const Device&) -> int64_t { return kRegisters; }},
    {cudaDevAttrClockRate, [](const Device& d) -> int64_t { return d.clock_khz; }},
    {cudaDevAttrTextureAlignment, [](const Device&) -> int64_t { return 512; }},
    {cudaDevAttrMultiProcessorCount, [](const Device& d) -> int64_t { return d.num_sms; }},
    {cudaDevAttrCanMapHostMemory, [](const Device&) -> int64_t { return 1; }},
    {cudaDevAttrConcurrentKernels, [](const Device&) -> int64_t { return 1; }},
    {cudaDevAttrMemoryClockRate, [](const Device& d) -> int64_t { return d.memory_clock_khz; }},
    {cudaDevAttrGlobalMemoryBusWidth, [](const Device& d) -> int64_t { return d.memory_bus_bits; }},
    {cudaDevAttrL2CacheSize, [](const Device& d) -> int64_t { return d.l2_bytes; }},
    {cudaDevAttrMaxThreadsPerMultiProcessor, [](const Device& d) -> int64_t { return d.threads_per_sm; }},
    {cudaDevAttrUnifiedAddressing, [](const Device&) -> int64_t { return 1; }},
    {cudaDevAttrComputeCapabilityMajor, [](const Device& d) -> int64_t { return d.architecture / 10; }},
    {cudaDevAttrComputeCapabilityMinor, [](const Device& d) -> int64_t { return d.architecture % 10; }},
    {cudaDevAttrStreamPrioritiesSupported, [](const Device&) -> int64_t { return 1; }},
    {cudaDevAttrGlobalL1CacheSupported, [](const Device&) -> int64_t { return 1; }},
    {cudaDevAttrLocalL1CacheSupported, [](const Device&) -> int64_t { return 1; }},
    {cudaDevAttrMaxSharedMemoryPerMultiprocessor, [](const Device& d) -> int64_t { return d.shared_per_sm; }},
    {cudaDevAttrMaxRegistersPerMultiprocessor, [](const Device&) -> int64_t { return kRegisters; }},
    {cudaDevAttrManagedMemory, [](const Device&) -> int64_t { return 1; }},
    {cudaDevAttrConcurrentManagedAccess, [](const Device&) -> int64_t { return 1; }},
    {cudaDevAttrCanUseHostPointerForRegisteredMem, [](const Device&) -> int64_t { return 1; }},
    {cudaDevAttrCooperativeLaunch, [](const Device&) -> int64_t { return 1; }},
    {cudaDevAttrMaxSharedMemoryPerBlockOptin, [](const Device& d) -> int64_t { return d.shared_per_block; }},
    {cudaDevAttrHostRegisterSupported, [](const Device&) -> int64_t { return 1; }},
    {cudaDevAttrMaxBlocksPerMultiprocessor, [](const Device& d) -> int64_t { return d.blocks_per_sm; }},
    {cudaDevAttrReservedSharedMemoryPerBlock, [](const Device&) -> int64_t { return kSharedReserved; }},
    {cudaDevAttrMemoryPoolsSupported, [](const Device&) -> int64_t { return 1; }},
};

// What no entry above names, a device that is emulated has none of.
int64_t attribute_of(const Device& device, cudaDeviceAttr attribute) {
  for (const Attribute& entry : kAttributes) {
    if (entry.attribute == attribute) return entry.value(device);
  }
  return 0;
}

}  // namespace

cudaError_t set_error(cudaError_t status) {
  if (status != cudaSuccess) this_threads_error = status;
  return status;
}

cudaError_t last_error(bool clear) {
  const cudaError_t status = this_threads_error;
  if (clear) this_threads_error = cudaSuccess;
  return status;
}

}  // namespace emulator

using namespace emulator;

extern "C" {

// ---- What host objects of nvcc call ---------------------------------------------------------------------------------

// The handle is an Image, and only this library reads it. Declared in no header of CUDA that a library may include.
void** __cudaRegisterFatBinary(void* wrapper) {
  return reinterpret_cast<void**>(Driver::instance().add_image(wrapper));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** handle) { Driver::instance().remove_image(reinterpret_cast<Image*>(handle)); }
void __cudaRegisterFunction(void** handle, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  Driver::instance().add_kernel(reinterpret_cast<Image*>(handle), stub, name);
}
void __cudaRegisterVar(void** handle, char* host, char*, const char* name, int, size_t, int, int) {
  Driver::instance().add_variable(reinterpret_cast<Image*>(handle), host, name);
}
// A managed variable is reached through a pointer of the host object; it is set when the module is first wanted.
struct ManagedVariable {
  Image* image;
  void** host;
  const char* name;
};
static std::vector<ManagedVariable>& managed_variables() {
  static auto* const all = new std::vector<ManagedVariable>;
  return *all;
}
void __cudaRegisterManagedVar(void** handle, void** host, char*, const char* name, int, size_t, int, int) {
  auto* const image = reinterpret_cast<Image*>(handle);
  managed_variables().push_back({image, host, name});
  Driver::instance().add_variable(image, host, name);
}
char __cudaInitModule(void** handle) {
  for (const ManagedVariable& variable : managed_variables()) {
    uint64_t num_bytes = 0;
    if (variable.image != reinterpret_cast<Image*>(handle)) continue;
    *variable.host = Driver::instance().find_variable(variable.image, variable.name, &num_bytes);
  }
  return 1;
}

struct CallConfiguration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
static std::vector<CallConfiguration>& call_configurations() {
  thread_local std::vector<CallConfiguration> pushed;
  return pushed;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  call_configurations().push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (call_configurations().empty()) return set_error(cudaErrorMissingConfiguration);
  const CallConfiguration call = call_configurations().back();
  call_configurations().pop_back();
  *grid = call.grid, *block = call.block, *shared = call.shared;
  *static_cast<cudaStream_t*>(stream) = call.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* handle, const void* stub) {
  *handle = reinterpret_cast<cudaKernel_t>(Driver::instance().find_kernel(stub));
  return *handle == nullptr ? set_error(cudaErrorInvalidDeviceFunction) : cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t handle, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  return launch_stub(handle, grid, block, args, shared, false);
}

// ---- Launches -------------------------------------------------------------------------------------------------------

cudaError_t cudaGetKernel(cudaKernel_t* handle, const void* stub) { return __cudaGetKernel(handle, stub); }
cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  return launch_stub(stub, grid, block, args, shared, false);
}
cudaError_t cudaLaunchCooperativeKernel(const void* stub, dim3 grid, dim3 block, void** args, size_t shared,
                                        cudaStream_t) {
  return launch_stub(stub, grid, block, args, shared, true);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** args) {
  if (config == nullptr) return set_error(cudaErrorInvalidValue);
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    const auto& cluster = attribute.val.clusterDim;
    if (attribute.id == cudaLaunchAttributeCooperative) cooperative = attribute.val.cooperative != 0;
    if (attribute.id == cudaLaunchAttributeClusterDimension && cluster.x * cluster.y * cluster.z > 1) {
      return set_error(cudaErrorNotSupported);
    }
  }
  return launch_stub(stub, config->gridDim, config->blockDim, args, config->dynamicSmemBytes, cooperative);
}

// ---- Kernels --------------------------------------------------------------------------------------------------------

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  Kernel* kernel = Driver::instance().find_kernel(stub);
  if (kernel == nullptr) return set_error(cudaErrorInvalidDeviceFunction);
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      return set_error(error_of(Driver::instance().opt_in(*kernel, value)));
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      return value < -1 || value > 100 ? set_error(cudaErrorInvalidValue) : cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed: return cudaSuccess;
    default: return set_error(cudaErrorNotSupported);
  }
}
cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }
cudaError_t cudaFuncGetName(const char** name, const void* stub) {
  const Kernel* kernel = Driver::instance().find_kernel(stub);
  if (kernel == nullptr) return set_error(cudaErrorInvalidDeviceFunction);
  *name = kernel->name.c_str();
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
  Kernel* kernel = nullptr;
  cudaError_t error = cudaSuccess;
  const Function* function = load(stub, &kernel, &error);
  if (function == nullptr) return set_error(error);
  const FunctionInfo& info = function->info();
  const int architecture = Driver::instance().device().architecture;
  *attributes = {};
  attributes->sharedSizeBytes = info.static_smem;
  attributes->localSizeBytes = info.local_bytes;
  attributes->maxThreadsPerBlock = static_cast<int>(threads_of(info));
  attributes->numRegs = static_cast<int>(registers_of(info));
  attributes->ptxVersion = attributes->binaryVersion = architecture;
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(Driver::instance().max_dynamic_shared(*kernel, *function));
  attributes->preferredShmemCarveout = -1;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* num_blocks, const void* stub, int block_threads,
                                                                   size_t dynamic_shared, unsigned) {
  Kernel* kernel = nullptr;
  cudaError_t error = cudaSuccess;
  const Function* function = load(stub, &kernel, &error);
  if (function == nullptr) return set_error(error);
  if (block_threads < 1) return set_error(cudaErrorInvalidValue);
  const FunctionInfo& info = function->info();
  const Device device = Driver::instance().device();
  const bool fits = block_threads <= static_cast<int>(threads_of(info)) &&
                    dynamic_shared <= Driver::instance().max_dynamic_shared(*kernel, *function);
  *num_blocks = fits ? resident_blocks(device, block_threads, static_cast<int>(registers_of(info)),
                                       info.static_smem + dynamic_shared)
                     : 0;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* num_blocks, const void* stub, int block_threads,
                                                          size_t dynamic_shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(num_blocks, stub, block_threads, dynamic_shared, 0);
}

// ---- The device -----------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : set_error(cudaErrorInvalidDevice); }
cudaError_t cudaInitDevice(int device, unsigned, unsigned) { return cudaSetDevice(device); }
cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaDeviceReset() { return cudaSuccess; }
cudaError_t cudaDeviceSetCacheConfig(cudaFuncCache) { return cudaSuccess; }
cudaError_t cudaDeviceSetLimit(cudaLimit, size_t) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kRuntimeVersion;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return set_error(cudaErrorInvalidDevice);
  if (value == nullptr || attribute < 1 || attribute >= cudaDevAttrMax) return set_error(cudaErrorInvalidValue);
  *value = static_cast<int>(attribute_of(Driver::instance().device(), attribute));
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return set_error(cudaErrorInvalidDevice);
  const Device gpu = Driver::instance().device();
  cudaDeviceProp& p = *properties;
  p = {};
  std::snprintf(p.name, sizeof p.name, "%s", gpu.name);
  p.totalGlobalMem = gpu.memory_bytes;
  p.sharedMemPerBlock = kSharedWithoutOptIn;
  p.regsPerBlock = p.regsPerMultiprocessor = kRegisters;
  p.warpSize = kWarpSize;
  p.memPitch = 0x7fffffff;
  p.maxThreadsPerBlock = kMaxThreads;
  for (int i = 0; i < 3; ++i) {
    p.maxThreadsDim[i] = static_cast<int>(kMaxBlockDim[i]);
    p.maxGridSize[i] = static_cast<int>(kMaxGridDim[i]);
  }
  p.totalConstMem = kConstantBytes;
  p.major = gpu.architecture / 10;
  p.minor = gpu.architecture % 10;
  p.textureAlignment = 512;
  p.multiProcessorCount = gpu.num_sms;
  p.canMapHostMemory = p.concurrentKernels = p.unifiedAddressing = p.streamPrioritiesSupported = 1;
  p.globalL1CacheSupported = p.localL1CacheSupported = p.managedMemory = p.concurrentManagedAccess = 1;
  p.canUseHostPointerForRegisteredMem = p.cooperativeLaunch = p.hostRegisterSupported = p.memoryPoolsSupported = 1;
  p.memoryBusWidth = gpu.memory_bus_bits;
  p.l2CacheSize = gpu.l2_bytes;
  p.maxThreadsPerMultiProcessor = gpu.threads_per_sm;
  p.sharedMemPerMultiprocessor = gpu.shared_per_sm;
  p.sharedMemPerBlockOptin = gpu.shared_per_block;
  p.reservedSharedMemPerBlock = kSharedReserved;
  p.maxBlocksPerMultiProcessor = gpu.blocks_per_sm;
  return cudaSuccess;
}

// ---- Errors ---------------------------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() { return last_error(true); }
cudaError_t cudaPeekAtLastError() { return last_error(false); }
const char* cudaGetErrorString(cudaError_t status) { return text_of(status).text; }
const char* cudaGetErrorName(cudaError_t status) { return text_of(status).name; }

}  // extern "C"
