// SPDX-License-Identifier: Apache-2.0
// The feed-forward layer of a mixture of experts: tensors in, checks, Params out. On CUDA its kernels one after another.
#include "moe_grouped_views.h"
#include "moe_mapping_views.h"
#include "moe_mlp.h"

namespace fmkernels {
namespace {

// [experts, rows, columns] as [experts, columns, rows].
DenseView view_transposed(const char* name, const Tensor& t, const Tensor& like) {
  DenseView v = view_operand(name, t, like, 3, false);
  std::swap(v.rows, v.columns);
  std::swap(v.row_stride, v.column_stride);
  if (v.columns <= 1) v.column_stride = 1;
  return v;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> moe_mlp(const Tensor& x, const Tensor& w_gate_up,
                                                           const Tensor& w_down, const Tensor& topk_weights,
                                                           const Tensor& topk_idx, bool keeps) {
  MoeMlpParams p{};
  const DType dtype = dtype_of("x", x);
  const DenseView tokens = view_operand("x", x, x, 2, true);
  const DenseView gate_up = view_transposed("w_gate_up", w_gate_up, x), down = view_transposed("w_down", w_down, x);
  const int64_t num_experts = w_gate_up.size(0), hidden = tokens.columns, width = down.rows;
  FM_CHECK(gate_up.rows == hidden, "w_gate_up must have as many columns as x, ", hidden, ", got ", gate_up.rows);
  FM_CHECK(gate_up.columns == 2 * width, "w_gate_up must have twice as many rows as w_down has columns, ", 2 * width,
           ", got ", gate_up.columns);
  FM_CHECK(down.columns == hidden, "w_down must have as many rows as x has columns, ", hidden, ", got ", down.columns);
  check_size("w_down", w_down, 0, num_experts);
  check_rank("topk_idx", topk_idx, 2);
  check_size("topk_idx", topk_idx, 0, tokens.rows);
  check_same_device("topk_idx", topk_idx, x);
  const Mapping mapping = view_mapping(topk_idx, num_experts, 1, -1);
  const int64_t num_rows = mapping.p.num_rows, num_topk = topk_idx.size(1);
  FM_CHECK(num_topk <= kMaxTopk, "topk_idx must have at most ", kMaxTopk, " columns, got ", num_topk);
  const float* weights = view_weights(topk_weights, topk_idx, x);

  Tensor out = torch::stable::new_empty(x, {tokens.rows, hidden});
  const int64_t kept_rows = keeps ? num_rows : 0, kept_columns = keeps ? 2 * width : 0;
  Tensor kept = hidden > 0 ? torch::stable::new_empty(x, {kept_rows, kept_columns})
                           : torch::stable::new_zeros(x, {kept_rows, kept_columns});  // sums of no products
#ifdef FM_CUDA
  const Tensor inner = torch::stable::new_empty(x, {num_rows, width});
  const Tensor y = torch::stable::new_empty(x, {num_rows, hidden});
  void *inner_data = data_of(inner), *y_data = data_of(y);
#else
  void *inner_data = nullptr, *y_data = nullptr;  // in the cache, or in a workspace of the kernel
#endif
  const DenseView inner_view{inner_data, 0, width, 1, num_rows, width}, y_view{y_data, 0, hidden, 1, num_rows, hidden};
  p.mapping = mapping.p;
  p.gated = {dtype,
             false,
             tokens,
             gate_up,
             inner_view,
             keeps ? data_of(kept) : nullptr,
             mapping.p.pos_to_token,
             mapping.p.expert_offsets,
             num_experts};
  p.down = {dtype, inner_view, down, y_view, nullptr, mapping.p.expert_offsets, num_experts};
  p.combine.dtype = dtype;
  p.combine.num_tokens = tokens.rows;
  p.combine.num_topk = num_topk;
  p.combine.num_rows = num_rows;
  p.combine.hidden = hidden;
  p.combine.y = {y_data, hidden};
  p.combine.out = {data_of(out), hidden};
  p.combine.token_topk_to_pos = mapping.p.token_topk_to_pos;
  p.combine.weights = weights;
  p.combine.weights_stride = stride_of(topk_weights, 0);
#ifdef FM_CUDA
  FM_EXECUTE(moe_mapping, p.mapping, x);
  if (num_rows * width > 0) FM_EXECUTE(moe_gated_mm, p.gated, x);
  if (num_rows * hidden > 0) FM_EXECUTE(moe_grouped_mm, p.down, x);
  if (out.numel() > 0) FM_EXECUTE(moe_combine, p.combine, x);
#else
  if (out.numel() > 0) FM_EXECUTE(moe_mlp, p, x);
  else FM_EXECUTE(moe_mapping, p.mapping, x);
#endif
  return {out, kept, mapping.pos_to_token, mapping.token_topk_to_pos, mapping.expert_offsets};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) { m.impl("moe_mlp", TORCH_BOX(&moe_mlp)); }

}  // namespace fmkernels
