// SPDX-License-Identifier: Apache-2.0
// moe_quantized.cu: the rows of each expert times its matrix of 8 or 4 bits, a tile of rows and a panel of features a block.
//
// Contract   see moe_quantized.h. Half elements.
// Work       grid: a bound of the tiles of rows, which the host knows from the rows and groups alone, times the panels of a
//            group, which come first: their tile of rows stays in the caches. A block walks the offsets to the group of its
//            tile; blocks behind the last tile leave. Rows of no group are tiles of zeros. Its product is that of
//            common/packed_weight_cuda.h.
// Tiles      8, 16 or 32 rows, of which the groups have so many on average, of the bounds that is.
// Shared     the sums of the warps, added in their order.                                              32 rows: 36 KiB
// Numerics   float32 accumulation, one rounding; a row has the same bits in any tile. Deterministic.
// Cost       the weight of an expert once for 8, 16 or 32 of its rows, from L2 but for the first time.

#include "../common/dispatch.h"
#include "../common/launch.h"
#include "../common/packed_weight_cuda.h"
#include "../moe/moe_grouped_cuda.h"
#include "moe_quantized.h"

namespace fmkernels {
namespace {

struct KernelParams : MoeQuantizedParams {
  bool a_is_aligned;  // every row begins on a 16-byte boundary
  Divisor panels, chunks_per_group;
};

template <class Traits>
__global__ void __launch_bounds__(kThreads, 2) moe_quantized_kernel(KernelParams p) {
  using T = typename Traits::Element;
  __shared__ float sSum[kWarps][Traits::kRows][kSumStride];  // [warp, row, feature]
  __shared__ GroupRows sRows;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  // The rows and the panel of this block.
  const int block = blockIdx.x, panel = block % p.panels;
  const GroupRows found = rows_of_tile<Traits::kRows>(p.offsets, static_cast<int>(p.num_groups),
                                                      static_cast<int>(p.num_rows), block / p.panels);
  if (found.count == 0) return;
  T* out = static_cast<T*>(p.out) + panel * kPackedPanel;
  if (found.group == p.num_groups) {
    for (int i = threadIdx.x; i < found.count * kPackedPanel; i += kThreads) {
      out[(found.first + i / kPackedPanel) * p.columns + i % kPackedPanel] = T{};
    }
    return;
  }
  if (threadIdx.x == 0) sRows = found;  // so that the product below has these registers

  // The chunks of this warp.
  const T* rows[Traits::kTiles];
  for (int tile = 0; tile < Traits::kTiles; ++tile) {
    const int row = row_of_lane<Traits>(tile);
    rows[tile] = row < found.count ? static_cast<const T*>(p.a) + (found.first + row) * p.a_stride : nullptr;
  }
  float total[Traits::kTiles][8] = {};
  multiply_panel<Traits>(p.weight, p.chunks_per_group, int64_t{found.group} * p.panels.value() + panel, rows,
                         p.a_is_aligned, total);

  // The warps together.
  store_sums<Traits>(sSum[warp], total, lane / 4, lane % 4);
  __syncthreads();  // the sums of all warps and sRows are there
  const float* bias = p.bias == nullptr ? nullptr : p.bias + sRows.group * p.columns + panel * kPackedPanel;
  for (int i = threadIdx.x; i < sRows.count * kPackedPanel; i += kThreads) {
    float y = sum_of_warps(sSum, i);
    if (bias != nullptr) y += __ldg(bias + i % kPackedPanel);
    out[(sRows.first + i / kPackedPanel) * p.columns + i % kPackedPanel] = from_float<T>(y);
  }
}

}  // namespace

void launch_moe_quantized_mm(const MoeQuantizedParams& params, cudaStream_t stream) {
  // Rows may have any length: load_columns looks at their ends.
  const bool aligned = is_aligned_16(params.a, element_bytes(params.dtype), 0, {params.a_stride});
  const KernelParams p{params, aligned, Divisor(static_cast<int32_t>(params.panels_of_group())),
                       Divisor(static_cast<int32_t>(params.weight.chunks_per_group))};
  const int64_t average = (p.num_rows + p.num_groups - 1) / p.num_groups;
  const int tiles = average <= 8 ? 1 : average <= 16 ? 2 : 4;
  dispatch_half(p.dtype, [&]<class T>() {
    dispatch_int<4, 8>("bits", p.weight.bits, [&]<int kBits>() {
      dispatch_int<1, 2, 4>("tiles", tiles, [&]<int kTiles>() {
        using Kernel = Traits<T, kBits, kTiles>;
        const int64_t num_tiles = most_tiles(p.num_rows, p.num_groups, Kernel::kRows);
        launch("moe_quantized_mm", moe_quantized_kernel<Kernel>,
               grid_of("moe_quantized_mm", num_tiles * p.panels_of_group(), 1), kThreads, 0, stream, p);
      });
    });
  });
}

}  // namespace fmkernels
