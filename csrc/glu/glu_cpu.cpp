// SPDX-License-Identifier: Apache-2.0
// glu_cpu.cpp: the CPU kernels of the gated linear units, forward and backward.
//
// Work       Tasks of about kTaskElements elements: rows, or parts of one.
// Numerics   float32, with exp and the normal distribution function as polynomials: relative errors below 1e-6.
// Cost       3 elements of memory an element forward, 5 backward; about as much arithmetic as the caches feed.

#include "glu.h"

#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "../common/sigmoid_cpu.h"
#include "../common/vec_pair.h"

namespace fmkernels {
namespace {

constexpr int64_t kTaskElements = 1 << 14;

// The distribution function of the normal distribution, and its density times sqrt(2 pi).
struct Normal {
  VecF distribution, bell;
};
FM_INLINE Normal normal(VecF x) {
  const VecF a = absolute(x), bell = exp(x * x * -0.5f);
  // Beyond -a: bell times a polynomial in t = 1 / (1 + 0.3 a), fitted for relative error on a <= 14, where bell is 0.
  const VecF t = 1.0f / (1.0f + 0.3f * a);
  VecF q = t * 3.567479424e-2f - 1.572031613e-1f;
  q = q * t + 2.063536318e-1f;
  q = q * t - 5.368375006e-2f;
  q = q * t + 1.285616773e-1f;
  q = q * t + 9.991347833e-2f;
  q = q * t + 1.207539580e-1f;
  q = q * t + 1.196292987e-1f;
  q = q * t * bell;
  return {choose(x > 0.0f, 1.0f - q, q), bell};
}

// act(g). sigmoid(x) is 1 / (1 + exp(-x)) here: where exp overflows, a finite g gives 0, and -infinity NaN, as in torch.
template <GluActivation activation>
FM_INLINE VecF activate(VecF g) {
  if constexpr (activation == GluActivation::kSilu) return silu(g);
  if constexpr (activation == GluActivation::kGelu) return g * normal(g).distribution;
  return g / (1.0f + exp(-g * (kTanhLinear + kTanhCubic * (g * g))));
}

// act(g) / g, and act'(g).
struct GateGradient {
  VecF factor, derivative;
};
template <GluActivation activation>
FM_INLINE GateGradient gate_gradient(VecF g) {
  if constexpr (activation == GluActivation::kSilu) {
    const Sigmoid s = sigmoid(g);
    return {s.value, s.value * (1.0f + g * s.rest)};
  } else if constexpr (activation == GluActivation::kGelu) {
    const Normal n = normal(g);
    return {n.distribution, n.distribution + g * (n.bell * kInverseSqrt2Pi)};
  } else {
    const Sigmoid s = sigmoid(g * (kTanhLinear + kTanhCubic * (g * g)));
    const VecF square = choose(g * g < kLargeSquare, g * g, VecF{} + kLargeSquare);
    const VecF slope = kTanhLinear + 3.0f * kTanhCubic * square;
    return {s.value, s.value + g * (s.value * s.rest) * slope};
  }
}

// f(place of a row, first column, number of columns) for parts of rows of about kTaskElements, or a row after another.
template <class F>
void for_each_part(const Rows& rows, int64_t width, int64_t num_bytes, F&& f) {
  const int64_t parts = (width + kTaskElements - 1) / kTaskElements,
                rows_per_task = parts > 1 ? 1 : kTaskElements / width;
  const int64_t row_tasks = (rows.count + rows_per_task - 1) / rows_per_task;
  parallel_for(row_tasks * parts, workers_for(num_bytes), [&](int64_t task, int) {
    const int64_t first = task % parts * kTaskElements,
                  last = first + kTaskElements < width ? first + kTaskElements : width;
    const int64_t begin = task / parts * rows_per_task;
    const int64_t end = begin + rows_per_task < rows.count ? begin + rows_per_task : rows.count;
    for (int64_t row = begin; row < end; ++row) f(place_of(rows, row), first, last - first);
  });
}

// Calls f.template operator()<T, activation>().
template <class F>
void dispatch_types(DType dtype, GluActivation activation, F&& f) {
  dispatch_dtype(dtype, [&]<class T>() {
    switch (activation) {
      case GluActivation::kSilu: return f.template operator()<T, GluActivation::kSilu>();
      case GluActivation::kGelu: return f.template operator()<T, GluActivation::kGelu>();
      case GluActivation::kGeluTanh: return f.template operator()<T, GluActivation::kGeluTanh>();
    }
  });
}

template <GluActivation activation, class T>
void glu_part(const T* gate, const T* up, T* out, int64_t count) {
  for_each_pair(count, [&](int64_t i, int n, int) __attribute__((always_inline)) {
    const VecPair g = load_pair(gate + i, n), u = load_pair(up + i, n);
    const VecPair active{activate<activation>(g.a), activate<activation>(g.b)};
    store_pair<Nan::kOfBFloat16>(out + i, active * u, n);
  });
}

template <GluActivation activation, class T>
void glu_part_backward(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t count) {
  for_each_pair(count, [&](int64_t i, int n, int) __attribute__((always_inline)) {
    const VecPair dy = load_pair(grad + i, n), g = load_pair(gate + i, n), u = load_pair(up + i, n);
    const GateGradient a = gate_gradient<activation>(g.a), b = gate_gradient<activation>(g.b);
    const VecPair factor{a.factor, b.factor}, derivative{a.derivative, b.derivative};
    store_pair<Nan::kOfBFloat16>(grad_gate + i, dy * u * derivative, n);
    store_pair<Nan::kOfBFloat16>(grad_up + i, dy * (g * factor), n);
  });
}

}  // namespace

template <>
void run_glu_forward<kIsa>(const GluForwardParams& p) {
  dispatch_types(p.dtype, p.activation, [&]<class T, GluActivation activation>() {
    const int64_t num_bytes = 3 * p.rows.count * p.width * static_cast<int64_t>(sizeof(T));
    for_each_part(p.rows, p.width, num_bytes, [&](const RowPlace& place, int64_t first, int64_t count) {
      glu_part<activation>(row_of<T>(p.gate, place) + first, row_of<T>(p.up, place) + first,
                           row_of<T>(p.out, place) + first, count);
    });
  });
}

template <>
void run_glu_backward<kIsa>(const GluBackwardParams& p) {
  dispatch_types(p.dtype, p.activation, [&]<class T, GluActivation activation>() {
    const int64_t num_bytes = 5 * p.rows.count * p.width * static_cast<int64_t>(sizeof(T));
    for_each_part(p.rows, p.width, num_bytes, [&](const RowPlace& place, int64_t first, int64_t count) {
      glu_part_backward<activation>(row_of<T>(p.grad, place) + first, row_of<T>(p.gate, place) + first,
                                    row_of<T>(p.up, place) + first, row_of<T>(p.grad_gate, place) + first,
                                    row_of<T>(p.grad_up, place) + first, count);
    });
  });
}

}  // namespace fmkernels
