// SPDX-License-Identifier: Apache-2.0
// The dropout of attention.h on the CPU: the keys of a group are four calls of Philox side by side, whose words then lie
// in the order of the keys. Internal linkage, as in common/vec.h.
#pragma once

#include "../common/philox_cpu.h"
#include "attention_rows_cpu.h"

namespace fmkernels {
namespace {

constexpr int kDropoutGroup = 32;  // keys of four calls
constexpr int kDropoutStep = 8;    // keys of one word of each

// Of kDropoutStep keys: all bits where a key is kept, none where it is dropped.
typedef int32_t DropoutBits __attribute__((vector_size(4 * kDropoutStep)));

FM_INLINE void mask(float* x, DropoutBits bits) {
  DropoutBits masked;
  memcpy(&masked, x, sizeof masked);
  masked &= bits;
  memcpy(x, &masked, sizeof masked);
}

class Dropout {
 public:
  explicit Dropout(const AttentionForwardParams& p) : threshold_(p.dropout_threshold << 16) {
    if (!is_on()) return;
    offset_ = static_cast<uint64_t>(p.dropout_rng[1]);
    keys_ = PhiloxKeys(static_cast<uint64_t>(p.dropout_rng[0]));
  }

  bool is_on() const { return threshold_ != 0; }

  // f(j, bits) for every kDropoutStep keys from block + j on: which of them this row keeps. `keys` are relative to
  // `block`, a multiple of kDropoutGroup, and whole groups are visited: j runs past both ends of them.
  template <class F>
  FM_INLINE void for_each_step(const AttentionForwardParams& p, const Sequence& s, int64_t row, int64_t block,
                               Range keys, F&& f) const {
    const uint64_t query = static_cast<uint64_t>(s.query(row));
    const uint64_t head = static_cast<uint64_t>(s.batch * p.heads + s.head(row));
    for (int64_t j = keys.begin / kDropoutGroup * kDropoutGroup; j < keys.end; j += kDropoutGroup) {
      const Philox64 call = Philox64{0, 1, 2, 3} + static_cast<uint64_t>((block + j) / kDropoutGroup * 4);
      PhiloxWords x[4] = {{call}, {Philox64{} + query}, {Philox64{} + head}, {Philox64{} + offset_}};
      philox(x, keys_);
#pragma GCC unroll 4
      for (int word = 0; word < 4; ++word) {
        // The 16 bits of an even key, and of the odd one after it, at the top of their lanes; what lies below them
        // changes no comparison.
        const Philox32 even = (Philox32)x[word].bits << 16, odd = (Philox32)(x[word].bits << 32);
        const Philox32 bits = __builtin_shuffle(even, odd, Philox32{0, 9, 2, 11, 4, 13, 6, 15});
        f(j + word * kDropoutStep, (DropoutBits)(bits >= threshold_));
      }
    }
  }

  // The weights of dropped keys become 0; weights[j] is that of the key block + j, as above.
  __attribute__((noinline)) void drop(const AttentionForwardParams& p, const Sequence& s, int64_t row, int64_t block,
                                      Range keys, float* weights) const {
    for_each_step(p, s, row, block, keys, [&](int64_t j, DropoutBits bits) { mask(weights + j, bits); });
  }

 private:
  PhiloxKeys keys_;
  uint64_t offset_ = 0;
  uint32_t threshold_;  // in the upper 16 bits
};

}  // namespace
}  // namespace fmkernels
