// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime: memory, copies, streams, events, attributes, occupancy, and the errors of wrong calls.
#include <cstring>
#include <string>

#include "program.h"

__global__ void fill(int* out, int value) { out[blockIdx.x * blockDim.x + threadIdx.x] = value; }
__global__ void __launch_bounds__(128, 4) bounded(float* x) {
  __shared__ float s[1024];
  extern __shared__ float more[];
  s[threadIdx.x] = more[threadIdx.x] = 1;
  x[threadIdx.x] = s[threadIdx.x] + more[threadIdx.x];
}
__device__ int counter = 5;
__constant__ float weights[4];
int host_variable = 0;

// The call fails with this error, which cudaGetLastError gives once more and then no more.
void fails(cudaError_t status, cudaError_t expected, const char* what) {
  if (status != expected) std::printf("%s: %s, not %s\n", what, cudaGetErrorName(status), cudaGetErrorName(expected));
  expect(status == expected && cudaPeekAtLastError() == expected && cudaGetLastError() == expected &&
             cudaGetLastError() == cudaSuccess,
         what);
}
template <class... Args>
void launch_fails(cudaError_t expected, const char* what, void (*kernel)(Args...), dim3 grid, dim3 block, size_t shared,
                  Args... args) {
  kernel<<<grid, block, shared>>>(args...);
  fails(cudaPeekAtLastError(), expected, what);
}

void test_memory() {
  int* a = nullptr;
  succeed(cudaMalloc(&a, 100 * sizeof(int)), "cudaMalloc");
  expect(reinterpret_cast<uintptr_t>(a) % 256 == 0, "aligned to 256 bytes");
  succeed(cudaMemset(a, 1, 100 * sizeof(int)), "cudaMemset");
  int host[100];
  succeed(cudaMemcpy(host, a, sizeof host, cudaMemcpyDeviceToHost), "cudaMemcpy");
  expect(host[0] == 0x01010101 && host[99] == 0x01010101, "memset and copy");
  int* b = nullptr;
  succeed(cudaMallocManaged(&b, 100 * sizeof(int)), "cudaMallocManaged");
  succeed(cudaMemcpyAsync(b, a, 100 * sizeof(int), cudaMemcpyDeviceToDevice), "device to device");
  expect(b[50] == 0x01010101, "managed memory is read by the host");
  fill<<<1, 100>>>(b, 9);
  launched("fill");
  expect(b[99] == 9, "and written by a kernel");
  int* pinned = nullptr;
  succeed(cudaMallocHost(&pinned, 64), "cudaMallocHost");
  fill<<<1, 16>>>(pinned, 4);
  launched("fill");
  expect(pinned[15] == 4, "pinned memory is reached by kernels");
  int plain[32] = {};
  succeed(cudaHostRegister(plain, sizeof plain, cudaHostRegisterDefault), "cudaHostRegister");
  int* seen = nullptr;
  succeed(cudaHostGetDevicePointer(&seen, plain, 0), "cudaHostGetDevicePointer");
  fill<<<1, 32>>>(seen, 7);
  launched("fill");
  expect(plain[31] == 7, "registered memory is reached by kernels");
  succeed(cudaHostUnregister(plain), "cudaHostUnregister");

  cudaPointerAttributes attributes;
  succeed(cudaPointerGetAttributes(&attributes, a + 3), "cudaPointerGetAttributes");
  expect(attributes.type == cudaMemoryTypeDevice && attributes.devicePointer == a + 3, "a pointer into the device");
  succeed(cudaPointerGetAttributes(&attributes, b), "cudaPointerGetAttributes");
  expect(attributes.type == cudaMemoryTypeManaged, "a managed pointer");
  succeed(cudaPointerGetAttributes(&attributes, &host_variable), "cudaPointerGetAttributes");
  expect(attributes.type == cudaMemoryTypeUnregistered, "a pointer of the host");

  char* rows = nullptr;
  size_t pitch = 0;
  succeed(cudaMallocPitch(&rows, &pitch, 100, 3), "cudaMallocPitch");
  char text[3][10] = {"first", "second", "third"};
  succeed(cudaMemcpy2D(rows, pitch, text, 10, 10, 3, cudaMemcpyHostToDevice), "cudaMemcpy2D");
  char back[10];
  succeed(cudaMemcpy(back, rows + 2 * pitch, 10, cudaMemcpyDefault), "cudaMemcpy");
  expect(pitch >= 100 && std::strcmp(back, "third") == 0, "rows with a pitch");

  size_t free_before = 0, free_after = 0, total = 0;
  succeed(cudaMemGetInfo(&free_before, &total), "cudaMemGetInfo");
  for (void* pointer : {static_cast<void*>(a), static_cast<void*>(b), static_cast<void*>(rows)}) {
    succeed(cudaFree(pointer), "cudaFree");
  }
  succeed(cudaFreeHost(pinned), "cudaFreeHost");
  succeed(cudaFree(nullptr), "cudaFree of null");
  succeed(cudaMemGetInfo(&free_after, &total), "cudaMemGetInfo");
  expect(free_after == free_before + 800 + 3 * pitch, "free memory");

  void* none = &none;
  fails(cudaMalloc(&none, size_t{1} << 45), cudaErrorMemoryAllocation, "more than the device has");
  expect(none == nullptr, "no pointer then");
  fails(cudaMallocPitch(&none, &pitch, 1 << 20, size_t{1} << 44), cudaErrorMemoryAllocation,
        "rows beyond all addresses");
  fails(cudaFree(host), cudaErrorInvalidValue, "freeing what was not allocated");
  fails(cudaMemcpy(host, host + 1, 8, cudaMemcpyDeviceToHost), cudaErrorInvalidValue, "a copy from no device memory");
  fails(cudaMemcpy(host, host + 1, 8, static_cast<cudaMemcpyKind>(9)), cudaErrorInvalidMemcpyDirection, "no direction");
  fails(cudaMemset(host, 0, 4), cudaErrorInvalidValue, "memset of memory of the host");
  fails(cudaHostUnregister(host), cudaErrorHostMemoryNotRegistered, "what was not registered");
}

