// SPDX-License-Identifier: Apache-2.0
// quantized_linear.cu: y = x times the transpose of a weight of 8 or 4 bits, which is read once for a tile of rows.
//
// Contract   see quantized_linear.h; the words of the weight are drawn in docs/layouts.md.
// Work       grid (panels of 32 features, tiles of rows). A block as in common/packed_weight_cuda.h.
// Shared     the sums of the warps, added in their order.
// Numerics   there. Deterministic.
// Cost       out_features * in_features * bits / 8 bytes and 2 * rows flops a weight: bound by memory up to many rows.

#include "../common/dispatch.h"
#include "../common/launch.h"
#include "../common/packed_weight_cuda.h"
#include "quantized_linear.h"

namespace fmkernels {
namespace {

constexpr int64_t kMaxGridY = 65535;

struct KernelParams : QuantizedLinearParams {
  bool x_is_aligned;  // every row begins on a 16-byte boundary
  Divisor chunks_per_group;
};

// Row `row` of x, or null where there is none.
template <class T>
__device__ __forceinline__ const T* row_of_x(const KernelParams& p, int64_t row) {
  if (row >= p.num_rows) return nullptr;
  return static_cast<const T*>(p.x) + row / p.rows_per_batch * p.x_stride[0] + row % p.rows_per_batch * p.x_stride[1];
}

template <class Traits>
__global__ void __launch_bounds__(kThreads, 2) quantized_linear_kernel(KernelParams p) {
  using T = typename Traits::Element;
  __shared__ float sSum[kWarps][Traits::kRows][kSumStride];  // [warp, row, feature]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const PackedWeight& w = p.weight;
  const int64_t panel = blockIdx.x, num_tiles = (p.num_rows + Traits::kRows - 1) / Traits::kRows;

  for (int64_t row_tile = blockIdx.y; row_tile < num_tiles; row_tile += gridDim.y) {
    const int64_t first_row = row_tile * Traits::kRows;
    const T* rows[Traits::kTiles];
    for (int tile = 0; tile < Traits::kTiles; ++tile)
      rows[tile] = row_of_x<T>(p, first_row + row_of_lane<Traits>(tile));

    // The chunks of this warp.
    float total[Traits::kTiles][8] = {};
    multiply_panel<Traits>(w, p.chunks_per_group, panel, rows, p.x_is_aligned, total);

    // The warps together.
    store_sums<Traits>(sSum[warp], total, lane / 4, lane % 4);
    __syncthreads();  // the sums of all warps are there
    for (int i = threadIdx.x; i < Traits::kRows * kPackedPanel; i += kThreads) {
      const int64_t row = first_row + i / kPackedPanel, feature = panel * kPackedPanel + i % kPackedPanel;
      if (row >= p.num_rows || feature >= w.out_features) continue;
      float y = sum_of_warps(sSum, i);
      if (p.bias != nullptr) y += bias_of(p, feature);
      static_cast<T*>(p.y)[row * w.out_features + feature] = from_float<T>(y);
    }
    __syncthreads();  // they have been read, before the next tile of rows
  }
}

// A warp a chunk of a panel, a lane a column of it.
template <class T, int kBits>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(DequantizeParams p) {
  const PackedWeight& w = p.weight;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t panel = item / w.num_chunks, chunk = item % w.num_chunks;
  const int64_t column = chunk * kPackedChunk + threadIdx.x % kWarp;
  if (panel >= w.num_panels() || column >= w.in_features) return;
  constexpr int kColumns = 32 / kBits;  // of a word
  const uint32_t* words = w.values + (panel * w.num_chunks * kPackedChunk + column) / kColumns * kPackedPanel;
  const int64_t group = (panel * w.num_groups + chunk / w.chunks_per_group) * kPackedPanel;
  const int in_word = static_cast<int>(column % kColumns);
  for (int i = 0; i < kPackedPanel && panel * kPackedPanel + i < w.out_features; ++i) {
    int integer;
    if constexpr (kBits == 4) {
      const int zero = w.zeros == nullptr ? 8 : w.zeros[group + i] & 15;
      integer = static_cast<int>(words[i] >> (4 * (in_word / 2 + in_word % 2 * 4)) & 15u) - zero;
    } else {
      integer = static_cast<int8_t>(words[i] >> (8 * in_word));
    }
    const float value = static_cast<float>(integer) * w.scales[group + i];
    static_cast<T*>(p.w)[(panel * kPackedPanel + i) * w.in_features + column] = from_float<T>(value);
  }
}

}  // namespace

void launch_quantized_linear(const QuantizedLinearParams& params, cudaStream_t stream) {
  // Rows may have any length: load_columns looks at their ends.
  const bool aligned =
      is_aligned_16(params.x, element_bytes(params.dtype), 0, {params.x_stride[0], params.x_stride[1]});
  KernelParams p{params, aligned, Divisor(static_cast<int32_t>(params.weight.chunks_per_group))};
  const bool is_small = p.num_rows <= (p.dtype == DType::kFloat32 ? 1 : 8);
  dispatch_dtype(p.dtype, [&]<class T>() {
    dispatch_int<4, 8>("bits", p.weight.bits, [&]<int kBits>() {
      dispatch_int<1, 4>("tiles", is_small ? 1 : 4, [&]<int kTiles>() {
        using Kernel = Traits<T, kBits, kTiles>;
        const int64_t num_tiles = (p.num_rows + Kernel::kRows - 1) / Kernel::kRows;
        const dim3 grid(static_cast<unsigned>(p.weight.num_panels()),
                        static_cast<unsigned>(num_tiles < kMaxGridY ? num_tiles : kMaxGridY));
        launch("quantized_linear", quantized_linear_kernel<Kernel>, grid, kThreads, 0, stream, p);
      });
    });
  });
}

void launch_quantized_linear_dequantize(const DequantizeParams& p, cudaStream_t stream) {
  const dim3 grid = grid_of("dequantize_weight", p.weight.num_panels() * p.weight.num_chunks, kWarps);
  dispatch_dtype(p.dtype, [&]<class T>() {
    dispatch_int<4, 8>("bits", p.weight.bits, [&]<int kBits>() {
      launch("dequantize_weight", dequantize_kernel<T, kBits>, grid, kThreads, 0, stream, p);
    });
  });
}

}  // namespace fmkernels
