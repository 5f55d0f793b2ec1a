// SPDX-License-Identifier: Apache-2.0
// Tiles, shared memory and geometry of attention_forward.cu. Included by it alone.
#pragma once

#include "../common/divisor.h"
#include "attention_mask_cuda.h"
#include "attention_products_cuda.h"

namespace fmkernels {
namespace {

constexpr float kRescaleLog2 = 8.0f;     // growth of a maximum, in log2 units, from which on o is rescaled
constexpr float kNoMax = 3.4028235e38f;  // shift of a row that has seen no finite score: larger than any growth

// ---- tiles ----------------------------------------------------------------------------------------------------------

struct Tile {
  int rows, keys, warps;
  bool operator==(const Tile&) const = default;
};

// For half elements the tile of an architecture whose blocks may have `smem_kib` of shared memory: 163 and more, or 99
// (sm_86, 89, 120). 32 rows a warp halve the traffic of keys and values from shared memory; beyond 128 columns o leaves room
// for 16.
// float32 has tiles of 99 KiB alone, with rows twice as long.
constexpr Tile tile_of(int smem_kib, int dim, bool is_float) {
  if (is_float) return dim == 64 ? Tile{128, 32, 4} : dim == 128 ? Tile{128, 32, 8} : Tile{64, 16, 4};  // 256
  const bool small = smem_kib < 163;
  switch (dim) {
    case 64: return {128, 64, 4};
    case 96: return {128, 64, 4};
    case 128: return small ? Tile{128, 32, 4} : Tile{128, 48, 4};
    case 192: return small ? Tile{128, 32, 8} : Tile{128, 64, 8};
    default: return small ? Tile{128, 32, 8} : Tile{128, 64, 8};  // 256
  }
}

// Whether blocks of a mask, of 64 or 128 keys, are whole blocks of keys: else a call with a mask takes the tile for 99 KiB.
constexpr bool takes_block_mask(Tile tile) { return kSmallestMaskBlock % tile.keys == 0; }

// Whether a kernel with this tile is launched on what is being compiled for. Code for sm_80 runs on sm_86 and 89 too, and
// PTX for any architecture on all later ones; only code for an "a" architecture runs there alone.
template <class T>
__device__ constexpr bool is_launched() {
#if defined(__CUDA_ARCH_SPECIFIC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool is_small = __CUDA_ARCH__ >= 1200;
  return T::kHasOneTile || is_small == (T::kSmemKiB == 99) || (T::kSmemKiB == 99 && !T::kLargeTakesBlockMask);
#else
  return true;
#endif
}

template <class Element, int kDim_, int kSmemKiB_>
struct Traits : RowTraits<Element, kDim_> {
  using Row = RowTraits<Element, kDim_>;
  static constexpr int kSmemKiB = kSmemKiB_;
  static constexpr bool kHasOneTile = tile_of(99, kDim_, Row::kSplits) == tile_of(163, kDim_, Row::kSplits);
  static constexpr Tile kTile = tile_of(kSmemKiB, kDim_, Row::kSplits);
  static constexpr int kDim = kDim_, kRows = kTile.rows, kKeys = kTile.keys, kWarps = kTile.warps;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kWarpRows = kRows / kWarps, kRowTiles = kWarpRows / 16;  // m16 tiles of a warp
  static constexpr int kKeyTiles = kKeys / 8, kColumnTiles = kDim / 8;          // n8 tiles of s and of o
  static constexpr int kPassRows = kThreads / Row::kRowThreads;                 // rows that all threads copy at a time
  static constexpr int kValueBytes = kKeys * Row::kRowBytes;  // from a key to its value in shared memory
  static constexpr int kBlocksPerSm = kThreads == 128 ? 2 : 1;
  static constexpr bool kKeepsQ = kDim == 64 && !Row::kSplits;  // fragments of q stay in registers
  static constexpr bool kKeepsColumns = kDim == 64;             // as do the addresses of all column steps of the keys
  static constexpr bool kTakesBlockMask = takes_block_mask(kTile);
  static constexpr bool kLargeTakesBlockMask = takes_block_mask(tile_of(163, kDim, Row::kSplits));

