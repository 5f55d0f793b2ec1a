// SPDX-License-Identifier: Apache-2.0
// attend: tensors in, checks, Params out.
#include "../attention/attention_scores_op.h"
#include "paged_kv_views.h"

namespace fmkernels {
namespace {

void set_tree_mask(PagedAttendParams& p, const Tensor& t, const Tensor& q) {
  check_same_device("tree_mask", t, q);
  check_scalar_type("tree_mask", t, ScalarType::Int, "int32");
  check_rank("tree_mask", t, 2);
  check_last_dim_contiguous("tree_mask", t);
  check_size("tree_mask", t, 0, p.total_q);
  p.tree_mask = static_cast<const uint32_t*>(data_of(t));
  p.tree_stride = stride_of(t, 0);
  p.tree_words = t.size(1);
}

#ifndef FM_CUDA
// Every page that a query may see exists: those before all windows may be gone.
void check_attend_values(const PagedAttendParams& p, const TableView& table) {
  if (p.cu_seqlens_q != nullptr) check_prefix_values("cu_seqlens_q", p.cu_seqlens_q, p.batch, p.total_q);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t seq_q = p.cu_seqlens_q == nullptr ? 1 : p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b];
    const int64_t seq_k = p.cache_seqlens[b], first = seq_k - seq_q - p.window_left;
    check_page_values(table, b, p.window_left < 0 || first < 0 ? 0 : first, seq_k, p.cache.page_size,
                      p.cache.num_pages);
  }
}
#endif

void execute(const PagedAttendParams& p, [[maybe_unused]] const Tensor& q) {
#ifdef FM_CUDA
  Tensor workspace = torch::stable::new_empty(q, {paged_kv_attend_workspace_floats(p)}, ScalarType::Float);
  const PagedAttendCall call{p, static_cast<float*>(data_of(workspace))};  // its address is taken before the launch
  FM_EXECUTE(paged_kv_attend, call, q);
#else
  FM_EXECUTE(paged_kv_attend, p, q);
#endif
}

std::tuple<Tensor, Tensor> paged_kv_attend(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                           const Tensor& block_table, const Tensor& cache_seqlens,
                                           const std::optional<Tensor>& cu_seqlens_q,
                                           const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                                           const std::optional<Tensor>& alibi_slopes,
                                           const std::optional<Tensor>& sinks, const std::optional<Tensor>& tree_mask,
                                           bool causal, int64_t window_left, int64_t window_right, double softmax_scale,
                                           double softcap) {
  PagedAttendParams p{};
  check_rank("q", q, 3);
  check_last_dim_contiguous("q", q);
  p.dtype = dtype_of("q", q);
  p.cache = view_cache(k_cache, v_cache, k_scale, v_scale, q);
  check_cache_dtype("k_cache", p.cache.dtype, p.dtype);
  p.total_q = q.size(0);
  p.heads = q.size(1);
  check_size("q", q, 2, p.cache.head_dim);
  FM_CHECK(p.cache.kv_heads > 0 && p.heads % p.cache.kv_heads == 0, "k_cache has ", p.cache.kv_heads,
           " heads, which must divide the ", p.heads, " heads of q");
  p.q = view_rows(q);
  const TableView table = view_table(block_table, q);
  p.batch = table.batch;
  p.block_table = table.data;
  p.table_stride = table.stride;
  p.max_pages = table.max_pages;
  check_size("cache_seqlens", cache_seqlens, 0, p.batch);
  p.cache_seqlens = view_list<int32_t>("cache_seqlens", cache_seqlens, q);
  if (cu_seqlens_q.has_value()) {
    check_size("cu_seqlens_q", *cu_seqlens_q, 0, p.batch + 1);
    p.cu_seqlens_q = view_list<int32_t>("cu_seqlens_q", *cu_seqlens_q, q);
  } else {
    FM_CHECK(p.total_q == p.batch, "q must have one query for each of the ", p.batch,
             " requests where there are no cu_seqlens_q, got ", p.total_q);
  }
  set_scores(p, q, alibi_slopes, sinks, causal, window_left, window_right, softmax_scale, softcap);
  if (tree_mask.has_value()) set_tree_mask(p, *tree_mask, q);
#ifndef FM_CUDA
  check_attend_values(p, table);
#endif
  Tensor o = new_contiguous(q, {p.total_q, p.heads, p.cache.v_head_dim}, q.scalar_type());
  Tensor lse = new_contiguous(q, {p.heads, p.total_q}, ScalarType::Float);
  p.o = view_rows(o);
  p.lse = static_cast<float*>(data_of(lse));
  p.lse_head_stride = p.total_q;
  if (lse.numel() > 0) execute(p, q);
  return {o, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) { m.impl("paged_kv_attend", TORCH_BOX(&paged_kv_attend)); }

}  // namespace fmkernels
