// SPDX-License-Identifier: Apache-2.0
// The feed-forward layer of a mixture of experts, whole: its mapping, both products, and the sum of each token.
//
//   out[t] = sum over k, in this order, of weights[t, k] y[token_topk_to_pos[t, k]]
//   y[r] = inner[r] w_down[e]^T,  inner[r] = silu(g) * u,  (g | u) = x[pos_to_token[r]] w_gate_up[e]^T
//
// What the kernels of moe.h, moe_gated.h and moe_grouped.h give one after another, bit for bit: inner and y are rounded.
#pragma once

#include "moe.h"
#include "moe_gated.h"
#include "moe_grouped.h"

namespace fmkernels {

struct MoeMlpParams {
  MoeMappingParams mapping;
  MoeGatedMmParams gated;    // reads what the mapping has written; CPU: out has no data
  MoeGroupedMmParams down;   // a is gated.out; CPU: neither a nor out has data
  MoeCombineParams combine;  // y is down.out
};

template <Isa isa>
void run_moe_mlp(const MoeMlpParams& p);

}  // namespace fmkernels
