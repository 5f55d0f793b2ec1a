// SPDX-License-Identifier: Apache-2.0
// The direct path of paged_kv_attend_cpu.cpp: a few rows against keys and values where they lie in their pages.
// Internal linkage, as in common/vec.h.
#pragma once

#include "paged_kv_rows_cpu.h"

namespace fmkernels {
namespace {

constexpr int kDirectRows = 8;               // the most rows of a kv head that go this way
constexpr int kStateRows = kDirectRows + 4;  // states of a partial: a step from row 4 on touches a whole vector

// Unfinished result of the rows of one (request, kv head) over one chunk of keys.
struct Partial {
  float* acc;       // [kDirectRows][v_head_dim]
  RowStates state;  // [kStateRows]
};

// Rows of keys or of values, and those that are asked of memory meanwhile: `ahead` has as many or more.
template <class T>
struct Rows {
  const T* data;
  const int64_t* offsets;
  const T* ahead_data;
  const int64_t* ahead_offsets;

  FM_INLINE const T* operator[](int j) const { return data + offsets[j]; }
  FM_INLINE void prefetch(int j, int64_t begin, int64_t end) const {
    const T* row = ahead_data + ahead_offsets[j];
    for (int64_t c = begin; c < end; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + c, 0, 2);
  }
};

// scores[r][j] = <q[r], keys[j]> for kRows rows and j in [begin, end); score rows are kBlockK apart. A lane sums every
// kLanes-th column, then join_lanes the lanes: the order that ordered_score_tile keeps to.
template <int kRows, class T>
void direct_scores(const float* q, const Rows<T>& keys, int begin, int end, int64_t head_dim, float* scores) {
  constexpr int kKeys = kRows == 1 ? 8 : kRows == 2 ? 4 : kRows == 3 ? 4 : 2;
  constexpr int kSums = (kRows * kKeys + kLanes - 1) / kLanes * kLanes;
  for (int j = begin; j < end; j += kKeys) {
    VecF acc[kSums] = {};
    const T* key[kKeys];
    for (int i = 0; i < kKeys; ++i) {
      const int at = j + i < end ? j + i : end - 1;  // the last one again, past the end
      key[i] = keys[at];
      keys.prefetch(at, 0, head_dim);
    }
    for (int64_t c = 0; c < head_dim; c += kLanes) {
#pragma GCC unroll 8
      for (int i = 0; i < kKeys; ++i) {
        const VecF k = load(key[i] + c);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[r * kKeys + i] += load(q + r * head_dim + c) * k;
      }
    }
    float sums[kSums];
#pragma GCC unroll 4
    for (int i = 0; i < kSums; i += kLanes) {
      store(sums + i, join_lanes(acc + i, [](VecF a, VecF b) { return a + b; }));
    }
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kKeys && j + i < end; ++i) scores[r * kBlockK + j + i] = sums[r * kKeys + i];
    }
  }
}

// acc[r][0, kVecs * kLanes) = alpha[r] * acc[r][.] + sum over j in [begin, end) of weights[r][j] * values[j][column + .].
template <int kRows, int kVecs, class T>
FM_INLINE void direct_value_tile(const float* weights, const Rows<T>& values, int64_t column, int begin, int end,
                                 const float* alpha, float* acc, int64_t acc_stride) {
  VecF sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVecs; ++i) sum[r][i] = load(acc + r * acc_stride + i * kLanes) * alpha[r];
  }
  for (int j = begin; j < end; ++j) {
    const T* value = values[j] + column;
    values.prefetch(j, column, column + kVecs * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) {
      const VecF v = load(value + i * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][i] += broadcast(weights[r * kBlockK + j]) * v;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVecs; ++i) store(acc + r * acc_stride + i * kLanes, sum[r][i]);
  }
}

