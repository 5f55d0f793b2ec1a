// SPDX-License-Identifier: Apache-2.0
// cross_entropy_cpu.cpp: the CPU kernels of cross_entropy: loss, gradient, and both at once.
//
// Work       A task is one row, or as many short ones as make kTaskElements.
// Pass       The loss reads a row once, in chunks that stay in the first cache between their maximum and their sum; the
//            gradient reads and writes it once. Both at once read it from memory once: a row stays in the second cache.
// Numerics   float32; sums in kChains vectors, rescaled when the maximum grows. Deterministic.
// Cost       1 row of memory for the loss, 2 for the gradient.
// After      Milakov and Gimelshein 2018, online normalizer calculation for softmax.

#include "cross_entropy.h"

#include <cmath>

#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "../common/vec.h"

namespace fmkernels {
namespace {

constexpr int64_t kTaskElements = 16384;
constexpr int kChains = 4;  // vectors in flight
constexpr int64_t kChunk = 1024;
constexpr float kInfinity = __builtin_inff();

struct Row {
  int64_t batch, token;
  int64_t index;  // of the arrays without strides
};

// f(row, target) for every row; target is -1 for a row that has none.
template <class F>
void for_each_row(const CrossEntropyParams& p, F&& f) {
  const int64_t num_rows = p.batch * p.num_tokens;
  const int64_t rows_per_task = kTaskElements / p.vocab > 1 ? kTaskElements / p.vocab : 1;
  const int workers = workers_for(num_rows * p.vocab * element_bytes(p.dtype));
  parallel_for((num_rows + rows_per_task - 1) / rows_per_task, workers, [&](int64_t task, int) {
    const int64_t begin = task * rows_per_task;
    const int64_t end = begin + rows_per_task < num_rows ? begin + rows_per_task : num_rows;
    for (int64_t index = begin; index < end; ++index) {
      const Row r{index / p.num_tokens, index % p.num_tokens, index};
      const int64_t target = p.target[r.batch * p.target_stride[0] + r.token * p.target_stride[1]];
      f(r, target == p.ignore_index || target < 0 || target >= p.vocab ? -1 : target);
    }
  });
}
template <class T>
const T* logits_of(const CrossEntropyParams& p, Row r) {
  return static_cast<const T*>(p.logits) + r.batch * p.logits_stride[0] + r.token * p.logits_stride[1];
}
template <class T>
T* grad_of(const CrossEntropyParams& p, Row r) {
  return static_cast<T*>(p.grad) + r.batch * p.grad_stride[0] + r.token * p.grad_stride[1];
}
float grad_loss_of(const CrossEntropyParams& p, Row r) {
  return p.grad_loss[r.batch * p.grad_loss_stride[0] + r.token * p.grad_loss_stride[1]];
}

// f(first element, chain, vectors' lanes) over [begin, end), kChains vectors a turn; the last vector may be partial.
template <class F>
FM_INLINE void for_each_vector(int64_t begin, int64_t end, F&& f) {
  int64_t v = begin;
  for (; v + kChains * kLanes <= end; v += kChains * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) f(v + i * kLanes, i, kLanes);
  }
  for (; v < end; v += kLanes) f(v, 0, static_cast<int>(end - v < kLanes ? end - v : kLanes));
}

template <bool kCapped>
FM_INLINE VecF capped(VecF x, float softcap) {
  if constexpr (kCapped) return tanh(x / softcap) * softcap;
  else return x;
}

struct Stats {
  float max, sum_exp;  // of exp(s - max)
  float sum_below;     // of (s - max) over the row, where it is wanted
};

// One online pass. Rows with a NaN or +infinity have a sum of NaN; rows of nothing but -infinity, of 0. A lane that holds
// the 1 of the maximum rounds whatever is added to it, so few additions reach a lane: four vectors are added first, and
// chunks are short and summed in double.
template <class T, bool kCapped, bool kSmoothed>
Stats stats_of(const T* x, int64_t vocab, float softcap) {
  float max = -kInfinity, anchor = 0.0f;
  double total = 0.0, total_above = 0.0;
  for (int64_t begin = 0; begin < vocab; begin += kChunk) {
    const int64_t end = begin + kChunk < vocab ? begin + kChunk : vocab;
    VecF top[kChains];
    for (VecF& t : top) t = broadcast(-kInfinity);
    for_each_vector(begin, end, [&](int64_t v, int i, int count) {
      top[i] = fmkernels::max(load_lanes(x + v, count, -kInfinity), top[i]);  // in this order a NaN leaves top alone
    });
    const VecF t = fmkernels::max(fmkernels::max(top[0], top[1]), fmkernels::max(top[2], top[3]));
    float chunk_max = t[0];
    for (int i = 1; i < kLanes; ++i) chunk_max = t[i] > chunk_max ? t[i] : chunk_max;
    chunk_max = capped<kCapped>(broadcast(chunk_max), softcap)[0];  // it never decreases
    if (chunk_max > max) {
      total *= std::exp(static_cast<double>(max) - chunk_max);
      max = chunk_max;
    }
    const float shift = max == -kInfinity ? 0.0f : max;
    if (begin == 0) anchor = bounded_anchor(max);
    VecF sum[2] = {}, above[2] = {};
    int64_t v = begin;
    for (int chain = 0; v + kChains * kLanes <= end; v += kChains * kLanes, chain ^= 1) {
      VecF e[kChains], d[kChains];
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) {
        const VecF s = capped<kCapped>(load(x + v + i * kLanes), softcap);
        e[i] = exp_nonpositive(s - shift);
        d[i] = s - anchor;
      }
      sum[chain] += (e[0] + e[1]) + (e[2] + e[3]);
      if constexpr (kSmoothed) above[chain] += (d[0] + d[1]) + (d[2] + d[3]);
    }
    for (; v < end; v += kLanes) {
      const int count = static_cast<int>(end - v < kLanes ? end - v : kLanes);
      const VecI is_there = lane_indices() < count;
      const VecF s = capped<kCapped>(load_lanes(x + v, count, 0.0f), softcap);
      sum[0] += (VecF)((VecI)exp_nonpositive(s - shift) & is_there);
      if constexpr (kSmoothed) above[0] += (VecF)((VecI)(s - anchor) & is_there);
    }
    total += horizontal_sum(sum[0] + sum[1]);
    total_above += horizontal_sum(above[0] + above[1]);
  }
  const double sum_below = total_above + static_cast<double>(vocab) * (static_cast<double>(anchor) - max);
  return {max, static_cast<float>(total), static_cast<float>(sum_below)};
}

