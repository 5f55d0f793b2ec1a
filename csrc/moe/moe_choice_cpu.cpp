// SPDX-License-Identifier: Apache-2.0
// moe_choice_cpu.cpp: the tokens that an expert takes, where experts choose and where their capacity is limited.
//
// Work       A task is an expert: its items' keys are selected, not sorted. Scores are computed by tasks of tokens before.
// Cost       linear in the items.

#include "moe_route.h"

#include <algorithm>

#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "moe_score_cpu.h"

namespace fmkernels {
namespace {

constexpr int64_t kTaskTokens = 16;

struct Item {
  uint32_t key;
  int32_t place;
};
struct ComesBefore {
  bool operator()(const Item& a, const Item& b) const { return a.key > b.key || (a.key == b.key && a.place < b.place); }
};

// Of `num_items` keys the cut that keeps `capacity`; `items` has room for all.
MoeCut find_cut(const uint32_t* keys, int64_t num_items, int64_t capacity, Item* items) {
  int64_t found = 0;
  for (int64_t i = 0; i < num_items; ++i) {
    items[found] = {keys[i], static_cast<int32_t>(i)};
    found += keys[i] != 0;
  }
  if (found <= capacity) return {0, -1};
  if (capacity == 0) return {0xffffffffu, -1};
  std::nth_element(items, items + capacity - 1, items + found, ComesBefore{});
  return {items[capacity - 1].key, items[capacity - 1].place};
}

// Keys lie expert by expert, and a token's are written and read as a line of each: kTaskTokens at a time, through a tile,
// since lines a power of two apart push each other out of the cache.
template <class T>
void find_keys(const MoeChoiceParams& p) {
  const int64_t num_experts = p.logits.num_experts, num_tokens = p.logits.num_tokens;
  const int64_t padded = round_up(num_experts, kLanes);
  parallel_for(ceil_div(num_tokens, kTaskTokens), workers_for(num_tokens * num_experts * 4), [&](int64_t task, int) {
    alignas(32) float x[kMaxExperts];
    uint32_t tile[kMaxExperts][kTaskTokens];
    const int64_t begin = task * kTaskTokens, count = min(kTaskTokens, num_tokens - begin);
    for (int64_t i = 0; i < count; ++i) {
      const bool is_nan = load_logits<T>(p.logits, begin + i, padded, x);
      const RowSum sum = p.scoring == MoeScoring::kSoftmax ? sum_exponentials(x, padded) : RowSum{};
      for (int64_t e = 0; e < padded; e += kLanes) {
        const VecF at = load(x + e);
        const VecF score =
            p.scoring == MoeScoring::kSoftmax ? exp_nonpositive(at - sum.max) * sum.inverse : score_of(p.scoring, at);
        store(x + e, at == -kInfinity ? at : score);
      }
      for (int64_t e = 0; e < num_experts; ++e) tile[e][i] = is_nan ? 0u : key_of(x[e]);
    }
    for (int64_t e = 0; e < num_experts; ++e) {
      memcpy(p.keys + e * num_tokens + begin, tile[e], static_cast<size_t>(count) * sizeof(uint32_t));
    }
  });
}

void choose(const MoeChoiceParams& p) {
  const int64_t num_experts = p.logits.num_experts, num_tokens = p.logits.num_tokens;
  const int workers = workers_for(num_tokens * num_experts * 4);
  const Workspace memory(workers * num_tokens * static_cast<int64_t>(sizeof(Item)));
  Item* items = reinterpret_cast<Item*>(memory.data());
  parallel_for(num_experts, workers, [&](int64_t e, int worker) {
    p.cuts[e] = find_cut(p.keys + e * num_tokens, num_tokens, p.capacity, items + worker * num_tokens);
  });
  parallel_for(ceil_div(num_tokens, kTaskTokens), workers, [&](int64_t task, int) {
    uint32_t tile[kMaxExperts][kTaskTokens];
    const int64_t begin = task * kTaskTokens, count = min(kTaskTokens, num_tokens - begin);
    for (int64_t e = 0; e < num_experts; ++e) {
      memcpy(tile[e], p.keys + e * num_tokens + begin, static_cast<size_t>(count) * sizeof(uint32_t));
    }
    for (int64_t i = 0; i < count; ++i) {
      int32_t* idx = p.topk_idx + (begin + i) * num_experts;
      float* weights = p.topk_weights + (begin + i) * num_experts;
      for (int64_t e = 0; e < num_experts; ++e) {
        const uint32_t key = tile[e][i];
        const bool kept = key != 0 && is_kept(p.cuts[e], key, begin + i);
        idx[e] = kept ? static_cast<int32_t>(e) : -1;
        weights[e] = kept ? value_of(key) : 0.0f;
      }
    }
  });
}

template <class Id>
void limit(const MoeCapacityParams& p) {
  const MoeMappingParams& m = p.mapping;
  const int64_t num_topk = m.num_topk.value(), num_tokens = m.num_slots / num_topk;
  const auto begin_of = [&](int64_t e) { return e == 0 ? 0 : int64_t{m.expert_offsets[e - 1]}; };
  if (p.topk_weights != nullptr) {
    for (int64_t token = 0; token < num_tokens; ++token) {
      for (int64_t k = 0; k < num_topk; ++k) {
        const int32_t pos = m.token_topk_to_pos[token * num_topk + k];
        if (pos >= 0) p.keys[pos] = capacity_key(p.topk_weights[token * p.weights_stride + k]);
      }
    }
    const Workspace memory(m.num_slots * static_cast<int64_t>(sizeof(Item)));
    Item* items = reinterpret_cast<Item*>(memory.data());
    parallel_for(m.num_experts, workers_for(m.num_slots * 16), [&](int64_t e, int) {
      const int64_t begin = begin_of(e);
      p.cuts[e] = find_cut(p.keys + begin, m.expert_offsets[e] - begin, p.capacity, items + begin);
    });
  }
  for (int64_t token = 0; token < num_tokens; ++token) {
    const Id* ids = static_cast<const Id*>(m.topk_idx) + token * m.idx_stride;
    for (int64_t k = 0; k < num_topk; ++k) {
      const int64_t slot = token * num_topk + k, e = ids[k];
      bool kept = false;
      if (e >= 0) {
        const int64_t pos = m.token_topk_to_pos[slot], item = pos - begin_of(e);
        kept = p.topk_weights == nullptr ? item < p.capacity : is_kept(p.cuts[e], p.keys[pos], item);
      }
      p.kept_idx[slot] = kept ? static_cast<int32_t>(e) : -1;
    }
  }
}

}  // namespace

template <>
void run_moe_choice<kIsa>(const MoeChoiceParams& p) {
  dispatch_dtype(p.logits.dtype, [&]<class T>() { find_keys<T>(p); });
  choose(p);
}
template <>
void run_moe_capacity<kIsa>(const MoeCapacityParams& p) {
  p.mapping.idx_is_long ? limit<int64_t>(p) : limit<int32_t>(p);
}

}  // namespace fmkernels
