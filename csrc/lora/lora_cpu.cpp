// SPDX-License-Identifier: Apache-2.0
// lora_cpu.cpp: the CPU kernels of lora_shrink and lora_expand.
//
// Work       Tokens are sorted by adapter, so that tokens of one adapter, wherever they stand in the batch, share its
//            rows; a task is up to kTileTokens of them and a block of ranks or features.
// Numerics   float32. shrink: sums of 256 columns a lane at a time, short chains that are added in order. Deterministic.
// Cost       An adapter is read once for its tokens: bound by memory in decoding, 2 * rank * (in + out) flops a token.

#include "lora.h"

#include "../common/dispatch_cpu.h"
#include "../common/parallel.h"
#include "../common/vec.h"

namespace fmkernels {
namespace {

constexpr int kTileTokens = 32;
constexpr int kTaskRanks = 8;           // of shrink
constexpr int64_t kTaskFeatures = 256;  // of expand
constexpr int64_t kBlockColumns = 256;  // that a chain of additions is long

// Up to kTileTokens tokens of one adapter.
struct Tile {
  int32_t adapter;
  int32_t count;
  int64_t first;  // into Groups::tokens
};

// The tokens in the order of their adapters, and cut into tiles.
struct Groups {
  int64_t* tokens;
  Tile* tiles;
  int64_t num_tiles;

  static int64_t bytes(const Adapters& a) {
    return Arena::array_bytes<int64_t>(a.num_tokens) + Arena::array_bytes<int64_t>(a.num_adapters + 2) +
           Arena::array_bytes<Tile>(a.num_tokens);
  }