template <int kRows, class T>
void direct_values(const float* weights, const Rows<T>& values, Range keys, const float* alpha, int64_t v_head_dim,
                   float* acc) {
  constexpr int kVecs = kRows == 1 ? 8 : kRows == 4 ? 2 : 4;
  const int begin = static_cast<int>(keys.begin), end = static_cast<int>(keys.end);
  int64_t c = 0;
  for (; c + kVecs * kLanes <= v_head_dim; c += kVecs * kLanes) {
    direct_value_tile<kRows, kVecs>(weights, values, c, begin, end, alpha, acc + c, v_head_dim);
  }
  for (; c < v_head_dim; c += kLanes) {
    direct_value_tile<kRows, 1>(weights, values, c, begin, end, alpha, acc + c, v_head_dim);
  }
}

// Adds the values of one row that it sees of [begin, end), in their order. alpha is 1 once it was applied.
template <class T>
void add_row_values(const float* weights, const Rows<T>& values, Range range, const KeyBits* seen, float* alpha,
                    int64_t v_head_dim, float* acc) {
  for (int64_t j = range.begin; j < range.end;) {
    int64_t end = range.end;
    if (seen != nullptr) {
      while (j < range.end && !(*seen)(j)) ++j;
      for (end = j; end < range.end && (*seen)(end);) ++end;
    }
    if (j >= end) break;
    direct_values<1>(weights, values, {j, end}, alpha, v_head_dim, acc);
    *alpha = 1.0f;
    j = end;
  }
}

// A block of keys: those that any row of the request sees, and those of each row, relative to the block.
struct DirectBlock {
  const BlockSlots* slots;
  Range keys;
  Range visible[kDirectRows];  // {0, 0} where empty
  KeyBits seen[kDirectRows];
  bool has_holes;
  const float *k_scales, *v_scales;  // of the block; null where they are not per token
};

// One block for the kRows rows from `first_row` on.
template <int kRows, class T>
void run_direct_rows(const Attend& x, const Sequence& s, const DirectBlock& d, int64_t first_row, const float* q,
                     const Rows<T>& keys, const Rows<T>& values, const Partial& partial) {
  alignas(64) float scores[kLanes * kBlockK];  // `weigh` takes kLanes rows, of which kRows are there
  const int64_t dim = x.a.v_head_dim;
  direct_scores<kRows>(q, keys, static_cast<int>(d.keys.begin), static_cast<int>(d.keys.end), x.a.head_dim, scores);
  Range visible[kLanes] = {};  // the rows past kRows see no key
  Range common = d.keys;
  for (int r = 0; r < kRows; ++r) {
    visible[r] = d.visible[first_row + r];
    common = {max(common.begin, visible[r].begin), min(common.end, visible[r].end)};
    if (is_modified(x)) {
      finish_scores(x, s, first_row + r, d.slots->begin, visible[r], d.k_scales, scores + r * kBlockK);
    }
    if (d.has_holes) hide(scores + r * kBlockK, d.seen[first_row + r], visible[r], -kInfinity);
  }
  common.end = d.has_holes ? common.begin : max(common.begin, common.end);
  float alpha[kLanes];
  weigh(scores, visible, partial.state.from(first_row), alpha);
  for (int r = 0; d.v_scales != nullptr && r < kRows; ++r) {
    scale_by(scores + r * kBlockK + visible[r].begin, d.v_scales + visible[r].begin,
             static_cast<int>(visible[r].end - visible[r].begin));
  }

  // Keys are added in their order: what comes before that which all rows see, row by row, then that, then the rest.
  float* acc = partial.acc + first_row * dim;
  auto add_alone = [&](int r, Range range) {
    add_row_values(scores + r * kBlockK, values, range, d.has_holes ? &d.seen[first_row + r] : nullptr, alpha + r, dim,
                   acc + r * dim);
  };
  for (int r = 0; r < kRows; ++r) add_alone(r, {visible[r].begin, min(visible[r].end, common.begin)});
  direct_values<kRows>(scores, values, common, alpha, dim, acc);
  for (int r = 0; r < kRows; ++r) {
    alpha[r] = 1.0f;
    add_alone(r, {max(visible[r].begin, common.end), visible[r].end});
  }
}

