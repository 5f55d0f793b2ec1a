// SPDX-License-Identifier: Apache-2.0
// What attention_forward.cu does to scores in masked or modified blocks, and its results. Included by it alone.
#pragma once

#include "attention_dropout_cuda.h"
#include "attention_warp_cuda.h"

namespace fmkernels {
namespace {

// ---- modifiers and masks --------------------------------------------------------------------------------------------

// Row of the unit that a lane's accumulators i = 2 * half and 2 * half + 1 of m belong to.
template <class T>
__device__ __forceinline__ int row_of(const Unit& u, int m, int half) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  return u.row_begin + warp * T::kWarpRows + m * 16 + half * 8 + lane / 4;
}

// s[m][n][2 * half + e] = f(that, row of the unit, key of the sequence).
template <class T, class F>
__device__ __forceinline__ void for_each_score(Scores<T>& s, const Unit& u, int first_key, F&& f) {
  const int column = first_key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto of_row = f(min(row_of<T>(u, m, half), u.num_rows - 1));
#pragma unroll
      for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) s[m][n][2 * half + e] = of_row(s[m][n][2 * half + e], column + n * 8 + e);
      }
    }
  }
}

template <class T, class Bias>
__device__ __forceinline__ void add_bias(Scores<T>& s, const AttentionForwardParams& p, const Unit& u, int first_key) {
  for_each_score<T>(s, u, first_key, [&](int row) {
    const int64_t head = head_of(u, row);
    const Bias* bias = static_cast<const Bias*>(p.bias) + blockIdx.z * p.bias_stride[0] + head * p.bias_stride[1] +
                       query_of(u, row) * p.bias_stride[2];
    return
        [&, bias](float x, int key) { return key < u.seq_k ? x + to_log2(to_float(bias[key * p.bias_stride[3]])) : x; };
  });
}

// Products become scores in log2 units.
template <class T>
__device__ __forceinline__ void modify(Scores<T>& s, const AttentionForwardParams& p, const Unit& u, int first_key) {
  if (p.softcap != 0.0f) {
    const float to_argument = p.softmax_scale / p.softcap, cap = p.softcap * kLog2E;
    for_each_score<T>(s, u, first_key, [&](int) { return [&](float x, int) { return tanh(x * to_argument) * cap; }; });
  } else {
    const float scale = p.softmax_scale * kLog2E;
    for_each_score<T>(s, u, first_key, [&](int) { return [&](float x, int) { return x * scale; }; });
  }
  if (p.bias != nullptr) {
    if (T::kSplits || p.bias_dtype == DType::kFloat32) add_bias<T, float>(s, p, u, first_key);
    else add_bias<T, typename T::Element>(s, p, u, first_key);
  }
  if (p.alibi_slopes != nullptr) {
    for_each_score<T>(s, u, first_key, [&](int row) {
      const int64_t head = head_of(u, row);
      const float slope = to_log2(p.alibi_slopes[blockIdx.z * p.alibi_batch_stride + head]);
      const int diagonal = query_of(u, row) + u.seq_k - u.seq_q;
      return [=](float x, int key) { return x - slope * static_cast<float>(abs(diagonal - key)); };
    });
  }
}

// Hides the keys from `first_key` on that a row does not see. `low`, `high`: which end of a range may lie in the block.
template <class T>
__device__ __forceinline__ void mask(Scores<T>& s, const AttentionForwardParams& p, const Unit& u, int first_key,
                                     bool low, bool high) {
  const int column = first_key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of<T>(u, m, half);
      Range keys = visible_keys(p, u, query_of(u, row));
      if (u.chunk >= 0) keys = {max(keys.begin, u.chunk * kSplitKeys), min(keys.end, (u.chunk + 1) * kSplitKeys)};
      const int begin = keys.begin - column, end = keys.end - column;
      if (high) {
#pragma unroll
        for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (n * 8 + e >= end) s[m][n][2 * half + e] = -INFINITY;
          }
        }
      }
      if (low) {
#pragma unroll
        for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (n * 8 + e < begin) s[m][n][2 * half + e] = -INFINITY;
          }
        }
      }
    }
  }
}

// The word of the block mask that a row has for 32 keys of a block from `key` on; `tiles`: what the lines from `first_line`
// on see of the block.
__device__ __forceinline__ uint32_t word_of_row(const BlockMaskView& m, const int (&tiles)[kLines], int first_line,
                                                int query, int key) {
  return word_of(m, block_of(m, query) == first_line ? tiles[0] : tiles[1], query, key);
}

