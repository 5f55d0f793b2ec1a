// SPDX-License-Identifier: Apache-2.0
// What paged_kv attend does to scores in modified or masked blocks, and its results. Included by
// paged_kv_attend_kernel_cuda.h.
#pragma once

#include "paged_kv_attend_warp_cuda.h"

namespace fmkernels {
namespace {

// ---- rows -----------------------------------------------------------------------------------------------------------

// Row of the request that a lane's accumulators 2 * half and 2 * half + 1 belong to, and its query and head.
template <class T>
__device__ __forceinline__ int row_of(const Unit& u, int half) {
  return u.row_begin + row_warp<T>() * 16 + half * 8 + static_cast<int>(threadIdx.x) % kWarp / 4;
}
__device__ __forceinline__ int query_of(const AttendArgs& a, int row) { return row / a.group; }
__device__ __forceinline__ int64_t head_of(const AttendArgs& a, int row) {
  return static_cast<int64_t>(blockIdx.x) * a.group.value() + row % a.group;
}

// Whether a query sees a key of its range, as the tree mask has it.
__device__ __forceinline__ bool is_shown(const AttendArgs& a, const Unit& u, int query, int key) {
  const int number = key - (u.request.seq_k - u.request.seq_q);  // among the last keys, which the queries are
  if (number < 0 || number >= 32 * static_cast<int>(a.p.tree_words)) return true;
  return (a.p.tree_mask[(u.request.q_start + query) * a.p.tree_stride + number / 32] >> number % 32 & 1) != 0;
}

// ---- modifiers and masks --------------------------------------------------------------------------------------------

// s[n][2 * half + e] = f(row)(that, key)
template <class T, class F>
__device__ __forceinline__ void for_each_score(BlockScores<T>& s, const Unit& u, int first_key, F&& f) {
  const int column = first_key + column_warp<T>() * T::kWarpKeys + threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto of_row = f(min(row_of<T>(u, half), u.num_rows - 1));
#pragma unroll
    for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) s[n][2 * half + e] = of_row(s[n][2 * half + e], column + n * 8 + e);
    }
  }
}

// Products, which are those of q and k over `scale`, become scores in log2 units.
template <class T>
__device__ __forceinline__ void modify(BlockScores<T>& s, const AttendArgs& a, const Unit& u, int first_key,
                                       float scale) {
  const PagedAttendParams& p = a.p;
  if (p.softcap != 0.0f) {
    const float to_argument = scale / p.softcap, cap = p.softcap * kLog2E;
    for_each_score<T>(s, u, first_key, [&](int) {
      return [&](float x, int) { return __fmul_rn(tanh(__fmul_rn(x, to_argument)), cap); };
    });
  } else {
    const float to_log2_units = scale * kLog2E;
    for_each_score<T>(s, u, first_key, [&](int) { return [&](float x, int) { return __fmul_rn(x, to_log2_units); }; });
  }
  if (p.alibi_slopes != nullptr) {
    for_each_score<T>(s, u, first_key, [&](int row) {
      const float slope = to_log2(p.alibi_slopes[u.b * p.alibi_batch_stride + head_of(a, row)]);
      const int position = query_of(a, row) + u.request.seq_k - u.request.seq_q;
      return [=](float x, int key) { return fmaf(-slope, static_cast<float>(abs(position - key)), x); };
    });
  }
}

// Hides the keys of a block that a row does not see.
template <class T>
__device__ __forceinline__ void hide(BlockScores<T>& s, const AttendArgs& a, const Unit& u, int first_key,
                                     bool by_tree) {
  for_each_score<T>(s, u, first_key, [&](int row) {
    const int query = query_of(a, row);
    const Range keys = keys_of_query(a.p, u.request, query);
    return [=, &a, &u](float x, int key) {
      const bool visible = keys.begin <= key && key < keys.end && (!by_tree || is_shown(a, u, query, key));
      return visible ? x : -INFINITY;
    };
  });
}

// Which keys of a block have the weight 0 in the lane's rows, as weights are multiplied: after their rounding.
template <class T>
struct ZeroWeights {
  uint32_t of_lanes[2][4];  // [half, lane of the quad]: bit 2 n + e for key 8 n + 2 lane + e; where warps share no rows
  uint32_t weights;         // in shared memory, where they do
  int row;                  // of the lane's first half there

