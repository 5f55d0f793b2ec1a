// SPDX-License-Identifier: Apache-2.0
// merge_attention.cu: the CUDA kernels of merge_attention, forward and backward.
//
// Contract   see merge_attention.h. A row is a (batch, token, head); kVec elements are read at a time where every row
//            begins on a 16-byte boundary, else one.
// Work       Forward: a thread owns one vector of a row, so a block covers kThreads consecutive vectors.
//            Backward: a warp owns one row and walks its vectors, because the gradient of lse is a sum over the row.
// Shared     none.
// Numerics   float32; weights at most 1; the sum of a row in a fixed order of lanes. Deterministic.
// Cost       3 * dim elements of memory a row forward, 5 * dim backward: bound by memory on every GPU.

#include "merge_attention.h"

#include "../common/dispatch.h"
#include "../common/launch.h"
#include "../common/vector_cuda.h"

namespace fmkernels {
namespace {

constexpr int kThreads = 256;

// load_vector through the read-only path: backward needs 48 registers and not 54.
template <class T, int kVec>
__device__ __forceinline__ Vector<T, kVec> load_read_only(const T* from) {
  Vector<T, kVec> vector;
  if constexpr (sizeof vector == sizeof(uint4)) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
    memcpy(&vector, &bits, sizeof vector);
  } else {
    vector = *reinterpret_cast<const Vector<T, kVec>*>(from);
  }
  return vector;
}

struct Row {
  int64_t batch, token, head;
};

__device__ __forceinline__ Row row_of(int64_t index, int64_t num_tokens, int64_t heads) {
  const int64_t token = index / heads;
  return {token / num_tokens, token % num_tokens, index % heads};
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

// A side whose lse is -infinity has seen no key: its o may hold anything and is not read. A side whose weight is too
// small for a float is read like any other, so that its NaN reaches what depends on it.
__device__ __forceinline__ bool has_keys(float lse) { return lse != -INFINITY; }

// The weights of both sides, 0 for a side without keys, and the merged lse. NaN on either side makes all of them NaN.
__device__ __forceinline__ Weights merge_weights(float lse_a, float lse_b) {
  if (lse_a == -INFINITY && lse_b == -INFINITY) return {0.0f, 0.0f, -INFINITY};
  const bool a_is_larger = lse_a > lse_b;
  const float larger = a_is_larger ? lse_a : lse_b, smaller = a_is_larger ? lse_b : lse_a;
  const float ratio = expf(smaller - larger), inverse = 1.0f / (1.0f + ratio);
  const float lse = larger + logf(1.0f + ratio);
  return a_is_larger ? Weights{inverse, ratio * inverse, lse} : Weights{ratio * inverse, inverse, lse};
}
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) merge_attention_kernel(MergeAttentionParams p) {
  const int64_t vectors_per_row = p.dim / kVec;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.batch * p.num_tokens * p.heads * vectors_per_row) return;
  const Row r = row_of(index / vectors_per_row, p.num_tokens, p.heads);
  const int64_t column = index % vectors_per_row * kVec;

  const float lse_a = *lse_of(p.a, r), lse_b = *lse_of(p.b, r);
  const Weights weights = merge_weights(lse_a, lse_b);

