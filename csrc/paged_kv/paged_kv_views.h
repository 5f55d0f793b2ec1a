// SPDX-License-Identifier: Apache-2.0
// Tensors to the views of paged_kv.h, with the checks that memory safety needs. Included by op files only.
#pragma once

#include "../common/tensor.h"
#include "paged_kv.h"

namespace fmkernels {

inline CacheDType cache_dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return CacheDType::kFloat32;
    case ScalarType::Half: return CacheDType::kFloat16;
    case ScalarType::BFloat16: return CacheDType::kBFloat16;
    case ScalarType::Float8_e4m3fn: return CacheDType::kFloat8E4M3;
    case ScalarType::Char: return CacheDType::kInt8;
    default: fail(name, " must be float32, float16, bfloat16, float8_e4m3fn or int8");
  }
}

// Whether the kernels of this backend read a cache for tensors of this dtype: on CUDA its own or a quantised one.
inline void check_cache_dtype([[maybe_unused]] const char* name, [[maybe_unused]] CacheDType cache,
                              [[maybe_unused]] DType dtype) {
#ifdef FM_CUDA
  FM_CHECK(is_quantized(cache) || static_cast<int32_t>(cache) == static_cast<int32_t>(dtype), name,
           " must have the dtype of the other tensors, or be float8_e4m3fn or int8");
#endif
}

// A contiguous tensor on the device of `like`, not written yet. By torch's C function and not through the dispatcher, as
// torch::stable::new_empty goes, by name: 1 us less of the 8 of a small call.
template <size_t kRank>
Tensor new_contiguous(const Tensor& like, const int64_t (&sizes)[kRank], ScalarType dtype) {
  int64_t strides[kRank];
  for (size_t dim = kRank, stride = 1; dim-- > 0; stride *= static_cast<size_t>(sizes[dim])) {
    strides[dim] = static_cast<int64_t>(stride);
  }
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(kRank, sizes, strides, code, device_type, device_index, &handle));
  return Tensor(handle);
}

inline RowsView view_rows(const Tensor& t) { return {data_of(t), stride_of(t, 0), stride_of(t, 1)}; }
inline PagesView view_pages(const Tensor& t) { return {data_of(t), stride_of(t, 0), stride_of(t, 1), stride_of(t, 2)}; }

inline void check_head_dim(const char* name, int64_t dim) {
  FM_CHECK(dim >= 8 && dim <= kMaxHeadDim && dim % 8 == 0, name, " must be a multiple of 8 from 8 to ", kMaxHeadDim,
           ", got ", dim);
}

inline void check_cache(const char* name, const Tensor& t, const Tensor& other) {
  check_rank(name, t, 4);
  check_last_dim_contiguous(name, t);
  check_same_device(name, t, other);
  check_head_dim(name, t.size(3));
  FM_CHECK(t.size(1) >= 1, name, " must have pages of at least 1 slot");
  FM_CHECK(t.size(0) <= INT32_MAX && t.size(1) <= INT32_MAX, name, " has more pages or slots than an int32 counts");
}

// The scale of a cache [num_pages, page_size, kv_heads, dim].
inline ScaleView view_scale(const char* name, const std::optional<Tensor>& scale, const Tensor& cache,
                            CacheDType dtype) {
  FM_CHECK(dtype != CacheDType::kInt8 || scale.has_value(), name, " must be given for an int8 cache");
  FM_CHECK(is_quantized(dtype) || !scale.has_value(), name, " must be None for a cache of floats");
  if (!scale.has_value()) return {};
  const Tensor& t = *scale;
  check_same_device(name, t, cache);
  check_scalar_type(name, t, ScalarType::Float, "float32");
  ScaleView view{static_cast<float*>(data_of(t)), 0, 0, 0, t.dim() == 3};
  if (t.dim() == 3) {
    for (int64_t dim = 0; dim < 3; ++dim) check_size(name, t, dim, cache.size(dim));
    view.page_stride = stride_of(t, 0);
    view.slot_stride = stride_of(t, 1);
    view.head_stride = stride_of(t, 2);
  } else {
    FM_CHECK(t.numel() == 1 || (t.dim() == 1 && t.size(0) == cache.size(2)), name,
             " must be one number, [kv_heads] or [num_pages, page_size, kv_heads]");
    view.head_stride = t.numel() == 1 ? 0 : t.stride(0);
  }
  return view;
}