  static_assert(kWarpRows % 16 == 0 && kKeys % 16 == 0 && kDim % 32 == 0, "whole fragments");
  static_assert(kKeys % kPassRows == 0 && kRows % kPassRows == 0, "whole passes of a load");
  static_assert(kKeys / kPassRows <= 4, "Passes");
  static_assert(kSplitKeys % kKeys == 0, "whole blocks in a chunk");
  static_assert(kPassRows % 8 == 0, "a pass keeps the swizzle of its rows");
};

// Factors of the bytes from one pass over a block to the next. The kernel reads them from its arguments, where one
// instruction multiplies and adds; of factors that it knows the compiler makes two.
struct Passes {
  int number[4] = {0, 1, 2, 3};
  int back;  // from the first pass over a block to that over the block before it
};

struct Args {
  AttentionForwardParams p;
  AttentionPartials partials;
  float scale_log2;  // of products, where nothing else modifies them
  bool modifies;     // scores, beyond their scale
  bool is_general;   // every block goes through the loop that modifies and masks
  Divisor group;     // query heads whose rows share a tile
  Divisor kv_share;  // neighbours in the grid that share a kv head: 1, or as many as it has query heads
  Passes passes;
  int chunks[2];  // of 16 bytes in a row of k, of v
};

// ---- geometry -------------------------------------------------------------------------------------------------------

// One sequence of the batch, and the unit of this block.
struct Unit {
  Divisor group;  // query heads whose rows share a tile
  int q_start, k_start, seq_q, seq_k, num_rows;
  int row_begin, chunk;  // chunk: -1 where the keys are not split
  bool exists;
};

__device__ __forceinline__ Unit unit_of(const Args& a, int tile_rows) {
  const Sequence s = sequence_of(a.p, blockIdx.z);
  Unit u{a.group, s.q_start, s.k_start, s.seq_q, s.seq_k, 0, 0, -1, true};
  u.num_rows = u.seq_q * u.group.value();
  const int unit = blockIdx.x;
  if (is_split(u.num_rows, u.seq_k)) {
    u.chunk = unit;
    u.exists = unit < (u.seq_k + kSplitKeys - 1) / kSplitKeys && u.num_rows > 0;
  } else {
    const int num_tiles = (u.num_rows + tile_rows - 1) / tile_rows;
    u.exists = unit < num_tiles;
    u.row_begin = (num_tiles - 1 - unit) * tile_rows;  // causal: the longest first
  }
  return u;
}

// The query, the head of a row, and the kv head of all of them.
__device__ __forceinline__ int query_of(const Unit& u, int row) { return row / u.group; }
__device__ __forceinline__ int64_t head_of(const Unit& u, int row) {
  return static_cast<int64_t>(blockIdx.y) * u.group.value() + row % u.group;
}

__device__ __forceinline__ int kv_head_of(const Args& a) { return static_cast<int>(blockIdx.y) / a.kv_share; }

// For rows [begin, end): keys that any of them sees, and keys that all of them see.
struct RowsVisible {
  Range any, all;
};
__device__ __forceinline__ RowsVisible visible_to(const AttentionForwardParams& p, const Unit& u, int begin, int end) {
  end = min(end, u.num_rows);
  if (begin >= end) return {{0, 0}, {0, 0}};
  const Range first = visible_keys(p, u, query_of(u, begin)), last = visible_keys(p, u, query_of(u, end - 1));
  RowsVisible v{{first.begin, last.end}, {last.begin, first.end}};
  if (u.chunk >= 0) {
    v.any = {max(v.any.begin, u.chunk * kSplitKeys), min(v.any.end, (u.chunk + 1) * kSplitKeys)};
    v.all = {max(v.all.begin, u.chunk * kSplitKeys), min(v.all.end, (u.chunk + 1) * kSplitKeys)};
  }
  return v;
}

// From a lane's chunk of the first rows that its warp loads or stores to its chunk of the rows of another pass.
template <class T, int pass>
__device__ __forceinline__ uint32_t in_pass(uint32_t first) {
  constexpr bool flips = T::kWarpPassRows % 8 != 0;  // four rows further a swizzle flips the third bit of a chunk
  return (first ^ (flips ? pass % 2 * 4 * 16 : 0)) + pass * T::kWarpPassRows * T::kRowBytes;
}

// Where a row of q or o begins.
template <class Element>
__device__ __forceinline__ Element* row_at(const TokenView& view, const Unit& u, int row) {
  return static_cast<Element*>(view.data) + blockIdx.z * view.batch_stride +
         (u.q_start + query_of(u, row)) * view.token_stride + head_of(u, row) * view.head_stride;
}

// Where the rows of q or o begin that this warp owns. A lane works out the place of one row and gives it to the others:
// all lanes call at() together. Rows that do not exist begin where the last one does.
template <class T>
class RowsOfWarp {
 public:
  __device__ __forceinline__ RowsOfWarp(const TokenView& view, const Unit& u) {
    const int row = u.row_begin + static_cast<int>(threadIdx.x) / kWarp * T::kWarpRows +
                    static_cast<int>(threadIdx.x) % kWarp % T::kWarpRows;
    mine_ = row_at<typename T::Element>(view, u, min(row, u.num_rows - 1));
  }
  __device__ __forceinline__ typename T::Element* at(int row) const {
    return reinterpret_cast<typename T::Element*>(
        __shfl_sync(ptx::kAllLanes, reinterpret_cast<unsigned long long>(mine_), row));
  }

 private:
  typename T::Element* mine_;
};

// The blocks of keys that a tile visits, and the block of the mask, its first line, that its first query lies in.
template <class T>
using KeyWalk = BlockWalk<T::kKeys, -1>;
__device__ __forceinline__ int first_line_of(const BlockMaskView& m, const Unit& u) {
  return block_of(m, query_of(u, u.row_begin));
}

template <class T>
struct Smem {
  typename T::Element q[T::kRows][T::kDim];      // [row, column], swizzled; then o
  typename T::Element kv[2][T::kKeys][T::kDim];  // [keys or values, key, column], swizzled
  // What only masks and results ask for: kept here, because the products leave no register for it.
  Unit unit;
  int first_block;
  Range plain;  // blocks that every row of the tile sees whole, where nothing else modifies scores; end 0: none
  RowsVisible visible[T::kWarps];
  KeyWalk<T> walks[T::kWarps];
};

}  // namespace
}  // namespace fmkernels
