// SPDX-License-Identifier: Apache-2.0
// attention_backward_cpu.cpp: gradients of attention on the CPU, fixed-length and packed.
//
// Rows       As in the forward: the (query, head of its group) pairs of a kv head, query major, so that the gradients of
//            keys and values sum over the group by themselves.
// Task       One kv head of one sequence, by one worker. Blocks of kBackwardKeys keys, and for each of them tiles of
//            kBackwardRows rows, in order: five products a tile, all sums in the same order always. No atomics.
// Weights    p = exp2(score - lse), from the forward's lse; ds = p * (do . v - delta), delta = do . o - dlse.
// Dropout    do is scaled up while it is packed; a dropped pair is 0 in do . v and, once ds is made, in p.
// Memory     float32 copies of the rows of a chunk (at most kChunkBytes) in the two layouts that the products read, and
//            float32 accumulators of the gradients of one head: linear in the sequence.
// Masks      Hidden pairs have p = ds = 0, whatever their product is. Where a block or a tile holds something that is not
//            finite, products go row by row over what is visible: 0 * NaN reaches none.
// Numerics   float32; bits depend neither on the batch nor on the number of threads. Deterministic.
// Cost       10 * visible pairs * head_dim flops.
// After      Dao 2023, FlashAttention-2, algorithm 2, keys outside.
#include <vector>

#include "attention.h"
#include "attention_dropout_cpu.h"
#include "attention_tiled_cpu.h"

