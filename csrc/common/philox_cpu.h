// SPDX-License-Identifier: Apache-2.0
// Four calls of Philox side by side on the CPU. Internal linkage, as in vec.h.
#pragma once

#include "philox.h"
#include "vec.h"

namespace fmkernels {
namespace {

// 32 bytes whatever the instruction set: the compiler splits them where its registers are shorter.
typedef uint64_t Philox64 __attribute__((vector_size(32)));
typedef uint32_t Philox32 __attribute__((vector_size(32)));

// The words of four calls, each in the low half of 64 bits; the high halves hold anything.
struct PhiloxWords {
  Philox64 bits;
};
FM_INLINE PhiloxWords operator^(PhiloxWords a, PhiloxWords b) { return {a.bits ^ b.bits}; }
FM_INLINE PhiloxProduct<PhiloxWords> philox_multiply(PhiloxWords x, uint32_t factor) {
#ifdef __AVX2__  // the generic form below becomes three products
  const Philox64 product = (Philox64)_mm256_mul_epu32((__m256i)x.bits, _mm256_set1_epi64x(factor));
#else
  const Philox64 product = (x.bits & 0xffffffffu) * factor;
#endif
  return {{product >> 32}, {product}};
}

// The keys of the rounds.
struct PhiloxKeys {
  PhiloxWords at[10][2];

  PhiloxKeys() = default;
  explicit PhiloxKeys(uint64_t key) {
    for (int round = 0; round < 10; ++round) {
      for (int half = 0; half < 2; ++half) at[round][half].bits = Philox64{} + philox_round_key(key, half, round);
    }
  }
  FM_INLINE PhiloxWords operator()(int half, int round) const { return at[round][half]; }
};

}  // namespace
}  // namespace fmkernels
