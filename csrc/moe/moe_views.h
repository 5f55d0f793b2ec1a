// SPDX-License-Identifier: Apache-2.0
// Tensors of a mixture of experts as the kernels read them. Included by op files only.
#pragma once

#include "../common/tensor.h"
#include "moe_route.h"

namespace fmkernels {

constexpr int64_t kMaxAlignment = 65536;
constexpr int64_t kMaxRows = int64_t{1} << 31;

// Checks topk_idx [tokens, topk] but for its values.
inline void view_ids(const Tensor& topk_idx, bool& is_long) {
  check_rank("topk_idx", topk_idx, 2);
  check_last_dim_contiguous("topk_idx", topk_idx);
  is_long = topk_idx.scalar_type() == ScalarType::Long;
  FM_CHECK(is_long || topk_idx.scalar_type() == ScalarType::Int, "topk_idx must be int32 or int64");
  FM_CHECK(topk_idx.numel() < kMaxRows, "topk_idx must have fewer than 2^31 elements, got ", topk_idx.numel());
}

// [rows, hidden], of the device and dtype of `like`, last dimension contiguous.
inline MoeRows view_matrix(const char* name, const Tensor& t, const Tensor& like) {
  check_rank(name, t, 2);
  check_last_dim_contiguous(name, t);
  check_same_device(name, t, like);
  FM_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of the first argument");
  FM_CHECK(t.size(0) < kMaxRows, name, " must have fewer than 2^31 rows, got ", t.size(0));
  return {data_of(t), stride_of(t, 0)};
}

// Contiguous int32, each from -1 to count - 1. On CUDA the kernels take what is out of range for -1.
inline const int32_t* view_positions(const char* name, const Tensor& t, const Tensor& like, int64_t count) {
  check_scalar_type(name, t, ScalarType::Int, "int32");
  check_same_device(name, t, like);
  int64_t expected = 1;
  for (int64_t dim = t.dim() - 1; dim >= 0; --dim) {
    FM_CHECK(t.numel() == 0 || t.size(dim) == 1 || t.stride(dim) == expected, name, " must be contiguous");
    expected *= t.size(dim);
  }
  const int32_t* positions = static_cast<const int32_t*>(data_of(t));
#ifndef FM_CUDA
  int32_t lowest = -1, highest = -1;
  const int64_t num_elements = t.numel();  // a call to torch, which a loop would repeat
  for (int64_t i = 0; i < num_elements; ++i) {
    lowest = positions[i] < lowest ? positions[i] : lowest;
    highest = positions[i] > highest ? positions[i] : highest;
  }
  FM_CHECK(lowest >= -1 && highest < count, name, " must be from -1 to ", count - 1, ", got ",
           lowest < -1 ? lowest : highest);
#else
  (void)count;
#endif
  return positions;
}

// The weights [tokens, topk] of the slots.
inline const float* view_weights(const Tensor& weights, const Tensor& token_topk_to_pos, const Tensor& like) {
  check_rank("topk_weights", weights, 2);
  check_scalar_type("topk_weights", weights, ScalarType::Float, "float32");
  check_same_device("topk_weights", weights, like);
  check_last_dim_contiguous("topk_weights", weights);
  for (int64_t dim = 0; dim < 2; ++dim) check_size("topk_weights", weights, dim, token_topk_to_pos.size(dim));
  return static_cast<const float*>(data_of(weights));
}

inline MoeScoring scoring_of(int64_t scoring) {
  FM_CHECK(scoring >= 0 && scoring <= 2, "scoring must be 0 (softmax), 1 (sigmoid) or 2 (sqrt_softplus), got ",
           scoring);
  return static_cast<MoeScoring>(scoring);
}

// [tokens, experts], last dimension contiguous.
inline MoeLogits view_logits(const Tensor& logits) {
  check_rank("logits", logits, 2);
  check_last_dim_contiguous("logits", logits);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  FM_CHECK(num_experts >= 1 && num_experts <= kMaxExperts, "logits must have from 1 to ", kMaxExperts, " experts, got ",
           num_experts);
  FM_CHECK(num_tokens < kMaxRows, "logits must have fewer than 2^31 tokens, got ", num_tokens);
  return {dtype_of("logits", logits), data_of(logits), stride_of(logits, 0), num_tokens, static_cast<int>(num_experts)};
}

}  // namespace fmkernels
