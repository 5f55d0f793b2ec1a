// SPDX-License-Identifier: Apache-2.0
// The direct path of paged_kv_attend_cpu.cpp: a few rows against keys and values where they lie in their pages.
// Internal linkage, as in common/vec.h.
#pragma once

#include "paged_kv_rows_cpu.h"

namespace fmkernels {
namespace {

constexpr int kDirectRows = 8;  // the most rows of a kv head that go this way
static_assert(kDirectRows % kLanes == 0, "a step of the softmax takes as many rows as a vector has lanes");

// Unfinished result of the rows of one (request, kv head) over one chunk of keys.
struct Partial {
  float* acc;       // [kDirectRows][v_head_dim]
  RowStates state;  // [kDirectRows]
};

// What is asked of memory while something else is multiplied: some rows, all heads of them, line by line in the order in
// which they lie. Requests that come evenly are what keeps memory busy: in bursts of a row they cost decode a third.
template <class T>
class Ahead {
 public:
  Ahead() = default;
  Ahead(const PagesView& pages, int64_t first_head, int64_t num_heads, int64_t dim, const int64_t* offsets, int count)
      : data_(static_cast<const T*>(pages.data) + first_head * pages.head_stride),
        offsets_(offsets),
        end_(offsets + count) {
    const bool joined = pages.head_stride == dim;  // a token is one run
    num_heads_ = joined ? 1 : num_heads;
    head_stride_ = pages.head_stride;
    row_bytes_ = (joined ? num_heads : 1) * dim * static_cast<int64_t>(sizeof(T));
    if (count > 0) begin_row();
  }

  FM_INLINE void next_line() {
    if (line_ == nullptr) return;
    __builtin_prefetch(line_, 0, 2);
    line_ += 64;
    if (line_ >= row_end_) next_row();
  }

 private:
  void begin_row() {
    line_ = reinterpret_cast<const char*>(data_ + *offsets_ + head_ * head_stride_);
    row_end_ = line_ + row_bytes_;
  }
  void next_row() {
    if (++head_ == num_heads_) head_ = 0, ++offsets_;
    if (offsets_ == end_) line_ = nullptr;
    else begin_row();
  }

