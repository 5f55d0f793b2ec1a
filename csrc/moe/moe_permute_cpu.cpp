// SPDX-License-Identifier: Apache-2.0
// moe_permute_cpu.cpp: tokens to the rows of their experts, and back.
//
// Work       Tasks of kTaskRows rows of the result. permute copies one row after another; large results go past the cache,
//            since reading the lines that are about to be written would cost as much as writing them. combine walks a
//            token's rows side by side, kBlock columns at a time, and asks for those of the next token meanwhile.
// Numerics   float32, the order of k; the sums of the gradient of a weight in four chains. Deterministic.
// Cost       bound by memory.

#include "moe.h"

#include "../common/dispatch.h"
#include "../common/integers_cpu.h"
#include "../common/parallel.h"
#include "../common/vec.h"

namespace fmkernels {
namespace {

constexpr int64_t kTaskRows = 64;
constexpr int kVectors = 8;                    // accumulators of combine
constexpr int64_t kBlock = kVectors * kLanes;  // columns
constexpr int64_t kStreamedBytes = 32 << 20;   // larger results do not stay in the cache anyway
constexpr int64_t kLineBytes = 64;

template <class T>
T* row_at(const MoeRows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

// f(row) over all rows, with `bytes` of memory traffic in each.
template <class F>
void for_each_row(int64_t num_rows, int64_t bytes, F&& f) {
  parallel_for(ceil_div(num_rows, kTaskRows), workers_for(num_rows * bytes), [&](int64_t task, int) {
    const int64_t end = min((task + 1) * kTaskRows, num_rows);
    for (int64_t row = task * kTaskRows; row < end; ++row) f(row);
  });
}

// ---- permute ---------------------------------------------------------------------------------------------------------

// num_bytes a multiple of 32, `to` on a boundary of 32. Past the cache.
FM_INLINE void stream_row(char* to, const char* from, int64_t num_bytes) {
#ifdef __AVX2__
  int64_t i = 0;
  for (; i + 2 * 32 <= num_bytes; i += 2 * 32) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + 32), high);
  }
  if (i < num_bytes) {
    const __m256i last = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), last);
  }
#else
  memcpy(to, from, static_cast<size_t>(num_bytes));
#endif
}
FM_INLINE void stream_fence() {
#ifdef __AVX2__
  _mm_sfence();  // what was streamed is seen by whoever is told that the task is done
#endif
}

void permute(const MoePermuteParams& p) {
  const int64_t element = element_bytes(p.dtype), num_bytes = p.hidden * element;
  char* y = static_cast<char*>(p.y.data);
  const int64_t y_bytes = p.y.stride * element, x_bytes = p.x.stride * element;
  const bool streams = p.num_rows * num_bytes >= kStreamedBytes && num_bytes % 32 == 0 && y_bytes % 32 == 0 &&
                       reinterpret_cast<uintptr_t>(y) % 32 == 0;
  const auto x_row = [&](int64_t row) { return static_cast<const char*>(p.x.data) + p.pos_to_token[row] * x_bytes; };
  prefer_huge_pages(y, p.num_rows * y_bytes);
  parallel_for(ceil_div(p.num_rows, kTaskRows), workers_for(p.num_rows * num_bytes * 2), [&](int64_t task, int) {
    const int64_t end = min((task + 1) * kTaskRows, p.num_rows);
    for (int64_t row = task * kTaskRows; row < end; ++row) {
      char* to = y + row * y_bytes;
      if (p.pos_to_token[row] < 0) memset(to, 0, static_cast<size_t>(num_bytes));
      else if (streams) stream_row(to, x_row(row), num_bytes);
      else memcpy(to, x_row(row), static_cast<size_t>(num_bytes));
    }
    if (streams) stream_fence();
  });
}

// ---- combine ---------------------------------------------------------------------------------------------------------

// The rows that a token has, in the order of k.
template <class T>
struct Choices {
  const T* row[kMaxTopk];
  float weight[kMaxTopk];
  int count = 0;

  Choices(const MoeCombineParams& p, int64_t token) {
    for (int64_t k = 0; k < p.num_topk; ++k) {
      const int32_t pos = p.token_topk_to_pos[token * p.num_topk + k];
      if (pos < 0) continue;
      row[count] = row_at<T>(p.y, pos);
      weight[count++] = p.weights == nullptr ? 1.0f : p.weights[token * p.weights_stride + k];
    }
  }
};

