// SPDX-License-Identifier: Apache-2.0
// attention_backward.cu: gradients of attention for float16 and bfloat16, sm_80 and later.
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

#include "../common/dispatch.h"
#include "attention_backward_warp_cuda.h"

namespace fmkernels {
namespace {

// ---- d_q, d_k, d_v --------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm)
    attention_backward_kernel(const __grid_constant__ BackwardArgs a) {
  const AttentionForwardParams& p = a.p;
  auto& smem = dynamic_smem<Smem<T>>();
  const int warp = threadIdx.x / kWarp;
  const Unit u = unit_of<T>(p, blockIdx.z, blockIdx.x);
  if (!u.exists) return;

  load_owned(smem, a, u, 0, blockIdx.y);
  if constexpr (T::kHasSlopes) load_owned(smem, a, u, 1, blockIdx.y);
  const Partners tile = partners_of<T>(p, u, u.begin, u.begin + T::kOwned);
  const int first_block = tile.any.begin / T::kStreamed;
  const int end_block = tile.any.begin < tile.any.end ? (tile.any.end + T::kStreamed - 1) / T::kStreamed : first_block;
  const int plain_begin = max(first_block, (tile.all.begin + T::kStreamed - 1) / T::kStreamed);
  const int plain_end = a.is_general ? 0 : min(tile.all.end / T::kStreamed, end_block);
  const int num_streamed = u.num_streamed;
  if (threadIdx.x == 0) smem.unit = u;
  if (threadIdx.x % kWarp == 0) {
    const int warp_begin = u.begin + warp * T::kWarpRows;
    smem.partners[warp] = partners_of<T>(p, u, warp_begin, warp_begin + T::kWarpRows);
  }
  RowStats<T> rows;
  rows.load(a, u, blockIdx.y);
  const Addresses<T> at(smem);

  Gradient<T> grads[T::kEndGrad - T::kFirstGrad];
#pragma unroll
  for (auto& gradient : grads) {
    for_each<T::kRowTiles, T::kColumnTiles>([&](int m, int n, int i) { gradient[m][n][i] = 0.0f; });
  }

  // The streamed heads: one for queries, those of the group for keys.
  const int first_head = T::kOwnsQueries ? blockIdx.y / a.group : blockIdx.y * a.group;
  const int end_head = first_head + (T::kOwnsQueries ? 1 : a.group);
  int stage = 0;
  for (int streamed_head = first_head; streamed_head < end_head; ++streamed_head) {
    const int head = T::kOwnsQueries ? blockIdx.y : streamed_head;
    StreamCopy<T> copy(a, u, smem, streamed_head, first_block);
    if (streamed_head == first_head) copy.zero_columns();
    int block = first_block;
    if (block < end_block) copy.issue(a, smem, stage, num_streamed - block * T::kStreamed);
    ptx::cp_async_commit();

    // One block. With kGeneral it modifies, masks and may skip.
    auto step = [&]<bool kGeneral>() {
      const int first_streamed = block * T::kStreamed;
      bool nonfinite = false;
      ptx::cp_async_wait<0>();
      if constexpr (kGeneral) nonfinite = __syncthreads_or(copy.has_nonfinite(stage));
      else __syncthreads();
      // B1: every warp sees block[i] and what it owns, and has read block[i-1]
      if (block + 1 < end_block) copy.issue(a, smem, stage ^ 1, num_streamed - first_streamed - T::kStreamed);
      ptx::cp_async_commit();

      const Range mine = kGeneral ? smem.partners[warp].any : Range{};
      const bool works = !kGeneral || (first_streamed < mine.end && first_streamed + T::kStreamed > mine.begin);
      const Columns<T, false> streamed = in_stage(at.streamed, stage), transposed = in_stage(at.transposed, stage);
      const float* stats = at.stats + stage * 2 * T::kStreamed;
      Products<T> s, d;
      if (works) {
        for_each<T::kRowTiles, T::kStreamTiles>([&](int m, int n, int i) { s[m][n][i] = 0.0f; });
        multiply<T, 0>(s, at.owned, streamed);
        if constexpr (T::kHasSlopes) {
          with_stats<T, 1>(d, rows, stats, [](float, float minus_delta) { return minus_delta; });
          multiply<T, 1>(d, at.owned, streamed);
        }
        if constexpr (kGeneral) {
          weigh_general<T, true>(s, d, a, smem.unit, head, first_streamed, rows, stats);
        } else {
          with_stats<T, 0>(s, rows, stats,
                           [&](float x, float minus_lse) { return ptx::ex2(fmaf(x, a.scale_log2, minus_lse)); });
          if constexpr (T::kHasSlopes)
            for_each<T::kRowTiles, T::kStreamTiles>([&](int m, int n, int i) { d[m][n][i] *= s[m][n][i]; });
        }
      }
      if (kGeneral && nonfinite) {
        if (works) {
          static_for<T::kEndGrad - T::kFirstGrad>(
              [&]<int g>() { add_nonfinite<T, T::kFirstGrad + g>(grads[g], smem, a, stage, first_streamed); });
        }
        __syncthreads();  // every warp has read what is not finite
        copy.zero_nonfinite(stage);
        __syncthreads();  // every warp sees zeros in its place
      }
      if (works) {
        if constexpr (T::kEndGrad == 2) accumulate<T, 1>(grads[1 - T::kFirstGrad], s, transposed);
        if constexpr (T::kFirstGrad == 0) accumulate<T, 0>(grads[0], d, transposed);
      }
      stage ^= 1;
      ++block;
    };

    while (block < end_block) {
      if (plain_begin <= block && block < plain_end) {
        do step.template operator()<false>();
        while (block < plain_end);
      } else {
        const int end = block < plain_begin && plain_begin < plain_end ? plain_begin : end_block;
        do step.template operator()<true>();
        while (block < end);
      }
    }
  }

  ptx::cp_async_wait<0>();
  __syncwarp();  // a warp's part of owned is copied, read and overwritten by the warp alone
  static_for<T::kEndGrad - T::kFirstGrad>([&]<int g>() {
    keep_gradient(grads[g], smem, T::kFirstGrad + g, T::kFirstGrad + g == 0 ? p.softmax_scale : 1.0f);
  });
  __syncwarp();
  for (int tensor = T::kFirstGrad; tensor < T::kEndGrad; ++tensor) store_owned(smem, a, u, tensor);
}

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
  const int64_t slot = a.stats.index(0, head, p.cu_seqlens_q != nullptr, blockIdx.z, s.q_start);
  const int64_t to_delta = a.stats.index(1, 0, false, 0, 0);
  for (int r = threadIdx.x / kLanesARow; r < kStatsRows; r += blockDim.x / kLanesARow) {
    const int query = first + r;
    const bool exists = query < s.seq_q;
    const int64_t token = s.q_start + query;
    const auto row = [&](const TokenView& view) {
      return static_cast<const Element*>(view.data) + blockIdx.z * view.batch_stride + token * view.token_stride +
             head * view.head_stride;
    };
    float product = 0.0f;
    for (int c = lane * kChunkElements; exists && c < p.v_head_dim; c += kLanesARow * kChunkElements) {
      const uint4 o = *reinterpret_cast<const uint4*>(row(p.o) + c);
      const uint4 d_o = *reinterpret_cast<const uint4*>(row(a.b.d_o) + c);
      const auto *x = reinterpret_cast<const Element*>(&o), *y = reinterpret_cast<const Element*>(&d_o);
      for (int i = 0; i < kChunkElements; ++i) product = fmaf(to_float(x[i]), to_float(y[i]), product);
    }
    for (int distance = kLanesARow / 2; distance > 0; distance /= 2)
      product += __shfl_xor_sync(ptx::kAllLanes, product, distance);
    if (lane != 0) continue;
    float minus_lse = -INFINITY, minus_delta = 0.0f;
    if (exists) {
      const auto of_row = [&](const float* data, const int64_t (&stride)[3]) {
        return data[blockIdx.z * stride[0] + head * stride[1] + token * stride[2]];
      };
      const float lse = of_row(a.b.lse, a.b.lse_stride);
      if (lse != -INFINITY) {
        minus_lse = -lse * kLog2E;
        minus_delta = (a.b.d_lse == nullptr ? 0.0f : of_row(a.b.d_lse, a.b.d_lse_stride)) - product;
      }
    }
    a.stats.data[slot + query] = minus_lse;
    a.stats.data[slot + to_delta + query] = minus_delta;
  }
}

// ---- d_sinks --------------------------------------------------------------------------------------------------------

constexpr int kSinkThreads = 256;

// A block for each head: minus the weight of the sink times delta, over all queries of all sequences.
__global__ void __launch_bounds__(kSinkThreads) attention_backward_sinks_kernel(const __grid_constant__ RowsArgs a) {
  const AttentionForwardParams& p = a.b.forward;
  __shared__ float sums[kSinkThreads];
  const int head = blockIdx.x;
  const float sink = to_log2(p.sinks[head]);
  const int64_t to_delta = a.stats.index(1, 0, false, 0, 0);
  float sum = 0.0f;
  for (int batch = 0; batch < p.batch; ++batch) {
    const Sequence s = sequence_of(p, batch);
    const float* stats = a.stats.data + a.stats.index(0, head, p.cu_seqlens_q != nullptr, batch, s.q_start);
    for (int query = threadIdx.x; query < s.seq_q; query += kSinkThreads) {
      const float minus_lse = stats[query];
      if (minus_lse != -INFINITY) sum += ptx::ex2(sink + minus_lse) * stats[to_delta + query];
    }
  }
  sums[threadIdx.x] = sum;
  for (int half = kSinkThreads / 2; half > 0; half /= 2) {
    __syncthreads();  // the sums of the last round are written
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) a.b.d_sinks[head] = sums[0];
}

// ---- d_bias ---------------------------------------------------------------------------------------------------------

struct BiasArgs {
  BackwardArgs a;
  float* d_bias;
  int64_t stride[4];
  int query_tiles;  // of the grid; a dimension that the bias is broadcast over has one block, which adds up
  bool reduces[4];  // batch, heads, queries, keys
};

// A block for each tile of the bias. What it adds up comes in the order of batch, head, query and key.
template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm)
    attention_backward_bias_kernel(const __grid_constant__ BiasArgs args) {
  const BackwardArgs& a = args.a;
  const AttentionForwardParams& p = a.p;
  auto& smem = dynamic_smem<Smem<T>>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int query_tile = blockIdx.x % args.query_tiles, key_block = blockIdx.x / args.query_tiles;
  const int num_tiles = (static_cast<int>(p.seq_q) + T::kOwned - 1) / T::kOwned;
  const int num_blocks = (static_cast<int>(p.seq_k) + T::kStreamed - 1) / T::kStreamed;
  const auto range = [&](int dim, int mine, int all) {
    return args.reduces[dim] ? Range{0, all} : Range{mine, mine + 1};
  };
  const Range batches = range(0, blockIdx.z, p.batch), heads = range(1, blockIdx.y, p.heads);
  const Range tiles = range(2, query_tile, num_tiles), blocks = range(3, key_block, num_blocks);
  const Addresses<T> at(smem);

  Products<T> sum;
  for_each<T::kRowTiles, T::kStreamTiles>([&](int m, int n, int i) { sum[m][n][i] = 0.0f; });
  for (int batch = batches.begin; batch < batches.end; ++batch) {
    for (int head = heads.begin; head < heads.end; ++head) {
      for (int tile = tiles.begin; tile < tiles.end; ++tile) {
        const Unit u = unit_of<T>(p, batch, tile);
        const Range any = partners_of<T>(p, u, u.begin, u.begin + T::kOwned).any;
        bool is_loaded = false;
        for (int block = blocks.begin; block < blocks.end; ++block) {
          const int first_key = block * T::kStreamed;
          if (first_key >= any.end || first_key + T::kStreamed <= any.begin) continue;
          __syncthreads();  // every warp has read the block before
          if (!is_loaded) {
            load_owned(smem, a, u, 0, head);
            load_owned(smem, a, u, 1, head);
            is_loaded = true;
          }
          StreamCopy<T> copy(a, u, smem, head / a.group, block);
          copy.zero_columns();
          copy.issue(a, smem, 0, u.seq_k - first_key);
          ptx::cp_async_commit();
          ptx::cp_async_wait<0>();
          __syncthreads();  // every warp sees the tile and the block
          RowStats<T> rows;
          rows.load(a, u, head);
          Products<T> s, d;
          for_each<T::kRowTiles, T::kStreamTiles>([&](int m, int n, int i) { s[m][n][i] = 0.0f; });
          multiply<T, 0>(s, at.owned, at.streamed);
          with_stats<T, 1>(d, rows, at.stats, [](float, float minus_delta) { return minus_delta; });
          multiply<T, 1>(d, at.owned, at.streamed);
          weigh_general<T, false>(s, d, a, u, head, first_key, rows, at.stats);
          for_each<T::kRowTiles, T::kStreamTiles>([&](int m, int n, int i) {
            if (RowStats<T>::row_of(u, m, i / 2) < u.seq_q) sum[m][n][i] += d[m][n][i];
          });
        }
      }
    }
  }

  float* to = args.d_bias + blockIdx.z * args.stride[0] + blockIdx.y * args.stride[1];
  const Unit u = unit_of<T>(p, 0, query_tile);
  const int first_key = key_block * T::kStreamed;
  if (!args.reduces[2]) {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = RowStats<T>::row_of(u, m, half);
        float of_row = 0.0f;
#pragma unroll
        for (int n = 0; n < T::kStreamTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = first_key + n * 8 + lane % 4 * 2 + e;
            const float x = sum[m][n][2 * half + e];
            if (args.reduces[3]) of_row += x;
            else if (query < u.seq_q && key < u.seq_k) to[query * args.stride[2] + key * args.stride[3]] = x;
          }
        }
        of_row = quad_sum(of_row);
        if (args.reduces[3] && lane % 4 == 0 && query < u.seq_q) to[query * args.stride[2]] = of_row;
      }
    }
    return;
  }
  float (&sums)[T::kWarps][T::kStreamed] = *reinterpret_cast<float (*)[T::kWarps][T::kStreamed]>(&smem);
  __syncthreads();  // every warp has read the last block, which the sums overlay
