// SPDX-License-Identifier: Apache-2.0
// Products, weights and their slopes in the backward kernels, a warp's work.
#pragma once

#include "attention_backward_tile_cuda.h"
#include "attention_dropout_cuda.h"

namespace fmkernels {
namespace {

// What a lane keeps: owned row 16 * m + 8 * half + g of the warp, in accumulators i = 2 * half and 2 * half + 1.
template <class T>
using Products = float[T::kRowTiles][T::kPartTiles][4];  // owned x a part of what is streamed
template <class T>
using Gradient = float[T::kRowTiles][T::kColumnTiles][4];  // owned x column

// The lane's rows of the first fragments; of what is streamed, in the stage of the block at hand.
template <class T>
struct Addresses {
  Columns<T, false> owned, streamed, transposed;
  uint32_t stats;  // of the lane's first query, owned or streamed

  __device__ __forceinline__ explicit Addresses(const Smem<T>& smem)
      : owned{pinned(ptx::smem_address(smem.owned[0][row_warp<T>() * T::kWarpRows]) + lane_offset<T>(true))},
        streamed{pinned(ptx::smem_address(&smem.stages[0]) + lane_offset<T>(false))},
        transposed{pinned(ptx::smem_address(&smem.stages[0].rows[0][0][first_column<T>()]) + transposed_offset<T>())},
        stats(pinned(T::kOwnsQueries ? ptx::smem_address(smem.stats + row_warp<T>() * T::kWarpRows * kStatsFloats +
                                                         threadIdx.x % kWarp / 4 * 4)
                                     : ptx::smem_address(smem.stages[0].stats + threadIdx.x % 4 * 4))) {}
  // To the other stage, `bytes` away.
  __device__ __forceinline__ void turn(int bytes) {
    streamed.at[0] += bytes;
    transposed.at[0] += bytes;
    if (!T::kOwnsQueries) stats += bytes;
  }
};

// x[i] = owned[tensor] streamed[tensor]^T + first(m, n), for parts first_part + i of the block.
template <class T, int tensor, int first_part, int num_parts, class First>
__device__ __forceinline__ void multiply(Products<T> (&x)[num_parts], const Addresses<T>& at, First&& first) {
  if constexpr (T::kSplits) {
    static_assert(num_parts == 1);
    for_each<T::kRowTiles, T::kPartTiles>([&](int m, int n, int i) {
      const float4 start = first(m, n);
      x[0][m][n][i] = i == 0 ? start.x : i == 1 ? start.y : i == 2 ? start.z : start.w;
    });
  }
  [[maybe_unused]] Products<T> sum = {};
  static_for<T::kRowBytes / T::kStepBytes>([&]<int step>() {
    uint32_t a[T::kRowTiles][T::kFragment];
    static_for<T::kRowTiles>([&]<int m>() { load_fragment<T, tensor * T::kOwned + m * 16, step>(a[m], at.owned); });
    static_for<num_parts * T::kPartTiles / 2>([&]<int pair>() {
      constexpr int part = pair * 2 / T::kPartTiles, n = pair * 2 % T::kPartTiles;
      uint32_t b[T::kFragment];
      load_fragment<T, tensor * T::kStreamed + (first_part + part) * T::kPart + n * 8, step>(b, at.streamed);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
        [[maybe_unused]] auto &left = x[part][m][n], &right = x[part][m][n + 1];
        if constexpr (T::kSplits) {
          multiply_add<T, 0>(sum[m][n], a[m], b);
          multiply_add<T, 1>(sum[m][n + 1], a[m], b);
        } else if constexpr (step == 0) {
          ptx::mma_m16n8k16<typename T::Element>(left, a[m], b[0], b[1], first(m, n));
          ptx::mma_m16n8k16<typename T::Element>(right, a[m], b[2], b[3], first(m, n + 1));
        } else {
          multiply_add<T, 0>(left, a[m], b);
          multiply_add<T, 1>(right, a[m], b);
        }
      }
    });
    if constexpr (T::kSplits) add_part<T, step>(x[0], sum);
  });
  if constexpr (T::kSplits)
    correct_nonfinite<T, tensor * T::kOwned, tensor * T::kStreamed>(x[0], at.owned, at.streamed, first);
}

// Minus lse in log2 units (kind 0) or minus delta (kind 1) of the queries of the accumulators of m and n, a tile of the
// block. A load is one instruction, and keeping them would take registers that the products need.
template <class T, int kind>
__device__ __forceinline__ float4 stats_of(uint32_t stats, int m, int n) {
  const int slot = T::kOwnsQueries ? m * 16 : n / 2 * kStatsGroup;
  return *static_cast<const float4*>(__cvta_shared_to_generic(
      stats + (slot * kStatsFloats + kind * AttentionRowStats::kToDelta + (T::kOwnsQueries ? 0 : n % 2 * 16)) * 4));
}

// The owned row that a lane's accumulators belong to.
template <class T>
__device__ __forceinline__ int row_of(const Unit& u, int m, int half) {
  return u.begin + row_warp<T>() * T::kWarpRows + m * 16 + half * 8 + threadIdx.x % kWarp / 4;
}

// s = owned[0] streamed[0]^T for the block.
template <class T>
__device__ __forceinline__ void multiply_scores(Products<T> (&s)[T::kParts], const Addresses<T>& at) {
  multiply<T, 0, 0>(s, at, [](int, int) { return float4{}; });
}
// d = owned[1] streamed[1]^T - delta for a part.
template <class T, int part>
__device__ __forceinline__ void multiply_slopes(Products<T> (&d)[1], const Addresses<T>& at) {
  multiply<T, 1, part>(d, at, [&](int m, int n) { return stats_of<T, 1>(at.stats, m, part * T::kPartTiles + n); });
}

// Products become weights (in s) and the gradients of scores (in d).
template <class T, int part>
__device__ __forceinline__ void weigh(Products<T>& s, Products<T>& d, uint32_t stats, float scale_log2) {
#pragma unroll
  for (int n = 0; n < T::kPartTiles; ++n) {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
      const float4 minus_lse = stats_of<T, 0>(stats, m, part * T::kPartTiles + n);
      s[m][n][0] = ptx::ex2(fmaf(s[m][n][0], scale_log2, minus_lse.x));
      s[m][n][1] = ptx::ex2(fmaf(s[m][n][1], scale_log2, minus_lse.y));
      s[m][n][2] = ptx::ex2(fmaf(s[m][n][2], scale_log2, minus_lse.z));
      s[m][n][3] = ptx::ex2(fmaf(s[m][n][3], scale_log2, minus_lse.w));
      if constexpr (T::kHasSlopes) {
#pragma unroll
        for (int i = 0; i < 4; ++i) d[m][n][i] *= s[m][n][i];
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

// Hidden pairs have neither weight nor gradient.
template <class T>
__device__ __forceinline__ void mask(Products<T>& s, Products<T>& d, const BackwardArgs& a, const Unit& u,
                                     int first_streamed) {
  const int column = first_streamed + threadIdx.x % 4 * 2;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Range partners = partners_of<T>(a.p, u, row_of<T>(u, m, half));
      const int begin = partners.begin - column;
      const uint32_t count = max(partners.end - partners.begin, 0);
#pragma unroll
      for (int n = 0; n < T::kPartTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = 2 * half + e;
          if (static_cast<uint32_t>(n * 8 + e - begin) < count) continue;
          s[m][n][i] = 0.0f;
          if constexpr (T::kHasSlopes) d[m][n][i] = 0.0f;
        }
      }
    }
  }
}

// Of the lines of the tile, that of the warp's rows, all of one block of the mask.
template <class T>
__device__ __forceinline__ int line_of_warp(const BlockMaskView& m, const Unit& u) {
  const int first = u.begin + row_warp<T>() * T::kWarpRows;
  return block_of(m, first) - block_of(m, u.begin);
}

// Pairs that the block mask hides have neither weight nor gradient; `tile_idx`: what the warp's line sees of the block.
template <class T>
__device__ __forceinline__ void mask_block(Products<T>& s, Products<T>& d, const BlockMaskView& mask, const Unit& u,
                                           int tile_idx, int first_streamed) {
  const int first_owned = row_of<T>(u, 0, 0), column = threadIdx.x % 4 * 2;
  // Words hold keys: those of an owned query that are streamed, or those of a streamed query that the warp owns.
  if constexpr (T::kOwnsQueries) {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = first_owned + m * 16 + half * 8;
        const uint32_t shown =
            word_of(mask, tile_idx, query, first_streamed / 32 * 32) >> (first_streamed % 32 + column);
#pragma unroll
        for (int n = 0; n < T::kPartTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (shown >> (n * 8 + e) & 1) continue;
            s[m][n][2 * half + e] = 0.0f;
            if constexpr (T::kHasSlopes) d[m][n][2 * half + e] = 0.0f;
          }
        }
      }
    }
  } else {
#pragma unroll
    for (int n = 0; n < T::kPartTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int query = first_streamed + column + n * 8 + e;
        const uint32_t shown = word_of(mask, tile_idx, query, first_owned / 32 * 32) >> first_owned % 32;
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (shown >> (m * 16 + half * 8) & 1) continue;
            s[m][n][2 * half + e] = 0.0f;
            if constexpr (T::kHasSlopes) d[m][n][2 * half + e] = 0.0f;
          }
        }
      }
    }
  }
}

