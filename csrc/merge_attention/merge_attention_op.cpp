// SPDX-License-Identifier: Apache-2.0
// merge_attention_forward, merge_attention_backward: tensors in, checks, Params out.
#include "../common/tensor.h"
#include "merge_attention.h"

namespace fmkernels {
namespace {

// o [batch, tokens, heads, dim] or [tokens, heads, dim]; lse [batch, heads, tokens] or [heads, tokens], or none.
MergeSide view_side(const char* name, const Tensor& o, const Tensor* lse, const Tensor& like) {
  check_rank(name, o, like.dim());
  check_last_dim_contiguous(name, o);
  check_same_device(name, o, like);
  FM_CHECK(o.scalar_type() == like.scalar_type(), name, " must have the dtype of the first argument");
  for (int64_t dim = 0; dim < like.dim(); ++dim) check_size(name, o, dim, like.size(dim));
  const int64_t first = o.dim() - 3;
  MergeSide side{
      data_of(o), nullptr, {first == 0 ? 0 : stride_of(o, 0), stride_of(o, first), stride_of(o, first + 1)}, {}};
  if (lse != nullptr) {
    check_rank("lse", *lse, o.dim() - 1);
    check_same_device("lse", *lse, like);
    check_scalar_type("lse", *lse, ScalarType::Float, "float32");
    if (first == 1) check_size("lse", *lse, 0, o.size(0));
    check_size("lse", *lse, first, o.size(first + 1));
    check_size("lse", *lse, first + 1, o.size(first));
    side.lse = static_cast<float*>(data_of(*lse));
    side.lse_stride[0] = first == 0 ? 0 : stride_of(*lse, 0);
    side.lse_stride[1] = stride_of(*lse, first + 1);
    side.lse_stride[2] = stride_of(*lse, first);
  }
  return side;
}

// Sizes and the two sides, which forward and backward read alike.
template <class Params>
Params view_sides(const Tensor& o_a, const Tensor& lse_a, const Tensor& o_b, const Tensor& lse_b) {
  FM_CHECK(o_a.dim() == 3 || o_a.dim() == 4, "o_a must have 3 or 4 dimensions, got ", o_a.dim());
  const int64_t first = o_a.dim() - 3;
  Params p{};
  p.dtype = dtype_of("o_a", o_a);
  p.batch = first == 0 ? 1 : o_a.size(0);
  p.num_tokens = o_a.size(first);
  p.heads = o_a.size(first + 1);
  p.dim = o_a.size(first + 2);
  FM_CHECK(p.dim > 0, "o_a must have a last dimension of at least 1");
  p.a = view_side("o_a", o_a, &lse_a, o_a);
  p.b = view_side("o_b", o_b, &lse_b, o_a);
  return p;
}

// A contiguous output of the same shape and dtype.
std::tuple<Tensor, Tensor> merge_attention_forward(const Tensor& o_a, const Tensor& lse_a, const Tensor& o_b,
                                                   const Tensor& lse_b) {
  auto p = view_sides<MergeAttentionParams>(o_a, lse_a, o_b, lse_b);
  Tensor o = empty_contiguous(o_a), lse = empty_contiguous(lse_a);
  p.merged = view_side("o", o, &lse, o_a);
  if (lse.numel() > 0) FM_EXECUTE(merge_attention, p, o_a);
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_attention_backward(const Tensor& grad_o,
                                                                    const std::optional<Tensor>& grad_lse,
                                                                    const Tensor& o_a, const Tensor& lse_a,
                                                                    const Tensor& o_b, const Tensor& lse_b) {
  auto p = view_sides<MergeAttentionBackwardParams>(o_a, lse_a, o_b, lse_b);
  Tensor grad_o_a = empty_contiguous(o_a), grad_lse_a = empty_contiguous(lse_a);
  Tensor grad_o_b = empty_contiguous(o_b), grad_lse_b = empty_contiguous(lse_b);
  p.grad = view_side("grad_o", grad_o, pointer_to(grad_lse), o_a);
  p.grad_a = view_side("grad_o_a", grad_o_a, &grad_lse_a, o_a);
  p.grad_b = view_side("grad_o_b", grad_o_b, &grad_lse_b, o_a);
  if (grad_lse_a.numel() > 0) FM_EXECUTE(merge_attention_backward, p, o_a);
  return {grad_o_a, grad_lse_a, grad_o_b, grad_lse_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) {
  m.impl("merge_attention_forward", TORCH_BOX(&merge_attention_forward));
  m.impl("merge_attention_backward", TORCH_BOX(&merge_attention_backward));
}

}  // namespace fmkernels
