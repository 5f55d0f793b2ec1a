// SPDX-License-Identifier: Apache-2.0
// append, gather, the copies of pages and the page table: tensors in, checks, Params out. attend: paged_kv_attend_op.cpp.
#include <vector>

#include "paged_kv_views.h"

namespace fmkernels {
namespace {

// ---- append ----------------------------------------------------------------------------------------------------------

RowsView checked_rows(const char* name, const Tensor& t, const Tensor& k, int64_t heads, int64_t dim) {
  check_rank(name, t, 3);
  check_last_dim_contiguous(name, t);
  check_same_device(name, t, k);
  FM_CHECK(t.scalar_type() == k.scalar_type(), name, " must have the dtype of k");
  check_size(name, t, 0, k.size(0));
  if (heads >= 0) check_size(name, t, 1, heads);
  check_size(name, t, 2, dim);
  return view_rows(t);
}

void set_rotation(PagedAppendParams& p, const Tensor& cos, const Tensor& sin, const Tensor& positions,
                  const Tensor& k) {
  for (const auto& [name, t] : {std::pair{"rotary_cos", &cos}, {"rotary_sin", &sin}}) {
    check_rank(name, *t, 2);
    check_scalar_type(name, *t, ScalarType::Float, "float32");
    check_same_device(name, *t, k);
    check_last_dim_contiguous(name, *t);
    for (int64_t dim = 0; dim < 2; ++dim) check_size(name, *t, dim, cos.size(dim));
  }
  FM_CHECK(stride_of(cos, 0) == stride_of(sin, 0), "rotary_sin must have the strides of rotary_cos");
  p.rotary_cos = static_cast<const float*>(data_of(cos));
  p.rotary_sin = static_cast<const float*>(data_of(sin));
  p.rotary_stride = stride_of(cos, 0);
  p.rotary_dim = 2 * cos.size(1);
  p.max_position = cos.size(0);
  FM_CHECK(p.rotary_dim <= p.cache.head_dim, "rotary_cos must have at most head_dim / 2 columns, ",
           p.cache.head_dim / 2, ", got ", cos.size(1));
  check_size("positions", positions, 0, p.num_tokens);
  p.positions = view_list<int64_t>("positions", positions, k);
}

#ifndef FM_CUDA
void check_append_values(const PagedAppendParams& p) {
  const int64_t num_slots = p.cache.num_pages * p.cache.page_size;
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    FM_CHECK(p.slot_mapping[t] < num_slots, "slot_mapping must be below the ", num_slots, " slots of the cache, got ",
             p.slot_mapping[t]);
    FM_CHECK(p.positions == nullptr || (p.positions[t] >= 0 && p.positions[t] < p.max_position),
             "positions must be from 0 to ", p.max_position - 1, ", got ", p.positions[t]);
  }
}
#endif

void paged_kv_append(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                     const Tensor& slot_mapping, const std::optional<Tensor>& k_scale,
                     const std::optional<Tensor>& v_scale, const std::optional<Tensor>& q,
                     const std::optional<Tensor>& rotary_cos, const std::optional<Tensor>& rotary_sin,
                     const std::optional<Tensor>& positions, bool interleaved) {
  PagedAppendParams p{};
  check_rank("k", k, 3);
  p.dtype = dtype_of("k", k);
  p.num_tokens = k.size(0);
  p.cache = view_cache(k_cache, v_cache, k_scale, v_scale, k);
  check_cache_dtype("k_cache", p.cache.dtype, p.dtype);
  check_written("k_cache", k_cache);
  check_written("v_cache", v_cache);
  if (p.cache.k_scale.per_token) check_written("k_scale", *k_scale);
  if (p.cache.v_scale.per_token) check_written("v_scale", *v_scale);
  p.k = checked_rows("k", k, k, p.cache.kv_heads, p.cache.head_dim);
  p.v = checked_rows("v", v, k, p.cache.kv_heads, p.cache.v_head_dim);
  check_size("slot_mapping", slot_mapping, 0, p.num_tokens);
  p.slot_mapping = view_list<int64_t>("slot_mapping", slot_mapping, k);
  FM_CHECK(rotary_cos.has_value() == rotary_sin.has_value() && rotary_cos.has_value() == positions.has_value(),
           "rotary_cos, rotary_sin and positions must be given together");
  FM_CHECK(rotary_cos.has_value() || !q.has_value(), "q must be given with rotary_cos only");
  if (rotary_cos.has_value()) set_rotation(p, *rotary_cos, *rotary_sin, *positions, k);
  if (q.has_value()) {
    p.q = checked_rows("q", *q, k, -1, p.cache.head_dim);
    check_written("q", *q);
    p.heads = q->size(1);
  }
  p.interleaved = interleaved;
#ifndef FM_CUDA
  check_append_values(p);
#endif
  if (p.num_tokens > 0 && p.cache.kv_heads + p.heads > 0) FM_EXECUTE(paged_kv_append, p, k);
}

// ---- gather ----------------------------------------------------------------------------------------------------------

Tensor paged_kv_gather(const Tensor& cache, const Tensor& block_table, const Tensor& cu_seqlens, int64_t num_tokens,
                       const std::optional<Tensor>& scale, ScalarType dtype) {
  PagedGatherParams p{};
  check_cache("cache", cache, cache);
  p.dtype = cache_dtype_of("cache", cache);
  p.num_pages = cache.size(0);
  p.page_size = cache.size(1);
  p.kv_heads = cache.size(2);
  p.dim = cache.size(3);
  p.cache = view_pages(cache);
  p.scale = view_scale("scale", scale, cache, p.dtype);
  const TableView table = view_table(block_table, cache);
  p.batch = table.batch;
  p.block_table = table.data;
  p.table_stride = table.stride;
  p.max_pages = table.max_pages;
  check_size("cu_seqlens", cu_seqlens, 0, p.batch + 1);
  p.cu_seqlens = view_list<int32_t>("cu_seqlens", cu_seqlens, cache);
  FM_CHECK(num_tokens >= 0, "num_tokens must not be negative, got ", num_tokens);
  p.num_tokens = num_tokens;
#ifndef FM_CUDA
  check_prefix_values("cu_seqlens", p.cu_seqlens, p.batch, num_tokens);
  for (int64_t b = 0; b < p.batch; ++b) {
    check_page_values(table, b, 0, p.cu_seqlens[b + 1] - p.cu_seqlens[b], p.page_size, p.num_pages);
  }
#endif
  Tensor out = torch::stable::new_empty(cache, {num_tokens, p.kv_heads, p.dim}, dtype);
  p.out_dtype = dtype_of("dtype", out);
  p.out = view_rows(out);
  if (out.numel() > 0) FM_EXECUTE(paged_kv_gather, p, cache);
  return out;
}

// ---- copies of pages -------------------------------------------------------------------------------------------------

// Pages of `a` and `b`, which have the same sizes but for the number of pages, as runs of bytes; dimensions that lie
// together in both are joined.
void view_bytes(PagedCopyParams& p, const Tensor& a, const Tensor& b) {
  const int64_t element = a.element_size();
  struct Dim {
    int64_t size, from_stride, to_stride;
  };
  std::vector<Dim> dims{{element, 1, 1}};  // from the innermost; bytes
  for (int64_t dim = a.dim() - 1; dim > 0; --dim) {
    if (a.size(dim) == 1) continue;
    const Dim next{a.size(dim), a.stride(dim) * element, b.stride(dim) * element};
    const Dim inner = dims.back();
    if (next.from_stride == inner.size * inner.from_stride && next.to_stride == inner.size * inner.to_stride) {
      dims.back() = {inner.size * next.size, inner.from_stride, inner.to_stride};
    } else {
      dims.push_back(next);
    }
  }
  p.run_bytes = dims[0].size;
  for (int i = 0; i < 3; ++i) {  // size[2] is the innermost
    const bool is_there = static_cast<size_t>(i) + 1 < dims.size();
    p.size[2 - i] = is_there ? dims[i + 1].size : 1;
    p.from.stride[2 - i] = is_there ? dims[i + 1].from_stride : 0;
    p.to.stride[2 - i] = is_there ? dims[i + 1].to_stride : 0;
  }
  p.from.data = static_cast<char*>(data_of(a));
  p.to.data = static_cast<char*>(data_of(b));
  p.from.num_pages = a.size(0);
  p.to.num_pages = b.size(0);
  p.from.page_stride = stride_of(a, 0) * element;
  p.to.page_stride = stride_of(b, 0) * element;
}

void check_pages_tensor(const char* name, const Tensor& t) {
  FM_CHECK(t.dim() >= 2 && t.dim() <= 5, name, " must have from 2 to 5 dimensions, got ", t.dim());
  check_last_dim_contiguous(name, t);
}

void check_list_values([[maybe_unused]] const char* name, [[maybe_unused]] const int32_t* pages,
                       [[maybe_unused]] int64_t count, [[maybe_unused]] int64_t num_pages) {
#ifndef FM_CUDA
  for (int64_t i = 0; i < count; ++i) {
    FM_CHECK(pages[i] >= 0 && pages[i] < num_pages, name, " must be from 0 to ", num_pages - 1, ", got ", pages[i]);
  }
#endif
}

void execute(const PagedCopyParams& p, const Tensor& cache) {
  // Of a cache without elements view_bytes may leave out the dimension that has none: nothing made its rows contiguous.
  if (p.count > 0 && cache.numel() > 0) FM_EXECUTE(paged_kv_copy, p, cache);
}

void paged_kv_copy_pages(const Tensor& cache, const Tensor& src, const Tensor& dst) {
  check_pages_tensor("cache", cache);
  check_written("cache", cache);
  PagedCopyParams p{};
  view_bytes(p, cache, cache);
  p.from_pages = view_list<int32_t>("src", src, cache);
  p.to_pages = view_list<int32_t>("dst", dst, cache);
  check_size("dst", dst, 0, src.size(0));
  p.count = src.size(0);
  check_list_values("src", p.from_pages, p.count, p.from.num_pages);
  check_list_values("dst", p.to_pages, p.count, p.to.num_pages);
#ifndef FM_CUDA
  std::vector<bool> is_source(static_cast<size_t>(p.from.num_pages)), is_written(is_source);
  for (int64_t i = 0; i < p.count; ++i) is_source[static_cast<size_t>(p.from_pages[i])] = true;
  for (int64_t i = 0; i < p.count; ++i) {
    const auto page = static_cast<size_t>(p.to_pages[i]);
    FM_CHECK(!is_source[page], "dst must not name a page of src, got ", page);
    FM_CHECK(!is_written[page], "dst must not name a page twice, got ", page);
    is_written[page] = true;
  }
#endif
  execute(p, cache);
}

void check_host_buffer(const Tensor& cache, const Tensor& pages, const Tensor& host_buffer) {
  check_pages_tensor("cache", cache);
  check_rank("host_buffer", host_buffer, cache.dim());
  check_last_dim_contiguous("host_buffer", host_buffer);
  FM_CHECK(host_buffer.scalar_type() == cache.scalar_type(), "host_buffer must have the dtype of cache");
  FM_CHECK(host_buffer.is_cpu(), "host_buffer must be on the CPU");
  for (int64_t dim = 1; dim < cache.dim(); ++dim) check_size("host_buffer", host_buffer, dim, cache.size(dim));
  FM_CHECK(host_buffer.size(0) >= pages.size(0), "host_buffer must hold the ", pages.size(0), " pages, got ",
           host_buffer.size(0));
}

void paged_kv_swap_out(const Tensor& cache, const Tensor& pages, const Tensor& host_buffer) {
  PagedCopyParams p{};
  p.from_pages = view_list<int32_t>("pages", pages, cache);
  check_host_buffer(cache, pages, host_buffer);
  check_written("host_buffer", host_buffer);
  view_bytes(p, cache, host_buffer);
  p.count = pages.size(0);
  check_list_values("pages", p.from_pages, p.count, p.from.num_pages);
  execute(p, cache);
}

void paged_kv_swap_in(const Tensor& cache, const Tensor& pages, const Tensor& host_buffer) {
  PagedCopyParams p{};
  p.to_pages = view_list<int32_t>("pages", pages, cache);
  check_host_buffer(cache, pages, host_buffer);
  check_written("cache", cache);
  view_bytes(p, host_buffer, cache);
  p.count = pages.size(0);
  check_list_values("pages", p.to_pages, p.count, p.to.num_pages);
#ifndef FM_CUDA
  std::vector<bool> is_written(static_cast<size_t>(p.to.num_pages));
  for (int64_t i = 0; i < p.count; ++i) {
    const auto page = static_cast<size_t>(p.to_pages[i]);
    FM_CHECK(!is_written[page], "pages must not name a page twice, got ", page);
    is_written[page] = true;
  }
#endif
  execute(p, cache);
}

void paged_kv_compact(const Tensor& cache, const Tensor& keep) {
  check_pages_tensor("cache", cache);
  check_written("cache", cache);
  PagedCopyParams p{};
  view_bytes(p, cache, cache);
  p.from_pages = view_list<int32_t>("keep", keep, cache);
  p.count = keep.size(0);
  FM_CHECK(p.count <= p.from.num_pages, "keep must name at most the ", p.from.num_pages, " pages of the cache, got ",
           p.count);
  p.in_order = true;
  check_list_values("keep", p.from_pages, p.count, p.from.num_pages);
#ifndef FM_CUDA
  for (int64_t i = 1; i < p.count; ++i) {
    FM_CHECK(p.from_pages[i - 1] < p.from_pages[i], "keep must ascend, got ", p.from_pages[i - 1], " before ",
             p.from_pages[i]);
  }
#endif
  execute(p, cache);
}

// ---- page table ------------------------------------------------------------------------------------------------------

Tensor paged_kv_page_table_from_csr(const Tensor& indptr, const Tensor& indices, int64_t max_pages) {
  PageTableParams p{};
  p.indptr = view_list<int32_t>("indptr", indptr, indptr);
  p.indices = view_list<int32_t>("indices", indices, indptr);
  FM_CHECK(indptr.size(0) >= 1, "indptr must have batch + 1 elements, got none");
  FM_CHECK(max_pages >= 0, "max_pages must not be negative, got ", max_pages);
  p.batch = indptr.size(0) - 1;
  p.num_indices = indices.size(0);
  p.max_pages = max_pages;
#ifndef FM_CUDA
  check_prefix_values("indptr", p.indptr, p.batch, p.num_indices);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t count = p.indptr[b + 1] - p.indptr[b];
    FM_CHECK(count <= max_pages, "max_pages must be at least the longest list, ", count, ", got ", max_pages);
  }
#endif
  Tensor table = torch::stable::new_empty(indptr, {p.batch, max_pages});
  p.table = static_cast<int32_t*>(data_of(table));
  if (table.numel() > 0) FM_EXECUTE(paged_kv_page_table, p, indptr);
  return table;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) {
  m.impl("paged_kv_append", TORCH_BOX(&paged_kv_append));
  m.impl("paged_kv_gather", TORCH_BOX(&paged_kv_gather));
  m.impl("paged_kv_copy_pages", TORCH_BOX(&paged_kv_copy_pages));
  m.impl("paged_kv_swap_out", TORCH_BOX(&paged_kv_swap_out));
  m.impl("paged_kv_swap_in", TORCH_BOX(&paged_kv_swap_in));
  m.impl("paged_kv_compact", TORCH_BOX(&paged_kv_compact));
  m.impl("paged_kv_page_table_from_csr", TORCH_BOX(&paged_kv_page_table_from_csr));
}

}  // namespace fmkernels