namespace fmkernels {
namespace {

constexpr int kBackwardRows = 48;  // rows of a tile: whole strips, and two score tiles of 24 KiB
constexpr int kBackwardKeys = 96;  // keys of a block: whole strips and panels
constexpr int64_t kChunkBytes = 24 << 20;
static_assert(kBackwardRows % kStrip == 0 && kBackwardKeys % kStrip == 0 && kBackwardKeys % kPanel == 0);
static_assert(kBackwardKeys <= kBlockK, "score rows are kBlockK apart");
static_assert(kBackwardKeys % kDropoutGroup == 0);

// acc[r][0, kPanel) += sum over seen j in [begin, end) of w(r, j) * rows[j][.], for kRows r; w(r, j) is weights[r][j] or, of
// the transposed product, weights[j][r]; weights are kBlockK apart, rows kPanel. The sum is made first: a chain of
// additions is no longer than a tile.
template <int kRows, bool kTransposed, class Seen = Everything>
FM_INLINE void add_product(const float* weights, const float* rows, Range range, float* acc, int64_t acc_stride,
                           Seen seen = {}) {
  VecF sum[kRows][2] = {};
#pragma GCC unroll 4
  for (int j = static_cast<int>(range.begin); j < static_cast<int>(range.end); ++j) {
    if (!seen(j)) continue;
    const VecF x0 = load(rows + j * kPanel), x1 = load(rows + j * kPanel + kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const VecF w = broadcast(kTransposed ? weights[j * kBlockK + r] : weights[r * kBlockK + j]);
      sum[r][0] += w * x0;
      sum[r][1] += w * x1;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    float* out = acc + r * acc_stride;
    store(out, load(out) + sum[r][0]);
    store(out + kLanes, load(out + kLanes) + sum[r][1]);
  }
}

struct BackwardShape {
  int64_t chunk_rows;  // rows packed at a time, whole tiles
  int64_t keys;        // of the longest sequence, whole blocks
  int64_t head_dim, v_head_dim;
  int64_t columns, v_columns;  // the same, rounded up to kPanel
  bool softcap;
};

struct BackwardScratch {
  // Of the rows of a chunk.
  float *q, *d_o;             // [row / kStrip][dim][kStrip], q scaled as in the forward
  float *q_rows, *d_o_rows;   // [tile][column / kPanel][kBackwardRows][kPanel], q as it is
  float* dq;                  // [row][columns]
  float *lse_high, *lse_low;  // [row], in log2 units: their sum has the bits that one number has no room for
  float* delta;               // [row]
  Range* visible;             // [row]
  bool* finite;               // [tile]: q and do
  // Of the head.
  float *dk, *dv;  // [key][columns]
  // Of a block of keys.
  float *k, *v;   // [key / kPanel][dim][kPanel]
  float* k_rows;  // [column / kPanel][kBlockK][kPanel]
  // Of a tile and a block.
  float *p, *ds, *slope;  // [kBackwardRows][kBlockK]; slope: of the softcap

  template <class Take>
  static BackwardScratch make(const BackwardShape& s, Take&& take) {
    BackwardScratch b{};
    take(b.q, s.chunk_rows * s.head_dim + kLanes);  // pack_strip writes up to a vector past the last strip
    take(b.d_o, s.chunk_rows * s.v_head_dim + kLanes);
    take(b.q_rows, s.chunk_rows * s.columns);
    take(b.d_o_rows, s.chunk_rows * s.v_columns);
    take(b.dq, s.chunk_rows * s.columns);
    take(b.lse_high, s.chunk_rows);
    take(b.lse_low, s.chunk_rows);
    take(b.delta, s.chunk_rows);
    take(b.visible, s.chunk_rows);
    take(b.finite, s.chunk_rows / kBackwardRows);
    take(b.dk, s.keys * s.columns);
    take(b.dv, s.keys * s.v_columns);
    take(b.k, kBackwardKeys * s.head_dim);
    take(b.v, kBackwardKeys * s.v_head_dim);
    take(b.k_rows, kBlockK * s.columns);
    take(b.p, kBackwardRows * kBlockK);
    take(b.ds, kBackwardRows * kBlockK);
    take(b.slope, s.softcap ? kBackwardRows * kBlockK : 0);
    return b;
  }
  static BackwardScratch in(Arena arena, const BackwardShape& s) {
    return make(s, [&]<class T>(T*& array, int64_t count) { array = arena.take<T>(count); });
  }
  static int64_t num_bytes(const BackwardShape& s) {
    int64_t bytes = 0;
    make(s, [&]<class T>(T*&, int64_t count) { bytes += Arena::array_bytes<T>(count); });
    return bytes;
  }
  static int64_t bytes_a_row(const BackwardShape& s) {
    return 4 * (s.head_dim + s.v_head_dim + 2 * s.columns + s.v_columns + 3) + static_cast<int64_t>(sizeof(Range));
  }
};

// rows[0, count) of a tile, scaled, to [column / kPanel][kBackwardRows][kPanel]; columns past dim and null rows as
// zeros. Whether all are finite.
template <class T>
bool pack_tile_rows(const T* const* rows, int count, int64_t dim, int64_t columns, float scale, float* packed) {
  VecF zero{};
  for (int64_t c = 0; c < columns; c += kLanes) {
    float* out = packed + c / kPanel * kPanel * kBackwardRows + c % kPanel;
    for (int r = 0; r < count; ++r) {
      const VecF x = c < dim && rows[r] != nullptr ? load(rows[r] + c) * scale : VecF{};
      zero += x * 0.0f;
      store(out + r * kPanel, x);
    }
  }
  return horizontal_sum(zero) == 0.0f;
}

// Packs rows [begin, end) of the head; rows up to whole tiles see nothing. d_sinks, if any: of this sequence.
template <class T>
void pack_chunk(const AttentionBackwardParams& b, const Sequence& s, int64_t begin, int64_t end,
                const BackwardShape& shape, const BackwardScratch& scratch, double* d_sinks) {
  const AttentionForwardParams& p = b.forward;
  const float scale = query_scale(p), kept_scale = dropout_scale(p);
  const int64_t padded = round_up(end - begin, kBackwardRows);
  for (int64_t tile = 0; tile < padded; tile += kBackwardRows) {
    const T *q[kBackwardRows], *d_o[kBackwardRows];
    for (int64_t i = 0; i < kBackwardRows; ++i) {
      const int64_t r = tile + i, row = begin + r;
      q[i] = d_o[i] = nullptr;
      scratch.visible[r] = {0, 0};
      scratch.lse_high[r] = scratch.lse_low[r] = scratch.delta[r] = 0.0f;
      if (row >= end) continue;
      const int64_t query = s.query(row), head = s.head(row);
      q[i] = token<T>(p.q, s, s.q_start, query, head);
      d_o[i] = token<T>(b.d_o, s, s.q_start, query, head);
      const T* o = token<T>(p.o, s, s.q_start, query, head);
      VecF sum{};
      for (int64_t c = 0; c < p.v_head_dim; c += kLanes) sum += load(o + c) * load(d_o[i] + c);
      const float lse =
          b.lse[s.batch * b.lse_stride[0] + head * b.lse_stride[1] + (s.q_start + query) * b.lse_stride[2]];
      float delta = horizontal_sum(sum);
      if (b.d_lse != nullptr) {
        delta -=
            b.d_lse[s.batch * b.d_lse_stride[0] + head * b.d_lse_stride[1] + (s.q_start + query) * b.d_lse_stride[2]];
      }
      scratch.delta[r] = delta;
      const double lse_log2 = lse / kLn2;
      scratch.lse_high[r] = static_cast<float>(lse_log2);
      scratch.lse_low[r] = std::isfinite(lse) ? static_cast<float>(lse_log2 - scratch.lse_high[r]) : 0.0f;
      if (lse != -kInfinity) scratch.visible[r] = visible_keys(p, s, row);  // -inf: nothing has weight
      if (d_sinks != nullptr && lse != -kInfinity) {
        const VecF share = exp2_nonpositive(broadcast(to_log2(p.sinks[head]) - lse * kLog2E));
        d_sinks[head] -= share[0] * delta;
      }
    }
    for (int64_t i = 0; i < kBackwardRows; i += kStrip) {
      pack_strip(q + i, p.head_dim, scale, scratch.q + (tile + i) * p.head_dim);
      pack_strip(d_o + i, p.v_head_dim, kept_scale, scratch.d_o + (tile + i) * p.v_head_dim);
    }
    const bool finite_q =
        pack_tile_rows(q, kBackwardRows, p.head_dim, shape.columns, 1.0f, scratch.q_rows + tile * shape.columns);
    const bool finite_do = pack_tile_rows(d_o, kBackwardRows, p.v_head_dim, shape.v_columns, kept_scale,
                                          scratch.d_o_rows + tile * shape.v_columns);
    scratch.finite[tile / kBackwardRows] = finite_q && finite_do;
  }
  memset(scratch.dq, 0, static_cast<size_t>(padded * shape.columns) * sizeof(float));
}

// x becomes 0 in the lanes [0, kBackwardKeys) around `visible`.
FM_INLINE void zero_around(float* x, Range visible) {
  const VecI lane = lane_indices();
  auto zero = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin / kLanes * kLanes; j < end; j += kLanes) {
      const VecI key = lane + static_cast<int32_t>(j);
      const VecI hidden = (key >= static_cast<int32_t>(begin)) & (key < static_cast<int32_t>(end));
      store(x + j, hidden ? VecF{} : load(x + j));
    }
  };
  zero(0, visible.begin);
  zero(visible.end, kBackwardKeys);
}

// p and ds of one row against the keys [0, kBackwardKeys) of a block, of which it sees `visible`.
FM_INLINE void weights_of_row(float* p, float* ds, Range visible, float lse_high, float lse_low, float delta) {
  const int begin = static_cast<int>(visible.begin / kLanes * kLanes), end = static_cast<int>(visible.end);
#pragma GCC unroll 2
  for (int j = begin; j < end; j += kLanes) {
    const VecF exponent = load(p + j) - lse_high - lse_low;
    const VecF weight = exp2_nonpositive(exponent > VecF{} ? VecF{} : exponent);  // above 0 by rounding alone
    store(p + j, weight);
    store(ds + j, weight * (load(ds + j) - delta));
  }
  zero_around(p, visible);
  zero_around(ds, visible);
}

// One tile of rows against one block of keys.
template <class T>
void run_backward_tile(const AttentionBackwardParams& b, const Sequence& s, int64_t first_row, int64_t tile,
                       int64_t block, int num_keys, bool keys_finite, const Dropout& dropout,
                       const BackwardShape& shape, const BackwardScratch& scratch) {
  const AttentionForwardParams& p = b.forward;
  Range visible[kBackwardRows], strips[kBackwardRows / kStrip];
  KeyBits seen[kBackwardRows];
  for (int r = 0; r < kBackwardRows; ++r) visible[r] = within_block(scratch.visible[tile + r], block, num_keys);
  const bool has_holes =
      narrow_to_mask(p, s, p.block_mask.columns, first_row + tile, block, kBackwardRows, visible, seen);
  for (int r = 0; r < kBackwardRows; r += kStrip) strips[r / kStrip] = hull(visible + r, kStrip);
  const Range all = hull(strips, kBackwardRows / kStrip);
  if (all.begin >= all.end) return;

  BiasRows<kBackwardRows> bias(p, s, first_row + tile, block);
  float* d_bias[kBackwardRows];
  for (int r = 0; b.d_bias != nullptr && r < kBackwardRows; ++r) {
    d_bias[r] = b.d_bias + s.batch * b.d_bias_stride[0] + s.head(first_row + tile + r) * b.d_bias_stride[1] +
                s.query(first_row + tile + r) * b.d_bias_stride[2] + block * b.d_bias_stride[3];
  }

  for (int64_t key = all.begin / kPanel * kPanel; key < all.end; key += kPanel) {
    for (int strip = 0; strip < kBackwardRows / kStrip; ++strip) {
      if (strips[strip].begin >= key + kPanel || strips[strip].end <= key) continue;
      bias.prefetch(strip * kStrip, kStrip, key);
      for (int r = strip * kStrip; b.d_bias != nullptr && r < (strip + 1) * kStrip; ++r) {
        __builtin_prefetch(d_bias[r] + key * b.d_bias_stride[3], 1, 2);
      }
      const int64_t row = tile + strip * kStrip, at = strip * kStrip * kBlockK + key;
      score_tile<false>(scratch.q + row * p.head_dim, scratch.k + key * p.head_dim, p.head_dim, scratch.p + at);
      score_tile<false>(scratch.d_o + row * p.v_head_dim, scratch.v + key * p.v_head_dim, p.v_head_dim,
                        scratch.ds + at);
    }
  }
  for (int r = 0; r < kBackwardRows; ++r) {
    float *weights = scratch.p + r * kBlockK, *gradients = scratch.ds + r * kBlockK;
    const int count = static_cast<int>(visible[r].end - visible[r].begin);
    if (count > 0 && p.softcap != 0.0f) {
      for (int64_t j = visible[r].begin / kLanes * kLanes; j < visible[r].end; j += kLanes) {
        const VecF t = tanh(load(weights + j));
        store(scratch.slope + r * kBlockK + j, 1.0f - t * t);
      }
      if (has_holes) hide(scratch.slope + r * kBlockK, seen[r], visible[r], 0.0f);
    }
    if (count > 0 && has_modifiers(p)) {
      apply_modifiers(p, s, first_row + tile + r, block + visible[r].begin, count, weights + visible[r].begin);
    }
    DropoutBits is_kept[kBackwardKeys / kDropoutStep];
    if (dropout.is_on()) {
      dropout.for_each_step(p, s, first_row + tile + r, block, visible[r], [&](int64_t j, DropoutBits bits) {
        is_kept[j / kDropoutStep] = bits;
        mask(gradients + j, bits);
      });
    }
    weights_of_row(weights, gradients, visible[r], scratch.lse_high[tile + r], scratch.lse_low[tile + r],
                   scratch.delta[tile + r]);
    if (dropout.is_on()) {
      for (int64_t i = visible[r].begin / kDropoutStep; i * kDropoutStep < visible[r].end; ++i) {
        mask(weights + i * kDropoutStep, is_kept[i]);
      }
    }
    if (has_holes) {
      hide(weights, seen[r], visible[r], 0.0f);
      hide(gradients, seen[r], visible[r], 0.0f);
    }
    if (count > 0 && b.d_bias != nullptr) {
      if (b.d_bias_stride[3] == 0) {
        VecF sum{};  // hidden pairs are zeros
        for (int j = 0; j < kBackwardKeys; j += kLanes) sum += load(gradients + j);
        *d_bias[r] += horizontal_sum(sum);
      } else {
        for (int64_t j = visible[r].begin; j < visible[r].end; ++j) d_bias[r][j * b.d_bias_stride[3]] += gradients[j];
      }
    }
    if (count > 0 && p.softcap != 0.0f) {
      for (int64_t j = visible[r].begin; j < visible[r].end; ++j) gradients[j] *= scratch.slope[r * kBlockK + j];
    }
  }

  // dq += ds k
  for (int r = 0; r < kBackwardRows; r += kStrip) {
    const Range range = strips[r / kStrip];
    for (int64_t c = 0; range.begin < range.end && c < shape.columns; c += kPanel) {
      const float* keys = scratch.k_rows + c * kBlockK;
      float* dq = scratch.dq + (tile + r) * shape.columns + c;
      if (keys_finite) {
        add_product<kStrip, false>(scratch.ds + r * kBlockK, keys, range, dq, shape.columns);
        continue;
      }
      for (int i = 0; i < kStrip; ++i) {
        auto add = [&](auto seen_key) {
          add_product<1, false>(scratch.ds + (r + i) * kBlockK, keys, visible[r + i], dq + i * shape.columns, 0,
                                seen_key);
        };
        if (has_holes) add(seen[r + i]);
        else add(Everything{});
      }
    }
  }
  // dk += ds^T q, dv += p^T do. Without a block mask the rows that see a key follow each other.
  auto rows_that_see = [&](Range keys) {
    Range rows{kBackwardRows, 0};
    for (int r = 0; r < kBackwardRows; ++r) {
      if (visible[r].begin < keys.end && keys.begin < visible[r].end) rows = {min(rows.begin, r), r + 1};
    }
    return rows;
  };
  const bool rows_finite = scratch.finite[tile / kBackwardRows];
  const float *q = scratch.q_rows + tile * shape.columns, *d_o = scratch.d_o_rows + tile * shape.v_columns;
  for (int64_t key = all.begin / kStrip * kStrip; key < all.end; key += kStrip) {
    const Range rows = rows_that_see({key, key + kStrip});
    if (rows.begin >= rows.end) continue;
    auto add = [&](const float* weights, const float* packed, float* acc, int64_t columns) {
      for (int64_t c = 0; c < columns; c += kPanel) {
        const float* panel = packed + c * kBackwardRows;
        float* out = acc + (block + key) * columns + c;
        if (rows_finite) {
          add_product<kStrip, true>(weights + key, panel, rows, out, columns);
          continue;
        }
        for (int i = 0; i < kStrip; ++i) {
          auto add_row = [&](auto seen_by) {
            add_product<1, true>(weights + key + i, panel, rows_that_see({key + i, key + i + 1}), out + i * columns, 0,
                                 seen_by);
          };
          if (p.block_mask.block != 0) add_row([&](int64_t r) { return seen[r](key + i); });
          else add_row(Everything{});
        }
      }
    };
    add(scratch.ds, q, scratch.dk, shape.columns);
    add(scratch.p, d_o, scratch.dv, shape.v_columns);
  }
}

template <class T>
void run_head(const AttentionBackwardParams& b, const Sequence& s, const BackwardShape& shape,
              const BackwardScratch& scratch, double* d_sinks) {
  const AttentionForwardParams& p = b.forward;
  const Dropout dropout(p);
  const int64_t padded_keys = round_up(s.seq_k, kBackwardKeys);
  memset(scratch.dk, 0, static_cast<size_t>(padded_keys * shape.columns) * sizeof(float));
  memset(scratch.dv, 0, static_cast<size_t>(padded_keys * shape.v_columns) * sizeof(float));
  for (int64_t begin = 0; begin < s.num_rows; begin += shape.chunk_rows) {
    const int64_t end = min(begin + shape.chunk_rows, s.num_rows);
    pack_chunk<T>(b, s, begin, end, shape, scratch, d_sinks);
    const Range all = hull(scratch.visible, end - begin);
    for (int64_t block = all.begin / kBackwardKeys * kBackwardKeys; block < all.end; block += kBackwardKeys) {
      const int num_keys = static_cast<int>(min(s.seq_k - block, kBackwardKeys));
      auto listed_from = [&](int64_t row) { return next_listed_row(p, s, row, {block, block + num_keys}); };
      int64_t row = listed_from(begin);
      if (row >= end) continue;
      const T* k = token<T>(p.k, s, s.k_start, block, s.kv_head);
      pack_keys(k, p.k.token_stride, num_keys, p.head_dim, scratch.k);
      pack_keys(token<T>(p.v, s, s.k_start, block, s.kv_head), p.v.token_stride, num_keys, p.v_head_dim, scratch.v);
      const bool keys_finite = pack_values(k, p.k.token_stride, num_keys, p.head_dim, scratch.k_rows);
      while (row < end) {
        const int64_t tile = (row - begin) / kBackwardRows * kBackwardRows;
        run_backward_tile<T>(b, s, begin, tile, block, num_keys, keys_finite, dropout, shape, scratch);
        row = listed_from(begin + tile + kBackwardRows);
      }
    }
    for (int64_t row = begin; row < end; ++row) {
      T* dq = const_cast<T*>(token<T>(b.d_q, s, s.q_start, s.query(row), s.head(row)));
      const float* acc = scratch.dq + (row - begin) * shape.columns;
      for (int64_t c = 0; c < p.head_dim; c += kLanes) store(dq + c, load(acc + c) * p.softmax_scale);
    }
  }
  for (int64_t key = 0; key < s.seq_k; ++key) {
    T* dk = const_cast<T*>(token<T>(b.d_k, s, s.k_start, key, s.kv_head));
    T* dv = const_cast<T*>(token<T>(b.d_v, s, s.k_start, key, s.kv_head));
    const float *acc_k = scratch.dk + key * shape.columns, *acc_v = scratch.dv + key * shape.v_columns;
    for (int64_t c = 0; c < p.head_dim; c += kLanes) store(dk + c, load(acc_k + c) * p.softmax_scale);
    for (int64_t c = 0; c < p.v_head_dim; c += kLanes) store(dv + c, load(acc_v + c));
  }
}

template <class T>
void run_backward(const AttentionBackwardParams& b) {
  const AttentionForwardParams& p = b.forward;
  int64_t most_rows = 0, most_keys = 0, pairs = 0;
  for (int64_t i = 0; i < p.batch; ++i) {
    const Sequence s = sequence_of(p, i, 0);
    most_rows = max(most_rows, s.num_rows);
    most_keys = max(most_keys, s.seq_k);
    pairs += s.num_rows * s.seq_k;
  }
  BackwardShape shape{kBackwardRows,    round_up(most_keys, kBackwardKeys), p.head_dim,
                      p.v_head_dim,     round_up(p.head_dim, kPanel),       round_up(p.v_head_dim, kPanel),
                      p.softcap != 0.0f};
  const int64_t affordable = kChunkBytes / BackwardScratch::bytes_a_row(shape) / kBackwardRows * kBackwardRows;
  shape.chunk_rows = max(kBackwardRows, min(affordable, round_up(most_rows, kBackwardRows)));

  // A bias that heads or sequences share is summed by one worker, in their order.
  const int workers = b.d_bias_is_shared ? 1 : workers_for(5 * pairs * p.kv_heads * (p.head_dim + p.v_head_dim));
  const int64_t scratch_bytes = BackwardScratch::num_bytes(shape);
  const Workspace workspace(workers * scratch_bytes);
  std::vector<double> d_sinks(b.d_sinks == nullptr ? 0
                                                   : p.batch * p.heads);  // [batch, heads]; sums of one number a row
  parallel_for(p.batch * p.kv_heads, workers, [&](int64_t task, int worker) {
    const Sequence s = sequence_of(p, task / p.kv_heads, task % p.kv_heads);
    run_head<T>(b, s, shape, BackwardScratch::in(Arena(workspace.data() + worker * scratch_bytes), shape),
                d_sinks.empty() ? nullptr : d_sinks.data() + s.batch * p.heads);
  });
  for (int64_t head = 0; !d_sinks.empty() && head < p.heads; ++head) {
    double sum = 0.0;
    for (int64_t i = 0; i < p.batch; ++i) sum += d_sinks[i * p.heads + head];
    b.d_sinks[head] = static_cast<float>(sum);
  }
}

}  // namespace

template <>
void run_attention_backward<kIsa>(const AttentionBackwardParams& b) {
  dispatch_dtype(b.forward.dtype, [&]<class T>() { run_backward<T>(b); });
}

}  // namespace fmkernels
