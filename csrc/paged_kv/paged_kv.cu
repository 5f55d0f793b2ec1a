// SPDX-License-Identifier: Apache-2.0
// paged_kv.cu: append and gather on CUDA. attend: paged_kv_attend.cu; pages as a whole: paged_kv_pages.cu.
//
// Contract   see paged_kv.h. Slots, positions, page ids and prefix sums are read on the device: what is out of range is
//            skipped by append, and zeros for gather.
// Work       A row is one head of one token. `lanes` lanes of a warp own it, kColumns columns each, so that a warp has as
//            many rows as fit, and the largest magnitude of a row is a shuffle away.
// Shared     none.
// Numerics   float32 between what is read and what is stored. Deterministic.
// Cost       every byte once: bound by memory. The angles and the other half of a rotated row come from the cache.

#include "paged_kv.h"

#include "../common/dispatch.h"
#include "../common/divisor.h"
#include "../common/launch.h"

namespace fmkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 8;  // of a lane; every dim is a multiple

struct Columns {
  float x[kColumns];
};

template <class T>
struct alignas(kColumns * sizeof(T) < 16 ? kColumns * sizeof(T) : 16) Packed {
  T x[kColumns];
};

// kColumns numbers from memory, at once where every row lies on the boundary that this takes.
template <class T>
__device__ __forceinline__ Columns load_columns(const T* from, bool aligned) {
  Packed<T> packed;
  if (aligned) {
    packed = *reinterpret_cast<const Packed<T>*>(from);
  } else {
    for (int i = 0; i < kColumns; ++i) packed.x[i] = from[i];
  }
  Columns columns;
  for (int i = 0; i < kColumns; ++i) columns.x[i] = to_float(packed.x[i]);
  return columns;
}
template <class T>
__device__ __forceinline__ void store_columns(T* to, const Columns& columns, bool aligned) {
  Packed<T> packed;
  for (int i = 0; i < kColumns; ++i) packed.x[i] = to_stored<T>(columns.x[i]);
  if (aligned) {
    *reinterpret_cast<Packed<T>*>(to) = packed;
  } else {
    for (int i = 0; i < kColumns; ++i) to[i] = packed.x[i];
  }
}

// The same for a dtype that is not a template argument: one of three branches, which all threads take together.
__device__ __forceinline__ Columns load_columns(DType dtype, const void* data, int64_t offset, bool aligned) {
  switch (dtype) {
    case DType::kFloat32: return load_columns(static_cast<const float*>(data) + offset, aligned);
    case DType::kFloat16: return load_columns(static_cast<const Half*>(data) + offset, aligned);
    default: return load_columns(static_cast<const BFloat16*>(data) + offset, aligned);
  }
}
__device__ __forceinline__ void store_columns(DType dtype, void* data, int64_t offset, const Columns& x, bool aligned) {
  switch (dtype) {
    case DType::kFloat32: return store_columns(static_cast<float*>(data) + offset, x, aligned);
    case DType::kFloat16: return store_columns(static_cast<Half*>(data) + offset, x, aligned);
    default: return store_columns(static_cast<BFloat16*>(data) + offset, x, aligned);
  }
}

// ---- append ----------------------------------------------------------------------------------------------------------

struct AppendCall {
  PagedAppendParams p;
  int lanes;  // of a row, a power of two
  Divisor rows_per_token, page_size;
  bool aligned;         // the rows of all tensors
  bool angles_aligned;  // rotary_dim / 2 and the rows of the angles
};

// Rotates the columns from `column` on of the row at data + offset, which hold x.
__device__ __forceinline__ void rotate(const AppendCall& call, int64_t position, const void* data, int64_t offset,
                                       int column, Columns& x) {
  const PagedAppendParams& p = call.p;
  const int rotary_dim = static_cast<int>(p.rotary_dim), half = rotary_dim / 2;
  if (column >= rotary_dim) return;
  const float *cos = p.rotary_cos + position * p.rotary_stride, *sin = p.rotary_sin + position * p.rotary_stride;
  if (p.interleaved) {
    for (int i = 0; i < kColumns && column + i < rotary_dim; i += 2) {
      const float a = x.x[i], b = x.x[i + 1], c = cos[(column + i) / 2], s = sin[(column + i) / 2];
      x.x[i] = a * c - b * s;
      x.x[i + 1] = b * c + a * s;
    }
  } else if (call.aligned && call.angles_aligned) {  // all columns of a lane lie in the same half
    const bool is_second = column >= half;
    const int angle = is_second ? column - half : column;
    const Columns other = load_columns(p.dtype, data, offset + (is_second ? -half : half), true);
    const Columns c = load_columns(cos + angle, true), s = load_columns(sin + angle, true);
    for (int i = 0; i < kColumns; ++i) {
      x.x[i] = is_second ? x.x[i] * c.x[i] + other.x[i] * s.x[i] : x.x[i] * c.x[i] - other.x[i] * s.x[i];
    }
  } else {
    for (int i = 0; i < kColumns && column + i < rotary_dim; ++i) {
      const bool is_second = column + i >= half;
      const int angle = is_second ? column + i - half : column + i;
      const int64_t at = offset + i + (is_second ? -half : half);
      float other = 0.0f;
      switch (p.dtype) {
        case DType::kFloat32: other = static_cast<const float*>(data)[at]; break;
        case DType::kFloat16: other = to_float(static_cast<const Half*>(data)[at]); break;
        default: other = to_float(static_cast<const BFloat16*>(data)[at]);
      }
      x.x[i] = is_second ? x.x[i] * cos[angle] + other * sin[angle] : x.x[i] * cos[angle] - other * sin[angle];
    }
  }
}

