// SPDX-License-Identifier: Apache-2.0
// moe_grouped_sum.cu: out[g] = the sum of x[r] over the rows r of group g.
//
// Contract   see moe_grouped.h.
// Work       grid: groups, of each the stretches of kLine vectors of columns. kLines rows are added side by side, kLines rows
//            further the next ones; then their sums, one after another.
// Numerics   float32, kLines chains of additions by turns. Deterministic.
// Cost       bound by memory: x is read once.

#include "moe_grouped_cuda.h"

namespace fmkernels {
namespace {

constexpr int kLine = kWarp;  // vectors of a row
constexpr int kLines = 8;     // rows side by side

struct SumArgs {
  MoeGroupedSumParams p;
  Divisor pieces;  // of the columns
};

template <int kVec>
struct SumSmem {
  float sums[kLines][kVec][kLine];
};

template <class T, int kVec>
__global__ void __launch_bounds__(kLine* kLines) moe_grouped_sum_kernel(const __grid_constant__ SumArgs args) {
  const MoeGroupedSumParams& p = args.p;
  auto& smem = dynamic_smem<SumSmem<kVec>>();
  const int group = blockIdx.x / args.pieces, lane = threadIdx.x % kLine, line = threadIdx.x / kLine;
  const GroupRows rows = rows_of_group(p.offsets, static_cast<int>(p.num_groups), static_cast<int>(p.x.rows), group);
  const int64_t column = (int64_t{blockIdx.x % args.pieces} * kLine + lane) * kVec;

  // Every kLines-th row.
  float sum[kVec] = {};
  const T* x = static_cast<const T*>(p.x.data) + rows.first * p.x.row_stride + column;
  for (int row = line; row < rows.count && column < p.x.columns; row += kLines) {
    const auto vector = load_vector<T, kVec>(x + row * p.x.row_stride);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum[i] += to_float(vector.lane[i]);
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) smem.sums[line][i][lane] = sum[i];
  __syncthreads();  // the sums of all rows are there

  // All of them.
  if (line != 0 || column >= p.x.columns) return;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    float total = sum[i];
    for (int other = 1; other < kLines; ++other) total += smem.sums[other][i][lane];
    p.out[group * p.x.columns + column + i] = total;
  }
}

}  // namespace

void launch_moe_grouped_sum(const MoeGroupedSumParams& p, cudaStream_t stream) {
  const bool aligned = is_aligned_16(p.x.data, element_bytes(p.dtype), p.x.columns, {p.x.row_stride});
  dispatch_vector(p.dtype, aligned, [&]<class T, int kVec>() {
    const int64_t pieces = (p.x.columns + kLine * kVec - 1) / (kLine * kVec);
    launch("moe_grouped_sum", moe_grouped_sum_kernel<T, kVec>, grid_of("moe_grouped_sum", p.num_groups * pieces, 1),
           kLine * kLines, sizeof(SumSmem<kVec>), stream, SumArgs{p, Divisor(static_cast<int32_t>(pieces))});
  });
}

}  // namespace fmkernels
