// SPDX-License-Identifier: Apache-2.0
// attention_forward_cpu.cpp: the CPU kernel of attention, fixed-length and packed.
//
// Rows       The query rows of one kv head are the (query, head of its group) pairs, query major: a group shares every
//            packed key and value, and the visible range grows with the row.
// Two paths  A sequence of more than kDirectRows rows is cut into row tiles. A tile packs each block of kBlockK keys
// and
//            values once, converted to float, and multiplies from cache with a register tile of kStrip rows x kPanel
//            columns. Fewer rows (decode) read keys and values where they lie; the keys are cut into chunks of kChunk,
//            so that a single long sequence keeps every core busy, and the chunks are merged in order.
// Masks      Every row has a visible range [begin, end) of keys. Scores are computed in whole panels, the softmax reads
//            the visible range alone, and the value product of a strip covers the range that all its rows see with the
//            register tile, the ragged rest row by row: nothing outside a row's range reaches it, NaN included.
// Numerics   float32 accumulation; scores in units of log2; blocks and chunks lie at fixed key positions, so a row's
// bits
//            depend neither on the other rows nor on the number of threads. Deterministic.
// Cost       4 * rows * visible keys * head_dim flops; packing adds 1/kMaxTileRows of the loads of the products.
// After      Dao 2023, FlashAttention-2, algorithm 1; Goto and van de Geijn 2008 for the register tile.

#include "attention.h"

#include <cmath>

#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "../common/vec.h"

namespace fmkernels {
namespace {

constexpr int kStrip = 6;           // rows of a register tile: 12 accumulators, 2 columns vectors, 1 broadcast of 16
constexpr int kPanel = 2 * kLanes;  // columns of a register tile
constexpr int kGroupStrips = 4;     // strips whose scores stay in the first-level cache together
constexpr int kGroupRows = kGroupStrips * kStrip;
constexpr int kBlockK = 128;                // keys packed at a time
constexpr int kDirectRows = 8;              // up to here keys and values are read in place
constexpr int kDirectBlock = 64;            // keys per softmax step of the direct path
constexpr int kChunk = 512;                 // keys of a chunk of the direct path
constexpr int64_t kPackedBytes = 48 << 20;  // packed blocks that all workers together keep
constexpr float kLog2E = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kInfinity = __builtin_inff();

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows of a tile: as many as keep q and o in 192 KiB, so that they stay in a second-level cache of 512 KiB beside a
// packed block and the next one on its way.
constexpr int64_t max_tile_rows(int64_t head_dim, int64_t v_head_dim) {
  return max(kGroupRows, 192 * 1024 / 4 / (head_dim + v_head_dim) / kGroupRows * kGroupRows);
}

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

// ---- packing -------------------------------------------------------------------------------------------------------

// rows[i][0, kLanes) for i in [0, kLanes) become out[c][0, kLanes) = rows[.][c], with a row stride of kPanel.
FM_INLINE void transpose_to(const VecF* rows, float* out) {
#ifdef __AVX2__
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    for (int h = 0; h < 2; ++h) {
      quads[4 * i + 2 * h] = _mm256_shuffle_ps(pairs[4 * i + h], pairs[4 * i + 2 + h], 0x44);
      quads[4 * i + 2 * h + 1] = _mm256_shuffle_ps(pairs[4 * i + h], pairs[4 * i + 2 + h], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * kPanel, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * kPanel, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31));
  }
#else
  for (int c = 0; c < kLanes; ++c) {
    for (int i = 0; i < kLanes; ++i) out[c * kPanel + i] = rows[i][c];
  }
#endif
}

// keys[0, count) to packed[panel][column][kPanel], the keys of the last panel past `count` as zeros.
template <class T>
void pack_keys(const T* keys, int64_t stride, int count, int64_t head_dim, float* packed) {
  for (int panel = 0; panel < count; panel += kPanel) {
    float* out = packed + panel * head_dim;
    for (int half = 0; half < kPanel; half += kLanes) {
      for (int64_t c = 0; c < head_dim; c += kLanes) {
        VecF rows[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int key = panel + half + i;
          rows[i] = key < count ? load(keys + key * stride + c) : VecF{};
        }
        transpose_to(rows, out + c * kPanel + half);
      }
    }
  }
}

// values[0, count) to packed[panel][key][kPanel] with kBlockK keys a panel; columns past v_head_dim as zeros. Returns
// whether all of them are finite.
template <class T>
bool pack_values(const T* values, int64_t stride, int count, int64_t v_head_dim, float* packed) {
  VecF zero{};  // becomes NaN with the first value that is not finite
  for (int64_t c = 0; c < v_head_dim; c += kPanel) {
    const bool whole = c + kPanel <= v_head_dim;
    float* out = packed + c * kBlockK;
    for (int key = 0; key < count; ++key) {
      const VecF left = load(values + key * stride + c);
      const VecF right = whole ? load(values + key * stride + c + kLanes) : VecF{};
      zero += (left * 0.0f) + (right * 0.0f);
      store(out + key * kPanel, left);
      store(out + key * kPanel + kLanes, right);
    }
  }
  return horizontal_sum(zero) == 0.0f;
}

template <class T>
FM_INLINE void prefetch_rows(const T* rows, int64_t stride, int begin, int end, int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int row = begin; row < end; ++row) {
    for (int64_t c = 0; c < columns; c += kLine) __builtin_prefetch(rows + row * stride + c, 0, 2);
  }
}

