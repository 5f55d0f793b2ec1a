// SPDX-License-Identifier: Apache-2.0
// The kernel of attention_forward.cu and attention_forward_float.cu, and how it is launched. attention_forward.cu tells how
// it works.
#pragma once

#include "../common/dispatch.h"
#include "attention_scores_cuda.h"

namespace fmkernels {
namespace {

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void run_tile(const Args& a) {
  using Element = typename T::Element;
  const AttentionForwardParams& p = a.p;
  auto& smem = dynamic_smem<Smem<T>>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Unit u = unit_of(a, T::kRows);
  if (!u.exists) return;

  const int warp_row = u.row_begin + warp * T::kWarpRows;
  const RowsVisible tile = visible_to(p, u, u.row_begin, u.row_begin + T::kRows);
  const int first_block = tile.any.begin / T::kKeys;
  const int end_block = tile.any.begin < tile.any.end ? (tile.any.end + T::kKeys - 1) / T::kKeys : first_block;

  // Queries, and the first keys and values; rows and columns that do not exist are zeros.
  {
    const RowsOfWarp<T> rows(p.q, u);
    const int first = lane / T::kRowThreads, chunk = lane % T::kRowThreads;
    const uint32_t to = ptx::smem_address(smem.q[warp * T::kWarpRows]) + swizzled<T>(first, chunk);
    static_for<T::kWarpRows / T::kWarpPassRows>([&]<int pass>() {
      const int r = first + pass * T::kWarpPassRows;
      const Element* q = rows.at(r) + chunk * T::kChunkElements;
      static_for<T::kColumnPasses>([&]<int c>() {
        const bool valid = warp_row + r < u.num_rows &&
                           (chunk + c * T::kRowThreads) * T::kChunkElements < static_cast<int>(p.head_dim);
        ptx::cp_async_16_or_zero(in_pass<T, pass>(to) + c * T::kRowThreads * 16,
                                 q + c * T::kRowThreads * T::kChunkElements, valid);
      });
    });
  }
  if (lane == 0) smem.visible[warp] = visible_to(p, u, warp_row, warp_row + T::kWarpRows);
  if (threadIdx.x == 0) {
    const int plain_begin = max(first_block, (tile.all.begin + T::kKeys - 1) / T::kKeys);
    const int plain_end = min(tile.all.end / T::kKeys, end_block);
    smem.unit = u;
    smem.first_block = first_block;
    smem.plain = {plain_begin, a.is_general || !T::kHasPlainLoop || plain_end <= plain_begin ? 0 : plain_end};
  }
  int block = end_block - 1;
  const bool has_block_mask = T::kTakesBlockMask && p.block_mask.block != 0;
  auto& walk = smem.walks[warp];
  if (has_block_mask) {
    const BlockMaskView& m = p.block_mask;
    block = walk.begin(m, m.rows, blockIdx.z, blockIdx.y, query_of(u, u.row_begin), block, first_block - 1);
  }
  const uint32_t copy_to = pinned(ptx::smem_address(smem.kv) + BlockCopy<T, false>::thread_offset());
  {
    BlockCopy<T, false> keys(a, u, copy_to, block);
    BlockCopy<T, true> values(a, u, copy_to, block);
    keys.zero_columns();
    values.zero_columns();
    if (first_block <= block) keys.issue_ragged(u.seq_k - block * T::kKeys);
  }
  ptx::cp_async_commit();

  WarpState<T> w;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
    for (int half = 0; half < 2; ++half) w.shift[m][half] = kNoMax, w.sum[m][half] = 0.0f;
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n) {
      for (int i = 0; i < 4; ++i) w.o[m][n][i] = 0.0f;
    }
  }
  // Made anew for every run of plain blocks, and for each block that is modified or masked: that needs the registers.
  auto addresses = [&] { return Addresses<T>(a, smem.unit, smem, block, copy_to); };
  ptx::cp_async_wait<0>();
  __syncthreads();  // every warp sees q, the unit and what is visible
  QFragments<T> q;
  if constexpr (T::kKeepsQ) {
    static_for<T::kRowBytes / T::kStepBytes>(
        [&]<int step>() { load_q<T, step>(q.kept[step], {Addresses<T>::of_q(smem)}); });
  }