  const char *line_ = nullptr, *row_end_ = nullptr;  // the next line, of a row that ends there; null: nothing is left
  const T* data_ = nullptr;
  const int64_t *offsets_ = nullptr, *end_ = nullptr;
  int64_t head_ = 0, num_heads_ = 0, head_stride_ = 0, row_bytes_ = 0;
};

// scores[r][j] = <q[r], keys[j]> for kRows rows and j in [begin, end); score rows are kBlockK apart. A lane sums every
// kLanes-th column, then join_lanes the lanes: the order that ordered_score_tile keeps to.
template <int kRows, class T>
__attribute__((noinline)) void direct_scores(const float* q, const T* data, const int64_t* offsets, int begin, int end,
                                             int64_t head_dim, Ahead<T>& request, float* scores) {
  constexpr int kKeys = kRows == 1 ? 8 : kRows == 2 ? 4 : kRows == 3 ? 4 : 2;
  constexpr int kSums = (kRows * kKeys + kLanes - 1) / kLanes * kLanes;
  constexpr int64_t kLine = 64 / sizeof(T);
  Ahead<T> ahead = request;  // in registers
  for (int j = begin; j < end; j += kKeys) {
    VecF acc[kSums] = {};
    const T* key[kKeys];
    for (int i = 0; i < kKeys; ++i) {
      key[i] = data + offsets[j + i < end ? j + i : end - 1];  // the last one again, past the end
      for (int64_t c = 0; c < head_dim; c += kLine) ahead.next_line();
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
    const int count = min(kKeys, end - j);
    for (int r = 0; r < kRows; ++r) {
      float* out = scores + r * kBlockK + j;
      if (count == kKeys) memcpy(out, sums + r * kKeys, sizeof(float) * kKeys);
      else memcpy(out, sums + r * kKeys, sizeof(float) * count);
    }
  }
  request = ahead;
}

// acc[r][0, kVecs * kLanes) = alpha[r] * acc[r][.] + sum over j in [begin, end) of weights[r][j] * values[j][.].
template <int kRows, int kVecs, class T>
__attribute__((noinline)) void direct_value_tile(const float* weights, const T* data, const int64_t* offsets, int begin,
                                                 int end, const float* alpha, Ahead<T>& request, float* acc,
                                                 int64_t acc_stride) {
  constexpr int kTileBytes = kVecs * kLanes * static_cast<int>(sizeof(T));
  constexpr int kLines = kTileBytes > 64 ? kTileBytes / 64 : 1, kEvery = kTileBytes < 64 ? 64 / kTileBytes : 1;
  Ahead<T> ahead = request;  // in registers
  VecF sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVecs; ++i) sum[r][i] = load(acc + r * acc_stride + i * kLanes) * alpha[r];
  }
  for (int j = begin; j < end; ++j) {
    const T* value = data + offsets[j];
    if (j % kEvery == 0) {
      for (int i = 0; i < kLines; ++i) ahead.next_line();
    }
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
  request = ahead;
}

template <int kRows, class T>
void direct_values(const float* weights, const T* data, const int64_t* offsets, Range keys, const float* alpha,
                   int64_t v_head_dim, Ahead<T>& ahead, float* acc) {
  constexpr int kVecs = kRows == 1 ? 8 : kRows == 4 ? 2 : 4;
  const int begin = static_cast<int>(keys.begin), end = static_cast<int>(keys.end);
  int64_t c = 0;
  for (; c + kVecs * kLanes <= v_head_dim; c += kVecs * kLanes) {
    direct_value_tile<kRows, kVecs>(weights, data + c, offsets, begin, end, alpha, ahead, acc + c, v_head_dim);
  }
  for (; c < v_head_dim; c += kLanes) {
    direct_value_tile<kRows, 1>(weights, data + c, offsets, begin, end, alpha, ahead, acc + c, v_head_dim);
  }
}

// Adds the values of one row that it sees of a range, in their order. alpha is 1 once it was applied.
template <class T>
void add_row_values(const float* weights, const T* data, const int64_t* offsets, Range range, const KeyBits* seen,
                    float* alpha, int64_t v_head_dim, float* acc) {
  Ahead<T> nothing;
  for (int64_t j = range.begin; j < range.end;) {
    int64_t end = range.end;
    if (seen != nullptr) {
      while (j < range.end && !(*seen)(j)) ++j;
      for (end = j; end < range.end && (*seen)(end);) ++end;
    }
    if (j >= end) break;
    direct_values<1>(weights, data, offsets, {j, end}, alpha, v_head_dim, nothing, acc);
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
};

// Scores, then weights, of the rows of one head for one block.
struct DirectHead {
  float* weights;            // [kDirectRows][kBlockK]
  float alpha[kDirectRows];  // for what was accumulated before the block; 1 once it was applied
};

Range overlap(Range a, Range b) { return {max(a.begin, b.begin), min(a.end, b.end)}; }

// From the products of one head to its weights.
void weigh_block(const Attend& x, const Sequence& s, const DirectBlock& d, const Partial& partial, DirectHead& head) {
  const PagedCache& cache = x.p.cache;
  float scales[kBlockK];
  const int begin = static_cast<int>(d.keys.begin);
  if (cache.k_scale.per_token) find_scales(x, s.batch, s.kv_head, *d.slots, begin, cache.k_scale, scales);
  for (int64_t row = 0; row < s.num_rows; ++row) {
    float* scores = head.weights + row * kBlockK;
    if (is_modified(x)) {
      finish_scores(x, s, row, d.slots->begin, d.visible[row], cache.k_scale.per_token ? scales : nullptr, scores);
    }
    if (d.has_holes) hide(scores, d.seen[row], d.visible[row], -kInfinity);
  }
  for (int64_t row = 0; row < s.num_rows; row += kLanes) {
    weigh(head.weights + row * kBlockK, d.visible + row, partial.state.from(row), head.alpha + row);
  }
  if (!cache.v_scale.per_token) return;
  find_scales(x, s.batch, s.kv_head, *d.slots, begin, cache.v_scale, scales);
  for (int64_t row = 0; row < s.num_rows; ++row) {
    const Range keys = d.visible[row];
    scale_by(head.weights + row * kBlockK + keys.begin, scales + keys.begin, static_cast<int>(keys.end - keys.begin));
  }
}

// Adds the values of `part` of a block to the kRows rows from `first` on. Keys are added in their order: what comes before
// that which all rows see, row by row, then that, then the rest.
template <int kRows, class T>
void add_values(const Attend& x, const DirectBlock& d, Range part, int64_t first, const T* data, DirectHead& head,
                Ahead<T>& ahead, float* partial_acc) {
  const int64_t dim = x.a.v_head_dim, *offsets = d.slots->v;
  float *weights = head.weights + first * kBlockK, *alpha = head.alpha + first, *acc = partial_acc + first * dim;
  Range common = part;
  for (int r = 0; r < kRows; ++r) common = overlap(common, d.visible[first + r]);
  common.end = d.has_holes ? common.begin : max(common.begin, common.end);
  auto add_alone = [&](int r, Range range) {
    add_row_values(weights + r * kBlockK, data, offsets, overlap(overlap(d.visible[first + r], part), range),
                   d.has_holes ? &d.seen[first + r] : nullptr, alpha + r, dim, acc + r * dim);
  };
  for (int r = 0; r < kRows; ++r) add_alone(r, {0, common.begin});
  direct_values<kRows>(weights, data, offsets, common, alpha, dim, ahead, acc);
  for (int r = 0; r < kRows; ++r) {
    alpha[r] = 1.0f;
    add_alone(r, {common.end, kBlockK});
  }
}

// Calls f.template operator()<kRows>(first) for the rows of a request, at most 4 at a time.
template <class F>
FM_INLINE void for_row_groups(int64_t num_rows, F&& f) {
  for (int64_t row = 0; row < num_rows; row += 4) {
    switch (min(num_rows - row, 4)) {
      case 1: f.template operator()<1>(row); break;
      case 2: f.template operator()<2>(row); break;
      case 3: f.template operator()<3>(row); break;
      case 4: f.template operator()<4>(row); break;
    }
  }
}

// Tokens of a part of a block, a power of two: so many that the keys, or values, of the heads that are read together stay in
// the second-level cache while the next part is on its way.
int64_t part_tokens(int64_t token_bytes) {
  int64_t tokens = kBlockK;
  while (tokens > 16 && tokens * token_bytes > 128 * 1024) tokens /= 2;
  return tokens;
}

// Scratch of a worker for num_heads heads.
struct DirectScratch {
  float* q;           // [head][kDirectRows][head_dim]
  float* weights;     // [head][kDirectRows][kBlockK]
  DirectHead* heads;  // [head]

  DirectScratch(Arena arena, int64_t num_heads, int64_t head_dim)
      : q(arena.take<float>(num_heads * kDirectRows * head_dim)),
        weights(arena.take<float>(num_heads * kDirectRows * kBlockK)),
        heads(arena.take<DirectHead>(num_heads)) {}
  static int64_t num_bytes(int64_t num_heads, int64_t head_dim) {
    return Arena::array_bytes<float>(num_heads * kDirectRows * head_dim) +
           Arena::array_bytes<float>(num_heads * kDirectRows * kBlockK) + Arena::array_bytes<DirectHead>(num_heads);
  }
};

// What follows a task on the same worker, whose first block is asked of memory at its end: a request and a token of it; no
// request: -1.
struct Following {
  int64_t batch, begin, end;
};

// The keys [begin, end), a chunk, for the kv heads [s.kv_head, s.kv_head + num_heads). A block goes through its keys, part by
// part and in a part head by head, then through its values likewise: heads that lie together are read together.
template <class T>
void run_direct(const Attend& x, Sequence s, int64_t num_heads, int64_t begin, int64_t end, Following following,
                const DirectScratch& scratch, const Partial* partials) {
  const PagedCache& cache = x.p.cache;
  const int64_t first_head = s.kv_head, head_dim = x.a.head_dim, v_head_dim = x.a.v_head_dim;
  Range visible[kDirectRows];
  for (int64_t row = 0; row < s.num_rows; ++row) visible[row] = overlap(visible_keys(x.a, s, row), {begin, end});
  const Range all = hull(visible, s.num_rows);
  for (int64_t head = 0; head < num_heads; ++head) {
    s.kv_head = first_head + head;
    const Partial& partial = partials[head];
    for (int64_t row = 0; row < kDirectRows; ++row) partial.state.set(row, {-kInfinity, 0.0f});
    memset(partial.acc, 0, static_cast<size_t>(s.num_rows * v_head_dim) * sizeof(float));
    scratch.heads[head].weights = scratch.weights + head * kDirectRows * kBlockK;
    const float scale = query_scale(x.a) * head_scale(cache.k_scale, s.kv_head);
    for (int64_t row = 0; row < s.num_rows; ++row) {
      load_query(x, s, row, scale, scratch.q + (head * kDirectRows + row) * head_dim);
    }
  }
  if (all.begin >= all.end) return;

  auto data_of_head = [&](const PagesView& pages, int64_t head) {
    return static_cast<const T*>(pages.data) + (first_head + head) * pages.head_stride;
  };
  auto ahead_of = [&](const PagesView& pages, int64_t dim, const int64_t* offsets, int64_t from, int64_t to) {
    return Ahead<T>(pages, first_head, num_heads, dim, offsets + from, static_cast<int>(max(0, to - from)));
  };
  const int64_t k_part = part_tokens(num_heads * head_dim * static_cast<int64_t>(sizeof(T)));
  const int64_t v_part = part_tokens(num_heads * v_head_dim * static_cast<int64_t>(sizeof(T)));
  BlockSlots slots[2];
  int64_t block = all.begin / kBlockK * kBlockK;
  find_slots(x, s.batch, block, end, slots[0]);
  for (int turn = 0; block < all.end; block += kBlockK, turn ^= 1) {
    const BlockSlots& here = slots[turn];
    BlockSlots& next = slots[turn ^ 1];
    next.count = 0;
    if (block + kBlockK < all.end) find_slots(x, s.batch, block + kBlockK, end, next);
    else if (following.batch >= 0) find_slots(x, following.batch, following.begin, following.end, next);
    DirectBlock d{};
    d.slots = &here;
    for (int64_t row = 0; row < s.num_rows; ++row) d.visible[row] = within_block(visible[row], block, here.count);
    d.has_holes = narrow_to_tree(x, s, 0, block, static_cast<int>(s.num_rows), d.visible, d.seen);
    d.keys = hull(d.visible, s.num_rows);

    const int64_t first_k = d.keys.begin / k_part * k_part, first_v = d.keys.begin / v_part * v_part;
    for (int64_t part = first_k; part < d.keys.end; part += k_part) {
      const Range keys = overlap(d.keys, {part, part + k_part});
      Ahead<T> ahead = keys.end < d.keys.end
                           ? ahead_of(cache.k, head_dim, here.k, keys.end, min(keys.end + k_part, d.keys.end))
                           : ahead_of(cache.v, v_head_dim, here.v, d.keys.begin, min(first_v + v_part, d.keys.end));
      for (int64_t head = 0; head < num_heads; ++head) {
        for_row_groups(s.num_rows, [&]<int kRows>(int64_t row) {
          direct_scores<kRows>(scratch.q + (head * kDirectRows + row) * head_dim, data_of_head(cache.k, head), here.k,
                               static_cast<int>(keys.begin), static_cast<int>(keys.end), head_dim, ahead,
                               scratch.heads[head].weights + row * kBlockK);
        });
      }
    }
    for (int64_t head = 0; head < num_heads && d.keys.begin < d.keys.end; ++head) {
      s.kv_head = first_head + head;
      weigh_block(x, s, d, partials[head], scratch.heads[head]);
    }
    for (int64_t part = first_v; part < d.keys.end; part += v_part) {
      const Range keys = overlap(d.keys, {part, part + v_part});
      Ahead<T> ahead = keys.end < d.keys.end
                           ? ahead_of(cache.v, v_head_dim, here.v, keys.end, min(keys.end + v_part, d.keys.end))
                           : ahead_of(cache.k, head_dim, next.k, 0, min(k_part, next.count));
      for (int64_t head = 0; head < num_heads; ++head) {
        for_row_groups(s.num_rows, [&]<int kRows>(int64_t row) {
          add_values<kRows>(x, d, keys, row, data_of_head(cache.v, head), scratch.heads[head], ahead,
                            partials[head].acc);
        });
      }
    }
  }
}

}  // namespace
}  // namespace fmkernels