template <class T, bool kCapped>
Stats stats_of(const CrossEntropyParams& p, const T* x, float softcap) {
  if (p.label_smoothing != 0.0f) return stats_of<T, kCapped, true>(x, p.vocab, softcap);
  return stats_of<T, kCapped, false>(x, p.vocab, softcap);
}

template <class T, bool kCapped>
float loss_of(const CrossEntropyParams& p, const T* x, int64_t target, const Stats& stats, float softcap) {
  const float at_target = capped<kCapped>(broadcast(to_float(x[target])), softcap)[0] - stats.max;
  const float log_sum = std::log(stats.sum_exp), lse = stats.max + log_sum;
  float loss = log_sum - (1.0f - p.label_smoothing) * at_target;
  if (p.label_smoothing != 0.0f) loss -= p.label_smoothing * (stats.sum_below / static_cast<float>(p.vocab));
  return p.z_loss == 0.0f ? loss : loss + p.z_loss * lse * lse;
}

// grad may be x.
template <class T, bool kCapped>
void gradient_of(const CrossEntropyParams& p, const T* x, T* grad, int64_t target, const Stats& stats, float grad_loss,
                 float softcap) {
  const float max = stats.max, lse = max + std::log(stats.sum_exp);
  const float of_softmax = grad_loss * (1.0f + 2.0f * p.z_loss * lse) / stats.sum_exp;
  const float of_mean = grad_loss * p.label_smoothing / static_cast<float>(p.vocab);
  const float of_target = grad_loss * (1.0f - p.label_smoothing);
  const auto gradient = [=](VecF loaded, float at_target) {
    if constexpr (!kCapped) return exp_nonpositive(loaded - max) * of_softmax - of_mean - at_target;
    const VecF t = tanh(loaded / softcap);
    return (exp_nonpositive(t * softcap - max) * of_softmax - of_mean - at_target) * (1.0f - t * t);
  };
  const float x_target = to_float(x[target]);
  for_each_vector(0, p.vocab, [&](int64_t v, int, int count) {
    store_lanes(grad + v, gradient(load_lanes(x + v, count, 0.0f), 0.0f), count);
  });
  grad[target] = from_float<T>(gradient(broadcast(x_target), of_target)[0]);
}

template <class F>
void dispatch_cap(const CrossEntropyParams& p, F&& f) {
  dispatch_dtype(p.dtype, [&]<class T>() {
    dispatch_bool(p.softcap != 0.0f, [&]<bool kCapped>() { f.template operator()<T, kCapped>(p.softcap); });
  });
}

}  // namespace

template <>
void run_cross_entropy<kIsa>(const CrossEntropyParams& p) {
  dispatch_cap(p, [&]<class T, bool kCapped>(float softcap) {
    for_each_row(p, [&](Row r, int64_t target) {
      const T* x = logits_of<T>(p, r);
      const Stats stats = target < 0 ? Stats{} : stats_of<T, kCapped>(p, x, softcap);
      p.loss[r.index] = target < 0 ? 0.0f : loss_of<T, kCapped>(p, x, target, stats, softcap);
      p.max[r.index] = stats.max;
      p.sum_exp[r.index] = stats.sum_exp;
    });
  });
}

template <>
void run_cross_entropy_backward<kIsa>(const CrossEntropyParams& p) {
  dispatch_cap(p, [&]<class T, bool kCapped>(float softcap) {
    for_each_row(p, [&](Row r, int64_t target) {
      T* grad = grad_of<T>(p, r);
      if (target < 0) {
        memset(grad, 0, static_cast<size_t>(p.vocab) * sizeof(T));
        return;
      }
      const Stats stats{p.max[r.index], p.sum_exp[r.index], 0.0f};
      gradient_of<T, kCapped>(p, logits_of<T>(p, r), grad, target, stats, grad_loss_of(p, r), softcap);
    });
  });
}

template <>
void run_cross_entropy_gradient<kIsa>(const CrossEntropyParams& p) {
  dispatch_cap(p, [&]<class T, bool kCapped>(float softcap) {
    for_each_row(p, [&](Row r, int64_t target) {
      T* grad = grad_of<T>(p, r);
      p.loss[r.index] = 0.0f;
      if (target < 0) {
        memset(grad, 0, static_cast<size_t>(p.vocab) * sizeof(T));
        return;
      }
      const T* x = logits_of<T>(p, r);
      const Stats stats = stats_of<T, kCapped>(p, x, softcap);
      p.loss[r.index] = loss_of<T, kCapped>(p, x, target, stats, softcap);
      gradient_of<T, kCapped>(p, x, grad, target, stats, grad_loss_of(p, r), softcap);
    });
  });
}

}  // namespace fmkernels
