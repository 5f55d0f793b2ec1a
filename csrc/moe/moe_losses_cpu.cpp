// SPDX-License-Identifier: Apache-2.0
// moe_losses_cpu.cpp: the losses that balance the experts, and their gradients.
//
// Work       A task is kTaskTokens tokens; the sums of the tasks are added up in their order, whatever the threads.
// Numerics   float32, the loss itself in double. Deterministic.
// Cost       an exponential a logit forward, and one backward.

#include "moe_route.h"

#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "moe_score_cpu.h"

namespace fmkernels {
namespace {

constexpr int64_t kTaskTokens = 64;

int64_t num_tasks(const MoeLogits& logits) { return ceil_div(logits.num_tokens, kTaskTokens); }
int64_t padded_experts(const MoeLogits& logits) { return round_up(logits.num_experts, kLanes); }

// f(task, first token, last) over all tasks.
template <class F>
void for_each_task(const MoeLogits& logits, F&& f) {
  parallel_for(num_tasks(logits), workers_for(logits.num_tokens * logits.num_experts * 8), [&](int64_t task, int) {
    f(task, task * kTaskTokens, min((task + 1) * kTaskTokens, logits.num_tokens));
  });
}

bool has_expert(const int32_t* idx, int64_t num_topk) {
  bool found = false;
  for (int64_t k = 0; k < num_topk; ++k) found = found || idx[k] >= 0;
  return found;
}

// The shares of a token's experts in the sum of their scores, but for the factor that is returned: NaN where a logit is.
template <class T>
float find_shares(const MoeLogits& logits, MoeScoring scoring, int64_t token, float* shares) {
  const int64_t padded = padded_experts(logits);
  const bool is_nan = load_logits<T>(logits, token, padded, shares);
  VecF largest = broadcast(-kInfinity), sum{};
  for (int64_t e = 0; e < padded; e += kLanes) {
    const VecF x = load(shares + e), log = x == -kInfinity ? x : log_score(scoring, x);
    store(shares + e, log);
    largest = max(largest, log);
  }
  const float top = horizontal_max(largest), max = top == -kInfinity ? 0.0f : top;
  for (int64_t e = 0; e < padded; e += kLanes) {
    const VecF share = exp_nonpositive(load(shares + e) - max);
    store(shares + e, share);
    sum += share;
  }
  const float total = horizontal_sum(sum);
  return is_nan ? __builtin_nanf("") : total == 0.0f ? 0.0f : 1.0f / total;
}

template <class T>
void balance(const MoeBalanceParams& p) {
  const int64_t num_experts = p.logits.num_experts, padded = padded_experts(p.logits), tasks = num_tasks(p.logits);
  const Workspace memory(Arena::array_bytes<float>((tasks + 1) * padded) +
                         Arena::array_bytes<int32_t>((tasks + 1) * (num_experts + 1)));
  Arena arena(memory.data());
  float* sums = arena.take<float>((tasks + 1) * padded);
  int32_t* counts = arena.take<int32_t>((tasks + 1) * (num_experts + 1));
  memset(sums, 0, static_cast<size_t>((tasks + 1) * padded) * sizeof(float));
  memset(counts, 0, static_cast<size_t>((tasks + 1) * (num_experts + 1)) * sizeof(int32_t));
  for_each_task(p.logits, [&](int64_t task, int64_t begin, int64_t end) {
    alignas(32) float shares[kMaxExperts];
    float* sum = sums + task * padded;
    int32_t* count = counts + task * (num_experts + 1);
    for (int64_t token = begin; token < end; ++token) {
      const int32_t* idx = p.topk_idx + token * p.num_topk;
      if (!has_expert(idx, p.num_topk)) continue;
      ++count[num_experts];
      for (int64_t k = 0; k < p.num_topk; ++k) {
        if (idx[k] >= 0) ++count[idx[k]];
      }
      const float factor = find_shares<T>(p.logits, p.scoring, token, shares);
      for (int64_t e = 0; e < padded; e += kLanes) store(sum + e, load(sum + e) + load(shares + e) * factor);
    }
  });
  int64_t num_slots = 0;
  int32_t* total = counts + tasks * (num_experts + 1);
  for (int64_t task = 0; task < tasks; ++task) {
    for (int64_t e = 0; e <= num_experts; ++e) total[e] += counts[task * (num_experts + 1) + e];
  }
  for (int64_t e = 0; e < num_experts; ++e) num_slots += total[e];
  double loss = 0.0;
  for (int64_t e = 0; e < num_experts; ++e) {
    double sum = 0.0;
    for (int64_t task = 0; task < tasks; ++task) sum += sums[task * padded + e];
    const double coefficient = num_slots == 0 ? 0.0
                                              : static_cast<double>(total[e]) * static_cast<double>(num_experts) /
                                                    (static_cast<double>(num_slots) * total[num_experts]);
    p.coefficients[e] = static_cast<float>(coefficient);
    loss += coefficient * sum;
  }
  *p.loss = static_cast<float>(loss);
}

template <class T>
void balance_backward(const MoeBalanceBackwardParams& p) {
  const int64_t num_experts = p.logits.num_experts;
  const float grad = *p.grad;
  for_each_task(p.logits, [&](int64_t, int64_t begin, int64_t end) {
    alignas(32) float shares[kMaxExperts];
    for (int64_t token = begin; token < end; ++token) {
      T* to = static_cast<T*>(p.grad_logits) + token * num_experts;
      if (!has_expert(p.topk_idx + token * p.num_topk, p.num_topk)) {
        memset(to, 0, static_cast<size_t>(num_experts) * sizeof(T));
        continue;
      }
      const float factor = find_shares<T>(p.logits, p.scoring, token, shares);
      const T* raw = static_cast<const T*>(p.logits.data) + token * p.logits.stride;
      VecF dots{};
      for (int64_t e = 0; e < num_experts; e += kLanes) {
        const int count = static_cast<int>(min(num_experts - e, kLanes));
        dots += load(shares + e) * load_lanes(p.coefficients + e, count);
      }
      const float mean = horizontal_sum(dots) * factor;
      for (int64_t e = 0; e < num_experts; e += kLanes) {
        const int count = static_cast<int>(min(num_experts - e, kLanes));
        const VecF at = load_lanes(raw + e, count), pull = load_lanes(p.coefficients + e, count) - mean;
        const VecF slope = grad * factor * load(shares + e) * pull * log_score_slope(p.scoring, at);
        store_lanes(to + e, at == kInfinity ? VecF{} : slope, count);
      }
    }
  });
}

template <class T>
void z_loss(const MoeZLossParams& p) {
  for_each_task(p.logits, [&](int64_t, int64_t begin, int64_t end) {
    alignas(32) float x[kMaxExperts];
    for (int64_t token = begin; token < end; ++token) {
      const bool is_nan = load_logits<T>(p.logits, token, padded_experts(p.logits), x);
      const RowSum sum = sum_exponentials(x, padded_experts(p.logits));
      p.lse[token] = is_nan ? __builtin_nanf("") : sum.inverse == 0.0f ? -kInfinity : sum.max - logf(sum.inverse);
    }
  });
  double loss = 0.0;
  for (int64_t token = 0; token < p.logits.num_tokens; ++token) {
    loss += static_cast<double>(p.lse[token]) * static_cast<double>(p.lse[token]);
  }
  *p.loss = p.logits.num_tokens == 0 ? 0.0f : static_cast<float>(loss / static_cast<double>(p.logits.num_tokens));
}

template <class T>
void z_loss_backward(const MoeZLossBackwardParams& p) {
  const int64_t num_experts = p.logits.num_experts;
  for_each_task(p.logits, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const T* raw = static_cast<const T*>(p.logits.data) + token * p.logits.stride;
      T* to = static_cast<T*>(p.grad_logits) + token * num_experts;
      const float lse = p.lse[token], factor = *p.grad * 2.0f * lse / static_cast<float>(p.logits.num_tokens);
      for (int64_t e = 0; e < num_experts; e += kLanes) {
        const int count = static_cast<int>(min(num_experts - e, kLanes));
        const VecF x = load_lanes(raw + e, count);
        store_lanes(to + e, x == kInfinity ? VecF{} : factor * exp_nonpositive(x - lse), count);
      }
    }
  });
}

}  // namespace

template <>
void run_moe_balance<kIsa>(const MoeBalanceParams& p) {
  dispatch_dtype(p.logits.dtype, [&]<class T>() { balance<T>(p); });
}
template <>
void run_moe_balance_backward<kIsa>(const MoeBalanceBackwardParams& p) {
  dispatch_dtype(p.logits.dtype, [&]<class T>() { balance_backward<T>(p); });
}
template <>
void run_moe_z_loss<kIsa>(const MoeZLossParams& p) {
  dispatch_dtype(p.logits.dtype, [&]<class T>() { z_loss<T>(p); });
}
template <>
void run_moe_z_loss_backward<kIsa>(const MoeZLossBackwardParams& p) {
  dispatch_dtype(p.logits.dtype, [&]<class T>() { z_loss_backward<T>(p); });
}

}  // namespace fmkernels
