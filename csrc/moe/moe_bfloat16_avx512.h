// SPDX-License-Identifier: Apache-2.0
// bfloat16 in vectors of AVX-512: a part of one, and the pairs that two rows make. Internal linkage, as in vec.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../common/dtype.h"

namespace fmkernels {
namespace {

constexpr int64_t kVector = 32;  // elements

// The first `count` of 32 lanes: none below 0, all from 32 on.
inline __mmask32 first_lanes(int64_t count) {
  return count >= kVector ? ~__mmask32{0} : count <= 0 ? 0 : (__mmask32{1} << count) - 1;
}

// The pairs of the elements of two rows at 16 places, and at the next 16.
struct RowPairs {
  __m512i of_low, of_high;

  RowPairs() {
    alignas(64) uint16_t low[kVector], high[kVector];
    for (int i = 0; i < kVector; ++i) {
      low[i] = static_cast<uint16_t>(i / 2 + i % 2 * kVector);
      high[i] = static_cast<uint16_t>(16 + i / 2 + i % 2 * kVector);
    }
    of_low = _mm512_load_si512(low);
    of_high = _mm512_load_si512(high);
  }
  __m512i low(__m512i first, __m512i second) const { return _mm512_permutex2var_epi16(first, of_low, second); }
  __m512i high(__m512i first, __m512i second) const { return _mm512_permutex2var_epi16(first, of_high, second); }
};

}  // namespace
}  // namespace fmkernels
