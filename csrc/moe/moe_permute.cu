// SPDX-License-Identifier: Apache-2.0
// moe_permute.cu: tokens to the rows of their experts, and back.
//
// Contract   see moe.h. kVec elements are read at a time where every row begins on a 16-byte boundary, else one. Entries
//            of a mapping that lie outside the tensors are taken for -1.
// Work       permute, combine: a warp owns kPer * 32 vectors of a row, of the result in both: nothing is scattered.
//            combine_backward: a warp owns a row of y whole, because the gradient of its weight is a sum over it.
// Numerics   float32; the order of k and that of the lanes are fixed, so a token's bits depend on its own rows alone.
// Cost       bound by memory: permute 2, combine (topk + 1) / topk, combine_backward 3 rows of traffic a slot.

#include "moe.h"

#include "../common/dispatch.h"
#include "../common/launch.h"
#include "../common/vector_cuda.h"
#include "moe_slots_cuda.h"

namespace fmkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPermutePer = 4;  // vectors of a lane
constexpr int kCombinePer = 2;  // each with a float32 sum

template <class T>
__device__ __forceinline__ T* row_at(const MoeRows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}
__device__ __forceinline__ int64_t own_row() { return int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; }

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) moe_permute_kernel(MoePermuteParams p) {
  const int64_t row = own_row(), num_vectors = p.hidden / kVec;
  if (row >= p.num_rows) return;
  const int token = p.pos_to_token[row];
  const bool has_token = is_within(token, p.num_tokens);
  const T* x = row_at<T>(p.x, has_token ? token : 0);
  T* y = row_at<T>(p.y, row);
  const int64_t step = int64_t{gridDim.y} * kPermutePer * kWarp;
  for (int64_t first = int64_t{blockIdx.y} * kPermutePer * kWarp + threadIdx.x % kWarp; first < num_vectors;
       first += step) {
    Vector<T, kVec> vectors[kPermutePer];
#pragma unroll
    for (int i = 0; i < kPermutePer; ++i) {
      vectors[i] = {};
      const int64_t v = first + i * kWarp;
      if (has_token && v < num_vectors) vectors[i] = load_vector<T, kVec>(x + v * kVec);
    }
#pragma unroll
    for (int i = 0; i < kPermutePer; ++i) {
      const int64_t v = first + i * kWarp;
      if (v < num_vectors) store_vector<T, kVec>(y + v * kVec, vectors[i]);
    }
  }
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) moe_combine_kernel(MoeCombineParams p) {
  const int64_t token = own_row(), num_vectors = p.hidden / kVec;
  if (token >= p.num_tokens) return;
  const int num_topk = static_cast<int>(p.num_topk);
  const int32_t* positions = p.token_topk_to_pos + token * p.num_topk;
  const float* weights = p.weights + token * p.weights_stride;
  T* out = row_at<T>(p.out, token);
  const int64_t step = int64_t{gridDim.y} * kCombinePer * kWarp;
  for (int64_t first = int64_t{blockIdx.y} * kCombinePer * kWarp + threadIdx.x % kWarp; first < num_vectors;
       first += step) {
    float sum[kCombinePer][kVec] = {};
#pragma unroll 2
    for (int k = 0; k < num_topk; ++k) {
      const int pos = positions[k];
      if (!is_within(pos, p.num_rows)) continue;
      const float weight = p.weights == nullptr ? 1.0f : weights[k];
      const T* y = row_at<T>(p.y, pos);
#pragma unroll
      for (int i = 0; i < kCombinePer; ++i) {
        const int64_t v = first + i * kWarp;
        if (v >= num_vectors) continue;
        const auto part = load_vector<T, kVec>(y + v * kVec);
        for (int c = 0; c < kVec; ++c) sum[i][c] += weight * to_float(part.lane[c]);
      }
    }
#pragma unroll
    for (int i = 0; i < kCombinePer; ++i) {
      const int64_t v = first + i * kWarp;
      if (v >= num_vectors) continue;
      Vector<T, kVec> rounded;
      for (int c = 0; c < kVec; ++c) rounded.lane[c] = from_float<T>(sum[i][c]);
      store_vector<T, kVec>(out + v * kVec, rounded);
    }
  }
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) moe_combine_backward_kernel(MoeCombineBackwardParams p) {
  const int64_t row = own_row(), num_vectors = p.hidden / kVec;
  if (row >= p.num_rows) return;  // whole warps: the votes and sums below need all lanes of one
  const int lane = threadIdx.x % kWarp, token = p.pos_to_token[row];
  int k = -1;
  if (is_within(token, p.num_tokens)) {
    k = choice_of(p.token_topk_to_pos + token * p.num_topk, static_cast<int>(p.num_topk), static_cast<int>(row));
  }
  T* grad_y = row_at<T>(p.grad_y, row);
  if (k < 0) {
    for (int64_t v = lane; v < num_vectors; v += kWarp) store_vector<T, kVec>(grad_y + v * kVec, {});
    return;
  }
  const float weight = p.weights[token * p.weights_stride + k];
  const T *grad = row_at<T>(p.grad, token), *y = row_at<T>(p.y, row);
  float sum = 0.0f;
#pragma unroll 2
  for (int64_t v = lane; v < num_vectors; v += kWarp) {
    const auto g = load_vector<T, kVec>(grad + v * kVec), value = load_vector<T, kVec>(y + v * kVec);
    Vector<T, kVec> scaled;
    for (int c = 0; c < kVec; ++c) {
      scaled.lane[c] = from_float<T>(weight * to_float(g.lane[c]));
      sum += to_float(g.lane[c]) * to_float(value.lane[c]);
    }
    store_vector<T, kVec>(grad_y + v * kVec, scaled);
  }
  sum = warp_sum(sum);
  if (lane == 0) p.grad_weights[token * p.num_topk + k] = sum;
}