// ---- register tiles ------------------------------------------------------------------------------------------------

// scores[r][0, kPanel) = sum over c of q[c][r] * keys[c][.], for kStrip rows; score rows are kBlockK apart.
FM_INLINE void score_tile(const float* q, const float* keys, int64_t head_dim, float* scores) {
  VecF acc[kStrip][2] = {};
#pragma GCC unroll 4
  for (int64_t c = 0; c < head_dim; ++c) {
    const VecF k0 = load(keys + c * kPanel), k1 = load(keys + c * kPanel + kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kStrip; ++r) {
      const VecF x = broadcast(q[c * kStrip + r]);
      acc[r][0] += x * k0;
      acc[r][1] += x * k1;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kStrip; ++r) {
    store(scores + r * kBlockK, acc[r][0]);
    store(scores + r * kBlockK + kLanes, acc[r][1]);
  }
}

// o[r][0, kPanel) = alpha[r] * o[r][.] + sum over j in [begin, end) of weights[r][j] * values[j][.], for kRows rows.
template <int kRows>
FM_INLINE void value_tile(const float* weights, const float* values, int begin, int end, const float* alpha, float* o,
                          int64_t o_stride) {
  VecF acc[kRows][2];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    acc[r][0] = load(o + r * o_stride) * alpha[r];
    acc[r][1] = load(o + r * o_stride + kLanes) * alpha[r];
  }
#pragma GCC unroll 4
  for (int j = begin; j < end; ++j) {
    const VecF v0 = load(values + j * kPanel), v1 = load(values + j * kPanel + kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const VecF x = broadcast(weights[r * kBlockK + j]);
      acc[r][0] += x * v0;
      acc[r][1] += x * v1;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    store(o + r * o_stride, acc[r][0]);
    store(o + r * o_stride + kLanes, acc[r][1]);
  }
}

// ---- the tiled path ------------------------------------------------------------------------------------------------

// Sizes of a worker's scratch.
struct TileShape {
  int64_t tile_rows, head_dim, columns, num_slots;  // columns: v_head_dim rounded up to kPanel
};

// A packed block of keys and values, and which block it is.
struct Slot {
  int64_t owner;  // a number that names (sequence, kv head, block); -1: empty
  bool values_finite;
};

// Scratch of one worker. The tiles of one kv head follow each other, so a worker finds most of the blocks that it needs
// packed by its previous tile.
struct TileScratch {
  float* q;         // [row / kStrip][head_dim][kStrip], scaled
  float* acc;       // [row][columns]
  RowState* state;  // [row]
  float* scores;    // [kGroupRows][kBlockK]
  Slot* slots;      // [num_slots]
  float* keys;      // [num_slots][kBlockK / kPanel][head_dim][kPanel]
  float* values;    // [num_slots][columns / kPanel][kBlockK][kPanel]

  TileScratch(Arena arena, const TileShape& shape)
      : q(arena.take<float>(shape.tile_rows * shape.head_dim)),
        acc(arena.take<float>(shape.tile_rows * shape.columns)),
        state(arena.take<RowState>(shape.tile_rows)),
        scores(arena.take<float>(kGroupRows * kBlockK)),
        slots(arena.take<Slot>(shape.num_slots)),
        keys(arena.take<float>(shape.num_slots * kBlockK * shape.head_dim)),
        values(arena.take<float>(shape.num_slots * kBlockK * shape.columns)) {}

  static int64_t num_bytes(const TileShape& shape) {
    return Arena::array_bytes<float>(shape.tile_rows * shape.head_dim) +
           Arena::array_bytes<float>(shape.tile_rows * shape.columns) + Arena::array_bytes<RowState>(shape.tile_rows) +
           Arena::array_bytes<float>(kGroupRows * kBlockK) + Arena::array_bytes<Slot>(shape.num_slots) +
           Arena::array_bytes<float>(shape.num_slots * kBlockK * shape.head_dim) +
           Arena::array_bytes<float>(shape.num_slots * kBlockK * shape.columns);
  }
};

// o = alpha * o + weights * values for the rows of one strip. The weights of a row lie in its visible range.
void accumulate_strip(float* weights, const Range* visible, const float* alpha, const float* values, bool values_finite,
                      float* acc, int64_t columns) {
  Range all{kBlockK, 0}, common{0, kBlockK};
  for (int r = 0; r < kStrip; ++r) {
    if (visible[r].begin < visible[r].end) {
      all = {min(all.begin, visible[r].begin), max(all.end, visible[r].end)};
    }
    common = {max(common.begin, visible[r].begin), min(common.end, visible[r].end)};
  }
  common.end = max(common.begin, common.end);
  if (values_finite) {  // a weight of 0 hides a key: one pass over what any row of the strip sees
    for (int r = 0; r < kStrip; ++r) {
      for (int64_t j = all.begin; j < min(visible[r].begin, all.end); ++j) weights[r * kBlockK + j] = 0.0f;
      for (int64_t j = max(visible[r].end, all.begin); j < all.end; ++j) weights[r * kBlockK + j] = 0.0f;
    }
    common = all;
  }
  const float one = 1.0f;
  auto accumulate_row = [&](int r, int64_t begin, int64_t end) {
    for (int64_t c = 0; c < columns && begin < end; c += kPanel) {
      value_tile<1>(weights + r * kBlockK, values + c * kBlockK, static_cast<int>(begin), static_cast<int>(end), &one,
                    acc + r * columns + c, columns);
    }
  };
  for (int64_t c = 0; c < columns; c += kPanel) {
    value_tile<kStrip>(weights, values + c * kBlockK, static_cast<int>(common.begin), static_cast<int>(common.end),
                       alpha, acc + c, columns);
  }
  if (values_finite) return;
  for (int r = 0; r < kStrip; ++r) {
    accumulate_row(r, visible[r].begin, min(visible[r].end, common.begin));
    accumulate_row(r, max(visible[r].begin, common.end), visible[r].end);
  }
}

template <class T>
void run_tile(const AttentionForwardParams& p, const Sequence& s, int64_t row_begin, int64_t row_end,
              const TileScratch& scratch, const TileShape& shape) {
  const int num_rows = static_cast<int>(row_end - row_begin);
  const int64_t padded_rows = round_up(num_rows, kGroupRows), columns = shape.columns;
  const bool modified = has_modifiers(p);

  // Query rows, scaled and interleaved by strip; the rows that pad the last group are zeros.
  const float scale = query_scale(p);
  for (int64_t r = 0; r < padded_rows; ++r) {
    float* out = scratch.q + r / kStrip * kStrip * p.head_dim + r % kStrip;
    const T* q = r < num_rows ? token<T>(p.q, s, s.q_start, s.query(row_begin + r), s.head(row_begin + r)) : nullptr;
    for (int64_t c = 0; c < p.head_dim; ++c) out[c * kStrip] = q == nullptr ? 0.0f : to_float(q[c]) * scale;
    scratch.state[r] = {-kInfinity, 0.0f};
  }
  memset(scratch.acc, 0, static_cast<size_t>(padded_rows * columns) * sizeof(float));

  // The union of the visible ranges; both ends grow with the row.
  const Range all{visible_keys(p, s, row_begin).begin, visible_keys(p, s, row_end - 1).end};
  for (int64_t block = all.begin / kBlockK * kBlockK; block < all.end; block += kBlockK) {
    const int num_keys = static_cast<int>(min(s.seq_k - block, kBlockK));
    const int64_t block_index = block / kBlockK, slot_index = block_index % shape.num_slots;
    Slot& slot = scratch.slots[slot_index];
    float* keys = scratch.keys + slot_index * kBlockK * p.head_dim;
    float* values = scratch.values + slot_index * kBlockK * columns;
    const int64_t owner = (s.batch * p.kv_heads + s.kv_head) * (p.seq_k / kBlockK + 1) + block_index;
    const bool is_packed = slot.owner == owner;
    if (!is_packed) {
      pack_keys(token<T>(p.k, s, s.k_start, block, s.kv_head), p.k.token_stride, num_keys, p.head_dim, keys);
      const bool finite =
          pack_values(token<T>(p.v, s, s.k_start, block, s.kv_head), p.v.token_stride, num_keys, p.v_head_dim, values);
      slot = {owner, finite};
    }
    // The next block comes from memory while this one is multiplied, an equal share with every group of rows.
    const int next_keys = is_packed ? 0 : static_cast<int>(max(0, min(all.end - block - kBlockK, kBlockK)));
    const T* next_k = token<T>(p.k, s, s.k_start, block + kBlockK, s.kv_head);
    const T* next_v = token<T>(p.v, s, s.k_start, block + kBlockK, s.kv_head);
    const int num_groups = static_cast<int>(ceil_div(num_rows, kGroupRows));

    for (int group = 0; group < num_rows; group += kGroupRows) {
      const int share = next_keys * (group / kGroupRows) / num_groups;
      const int share_end = next_keys * (group / kGroupRows + 1) / num_groups;
      prefetch_rows(next_k, p.k.token_stride, share, share_end, p.head_dim);
      prefetch_rows(next_v, p.v.token_stride, share, share_end, p.v_head_dim);

      Range visible[kGroupRows], strip_range[kGroupStrips];
      Range group_range{kBlockK, 0};
      for (int strip = 0; strip < kGroupStrips; ++strip) {
        Range& range = strip_range[strip] = {kBlockK, 0};
        for (int r = strip * kStrip; r < (strip + 1) * kStrip; ++r) {
          const Range keys = group + r < num_rows ? visible_keys(p, s, row_begin + group + r) : Range{0, 0};
          visible[r] = {max(keys.begin - block, 0), min(keys.end - block, num_keys)};
          if (visible[r].begin >= visible[r].end) visible[r] = {0, 0};
          else range = {min(range.begin, visible[r].begin), max(range.end, visible[r].end)};
        }
        group_range = {min(group_range.begin, range.begin), max(group_range.end, range.end)};
      }
      if (group_range.begin >= group_range.end) continue;

      // Scores, panel by panel so that a panel of keys serves every strip from the first-level cache.
      for (int64_t key = group_range.begin / kPanel * kPanel; key < group_range.end; key += kPanel) {
        for (int strip = 0; strip < kGroupStrips; ++strip) {
          if (strip_range[strip].begin >= key + kPanel || strip_range[strip].end <= key) continue;
          score_tile(scratch.q + (group + strip * kStrip) * p.head_dim, keys + key * p.head_dim, p.head_dim,
                     scratch.scores + strip * kStrip * kBlockK + key);
        }
      }

      // Weights.
      if (modified) {
        for (int r = 0; r < kGroupRows; ++r) {
          const int count = static_cast<int>(visible[r].end - visible[r].begin);
          if (count == 0) continue;
          apply_modifiers(p, s, row_begin + group + r, block + visible[r].begin, count,
                          scratch.scores + r * kBlockK + visible[r].begin);
        }
      }
      float alpha[kGroupRows];
      softmax_step<kGroupRows, kBlockK>(scratch.scores, visible, scratch.state + group, alpha);

      // Values.
      for (int strip = 0; strip < kGroupStrips; ++strip) {
        if (strip_range[strip].begin >= strip_range[strip].end) continue;
        const int r = strip * kStrip;
        accumulate_strip(scratch.scores + r * kBlockK, visible + r, alpha + r, values, slot.values_finite,
                         scratch.acc + (group + r) * columns, columns);
      }
    }
  }
  for (int r = 0; r < num_rows; ++r) {
    finish_row<T>(p, s, row_begin + r, scratch.state[r], scratch.acc + r * columns);
  }
}

// ---- the direct path -----------------------------------------------------------------------------------------------

// sums[i] = sum of the lanes of acc[i], for 8 accumulators.
FM_INLINE void horizontal_sums(const VecF* acc, float* sums) {
#ifdef __AVX2__
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(acc[0], acc[1]), _mm256_hadd_ps(acc[2], acc[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(acc[4], acc[5]), _mm256_hadd_ps(acc[6], acc[7]));
  _mm256_storeu_ps(sums, _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31));
#else
  for (int i = 0; i < 8; ++i) sums[i] = horizontal_sum(acc[i]);
#endif
}

// scores[r][j] = <q[r], keys[j]> for kRows rows and j in [0, count); score rows are kDirectBlock apart.
template <int kRows, class T>
void direct_scores(const float* q, const T* keys, int64_t stride, int count, int64_t head_dim, float* scores) {
  constexpr int kKeys = kRows == 1 ? 8 : kRows == 2 ? 4 : 2;  // kRows * kKeys <= 8 accumulators
  for (int j = 0; j < count; j += kKeys) {
    VecF acc[8] = {};
    const T* key[kKeys];
    for (int i = 0; i < kKeys; ++i) key[i] = keys + min(j + i, count - 1) * stride;  // the last one again, past the end
    for (int64_t c = 0; c < head_dim; c += kLanes) {
#pragma GCC unroll 8
      for (int i = 0; i < kKeys; ++i) {
        const VecF k = load(key[i] + c);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[r * kKeys + i] += load(q + r * head_dim + c) * k;
      }
    }
    float sums[8];
    horizontal_sums(acc, sums);
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kKeys && j + i < count; ++i) scores[r * kDirectBlock + j + i] = sums[r * kKeys + i];
    }
  }
}

