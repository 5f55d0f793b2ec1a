// SPDX-License-Identifier: Apache-2.0
// Division by a number that is the same for a whole launch, as a multiplication: three instructions on a GPU, not twenty.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fmkernels {

// x / d and x % d for 0 <= x < 2^31, exactly. After Granlund and Montgomery 1994, figure 4.1.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int32_t value) : value_(value) {  // > 0
    while (int64_t{1} << shift_ < value) ++shift_;
    const uint64_t above = (uint64_t{1} << shift_) - static_cast<uint64_t>(value);
    multiplier_ = static_cast<uint32_t>((above << 32) / static_cast<uint64_t>(value) + 1);
  }
  FM_HOST_DEVICE int32_t value() const { return value_; }
  friend FM_HOST_DEVICE int32_t operator/(int32_t x, const Divisor& d) {
    const uint32_t high = static_cast<uint32_t>(uint64_t{static_cast<uint32_t>(x)} * d.multiplier_ >> 32);
    return static_cast<int32_t>((high + static_cast<uint32_t>(x)) >> d.shift_);
  }
  friend FM_HOST_DEVICE int32_t operator%(int32_t x, const Divisor& d) { return x - x / d * d.value_; }

 private:
  int32_t value_ = 1;
  uint32_t multiplier_ = 1, shift_ = 0;
};

}  // namespace fmkernels
