// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10: 128 random bits that are a function of a counter and a key, without a state.
// After Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fmkernels {

template <class Word>
struct PhiloxProduct {
  Word high, low;
};
FM_HOST_DEVICE PhiloxProduct<uint32_t> philox_multiply(uint32_t x, uint32_t factor) {
  const uint64_t product = uint64_t{x} * factor;
  return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
}

// Half 0 (low) or 1 of the key in a round: no chain of additions, so that no round waits for its key.
FM_HOST_DEVICE uint32_t philox_round_key(uint64_t key, int half, int round) {
  const uint32_t step = half == 0 ? 0x9e3779b9u : 0xbb67ae85u;
  return static_cast<uint32_t>(key >> (32 * half)) + static_cast<uint32_t>(round) * step;
}

// The counter becomes the random bits. A Word is a uint32_t, or several of them with philox_multiply and operator^;
// round_key(half, round) is one too.
template <class Word, class RoundKey>
FM_HOST_DEVICE void philox(Word (&x)[4], const RoundKey& round_key) {
  for (int round = 0; round < 10; ++round) {
    const PhiloxProduct<Word> a = philox_multiply(x[0], 0xd2511f53u), b = philox_multiply(x[2], 0xcd9e8d57u);
    x[0] = b.high ^ x[1] ^ round_key(0, round);
    x[2] = a.high ^ x[3] ^ round_key(1, round);
    x[1] = b.low;
    x[3] = a.low;
  }
}

}  // namespace fmkernels
