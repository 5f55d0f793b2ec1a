// SPDX-License-Identifier: Apache-2.0
// speculative_verify: tensors in, checks, Params out.
#include "../common/row_tensors.h"
#include "../common/tensor.h"
#include "speculative.h"

namespace fmkernels {
namespace {

// [batch, rows, vocab] of float32 with vocab contiguous.
const float* view_probs(const char* name, const Tensor& t, const Tensor& tokens, int64_t rows, int64_t vocab,
                        int64_t (&stride)[2]) {
  check_rank(name, t, 3);
  check_same_device(name, t, tokens);
  check_scalar_type(name, t, ScalarType::Float, "float32");
  check_size(name, t, 0, tokens.size(0));
  check_size(name, t, 1, rows);
  check_size(name, t, 2, vocab);
  check_last_dim_contiguous(name, t);
  stride[0] = stride_of(t, 0);
  stride[1] = stride_of(t, 1);
  return static_cast<const float*>(data_of(t));
}

// [batch, nodes] of int64.
const int64_t* view_nodes(const char* name, const Tensor& t, const Tensor& tokens, int64_t (&stride)[2]) {
  check_rank(name, t, 2);
  check_same_device(name, t, tokens);
  check_scalar_type(name, t, ScalarType::Long, "int64");
  for (int64_t dim = 0; dim < 2; ++dim) {
    check_size(name, t, dim, tokens.size(dim));
    stride[dim] = stride_of(t, dim);
  }
  return static_cast<const int64_t*>(data_of(t));
}

#ifndef FM_CUDA
// What a GPU cannot see without waiting for it.
void check_values(const SpeculativeParams& p) {
  for (int64_t row = 0; row < p.batch; ++row) {
    for (int64_t node = 0; node < p.num_nodes; ++node) {
      const int64_t token = p.draft_tokens[row * p.draft_tokens_stride[0] + node * p.draft_tokens_stride[1]];
      FM_CHECK(token >= -1 && token < p.vocab, "draft_tokens must be from -1 to ", p.vocab - 1, ", got ", token);
      FM_CHECK(draft_parent(p, row, node) >= -1, "parents must be -1 or an earlier node, got ",
               p.parents[row * p.parents_stride[0] + node * p.parents_stride[1]], " of node ", node);
    }
  }
}
#endif

std::tuple<Tensor, Tensor, Tensor> speculative_verify(const Tensor& draft_tokens, const Tensor& target_probs,
                                                      const Tensor& seed, const Tensor& offset,
                                                      const std::optional<Tensor>& draft_probs,
                                                      const std::optional<Tensor>& parents) {
  check_rank("draft_tokens", draft_tokens, 2);
  check_rank("target_probs", target_probs, 3);
  SpeculativeParams p{};
  p.batch = draft_tokens.size(0);
  p.num_nodes = draft_tokens.size(1);
  p.vocab = target_probs.size(2);
  FM_CHECK(p.vocab > 0 && p.vocab <= kMaxWeights, "target_probs must have a vocabulary from 1 to ", kMaxWeights,
           ", got ", p.vocab);
  FM_CHECK(p.num_nodes < 0x7fffffff, "draft_tokens must have fewer than 2^31 - 1 nodes, got ", p.num_nodes);
  p.draft_tokens = view_nodes("draft_tokens", draft_tokens, draft_tokens, p.draft_tokens_stride);
  p.target = view_probs("target_probs", target_probs, draft_tokens, p.num_nodes + 1, p.vocab, p.target_stride);
  if (draft_probs.has_value()) {
    p.draft = view_probs("draft_probs", *draft_probs, draft_tokens, p.num_nodes, p.vocab, p.draft_stride);
  }
  if (parents.has_value()) p.parents = view_nodes("parents", *parents, draft_tokens, p.parents_stride);
  p.seed = view_one_a_row<int64_t>("seed", seed, draft_tokens, ScalarType::Long, "int64");
  p.offset = view_one_a_row<int64_t>("offset", offset, draft_tokens, ScalarType::Long, "int64");
#ifndef FM_CUDA
  check_values(p);
#endif
  Tensor tokens = torch::stable::new_empty(draft_tokens, {p.batch, p.num_nodes + 1});
  Tensor num_accepted = torch::stable::new_empty(draft_tokens, {p.batch});
  Tensor nodes = torch::stable::new_empty(draft_tokens, {p.batch, p.num_nodes});
  p.tokens = static_cast<int64_t*>(data_of(tokens));
  p.num_accepted = static_cast<int64_t*>(data_of(num_accepted));
  p.nodes = static_cast<int64_t*>(data_of(nodes));
  if (p.batch > 0) FM_EXECUTE(speculative, p, draft_tokens);
  return {tokens, num_accepted, nodes};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) { m.impl("speculative_verify", TORCH_BOX(&speculative_verify)); }

}  // namespace fmkernels
