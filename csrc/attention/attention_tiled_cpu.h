// SPDX-License-Identifier: Apache-2.0
// The tiled path of attention_forward_cpu.cpp: keys and values packed, products by a register tile.
// Internal linkage, as in common/vec.h.
#pragma once

#include "../common/parallel.h"
#include "attention_dropout_cpu.h"
#include "attention_mask_cpu.h"

namespace fmkernels {
namespace {

constexpr int kStrip = 6;           // rows of a register tile: 12 accumulators, 2 column vectors, 1 broadcast of 16
constexpr int kPanel = 2 * kLanes;  // columns of a register tile
constexpr int kGroupStrips = 4;     // strips whose scores stay in the first-level cache together
constexpr int kGroupRows = kGroupStrips * kStrip;
constexpr int kBlockK = 128;      // keys packed at a time
constexpr int kLongestSum = 128;  // columns in one chain of additions; more are two sums, which round less
constexpr int kRowsAhead = 12;    // rows of q and o are asked for so many rows before their turn
static_assert(kBlockK == kMaskKeys);

// Rows of a tile: as many as keep q and o in 192 KiB, so that they stay in a second-level cache of 512 KiB beside a
// packed block and the next one on its way.
constexpr int64_t max_tile_rows(int64_t head_dim, int64_t v_head_dim) {
  return max(kGroupRows, 192 * 1024 / 4 / (head_dim + v_head_dim) / kGroupRows * kGroupRows);
}

// ---- packing -------------------------------------------------------------------------------------------------------

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
        transpose_to(rows, out + c * kPanel + half, kPanel);
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

// The rows of a strip, scaled, to packed[column][kStrip]; a null row is zeros. The last column's vector is longer than
// kStrip: it ends in what the caller writes next.
template <class T>
FM_INLINE void pack_strip(const T* const* rows, int64_t head_dim, float scale, float* packed) {
  constexpr int kLast = (kStrip - 1) / kLanes * kLanes;
  for (int64_t c = 0; c < head_dim; c += kLanes) {
    for (int first = kLast; first >= 0; first -= kLanes) {  // so that what a vector holds too much is overwritten
      VecF lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const T* row = first + i < kStrip ? rows[first + i] : nullptr;
        lanes[i] = row == nullptr ? VecF{} : load(row + c) * scale;
      }
      transpose_to(lanes, packed + c * kStrip + first, kStrip);
    }
  }
}

template <class T>
FM_INLINE void prefetch_rows(const T* rows, int64_t stride, int begin, int end, int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int row = begin; row < end; ++row) {
    for (int64_t c = 0; c < columns; c += kLine) __builtin_prefetch(rows + row * stride + c, 0, 2);
  }
}

// Asks for the row of q or o that is kRowsAhead rows after `row`, where it is before `end`.
template <class T>
FM_INLINE void prefetch_row_ahead(const TokenView& view, const Sequence& s, int64_t row, int64_t end, int64_t columns) {
  const int64_t next = row + kRowsAhead;
  if (next < end) prefetch_rows(token<T>(view, s, s.q_start, s.query(next), s.head(next)), 0, 0, 1, columns);
}

// ---- register tiles ------------------------------------------------------------------------------------------------

// scores[r][0, kPanel) = sum over c of q[c][r] * keys[c][.], for kStrip rows; score rows are kBlockK apart. With kAdd
// the sum is added to what is there.
template <bool kAdd>
__attribute__((noinline)) void score_tile(const float* q, const float* keys, int64_t num_columns, float* scores) {
  VecF acc[kStrip][2] = {};
#pragma GCC unroll 4
  for (int64_t c = 0; c < num_columns; ++c) {
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
    float* row = scores + r * kBlockK;
    store(row, kAdd ? load(row) + acc[r][0] : acc[r][0]);
    store(row + kLanes, kAdd ? load(row + kLanes) + acc[r][1] : acc[r][1]);
  }
}

// o[r][0, kPanel) = alpha[r] * o[r][.] + sum over seen j in [begin, end) of weights[r][j] * values[j][.], for kRows
// rows.
template <int kRows, class Seen = Everything>
FM_INLINE void value_tile(const float* weights, const float* values, int begin, int end, const float* alpha, float* o,
                          int64_t o_stride, Seen seen = {}) {
  VecF acc[kRows][2];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    acc[r][0] = load(o + r * o_stride) * alpha[r];
    acc[r][1] = load(o + r * o_stride + kLanes) * alpha[r];
  }