#pragma unroll
  for (int n = 0; n < T::kStreamTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float of_column = 0.0f;
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) of_column += sum[m][n][e] + sum[m][n][2 + e];
      for (int distance = 4; distance < kWarp; distance *= 2)
        of_column += __shfl_xor_sync(ptx::kAllLanes, of_column, distance);
      if (lane < 4) sums[warp][n * 8 + lane * 2 + e] = of_column;
    }
  }
  __syncthreads();  // the sums of all warps are written
  if (threadIdx.x >= T::kStreamed) return;
  float of_column = 0.0f;
  for (const auto& of_warp : sums) of_column += of_warp[threadIdx.x];
  if (args.reduces[3]) {
    for (int distance = 1; distance < T::kStreamed; distance *= 2)
      of_column +=
          __shfl_xor_sync(T::kStreamed == kWarp ? ptx::kAllLanes : (1u << T::kStreamed) - 1, of_column, distance);
    if (threadIdx.x == 0) *to = of_column;
  } else if (first_key + static_cast<int>(threadIdx.x) < p.seq_k) {
    to[(first_key + threadIdx.x) * args.stride[3]] = of_column;
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

// Which tensors a pass owns and which it streams.
template <class T>
BackwardArgs args_of(const AttentionBackwardCall& call) {
  const AttentionBackwardParams& b = call.b;
  const AttentionForwardParams& p = b.forward;
  BackwardArgs a{p,
                 {p.q, b.d_o},
                 {p.k, p.v},
                 {b.d_q, {}},
                 {static_cast<int>(p.head_dim), static_cast<int>(p.v_head_dim)},
                 call.stats,
                 static_cast<float>(p.softmax_scale * kLog2E),
                 p.softcap != 0.0f || p.bias != nullptr || p.alibi_slopes != nullptr,
                 static_cast<int>(p.heads / p.kv_heads),
                 {},
                 {}};
  if (!T::kOwnsQueries) {
    std::swap(a.owned, a.streamed);
    a.grads[0] = b.d_k;
    a.grads[1] = b.d_v;
  }
  for (int t = 0; t < 2; ++t) {
    const int64_t row_bytes = a.streamed[t].token_stride * 2;
    a.pass_bytes[t] = row_bytes * T::kPassRows;
    a.block_bytes[t] = row_bytes * (T::kStreamed - (T::kPasses - 1) * T::kPassRows);
  }
  return a;
}

template <class T>
void launch_pass(const AttentionBackwardCall& call, cudaStream_t stream) {
  const AttentionForwardParams& p = call.b.forward;
  const int64_t owned = T::kOwnsQueries ? p.seq_q : p.seq_k, heads = T::kOwnsQueries ? p.heads : p.kv_heads;
  if (owned == 0) return;
  launch("attention_backward", attention_backward_kernel<T>, dim3((owned + T::kOwned - 1) / T::kOwned, heads, p.batch),
         T::kThreads, sizeof(Smem<T>), stream, args_of<T>(call));
}

template <class T>
void launch_bias(const AttentionBackwardCall& call, cudaStream_t stream) {
  const AttentionBackwardParams& b = call.b;
  const AttentionForwardParams& p = b.forward;
  BiasArgs args{args_of<T>(call), b.d_bias, {}, 1, {}};
  const int64_t sizes[4] = {p.batch, p.heads, (p.seq_q + T::kOwned - 1) / T::kOwned,
                            (p.seq_k + T::kStreamed - 1) / T::kStreamed};
  int64_t grid[4];
  for (int dim = 0; dim < 4; ++dim) {
    args.stride[dim] = b.d_bias_stride[dim];
    args.reduces[dim] = b.d_bias_stride[dim] == 0;
    grid[dim] = args.reduces[dim] ? 1 : sizes[dim];
  }
  args.query_tiles = static_cast<int>(grid[2]);
  launch("attention_backward_bias", attention_backward_bias_kernel<T>, dim3(grid[2] * grid[3], grid[1], grid[0]),
         T::kThreads, sizeof(Smem<T>), stream, args);
}

}  // namespace

