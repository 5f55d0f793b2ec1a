// SPDX-License-Identifier: Apache-2.0
// A cache of keys and values in pages, and what is done with it: append, attend, gather, copy, swap, compact.
//
//   slot of token t of request b   page = block_table[b][t / page_size], row t % page_size of that page
//   what a slot stands for         stored * scale, where scale is 1, one number, one a head or one a slot and head
//
// attend, for query i of a request with seq_q queries and seq_k = cache_seqlens[b] tokens in the cache, its own included:
//
//   position    = seq_k - seq_q + i                                                            (bottom-right)
//   score(i, j) = softcap_or_identity(softmax_scale * <q_i, k_j>) - alibi_slope * |position - j|
//   visible     : position - window_left <= j <= position + window_right; causal is window_right = 0
//                 and, with a tree mask, for j = seq_k - seq_q + t, t in [0, 32 * tree_words): bit t % 32 of word t / 32 of
//                 the row of the query is set
//   lse(i)      = log(sum over visible j of exp(score(i, j)) + exp(sink)),  -inf where nothing is visible
//   o(i)        = sum over visible j of exp(score(i, j) - lse(i)) v_j,      0 where nothing is visible
//
// A row's bits depend on its query, its position and the keys that it sees, and on nothing else: not on the other
// requests, the other queries of its own, the page size, or how the work is split. So the keys are cut at fixed positions:
// chunks of kChunkTokens tokens from token 0 on, each summed by itself, and merged in their order, whatever the number of
// queries. (Whoever runs the chunks of a request one after another merges at the same places.)
//
// What no query sees is not read: slots past cache_seqlens[b], table entries past its pages. Page ids and slots out of
// range are refused by the ops on the CPU; on CUDA they never leave the cache: such keys read as zeros, such writes and
// copies do not happen, cache_seqlens and cu_seqlens are clamped to what the tensors hold, and rows that lie before or
// after all requests, as a captured graph is padded with, give o = 0 and lse = -inf, and zeros from gather.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/stream.h"
#include "paged_kv_number.h"