// Whether the block mask hides the block from all rows of the warp.
template <class T>
__device__ __forceinline__ bool hides_all(const BlockMaskView& m, const Unit& u, const int (&tiles)[kLines]) {
  const int first = u.row_begin + static_cast<int>(threadIdx.x) / kWarp * T::kWarpRows;
  const int last = min(first + T::kWarpRows, u.num_rows) - 1, line = first_line_of(m, u);
  return (tiles[0] == kHidden || block_of(m, query_of(u, first)) != line) &&
         (tiles[1] == kHidden || block_of(m, query_of(u, last)) == line);
}

// Hides what the block mask hides.
template <class T>
__device__ __forceinline__ void mask_block(Scores<T>& s, const BlockMaskView& m, const Unit& u, int first_key,
                                           const int (&tiles)[kLines]) {
  const int first_line = first_line_of(m, u);
#pragma unroll
  for (int tile = 0; tile < T::kRowTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = query_of(u, min(row_of<T>(u, tile, half), u.num_rows - 1));
#pragma unroll
      for (int first = 0; first < T::kKeyTiles; first += 4) {
        const int key = first_key + first * 8;
        const uint32_t shown =
            word_of_row(m, tiles, first_line, query, key / 32 * 32) >> (key % 32 + threadIdx.x % 4 * 2);
#pragma unroll
        for (int n = first; n < first + 4 && n < T::kKeyTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if ((shown >> ((n - first) * 8 + e) & 1) == 0) s[tile][n][2 * half + e] = -INFINITY;
          }
        }
      }
    }
  }
}

// Which keys of a block the lane's rows keep: as many bits for each row as it has accumulators.
template <class T>
constexpr int kKeptOfRow = T::kKeyTiles * 2;
template <class T>
using KeptBits = std::conditional_t<T::kRowTiles * 2 * kKeptOfRow<T> <= 32, uint32_t, uint64_t>;
template <class T>
__device__ __forceinline__ constexpr int kept_bit(int m, int half, int n, int e) {
  return kKeptOfRow<T> * (2 * m + half) + 2 * n + e;
}
template <class T>
__device__ __forceinline__ KeptBits<T> kept_of_block(const AttentionForwardParams& p, const Unit& u, int first_key) {
  constexpr int kCalls = (T::kKeys + 16) / kDropoutGroup;  // a block may begin in the middle of a group
  const int first_row = row_of<T>(u, 0, 0);
  KeptBits<T> kept = 0;
#pragma unroll 1
  for (int i = T::kRowTiles * 2 - 1; i >= 0; --i) {
    const int row = first_row + 8 * i;
    uint32_t of_row = 0;
#pragma unroll 1
    for (int call = kCalls - 1; call >= 0; --call)
      of_row = of_row << kCallBits | kept_of_call(p, blockIdx.z, head_of(u, row), query_of(u, row),
                                                  first_key / kDropoutGroup + call, threadIdx.x % 4);
    of_row = of_row >> (first_key % kDropoutGroup / 8 * 2) & ~(~0u << kKeptOfRow<T>);
    kept = kept << kKeptOfRow<T> | of_row;
  }
  return kept;
}

// o += v for the values of a block that are not finite, in the rows that see them. A product with the weight 0 of a
// hidden key would be NaN, so these values go this way and are zeros in the product.
template <class T>
__device__ __forceinline__ void add_nonfinite(WarpState<T>& w, const typename T::Element* values,
                                              const AttentionForwardParams& p, const Unit& u, int first_key,
                                              const int (&tiles)[kLines]) {
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = query_of(u, min(row_of<T>(u, m, half), u.num_rows - 1));
      const Range keys = visible_keys(p, u, query);
      const int end = min(keys.end - first_key, T::kKeys);
#pragma unroll 1
      for (int key = max(keys.begin - first_key, 0); key < end; ++key) {
        if (T::kTakesBlockMask && p.block_mask.block != 0) {
          const uint32_t word =
              word_of_row(p.block_mask, tiles, first_line_of(p.block_mask, u), query, (first_key + key) / 32 * 32);
          if ((word >> (first_key + key) % 32 & 1) == 0) continue;
        }
#pragma unroll
        for (int n = 0; n < T::kColumnTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float v = to_float(values[place_of<T>(key, n) + e]);
            if (!isfinite(v)) w.o[m][n][2 * half + e] += v;
          }
        }
      }
    }
  }
}

