// SPDX-License-Identifier: Apache-2.0
// The scores of one logit, their logarithms and slopes, on device and host. Of softmax, which is over many, the exponential.
#pragma once

#include <cmath>

#include "moe_route.h"

namespace fmkernels {

constexpr float kLargestFloat = 3.402823466e38f;

FM_HOST_DEVICE float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }
FM_HOST_DEVICE float sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

constexpr float kSmall = -20.0f;  // below, softplus(x) is exp(x) to the last bit

// Not for softmax.
FM_HOST_DEVICE float score_of(MoeScoring scoring, float x) {
  if (scoring == MoeScoring::kSigmoid) return sigmoid(x);
  return x < kSmall ? expf(0.5f * x) : sqrtf(softplus(x));
}
FM_HOST_DEVICE float score_slope(MoeScoring scoring, float x) {
  if (scoring == MoeScoring::kSigmoid) return sigmoid(x) * sigmoid(-x);
  return x < kSmall ? 0.5f * expf(0.5f * x) : 0.5f * sigmoid(x) / sqrtf(softplus(x));
}

// log s, of softmax but for a number that all experts share.
FM_HOST_DEVICE float log_score(MoeScoring scoring, float x) {
  if (scoring == MoeScoring::kSoftmax) return x;
  if (scoring == MoeScoring::kSigmoid) return fminf(x, 0.0f) - log1pf(expf(-fabsf(x)));
  return x < kSmall ? 0.5f * x : 0.5f * logf(softplus(x));
}
FM_HOST_DEVICE float log_score_slope(MoeScoring scoring, float x) {
  if (scoring == MoeScoring::kSoftmax) return 1.0f;
  if (scoring == MoeScoring::kSigmoid) return sigmoid(-x);
  return x < kSmall ? 0.5f : 0.5f * sigmoid(x) / softplus(x);
}

// Rises with x, which is not NaN; -0 and 0 have one key. 0, below all others, is -inf: not to be had.
FM_HOST_DEVICE uint32_t key_of(float x) {
  const uint32_t bits = float_bits(x + 0.0f);
  const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return bits == 0xff800000u ? 0u : key;
}
// Of a weight: NaN comes last of all, and everything can be had.
FM_HOST_DEVICE uint32_t capacity_key(float weight) {
  const uint32_t key = weight == weight ? key_of(weight) : 0u;
  return key == 0u ? 1u : key;
}
FM_HOST_DEVICE float value_of(uint32_t key) {
  return key == 0u ? float_from_bits(0xff800000u) : float_from_bits(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

}  // namespace fmkernels
