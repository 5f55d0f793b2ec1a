// SPDX-License-Identifier: Apache-2.0
// Products, weights and their slopes in attention_backward.cu, a warp's work. Included by it alone.
#pragma once

#include "attention_backward_tile_cuda.h"

namespace fmkernels {
namespace {

// What a lane keeps: owned row 16 * m + 8 * half + g of the warp, in accumulators i = 2 * half and 2 * half + 1.
template <class T>
using Products = float[T::kRowTiles][T::kStreamTiles][4];  // owned x streamed
template <class T>
using Gradient = float[T::kRowTiles][T::kColumnTiles][4];  // owned x column

// f(m, n, i) for every element.
template <int kRowTiles, int kTiles, class F>
__device__ __forceinline__ void for_each(F&& f) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) f(m, n, i);
    }
  }
}

// The lane's rows of the first fragments.
template <class T>
struct Addresses {
  Columns<T, false> owned, streamed, transposed;  // the last two: in stage 0
  const float* stats;                             // of the lane's first streamed query, in stage 0

  __device__ __forceinline__ explicit Addresses(const Smem<T>& smem)
      : owned{ptx::smem_address(smem.owned[0][threadIdx.x / kWarp * T::kWarpRows]) + lane_offset<T>(true)},
        streamed{ptx::smem_address(smem.streamed) + lane_offset<T>(false)},
        transposed{ptx::smem_address(smem.streamed) + lane_offset<T>(true)},
        stats(&smem.stats[0][0][threadIdx.x % 4 * 2]) {}
};

template <class T>
__device__ __forceinline__ Columns<T, false> in_stage(const Columns<T, false>& first, int stage) {
  return {{first.at[0] + stage * T::kStageBytes}};
}

// x += owned[tensor] streamed[tensor]^T for one block.
template <class T, int tensor>
__device__ __forceinline__ void multiply(Products<T>& x, const Columns<T, false>& owned,
                                         const Columns<T, false>& streamed) {
  static_for<T::kDim / 16>([&]<int step>() {
    uint32_t a[T::kRowTiles][4];
    static_for<T::kRowTiles>([&]<int m>() { load_fragment<T, tensor * T::kOwned + m * 16, step>(a[m], owned); });
    static_for<T::kStreamTiles / 2>([&]<int pair>() {
      constexpr int n = pair * 2;
      uint32_t b[4];
      load_fragment<T, tensor * T::kStreamed + n * 8, step>(b, streamed);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
        ptx::mma_m16n8k16<typename T::Element>(x[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<typename T::Element>(x[m][n + 1], a[m], b[2], b[3]);
      }
    });
  });
}

// gradient += x streamed[tensor] for one block.
template <class T, int tensor>
__device__ __forceinline__ void accumulate(Gradient<T>& gradient, const Products<T>& x,
                                           const Columns<T, false>& transposed) {
  using Element = typename T::Element;
  static_for<T::kStreamed / 16>([&]<int step>() {
    uint32_t a[T::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
      const auto &left = x[m][2 * step], &right = x[m][2 * step + 1];
      a[m][0] = ptx::pack<Element>(left[0], left[1]);
      a[m][1] = ptx::pack<Element>(left[2], left[3]);
      a[m][2] = ptx::pack<Element>(right[0], right[1]);
      a[m][3] = ptx::pack<Element>(right[2], right[3]);
    }
    static_for<T::kColumnTiles / 2>([&]<int pair>() {
      constexpr int n = pair * 2;
      uint32_t b[4];
      load_fragment<T, tensor * T::kStreamed + step * 16, pair, true>(b, transposed);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
        ptx::mma_m16n8k16<Element>(gradient[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<Element>(gradient[m][n + 1], a[m], b[2], b[3]);
      }
    });
  });
}

// Minus lse in log2 units (kind 0) or minus delta (kind 1) of the queries that a lane's products belong to: of its owned
// rows, in registers, or of the streamed ones, in shared memory.
template <class T>
struct RowStats {
  float of_owned[T::kOwnsQueries ? 2 : 1][T::kRowTiles][2];

  __device__ __forceinline__ void load(const BackwardArgs& a, const Unit& u, int head) {
    if constexpr (T::kOwnsQueries) {
      for (int kind = 0; kind < 2; ++kind) {
        const float* stats = a.stats.data + a.stats.index(kind, head, a.p.cu_seqlens_q != nullptr, u.batch, u.q_start);
        for (int m = 0; m < T::kRowTiles; ++m) {
          for (int half = 0; half < 2; ++half) of_owned[kind][m][half] = stats[min(row_of(u, m, half), u.seq_q - 1)];
        }
      }
    }
  }
  // The owned row that a lane's accumulators belong to.
  static __device__ __forceinline__ int row_of(const Unit& u, int m, int half) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    return u.begin + warp * T::kWarpRows + m * 16 + half * 8 + lane / 4;
  }
};

// x[m][n][i] = f(x[m][n][i], the statistic of its query).
template <class T, int kind, class F>
__device__ __forceinline__ void with_stats(Products<T>& x, const RowStats<T>& rows, const float* streamed, F&& f) {
#pragma unroll
  for (int n = 0; n < T::kStreamTiles; ++n) {
    float2 of_columns{};
    if constexpr (!T::kOwnsQueries)
      of_columns = *reinterpret_cast<const float2*>(streamed + kind * T::kStreamed + n * 8);
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float stat = i % 2 == 0 ? of_columns.x : of_columns.y;
        if constexpr (T::kOwnsQueries) stat = rows.of_owned[kind][m][i / 2];
        x[m][n][i] = f(x[m][n][i], stat);
      }
    }
  }
}

