// SPDX-License-Identifier: Apache-2.0
// attention_backward.cu: gradients of attention for float16, bfloat16 and float32, sm_80 and later.
//
// Contract   see attention.h; rows of all tensors begin on 16-byte boundaries.
// Launches   rows: what a query's gradients need of it, minus its lse and minus delta = <o, d_o> - d_lse. Then, in any
//            order: keys (d_k and d_v), queries (d_q) and, where they are wanted, bias and sinks. Every sum has one owner
//            and a fixed order: no atomics, the same bits in every run, whatever else is in the batch.
// Work       keys: grid (key tiles, kv heads, batch), the queries of all heads of the group stream past. Queries: grid
//            (query tiles, heads, batch), the keys stream past. One kernel: attention_backward_tile_cuda.h has the roles.
// Shared     struct Smem: two owned tensors, overlaid by the gradients; two stages of two streamed ones.
// Pipeline   wait block[i] | B1 | load block[i+1] | s = q k | d = d_o v - delta | weights and slopes | sums += ...
//            B1: all warps see block[i], and have read block[i-1], whose place block[i+1] takes.
//            The owned side is the left operand of all products, so weights and slopes go from one product to the next
//            in registers, and warps share nothing but what is streamed.
// Masks      Blocks that every owned row meets whole, and no modifiers: one loop without a mask. Others: a loop that
//            modifies and masks, where a warp skips a block that none of its rows meets.
// Numerics   float32 accumulation; weights and slopes are rounded to the dtype of the inputs for the products that they
//            enter. A hidden pair never reaches a gradient, NaN included. Deterministic.
// Cost       14 * visible pairs * dim flops, 16 beyond 128 columns: seven products in place of the five of a kernel that
//            adds up d_q across blocks; docs/attention.md says why.
// After      Dao 2023, FlashAttention-2, algorithm 2.

#include "attention_backward_kernel_cuda.h"

namespace fmkernels {
namespace {

// ---- what the others read of a query --------------------------------------------------------------------------------

struct RowsArgs {
  AttentionBackwardParams b;
  AttentionRowStats stats;
};

constexpr int kLanesARow = 8;  // that read a row of o and d_o

// A block for kStatsRows queries of one head; those beyond the end of the sequence have no weight.
template <class Element>
__global__ void __launch_bounds__(128) attention_backward_rows_kernel(const __grid_constant__ RowsArgs a) {
  const AttentionForwardParams& p = a.b.forward;
  const Sequence s = sequence_of(p, blockIdx.z);
  const int first = blockIdx.x * kStatsRows, head = blockIdx.y, lane = threadIdx.x % kLanesARow;
  if (first >= s.seq_q) return;
  const auto rows_of = [&](const TokenView& view) {
    return static_cast<const Element*>(view.data) + blockIdx.z * view.batch_stride + head * view.head_stride;
  };
  const Element *const o = rows_of(p.o), *const d_o = rows_of(a.b.d_o);
  constexpr int kChunk = 16 / sizeof(Element);  // elements of 16 bytes
  // Lane i of a row's lanes keeps the product of the i-th pass.
  constexpr int kPassRows = 128 / kLanesARow, kPasses = kStatsRows / kPassRows;
  static_assert(kPasses <= kLanesARow);
  float mine = 0.0f;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int query = first + threadIdx.x / kLanesARow + pass * kPassRows;
    const int64_t token = s.q_start + min(query, s.seq_q - 1);
    float product = 0.0f;
    for (int c = lane * kChunk; c < p.v_head_dim; c += kLanesARow * kChunk) {
      const uint4 x = *reinterpret_cast<const uint4*>(o + token * p.o.token_stride + c);
      const uint4 y = *reinterpret_cast<const uint4*>(d_o + token * a.b.d_o.token_stride + c);
      const auto *of_x = reinterpret_cast<const Element*>(&x), *of_y = reinterpret_cast<const Element*>(&y);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) product = fmaf(to_float(of_x[i]), to_float(of_y[i]), product);
    }
    for (int distance = kLanesARow / 2; distance > 0; distance /= 2)
      product += __shfl_xor_sync(ptx::kAllLanes, product, distance);
    if (lane == pass) mine = product;
  }
  if (lane >= kPasses) return;
  const int query = first + threadIdx.x / kLanesARow + lane * kPassRows;
  float minus_lse = -INFINITY, minus_delta = 0.0f;
  if (query < s.seq_q) {
    const auto of_row = [&](const float* data, const int64_t (&stride)[3]) {
      return data[blockIdx.z * stride[0] + head * stride[1] + (s.q_start + query) * stride[2]];
    };
    const float lse = of_row(a.b.lse, a.b.lse_stride);
    if (lse != -INFINITY) {
      minus_lse = -lse * kLog2E;
      minus_delta = (a.b.d_lse == nullptr ? 0.0f : of_row(a.b.d_lse, a.b.d_lse_stride)) - mine;
    }
  }
  const int64_t slot = a.stats.first_slot(head, blockIdx.z, s.q_start) + query;
  float* to = a.stats.minus_lse(slot);
  to[0] = to[AttentionRowStats::kToSecond] = minus_lse;
  to[AttentionRowStats::kToDelta] = to[AttentionRowStats::kToDelta + AttentionRowStats::kToSecond] = minus_delta;
}

