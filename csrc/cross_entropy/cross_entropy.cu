// SPDX-License-Identifier: Apache-2.0
// cross_entropy.cu: the CUDA kernels of cross_entropy: loss, gradient, and both at once.
//
// Contract   see cross_entropy.h. kVec elements are read at a time where every row begins on a 16-byte boundary, else one.
// Work       Loss, and both at once: a block owns a row. Gradient alone: a block owns kGradientChunk of a row.
// Shared     struct Smem: what each warp knows of the row.
// Pipeline   A few vectors in flight a thread | maximum of them, then their sum | shuffles | one barrier | the partial
//            results of the warps, joined by every thread in one order. Both at once then reads the row again, from L2.
// Numerics   float32. Every order is fixed: deterministic, and a row knows nothing of the others.
// Cost       Bound by memory: one row for the loss, two for the gradient, three for both at once.
// After      Milakov and Gimelshein 2018, online normalizer calculation for softmax.

#include "cross_entropy.h"

#include "../common/dispatch.h"
#include "../common/launch.h"
#include "../common/ptx.h"
#include "../common/vector_cuda.h"

namespace fmkernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kGradientChunk = 16384;

// Of some elements of a row: the largest s, the sum of exp(s - max), and the sum of s - anchor.
struct Part {
  float max, sum, above;
};

struct Smem {
  Part warp[kThreads / kWarp];
};

struct Row {
  int64_t batch, token, index;
  int64_t target;  // -1: the row has none
};

__device__ __forceinline__ Row row_of(const CrossEntropyParams& p, int64_t index) {
  Row r{index / p.num_tokens, index % p.num_tokens, index, -1};
  const int64_t target = p.target[r.batch * p.target_stride[0] + r.token * p.target_stride[1]];
  if (target != p.ignore_index && target >= 0 && target < p.vocab) r.target = target;
  return r;
}
template <class T>
__device__ __forceinline__ const T* logits_of(const CrossEntropyParams& p, const Row& r) {
  return static_cast<const T*>(p.logits) + r.batch * p.logits_stride[0] + r.token * p.logits_stride[1];
}
template <class T>
__device__ __forceinline__ T* grad_of(const CrossEntropyParams& p, const Row& r) {
  return static_cast<T*>(p.grad) + r.batch * p.grad_stride[0] + r.token * p.grad_stride[1];
}

__device__ __forceinline__ float capped(const CrossEntropyParams& p, float x) {
  return p.softcap == 0.0f ? x : tanhf(x / p.softcap) * p.softcap;
}

// ---- the sums of a row ----------------------------------------------------------------------------------------------

// What is subtracted in exponents: nothing is left of a maximum of -infinity, and no NaN made of it.
__device__ __forceinline__ float shift_of(float max) { return max == -INFINITY ? 0.0f : max; }

__device__ __forceinline__ Part join(const Part& a, const Part& b) {
  const float max = fmaxf(a.max, b.max), shift = shift_of(max);
  return {max, a.sum * expf(a.max - shift) + b.sum * expf(b.max - shift), a.above + b.above};
}

template <int kCount>
__device__ __forceinline__ float tree_sum(const float* x) {
  if constexpr (kCount == 1) return x[0];
  else return tree_sum<kCount / 2>(x) + tree_sum<kCount - kCount / 2>(x + kCount / 2);
}

template <int kCount>
__device__ __forceinline__ void add(Part& part, const float (&s)[kCount]) {
  float max = part.max;
#pragma unroll
  for (int i = 0; i < kCount; ++i) max = fmaxf(max, s[i]);  // a NaN leaves it alone
  const float shift = shift_of(max);
  if (max > part.max) part.sum *= expf(part.max - shift);
  part.max = max;
  // In pairs: whoever holds the 1 of the maximum rounds whatever is added to it.
  float e[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) e[i] = expf(s[i] - shift);
  part.sum += tree_sum<kCount>(e);
}

// The vectors at v, v + step, ..., all of which are there.
template <class T, int kVec, int kCount>
__device__ __forceinline__ void add_vectors(const CrossEntropyParams& p, Part& part, const T* x, int64_t step,
                                            float anchor) {
  Vector<T, kVec> loaded[kCount];
#pragma unroll
  for (int n = 0; n < kCount; ++n) loaded[n] = load_vector<T, kVec>(x + n * step);
  float s[kCount * kVec];
#pragma unroll
  for (int i = 0; i < kCount * kVec; ++i) s[i] = to_float(loaded[i / kVec].lane[i % kVec]);
  if (p.softcap != 0.0f) {
#pragma unroll
    for (int i = 0; i < kCount * kVec; ++i) s[i] = capped(p, s[i]);
  }
  if (p.label_smoothing != 0.0f) {
#pragma unroll
    for (int i = 0; i < kCount * kVec; ++i) part.above += s[i] - anchor;
  }
  add(part, s);
}

