// SPDX-License-Identifier: Apache-2.0
// attend: tensors in, checks, Params out.
#include <cmath>

#include "paged_kv_views.h"

namespace fmkernels {
namespace {

void set_scores(PagedAttendParams& p, const Tensor& q, const std::optional<Tensor>& alibi_slopes,
                const std::optional<Tensor>& sinks, bool causal, int64_t window_left, int64_t window_right,
                double softmax_scale, double softcap) {
  FM_CHECK(window_left >= -1 && window_right >= -1, "window must be -1 or more on both sides");
  constexpr int64_t kWidest = int64_t{1} << 40;  // wider than any sequence, and safe to add to a position
  p.window_left = window_left < kWidest ? window_left : kWidest;
  p.window_right = causal ? 0 : window_right < kWidest ? window_right : kWidest;
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.softcap = static_cast<float>(softcap);
  FM_CHECK(std::fabs(p.softmax_scale) <= 0x1p127f, "softmax_scale must be at most 2**127 in magnitude, got ",
           softmax_scale);
  FM_CHECK(std::isfinite(p.softcap) && p.softcap >= 0.0f, "softcap must be finite in float32 and not negative, got ",
           softcap);
  FM_CHECK(softcap == 0.0 || (p.softcap > 0.0f && std::isfinite(p.softmax_scale / p.softcap)),
           "softcap must be 0 or leave softmax_scale / softcap finite in float32, got ", softcap);
  p.softcap = std::fmin(p.softcap, 0x1p127f);  // finite in log2 units too, and no bound in either case
  if (alibi_slopes.has_value()) {
    const Tensor& t = *alibi_slopes;
    check_same_device("alibi_slopes", t, q);
    check_scalar_type("alibi_slopes", t, ScalarType::Float, "float32");
    FM_CHECK(t.dim() == 1 || t.dim() == 2, "alibi_slopes must be [heads] or [batch, heads]");
    check_last_dim_contiguous("alibi_slopes", t);
    check_size("alibi_slopes", t, t.dim() - 1, p.heads);
    if (t.dim() == 2) check_size("alibi_slopes", t, 0, p.batch);
    p.alibi_slopes = static_cast<const float*>(data_of(t));
    p.alibi_batch_stride = t.dim() == 2 ? stride_of(t, 0) : 0;
  }
  if (sinks.has_value()) {
    const Tensor& t = *sinks;
    check_same_device("sinks", t, q);
    check_scalar_type("sinks", t, ScalarType::Float, "float32");
    check_rank("sinks", t, 1);
    check_last_dim_contiguous("sinks", t);
    check_size("sinks", t, 0, p.heads);
    p.sinks = static_cast<const float*>(data_of(t));
  }
}

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
