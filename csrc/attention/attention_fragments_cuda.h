// SPDX-License-Identifier: Apache-2.0
// What the forward and the backward kernels of attention share: sequences, places in tiles in shared memory, and the
// arithmetic of scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "../common/launch.h"
#include "../common/ptx.h"
#include "../common/vector_cuda.h"
#include "attention.h"

namespace fmkernels {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.69314718f;

// f.template operator()<i>() for i in [0, kCount): a loop whose index is a constant of the instructions in it.
template <int kCount, class F>
__device__ __forceinline__ void static_for(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (f.template operator()<i>(), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// f(m, n, i) for every accumulator of kRowTiles x kTiles tiles.
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

// Rows of tiles in shared memory, and how the tensor cores take them: half elements by m16n8k16, float32 by m16n8k8 of tf32
// (attention_products_cuda.h).
template <class Element_, int kDim_>
struct RowTraits {
  using Element = Element_;
  static constexpr int kDim = kDim_, kElementBytes = sizeof(Element), kRowBytes = kDim * kElementBytes;
  static constexpr int kChunkElements = 16 / kElementBytes, kRowChunks = kRowBytes / 16;  // chunks of 16 bytes
  // Threads along a row when a tile is copied: a divisor of its chunks, so that a thread keeps to its columns.
  static constexpr int kRowThreads = kRowChunks % 8 == 0 ? 8 : 4, kColumnPasses = kRowChunks / kRowThreads;
  static constexpr int kWarpPassRows = kWarp / kRowThreads;  // rows that a warp copies at a time
  static constexpr bool kSplits = std::is_same_v<Element, float>;
  static constexpr int kFragment =
      kSplits ? 8 : 4;  // registers of a fragment; split: four of high parts, four of low ones
  // Split products leave little to save by a loop without masks, which would double the code; and where values may be
  // infinite every block must look for them.
  static constexpr bool kHasPlainLoop = !kSplits;
  static constexpr int kStepBytes = 32;               // of a row that one product takes
  static constexpr int kStepRows = kSplits ? 8 : 16;  // that one product takes of a transposed operand
  // What a swizzle permutes in a row.
  static constexpr int kPermutedBytes = kRowBytes % 128 == 0 ? 128 : 64;
};

// Byte offset of a 16-byte chunk of a row. Eight rows at one column, and one row's columns, fall into different banks.
template <class T>
__host__ __device__ constexpr int swizzled(int row, int chunk) {
  constexpr bool whole_lines = T::kPermutedBytes == 128;  // else rows of 192 bytes: two rows shift by half of the banks
  return row * T::kRowBytes + ((chunk ^ (whole_lines ? row & 7 : row >> 1 & 3)) << 4);
}
// Of the first of a lane's two neighbouring accumulators of tile n of a row, as a place in an array of elements.
template <class T>
__device__ __forceinline__ int place_of(int row, int n) {
  constexpr int kChunk = T::kChunkElements;
  const uint32_t column = threadIdx.x % 4 * 2;
  return swizzled<T>(row, n * (8 / kChunk) + column / kChunk) / T::kElementBytes + column % kChunk;
}

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

// The lane's row and 16-byte chunk of a fragment of 16 rows and 32 bytes: ldmatrix.x4 gives its four 8 x 8 matrices of
// 16-bit elements, or 8 x 4 ones of 32-bit elements, column by column, as fragments of q and of transposed values are
// numbered, or row by row, as those of keys are.
template <class T>
__device__ __forceinline__ uint32_t lane_offset(bool by_column) {
  const int lane = threadIdx.x % kWarp;
  return by_column ? swizzled<T>(lane % 16, lane / 16) : swizzled<T>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}
// The same of a transposed operand: of one that is split the lane reads rows 2t and 2t+1 of column g itself.
template <class T>
__device__ __forceinline__ uint32_t transposed_offset() {
  const int lane = threadIdx.x % kWarp;
  if constexpr (T::kSplits) return swizzled<T>(lane % 4 * 2, lane / 16) + lane / 4 % 4 * 4;
  else return lane_offset<T>(true);
}

// The lane's row of the first fragment in each column step (32 bytes) of what a swizzle permutes. A step flips bits of
// the address: either all addresses are kept, or one from which the others are made.
template <class T, bool kKept>
struct Columns {
  static constexpr int kSteps = T::kPermutedBytes / T::kStepBytes;
  uint32_t at[kKept ? kSteps : 1];

  template <int step>
  __device__ __forceinline__ uint32_t of() const {
    if constexpr (kKept) return at[step % kSteps];
    else return at[0] ^ (step % kSteps * T::kStepBytes);
  }
};

// Where a lane's accumulators 2 * half and 2 * half + 1 of m and n, rounded, lie in a tile; `first`: those of 0, 0 and 0.
template <class T>
__device__ __forceinline__ uint32_t in_tile(uint32_t first, int m, int half, int n) {
  constexpr int kTileBytes = 8 * T::kElementBytes, kPermuted = T::kPermutedBytes / kTileBytes;
  return (first ^ (n % kPermuted * kTileBytes)) + (m * 16 + half * 8) * T::kRowBytes +
         n / kPermuted * T::kPermutedBytes;
}
// That of 0, 0 and 0, from where the tile begins.
template <class T>
__device__ __forceinline__ uint32_t first_in_tile() {
  const int lane = threadIdx.x % kWarp, bytes = lane % 4 * 2 * T::kElementBytes;
  return swizzled<T>(lane / 4, bytes / 16) + bytes % 16;
}
// Writes two of them there, rounded.
template <class T>
__device__ __forceinline__ void store_pair(uint32_t at, float x, float y) {
  void* to = __cvta_shared_to_generic(at);
  if constexpr (T::kSplits) *static_cast<float2*>(to) = make_float2(x, y);
  else *static_cast<uint32_t*>(to) = ptx::pack<typename T::Element>(x, y);
}

// sum, or something else than 0 where an element of a chunk is not finite: its product with zero is NaN.
template <class Element>
__device__ __forceinline__ uint32_t add_nonfinite_of(uint32_t sum, const uint4& chunk) {
  for (uint32_t word : {chunk.x, chunk.y, chunk.z, chunk.w}) {
    if constexpr (std::is_same_v<Element, float>)
      sum = float_bits(fmaf(float_from_bits(word), 0.0f, float_from_bits(sum)));
    else sum = ptx::fma_x2<Element>(word, 0, sum);
  }
  return sum;
}
// The elements of a chunk that are not finite become zeros.
template <class Element>
__device__ __forceinline__ void zero_nonfinite_of(void* chunk) {
  using Bits = std::conditional_t<std::is_same_v<Element, float>, uint32_t, uint16_t>;
  constexpr uint32_t kExponents[] = {0x7f800000u, 0x7c00u, 0x7f80u};
  constexpr uint32_t kExponent = kExponents[static_cast<int>(kDType<Element>)];
  auto* bits = static_cast<Bits*>(chunk);
  for (int i = 0; i < 16 / static_cast<int>(sizeof(Bits)); ++i) {
    if ((bits[i] & kExponent) == kExponent) bits[i] = 0;
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
template <class Element>
int bucket_of(int64_t dim) {
  if constexpr (std::is_same_v<Element, float>) return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
  else return dim <= 64 ? 64 : dim <= 96 ? 96 : dim <= 128 ? 128 : dim <= 192 ? 192 : 256;
}

// Refuses what a launch with a block for each of `grid_heads` heads cannot take, and shortens windows so that a position,
// a window and the rows of a tile after it add up within 32 bits.
inline void check_launch(const char* name, AttentionForwardParams& p, const char* heads_name, int64_t grid_heads,
                         std::initializer_list<const TokenView*> views) {
  constexpr int64_t kMaxLength = (1 << 30) - 1024, kMaxGrid = 65535, kMaxStride = 1 << 23;
  const int64_t chunk_elements = 16 / element_bytes(p.dtype);
  FM_CHECK(p.batch <= kMaxGrid && grid_heads <= kMaxGrid, name, ": batch and ", heads_name, " must be at most ",
           kMaxGrid, " on CUDA, got ", p.batch, " and ", grid_heads);
  FM_CHECK(p.seq_q * (p.heads / p.kv_heads) <= kMaxLength && p.seq_k <= kMaxLength && p.total_q <= kMaxLength &&
               p.total_k <= kMaxLength,
           name, ": sequences must be at most ", kMaxLength, " rows long on CUDA");
  for (const TokenView* view : views) {
    FM_CHECK(reinterpret_cast<uintptr_t>(view->data) % 16 == 0 && view->batch_stride % chunk_elements == 0 &&
                 view->token_stride % chunk_elements == 0 && view->head_stride % chunk_elements == 0,
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