#pragma GCC unroll 4
  for (int j = begin; j < end; ++j) {
    if (!seen(j)) continue;
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
  RowStates state;  // [row]
  Range* visible;   // [row], keys of the sequence
  float* scores;    // [kGroupRows][kBlockK]
  Slot* slots;      // [num_slots]
  float* keys;      // [num_slots][kBlockK / kPanel][head_dim][kPanel]
  float* values;    // [num_slots][columns / kPanel][kBlockK][kPanel]

  TileScratch(Arena arena, const TileShape& shape)
      : q(arena.take<float>(q_floats(shape))),
        acc(arena.take<float>(shape.tile_rows * shape.columns)),
        state{arena.take<float>(shape.tile_rows), arena.take<float>(shape.tile_rows)},
        visible(arena.take<Range>(shape.tile_rows)),
        scores(arena.take<float>(kGroupRows * kBlockK)),
        slots(arena.take<Slot>(shape.num_slots)),
        keys(arena.take<float>(shape.num_slots * kBlockK * shape.head_dim)),
        values(arena.take<float>(shape.num_slots * kBlockK * shape.columns)) {}

  static int64_t q_floats(const TileShape& shape) {  // pack_strip writes up to a vector past the last strip
    return shape.tile_rows * shape.head_dim + kLanes;
  }
  static int64_t num_bytes(const TileShape& shape) {
    return Arena::array_bytes<float>(q_floats(shape)) + Arena::array_bytes<float>(shape.tile_rows * shape.columns) +
           2 * Arena::array_bytes<float>(shape.tile_rows) + Arena::array_bytes<Range>(shape.tile_rows) +
           Arena::array_bytes<float>(kGroupRows * kBlockK) + Arena::array_bytes<Slot>(shape.num_slots) +
           Arena::array_bytes<float>(shape.num_slots * kBlockK * shape.head_dim) +
           Arena::array_bytes<float>(shape.num_slots * kBlockK * shape.columns);
  }
};

// o = alpha * o + weights * values for the rows of one strip. The weights of a row lie in its visible range; `seen`, not
// null where it has holes, tells which.
void accumulate_strip(float* weights, const Range* visible, const KeyBits* seen, const float* alpha,
                      const float* values, bool values_finite, float* acc, int64_t columns) {
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
  } else if (seen != nullptr) {
    common = {kBlockK, kBlockK};  // all row by row
  }
  float factor[kStrip];  // of what the row has accumulated: alpha, and 1 once it was applied
  auto accumulate_row = [&](int r, int64_t begin, int64_t end) {
    if (begin >= end) return;
    for (int64_t c = 0; c < columns; c += kPanel) {
      auto add = [&](auto of_row) {
        value_tile<1>(weights + r * kBlockK, values + c * kBlockK, static_cast<int>(begin), static_cast<int>(end),
                      factor + r, acc + r * columns + c, columns, of_row);
      };
      if (seen == nullptr) add(Everything{});
      else add(seen[r]);
    }
    factor[r] = 1.0f;
  };
  // Keys are added in their order either way, so that a hidden value changes no bits.
  for (int r = 0; r < kStrip; ++r) {
    factor[r] = alpha[r];
    if (!values_finite) accumulate_row(r, visible[r].begin, min(visible[r].end, common.begin));
  }
  for (int64_t c = 0; c < columns; c += kPanel) {
    value_tile<kStrip>(weights, values + c * kBlockK, static_cast<int>(common.begin), static_cast<int>(common.end),
                       factor, acc + c, columns);
  }
  if (values_finite) return;
  for (int r = 0; r < kStrip; ++r) {
    factor[r] = 1.0f;
    accumulate_row(r, max(visible[r].begin, common.end), visible[r].end);
  }
}

