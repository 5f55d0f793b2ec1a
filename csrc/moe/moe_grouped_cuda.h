// SPDX-License-Identifier: Apache-2.0
// Where the rows of the groups are, found on the device, the tiles of a product of rows and the grid of them, and the stages
// of a product over one stretch of its inner dimension.
#pragma once

#include "../common/tile_sums_cuda.h"
#include "moe_grouped.h"

namespace fmkernels {
namespace {

// Rows that stand one after another, of one group; of none if group is their number; count 0: no rows.
struct GroupRows {
  int group, first, count;
};

// The largest of the lanes up to this one; their sum. All lanes of a warp together.
__device__ __forceinline__ int scan_max(int x, int lane) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(ptx::kAllLanes, x, step);
    if (lane >= step) x = max(x, other);
  }
  return x;
}
__device__ __forceinline__ int scan_sum(int x, int lane) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(ptx::kAllLanes, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

// Where a group ends by its own offset; the rows behind all groups are those of group num_groups.
__device__ __forceinline__ int end_of(const int32_t* offsets, int num_groups, int num_rows, int group) {
  return group < num_groups ? min(max(__ldg(offsets + group), 0), num_rows) : num_rows;
}

// Tiles of kRows rows, of which a group has as few as hold its rows: the one of this number, for a block that has no other. A
// warp looks at 32 groups at a time, all its lanes together; every lane holds the result.
template <int kRows>
__device__ __forceinline__ GroupRows rows_of_tile(const int32_t* offsets, int num_groups, int num_rows, int tile) {
  const int lane = threadIdx.x % kWarp;
  int end_before = 0, tiles_before = 0;  // of the groups before these 32
#pragma unroll 1
  for (int first = 0; first <= num_groups; first += kWarp) {
    const int own_end = end_of(offsets, num_groups, num_rows, first + lane);
    const int end = max(scan_max(own_end, lane), end_before);
    int begin = __shfl_up_sync(ptx::kAllLanes, end, 1);
    if (lane == 0) begin = end_before;
    const int tiles = (end - begin) / kRows + ((end - begin) % kRows != 0);
    const int through = scan_sum(tiles, lane) + tiles_before;
    const unsigned behind = __ballot_sync(ptx::kAllLanes, tile < through);
    if (behind != 0) {
      const int found = __ffs(static_cast<int>(behind)) - 1;
      const int tile_of_group = tile - __shfl_sync(ptx::kAllLanes, through - tiles, found);
      const int first_row = __shfl_sync(ptx::kAllLanes, begin, found) + tile_of_group * kRows;
      return {first + found, first_row, min(__shfl_sync(ptx::kAllLanes, end, found) - first_row, kRows)};
    }
    end_before = __shfl_sync(ptx::kAllLanes, end, kWarp - 1);
    tiles_before = __shfl_sync(ptx::kAllLanes, through, kWarp - 1);
  }
  return {num_groups, num_rows, 0};
}

// The same tiles, for a block that takes several; the rows of no group come last, as those of one. A warp has an index of
// them, all its lanes together: each lane knows of as many groups as any other, one after another, where they begin and how
// many tiles come before. The offsets are read twice for it, and then, for each tile, those of one lane: one of 31 groups.
template <int kRows>
class RowTiles {
 public:
  __device__ __forceinline__ RowTiles(const int32_t* offsets, int num_groups, int num_rows)
      : offsets_(offsets), num_groups_(num_groups), num_rows_(num_rows) {
    const int lane = threadIdx.x % kWarp, first = lane * lane_groups();
    int end = 0, tiles = 0;
#pragma unroll 1
    for (int i = 0; i < lane_groups(); ++i) end = max(end, end_of(offsets, num_groups, num_rows, first + i));
    begin_ = __shfl_up_sync(ptx::kAllLanes, scan_max(end, lane), 1);
    if (lane == 0) begin_ = 0;
#pragma unroll 1
    for (int i = 0, begin = begin_; i < lane_groups(); ++i) {
      end = max(begin, end_of(offsets, num_groups, num_rows, first + i));
      tiles += tiles_of(end - begin);
      begin = end;
    }
    const int through = scan_sum(tiles, lane);
    before_ = through - tiles;
    count_ = uniform(through);
  }

  __device__ __forceinline__ int count() const { return count_; }

  // Those of a tile, of count().
  __device__ __forceinline__ GroupRows at(int tile) const {
    const bool is_before = before_ <= tile;  // the last lane for which it is knows the group
    int group = uniform(is_before ? static_cast<int>(threadIdx.x % kWarp) : 0) * lane_groups();
    int begin = uniform(is_before ? begin_ : 0);
    tile -= uniform(is_before ? before_ : 0);
#pragma unroll 1
    for (;; ++group) {
      const int end = uniform(max(begin, end_of(offsets_, num_groups_, num_rows_, group)));
      const int tiles = tiles_of(end - begin);
      if (tile < tiles || group >= num_groups_) {
        return {group, begin + tile * kRows, min(end - begin - tile * kRows, kRows)};
      }
      tile -= tiles;
      begin = end;
    }
  }

 private:
  static __device__ __forceinline__ int tiles_of(int rows) { return (static_cast<unsigned>(rows) + kRows - 1) / kRows; }
  __device__ __forceinline__ int lane_groups() const { return num_groups_ / kWarp + 1; }

  const int32_t* offsets_;
  int num_groups_, num_rows_;
  int begin_, before_, count_;  // of the lane's groups; of all
};

// All rows of a group, for a warp likewise.
__device__ __forceinline__ GroupRows rows_of_group(const int32_t* offsets, int num_groups, int num_rows, int group) {
  int begin = 0;
  for (int g = threadIdx.x % kWarp; g < group; g += kWarp) begin = max(begin, end_of(offsets, num_groups, num_rows, g));
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) begin = max(begin, __shfl_xor_sync(ptx::kAllLanes, begin, step));
  return {group, begin, max(end_of(offsets, num_groups, num_rows, group) - begin, 0)};
}

