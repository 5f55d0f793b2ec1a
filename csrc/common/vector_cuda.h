// SPDX-License-Identifier: Apache-2.0
// Vectors of up to 16 bytes in global memory on CUDA, as floats, and sums over a warp.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"

namespace fmkernels {

constexpr int kWarpLanes = 32;

template <class T, int kVec>
struct alignas(sizeof(T) * kVec <= 16 ? sizeof(T) * kVec : 16) Vector {
  T lane[kVec];
};

// Whether rows of kVec-element vectors begin on 16-byte boundaries: the base, both strides and the length in elements.
inline bool is_aligned_16(const void* base, int64_t stride_a, int64_t stride_b, int64_t row, int64_t element_bytes) {
  const int64_t vec = 16 / element_bytes;
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride_a % vec == 0 && stride_b % vec == 0 && row % vec == 0;
}

#ifdef __CUDACC__

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
  for (int step = kWarpLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

#endif

}  // namespace fmkernels
