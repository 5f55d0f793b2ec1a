// SPDX-License-Identifier: Apache-2.0
// The kernel of dsd and its launcher, of block_sparse.cu and block_sparse_int8.cu, which say what it does.
#pragma once

#include <type_traits>

#include "block_sparse_result_cuda.h"

namespace fmkernels {
namespace {

struct DsdArgs {
  BlockSparseDsdParams p;
  Divisor column_tiles, batches, block_rows;  // batches: that share a list; block_rows: of a list
  int num_rows;                               // of blocks, of all lists
  int tile_inner, num_block_columns;
  Passes passes;
  bool dense_is_row_major, dense_is_aligned, out_is_row_major, out_is_aligned;
};

// The copies of a row of blocks, step by step. kIsPaired: a step takes two entries where blocks have 16 inner columns.
template <class CopiesA, class CopiesB, bool kIsPaired>
class Walk {
 public:
  static constexpr bool kConverts = CopiesA::kConverts;

  __device__ __forceinline__ Walk(const DsdArgs& args, int begin, int end, const CopiesA& a, const CopiesB& b)
      : args_(args), a_(a), b_(b), entry_(begin), end_(end) {
    read_entries();
    take_entries();
  }

  // Starts the copies of a step.
  __device__ __forceinline__ void start(uint32_t stage_a, uint32_t stage_b) const {
    const Block &first = blocks_[0], &second = blocks_[kIsPaired];
    auto of_a = [&](const Block& block) { return Piece{block.place, block.inner, block.left}; };
    auto of_b = [&](const Block& block) { return Piece{0, block.first + block.inner, block.left}; };
    a_.start(stage_a, of_a(first), of_a(second), args_.passes);
    b_.start(stage_b, of_b(first), of_b(second), args_.passes);
  }
  __device__ __forceinline__ void advance() {
    if constexpr (kConverts) {
      for (int i = 0; i < kEntries; ++i) {
        for (int step = 0; step + 1 < kStepsAhead; ++step) scales_[step][i] = scales_[step + 1][i];
        scales_[kStepsAhead - 1][i] = blocks_[i].scale;
      }
    }
    for (Block& block : blocks_) block.inner += kStep, block.left -= kStep;
    if (blocks_[0].inner >= args_.tile_inner) take_entries();
  }
  __device__ __forceinline__ void convert(uint32_t stage_a) const {
    a_.convert(stage_a, scales_[0][0], scales_[0][kIsPaired]);
  }

 private:
  static constexpr int kEntries = kIsPaired ? 2 : 1, kStepsAhead = 3, kBytes = kConverts ? 1 : 2;
  struct Block {
    int64_t place;  // in values, in bytes
    int first, inner,
        left;     // its first row of dense, and of the step: its first one in the block, and how many there are
    float scale;  // of int8 values
  };

  __device__ __forceinline__ bool takes_two() const { return kIsPaired && args_.tile_inner == kStep / 2; }

  __device__ __forceinline__ void read_entries() {
    const int num_entries = takes_two() ? 2 : 1;
    for (int i = 0; i < kEntries; ++i) {
      next_index_[i] = -1;
      const int entry = entry_ + i;
      if (entry >= end_ || i >= num_entries) continue;
      next_index_[i] = __ldg(args_.p.indices + entry);
      next_position_[i] = args_.p.positions == nullptr ? entry : __ldg(args_.p.positions + entry);
    }
    entry_ += num_entries;
  }
  __device__ __forceinline__ void take_entries() {
    const BlockSparseDsdParams& p = args_.p;
    for (int i = 0; i < kEntries; ++i) {
      const bool exists = static_cast<uint32_t>(next_index_[i]) < static_cast<uint32_t>(args_.num_block_columns) &&
                          static_cast<uint32_t>(next_position_[i]) < static_cast<uint32_t>(p.num_blocks);
      Block& block = blocks_[i];
      block.inner = 0;
      block.first = exists ? next_index_[i] * args_.tile_inner : 0;
      block.left = exists ? min(static_cast<int>(p.inner) - block.first, args_.tile_inner) : 0;
      block.place = exists ? int64_t{next_position_[i]} * (p.block_rows * p.block_columns * kBytes) : 0;
      if constexpr (kConverts) block.scale = exists ? __ldg(p.block_scales + next_position_[i]) : 0.0f;
    }
    if (takes_two()) blocks_[1].inner -= kStep / 2, blocks_[1].left += kStep / 2;
    else if (kIsPaired) blocks_[1] = blocks_[0];
    read_entries();
  }

