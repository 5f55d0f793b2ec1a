// SPDX-License-Identifier: Apache-2.0
// The tiled path of paged_kv_attend_cpu.cpp: keys and values packed out of their pages, products by the register tile of
// attention. Internal linkage, as in common/vec.h.
#pragma once

#include "paged_kv_rows_cpu.h"

namespace fmkernels {
namespace {

// The columns of a row lane by lane, as the direct path sums them: column step * kLanes + lane stands at step of segment
// `place`, where the segments lie in the order in which join_lanes joins their sums pairwise.
constexpr int lane_at(int place) { return kLanes == 8 ? (place & 4) | (place & 1) << 1 | (place >> 1 & 1) : place; }
constexpr int place_of(int lane) { return lane_at(lane); }  // its own inverse

// Floats of a segment of a packed strip: what pack_query writes too much stays within it.
constexpr int64_t strip_segment(int64_t head_dim) { return head_dim / kLanes * kStrip + kLanes; }
constexpr int64_t strip_floats(int64_t head_dim) { return kLanes * strip_segment(head_dim); }

// ---- packing -------------------------------------------------------------------------------------------------------

// out[place_of(c) * segment + lane] = rows[lane][c], for a square of kLanes columns.
FM_INLINE void transpose_to_segments(const VecF* rows, float* out, int64_t segment) {
  float square[kLanes * kLanes];
  transpose_to(rows, square, kLanes);
#pragma GCC unroll 8
  for (int c = 0; c < kLanes; ++c) store(out + place_of(c) * segment, load(square + c * kLanes));
}

// The keys from number `begin` of a block on to packed[panel][segment][step][kPanel]; the others of its panels as zeros.
template <class T>
void pack_paged_keys(const T* data, const BlockSlots& slots, int begin, int64_t head_dim, float* packed) {
  const int64_t segment = head_dim / kLanes * kPanel;
  for (int panel = 0; panel < slots.count; panel += kPanel) {
    float* out = packed + panel * head_dim;
    for (int half = 0; half < kPanel; half += kLanes) {
      for (int64_t c = 0; c < head_dim; c += kLanes) {
        VecF rows[kLanes];
#pragma GCC unroll 8
        for (int i = 0; i < kLanes; ++i) {
          const int key = panel + half + i;
          rows[i] = key >= begin && key < slots.count ? load(data + slots.k[key] + c) : VecF{};
        }
        transpose_to_segments(rows, out + c / kLanes * kPanel + half, segment);
      }
    }
  }
}

// The values from number `begin` of a block on to packed[panel][key][kPanel] with kBlockK keys a panel; columns past
// v_head_dim as zeros. Returns whether all of them are finite.
template <class T>
bool pack_paged_values(const T* data, const BlockSlots& slots, int begin, int64_t v_head_dim, float* packed) {
  VecF zero{};  // becomes NaN with the first value that is not finite
  for (int key = begin; key < slots.count; ++key) {
    const T* row = data + slots.v[key];
    for (int64_t c = 0; c < v_head_dim; c += kPanel) {
      const VecF left = load(row + c), right = c + kPanel <= v_head_dim ? load(row + c + kLanes) : VecF{};
      float* out = packed + c * kBlockK + key * kPanel;
      zero += (left * 0.0f) + (right * 0.0f);
      store(out, left);
      store(out + kLanes, right);
    }
  }
  return horizontal_sum(zero) == 0.0f;
}

// The rows [row, row + kStrip) of queries, scaled, to packed[segment][step][kStrip]; rows from `end` on are zeros. `buffer`
// holds kStrip rows.
void pack_query(const Attend& x, const Sequence& s, int64_t row, int64_t end, float scale, float* buffer,
                float* packed) {
  const int64_t head_dim = x.a.head_dim;
  for (int64_t r = 0; r < kStrip && row + r < end; ++r) load_query(x, s, row + r, scale, buffer + r * head_dim);
  constexpr int kLast = (kStrip - 1) / kLanes * kLanes;
  for (int64_t c = 0; c < head_dim; c += kLanes) {
    for (int first = kLast; first >= 0; first -= kLanes) {  // so that what a vector holds too much is overwritten
      VecF lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        lanes[i] = first + i < kStrip && row + first + i < end ? load(buffer + (first + i) * head_dim + c) : VecF{};
      }
      transpose_to_segments(lanes, packed + c / kLanes * kStrip + first, strip_segment(head_dim));
    }
  }
}

// ---- register tile -------------------------------------------------------------------------------------------------

// scores[r][0, kPanel) = <q[r], keys[.]> for kStrip rows; score rows are kBlockK apart. Each segment has its own sum, and
// the sums are joined pairwise: the additions of direct_scores, one by one.
__attribute__((noinline)) void ordered_score_tile(const float* q, const float* keys, int64_t head_dim, float* scores) {
  constexpr int kLevels = kLanes == 8 ? 3 : 2;
  static_assert(1 << kLevels == kLanes);
  VecF joined[kLevels][kStrip][2];  // of 1, 2 and 4 segments, as a binary counter
  const int64_t num_steps = head_dim / kLanes;
#pragma GCC unroll 8
  for (int place = 0; place < kLanes; ++place) {
    VecF acc[kStrip][2] = {};
    const float* columns = q + place * strip_segment(head_dim);
    const float* panel = keys + place * num_steps * kPanel;
#pragma GCC unroll 1
    for (int64_t step = 0; step < num_steps; ++step) {
      const VecF k0 = load(panel + step * kPanel), k1 = load(panel + step * kPanel + kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kStrip; ++r) {
        const VecF x = broadcast(columns[step * kStrip + r]);
        acc[r][0] += x * k0;
        acc[r][1] += x * k1;
      }
    }
    int level = 0;
    for (; place >> level & 1; ++level) {
      for (int r = 0; r < kStrip; ++r) {
        acc[r][0] = joined[level][r][0] + acc[r][0];
        acc[r][1] = joined[level][r][1] + acc[r][1];
      }
    }
    for (int r = 0; r < kStrip; ++r) {
      if (level < kLevels) {
        joined[level][r][0] = acc[r][0];
        joined[level][r][1] = acc[r][1];
      } else {
        store(scores + r * kBlockK, acc[r][0]);
        store(scores + r * kBlockK + kLanes, acc[r][1]);
      }
    }
  }
}

// ---- the tiled path ------------------------------------------------------------------------------------------------

struct PagedTileShape {
  int64_t tile_rows, head_dim, columns, num_slots;  // columns: v_head_dim rounded up to kPanel
};

// A packed block of keys and values of a worker.
struct PackedBlock {
  int64_t owner;  // a number that names (request, kv head, block); -1: empty
  bool values_finite;
};

// Scratch of one worker. The tiles of one kv head follow each other, so a worker finds most of the blocks that it needs
// packed by its previous tile.
struct PagedTileScratch {
  float *q, *rows;         // [row / kStrip][strip_floats]; [kStrip][head_dim]
  float *acc, *total;      // [row][columns]: of the chunk, of all chunks before
  RowStates state, whole;  // [row]: likewise
  Range* visible;          // [row], keys of the request
  float* scores;           // [kGroupRows][kBlockK]
  PackedBlock* blocks;     // [num_slots]
  float* keys;             // [num_slots][kBlockK / kPanel][segment][step][kPanel]
  float* values;           // [num_slots][columns / kPanel][kBlockK][kPanel]
  float* scales;           // [2][kBlockK]

