// SPDX-License-Identifier: Apache-2.0
// Gated linear units: y = act(gate) * up, elementwise, of two tensors or of the halves of one.
//
//   silu       g * sigmoid(g)
//   gelu       g * Phi(g), Phi the distribution function of the normal distribution
//   gelu_tanh  g * (1 + tanh(w)) / 2 = g * sigmoid(2 w), w = sqrt(2 / pi) (g + 0.044715 g^3)
//   dgate = dy * up * act'(gate),  dup = dy * act(gate)
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/rows.h"
#include "../common/stream.h"

namespace fmkernels {

enum class GluActivation : int32_t { kSilu, kGelu, kGeluTanh };

// 2 w = g * (kTanhLinear + kTanhCubic * g^2) of gelu_tanh.
constexpr float kTanhLinear = 1.5957691216f, kTanhCubic = 0.0713548163f;
constexpr float kLargeSquare = 1e4f;  // of a g whose derivative is 1 or 0; a square of infinity would make it NaN
constexpr float kInverseSqrt2Pi = 0.3989422804f;

struct GluForwardParams {
  DType dtype;
  GluActivation activation;
  Rows rows;
  int64_t width;  // of gate, up and out
  RowView gate, up;
  RowView out;  // written; may be gate or up
};

struct GluBackwardParams {
  DType dtype;
  GluActivation activation;
  Rows rows;
  int64_t width;
  RowView grad, gate, up;
  RowView grad_gate, grad_up;  // written
};

template <Isa isa>
void run_glu_forward(const GluForwardParams& p);
template <Isa isa>
void run_glu_backward(const GluBackwardParams& p);

void launch_glu_forward(const GluForwardParams& p, cudaStream_t stream);
void launch_glu_backward(const GluBackwardParams& p, cudaStream_t stream);

}  // namespace fmkernels
