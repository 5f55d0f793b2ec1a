// SPDX-License-Identifier: Apache-2.0
// The direct path of attention_forward_cpu.cpp: a few rows against keys and values where they lie.
// Internal linkage, as in common/vec.h.
#pragma once

#include "attention_dropout_cpu.h"

namespace fmkernels {
namespace {

constexpr int kDirectRows = 8;               // the most rows of a kv head that go this way
constexpr int kStateRows = kDirectRows + 4;  // states of a partial: a step from row 4 on touches a whole vector
constexpr int kDirectBlock = 64;             // keys per softmax step
constexpr int kChunk = 512;                  // keys of a chunk, merged in order

// scores[r][j] = <q[r], keys[j]> for kRows rows and j in [0, count); score rows are kDirectBlock apart.
//
// The direct path asks for what it will read next, `ahead` elements further on, wherever it reads keys and values, so
// that requests to memory spread over the arithmetic. An address without a meaning is one that a prefetch may have.
template <int kRows, class T>
void direct_scores(const float* q, const T* keys, int64_t stride, int64_t ahead, int count, int64_t head_dim,
                   float* scores) {
  constexpr int kKeys = kRows == 1 ? 8 : kRows == 2 ? 4 : 2;  // kRows * kKeys <= 8 accumulators
  for (int j = 0; j < count; j += kKeys) {
    VecF acc[8] = {};
    const T* key[kKeys];
    for (int i = 0; i < kKeys; ++i) key[i] = keys + min(j + i, count - 1) * stride;  // the last one again, past the end
    for (int i = 0; i < kKeys; ++i) {
      for (int64_t c = 0; c < head_dim; c += 64 / sizeof(T)) __builtin_prefetch(key[i] + ahead + c, 0, 2);
    }
    for (int64_t c = 0; c < head_dim; c += kLanes) {
#pragma GCC unroll 8
      for (int i = 0; i < kKeys; ++i) {
        const VecF k = load(key[i] + c);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[r * kKeys + i] += load(q + r * head_dim + c) * k;
      }
    }
    float sums[8];
    for (int i = 0; i < 8; i += kLanes) store(sums + i, join_lanes(acc + i, [](VecF a, VecF b) { return a + b; }));
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kKeys && j + i < count; ++i) scores[r * kDirectBlock + j + i] = sums[r * kKeys + i];
    }
  }
}

// acc[r][0, kVecs * kLanes) = alpha[r] * acc[r][.] + sum over j in [begin, end) of weights[r][j] * values[j][.].
template <int kRows, int kVecs, class T>
FM_INLINE void direct_value_tile(const float* weights, const T* values, int64_t stride, int64_t ahead, int begin,
                                 int end, const float* alpha, float* acc, int64_t acc_stride) {
  VecF sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVecs; ++i) sum[r][i] = load(acc + r * acc_stride + i * kLanes) * alpha[r];
  }
  for (int j = begin; j < end; ++j) {
    const T* value = values + j * stride;
    for (int i = 0; i < kVecs * kLanes; i += 64 / sizeof(T)) __builtin_prefetch(value + ahead + i, 0, 2);
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) {
      const VecF v = load(value + i * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][i] += broadcast(weights[r * kDirectBlock + j]) * v;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVecs; ++i) store(acc + r * acc_stride + i * kLanes, sum[r][i]);
  }
}

template <int kRows, class T>
void direct_values(const float* weights, const T* values, int64_t stride, int64_t ahead, Range keys, const float* alpha,
                   int64_t v_head_dim, float* acc) {
  constexpr int kVecs = kRows == 1 ? 8 : kRows == 4 ? 2 : 4;
  const int begin = static_cast<int>(keys.begin), end = static_cast<int>(keys.end);
  int64_t c = 0;
  for (; c + kVecs * kLanes <= v_head_dim; c += kVecs * kLanes) {
    direct_value_tile<kRows, kVecs>(weights, values + c, stride, ahead, begin, end, alpha, acc + c, v_head_dim);
  }
  for (; c < v_head_dim; c += kLanes) {
    direct_value_tile<kRows, 1>(weights, values + c, stride, ahead, begin, end, alpha, acc + c, v_head_dim);
  }
}

// Unfinished result of the rows of one (sequence, kv head) over one chunk of keys.
struct Partial {
  float* acc;       // [kDirectRows][v_head_dim]
  RowStates state;  // [kStateRows]
};

// A block of at most kDirectBlock keys from `block` on: those that any row of the sequence sees, and those of each row.
struct DirectBlock {
  int64_t block;
  Range keys;                  // relative to `block`
  Range visible[kDirectRows];  // relative to `block`, {0, 0} where empty
};

