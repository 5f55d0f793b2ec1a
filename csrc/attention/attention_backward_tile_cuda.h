// SPDX-License-Identifier: Apache-2.0
// Tiles, shared memory, geometry and copies of the backward kernels (attention_backward_kernel_cuda.h).
//
// A pass owns a tile of one side, queries or keys, and streams the other side past it. The arithmetic is the same for
// both: tensor 0 gives the scores, tensor 1 the slopes of the weights.
//                 owned[0]  owned[1]  streamed[0]  streamed[1]  grads[0] += slopes streamed[0]  grads[1] += weights streamed[1]
//   kQuery        q         d_o       k            v            d_q
//   kKeyValue     k         v         q            d_o          d_k                             d_v
//   kKey, kValue  the same, one gradient at a time: both do not fit into the registers beyond 128 columns
#pragma once

#include "attention_mask_cuda.h"
#include "attention_products_cuda.h"

namespace fmkernels {
namespace {

enum class Pass { kQuery, kKeyValue, kKey, kValue };

struct BackwardTile {
  int owned, streamed, warps;
  int part;              // streamed rows whose slopes are in registers at a time
  int column_warps = 1;  // that own the same rows, and a part of the columns of their gradients each
  int stages = 2;        // of what is streamed
};

// One table for every architecture: all tiles fit into the 99 KiB of sm_86, 89 and 120.
constexpr BackwardTile backward_tile(int dim, Pass pass, bool is_float) {
  if (is_float) {
    return dim == 64    ? BackwardTile{128, 32, 8, 32}
           : dim == 128 ? BackwardTile{64, 16, 4, 16}
                        : BackwardTile{32, 16, 4, 16, 2, 1};  // 256
  }
  const bool both = pass == Pass::kKeyValue;
  switch (dim) {
    case 64: return {128, 32, 4, both ? 16 : 32};
    case 96: return {both ? 64 : 128, 32, 4, 32};
    case 128: return {128, 32, both ? 8 : 4, 32};
    case 192: return {64, 32, 4, 32};
    default: return {64, 16, 4, 16};  // 256
  }
}

template <class Element, int kDim_, Pass kPass_>
struct Traits : RowTraits<Element, kDim_> {
  using Row = RowTraits<Element, kDim_>;
  static constexpr Pass kPass = kPass_;
  static constexpr BackwardTile kTile = backward_tile(kDim_, kPass_, Row::kSplits);
  static constexpr int kDim = kDim_, kOwned = kTile.owned, kStreamed = kTile.streamed, kWarps = kTile.warps;
  static constexpr int kThreads = kWarps * kWarp, kBlocksPerSm = kThreads == 128 && kDim <= 96 ? 2 : 1;
  static constexpr int kColumnWarps = kTile.column_warps, kRowWarps = kWarps / kColumnWarps, kStages = kTile.stages;
  static constexpr int kWarpRows = kOwned / kRowWarps, kRowTiles = kWarpRows / 16;  // m16 tiles of a warp
  static constexpr int kCopiedRows = kOwned / kWarps;                               // owned rows that a warp copies
  static constexpr int kPart = kTile.part, kParts = kStreamed / kPart;
  static constexpr int kPartTiles = kPart / 8,
                       kColumnTiles = kDim / 8 / kColumnWarps;  // n8 tiles of products and of gradients
  // Of a streamed block, half of the threads copy one tensor, half the other.
  static constexpr int kPassRows = kThreads / 2 / Row::kRowThreads, kPasses = kStreamed / kPassRows;
  static constexpr bool kOwnsQueries = kPass == Pass::kQuery;
  static constexpr bool kHasSlopes = kPass != Pass::kValue;  // of weights: they need the second product
  static constexpr int kFirstGrad = kHasSlopes ? 0 : 1, kEndGrad = kPass == Pass::kKeyValue || !kHasSlopes ? 2 : 1;
  static constexpr int kTensorBytes = kStreamed * Row::kRowBytes;

