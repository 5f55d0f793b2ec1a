// SPDX-License-Identifier: Apache-2.0
// lora.cu: the CUDA kernels of lora_shrink and lora_expand.
//
// Contract   see lora.h. kVec elements are read at a time where every row begins on a 16-byte boundary, else one.
// Work       shrink: a warp owns a (token, rank), a sum over in_features. expand: a warp owns a token and 32 features,
//            kGroup lanes a feature, in kGroup turns, after which lane i has feature i: stores are whole.
// Shared     none.
// Numerics   float32, sums in a fixed order of lanes. Deterministic, and the same for a token in any batch.
// Cost       Bound by the bytes of the adapters: rank * (in + out) elements a token, in cache for tokens of one adapter.

#include "lora.h"

#include "../common/dispatch.h"
#include "../common/launch.h"
#include "../common/ptx.h"
#include "../common/vector_cuda.h"

namespace fmkernels {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;
constexpr int64_t kMaxGridY = 65535;

// Elements of a row as floats, kVec at a time.
template <class T, int kVec>
struct Floats {
  float lane[kVec];
};
template <class T, int kVec>
__device__ __forceinline__ Floats<T, kVec> load_floats(const T* from) {
  Floats<T, kVec> result;
  T elements[kVec];
  if constexpr (kVec == 1) {
    elements[0] = *from;
  } else {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
    memcpy(elements, &bits, sizeof bits);
  }
  for (int i = 0; i < kVec; ++i) result.lane[i] = to_float(elements[i]);
  return result;
}

// The adapter of a token; -1 for what is none.
__device__ __forceinline__ int32_t adapter_of(const Adapters& a, int64_t token) {
  const int32_t adapter = a.idx[token * a.idx_stride];
  return adapter >= 0 && adapter < a.num_adapters ? adapter : -1;
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) lora_shrink_kernel(LoraShrinkParams p) {
  const int lane = threadIdx.x % kWarp;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp, rank = p.adapters.rank;
  const int64_t token = item / rank, r = item % rank;
  if (token >= p.adapters.num_tokens) return;  // whole warps: the shuffles below need all lanes of one
  const int32_t adapter = adapter_of(p.adapters, token);
  if (adapter < 0) {
    if (lane == 0) p.h[item] = 0.0f;
    return;
  }
  const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
  const T* a = static_cast<const T*>(p.a) + adapter * p.a_stride[0] + r * p.a_stride[1];
  float sum[kVec] = {};
#pragma unroll 4
  for (int64_t c = lane * kVec; c < p.in_features; c += kWarp * kVec) {
    const auto left = load_floats<T, kVec>(x + c), right = load_floats<T, kVec>(a + c);
    for (int i = 0; i < kVec; ++i) sum[i] += left.lane[i] * right.lane[i];
  }
  float total = sum[0];
  for (int i = 1; i < kVec; ++i) total += sum[i];
  total = warp_sum(total);
  if (lane == 0) p.h[item] = total;
}

struct ExpandKernelParams : LoraExpandParams {
  int group;  // lanes of a feature: a power of two, at most kWarp
};

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) lora_expand_kernel(ExpandKernelParams p) {
  const int lane = threadIdx.x % kWarp;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * kWarp;
  if (first >= p.out_features) return;
  constexpr int kSteps = kVec == 1 ? kMaxRank / kWarp : 1;  // of a group along a row: 32 vectors are any row
  const int64_t feature = first + lane, rank = p.adapters.rank;
  const int features_a_turn = kWarp / p.group, in_group = lane % p.group;

  for (int64_t token = blockIdx.y; token < p.adapters.num_tokens; token += gridDim.y) {
    const int32_t adapter = adapter_of(p.adapters, token);
    float h[kSteps][kVec];  // the columns of this lane
    for (int i = 0; i < kSteps; ++i) {
      const int64_t r = (i * p.group + in_group) * kVec;
      for (int j = 0; j < kVec; ++j) h[i][j] = adapter >= 0 && r < rank ? p.h[token * p.h_stride + r + j] : 0.0f;
    }
    float delta = 0.0f;
    for (int turn = 0; adapter >= 0 && turn < p.group; ++turn) {
      const int64_t n = first + turn * features_a_turn + lane / p.group;
      const T* b = static_cast<const T*>(p.b) + adapter * p.b_stride[0] + n * p.b_stride[1];
      float sum = 0.0f;
      for (int i = 0; i < kSteps; ++i) {
        const int64_t r = (i * p.group + in_group) * kVec;
        if (n >= p.out_features || r >= rank) continue;
        const auto row = load_floats<T, kVec>(b + r);
        for (int j = 0; j < kVec; ++j) sum += row.lane[j] * h[i][j];
      }
      for (int step = p.group / 2; step > 0; step /= 2) sum += __shfl_xor_sync(ptx::kAllLanes, sum, step);
      // Every lane of a group has its sum: lane i keeps that of feature i when its turn comes.
      const float mine = __shfl_sync(ptx::kAllLanes, sum, lane % features_a_turn * p.group);
      if (lane / features_a_turn == turn) delta = mine;
    }
    if (feature >= p.out_features) continue;
    const T* base = static_cast<const T*>(p.base) + token * p.base_stride;
    T y = base[feature];
    if (adapter >= 0) y = from_float<T>(to_float(y) + (p.scale == nullptr ? 1.0f : p.scale[adapter]) * delta);
    static_cast<T*>(p.y)[token * p.out_features + feature] = y;
  }
}

}  // namespace

void launch_lora_shrink(const LoraShrinkParams& p, cudaStream_t stream) {
  const int64_t bytes = element_bytes(p.dtype), num_items = p.adapters.num_tokens * p.adapters.rank;
  const bool aligned = is_aligned_16(p.x, bytes, p.in_features, {p.x_stride}) &&
                       is_aligned_16(p.a, bytes, p.in_features, {p.a_stride[0], p.a_stride[1]});
  dispatch_vector(p.dtype, aligned, [&]<class T, int kVec>() {
    launch("lora_shrink", lora_shrink_kernel<T, kVec>, grid_of("lora_shrink", num_items, kWarps), kThreads, 0, stream,
           p);
  });
}

void launch_lora_expand(const LoraExpandParams& params, cudaStream_t stream) {
  const int64_t bytes = element_bytes(params.dtype), rank = params.adapters.rank;
  const bool aligned = is_aligned_16(params.b, bytes, rank, {params.b_stride[0], params.b_stride[1]});
  dispatch_vector(params.dtype, aligned, [&]<class T, int kVec>() {
    ExpandKernelParams p{params, 1};
    while (p.group * kVec < rank && p.group < kWarp) p.group *= 2;
    const int64_t num_tokens = p.adapters.num_tokens, per_block = kWarps * kWarp;
    const dim3 grid(static_cast<unsigned>((p.out_features + per_block - 1) / per_block),
                    static_cast<unsigned>(num_tokens < kMaxGridY ? num_tokens : kMaxGridY));
    launch("lora_expand", lora_expand_kernel<T, kVec>, grid, kThreads, 0, stream, p);
  });
}

}  // namespace fmkernels