void test_symbols() {
  int value = 0;
  succeed(cudaMemcpyFromSymbol(&value, counter, sizeof value), "cudaMemcpyFromSymbol");
  expect(value == 5, "the initial value of a variable");
  const float two[2] = {1.5f, 2.5f};
  succeed(cudaMemcpyToSymbol(weights, two, sizeof two, 2 * sizeof(float)), "cudaMemcpyToSymbol");
  float all[4];
  succeed(cudaMemcpyFromSymbolAsync(all, weights, sizeof all, 0, cudaMemcpyDeviceToHost), "cudaMemcpyFromSymbolAsync");
  expect(all[1] == 0 && all[3] == 2.5f, "a part of a constant array");
  fails(cudaMemcpyToSymbol(weights, two, sizeof two, 3 * sizeof(float)), cudaErrorInvalidValue, "past its end");
  void* address = nullptr;
  fails(cudaGetSymbolAddress(&address, &host_variable), cudaErrorInvalidSymbol, "a variable of the host");
}

void test_streams() {
  cudaStream_t stream = nullptr, other = nullptr;
  succeed(cudaStreamCreate(&stream), "cudaStreamCreate");
  succeed(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  cudaEvent_t start = nullptr, end = nullptr;
  succeed(cudaEventCreate(&start), "cudaEventCreate");
  succeed(cudaEventCreateWithFlags(&end, cudaEventDefault), "cudaEventCreateWithFlags");
  float elapsed = -1;
  fails(cudaEventElapsedTime(&elapsed, start, end), cudaErrorInvalidResourceHandle, "events that were not recorded");
  Array<int> x(64);
  succeed(cudaEventRecord(start, stream), "cudaEventRecord");
  fill<<<1, 64, 0, stream>>>(x, 3);
  succeed(cudaEventRecord(end, stream), "cudaEventRecord");
  succeed(cudaStreamWaitEvent(other, end, 0), "cudaStreamWaitEvent");
  succeed(cudaStreamSynchronize(other), "cudaStreamSynchronize");
  succeed(cudaStreamQuery(stream), "cudaStreamQuery");
  succeed(cudaEventElapsedTime(&elapsed, start, end), "cudaEventElapsedTime");
  expect(elapsed >= 0, "time passes");
  expect_all(x, [](size_t) { return 3; }, "a launch on a stream");
  int called = 0;
  succeed(cudaLaunchHostFunc(stream, [](void* data) { *static_cast<int*>(data) = 1; }, &called), "cudaLaunchHostFunc");
  expect(called == 1, "a function of the host on a stream");
  int* pooled = nullptr;
  succeed(cudaMallocAsync(&pooled, 256, stream), "cudaMallocAsync");
  fill<<<1, 64, 0, stream>>>(pooled, 1);
  succeed(cudaFreeAsync(pooled, stream), "cudaFreeAsync");
  launched("memory of a stream");
  for (cudaStream_t s : {stream, other, cudaStreamLegacy, cudaStreamPerThread}) {
    int priority = -1;
    unsigned flags = 9;
    succeed(cudaStreamGetPriority(s, &priority), "cudaStreamGetPriority");
    succeed(cudaStreamGetFlags(s, &flags), "cudaStreamGetFlags");
    expect(priority == 0 && flags == (s == other ? cudaStreamNonBlocking : 0), "what a stream was made with");
  }
  for (cudaEvent_t event : {start, end}) succeed(cudaEventDestroy(event), "cudaEventDestroy");
  for (cudaStream_t s : {stream, other}) succeed(cudaStreamDestroy(s), "cudaStreamDestroy");
}

void test_device() {
  int count = 0, device = -1, value = 0, runtime = 0, driver = 0;
  succeed(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  succeed(cudaGetDevice(&device), "cudaGetDevice");
  succeed(cudaSetDevice(0), "cudaSetDevice");
  expect(count == 1 && device == 0, "one device");
  fails(cudaSetDevice(1), cudaErrorInvalidDevice, "a second one");
  succeed(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  succeed(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  expect(runtime == CUDART_VERSION && driver >= runtime, "versions");
  cudaDeviceProp p;
  succeed(cudaGetDeviceProperties(&p, 0), "cudaGetDeviceProperties");
  std::printf("sm_%d%d: %d multiprocessors, %zu bytes a block, %zu bytes in all\n", p.major, p.minor,
              p.multiProcessorCount, p.sharedMemPerBlockOptin, p.sharedMemPerMultiprocessor);
  expect(p.warpSize == 32 && p.maxThreadsPerBlock == 1024 && p.sharedMemPerBlock == 49152, "properties");
  const struct {
    cudaDeviceAttr attribute;
    int64_t property;
  } same[] = {{cudaDevAttrMultiProcessorCount, p.multiProcessorCount},
              {cudaDevAttrComputeCapabilityMajor, p.major},
              {cudaDevAttrMaxSharedMemoryPerBlockOptin, int64_t(p.sharedMemPerBlockOptin)},
              {cudaDevAttrMaxSharedMemoryPerMultiprocessor, int64_t(p.sharedMemPerMultiprocessor)},
              {cudaDevAttrMaxThreadsPerMultiProcessor, p.maxThreadsPerMultiProcessor},
              {cudaDevAttrMaxBlocksPerMultiprocessor, p.maxBlocksPerMultiProcessor},
              {cudaDevAttrL2CacheSize, p.l2CacheSize},
              {cudaDevAttrGlobalMemoryBusWidth, p.memoryBusWidth},
              {cudaDevAttrCooperativeLaunch, p.cooperativeLaunch},
              {cudaDevAttrMaxGridDimY, p.maxGridSize[1]},
              {cudaDevAttrIntegrated, p.integrated}};
  bool equal = true;
  for (const auto& entry : same) {
    succeed(cudaDeviceGetAttribute(&value, entry.attribute, 0), "cudaDeviceGetAttribute");
    equal = equal && value == entry.property;
  }
  expect(equal, "attributes are the properties");
  fails(cudaDeviceGetAttribute(&value, static_cast<cudaDeviceAttr>(100000), 0), cudaErrorInvalidValue, "no attribute");
  expect(std::string(cudaGetErrorName(cudaErrorInvalidValue)) == "cudaErrorInvalidValue" &&
             std::string(cudaGetErrorString(cudaErrorInvalidValue)) == "invalid argument",
         "names of errors");
}

void test_kernels() {
  cudaFuncAttributes a;
  succeed(cudaFuncGetAttributes(&a, bounded), "cudaFuncGetAttributes");
  expect(a.sharedSizeBytes == 4096 && a.maxThreadsPerBlock == 128 && a.numRegs > 0 && a.localSizeBytes == 0 &&
             a.maxDynamicSharedSizeBytes == 49152 - 4096,
         "attributes of a kernel");
  int blocks = 0;
  succeed(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, bounded, 128, 0), "occupancy");
  expect(blocks >= 4, "launch bounds are an occupancy");
  succeed(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, bounded, 256, 0), "occupancy");
  expect(blocks == 0, "beyond them there is none");
  int grid = 0, block = 0;
  succeed(cudaOccupancyMaxPotentialBlockSize(&grid, &block, fill), "cudaOccupancyMaxPotentialBlockSize");
  expect(grid > 0 && block >= 32, "a block size that fills the device");
  fails(cudaFuncGetAttributes(&a, reinterpret_cast<const void*>(&host_variable)), cudaErrorInvalidDeviceFunction,
        "no kernel");
  fails(cudaFuncSetAttribute(bounded, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 20), cudaErrorInvalidValue,
        "more shared memory than there is");
}

// Each of these is reported besides.
void test_refused_launches() {
  Array<int> x(4096);
  Array<float> y(128);
  int* out = x;
  float* floats = y;
  launch_fails(cudaErrorInvalidConfiguration, "too many threads", fill, dim3(1), dim3(1025), 0, out, 1);
  launch_fails(cudaErrorInvalidConfiguration, "too many in z", fill, dim3(1), dim3(1, 1, 65), 0, out, 1);
  launch_fails(cudaErrorInvalidConfiguration, "no thread", fill, dim3(1), dim3(0), 0, out, 1);
  launch_fails(cudaErrorInvalidConfiguration, "no block", fill, dim3(0), dim3(32), 0, out, 1);
  launch_fails(cudaErrorInvalidConfiguration, "too many blocks", fill, dim3(1, 65536), dim3(1), 0, out, 1);
  launch_fails(cudaErrorInvalidValue, "shared memory without opting in", bounded, dim3(1), dim3(64), 45060, floats);
  succeed(cudaFuncSetAttribute(bounded, cudaFuncAttributeMaxDynamicSharedMemorySize, 46000), "opting in");
  bounded<<<1, 64, 45060>>>(floats);
  launched("and with it");
  launch_fails(cudaErrorLaunchOutOfResources, "beyond the launch bounds", bounded, dim3(1), dim3(256), 0, floats);
  int value = 1;
  void* args[] = {&out, &value};
  fails(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(fill), dim3(100000), dim3(1024), args, 0, nullptr),
        cudaErrorCooperativeLaunchTooLarge, "a cooperative launch that is not resident");
  cudaLaunchConfig_t config = {};
  config.gridDim = 2, config.blockDim = 32;
  succeed(cudaLaunchKernelEx(&config, fill, out, 6), "cudaLaunchKernelEx");
  expect(x.host()[63] == 6, "a launch with a configuration");
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {2, 1, 1};
  config.attrs = &cluster, config.numAttrs = 1;
  fails(cudaLaunchKernelEx(&config, fill, out, 6), cudaErrorNotSupported, "clusters");
}

int main(int argc, char**) {
  test_memory();
  test_symbols();
  test_streams();
  test_device();
  test_kernels();
  if (argc > 1) test_refused_launches();
  return failures != 0;
}