// ---- d_sinks --------------------------------------------------------------------------------------------------------

constexpr int kSinkThreads = 256;

// A block for each head: minus the weight of the sink times delta, over all queries of all sequences.
__global__ void __launch_bounds__(kSinkThreads) attention_backward_sinks_kernel(const __grid_constant__ RowsArgs a) {
  const AttentionForwardParams& p = a.b.forward;
  __shared__ float sums[kSinkThreads];
  const int head = blockIdx.x;
  const float sink = to_log2(p.sinks[head]);
  float sum = 0.0f;
  for (int batch = 0; batch < p.batch; ++batch) {
    const Sequence s = sequence_of(p, batch);
    const int64_t first = a.stats.first_slot(head, batch, s.q_start);
    for (int query = threadIdx.x; query < s.seq_q; query += kSinkThreads) {
      const float* stats = a.stats.minus_lse(first + query);
      if (stats[0] != -INFINITY) sum += ptx::ex2(sink + stats[0]) * stats[AttentionRowStats::kToDelta];
    }
  }
  sums[threadIdx.x] = sum;
  for (int half = kSinkThreads / 2; half > 0; half /= 2) {
    __syncthreads();  // the sums of the last round are written
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) a.b.d_sinks[head] = sums[0];
}

}  // namespace

AttentionRowStats attention_row_stats(const AttentionForwardParams& p) {
  if (p.cu_seqlens_q != nullptr) return {nullptr, (p.total_q / kStatsRows + p.batch + 1) * kStatsRows, 0};
  const int64_t batch_slots = (p.seq_q + kStatsRows - 1) / kStatsRows * kStatsRows;
  return {nullptr, p.batch * batch_slots, batch_slots};
}

void launch_attention_backward(const AttentionBackwardCall& given, cudaStream_t stream) {
  AttentionBackwardCall call = given;
  AttentionBackwardParams& b = call.b;
  AttentionForwardParams& p = b.forward;
  check_launch("attention_backward", p, "heads", p.heads, {&p.q, &p.k, &p.v, &p.o, &b.d_o, &b.d_q, &b.d_k, &b.d_v});
  max_smem_bytes("attention_backward");  // enough for every tile
  if (p.seq_q > 0) {
    dispatch_dtype(p.dtype, [&]<class Element>() {
      launch("attention_backward_rows", attention_backward_rows_kernel<Element>,
             dim3((p.seq_q + kStatsRows - 1) / kStatsRows, p.heads, p.batch), 128, 0, stream, RowsArgs{b, call.stats});
    });
  }
  if (p.dtype == DType::kFloat32) {
    launch_attention_backward_float(call, stream);
  } else {
    launch_attention_backward_keys(call, stream);
    launch_attention_backward_queries(call, stream);
  }
  if (b.d_bias != nullptr && p.seq_q > 0 && p.seq_k > 0) launch_attention_backward_bias(call, stream);
  if (b.d_sinks != nullptr)
    launch("attention_backward_sinks", attention_backward_sinks_kernel, dim3(p.heads), kSinkThreads, 0, stream,
           RowsArgs{b, call.stats});
}

}  // namespace fmkernels