template <class T>
void combine_token(const MoeCombineParams& p, int64_t token, bool has_next) {
  const Choices<T> choices(p, token);
  T* out = row_at<T>(p.out, token);
  const int32_t* next = p.token_topk_to_pos + (token + 1) * p.num_topk;
  const int64_t num_next = has_next ? p.num_topk : 0;
  int64_t c = 0;
  for (; c + kBlock <= p.hidden; c += kBlock) {
    for (int64_t k = 0; k < num_next; ++k) {
      if (next[k] < 0) continue;
      const T* ahead = row_at<T>(p.y, next[k]) + c;
      for (int64_t i = 0; i < kBlock; i += kLineBytes / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(ahead + i);
    }
    VecF sum[kVectors] = {};
    for (int i = 0; i < choices.count; ++i) {
      const T* y = choices.row[i] + c;
      const VecF weight = broadcast(choices.weight[i]);
      for (int v = 0; v < kVectors; ++v) sum[v] += weight * load(y + v * kLanes);
    }
    for (int v = 0; v < kVectors; ++v) store(out + c + v * kLanes, sum[v]);
  }
  for (; c < p.hidden; c += kLanes) {
    const int count = static_cast<int>(min(p.hidden - c, kLanes));
    VecF sum{};
    for (int i = 0; i < choices.count; ++i) {
      sum += broadcast(choices.weight[i]) * load_lanes(choices.row[i] + c, count);
    }
    store_lanes(out + c, sum, count);
  }
}

template <class T>
void combine(const MoeCombineParams& p) {
  prefer_huge_pages(p.out.data, p.num_tokens * p.out.stride * static_cast<int64_t>(sizeof(T)));
  for_each_row(p.num_tokens, p.hidden * (p.num_topk + 1) * static_cast<int64_t>(sizeof(T)),
               [&](int64_t token) { combine_token<T>(p, token, token + 1 < p.num_tokens); });
}

// ---- the gradients of combine -----------------------------------------------------------------------------------------

template <class T>
void combine_row_backward(const MoeCombineBackwardParams& p, int64_t row) {
  const int64_t token = p.pos_to_token[row];
  T* grad_y = row_at<T>(p.grad_y, row);
  int64_t k = p.num_topk;
  if (token >= 0) {
    for (k = 0; k < p.num_topk && p.token_topk_to_pos[token * p.num_topk + k] != row;) ++k;
  }
  if (k == p.num_topk) {
    memset(grad_y, 0, static_cast<size_t>(p.hidden) * sizeof(T));
    return;
  }
  const float weight = p.weights[token * p.weights_stride + k];
  const T *grad = row_at<T>(p.grad, token), *y = row_at<T>(p.y, row);
  VecF sum[4] = {};  // short chains of additions: less rounding than one long one
  for (int64_t c = 0; c < p.hidden; c += kLanes) {
    const int count = static_cast<int>(min(p.hidden - c, kLanes));
    const VecF g = load_lanes(grad + c, count);
    store_lanes(grad_y + c, g * weight, count);
    sum[c / kLanes % 4] += g * load_lanes(y + c, count);
  }
  p.grad_weights[token * p.num_topk + k] = horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

}  // namespace

template <>
void run_moe_permute<kIsa>(const MoePermuteParams& p) {
  permute(p);
}

template <>
void run_moe_combine<kIsa>(const MoeCombineParams& p) {
  dispatch_dtype(p.dtype, [&]<class T>() { combine<T>(p); });
}

template <>
void run_moe_combine_backward<kIsa>(const MoeCombineBackwardParams& p) {
  dispatch_dtype(p.dtype, [&]<class T>() {
    const int64_t bytes = p.hidden * 3 * static_cast<int64_t>(sizeof(T));
    prefer_huge_pages(p.grad_y.data, p.num_rows * p.grad_y.stride * static_cast<int64_t>(sizeof(T)));
    for_each_row(p.num_rows, bytes, [&](int64_t row) { combine_row_backward<T>(p, row); });
  });
}

}  // namespace fmkernels
