// SPDX-License-Identifier: Apache-2.0
// What attention and paged_kv check and fill in alike of how scores are made. Included by op files only.
#pragma once

#include <cmath>

#include "../common/tensor.h"

namespace fmkernels {

// Of Params whose batch and heads are set.
template <class Params>
void set_scores(Params& p, const Tensor& q, const std::optional<Tensor>& alibi_slopes,
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
  // finite in the log2 units of the kernels too, and no bound in either case
  p.softcap = std::fmin(p.softcap, 0x1p127f);
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
    p.sinks = view_vector<float>("sinks", *sinks, q, ScalarType::Float, "float32", p.heads);
  }
}

}  // namespace fmkernels