// Bits of what dropout keeps of the pairs of m, half, n and e in a part.
template <class T>
__device__ __forceinline__ constexpr int kept_bit(int m, int half, int n, int e) {
  return T::kOwnsQueries ? (m * 2 + half) * kCallBits + n * 2 + e : (n * 2 + e) * 4 + m * 2 + half;
}
template <class T>
__device__ __forceinline__ uint32_t kept_of_part(const AttentionForwardParams& p, const Unit& u, int head,
                                                 int first_streamed) {
  const int lane = threadIdx.x % kWarp, first_owned = row_of<T>(u, 0, 0);
  uint32_t kept = 0;
  if constexpr (T::kOwnsQueries) {
#pragma unroll 1
    for (int row = T::kRowTiles * 2 - 1; row >= 0; --row)
      kept = kept << kCallBits |
             kept_of_call(p, u.batch, head, first_owned + row * 8, first_streamed / kDropoutGroup, lane % 4);
    return kept >> (first_streamed % kDropoutGroup / 8 * 2);
  } else {
    // A call has the keys of two lanes, each of which has two queries: each lane makes the call of one.
    const int parity = lane / 4 % 2, query = first_streamed + lane % 4 * 2 + parity;
    const auto of_parity = [](uint32_t x, int bit) {  // bits 2 * word + bit become bits word
      x = x >> bit & 0x55;
      x = (x | x >> 1) & 0x33;
      return (x | x >> 2) & 0xf;
    };
    uint32_t theirs = 0;
#pragma unroll 1
    for (int n = T::kPartTiles - 1; n >= 0; --n) {
      const uint32_t call = kept_of_call(p, u.batch, head, query + n * 8, first_owned / kDropoutGroup, lane / 8);
      kept = kept << 8 | of_parity(call, parity) << (4 * parity);
      theirs = theirs << 8 | of_parity(call, 1 - parity) << (4 * parity);
    }
    kept |= __shfl_xor_sync(ptx::kAllLanes, theirs, 4);
    return kept >> (first_owned % kDropoutGroup / 8);
  }
}