  Groups(const Adapters& a, char* memory) : num_tiles(0) {
    Arena arena(memory);
    tokens = arena.take<int64_t>(a.num_tokens);
    int64_t* starts = arena.take<int64_t>(a.num_adapters + 2);  // [i] of adapter i - 1: -1 is the first
    tiles = arena.take<Tile>(a.num_tokens);
    for (int64_t i = 0; i < a.num_adapters + 2; ++i) starts[i] = 0;
    for (int64_t t = 0; t < a.num_tokens; ++t) ++starts[a.idx[t * a.idx_stride] + 2];
    for (int64_t i = 1; i < a.num_adapters + 2; ++i) starts[i] += starts[i - 1];
    for (int64_t t = 0; t < a.num_tokens; ++t) tokens[starts[a.idx[t * a.idx_stride] + 1]++] = t;
    for (int64_t first = 0; first < a.num_tokens;) {
      const int32_t adapter = a.idx[tokens[first] * a.idx_stride];
      int32_t count = 1;
      while (count < kTileTokens && first + count < a.num_tokens &&
             a.idx[tokens[first + count] * a.idx_stride] == adapter) {
        ++count;
      }
      tiles[num_tiles++] = {adapter, count, first};
      first += count;
    }
  }
};

// The first `count` < kLanes elements, and zeros: no float of the rest takes part in a sum.
template <class T>
FM_INLINE VecF load_tail(const T* p, int64_t count) {
  T lanes[kLanes] = {};
  memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}

// ---- shrink ------------------------------------------------------------------------------------------------------------

// out[i][j] = <x[i], a[j]> over num_columns. The order of a sum does not depend on kTokens and kRanks.
template <class T, int kTokens, int kRanks>
void dots(const T* const* x, const T* const* a, int64_t num_columns, float (*out)[kTaskRanks]) {
  VecF total[kTokens][kRanks] = {};
  for (int64_t begin = 0; begin < num_columns; begin += kBlockColumns) {
    const int64_t end = begin + kBlockColumns < num_columns ? begin + kBlockColumns : num_columns;
    VecF acc[kTokens][kRanks] = {};
    auto multiply = [&](auto&& load_columns) {
      VecF row[kTokens];
      for (int i = 0; i < kTokens; ++i) row[i] = load_columns(x[i]);
      for (int j = 0; j < kRanks; ++j) {
        const VecF column = load_columns(a[j]);
        for (int i = 0; i < kTokens; ++i) acc[i][j] += row[i] * column;
      }
    };
    int64_t c = begin;
    for (; c + kLanes <= end; c += kLanes) multiply([&](const T* p) { return load(p + c); });
    if (c < end) multiply([&](const T* p) { return load_tail(p + c, end - c); });
    for (int i = 0; i < kTokens; ++i) {
      for (int j = 0; j < kRanks; ++j) total[i][j] += acc[i][j];
    }
  }
  for (int i = 0; i < kTokens; ++i) {
    for (int j = 0; j < kRanks; ++j) out[i][j] = horizontal_sum(total[i][j]);
  }
}

// dots of kTokens rows with num_ranks <= kTaskRanks rows, as many at a time as the registers hold.
template <class T, int kTokens>
void dots_of(const T* const* x, const T* const* a, int num_ranks, int64_t num_columns, float (*out)[kTaskRanks]) {
  constexpr int kRanks = kTaskRanks / kTokens;
  int j = 0;
  auto shifted = [&](int by) { return reinterpret_cast<float (*)[kTaskRanks]>(&out[0][by]); };
  for (; j + kRanks <= num_ranks; j += kRanks) dots<T, kTokens, kRanks>(x, a + j, num_columns, shifted(j));
  for (; j < num_ranks; ++j) dots<T, kTokens, 1>(x, a + j, num_columns, shifted(j));
}

template <class T>
void shrink_tile(const LoraShrinkParams& p, const Tile& tile, const int64_t* tokens, int64_t first_rank) {
  const int64_t rank = p.adapters.rank, left = rank - first_rank;
  const int num_ranks = static_cast<int>(left < kTaskRanks ? left : kTaskRanks);
  if (tile.adapter < 0) {
    for (int i = 0; i < tile.count; ++i) {
      for (int j = 0; j < num_ranks; ++j) p.h[tokens[i] * rank + first_rank + j] = 0.0f;
    }
    return;
  }
  const T *x[kTileTokens], *a[kTaskRanks];
  for (int i = 0; i < tile.count; ++i) x[i] = static_cast<const T*>(p.x) + tokens[i] * p.x_stride;
  for (int j = 0; j < num_ranks; ++j) {
    a[j] = static_cast<const T*>(p.a) + tile.adapter * p.a_stride[0] + (first_rank + j) * p.a_stride[1];
  }
  float out[4][kTaskRanks];
  for (int i = 0; i < tile.count;) {
    const int left_tokens = tile.count - i, count = left_tokens >= 4 ? 4 : left_tokens >= 2 ? 2 : 1;
    dispatch_checked_int<1, 2, 4>(count,
                                  [&]<int kTokens>() { dots_of<T, kTokens>(x + i, a, num_ranks, p.in_features, out); });
    for (int k = 0; k < count; ++k, ++i) {
      for (int j = 0; j < num_ranks; ++j) p.h[tokens[i] * rank + first_rank + j] = out[k][j];
    }
  }
}

// ---- expand ------------------------------------------------------------------------------------------------------------

template <class T>
void expand_tile(const LoraExpandParams& p, const Tile& tile, const int64_t* tokens, int64_t first, int64_t end) {
  auto base_row = [&](int i) { return static_cast<const T*>(p.base) + tokens[i] * p.base_stride; };
  auto y_row = [&](int i) { return static_cast<T*>(p.y) + tokens[i] * p.out_features; };
  if (tile.adapter < 0) {
    for (int i = 0; i < tile.count; ++i) {
      memcpy(y_row(i) + first, base_row(i) + first, static_cast<size_t>(end - first) * sizeof(T));
    }
    return;
  }
  constexpr int kMaxVecs = kMaxRank / kLanes;
  const int64_t rank = p.adapters.rank, whole = rank / kLanes * kLanes;
  const int num_vecs = static_cast<int>((rank + kLanes - 1) / kLanes);
  VecF h[kTileTokens][kMaxVecs];
  for (int i = 0; i < tile.count; ++i) {
    const float* from = p.h + tokens[i] * p.h_stride;
    for (int64_t r = 0; r < whole; r += kLanes) h[i][r / kLanes] = load(from + r);
    if (whole < rank) h[i][num_vecs - 1] = load_tail(from + whole, rank - whole);
  }
  const VecF scale = broadcast(p.scale == nullptr ? 1.0f : p.scale[tile.adapter]);
  const T* b = static_cast<const T*>(p.b) + tile.adapter * p.b_stride[0];
  VecF rows[kLanes][kMaxVecs];  // of b, as floats: decoded once for the tokens
  for (int64_t n = first; n < end; n += kLanes) {
    const int count = static_cast<int>(end - n < kLanes ? end - n : kLanes);
    for (int lane = 0; lane < kLanes; ++lane) {
      const T* row = b + (n + (lane < count ? lane : 0)) * p.b_stride[1];
      for (int64_t r = 0; r < whole; r += kLanes) rows[lane][r / kLanes] = load(row + r);
      if (whole < rank) rows[lane][num_vecs - 1] = load_tail(row + whole, rank - whole);
    }
    for (int i = 0; i < tile.count; ++i) {
      VecF acc[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) acc[lane] = rows[lane][0] * h[i][0];
      for (int v = 1; v < num_vecs; ++v) {
        for (int lane = 0; lane < kLanes; ++lane) acc[lane] += rows[lane][v] * h[i][v];
      }
      const VecF sum = join_lanes(acc, [](VecF left, VecF right) { return left + right; });
      const T* base = base_row(i) + n;
      T* y = y_row(i) + n;
      if (count == kLanes) store(y, load(base) + scale * sum);
      else store_partial(y, load_tail(base, count) + scale * sum, count);
    }
  }
}

// f(tile, its tokens, block) for every tile and every block of num_blocks.
template <class F>
void for_each_task(const Adapters& a, int64_t num_blocks, int64_t operations, F&& f) {
  const Workspace workspace(Groups::bytes(a));
  const Groups groups(a, workspace.data());
  parallel_for(groups.num_tiles * num_blocks, workers_for(operations), [&](int64_t task, int) {
    const Tile& tile = groups.tiles[task / num_blocks];
    f(tile, groups.tokens + tile.first, task % num_blocks);
  });
}

}  // namespace

template <>
void run_lora_shrink<kIsa>(const LoraShrinkParams& p) {
  const int64_t rank = p.adapters.rank, num_blocks = (rank + kTaskRanks - 1) / kTaskRanks;
  dispatch_dtype(p.dtype, [&]<class T>() {
    for_each_task(p.adapters, num_blocks, p.adapters.num_tokens * rank * p.in_features,
                  [&](const Tile& tile, const int64_t* tokens, int64_t block) {
                    shrink_tile<T>(p, tile, tokens, block * kTaskRanks);
                  });
  });
}

template <>
void run_lora_expand<kIsa>(const LoraExpandParams& p) {
  const int64_t n = p.out_features, num_blocks = (n + kTaskFeatures - 1) / kTaskFeatures;
  dispatch_dtype(p.dtype, [&]<class T>() {
    for_each_task(p.adapters, num_blocks, p.adapters.num_tokens * p.adapters.rank * n,
                  [&](const Tile& tile, const int64_t* tokens, int64_t block) {
                    const int64_t first = block * kTaskFeatures;
                    expand_tile<T>(p, tile, tokens, first, first + kTaskFeatures < n ? first + kTaskFeatures : n);
                  });
  });
}

}  // namespace fmkernels
