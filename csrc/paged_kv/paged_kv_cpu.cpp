// SPDX-License-Identifier: Apache-2.0
// paged_kv_cpu.cpp: append, gather, the copies of pages and the page table on the CPU. attend: paged_kv_attend_cpu.cpp.
//
// Work       append and gather: tasks of kTaskTokens tokens, a row (one head of one token) at a time through a buffer of
//            floats. Copies: a task per page; compact: a task per run of a page, which walks the pages in their order.
// Numerics   float32 between what is read and what is stored; one rounding. Deterministic.
// Cost       every byte once: bound by memory.

#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "paged_kv_vec_cpu.h"

namespace fmkernels {
namespace {

constexpr int64_t kTaskTokens = 64;

// f(token) for all tokens of which each moves so many bytes.
template <class F>
void for_each_token(int64_t num_tokens, int64_t token_bytes, F&& f) {
  const int64_t num_tasks = (num_tokens + kTaskTokens - 1) / kTaskTokens;
  parallel_for(num_tasks, workers_for(num_tokens * token_bytes), [&](int64_t task, int) {
    const int64_t end = (task + 1) * kTaskTokens < num_tokens ? (task + 1) * kTaskTokens : num_tokens;
    for (int64_t token = task * kTaskTokens; token < end; ++token) f(token);
  });
}

// ---- append ----------------------------------------------------------------------------------------------------------

// Rotates x[0, rotary_dim) by the angles of one position.
void rotate(float* x, const float* cos, const float* sin, int64_t rotary_dim, bool interleaved) {
  const int64_t half = rotary_dim / 2;
  if (interleaved) {
    for (int64_t c = 0; c < half; ++c) {
      const float a = x[2 * c], b = x[2 * c + 1];
      x[2 * c] = a * cos[c] - b * sin[c];
      x[2 * c + 1] = b * cos[c] + a * sin[c];
    }
    return;
  }
  int64_t c = 0;
  for (; c + kLanes <= half; c += kLanes) {
    const VecF a = load(x + c), b = load(x + half + c), cosine = load(cos + c), sine = load(sin + c);
    store(x + c, a * cosine - b * sine);
    store(x + half + c, b * cosine + a * sine);
  }
  for (; c < half; ++c) {
    const float a = x[c], b = x[half + c];
    x[c] = a * cos[c] - b * sin[c];
    x[half + c] = b * cos[c] + a * sin[c];
  }
}

template <class T>
void load_row(const T* from, int64_t dim, float* to) {
  for (int64_t c = 0; c < dim; c += kLanes) store(to + c, load(from + c));
}

// The largest magnitude, NaN where there is one.
float largest_of(const float* row, int64_t dim) {
  VecF largest{}, zero{};
  for (int64_t c = 0; c < dim; c += kLanes) {
    const VecF x = load(row + c);
    largest = max(largest, absolute(x));
    zero += x * 0.0f;
  }
  float result = 0.0f;
  for (int i = 0; i < kLanes; ++i) result = largest[i] > result ? largest[i] : result;
  return horizontal_sum(zero) == 0.0f ? result : float_from_bits(0x7fc00000u);
}

template <class Stored>
void store_row(const float* row, int64_t dim, Stored* to, [[maybe_unused]] const ScaleView& scale, int64_t page,
               int64_t slot, int64_t head) {
  if constexpr (kIsQuantized<Stored>) {
    float divisor = 1.0f;
    if (scale.data != nullptr) {
      float* at = scale_at(scale, page, slot, head);
      if (scale.per_token) *at = scale_of_row<Stored>(largest_of(row, dim));
      divisor = *at;
    }
    for (int64_t c = 0; c < dim; c += kLanes) store_as(to + c, load(row + c) / divisor);
  } else {
    for (int64_t c = 0; c < dim; c += kLanes) store(to + c, load(row + c));
  }
}

template <class T, class Stored>
void append(const PagedAppendParams& p) {
  const PagedCache& cache = p.cache;
  const int64_t row_floats = cache.kv_heads * (cache.head_dim + cache.v_head_dim) + p.heads * cache.head_dim;
  const bool is_copied = p.rotary_cos == nullptr && static_cast<int32_t>(cache.dtype) == static_cast<int32_t>(p.dtype);
  for_each_token(p.num_tokens, row_floats * 8, [&](int64_t t) {
    alignas(64) float row[kMaxHeadDim];
    const float *cos = nullptr, *sin = nullptr;
    if (p.rotary_cos != nullptr) {
      cos = p.rotary_cos + p.positions[t] * p.rotary_stride;
      sin = p.rotary_sin + p.positions[t] * p.rotary_stride;
    }
    auto row_of = [&](const RowsView& view, int64_t head) {
      return static_cast<T*>(view.data) + t * view.token_stride + head * view.head_stride;
    };
    for (int64_t head = 0; head < p.heads; ++head) {
      T* q = row_of(p.q, head);
      load_row(q, cache.head_dim, row);
      rotate(row, cos, sin, p.rotary_dim, p.interleaved);
      for (int64_t c = 0; c < cache.head_dim; c += kLanes) store(q + c, load(row + c));
    }
    if (p.slot_mapping[t] < 0) return;
    const int64_t page = p.slot_mapping[t] / cache.page_size, slot = p.slot_mapping[t] % cache.page_size;
    auto write = [&](const RowsView& from, const PagesView& to, const ScaleView& scale, int64_t dim, bool is_rotated) {
      for (int64_t head = 0; head < cache.kv_heads; ++head) {
        Stored* out = static_cast<Stored*>(to.data) + offset_of(to, page, slot, head);
        if (is_copied) {
          memcpy(out, row_of(from, head), static_cast<size_t>(dim) * sizeof(T));
          continue;
        }
        load_row(row_of(from, head), dim, row);
        if (is_rotated) rotate(row, cos, sin, p.rotary_dim, p.interleaved);
        store_row(row, dim, out, scale, page, slot, head);
      }
    };
    write(p.k, cache.k, cache.k_scale, cache.head_dim, cos != nullptr);
    write(p.v, cache.v, cache.v_scale, cache.v_head_dim, false);
  });
}

// ---- gather ----------------------------------------------------------------------------------------------------------

template <class Stored, class T>
void gather(const PagedGatherParams& p) {
  const bool is_copied = static_cast<int32_t>(p.dtype) == static_cast<int32_t>(p.out_dtype);
  const int64_t token_bytes = p.kv_heads * p.dim * static_cast<int64_t>(sizeof(Stored) + sizeof(T));
  for_each_token(p.num_tokens, token_bytes, [&](int64_t t) {
    int64_t b = 0;  // the last request that begins at t or before
    for (int64_t end = p.batch; end - b > 1;) {
      const int64_t middle = (b + end) / 2;
      (p.cu_seqlens[middle] <= t ? b : end) = middle;
    }
    const int64_t position = t - p.cu_seqlens[b];
    const int64_t page = p.block_table[b * p.table_stride + position / p.page_size], slot = position % p.page_size;
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      const Stored* from = static_cast<const Stored*>(p.cache.data) + offset_of(p.cache, page, slot, head);
      T* to = static_cast<T*>(p.out.data) + t * p.out.token_stride + head * p.out.head_stride;
      if (is_copied) {
        memcpy(to, from, static_cast<size_t>(p.dim) * sizeof(T));
        continue;
      }
      const float scale = p.scale.data == nullptr ? 1.0f : *scale_at(p.scale, page, slot, head);
      for (int64_t c = 0; c < p.dim; c += kLanes) store(to + c, load(from + c) * scale);
    }
  });
}

// ---- pages -----------------------------------------------------------------------------------------------------------

// f(offset in a page of `from`, in one of `to`) for the runs [begin, end).
template <class F>
void for_each_run(const PagedCopyParams& p, int64_t begin, int64_t end, F&& f) {
  for (int64_t run = begin; run < end; ++run) {
    const int64_t index[3] = {run / (p.size[1] * p.size[2]), run / p.size[2] % p.size[1], run % p.size[2]};
    int64_t from = 0, to = 0;
    for (int dim = 0; dim < 3; ++dim) {
      from += index[dim] * p.from.stride[dim];
      to += index[dim] * p.to.stride[dim];
    }
    f(from, to);
  }
}

void copy(const PagedCopyParams& p) {
  const int64_t num_runs = p.size[0] * p.size[1] * p.size[2];
  const int workers = workers_for(2 * p.count * num_runs * p.run_bytes);
  auto page_of = [](const PageBytes& pages, const int32_t* list, int64_t i) {
    return pages.data + (list == nullptr ? i : list[i]) * pages.page_stride;
  };
  auto copy_runs = [&](int64_t i, int64_t begin, int64_t end) {
    const char* from = page_of(p.from, p.from_pages, i);
    char* to = page_of(p.to, p.to_pages, i);
    if (from == to) return;
    for_each_run(p, begin, end,
                 [&](int64_t f, int64_t t) { memcpy(to + t, from + f, static_cast<size_t>(p.run_bytes)); });
  };
  if (p.in_order) {
    parallel_for(num_runs, workers, [&](int64_t run, int) {
      for (int64_t i = 0; i < p.count; ++i) copy_runs(i, run, run + 1);
    });
  } else {
    parallel_for(p.count, workers, [&](int64_t i, int) { copy_runs(i, 0, num_runs); });
  }
}

}  // namespace

template <>
void run_paged_kv_append<kIsa>(const PagedAppendParams& p) {
  dispatch_dtype(p.dtype,
                 [&]<class T>() { dispatch_cache(p.cache.dtype, [&]<class Stored>() { append<T, Stored>(p); }); });
}

template <>
void run_paged_kv_gather<kIsa>(const PagedGatherParams& p) {
  dispatch_cache(p.dtype,
                 [&]<class Stored>() { dispatch_dtype(p.out_dtype, [&]<class T>() { gather<Stored, T>(p); }); });
}

template <>
void run_paged_kv_copy<kIsa>(const PagedCopyParams& p) {
  copy(p);
}

template <>
void run_paged_kv_page_table<kIsa>(const PageTableParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t count = p.indptr[b + 1] - p.indptr[b];
    int32_t* row = p.table + b * p.max_pages;
    for (int64_t i = 0; i < p.max_pages; ++i) row[i] = i < count ? p.indices[p.indptr[b] + i] : -1;
  }
}

}  // namespace fmkernels
