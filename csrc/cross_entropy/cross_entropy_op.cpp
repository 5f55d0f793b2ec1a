// SPDX-License-Identifier: Apache-2.0
// cross_entropy_forward, _backward, _gradient_: tensors in, checks, Params out.
#include "../common/parallel.h"
#include "../common/tensor.h"
#include "cross_entropy.h"

namespace fmkernels {
namespace {

// [batch, tokens, ...] or [tokens, ...]: strides of batch and token.
void view_strides(const Tensor& t, int64_t rank, int64_t (&stride)[2]) {
  stride[0] = rank == 1 ? 0 : stride_of(t, 0);
  stride[1] = stride_of(t, rank - 1);
}

// A tensor of one element a row.
void check_rows(const char* name, const Tensor& t, const Tensor& logits) {
  check_rank(name, t, logits.dim() - 1);
  check_same_device(name, t, logits);
  for (int64_t dim = 0; dim < t.dim(); ++dim) check_size(name, t, dim, logits.size(dim));
}
const float* float_rows(const char* name, const Tensor& t, const Tensor& logits) {
  check_rows(name, t, logits);
  check_scalar_type(name, t, ScalarType::Float, "float32");
  return static_cast<const float*>(data_of(t));
}

#ifndef FM_CUDA
// What a GPU cannot see without waiting for it.
void check_target(const CrossEntropyParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t i = 0; i < p.num_tokens; ++i) {
      const int64_t target = p.target[b * p.target_stride[0] + i * p.target_stride[1]];
      FM_CHECK(target == p.ignore_index || (target >= 0 && target < p.vocab), "target must be from 0 to ", p.vocab - 1,
               " or ignore_index, ", p.ignore_index, ", got ", target);
    }
  }
}
#endif

CrossEntropyParams view(const Tensor& logits, const Tensor& target, int64_t ignore_index, double label_smoothing,
                        double z_loss, double softcap) {
  FM_CHECK(logits.dim() == 2 || logits.dim() == 3, "logits must have 2 or 3 dimensions, got ", logits.dim());
  const int64_t rank = logits.dim() - 1;
  CrossEntropyParams p{};
  p.dtype = dtype_of("logits", logits);
  check_last_dim_contiguous("logits", logits);
  p.batch = rank == 1 ? 1 : logits.size(0);
  p.num_tokens = logits.size(rank - 1);
  p.vocab = logits.size(rank);
  FM_CHECK(p.vocab > 0, "logits must have a vocabulary of at least 1");
  p.logits = data_of(logits);
  view_strides(logits, rank, p.logits_stride);
  check_rows("target", target, logits);
  check_scalar_type("target", target, ScalarType::Long, "int64");
  p.target = static_cast<const int64_t*>(data_of(target));
  view_strides(target, rank, p.target_stride);
  p.ignore_index = ignore_index;
  p.label_smoothing = static_cast<float>(label_smoothing);
  p.z_loss = static_cast<float>(z_loss);
  p.softcap = static_cast<float>(softcap);
#ifndef FM_CUDA
  if (target.numel() > 0) check_target(p);
#endif
  return p;
}

void view_grad_loss(CrossEntropyParams& p, const Tensor& grad_loss, const Tensor& logits) {
  p.grad_loss = float_rows("grad_loss", grad_loss, logits);
  view_strides(grad_loss, grad_loss.dim(), p.grad_loss_stride);
}

Tensor empty_rows(const Tensor& logits) {
  const auto sizes = logits.sizes();
  return torch::stable::new_empty(logits, {sizes.begin(), sizes.end() - 1}, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(const Tensor& logits, const Tensor& target,
                                                         int64_t ignore_index, double label_smoothing, double z_loss,
                                                         double softcap) {
  CrossEntropyParams p = view(logits, target, ignore_index, label_smoothing, z_loss, softcap);
  Tensor loss = empty_rows(logits), max = empty_rows(logits), sum_exp = empty_rows(logits);
  p.loss = static_cast<float*>(data_of(loss));
  p.max = static_cast<float*>(data_of(max));
  p.sum_exp = static_cast<float*>(data_of(sum_exp));
  if (loss.numel() > 0) FM_EXECUTE(cross_entropy, p, logits);
  return {loss, max, sum_exp};
}

Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target, const Tensor& max,
                              const Tensor& sum_exp, int64_t ignore_index, double label_smoothing, double z_loss,
                              double softcap) {
  CrossEntropyParams p = view(logits, target, ignore_index, label_smoothing, z_loss, softcap);
  view_grad_loss(p, grad_loss, logits);
  for (const Tensor* t : {&max, &sum_exp}) FM_CHECK(t->is_contiguous(), "max and sum_exp must be contiguous");
  p.max = const_cast<float*>(float_rows("max", max, logits));
  p.sum_exp = const_cast<float*>(float_rows("sum_exp", sum_exp, logits));
  Tensor grad = empty_contiguous(logits);
  p.grad = data_of(grad);
#ifndef FM_CUDA
  prefer_huge_pages(p.grad, grad.numel() * element_bytes(p.dtype));
#endif
  view_strides(grad, grad.dim() - 1, p.grad_stride);
  if (grad.numel() > 0) FM_EXECUTE(cross_entropy_backward, p, logits);
  return grad;
}

Tensor cross_entropy_gradient(Tensor logits, const Tensor& grad_loss, const Tensor& target, int64_t ignore_index,
                              double label_smoothing, double z_loss, double softcap) {
  CrossEntropyParams p = view(logits, target, ignore_index, label_smoothing, z_loss, softcap);
  FM_CHECK(logits.is_contiguous(), "logits must be contiguous where they are overwritten");
  view_grad_loss(p, grad_loss, logits);
  Tensor loss = empty_rows(logits);
  p.loss = static_cast<float*>(data_of(loss));
  p.grad = const_cast<void*>(p.logits);
  view_strides(logits, logits.dim() - 1, p.grad_stride);
  if (loss.numel() > 0) FM_EXECUTE(cross_entropy_gradient, p, logits);
  return loss;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient));
}

}  // namespace fmkernels