// ---- tiles -----------------------------------------------------------------------------------------------------------

template <class Element, int kRows>
struct MmTraits : TileTraits<Element, kRows, 256, kRows, 64> {};
template <class Element>
struct MmTraits<Element, 128> : TileTraits<Element, 128, 128, 64, 64> {};

// Of few rows, where b is what there is to read: four times the blocks of MmTraits<Element, 16>, each with 28 KiB of it on
// its way.
template <class Element>
struct FewTraits : TileTraits<Element, 16, 64, 16, 16, 1, 8> {
  static constexpr int kBlocksPerSm = 5;  // as the shared memory of sm_90 allows
};
constexpr int64_t kFewBlocks = 512;  // about four for each multiprocessor of a large GPU

// Tiles that any offsets may need: each group, and the rows of none, ends with one that may hold a single row.
inline int64_t most_tiles(int64_t num_rows, int64_t num_groups, int64_t tile_rows) {
  const int64_t ends = num_rows < num_groups + 1 ? num_rows : num_groups + 1;
  return (num_rows + ends * (tile_rows - 1)) / tile_rows;
}

// Calls f.template operator()<T>() with the tile for so many rows a group on average, which is all that the host knows. The
// tile changes no bits.
template <class Element, class F>
void dispatch_tile(int64_t num_rows, int64_t num_groups, int64_t columns, F&& f) {
  const int64_t average = num_groups == 0 ? 0 : (num_rows + num_groups - 1) / num_groups;
  using Wide = MmTraits<Element, 16>;
  const int64_t wide_blocks = most_tiles(num_rows, num_groups, Wide::kRows) * ((columns - 1) / Wide::kColumns + 1);
  if (average <= Wide::kRows && wide_blocks < kFewBlocks) return f.template operator()<FewTraits<Element>>();
  const int tile_rows = average <= 16 ? 16 : average <= 32 ? 32 : average <= 64 ? 64 : 128;
  dispatch_int<16, 32, 64, 128>("rows of a tile", tile_rows,
                                [&]<int kRows>() { f.template operator()<MmTraits<Element, kRows>>(); });
}

// The tiles of a product, in order: of kStrip tiles of rows, which mostly have their b in common, all columns before the next
// ones. Blocks take them by turns, as many blocks as a GPU has at one time.
class TileGrid {
 public:
  static constexpr int kStrip = 8;
  struct Place {
    int row_tile, column_tile;
  };

  TileGrid(const char* name, int64_t row_tiles, int64_t columns, int64_t tile_columns) {
    constexpr int64_t kMaxColumnTiles = 0x7fffffff / kStrip;
    const int64_t column_tiles = (columns + tile_columns - 1) / tile_columns;
    FM_CHECK(column_tiles <= kMaxColumnTiles, name, ": b has too many columns on CUDA, ", columns);
    strip_tiles_ = Divisor(static_cast<int32_t>(column_tiles * kStrip));
    most_ = grid_of(name, row_tiles * column_tiles, 1).x;
  }
  int64_t most() const { return most_; }  // tiles that any offsets may need
  // Of so many tiles of rows: all tiles, and where one of them is.
  __device__ __forceinline__ unsigned count(int row_tiles) const { return row_tiles * (strip_tiles_.value() / kStrip); }
  __device__ __forceinline__ Place at(int tile, int row_tiles) const {
    const int first = tile / strip_tiles_ * kStrip, of_strip = tile % strip_tiles_;
    const int rows = min(row_tiles - first, kStrip), column = of_strip / rows;
    return {first + of_strip - column * rows, column};
  }

 private:
  Divisor strip_tiles_;
  int64_t most_;
};

// ---- operands and results --------------------------------------------------------------------------------------------

// The copies of both operands, a stage after another, over inner indices from 0 to `end`.
template <class CopiesA, class CopiesB>
struct InnerWalk {
  static constexpr bool kConverts = false;
  CopiesA a;
  CopiesB b;
  const Passes& passes;
  int end;
  uint32_t inner = 0;  // may pass 2^31 behind the end

  __device__ __forceinline__ void start(uint32_t stage_a, uint32_t stage_b) const {
    const int left = static_cast<int>(static_cast<uint32_t>(end) - inner);
    const Piece piece{0, left > 0 ? static_cast<int>(inner) : 0, min(left, kStep)};
    a.start(stage_a, piece, piece, passes);
    b.start(stage_b, piece, piece, passes);
  }
  __device__ __forceinline__ void advance() { inner += kStep; }
};

// Stores the first rows and columns of a tile of sums, with `bias` where there is one, at `out`, whose rows are `stride` apart.
template <class T>
__device__ __forceinline__ void store_tile(float* sums, typename T::Element* out, int64_t stride, int num_rows,
                                           int num_columns, const float* bias, bool is_aligned) {
  using Element = typename T::Element;
  for_each_chunk<SumLines<T, false>, T>(sums, ptx::tid_x(), [&](int line, int along, float (&x)[kChunk]) {
    if (line >= num_rows || along >= num_columns) return;
    const int count = min(num_columns - along, kChunk);
    if (bias != nullptr) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i] += i < count ? __ldg(bias + along + i) : 0.0f;
    }
    const Vector<Element, kChunk> chunk = pack_chunk<Element>(x);
    Element* to = out + line * stride + along;
    if (is_aligned && count == kChunk) return store_vector<Element, kChunk>(to, chunk);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i < count) to[i] = chunk.lane[i];
    }
  });
}

}  // namespace
}  // namespace fmkernels