// ---- results --------------------------------------------------------------------------------------------------------

// What a row's weights add up to, the sink included: the factor of what it accumulated, and its lse.
struct Total {
  float factor, lse;
};
// `largest`: what the weights refer to, in log2 units; -infinity with a sum of 0 where no key was seen.
__device__ __forceinline__ Total total_of(float largest, float sum, const float* sinks, int64_t head) {
  float scale = 1.0f;
  if (sinks != nullptr) {
    const float sink = to_log2(sinks[head]), joint = fmaxf(largest, sink);
    const float reference = joint == -INFINITY ? 0.0f : joint;
    scale = ptx::ex2(largest - reference);
    sum = sum * scale + ptx::ex2(sink - reference);
    largest = joint;
  }
  if (sum == 0.0f) return {0.0f, -INFINITY};
  return {scale * ptx::rcp(sum), (largest + ptx::lg2(sum)) * kLn2};
}

template <class T>
__device__ __forceinline__ void store_results(WarpState<T>& w, Smem<T>& smem, const Args& a, const Unit& u) {
  using Element = typename T::Element;
  const AttentionForwardParams& p = a.p;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const float scale = dropout_scale(p);
  const int64_t slot = a.partials.first_slot(blockIdx.z, p.cu_seqlens_k != nullptr, u.k_start) + u.chunk;
  const uint32_t first_o = ptx::smem_address(smem.q[warp * T::kWarpRows]) + first_in_tile<T>();
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of<T>(u, m, half);
      const float sum = quad_sum(w.sum[m][half]), largest = sum == 0.0f ? -INFINITY : -w.shift[m][half];
      const int64_t head = head_of(u, row);
      const int64_t partial = u.chunk < 0 ? 0 : a.partials.index(slot, row, blockIdx.y);
      const bool exists = row < u.num_rows;
      Total total{0.0f, -INFINITY};
      if (exists) total = total_of(largest, sum, u.chunk < 0 ? p.sinks : nullptr, head);
      const float factor = total.factor * scale;
      if (exists && lane % 4 == 0) {
        float* lse = u.chunk >= 0 ? a.partials.lse + partial
                                  : p.lse + blockIdx.z * p.lse_batch_stride + head * p.lse_head_stride + u.q_start +
                                        query_of(u, row);
        *lse = total.lse;
      }
#pragma unroll
      for (int n = 0; n < T::kColumnTiles; ++n) {
        const float x = w.o[m][n][2 * half] * factor, y = w.o[m][n][2 * half + 1] * factor;
        if (u.chunk < 0) {
          store_pair<T>(in_tile<T>(first_o, m, half, n), x, y);
        } else if (exists && n * 8 < p.v_head_dim) {
          *reinterpret_cast<float2*>(a.partials.o + partial * p.v_head_dim + n * 8 + lane % 4 * 2) = make_float2(x, y);
        }
      }
    }
  }
  if (u.chunk >= 0) return;
  __syncwarp();  // a warp's rows of o are written and read by the warp alone
  const RowsOfWarp<T> rows(p.o, u);
  const int first = lane / T::kRowThreads, chunk = lane % T::kRowThreads;
  const uint32_t from = ptx::smem_address(smem.q[warp * T::kWarpRows]) + swizzled<T>(first, chunk);
  static_for<T::kWarpRows / T::kWarpPassRows>([&]<int pass>() {
    const int r = first + pass * T::kWarpPassRows;
    Element* o = rows.at(r) + chunk * T::kChunkElements;
    const bool exists = u.row_begin + warp * T::kWarpRows + r < u.num_rows;
    static_for<T::kColumnPasses>([&]<int c>() {
      const void* bits = __cvta_shared_to_generic(in_pass<T, pass>(from) + c * T::kRowThreads * 16);
      if (exists && (chunk + c * T::kRowThreads) * T::kChunkElements < p.v_head_dim) {
        *reinterpret_cast<uint4*>(o + c * T::kRowThreads * T::kChunkElements) = *static_cast<const uint4*>(bits);
      }
    });
  });
}

}  // namespace
}  // namespace fmkernels
