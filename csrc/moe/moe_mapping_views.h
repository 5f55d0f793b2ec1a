// SPDX-License-Identifier: Apache-2.0
// A mapping and its memory, of checked ids. Included by op files only.
#pragma once

#include "moe.h"
#include "moe_views.h"

namespace fmkernels {

#ifndef FM_CUDA  // on CUDA the kernels skip what is out of range
// Ids from -1 to num_experts - 1; and, where the rows are fewer than the slots could need, enough of them.
template <class Id>
void check_ids(const MoeMappingParams& p, bool rows_suffice) {
  const int64_t num_topk = p.num_topk.value(), num_tokens = p.num_slots / num_topk;
  // Rows that lie one behind the other are one: a loop without an end of its own every few ids is one over vectors.
  const bool flat = p.idx_stride == num_topk;
  const int64_t num_rows = flat ? 1 : num_tokens, row_ids = flat ? p.num_slots : num_topk;
  Id lowest = -1, highest = -1;
  for (int64_t row = 0; row < num_rows; ++row) {
    const Id* ids = static_cast<const Id*>(p.topk_idx) + row * p.idx_stride;
    for (int64_t i = 0; i < row_ids; ++i) {
      lowest = ids[i] < lowest ? ids[i] : lowest;
      highest = ids[i] > highest ? ids[i] : highest;
    }
  }
  FM_CHECK(lowest >= -1 && highest < p.num_experts, "topk_idx must be from -1 to ", p.num_experts - 1, ", got ",
           lowest < -1 ? lowest : highest);
  if (rows_suffice) return;
  int64_t counts[kMaxExperts] = {}, needed = 0;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const Id* ids = static_cast<const Id*>(p.topk_idx) + t * p.idx_stride;
    for (int64_t k = 0; k < num_topk; ++k) {
      if (ids[k] >= 0) ++counts[ids[k]];
    }
  }
  for (const int64_t count : counts) needed += (count + p.alignment - 1) / p.alignment * p.alignment;
  FM_CHECK(needed <= p.num_rows, "num_rows must be at least ", needed, " for these topk_idx, got ", p.num_rows);
}
#endif

// A mapping and its memory.
struct Mapping {
  MoeMappingParams p;
  Tensor pos_to_token, token_topk_to_pos, expert_offsets, counts;
};
inline Mapping view_mapping(const Tensor& topk_idx, int64_t num_experts, int64_t alignment, int64_t num_rows) {
  MoeMappingParams p{};
  view_ids(topk_idx, p.idx_is_long);
  FM_CHECK(num_experts >= 1 && num_experts <= kMaxExperts, "num_experts must be from 1 to ", kMaxExperts, ", got ",
           num_experts);
  FM_CHECK(alignment >= 1 && alignment <= kMaxAlignment, "alignment must be from 1 to ", kMaxAlignment, ", got ",
           alignment);
  const int64_t num_slots = topk_idx.numel(), num_topk = topk_idx.size(1);
  const int64_t most = num_slots + (num_slots < num_experts ? num_slots : num_experts) * (alignment - 1);
  FM_CHECK(most < kMaxRows &&
                   num_rows<kMaxRows, "topk_idx and num_rows must make fewer than 2^31 rows, got ", most> num_rows
               ? most
               : num_rows);
  const int64_t enough = most / alignment * alignment;
  p.num_slots = num_slots;
  p.num_topk = Divisor(num_slots == 0 ? 1 : static_cast<int32_t>(num_topk));
  p.num_experts = num_experts;
  p.alignment = alignment;
  p.num_rows = num_rows < 0 ? enough : num_rows;
  p.topk_idx = data_of(topk_idx);
  p.idx_stride = stride_of(topk_idx, 0);
  const auto integers = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(topk_idx, sizes, ScalarType::Int);
  };
  Tensor pos_to_token = integers({p.num_rows}), token_topk_to_pos = integers({topk_idx.size(0), num_topk});
  Tensor expert_offsets = integers({2, num_experts});
  p.pos_to_token = static_cast<int32_t*>(data_of(pos_to_token));
  p.token_topk_to_pos = static_cast<int32_t*>(data_of(token_topk_to_pos));
  p.expert_offsets = static_cast<int32_t*>(data_of(expert_offsets));
#ifdef FM_CUDA
  const int64_t chunks = mapping_chunks(num_slots);
  Tensor counts = integers({chunks > 1 ? (chunks + 1) * num_experts : 0});
  p.counts = static_cast<int32_t*>(data_of(counts));
#else
  Tensor counts = integers({0});
  p.idx_is_long ? check_ids<int64_t>(p, p.num_rows >= enough) : check_ids<int32_t>(p, p.num_rows >= enough);
#endif
  return {p, pos_to_token, token_topk_to_pos, expert_offsets, counts};
}

}  // namespace fmkernels
