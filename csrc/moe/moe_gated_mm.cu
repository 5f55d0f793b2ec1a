// SPDX-License-Identifier: Apache-2.0
// moe_gated_mm.cu: out[r] = silu(g) u, (g | u) = a[t] b[e], for the rows r of each expert e, t the token of r.
//
// Contract   see moe_gated.h. Half elements. Any sizes and strides; where operands are not of whole 16-byte chunks on 16-byte
//            boundaries another kernel copies them, which is slow. Tokens that are none are rows of zeros.
// Work       that of moe_grouped_mm.cu, with the tiles of columns of moe_gated_cuda.h. A thread reads the token of each row that
//            it copies once a tile.
// Tiles      likewise: 128 x 128, 16, 32, 64 x 256 and 16 x 64; half as many elements of a row.
// Shared     union Smem, tile_cuda.h.    128 x 128: 64 KiB, 64 x 256: 80 KiB, 32 x 256: 72, 16 x 256: 68, 16 x 64: 40
// Pipeline   that of tile_cuda.h, over the inner dimension.
// Numerics   float32 accumulation in the order of the inner dimension; the sums are not rounded before the unit. Deterministic.
// Cost       4 * rows * inner * width flops, and up to a tile more a group. Rows of a are read once a tile of columns, from L2.

#include "moe_gated_cuda.h"

namespace fmkernels {
namespace {

struct GatedArgs {
  MoeGatedMmParams p;
  TileGrid grid;
  Passes passes;
  int64_t a_row_bytes;
  bool b_is_row_major, a_is_aligned, b_is_aligned, out_is_aligned;
};

template <class T, bool kIsFast>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm)
    moe_gated_mm_kernel(const __grid_constant__ GatedArgs args) {
  using Element = typename T::Element;
  const MoeGatedMmParams& p = args.p;
  auto& smem = dynamic_smem<Smem<T>>();

  const int num_groups = static_cast<int>(p.num_groups), inner = static_cast<int>(p.a.columns);
  const RowTiles<T::kRows> row_tiles(p.offsets, num_groups, static_cast<int>(p.out.rows));
  auto multiply_tiles = [&]<bool kIsRowMajor>() {
    using LinesA = Lines<T::kRows, false, T::kThreads>;
    using LinesB = Lines<T::kColumns, kIsRowMajor, T::kThreads>;
    using A = GatheredCopies<LinesA, Element, kIsFast>;
    using B = Copies<LinesB, Element, kIsFast>;
#pragma unroll 1
    for (unsigned tile = blockIdx.x; tile < args.grid.count(row_tiles.count()); tile += gridDim.x) {
      // Its rows and columns.
      const auto [row_tile, column_tile] = args.grid.at(static_cast<int>(tile), row_tiles.count());
      const GroupRows rows = row_tiles.at(row_tile);
      const GatedColumns columns{int64_t{column_tile} * (T::kColumns / 2), p.out.columns, p.is_interleaved};
      Element* out = static_cast<Element*>(p.out.data) + rows.first * columns.width;
      Element* gate_up =
          p.gate_up == nullptr ? nullptr : static_cast<Element*>(p.gate_up) + 2 * columns.width * rows.first;

      // The product; of rows of no group the sums are zeros.
      const int thread = ptx::tid_x(), warp = thread / kWarp;
      const int warp_row = warp / T::kWarpsAcross * T::kWarpRows;
      const int warp_column = warp % T::kWarpsAcross * T::kWarpColumns;
      Sums<T> sums = {};
      if (rows.group < num_groups) {
        InnerWalk<A, B> walk{{p.a, args.a_row_bytes, args.a_is_aligned, thread,
                              [&](int line) {
                                if (line >= rows.count) return -1;
                                return p.pos_to_token == nullptr ? rows.first + line
                                                                 : p.pos_to_token[rows.first + line];
                              }},
                             copies_of_columns<LinesB, Element, kIsFast>(
                                 static_cast<const Element*>(p.b.data) + rows.group * p.b.batch_stride, p.b, columns,
                                 args.b_is_aligned, thread),
                             args.passes,
                             inner};
        const bool is_wanted = warp_row < rows.count && warp_column / 2 < columns.width - columns.first;
        multiply<T, LinesA, LinesB>(sums, smem.stages, (inner + kStep - 1) / kStep, 0, 0, warp_row, warp_column,
                                    is_wanted, walk);
      }

      // The result.
      store_sums<T, false>(smem.sums[0], sums, warp_row, warp_column);
      __syncthreads();  // the sums of all warps are there
      auto is_row = [&](int line) {
        return p.pos_to_token == nullptr || is_within(p.pos_to_token[rows.first + line], p.a.rows);
      };
      auto store = [&]<bool kIsInterleaved>() {
        store_gated<T, kIsInterleaved>(smem.sums[0], out, gate_up, columns, rows.count, args.out_is_aligned, is_row);
      };
      if (columns.is_interleaved) store.template operator()<true>();
      else store.template operator()<false>();
      __syncthreads();  // all have read the sums, in whose place the next tile is copied
    }
  };
  if (args.b_is_row_major) multiply_tiles.template operator()<true>();
  else multiply_tiles.template operator()<false>();
}

template <class T, bool kIsFast>
void launch_tiles(const MoeGatedMmParams& p, bool b_is_aligned, cudaStream_t stream) {
  const int64_t row_tiles = most_tiles(p.out.rows, p.num_groups, T::kRows);
  const GatedArgs args{p,
                       TileGrid("moe_gated_mm", row_tiles, p.out.columns, T::kColumns / 2),
                       {},
                       int64_t{sizeof(typename T::Element)} * p.a.row_stride,
                       p.b.is_row_major(),
                       is_aligned(p.a),
                       b_is_aligned,
                       is_aligned_16(p.out.data, 2, p.out.columns, {}) && is_aligned_16(p.gate_up, 2, 0, {})};
  launch_by_turns("moe_gated_mm", moe_gated_mm_kernel<T, kIsFast>, args.grid.most(), T::kThreads, sizeof(Smem<T>),
                  stream, args);
}

}  // namespace

void launch_moe_gated_mm(const MoeGatedMmParams& p, cudaStream_t stream) {
  // Where ups are a row's second half, that must begin on a boundary too.
  const bool ups_are_aligned = p.is_interleaved || !p.b.is_row_major() || p.out.columns % kChunk == 0;
  const bool is_whole = is_fast(p.a) && is_fast(p.b) && ups_are_aligned;
  dispatch_half(p.dtype, [&]<class Element>() {
    if (!is_whole) return launch_tiles<MmTraits<Element, 64>, false>(p, is_aligned(p.b) && ups_are_aligned, stream);
    dispatch_tile<Element>(p.out.rows, p.num_groups, 2 * p.out.columns,
                           [&]<class T>() { launch_tiles<T, true>(p, true, stream); });
  });
}

}  // namespace fmkernels
