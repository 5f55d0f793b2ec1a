// SPDX-License-Identifier: Apache-2.0
// Fused attention: o = softmax(scores) v without the score matrix in memory.
//
//   score(i, j) = softcap_or_identity(softmax_scale * <q_i, k_j>) + bias(i, j) - alibi_slope * |i + seq_k - seq_q - j|
//   visible     : i + shift - window_left <= j <= i + shift + window_right,  shift = seq_k - seq_q  (bottom-right)
//                 and shown by the block mask, where there is one
//   lse(i)      = log(sum over visible j of exp(score(i, j)) + exp(sink)),  -inf where nothing is visible
//   o(i)        = sum over visible j of exp(score(i, j) - lse(i)) v_j,      0 where nothing is visible
//
// Dropout multiplies the weight of each v_j by dropout_scale() or by 0; lse is what it is without. Which weights are
// dropped follows from (seed, offset) and the place alone: batch b, head h, query i, key j, in a packed sequence those of
// the sequence b. Each has 16 bits, and is dropped where they are less than dropout_threshold:
//
//   (x0, x1, x2, x3) = Philox4x32-10(counter (j / 32 * 4 + j % 8 / 2, i, b * heads + h, offset), key seed)
//   bits(j)          = low half of x[j % 32 / 8] where j is even, high half where it is odd
//
// so that one call serves what a thread of a GPU holds of a row in four accumulators m16n8 side by side.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/stream.h"

namespace fmkernels {

// A tensor [batch, tokens, heads, dim], dim contiguous; packed sequences are [total_tokens, heads, dim] with a batch
// stride of 0. Strides are in elements.
struct TokenView {
  void* data;
  int64_t batch_stride, token_stride, head_stride;
};

// Listed blocks by lines: by query blocks, whose indices are key blocks, or by key blocks, whose indices are query
// blocks.
struct BlockList {
  const int32_t* offsets;   // [batch or 1][heads or 1][num_lines + 1], into the two below
  const int32_t* indices;   // ascending within a line
  const int32_t* tile_idx;  // -1: the whole block is visible
  int64_t num_lines, num_listed;
};

// Which pairs of a query and a key are visible: docs/layouts.md. Both lists hold the same blocks.
struct BlockMaskView {
  int64_t block;         // queries and keys of a block, 64 or 128; 0: there is no block mask
  int64_t batch, heads;  // 1: shared
  BlockList rows, columns;
  const uint32_t* tiles;  // [num_tiles][query of the block][key of the block / 32], bit key % 32
  int64_t num_tiles;
};
constexpr int kWhole = -1;   // tile_idx of a block that is visible as a whole
constexpr int kHidden = -2;  // stands for that of a block that is not listed

// The offsets of the lines of one head.
FM_HOST_DEVICE const int32_t* lines_of(const BlockMaskView& m, const BlockList& list, int64_t batch, int64_t head) {
  const int64_t b = m.batch == 1 ? 0 : batch, h = m.heads == 1 ? 0 : head;
  return list.offsets + (b * m.heads + h) * (list.num_lines + 1);
}
// The first place of [begin, end), of a line, whose index is `index` or more; `end` where there is none.
FM_HOST_DEVICE int32_t find_from(const BlockList& list, int32_t begin, int32_t end, int64_t index) {
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (list.indices[middle] < index) begin = middle + 1;
    else end = middle;
  }
  return begin;
}
// Which of the 32 keys from `key` on, a multiple of 32, a query sees where its block sees `tile` of theirs.
template <class Position>
FM_HOST_DEVICE uint32_t word_of(const BlockMaskView& m, int tile, Position query, Position key) {
  if (tile < 0) return tile == kWhole ? ~0u : 0;
  const auto block = static_cast<Position>(m.block);
  return m.tiles[(static_cast<int64_t>(tile) * block + query % block) * (block / 32) + key % block / 32];
}

struct AttentionForwardParams {
  DType dtype;
  TokenView q, k, v, o;  // head_dim, head_dim, v_head_dim, v_head_dim wide
  float* lse;            // [batch, heads, seq_q] or [heads, total_q], last dimension contiguous
  int64_t lse_batch_stride, lse_head_stride;

  int64_t batch, heads, kv_heads, seq_q, seq_k;  // seq_q, seq_k: the longest, where cu_seqlens are given
  int64_t head_dim, v_head_dim;                  // multiples of 8, at most 256
  const int32_t* cu_seqlens_q;                   // [batch + 1] or null
  const int32_t* cu_seqlens_k;                   // [batch + 1] or null, together with cu_seqlens_q
  int64_t total_q, total_k;                      // tokens of the packed tensors, where cu_seqlens are given

  float softmax_scale, softcap;       // softcap 0: none
  int64_t window_left, window_right;  // -1: unlimited; causal is window_right = 0
  DType bias_dtype;                   // float32 or dtype
  const void* bias;                   // null: none
  int64_t bias_stride[4];             // [batch, heads, seq_q, seq_k]; 0 in a broadcast dimension
  const float* alibi_slopes;          // [heads] or [batch, heads]; null: none
  int64_t alibi_batch_stride;
  const float* sinks;          // [heads]; null: none
  uint32_t dropout_threshold;  // of 2^16, less than it; 0: no dropout
  const int64_t* dropout_rng;  // [2]: seed, offset modulo 2^32; null without dropout
  BlockMaskView block_mask;
};

