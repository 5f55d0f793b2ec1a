// SPDX-License-Identifier: Apache-2.0
// attention_backward_bias.cu: the gradient of the bias, summed over what the bias is broadcast over. See attention_backward.cu.

#include "attention_backward_kernel_cuda.h"

namespace fmkernels {
namespace {

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
  const bool writes = first_column<T>() == 0;  // of the warps that own the same rows one

  Products<T> sum;
  for_each<T::kRowTiles, T::kPartTiles>([&](int m, int n, int i) { sum[m][n][i] = 0.0f; });
  for (int batch = batches.begin; batch < batches.end; ++batch) {
    for (int head = heads.begin; head < heads.end; ++head) {
      for (int tile = tiles.begin; tile < tiles.end; ++tile) {
        const Unit u = unit_of<T>(p, batch, tile);
        const Range any = partners_of<T>(p, u, u.begin, u.begin + T::kOwned).any;
        Range lines[kLines];
        for (int i = 0; i < kLines; ++i) {
          lines[i] = p.block_mask.block == 0
                         ? Range{}
                         : line_of(p.block_mask, p.block_mask.rows, batch, head, block_of(p.block_mask, u.begin) + i);
        }
        bool is_loaded = false;
        for (int block = blocks.begin; block < blocks.end; ++block) {
          const int first_key = block * T::kStreamed;
          if (first_key >= any.end || first_key + T::kStreamed <= any.begin) continue;
          int tile_idx = kWhole;
          if (p.block_mask.block != 0) {
            int tiles[kLines];
            for (int i = 0; i < kLines; ++i)
              tiles[i] = tile_of_block(p.block_mask, p.block_mask.rows, lines[i], first_key);
            if (tiles[0] == kHidden && tiles[1] == kHidden) continue;
            tile_idx = line_of_warp<T>(p.block_mask, u) == 0 ? tiles[0] : tiles[1];
          }
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
          const uint32_t kept = p.dropout_threshold != 0 ? kept_of_part<T>(p, u, head, first_key) : 0;
          Products<T> s[1], d[1];
          multiply_scores<T>(s, at);
          multiply_slopes<T, 0>(d, at);
          if (p.dropout_threshold != 0) drop_slopes<T, 0>(d[0], at.stats, a.kept_scale, kept);
          weigh_general<T, 0, false>(s[0], d[0], a, u, head, first_key, at.stats);
          if (tile_idx != kWhole) mask_block<T>(s[0], d[0], p.block_mask, u, tile_idx, first_key);
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
            else if (writes && query < u.seq_q && key < u.seq_k) to[query * args.stride[2] + key * args.stride[3]] = x;
          }
        }
        of_row = quad_sum(of_row);
        if (writes && args.reduces[3] && lane % 4 == 0 && query < u.seq_q) to[query * args.stride[2]] = of_row;
      }
    }
    return;
  }
  float (&sums)[T::kRowWarps][T::kStreamed] = *reinterpret_cast<float (*)[T::kRowWarps][T::kStreamed]>(&smem);
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
      if (writes && lane < 4) sums[warp][n * 8 + lane * 2 + e] = of_column;
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

void launch_attention_backward_bias(const AttentionBackwardCall& call, cudaStream_t stream) {
  const auto launch_of = [&]<class Element, int kDim>() {
    launch_bias<Traits<Element, kDim, Pass::kQuery>>(call, stream);
  };
  call.b.forward.dtype == DType::kFloat32 ? dispatch_backward_float(call.b.forward, launch_of)
                                          : dispatch_backward(call.b.forward, launch_of);
}

}  // namespace fmkernels
