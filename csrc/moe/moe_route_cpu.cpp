// SPDX-License-Identifier: Apache-2.0
// moe_route_cpu.cpp: the experts of each token and their weights, and the gradient of the logits.
//
// Work       A task is kTaskTokens tokens. A token's keys lie in blocks of kBlock, of which the maxima are kept: a choice
//            looks for the best block, takes all experts that share its maximum, and has this block to look through again.
// Numerics   float32; a token's result depends on its logits alone. Deterministic.
// Cost       a few nanoseconds an expert, about fifteen a choice. Exponentials of all experts only where weights are not
//            renormalised or scores are compared.

#include "moe_route.h"

#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "moe_score_cpu.h"

namespace fmkernels {
namespace {

constexpr int64_t kTaskTokens = 32;
constexpr int kBlock = 64;
constexpr int kBlocks = kMaxExperts / kBlock;
constexpr int kVectors = kBlock / kLanes;

// Bit i: lane i is set.
FM_INLINE uint64_t lanes_of(VecI mask) {
#ifdef __AVX2__
  return static_cast<uint64_t>(static_cast<unsigned>(_mm256_movemask_ps((__m256)mask)));
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint64_t>(mask[i] & 1) << i;
  return bits;
#endif
}

struct Keys {
  alignas(32) float key[kMaxExperts];
  float block_max[kBlocks];
  int64_t num_blocks;

