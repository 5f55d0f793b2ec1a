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

  // rope: q, k [batch, tokens, heads, head_dim] or [tokens, heads, head_dim]; cos_sin [positions, rotary_dim]
  m.def(
      "rope_forward(Tensor q, Tensor? k, Tensor positions, Tensor cos_sin, bool interleaved, bool inverse) -> "
      "(Tensor q_out, Tensor k_out)");
  m.def(
      "rope_forward_out(Tensor q, Tensor? k, Tensor positions, Tensor cos_sin, bool interleaved, bool inverse, "
      "Tensor(a!) q_out, Tensor(b!)? k_out) -> ()");

  // glu: act(gate) * up, of two tensors or of the halves of gate; activation 0 silu, 1 gelu, 2 gelu_tanh
  m.def("glu_forward(Tensor gate, Tensor? up, int activation) -> Tensor");
  m.def("glu_forward_out(Tensor gate, Tensor? up, int activation, Tensor(a!) out) -> ()");
  m.def("glu_backward(Tensor grad, Tensor gate, Tensor? up, int activation) -> (Tensor grad_gate, Tensor grad_up)");
}