// acc[r][0, kVecs * kLanes) = alpha[r] * acc[r][.] + sum over j in [begin[r], end[r]) ... of weights[r][j] *
// values[j][.]
template <int kRows, int kVecs, class T>
FM_INLINE void direct_value_tile(const float* weights, const T* values, int64_t stride, int begin, int end,
                                 const float* alpha, float* acc, int64_t acc_stride) {
  VecF sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVecs; ++i) sum[r][i] = load(acc + r * acc_stride + i * kLanes) * alpha[r];
  }
  for (int j = begin; j < end; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) {
      const VecF v = load(values + j * stride + i * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][i] += broadcast(weights[r * kDirectBlock + j]) * v;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVecs; ++i) store(acc + r * acc_stride + i * kLanes, sum[r][i]);
  }
}

template <int kRows, class T>
void direct_values(const float* weights, const T* values, int64_t stride, int begin, int end, const float* alpha,
                   int64_t v_head_dim, float* acc) {
  constexpr int kVecs = kRows == 1 ? 8 : kRows == 4 ? 2 : 4;
  int64_t c = 0;
  for (; c + kVecs * kLanes <= v_head_dim; c += kVecs * kLanes) {
    direct_value_tile<kRows, kVecs>(weights, values + c, stride, begin, end, alpha, acc + c, v_head_dim);
  }
  for (; c < v_head_dim; c += kLanes) {
    direct_value_tile<kRows, 1>(weights, values + c, stride, begin, end, alpha, acc + c, v_head_dim);
  }
}