  // All lanes together; the weights in shared memory are seen by every warp.
  __device__ __forceinline__ ZeroWeights(const BlockScores<T>& s, const AttendSmem<T>& smem) {
    if constexpr (T::kQuantized) {  // their values are finite or NaN: no one asks
    } else if constexpr (T::kColumnWarps > 1) {
      const int thread = static_cast<int>(pinned(threadIdx.x));  // the main loop shares none of this arithmetic
      row = thread / kWarp / T::kColumnWarps * 16 + thread % kWarp / 4;
      weights = ptx::smem_address(smem.weights);
    } else {
      static_assert(2 * T::kKeyTiles <= 32);
      constexpr float kRoundsToZero = std::is_same_v<typename T::Weight, Half> ? 0x1p-25f : 0x1p-134f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t zeros = 0;
#pragma unroll
        for (int i = 0; i < 2 * T::kKeyTiles; ++i) {
          if (s[i / 2][2 * half + i % 2] <= kRoundsToZero) zeros |= 1u << i;
        }
        for (int lane = 0; lane < 4; ++lane)
          of_lanes[half][lane] =
              __shfl_sync(ptx::kAllLanes, zeros, static_cast<int>(threadIdx.x) % kWarp / 4 * 4 + lane);
      }
    }
  }
  __device__ __forceinline__ bool is_zero(int half, int key) const {
    if constexpr (T::kColumnWarps > 1) {
      const uint32_t pair =
          ptx::ld_shared(weights + swizzled<WeightRows<T>>(row + half * 8, key / 8) + key % 8 / 2 * 4);
      return (pair & (key % 2 == 0 ? 0x7fffu : 0x7fff0000u)) == 0;
    } else {
      const int lane = key % 8 / 2;
      const uint32_t low = lane % 2 == 0 ? of_lanes[half][0] : of_lanes[half][1];
      const uint32_t high = lane % 2 == 0 ? of_lanes[half][2] : of_lanes[half][3];
      return ((lane < 2 ? low : high) >> (key / 8 * 2 + key % 2) & 1) != 0;
    }
  }
};

// o += v for the values of a block that are not finite, in the rows that see them, and NaN where the weight of one is 0:
// what its product would add. That of a hidden key, whose weight is 0 too, adds nothing: so these values go this way and
// are zeros in the product.
template <class T>
__device__ __forceinline__ void add_nonfinite(RowState<T>& w, const BlockScores<T>& s, const AttendSmem<T>& smem,
                                              const typename T::Stored* values, const AttendArgs& a, const Unit& u,
                                              int first_key, bool by_tree) {
  using Cache = typename T::Cache;
  const ZeroWeights<T> weights(s, smem);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = query_of(a, min(row_of<T>(u, half), u.num_rows - 1));
    const Range keys = keys_of_query(a.p, u.request, query);
    const int end = min(keys.end - first_key, T::kBlockKeys);
#pragma unroll 1
    for (int key = max(keys.begin - first_key, 0); key < end; ++key) {
      if (by_tree && !is_shown(a, u, query, first_key + key)) continue;
      const float weight = !T::kQuantized && weights.is_zero(half, key) ? 0.0f : 1.0f;  // makes NaN of an infinity
#pragma unroll
      for (int n = 0; n < T::kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = column_warp<T>() * T::kWarpColumns + first_column<T>() + to_column<T>(n) + e;
          const int place = swizzled<Cache>(key, column / Cache::kChunkElements) / Cache::kElementBytes +
                            column % Cache::kChunkElements;
          const float v = to_float(values[place]);
          if (!isfinite(v)) {
            if constexpr (T::kQuantized) w.o[(n & ~1) + e][2 * half + n % 2] += v;
            else w.o[n][2 * half + e] = fmaf(v, weight, w.o[n][2 * half + e]);
          }
        }
      }
    }
  }
}

// ---- results --------------------------------------------------------------------------------------------------------

// The queries that requests have: those before and after them have none.
__device__ __forceinline__ Range queries_of_requests(const PagedAttendParams& p) {
  const int total = static_cast<int>(p.total_q);
  if (p.cu_seqlens_q == nullptr) return {0, total};
  const int begin = clamp(p.cu_seqlens_q[0], 0, total);
  return {begin, clamp(p.cu_seqlens_q[p.batch], begin, total)};
}

// o = 0 and lse = -infinity of queries that no request has, which graphs are padded with; a block takes every
// gridDim.y'th of them.
template <class T>
__device__ __forceinline__ void store_padding(const AttendArgs& a, Range queries) {
  const PagedAttendParams& p = a.p;
  const int num_queries = queries.end - queries.begin, group = a.group.value();
#pragma unroll 1
  for (int token = blockIdx.y; token < static_cast<int>(p.total_q) - num_queries; token += gridDim.y) {
    const int64_t to = token < queries.begin ? token : token + num_queries,
                  head = static_cast<int64_t>(blockIdx.x) * group;
    uint4* o = reinterpret_cast<uint4*>(static_cast<typename T::Element*>(p.o.data) + to * p.o.token_stride +
                                        head * p.o.head_stride);
#pragma unroll 1
    for (int i = threadIdx.x; i < group * static_cast<int>(p.cache.v_head_dim) / T::kChunkElements; i += T::kThreads)
      o[i] = uint4{};
#pragma unroll 1
    for (int i = threadIdx.x; i < group; i += T::kThreads) p.lse[(head + i) * p.lse_head_stride + to] = -INFINITY;
  }
}

