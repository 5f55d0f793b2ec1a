// SPDX-License-Identifier: Apache-2.0
// Copies of blocks, products and softmax of attention_forward.cu, a warp's work. Included by it alone.
#pragma once

#include "attention_tile_cuda.h"

namespace fmkernels {
namespace {

// ---- copies ---------------------------------------------------------------------------------------------------------

// Keys or values of one kv head, and where this thread writes the part of a block that it copies.
template <class T, bool kValues>
struct BlockCopy {
  const char* next;  // this thread's row of the first pass over the block to come, at its first column
  int pass_bytes;
  uint32_t smem;  // where that goes
  int columns;    // 16-byte chunks that the tensor has from this thread's first column on

  // The first block to come is `block`; each is the one before the last.
  __device__ __forceinline__ BlockCopy(const Args& a, const Unit& u, uint32_t offset, int block) {
    const TokenView& view = kValues ? a.p.v : a.p.k;
    const int row = threadIdx.x / T::kRowThreads, chunk = threadIdx.x % T::kRowThreads;
    next = static_cast<const char*>(view.data) + chunk * 16 +
           T::kElementBytes * (blockIdx.z * view.batch_stride + kv_head_of(a) * view.head_stride +
                               (u.k_start + static_cast<int64_t>(block) * T::kKeys + row) * view.token_stride);
    pass_bytes = static_cast<int>(pinned(static_cast<int>(view.token_stride) * T::kPassRows * T::kElementBytes));
    smem = offset;
    columns = a.chunks[kValues] - chunk;
  }

  // Of this thread's row in the first pass over the keys, at its first column.
  static __device__ __forceinline__ uint32_t thread_offset() {
    return swizzled<T>(threadIdx.x / T::kRowThreads, threadIdx.x % T::kRowThreads);
  }
  // From `smem` to the same row and column of another pass; kRowThreads chunks leave the swizzled bits alone.
  static constexpr int smem_bytes(int pass, int c) {
    return (kValues ? T::kValueBytes : 0) + pass * T::kPassRows * T::kRowBytes + c * T::kRowThreads * 16;
  }
  // A block that lies inside the sequence; with !wanted nothing is read.
  __device__ __forceinline__ void issue(bool wanted, const Passes& passes) {
    static_for<T::kKeys / T::kPassRows>([&]<int pass>() {
      const char* from = pass == 0 ? next : next + static_cast<int64_t>(pass_bytes) * passes.number[pass];
      static_for<T::kColumnPasses>([&]<int c>() {
        ptx::cp_async_16_if<smem_bytes(pass, c), c * T::kRowThreads * 16, c * T::kRowThreads>(wanted, columns, smem,
                                                                                              from);
      });
    });
    next += static_cast<int64_t>(pass_bytes) * passes.back;
  }
  // A block of which the sequence has `num_keys` keys: rows past them are zeros.
  __device__ __forceinline__ void issue_ragged(int num_keys) {
    const char* from = next;
    const int row = threadIdx.x / T::kRowThreads;
    for (int pass = 0; pass < T::kKeys / T::kPassRows; ++pass) {
      const bool valid = row + pass * T::kPassRows < num_keys;
      for (int c = 0; c < T::kColumnPasses; ++c) {
        if (c * T::kRowThreads < columns) {
          ptx::cp_async_16_or_zero(smem + smem_bytes(pass, c), valid ? from + c * T::kRowThreads * 16 : from, valid);
        }
      }
      from += pass_bytes;
    }
    next += static_cast<int64_t>(pass_bytes) * -(T::kKeys / T::kPassRows);
  }
  // Zeros in the columns that the tensor lacks: written once, never loaded over.
  __device__ __forceinline__ void zero_columns() const {
    for (int pass = 0; pass < T::kKeys / T::kPassRows; ++pass) {
      for (int c = 0; c < T::kColumnPasses; ++c) {
        if (c * T::kRowThreads >= columns) {
          *static_cast<uint4*>(__cvta_shared_to_generic(smem + smem_bytes(pass, c))) = uint4{};
        }
      }
    }
  }
  // Whether any of this thread's chunks holds an element that is not finite: its product with zero is NaN.
  template <class Element>
  __device__ __forceinline__ bool has_nonfinite() const {
    uint32_t sum = 0;
#pragma unroll
    for (int pass = 0; pass < T::kKeys / T::kPassRows; ++pass) {
#pragma unroll
      for (int c = 0; c < T::kColumnPasses; ++c) {
        const uint4 x = *static_cast<const uint4*>(__cvta_shared_to_generic(smem + smem_bytes(pass, c)));
        sum = add_nonfinite_of<Element>(sum, x);
      }
    }
    return sum != 0;
  }
  // The elements of this thread's chunks that are not finite become zeros.
  template <class Element>
  __device__ __forceinline__ void zero_nonfinite() const {
    for (int pass = 0; pass < T::kKeys / T::kPassRows; ++pass) {
      for (int c = 0; c < T::kColumnPasses; ++c) {
        zero_nonfinite_of<Element>(__cvta_shared_to_generic(smem + smem_bytes(pass, c)));
      }
    }
  }
};

// ---- one warp -------------------------------------------------------------------------------------------------------

// What a lane keeps of its rows: row 16 * m + 8 * half + g of the warp, m < kRowTiles, g = lane / 4.
template <class T>
struct WarpState {
  float o[T::kRowTiles][T::kColumnTiles][4];
  float shift[T::kRowTiles][2];  // minus the maximum that weights refer to, in log2 units; kNoMax: none yet
  float sum[T::kRowTiles][2];    // of this lane's weights
};

template <class T>
using Scores = float[T::kRowTiles][T::kKeyTiles][4];

template <class T, int step>
__device__ __forceinline__ void load_q(uint32_t (&q)[T::kRowTiles][T::kFragment], const Columns<T, false>& at) {
  static_for<T::kRowTiles>([&]<int m>() { load_fragment<T, m * 16, step>(q[m], at); });
}

template <class T>
struct QFragments {
  uint32_t kept[T::kKeepsQ ? T::kRowBytes / T::kStepBytes : 1][T::kRowTiles][T::kFragment];
};

// s = q k^T for one block.
template <class T>
__device__ __forceinline__ void multiply_keys(Scores<T>& s, const QFragments<T>& q, const Columns<T, false>& q_at,
                                              const Columns<T, T::kKeepsColumns>& k_at) {
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < T::kKeyTiles; ++n) {
      for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
    }
  }
  [[maybe_unused]] float part[T::kRowTiles][T::kKeyTiles][4] = {};
  static_for<T::kRowBytes / T::kStepBytes>([&]<int step>() {
    [[maybe_unused]] uint32_t loaded[T::kRowTiles][T::kFragment];
    if constexpr (!T::kKeepsQ) load_q<T, step>(loaded, q_at);
    const auto& a = [&]() -> const uint32_t (&)[T::kRowTiles][T::kFragment] {
      if constexpr (T::kKeepsQ) return q.kept[step];
      else return loaded;
    }();
    static_for<T::kKeyTiles / 2>([&]<int pair>() {
      constexpr int n = pair * 2;
      uint32_t b[T::kFragment];
      load_fragment<T, n * 8, step>(b, k_at);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
        if constexpr (T::kSplits) {
          multiply_add<T, 0>(part[m][n], a[m], b);
          multiply_add<T, 1>(part[m][n + 1], a[m], b);
        } else {
          multiply_add<T, 0>(s[m][n], a[m], b);
          multiply_add<T, 1>(s[m][n + 1], a[m], b);
        }
      }
    });
    if constexpr (T::kSplits) add_part<T, step>(s, part);
  });
  if constexpr (T::kSplits) correct_nonfinite<T, 0, 0>(s, q_at, k_at, [](int, int) { return float4{}; });
}

