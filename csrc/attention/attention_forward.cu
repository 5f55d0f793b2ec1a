// SPDX-License-Identifier: Apache-2.0
// attention_forward.cu: o = softmax(q k^T) v for float16, bfloat16 and, with kernels in attention_forward_float.cu,
//                       float32; sm_80 and later.
//
// Contract   see attention.h; rows of q, k, v and o begin on 16-byte boundaries.
// Rows       The query rows of a kv head are the (query, head of its group) pairs, query major: a group shares every
//            key and value that is loaded, and what a row sees grows with the row.
// Work       grid (units, kv heads, batch). A unit is a tile of kRows rows, the last tile first, or, for a sequence of
//            at most kSplitRows rows, a chunk of kSplitKeys keys; chunks are merged in their order by a second kernel.
//            The rule looks at the sequence alone, so its bits depend on nothing else. A warp owns kWarpRows rows; keys
//            and values stream past in blocks of kKeys, from the last visible one to the first.
// Shared     struct Smem: q, overlaid by o; one block of keys and one of values.
// Pipeline   wait k[i] | B1 | load v[i] | s = q k[i] | wait v[i] | B2 | load k[i-1] | softmax | o += p v[i].
//            B1: all warps see k[i], and have read the values before it. B2: all see v[i], and have read k[i].
// Masks      Blocks that every row of the tile sees whole, and no modifiers: one loop without a mask. Others: a loop
//            that modifies and masks scores, where a warp skips a block that none of its rows sees.
// Numerics   float32 accumulation, base-2 exponent. o is rescaled only when a maximum grows by more than 2^8: weights
//            up to 2^8 lose nothing. A hidden value never reaches a row, NaN included. Deterministic.
// Cost       4 * visible pairs * dim flops; bound by the tensor cores beyond seq ~ 500.
// After      Dao 2023, FlashAttention-2, algorithm 1.

#include "attention_forward_kernel_cuda.h"

namespace fmkernels {

AttentionPartials attention_partials(const AttentionForwardParams& p) {
  const int64_t max_rows = p.seq_q * heads_of_tile(p);
  // Packed sequences may be shorter than the longest, in any way.
  const bool may_split = p.cu_seqlens_q != nullptr ? p.seq_k > kSplitKeys : is_split(max_rows, p.seq_k);
  const int64_t max_chunks = may_split ? (p.seq_k + kSplitKeys - 1) / kSplitKeys : 0;
  const int64_t num_slots = p.cu_seqlens_q != nullptr ? p.total_k / kSplitKeys + p.batch : p.batch * max_chunks;
  return {nullptr,
          nullptr,
          std::min<int64_t>(max_rows, kSplitRows),
          max_chunks,
          may_split ? num_slots : 0,
          p.heads / heads_of_tile(p)};
}

void launch_attention_forward(const AttentionForwardCall& call, cudaStream_t stream) {
  if (call.p.dtype == DType::kFloat32) return launch_attention_forward_float(call, stream);
  dispatch_half(call.p.dtype, [&]<class Element>() { launch_forward<Element, 64, 96, 128, 192, 256>(call, stream); });
}

}  // namespace fmkernels