// What a row's weights of a chunk add up to, in a fixed order of lanes and keys. All threads together where warps share
// rows.
template <class T>
__device__ __forceinline__ void total_of_chunk(RowTotal (&totals)[2], const RowState<T>& w, AttendSmem<T>& smem) {
  const int lane = threadIdx.x % kWarp, row = row_warp<T>() * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sums[kClasses];
#pragma unroll
    for (int c = 0; c < T::kWarpClasses; ++c) sums[c] = quad_sum(w.sum[c][half]);
    if constexpr (T::kColumnWarps > 1) {
      for (int c = 0; c < T::kWarpClasses; ++c) {
        if (lane % 4 == 0) smem.of_classes[column_warp<T>() * T::kWarpClasses + c][row + 8 * half] = sums[c];
      }
    } else {
      const float sum = sums[0] + sums[1] + sums[2] + sums[3];
      totals[half] = {sum == 0.0f ? -INFINITY : -w.shift[half], sum};
    }
  }
  if constexpr (T::kColumnWarps > 1) {
    __syncthreads();  // every warp sees the sums
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = smem.of_classes[0][row + 8 * half];
#pragma unroll
      for (int c = 1; c < kClasses; ++c) sum += smem.of_classes[c][row + 8 * half];
      totals[half] = {sum == 0.0f ? -INFINITY : -w.shift[half], sum};
    }
  }
}

template <class T>
__device__ __forceinline__ float value_scale(const AttendArgs& a) {
  const ScaleView& view = a.p.cache.v_scale;
  return T::kQuantized && view.data != nullptr && !view.per_token ? view.data[blockIdx.x * view.head_stride] : 1.0f;
}

// A chunk of a split unit, for another kernel to merge.
template <class T>
__device__ __forceinline__ void store_chunk(const RowState<T>& w, const RowTotal (&totals)[2], const AttendArgs& a,
                                            const Unit& u) {
  const int v_head_dim = static_cast<int>(a.p.cache.v_head_dim);
  constexpr int kPairs = T::kQuantized ? 2 : 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row_of<T>(u, half);
    if (row >= u.num_rows) continue;
    const int64_t place = (u.slot * static_cast<int64_t>(gridDim.x) + blockIdx.x) * a.partials.rows + row;
    if (column_warp<T>() == 0 && threadIdx.x % 4 == 0)
      *reinterpret_cast<float2*>(a.partials.stats + place * 2) = make_float2(totals[half].largest, totals[half].sum);
    const int column = column_warp<T>() * T::kWarpColumns + first_column<T>();
    float* to = a.partials.o + place * v_head_dim + column;
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; n += kPairs) {
      if (to_column<T>(n) >= v_head_dim - column) break;
      const float2 x = pair_of<T>(w.o, n, half);
      if constexpr (T::kQuantized) {  // four columns side by side
        const float2 y = pair_of<T>(w.o, n + 1, half);
        *reinterpret_cast<float4*>(to + to_column<T>(n)) = make_float4(x.x, x.y, y.x, y.y);
      } else {
        *reinterpret_cast<float2*>(to + to_column<T>(n)) = x;
      }
    }
  }
}

// The results of a unit with all its keys. All threads together, when no one reads q in shared memory any more.
template <class T>
__device__ __forceinline__ void store_results(const float (&o)[T::kColumnTiles][4], const RowTotal (&totals)[2],
                                              AttendSmem<T>& smem, const AttendArgs& a, const Unit& u) {
  using Element = typename T::Element;
  const PagedAttendParams& p = a.p;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row_of<T>(u, half), row_of_tile = row - u.row_begin;
    RowResult result{0.0f, -INFINITY};
    if (row < u.num_rows) {
      result = result_of(totals[half], p.sinks, head_of(a, row));
      if (column_warp<T>() == 0 && threadIdx.x % 4 == 0)
        p.lse[head_of(a, row) * p.lse_head_stride + u.request.q_start + query_of(a, row)] = result.lse;
    }
    const float factor = __fmul_rn(result.factor, value_scale<T>(a));
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n) {
      const float2 pair = pair_of<T>(o, n, half);
      const int column = column_warp<T>() * T::kWarpColumns + first_column<T>() + to_column<T>(n);
      const uint32_t to = ptx::smem_address(smem.q) + swizzled<T>(row_of_tile, column / T::kChunkElements) +
                          column % T::kChunkElements * T::kElementBytes;
      store_pair<T>(to, __fmul_rn(pair.x, factor), __fmul_rn(pair.y, factor));
    }
  }
  __syncthreads();  // every thread sees the results
  const int chunk = threadIdx.x % T::kRowThreads;
  for (int r = threadIdx.x / T::kRowThreads; r < T::kRows; r += T::kThreads / T::kRowThreads) {
    const int row = u.row_begin + r;
    if (row >= u.num_rows) break;
    Element* to = static_cast<Element*>(p.o.data) + (u.request.q_start + query_of(a, row)) * p.o.token_stride +
                  head_of(a, row) * p.o.head_stride;
    for (int c = chunk; c * T::kChunkElements < p.cache.v_head_dim; c += T::kRowThreads) {
      const void* bits = reinterpret_cast<const char*>(smem.q) + swizzled<T>(r, c);
      *reinterpret_cast<uint4*>(to + c * T::kChunkElements) = *static_cast<const uint4*>(bits);
    }
  }
}

}  // namespace
}  // namespace fmkernels
