// SPDX-License-Identifier: Apache-2.0
// paged_kv_pages.cu: copies of pages, among them those to and from host memory, and the page table, on CUDA.
//
// Contract   see paged_kv.h. Page ids are read on the device; a copy with one out of range does not happen. Host memory
//            is read and written by the kernel itself, over its address: it must be pinned.
// Work       A page is runs of bytes, a run is vectors of 16 bytes, or 4 or 1 where something is not so aligned. A thread
//            owns a vector of one page; where pages move within a cache, of all pages, which it copies in their order.
// Shared     none.
// Numerics   bytes. Deterministic.
// Cost       every byte once: bound by memory, or by the bus to the host.

#include <type_traits>

#include "paged_kv.h"

#include "../common/dispatch.h"
#include "../common/divisor.h"
#include "../common/launch.h"

namespace fmkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // pages that a thread has read before it writes the first

struct CopyCall {
  PagedCopyParams p;
  int units;                   // vectors of a page
  Divisor blocks_per_page;     // where a block copies of one page
  Divisor run_units, size[3];  // vectors of a run; dimensions of the runs
};

// Where the vector `unit` of a page lies in `from` and in `to`.
struct Offsets {
  int64_t from, to;
};
template <int kBytes>
__device__ __forceinline__ Offsets offsets_of(const CopyCall& call, int unit) {
  int run = unit / call.run_units;
  const int64_t column = static_cast<int64_t>(unit - run * call.run_units.value()) * kBytes;
  Offsets at{column, column};
  for (int dim = 2; dim >= 0; --dim) {
    const int rest = run / call.size[dim], index = run - rest * call.size[dim].value();
    at.from += index * call.p.from.stride[dim];
    at.to += index * call.p.to.stride[dim];
    run = rest;
  }
  return at;
}

// The page `i` of a list of `pages`; null where there is none.
__device__ __forceinline__ char* page_of(const PageBytes& pages, const int32_t* list, int i) {
  const int page = list == nullptr ? i : list[i];
  return page >= 0 && page < pages.num_pages ? pages.data + page * pages.page_stride : nullptr;
}

template <int kBytes>
using Vector = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 4, uint32_t, uint8_t>>;

template <int kBytes>
__global__ void __launch_bounds__(kThreads) paged_kv_copy_kernel(CopyCall call) {
  const int block = static_cast<int>(blockIdx.x), i = block / call.blocks_per_page;
  const int unit = (block - i * call.blocks_per_page.value()) * kThreads + static_cast<int>(threadIdx.x);
  const char* from = page_of(call.p.from, call.p.from_pages, i);
  char* to = page_of(call.p.to, call.p.to_pages, i);
  if (unit >= call.units || from == nullptr || to == nullptr) return;
  const Offsets at = offsets_of<kBytes>(call, unit);
  *reinterpret_cast<Vector<kBytes>*>(to + at.to) = *reinterpret_cast<const Vector<kBytes>*>(from + at.from);
}

// Source pages ascend, so number i is i or more: no page is written before this thread has read it, several ahead too.
template <int kBytes>
__global__ void __launch_bounds__(kThreads) paged_kv_compact_kernel(CopyCall call) {
  const int unit = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (unit >= call.units) return;
  const Offsets at = offsets_of<kBytes>(call, unit);
  const int count = static_cast<int>(call.p.count);
  for (int first = 0; first < count; first += kInFlight) {
    Vector<kBytes> vectors[kInFlight];
    bool is_there[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const char* from = first + i < count ? page_of(call.p.from, call.p.from_pages, first + i) : nullptr;
      is_there[i] = from != nullptr;
      if (is_there[i]) vectors[i] = *reinterpret_cast<const Vector<kBytes>*>(from + at.from);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (!is_there[i]) continue;
      *reinterpret_cast<Vector<kBytes>*>(page_of(call.p.to, nullptr, first + i) + at.to) = vectors[i];
    }
  }
}

__global__ void __launch_bounds__(kThreads) paged_kv_page_table_kernel(PageTableParams p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= p.batch * p.max_pages) return;
  const int64_t b = at / p.max_pages, index = p.indptr[b] + at % p.max_pages;
  const bool is_there = index >= 0 && index < p.indptr[b + 1] && index < p.num_indices;
  p.table[at] = is_there ? p.indices[index] : -1;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_multiple(const PagedCopyParams& p, int64_t bytes) {
  bool all = p.run_bytes % bytes == 0;
  for (const PageBytes* pages : {&p.from, &p.to}) {
    all = all && reinterpret_cast<uintptr_t>(pages->data) % static_cast<uint64_t>(bytes) == 0;
    for (const int64_t stride : {pages->page_stride, pages->stride[0], pages->stride[1], pages->stride[2]}) {
      all = all && stride % bytes == 0;
    }
  }
  return all;
}

// Memory that the device cannot reach would end the whole process there.
void check_reachable(const void* data) {
  cudaPointerAttributes attributes{};
  const cudaError_t status = cudaPointerGetAttributes(&attributes, data);
  FM_CHECK(status == cudaSuccess && attributes.type != cudaMemoryTypeUnregistered,
           "host_buffer must be pinned where the cache is on CUDA");
}

}  // namespace

void launch_paged_kv_copy(const PagedCopyParams& p, cudaStream_t stream) {
  check_reachable(p.from.data);
  check_reachable(p.to.data);
  const int bytes = is_multiple(p, 16) ? 16 : is_multiple(p, 4) ? 4 : 1;
  CopyCall call{};
  call.p = p;
  const int64_t units = p.size[0] * p.size[1] * p.size[2] * (p.run_bytes / bytes);
  const int64_t blocks_per_page = ceil_div(units, kThreads), num_blocks = p.in_order ? 1 : p.count;
  FM_CHECK(units <= INT32_MAX - kThreads && p.count <= INT32_MAX && blocks_per_page <= INT32_MAX / num_blocks,
           "paged_kv: pages of ", units, " vectors are too many for one copy");
  call.units = static_cast<int>(units);
  call.blocks_per_page = Divisor(static_cast<int32_t>(blocks_per_page));
  call.run_units = Divisor(static_cast<int32_t>(p.run_bytes / bytes));
  for (int dim = 0; dim < 3; ++dim) call.size[dim] = Divisor(static_cast<int32_t>(p.size[dim]));
  dispatch_int<16, 4, 1>("bytes", bytes, [&]<int kBytes>() {
    launch("paged_kv", p.in_order ? paged_kv_compact_kernel<kBytes> : paged_kv_copy_kernel<kBytes>,
           dim3(static_cast<unsigned>(blocks_per_page * num_blocks)), kThreads, 0, stream, call);
  });
}

void launch_paged_kv_page_table(const PageTableParams& p, cudaStream_t stream) {
  const int64_t num_blocks = ceil_div(p.batch * p.max_pages, kThreads);
  FM_CHECK(num_blocks <= INT32_MAX, "paged_kv.page_table_from_csr: ", num_blocks, " blocks are more than a grid holds");
  launch("paged_kv.page_table_from_csr", paged_kv_page_table_kernel, dim3(static_cast<unsigned>(num_blocks)), kThreads,
         0, stream, p);
}

}  // namespace fmkernels
