// SPDX-License-Identifier: Apache-2.0
// Tiles, shared memory, geometry and copies of attention_backward.cu. Included by it alone.
//
// A pass owns a tile of one side, queries or keys, and streams the other side past it. The arithmetic is the same for
// both: tensor 0 gives the scores, tensor 1 the slopes of the weights.
//                 owned[0]  owned[1]  streamed[0]  streamed[1]  grads[0] += slopes streamed[0]  grads[1] += weights streamed[1]
//   kQuery        q         d_o       k            v            d_q
//   kKeyValue     k         v         q            d_o          d_k                             d_v
//   kKey, kValue  the same, one gradient at a time: both do not fit into the registers beyond 128 columns
#pragma once

#include "attention_fragments_cuda.h"

namespace fmkernels {
namespace {

enum class Pass { kQuery, kKeyValue, kKey, kValue };

struct BackwardTile {
  int owned, streamed, warps;
};

// One table for every architecture: all tiles fit into the 99 KiB of sm_86, 89 and 120.
constexpr BackwardTile backward_tile(int dim, Pass pass) {
  switch (dim) {
    case 64: return {128, 32, 4};
    case 96: return pass == Pass::kQuery ? BackwardTile{128, 32, 4} : BackwardTile{64, 32, 4};
    case 128: return {128, 32, 8};
    case 192: return {64, 32, 4};
    default: return {64, 16, 4};  // 256
  }
}

template <class Element_, int kDim_, Pass kPass_>
struct Traits {
  using Element = Element_;
  static constexpr Pass kPass = kPass_;
  static constexpr BackwardTile kTile = backward_tile(kDim_, kPass_);
  static constexpr int kDim = kDim_, kOwned = kTile.owned, kStreamed = kTile.streamed, kWarps = kTile.warps;
  static constexpr int kThreads = kWarps * kWarp, kBlocksPerSm = kThreads == 128 && kDim <= 96 ? 2 : 1;
  static constexpr int kWarpRows = kOwned / kWarps, kRowTiles = kWarpRows / 16;  // m16 tiles of a warp
  static constexpr int kStreamTiles = kStreamed / 8, kColumnTiles = kDim / 8;    // n8 tiles of scores and of gradients
  static constexpr int kRowChunks = kDim / kChunkElements;                       // 16-byte chunks of a row
  static constexpr int kRowThreads = kRowChunks % 8 == 0 ? 8 : 4;                // threads along a row that is copied
  static constexpr int kColumnPasses = kRowChunks / kRowThreads;
  static constexpr int kPassRows = kThreads / kRowThreads, kPasses = kStreamed / kPassRows;  // of the block
  static constexpr int kWarpPassRows = kWarp / kRowThreads;                                  // of one warp's own rows
  static constexpr bool kOwnsQueries = kPass == Pass::kQuery;
  static constexpr bool kHasSlopes = kPass != Pass::kValue;  // of weights: they need the second product
  static constexpr int kFirstGrad = kHasSlopes ? 0 : 1, kEndGrad = kPass == Pass::kKeyValue || !kHasSlopes ? 2 : 1;
  static constexpr int kTensorBytes = kStreamed * kDim * 2, kStageBytes = 2 * kTensorBytes;

