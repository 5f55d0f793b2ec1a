// SPDX-License-Identifier: Apache-2.0
// The sigmoid of vectors, as kernels on the CPU share it. Internal linkage, as in vec.h.
#pragma once

#include "vec.h"

namespace fmkernels {
namespace {

FM_INLINE VecF choose(VecI condition, VecF yes, VecF no) { return condition ? yes : no; }

// sigmoid(x) and 1 - sigmoid(x), neither by a difference.
struct Sigmoid {
  VecF value, rest;
};
FM_INLINE Sigmoid sigmoid(VecF x) {
  const VecF e = exp(-absolute(x));
  const VecF large = 1.0f / (1.0f + e), small = e * large;
  const VecI is_positive = x > 0.0f;
  return {choose(is_positive, large, small), choose(is_positive, small, large)};
}

// x sigmoid(x). sigmoid(x) is 1 / (1 + exp(-x)) here: where exp overflows, a finite x gives 0, and -infinity NaN, as in torch.
FM_INLINE VecF silu(VecF x) { return x / (1.0f + exp(-x)); }

}  // namespace
}  // namespace fmkernels
