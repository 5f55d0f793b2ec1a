// SPDX-License-Identifier: Apache-2.0
// The dropout of attention.h on CUDA. What is kept is gathered into the bits of one integer, in loops that are not
// unrolled: a call of Philox is seventy instructions.
#pragma once

#include "../common/philox.h"
#include "attention_fragments_cuda.h"

namespace fmkernels {
namespace {

constexpr int kDropoutGroup = 32;  // keys of the calls of four lanes; a call has every word of 8 of them, two a word
constexpr int kCallBits = 8;

// Which keys of a call are kept: bit 2 * word + half. `lane_of_four`: j % 8 / 2 of its keys.
__device__ __forceinline__ uint32_t kept_of_call(const AttentionForwardParams& p, int batch, int64_t head, int query,
                                                 int group, int lane_of_four) {
  const uint64_t seed = static_cast<uint64_t>(p.dropout_rng[0]);
  uint32_t x[4] = {static_cast<uint32_t>(group * 4 + lane_of_four), static_cast<uint32_t>(query),
                   static_cast<uint32_t>(batch * p.heads + head), static_cast<uint32_t>(p.dropout_rng[1])};
  philox(x, [&](int half, int round) { return philox_round_key(seed, half, round); });
  uint32_t kept = 0;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    if ((x[word] & 0xffff) >= p.dropout_threshold) kept |= 1u << (2 * word);
    if (x[word] >> 16 >= p.dropout_threshold) kept |= 2u << (2 * word);
  }
  return kept;
}

// Weights that are dropped become 0; bit_of(m, half, n, e): which bit of `kept` tells.
template <int kRowTiles, int kTiles, class Bits, class BitOf>
__device__ __forceinline__ void drop_weights(float (&weights)[kRowTiles][kTiles][4], Bits kept, BitOf&& bit_of) {
  for_each<kRowTiles, kTiles>([&](int m, int n, int i) {
    if ((kept >> bit_of(m, i / 2, n, i % 2) & 1) == 0) weights[m][n][i] = 0.0f;
  });
}

}  // namespace
}  // namespace fmkernels
