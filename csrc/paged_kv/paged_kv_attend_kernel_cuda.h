// SPDX-License-Identifier: Apache-2.0
// The kernel of paged_kv_attend.cu, paged_kv_attend_int8.cu and paged_kv_attend_float8.cu, and how it is launched.
// paged_kv_attend.cu tells how it works.
#pragma once

#include "../common/dispatch.h"
#include "paged_kv_attend_scores_cuda.h"

namespace fmkernels {
namespace {

// ---- a unit ---------------------------------------------------------------------------------------------------------

// Starts the copy of the queries of a tile; rows and columns that do not exist are zeros.
template <class T>
__device__ __forceinline__ void copy_queries(AttendSmem<T>& smem, const AttendArgs& a, const Unit& u) {
  using Element = typename T::Element;
  const int chunk = threadIdx.x % T::kRowThreads;
  for (int r = threadIdx.x / T::kRowThreads; r < T::kRows; r += T::kThreads / T::kRowThreads) {
    const int row = min(u.row_begin + r, u.num_rows - 1);
    const Element* q = static_cast<const Element*>(a.p.q.data) +
                       (u.request.q_start + query_of(a, row)) * a.p.q.token_stride +
                       head_of(a, row) * a.p.q.head_stride;
    for (int c = chunk; c < T::kRowChunks; c += T::kRowThreads) {
      const bool exists = u.row_begin + r < u.num_rows && c * T::kChunkElements < a.p.cache.head_dim;
      ptx::cp_async_16_or_zero(ptx::smem_address(smem.q) + swizzled<T>(r, c), exists ? q + c * T::kChunkElements : q,
                               exists);
    }
  }
}

template <class T>
struct KeptQueries {
  uint32_t kept[T::kKeepsQ ? T::kDim / 16 : 1][4];
};

template <class T>
__device__ __forceinline__ void attend_unit(AttendSmem<T>& smem, const AttendArgs& a, const Unit& unit) {
  const PagedAttendParams& p = a.p;
  const int first_query = query_of(a, unit.row_begin);
  const int last_query = query_of(a, min(unit.row_begin + T::kRows, unit.num_rows) - 1);
  Range any = keys_of_queries(p, unit.request, first_query, last_query);
  const Range all{keys_of_query(p, unit.request, last_query).begin, keys_of_query(p, unit.request, first_query).end};
  if (unit.slot >= 0) any = {max(any.begin, unit.chunk * kChunkTokens), min(any.end, (unit.chunk + 1) * kChunkTokens)};
  any.end = max(any.begin, any.end);
  const int first_block = any.begin / T::kBlockKeys, end_block = (any.end + T::kBlockKeys - 1) / T::kBlockKeys;
  // Blocks whose keys some row sees, and blocks whose keys all rows see.
  const int whole_begin = (any.begin + T::kBlockKeys - 1) / T::kBlockKeys,
            num_whole = any.end / T::kBlockKeys - whole_begin;
  const int plain_begin = max(whole_begin, (all.begin + T::kBlockKeys - 1) / T::kBlockKeys);
  const int plain_end = min(min(any.end, all.end), tree_begin(p, unit.request)) / T::kBlockKeys;
  if (threadIdx.x == 0) {
    smem.unit = unit;
    smem.any = any;
    smem.all = all;
    smem.plain = {plain_begin, plain_end};
  }
  __syncthreads();  // every thread sees the unit
  const Unit& u = smem.unit;

  // Scales of products.
  float scale = p.softmax_scale, scale_log2 = a.scale_log2;
  bool modifies = a.modifies;
  if constexpr (T::kQuantized) {
    const ScaleView& view = p.cache.k_scale;
    if (view.data != nullptr && !view.per_token) scale *= view.data[blockIdx.x * view.head_stride];
    scale_log2 = scale * kLog2E;
    modifies = modifies || !(scale > 0.0f);
  }

  const PageCopy<T, false> keys(smem, a);
  const PageCopy<T, true> values(smem, a);
  const uint32_t copy_to = pinned(ptx::smem_address(smem.kv) + PageCopy<T, false>::thread_offset());
  const uint32_t q_at = ptx::smem_address(smem.q[row_warp<T>() * 16]) + lane_of_queries<T>();
  const uint32_t k_at = pinned(ptx::smem_address(smem.kv) + lane_of_keys<T>());
  const uint32_t v_at = pinned(ptx::smem_address(smem.kv) + lane_of_values<T>());
  const uint32_t stored_at = pinned(ptx::smem_address(smem.weights) + lane_of_stored_weights<T>());
  const uint32_t loaded_at = pinned(ptx::smem_address(smem.weights) + lane_of_loaded_weights<T>());
  const auto stage_bytes = [](int block) { return stage_of<T>(block) * T::kBlockBytes; };
  // Blocks that are copied without a look at each row and column: none where a page is missing, or columns are.
  int num_easy = p.cache.head_dim == T::kDim && p.cache.v_head_dim == T::kDim ? max(num_whole, 0) : 0;
  const auto copy = [&](const auto& part, int block) {
    if (static_cast<uint32_t>(block - whole_begin) < static_cast<uint32_t>(num_easy))
      part.issue(a, block, copy_to + stage_bytes(block));
    else if (block < end_block) part.issue_ragged(a, block, smem.any, copy_to + stage_bytes(block));
    ptx::cp_async_commit();
  };
  const auto copy_keys = [&](int block) { copy(keys, block); };
  const auto copy_values = [&](int block) { copy(values, block); };

  KeptQueries<T> q;
  if (first_block < end_block) {
    const int chunk = first_block / T::kChunkBlocks;
    bool is_missing = locate_rows<T>(smem, a, chunk);
    if ((chunk + 1) * kChunkTokens < any.end && locate_rows<T>(smem, a, chunk + 1)) is_missing = true;
    copy_queries<T>(smem, a, u);
    if (__syncthreads_or(is_missing)) num_easy = 0;  // every thread sees where the rows begin
    copy_keys(first_block);
    for (int stage = 1; stage < T::kStages; ++stage)
      copy_values(first_block + stage - 1), copy_keys(first_block + stage);
    if constexpr (T::kKeepsQ) {
      ptx::cp_async_wait<2 * (T::kStages - 1)>();
      __syncthreads();  // every warp sees q
      static_for<T::kDim / 16>([&]<int step>() { load_queries<T, step>(q.kept[step], q_at); });
    }
  }

  RowState<T> w;
  float o[T::kColumnTiles][4];  // of the chunks before
  RowTotal totals[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}};
  w.reset();
  for_each<1, T::kColumnTiles>([&](int, int n, int i) { o[n][i] = 0.0f; });

#pragma unroll 1
  for (int block = first_block; block < end_block; ++block) {
    const int first_key = block * T::kBlockKeys;
    ptx::cp_async_wait<2 * (T::kStages - 1)>();
    __syncthreads();  // B1: every warp sees the keys, and has read the values of the block before
    copy_values(block + T::kStages - 1);
    const int block_of_chunk = static_cast<uint32_t>(block) % T::kChunkBlocks;
    if (block_of_chunk == 0 && block != first_block) {
      // Every thread sees where the rows begin.
      if (__syncthreads_or(locate_rows<T>(smem, a, block / T::kChunkBlocks + 1))) num_easy = 0;
    }

    BlockScores<T> s;
    multiply_block<T>(s, q, q_at, k_at + stage_bytes(block));
    if constexpr (T::kQuantized) {
      if (p.cache.k_scale.per_token) {
        for_each_score<T>(s, u, first_key, [&](int) {
          return [&](float x, int key) { return __fmul_rn(x, smem.scales[0][key % (2 * kChunkTokens)]); };
        });
      }
    }
    float to_log2_units = scale_log2;
    if (modifies) modify<T>(s, a, u, first_key, scale), to_log2_units = 1.0f;
    // Whether a tree mask holds in the block, and whether a row sees a key of it that another does not.
    bool by_tree = false, differs = false;
    if (block < smem.plain.begin || block >= smem.plain.end) {
      const int end_key = first_key + T::kBlockKeys;
      by_tree = end_key > tree_begin(p, u.request);
      differs = by_tree || max(first_key, smem.any.begin) < smem.all.begin || min(end_key, smem.any.end) > smem.all.end;
      hide<T>(s, a, u, first_key, by_tree);
    }

    bool grown = grows<T>(w, s, to_log2_units);
    if constexpr (T::kColumnWarps > 1) grown = __syncthreads_or(grown);
    else grown = __any_sync(ptx::kAllLanes, grown);
    if (__builtin_expect(grown, 0)) rescale<T>(w, s, to_log2_units, smem);
    exponentiate<T>(w, s, to_log2_units);
    if constexpr (T::kQuantized) {
      if (p.cache.v_scale.per_token) {
        for_each_score<T>(s, u, first_key, [&](int) {
          return [&](float x, int key) {  // a hidden key's scale may be NaN
            return x == 0.0f ? 0.0f : __fmul_rn(x, smem.scales[1][key % (2 * kChunkTokens)]);
          };
        });
      }
    }
    if constexpr (T::kColumnWarps > 1) store_weights<T>(s, stored_at);

    ptx::cp_async_wait<2 * (T::kStages - 1)>();
    bool nonfinite = false;
    if (differs) nonfinite = __syncthreads_or(values.has_nonfinite(copy_to + stage_bytes(block)));
    else __syncthreads();  // B2: every warp sees the values and the weights, and has read the keys
    copy_keys(block + T::kStages);
    if (__builtin_expect(nonfinite, 0)) {
      add_nonfinite<T>(w, s, smem, smem.kv[1][stage_of<T>(block)][0], a, u, first_key, by_tree);
      __syncthreads();  // every warp has read what is not finite
      values.zero_nonfinite(copy_to + stage_bytes(block));
      __syncthreads();  // every warp sees zeros in its place
    }
    static_for<T::kBlockKeys / 16>([&]<int step>() {
      Weights<T> weights;
      if constexpr (T::kColumnWarps > 1) load_weights<T, step>(weights, loaded_at);
      else pack_weights<T>(weights, s[2 * step], s[2 * step + 1]);
      add_values<T, step>(w.o, weights, v_at + stage_bytes(block));
    });

    if (block_of_chunk == T::kChunkBlocks - 1 || block == end_block - 1) {
      RowTotal of_chunk[2];
      total_of_chunk<T>(of_chunk, w, smem);
      if (u.slot >= 0) {
        store_chunk<T>(w, of_chunk, a, u);
        return;
      }
      for (int half = 0; half < 2; ++half) {
        const MergeFactors f = merge_total(totals[half], of_chunk[half]);
        for (int n = 0; n < T::kColumnTiles; ++n) {
          for (int e = 0; e < 2; ++e) o[n][2 * half + e] = merged(o[n][2 * half + e], w.o[n][2 * half + e], f);
        }
      }
      w.reset();
    }
  }
  store_results<T>(o, totals, smem, a, u);
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm)
    paged_kv_attend_kernel(const __grid_constant__ AttendArgs a) {
  auto& smem = dynamic_smem<AttendSmem<T>>();
  const Range queries = queries_of_requests(a.p);  // on its way while the list is made
  Work<T::kRows, T::kTall> work(a, smem.work);
  if (a.stores_padding) store_padding<T>(a, queries);
  Unit unit;
  int number = blockIdx.y;
  if (!work.find(a, number, unit)) return;
#pragma unroll 1
  do {
    attend_unit<T>(smem, a, unit);
    __syncthreads();  // every warp is done with the unit, all of whose copies have landed
    number += gridDim.y;
  } while (work.find(a, number, unit));
}

// ---- launch ---------------------------------------------------------------------------------------------------------

constexpr int64_t kMaxWorkspaceBytes = 64 << 20;

// What shapes alone tell of the tiles of one height.
struct AttendShape {
  int64_t max_units, num_slots, slot_rows;