  // One block. With kGeneral it modifies, masks and may skip, and goes on to the next one; else no place of the block is
  // asked for, and `is_followed` tells whether there is a next one.
  auto step = [&]<bool kGeneral>(Addresses<T>& at, bool is_followed) {
    Scores<T> s;
    const int first_key = kGeneral ? block * T::kKeys : 0;
    KeptBits<T> kept = 0;
    if (kGeneral && p.dropout_threshold != 0) kept = kept_of_block<T>(p, smem.unit, first_key);

    ptx::cp_async_wait<0>();
    __syncthreads();  // B1: every warp sees k[block], and has read the values of the block before
    const RowsVisible mine = kGeneral ? smem.visible[warp] : RowsVisible{};
    bool works = !kGeneral || (first_key < mine.any.end && first_key + T::kKeys > mine.any.begin);
    // What the lines of the block mask see of the block, and the block that comes next.
    int tiles[kLines] = {kWhole, kWhole}, below = kGeneral ? block - 1 : 0;
    if (kGeneral && has_block_mask) {
      const auto visit = walk.now();
      for (int i = 0; i < kLines; ++i) tiles[i] = visit.tiles[i];
      below = walk.next().block;
      walk.advance(p.block_mask, p.block_mask.rows);
      works = works && !hides_all<T>(p.block_mask, smem.unit, tiles);
    }
    if (kGeneral && first_key + T::kKeys > smem.unit.seq_k) at.copy_values.issue_ragged(smem.unit.seq_k - first_key);
    else at.copy_values.issue(true, a.passes);
    ptx::cp_async_commit();
    float scale = a.scale_log2;
    if (works) {
      multiply_keys<T>(s, q, at.q, at.k);
      if constexpr (kGeneral) {
        const Unit& u = smem.unit;
        if (a.modifies) modify<T>(s, p, u, first_key), scale = 1.0f;
        const bool low = first_key < (mine.all.begin), high = mine.all.end < first_key + T::kKeys;
        if (low || high) mask<T>(s, p, u, first_key, low, high);
        if (tiles[0] != kWhole || tiles[1] != kWhole) mask_block<T>(s, p.block_mask, u, first_key, tiles);
      }
    }

    ptx::cp_async_wait<0>();
    bool nonfinite = false;
    if constexpr (kGeneral) nonfinite = __syncthreads_or(at.copy_values.template has_nonfinite<Element>());
    else __syncthreads();
    // B2: every warp sees v[block], and has read k[block]
    if constexpr (kGeneral) {
      BlockCopy<T, false>(a, smem.unit, copy_to, below).issue(below >= smem.first_block, a.passes);
    } else at.copy_keys.issue(is_followed, a.passes);
    ptx::cp_async_commit();
    if (works) {
      softmax<T>(w, s, scale);
      if (kGeneral && p.dropout_threshold != 0) drop_weights(s, kept, kept_bit<T>);
    }
    if (kGeneral && nonfinite) {
      if (works) add_nonfinite<T>(w, &smem.kv[1][0][0], p, smem.unit, first_key, tiles);
      __syncthreads();  // every warp has read what is not finite
      at.copy_values.template zero_nonfinite<Element>();
      __syncthreads();  // every warp sees zeros in its place
    }
    if (works) add_product<T, 0>(w.o, s, at.v);  // o += p v
    if constexpr (kGeneral) block = below;
  };

  const auto is_plain = [&] { return T::kHasPlainLoop && smem.plain.begin <= block && block < smem.plain.end; };
  while (block >= smem.first_block) {
    if constexpr (T::kHasPlainLoop) {
      if (is_plain()) {
        // Twice the plain blocks that come after this one, and one more where others follow: a register for both ends.
        int ahead = 2 * (block - smem.plain.begin) + (smem.plain.begin > smem.first_block);
        Addresses<T> at = addresses();
        do step.template operator()<false>(at, ahead > 0);
        while ((ahead -= 2) >= 0);
        block = smem.plain.begin - 1;
        continue;
      }
    }
    do {
      Addresses<T> at = addresses();
      step.template operator()<true>(at, false);
    } while (block >= smem.first_block && !is_plain());
  }
  store_results<T>(w, smem, a, smem.unit);
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm)
    attention_forward_kernel(const __grid_constant__ Args a) {
  if constexpr (is_launched<T>()) run_tile<T>(a);
  else __trap();
}