  float sum[kVec] = {};
  auto add = [&](const MergeSide& side, float lse, float w) {
    if (!has_keys(lse)) return;
    const auto part = load_read_only<T, kVec>(o_row<T>(side, r) + column);
    for (int i = 0; i < kVec; ++i) sum[i] += to_float(part.lane[i]) * w;
  };
  add(p.a, lse_a, weights.a);
  add(p.b, lse_b, weights.b);
  Vector<T, kVec> o;
  for (int i = 0; i < kVec; ++i) o.lane[i] = from_float<T>(sum[i]);
  store_vector<T, kVec>(o_row<T>(p.merged, r) + column, o);
  if (column == 0) *lse_of(p.merged, r) = weights.lse;
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) merge_attention_backward_kernel(MergeAttentionBackwardParams p) {
  using Vec = Vector<T, kVec>;
  const int lane = threadIdx.x % kWarp;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (index >= p.batch * p.num_tokens * p.heads) return;  // whole warps: the shuffles below need all lanes of one
  const Row r = row_of(index, p.num_tokens, p.heads);
  const float lse_a = *lse_of(p.a, r), lse_b = *lse_of(p.b, r);
  const Weights weights = merge_weights(lse_a, lse_b);
  const bool has_a = has_keys(lse_a), has_b = has_keys(lse_b);

  float sum = 0.0f;
  for (int64_t column = lane * kVec; column < p.dim; column += kWarp * kVec) {
    const Vec grad = load_read_only<T, kVec>(o_row<T>(p.grad, r) + column);
    Vec grad_a, grad_b;
    for (int i = 0; i < kVec; ++i) {
      const float g = to_float(grad.lane[i]);
      grad_a.lane[i] = from_float<T>(has_a ? g * weights.a : 0.0f);
      grad_b.lane[i] = from_float<T>(has_b ? g * weights.b : 0.0f);
    }
    store_vector<T, kVec>(o_row<T>(p.grad_a, r) + column, grad_a);
    store_vector<T, kVec>(o_row<T>(p.grad_b, r) + column, grad_b);
    if (has_a && has_b) {
      const Vec a = load_read_only<T, kVec>(o_row<T>(p.a, r) + column);
      const Vec b = load_read_only<T, kVec>(o_row<T>(p.b, r) + column);
      for (int i = 0; i < kVec; ++i) sum += to_float(grad.lane[i]) * (to_float(a.lane[i]) - to_float(b.lane[i]));
    }
  }
  const float dot = warp_sum(sum);
  if (lane == 0) {
    const float grad_lse = p.grad.lse == nullptr ? 0.0f : *lse_of(p.grad, r);
    *lse_of(p.grad_a, r) = has_a ? weights.a * (grad_lse + weights.b * dot) : 0.0f;
    *lse_of(p.grad_b, r) = has_b ? weights.b * (grad_lse - weights.a * dot) : 0.0f;
  }
}

bool is_aligned(const MergeSide& side, int64_t bytes, int64_t dim) {
  return is_aligned_16(side.o, bytes, dim, {side.o_stride[0], side.o_stride[1], side.o_stride[2]});
}

}  // namespace

void launch_merge_attention(const MergeAttentionParams& p, cudaStream_t stream) {
  const int64_t bytes = element_bytes(p.dtype);
  const bool aligned =
      is_aligned(p.a, bytes, p.dim) && is_aligned(p.b, bytes, p.dim) && is_aligned(p.merged, bytes, p.dim);
  dispatch_vector(p.dtype, aligned, [&]<class T, int kVec>() {
    const int64_t num_vectors = p.batch * p.num_tokens * p.heads * (p.dim / kVec);
    launch("merge_attention", merge_attention_kernel<T, kVec>, grid_of("merge_attention", num_vectors, kThreads),
           kThreads, 0, stream, p);
  });
}

void launch_merge_attention_backward(const MergeAttentionBackwardParams& p, cudaStream_t stream) {
  bool aligned = true;
  for (const MergeSide* side : {&p.a, &p.b, &p.grad, &p.grad_a, &p.grad_b}) {
    aligned = aligned && is_aligned(*side, element_bytes(p.dtype), p.dim);
  }
  dispatch_vector(p.dtype, aligned, [&]<class T, int kVec>() {
    const int64_t num_rows = p.batch * p.num_tokens * p.heads;
    launch("merge_attention_backward", merge_attention_backward_kernel<T, kVec>,
           grid_of("merge_attention_backward", num_rows, kThreads / kWarp), kThreads, 0, stream, p);
  });
}

}  // namespace fmkernels
