// SPDX-License-Identifier: Apache-2.0
// The direct path of attention_forward_cpu.cpp: a few rows against keys and values where they lie.
// Internal linkage, as in common/vec.h.
#pragma once

#include "attention_rows_cpu.h"

namespace fmkernels {
namespace {

constexpr int kDirectRows = 8;    // the most rows that go this way
constexpr int kDirectBlock = 64;  // keys per softmax step
constexpr int kChunk = 512;       // keys of a chunk: one task, merged in order

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

// The direct path asks for the same columns one block ahead wherever it reads keys and values, so that requests to
// memory spread over the arithmetic. Past the last key that is an address without a meaning, which a prefetch may have.
template <class T>
FM_INLINE void prefetch_next_block(const T* row, int64_t stride) {
  __builtin_prefetch(row + kDirectBlock * stride, 0, 2);
}

// scores[r][j] = <q[r], keys[j]> for kRows rows and j in [0, count); score rows are kDirectBlock apart.
template <int kRows, class T>
void direct_scores(const float* q, const T* keys, int64_t stride, int count, int64_t head_dim, float* scores) {
  constexpr int kKeys = kRows == 1 ? 8 : kRows == 2 ? 4 : 2;  // kRows * kKeys <= 8 accumulators
  for (int j = 0; j < count; j += kKeys) {
    VecF acc[8] = {};
    const T* key[kKeys];
    for (int i = 0; i < kKeys; ++i) key[i] = keys + min(j + i, count - 1) * stride;  // the last one again, past the end
    for (int i = 0; i < kKeys; ++i) {
      for (int64_t c = 0; c < head_dim; c += 64 / sizeof(T)) prefetch_next_block(key[i] + c, stride);
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
    horizontal_sums(acc, sums);
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kKeys && j + i < count; ++i) scores[r * kDirectBlock + j + i] = sums[r * kKeys + i];
    }
  }
}

// acc[r][0, kVecs * kLanes) = alpha[r] * acc[r][.] + sum over j in [begin, end) of weights[r][j] * values[j][.].
template <int kRows, int kVecs, class T>
FM_INLINE void direct_value_tile(const float* weights, const T* values, int64_t stride, int begin, int end,
                                 const float* alpha, float* acc, int64_t acc_stride) {
  VecF sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVecs; ++i) sum[r][i] = load(acc + r * acc_stride + i * kLanes) * alpha[r];
  }
  for (int j = begin; j < end; ++j) {
    for (int i = 0; i < kVecs * kLanes; i += 64 / sizeof(T)) prefetch_next_block(values + j * stride + i, stride);
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

}  // namespace
}  // namespace fmkernels
