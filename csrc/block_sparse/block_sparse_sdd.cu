// SPDX-License-Identifier: Apache-2.0
// block_sparse_sdd.cu: the blocks of a topology of activation(scale * (a b) + bias), each from its rows of a and its columns
// of b.
//
// Contract   see block_sparse.h. Half elements. Any sizes and strides; where an operand is not of whole 16-byte chunks on
//            16-byte boundaries another kernel copies it, chunk by chunk or element by element, which is slow.
// Work       grid: square tiles of the blocks, in the order of the list. A tile of 128 has four warps, a smaller one has one.
//            A block of threads has one tile of 128, two of 64 or four; neighbours in the list that have their rows of a in
//            common read them once.
// Shared     union Smem, tile_cuda.h.      128 x 128: 64 KiB, two of 64 x 64: 48, four of 32 x 32: 64, 16 x 16: 32
// Pipeline   that of tile_cuda.h, over the inner dimension.
// Edges      Past the edge of the matrix, and where there is no block, zeros are written.
// Numerics   float32 accumulation, one rounding. A tile does not depend on the others. Deterministic.
// Cost       2 * block_rows * block_columns * inner flops a block.

#include "block_sparse_result_cuda.h"

namespace fmkernels {
namespace {

struct SddArgs {
  BlockSparseSddParams p;
  Divisor block_rows;  // of a batch
  int64_t num_tiles;
  int log2_across, log2_tiles;     // tiles of a block, in a row of them and in all
  uint32_t num_rows, num_columns;  // of blocks, of all batches
  Passes passes;
  bool a_is_row_major, a_is_aligned, b_is_row_major, b_is_aligned;
};

// A tile of a block and its place in the product.
struct Tile {
  int64_t block, batch, first_row, first_column;  // of the product
  int row, column;                                // in the block
  int num_rows, num_columns;                      // of the product, from there on; 0: the tile is zeros
};

template <class T>
__device__ __forceinline__ Tile tile_of(const SddArgs& args, int64_t index) {
  const BlockSparseSddParams& p = args.p;
  Tile tile{index >> args.log2_tiles};
  const int in_block = static_cast<int>(index & ((1 << args.log2_tiles) - 1));
  tile.row = (in_block >> args.log2_across) * T::kRows;
  tile.column = (in_block & ((1 << args.log2_across) - 1)) * T::kColumns;
  if (index >= args.num_tiles) return tile;
  const int row = __ldg(p.row_indices + tile.block), column = __ldg(p.column_indices + tile.block);
  if (static_cast<uint32_t>(row) >= args.num_rows) return tile;
  if (static_cast<uint32_t>(column) >= args.num_columns) return tile;
  tile.batch = row / args.block_rows;
  tile.first_row = int64_t{row % args.block_rows} * p.block_rows + tile.row;
  tile.first_column = int64_t{column} * p.block_columns + tile.column;
  if (tile.first_row >= p.rows || tile.first_column >= p.columns) return tile;
  tile.num_rows = static_cast<int>(min(p.rows - tile.first_row, int64_t{T::kRows}));
  tile.num_columns = static_cast<int>(min(p.columns - tile.first_column, int64_t{T::kColumns}));
  return tile;
}

// The copies of a tile, step by step.
template <class CopiesA, class CopiesB, bool kShares>
struct Walk {
  static constexpr bool kConverts = false;

  CopiesA a;
  CopiesB b;
  const Passes& passes;
  bool copies_a;
  int end;
  uint32_t inner = 0;  // may pass 2^31 behind the end