// The keys [begin, end), a chunk, for the kv heads [s.kv_head, s.kv_head + num_heads), block by block, so that heads which
// lie together are read together; keys are asked of memory up to ahead_end. `q` is scratch for kDirectRows * head_dim
// floats a head.
template <class T>
void run_direct(const Attend& x, Sequence s, int64_t num_heads, int64_t begin, int64_t end, int64_t ahead_end, float* q,
                const Partial* partials) {
  const PagedCache& cache = x.p.cache;
  const int64_t first_head = s.kv_head;
  Range visible[kDirectRows];
  for (int64_t row = 0; row < s.num_rows; ++row) {
    const Range keys = visible_keys(x.a, s, row);
    visible[row] = {max(keys.begin, begin), min(keys.end, end)};
  }
  const Range all = hull(visible, s.num_rows);
  for (int64_t head = 0; head < num_heads; ++head) {
    s.kv_head = first_head + head;
    const Partial& partial = partials[head];
    for (int64_t row = 0; row < kStateRows; ++row) partial.state.set(row, {-kInfinity, 0.0f});
    memset(partial.acc, 0, static_cast<size_t>(s.num_rows * x.a.v_head_dim) * sizeof(float));
    const float scale = query_scale(x.a) * head_scale(cache.k_scale, s.kv_head);
    for (int64_t row = 0; row < s.num_rows; ++row) {
      load_query(x, s, row, scale, q + (head * kDirectRows + row) * x.a.head_dim);
    }
  }
  if (all.begin >= all.end) return;

  BlockSlots slots[2];
  float k_scales[kBlockK], v_scales[kBlockK];
  int64_t block = all.begin / kBlockK * kBlockK;
  find_slots(x, s.batch, block, end, slots[0]);
  for (int turn = 0; block < all.end; block += kBlockK, turn ^= 1) {
    const BlockSlots &here = slots[turn], &next = slots[turn ^ 1];
    const bool is_last = block + kBlockK >= ahead_end;
    if (!is_last) find_slots(x, s.batch, block + kBlockK, ahead_end, slots[turn ^ 1]);
    DirectBlock d{};
    d.slots = &here;
    for (int64_t row = 0; row < s.num_rows; ++row) d.visible[row] = within_block(visible[row], block, here.count);
    d.has_holes = narrow_to_tree(x, s, 0, block, static_cast<int>(s.num_rows), d.visible, d.seen);
    d.keys = hull(d.visible, s.num_rows);
    if (d.keys.begin >= d.keys.end) continue;
    for (int64_t head = 0; head < num_heads; ++head) {
      s.kv_head = first_head + head;
      // Ahead: the same block of the next head, and from the last head the next block of the first.
      const bool stays = head + 1 < num_heads;
      const int64_t ahead_head = stays || is_last ? s.kv_head + stays : first_head;
      const BlockSlots& ahead = stays || is_last ? here : next;
      auto rows_of = [&](const PagesView& pages, const int64_t* offsets, const int64_t* ahead_offsets) {
        const T* data = static_cast<const T*>(pages.data);
        return Rows<T>{data + s.kv_head * pages.head_stride, offsets, data + ahead_head * pages.head_stride,
                       ahead_offsets};
      };
      const Rows<T> keys = rows_of(cache.k, here.k, ahead.k), values = rows_of(cache.v, here.v, ahead.v);
      if (cache.k_scale.per_token) {
        find_scales(x, s.batch, s.kv_head, here, static_cast<int>(d.keys.begin), cache.k_scale, k_scales);
        d.k_scales = k_scales;
      }
      if (cache.v_scale.per_token) {
        find_scales(x, s.batch, s.kv_head, here, static_cast<int>(d.keys.begin), cache.v_scale, v_scales);
        d.v_scales = v_scales;
      }
      for (int64_t row = 0; row < s.num_rows; row += 4) {
        const float* rows = q + (head * kDirectRows + row) * x.a.head_dim;
        switch (min(s.num_rows - row, 4)) {
          case 1: run_direct_rows<1, T>(x, s, d, row, rows, keys, values, partials[head]); break;
          case 2: run_direct_rows<2, T>(x, s, d, row, rows, keys, values, partials[head]); break;
          case 3: run_direct_rows<3, T>(x, s, d, row, rows, keys, values, partials[head]); break;
          case 4: run_direct_rows<4, T>(x, s, d, row, rows, keys, values, partials[head]); break;
        }
      }
    }
  }
}

}  // namespace
}  // namespace fmkernels