// Unfinished result of the rows of one (sequence, kv head) over one chunk of keys.
struct Partial {
  float* acc;       // [rows][v_head_dim]
  RowState* state;  // [rows]
};

// The keys [begin, end) for up to 4 rows from `first_row` on.
template <int kRows, class T>
void run_direct_rows(const AttentionForwardParams& p, const Sequence& s, int64_t first_row, int64_t begin, int64_t end,
                     const Partial& partial) {
  alignas(64) float q[kRows * 256];
  alignas(64) float scores[kRows * kDirectBlock];
  const float scale = query_scale(p);
  Range visible[kRows];
  Range all{end, begin};
  for (int r = 0; r < kRows; ++r) {
    const T* from = token<T>(p.q, s, s.q_start, s.query(first_row + r), s.head(first_row + r));
    for (int64_t c = 0; c < p.head_dim; c += kLanes) store(q + r * p.head_dim + c, load(from + c) * scale);
    const Range keys = visible_keys(p, s, first_row + r);
    visible[r] = {max(keys.begin, begin), min(keys.end, end)};
    if (visible[r].begin < visible[r].end) all = {min(all.begin, visible[r].begin), max(all.end, visible[r].end)};
  }
  RowState state[kLanes];
  for (RowState& row : state) row = {-kInfinity, 0.0f};
  const bool modified = has_modifiers(p);
  float* acc = partial.acc + first_row * p.v_head_dim;
  memset(acc, 0, static_cast<size_t>(kRows * p.v_head_dim) * sizeof(float));

  for (int64_t block = all.begin / kDirectBlock * kDirectBlock; block < all.end; block += kDirectBlock) {
    const int first_key = static_cast<int>(max(all.begin - block, 0));
    const int num_keys = static_cast<int>(min(all.end - block, kDirectBlock));
    direct_scores<kRows>(q, token<T>(p.k, s, s.k_start, block + first_key, s.kv_head), p.k.token_stride,
                         num_keys - first_key, p.head_dim, scores + first_key);
    const T* values = token<T>(p.v, s, s.k_start, block, s.kv_head);
    if (block + kDirectBlock < all.end) {  // the next block comes from memory meanwhile
      const int next_keys = static_cast<int>(min(all.end - block - kDirectBlock, kDirectBlock));
      prefetch_rows(token<T>(p.k, s, s.k_start, block + kDirectBlock, s.kv_head), p.k.token_stride, 0, next_keys,
                    p.head_dim);
      prefetch_rows(values + kDirectBlock * p.v.token_stride, p.v.token_stride, 0, next_keys, p.v_head_dim);
    }

    Range range[kLanes] = {};  // visible keys of this block; the rows past kRows see none
    Range common{first_key, num_keys};
    for (int r = 0; r < kRows; ++r) {
      range[r] = {max(visible[r].begin - block, 0), min(visible[r].end - block, num_keys)};
      if (range[r].begin >= range[r].end) range[r] = {0, 0};
      common = {max(common.begin, range[r].begin), min(common.end, range[r].end)};
      const int count = static_cast<int>(range[r].end - range[r].begin);
      if (modified && count > 0) {
        apply_modifiers(p, s, first_row + r, block + range[r].begin, count, scores + r * kDirectBlock + range[r].begin);
      }
    }
    common.end = max(common.begin, common.end);
    float alpha[kLanes];
    softmax_step<kLanes, kDirectBlock>(scores, range, state, alpha);

    // What all rows see together, then the ragged ends row by row.
    direct_values<kRows>(scores, values, p.v.token_stride, static_cast<int>(common.begin), static_cast<int>(common.end),
                         alpha, p.v_head_dim, acc);
    const float one = 1.0f;
    auto accumulate_row = [&](int r, int64_t begin, int64_t end) {
      if (begin >= end) return;
      direct_values<1>(scores + r * kDirectBlock, values, p.v.token_stride, static_cast<int>(begin),
                       static_cast<int>(end), &one, p.v_head_dim, acc + r * p.v_head_dim);
    };
    for (int r = 0; r < kRows; ++r) {
      accumulate_row(r, range[r].begin, min(range[r].end, common.begin));
      accumulate_row(r, max(range[r].begin, common.end), range[r].end);
    }
  }
  for (int r = 0; r < kRows; ++r) partial.state[first_row + r] = state[r];
}