  int64_t workspace_floats(const PagedAttendParams& p) const {
    return num_slots * slot_rows * p.cache.kv_heads * (p.cache.v_head_dim + 2);
  }
};

// Whether the kernel for tiles of this height also stores the rows that no request has: the one that is always launched.
inline bool stores_padding(const PagedAttendParams& p, bool tall) {
  return p.cu_seqlens_q != nullptr && tall == (p.heads / p.cache.kv_heads > kShortRows);
}

inline int bucket_of_dims(const PagedAttendParams& p) {
  const int64_t dim = std::max(p.cache.head_dim, p.cache.v_head_dim);
  return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

// Units, and slots of the workspace, that requests of these shapes may have.
inline AttendShape shape_of(const PagedAttendParams& p, bool tall) {
  const int64_t group = p.heads / p.cache.kv_heads, tile_rows = !tall ? kShortRows : bucket_of_dims(p) == 256 ? 32 : 64;
  // Rows of a request, and how many requests have as many as the tiles are for.
  const int64_t max_rows = (p.cu_seqlens_q == nullptr ? 1 : p.total_q) * group;
  const int64_t fewest = tall ? kShortRows + 1 : 1;
  if (max_rows < fewest || (!tall && group > kShortRows)) return {0, 0, 0};
  const int64_t requests = std::min(p.batch, p.total_q * group / std::max(fewest, group));
  const int64_t max_chunks = (p.max_pages * p.cache.page_size + kChunkTokens - 1) / kChunkTokens;
  AttendShape shape{requests + (tall ? p.total_q * group / tile_rows : 0), 0, std::min(max_rows, tile_rows)};
  if (group <= tile_rows && max_chunks > 1) {
    const int64_t slot_bytes =
        AttendShape{0, 1, shape.slot_rows}.workspace_floats(p) * static_cast<int64_t>(sizeof(float));
    shape.num_slots = std::min(requests * max_chunks, kMaxWorkspaceBytes / slot_bytes);
    shape.max_units = std::min(shape.max_units + shape.num_slots, shape.max_units * max_chunks);
  }
  return shape;
}

// Refuses what the kernels cannot take.
inline AttendArgs args_of(const PagedAttendCall& call, bool tall) {
  constexpr int64_t kMaxLength = (1 << 30) - 1024;
  AttendArgs a{call.p, {}, 0.0f, false, stores_padding(call.p, tall), Divisor(), Divisor(), 0, 0};
  PagedAttendParams& p = a.p;
  const PagedCache& cache = p.cache;
  const char* name = "paged_kv_attend";
  FM_CHECK(p.total_q * (p.heads / cache.kv_heads) <= kMaxLength && p.max_pages * cache.page_size <= kMaxLength, name,
           ": queries and keys of a request must be at most ", kMaxLength, " rows on CUDA");
  FM_CHECK(p.batch <= kMaxLength && cache.kv_heads <= 65535, name, ": kv_heads must be at most 65535 on CUDA, got ",
           cache.kv_heads);
  const auto check_aligned = [&](const char* tensor, const void* data, int64_t element_bytes,
                                 std::initializer_list<int64_t> sizes) {
    bool is_aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (int64_t elements : sizes) is_aligned = is_aligned && elements * element_bytes % 16 == 0;
    FM_CHECK(is_aligned, name, ": rows of ", tensor, " must begin on 16-byte boundaries on CUDA, and end there");
  };
  check_aligned("q", p.q.data, 2, {p.q.token_stride, p.q.head_stride, cache.head_dim});
  check_aligned("o", p.o.data, 2, {p.o.token_stride, p.o.head_stride, cache.v_head_dim});
  const auto check_cache = [&](const char* tensor, const PagesView& view, int64_t dim) {
    const int64_t stored_bytes = is_quantized(cache.dtype) ? 1 : 2;
    check_aligned(tensor, view.data, stored_bytes, {view.page_stride, view.slot_stride, view.head_stride, dim});
    const int64_t last = (cache.num_pages - 1) * view.page_stride + (cache.page_size - 1) * view.slot_stride;
    FM_CHECK(last * stored_bytes / 16 < int64_t{kNoRow}, name, ": ", tensor, " must span less than 64 GiB on CUDA");
  };
  check_cache("k_cache", cache.k, cache.head_dim);
  check_cache("v_cache", cache.v, cache.v_head_dim);
  p.window_left = std::min(p.window_left, kMaxLength);
  p.window_right = std::min(p.window_right, kMaxLength);
  a.scale_log2 = p.softmax_scale * kLog2E;
  a.modifies = p.softcap != 0.0f || p.alibi_slopes != nullptr || !(p.softmax_scale > 0.0f);
  a.group = Divisor(static_cast<int32_t>(p.heads / cache.kv_heads));
  a.page_size = Divisor(static_cast<int32_t>(cache.page_size));
  a.row_shift = cache.page_size % kGroupRows == 0 ? 4 : 0;
  a.max_keys = static_cast<int>(p.max_pages * cache.page_size);
  const AttendShape shape = shape_of(p, tall);
  a.partials = {call.workspace, nullptr, static_cast<int>(shape.num_slots), static_cast<int>(shape.slot_rows)};
  if (tall) a.partials.o += shape_of(p, false).workspace_floats(p);
  a.partials.stats = a.partials.o + shape.num_slots * shape.slot_rows * cache.kv_heads * cache.v_head_dim;
  return a;
}

// A grid (kv heads, blocks) for a number of units, of which a block takes every gridDim.y'th: many blocks for each place on
// the GPU, so that it balances them; beyond that they take several units each.
inline dim3 grid_of(const PagedAttendParams& p, int64_t num_units) {
  int device = 0, num_sms = 0;
  check_cuda("paged_kv_attend", cudaGetDevice(&device));
  check_cuda("paged_kv_attend", cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  const int64_t kv_heads = p.cache.kv_heads, enough = (int64_t{16} * num_sms + kv_heads - 1) / kv_heads;
  const int64_t blocks = std::max(int64_t{1}, std::min({num_units, enough, int64_t{65535}}));
  return dim3(static_cast<unsigned>(kv_heads), static_cast<unsigned>(blocks));
}

template <class T>
void launch_tiles(const PagedAttendCall& call, cudaStream_t stream) {
  const AttendShape shape = shape_of(call.p, T::kTall);
  if (shape.max_units == 0 && !stores_padding(call.p, T::kTall)) return;
  launch("paged_kv_attend", paged_kv_attend_kernel<T>, grid_of(call.p, shape.max_units), T::kThreads,
         sizeof(AttendSmem<T>), stream, args_of(call, T::kTall));
}

template <class Element, class Stored>
void launch_stored(const PagedAttendCall& call, cudaStream_t stream) {
  dispatch_int<64, 128, 256>("dim", bucket_of_dims(call.p), [&]<int kDim>() {
    launch_tiles<AttendTraits<Element, Stored, kDim, false>>(call, stream);
    launch_tiles<AttendTraits<Element, Stored, kDim, true>>(call, stream);
  });
}

}  // namespace

void launch_paged_kv_attend_int8(const PagedAttendCall& call, cudaStream_t stream);
void launch_paged_kv_attend_float8(const PagedAttendCall& call, cudaStream_t stream);

}  // namespace fmkernels
