// SPDX-License-Identifier: Apache-2.0
// norm_cpu.cpp: the CPU kernels of RMSNorm and LayerNorm, forward and backward.
//
// Work       Forward: a row is read once from memory and again from the first-level cache. Backward: a task is a chunk
//            of rows; kRowsAtOnce of them share one read and write of the sums for dweight and dbias.
// Numerics   float32, in four chains of additions a row; the variance of LayerNorm about the mean. Deterministic.
// Cost       2 elements of memory an element (4 with a residual) forward, 3 backward (4): bound by memory.

#include "norm.h"

#include <cmath>
#include <type_traits>

#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "../common/vec_pair.h"

namespace fmkernels {
namespace {

constexpr int64_t kTaskElements = 1 << 15;
constexpr int kRowsAtOnce = 4;

// Where all that a result depends on is bfloat16, so is a NaN in it.
template <class W>
constexpr Nan kNan = std::is_same_v<W, BFloat16> ? Nan::kOfBFloat16 : Nan::kAny;

FM_INLINE float rstd_of(float sum_of_squares, int64_t hidden, float eps) {
  return 1.0f / std::sqrt(sum_of_squares / static_cast<float>(hidden) + eps);
}

template <bool kCentred, class T, class W>
void norm_row(const NormForwardParams& p, const RowPlace& place) {
  const int64_t hidden = p.hidden;
  const T* row = row_of<T>(p.x, place);
  PairSum sum;
  if (p.residual.data != nullptr) {
    const T* residual = row_of<T>(p.residual, place);
    T* summed = row_of<T>(p.summed, place);
    for_each_pair(hidden, [&](int64_t c, int count, int half) __attribute__((always_inline)) {
      const VecPair s = rounded_to<T, Nan::kOfBFloat16>(load_pair(row + c, count) + load_pair(residual + c, count));
      store_exact_pair(summed + c, s, count);
      sum.add(kCentred ? s : s * s, half);
    });
    row = summed;
  } else {
    for_each_pair(hidden, [&](int64_t c, int count, int half) __attribute__((always_inline)) {
      const VecPair s = load_pair(row + c, count);
      sum.add(kCentred ? s : s * s, half);
    });
  }
  float mean = 0.0f, squares = sum.total();
  if (kCentred) {
    mean = squares / static_cast<float>(hidden);
    PairSum sum_of_squares;
    for_each_pair(hidden, [&](int64_t c, int count, int half) __attribute__((always_inline)) {
      const VecPair d = first_elements<T>(load_pair(row + c, count) - mean, count);
      sum_of_squares.add(d * d, half);
    });
    squares = sum_of_squares.total();
  }
  const float rstd = rstd_of(squares, hidden, p.eps);
  T* y = row_of<T>(p.y, place);
  const W *weight = static_cast<const W*>(p.weight), *bias = static_cast<const W*>(p.bias);
  for_each_pair(hidden, [&](int64_t c, int count, int) __attribute__((always_inline)) {
    VecPair s = load_pair(row + c, count);
    if (kCentred) s = s - mean;
    s = s * rstd;
    if (weight != nullptr) s = s * load_pair_as<T>(weight + c, count);
    if (bias != nullptr) s = s + load_pair_as<T>(bias + c, count);
    store_pair<kNan<W>>(y + c, s, count);
  });
}

// What the gradient of a row needs besides its elements. mean_g is 0 for RMSNorm.
struct RowGradient {
  float mean, rstd, mean_gh, mean_g;
};

template <class T, class W>
FM_INLINE VecPair weighted(VecPair grad_y, const W* weight, int64_t c, int count) {
  return weight == nullptr ? grad_y : grad_y * load_pair_as<T>(weight + c, count);
}

template <class T, class W>
RowGradient row_gradient(const NormBackwardParams& p, const T* s, const T* grad_y) {
  const int64_t hidden = p.hidden;
  const W* weight = static_cast<const W*>(p.weight);
  const float n = static_cast<float>(hidden);
  float mean = 0.0f;
  if (p.is_centred) {
    PairSum sum;
    for_each_pair(hidden, [&](int64_t c, int count, int half)
                              __attribute__((always_inline)) { sum.add(load_pair(s + c, count), half); });
    mean = sum.total() / n;
  }
  PairSum squares, products, plain;
  for_each_pair(hidden, [&](int64_t c, int count, int half) __attribute__((always_inline)) {
    const VecPair d = first_elements<T>(load_pair(s + c, count) - mean, count);
    const VecPair g = weighted<T>(load_pair(grad_y + c, count), weight, c, count);
    squares.add(d * d, half);
    products.add(d * g, half);
    plain.add(g, half);
  });
  const float rstd = rstd_of(squares.total(), hidden, p.eps);
  return {mean, rstd, products.total() * rstd / n, p.is_centred ? plain.total() / n : 0.0f};
}

FM_INLINE void add_to(float* sums, VecPair x, int count) { store_pair(sums, load_pair(sums, count) + x, count); }

// kRows rows from `first` on: their gradients, and what they add to the sums of their chunk.
template <int kRows, class T, class W>
void norm_rows_backward(const NormBackwardParams& p, int64_t first, float* weight_sums, float* bias_sums) {
  const T *s[kRows], *grad_y[kRows], *grad_summed[kRows];
  T* grad_x[kRows];
  RowGradient rows[kRows];
  const W* weight = static_cast<const W*>(p.weight);
  for (int i = 0; i < kRows; ++i) {
    const RowPlace place = place_of(p.rows, first + i);
    s[i] = row_of<T>(p.summed, place);
    grad_y[i] = row_of<T>(p.grad_y, place);
    grad_x[i] = row_of<T>(p.grad_x, place);
    grad_summed[i] = p.grad_summed.data == nullptr ? nullptr : row_of<T>(p.grad_summed, place);
    rows[i] = row_gradient<T, W>(p, s[i], grad_y[i]);
  }
  for_each_pair(p.hidden, [&](int64_t c, int count, int) __attribute__((always_inline)) {
    VecPair weight_sum{}, bias_sum{};
    for (int i = 0; i < kRows; ++i) {
      const VecPair h = (load_pair(s[i] + c, count) - rows[i].mean) * rows[i].rstd;
      const VecPair dy = load_pair(grad_y[i] + c, count);
      VecPair grad = (weighted<T>(dy, weight, c, count) - rows[i].mean_g - h * rows[i].mean_gh) * rows[i].rstd;
      if (p.grad_summed.data != nullptr) grad = grad + load_pair(grad_summed[i] + c, count);
      store_pair<kNan<W>>(grad_x[i] + c, grad, count);
      weight_sum = weight_sum + dy * h;
      bias_sum = bias_sum + dy;
    }
    if (weight_sums != nullptr) add_to(weight_sums + c, in_order<T>(weight_sum), count);
    if (bias_sums != nullptr) add_to(bias_sums + c, in_order<T>(bias_sum), count);
  });
}

// grad[c] = the sum over the chunks of sums[chunk][c], in their order.
template <class W>
void add_chunks(const NormBackwardParams& p, const float* sums, void* grad) {
  for_each_pair(p.hidden, [&](int64_t c, int count, int) __attribute__((always_inline)) {
    VecPair total{};
    for (int64_t chunk = 0; chunk < p.num_chunks; ++chunk) {
      total = total + load_pair_as<W>(sums + chunk * p.sums_stride + c, count);
    }
    store_pair(static_cast<W*>(grad) + c, total, count);
  });
}

}  // namespace

template <>
void run_norm_forward<kIsa>(const NormForwardParams& p) {
  const int64_t rows_per_task = kTaskElements / p.hidden + 1, num_rows = p.rows.count;
  const int workers = workers_for(num_rows * p.hidden * element_bytes(p.dtype) * (p.residual.data == nullptr ? 2 : 4));
  dispatch_dtypes(p.dtype, p.weight_dtype, [&]<class T, class W>() {
    parallel_for((num_rows + rows_per_task - 1) / rows_per_task, workers, [&](int64_t task, int) {
      const int64_t begin = task * rows_per_task;
      const int64_t end = begin + rows_per_task < num_rows ? begin + rows_per_task : num_rows;
      for (int64_t row = begin; row < end; ++row) {
        const RowPlace place = place_of(p.rows, row);
        if (p.is_centred) norm_row<true, T, W>(p, place);
        else norm_row<false, T, W>(p, place);
      }
    });
  });
}

template <>
void run_norm_backward<kIsa>(const NormBackwardParams& p) {
  const int workers = workers_for(p.rows.count * p.hidden * element_bytes(p.dtype) * 3);
  dispatch_dtypes(p.dtype, p.weight_dtype, [&]<class T, class W>() {
    parallel_for(p.num_chunks, workers, [&](int64_t chunk, int) {
      float* weight_sums = p.weight_sums == nullptr ? nullptr : p.weight_sums + chunk * p.sums_stride;
      float* bias_sums = p.bias_sums == nullptr ? nullptr : p.bias_sums + chunk * p.sums_stride;
      for (float* sums : {weight_sums, bias_sums}) {
        if (sums != nullptr) memset(sums, 0, static_cast<size_t>(p.hidden) * sizeof(float));
      }
      int64_t row = chunk * p.rows_per_chunk;
      const int64_t end = row + p.rows_per_chunk < p.rows.count ? row + p.rows_per_chunk : p.rows.count;
      for (; row + kRowsAtOnce <= end; row += kRowsAtOnce) {
        norm_rows_backward<kRowsAtOnce, T, W>(p, row, weight_sums, bias_sums);
      }
      for (; row < end; ++row) norm_rows_backward<1, T, W>(p, row, weight_sums, bias_sums);
    });
    if (p.grad_weight != nullptr) add_chunks<W>(p, p.weight_sums, p.grad_weight);
    if (p.grad_bias != nullptr) add_chunks<W>(p, p.bias_sums, p.grad_bias);
  });
}

}  // namespace fmkernels
