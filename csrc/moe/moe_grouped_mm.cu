// SPDX-License-Identifier: Apache-2.0
// moe_grouped_mm.cu: out[r] = a[r] b[g] + bias[g] for the rows r of each group g, by tiles of rows and columns.
//
// Contract   see moe_grouped.h. Half elements. Any sizes and strides; where operands are not of whole 16-byte chunks on 16-byte
//            boundaries another kernel copies them, chunk by chunk or element by element, which is slow.
// Work       grid: the blocks that the GPU has at one time, or a bound of the tiles, which the host knows from the rows and
//            groups alone. Block i takes the tiles i, i + blocks, ..., of as many as the offsets make, of which each warp has
//            an index (RowTiles). Rows of no group are tiles of zeros. Of kStrip tiles of rows, which mostly have their b in
//            common, all columns come before the next ones.
// Registers  Each layout of b has a loop of its own: with both in one loop the compiler spills.
// Tiles      128 x 128, and 16, 32, 64 x 256 where the groups have so few rows on average, of the bounds that is; 16 x 64 where
//            those of 16 x 256 would be too few to fill a GPU.
// Shared     union Smem, tile_cuda.h.    128 x 128: 64 KiB, 64 x 256: 80 KiB, 32 x 256: 72, 16 x 256: 68, 16 x 64: 40
// Pipeline   that of tile_cuda.h, over the inner dimension.
// Numerics   float32 accumulation in the order of the inner dimension, one rounding. Deterministic.
// Cost       2 * rows * inner * columns flops, and up to a tile more a group.

#include "moe_grouped_cuda.h"

namespace fmkernels {
namespace {

struct MmArgs {
  MoeGroupedMmParams p;
  TileGrid grid;
  Passes passes;
  bool b_is_row_major, a_is_aligned, b_is_aligned, out_is_aligned;
};

// Zeros in the first rows and columns of a tile at `out`, whose rows are `stride` apart.
template <class T>
__device__ __forceinline__ void store_zeros(typename T::Element* out, int64_t stride, int num_rows, int num_columns,
                                            bool is_aligned) {
  using Element = typename T::Element;
  constexpr int kLineChunks = T::kColumns / kChunk;
  const int along = ptx::tid_x() % kLineChunks * kChunk;
  for (int line = ptx::tid_x() / kLineChunks; line < num_rows; line += T::kThreads / kLineChunks) {
    Element* to = out + line * stride + along;
    if (is_aligned && along + kChunk <= num_columns) {
      store_vector<Element, kChunk>(to, {});
      continue;
    }
    for (int i = 0; i < kChunk && along + i < num_columns; ++i) to[i] = {};
  }
}

template <class T, bool kIsFast>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm)
    moe_grouped_mm_kernel(const __grid_constant__ MmArgs args) {
  using Element = typename T::Element;
  const MoeGroupedMmParams& p = args.p;
  auto& smem = dynamic_smem<Smem<T>>();

  const int num_groups = static_cast<int>(p.num_groups), inner = static_cast<int>(p.a.columns);
  const RowTiles<T::kRows> row_tiles(p.offsets, num_groups, static_cast<int>(p.out.rows));
  auto multiply_tiles = [&]<bool kIsRowMajor>() {
    using LinesA = Lines<T::kRows, false, T::kThreads>;
    using LinesB = Lines<T::kColumns, kIsRowMajor, T::kThreads>;
    using A = Copies<LinesA, Element, kIsFast>;
    using B = Copies<LinesB, Element, kIsFast>;
#pragma unroll 1
    for (unsigned tile = blockIdx.x; tile < args.grid.count(row_tiles.count()); tile += gridDim.x) {
      // Its rows and columns.
      const auto [row_tile, column_tile] = args.grid.at(static_cast<int>(tile), row_tiles.count());
      const GroupRows rows = row_tiles.at(row_tile);
      const int64_t first_column = int64_t{column_tile} * T::kColumns;
      const int num_columns = static_cast<int>(min(p.out.columns - first_column, int64_t{T::kColumns}));
      Element* out = static_cast<Element*>(p.out.data) + rows.first * p.out.columns + first_column;
      if (rows.group == num_groups) {
        store_zeros<T>(out, p.out.columns, rows.count, num_columns, args.out_is_aligned);
        continue;
      }

      // The product.
      const int thread = ptx::tid_x(), warp = thread / kWarp;
      const int warp_row = warp / T::kWarpsAcross * T::kWarpRows;
      const int warp_column = warp % T::kWarpsAcross * T::kWarpColumns;
      const bool is_wanted = warp_row < rows.count && warp_column < num_columns;
      const Element* first_a = static_cast<const Element*>(p.a.data) + rows.first * p.a.row_stride;
      const Element* first_b =
          static_cast<const Element*>(p.b.data) + rows.group * p.b.batch_stride + first_column * p.b.column_stride;
      Sums<T> sums = {};
      InnerWalk<A, B> walk{
          {first_a, p.a.row_stride, rows.count, args.a_is_aligned, thread},
          {first_b, kIsRowMajor ? p.b.row_stride : p.b.column_stride, num_columns, args.b_is_aligned, thread},
          args.passes,
          inner};
      multiply<T, LinesA, LinesB>(sums, smem.stages, (inner + kStep - 1) / kStep, 0, 0, warp_row, warp_column,
                                  is_wanted, walk);

      // The result.
      store_sums<T, false>(smem.sums[0], sums, warp_row, warp_column);
      __syncthreads();  // the sums of all warps are there
      store_tile<T>(smem.sums[0], out, p.out.columns, rows.count, num_columns,
                    p.bias == nullptr ? nullptr : p.bias + rows.group * p.out.columns + first_column,
                    args.out_is_aligned);
      __syncthreads();  // all have read the sums, in whose place the next tile is copied
    }
  };
  if (args.b_is_row_major) multiply_tiles.template operator()<true>();
  else multiply_tiles.template operator()<false>();
}

template <class T, bool kIsFast>
void launch_tiles(const MoeGroupedMmParams& p, cudaStream_t stream) {
  const MmArgs args{
      p,
      TileGrid("moe_grouped_mm", most_tiles(p.out.rows, p.num_groups, T::kRows), p.out.columns, T::kColumns),
      {},
      p.b.is_row_major(),
      is_aligned(p.a),
      is_aligned(p.b),
      is_aligned_16(p.out.data, 2, p.out.columns, {})};
  launch_by_turns("moe_grouped_mm", moe_grouped_mm_kernel<T, kIsFast>, args.grid.most(), T::kThreads, sizeof(Smem<T>),
                  stream, args);
}

}  // namespace

void launch_moe_grouped_mm(const MoeGroupedMmParams& p, cudaStream_t stream) {
  dispatch_half(p.dtype, [&]<class Element>() {
    if (!is_fast(p.a) || !is_fast(p.b)) return launch_tiles<MmTraits<Element, 64>, false>(p, stream);
    dispatch_tile<Element>(p.out.rows, p.num_groups, p.out.columns,
                           [&]<class T>() { launch_tiles<T, true>(p, stream); });
  });
}

}  // namespace fmkernels
