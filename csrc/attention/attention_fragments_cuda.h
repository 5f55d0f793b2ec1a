// SPDX-License-Identifier: Apache-2.0
// What the forward and the backward kernels of attention share: sequences, fragments of tiles in shared memory, and the
// arithmetic of scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <utility>

#include "../common/launch.h"
#include "../common/ptx.h"
#include "attention.h"

namespace fmkernels {
namespace {

constexpr int kWarp = 32;
constexpr int kChunkElements = 8;  // elements of a 16-byte chunk
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.69314718f;

// f.template operator()<i>() for i in [0, kCount): a loop whose index is a constant of the instructions in it.
template <int kCount, class F>
__device__ __forceinline__ void static_for(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (f.template operator()<i>(), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// Byte offset of a 16-byte chunk of a row. Eight rows at one column, and one row's columns, fall into different banks.
template <int kDim>
__host__ __device__ constexpr int swizzled(int row, int chunk) {
  constexpr bool whole_lines = kDim * 2 % 128 == 0;  // else rows of 192 bytes: two rows shift by half of the banks
  return row * kDim * 2 + ((chunk ^ (whole_lines ? row & 7 : row >> 1 & 3)) << 4);
}

// x, the same in every lane of the warp, in a register that the compiler knows to be so.
__device__ __forceinline__ int uniform(int x) { return __reduce_max_sync(ptx::kAllLanes, x); }

__device__ __forceinline__ int clamp(int x, int low, int high) { return min(max(x, low), high); }

// x, out of a shuffle with itself: the compiler keeps the result instead of computing it again in the loop.
__device__ __forceinline__ uint32_t pinned(uint32_t x) { return __shfl_sync(ptx::kAllLanes, x, threadIdx.x % kWarp); }

// ---- sequences ------------------------------------------------------------------------------------------------------

struct Sequence {
  int q_start, k_start, seq_q, seq_k;
};

// One of the batch. Lengths that only the device knows stay within the tensors, whatever they are.
__device__ __forceinline__ Sequence sequence_of(const AttentionForwardParams& p, int b) {
  Sequence s{0, 0, static_cast<int>(p.seq_q), static_cast<int>(p.seq_k)};
  if (p.cu_seqlens_q != nullptr) {
    s.q_start = uniform(clamp(p.cu_seqlens_q[b], 0, static_cast<int>(p.total_q)));
    s.k_start = uniform(clamp(p.cu_seqlens_k[b], 0, static_cast<int>(p.total_k)));
    s.seq_q = uniform(min(clamp(p.cu_seqlens_q[b + 1], s.q_start, static_cast<int>(p.total_q)) - s.q_start, s.seq_q));
    s.seq_k = uniform(min(clamp(p.cu_seqlens_k[b + 1], s.k_start, static_cast<int>(p.total_k)) - s.k_start, s.seq_k));
  }
  return s;
}

struct Range {
  int begin, end;
};

// Keys that a query sees; S: a Sequence, or what has its members.
template <class S>
__device__ __forceinline__ Range visible_keys(const AttentionForwardParams& p, const S& s, int query) {
  const int diagonal = query + s.seq_k - s.seq_q;
  return {p.window_left < 0 ? 0 : max(0, diagonal - static_cast<int>(p.window_left)),
          p.window_right < 0 ? s.seq_k : clamp(diagonal + static_cast<int>(p.window_right) + 1, 0, s.seq_k)};
}

// ---- fragments ------------------------------------------------------------------------------------------------------

// The lane's row and 16-byte chunk of a 16 x 16 fragment: ldmatrix.x4 gives its four 8 x 8 matrices column by column,
// as fragments of q and of transposed values are numbered, or row by row, as those of keys are.
template <class T>
__device__ __forceinline__ uint32_t lane_offset(bool by_column) {
  const int lane = threadIdx.x % kWarp;
  return by_column ? swizzled<T::kDim>(lane % 16, lane / 16)
                   : swizzled<T::kDim>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

// The lane's row of the first fragment in each column step (16 columns) of what a swizzle permutes. A step flips bits of
// the address: either all addresses are kept, or one from which the others are made.
template <class T, bool kKept>
struct Columns {
  static constexpr int kSteps = T::kDim * 2 % 128 == 0 ? 4 : 2;
  uint32_t at[kKept ? kSteps : 1];

  template <int step>
  __device__ __forceinline__ uint32_t of() const {
    if constexpr (kKept) return at[step % kSteps];
    else return at[0] ^ (step % kSteps * 32);
  }
};

// ldmatrix.x4 of the fragment at row `row` and column step `step`. Rows are whole multiples of what the swizzle permutes.
template <class T, int row, int step, bool kTransposed = false, class Steps>
__device__ __forceinline__ void load_fragment(uint32_t (&r)[4], const Steps& columns) {
  constexpr int kSteps = Columns<T, false>::kSteps, kOffset = row * T::kDim * 2 + step / kSteps * kSteps * 32;
  const uint32_t column = columns.template of<step>();
  if constexpr (kTransposed) ptx::ldmatrix_x4_trans<kOffset>(r, column);
  else ptx::ldmatrix_x4<kOffset>(r, column);
}

// sum += x y for accumulators x, rounded, and y of 8 kTiles rows from row `first` on of what `columns` addresses.
template <class T, int first, int kTiles>
__device__ __forceinline__ void add_product(float (&sum)[T::kRowTiles][T::kColumnTiles][4],
                                            const float (&x)[T::kRowTiles][kTiles][4],
                                            const Columns<T, false>& columns) {
  using Element = typename T::Element;
  static_for<kTiles / 2>([&]<int step>() {
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
      load_fragment<T, first + step * 16, pair, true>(b, columns);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
        ptx::mma_m16n8k16<Element>(sum[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<Element>(sum[m][n + 1], a[m], b[2], b[3]);
      }
    });
  });
}

// Where a lane's accumulators 2 * half and 2 * half + 1 of m and n, rounded, lie in a tile; `first`: those of 0, 0 and 0.
template <class T>
__device__ __forceinline__ uint32_t in_tile(uint32_t first, int m, int half, int n) {
  constexpr int kPermuted = T::kDim * 2 % 128 == 0 ? 8 : 4;  // chunks that a swizzle permutes
  return (first ^ (n % kPermuted * 16)) + (m * 16 + half * 8) * T::kDim * 2 + n / kPermuted * kPermuted * 16;
}

// sum, or something else than 0 where an element of a chunk is not finite: its product with zero is NaN.
template <class Element>
__device__ __forceinline__ uint32_t add_nonfinite_of(uint32_t sum, const uint4& chunk) {
  for (uint32_t word : {chunk.x, chunk.y, chunk.z, chunk.w}) sum = ptx::fma_x2<Element>(word, 0, sum);
  return sum;
}
// The elements of a chunk that are not finite become zeros.
template <class Element>
__device__ __forceinline__ void zero_nonfinite_of(uint16_t* chunk) {
  constexpr uint32_t kExponent = kDType<Element> == DType::kFloat16 ? 0x7c00u : 0x7f80u;
  for (int i = 0; i < kChunkElements; ++i) {
    if ((chunk[i] & kExponent) == kExponent) chunk[i] = 0;
  }
}

// The largest of the four lanes that share a row; all four hold it.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ptx::kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(ptx::kAllLanes, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(ptx::kAllLanes, x, 1);
  return x + __shfl_xor_sync(ptx::kAllLanes, x, 2);
}

// ---- scores ---------------------------------------------------------------------------------------------------------

// tanh to a few units in the last place everywhere: 1 - 2 / (1 + e^2x) or, near zero, where that cancels, an odd
// polynomial.
__device__ __forceinline__ float tanh(float x) {
  const float far = 1.0f - 2.0f * ptx::rcp(1.0f + ptx::ex2(x * (2.0f * kLog2E))), u = x * x;
  float near = u * -5.602740497e-3f + 2.053993824e-2f;
  near = near * u - 5.370532051e-2f;
  near = near * u + 1.333093216e-1f;
  near = near * u - 3.333325220e-1f;
  near = near * u + 1.0f;
  return fabsf(x) < 0.625f ? near * x : far;
}

// x in log2 units; what is finite stays finite.
__device__ __forceinline__ float to_log2(float x) {
  const float scaled = x * kLog2E;
  return isfinite(x) ? fminf(fmaxf(scaled, -0x1.fp127f), 0x1.fp127f) : scaled;
}

// ---- launch ---------------------------------------------------------------------------------------------------------

// The columns that a kernel for `dim` of them has.
inline int bucket_of(int64_t dim) {
  return dim <= 64 ? 64 : dim <= 96 ? 96 : dim <= 128 ? 128 : dim <= 192 ? 192 : 256;
}

// Refuses what a launch with a block for each of `grid_heads` heads cannot take, and shortens windows so that a position, a window and the rows of a tile after it
// add up within 32 bits.
inline void check_launch(const char* name, AttentionForwardParams& p, const char* heads_name, int64_t grid_heads,
                         std::initializer_list<const TokenView*> views) {
  constexpr int64_t kMaxLength = (1 << 30) - 1024, kMaxGrid = 65535, kMaxStride = 1 << 23;
  FM_CHECK(p.dtype != DType::kFloat32, name, ": CUDA tensors must be float16 or bfloat16");
  FM_CHECK(p.batch <= kMaxGrid && grid_heads <= kMaxGrid, name, ": batch and ", heads_name, " must be at most ",
           kMaxGrid, " on CUDA, got ", p.batch, " and ", grid_heads);
  FM_CHECK(p.seq_q * (p.heads / p.kv_heads) <= kMaxLength && p.seq_k <= kMaxLength && p.total_q <= kMaxLength &&
               p.total_k <= kMaxLength,
           name, ": sequences must be at most ", kMaxLength, " rows long on CUDA");
  for (const TokenView* view : views) {
    FM_CHECK(reinterpret_cast<uintptr_t>(view->data) % 16 == 0 && view->batch_stride % kChunkElements == 0 &&
                 view->token_stride % kChunkElements == 0 && view->head_stride % kChunkElements == 0,
             name, ": rows of all tensors must begin on 16-byte boundaries");
    FM_CHECK(view->token_stride < kMaxStride, name, ": a token stride must be below ", kMaxStride,
             " elements on CUDA, got ", view->token_stride);
  }
  p.window_left = std::min<int64_t>(p.window_left, kMaxLength - 1);
  p.window_right = std::min<int64_t>(p.window_right, kMaxLength - 1);
}

// The shared memory that a block may have on the current device.
inline int max_smem_bytes(const char* name) {
  int device = 0, smem_bytes = 0;
  check_cuda(name, cudaGetDevice(&device));
  check_cuda(name, cudaDeviceGetAttribute(&smem_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  FM_CHECK(smem_bytes >= 99 * 1024, name, ": this GPU gives a block ", smem_bytes,
           " bytes of shared memory; 99 KiB are needed (sm_80 and later)");
  return smem_bytes;
}

}  // namespace
}  // namespace fmkernels