  static_assert(kWarpRows % 16 == 0 && kPart % 16 == 0 && kStreamed % kPart == 0 && kDim % 32 == 0, "whole fragments");
  static_assert(kStreamed % kPassRows == 0 && kPassRows % 8 == 0, "whole passes, which keep the swizzle of their rows");
};

struct BackwardArgs {
  AttentionForwardParams p;  // its o and lse are not read
  TokenView owned[2], streamed[2], grads[2];
  int dims[2];  // columns of tensors 0 and 1
  AttentionRowStats stats;
  float scale_log2;  // of products, where nothing else modifies them
  float kept_scale;  // of weights that dropout keeps
  bool modifies;     // scores, beyond their scale
  bool is_general;   // every block goes through the loop that modifies and masks
  int group;         // query heads of a kv head
  // Factors of the bytes from one pass over a block to the next: one instruction multiplies and adds, where they come from
  // here.
  uint32_t pass[8] = {0, 1, 2, 3, 4, 5, 6, 7}, num_passes;
};

// ---- geometry -------------------------------------------------------------------------------------------------------

// What this block owns: rows [begin, begin + kOwned) of the queries or keys of a sequence.
struct Unit : Sequence {
  int batch, num_owned, num_streamed, begin;
  bool exists;
};

template <class T>
__device__ __forceinline__ Unit unit_of(const AttentionForwardParams& p, int batch, int tile) {
  Unit u{sequence_of(p, batch), batch, 0, 0, 0, true};
  u.num_owned = T::kOwnsQueries ? u.seq_q : u.seq_k;
  u.num_streamed = T::kOwnsQueries ? u.seq_k : u.seq_q;
  const int num_tiles = (u.num_owned + T::kOwned - 1) / T::kOwned;
  u.exists = tile < num_tiles;
  u.begin = (T::kOwnsQueries ? num_tiles - 1 - tile : tile) * T::kOwned;  // causal: the longest first
  return u;
}

// Streamed rows that meet an owned one: the keys that a query sees, or the queries that see a key.
template <class T>
__device__ __forceinline__ Range partners_of(const AttentionForwardParams& p, const Unit& u, int owned) {
  if constexpr (T::kOwnsQueries) {
    return visible_keys(p, u, owned);
  } else {
    const int diagonal = owned - (u.seq_k - u.seq_q);
    return {p.window_right < 0 ? 0 : max(0, diagonal - static_cast<int>(p.window_right)),
            p.window_left < 0 ? u.seq_q : clamp(diagonal + static_cast<int>(p.window_left) + 1, 0, u.seq_q)};
  }
}

// For owned rows [begin, end): streamed rows that meet any of them, and those that meet all.
struct Partners {
  Range any, all;
};
template <class T>
__device__ __forceinline__ Partners partners_of(const AttentionForwardParams& p, const Unit& u, int begin, int end) {
  end = min(end, u.num_owned);
  if (begin >= end) return {{0, 0}, {0, 0}};
  const Range first = partners_of<T>(p, u, begin), last = partners_of<T>(p, u, end - 1);
  return {{first.begin, last.end}, {last.begin, first.end}};
}

// Statistics of queries: where they are streamed as they lie in memory (attention.h); of owned ones, a lane's two rows of a
// fragment, twice each, are together.
template <class T>
struct Stage {
  typename T::Element rows[2][T::kStreamed][T::kDim];  // [tensor, row, column], swizzled
  alignas(128) float stats[T::kOwnsQueries ? 1 : T::kStreamed * kStatsFloats];
};

template <class T>
struct Smem {
  typename T::Element owned[2][T::kOwned][T::kDim];  // [tensor, row, column], swizzled; then the gradients
  alignas(128) Stage<T> stages[T::kStages];
  alignas(16) float stats[T::kOwnsQueries ? T::kOwned * kStatsFloats : 1];
  // What only masks ask for: kept here, because the products leave no register for it.
  Unit unit;
  int first_block, end_block;
  Range plain;  // blocks that every owned row meets whole, where nothing else modifies scores
  Partners partners[T::kWarps];
  BlockWalk<T::kStreamed, 1> walks[T::kWarps];
};

// Bytes from the first stage to the second, where there are two.
template <class T>
constexpr int kToSecondStage = T::kStages > 1 ? static_cast<int>(sizeof(Stage<T>)) : 0;

// Of a warp: which rows it owns, of kRowWarps, and which columns of their gradients, of kColumnWarps.
template <class T>
__device__ __forceinline__ int row_warp() {
  const int warp = threadIdx.x / kWarp;
  return T::kColumnWarps == 1 ? warp : warp % T::kRowWarps;
}
template <class T>
__device__ __forceinline__ int first_column() {
  return T::kColumnWarps == 1 ? 0 : static_cast<int>(threadIdx.x) / kWarp / T::kRowWarps * T::kColumnTiles * 8;
}

// ---- copies ---------------------------------------------------------------------------------------------------------

// The warp's part of owned[tensor], from memory. Rows and columns that do not exist are zeros.
template <class T>
__device__ __forceinline__ void load_owned(Smem<T>& smem, const BackwardArgs& a, const Unit& u, int tensor, int head) {
  const int lane = threadIdx.x % kWarp, warp_row = threadIdx.x / kWarp * T::kCopiedRows;
  const int first = lane / T::kRowThreads, chunk = lane % T::kRowThreads;
  const TokenView& view = a.owned[tensor];
  const auto* from = static_cast<const typename T::Element*>(view.data) + u.batch * view.batch_stride +
                     head * view.head_stride + chunk * T::kChunkElements;
  const int start = T::kOwnsQueries ? u.q_start : u.k_start;
  const uint32_t to = ptx::smem_address(smem.owned[tensor][warp_row]);
  for (int r = first; r < T::kCopiedRows; r += T::kWarpPassRows) {
    const int row = u.begin + warp_row + r;
    for (int c = chunk; c < T::kRowChunks; c += T::kRowThreads) {
      const bool valid = row < u.num_owned && c * T::kChunkElements < a.dims[tensor];
      ptx::cp_async_16_or_zero(
          to + swizzled<T>(r, c),
          valid ? from + (start + row) * view.token_stride + (c - chunk) * T::kChunkElements : from, valid);
    }
  }
}

// Their statistics, where they are queries.
template <class T>
__device__ __forceinline__ void load_owned_stats(Smem<T>& smem, const BackwardArgs& a, const Unit& u, int head) {
  const int64_t slot = a.stats.first_slot(head, u.batch, u.q_start);
  for (int r = threadIdx.x; r < T::kOwned; r += T::kThreads) {
    const float* from = a.stats.minus_lse(slot + min(u.begin + r, u.seq_q - 1));
    float* to = smem.stats + r / kStatsGroup * kStatsGroup * kStatsFloats + r % 8 * 4 + r / 8 % 2 * 2;
    to[0] = to[1] = from[0];
    to[AttentionRowStats::kToDelta] = to[AttentionRowStats::kToDelta + 1] = from[AttentionRowStats::kToDelta];
  }
}

// The gradient of those rows, from owned[tensor] to memory.
template <class T>
__device__ __forceinline__ void store_owned(const Smem<T>& smem, const BackwardArgs& a, const Unit& u, int tensor) {
  const int lane = pinned(threadIdx.x % kWarp), warp_row = threadIdx.x / kWarp * T::kCopiedRows;
  const int first = lane / T::kRowThreads, chunk = lane % T::kRowThreads;
  const TokenView& view = a.grads[tensor];
  const int start = T::kOwnsQueries ? u.q_start : u.k_start;
  auto* to = static_cast<typename T::Element*>(view.data) + u.batch * view.batch_stride + blockIdx.y * view.head_stride;
  const char* from = reinterpret_cast<const char*>(smem.owned[tensor][warp_row]);
  for (int r = first; r < T::kCopiedRows; r += T::kWarpPassRows) {
    const int row = u.begin + warp_row + r;
    for (int c = chunk; c < T::kRowChunks; c += T::kRowThreads) {
      if (row < u.num_owned && c * T::kChunkElements < a.dims[tensor]) {
        *reinterpret_cast<uint4*>(to + (start + row) * view.token_stride + c * T::kChunkElements) =
            *reinterpret_cast<const uint4*>(from + swizzled<T>(r, c));
      }
    }
  }
}

// The streamed tensors of one head, block after block into alternating stages: what this thread copies, all of one tensor.
template <class T>
struct StreamCopy {
  const char* next;     // its row of the first pass over the block to come, at its first column
  const char* stats;    // its part of the statistics to come
  uint32_t pass_bytes;  // between the rows of two passes
  uint32_t smem;        // where the first chunk goes
  int columns;          // 16-byte chunks that the tensor has from its first column on

