// SPDX-License-Identifier: Apache-2.0
// Vectors of up to 16 bytes in global memory on CUDA, as floats, and what all lanes of a warp find together.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "dispatch.h"
#include "dtype.h"
#include "ptx.h"

namespace fmkernels {

template <class T, int kVec>
struct alignas(sizeof(T) * kVec <= 16 ? sizeof(T) * kVec : 16) Vector {
  T lane[kVec];
};

// Whether rows of `width` elements at these strides, in elements, can be read 16 bytes at a time.
inline bool is_aligned_16(const void* data, int64_t bytes, int64_t width, std::initializer_list<int64_t> strides) {
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && width * bytes % 16 == 0;
  for (const int64_t stride : strides) aligned = aligned && stride * bytes % 16 == 0;
  return aligned;
}

// Calls f.template operator()<T, kVec>(): 16 bytes at a time where all is aligned, else one element.
template <class F>
void dispatch_vector(DType dtype, bool aligned, F&& f) {
  dispatch_dtype(dtype, [&]<class T>() {
    if (aligned) f.template operator()<T, 16 / sizeof(T)>();
    else f.template operator()<T, 1>();
  });
}

// 16 bytes move as one word, stored by an intrinsic: the compiler splits an ordinary assignment, and does not always join
// it again. Loads do not take the read-only path, since an output may be an input.
template <class T, int kVec>
__device__ __forceinline__ Vector<T, kVec> load_vector(const T* from) {
  Vector<T, kVec> vector;
  if constexpr (sizeof vector % sizeof(uint4) == 0) {
    constexpr int kWords = sizeof vector / sizeof(uint4);
    uint4 words[kWords];
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
    memcpy(&vector, words, sizeof vector);
  } else {
    vector = *reinterpret_cast<const Vector<T, kVec>*>(from);
  }
  return vector;
}
template <class T, int kVec>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, kVec>& vector) {
  if constexpr (sizeof vector % sizeof(uint4) == 0) {
    constexpr int kWords = sizeof vector / sizeof(uint4);
    uint4 words[kWords];
    memcpy(words, &vector, sizeof vector);
    for (int i = 0; i < kWords; ++i) __stwb(reinterpret_cast<uint4*>(to) + i, words[i]);
  } else {
    *reinterpret_cast<Vector<T, kVec>*>(to) = vector;
  }
}

// Sum over the lanes of a warp, in the same order on every run; every lane holds the result.
__device__ __forceinline__ float warp_sum(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(ptx::kAllLanes, x, step);
  return x;
}

// The largest x of a warp, in a register that the compiler knows to be the same in every lane: branches on it do not diverge.
__device__ __forceinline__ int uniform(int x) { return __reduce_max_sync(ptx::kAllLanes, x); }

}  // namespace fmkernels