// Slopes of weights that dropout scales or drops become those of the weights before it: only products are its concern,
// delta is not.
template <class T, int part>
__device__ __forceinline__ void drop_slopes(Products<T>& d, uint32_t stats, float kept_scale, uint32_t kept) {
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < T::kPartTiles; ++n) {
      const float4 all = stats_of<T, 1>(stats, m, part * T::kPartTiles + n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float minus_delta = i == 0 ? all.x : i == 1 ? all.y : i == 2 ? all.z : all.w;
        const bool is_kept = kept >> kept_bit<T>(m, i / 2, n, i % 2) & 1;
        d[m][n][i] = (is_kept ? (d[m][n][i] - minus_delta) * kept_scale : 0.0f) + minus_delta;
      }
    }
  }
}

// `weigh` and `mask` with everything that may modify scores; the gradients are of scores after softcap or, with
// kThroughCap, of those before it.
template <class T, int part, bool kThroughCap>
__device__ __forceinline__ void weigh_general(Products<T>& s, Products<T>& d, const BackwardArgs& a, const Unit& u,
                                              int head, int first_streamed, uint32_t stats) {
  const AttentionForwardParams& p = a.p;
  const int column = first_streamed + threadIdx.x % 4 * 2, shift = u.seq_k - u.seq_q;
  float slope = 0.0f;
  if (p.alibi_slopes != nullptr) slope = to_log2(p.alibi_slopes[u.batch * p.alibi_batch_stride + head]);
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int owned = min(row_of<T>(u, m, half), u.num_owned - 1);
      const Range partners = partners_of<T>(p, u, owned);
#pragma unroll
      for (int n = 0; n < T::kPartTiles; ++n) {
        const float4 minus_lse = stats_of<T, 0>(stats, m, part * T::kPartTiles + n);
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
          const float weight = ptx::ex2(
              score + (half == 0 ? (e == 0 ? minus_lse.x : minus_lse.y) : (e == 0 ? minus_lse.z : minus_lse.w)));
          s[m][n][i] = visible ? weight : 0.0f;
          if constexpr (T::kHasSlopes)
            d[m][n][i] = visible ? weight * d[m][n][i] * (kThroughCap ? steepness : 1.0f) : 0.0f;
        }
      }
    }
  }
}