namespace fmkernels {

constexpr int kChunkTokens = 512;
constexpr int kMaxHeadDim = 256;  // head_dim and v_head_dim are multiples of 8 up to it

// [tokens, heads, dim], dim contiguous; strides in elements.
struct RowsView {
  void* data;
  int64_t token_stride, head_stride;
};

// [num_pages, page_size, kv_heads, dim], dim contiguous; NHD and HND are strides, in elements.
struct PagesView {
  void* data;
  int64_t page_stride, slot_stride, head_stride;
};

// What stored numbers are multiplied with: data[page * page_stride + slot * slot_stride + head * head_stride], strides 0
// where it does not vary; null: 1.
struct ScaleView {
  float* data;
  int64_t page_stride, slot_stride, head_stride;
  bool per_token;  // [num_pages, page_size, kv_heads]: append writes it, others read it; else it is read by all
};

FM_HOST_DEVICE float* scale_at(const ScaleView& scale, int64_t page, int64_t slot, int64_t head) {
  return scale.data + page * scale.page_stride + slot * scale.slot_stride + head * scale.head_stride;
}
FM_HOST_DEVICE int64_t offset_of(const PagesView& pages, int64_t page, int64_t slot, int64_t head) {
  return page * pages.page_stride + slot * pages.slot_stride + head * pages.head_stride;
}

struct PagedCache {
  CacheDType dtype;  // of both
  int64_t num_pages, page_size, kv_heads, head_dim, v_head_dim;
  PagesView k, v;
  ScaleView k_scale, v_scale;  // null unless dtype is quantised
};

// Writes k and v of num_tokens tokens to their slots. In this order: k, and q in its place, are rotated in float32; what is
// stored is rounded once. With scales per token the scale of a row, one head of one token, is its largest magnitude over
// the largest stored number.
//
//   rotation of (x, y) at position t:  (x cos - y sin, y cos + x sin), cos = rotary_cos[t][c], c < rotary_dim / 2
//   pairs of a row: columns (c, c + rotary_dim / 2), or (2 c, 2 c + 1) where interleaved; columns from rotary_dim on stay
struct PagedAppendParams {
  DType dtype;  // of k, v and q
  int64_t num_tokens, heads;
  RowsView k, v, q;  // q.data: null for none
  PagedCache cache;
  const int64_t* slot_mapping;  // [num_tokens]; page * page_size + row of the page; negative: skipped, q is not
  const float *rotary_cos, *rotary_sin;  // [max_position, rotary_dim / 2], contiguous columns; null: no rotation
  int64_t rotary_stride, rotary_dim, max_position;
  const int64_t* positions;  // [num_tokens]; on CUDA rows of positions out of range are not rotated
  bool interleaved;
};

struct PagedAttendParams {
  DType dtype;    // of q and o; on CUDA a half, and that of the cache where it is not quantised
  RowsView q, o;  // [total_q, heads, head_dim], [total_q, heads, v_head_dim]; the heads of a row of o lie together
  float* lse;     // [heads, total_q]
  int64_t lse_head_stride;
  PagedCache cache;
  int64_t batch, heads, total_q;
  const int32_t* block_table;  // [batch, max_pages], pages contiguous
  int64_t table_stride, max_pages;
  const int32_t* cache_seqlens;  // [batch]
  const int32_t* cu_seqlens_q;   // [batch + 1]; null: one query a request, total_q == batch
  const uint32_t* tree_mask;     // [total_q, tree_words], words contiguous; null: none
  int64_t tree_stride, tree_words;
  float softmax_scale, softcap;       // softcap 0: none
  int64_t window_left, window_right;  // -1: unlimited
  const float* alibi_slopes;          // [heads] or [batch, heads]; null: none
  int64_t alibi_batch_stride;
  const float* sinks;  // [heads]; null: none
};

// out[t] = the token t - cu_seqlens[b] of the request b with cu_seqlens[b] <= t < cu_seqlens[b + 1], times its scale.
struct PagedGatherParams {
  CacheDType dtype;
  DType out_dtype;
  int64_t num_pages, page_size, kv_heads, dim;
  PagesView cache;
  ScaleView scale;
  int64_t batch, num_tokens;
  const int32_t* block_table;
  int64_t table_stride, max_pages;
  const int32_t* cu_seqlens;  // [batch + 1]
  RowsView out;               // [num_tokens, kv_heads, dim]
};

// Pages as bytes: page i is size[0] x size[1] x size[2] runs of run_bytes bytes.
struct PageBytes {
  char* data;
  int64_t num_pages;
  int64_t page_stride, stride[3];  // in bytes
};

// Page to[i] of `to` = page from[i] of `from`, for i in [0, count), run by run. A null list stands for i itself.
struct PagedCopyParams {
  PageBytes from, to;
  const int32_t *from_pages, *to_pages;  // [count]
  int64_t count, size[3], run_bytes;
  bool
      in_order;  // compact: from and to are one cache, from_pages ascends, so that no page is written before it was read
};

// table[b][i] = indices[indptr[b] + i], -1 past the pages of the request.
struct PageTableParams {
  const int32_t *indptr, *indices;  // [batch + 1], [num_indices]
  int64_t batch, num_indices, max_pages;
  int32_t* table;  // [batch, max_pages], contiguous
};

template <Isa isa>
void run_paged_kv_append(const PagedAppendParams& p);
template <Isa isa>
void run_paged_kv_attend(const PagedAttendParams& p);
template <Isa isa>
void run_paged_kv_gather(const PagedGatherParams& p);
template <Isa isa>
void run_paged_kv_copy(const PagedCopyParams& p);
template <Isa isa>
void run_paged_kv_page_table(const PageTableParams& p);

// What the CUDA kernel of attend needs besides: workspace_floats(p) floats, a number that shapes alone decide.
struct PagedAttendCall {
  PagedAttendParams p;
  float* workspace;
};
int64_t paged_kv_attend_workspace_floats(const PagedAttendParams& p);

void launch_paged_kv_append(const PagedAppendParams& p, cudaStream_t stream);
void launch_paged_kv_attend(const PagedAttendCall& call, cudaStream_t stream);
void launch_paged_kv_gather(const PagedGatherParams& p, cudaStream_t stream);
void launch_paged_kv_copy(const PagedCopyParams& p, cudaStream_t stream);
void launch_paged_kv_page_table(const PageTableParams& p, cudaStream_t stream);

}  // namespace fmkernels
