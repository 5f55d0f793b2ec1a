// SPDX-License-Identifier: Apache-2.0
// moe_grouped_mm_inner.cu: out[g] = the sum of a[r]^T b[r] over the rows r of group g, one tile of the result a block.
//
// Contract   see moe_grouped.h. Half elements. Any sizes and strides; where operands are not of whole 16-byte chunks on 16-byte
//            boundaries another kernel copies them, which is slow.
// Work       grid: groups, of each the tiles of 128 columns of a, of each those of 128 columns of b. A block walks the rows of
//            its group, which it finds by the offsets, in steps of 32. A group without rows is zeros.
// Shared     union Smem, tile_cuda.h.                                                                       64 KiB
// Pipeline   that of tile_cuda.h, over the rows; both operands lie across them.
// Numerics   float32 accumulation in the order of the rows, one rounding. Deterministic.
// Cost       2 * rows * a columns * b columns flops; the longest group alone is on as many blocks as it has tiles.

#include "moe_grouped_cuda.h"

namespace fmkernels {
namespace {

struct InnerArgs {
  MoeGroupedMmInnerParams p;
  Divisor group_tiles, column_tiles;
  Passes passes;
  bool a_is_aligned, b_is_aligned, out_is_aligned;
};

template <class T, bool kIsFast>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm)
    moe_grouped_mm_inner_kernel(const __grid_constant__ InnerArgs args) {
  using Element = typename T::Element;
  const MoeGroupedMmInnerParams& p = args.p;
  auto& smem = dynamic_smem<Smem<T>>();

  // The group and the tile of this block.
  const int group = blockIdx.x / args.group_tiles, tile = blockIdx.x % args.group_tiles;
  const int64_t first_row = int64_t{tile / args.column_tiles} * T::kRows;
  const int64_t first_column = int64_t{tile % args.column_tiles} * T::kColumns;
  const int num_rows = static_cast<int>(min(p.a.columns - first_row, int64_t{T::kRows}));
  const int num_columns = static_cast<int>(min(p.b.columns - first_column, int64_t{T::kColumns}));
  const GroupRows rows = rows_of_group(p.offsets, static_cast<int>(p.num_groups), static_cast<int>(p.a.rows), group);

  // The product.
  const int warp = threadIdx.x / kWarp;
  const int warp_row = warp / T::kWarpsAcross * T::kWarpRows, warp_column = warp % T::kWarpsAcross * T::kWarpColumns;
  using LinesA = Lines<T::kRows, true, T::kThreads>;
  using LinesB = Lines<T::kColumns, true, T::kThreads>;
  using A = Copies<LinesA, Element, kIsFast>;
  using B = Copies<LinesB, Element, kIsFast>;
  const Element* first_a = static_cast<const Element*>(p.a.data) + rows.first * p.a.row_stride + first_row;
  const Element* first_b = static_cast<const Element*>(p.b.data) + rows.first * p.b.row_stride + first_column;
  InnerWalk<A, B> walk{{first_a, p.a.row_stride, num_rows, args.a_is_aligned, static_cast<int>(threadIdx.x)},
                       {first_b, p.b.row_stride, num_columns, args.b_is_aligned, static_cast<int>(threadIdx.x)},
                       args.passes,
                       rows.count};
  Sums<T> sums = {};
  multiply<T, LinesA, LinesB>(sums, smem.stages, rows.count / kStep + (rows.count % kStep != 0), 0, 0, warp_row,
                              warp_column, warp_row < num_rows && warp_column < num_columns, walk);

  // The result.
  store_sums<T, false>(smem.sums[0], sums, warp_row, warp_column);
  __syncthreads();  // the sums of all warps are there
  Element* out = static_cast<Element*>(p.out.data) + (group * p.a.columns + first_row) * p.b.columns + first_column;
  store_tile<T>(smem.sums[0], out, p.b.columns, num_rows, num_columns, nullptr, args.out_is_aligned);
}

template <class Element>
struct InnerTraits : TileTraits<Element, 128, 128, 64, 64> {};

}  // namespace

void launch_moe_grouped_mm_inner(const MoeGroupedMmInnerParams& p, cudaStream_t stream) {
  dispatch_half(p.dtype, [&]<class Element>() {
    using T = InnerTraits<Element>;
    const int64_t row_tiles = (p.a.columns + T::kRows - 1) / T::kRows;
    const int64_t column_tiles = (p.b.columns + T::kColumns - 1) / T::kColumns;
    const dim3 grid = grid_of("moe_grouped_mm_inner", p.num_groups * row_tiles * column_tiles, 1);
    const InnerArgs args{p,
                         Divisor(static_cast<int32_t>(row_tiles * column_tiles)),
                         Divisor(static_cast<int32_t>(column_tiles)),
                         {},
                         is_aligned(p.a),
                         is_aligned(p.b),
                         is_aligned_16(p.out.data, 2, p.out.columns, {})};
    dispatch_bool(is_fast(p.a) && is_fast(p.b), [&]<bool kIsFast>() {
      launch("moe_grouped_mm_inner", moe_grouped_mm_inner_kernel<T, kIsFast>, grid, T::kThreads, sizeof(Smem<T>),
             stream, args);
    });
  });
}

}  // namespace fmkernels
