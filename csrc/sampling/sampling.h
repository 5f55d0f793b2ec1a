// SPDX-License-Identifier: Apache-2.0
// Token ids drawn from logits [batch, vocab], each row with options and a seed of its own.
//
//   x     = logits; a token in the prompt or the output: x > 0 ? x / repetition : x * repetition
//           x - frequency * (its count in the output) - presence * [it is in the output]
//   w     = exp((x - max x) / temperature), as an integer (common/fixed_weight.h)
//   S1    = tokens with w >= min_p * (the largest w)
//   S2    = the first top_k of S1, by falling x, equal x by rising id
//   S3    = the shortest beginning of S2, in that order, whose weights are at least top_p of those of S2
//   token = the first of S3, by rising id, at which the sum of weights exceeds a number drawn below their total
//
// Temperature 0: the largest x, of equal ones the lowest id. A row with a NaN, or with nothing above -infinity: -1.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/fixed_weight.h"
#include "../common/isa.h"
#include "../common/stream.h"

namespace fmkernels {

struct SamplingParams {
  DType dtype;
  int64_t batch, vocab;
  const void* logits;
  int64_t logits_stride;  // of batch
  const int64_t *seed, *offset;
  // [batch] each, or null where the option is off for all rows.
  const float *temperature, *top_p, *min_p;
  const int32_t* top_k;
  const float *repetition_penalty, *frequency_penalty, *presence_penalty;
  const int32_t* output_counts;  // [batch, vocab], or null: no token is in the output
  int64_t output_counts_stride;
  const uint8_t* prompt_mask;  // [batch, vocab] of 0 and 1, or null: no token is in the prompt
  int64_t prompt_mask_stride;
  int64_t* tokens;
  float* logprobs;  // of the tokens under softmax(logits), or null
};

constexpr uint32_t kSamplingStream = 1;  // of random_bits
constexpr float kLargestFloat = 3.4028234663852886e38f;

// What a kernel does with options that only the device sees: they are clamped to their range, and off where NaN; penalties
// are off where they are not finite, a repetition where it is not positive.
struct SamplingRow {
  float temperature, top_p;
  int64_t top_k;        // vocab: off
  uint64_t min_weight;  // of min_p
  float repetition, frequency, presence;
  bool has_penalties;
  const int32_t* output_counts;
  const uint8_t* prompt_mask;
};

FM_HOST_DEVICE SamplingRow sampling_row(const SamplingParams& p, int64_t row) {
  SamplingRow r{};
  const auto option = [row](const float* values, float off) { return values == nullptr ? off : values[row]; };
  const auto is_finite = [](float x) { return x - x == 0.0f; };
  r.temperature = option(p.temperature, 1.0f);
  if (r.temperature != r.temperature) r.temperature = 1.0f;
  if (r.temperature < 0.0f) r.temperature = 0.0f;
  if (r.temperature > kLargestFloat) r.temperature = kLargestFloat;
  r.top_p = option(p.top_p, 1.0f);
  if (!(r.top_p < 1.0f)) r.top_p = 1.0f;
  if (r.top_p < 0.0f) r.top_p = 0.0f;
  const int32_t top_k = p.top_k == nullptr ? 0 : p.top_k[row];
  r.top_k = top_k > 0 && top_k < p.vocab ? top_k : p.vocab;
  const float min_p = option(p.min_p, 0.0f);
  r.min_weight = min_p > 0.0f ? share_of(min_p < 1.0f ? min_p : 1.0f, kWeightOne) : 0;
  r.repetition = option(p.repetition_penalty, 1.0f);
  if (!(r.repetition > 0.0f && is_finite(r.repetition))) r.repetition = 1.0f;
  r.frequency = option(p.frequency_penalty, 0.0f);
  if (!is_finite(r.frequency)) r.frequency = 0.0f;
  r.presence = option(p.presence_penalty, 0.0f);
  if (!is_finite(r.presence)) r.presence = 0.0f;
  r.output_counts = p.output_counts == nullptr ? nullptr : p.output_counts + row * p.output_counts_stride;
  r.prompt_mask = p.prompt_mask == nullptr ? nullptr : p.prompt_mask + row * p.prompt_mask_stride;
  r.has_penalties = (r.output_counts != nullptr || r.prompt_mask != nullptr) &&
                    (r.repetition != 1.0f || r.frequency != 0.0f || r.presence != 0.0f);
  return r;
}

// x of the token v; -0 is 0, so that equal numbers have equal bits.
FM_HOST_DEVICE float adjusted_logit(const SamplingRow& r, float x, int64_t v) {
  if (r.has_penalties) {
    const int32_t count = r.output_counts == nullptr ? 0 : r.output_counts[v];
    const bool is_old = count > 0 || (r.prompt_mask != nullptr && r.prompt_mask[v] != 0);
    if (is_old) x = x > 0.0f ? x / r.repetition : x * r.repetition;
    if (count > 0) x = fused(-r.frequency, static_cast<float>(count), x) - r.presence;
  }
  return x + 0.0f;
}

FM_HOST_DEVICE uint64_t sampling_weight(float x, float max, float temperature) {
  return weight_of(exp_bits(x == max ? 0.0f : (x - max) / temperature));  // infinity - infinity is not taken
}

template <Isa isa>
void run_sampling(const SamplingParams& p);
void launch_sampling(const SamplingParams& p, cudaStream_t stream);

}  // namespace fmkernels