// Scores, in units of 1 / scale, become weights exp2(score * scale + shift); the sums grow by them.
template <class T>
__device__ __forceinline__ void softmax(WarpState<T>& w, Scores<T>& s, float scale) {
  float largest[T::kRowTiles][2];
  bool grows = false;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x = fmaxf(s[m][0][2 * half], s[m][0][2 * half + 1]);
#pragma unroll
      for (int n = 1; n < T::kKeyTiles; ++n) x = fmaxf(fmaxf(x, s[m][n][2 * half]), s[m][n][2 * half + 1]);
      largest[m][half] = quad_max(x);
      grows = grows || fmaf(largest[m][half], scale, w.shift[m][half]) > kRescaleLog2;
    }
  }
  if (__builtin_expect(__any_sync(ptx::kAllLanes, grows), 0)) {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float old_shift = w.shift[m][half];
        const bool row_grows = fmaf(largest[m][half], scale, old_shift) > kRescaleLog2;
        if (row_grows) w.shift[m][half] = -largest[m][half] * scale;
        const float factor = row_grows ? ptx::ex2(w.shift[m][half] - old_shift) : 1.0f;
        w.sum[m][half] *= factor;
#pragma unroll
        for (int n = 0; n < T::kColumnTiles; ++n) {
          w.o[m][n][2 * half] *= factor;
          w.o[m][n][2 * half + 1] *= factor;
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[m][n][i] = ptx::ex2(fmaf(s[m][n][i], scale, w.shift[m][i / 2]));
        w.sum[m][i / 2] += s[m][n][i];
      }
    }
  }
}

// What the loops address: copies of the blocks to come, and the lane's rows of the first fragments of q, k and v.
template <class T>
struct Addresses {
  BlockCopy<T, false> copy_keys;
  BlockCopy<T, true> copy_values;
  Columns<T, false> q, v;
  Columns<T, T::kKeepsColumns> k;

  static __device__ __forceinline__ uint32_t of_q(const Smem<T>& smem) {
    return ptx::smem_address(smem.q[threadIdx.x / kWarp * T::kWarpRows]) + lane_offset<T>(true);
  }
  __device__ __forceinline__ Addresses(const Args& a, const Unit& u, const Smem<T>& smem, int block, uint32_t copy_to)
      : copy_keys(a, u, copy_to, block - 1),
        copy_values(a, u, copy_to, block),
        q{of_q(smem)},
        v{pinned(ptx::smem_address(smem.kv[1]) + transposed_offset<T>())} {
    const uint32_t first = ptx::smem_address(smem.kv[0]) + lane_offset<T>(false);
    for (int step = 0; step < static_cast<int>(sizeof(k.at) / sizeof(k.at[0])); ++step)
      k.at[step] = pinned(first ^ (step * T::kStepBytes));
  }
};

}  // namespace
}  // namespace fmkernels
