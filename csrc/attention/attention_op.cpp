// SPDX-License-Identifier: Apache-2.0
// attention_forward, attention_varlen_forward and their backward: tensors in, checks, Params out.
#include <cmath>
#include <string>
#include <vector>

#include "../common/tensor.h"
#include "attention.h"
#include "attention_scores_op.h"

namespace fmkernels {
namespace {

TokenView view_tokens(const Tensor& t) {
  const bool packed = t.dim() == 3;
  const int64_t first = packed ? 0 : 1;
  return {data_of(t), packed ? 0 : stride_of(t, 0), stride_of(t, first), stride_of(t, first + 1)};
}

// A tensor whose rows the kernels of this backend can read: itself or, where the 16-byte copies of CUDA cannot reach
// its rows, a contiguous copy.
Tensor readable(const Tensor& t) {
#ifdef FM_CUDA
  const int64_t last = t.dim() - 1;
  if (last < 2 || (t.stride(last) != 1 && t.numel() > 0)) return t;  // refused later
  constexpr int64_t kRowBytes = 16, kMaxStride = 1 << 23;            // elements of a token stride
  bool aligned = reinterpret_cast<uintptr_t>(data_of(t)) % kRowBytes == 0;
  for (int64_t dim = 0; dim < last; ++dim) {
    aligned = aligned && stride_of(t, dim) * t.element_size() % kRowBytes == 0;
  }
  if (aligned && stride_of(t, last - 2) < kMaxStride) return t;
  Tensor copy = empty_contiguous(t);
  torch::stable::copy_(copy, t);
  return copy;
#else
  return t;
#endif
}

void execute(const AttentionForwardParams& p, [[maybe_unused]] const Tensor& q) {
#ifdef FM_CUDA
  AttentionPartials partials = attention_partials(p);
  const int64_t rows = partials.num_slots * partials.rows * partials.heads;
  Tensor o = torch::stable::new_empty(q, {rows, p.v_head_dim}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(q, {rows}, ScalarType::Float);
  partials.o = static_cast<float*>(data_of(o));
  partials.lse = static_cast<float*>(data_of(lse));
  FM_EXECUTE(attention_forward, (AttentionForwardCall{p, partials}), q);
#else
  FM_EXECUTE(attention_forward, p, q);
#endif
}

// What fixed-length and packed attention check and fill in alike. `first` is the dimension of tokens.
AttentionForwardParams common_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
                                     int64_t batch, bool causal, int64_t window_left, int64_t window_right,
                                     double softmax_scale, double softcap, double dropout_p,
                                     const std::optional<Tensor>& dropout_rng) {
  const int64_t rank = q.dim(), first = rank - 3;
  AttentionForwardParams p{};
  p.dtype = dtype_of("q", q);
  check_rank("k", k, rank);
  check_rank("v", v, rank);
  for (const auto& [name, t] : {std::pair{"q", &q}, {"k", &k}, {"v", &v}}) {
    check_last_dim_contiguous(name, *t);
    check_same_device(name, *t, q);
    FM_CHECK(t->scalar_type() == q.scalar_type(), name, " must have the dtype of q");
  }
  p.batch = batch;
  p.seq_q = q.size(first);
  p.seq_k = k.size(first);
  p.heads = q.size(first + 1);
  p.kv_heads = k.size(first + 1);
  p.head_dim = q.size(first + 2);
  p.v_head_dim = v.size(first + 2);
  FM_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "k has ", p.kv_heads, " heads, which must divide the ", p.heads,
           " heads of q");
  for (const auto& [name, dim] : {std::pair{"head_dim", p.head_dim}, {"v_head_dim", p.v_head_dim}}) {
    FM_CHECK(dim >= 8 && dim <= 256 && dim % 8 == 0, name, " must be a multiple of 8 from 8 to 256, got ", dim);
  }
  check_size("k", k, first + 2, p.head_dim);
  check_size("v", v, first, p.seq_k);
  check_size("v", v, first + 1, p.kv_heads);
  p.q = view_tokens(q);
  p.k = view_tokens(k);
  p.v = view_tokens(v);