  static_assert(kWarpRows % 16 == 0 && kStreamed % 16 == 0 && kDim % 32 == 0, "whole fragments");
  static_assert(kStreamed % kPassRows == 0 && kPassRows % 8 == 0, "whole passes, which keep the swizzle of their rows");
};

struct BackwardArgs {
  AttentionForwardParams p;  // its o and lse are not read
  TokenView owned[2], streamed[2], grads[2];
  int dims[2];  // columns of tensors 0 and 1
  AttentionRowStats stats;
  float scale_log2;        // of products, where nothing else modifies them
  bool is_general;         // every block goes through the loop that modifies and masks
  int group;               // query heads of a kv head
  int64_t pass_bytes[2];   // of the streamed tensors: between the rows of two passes,
  int64_t block_bytes[2];  // and from the last pass over a block to the first one over the next
};

// ---- geometry -------------------------------------------------------------------------------------------------------

struct Range {
  int begin, end;
};

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
    const KeyRange keys = visible_keys(p, u, owned);
    return {keys.begin, keys.end};
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

template <class T>
struct Smem {
  typename T::Element owned[2][T::kOwned][T::kDim];           // [tensor, row, column], swizzled; then the gradients
  typename T::Element streamed[2][2][T::kStreamed][T::kDim];  // [stage, tensor, row, column], swizzled
  float stats[2][2][T::kStreamed];  // [stage, minus lse or minus delta, query], where queries are streamed
  // What only masks ask for: kept here, because the products leave no register for it.
  Unit unit;
  Partners partners[T::kWarps];
};

// ---- copies ---------------------------------------------------------------------------------------------------------

// Rows that this warp owns, from memory to its part of owned[tensor]. Rows and columns that do not exist are zeros.
template <class T>
__device__ __forceinline__ void load_owned(Smem<T>& smem, const BackwardArgs& a, const Unit& u, int tensor, int head) {
  const int lane = threadIdx.x % kWarp, warp_row = threadIdx.x / kWarp * T::kWarpRows;
  const int first = lane / T::kRowThreads, chunk = lane % T::kRowThreads;
  const TokenView& view = a.owned[tensor];
  const auto* from = static_cast<const typename T::Element*>(view.data) + u.batch * view.batch_stride +
                     head * view.head_stride + chunk * kChunkElements;
  const int start = T::kOwnsQueries ? u.q_start : u.k_start;
  const uint32_t to = ptx::smem_address(smem.owned[tensor][warp_row]);
  for (int r = first; r < T::kWarpRows; r += T::kWarpPassRows) {
    const int row = u.begin + warp_row + r;
    for (int c = chunk; c < T::kRowChunks; c += T::kRowThreads) {
      const bool valid = row < u.num_owned && c * kChunkElements < a.dims[tensor];
      ptx::cp_async_16_or_zero(to + swizzled<T::kDim>(r, c),
                               valid ? from + (start + row) * view.token_stride + (c - chunk) * kChunkElements : from,
                               valid);
    }
  }
}

// The gradient of those rows, from owned[tensor] to memory.
template <class T>
__device__ __forceinline__ void store_owned(const Smem<T>& smem, const BackwardArgs& a, const Unit& u, int tensor) {
  const int lane = threadIdx.x % kWarp, warp_row = threadIdx.x / kWarp * T::kWarpRows;
  const int first = lane / T::kRowThreads, chunk = lane % T::kRowThreads;
  const TokenView& view = a.grads[tensor];
  const int start = T::kOwnsQueries ? u.q_start : u.k_start;
  auto* to = static_cast<typename T::Element*>(view.data) + u.batch * view.batch_stride + blockIdx.y * view.head_stride;
  const char* from = reinterpret_cast<const char*>(smem.owned[tensor][warp_row]);
  for (int r = first; r < T::kWarpRows; r += T::kWarpPassRows) {
    const int row = u.begin + warp_row + r;
    for (int c = chunk; c < T::kRowChunks; c += T::kRowThreads) {
      if (row < u.num_owned && c * kChunkElements < a.dims[tensor]) {
        *reinterpret_cast<uint4*>(to + (start + row) * view.token_stride + c * kChunkElements) =
            *reinterpret_cast<const uint4*>(from + swizzled<T::kDim>(r, c));
      }
    }
  }
}

// The streamed tensors of one head, block after block, and where this thread writes the part that it copies.
template <class T>
struct StreamCopy {
  const char* next[2];  // this thread's row of the first pass over the block to come, at its first column
  const float* stats;   // four statistics of the queries to come, for the first threads
  uint32_t smem;        // where that goes in stage 0
  int columns[2];       // 16-byte chunks that the tensors have from this thread's first column on

  __device__ __forceinline__ StreamCopy(const BackwardArgs& a, const Unit& u, const Smem<T>& shared, int head,
                                        int block) {
    const int row = threadIdx.x / T::kRowThreads, chunk = threadIdx.x % T::kRowThreads;
    const int64_t token = (T::kOwnsQueries ? u.k_start : u.q_start) + static_cast<int64_t>(block) * T::kStreamed + row;
    for (int t = 0; t < 2; ++t) {
      const TokenView& view = a.streamed[t];
      next[t] = static_cast<const char*>(view.data) + chunk * 16 +
                2 * (u.batch * view.batch_stride + head * view.head_stride + token * view.token_stride);
      columns[t] = a.dims[t] / kChunkElements - chunk;
    }
    smem = pinned(ptx::smem_address(shared.streamed) + swizzled<T::kDim>(row, chunk));
    if constexpr (!T::kOwnsQueries) {
      const int kind = threadIdx.x / (T::kStreamed / 4) % 2, four = threadIdx.x % (T::kStreamed / 4);
      stats = a.stats.data + a.stats.index(kind, head, a.p.cu_seqlens_q != nullptr, u.batch, u.q_start) +
              static_cast<int64_t>(block) * T::kStreamed + four * 4;
    }
  }