template <class T>
void run_tile(const AttentionForwardParams& p, const Sequence& s, int64_t row_begin, int64_t row_end,
              const TileScratch& scratch, const TileShape& shape) {
  const int num_rows = static_cast<int>(row_end - row_begin);
  const int64_t padded_rows = round_up(num_rows, kGroupRows), columns = shape.columns;
  const bool modified = has_modifiers(p);
  const Dropout dropout(p);
  const int64_t first_sum = p.head_dim <= kLongestSum ? p.head_dim : p.head_dim / 2;

  // Query rows, scaled and interleaved by strip; the rows that pad the last group are zeros.
  const float scale = query_scale(p);
  for (int64_t strip = 0; strip < padded_rows; strip += kStrip) {
    const T* q[kStrip];
    for (int64_t i = 0; i < kStrip; ++i) {
      const int64_t row = row_begin + strip + i;
      q[i] = row < row_end ? token<T>(p.q, s, s.q_start, s.query(row), s.head(row)) : nullptr;
      prefetch_row_ahead<T>(p.q, s, row, row_end, p.head_dim);
      scratch.visible[strip + i] = row < row_end ? visible_keys(p, s, row) : Range{0, 0};
      scratch.state.set(strip + i, {-kInfinity, 0.0f});
    }
    pack_strip(q, p.head_dim, scale, scratch.q + strip * p.head_dim);
  }
  memset(scratch.acc, 0, static_cast<size_t>(padded_rows * columns) * sizeof(float));

  const Range all = hull(scratch.visible, num_rows);
  auto listed_from = [&](int64_t key) { return next_listed_key(p, s, row_begin, row_end, key); };
  for (int64_t block = listed_from(all.begin / kBlockK * kBlockK), next = 0; block < all.end; block = next) {
    next = listed_from(block + kBlockK);
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
    const int next_keys = is_packed ? 0 : static_cast<int>(max(0, min(all.end - next, kBlockK)));
    const T* next_k = token<T>(p.k, s, s.k_start, next, s.kv_head);
    const T* next_v = token<T>(p.v, s, s.k_start, next, s.kv_head);
    const int num_groups = static_cast<int>(ceil_div(num_rows, kGroupRows));

    for (int group = 0; group < num_rows; group += kGroupRows) {
      const int share = next_keys * (group / kGroupRows) / num_groups;
      const int share_end = next_keys * (group / kGroupRows + 1) / num_groups;
      prefetch_rows(next_k, p.k.token_stride, share, share_end, p.head_dim);
      prefetch_rows(next_v, p.v.token_stride, share, share_end, p.v_head_dim);

      Range visible[kGroupRows], strip_range[kGroupStrips];
      KeyBits seen[kGroupRows];
      for (int r = 0; r < kGroupRows; ++r) visible[r] = within_block(scratch.visible[group + r], block, num_keys);
      const bool has_holes =
          narrow_to_mask(p, s, p.block_mask.rows, row_begin + group, block, kGroupRows, visible, seen);
      for (int strip = 0; strip < kGroupStrips; ++strip) strip_range[strip] = hull(visible + strip * kStrip, kStrip);
      const Range group_range = hull(strip_range, kGroupStrips);
      if (group_range.begin >= group_range.end) continue;

      const BiasRows<kGroupRows> bias(p, s, row_begin + group, block);
      // Scores, panel by panel so that a panel of keys serves every strip from the first-level cache.
      for (int64_t key = group_range.begin / kPanel * kPanel; key < group_range.end; key += kPanel) {
        for (int strip = 0; strip < kGroupStrips; ++strip) {
          if (strip_range[strip].begin >= key + kPanel || strip_range[strip].end <= key) continue;
          bias.prefetch(strip * kStrip, kStrip, key);
          const float* q = scratch.q + (group + strip * kStrip) * p.head_dim;
          const float* panel = keys + key * p.head_dim;
          float* scores = scratch.scores + strip * kStrip * kBlockK + key;
          score_tile<false>(q, panel, first_sum, scores);
          if (first_sum == p.head_dim) continue;
          score_tile<true>(q + first_sum * kStrip, panel + first_sum * kPanel, p.head_dim - first_sum, scores);
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
      for (int r = 0; has_holes && r < kGroupRows; ++r) {
        hide(scratch.scores + r * kBlockK, seen[r], visible[r], -kInfinity);
      }
      float alpha[kGroupRows];
      for (int r = 0; r < kGroupRows; r += kLanes) {
        softmax_step<kBlockK>(scratch.scores + r * kBlockK, visible + r, scratch.state.from(group + r), alpha + r);
      }
      for (int r = 0; dropout.is_on() && r < kGroupRows; ++r) {
        dropout.drop(p, s, row_begin + group + r, block, visible[r], scratch.scores + r * kBlockK);
      }

      // Values.
      for (int strip = 0; strip < kGroupStrips; ++strip) {
        if (strip_range[strip].begin >= strip_range[strip].end) continue;
        const int r = strip * kStrip;
        accumulate_strip(scratch.scores + r * kBlockK, visible + r, has_holes ? seen + r : nullptr, alpha + r, values,
                         slot.values_finite, scratch.acc + (group + r) * columns, columns);
      }
    }
  }
  for (int r = 0; r < num_rows; ++r) {
    prefetch_row_ahead<T>(p.o, s, row_begin + r, row_end, p.v_head_dim);
    finish_row<T>(p, s, row_begin + r, scratch.state[r], scratch.acc + r * columns);
  }
}

}  // namespace
}  // namespace fmkernels
