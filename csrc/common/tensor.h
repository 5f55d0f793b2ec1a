// SPDX-License-Identifier: Apache-2.0
// What every *_op.cpp needs of the stable ABI. Included by op files only; kernels see no tensor.
//
// The checks here guard memory: they hold for callers of torch.ops too. The sentences that users read are raised by
// the public Python functions.
#pragma once

#include <optional>
#include <tuple>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "check.h"
#include "dtype.h"
#include "isa.h"
#include "stream.h"

#if defined(FM_EMULATED)
#include "emulated_memory.h"
#elif defined(FM_CUDA)
#include <torch/csrc/stable/accelerator.h>

// Lives in libtorch_cuda. Weak, so that this library also loads beside a torch without CUDA, where it stays null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
#endif

// FM_CUDA is set by the build for _C_cuda and _C_emulated, FM_EMULATED for the latter, where the launchers of the CUDA
// kernels run on CPU tensors over the emulator's CUDA runtime.
#if defined(FM_EMULATED)
#define FM_BACKEND CPU
#define FM_EXECUTE(name, params, tensor)       \
  do {                                         \
    const EmulatedLaunch memory_is_accessible; \
    launch_##name(params, nullptr);            \
  } while (0)
#elif defined(FM_CUDA)
#define FM_BACKEND CUDA
#define FM_EXECUTE(name, params, tensor)   \
  do {                                     \
    const StreamScope scope(tensor);       \
    launch_##name(params, scope.stream()); \
  } while (0)
#else
#define FM_BACKEND CPU
#define FM_EXECUTE(name, params, tensor) dispatch_isa([&]<Isa isa>() { run_##name<isa>(params); })
#endif

namespace fmkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A contiguous tensor of the shape, dtype and device of another.
inline Tensor empty_contiguous(const Tensor& like) {
  return torch::stable::new_empty(like, {like.sizes().begin(), like.sizes().end()});
}

inline const Tensor* pointer_to(const std::optional<Tensor>& t) { return t.has_value() ? &*t : nullptr; }

inline DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: fail(name, " must be float32, float16 or bfloat16");
  }
}

// Op files read and write through Params of plain pointers; which of them are written is the contract of the op. Torch
// lets the storage below a tensor be shrunk or freed (`untyped_storage().resize_(0)`, as sharded training does).
inline void* data_of(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t end = t.storage_offset() + 1, storage_bytes = 0;  // end: elements up to the last one of the tensor
  for (size_t dim = 0; dim < sizes.size(); ++dim) end += (sizes[dim] - 1) * strides[dim];
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &storage_bytes));
  FM_CHECK(end * static_cast<int64_t>(t.element_size()) <= storage_bytes || t.numel() == 0,
           "a tensor has a storage of ", storage_bytes, " bytes, which does not hold its elements");
  void* data = const_cast<void*>(t.const_data_ptr());
#ifdef FM_EMULATED
  note_view(data, sizes, strides, static_cast<int64_t>(t.element_size()));
#endif
  return data;
}

// A dimension of size 1 is never stepped along, so its stride says nothing; 0 keeps later checks simple.
inline int64_t stride_of(const Tensor& t, int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); }

inline void check_last_dim_contiguous(const char* name, const Tensor& t) {
  FM_CHECK(t.numel() == 0 || t.size(t.dim() - 1) == 1 || t.stride(t.dim() - 1) == 1, name,
           " must have a contiguous last dimension");
}

// Of a tensor that is written: two elements in one place would be written in no order.
inline void check_written(const char* name, const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    FM_CHECK(sizes[dim] <= 1 || strides[dim] != 0 || t.numel() == 0, name,
             " is written and must have a place for each element, got stride 0 in dimension ", dim);
  }
}

inline void check_rank(const char* name, const Tensor& t, int64_t rank) {
  FM_CHECK(t.dim() == rank, name, " must have ", rank, " dimensions, got ", t.dim());
}

inline void check_size(const char* name, const Tensor& t, int64_t dim, int64_t expected) {
  FM_CHECK(t.size(dim) == expected, name, " must have size ", expected, " in dimension ", dim, ", got ", t.size(dim));
}

inline void check_extent(const char* name, int64_t size) {
  FM_CHECK(size >= 0 && size < int64_t{1} << 31, name, " must be from 0 to 2^31 - 1, got ", size);
}

inline void check_same_device(const char* name, const Tensor& t, const Tensor& other) {
  FM_CHECK(t.device() == other.device(), name, " is on another device than the first argument");
}

inline void check_scalar_type(const char* name, const Tensor& t, ScalarType expected, const char* expected_name) {
  FM_CHECK(t.scalar_type() == expected, name, " must be ", expected_name);
}

// The data of a vector [num_elements], contiguous, on the device of `like`.
template <class T>
const T* view_vector(const char* name, const Tensor& t, const Tensor& like, ScalarType type, const char* type_name,
                     int64_t num_elements) {
  check_rank(name, t, 1);
  check_same_device(name, t, like);
  check_size(name, t, 0, num_elements);
  check_scalar_type(name, t, type, type_name);
  check_last_dim_contiguous(name, t);
  return static_cast<const T*>(data_of(t));
}

#if defined(FM_CUDA) && !defined(FM_EMULATED)
// Makes the device of a tensor current for a scope and knows torch's stream on it.
class StreamScope {
 public:
  explicit StreamScope(const Tensor& t) : guard_(t.get_device_index()) {
    FM_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};
#endif

}  // namespace fmkernels
