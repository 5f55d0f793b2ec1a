// SPDX-License-Identifier: Apache-2.0
// merge_attention.cu: the CUDA kernels of merge_attention, forward and backward.
//
// Contract   see merge_attention.h. A row is a (batch, token, head); kVec elements are read at a time where every row
//            begins on a 16-byte boundary, else one.
// Work       Forward: a thread owns one vector of a row, so a block covers kThreads consecutive vectors.
//            Backward: a warp owns one row and walks its vectors, because the gradient of lse is a sum over the row.
// Shared     none.
// Numerics   float32; weights at most 1; the sum of a row in a fixed order of lanes. Deterministic.
// Cost       3 * dim elements of memory a row forward, 6 * dim backward: bound by memory on every GPU.

#include "merge_attention.h"

#include "../common/dispatch.h"
#include "../common/launch.h"

namespace fmkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = 0x7fffffff;  // of a grid in x

template <class T, int kVec>
struct alignas(sizeof(T) * kVec) Vector {
  T lane[kVec];
};

struct Row {
  int64_t batch, token, head;
};

__device__ __forceinline__ Row row_of(const MergeAttentionParams& p, int64_t index) {
  const int64_t token = index / p.heads;
  return {token / p.num_tokens, token % p.num_tokens, index % p.heads};
}
template <class T>
__device__ __forceinline__ T* o_row(const MergeSide& side, Row r) {
  return static_cast<T*>(side.o) + r.batch * side.o_stride[0] + r.token * side.o_stride[1] + r.head * side.o_stride[2];
}
__device__ __forceinline__ float* lse_of(const MergeSide& side, Row r) {
  return side.lse + r.batch * side.lse_stride[0] + r.token * side.lse_stride[1] + r.head * side.lse_stride[2];
}

struct Weights {
  float a, b, lse;
};

// The weights of both sides, 0 for a side without keys, and the merged lse. NaN on either side makes all of them NaN.
__device__ __forceinline__ Weights merge_weights(float lse_a, float lse_b) {
  if (lse_a == -INFINITY && lse_b == -INFINITY) return {0.0f, 0.0f, -INFINITY};
  const bool a_is_larger = lse_a > lse_b;
  const float larger = a_is_larger ? lse_a : lse_b, smaller = a_is_larger ? lse_b : lse_a;
  const float ratio = expf(smaller - larger), inverse = 1.0f / (1.0f + ratio);
  const float lse = larger + logf(1.0f + ratio);
  return a_is_larger ? Weights{inverse, ratio * inverse, lse} : Weights{ratio * inverse, inverse, lse};
}
// exp(part - whole), and 0 for a side without keys, also where the whole has none.
__device__ __forceinline__ float weight(float part, float whole) {
  return part == -INFINITY ? 0.0f : expf(part - whole);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) merge_attention_kernel(MergeAttentionParams p) {
  const int64_t vectors_per_row = p.dim / kVec;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.batch * p.num_tokens * p.heads * vectors_per_row) return;
  const Row r = row_of(p, index / vectors_per_row);
  const int64_t column = index % vectors_per_row * kVec;

  const Weights weights = merge_weights(*lse_of(p.a, r), *lse_of(p.b, r));

  float sum[kVec] = {};
  auto add = [&](const MergeSide& side, float w) {
    if (w == 0.0f) return;  // a side without keys is not read: its o may hold anything
    const auto part = *reinterpret_cast<const Vector<T, kVec>*>(o_row<T>(side, r) + column);
    for (int i = 0; i < kVec; ++i) sum[i] += to_float(part.lane[i]) * w;
  };
  add(p.a, weights.a);
  add(p.b, weights.b);
  Vector<T, kVec> o;
  for (int i = 0; i < kVec; ++i) o.lane[i] = from_float<T>(sum[i]);
  *reinterpret_cast<Vector<T, kVec>*>(o_row<T>(p.merged, r) + column) = o;
  if (column == 0) *lse_of(p.merged, r) = weights.lse;
}