// ---- modifiers and masks --------------------------------------------------------------------------------------------

// The bias of a pair in log2 units.
__device__ __forceinline__ float bias_of(const AttentionForwardParams& p, int batch, int head, int query, int key) {
  const int64_t at =
      batch * p.bias_stride[0] + head * p.bias_stride[1] + query * p.bias_stride[2] + key * p.bias_stride[3];
  if (p.bias_dtype == DType::kFloat32) return to_log2(static_cast<const float*>(p.bias)[at]);
  if (p.bias_dtype == DType::kFloat16) return to_log2(to_float(static_cast<const Half*>(p.bias)[at]));
  return to_log2(to_float(static_cast<const BFloat16*>(p.bias)[at]));
}

// Products become weights (in s) and the gradients of scores, those after softcap or, with kThroughCap, those before it
// (in d); hidden pairs have neither.
template <class T, bool kThroughCap>
__device__ __forceinline__ void weigh_general(Products<T>& s, Products<T>& d, const BackwardArgs& a, const Unit& u,
                                              int head, int first_streamed, const RowStats<T>& rows,
                                              const float* streamed_stats) {
  const AttentionForwardParams& p = a.p;
  const int column = first_streamed + threadIdx.x % 4 * 2, shift = u.seq_k - u.seq_q;
  float slope = 0.0f;
  if (p.alibi_slopes != nullptr) slope = to_log2(p.alibi_slopes[u.batch * p.alibi_batch_stride + head]);
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int owned = min(RowStats<T>::row_of(u, m, half), u.num_owned - 1);
      const Range partners = partners_of<T>(p, u, owned);
#pragma unroll
      for (int n = 0; n < T::kStreamTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = 2 * half + e, streamed = column + n * 8 + e;
          const bool visible = partners.begin <= streamed && streamed < partners.end;
          const int query = T::kOwnsQueries ? owned : streamed, key = T::kOwnsQueries ? streamed : owned;
          float score, steepness = 1.0f;
          if (p.softcap != 0.0f) {
            const float bounded = tanh(s[m][n][i] * (p.softmax_scale / p.softcap));
            score = bounded * (p.softcap * kLog2E);
            steepness = 1.0f - bounded * bounded;
          } else {
            score = s[m][n][i] * a.scale_log2;
          }
          if (p.bias != nullptr && visible) score += bias_of(p, u.batch, head, query, key);
          if (p.alibi_slopes != nullptr) score -= slope * static_cast<float>(abs(query + shift - key));
          float minus_lse;
          if constexpr (T::kOwnsQueries) minus_lse = rows.of_owned[0][m][half];
          else minus_lse = streamed_stats[n * 8 + e];
          const float weight = ptx::ex2(score + minus_lse);
          s[m][n][i] = visible ? weight : 0.0f;
          if constexpr (T::kHasSlopes)
            d[m][n][i] = visible ? weight * d[m][n][i] * (kThroughCap ? steepness : 1.0f) : 0.0f;
        }
      }
    }
  }
}

// NaN where a streamed value that is not finite meets an owned row. In a product with the weight 0 of a hidden pair it
// would reach others, so these values go this way and are zeros in the product.
template <class T, int tensor>
__device__ __forceinline__ void add_nonfinite(Gradient<T>& gradient, const Smem<T>& smem, const BackwardArgs& a,
                                              int stage, int first_streamed) {
  const Unit& u = smem.unit;
  const typename T::Element* values = &smem.streamed[stage][tensor][0][0];
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int owned = RowStats<T>::row_of(u, m, half);
      const Range partners = partners_of<T>(a.p, u, min(owned, u.num_owned - 1));
      const int end = min(partners.end - first_streamed, T::kStreamed);
#pragma unroll 1
      for (int row = max(partners.begin - first_streamed, 0); row < end; ++row) {
#pragma unroll
        for (int n = 0; n < T::kColumnTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float value = to_float(values[swizzled<T::kDim>(row, n) / 2 + threadIdx.x % 4 * 2 + e]);
            if (!isfinite(value)) gradient[m][n][2 * half + e] = NAN;
          }
        }
      }
    }
  }
}

// The warp's rows of a gradient, times `scale`, to its part of owned[tensor], which it has read for the last time.
template <class T>
__device__ __forceinline__ void keep_gradient(const Gradient<T>& gradient, Smem<T>& smem, int tensor, float scale) {
  constexpr int kPermuted = T::kDim * 2 % 128 == 0 ? 8 : 4;  // chunks that a swizzle permutes
  const int lane = threadIdx.x % kWarp;
  const uint32_t first = ptx::smem_address(smem.owned[tensor][threadIdx.x / kWarp * T::kWarpRows]) +
                         swizzled<T::kDim>(lane / 4, 0) + lane % 4 * 4;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < T::kColumnTiles; ++n) {
        const uint32_t at =
            (first ^ (n % kPermuted * 16)) + (m * 16 + half * 8) * T::kDim * 2 + n / kPermuted * kPermuted * 16;
        *static_cast<uint32_t*>(__cvta_shared_to_generic(at)) =
            ptx::pack<typename T::Element>(gradient[m][n][2 * half] * scale, gradient[m][n][2 * half + 1] * scale);
      }
    }
  }
}

}  // namespace
}  // namespace fmkernels