// NaN where an owned row meets a value that is not finite, of the part from streamed row `first_streamed` on, row
// `first_row` of the block. In a product with the weight 0 of a hidden pair it would reach others, so these values go
// this way and are zeros in the product.
template <class T, int tensor>
__device__ __forceinline__ void add_nonfinite(Gradient<T>& gradient, const Smem<T>& smem, const BackwardArgs& a,
                                              int stage, int first_row, int first_streamed, int tile_idx) {
  const Unit& u = smem.unit;
  const typename T::Element* values = &smem.stages[stage].rows[tensor][first_row][first_column<T>()];
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int owned = row_of<T>(u, m, half);
      const Range partners = partners_of<T>(a.p, u, min(owned, u.num_owned - 1));
      const int end = min(partners.end - first_streamed, T::kPart);
#pragma unroll 1
      for (int row = max(partners.begin - first_streamed, 0); row < end; ++row) {
        const int streamed = first_streamed + row, query = T::kOwnsQueries ? owned : streamed;
        const int key = T::kOwnsQueries ? streamed : owned;
        if ((word_of(a.p.block_mask, tile_idx, query, key / 32 * 32) >> key % 32 & 1) == 0) continue;
#pragma unroll
        for (int n = 0; n < T::kColumnTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float value = to_float(values[place_of<T>(row, n) + e]);
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
  const uint32_t first =
      ptx::smem_address(&smem.owned[tensor][row_warp<T>() * T::kWarpRows][first_column<T>()]) + first_in_tile<T>();
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < T::kColumnTiles; ++n) {
        store_pair<T>(in_tile<T>(first, m, half, n), gradient[m][n][2 * half] * scale,
                      gradient[m][n][2 * half + 1] * scale);
      }
    }
  }
}

}  // namespace
}  // namespace fmkernels