// Sum over the lanes of a warp, in the same order on every run; every lane holds the result.
__device__ __forceinline__ float warp_sum(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// The gradients of one side of row r, by one warp.
template <class T, int kVec>
__device__ __forceinline__ void side_backward(const MergeAttentionBackwardParams& p, const MergeSide& side,
                                              const MergeSide& grad_side, Row r, int lane) {
  using Vec = Vector<T, kVec>;
  const float w = weight(*lse_of(side, r), *lse_of(p.forward.merged, r));
  float dot = 0.0f;
  for (int64_t column = lane * kVec; column < p.forward.dim; column += kWarp * kVec) {
    Vec grad_part;
    if (w == 0.0f) {  // the side was not read, so it is not read here
      for (int i = 0; i < kVec; ++i) grad_part.lane[i] = from_float<T>(0.0f);
    } else {
      const Vec grad = *reinterpret_cast<const Vec*>(o_row<T>(p.grad, r) + column);
      const Vec part = *reinterpret_cast<const Vec*>(o_row<T>(side, r) + column);
      const Vec o = *reinterpret_cast<const Vec*>(o_row<T>(p.forward.merged, r) + column);
      for (int i = 0; i < kVec; ++i) {
        const float g = to_float(grad.lane[i]);
        grad_part.lane[i] = from_float<T>(g * w);
        dot += g * (to_float(part.lane[i]) - to_float(o.lane[i]));
      }
    }
    *reinterpret_cast<Vec*>(o_row<T>(grad_side, r) + column) = grad_part;
  }
  dot = warp_sum(dot);
  if (lane == 0) {
    const float grad_lse = p.grad.lse == nullptr ? 0.0f : *lse_of(p.grad, r);
    *lse_of(grad_side, r) = w == 0.0f ? 0.0f : w * (grad_lse + dot);
  }
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) merge_attention_backward_kernel(MergeAttentionBackwardParams p) {
  const int lane = threadIdx.x % kWarp;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (index >= p.forward.batch * p.forward.num_tokens * p.forward.heads) return;
  const Row r = row_of(p.forward, index);
  side_backward<T, kVec>(p, p.forward.a, p.grad_a, r, lane);
  side_backward<T, kVec>(p, p.forward.b, p.grad_b, r, lane);
}

// Whether every row of the side begins on a 16-byte boundary.
bool is_aligned(const MergeSide& side, int64_t bytes) {
  const int64_t vec = 16 / bytes;
  return reinterpret_cast<uintptr_t>(side.o) % 16 == 0 && side.o_stride[0] % vec == 0 && side.o_stride[1] % vec == 0 &&
         side.o_stride[2] % vec == 0;
}

dim3 grid_of(const char* name, int64_t num_items, int64_t items_per_block) {
  const int64_t num_blocks = (num_items + items_per_block - 1) / items_per_block;
  FM_CHECK(num_blocks <= kMaxBlocks, name, ": ", num_blocks, " blocks are more than a grid holds");
  return dim3(static_cast<unsigned>(num_blocks));
}

// Calls f.template operator()<T, kVec>() with the widest vectors that dim and the alignment of all sides allow.
template <class F>
void dispatch_vector(DType dtype, int64_t dim, bool aligned, F&& f) {
  dispatch_dtype(dtype, [&]<class T>() {
    constexpr int kVec = 16 / sizeof(T);
    if (aligned && dim % kVec == 0) f.template operator()<T, kVec>();
    else f.template operator()<T, 1>();
  });
}

}  // namespace

void launch_merge_attention(const MergeAttentionParams& p, cudaStream_t stream) {
  const int64_t bytes = element_bytes(p.dtype);
  const bool aligned = is_aligned(p.a, bytes) && is_aligned(p.b, bytes) && is_aligned(p.merged, bytes);
  dispatch_vector(p.dtype, p.dim, aligned, [&]<class T, int kVec>() {
    const int64_t num_vectors = p.batch * p.num_tokens * p.heads * (p.dim / kVec);
    launch("merge_attention", merge_attention_kernel<T, kVec>, grid_of("merge_attention", num_vectors, kThreads),
           kThreads, 0, stream, p);
  });
}

void launch_merge_attention_backward(const MergeAttentionBackwardParams& p, cudaStream_t stream) {
  const MergeAttentionParams& forward = p.forward;
  bool aligned = true;
  for (const MergeSide* side : {&forward.a, &forward.b, &forward.merged, &p.grad, &p.grad_a, &p.grad_b}) {
    aligned = aligned && is_aligned(*side, element_bytes(forward.dtype));
  }
  dispatch_vector(forward.dtype, forward.dim, aligned, [&]<class T, int kVec>() {
    const int64_t num_rows = forward.batch * forward.num_tokens * forward.heads;
    launch("merge_attention_backward", merge_attention_backward_kernel<T, kVec>,
           grid_of("merge_attention_backward", num_rows, kThreads / kWarp), kThreads, 0, stream, p);
  });
}

}  // namespace fmkernels
