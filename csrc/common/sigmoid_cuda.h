// SPDX-License-Identifier: Apache-2.0
// The logistic function on CUDA, exact to some units in the last place at both ends.
#pragma once

#include "ptx.h"

namespace fmkernels {

constexpr float kLog2E = 1.4426950409f;

// sigmoid(x) and 1 - sigmoid(x), neither by a difference.
struct Sigmoid {
  float value, rest;
};
__device__ __forceinline__ Sigmoid sigmoid(float x) {
  const float e = ptx::ex2(-fabsf(x) * kLog2E), large = ptx::rcp(1.0f + e), small = e * large;
  return x > 0.0f ? Sigmoid{large, small} : Sigmoid{small, large};
}

}  // namespace fmkernels
