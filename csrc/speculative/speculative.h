// SPDX-License-Identifier: Apache-2.0
// Verification of drafted tokens by rejection sampling, over a chain or a tree of them.
//
// Row 0 of the target is the distribution p after the last committed token, row i + 1 that after the draft node i; row
// r of the draft, where it is given, is the q from which the children of that place were drawn, one by one. From the root:
//
//   R = p.  For each child c in turn: it is accepted with probability min(1, R(c) / q(c)), R and q normalised, and the
//   walk goes on from there; else R = max(R - q, 0).  Without a draft distribution q is 1 at the token of c.
//   Where no child is accepted, the last token is drawn from R.
//
// Whatever the draft, a token has the distribution p: Leviathan, Kalman and Matias 2023; for several children Miao et al.
// 2024 (SpecInfer). Weights of p and q are integers (common/fixed_weight.h); with q, R = max(p - floor(alpha q), 0), where
// alpha grows by sum(R) / sum(q) with each rejection.
#pragma once

#include <cstdint>

#include "../common/fixed_weight.h"
#include "../common/isa.h"
#include "../common/stream.h"

namespace fmkernels {

struct SpeculativeParams {
  int64_t batch, num_nodes, vocab;
  const float* target;       // [batch, num_nodes + 1, vocab]
  int64_t target_stride[2];  // of batch and row
  const float* draft;        // [batch, num_nodes, vocab], or null
  int64_t draft_stride[2];
  const int64_t* draft_tokens;  // [batch, num_nodes]; no class: the node is absent
  int64_t draft_tokens_stride[2];
  const int64_t* parents;  // [batch, num_nodes]: an earlier node, or -1 for the root; null: a chain
  int64_t parents_stride[2];
  const int64_t *seed, *offset;  // [batch]
  int64_t* tokens;               // [batch, num_nodes + 1]: accepted, then the last token, then -1
  int64_t* num_accepted;         // [batch]
  int64_t* nodes;                // [batch, num_nodes]: the accepted ones, then -1
};

constexpr uint32_t kSpeculativeStream = 2;  // of random_bits; index 0 draws the last token, i + 1 is the coin of node i

// A node of the draft, as every device reads it. Parents that are no earlier node make it absent.
FM_HOST_DEVICE int64_t draft_token(const SpeculativeParams& p, int64_t row, int64_t node) {
  const int64_t token = p.draft_tokens[row * p.draft_tokens_stride[0] + node * p.draft_tokens_stride[1]];
  return token >= 0 && token < p.vocab ? token : -1;
}
FM_HOST_DEVICE int64_t draft_parent(const SpeculativeParams& p, int64_t row, int64_t node) {
  if (p.parents == nullptr) return node - 1;
  const int64_t parent = p.parents[row * p.parents_stride[0] + node * p.parents_stride[1]];
  return parent >= -1 && parent < node ? parent : -2;
}

// Of a probability; what is no number from 0 to 1 is clamped to them.
FM_HOST_DEVICE uint64_t probability_weight(float x) { return weight_of(x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f); }

// What is left of p at one token: with alpha = 0, p.
FM_HOST_DEVICE uint64_t residual_weight(uint64_t p, uint64_t q, double alpha) {
  const uint64_t taken = static_cast<uint64_t>(alpha * static_cast<double>(q));
  return p > taken ? p - taken : 0;
}

// Whether a coin accepts a token: coin * (sum of R) * q < R * (sum of q), in double, which every device rounds alike.
FM_HOST_DEVICE bool accepts(uint64_t coin, uint64_t r, uint64_t r_sum, uint64_t q, uint64_t q_sum) {
  const double u = static_cast<double>(coin >> 11) * 0x1p-53;
  const double wanted = u * static_cast<double>(r_sum) * static_cast<double>(q);
  return wanted < static_cast<double>(r) * static_cast<double>(q_sum);
}

template <Isa isa>
void run_speculative(const SpeculativeParams& p);
void launch_speculative(const SpeculativeParams& p, cudaStream_t stream);

}  // namespace fmkernels