  PagedTileScratch(Arena arena, const PagedTileShape& shape)
      : q(arena.take<float>(shape.tile_rows / kStrip * strip_floats(shape.head_dim))),
        rows(arena.take<float>(kStrip * shape.head_dim)),
        acc(arena.take<float>(shape.tile_rows * shape.columns)),
        total(arena.take<float>(shape.tile_rows * shape.columns)),
        state{arena.take<float>(shape.tile_rows), arena.take<float>(shape.tile_rows)},
        whole{arena.take<float>(shape.tile_rows), arena.take<float>(shape.tile_rows)},
        visible(arena.take<Range>(shape.tile_rows)),
        scores(arena.take<float>(kGroupRows * kBlockK)),
        blocks(arena.take<PackedBlock>(shape.num_slots)),
        keys(arena.take<float>(shape.num_slots * kBlockK * shape.head_dim)),
        values(arena.take<float>(shape.num_slots * kBlockK * shape.columns)),
        scales(arena.take<float>(2 * kBlockK)) {}

  static int64_t num_bytes(const PagedTileShape& shape) {
    auto floats = [](int64_t count) { return Arena::array_bytes<float>(count); };
    return floats(shape.tile_rows / kStrip * strip_floats(shape.head_dim)) + floats(kStrip * shape.head_dim) +
           2 * floats(shape.tile_rows * shape.columns) + 4 * floats(shape.tile_rows) +
           Arena::array_bytes<Range>(shape.tile_rows) + floats(kGroupRows * kBlockK) +
           Arena::array_bytes<PackedBlock>(shape.num_slots) + floats(shape.num_slots * kBlockK * shape.head_dim) +
           floats(shape.num_slots * kBlockK * shape.columns) + floats(2 * kBlockK);
  }
};

// Scores, weights and values of the rows [group, group + kGroupRows) of a tile for one packed block.
void run_group(const Attend& x, const Sequence& s, int64_t row_begin, int64_t group, const BlockSlots& slots,
               const PackedBlock& packed, const float* keys, const float* values, const PagedTileScratch& scratch,
               int64_t columns) {
  const int64_t head_dim = x.a.head_dim, block = slots.begin;
  Range visible[kGroupRows], strip_range[kGroupStrips];
  KeyBits seen[kGroupRows];
  for (int r = 0; r < kGroupRows; ++r) visible[r] = within_block(scratch.visible[group + r], block, slots.count);
  const bool has_holes = narrow_to_tree(x, s, row_begin + group, block, kGroupRows, visible, seen);
  for (int strip = 0; strip < kGroupStrips; ++strip) strip_range[strip] = hull(visible + strip * kStrip, kStrip);
  const Range group_range = hull(strip_range, kGroupStrips);
  if (group_range.begin >= group_range.end) return;

  // Scores, panel by panel so that a panel of keys serves every strip from the first-level cache.
  for (int64_t key = group_range.begin / kPanel * kPanel; key < group_range.end; key += kPanel) {
    for (int strip = 0; strip < kGroupStrips; ++strip) {
      if (strip_range[strip].begin >= key + kPanel || strip_range[strip].end <= key) continue;
      ordered_score_tile(scratch.q + (group / kStrip + strip) * strip_floats(head_dim), keys + key * head_dim, head_dim,
                         scratch.scores + strip * kStrip * kBlockK + key);
    }
  }

  // Weights.
  const bool has_k_scales = x.p.cache.k_scale.per_token, has_v_scales = x.p.cache.v_scale.per_token;
  const float *k_scales = scratch.scales, *v_scales = scratch.scales + kBlockK;
  for (int r = 0; is_modified(x) && r < kGroupRows; ++r) {
    finish_scores(x, s, row_begin + group + r, block, visible[r], has_k_scales ? k_scales : nullptr,
                  scratch.scores + r * kBlockK);
  }
  for (int r = 0; has_holes && r < kGroupRows; ++r) {
    hide(scratch.scores + r * kBlockK, seen[r], visible[r], -kInfinity);
  }
  float alpha[kGroupRows];
  for (int r = 0; r < kGroupRows; r += kLanes) {
    weigh(scratch.scores + r * kBlockK, visible + r, scratch.state.from(group + r), alpha + r);
  }
  for (int r = 0; has_v_scales && r < kGroupRows; ++r) {
    float* weights = scratch.scores + r * kBlockK;
    const int count = static_cast<int>(visible[r].end - visible[r].begin);
    scale_by(weights + visible[r].begin, v_scales + visible[r].begin, count);
    if (has_holes) hide(weights, seen[r], visible[r], 0.0f);  // the scale of a hidden key may be NaN
  }

  // Values.
  for (int strip = 0; strip < kGroupStrips; ++strip) {
    if (strip_range[strip].begin >= strip_range[strip].end) continue;
    const int r = strip * kStrip;
    accumulate_strip(scratch.scores + r * kBlockK, visible + r, has_holes ? seen + r : nullptr, alpha + r, values,
                     packed.values_finite, scratch.acc + (group + r) * columns, columns);
  }
}

// Asks memory for a share of the keys and values of a block, the share `part` of `num_parts`.
template <class T>
void prefetch_block(const Attend& x, int64_t kv_head, const BlockSlots& slots, int part, int num_parts) {
  const PagesView &k = x.p.cache.k, &v = x.p.cache.v;
  for (int j = slots.count * part / num_parts; j < slots.count * (part + 1) / num_parts; ++j) {
    prefetch_rows(static_cast<const T*>(k.data) + kv_head * k.head_stride + slots.k[j], 0, 0, 1, x.a.head_dim);
    prefetch_rows(static_cast<const T*>(v.data) + kv_head * v.head_stride + slots.v[j], 0, 0, 1, x.a.v_head_dim);
  }
}

// The rows [row_begin, row_end) of one (request, kv head).
template <class T>
void run_paged_tile(const Attend& x, const Sequence& s, int64_t row_begin, int64_t row_end,
                    const PagedTileScratch& scratch, const PagedTileShape& shape) {
  const PagedCache& cache = x.p.cache;
  const int num_rows = static_cast<int>(row_end - row_begin);
  const int64_t padded_rows = round_up(num_rows, kGroupRows), columns = shape.columns;
  const float scale = query_scale(x.a) * head_scale(cache.k_scale, s.kv_head);
  for (int64_t row = 0; row < padded_rows; ++row) {
    scratch.visible[row] = row < num_rows ? visible_keys(x.a, s, row_begin + row) : Range{0, 0};
    scratch.whole.set(row, {-kInfinity, 0.0f});
  }
  for (int64_t strip = 0; strip < padded_rows; strip += kStrip) {
    pack_query(x, s, row_begin + strip, row_end, scale, scratch.rows,
               scratch.q + strip / kStrip * strip_floats(shape.head_dim));
  }
  const size_t acc_bytes = static_cast<size_t>(padded_rows * columns) * sizeof(float);
  memset(scratch.total, 0, acc_bytes);

  const Range all = hull(scratch.visible, num_rows);
  BlockSlots slots[2];
  int turn = 0;
  find_slots(x, s.batch, all.begin / kBlockK * kBlockK, s.seq_k, slots[0]);
  for (int64_t block = all.begin / kBlockK * kBlockK; block < all.end; block += kBlockK, turn ^= 1) {
    if (block % kChunkTokens == 0 || block <= all.begin) {  // a chunk begins
      memset(scratch.acc, 0, acc_bytes);
      for (int64_t row = 0; row < padded_rows; ++row) scratch.state.set(row, {-kInfinity, 0.0f});
    }
    const BlockSlots& here = slots[turn];
    BlockSlots& next = slots[turn ^ 1];
    find_slots(x, s.batch, block + kBlockK, block + kBlockK < all.end ? s.seq_k : 0, next);
    const int64_t block_index = block / kBlockK, slot = block_index % shape.num_slots;
    PackedBlock& packed = scratch.blocks[slot];
    float* keys = scratch.keys + slot * kBlockK * shape.head_dim;
    float* values = scratch.values + slot * kBlockK * columns;
    const int begin = static_cast<int>(max(0, all.begin - block));  // pages that no row sees may be gone
    const int64_t num_blocks = x.p.max_pages * cache.page_size / kBlockK + 1;
    const int64_t owner = ((s.batch * cache.kv_heads + s.kv_head) * num_blocks + block_index) * kBlockK + begin;
    const bool is_packed = packed.owner == owner;
    if (!is_packed) {
      pack_paged_keys(static_cast<const T*>(cache.k.data) + s.kv_head * cache.k.head_stride, here, begin,
                      shape.head_dim, keys);
      const bool finite = pack_paged_values(static_cast<const T*>(cache.v.data) + s.kv_head * cache.v.head_stride, here,
                                            begin, x.a.v_head_dim, values);
      packed = {owner, finite};
    }
    if (cache.k_scale.per_token) find_scales(x, s.batch, s.kv_head, here, begin, cache.k_scale, scratch.scales);
    if (cache.v_scale.per_token)
      find_scales(x, s.batch, s.kv_head, here, begin, cache.v_scale, scratch.scales + kBlockK);
    // The next block comes from memory while this one is multiplied, an equal share with every group of rows.
    const int num_groups = static_cast<int>(padded_rows / kGroupRows);
    for (int group = 0; group < num_groups; ++group) {
      if (!is_packed) prefetch_block<T>(x, s.kv_head, next, group, num_groups);
      run_group(x, s, row_begin, group * kGroupRows, here, packed, keys, values, scratch, columns);
    }
    if ((block + kBlockK) % kChunkTokens == 0 || block + kBlockK >= all.end) {  // the chunk ends
      for (int64_t row = 0; row < num_rows; ++row) {
        merge_chunk(scratch.whole, scratch.state, row, scratch.total + row * columns, scratch.acc + row * columns,
                    x.a.v_head_dim);
      }
    }
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    write_row(x, s, row_begin + row, scratch.whole[row], scratch.total + row * columns);
  }
}

}  // namespace
}  // namespace fmkernels