bool is_aligned(const MoeRows& rows, DType dtype, int64_t hidden) {
  return is_aligned_16(rows.data, element_bytes(dtype), hidden, {rows.stride});
}

// Blocks of kWarps rows, and as many beside each other as have `vectors` for each lane.
dim3 grid_of_rows(const char* name, int64_t num_rows, int64_t num_vectors, int64_t vectors) {
  dim3 grid = grid_of(name, num_rows, kWarps);
  const int64_t parts = (num_vectors + vectors * kWarp - 1) / (vectors * kWarp);
  grid.y = static_cast<unsigned>(parts < 65535 ? parts : 65535);
  return grid;
}

}  // namespace

void launch_moe_permute(const MoePermuteParams& p, cudaStream_t stream) {
  const char* name = "moe.permute";
  const bool aligned = is_aligned(p.x, p.dtype, p.hidden) && is_aligned(p.y, p.dtype, p.hidden);
  dispatch_vector(p.dtype, aligned, [&]<class T, int kVec>() {
    launch(name, moe_permute_kernel<T, kVec>, grid_of_rows(name, p.num_rows, p.hidden / kVec, kPermutePer), kThreads, 0,
           stream, p);
  });
}

void launch_moe_combine(const MoeCombineParams& p, cudaStream_t stream) {
  const char* name = "moe.combine";
  const bool aligned = is_aligned(p.y, p.dtype, p.hidden) && is_aligned(p.out, p.dtype, p.hidden);
  dispatch_vector(p.dtype, aligned, [&]<class T, int kVec>() {
    launch(name, moe_combine_kernel<T, kVec>, grid_of_rows(name, p.num_tokens, p.hidden / kVec, kCombinePer), kThreads,
           0, stream, p);
  });
}

void launch_moe_combine_backward(const MoeCombineBackwardParams& p, cudaStream_t stream) {
  const char* name = "moe.combine";
  const bool aligned = is_aligned(p.grad, p.dtype, p.hidden) && is_aligned(p.y, p.dtype, p.hidden) &&
                       is_aligned(p.grad_y, p.dtype, p.hidden);
  dispatch_vector(p.dtype, aligned, [&]<class T, int kVec>() {
    launch(name, moe_combine_backward_kernel<T, kVec>, grid_of(name, p.num_rows, kWarps), kThreads, 0, stream, p);
  });
}

}  // namespace fmkernels
