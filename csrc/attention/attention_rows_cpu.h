// SPDX-License-Identifier: Apache-2.0
// What both paths of attention_forward_cpu.cpp do with one row: which keys it sees, what modifies its scores, the
// online softmax, and the division at the end. Internal linkage, as in common/vec.h.
#pragma once

#include <cmath>

#include "../common/dispatch.h"
#include "../common/vec.h"
#include "attention.h"

namespace fmkernels {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kInfinity = __builtin_inff();

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- geometry ------------------------------------------------------------------------------------------------------

struct Range {
  int64_t begin, end;  // keys [begin, end); empty where end <= begin
};

// One sequence of the batch and one kv head of it.
struct Sequence {
  int64_t batch, kv_head, group;
  int64_t seq_q, seq_k, num_rows;
  int64_t q_start, k_start;  // first token in the packed tensors, 0 otherwise

  int64_t query(int64_t row) const { return row / group; }
  int64_t head(int64_t row) const { return kv_head * group + row % group; }
};

Sequence sequence_of(const AttentionForwardParams& p, int64_t batch, int64_t kv_head) {
  Sequence s{batch, kv_head, p.heads / p.kv_heads, p.seq_q, p.seq_k, 0, 0, 0};
  if (p.cu_seqlens_q != nullptr) {
    s.q_start = p.cu_seqlens_q[batch];
    s.k_start = p.cu_seqlens_k[batch];
    s.seq_q = p.cu_seqlens_q[batch + 1] - s.q_start;
    s.seq_k = p.cu_seqlens_k[batch + 1] - s.k_start;
  }
  s.num_rows = s.seq_q * s.group;
  return s;
}

Range visible_keys(const AttentionForwardParams& p, const Sequence& s, int64_t row) {
  const int64_t diagonal = s.query(row) + s.seq_k - s.seq_q;
  return {p.window_left < 0 ? 0 : max(0, diagonal - p.window_left),
          p.window_right < 0 ? s.seq_k : max(0, min(s.seq_k, diagonal + p.window_right + 1))};
}

template <class T>
const T* token(const TokenView& view, const Sequence& s, int64_t start, int64_t index, int64_t head) {
  return static_cast<const T*>(view.data) + s.batch * view.batch_stride + (start + index) * view.token_stride +
         head * view.head_stride;
}

// ---- scores of one row, in log2 units ------------------------------------------------------------------------------

bool has_modifiers(const AttentionForwardParams& p) {
  return p.softcap != 0.0f || p.bias != nullptr || p.alibi_slopes != nullptr;
}

// What q is multiplied with while it is copied, so that products are scores: log2 units, or the argument of tanh.
float query_scale(const AttentionForwardParams& p) {
  return p.softcap != 0.0f ? p.softmax_scale / p.softcap : p.softmax_scale * kLog2E;
}

// tanh to a few units in the last place everywhere: an odd polynomial near zero, where the formula over exp cancels.
FM_INLINE VecF tanh(VecF x) {
  const VecF magnitude = (VecF)((VecI)x & 0x7fffffff);
  const VecF e = exp2_nonpositive(magnitude * (-2.0f * kLog2E));
  const VecF sign = (VecF)((VecI)x & (VecI)broadcast(-0.0f));
  const VecF far = (VecF)((VecI)((1.0f - e) / (1.0f + e)) | (VecI)sign);
  const VecF u = x * x;
  VecF near = u * -5.602740497e-3f + 2.053993824e-2f;
  near = near * u - 5.370532051e-2f;
  near = near * u + 1.333093216e-1f;
  near = near * u - 3.333325220e-1f;
  near = near * u + 1.0f;
  return magnitude < 0.625f ? near * x : far;
}

template <class B>
FM_INLINE VecF load_bias(const B* bias, int64_t stride, int count) {
  if (stride == 1 && count >= kLanes) return load(bias);
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? to_float(bias[i * stride]) : 0.0f;
  return load(lanes);
}

constexpr int kUnroll = 4;  // vectors in flight, to hide the latency of sums and maxima

// scores[j] = f(scores[j], j, u) for j in [0, count), a vector at a time; the lanes past `count` are -infinity. u <
// kUnroll tells apart the vectors that are in flight together.
template <class F>
FM_INLINE void transform(float* scores, int count, F&& f) {
  int j = 0;
  for (; j + kUnroll * kLanes <= count; j += kUnroll * kLanes) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const int at = j + u * kLanes;
      store(scores + at, f(load(scores + at), at, u));
    }
  }
  for (; j + kLanes <= count; j += kLanes) store(scores + j, f(load(scores + j), j, 0));
  if (j < count) {
    const VecF tail = f(load_partial(scores + j, count - j, -kInfinity), j, 0);
    store_partial(scores + j, tail, count - j);
  }
}