// Whether anything but their scale modifies scores.
FM_HOST_DEVICE bool has_modifiers(const AttentionForwardParams& p) {
  return p.softcap != 0.0f || p.bias != nullptr || p.alibi_slopes != nullptr;
}

// What a weight that is kept is multiplied by: the expectation of a weight is the weight, exactly.
FM_HOST_DEVICE float dropout_scale(const AttentionForwardParams& p) {
  return 65536.0f / static_cast<float>(65536 - p.dropout_threshold);
}

template <Isa isa>
void run_attention_forward(const AttentionForwardParams& p);

// Gradients. `forward` holds what the forward was given, and its o; its lse is not read, because another may be given.
struct AttentionBackwardParams {
  AttentionForwardParams forward;
  const float *lse, *d_lse;                // d_lse: null for none
  int64_t lse_stride[3], d_lse_stride[3];  // [batch, heads, seq_q]; batch 0 where packed
  TokenView d_o, d_q, d_k, d_v;
  float* d_sinks;            // [heads]; null: not wanted
  float* d_bias;             // zeros before; null: not wanted
  int64_t d_bias_stride[4];  // 0 in a dimension that the bias is broadcast over
  bool d_bias_is_shared;     // between kv heads or sequences
};

template <Isa isa>
void run_attention_backward(const AttentionBackwardParams& p);

// On CUDA, what the gradients read of every query: minus its lse in log2 units, and minus delta, the product of its o and
// d_o less the gradient of its lse. A sequence has a slot for each query of each head, from a multiple of kStatsRows on;
// what is between its end and the next multiple is written too, as queries without weight. Of sixteen slots minus lse
// comes first, then minus delta: of two neighbours at a time and twice, as the accumulators of a product begin.
constexpr int kStatsRows = 64, kStatsGroup = 16, kStatsFloats = 4;  // floats of a slot
struct AttentionRowStats {
  float* data;
  int64_t num_slots, batch_slots;  // of a head; of a sequence, 0 where they are packed

  static constexpr int kToSecond = 2;               // from minus lse, or minus delta, to the same again
  static constexpr int kToDelta = 2 * kStatsGroup;  // from minus lse to minus delta
  FM_HOST_DEVICE int64_t first_slot(int64_t head, int64_t batch, int64_t q_start) const {
    return head * num_slots + (batch_slots == 0 ? (q_start / kStatsRows + batch) * kStatsRows : batch * batch_slots);
  }
  FM_HOST_DEVICE float* minus_lse(int64_t slot) const {
    return data + slot / kStatsGroup * kStatsGroup * kStatsFloats + slot % kStatsGroup / 2 * 4 + slot % 2;
  }
};
// The sizes for these parameters; the pointer, to heads * num_slots * kStatsFloats numbers, is the caller's.
AttentionRowStats attention_row_stats(const AttentionForwardParams& p);

struct AttentionBackwardCall {
  AttentionBackwardParams b;
  AttentionRowStats stats;
};
void launch_attention_backward(const AttentionBackwardCall& call, cudaStream_t stream);

// On CUDA the keys of a sequence with few rows are split into chunks of fixed length, whose results are merged in
// order. A rule on the sequence alone: its bits depend neither on the batch nor on the GPU.
constexpr int kSplitRows = 32, kSplitKeys = 576;
// Query heads whose rows share a tile there: those of a kv head or, where each sees other blocks, one.
FM_HOST_DEVICE int64_t heads_of_tile(const AttentionForwardParams& p) {
  return p.block_mask.heads > 1 ? 1 : p.heads / p.kv_heads;
}
FM_HOST_DEVICE constexpr bool is_split(int64_t num_rows, int64_t seq_k) {
  return num_rows <= kSplitRows && seq_k > kSplitKeys;
}

// Results of the chunks: o [slot][row][heads][v_head_dim] and lse [slot][row][heads]. A chunk has a slot; the chunks
// of a sequence lie together. Where only the device knows how long the sequences are, a sequence begins at the slot that
// its place among the packed keys leaves free: ceil(n / c) <= floor((k + n) / c) - floor(k / c) + 1.
struct AttentionPartials {
  float *o, *lse;
  int64_t rows, max_chunks, num_slots;  // of a slot, of a sequence, in all; no chunks: no sequence is split
  int64_t heads;                        // of the grid: kv heads, or query heads

  FM_HOST_DEVICE int64_t first_slot(int64_t batch, bool is_packed, int64_t k_start) const {
    return is_packed ? k_start / kSplitKeys + batch : batch * max_chunks;
  }
  FM_HOST_DEVICE int64_t index(int64_t slot, int64_t row, int64_t head) const {
    return (slot * rows + row) * heads + head;
  }
};
// The sizes for these parameters; the pointers are the caller's.
AttentionPartials attention_partials(const AttentionForwardParams& p);

struct AttentionForwardCall {
  AttentionForwardParams p;
  AttentionPartials partials;
};
void launch_attention_forward(const AttentionForwardCall& call, cudaStream_t stream);

}  // namespace fmkernels