// The largest magnitude in the row that the lanes of a warp share, NaN where there is one; every lane holds it.
__device__ __forceinline__ float largest_of_row(const Columns& x, int lanes) {
  unsigned largest =
      0;  // the bits of floats that are not negative have the order of the floats, and NaN the last place
  for (int i = 0; i < kColumns; ++i) largest = max(largest, float_bits(x.x[i]) & 0x7fffffffu);
  for (int step = lanes / 2; step > 0; step /= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  return float_from_bits(largest);
}

template <class Stored>
__global__ void __launch_bounds__(kThreads) paged_kv_append_kernel(AppendCall call) {
  const PagedAppendParams& p = call.p;
  const PagedCache& cache = p.cache;
  const int kv_heads = static_cast<int>(cache.kv_heads);
  const int row = static_cast<int>(blockIdx.x) * (kThreads / call.lanes) + static_cast<int>(threadIdx.x) / call.lanes;
  const int column = static_cast<int>(threadIdx.x) % call.lanes * kColumns;
  const int token = row / call.rows_per_token, place = row - token * call.rows_per_token.value();
  // In the order k, v, q. No thread returns before the shuffles.
  const bool is_q = place >= 2 * kv_heads, is_v = !is_q && place >= kv_heads;
  const int head = is_q ? place - 2 * kv_heads : is_v ? place - kv_heads : place;
  const RowsView& from = is_q ? p.q : is_v ? p.v : p.k;
  const bool is_there = token < p.num_tokens;
  const bool has_columns = is_there && column < (is_v ? cache.v_head_dim : cache.head_dim);
  const int64_t offset = token * from.token_stride + head * from.head_stride + column;

  // Read and rotate.
  Columns x{};
  if (has_columns) {
    x = load_columns(p.dtype, from.data, offset, call.aligned);
    if (!is_v && p.rotary_cos != nullptr) {
      const int64_t position = p.positions[token];
      if (position >= 0 && position < p.max_position) rotate(call, position, from.data, offset, column, x);
    }
  }
  float largest = 0.0f;
  if (kIsQuantized<Stored> && (cache.k_scale.per_token || cache.v_scale.per_token)) {
    largest = largest_of_row(x, call.lanes);
  }
  __syncwarp();  // all lanes of a query have read what others write
  if (!has_columns) return;
  if (is_q) return store_columns(p.dtype, p.q.data, offset, x, call.aligned);

  // Quantise and write.
  const int64_t slot = p.slot_mapping[token];
  if (slot < 0 || slot >= cache.num_pages * cache.page_size) return;
  const int page = static_cast<int>(slot) / call.page_size;
  const int place_in_page = static_cast<int>(slot) - page * call.page_size.value();
  const PagesView& to = is_v ? cache.v : cache.k;
  if constexpr (kIsQuantized<Stored>) {
    const ScaleView& scale = is_v ? cache.v_scale : cache.k_scale;
    if (scale.data != nullptr) {
      float* at = scale_at(scale, page, place_in_page, head);
      const float divisor = scale.per_token ? scale_of_row<Stored>(largest) : *at;
      if (scale.per_token && column == 0) *at = divisor;
      for (int i = 0; i < kColumns; ++i) x.x[i] /= divisor;
    }
  }
  store_columns(static_cast<Stored*>(to.data) + offset_of(to, page, place_in_page, head) + column, x, call.aligned);
}

// ---- gather ----------------------------------------------------------------------------------------------------------

struct GatherCall {
  PagedGatherParams p;
  int lanes;
  Divisor kv_heads, page_size;
  bool aligned;
};

template <class Stored>
__global__ void __launch_bounds__(kThreads) paged_kv_gather_kernel(GatherCall call) {
  const PagedGatherParams& p = call.p;
  const int row = static_cast<int>(blockIdx.x) * (kThreads / call.lanes) + static_cast<int>(threadIdx.x) / call.lanes;
  const int column = static_cast<int>(threadIdx.x) % call.lanes * kColumns;
  const int token = row / call.kv_heads, head = row - token * call.kv_heads.value();
  if (token >= p.num_tokens || column >= p.dim) return;
  int begin = 0;  // the last request that begins at the token or before
  for (int end = static_cast<int>(p.batch); end - begin > 1;) {
    const int middle = (begin + end) / 2;
    if (p.cu_seqlens[middle] <= token) begin = middle;
    else end = middle;
  }
  Columns x{};
  const int position = p.batch > 0 ? token - p.cu_seqlens[begin] : -1;
  const int index = position / call.page_size, slot = position - index * call.page_size.value();
  if (position >= 0 && index < p.max_pages && token < p.cu_seqlens[begin + 1]) {
    const int page = p.block_table[begin * p.table_stride + index];
    if (page >= 0 && page < p.num_pages) {
      x = load_columns(static_cast<const Stored*>(p.cache.data) + offset_of(p.cache, page, slot, head) + column,
                       call.aligned);
      const float scale = p.scale.data == nullptr ? 1.0f : *scale_at(p.scale, page, slot, head);
      for (int i = 0; i < kColumns; ++i) x.x[i] *= scale;
    }
  }
  store_columns(p.out_dtype, p.out.data, token * p.out.token_stride + head * p.out.head_stride + column, x,
                call.aligned);
}

// ---- launchers -------------------------------------------------------------------------------------------------------

// Whether rows of elements of so many bytes lie where Packed takes them.
template <class... Strides>
bool is_aligned(const void* data, int64_t element, Strides... strides) {
  const int64_t boundary = kColumns * element < 16 ? kColumns * element : 16;
  return reinterpret_cast<uintptr_t>(data) % static_cast<uint64_t>(boundary) == 0 &&
         ((strides * element % boundary == 0) && ...);
}
int64_t bytes_of(CacheDType dtype) { return is_quantized(dtype) ? 1 : dtype == CacheDType::kFloat32 ? 4 : 2; }
bool is_aligned(const RowsView& rows, DType dtype) {
  return is_aligned(rows.data, element_bytes(dtype), rows.token_stride, rows.head_stride);
}
bool is_aligned(const PagesView& pages, CacheDType dtype) {
  return is_aligned(pages.data, bytes_of(dtype), pages.page_stride, pages.slot_stride, pages.head_stride);
}

int lanes_of_row(int64_t dim) {
  int lanes = 1;
  while (lanes * kColumns < dim) lanes *= 2;
  return lanes;
}

dim3 grid_of(const char* name, int64_t num_rows, int lanes, int64_t num_slots) {
  FM_CHECK(num_rows <= INT32_MAX - kThreads && num_slots <= INT32_MAX, name, ": at most 2**31 rows and slots on CUDA");
  const int64_t rows_per_block = kThreads / lanes;
  return dim3(static_cast<unsigned>((num_rows + rows_per_block - 1) / rows_per_block));
}

}  // namespace