// Turns the products scores[0, count) of the keys from `key` on into scores.
void apply_modifiers(const AttentionForwardParams& p, const Sequence& s, int64_t row, int64_t key, int count,
                     float* scores) {
  const int64_t head = s.head(row), query = s.query(row);
  if (p.softcap != 0.0f) {
    transform(scores, count, [&](VecF x, int, int) { return tanh(x) * (p.softcap * kLog2E); });
  }
  if (p.bias != nullptr) {
    const int64_t stride = p.bias_stride[3];
    dispatch_dtype(p.bias_dtype, [&]<class B>() {
      const B* bias = static_cast<const B*>(p.bias) + s.batch * p.bias_stride[0] + head * p.bias_stride[1] +
                      query * p.bias_stride[2] + key * stride;
      transform(scores, count,
                [&](VecF x, int j, int) { return x + load_bias(bias + j * stride, stride, count - j) * kLog2E; });
    });
  }
  if (p.alibi_slopes != nullptr) {
    const float slope_log2 = p.alibi_slopes[s.batch * p.alibi_batch_stride + head] * kLog2E;
    const int64_t diagonal = query + s.seq_k - s.seq_q - key;
    VecF lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<float>(i);
    transform(scores, count, [&](VecF x, int j, int) {
      const VecF distance = static_cast<float>(diagonal - j) - lane;
      return x - (VecF)((VecI)distance & 0x7fffffff) * slope_log2;
    });
  }
}

// ---- online softmax ------------------------------------------------------------------------------------------------

// Maximum in log2 units and sum of the weights below it; -infinity and 0 before the first key.
struct RowState {
  float max_log2, sum;
};

FM_INLINE float row_max(const float* scores, int count, float start) {
  VecF largest[kUnroll];
  for (int u = 0; u < kUnroll; ++u) largest[u] = broadcast(start);
  int j = 0;
  for (; j + kUnroll * kLanes <= count; j += kUnroll * kLanes) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) largest[u] = max(largest[u], load(scores + j + u * kLanes));
  }
  for (; j + kLanes <= count; j += kLanes) largest[0] = max(largest[0], load(scores + j));
  if (j < count) largest[0] = max(largest[0], load_partial(scores + j, count - j, -kInfinity));
  return horizontal_max(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
}

// One step for kRows rows (a multiple of kLanes): the scores of row r in visible[r] become exp2(score - new maximum),
// and alpha[r] the factor for what was accumulated before. Three passes, so that rows overlap in the processor.
template <int kRows, int kStride>
void softmax_step(float* scores, const Range* visible, RowState* state, float* alpha) {
  float shift[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int count = static_cast<int>(visible[r].end - visible[r].begin);
    const float old_max = state[r].max_log2;
    const float new_max = count == 0 ? old_max : row_max(scores + r * kStride + visible[r].begin, count, old_max);
    shift[r] = new_max == -kInfinity ? 0.0f : new_max;  // all scores -infinity: every weight is 0, not NaN
    alpha[r] = old_max - shift[r];
    state[r].max_log2 = new_max;
  }
  for (int r = 0; r < kRows; r += kLanes) store(alpha + r, exp2_nonpositive(load(alpha + r)));
  for (int r = 0; r < kRows; ++r) {
    const int count = static_cast<int>(visible[r].end - visible[r].begin);
    VecF sum[kUnroll] = {};
    transform(scores + r * kStride + visible[r].begin, count, [&](VecF x, int, int u) {
      const VecF weight = exp2_nonpositive(x - shift[r]);
      sum[u] += weight;
      return weight;
    });
    state[r].sum = state[r].sum * alpha[r] + horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

// Divides the accumulated row by its sum, sink included, and writes o and lse.
template <class T>
void finish_row(const AttentionForwardParams& p, const Sequence& s, int64_t row, RowState state, const float* acc) {
  const int64_t head = s.head(row), query = s.query(row);
  float scale = 1.0f;
  if (p.sinks != nullptr) {
    const float sink_log2 = p.sinks[head] * kLog2E;
    const float new_max = state.max_log2 > sink_log2 ? state.max_log2 : sink_log2;
    const float safe_max = new_max == -kInfinity ? 0.0f : new_max;
    scale = std::exp2(state.max_log2 - safe_max);
    state = {new_max, state.sum * scale + std::exp2(sink_log2 - safe_max)};
  }
  const float factor = state.sum == 0.0f ? 0.0f : scale / state.sum;
  T* o = const_cast<T*>(token<T>(p.o, s, s.q_start, query, head));
  for (int64_t c = 0; c < p.v_head_dim; c += kLanes) store(o + c, load(acc + c) * factor);
  p.lse[s.batch * p.lse_batch_stride + head * p.lse_head_stride + s.q_start + query] =
      state.sum == 0.0f ? -kInfinity : static_cast<float>(state.max_log2 * kLn2 + std::log(double(state.sum)));
}

}  // namespace
}  // namespace fmkernels