  static constexpr int smem_bytes(int tensor, int pass, int c) {
    return tensor * T::kTensorBytes + pass * T::kPassRows * T::kDim * 2 + c * T::kRowThreads * 16;
  }
  // The next block, of whose rows `num_rows` exist: the rest is zeros. Statistics exist for whole blocks.
  __device__ __forceinline__ void issue(const BackwardArgs& a, const Smem<T>& shared, int stage, int num_rows) {
    if (num_rows >= T::kStreamed) {
      each(
          [&]<int tensor, int pass, int c>() {
            ptx::cp_async_16_if<smem_bytes(tensor, pass, c), c * T::kRowThreads * 16, c * T::kRowThreads>(
                true, columns[tensor], smem + stage * T::kStageBytes, next[tensor]);
          },
          a);
    } else {
      const int row = threadIdx.x / T::kRowThreads;
      each(
          [&]<int tensor, int pass, int c>() {
            if (c * T::kRowThreads < columns[tensor]) {
              const bool valid = row + pass * T::kPassRows < num_rows;
              ptx::cp_async_16_or_zero(smem + stage * T::kStageBytes + smem_bytes(tensor, pass, c),
                                       valid ? next[tensor] + c * T::kRowThreads * 16 : next[tensor], valid);
            }
          },
          a);
    }
    if constexpr (!T::kOwnsQueries) {
      if (threadIdx.x < T::kStreamed / 2) {
        ptx::cp_async_16_or_zero(ptx::smem_address(shared.stats[stage]) + threadIdx.x * 16, stats, true);
      }
      stats += T::kStreamed;
    }
  }
  // Zeros in the columns that the tensors lack: written once, never copied over.
  __device__ __forceinline__ void zero_columns() const {
    for (int stage = 0; stage < 2; ++stage) {
      places([&]<int tensor, int pass, int c>() {
        if (c * T::kRowThreads >= columns[tensor]) *chunk_at<uint4>(stage, smem_bytes(tensor, pass, c)) = uint4{};
      });
    }
  }
  // Whether any of this thread's chunks holds an element that is not finite: its product with zero is NaN.
  __device__ __forceinline__ bool has_nonfinite(int stage) const {
    uint32_t sum = 0;
    places([&]<int tensor, int pass, int c>() {
      const uint4 x = *chunk_at<uint4>(stage, smem_bytes(tensor, pass, c));
      for (uint32_t word : {x.x, x.y, x.z, x.w}) sum = ptx::fma_x2<typename T::Element>(word, 0, sum);
    });
    return sum != 0;
  }
  // The elements of this thread's chunks that are not finite become zeros.
  __device__ __forceinline__ void zero_nonfinite(int stage) const {
    constexpr uint32_t kExponent = kDType<typename T::Element> == DType::kFloat16 ? 0x7c00u : 0x7f80u;
    places([&]<int tensor, int pass, int c>() {
      auto* element = chunk_at<uint16_t>(stage, smem_bytes(tensor, pass, c));
      for (int i = 0; i < kChunkElements; ++i) {
        if ((element[i] & kExponent) == kExponent) element[i] = 0;
      }
    });
  }

 private:
  template <class U>
  __device__ __forceinline__ U* chunk_at(int stage, int bytes) const {
    return static_cast<U*>(__cvta_shared_to_generic(smem + stage * T::kStageBytes + bytes));
  }
  // f<tensor, pass, c>() for every chunk of this thread.
  template <class F>
  static __device__ __forceinline__ void places(F&& f) {
    static_for<2>([&]<int tensor>() {
      static_for<T::kPasses>([&]<int pass>() {
        static_for<T::kColumnPasses>([&]<int c>() { f.template operator()<tensor, pass, c>(); });
      });
    });
  }
  // The same, with next[tensor] on the row of the pass; then it is on the next block.
  template <class F>
  __device__ __forceinline__ void each(F&& f, const BackwardArgs& a) {
    static_for<2>([&]<int tensor>() {
      static_for<T::kPasses>([&]<int pass>() {
        static_for<T::kColumnPasses>([&]<int c>() { f.template operator()<tensor, pass, c>(); });
        next[tensor] += pass + 1 < T::kPasses ? a.pass_bytes[tensor] : a.block_bytes[tensor];
      });
    });
  }
};

}  // namespace
}  // namespace fmkernels