  set_scores(p, q, alibi_slopes, sinks, causal, window_left, window_right, softmax_scale, softcap);
  FM_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p must be at least 0 and less than 1, got ", dropout_p);
  p.dropout_threshold = static_cast<uint32_t>(std::fmin(std::floor(dropout_p * 65536.0 + 0.5), 65535.0));
  FM_CHECK(dropout_p == 0.0 || dropout_rng.has_value(), "dropout_rng must be given where dropout_p is not 0");
  if (dropout_rng.has_value()) {
    p.dropout_rng = view_vector<int64_t>("dropout_rng", *dropout_rng, q, ScalarType::Long, "int64", 2);
  }
  return p;
}

// The additive bias; sizes are those of the batch.
void set_bias(AttentionForwardParams& p, const Tensor& bias, const Tensor& q) {
  check_same_device("bias", bias, q);
  check_rank("bias", bias, 4);
  p.bias_dtype = dtype_of("bias", bias);
  FM_CHECK(p.bias_dtype == DType::kFloat32 || p.bias_dtype == p.dtype, "bias must be float32 or have the dtype of q");
  p.bias = data_of(bias);
  const int64_t full[4] = {p.batch, p.heads, p.seq_q, p.seq_k};
  for (int dim = 0; dim < 4; ++dim) {
    FM_CHECK(bias.size(dim) == 1 || bias.size(dim) == full[dim], "bias must have size 1 or ", full[dim],
             " in dimension ", dim, ", got ", bias.size(dim));
    p.bias_stride[dim] = stride_of(bias, dim);
  }
}

// A list of blocks. On the CPU its values are checked, so that every read stays within the tensors: offsets that partition
// the indices, indices that ascend below `limit`, tiles that exist. On CUDA the kernels keep within them.
BlockList checked_block_list([[maybe_unused]] const char* line_name, const Tensor& offsets, const Tensor& indices,
                             const Tensor& tile_idx, [[maybe_unused]] int64_t limit,
                             [[maybe_unused]] int64_t num_tiles) {
  const BlockList list{static_cast<const int32_t*>(data_of(offsets)), static_cast<const int32_t*>(data_of(indices)),
                       static_cast<const int32_t*>(data_of(tile_idx)), offsets.size(2) - 1, indices.size(0)};
  const int64_t num_listed = list.num_listed;
  check_size("block_mask: tile_idx", tile_idx, 0, num_listed);
#ifndef FM_CUDA
  const int64_t num_heads = offsets.size(0) * offsets.size(1);
  int64_t end = 0;  // of what the lines before hold
  for (int64_t i = 0; i < num_heads * (list.num_lines + 1); ++i) {
    const int32_t offset = list.offsets[i];
    const bool begins_head = i % (list.num_lines + 1) == 0;
    FM_CHECK(begins_head ? offset == end : end <= offset && offset <= num_listed, "block_mask: ", line_name,
             "_offsets must rise from 0 to the ", num_listed, " listed blocks, and go on in the next head, got ",
             offset, " after ", end);
    for (int64_t at = end; at < offset; ++at) {
      const int64_t least = at == end ? 0 : int64_t{list.indices[at - 1]} + 1;
      FM_CHECK(list.indices[at] >= least && list.indices[at] < limit, "block_mask: indices of a ", line_name,
               " must ascend from 0 to ", limit - 1, ", got ", list.indices[at], " where ", least,
               " is the least allowed");
      FM_CHECK(list.tile_idx[at] >= -1 && list.tile_idx[at] < num_tiles, "block_mask: tile_idx must be from -1 to ",
               num_tiles - 1, ", got ", list.tile_idx[at]);
    }
    end = offset;
  }
  FM_CHECK(end == num_listed, "block_mask: ", line_name, "_offsets must end with the ", num_listed,
           " listed blocks, got ", end);
#endif
  return list;
}

// The tensors of fmkernels.BlockMask in its order; sizes are those of the batch.
void set_block_mask(AttentionForwardParams& p, const std::vector<Tensor>& mask, const Tensor& q) {
  FM_CHECK(mask.size() == 7, "block_mask must be 7 tensors, got ", mask.size());
  constexpr const char* kNames[] = {"row_offsets", "column_indices",      "tile_idx", "column_offsets",
                                    "row_indices", "transposed_tile_idx", "tiles"};
  constexpr int64_t kRanks[] = {3, 1, 1, 3, 1, 1, 3};
  for (size_t i = 0; i < mask.size(); ++i) {
    const std::string name = std::string("block_mask: ") + kNames[i];
    check_same_device(name.c_str(), mask[i], q);
    check_scalar_type(name.c_str(), mask[i], ScalarType::Int, "int32");
    check_rank(name.c_str(), mask[i], kRanks[i]);
    FM_CHECK(mask[i].is_contiguous(), name, " must be contiguous");
  }
  const Tensor &rows = mask[0], &columns = mask[3], &tiles = mask[6];
  BlockMaskView& m = p.block_mask;
  m.block = tiles.size(1);
  FM_CHECK(m.block == 64 || m.block == 128, "block_mask: tiles must have 64 or 128 queries, got ", m.block);
  check_size("block_mask: tiles", tiles, 2, m.block / 32);
  m.batch = rows.size(0);
  m.heads = rows.size(1);
  FM_CHECK(m.batch == 1 || m.batch == p.batch, "block_mask: row_offsets must have batch 1 or ", p.batch, ", got ",
           m.batch);
  FM_CHECK(m.heads == 1 || m.heads == p.heads, "block_mask: row_offsets must have heads 1 or ", p.heads, ", got ",
           m.heads);
  const int64_t row_blocks = (p.seq_q + m.block - 1) / m.block, column_blocks = (p.seq_k + m.block - 1) / m.block;
  check_size("block_mask: row_offsets", rows, 2, row_blocks + 1);
  check_size("block_mask: column_offsets", columns, 0, m.batch);
  check_size("block_mask: column_offsets", columns, 1, m.heads);
  check_size("block_mask: column_offsets", columns, 2, column_blocks + 1);
  m.rows = checked_block_list("row", rows, mask[1], mask[2], column_blocks, tiles.size(0));
  m.columns = checked_block_list("column", columns, mask[4], mask[5], row_blocks, tiles.size(0));
  m.tiles = static_cast<const uint32_t*>(data_of(tiles));
  m.num_tiles = tiles.size(0);
}

// Parameters of attention over a rectangular batch.
AttentionForwardParams dense_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const std::optional<Tensor>& bias, const std::optional<Tensor>& alibi_slopes,
                                    const std::optional<Tensor>& sinks, bool causal, int64_t window_left,
                                    int64_t window_right, double softmax_scale, double softcap, double dropout_p,
                                    const std::optional<Tensor>& dropout_rng,
                                    const std::optional<std::vector<Tensor>>& block_mask) {
  check_rank("q", q, 4);
  const int64_t batch = q.size(0);
  AttentionForwardParams p = common_params(q, k, v, alibi_slopes, sinks, batch, causal, window_left, window_right,
                                           softmax_scale, softcap, dropout_p, dropout_rng);
  check_size("k", k, 0, batch);
  check_size("v", v, 0, batch);
  if (bias.has_value()) set_bias(p, *bias, q);
  if (block_mask.has_value()) set_block_mask(p, *block_mask, q);
  return p;
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& given_q, const Tensor& given_k, const Tensor& given_v,
                                             const std::optional<Tensor>& bias,
                                             const std::optional<Tensor>& alibi_slopes,
                                             const std::optional<Tensor>& sinks, bool causal, int64_t window_left,
                                             int64_t window_right, double softmax_scale, double softcap,
                                             double dropout_p, const std::optional<Tensor>& dropout_rng,
                                             const std::optional<std::vector<Tensor>>& block_mask) {
  const Tensor q = readable(given_q), k = readable(given_k), v = readable(given_v);
  AttentionForwardParams p = dense_params(q, k, v, bias, alibi_slopes, sinks, causal, window_left, window_right,
                                          softmax_scale, softcap, dropout_p, dropout_rng, block_mask);
  Tensor o = torch::stable::new_empty(q, {p.batch, p.seq_q, p.heads, p.v_head_dim});
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads, p.seq_q}, ScalarType::Float);
  p.o = view_tokens(o);
  p.lse = static_cast<float*>(data_of(lse));
  p.lse_batch_stride = lse.stride(0);
  p.lse_head_stride = lse.stride(1);
  if (lse.numel() > 0) execute(p, q);
  return {o, lse};
}

