// SPDX-License-Identifier: Apache-2.0
// The scores of moe_score.h a vector register at a time, and rows of logits as floats. Internal linkage, as in vec.h.
#pragma once

#include "../common/integers_cpu.h"
#include "../common/vec.h"
#include "moe_score.h"

namespace fmkernels {
namespace {

constexpr float kInfinity = __builtin_inff();

// log(1 + e) for e from 0 to 1: 2 atanh(z), z = e / (2 + e) to 1/3, as a series.
FM_INLINE VecF log1p_of_unit(VecF e) {
  const VecF z = e / (e + 2.0f), u = z * z;
  VecF p = u * (1.0f / 15.0f) + 1.0f / 13.0f;
  p = p * u + 1.0f / 11.0f;
  p = p * u + 1.0f / 9.0f;
  p = p * u + 1.0f / 7.0f;
  p = p * u + 1.0f / 5.0f;
  p = p * u + 1.0f / 3.0f;
  return (z + z) * (p * u + 1.0f);
}
FM_INLINE VecF exp_of_minus_magnitude(VecF x) { return exp_nonpositive(absolute(x) * -1.0f); }

// log(x) for normal x: the exponent, and of the mantissa m from sqrt(1/2) to sqrt(2) 2 atanh(z), z = (m - 1) / (m + 1).
FM_INLINE VecF log_of_normal(VecF x) {
  const VecI bits = (VecI)x, exponent = (bits - 0x3f3504f3) >> 23;
  const VecF n = __builtin_convertvector(exponent, VecF), m = (VecF)(bits - (exponent << 23));
  const VecF z = (m - 1.0f) / (m + 1.0f), u = z * z;
  VecF p = u * (1.0f / 9.0f) + 1.0f / 7.0f;
  p = p * u + 1.0f / 5.0f;
  p = p * u + 1.0f / 3.0f;
  return n * 0.693359375f + (n * -2.121944401e-04f + (z + z) * (p * u + 1.0f));
}
FM_INLINE VecF softplus(VecF x) { return max(x, broadcast(0.0f)) + log1p_of_unit(exp_of_minus_magnitude(x)); }

// Not for softmax.
FM_INLINE VecF score_of(MoeScoring scoring, VecF x) {
  if (scoring == MoeScoring::kSigmoid) {
    const VecF e = exp_of_minus_magnitude(x);
    return (x < 0.0f ? e : broadcast(1.0f)) / (1.0f + e);
  }
  const VecF squared = softplus(x), small = exp_nonpositive(min(x, broadcast(0.0f)) * 0.5f);
#ifdef __AVX2__
  const VecF root = _mm256_sqrt_ps(squared);
#else
  VecF root{};
  for (int i = 0; i < kLanes; ++i) root[i] = __builtin_sqrtf(squared[i]);
#endif
  return x < kSmall ? small : root;
}
FM_INLINE VecF log_score(MoeScoring scoring, VecF x) {
  if (scoring == MoeScoring::kSoftmax) return x;
  if (scoring == MoeScoring::kSigmoid) return min(x, broadcast(0.0f)) - log1p_of_unit(exp_of_minus_magnitude(x));
  return 0.5f * (x < kSmall ? x : log_of_normal(softplus(max(x, broadcast(kSmall)))));
}

FM_INLINE VecF log_score_slope(MoeScoring scoring, VecF x) {
  if (scoring == MoeScoring::kSoftmax) return broadcast(1.0f);
  if (scoring == MoeScoring::kSigmoid) return score_of(MoeScoring::kSigmoid, x * -1.0f);
  const VecF within = max(x, broadcast(kSmall));
  return 0.5f * (x < kSmall ? broadcast(1.0f) : score_of(MoeScoring::kSigmoid, within) / softplus(within));
}

FM_INLINE float horizontal_max(VecF x) {
  if constexpr (kLanes == 8) x = max(x, swap_lanes<kLanes / 2>(x));
  x = max(x, swap_lanes<2>(x));
  return max(x, swap_lanes<1>(x))[0];
}
FM_INLINE bool any(VecI mask) {
#ifdef __AVX2__
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

// to[e] = min(logit, the largest float), -inf behind the experts, for `padded` entries, a multiple of kLanes. Whether a
// logit is NaN.
template <class T>
bool load_logits(const MoeLogits& logits, int64_t token, int64_t padded, float* to) {
  const T* row = static_cast<const T*>(logits.data) + token * logits.stride;
  VecI nan{};
  int64_t e = 0;
  for (; e + kLanes <= logits.num_experts; e += kLanes) {
    const VecF x = load(row + e);
    nan |= x != x;
    store(to + e, min(x, broadcast(kLargestFloat)));
  }
  for (; e < padded; e += kLanes) {
    const VecF x = load_partial(row + e, static_cast<int>(max(logits.num_experts - e, 0)), -kInfinity);
    nan |= x != x;
    store(to + e, min(x, broadcast(kLargestFloat)));
  }
  return any(nan);
}

// The largest of a row, and the inverse of the sum of the exponentials below it; both 0 where all are -inf.
struct RowSum {
  float max, inverse;
};
inline RowSum sum_exponentials(const float* x, int64_t padded) {
  VecF largest = load(x), sum{};
  for (int64_t e = kLanes; e < padded; e += kLanes) largest = max(largest, load(x + e));
  const float max = horizontal_max(largest);
  if (max == -kInfinity) return {0.0f, 0.0f};
  for (int64_t e = 0; e < padded; e += kLanes) sum += exp_nonpositive(load(x + e) - max);
  return {max, 1.0f / horizontal_sum(sum)};
}

}  // namespace
}  // namespace fmkernels