  void find_maxima() {
    for (int64_t block = 0; block < num_blocks; ++block) {
      VecF vectors[kVectors];
      for (int i = 0; i < kVectors; ++i) vectors[i] = load(key + block * kBlock + i * kLanes);
      block_max[block] = largest(vectors);
    }
  }
  static FM_INLINE float largest(const VecF (&vectors)[kVectors]) {
    VecF even = vectors[0], odd = vectors[1];
    for (int i = 2; i < kVectors; i += 2) even = max(even, vectors[i]), odd = max(odd, vectors[i + 1]);
    return horizontal_max(max(even, odd));
  }
  // To `ids` the experts of the largest key in the first block that has it, rising, at most `room` of them; they cannot be had
  // any more. How many they are: 0 where no expert is left. The next largest key is known before the ids are, which keeps
  // what a choice waits for short; loads do not meet stores of another size.
  FM_INLINE int take(float& value, int32_t* ids, int room) {
    int64_t block = 0;
    value = block_max[0];
    for (int64_t b = 1; b < num_blocks; ++b) {
      if (block_max[b] > value) value = block_max[b], block = b;
    }
    if (value == -kInfinity) return 0;
    float* keys = key + block * kBlock;
    const VecF wanted = broadcast(value);
    VecF vectors[kVectors];
    uint64_t equal = 0;
    for (int i = 0; i < kVectors; ++i) {
      const VecF at = load(keys + i * kLanes);
      const VecI is_wanted = at == wanted;
      vectors[i] = is_wanted ? broadcast(-kInfinity) : at;
      store(keys + i * kLanes, vectors[i]);
      equal |= lanes_of(is_wanted) << (i * kLanes);
    }
    block_max[block] = largest(vectors);
    int count = 0;
    for (; equal != 0 && count < room; equal &= equal - 1) {
      ids[count++] = static_cast<int32_t>(block * kBlock) + __builtin_ctzll(equal);
    }
    return count;
  }
};

// The sum of the `best` largest of some keys, from the largest down; -inf where there are none.
float sum_of_best(const float* keys, int count, int best) {
  if (best <= 2) {
    float first = -kInfinity, second = -kInfinity;
    for (int e = 0; e < count; ++e) {
      const float lower = keys[e] < first ? keys[e] : first;
      first = keys[e] > first ? keys[e] : first;
      second = lower > second ? lower : second;
    }
    return best == 1 || second == -kInfinity ? first : first + second;
  }
  float sorted[kMaxRoutedTopk];  // falling
  int found = 0;
  for (int e = 0; e < count; ++e) {
    if (keys[e] == -kInfinity || (found == best && keys[e] <= sorted[found - 1])) continue;
    int at = found < best ? found++ : found - 1;
    for (; at > 0 && sorted[at - 1] < keys[e]; --at) sorted[at] = sorted[at - 1];
    sorted[at] = keys[e];
  }
  float sum = found == 0 ? -kInfinity : sorted[0];
  for (int i = 1; i < found; ++i) sum += sorted[i];
  return sum;
}

// Leaves the experts of the best groups.
void limit_to_groups(const MoeRouteParams& p, float* keys) {
  const int size = p.group_size.value();
  float score[kMaxGroups];
  for (int group = 0; group < p.num_groups; ++group) {
    score[group] = sum_of_best(keys + group * size, size, p.group_best);
  }
  uint32_t allowed = 0;
  for (int n = 0; n < p.topk_groups; ++n) {
    int best = -1;
    for (int group = 0; group < p.num_groups; ++group) {
      if ((allowed >> group & 1) == 0 && score[group] > (best < 0 ? -kInfinity : score[best])) best = group;
    }
    if (best >= 0) allowed |= 1u << best;
  }
  for (int group = 0; group < p.num_groups; ++group) {
    if ((allowed >> group & 1) != 0) continue;
    for (int e = group * size; e < (group + 1) * size; ++e) keys[e] = -kInfinity;
  }
}

template <class T>
void route_token(const MoeRouteParams& p, int64_t token, Keys& keys, float* logits) {
  const int64_t padded = keys.num_blocks * kBlock;
  const bool by_score = compares_scores(p);
  float* x = by_score ? logits : keys.key;
  bool is_nan = load_logits<T>(p.logits, token, padded, x);

  RowSum sum{};
  if (p.scoring == MoeScoring::kSoftmax && (by_score || !p.renormalize)) sum = sum_exponentials(x, padded);
  const auto score = [&](VecF x) {
    return p.scoring == MoeScoring::kSoftmax ? exp_nonpositive(x - sum.max) * sum.inverse : score_of(p.scoring, x);
  };
  if (by_score) {
    VecI nan{};
    for (int64_t e = 0; e < padded; e += kLanes) {
      const int count = static_cast<int>(min(max(p.logits.num_experts - e, 0), kLanes));
      const VecF at = load(x + e), bias = p.bias == nullptr ? VecF{} : load_lanes(p.bias + e, count);
      nan |= bias != bias;
      store(keys.key + e, at == -kInfinity ? at : min(score(at) + bias, broadcast(kLargestFloat)));
    }
    is_nan = is_nan || any(nan);
  }

  alignas(32) float chosen[kMaxRoutedTopk];  // logits, then logarithms of scores
  int32_t* idx = p.topk_idx + token * p.num_topk;
  float* weights = p.topk_weights + token * p.num_topk;
  int count = 0;
  for (int i = 0; i < kMaxRoutedTopk; i += kLanes) store(chosen + i, broadcast(-kInfinity));
  if (!is_nan) {
    if (p.num_groups > 1) limit_to_groups(p, keys.key);
    keys.find_maxima();
    while (count < p.num_topk) {
      float value;
      const int found = keys.take(value, idx + count, p.num_topk - count);
      if (found == 0) break;
      for (int end = count + found; count < end; ++count) chosen[count] = by_score ? x[idx[count]] : value;
    }
  }
  for (int k = count; k < p.num_topk; ++k) idx[k] = -1;

  alignas(32) float weight[kMaxRoutedTopk];
  VecF largest = broadcast(-kInfinity), total{};
  for (int i = 0; i < p.num_topk; i += kLanes) {
    const VecF at = load(chosen + i);
    const VecF value = p.renormalize ? (at == -kInfinity ? at : log_score(p.scoring, at)) : score(at);
    store(weight + i, value);
    largest = max(largest, value);
  }
  if (p.renormalize && count > 0) {
    const float max = horizontal_max(largest);
    for (int i = 0; i < p.num_topk; i += kLanes) {
      const VecF e = exp_nonpositive(load(weight + i) - max);
      store(weight + i, e);
      total += e;
    }
    const float sum = horizontal_sum(total);
    for (int i = 0; i < p.num_topk; i += kLanes) store(weight + i, load(weight + i) / sum);
  }
  for (int k = 0; k < p.num_topk; ++k) weights[k] = k < count ? weight[k] : 0.0f;
}

template <class T>
void route_token_backward(const MoeRouteBackwardParams& p, int64_t token, float* x) {
  const int num_experts = p.logits.num_experts;
  const T* logits = static_cast<const T*>(p.logits.data) + token * p.logits.stride;
  const int32_t* idx = p.topk_idx + token * p.num_topk;
  const float *weights = p.topk_weights + token * p.num_topk, *grads = p.grad_weights + token * p.grad_stride;
  T* to = static_cast<T*>(p.grad_logits) + token * num_experts;
  float dot = 0.0f;
  bool has_expert = false;
  for (int64_t k = 0; k < p.num_topk; ++k) {
    if (idx[k] < 0) continue;
    has_expert = true;
    dot += weights[k] * grads[k];
  }
  // Where no expert is chosen: 0, but of softmax without renormalisation, whose sum is over all.
  if (has_expert && p.scoring == MoeScoring::kSoftmax && !p.renormalize) {
    const int64_t padded = round_up(num_experts, kLanes);
    load_logits<T>(p.logits, token, padded, x);
    const RowSum sum = sum_exponentials(x, padded);
    for (int64_t e = 0; e < num_experts; e += kLanes) {
      const int count = static_cast<int>(min(num_experts - e, kLanes));
      const VecF raw = load_lanes(logits + e, count);
      const VecF grad = exp_nonpositive(load(x + e) - sum.max) * (sum.inverse * -dot);
      store_lanes(to + e, raw == kInfinity ? VecF{} : grad, count);
    }
  } else {
    memset(to, 0, static_cast<size_t>(num_experts) * sizeof(T));
  }
  for (int64_t k = 0; k < p.num_topk; ++k) {
    if (idx[k] < 0) continue;
    const float at = to_float(logits[idx[k]]);
    float grad = grads[k];
    if (p.renormalize || p.scoring == MoeScoring::kSoftmax) {
      grad = weights[k] * (grad - dot) * log_score_slope(p.scoring, at);
    } else {
      grad *= score_slope(p.scoring, at);
    }
    to[idx[k]] = from_float<T>(at == kInfinity ? 0.0f : grad);
  }
}

// f(token) for all tokens, about `cost` operations each.
template <class F>
void for_each_token(const MoeLogits& logits, int64_t cost, F&& f) {
  parallel_for(ceil_div(logits.num_tokens, kTaskTokens), workers_for(logits.num_tokens * cost),
               [&](int64_t task, int) { f(task * kTaskTokens, min((task + 1) * kTaskTokens, logits.num_tokens)); });
}

}  // namespace

template <>
void run_moe_route<kIsa>(const MoeRouteParams& p) {
  dispatch_dtype(p.logits.dtype, [&]<class T>() {
    for_each_token(p.logits, p.logits.num_experts + 32 * p.num_topk, [&](int64_t begin, int64_t end) {
      Keys keys;
      keys.num_blocks = ceil_div(p.logits.num_experts, kBlock);
      alignas(32) float logits[kMaxExperts];
      for (int64_t token = begin; token < end; ++token) route_token<T>(p, token, keys, logits);
    });
  });
}

template <>
void run_moe_route_backward<kIsa>(const MoeRouteBackwardParams& p) {
  dispatch_dtype(p.logits.dtype, [&]<class T>() {
    for_each_token(p.logits, 2 * p.logits.num_experts + 8 * p.num_topk, [&](int64_t begin, int64_t end) {
      alignas(32) float x[kMaxExperts];
      for (int64_t token = begin; token < end; ++token) route_token_backward<T>(p, token, x);
    });
  });
}

}  // namespace fmkernels