  const DsdArgs& args_;
  const CopiesA& a_;
  const CopiesB& b_;
  int entry_, end_;                                     // the entry that is read next, and the end of the list
  int next_index_[kEntries], next_position_[kEntries];  // of what was read last
  Block blocks_[kEntries];                              // that are copied
  float scales_[kStepsAhead][kEntries];                 // of the steps under way, the oldest first
};

template <class T, bool kTransposed>
__device__ __forceinline__ void store_out(const DsdArgs& args, float* sums, int64_t batch, int64_t first_row,
                                          int64_t first_column) {
  using Element = typename T::Element;
  using L = SumLines<T, kTransposed>;
  const BlockSparseDsdParams& p = args.p;
  const int64_t first_line = kTransposed ? first_column : first_row,
                first_along = kTransposed ? first_row : first_column;
  const int64_t num_lines = (kTransposed ? p.columns : p.rows) - first_line;
  const int64_t line_stride = kTransposed ? p.rows : p.columns, length = line_stride - first_along;
  Element* out =
      static_cast<Element*>(p.out.data) + batch * p.out.batch_stride + first_line * line_stride + first_along;
  for_each_chunk<L, T>(sums, threadIdx.x, [&](int line, int along, float (&x)[kChunk]) {
    if (line >= num_lines || along >= length) return;
    const int count = static_cast<int>(min(length - along, int64_t{kChunk}));
    const auto chunk = finish<Element, kTransposed>(p.epilogue, x, first_row + (kTransposed ? along : line), count);
    Element* to = out + line * line_stride + along;
    if (args.out_is_aligned && count == kChunk) return store_vector<Element, kChunk>(to, chunk);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i < count) to[i] = chunk.lane[i];
    }
  });
}

template <class T, bool kIsFast, bool kIsInt8>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm)
    block_sparse_dsd_kernel(const __grid_constant__ DsdArgs args) {
  using Element = typename T::Element;
  using Stored = std::conditional_t<kIsInt8, int8_t, Element>;  // of S
  const BlockSparseDsdParams& p = args.p;
  auto& smem = dynamic_smem<Smem<T>>();

  // The row of blocks and the tile of columns of this block.
  const int tile = blockIdx.x, item = tile / args.column_tiles;
  const int row = p.order[item / args.batches];
  if (static_cast<uint32_t>(row) >= static_cast<uint32_t>(args.num_rows)) return;
  const int list = row / args.block_rows, block_row = row % args.block_rows;
  const int64_t batch = p.num_lists == 1 ? item % args.batches : list;
  const int64_t first_row = int64_t{block_row} * T::kRows,
                first_column = int64_t{tile % args.column_tiles} * T::kColumns;
  const int32_t* offsets = p.offsets + list * (args.block_rows.value() + 1ll) + block_row;
  const int begin = max(0, min(offsets[0], static_cast<int>(p.num_entries)));
  const int end = max(begin, min(offsets[1], static_cast<int>(p.num_entries)));

  // The product.
  const int warp = threadIdx.x / kWarp;
  const int warp_row = warp / T::kWarpsAcross * T::kWarpRows, warp_column = warp % T::kWarpsAcross * T::kWarpColumns;
  const int num_columns = static_cast<int>(min(p.columns - first_column, int64_t{T::kColumns}));
  const bool is_wanted = warp_column < num_columns && first_row + warp_row < p.rows;
  const Element* dense =
      static_cast<const Element*>(p.dense.data) + batch * p.dense.batch_stride + first_column * p.dense.column_stride;
  Sums<T> sums = {};
  dispatch_lines<T>(p.transposed, args.dense_is_row_major, [&]<class LinesA, class LinesB>() {
    constexpr int kLineA = LinesA::kAcross ? T::kRows : 0;  // else a block has any number of columns
    constexpr bool kIsPaired = kIsFast && T::kRows == 16;
    using A = Copies<LinesA, Element, kIsFast, true, kIsPaired, Stored>;
    using B = Copies<LinesB, Element, kIsFast, false, kIsPaired>;
    const A a(static_cast<const Stored*>(p.values), kLineA != 0 ? kLineA : p.block_columns, T::kRows, true,
              threadIdx.x);
    const B b(dense, LinesB::kAcross ? p.dense.row_stride : p.dense.column_stride, num_columns, args.dense_is_aligned,
              threadIdx.x);
    Walk<A, B, kIsPaired> walk(args, begin, end, a, b);
    const int num_entries = end - begin;
    const int num_steps = kIsPaired && args.tile_inner < kStep ? (num_entries + 1) / 2
                                                               : num_entries * ((args.tile_inner + kStep - 1) / kStep);
    multiply<T, LinesA, LinesB>(sums, smem.stages, num_steps, 0, 0, warp_row, warp_column, is_wanted, walk);
  });

  // The result.
  auto store = [&]<bool kTransposed>() {
    store_sums<T, kTransposed>(smem.sums[0], sums, warp_row, warp_column);
    __syncthreads();  // the sums of all warps are there
    store_out<T, kTransposed>(args, smem.sums[0], batch, first_row, first_column);
  };
  if (args.out_is_row_major) store.template operator()<false>();
  else store.template operator()<true>();
}

