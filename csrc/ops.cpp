// SPDX-License-Identifier: Apache-2.0
// Every op of the library: the table of contents. `m.def` lines only. An op belongs to the longest folder name that its
// name begins with.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fmkernels, m) {
  // attention: q, k, v [batch, seq, heads, dim] or packed [total, heads, dim]; lse [batch, heads, seq_q] or [heads,
  // total]
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, bool causal, "
      "int window_left, int window_right, float softmax_scale, float softcap, float dropout_p, "
      "Tensor? dropout_rng, Tensor[]? block_mask=None) -> (Tensor o, Tensor lse)");
  m.def(
      "attention_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "int max_seqlen_q, int max_seqlen_k, Tensor? alibi_slopes, Tensor? sinks, bool causal, int window_left, "
      "int window_right, float softmax_scale, float softcap, float dropout_p, Tensor? dropout_rng) -> "
      "(Tensor o, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad_o, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
      "Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, bool causal, int window_left, int window_right, "
      "float softmax_scale, float softcap, float dropout_p, Tensor? dropout_rng, bool bias_grad, "
      "Tensor[]? block_mask=None) -> "
      "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, Tensor grad_sinks)");
  m.def(
      "attention_varlen_backward(Tensor grad_o, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, Tensor? alibi_slopes, "
      "Tensor? sinks, bool causal, int window_left, int window_right, float softmax_scale, float softcap, "
      "float dropout_p, Tensor? dropout_rng) -> "
      "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_sinks)");

  // merge_attention: two partial results of attention into one
  m.def("merge_attention_forward(Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b) -> (Tensor o, Tensor lse)");
  m.def(
      "merge_attention_backward(Tensor grad_o, Tensor? grad_lse, Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b) "
      "-> "
      "(Tensor grad_o_a, Tensor grad_lse_a, Tensor grad_o_b, Tensor grad_lse_b)");

  // paged_kv: caches [num_pages, page_size, kv_heads, dim]; scales one number, [kv_heads] or [num_pages, page_size, kv_heads]
  m.def(
      "paged_kv_append(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, "
      "Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor(e!)? q, Tensor? rotary_cos, Tensor? rotary_sin, "
      "Tensor? positions, bool interleaved) -> ()");
  m.def(
      "paged_kv_attend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor cache_seqlens, "
      "Tensor? cu_seqlens_q, Tensor? k_scale, Tensor? v_scale, Tensor? alibi_slopes, Tensor? sinks, "
      "Tensor? tree_mask, bool causal, int window_left, int window_right, float softmax_scale, float softcap) -> "
      "(Tensor o, Tensor lse)");
  m.def(
      "paged_kv_gather(Tensor cache, Tensor block_table, Tensor cu_seqlens, int num_tokens, Tensor? scale, "
      "ScalarType dtype) -> Tensor");
  m.def("paged_kv_copy_pages(Tensor(a!) cache, Tensor src, Tensor dst) -> ()");
  m.def("paged_kv_swap_out(Tensor cache, Tensor pages, Tensor(a!) host_buffer) -> ()");
  m.def("paged_kv_swap_in(Tensor(a!) cache, Tensor pages, Tensor host_buffer) -> ()");
  m.def("paged_kv_compact(Tensor(a!) cache, Tensor keep) -> ()");
  m.def("paged_kv_page_table_from_csr(Tensor indptr, Tensor indices, int max_pages) -> Tensor");
}