AttentionRowStats attention_row_stats(const AttentionForwardParams& p) {
  const int64_t batch_slots = (p.seq_q + kStatsRows - 1) / kStatsRows * kStatsRows;
  const int64_t num_slots =
      p.cu_seqlens_q != nullptr ? (p.total_q / kStatsRows + p.batch + 1) * kStatsRows : p.batch * batch_slots;
  return {nullptr, p.heads, num_slots, batch_slots};
}

void launch_attention_backward(const AttentionBackwardCall& given, cudaStream_t stream) {
  AttentionBackwardCall call = given;
  AttentionBackwardParams& b = call.b;
  AttentionForwardParams& p = b.forward;
  check_launch("attention_backward", p, {&p.q, &p.k, &p.v, &p.o, &b.d_o, &b.d_q, &b.d_k, &b.d_v});
  max_smem_bytes("attention_backward");  // enough for every tile
  const int64_t dim = std::max(p.head_dim, p.v_head_dim);
  dispatch_half(p.dtype, [&]<class Element>() {
    if (p.seq_q > 0) {
      launch("attention_backward_rows", attention_backward_rows_kernel<Element>,
             dim3((p.seq_q + kStatsRows - 1) / kStatsRows, p.heads, p.batch), 128, 0, stream, RowsArgs{b, call.stats});
    }
    dispatch_int<64, 96, 128, 192, 256>("dim", bucket_of(dim), [&]<int kDim>() {
      if constexpr (kDim <= 128) {
        launch_pass<Traits<Element, kDim, Pass::kKeyValue>>(call, stream);
      } else {
        launch_pass<Traits<Element, kDim, Pass::kValue>>(call, stream);
        launch_pass<Traits<Element, kDim, Pass::kKey>>(call, stream);
      }
      launch_pass<Traits<Element, kDim, Pass::kQuery>>(call, stream);
      if (b.d_bias != nullptr && p.seq_q > 0 && p.seq_k > 0)
        launch_bias<Traits<Element, kDim, Pass::kQuery>>(call, stream);
    });
  });
  if (b.d_sinks != nullptr)
    launch("attention_backward_sinks", attention_backward_sinks_kernel, dim3(p.heads), kSinkThreads, 0, stream,
           RowsArgs{b, call.stats});
}

}  // namespace fmkernels
