// SPDX-License-Identifier: Apache-2.0
// rope_cpu.cpp: the CPU kernel of the rotary embedding.
//
// Work       Tasks of kTaskTokens tokens. The cos and sin of a token are unpacked once, as many as stay in registers at a
//            time, and serve all heads of q and k.
// Numerics   float32. Deterministic.
// Cost       2 elements of memory an element: bound by memory.

#include "rope.h"

#include "../common/dispatch.h"
#include "../common/parallel.h"
#include "../common/vec_pair.h"

namespace fmkernels {
namespace {

constexpr int64_t kTaskTokens = 16;
constexpr int kPairsAtOnce = 4;

// A NaN of the cache as arithmetic would make it, so that none needs to be looked for when a result is rounded.
FM_INLINE VecF plain_nan(VecF x) { return x != x ? VecF{} + __builtin_nanf("") : x; }
FM_INLINE VecPair plain_nan(VecPair x) { return {plain_nan(x.a), plain_nan(x.b)}; }

// The heads of a token, from the first column that is rotated on.
template <class T>
struct Heads {
  const T* in;
  T* out;
  int64_t num_heads, in_stride, out_stride;
};

template <class T>
Heads<T> heads_of(const RopeSide& side, int64_t batch, int64_t token) {
  return {static_cast<const T*>(side.in) + batch * side.in_stride[0] + token * side.in_stride[1],
          static_cast<T*>(side.out) + batch * side.out_stride[0] + token * side.out_stride[1], side.num_heads,
          side.in_stride[2], side.out_stride[2]};
}

// Columns i and i + half of every head for kPairs pairs of vectors from i on, of the last of which `count` elements are
// there. cos and sin stay in registers, in the order of T.
template <int kPairs, class T, class W>
FM_INLINE void rotate_halves(const RopeParams& p, const Heads<T>* sides, const W* row, int64_t i, int count) {
  const int64_t half = p.rotary_dim / 2;
  VecPair c[kPairs], s[kPairs];
  for (int j = 0; j < kPairs; ++j) {
    const int64_t at = i + j * kPairLanes;
    c[j] = plain_nan(load_pair_as<T>(row + at, count));
    s[j] = plain_nan(load_pair_as<T>(row + half + at, count));
    if (p.inverse) s[j] = VecPair{} - s[j];
  }
  for (int side = 0; side < 2; ++side) {
    const T* in = sides[side].in + i;
    T* out = sides[side].out + i;
    for (int64_t head = 0; head < sides[side].num_heads; ++head) {
      for (int j = 0; j < kPairs; ++j) {
        const int64_t at = j * kPairLanes;
        const VecPair u = load_pair(in + at, count), v = load_pair(in + half + at, count);
        store_pair<Nan::kOfBFloat16>(out + at, u * c[j] - v * s[j], count);
        store_pair<Nan::kOfBFloat16>(out + half + at, v * c[j] + u * s[j], count);
      }
      in += sides[side].in_stride;
      out += sides[side].out_stride;
    }
  }
}

// The same for neighbouring columns 2 i and 2 i + 1: a pair of vectors has kLanes of them, and cos and sin are in the
// order of memory.
template <int kPairs, class T, class W>
FM_INLINE void rotate_neighbours(const RopeParams& p, const Heads<T>* sides, const W* row, int64_t i, int count) {
  VecF c[kPairs], s[kPairs];
  for (int j = 0; j < kPairs; ++j) {
    const W* cos = row + i + j * kLanes;
    const W* sin = cos + p.rotary_dim / 2;
    c[j] = plain_nan(count == kPairLanes ? load(cos) : load_partial(cos, count / 2, 0.0f));
    s[j] = plain_nan(count == kPairLanes ? load(sin) : load_partial(sin, count / 2, 0.0f));
    if (p.inverse) s[j] = VecF{} - s[j];
  }
  for (int side = 0; side < 2; ++side) {
    const T* in = sides[side].in + 2 * i;
    T* out = sides[side].out + 2 * i;
    for (int64_t head = 0; head < sides[side].num_heads; ++head) {
      for (int j = 0; j < kPairs; ++j) {
        VecPair x = load_pair(in + j * kPairLanes, count);
        if constexpr (!std::is_same_v<T, BFloat16>) x = evens_and_odds(x);
        x = {x.a * c[j] - x.b * s[j], x.b * c[j] + x.a * s[j]};
        if constexpr (!std::is_same_v<T, BFloat16>) x = interleaved(x);
        store_pair<Nan::kOfBFloat16>(out + j * kPairLanes, x, count);
      }
      in += sides[side].in_stride;
      out += sides[side].out_stride;
    }
  }
}

template <class T, class W>
void rotate_token(const RopeParams& p, int64_t batch, int64_t token) {
  const W* row = static_cast<const W*>(p.cos_sin) + cache_row(p, batch, token) * p.cos_sin_stride;
  const Heads<T> sides[2] = {heads_of<T>(p.q, batch, token), heads_of<T>(p.k, batch, token)};
  const int64_t half = p.rotary_dim / 2;
  int64_t i = 0;
  if (p.interleaved) {
    constexpr int64_t kStep = kPairsAtOnce * kLanes;
    for (; i + kStep <= half; i += kStep) rotate_neighbours<kPairsAtOnce>(p, sides, row, i, kPairLanes);
    for (; i + kLanes <= half; i += kLanes) rotate_neighbours<1>(p, sides, row, i, kPairLanes);
    if (i < half) rotate_neighbours<1>(p, sides, row, i, static_cast<int>(2 * (half - i)));
  } else {
    constexpr int64_t kStep = kPairsAtOnce * kPairLanes;
    for (; i + kStep <= half; i += kStep) rotate_halves<kPairsAtOnce>(p, sides, row, i, kPairLanes);
    for (; i + kPairLanes <= half; i += kPairLanes) rotate_halves<1>(p, sides, row, i, kPairLanes);
    if (i < half) rotate_halves<1>(p, sides, row, i, static_cast<int>(half - i));
  }
  if (p.rotary_dim == p.head_dim || !p.copies_rest) return;
  for (const Heads<T>& side : sides) {
    for (int64_t head = 0; head < side.num_heads; ++head) {
      memmove(side.out + head * side.out_stride + p.rotary_dim, side.in + head * side.in_stride + p.rotary_dim,
              static_cast<size_t>(p.head_dim - p.rotary_dim) * sizeof(T));
    }
  }
}

}  // namespace

template <>
void run_rope_forward<kIsa>(const RopeParams& p) {
  const int64_t num_tasks = (p.num_tokens + kTaskTokens - 1) / kTaskTokens;
  const int64_t elements = p.batch * p.num_tokens * (p.q.num_heads + p.k.num_heads) * p.head_dim;
  const int workers = workers_for(2 * elements * element_bytes(p.dtype));
  dispatch_dtypes(p.dtype, p.cache_dtype, [&]<class T, class W>() {
    parallel_for(p.batch * num_tasks, workers, [&](int64_t task, int) {
      const int64_t batch = task / num_tasks, begin = task % num_tasks * kTaskTokens;
      const int64_t end = begin + kTaskTokens < p.num_tokens ? begin + kTaskTokens : p.num_tokens;
      for (int64_t token = begin; token < end; ++token) rotate_token<T, W>(p, batch, token);
    });
  });
}

}  // namespace fmkernels