void launch_paged_kv_append(const PagedAppendParams& p, cudaStream_t stream) {
  const PagedCache& cache = p.cache;
  AppendCall call{};
  call.p = p;
  call.lanes = lanes_of_row(cache.head_dim > cache.v_head_dim ? cache.head_dim : cache.v_head_dim);
  const int64_t rows_per_token = 2 * cache.kv_heads + p.heads, num_slots = cache.num_pages * cache.page_size;
  const dim3 grid = grid_of("paged_kv.append", p.num_tokens * rows_per_token, call.lanes, num_slots);
  call.rows_per_token = Divisor(static_cast<int32_t>(rows_per_token));
  call.page_size = Divisor(static_cast<int32_t>(cache.page_size));
  call.aligned = is_aligned(p.k, p.dtype) && is_aligned(p.v, p.dtype) && is_aligned(p.q, p.dtype) &&
                 is_aligned(cache.k, cache.dtype) && is_aligned(cache.v, cache.dtype);
  call.angles_aligned =
      p.rotary_dim / 2 % kColumns == 0 && is_aligned(p.rotary_cos, 4, p.rotary_stride) && is_aligned(p.rotary_sin, 4);
  dispatch_cache(cache.dtype, [&]<class Stored>() {
    launch("paged_kv.append", paged_kv_append_kernel<Stored>, grid, kThreads, 0, stream, call);
  });
}

void launch_paged_kv_gather(const PagedGatherParams& p, cudaStream_t stream) {
  GatherCall call{};
  call.p = p;
  call.lanes = lanes_of_row(p.dim);
  const dim3 grid = grid_of("paged_kv.gather", p.num_tokens * p.kv_heads, call.lanes, p.num_pages * p.page_size);
  call.kv_heads = Divisor(static_cast<int32_t>(p.kv_heads));
  call.page_size = Divisor(static_cast<int32_t>(p.page_size));
  call.aligned = is_aligned(p.cache, p.dtype) && is_aligned(p.out, p.out_dtype);
  dispatch_cache(p.dtype, [&]<class Stored>() {
    launch("paged_kv.gather", paged_kv_gather_kernel<Stored>, grid, kThreads, 0, stream, call);
  });
}

}  // namespace fmkernels