// All threads hold the result; its `above` counts only where labels are smoothed.
template <class T, int kVec>
__device__ __forceinline__ Part part_of_row(const CrossEntropyParams& p, const T* x, float anchor, Smem& smem) {
  constexpr int kLoads = kVec == 8 ? 2 : 4;
  constexpr int64_t kStep = int64_t{kThreads} * kVec;
  Part part{-INFINITY, 0.0f, 0.0f};
  int64_t v = int64_t{threadIdx.x} * kVec;
  for (; v + (kLoads - 1) * kStep < p.vocab; v += kLoads * kStep) {
    add_vectors<T, kVec, kLoads>(p, part, x + v, kStep, anchor);
  }
  for (; v < p.vocab; v += kStep) add_vectors<T, kVec, 1>(p, part, x + v, kStep, anchor);
#pragma unroll
  for (int lane_step = kWarp / 2; lane_step > 0; lane_step /= 2) {
    const Part other{__shfl_xor_sync(ptx::kAllLanes, part.max, lane_step),
                     __shfl_xor_sync(ptx::kAllLanes, part.sum, lane_step),
                     __shfl_xor_sync(ptx::kAllLanes, part.above, lane_step)};
    part = join(part, other);
  }
  if (threadIdx.x % kWarp == 0) smem.warp[threadIdx.x / kWarp] = part;
  __syncthreads();  // every warp has written its part, and has read its elements of x
  part = smem.warp[0];
  for (int warp = 1; warp < kThreads / kWarp; ++warp) part = join(part, smem.warp[warp]);
  return part;
}

struct Stats {
  float max, sum_exp, mean_below;  // mean_below: of s - max
};

// Something near which logits lie, for sums of small differences: the largest of 32. One of them alone may be masked, and
// the distance to finfo.min or -1e9 overflows a sum or takes its digits.
template <class T>
__device__ __forceinline__ float anchor_of(const CrossEntropyParams& p, const T* x) {
  float largest = to_float(x[threadIdx.x % kWarp * p.vocab / kWarp]);
#pragma unroll
  for (int lane_step = kWarp / 2; lane_step > 0; lane_step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(ptx::kAllLanes, largest, lane_step));
  }
  return bounded_anchor(capped(p, largest));
}

template <class T, int kVec>
__device__ __forceinline__ Stats stats_of_row(const CrossEntropyParams& p, const T* x, Smem& smem) {
  const float anchor = p.label_smoothing == 0.0f ? 0.0f : anchor_of(p, x);
  const Part part = part_of_row<T, kVec>(p, x, anchor, smem);
  return {part.max, part.sum, part.above / static_cast<float>(p.vocab) + (anchor - part.max)};
}

__device__ __forceinline__ float loss_of(const CrossEntropyParams& p, const Stats& stats, float x_target) {
  const float log_sum = logf(stats.sum_exp), lse = stats.max + log_sum;
  float loss = log_sum - (1.0f - p.label_smoothing) * (capped(p, x_target) - stats.max);
  if (p.label_smoothing != 0.0f) loss -= p.label_smoothing * stats.mean_below;
  return p.z_loss == 0.0f ? loss : loss + p.z_loss * lse * lse;
}

// ---- the gradient ---------------------------------------------------------------------------------------------------

// Of the elements from `begin` to `end` of the row r; grad may be x.
template <class T, int kVec>
__device__ __forceinline__ void write_gradient(const CrossEntropyParams& p, const Row& r, const T* x, T* grad,
                                               float max, float sum_exp, int64_t begin, int64_t end) {
  const float grad_loss = p.grad_loss[r.batch * p.grad_loss_stride[0] + r.token * p.grad_loss_stride[1]];
  const float of_softmax = grad_loss * (1.0f + 2.0f * p.z_loss * (max + logf(sum_exp))) / sum_exp;
  const float of_mean = grad_loss * p.label_smoothing / static_cast<float>(p.vocab);
  const float of_target = grad_loss * (1.0f - p.label_smoothing);
  for (int64_t v = begin + threadIdx.x * kVec; v < end; v += kThreads * kVec) {
    Vector<T, kVec> loaded = load_vector<T, kVec>(x + v);
    const bool has_target = r.target >= v && r.target < v + kVec;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float x_i = to_float(loaded.lane[i]), t = p.softcap == 0.0f ? 0.0f : tanhf(x_i / p.softcap);
      const float s = p.softcap == 0.0f ? x_i : t * p.softcap;
      float g = expf(s - max) * of_softmax - of_mean;
      if (has_target) g -= v + i == r.target ? of_target : 0.0f;
      loaded.lane[i] = from_float<T>(g * (1.0f - t * t));
    }
    store_vector<T, kVec>(grad + v, loaded);
  }
}
template <class T, int kVec>
__device__ __forceinline__ void write_zeros(T* grad, int64_t begin, int64_t end) {
  for (int64_t v = begin + threadIdx.x * kVec; v < end; v += kThreads * kVec) {
    store_vector<T, kVec>(grad + v, Vector<T, kVec>{});
  }
}

