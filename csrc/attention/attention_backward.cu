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
  if (threadIdx.x == 0) smem.unit = u;
  if (threadIdx.x % kWarp == 0) {
    const int warp_begin = u.begin + warp * T::kWarpRows;
    smem.partners[warp] = partners_of<T>(p, u, warp_begin, warp_begin + T::kWarpRows);
  }
  if constexpr (T::kOwnsQueries) load_owned_stats(smem, a, u, blockIdx.y);
  Addresses<T> at(smem);

  // The streamed heads: one for queries, those of the group for keys.
  const int first_head = T::kOwnsQueries ? blockIdx.y / a.group : blockIdx.y * a.group;
  const int num_heads = T::kOwnsQueries ? 1 : a.group;
  int to_next = sizeof(Stage<T>);    // from the stage of the block at hand to the other
  const auto copy_of = [&](int i) {  // of streamed head i, with its first block under way
    StreamCopy<T> copy(a, u, smem, to_next > 0 ? 0 : sizeof(Stage<T>), first_head + i, first_block);
    if (i == 0) copy.zero_columns();
    copy.issue(a, smem, to_next, first_block < end_block ? u.num_streamed - first_block * T::kStreamed : 0);
    ptx::cp_async_commit();
    return copy;
  };
  StreamCopy<T> copy = copy_of(0);

  Gradient<T> grads[T::kEndGrad - T::kFirstGrad];
