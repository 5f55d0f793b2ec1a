// SPDX-License-Identifier: Apache-2.0
// The block mask on the CPU: which blocks of keys a tile of rows visits, which rows a block of keys visits, and the bits
// of what a row sees. Internal linkage, as in common/vec.h.
#pragma once

#include "attention_rows_cpu.h"

namespace fmkernels {
namespace {

constexpr int kMaskKeys = 128;  // keys of a KeyBits

// ---- lines ---------------------------------------------------------------------------------------------------------

int32_t tile_of(const BlockList& list, const int32_t* line, int64_t index) {
  const int32_t place = find_from(list, line[0], line[1], index);
  return place < line[1] && list.indices[place] == index ? list.tile_idx[place] : kHidden;
}

// The first row of the head of `row` whose query is `query` or later, past its last row where there is none.
int64_t row_of(const Sequence& s, int64_t row, int64_t query) {
  return s.head_major ? row - s.query(row) + min(query, s.seq_q) : query * s.group;
}

// The first multiple of kMaskKeys from the multiple `key` on where a row of [begin, end) lists a block of the next
// kMaskKeys keys; past all keys where there is none. `key` itself without a block mask.
int64_t next_listed_key(const AttentionForwardParams& p, const Sequence& s, int64_t begin, int64_t end, int64_t key) {
  const BlockMaskView& m = p.block_mask;
  if (m.block == 0) return key;
  int64_t nearest = round_up(s.seq_k, kMaskKeys);
  for (int64_t row = begin; row < end;) {
    const int64_t line = s.query(row) / m.block;
    const int32_t* offsets = lines_of(m, m.rows, s.batch, s.head(row)) + line;
    const int32_t place = find_from(m.rows, offsets[0], offsets[1], key / m.block);
    if (place < offsets[1]) nearest = min(nearest, m.rows.indices[place] * m.block / kMaskKeys * kMaskKeys);
    row = row_of(s, row, (line + 1) * m.block);
  }
  return nearest;
}

// The first row from `row` on whose query block is listed for one of the keys; s.num_rows where there is none. `row`
// itself without a block mask.
inline int64_t next_listed_row(const AttentionForwardParams& p, const Sequence& s, int64_t row, Range keys) {
  const BlockMaskView& m = p.block_mask;
  if (m.block == 0) return row;
  while (row < s.num_rows) {  // head by head
    const int32_t* offsets = lines_of(m, m.columns, s.batch, s.head(row));
    int64_t nearest = m.rows.num_lines;
    for (int64_t line = keys.begin / m.block; line * m.block < keys.end; ++line) {
      const int32_t place = find_from(m.columns, offsets[line], offsets[line + 1], s.query(row) / m.block);
      if (place < offsets[line + 1]) nearest = min(nearest, m.columns.indices[place]);
    }
    if (nearest < m.rows.num_lines) return max(row, row_of(s, row, nearest * m.block));
    row = row_of(s, row, s.seq_q);
  }
  return s.num_rows;
}

// ---- bits ----------------------------------------------------------------------------------------------------------

// Which of kMaskKeys keys a row sees.
struct KeyBits {
  uint32_t words[kMaskKeys / 32];

  bool operator()(int64_t key) const { return words[key / 32] >> key % 32 & 1; }
};

// Of the keys [32 word, 32 word + 32), those in the range.
FM_INLINE uint32_t bits_in(Range range, int word) {
  const int64_t begin = max(range.begin - 32 * word, 0), end = min(range.end - 32 * word, 32);
  return begin >= end ? 0 : ~0u >> (32 - (end - begin)) << begin;
}

// Narrows visible[0, count), ranges of the keys from `key` on, a multiple of 32, for the rows from `row` on, to the
// block mask, and tells in `bits` which keys of them are seen. Whether any row sees its range with holes: only then are
// the bits needed. `list` is the one to look blocks up in: rows or columns.
bool narrow_to_mask(const AttentionForwardParams& p, const Sequence& s, const BlockList& list, int64_t row, int64_t key,
                    int count, Range* visible, KeyBits* bits) {
  const BlockMaskView& m = p.block_mask;
  if (m.block == 0) return false;
  constexpr int kWords = kMaskKeys / 32;
  int32_t tile[kWords];    // of the line of the row
  int64_t line_end = row;  // the first row of the next line
  bool has_holes = false;
  for (int r = 0; r < count; ++r) {
    Range& range = visible[r];
    bits[r] = {};
    if (range.begin >= range.end) continue;  // rows that only pad see nothing
    const int64_t query = s.query(row + r), line = query / m.block;
    if (row + r >= line_end) {
      line_end = row_of(s, row + r, (line + 1) * m.block);
      const int32_t* offsets = lines_of(m, list, s.batch, s.head(row + r));
      for (int word = 0; word < kWords; ++word) {
        const int64_t column = (key + 32 * word) / m.block;
        tile[word] = column >= m.columns.num_lines ? kHidden
                     : &list == &m.rows            ? tile_of(list, offsets + line, column)
                                                   : tile_of(list, offsets + column, line);
      }
    }
    Range seen{kMaskKeys, 0};
    int num_seen = 0;
    for (int word = 0; word < kWords; ++word) {
      const uint32_t shown = word_of(m, tile[word], query, key + 32 * word);
      const uint32_t both = bits[r].words[word] = shown & bits_in(range, word);
      if (both == 0) continue;
      seen = {min(seen.begin, 32 * word + __builtin_ctz(both)), 32 * word + 32 - __builtin_clz(both)};
      num_seen += __builtin_popcount(both);
    }
    range = num_seen == 0 ? Range{0, 0} : seen;
    has_holes = has_holes || num_seen < range.end - range.begin;
  }
  return has_holes;
}

// x[key] = hidden for the keys of the range that are not seen.
FM_INLINE void hide(float* x, const KeyBits& seen, Range range, float hidden) {
  const VecI lane_bits = (VecI{} + 1) << lane_indices();
  for (int64_t j = range.begin / kLanes * kLanes; j < range.end; j += kLanes) {
    const VecI word = VecI{} + static_cast<int32_t>(seen.words[j / 32] >> j % 32);
    store(x + j, (word & lane_bits) != 0 ? load(x + j) : broadcast(hidden));
  }
}

// In the place of a KeyBits where there are no holes.
struct Everything {
  constexpr bool operator()(int64_t) const { return true; }
};

// ---- ranges --------------------------------------------------------------------------------------------------------

// The part of `keys` in the block [block, block + num_keys), relative to it; {0, 0} where there is none.
FM_INLINE Range within_block(Range keys, int64_t block, int num_keys) {
  const Range range{max(keys.begin - block, 0), min(keys.end - block, num_keys)};
  return range.begin < range.end ? range : Range{0, 0};
}

// The shortest range that holds all of them; {0, 0} where all are empty.
FM_INLINE Range hull(const Range* ranges, int64_t count) {
  Range all{INT64_MAX, 0};
  for (int64_t i = 0; i < count; ++i) {
    if (ranges[i].begin < ranges[i].end) all = {min(all.begin, ranges[i].begin), max(all.end, ranges[i].end)};
  }
  return all.end == 0 ? Range{0, 0} : all;
}

}  // namespace
}  // namespace fmkernels