template <class Element, int kRows>
struct DsdTraits : TileTraits<Element, kRows, 256, kRows, 64> {};
template <class Element>
struct DsdTraits<Element, 128> : TileTraits<Element, 128, 128, 64, 64> {};

// Of values that are int8_t, or of the dtype.
template <bool kIsInt8>
void launch_dsd(const BlockSparseDsdParams& p, cudaStream_t stream) {
  constexpr int64_t kMaxEntries = int64_t{1} << 29;  // steps are counted in 32 bits
  FM_CHECK(p.num_entries < kMaxEntries, "block_sparse_dsd: there must be less than ", kMaxEntries,
           " indices on CUDA, got ", p.num_entries);
  const bool fast = is_fast(p.dense) && (p.inner % kChunk == 0 || p.transposed);
  dispatch_half(p.dtype, [&]<class Element>() {
    dispatch_int<16, 32, 64, 128>("rows of a block", p.tile_rows(), [&]<int kRows>() {
      using T = DsdTraits<Element, kRows>;
      const int64_t column_tiles = (p.columns + T::kColumns - 1) / T::kColumns;
      const int64_t batches = p.num_lists == 1 ? p.batch : 1;
      const dim3 grid = grid_of("block_sparse_dsd", p.num_lists * p.num_block_rows() * batches * column_tiles, 1);
      const DsdArgs args{p,
                         Divisor(static_cast<int32_t>(column_tiles)),
                         Divisor(static_cast<int32_t>(batches)),
                         Divisor(static_cast<int32_t>(p.num_block_rows())),
                         static_cast<int>(p.num_lists * p.num_block_rows()),
                         p.tile_inner(),
                         static_cast<int>(p.num_block_columns()),
                         {},
                         p.dense.is_row_major(),
                         is_aligned(p.dense),
                         p.out.is_row_major(),
                         is_aligned_16(p.out.data, 2, p.out.is_row_major() ? p.columns : p.rows, {p.out.batch_stride})};
      dispatch_bool(fast, [&]<bool kIsFast>() {
        launch("block_sparse_dsd", block_sparse_dsd_kernel<T, kIsFast, kIsInt8>, grid, T::kThreads, sizeof(Smem<T>),
               stream, args);
      });
    });
  });
}

}  // namespace
}  // namespace fmkernels