// Prefix sums; on the CPU their values are checked before they are used as addresses.
const int32_t* checked_cu_seqlens(const char* name, const Tensor& t, int64_t total, int64_t max_seqlen) {
  check_scalar_type(name, t, ScalarType::Int, "int32");
  check_rank(name, t, 1);
  check_last_dim_contiguous(name, t);
  FM_CHECK(t.size(0) >= 1, name, " must have batch + 1 elements, got none");
  const auto* prefix = static_cast<const int32_t*>(data_of(t));
#ifdef FM_CUDA
  return prefix;  // on the device, where the kernel keeps within the tensors whatever it holds
#endif
  FM_CHECK(prefix[0] == 0, name, " must begin with 0, got ", prefix[0]);
  for (int64_t b = 0; b + 1 < t.size(0); ++b) {
    const int64_t seqlen = int64_t{prefix[b + 1]} - prefix[b];
    FM_CHECK(seqlen >= 0, name, " must not decrease, got ", prefix[b], " before ", prefix[b + 1]);
    FM_CHECK(seqlen <= max_seqlen, name, " has a sequence of ", seqlen, " tokens, longer than its max_seqlen of ",
             max_seqlen);
  }
  FM_CHECK(prefix[t.size(0) - 1] == total, name, " must end with the ", total, " tokens of the packed tensor, got ",
           prefix[t.size(0) - 1]);
  return prefix;
}