// Merges the chunks of the sequences that were split, a warp for each (row, kv head, sequence).
template <class Element>
__global__ void __launch_bounds__(128) attention_merge_chunks_kernel(const __grid_constant__ Args a) {
  const AttentionForwardParams& p = a.p;
  const Unit u = unit_of(a, 1 << 20);
  const int lane = threadIdx.x % kWarp, row = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (!is_split(u.num_rows, u.seq_k) || row >= u.num_rows) return;
  const int num_chunks = (u.seq_k + kSplitKeys - 1) / kSplitKeys;
  const int64_t first_slot = a.partials.first_slot(blockIdx.z, p.cu_seqlens_k != nullptr, u.k_start);
  const int64_t first = a.partials.index(first_slot, row, blockIdx.y), step = a.partials.rows * a.partials.heads;
  const float *const lse = a.partials.lse + first, *const o_of_chunks = a.partials.o + first * p.v_head_dim;
  float largest = -INFINITY;
  for (int chunk = 0; chunk < num_chunks; ++chunk) largest = fmaxf(largest, lse[chunk * step]);
  const float reference = largest == -INFINITY ? 0.0f : largest;
  float sum = 0.0f;
  for (int chunk = 0; chunk < num_chunks; ++chunk) sum += ptx::ex2((lse[chunk * step] - reference) * kLog2E);
  const int64_t head = head_of(u, row);
  const Total total = total_of(largest * kLog2E, sum, p.sinks, head);
  Element* o = row_at<Element>(p.o, u, row);
  for (int column = lane; column < p.v_head_dim; column += kWarp) {
    const float *lse_of_chunk = lse, *o_of_chunk = o_of_chunks + column;
    float x = 0.0f;
    for (int chunk = 0; chunk < num_chunks; ++chunk, lse_of_chunk += step, o_of_chunk += step * p.v_head_dim)
      x += ptx::ex2((*lse_of_chunk - reference) * kLog2E) * *o_of_chunk;  // 0, where no key of the chunk is visible
    o[column] = from_float<Element>(x * total.factor);
  }
  if (lane == 0)
    p.lse[blockIdx.z * p.lse_batch_stride + head * p.lse_head_stride + u.q_start + query_of(u, row)] = total.lse;
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class T>
void launch_with(Args a, int64_t units, cudaStream_t stream) {
  a.passes.back = -T::kKeys / T::kPassRows;
  a.chunks[0] = static_cast<int>(a.p.head_dim / T::kChunkElements);
  a.chunks[1] = static_cast<int>(a.p.v_head_dim / T::kChunkElements);
  launch("attention_forward", attention_forward_kernel<T>, dim3(units, a.partials.heads, a.p.batch), T::kThreads,
         sizeof(Smem<T>), stream, a);
}

// f<T>() for the traits of a call: those of its dtype and columns, and of what shared memory the GPU has.
template <class Element, int... kDims, class F>
void dispatch_forward(const AttentionForwardParams& p, F&& f) {
  const int smem_bytes = max_smem_bytes("attention_forward");
  dispatch_int<kDims...>("dim", bucket_of<Element>(std::max(p.head_dim, p.v_head_dim)), [&]<int kDim>() {
    using Large = Traits<Element, kDim, 163>;
    if constexpr (Large::kHasOneTile) f.template operator()<Large>();
    else if (smem_bytes >= 163 * 1024 && (p.block_mask.block == 0 || Large::kTakesBlockMask))
      f.template operator()<Large>();
    else f.template operator()<Traits<Element, kDim, 99>>();
  });
}

template <class Element, int... kDims>
void launch_forward(const AttentionForwardCall& call, cudaStream_t stream) {
  const AttentionPartials& partials = call.partials;
  Args a{call.p,
         partials,
         static_cast<float>(call.p.softmax_scale * kLog2E),
         false,
         false,
         Divisor(static_cast<int32_t>(heads_of_tile(call.p))),
         Divisor(static_cast<int32_t>(partials.heads / call.p.kv_heads)),
         {},
         {}};
  AttentionForwardParams& p = a.p;
  check_launch("attention_forward", p, partials.heads == p.kv_heads ? "kv_heads" : "heads", partials.heads,
               {&p.q, &p.k, &p.v, &p.o});
  a.modifies = has_modifiers(p) || !(p.softmax_scale > 0.0f);
  a.is_general = a.modifies || p.dropout_threshold != 0 || p.block_mask.block != 0;

  const int64_t max_rows = p.seq_q * heads_of_tile(p);
  dispatch_forward<Element, kDims...>(p, [&]<class T>() {
    const int64_t tiles = (max_rows + T::kRows - 1) / T::kRows;
    launch_with<T>(a, std::max(tiles, partials.max_chunks), stream);
  });
  if (partials.max_chunks == 0) return;
  const int64_t rows = std::min<int64_t>(max_rows, kSplitRows);
  launch("attention_merge_chunks", attention_merge_chunks_kernel<Element>,
         dim3((rows + 3) / 4, partials.heads, p.batch), 128, 0, stream, a);
}

}  // namespace

// Of attention_forward_float.cu, a file of its own: a compiler takes its time over it.
void launch_attention_forward_float(const AttentionForwardCall& call, cudaStream_t stream);

}  // namespace fmkernels
