// SPDX-License-Identifier: Apache-2.0
// moe_gated_backward.cu: from the gradient of silu(g) u to those of g, of u and of the weights of the slots.
//
// Contract   see moe_gated.h. kVec elements are read at a time where every row begins on a 16-byte boundary, else one. Entries
//            of a mapping that lie outside the tensors are taken for -1.
// Work       a warp owns a row whole, because the gradient of its weight is a sum over it; the slot of a row is the k at which
//            its token names it.
// Shared     none.
// Numerics   float32; the order of the sum is that of the lanes, which follows from the width alone. Deterministic.
// Cost       bound by memory: 3 rows of width read and 3 written, or 2 without weights.

#include "moe_gated.h"

#include "../common/launch.h"
#include "../common/sigmoid_cuda.h"
#include "../common/vector_cuda.h"
#include "moe_slots_cuda.h"

namespace fmkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

struct Slot {
  int64_t token;
  int k;  // -1: none
};

// The slot of a row; without weights any one where the row has a token. In every lane of the warp.
__device__ __forceinline__ Slot slot_of(const MoeGatedBackwardParams& p, int row) {
  if (p.pos_to_token == nullptr) return {0, 0};
  const int token = p.pos_to_token[row];
  if (p.weights == nullptr) return {0, token < 0 ? -1 : 0};
  if (!is_within(token, p.num_tokens)) return {0, -1};
  return {token, choice_of(p.token_topk_to_pos + token * p.num_topk, static_cast<int>(p.num_topk), row)};
}

// kOwn gates and as many ups of a row: two vectors or, in turns, one.
template <class T, int kVec, bool kIsInterleaved>
class GateUp {
 public:
  // Neighbours in a row are neighbours in a warp, whichever way they lie.
  static constexpr int kOwn = kIsInterleaved && kVec > 1 ? kVec / 2 : kVec;

  __device__ __forceinline__ T& gate(int i) { return at(0, i); }
  __device__ __forceinline__ T& up(int i) { return at(1, i); }
  __device__ __forceinline__ void load(const T* row, int64_t v, int64_t width) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) vectors_[i] = load_vector<T, kVec>(row + column_of(i, v, width));
  }
  __device__ __forceinline__ void store(T* row, int64_t v, int64_t width) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) store_vector<T, kVec>(row + column_of(i, v, width), vectors_[i]);
  }

 private:
  static constexpr int kVectors = 2 * kOwn / kVec;

  static __device__ __forceinline__ int64_t column_of(int vector, int64_t v, int64_t width) {
    return kIsInterleaved ? 2 * v * kOwn + vector * kVec : vector * width + v * kVec;
  }
  __device__ __forceinline__ T& at(int which, int i) {
    const int place = kIsInterleaved ? 2 * i + which : which * kVec + i;
    return vectors_[place / kVec].lane[place % kVec];
  }

  Vector<T, kVec> vectors_[kVectors];
};

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) moe_gated_backward_kernel(MoeGatedBackwardParams p) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (row >= p.num_rows) return;  // whole warps: the votes and sums below need all lanes of one
  const int lane = threadIdx.x % kWarp;
  const Slot slot = slot_of(p, static_cast<int>(row));
  const T* grad = static_cast<const T*>(p.grad_inner) + row * p.grad_stride;
  const T* gate_up = static_cast<const T*>(p.gate_up) + row * 2 * p.width;
  T* grad_gate_up = static_cast<T*>(p.grad_gate_up) + row * 2 * p.width;
  T* inner = p.inner == nullptr ? nullptr : static_cast<T*>(p.inner) + row * p.width;

  if (slot.k < 0) {
    for (int64_t at = lane * kVec; at < 2 * p.width; at += kWarp * kVec) store_vector<T, kVec>(grad_gate_up + at, {});
    for (int64_t at = lane * kVec; inner != nullptr && at < p.width; at += kWarp * kVec) {
      store_vector<T, kVec>(inner + at, {});
    }
    return;
  }
  const float weight = p.weights == nullptr ? 1.0f : p.weights[slot.token * p.weights_stride + slot.k];
  float sum = 0.0f;
  auto run = [&]<bool kIsInterleaved>() {
    using Both = GateUp<T, kVec, kIsInterleaved>;
    constexpr int kOwn = Both::kOwn;
#pragma unroll 1
    for (int64_t v = lane; v * kOwn < p.width; v += kWarp) {
      const auto d = load_vector<T, kOwn>(grad + v * kOwn);
      Both x, grad_x;
      Vector<T, kOwn> unit;
      x.load(gate_up, v, p.width);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const float g = to_float(x.gate(i)), u = to_float(x.up(i)), dy = to_float(d.lane[i]), scaled = weight * dy;
        const Sigmoid s = sigmoid(g);
        const float silu = g * s.value;
        grad_x.gate(i) = from_float<T>(scaled * u * (s.value * (1.0f + g * s.rest)));
        grad_x.up(i) = from_float<T>(scaled * silu);
        unit.lane[i] = from_float<T>(weight * (silu * u));
        sum += dy * (silu * u);
      }
      grad_x.store(grad_gate_up, v, p.width);
      if (inner != nullptr) store_vector<T, kOwn>(inner + v * kOwn, unit);
    }
  };
  p.is_interleaved ? run.template operator()<true>() : run.template operator()<false>();
  if (p.weights == nullptr) return;
  sum = warp_sum(sum);
  if (lane == 0) p.grad_weights[slot.token * p.num_topk + slot.k] = sum;
}

}  // namespace

void launch_moe_gated_backward(const MoeGatedBackwardParams& p, cudaStream_t stream) {
  const char* name = "moe_gated_backward";
  bool aligned = is_aligned_16(p.grad_inner, element_bytes(p.dtype), p.width, {p.grad_stride});
  for (const void* t : {p.gate_up, static_cast<const void*>(p.grad_gate_up), static_cast<const void*>(p.inner)}) {
    aligned = aligned && is_aligned_16(t, element_bytes(p.dtype), p.width, {});
  }
  dispatch_vector(p.dtype, aligned, [&]<class T, int kVec>() {
    launch(name, moe_gated_backward_kernel<T, kVec>, grid_of(name, p.num_rows, kWarps), kThreads, 0, stream, p);
  });
}

}  // namespace fmkernels