template <class T>
void run_direct(const AttentionForwardParams& p, const Sequence& s, int64_t begin, int64_t end,
                const Partial& partial) {
  int64_t row = 0;
  for (; row + 4 <= s.num_rows; row += 4) run_direct_rows<4, T>(p, s, row, begin, end, partial);
  switch (s.num_rows - row) {
    case 1: return run_direct_rows<1, T>(p, s, row, begin, end, partial);
    case 2: return run_direct_rows<2, T>(p, s, row, begin, end, partial);
    case 3: return run_direct_rows<3, T>(p, s, row, begin, end, partial);
  }
}

// ---- work of a call ------------------------------------------------------------------------------------------------

// What one sequence of the batch contributes, per kv head: row tiles, or chunks of the direct path.
struct SequencePlan {
  int64_t first_task, first_partial;  // over all sequences before this one
  int64_t units;                      // tiles or chunks per kv head
  bool direct;
};

template <class T>
void run_forward(const AttentionForwardParams& p) {
  const int64_t columns = round_up(p.v_head_dim, kPanel);
  const int workers = num_workers();

  auto uses_direct = [](const Sequence& s) { return s.num_rows <= kDirectRows; };
  auto num_chunks = [](const Sequence& s) { return max(1, ceil_div(s.seq_k, kChunk)); };
  int64_t total_rows = 0, num_partials = 0, max_blocks = 1;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b, 0);
    total_rows += s.num_rows;
    max_blocks = max(max_blocks, ceil_div(s.seq_k, kBlockK));
    if (uses_direct(s)) num_partials += num_chunks(s) * p.kv_heads;
  }
  // Tile rows: enough tiles for every worker, never more rows than the cache holds. The choice changes no bits.
  const int64_t wanted = round_up(ceil_div(total_rows * p.kv_heads, 4 * workers), kGroupRows);
  const int64_t tile_rows = max(kGroupRows, min(max_tile_rows(p.head_dim, p.v_head_dim), wanted));
  const int64_t affordable_slots = kPackedBytes / workers / (kBlockK * (p.head_dim + columns) * 4);
  const TileShape shape{tile_rows, p.head_dim, columns, max(1, min(max_blocks, affordable_slots))};

  const int64_t acc_floats = num_partials * kDirectRows * p.v_head_dim;
  const int64_t scratch_bytes = TileScratch::num_bytes(shape);
  const Workspace workspace(Arena::array_bytes<SequencePlan>(p.batch) + Arena::array_bytes<float>(acc_floats) +
                            Arena::array_bytes<RowState>(num_partials * kDirectRows) + workers * scratch_bytes);
  Arena arena(workspace.data());
  SequencePlan* plan = arena.take<SequencePlan>(p.batch);
  float* partial_acc = arena.take<float>(acc_floats);
  RowState* partial_state = arena.take<RowState>(num_partials * kDirectRows);
  char* scratch = arena.take<char>(workers * scratch_bytes);

  for (int worker = 0; worker < workers; ++worker) {
    const TileScratch buffers(Arena(scratch + worker * scratch_bytes), shape);
    for (int64_t slot = 0; slot < shape.num_slots; ++slot) buffers.slots[slot] = {-1, false};
  }
  int64_t num_tasks = 0;
  num_partials = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b, 0);
    const bool direct = uses_direct(s);
    const int64_t units = direct ? (s.num_rows == 0 ? 0 : num_chunks(s)) : ceil_div(s.num_rows, tile_rows);
    plan[b] = {num_tasks, num_partials, units, direct};
    num_tasks += units * p.kv_heads;
    if (direct) num_partials += units * p.kv_heads;
  }
  auto partial_of = [&](const SequencePlan& unit, int64_t kv_head, int64_t chunk) {
    const int64_t index = unit.first_partial + kv_head * unit.units + chunk;
    return Partial{partial_acc + index * kDirectRows * p.v_head_dim, partial_state + index * kDirectRows};
  };
  auto finish_direct = [&](const Sequence& s, const SequencePlan& unit) {
    const Partial total = partial_of(unit, s.kv_head, 0);
    for (int64_t row = 0; row < s.num_rows; ++row) {
      RowState& state = total.state[row];
      float* acc = total.acc + row * p.v_head_dim;
      for (int64_t chunk = 1; chunk < unit.units; ++chunk) {
        const Partial part = partial_of(unit, s.kv_head, chunk);
        const RowState other = part.state[row];
        if (other.sum == 0.0f) continue;
        const float new_max = other.max_log2 > state.max_log2 ? other.max_log2 : state.max_log2;
        const float mine = std::exp2(state.max_log2 - new_max), theirs = std::exp2(other.max_log2 - new_max);
        const float* other_acc = part.acc + row * p.v_head_dim;
        for (int64_t c = 0; c < p.v_head_dim; c += kLanes) {
          store(acc + c, load(acc + c) * mine + load(other_acc + c) * theirs);
        }
        state = {new_max, state.sum * mine + other.sum * theirs};
      }
      finish_row<T>(p, s, row, state, acc);
    }
  };

  parallel_for(num_tasks, [&](int64_t task, int worker) {
    int64_t b = 0;
    for (int64_t end = p.batch; end - b > 1;) {
      const int64_t middle = (b + end) / 2;
      (plan[middle].first_task <= task ? b : end) = middle;
    }
    const SequencePlan& unit = plan[b];
    const int64_t local = task - unit.first_task;
    const Sequence s = sequence_of(p, b, local / unit.units);
    if (unit.direct) {
      const int64_t chunk = local % unit.units;
      run_direct<T>(p, s, chunk * kChunk, min((chunk + 1) * kChunk, s.seq_k), partial_of(unit, s.kv_head, chunk));
      if (unit.units == 1) finish_direct(s, unit);
    } else {
      const int64_t tile = unit.units - 1 - local % unit.units;  // causal: the longest first
      run_tile<T>(p, s, tile * tile_rows, min((tile + 1) * tile_rows, s.num_rows),
                  TileScratch(Arena(scratch + worker * scratch_bytes), shape), shape);
    }
  });
  if (num_partials == 0) return;
  parallel_for(p.batch * p.kv_heads, [&](int64_t task, int) {
    const SequencePlan& unit = plan[task / p.kv_heads];
    if (unit.direct && unit.units > 1) finish_direct(sequence_of(p, task / p.kv_heads, task % p.kv_heads), unit);
  });
}

}  // namespace

template <>
void run_attention_forward<kIsa>(const AttentionForwardParams& p) {
  dispatch_dtype(p.dtype, [&]<class T>() { run_forward<T>(p); });
}

}  // namespace fmkernels
