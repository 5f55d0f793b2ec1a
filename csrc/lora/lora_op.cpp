// SPDX-License-Identifier: Apache-2.0
// lora_shrink, lora_expand: tensors in, checks, Params out.
#include "../common/tensor.h"
#include "lora.h"

namespace fmkernels {
namespace {

Adapters view_adapters(const Tensor& idx, const Tensor& tokens, int64_t num_adapters, int64_t rank) {
  FM_CHECK(rank >= 1 && rank <= kMaxRank, "rank must be from 1 to ", kMaxRank, ", got ", rank);
  check_rank("idx", idx, 1);
  check_size("idx", idx, 0, tokens.size(0));
  check_same_device("idx", idx, tokens);
  check_scalar_type("idx", idx, ScalarType::Int, "int32");
  FM_CHECK(num_adapters < int64_t{1} << 31, "at most 2^31 - 1 adapters, got ", num_adapters);
  const Adapters adapters{static_cast<const int32_t*>(data_of(idx)), stride_of(idx, 0), tokens.size(0), num_adapters,
                          rank};
#ifndef FM_CUDA  // on CUDA the kernel skips what it is not to read
  for (int64_t t = 0; t < adapters.num_tokens; ++t) {
    const int32_t adapter = adapters.idx[t * adapters.idx_stride];
    FM_CHECK(adapter >= -1 && adapter < num_adapters, "idx must be from -1 to ", num_adapters - 1, ", got ", adapter);
  }
#endif
  return adapters;
}

// [tokens, columns] or [adapters, rows, columns], of the device and dtype of `like`.
void check_matrix(const char* name, const Tensor& t, int64_t rank, const Tensor& like) {
  check_rank(name, t, rank);
  check_last_dim_contiguous(name, t);
  check_same_device(name, t, like);
  FM_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of the first argument");
}

Tensor lora_shrink(const Tensor& x, const Tensor& a, const Tensor& idx) {
  LoraShrinkParams p{};
  p.dtype = dtype_of("x", x);
  check_matrix("x", x, 2, x);
  check_matrix("a", a, 3, x);
  check_size("a", a, 2, x.size(1));
  p.adapters = view_adapters(idx, x, a.size(0), a.size(1));
  p.in_features = x.size(1);
  p.x = data_of(x);
  p.x_stride = stride_of(x, 0);
  p.a = data_of(a);
  p.a_stride[0] = stride_of(a, 0);
  p.a_stride[1] = stride_of(a, 1);
  Tensor h = torch::stable::new_empty(x, {x.size(0), a.size(1)}, ScalarType::Float);
  p.h = static_cast<float*>(data_of(h));
  if (h.numel() > 0) FM_EXECUTE(lora_shrink, p, x);
  return h;
}

Tensor lora_expand(const Tensor& base, const Tensor& b, const Tensor& h, const Tensor& idx,
                   const std::optional<Tensor>& scale) {
  LoraExpandParams p{};
  p.dtype = dtype_of("base", base);
  check_matrix("base", base, 2, base);
  check_matrix("b", b, 3, base);
  check_size("b", b, 1, base.size(1));
  check_scalar_type("h", h, ScalarType::Float, "float32");
  check_rank("h", h, 2);
  check_last_dim_contiguous("h", h);
  check_same_device("h", h, base);
  check_size("h", h, 0, base.size(0));
  check_size("h", h, 1, b.size(2));
  p.adapters = view_adapters(idx, base, b.size(0), b.size(2));
  if (scale.has_value()) {
    check_scalar_type("scale", *scale, ScalarType::Float, "float32");
    check_rank("scale", *scale, 1);
    check_size("scale", *scale, 0, b.size(0));
    check_last_dim_contiguous("scale", *scale);
    check_same_device("scale", *scale, base);
    p.scale = static_cast<const float*>(data_of(*scale));
  }
  p.out_features = base.size(1);
  p.base = data_of(base);
  p.base_stride = stride_of(base, 0);
  p.h = static_cast<const float*>(data_of(h));
  p.h_stride = stride_of(h, 0);
  p.b = data_of(b);
  p.b_stride[0] = stride_of(b, 0);
  p.b_stride[1] = stride_of(b, 1);
  Tensor y = torch::stable::new_empty(base, {base.size(0), base.size(1)});
  p.y = data_of(y);
  if (y.numel() > 0) FM_EXECUTE(lora_expand, p, base);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) {
  m.impl("lora_shrink", TORCH_BOX(&lora_shrink));
  m.impl("lora_expand", TORCH_BOX(&lora_expand));
}

}  // namespace fmkernels