  static __device__ __forceinline__ int row_of(int thread) { return thread % (T::kThreads / 2) / T::kRowThreads; }

  // The first block goes to the stage that begins `stage` bytes after the first one.
  __device__ __forceinline__ StreamCopy(const BackwardArgs& a, const Unit& u, const Smem<T>& shared, int stage,
                                        int head, int first_block) {
    // Pinned, so that nothing made of it waits in registers for the next head.
    const int thread = static_cast<int>(pinned(threadIdx.x));
    const int tensor = thread / (T::kThreads / 2), row = row_of(thread), chunk = thread % T::kRowThreads;
    const TokenView& view = a.streamed[tensor];
    const int64_t first = static_cast<int64_t>(static_cast<int>(pinned(first_block))) * T::kStreamed;
    next = static_cast<const char*>(view.data) + chunk * 16 +
           T::kElementBytes * (u.batch * view.batch_stride + head * view.head_stride +
                               ((T::kOwnsQueries ? u.k_start : u.q_start) + first + row) * view.token_stride);
    pass_bytes = pinned(static_cast<uint32_t>(view.token_stride) * T::kPassRows * T::kElementBytes);
    smem = pinned(ptx::smem_address(&shared.stages[0]) + stage + tensor * T::kTensorBytes + swizzled<T>(row, chunk));
    columns = static_cast<int>(pinned(a.dims[tensor] / T::kChunkElements - chunk));
    if constexpr (!T::kOwnsQueries) {
      const int64_t slot = a.stats.first_slot(head, u.batch, u.q_start) + first;
      stats = reinterpret_cast<const char*>(a.stats.minus_lse(slot)) + thread * 16;
    }
  }

