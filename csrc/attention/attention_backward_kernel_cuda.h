// SPDX-License-Identifier: Apache-2.0
// The kernel of attention_backward_queries.cu and attention_backward_keys.cu, and how a pass is launched. attention_backward.cu
// tells how the passes work together.
#pragma once

#include "../common/dispatch.h"
#include "attention_backward_warp_cuda.h"

namespace fmkernels {

// The launches of attention_backward.cu that have files of their own: a compiler takes its time over each.
void launch_attention_backward_queries(const AttentionBackwardCall& call, cudaStream_t stream);
void launch_attention_backward_keys(const AttentionBackwardCall& call, cudaStream_t stream);
void launch_attention_backward_bias(const AttentionBackwardCall& call, cudaStream_t stream);
void launch_attention_backward_float(const AttentionBackwardCall& call, cudaStream_t stream);  // queries and keys

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
  const bool has_block_mask = p.block_mask.block != 0;
  const BlockList& listed = T::kOwnsQueries ? p.block_mask.rows : p.block_mask.columns;
  auto& walk = smem.walks[warp];
  if (threadIdx.x == 0) {
    smem.unit = u, smem.first_block = first_block, smem.end_block = end_block;
    smem.plain = {max(first_block, (tile.all.begin + T::kStreamed - 1) / T::kStreamed),
                  a.is_general || !T::kHasPlainLoop ? 0 : min(tile.all.end / T::kStreamed, end_block)};
  }
  if (threadIdx.x % kWarp == 0) {
    const int warp_begin = u.begin + row_warp<T>() * T::kWarpRows;
    smem.partners[warp] = partners_of<T>(p, u, warp_begin, warp_begin + T::kWarpRows);
  }
  if constexpr (T::kOwnsQueries) load_owned_stats(smem, a, u, blockIdx.y);
  __syncthreads();  // what masks ask for is written
  const Unit& kept =
      T::kOwnsQueries || T::kSplits ? smem.unit : u;  // of the two that which leaves registers to the products
  Addresses<T> at(smem);

  // The streamed heads: one for queries, those of the group for keys.
  const int first_head = T::kOwnsQueries ? blockIdx.y / a.group : blockIdx.y * a.group;
  int to_next = kToSecondStage<T>;  // from the stage of the block at hand to the other
  int block;
  const auto copy_of = [&](int head) {  // a streamed one, with its first block under way
    block = smem.first_block;
    if (has_block_mask)
      block = walk.begin(p.block_mask, listed, u.batch, T::kOwnsQueries ? blockIdx.y : head, u.begin, block,
                         smem.end_block);
    StreamCopy<T> copy(a, u, smem, to_next > 0 ? 0 : kToSecondStage<T>, head, block);
    if (head == first_head) copy.zero_columns();
    copy.issue(a, smem, to_next, block < smem.end_block ? u.num_streamed - block * T::kStreamed : 0);
    ptx::cp_async_commit();
    return copy;
  };
  StreamCopy<T> copy = copy_of(first_head);

  Gradient<T> grads[T::kEndGrad - T::kFirstGrad];
#pragma unroll
  for (auto& gradient : grads) {
    for_each<T::kRowTiles, T::kColumnTiles>([&](int m, int n, int i) { gradient[m][n][i] = 0.0f; });
  }

