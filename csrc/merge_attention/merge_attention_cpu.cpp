// SPDX-License-Identifier: Apache-2.0
// merge_attention_cpu.cpp: the CPU kernels of merge_attention, forward and backward.
//
// Work       Tasks of kTaskRows rows; a row (token, head) is one pass over its vectors.
// Numerics   float32; weights at most 1. Deterministic.
// Cost       3 * dim elements of memory a row forward, 5 * dim backward: bound by memory.

#include "merge_attention.h"

#include <cmath>

#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "../common/vec.h"

namespace fmkernels {
namespace {

constexpr int64_t kTaskRows = 256;

struct Row {
  int64_t batch, token, head;
};

template <class T>
T* o_row(const MergeSide& side, Row r) {
  return static_cast<T*>(side.o) + r.batch * side.o_stride[0] + r.token * side.o_stride[1] + r.head * side.o_stride[2];
}
float* lse_of(const MergeSide& side, Row r) {
  return side.lse + r.batch * side.lse_stride[0] + r.token * side.lse_stride[1] + r.head * side.lse_stride[2];
}

// f(row) for every (batch, token, head).
template <class Params, class F>
void for_each_row(const Params& p, F&& f) {
  const int64_t rows_per_batch = p.num_tokens * p.heads, tasks_per_batch = (rows_per_batch + kTaskRows - 1) / kTaskRows;
  const int workers = workers_for(p.batch * p.num_tokens * p.heads * p.dim * 3 * element_bytes(p.dtype));
  parallel_for(p.batch * tasks_per_batch, workers, [&](int64_t task, int) {
    const int64_t batch = task / tasks_per_batch, begin = task % tasks_per_batch * kTaskRows;
    const int64_t end = begin + kTaskRows < rows_per_batch ? begin + kTaskRows : rows_per_batch;
    int64_t token = begin / p.heads, head = begin % p.heads;
    for (int64_t row = begin; row < end; ++row) {
      f(Row{batch, token, head});
      if (++head == p.heads) head = 0, ++token;
    }
  });
}

// f(first lane, number of lanes) over [0, dim), a vector at a time.
template <class F>
FM_INLINE void for_each_vector(int64_t dim, F&& f) {
  for (int64_t c = 0; c < dim; c += kLanes) f(c, static_cast<int>(dim - c < kLanes ? dim - c : kLanes));
}

struct Weights {
  float a, b, lse;
};

// A side whose lse is -infinity has seen no key: its o may hold anything and is not read. A side whose weight is too
// small for a float is read like any other, so that its NaN reaches what depends on it.
bool has_keys(float lse) { return lse != -__builtin_inff(); }

// The weights of both sides, 0 for a side without keys, and the merged lse. NaN on either side makes all of them NaN.
Weights merge_weights(float lse_a, float lse_b) {
  if (lse_a == -__builtin_inff() && lse_b == -__builtin_inff()) return {0.0f, 0.0f, -__builtin_inff()};
  const bool a_is_larger = lse_a > lse_b;
  const float larger = a_is_larger ? lse_a : lse_b, smaller = a_is_larger ? lse_b : lse_a;
  const float ratio = std::exp(smaller - larger), inverse = 1.0f / (1.0f + ratio);
  const float lse = larger + std::log(1.0f + ratio);
  return a_is_larger ? Weights{inverse, ratio * inverse, lse} : Weights{ratio * inverse, inverse, lse};
}

template <class T>
void merge_row(const MergeAttentionParams& p, Row r) {
  const float lse_a = *lse_of(p.a, r), lse_b = *lse_of(p.b, r);
  const Weights weights = merge_weights(lse_a, lse_b);
  const T *a = o_row<T>(p.a, r), *b = o_row<T>(p.b, r);
  T* o = o_row<T>(p.merged, r);
  for_each_vector(p.dim, [&](int64_t c, int count) {
    VecF sum{};
    if (has_keys(lse_a)) sum += load_lanes(a + c, count) * weights.a;
    if (has_keys(lse_b)) sum += load_lanes(b + c, count) * weights.b;
    store_lanes(o + c, sum, count);
  });
  *lse_of(p.merged, r) = weights.lse;
}

template <class T>
void merge_row_backward(const MergeAttentionBackwardParams& p, Row r) {
  const float lse_a = *lse_of(p.a, r), lse_b = *lse_of(p.b, r);
  const Weights weights = merge_weights(lse_a, lse_b);
  const bool has_a = has_keys(lse_a), has_b = has_keys(lse_b);
  const T *a = o_row<T>(p.a, r), *b = o_row<T>(p.b, r), *grad = o_row<T>(p.grad, r);
  T *grad_a = o_row<T>(p.grad_a, r), *grad_b = o_row<T>(p.grad_b, r);
  VecF sum[4] = {};  // short chains of additions: less rounding than one long one
  for_each_vector(p.dim, [&](int64_t c, int count) {
    const VecF g = load_lanes(grad + c, count);
    store_lanes(grad_a + c, has_a ? g * weights.a : VecF{}, count);
    store_lanes(grad_b + c, has_b ? g * weights.b : VecF{}, count);
    if (has_a && has_b) sum[c / kLanes % 4] += g * (load_lanes(a + c, count) - load_lanes(b + c, count));
  });
  const float dot = horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3])),
              grad_lse = p.grad.lse == nullptr ? 0.0f : *lse_of(p.grad, r);
  *lse_of(p.grad_a, r) = has_a ? weights.a * (grad_lse + weights.b * dot) : 0.0f;
  *lse_of(p.grad_b, r) = has_b ? weights.b * (grad_lse - weights.a * dot) : 0.0f;
}

}  // namespace

template <>
void run_merge_attention<kIsa>(const MergeAttentionParams& p) {
  dispatch_dtype(p.dtype, [&]<class T>() { for_each_row(p, [&](Row r) { merge_row<T>(p, r); }); });
}

template <>
void run_merge_attention_backward<kIsa>(const MergeAttentionBackwardParams& p) {
  dispatch_dtype(p.dtype, [&]<class T>() { for_each_row(p, [&](Row r) { merge_row_backward<T>(p, r); }); });
}

}  // namespace fmkernels
