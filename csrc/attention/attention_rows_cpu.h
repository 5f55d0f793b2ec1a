// SPDX-License-Identifier: Apache-2.0
// What both paths of attention_forward_cpu.cpp do with one row: which keys it sees, what modifies its scores, the
// online softmax, and the division at the end. Internal linkage, as in common/vec.h.
#pragma once

#include <cmath>

#include "../common/dispatch.h"
#include "../common/integers_cpu.h"
#include "../common/vec.h"
#include "attention.h"

namespace fmkernels {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kInfinity = __builtin_inff();

// ---- geometry ------------------------------------------------------------------------------------------------------

struct Range {
  int64_t begin, end;  // keys [begin, end); empty where end <= begin
};

// One sequence of the batch and one kv head of it. Rows are query major; head major where heads have block masks of
// their own, so that neighbouring rows list the same blocks.
struct Sequence {
  int64_t batch, kv_head, group;
  int64_t seq_q, seq_k, num_rows;
  int64_t q_start, k_start;  // first token in the packed tensors, 0 otherwise
  bool head_major;

  int64_t query(int64_t row) const { return head_major ? row % seq_q : row / group; }
  int64_t head(int64_t row) const { return kv_head * group + (head_major ? row / seq_q : row % group); }
};

inline Sequence sequence_of(const AttentionForwardParams& p, int64_t batch, int64_t kv_head) {
  Sequence s{batch, kv_head, p.heads / p.kv_heads, p.seq_q, p.seq_k, 0, 0, 0, p.block_mask.heads > 1};
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

// x in log2 units. What is finite stays finite: a mask may be the lowest finite number, and means its order, not -inf.
FM_INLINE VecF to_log2(VecF x) {
  const VecF limit = broadcast(0x1.5p127f);
  const VecF floored = max(-limit, x), clamped = limit < floored ? limit : floored;
  return clamped * kLog2E + (x - clamped) * 0x1p-60f;  // an infinity or a NaN again, and nothing of what is finite
}
FM_INLINE float to_log2(float x) { return to_log2(broadcast(x))[0]; }

// What q is multiplied with while it is copied, so that products are scores: log2 units, or the argument of tanh.
float query_scale(const AttentionForwardParams& p) {
  return p.softcap != 0.0f ? p.softmax_scale / p.softcap : p.softmax_scale * kLog2E;
}

template <class B>
FM_INLINE VecF load_bias(const B* bias, int64_t stride, int count) {
  if (stride == 1 && count >= kLanes) return load(bias);
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? to_float(bias[i * stride]) : 0.0f;
  return load(lanes);
}

// Where the biases of kRows rows and the keys from `key` on lie, to ask memory for them before their turn.
template <int kRows>
class BiasRows {
 public:
  BiasRows(const AttentionForwardParams& p, const Sequence& s, int64_t row, int64_t key) {
    if (p.bias == nullptr) return;
    const int64_t element = p.bias_dtype == DType::kFloat32 ? 4 : 2;
    stride_ = p.bias_stride[3] * element;
    for (int r = 0; r < kRows; ++r) {
      rows_[r] = static_cast<const char*>(p.bias) + (s.batch * p.bias_stride[0] + s.head(row + r) * p.bias_stride[1] +
                                                     s.query(row + r) * p.bias_stride[2] + key * p.bias_stride[3]) *
                                                        element;
    }
    is_there_ = true;
  }

  // An address without a meaning, of a row that only pads, is one that a prefetch may have.
  FM_INLINE void prefetch(int row, int count, int64_t key) const {
    for (int r = row; is_there_ && r < row + count; ++r) __builtin_prefetch(rows_[r] + key * stride_, 0, 2);
  }

 private:
  const char* rows_[kRows];
  int64_t stride_ = 0;
  bool is_there_ = false;
};

// scores[j] = f(scores[j], j) for j in [0, count), a vector at a time; f gets -infinity in the lanes past `count`.
template <class F>
FM_INLINE void transform(float* scores, int count, F&& f) {
  int j = 0;
  for (; j + kLanes <= count; j += kLanes) store(scores + j, f(load(scores + j), j));
  if (j < count) store_partial(scores + j, f(load_partial(scores + j, count - j, -kInfinity), j), count - j);
}

// Turns the products scores[0, count) of the keys from `key` on into scores.
void apply_modifiers(const AttentionForwardParams& p, const Sequence& s, int64_t row, int64_t key, int count,
                     float* scores) {
  const int64_t head = s.head(row), query = s.query(row);
  if (p.softcap != 0.0f) {
    transform(scores, count, [&](VecF x, int) { return tanh(x) * (p.softcap * kLog2E); });
  }
  if (p.bias != nullptr) {
    const int64_t stride = p.bias_stride[3];
    dispatch_dtype(p.bias_dtype, [&]<class B>() {
      const B* bias = static_cast<const B*>(p.bias) + s.batch * p.bias_stride[0] + head * p.bias_stride[1] +
                      query * p.bias_stride[2] + key * stride;
      transform(scores, count,
                [&](VecF x, int j) { return x + to_log2(load_bias(bias + j * stride, stride, count - j)); });
    });
  }
  if (p.alibi_slopes != nullptr) {
    const float slope_log2 = to_log2(p.alibi_slopes[s.batch * p.alibi_batch_stride + head]);
    const int64_t diagonal = query + s.seq_k - s.seq_q - key;
    const VecF lane = __builtin_convertvector(lane_indices(), VecF);
    transform(scores, count, [&](VecF x, int j) {
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

// The states of many rows.
struct RowStates {
  float *max_log2, *sum;

  RowState operator[](int64_t row) const { return {max_log2[row], sum[row]}; }
  void set(int64_t row, RowState state) const {
    max_log2[row] = state.max_log2;
    sum[row] = state.sum;
  }
  RowStates from(int64_t row) const { return {max_log2 + row, sum + row}; }
};

// The whole vectors that hold `visible`, which begin at multiples of kLanes; the scores around it become -infinity.
FM_INLINE Range hide_around(float* scores, Range visible) {
  if (visible.begin >= visible.end) return {0, 0};
  const Range whole{visible.begin / kLanes * kLanes, round_up(visible.end, kLanes)};
  const VecI lane = lane_indices();
  if (whole.begin < visible.begin) {
    const VecI first = VecI{} + static_cast<int32_t>(visible.begin - whole.begin);
    store(scores + whole.begin, lane >= first ? load(scores + whole.begin) : broadcast(-kInfinity));
  }
  if (visible.end < whole.end) {
    float* last = scores + whole.end - kLanes;
    store(last, lane < VecI{} + static_cast<int32_t>(visible.end % kLanes) ? load(last) : broadcast(-kInfinity));
  }
  return whole;
}

// One step for kLanes rows: the scores of row r in visible[r] become exp2(score - new maximum), those that share a
// vector with them 0, and alpha[r] the factor for what was accumulated before. What is one number a row is computed
// for all rows at once.
template <int kStride>
void softmax_step(float* scores, const Range* visible, RowStates state, float* alpha) {
  VecF lanes[kLanes];  // [row]
  Range whole[kLanes];
  for (int r = 0; r < kLanes; ++r) {
    whole[r] = hide_around(scores + r * kStride, visible[r]);
    lanes[r] = broadcast(-kInfinity);
    for (int64_t j = whole[r].begin; j < whole[r].end; j += kLanes) {
      lanes[r] = max(lanes[r], load(scores + r * kStride + j));
    }
  }
  const VecF old_max = load(state.max_log2);
  const VecF new_max = max(old_max, join_lanes(lanes, [](VecF a, VecF b) { return max(a, b); }));
  const VecF shift = new_max == broadcast(-kInfinity) ? VecF{} : new_max;  // no finite score: every weight 0, not NaN
  const VecF factor = exp2_nonpositive(old_max - shift);
  store(state.max_log2, new_max);
  store(alpha, factor);
  for (int r = 0; r < kLanes; ++r) {
    VecF sum{};
    for (int64_t j = whole[r].begin; j < whole[r].end; j += kLanes) {
      float* at = scores + r * kStride + j;
      const VecF weight = exp2_nonpositive(load(at) - shift[r]);
      store(at, weight);
      sum += weight;
    }
    lanes[r] = sum;
  }
  store(state.sum, load(state.sum) * factor + join_lanes(lanes, [](VecF a, VecF b) { return a + b; }));
}

// Divides the accumulated row by its sum, sink included, and writes o and lse. What dropout scales up it scales here.
template <class T>
void finish_row(const AttentionForwardParams& p, const Sequence& s, int64_t row, RowState state, const float* acc) {
  const int64_t head = s.head(row), query = s.query(row);
  float scale = 1.0f;
  if (p.sinks != nullptr) {
    const float sink_log2 = to_log2(p.sinks[head]);
    const float new_max = state.max_log2 > sink_log2 ? state.max_log2 : sink_log2;
    const float safe_max = new_max == -kInfinity ? 0.0f : new_max;
    scale = std::exp2(state.max_log2 - safe_max);
    state = {new_max, state.sum * scale + std::exp2(sink_log2 - safe_max)};
  }
  const float factor = state.sum == 0.0f ? 0.0f : scale / state.sum * dropout_scale(p);
  T* o = const_cast<T*>(token<T>(p.o, s, s.q_start, query, head));
  for (int64_t c = 0; c < p.v_head_dim; c += kLanes) store(o + c, load(acc + c) * factor);
  p.lse[s.batch * p.lse_batch_stride + head * p.lse_head_stride + s.q_start + query] =
      state.sum == 0.0f ? -kInfinity : static_cast<float>(state.max_log2 * kLn2 + std::log(double(state.sum)));
}

}  // namespace
}  // namespace fmkernels