// Parameters of packed attention, where there are queries: its sequences must hold them.
AttentionForwardParams varlen_params(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                     const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                     const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
                                     bool causal, int64_t window_left, int64_t window_right, double softmax_scale,
                                     double softcap, double dropout_p, const std::optional<Tensor>& dropout_rng) {
  check_rank("q", q, 3);
  check_rank("cu_seqlens_q", cu_seqlens_q, 1);
  const int64_t batch = cu_seqlens_q.size(0) - 1;
  AttentionForwardParams p = common_params(q, k, v, alibi_slopes, sinks, batch, causal, window_left, window_right,
                                           softmax_scale, softcap, dropout_p, dropout_rng);
  check_same_device("cu_seqlens_q", cu_seqlens_q, q);
  check_same_device("cu_seqlens_k", cu_seqlens_k, q);
  const int64_t total_q = p.total_q = p.seq_q;
  p.total_k = p.seq_k;
  p.cu_seqlens_q = checked_cu_seqlens("cu_seqlens_q", cu_seqlens_q, total_q, max_seqlen_q);
  p.cu_seqlens_k = checked_cu_seqlens("cu_seqlens_k", cu_seqlens_k, p.seq_k, max_seqlen_k);
  check_size("cu_seqlens_k", cu_seqlens_k, 0, batch + 1);
  p.seq_q = max_seqlen_q < total_q ? max_seqlen_q : total_q;
  p.seq_k = max_seqlen_k < p.seq_k ? max_seqlen_k : p.seq_k;
  FM_CHECK(total_q == 0 || (batch > 0 && p.seq_q > 0), "cu_seqlens_q has ", batch, " sequences of at most ",
           max_seqlen_q, " tokens, which are not the ", total_q, " tokens of q");
  return p;
}

std::tuple<Tensor, Tensor> attention_varlen_forward(
    const Tensor& given_q, const Tensor& given_k, const Tensor& given_v, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sinks, bool causal, int64_t window_left, int64_t window_right, double softmax_scale,
    double softcap, double dropout_p, const std::optional<Tensor>& dropout_rng) {
  const Tensor q = readable(given_q), k = readable(given_k), v = readable(given_v);
  AttentionForwardParams p =
      varlen_params(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes, sinks, causal,
                    window_left, window_right, softmax_scale, softcap, dropout_p, dropout_rng);
  Tensor o = torch::stable::new_empty(q, {p.total_q, p.heads, p.v_head_dim});
  Tensor lse = torch::stable::new_empty(q, {p.heads, p.total_q}, ScalarType::Float);
  p.o = view_tokens(o);
  p.lse = static_cast<float*>(data_of(lse));
  p.lse_head_stride = lse.stride(0);
  if (lse.numel() > 0) execute(p, q);
  return {o, lse};
}

// ---- gradients -------------------------------------------------------------------------------------------------------

// A tensor [batch, heads, seq_q] or [heads, total_q] of float32, as strides [batch, heads, seq_q].
const float* view_rows(const char* name, const Tensor& t, const Tensor& q, int64_t (&strides)[3]) {
  check_same_device(name, t, q);
  check_scalar_type(name, t, ScalarType::Float, "float32");
  check_rank(name, t, q.dim() - 1);
  const int64_t first = q.dim() - 3;
  if (first == 1) check_size(name, t, 0, q.size(0));
  check_size(name, t, first, q.size(first + 1));
  check_size(name, t, first + 1, q.size(first));
  strides[0] = first == 1 ? stride_of(t, 0) : 0;
  strides[1] = stride_of(t, first);
  strides[2] = stride_of(t, first + 1);
  return static_cast<const float*>(data_of(t));
}

Tensor zeros(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_zeros(like, sizes, ScalarType::Float);
}

