// SPDX-License-Identifier: Apache-2.0
// glu.cu: the CUDA kernels of the gated linear units, forward and backward.
//
// Contract   see glu.h. kVec elements are read at a time where every row, and the second half of packed ones, begins on a
//            16-byte boundary, else one.
// Work       A thread owns one vector of a row, so a block covers kThreads consecutive vectors.
// Shared     none.
// Numerics   float32. Deterministic.
// Cost       3 elements of memory an element forward, 5 backward: bound by memory on every GPU.

#include "glu.h"

#include "../common/dispatch.h"
#include "../common/launch.h"
#include "../common/sigmoid_cuda.h"
#include "../common/vector_cuda.h"

namespace fmkernels {
namespace {

constexpr int kThreads = 256;

// act(g) / g, and act'(g).
struct Gate {
  float factor, derivative;
};

template <GluActivation activation>
__device__ __forceinline__ Gate gate_of(float g) {
  if constexpr (activation == GluActivation::kSilu) {
    const Sigmoid s = sigmoid(g);
    return {s.value, s.value * (1.0f + g * s.rest)};
  } else if constexpr (activation == GluActivation::kGelu) {
    const float distribution = 0.5f * erfcf(g * -0.70710678f);
    return {distribution, distribution + g * (kInverseSqrt2Pi * ptx::ex2(g * g * (-0.5f * kLog2E)))};
  } else {
    const Sigmoid s = sigmoid(g * (kTanhLinear + kTanhCubic * (g * g)));
    const float slope = kTanhLinear + 3.0f * kTanhCubic * fminf(g * g, kLargeSquare);
    return {s.value, s.value + g * (s.value * s.rest) * slope};
  }
}

// f(activation as a constant), chosen once a vector: the memory of a vector takes longer than the choice.
template <class F>
__device__ __forceinline__ void with_activation(GluActivation activation, F&& f) {
  switch (activation) {
    case GluActivation::kSilu: return f.template operator()<GluActivation::kSilu>();
    case GluActivation::kGelu: return f.template operator()<GluActivation::kGelu>();
    case GluActivation::kGeluTanh: return f.template operator()<GluActivation::kGeluTanh>();
  }
}

// The row and first column of this thread's vector; false where there is none.
template <int kVec>
__device__ __forceinline__ bool find_vector(const Rows& rows, int64_t width, RowPlace& place, int64_t& column) {
  const int64_t vectors = width / kVec, index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool is_small = rows.count * vectors >> 31 == 0;
  const int64_t row = is_small ? static_cast<uint32_t>(index) / static_cast<uint32_t>(vectors) : index / vectors;
  if (row >= rows.count) return false;
  place = place_of(rows, row);
  column = (index - row * vectors) * kVec;
  return true;
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) glu_forward_kernel(GluForwardParams p) {
  RowPlace place;
  int64_t column;
  if (!find_vector<kVec>(p.rows, p.width, place, column)) return;
  const auto gate = load_vector<T, kVec>(row_of<T>(p.gate, place) + column);
  const auto up = load_vector<T, kVec>(row_of<T>(p.up, place) + column);
  Vector<T, kVec> out;
  with_activation(p.activation, [&]<GluActivation activation>() {
    for (int i = 0; i < kVec; ++i) {
      const float g = to_float(gate.lane[i]);
      out.lane[i] = from_float<T>(g * gate_of<activation>(g).factor * to_float(up.lane[i]));
    }
  });
  store_vector<T, kVec>(row_of<T>(p.out, place) + column, out);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) glu_backward_kernel(GluBackwardParams p) {
  RowPlace place;
  int64_t column;
  if (!find_vector<kVec>(p.rows, p.width, place, column)) return;
  const auto grad = load_vector<T, kVec>(row_of<T>(p.grad, place) + column);
  const auto gate = load_vector<T, kVec>(row_of<T>(p.gate, place) + column);
  const auto up = load_vector<T, kVec>(row_of<T>(p.up, place) + column);
  Vector<T, kVec> grad_gate, grad_up;
  with_activation(p.activation, [&]<GluActivation activation>() {
    for (int i = 0; i < kVec; ++i) {
      const float g = to_float(gate.lane[i]), dy = to_float(grad.lane[i]);
      const Gate a = gate_of<activation>(g);
      grad_gate.lane[i] = from_float<T>(dy * to_float(up.lane[i]) * a.derivative);
      grad_up.lane[i] = from_float<T>(dy * (g * a.factor));
    }
  });
  store_vector<T, kVec>(row_of<T>(p.grad_gate, place) + column, grad_gate);
  store_vector<T, kVec>(row_of<T>(p.grad_up, place) + column, grad_up);
}

bool are_aligned(DType dtype, int64_t width, std::initializer_list<const RowView*> views) {
  bool aligned = width * element_bytes(dtype) % 16 == 0;
  for (const RowView* view : views) aligned = aligned && rows_are_aligned(*view, element_bytes(dtype), 16);
  return aligned;
}

}  // namespace

void launch_glu_forward(const GluForwardParams& p, cudaStream_t stream) {
  const bool aligned = are_aligned(p.dtype, p.width, {&p.gate, &p.up, &p.out});
  dispatch_vector(p.dtype, aligned, [&]<class T, int kVec>() {
    launch("glu_forward", glu_forward_kernel<T, kVec>,
           grid_of("glu_forward", p.rows.count * (p.width / kVec), kThreads), kThreads, 0, stream, p);
  });
}

void launch_glu_backward(const GluBackwardParams& p, cudaStream_t stream) {
  const bool aligned = are_aligned(p.dtype, p.width, {&p.grad, &p.gate, &p.up, &p.grad_gate, &p.grad_up});
  dispatch_vector(p.dtype, aligned, [&]<class T, int kVec>() {
    launch("glu_backward", glu_backward_kernel<T, kVec>,
           grid_of("glu_backward", p.rows.count * (p.width / kVec), kThreads), kThreads, 0, stream, p);
  });
}

}  // namespace fmkernels
