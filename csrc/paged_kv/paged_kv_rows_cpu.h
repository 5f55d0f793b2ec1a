// SPDX-License-Identifier: Apache-2.0
// What both paths of paged_kv_attend_cpu.cpp share: requests, where their keys lie, what becomes of the products of a row,
// and the merge of chunks. Internal linkage, as in common/vec.h.
//
// Both paths must give a row the same bits. What a row goes through is therefore one function for both, compiled once
// (noinline), or the same fixed order of additions.
#pragma once

#include "../attention/attention_tiled_cpu.h"
#include "paged_kv_vec_cpu.h"

namespace fmkernels {
namespace {

static_assert(kChunkTokens % kBlockK == 0);

// The parameters of one call, in the form that the headers of attention take them besides.
struct Attend {
  const PagedAttendParams& p;
  AttentionForwardParams a;

  explicit Attend(const PagedAttendParams& params) : p(params), a{} {
    a.o = {p.o.data, 0, p.o.token_stride, p.o.head_stride};
    a.q = {p.q.data, 0, p.q.token_stride, p.q.head_stride};
    a.lse = p.lse;
    a.lse_head_stride = p.lse_head_stride;
    a.batch = p.batch;
    a.heads = p.heads;
    a.kv_heads = p.cache.kv_heads;
    a.head_dim = p.cache.head_dim;
    a.v_head_dim = p.cache.v_head_dim;
    a.softmax_scale = p.softmax_scale;
    a.softcap = p.softcap;
    a.window_left = p.window_left;
    a.window_right = p.window_right;
    a.alibi_slopes = p.alibi_slopes;
    a.alibi_batch_stride = p.alibi_batch_stride;
    a.sinks = p.sinks;
  }