  int streamed_head = first_head;
  do {
    const int head = T::kOwnsQueries ? blockIdx.y : streamed_head;
    if (!T::kOwnsQueries && streamed_head > first_head) copy = copy_of(streamed_head);

    // Rows that are streamed from a block on; 0 past the last block.
    const auto rows_from = [&](int first) {
      return first < smem.end_block ? kept.num_streamed - first * T::kStreamed : 0;
    };
    // One block. With kGeneral it modifies, masks and may skip, and goes on to the next one; else no place of the block is
    // asked for, and `rows_ahead` tells which rows the next one has.
    auto step = [&]<bool kGeneral>(int rows_ahead) {
      const int first_streamed = kGeneral ? block * T::kStreamed : 0;
      bool nonfinite = false;
      ptx::cp_async_wait<0>();
      if constexpr (kGeneral) nonfinite = __syncthreads_or(copy.has_nonfinite(-to_next));
      else __syncthreads();
      // B1: every warp sees block[i] and what it owns, and has read block[i-1]
      // What the warp's line of the block mask sees of the block, and the block that comes next.
      int tile_idx = kWhole, next = kGeneral ? block + 1 : 0;
      if (kGeneral && has_block_mask) {
        tile_idx = walk.now().tiles[line_of_warp<T>(p.block_mask, smem.unit)];
        next = walk.next().block;
        walk.advance(p.block_mask, listed);
      }
      const auto issue_next = [&] {
        if (kGeneral && has_block_mask) copy.skip(a, next - block - 1);
        copy.issue(a, smem, -to_next, kGeneral ? rows_from(next) : rows_ahead);
        ptx::cp_async_commit();
      };
      if constexpr (T::kStages > 1) issue_next();

      const Partners mine = kGeneral ? smem.partners[warp] : Partners{};
      // Where something is not finite all warps work, because they share barriers.
      const bool works =
          !kGeneral || nonfinite ||
          (tile_idx != kHidden && first_streamed < mine.any.end && first_streamed + T::kStreamed > mine.any.begin);
      const bool is_whole =
          !kGeneral || (mine.all.begin <= first_streamed && first_streamed + T::kStreamed <= mine.all.end);
      if (works) {
        Products<T> s[T::kParts];
        multiply_scores<T>(s, at);
        static_for<T::kParts>([&]<int part>() {
          const int first_of_part = first_streamed + part * T::kPart;
          uint32_t kept_bits = 0;
          if (kGeneral && p.dropout_threshold != 0) kept_bits = kept_of_part<T>(p, smem.unit, head, first_of_part);
          Products<T> d[1];
          if constexpr (T::kHasSlopes) multiply_slopes<T, part>(d, at);
          if constexpr (kGeneral && T::kHasSlopes) {
            if (p.dropout_threshold != 0) drop_slopes<T, part>(d[0], at.stats, a.kept_scale, kept_bits);
          }
          if (kGeneral && a.modifies) {
            weigh_general<T, part, true>(s[part], d[0], a, smem.unit, head, first_of_part, at.stats);
          } else {
            weigh<T, part>(s[part], d[0], at.stats, a.scale_log2);
            if (!is_whole) mask<T>(s[part], d[0], a, smem.unit, first_of_part);
          }
          if constexpr (kGeneral) {
            if (tile_idx != kWhole) mask_block<T>(s[part], d[0], p.block_mask, smem.unit, tile_idx, first_of_part);
            if (T::kEndGrad == 2 && p.dropout_threshold != 0) drop_weights(s[part], kept_bits, kept_bit<T>);
          }
          if (kGeneral && nonfinite) {
            static_for<T::kEndGrad - T::kFirstGrad>([&]<int g>() {
              add_nonfinite<T, T::kFirstGrad + g>(grads[g], smem, a, T::kStages == 1 || to_next > 0 ? 0 : 1,
                                                  part * T::kPart, first_of_part, tile_idx);
            });
            __syncthreads();  // every warp has read what is not finite
            copy.zero_nonfinite(0, part * T::kPart);
            __syncthreads();  // every warp sees zeros in its place
          }
          constexpr int row = part * T::kPart;
          if constexpr (T::kEndGrad == 2)
            add_product<T, T::kStreamed + row>(grads[1 - T::kFirstGrad], s[part], at.transposed);
          if constexpr (T::kFirstGrad == 0) add_product<T, row>(grads[0], d[0], at.transposed);
        });
      }
      if constexpr (T::kStages == 1) {
        __syncthreads();  // every warp has read block[i]
        issue_next();
      }
      at.turn(to_next);
      to_next = -to_next;
      if constexpr (kGeneral) block = next;
    };

    const auto is_plain = [&] { return T::kHasPlainLoop && smem.plain.begin <= block && block < smem.plain.end; };
    while (block < smem.end_block) {
      if constexpr (T::kHasPlainLoop) {
        if (is_plain()) {
          // The rows ahead, of which the last plain block has at most one block's and every other one more than that: one
          // register tells both where the loop ends and what is copied.
          constexpr int kBlock = T::kStreamed;
          int rows_ahead = 2 * kBlock * (smem.plain.end - 1 - block) + min(rows_from(smem.plain.end), kBlock);
          do step.template operator()<false>(rows_ahead);
          while ((rows_ahead -= 2 * kBlock) >= 0);
          block = smem.plain.end;
          continue;
        }
      }
      do step.template operator()<true>(0);
      while (block < smem.end_block && !is_plain());
    }
  } while (!T::kOwnsQueries && ++streamed_head < first_head + a.group);

  // Unless several warps share rows, a warp's part of owned is copied, read and overwritten by the warp alone.
  const auto sync_owners = [] { T::kColumnWarps > 1 ? __syncthreads() : __syncwarp(); };
  ptx::cp_async_wait<0>();
  sync_owners();
  static_for<T::kEndGrad - T::kFirstGrad>([&]<int g>() {
    keep_gradient(grads[g], smem, T::kFirstGrad + g, T::kFirstGrad + g == 0 ? p.softmax_scale : a.kept_scale);
  });
  sync_owners();
  for (int tensor = T::kFirstGrad; tensor < T::kEndGrad; ++tensor) store_owned(smem, a, kept, tensor);
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
  a.kept_scale = dropout_scale(p);
  a.modifies = has_modifiers(p);
  a.is_general = a.modifies || p.dropout_threshold != 0 || p.block_mask.block != 0;
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

// d_k and d_v, in one pass where both fit into the registers.
template <class Element, int kDim>
void launch_keys(const AttentionBackwardCall& call, cudaStream_t stream) {
  if constexpr (kDim <= (std::is_same_v<Element, float> ? 64 : 128)) {
    launch_pass<Traits<Element, kDim, Pass::kKeyValue>>(call, stream);
  } else {
    launch_pass<Traits<Element, kDim, Pass::kValue>>(call, stream);
    launch_pass<Traits<Element, kDim, Pass::kKey>>(call, stream);
  }
}

// f<Element, kDim>() for the dtype and the columns of a call, of half elements or of float32.
template <class F>
void dispatch_backward(const AttentionForwardParams& p, F&& f) {
  dispatch_half(p.dtype, [&]<class Element>() {
    dispatch_int<64, 96, 128, 192, 256>("dim", bucket_of<Element>(std::max(p.head_dim, p.v_head_dim)),
                                        [&]<int kDim>() { f.template operator()<Element, kDim>(); });
  });
}
template <class F>
void dispatch_backward_float(const AttentionForwardParams& p, F&& f) {
  dispatch_int<64, 128, 256>("dim", bucket_of<float>(std::max(p.head_dim, p.v_head_dim)),
                             [&]<int kDim>() { f.template operator()<float, kDim>(); });
}

}  // namespace
}  // namespace fmkernels
