// SPDX-License-Identifier: Apache-2.0
// The logits of a token as its warp reads them: any dtype, lane l the experts l, l + 32, ...
#pragma once

#include "../common/ptx.h"
#include "../common/vector_cuda.h"
#include "moe_score.h"

namespace fmkernels {

// Every lane holds the result; NaN is passed over.
__device__ __forceinline__ float warp_max(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ptx::kAllLanes, x, step));
  return x;
}

__device__ __forceinline__ void store_logit(DType dtype, void* data, int64_t at, float x) {
  switch (dtype) {
    case DType::kFloat32: static_cast<float*>(data)[at] = x; return;
    case DType::kFloat16: static_cast<Half*>(data)[at] = from_float<Half>(x); return;
    case DType::kBFloat16: static_cast<BFloat16*>(data)[at] = from_float<BFloat16>(x); return;
  }
}

// The largest logarithm of a token's scores, and the inverse of the sum of their exponentials below it: NaN where one of
// them is, 0 where all are -inf.
struct LogSum {
  float max, inverse_sum;

  __device__ __forceinline__ float share(float log) const { return expf(log - max) * inverse_sum; }
};

class LogitRow {
 public:
  __device__ __forceinline__ LogitRow(const MoeLogits& logits, int64_t token)
      : logits_(logits), begin_(token * logits.stride) {}

  __device__ __forceinline__ float raw(int expert) const {
    const int64_t at = begin_ + expert;
    switch (logits_.dtype) {
      case DType::kFloat32: return static_cast<const float*>(logits_.data)[at];
      case DType::kFloat16: return to_float(static_cast<const Half*>(logits_.data)[at]);
      case DType::kBFloat16: return to_float(static_cast<const BFloat16*>(logits_.data)[at]);
    }
    return 0.0f;
  }
  // +inf as the largest float.
  __device__ __forceinline__ float clamped(int expert) const {
    const float x = raw(expert);
    return x > kLargestFloat ? kLargestFloat : x;
  }
  __device__ __forceinline__ float log_score_at(MoeScoring scoring, int expert) const {
    const float x = clamped(expert);
    return x == -INFINITY ? x : log_score(scoring, x);
  }

  // By the warp, in every lane.
  __device__ __forceinline__ LogSum log_sum(MoeScoring scoring) const {
    const int lane = threadIdx.x % kWarp;
    float max = -INFINITY, sum = 0.0f;
    for (int e = lane; e < logits_.num_experts; e += kWarp) max = fmaxf(max, log_score_at(scoring, e));
    max = warp_max(max);
    if (max == -INFINITY) max = 0.0f;
    for (int e = lane; e < logits_.num_experts; e += kWarp) sum += expf(log_score_at(scoring, e) - max);
    sum = warp_sum(sum);
    return {max, sum == 0.0f ? 0.0f : 1.0f / sum};
  }

 private:
  const MoeLogits& logits_;
  int64_t begin_;
};

}  // namespace fmkernels
