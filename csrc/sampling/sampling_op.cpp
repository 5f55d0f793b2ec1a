// SPDX-License-Identifier: Apache-2.0
// sampling_tokens: tensors in, checks, Params out.
#include "../common/row_tensors.h"
#include "../common/tensor.h"
#include "sampling.h"

namespace fmkernels {
namespace {

// Null where it is left out.
const float* view_floats(const char* name, const std::optional<Tensor>& t, const Tensor& logits) {
  return t.has_value() ? view_one_a_row<float>(name, *t, logits, ScalarType::Float, "float32") : nullptr;
}

// [batch, vocab] with vocab contiguous.
template <class T>
const T* view_rows(const char* name, const std::optional<Tensor>& t, const Tensor& logits, ScalarType type,
                   const char* type_name, int64_t& stride) {
  if (!t.has_value()) return nullptr;
  check_rank(name, *t, 2);
  check_same_device(name, *t, logits);
  for (int64_t dim = 0; dim < 2; ++dim) check_size(name, *t, dim, logits.size(dim));
  check_scalar_type(name, *t, type, type_name);
  check_last_dim_contiguous(name, *t);
  stride = stride_of(*t, 0);
  return static_cast<const T*>(data_of(*t));
}

#ifndef FM_CUDA
template <class T, class Rule>
void check_values(const char* name, const T* values, int64_t count, Rule rule, const char* sentence) {
  for (int64_t i = 0; values != nullptr && i < count; ++i) {
    FM_CHECK(rule(values[i]), name, " must be ", sentence, ", got ", values[i]);
  }
}
// What a GPU cannot see without waiting for it.
void check_options(const SamplingParams& p) {
  const auto is_share = [](float x) { return x >= 0.0f && x <= 1.0f; };
  const auto is_finite = [](float x) { return x - x == 0.0f; };
  const auto at_least_0 = [=](float x) { return x >= 0.0f && is_finite(x); };
  check_values("temperature", p.temperature, p.batch, at_least_0, "finite and not negative");
  check_values("top_p", p.top_p, p.batch, is_share, "from 0 to 1");
  check_values("min_p", p.min_p, p.batch, is_share, "from 0 to 1");
  check_values("top_k", p.top_k, p.batch, [](int32_t k) { return k >= 0; }, "not negative");
  const auto is_positive = [=](float x) { return x > 0.0f && is_finite(x); };
  check_values("repetition_penalty", p.repetition_penalty, p.batch, is_positive, "finite and positive");
  check_values("frequency_penalty", p.frequency_penalty, p.batch, is_finite, "finite");
  check_values("presence_penalty", p.presence_penalty, p.batch, is_finite, "finite");
}
#endif

std::tuple<Tensor, Tensor> sampling_tokens(const Tensor& logits, const Tensor& seed, const Tensor& offset,
                                           const std::optional<Tensor>& temperature, const std::optional<Tensor>& top_k,
                                           const std::optional<Tensor>& top_p, const std::optional<Tensor>& min_p,
                                           const std::optional<Tensor>& repetition_penalty,
                                           const std::optional<Tensor>& frequency_penalty,
                                           const std::optional<Tensor>& presence_penalty,
                                           const std::optional<Tensor>& output_counts,
                                           const std::optional<Tensor>& prompt_mask, bool return_logprobs) {
  check_rank("logits", logits, 2);
  check_last_dim_contiguous("logits", logits);
  SamplingParams p{};
  p.dtype = dtype_of("logits", logits);
  p.batch = logits.size(0);
  p.vocab = logits.size(1);
  FM_CHECK(p.vocab > 0 && p.vocab <= kMaxWeights, "logits must have a vocabulary from 1 to ", kMaxWeights, ", got ",
           p.vocab);
  p.logits = data_of(logits);
  p.logits_stride = stride_of(logits, 0);
  p.seed = view_one_a_row<int64_t>("seed", seed, logits, ScalarType::Long, "int64");
  p.offset = view_one_a_row<int64_t>("offset", offset, logits, ScalarType::Long, "int64");
  p.temperature = view_floats("temperature", temperature, logits);
  if (top_k.has_value()) p.top_k = view_one_a_row<int32_t>("top_k", *top_k, logits, ScalarType::Int, "int32");
  p.top_p = view_floats("top_p", top_p, logits);
  p.min_p = view_floats("min_p", min_p, logits);
  p.repetition_penalty = view_floats("repetition_penalty", repetition_penalty, logits);
  p.frequency_penalty = view_floats("frequency_penalty", frequency_penalty, logits);
  p.presence_penalty = view_floats("presence_penalty", presence_penalty, logits);
  p.output_counts =
      view_rows<int32_t>("output_counts", output_counts, logits, ScalarType::Int, "int32", p.output_counts_stride);
  p.prompt_mask =
      view_rows<uint8_t>("prompt_mask", prompt_mask, logits, ScalarType::Bool, "bool", p.prompt_mask_stride);
#ifndef FM_CUDA
  check_options(p);
#endif
  Tensor tokens = torch::stable::new_empty(logits, {p.batch}, ScalarType::Long);
  Tensor logprobs = torch::stable::new_empty(logits, {return_logprobs ? p.batch : 0}, ScalarType::Float);
  p.tokens = static_cast<int64_t*>(data_of(tokens));
  p.logprobs = return_logprobs ? static_cast<float*>(data_of(logprobs)) : nullptr;
  if (p.batch > 0) FM_EXECUTE(sampling, p, logits);
  return {tokens, logprobs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) { m.impl("sampling_tokens", TORCH_BOX(&sampling_tokens)); }

}  // namespace fmkernels