inline PagedCache view_cache(const Tensor& k_cache, const Tensor& v_cache, const std::optional<Tensor>& k_scale,
                             const std::optional<Tensor>& v_scale, const Tensor& other) {
  check_cache("k_cache", k_cache, other);
  check_cache("v_cache", v_cache, other);
  FM_CHECK(k_cache.scalar_type() == v_cache.scalar_type(), "v_cache must have the dtype of k_cache");
  for (int64_t dim = 0; dim < 3; ++dim) check_size("v_cache", v_cache, dim, k_cache.size(dim));
  PagedCache cache{};
  cache.dtype = cache_dtype_of("k_cache", k_cache);
  cache.num_pages = k_cache.size(0);
  cache.page_size = k_cache.size(1);
  cache.kv_heads = k_cache.size(2);
  cache.head_dim = k_cache.size(3);
  cache.v_head_dim = v_cache.size(3);
  cache.k = view_pages(k_cache);
  cache.v = view_pages(v_cache);
  cache.k_scale = view_scale("k_scale", k_scale, k_cache, cache.dtype);
  cache.v_scale = view_scale("v_scale", v_scale, v_cache, cache.dtype);
  return cache;
}

// The data of a list of int32 or int64.
template <class T>
const T* view_list(const char* name, const Tensor& t, const Tensor& other) {
  check_scalar_type(name, t, sizeof(T) == 8 ? ScalarType::Long : ScalarType::Int, sizeof(T) == 8 ? "int64" : "int32");
  check_rank(name, t, 1);
  check_last_dim_contiguous(name, t);
  check_same_device(name, t, other);
  return static_cast<const T*>(data_of(t));
}

struct TableView {
  const int32_t* data;
  int64_t stride, batch, max_pages;
};
inline TableView view_table(const Tensor& t, const Tensor& other) {
  check_scalar_type("block_table", t, ScalarType::Int, "int32");
  check_rank("block_table", t, 2);
  check_last_dim_contiguous("block_table", t);
  check_same_device("block_table", t, other);
  return {static_cast<const int32_t*>(data_of(t)), stride_of(t, 0), t.size(0), t.size(1)};
}

#ifndef FM_CUDA
// Prefix sums that are used as addresses.
inline void check_prefix_values(const char* name, const int32_t* prefix, int64_t count, int64_t total) {
  FM_CHECK(prefix[0] == 0, name, " must begin with 0, got ", prefix[0]);
  for (int64_t b = 0; b < count; ++b) {
    FM_CHECK(prefix[b] <= prefix[b + 1], name, " must not decrease, got ", prefix[b], " before ", prefix[b + 1]);
  }
  FM_CHECK(prefix[count] == total, name, " must end with ", total, ", got ", prefix[count]);
}

// The pages of a request from the one of token `first` to that of its last.
inline void check_page_values(const TableView& table, int64_t request, int64_t first, int64_t num_tokens,
                              int64_t page_size, int64_t num_pages) {
  FM_CHECK(num_tokens >= 0 && num_tokens <= table.max_pages * page_size, "request ", request, " must have from 0 to ",
           table.max_pages * page_size, " tokens, which a row of block_table holds, got ", num_tokens);
  for (int64_t i = first / page_size; i * page_size < num_tokens; ++i) {
    const int32_t page = table.data[request * table.stride + i];
    FM_CHECK(page >= 0 && page < num_pages, "block_table must name pages from 0 to ", num_pages - 1, ", got ", page,
             " for request ", request);
  }
}
#endif

}  // namespace fmkernels
