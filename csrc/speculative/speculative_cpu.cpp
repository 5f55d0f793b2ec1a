// SPDX-License-Identifier: Apache-2.0
// speculative_cpu.cpp: the CPU kernel of speculative verification.
//
// Work       A task is one request: a walk from the root, of which each place takes one pass over its p and its q.
// Numerics   Integers and single IEEE operations: the tokens are those of the CUDA kernel, bit by bit.
// Cost       A pass over p, and over q, for each accepted token and the last; one more over both for a rejection.

#include "speculative.h"

#include "../common/fixed_weight_cpu.h"
#include "../common/parallel.h"
#include "../common/vec.h"

namespace fmkernels {
namespace {

constexpr int64_t kBlock = 256;  // tokens whose sum of weights is taken together in a draw

// Weights of a row of probabilities; their sum, 0 where one is NaN.
uint64_t fill_weights(const float* x, int64_t vocab, uint64_t* weight) {
  uint64_t total = 0;
  bool is_nan = false;
  int64_t v = 0;
#ifdef __AVX2__
  __m256i sum = _mm256_setzero_si256();
  __m256 unordered = _mm256_setzero_ps();
  for (; v + 8 <= vocab; v += 8) {
    const __m256 lanes = _mm256_loadu_ps(x + v);
    unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(lanes, lanes, _CMP_UNORD_Q));
    const __m256 bounded = _mm256_min_ps(_mm256_max_ps(lanes, _mm256_setzero_ps()), _mm256_set1_ps(1.0f));
    sum = _mm256_add_epi64(sum, store_weights(weight + v, weights_of(bounded)));
  }
  total = sum_of_lanes(sum);
  is_nan = _mm256_movemask_ps(unordered) != 0;
#endif
  for (; v < vocab; ++v) {
    is_nan |= x[v] != x[v];
    weight[v] = probability_weight(x[v]);
    total += weight[v];
  }
  return is_nan ? 0 : total;
}

// Walks one request. p and q hold the weights of a place; R is written over p.
void verify(const SpeculativeParams& params, int64_t row, uint64_t* p, uint64_t* q) {
  const int64_t num_nodes = params.num_nodes, vocab = params.vocab;
  const int64_t seed = params.seed[row], offset = params.offset[row];
  int64_t *tokens = params.tokens + row * (num_nodes + 1), *nodes = params.nodes + row * num_nodes;
  for (int64_t i = 0; i <= num_nodes; ++i) tokens[i] = -1;
  for (int64_t i = 0; i < num_nodes; ++i) nodes[i] = -1;
  int64_t place = -1, accepted = 0;
  for (bool moved = true; moved;) {
    moved = false;
    const float* target = params.target + row * params.target_stride[0] + (place + 1) * params.target_stride[1];
    uint64_t r_sum = fill_weights(target, vocab, p);
    bool has_q = false;
    uint64_t q_sum = 1;
    double alpha = 0.0;
    for (int64_t node = place + 1; r_sum > 0 && node < num_nodes && !moved; ++node) {
      const int64_t token = draft_token(params, row, node);
      if (token < 0 || draft_parent(params, row, node) != place) continue;
      if (params.draft != nullptr && !has_q) {
        const float* draft = params.draft + row * params.draft_stride[0] + (place + 1) * params.draft_stride[1];
        q_sum = fill_weights(draft, vocab, q);
        has_q = true;
      }
      if (q_sum == 0) {  // nothing can be said of a child of a distribution that is none
        r_sum = 0;
        break;
      }
      const uint64_t coin = random_bits(seed, offset, static_cast<uint32_t>(node + 1), kSpeculativeStream);
      if (accepts(coin, p[token], r_sum, has_q ? q[token] : 1, q_sum)) {
        tokens[accepted] = token;
        nodes[accepted++] = node;
        place = node;
        moved = true;
      } else if (!has_q) {
        r_sum -= p[token];
        p[token] = 0;
      } else {
        alpha += static_cast<double>(r_sum) / static_cast<double>(q_sum);
        fill_weights(target, vocab, p);
        r_sum = 0;
        for (int64_t v = 0; v < vocab; ++v) r_sum += p[v] = residual_weight(p[v], q[v], alpha);
        if (r_sum == 0) {  // rounding took the last of it
          alpha = 0.0;
          r_sum = fill_weights(target, vocab, p);
        }
      }
    }
    if (!moved && r_sum > 0) {
      const uint64_t bits = random_bits(seed, offset, 0, kSpeculativeStream);
      tokens[accepted] = first_above<kBlock>(vocab, uniform_below(r_sum, bits), [p](int64_t v) { return p[v]; });
    }
  }
  params.num_accepted[row] = accepted;
}

}  // namespace

template <>
void run_speculative<kIsa>(const SpeculativeParams& p) {
  const int64_t wanted = workers_for(p.batch * p.vocab * 32);
  const int workers = static_cast<int>(wanted < p.batch ? wanted : p.batch);
  const int64_t bytes = Arena::array_bytes<uint64_t>(p.vocab);
  const Workspace workspace(workers * 2 * bytes);
  parallel_for(p.batch, workers, [&](int64_t row, int worker) {
    Arena arena(workspace.data() + worker * 2 * bytes);
    uint64_t *weights_p = arena.take<uint64_t>(p.vocab), *weights_q = arena.take<uint64_t>(p.vocab);
    verify(p, row, weights_p, weights_q);
  });
}

}  // namespace fmkernels