#pragma unroll
  for (auto& gradient : grads) {
    for_each<T::kRowTiles, T::kColumnTiles>([&](int m, int n, int i) { gradient[m][n][i] = 0.0f; });
  }

  for (int i = 0; i < num_heads; ++i) {
    const int head = T::kOwnsQueries ? blockIdx.y : first_head + i;
    if (i > 0) copy = copy_of(i);
    int block = first_block;

    // One block. With kGeneral it modifies, masks and may skip.
    auto step = [&]<bool kGeneral>() {
      const int first_streamed = block * T::kStreamed;
      bool nonfinite = false;
      ptx::cp_async_wait<0>();
      if constexpr (kGeneral) nonfinite = __syncthreads_or(copy.has_nonfinite(-to_next));
      else __syncthreads();
      // B1: every warp sees block[i] and what it owns, and has read block[i-1]
      copy.issue(a, smem, -to_next, block + 1 < end_block ? smem.unit.num_streamed - first_streamed - T::kStreamed : 0);
      ptx::cp_async_commit();

      const Partners mine = kGeneral ? smem.partners[warp] : Partners{};
      // Where something is not finite all warps work, because they share barriers.
      const bool works =
          !kGeneral || nonfinite || (first_streamed < mine.any.end && first_streamed + T::kStreamed > mine.any.begin);
      const bool is_whole =
          !kGeneral || (mine.all.begin <= first_streamed && first_streamed + T::kStreamed <= mine.all.end);
      if (works) {
        Products<T> s[T::kParts];
        multiply_scores<T>(s, at);
        static_for<T::kParts>([&]<int part>() {
          const int first_of_part = first_streamed + part * T::kPart;
          Products<T> d[1];
          if constexpr (T::kHasSlopes) multiply_slopes<T, part>(d, at);
          if (kGeneral && a.is_general) {
            weigh_general<T, part, true>(s[part], d[0], a, smem.unit, head, first_of_part, at.stats);
          } else {
            weigh<T, part>(s[part], d[0], at.stats, a.scale_log2);
            if (!is_whole) mask<T>(s[part], d[0], a, smem.unit, first_of_part);
          }
          if (kGeneral && nonfinite) {
            static_for<T::kEndGrad - T::kFirstGrad>([&]<int g>() {
              add_nonfinite<T, T::kFirstGrad + g>(grads[g], smem, a, to_next > 0 ? 0 : 1, part * T::kPart,
                                                  first_of_part);
            });
            __syncthreads();  // every warp has read what is not finite
            copy.zero_nonfinite(0, part * T::kPart);
            __syncthreads();  // every warp sees zeros in its place
          }
          if constexpr (T::kEndGrad == 2) accumulate<T, 1, part>(grads[1 - T::kFirstGrad], s[part], at.transposed);
          if constexpr (T::kFirstGrad == 0) accumulate<T, 0, part>(grads[0], d[0], at.transposed);
        });
      }
      at.turn(to_next);
      to_next = -to_next;
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
  __syncthreads();  // every warp sees the unit, also where there was no block
  static_for<T::kEndGrad - T::kFirstGrad>([&]<int g>() {
    keep_gradient(grads[g], smem, T::kFirstGrad + g, T::kFirstGrad + g == 0 ? p.softmax_scale : 1.0f);
  });
  __syncwarp();
  for (int tensor = T::kFirstGrad; tensor < T::kEndGrad; ++tensor) store_owned(smem, a, smem.unit, tensor);
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
  const auto rows_of = [&](const TokenView& view) {
    return static_cast<const Element*>(view.data) + blockIdx.z * view.batch_stride + head * view.head_stride;
  };
  const Element *const o = rows_of(p.o), *const d_o = rows_of(a.b.d_o);
  // Lane i of a row's lanes keeps the product of the i-th pass.
  constexpr int kPassRows = 128 / kLanesARow, kPasses = kStatsRows / kPassRows;
  static_assert(kPasses <= kLanesARow);
  float mine = 0.0f;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int query = first + threadIdx.x / kLanesARow + pass * kPassRows;
    const int64_t token = s.q_start + min(query, s.seq_q - 1);
    float product = 0.0f;
    for (int c = lane * kChunkElements; c < p.v_head_dim; c += kLanesARow * kChunkElements) {
      const uint4 x = *reinterpret_cast<const uint4*>(o + token * p.o.token_stride + c);
      const uint4 y = *reinterpret_cast<const uint4*>(d_o + token * a.b.d_o.token_stride + c);
      const auto *of_x = reinterpret_cast<const Element*>(&x), *of_y = reinterpret_cast<const Element*>(&y);
#pragma unroll
      for (int i = 0; i < kChunkElements; ++i) product = fmaf(to_float(of_x[i]), to_float(of_y[i]), product);
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
  const int64_t slot = a.stats.first_slot(head, p.cu_seqlens_q != nullptr, blockIdx.z, s.q_start) + query;
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
    const int64_t first = a.stats.first_slot(head, p.cu_seqlens_q != nullptr, batch, s.q_start);
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
  for_each<T::kRowTiles, T::kPartTiles>([&](int m, int n, int i) { sum[m][n][i] = 0.0f; });
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
            load_owned_stats(smem, a, u, head);
            is_loaded = true;
          }
          StreamCopy<T> copy(a, u, smem, 0, head / a.group, block);
          copy.zero_columns();
          copy.issue(a, smem, 0, u.seq_k - first_key);
          ptx::cp_async_commit();
          ptx::cp_async_wait<0>();
          __syncthreads();  // every warp sees the tile and the block
          Products<T> s[1], d[1];
          multiply_scores<T>(s, at);
          multiply_slopes<T, 0>(d, at);
          weigh_general<T, 0, false>(s[0], d[0], a, u, head, first_key, at.stats);
          for_each<T::kRowTiles, T::kPartTiles>([&](int m, int n, int i) {
            if (row_of<T>(u, m, i / 2) < u.seq_q) sum[m][n][i] += d[0][m][n][i];
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
        const int query = row_of<T>(u, m, half);
        float of_row = 0.0f;
#pragma unroll
        for (int n = 0; n < T::kPartTiles; ++n) {
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
  for (int n = 0; n < T::kPartTiles; ++n) {
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
  BackwardArgs a{};
  a.p = p;
  a.owned[0] = p.q, a.owned[1] = b.d_o, a.grads[0] = b.d_q;
  a.streamed[0] = p.k, a.streamed[1] = p.v;
  a.dims[0] = static_cast<int>(p.head_dim), a.dims[1] = static_cast<int>(p.v_head_dim);
  a.stats = call.stats;
  a.scale_log2 = static_cast<float>(p.softmax_scale * kLog2E);
  a.is_general = p.softcap != 0.0f || p.bias != nullptr || p.alibi_slopes != nullptr;
  a.group = static_cast<int>(p.heads / p.kv_heads);
  if (!T::kOwnsQueries) {
    std::swap(a.owned, a.streamed);
    a.grads[0] = b.d_k;
    a.grads[1] = b.d_v;
  }
  a.num_passes = T::kPasses;
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
  return {nullptr, num_slots, batch_slots};
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