// One block for the kRows rows from `first_row` on.
template <int kRows, class T>
void run_direct_rows(const AttentionForwardParams& p, const Sequence& s, const Dropout& dropout, const DirectBlock& d,
                     int64_t first_row, const float* q, int64_t ahead_k, int64_t ahead_v, const Partial& partial) {
  alignas(64) float scores[kLanes * kDirectBlock];  // softmax_step takes kLanes rows, of which kRows are there
  direct_scores<kRows>(q, token<T>(p.k, s, s.k_start, d.block + d.keys.begin, s.kv_head), p.k.token_stride, ahead_k,
                       static_cast<int>(d.keys.end - d.keys.begin), p.head_dim, scores + d.keys.begin);
  Range visible[kLanes] = {};  // the rows past kRows see no key
  Range common = d.keys;
  for (int r = 0; r < kRows; ++r) {
    visible[r] = d.visible[first_row + r];
    common = {max(common.begin, visible[r].begin), min(common.end, visible[r].end)};
    const int count = static_cast<int>(visible[r].end - visible[r].begin);
    if (has_modifiers(p) && count > 0) {
      apply_modifiers(p, s, first_row + r, d.block + visible[r].begin, count,
                      scores + r * kDirectBlock + visible[r].begin);
    }
  }
  common.end = max(common.begin, common.end);
  float alpha[kLanes];
  softmax_step<kDirectBlock>(scores, visible, partial.state.from(first_row), alpha);
  for (int r = 0; dropout.is_on() && r < kRows; ++r) {
    dropout.drop(p, s, first_row + r, d.block, visible[r], scores + r * kDirectBlock);
  }

  // What all rows see together, then the ragged ends row by row.
  const T* values = token<T>(p.v, s, s.k_start, d.block, s.kv_head);
  float* acc = partial.acc + first_row * p.v_head_dim;
  direct_values<kRows>(scores, values, p.v.token_stride, ahead_v, common, alpha, p.v_head_dim, acc);
  const float one = 1.0f;
  for (int r = 0; r < kRows; ++r) {
    for (const Range keys : {Range{visible[r].begin, min(visible[r].end, common.begin)},
                             Range{max(visible[r].begin, common.end), visible[r].end}}) {
      if (keys.begin >= keys.end) continue;
      direct_values<1>(scores + r * kDirectBlock, values, p.v.token_stride, 0, keys, &one, p.v_head_dim,
                       acc + r * p.v_head_dim);
    }
  }
}

// The keys [begin, end) for the kv heads [s.kv_head, s.kv_head + num_heads), block by block, so that heads which lie
// together are read together. `q` is scratch for kDirectRows * head_dim floats a head.
template <class T>
void run_direct(const AttentionForwardParams& p, Sequence s, int64_t num_heads, int64_t begin, int64_t end, float* q,
                const Partial* partials) {
  const int64_t first_head = s.kv_head;
  const float scale = query_scale(p);
  const Dropout dropout(p);
  Range visible[kDirectRows], all{end, begin};
  for (int64_t row = 0; row < s.num_rows; ++row) {
    const Range keys = visible_keys(p, s, row);
    visible[row] = {max(keys.begin, begin), min(keys.end, end)};
    if (visible[row].begin < visible[row].end) {
      all = {min(all.begin, visible[row].begin), max(all.end, visible[row].end)};
    }
  }
  for (int64_t head = 0; head < num_heads; ++head) {
    s.kv_head = first_head + head;
    const Partial& partial = partials[head];
    for (int64_t row = 0; row < kStateRows; ++row) partial.state.set(row, {-kInfinity, 0.0f});
    memset(partial.acc, 0, static_cast<size_t>(s.num_rows * p.v_head_dim) * sizeof(float));
    for (int64_t row = 0; row < s.num_rows; ++row) {
      const T* from = token<T>(p.q, s, s.q_start, s.query(row), s.head(row));
      float* to = q + (head * kDirectRows + row) * p.head_dim;
      for (int64_t c = 0; c < p.head_dim; c += kLanes) store(to + c, load(from + c) * scale);
    }
  }

  for (int64_t block = all.begin / kDirectBlock * kDirectBlock; block < all.end; block += kDirectBlock) {
    DirectBlock d{block, {max(all.begin - block, 0), min(all.end - block, kDirectBlock)}, {}};
    for (int64_t row = 0; row < s.num_rows; ++row) {
      const Range keys{max(visible[row].begin - block, 0), min(visible[row].end - block, kDirectBlock)};
      if (keys.begin < keys.end) d.visible[row] = keys;
    }
    for (int64_t head = 0; head < num_heads; ++head) {
      s.kv_head = first_head + head;
      // To the same block of the next head, and from the last head to the next block of the first.
      auto ahead_in = [&](const TokenView& view) {
        return head + 1 < num_heads ? view.head_stride : kDirectBlock * view.token_stride - head * view.head_stride;
      };
      const int64_t ahead_k = ahead_in(p.k), ahead_v = ahead_in(p.v);
      for (int64_t row = 0; row < s.num_rows; row += 4) {
        const float* rows = q + (head * kDirectRows + row) * p.head_dim;
        switch (min(s.num_rows - row, 4)) {
          case 1: run_direct_rows<1, T>(p, s, dropout, d, row, rows, ahead_k, ahead_v, partials[head]); break;
          case 2: run_direct_rows<2, T>(p, s, dropout, d, row, rows, ahead_k, ahead_v, partials[head]); break;
          case 3: run_direct_rows<3, T>(p, s, dropout, d, row, rows, ahead_k, ahead_v, partials[head]); break;
          case 4: run_direct_rows<4, T>(p, s, dropout, d, row, rows, ahead_k, ahead_v, partials[head]); break;
        }
      }
    }
  }
}

}  // namespace
}  // namespace fmkernels