  static constexpr int smem_bytes(int pass, int c) {
    return pass * T::kPassRows * T::kRowBytes + c * T::kRowThreads * 16;
  }

  // The next block. Of its rows `num_rows` exist: none, all, or the first, and then the rest is zeros. Statistics exist for
  // whole blocks. The one after it goes to the stage `to_next` bytes away.
  __device__ __forceinline__ void issue(const BackwardArgs& a, const Smem<T>& shared, int to_next, int num_rows) {
    if (0 < num_rows && num_rows < T::kStreamed) {
      places([&]<int pass, int c>() {
        if (c * T::kRowThreads < columns) {
          const bool valid = row_of(threadIdx.x) + pass * T::kPassRows < num_rows;
          const uint64_t bytes = uint64_t{pass_bytes} * pass + c * T::kRowThreads * 16;
          ptx::cp_async_16_or_zero(smem + smem_bytes(pass, c), next + (valid ? bytes : 0), valid);
        }
      });
    }
    static_for<T::kPasses>([&]<int pass>() {
      const char* from = pass == 0 ? next : next + uint64_t{pass_bytes} * a.pass[pass];
      static_for<T::kColumnPasses>([&]<int c>() {
        ptx::cp_async_16_if<smem_bytes(pass, c), c * T::kRowThreads * 16, c * T::kRowThreads>(num_rows >= T::kStreamed,
                                                                                              columns, smem, from);
      });
    });
    next += uint64_t{pass_bytes} * a.num_passes;
    if constexpr (!T::kOwnsQueries) {
      const int stage = to_next > 0 ? 0 : kToSecondStage<T>;
      ptx::cp_async_16_if<0, 0, 0>(threadIdx.x < T::kStreamed, num_rows,
                                   ptx::smem_address(shared.stages[0].stats) + stage + threadIdx.x * 16, stats);
      stats += T::kStreamed * kStatsFloats * 4;
    }
    smem += to_next;
  }
  // The block to come is `blocks` blocks further than it was.
  __device__ __forceinline__ void skip(const BackwardArgs& a, int blocks) {
    next += static_cast<int64_t>(uint64_t{pass_bytes} * a.num_passes) * blocks;
    if constexpr (!T::kOwnsQueries) stats += static_cast<int64_t>(T::kStreamed * kStatsFloats * 4) * blocks;
  }
  // Zeros in the columns that the tensor lacks, in all stages: written once, never copied over. Before the first block.
  __device__ __forceinline__ void zero_columns() const {
    places([&]<int pass, int c>() {
      if (c * T::kRowThreads < columns) return;
      *chunk_at<uint4>(smem_bytes(pass, c)) = uint4{};
      if constexpr (T::kStages > 1) *chunk_at<uint4>(kToSecondStage<T> + smem_bytes(pass, c)) = uint4{};
    });
  }
  // Whether any of this thread's chunks, in the stage `bytes` from that of the block to come, holds an element that is not
  // finite: its product with zero is NaN.
  __device__ __forceinline__ bool has_nonfinite(int bytes) const {
    uint32_t sum = 0;
    places([&]<int pass, int c>() {
      const uint4 x = *chunk_at<uint4>(bytes + smem_bytes(pass, c));
      sum = add_nonfinite_of<typename T::Element>(sum, x);
    });
    return sum != 0;
  }
  // The elements of these chunks that are not finite become zeros, in the kPart rows from `first_row` on.
  __device__ __forceinline__ void zero_nonfinite(int bytes, int first_row) const {
    places([&]<int pass, int c>() {
      if (static_cast<uint32_t>(row_of(threadIdx.x) + pass * T::kPassRows - first_row) >= T::kPart) return;
      zero_nonfinite_of<typename T::Element>(chunk_at<void>(bytes + smem_bytes(pass, c)));
    });
  }

 private:
  template <class U>
  __device__ __forceinline__ U* chunk_at(int bytes) const {
    return static_cast<U*>(__cvta_shared_to_generic(smem + bytes));
  }
  // f<pass, c>() for every chunk of this thread.
  template <class F>
  static __device__ __forceinline__ void places(F&& f) {
    static_for<T::kPasses>(
        [&]<int pass>() { static_for<T::kColumnPasses>([&]<int c>() { f.template operator()<pass, c>(); }); });
  }
};

}  // namespace
}  // namespace fmkernels