// ---- kernels --------------------------------------------------------------------------------------------------------

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(CrossEntropyParams p) {
  const Row r = row_of(p, blockIdx.x);
  Stats stats{};
  float loss = 0.0f;
  if (r.target >= 0) {  // the same for all threads of the block
    const T* x = logits_of<T>(p, r);
    stats = stats_of_row<T, kVec>(p, x, dynamic_smem<Smem>());
    loss = loss_of(p, stats, to_float(x[r.target]));
  }
  if (threadIdx.x == 0) {
    p.loss[r.index] = loss;
    p.max[r.index] = stats.max;
    p.sum_exp[r.index] = stats.sum_exp;
  }
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) cross_entropy_backward_kernel(CrossEntropyParams p) {
  const Row r = row_of(p, blockIdx.x);
  const int64_t begin = blockIdx.y * kGradientChunk, end = min(begin + kGradientChunk, p.vocab);
  T* grad = grad_of<T>(p, r);
  if (r.target < 0) write_zeros<T, kVec>(grad, begin, end);
  else write_gradient<T, kVec>(p, r, logits_of<T>(p, r), grad, p.max[r.index], p.sum_exp[r.index], begin, end);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) cross_entropy_gradient_kernel(CrossEntropyParams p) {
  const Row r = row_of(p, blockIdx.x);
  T* grad = grad_of<T>(p, r);
  float loss = 0.0f;
  if (r.target < 0) {
    write_zeros<T, kVec>(grad, 0, p.vocab);
  } else {
    const T* x = logits_of<T>(p, r);
    const float x_target = to_float(x[r.target]);  // before the barrier of stats_of_row: it is overwritten after it
    const Stats stats = stats_of_row<T, kVec>(p, x, dynamic_smem<Smem>());
    loss = loss_of(p, stats, x_target);
    write_gradient<T, kVec>(p, r, x, grad, stats.max, stats.sum_exp, 0, p.vocab);
  }
  if (threadIdx.x == 0) p.loss[r.index] = loss;
}

dim3 grid_of_rows(const char* name, const CrossEntropyParams& p) { return grid_of(name, p.batch * p.num_tokens, 1); }

bool are_aligned(const CrossEntropyParams& p) {
  const int64_t bytes = element_bytes(p.dtype);
  return is_aligned_16(p.logits, bytes, p.vocab, {p.logits_stride[0], p.logits_stride[1]}) &&
         is_aligned_16(p.grad, bytes, p.vocab, {p.grad_stride[0], p.grad_stride[1]});
}

}  // namespace

void launch_cross_entropy(const CrossEntropyParams& p, cudaStream_t stream) {
  dispatch_vector(p.dtype, are_aligned(p), [&]<class T, int kVec>() {
    launch("cross_entropy", cross_entropy_kernel<T, kVec>, grid_of_rows("cross_entropy", p), kThreads, sizeof(Smem),
           stream, p);
  });
}

void launch_cross_entropy_backward(const CrossEntropyParams& p, cudaStream_t stream) {
  const int64_t chunks = (p.vocab + kGradientChunk - 1) / kGradientChunk;
  FM_CHECK(chunks <= 0xffff, "cross_entropy: a vocabulary of ", p.vocab, " is more than a grid holds");
  dim3 grid = grid_of_rows("cross_entropy_backward", p);
  grid.y = static_cast<unsigned>(chunks);
  dispatch_vector(p.dtype, are_aligned(p), [&]<class T, int kVec>() {
    launch("cross_entropy_backward", cross_entropy_backward_kernel<T, kVec>, grid, kThreads, 0, stream, p);
  });
}

void launch_cross_entropy_gradient(const CrossEntropyParams& p, cudaStream_t stream) {
  dispatch_vector(p.dtype, are_aligned(p), [&]<class T, int kVec>() {
    launch("cross_entropy_gradient", cross_entropy_gradient_kernel<T, kVec>, grid_of_rows("cross_entropy_gradient", p),
           kThreads, sizeof(Smem), stream, p);
  });
}

}  // namespace fmkernels
