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

  // norm: RMSNorm and (centred) LayerNorm of x, or of x + residual, over the last dimension
  m.def(
      "norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool centred) -> "
      "(Tensor y, Tensor summed)");
  m.def(
      "norm_forward_out(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool centred, "
      "Tensor(a!) y, Tensor(b!)? summed) -> ()");
  m.def(
      "norm_backward(Tensor grad_y, Tensor? grad_summed, Tensor summed, Tensor? weight, Tensor? bias, float eps, "
      "bool centred, bool weight_grad) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  // quantized_linear: a weight of 8 or 4 bits, its layout in docs/layouts.md; group_size 0: one scale a row
  m.def(
      "quantized_linear_forward(Tensor x, Tensor values, Tensor scales, Tensor? zeros, Tensor? bias, int bits, "
      "int group_size, int out_features, int in_features) -> Tensor");
  m.def(
      "quantized_linear_dequantize(Tensor values, Tensor scales, Tensor? zeros, int bits, int group_size, "
      "int out_features, int in_features, ScalarType dtype) -> Tensor");

  // block_sparse: values [blocks, block_rows, block_columns], int8 with block_scales [blocks] float32; dense, a, b [batch,
  // rows, columns]; lists int32, drawn in docs/layouts.md; activation 0 none, 1 relu, 2 gelu, 3 silu
  m.def(
      "block_sparse_dsd(Tensor values, Tensor dense, Tensor offsets, Tensor indices, Tensor? positions, Tensor order, "
      "Tensor? scale, Tensor? bias, int rows, bool transposed, bool transposed_out, int activation, "
      "Tensor? block_scales=None) -> Tensor");
  m.def(
      "block_sparse_sdd(Tensor a, Tensor b, Tensor row_indices, Tensor column_indices, Tensor? scale, Tensor? bias, "
      "int block_rows, int block_columns, int activation) -> Tensor");

  // block_codec: wires [ranks, bytes] uint8, drawn in docs/layouts.md; x, residual, a sum: any shape; bits -8: float8 e4m3
  m.def(
      "block_codec_quantize(Tensor x, Tensor(a!)? residual, int bits, int block, bool hadamard, bool stochastic, "
      "int seed, int step, int offset, Tensor(b!) out) -> ()");
  m.def("block_codec_sum(Tensor wires, int bits, int block, bool hadamard, float factor, Tensor(a!) out) -> ()");
  m.def(
      "block_codec_reduce(Tensor wires, int numel, int bits, int out_bits, int block, bool hadamard, float factor, "
      "bool stochastic, int seed, int step, int offset, Tensor(a!) out) -> ()");

  // peer_all_reduce: lists of ranks rank, rank + 1, ..., of which a user has one; workspaces of all ranks, uint8, all zeros
  // at first; bits 0: the elements as they are
  m.def(
      "peer_all_reduce(Tensor[] x, Tensor(a!)[] workspaces, Tensor(b!)[] out, int rank, bool one_shot, int bits, "
      "int block, bool average, int lanes, int timeout_ms) -> ()");
  m.def(
      "peer_all_reduce_rms_norm(Tensor[] x, Tensor[] residual, Tensor weight, Tensor(a!)[] workspaces, "
      "Tensor(b!)[] out, Tensor(c!)[] residual_out, int rank, bool one_shot, int bits, int block, int lanes, "
      "float eps, int timeout_ms) -> ()");

  // semi_structured: x, mask [rows, columns]; values [rows, columns / 2], metadata [rows / 16, ceil(columns / 64), 32] int32
  m.def("semi_structured_mask(Tensor x, bool both_directions) -> Tensor");
  m.def("semi_structured_pack(Tensor x, Tensor mask, bool transposed) -> (Tensor values, Tensor metadata)");
  m.def("semi_structured_linear(Tensor x, Tensor values, Tensor metadata, Tensor? bias) -> Tensor");

  // lora: x [tokens, in], a [adapters, rank, in], h [tokens, rank], b [adapters, out, rank], idx [tokens], scale [adapters]
  m.def("lora_shrink(Tensor x, Tensor a, Tensor idx) -> Tensor");
  m.def("lora_expand(Tensor base, Tensor b, Tensor h, Tensor idx, Tensor? scale) -> Tensor");

  // rope: q, k [batch, tokens, heads, head_dim] or [tokens, heads, head_dim]; cos_sin [positions, rotary_dim]
  m.def(
      "rope_forward(Tensor q, Tensor? k, Tensor positions, Tensor cos_sin, bool interleaved, bool inverse) -> "
      "(Tensor q_out, Tensor k_out)");
  m.def(
      "rope_forward_out(Tensor q, Tensor? k, Tensor positions, Tensor cos_sin, bool interleaved, bool inverse, "
      "Tensor(a!) q_out, Tensor(b!)? k_out) -> ()");
  // cross_entropy: logits [tokens, vocab] or [batch, tokens, vocab]; the others without vocab
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor target, int ignore_index, float label_smoothing, float z_loss, "
      "float softcap) -> (Tensor loss, Tensor max, Tensor sum_exp)");
  m.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor max, Tensor sum_exp, "
      "int ignore_index, float label_smoothing, float z_loss, float softcap) -> Tensor grad_logits");
  m.def(
      "cross_entropy_gradient_(Tensor(a!) logits, Tensor grad_loss, Tensor target, int ignore_index, "
      "float label_smoothing, float z_loss, float softcap) -> Tensor loss");

  // sampling: logits [batch, vocab], options [batch]
  m.def(
      "sampling_tokens(Tensor logits, Tensor seed, Tensor offset, Tensor? temperature, Tensor? top_k, Tensor? top_p, "
      "Tensor? min_p, Tensor? repetition_penalty, Tensor? frequency_penalty, Tensor? presence_penalty, "
      "Tensor? output_counts, Tensor? prompt_mask, bool return_logprobs) -> (Tensor tokens, Tensor logprobs)");

  // speculative: draft_tokens, parents [batch, nodes], target_probs [batch, nodes + 1, vocab], draft_probs [batch, nodes,
  // vocab]
  m.def(
      "speculative_verify(Tensor draft_tokens, Tensor target_probs, Tensor seed, Tensor offset, Tensor? draft_probs, "
      "Tensor? parents) -> (Tensor tokens, Tensor num_accepted, Tensor nodes)");

  // glu: act(gate) * up, of two tensors or of the halves of gate; activation 0 silu, 1 gelu, 2 gelu_tanh
  m.def("glu_forward(Tensor gate, Tensor? up, int activation) -> Tensor");
  m.def("glu_forward_out(Tensor gate, Tensor? up, int activation, Tensor(a!) out) -> ()");
  m.def("glu_backward(Tensor grad, Tensor gate, Tensor? up, int activation) -> (Tensor grad_gate, Tensor grad_up)");
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

  // moe: topk_idx, topk_weights [tokens, topk]; a mapping as drawn in docs/layouts.md; num_rows -1: enough for any ids
  m.def(
      "moe_build_mapping(Tensor topk_idx, int num_experts, int alignment, int num_rows) -> "
      "(Tensor pos_to_token, Tensor token_topk_to_pos, Tensor expert_offsets)");
  m.def("moe_permute(Tensor x, Tensor pos_to_token) -> Tensor");
  m.def("moe_combine(Tensor y, Tensor token_topk_to_pos, Tensor? topk_weights) -> Tensor");
  m.def(
      "moe_combine_backward(Tensor grad, Tensor y, Tensor pos_to_token, Tensor token_topk_to_pos, Tensor topk_weights) "
      "-> (Tensor grad_y, Tensor grad_weights)");
  // logits [tokens, experts]; scoring 0 softmax, 1 sigmoid, 2 sqrt_softplus; group_best: scores that a group's own sums
  m.def(
      "moe_route(Tensor logits, Tensor? bias, int num_topk, int scoring, bool renormalize, int num_groups, "
      "int topk_groups, int group_best) -> (Tensor topk_weights, Tensor topk_idx)");
  m.def(
      "moe_route_backward(Tensor grad_weights, Tensor logits, Tensor topk_weights, Tensor topk_idx, int scoring, "
      "bool renormalize) -> Tensor grad_logits");
  m.def("moe_load_balance(Tensor logits, Tensor topk_idx, int scoring) -> (Tensor loss, Tensor coefficients)");
  m.def(
      "moe_load_balance_backward(Tensor grad, Tensor logits, Tensor topk_idx, Tensor coefficients, int scoring) -> "
      "Tensor grad_logits");
  m.def("moe_z_loss(Tensor logits) -> (Tensor loss, Tensor lse)");
  m.def("moe_z_loss_backward(Tensor grad, Tensor logits, Tensor lse) -> Tensor grad_logits");
  m.def("moe_route_expert_choice(Tensor logits, int capacity, int scoring) -> (Tensor topk_weights, Tensor topk_idx)");
  m.def("moe_capacity(Tensor topk_idx, Tensor? topk_weights, int num_experts, int capacity) -> Tensor");
  // a [rows, inner], b [experts, inner, columns]; a [rows, a columns], b [rows, columns]; offsets [experts]: ends of their rows
  m.def("moe_grouped_mm(Tensor a, Tensor b, Tensor offsets, Tensor? bias) -> Tensor");
  m.def("moe_grouped_mm_inner(Tensor a, Tensor b, Tensor offsets) -> Tensor");
  m.def("moe_grouped_sum(Tensor x, Tensor offsets) -> Tensor");
  // a [tokens, inner] where pos_to_token [rows] is given, else [rows, inner]; b [experts, inner, 2 width]; gate_up [0] unless
  // kept; inner and grad_weights [0] without topk_weights
  m.def(
      "moe_gated_mm(Tensor a, Tensor b, Tensor offsets, Tensor? pos_to_token, bool interleaved, bool keeps) -> "
      "(Tensor out, Tensor gate_up)");
  m.def(
      "moe_gated_backward(Tensor grad_inner, Tensor gate_up, Tensor? pos_to_token, Tensor? token_topk_to_pos, "
      "Tensor? topk_weights, bool interleaved) -> (Tensor grad_gate_up, Tensor inner, Tensor grad_weights)");
  m.def(
      "moe_mlp(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor topk_weights, Tensor topk_idx, bool keeps) -> "
      "(Tensor out, Tensor gate_up, Tensor pos_to_token, Tensor token_topk_to_pos, Tensor expert_offsets)");
  // moe_quantized: a packed weight of the matrices of all experts, one below another; group_size 0: one scale a row
  m.def(
      "moe_quantized_mm(Tensor a, Tensor values, Tensor scales, Tensor? zeros, Tensor offsets, Tensor? bias, int bits, "
      "int group_size, int out_features, int in_features) -> Tensor");
}