void execute(const AttentionBackwardParams& b, [[maybe_unused]] const Tensor& q) {
#ifdef FM_CUDA
  AttentionRowStats stats = attention_row_stats(b.forward);
  const int64_t num_floats = b.forward.heads * stats.num_slots * kStatsFloats;
  Tensor data = torch::stable::new_empty(q, {num_floats}, ScalarType::Float);
  stats.data = static_cast<float*>(data_of(data));
  FM_EXECUTE(attention_backward, (AttentionBackwardCall{b, stats}), q);
#else
  FM_EXECUTE(attention_backward, b, q);
#endif
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// grad_bias and grad_sinks have no elements where they are not wanted.
Gradients run_backward(const AttentionForwardParams& forward, const Tensor& given_grad_o,
                       const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
                       const Tensor& given_o, const Tensor& lse, const std::optional<Tensor>& bias, bool bias_grad) {
  AttentionBackwardParams b{};
  b.forward = forward;
  const int64_t rank = q.dim();
  const Tensor grad_o = readable(given_grad_o), o = readable(given_o);
  for (const auto& [name, t] : {std::pair{"grad_o", &grad_o}, {"o", &o}}) {
    check_rank(name, *t, rank);
    check_last_dim_contiguous(name, *t);
    check_same_device(name, *t, q);
    FM_CHECK(t->scalar_type() == q.scalar_type(), name, " must have the dtype of q");
    for (int64_t dim = 0; dim < rank - 1; ++dim) check_size(name, *t, dim, q.size(dim));
    check_size(name, *t, rank - 1, forward.v_head_dim);
  }
  b.forward.o = view_tokens(o);
  b.d_o = view_tokens(grad_o);
  b.lse = view_rows("lse", lse, q, b.lse_stride);
  if (grad_lse.has_value()) b.d_lse = view_rows("grad_lse", *grad_lse, q, b.d_lse_stride);
  Tensor grad_q = empty_contiguous(q), grad_k = empty_contiguous(k), grad_v = empty_contiguous(v);
  b.d_q = view_tokens(grad_q);
  b.d_k = view_tokens(grad_k);
  b.d_v = view_tokens(grad_v);
  const bool has_sinks = forward.sinks != nullptr;
  Tensor grad_sinks = zeros(q, {has_sinks ? forward.heads : 0});
  if (has_sinks) b.d_sinks = static_cast<float*>(data_of(grad_sinks));
  Tensor grad_bias = zeros(q, {0});
  if (bias.has_value() && bias_grad) {
    grad_bias = zeros(q, {bias->sizes().begin(), bias->sizes().end()});
    b.d_bias = static_cast<float*>(data_of(grad_bias));
    for (int dim = 0; dim < 4; ++dim) b.d_bias_stride[dim] = bias->size(dim) == 1 ? 0 : stride_of(grad_bias, dim);
    b.d_bias_is_shared = (bias->size(0) == 1 && forward.batch > 1) || (bias->size(1) == 1 && forward.kv_heads > 1);
  }
  if (q.numel() + k.numel() > 0) execute(b, q);
  return {grad_q, grad_k, grad_v, grad_bias, grad_sinks};
}

Gradients attention_backward(const Tensor& grad_o, const std::optional<Tensor>& grad_lse, const Tensor& given_q,
                             const Tensor& given_k, const Tensor& given_v, const Tensor& o, const Tensor& lse,
                             const std::optional<Tensor>& bias, const std::optional<Tensor>& alibi_slopes,
                             const std::optional<Tensor>& sinks, bool causal, int64_t window_left, int64_t window_right,
                             double softmax_scale, double softcap, double dropout_p,
                             const std::optional<Tensor>& dropout_rng, bool bias_grad,
                             const std::optional<std::vector<Tensor>>& block_mask) {
  const Tensor q = readable(given_q), k = readable(given_k), v = readable(given_v);
  const AttentionForwardParams p = dense_params(q, k, v, bias, alibi_slopes, sinks, causal, window_left, window_right,
                                                softmax_scale, softcap, dropout_p, dropout_rng, block_mask);
  return run_backward(p, grad_o, grad_lse, q, k, v, o, lse, bias, bias_grad);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_varlen_backward(
    const Tensor& grad_o, const std::optional<Tensor>& grad_lse, const Tensor& given_q, const Tensor& given_k,
    const Tensor& given_v, const Tensor& o, const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
    int64_t max_seqlen_q, int64_t max_seqlen_k, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sinks, bool causal, int64_t window_left, int64_t window_right, double softmax_scale,
    double softcap, double dropout_p, const std::optional<Tensor>& dropout_rng) {
  const Tensor q = readable(given_q), k = readable(given_k), v = readable(given_v);
  const AttentionForwardParams p =
      varlen_params(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes, sinks, causal,
                    window_left, window_right, softmax_scale, softcap, dropout_p, dropout_rng);
  auto [grad_q, grad_k, grad_v, grad_bias, grad_sinks] =
      run_backward(p, grad_o, grad_lse, q, k, v, o, lse, std::nullopt, false);
  return {grad_q, grad_k, grad_v, grad_sinks};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_varlen_forward", TORCH_BOX(&attention_varlen_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_varlen_backward", TORCH_BOX(&attention_varlen_backward));
}

}  // namespace fmkernels