  // One kv head of one request.
  Sequence request(int64_t batch, int64_t kv_head) const {
    Sequence s{};
    s.batch = batch;
    s.kv_head = kv_head;
    s.group = p.heads / p.cache.kv_heads;
    s.q_start = p.cu_seqlens_q == nullptr ? batch : p.cu_seqlens_q[batch];
    s.seq_q = p.cu_seqlens_q == nullptr ? 1 : p.cu_seqlens_q[batch + 1] - s.q_start;
    s.seq_k = p.cache_seqlens[batch];
    s.num_rows = s.seq_q * s.group;
    return s;
  }
};

// ---- where keys lie --------------------------------------------------------------------------------------------------

// The slots of up to kBlockK tokens of a request, from token `begin` on.
struct BlockSlots {
  int64_t begin;
  int count;
  int64_t k[kBlockK], v[kBlockK];  // offsets of their rows of head 0, in elements
};

// From token `begin` to `end`, at most kBlockK of them. Their scales, where they are per token, are asked of memory.
void find_slots(const Attend& x, int64_t batch, int64_t begin, int64_t end, BlockSlots& slots) {
  const PagedCache& cache = x.p.cache;
  const int32_t* table = x.p.block_table + batch * x.p.table_stride;
  slots.begin = begin;
  slots.count = static_cast<int>(max(0, min(end - begin, kBlockK)));
  int64_t page = begin / cache.page_size, slot = begin % cache.page_size;
  for (int j = 0; j < slots.count; ++page, slot = 0) {
    const int64_t id = table[page];
    int64_t k = id * cache.k.page_stride + slot * cache.k.slot_stride;
    int64_t v = id * cache.v.page_stride + slot * cache.v.slot_stride;
    for (; slot < cache.page_size && j < slots.count; ++slot, ++j) {
      slots.k[j] = k;
      slots.v[j] = v;
      k += cache.k.slot_stride;
      v += cache.v.slot_stride;
      if (cache.k_scale.per_token) __builtin_prefetch(scale_at(cache.k_scale, id, slot, 0), 0, 2);
      if (cache.v_scale.per_token) __builtin_prefetch(scale_at(cache.v_scale, id, slot, 0), 0, 2);
    }
  }
}

// The scales of those tokens from number `begin` on for one head, where they are per token.
void find_scales(const Attend& x, int64_t batch, int64_t head, const BlockSlots& slots, int begin,
                 const ScaleView& scale, float* scales) {
  const int64_t page_size = x.p.cache.page_size, token = slots.begin + begin;
  const int32_t* table = x.p.block_table + batch * x.p.table_stride;
  int64_t page = token / page_size, slot = token % page_size;
  for (int j = begin; j < slots.count; ++page, slot = 0) {
    const float* of_page = scale_at(scale, table[page], 0, head);
    for (; slot < page_size && j < slots.count; ++slot, ++j) scales[j] = of_page[slot * scale.slot_stride];
  }
}

// ---- rows ------------------------------------------------------------------------------------------------------------

// The scale that all keys, or all values, of a head have in common.
float head_scale(const ScaleView& scale, int64_t head) {
  return scale.data == nullptr || scale.per_token ? 1.0f : *scale_at(scale, 0, 0, head);
}

// The query of a row times `scale`, as floats.
__attribute__((noinline)) void load_query(const Attend& x, const Sequence& s, int64_t row, float scale, float* out) {
  dispatch_dtype(x.p.dtype, [&]<class T>() {
    const T* q = token<T>(x.a.q, s, s.q_start, s.query(row), s.head(row));
    for (int64_t c = 0; c < x.a.head_dim; c += kLanes) store(out + c, load(q + c) * scale);
  });
}

// Whether the products of a row become scores by more than their common scale.
bool is_modified(const Attend& x) { return has_modifiers(x.a) || x.p.cache.k_scale.per_token; }

// x[j] *= factors[j] for j in [0, count).
__attribute__((noinline)) void scale_by(float* x, const float* factors, int count) {
  int j = 0;
  for (; j + kLanes <= count; j += kLanes) store(x + j, load(x + j) * load(factors + j));
  for (; j < count; ++j) x[j] *= factors[j];
}

// Turns the products of a row with the keys of `block` that it sees into scores. scores and k_scales are those of the
// block, k_scales null where they are not per token.
__attribute__((noinline)) void finish_scores(const Attend& x, const Sequence& s, int64_t row, int64_t block,
                                             Range visible, const float* k_scales, float* scores) {
  const int count = static_cast<int>(visible.end - visible.begin);
  if (count <= 0) return;
  if (k_scales != nullptr) scale_by(scores + visible.begin, k_scales + visible.begin, count);
  apply_modifiers(x.a, s, row, block + visible.begin, count, scores + visible.begin);
}

__attribute__((noinline)) void weigh(float* scores, const Range* visible, RowStates state, float* alpha) {
  softmax_step<kBlockK>(scores, visible, state, alpha);
}

// Adds what a chunk gave to what the chunks before it did; a chunk without keys changes no bits.
__attribute__((noinline)) void merge_chunk(RowStates total, const RowStates chunk, int64_t row, float* acc,
                                           const float* chunk_acc, int64_t dim) {
  const RowState a = total[row], b = chunk[row];
  const float new_max = b.max_log2 > a.max_log2 ? b.max_log2 : a.max_log2;
  const float shift = new_max == -kInfinity ? 0.0f : new_max;
  const float mine = std::exp2(a.max_log2 - shift), theirs = std::exp2(b.max_log2 - shift);
  for (int64_t c = 0; c < dim; c += kLanes) store(acc + c, load(acc + c) * mine + load(chunk_acc + c) * theirs);
  total.set(row, {new_max, a.sum * mine + b.sum * theirs});
}

// Writes o and lse of a row.
__attribute__((noinline)) void write_row(const Attend& x, const Sequence& s, int64_t row, RowState state, float* acc) {
  const float scale = head_scale(x.p.cache.v_scale, s.kv_head);
  if (scale != 1.0f) {
    for (int64_t c = 0; c < x.a.v_head_dim; c += kLanes) store(acc + c, load(acc + c) * scale);
  }
  dispatch_dtype(x.p.dtype, [&]<class T>() { finish_row<T>(x.a, s, row, state, acc); });
}

// ---- tree mask -------------------------------------------------------------------------------------------------------

// Which of the 32 keys from number t of the queries' own on the words of a query show; all others are shown.
FM_INLINE uint32_t shown_from(const uint32_t* words, int64_t num_words, int64_t t) {
  auto word = [&](int64_t i) { return i < 0 || i >= num_words ? ~0u : words[i]; };
  const int64_t index = t >> 5;
  const int shift = static_cast<int>(t & 31);
  return shift == 0 ? word(index) : word(index) >> shift | word(index + 1) << (32 - shift);
}

// Narrows the ranges of `count` rows from `row` on, relative to `block`, to the tree mask, and tells in `seen` which keys
// of them are shown. Whether any row sees its range with holes.
bool narrow_to_tree(const Attend& x, const Sequence& s, int64_t row, int64_t block, int count, Range* visible,
                    KeyBits* seen) {
  const int64_t own = s.seq_k - s.seq_q;  // the first key of the queries
  if (x.p.tree_mask == nullptr || block + kBlockK <= own) return false;
  bool has_holes = false;
  for (int r = 0; r < count; ++r) {
    Range& range = visible[r];
    seen[r] = {};
    if (range.begin >= range.end) continue;
    const uint32_t* words = x.p.tree_mask + (s.q_start + s.query(row + r)) * x.p.tree_stride;
    Range narrow{kBlockK, 0};
    int num_seen = 0;
    for (int w = 0; w < kBlockK / 32; ++w) {
      const uint32_t bits = shown_from(words, x.p.tree_words, block + 32 * w - own) & bits_in(range, w);
      seen[r].words[w] = bits;
      if (bits == 0) continue;
      narrow = {min(narrow.begin, 32 * w + __builtin_ctz(bits)), 32 * w + 32 - __builtin_clz(bits)};
      num_seen += __builtin_popcount(bits);
    }
    range = num_seen == 0 ? Range{0, 0} : narrow;
    has_holes = has_holes || num_seen < range.end - range.begin;
  }
  return has_holes;
}

}  // namespace
}  // namespace fmkernels
