// SPDX-License-Identifier: Apache-2.0
// What becomes of the sums of a tile: scale, bias, activation, one rounding.
#pragma once

#include "../common/tile_sums_cuda.h"
#include "block_sparse.h"

namespace fmkernels {
namespace {

// ---- elements -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kRelu: return x < 0.0f ? 0.0f : x;  // NaN stays
    case Activation::kGelu: return x * (0.5f * erfcf(x * -0.70710678f));
    case Activation::kSilu: return x / (1.0f + expf(-x));
    default: return x;
  }
}

// Eight elements of a line of the result, rounded. They have one scale and bias, those of `feature`, or (kAlong) one each
// from there on, of which the first `count` exist.
template <class Element, bool kAlong>
__device__ __forceinline__ Vector<Element, kChunk> finish(const Epilogue& e, float (&x)[kChunk], int64_t feature,
                                                          int count) {
  auto apply = [&](const float* vector, auto&& f) {
    if (vector == nullptr) return;
    const float common = kAlong ? 0.0f : __ldg(vector + feature);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) f(x[i], kAlong ? (i < count ? __ldg(vector + feature + i) : 0.0f) : common);
  };
  apply(e.scale, [](float& sum, float scale) { sum *= scale; });
  apply(e.bias, [](float& sum, float bias) { sum += bias; });
  if (e.activation != Activation::kNone) {
#pragma unroll 1
    for (int i = 0; i < kChunk; ++i) {
      const float y = activate(e.activation, x[0]);  // a rotation: the index of a register is a constant
#pragma unroll
      for (int k = 0; k + 1 < kChunk; ++k) x[k] = x[k + 1];
      x[kChunk - 1] = y;
    }
  }
  return pack_chunk<Element>(x);
}

}  // namespace
}  // namespace fmkernels