  __device__ __forceinline__ void start(uint32_t stage_a, uint32_t stage_b) const {
    const int left = static_cast<int>(static_cast<uint32_t>(end) - inner);
    const Piece piece{0, left > 0 ? static_cast<int>(inner) : 0, min(left, kStep)};
    if (!kShares || copies_a) a.start(stage_a, piece, piece, passes);
    b.start(stage_b, piece, piece, passes);
  }
  __device__ __forceinline__ void advance() { inner += kStep; }
};

template <class T, bool kIsFast>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm)
    block_sparse_sdd_kernel(const __grid_constant__ SddArgs args) {
  using Element = typename T::Element;
  const BlockSparseSddParams& p = args.p;
  auto& smem = dynamic_smem<Smem<T>>();
  const int group = threadIdx.x / T::kGroupThreads, thread = threadIdx.x % T::kGroupThreads;
  const int64_t index = int64_t{blockIdx.x} * T::kGroups + group;
  const Tile tile = tile_of<T>(args, index);

  // Neighbours that have their rows in common read them once.
  int group_of_a = group;
  for (int i = 1; i <= group && tile.num_rows > 0; ++i) {
    const Tile before = tile_of<T>(args, index - i);
    if (before.num_rows == 0 || before.batch != tile.batch || before.first_row != tile.first_row) break;
    --group_of_a;
  }

  // The product.
  const int warp = thread / kWarp;
  const int warp_row = warp / T::kWarpsAcross * T::kWarpRows, warp_column = warp % T::kWarpsAcross * T::kWarpColumns;
  const bool is_wanted = warp_row < tile.num_rows && warp_column < tile.num_columns;
  const int num_steps = __syncthreads_or(tile.num_rows > 0) ? static_cast<int>((p.inner + kStep - 1) / kStep) : 0;
  const Element* first_a =
      static_cast<const Element*>(p.a.data) + tile.batch * p.a.batch_stride + tile.first_row * p.a.row_stride;
  const Element* first_b =
      static_cast<const Element*>(p.b.data) + tile.batch * p.b.batch_stride + tile.first_column * p.b.column_stride;
  Sums<T> sums = {};
  dispatch_lines<T>(!args.a_is_row_major, args.b_is_row_major, [&]<class LinesA, class LinesB>() {
    using A = Copies<LinesA, Element, kIsFast>;
    using B = Copies<LinesB, Element, kIsFast>;
    Walk<A, B, (T::kGroups > 1)> walk{
        {first_a, LinesA::kAcross ? p.a.column_stride : p.a.row_stride, tile.num_rows, args.a_is_aligned, thread},
        {first_b, LinesB::kAcross ? p.b.row_stride : p.b.column_stride, tile.num_columns, args.b_is_aligned, thread},
        args.passes,
        group_of_a == group,
        static_cast<int>(p.inner)};
    multiply<T, LinesA, LinesB>(sums, smem.stages, num_steps, group, group_of_a, warp_row, warp_column, is_wanted,
                                walk);
  });

  // The result.
  using L = SumLines<T, false>;
  store_sums<T, false>(smem.sums[group], sums, warp_row, warp_column);
  __syncthreads();  // the sums of all warps are there
  if (index >= args.num_tiles) return;
  Element* out =
      static_cast<Element*>(p.values) + (tile.block * p.block_rows + tile.row) * p.block_columns + tile.column;
  for_each_chunk<L, T>(smem.sums[group], thread, [&](int line, int along, float (&x)[kChunk]) {
    const int count = line < tile.num_rows ? tile.num_columns - along : 0;
    Vector<Element, kChunk> chunk = finish<Element, true>(p.epilogue, x, tile.first_column + along, count);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= count) chunk.lane[i] = {};
    }
    store_vector<Element, kChunk>(out + line * p.block_columns + along, chunk);
  });
}

template <class Element, int kSide>
struct SddTraits : TileTraits<Element, kSide, kSide, kSide, kSide, 4> {};
template <class Element>
struct SddTraits<Element, 64> : TileTraits<Element, 64, 64, 64, 64, 2, 3> {};
template <class Element>
struct SddTraits<Element, 128> : TileTraits<Element, 128, 128, 64, 64> {};

int log2_of(int x) { return x <= 1 ? 0 : 1 + log2_of(x / 2); }

}  // namespace

void launch_block_sparse_sdd(const BlockSparseSddParams& p, cudaStream_t stream) {
  dispatch_half(p.dtype, [&]<class Element>() {
    const int side = p.block_rows < p.block_columns ? p.block_rows : p.block_columns;
    dispatch_int<16, 32, 64, 128>("the smaller side of a block", side, [&]<int kSide>() {
      using T = SddTraits<Element, kSide>;
      const int down = p.block_rows / kSide, across = p.block_columns / kSide;
      const int64_t num_tiles = p.num_blocks * down * across;
      const SddArgs args{p,
                         Divisor(static_cast<int32_t>(p.num_block_rows() > 0 ? p.num_block_rows() : 1)),
                         num_tiles,
                         log2_of(across),
                         log2_of(down * across),
                         static_cast<uint32_t>(p.batch * p.num_block_rows()),
                         static_cast<uint32_t>(p.num_block_columns()),
                         {},
                         p.a.is_row_major(),
                         is_aligned(p.a),
                         p.b.is_row_major(),
                         is_aligned(p.b)};
      const dim3 grid = grid_of("block_sparse_sdd", num_tiles, T::kGroups);
      dispatch_bool(is_fast(p.a) && is_fast(p.b), [&]<bool kIsFast>() {
        launch("block_sparse_sdd", block_sparse_sdd_kernel<T, kIsFast>, grid, T::kThreads, sizeof(Smem<T>), stream,
               args);
      });
    });
  });
}

}  // namespace fmkernels
