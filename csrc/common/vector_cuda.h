// SPDX-License-Identifier: Apache-2.0
// A few neighbouring elements that one thread of a GPU moves at once, 16 bytes where it can.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"

namespace fmkernels {

template <class T, int kVec>
struct alignas(sizeof(T) * kVec) Vector {
  T lane[kVec];
};

// 16 bytes move as one register quad: the compiler splits a struct of halves, and does not always join it again.
template <class T, int kVec>
__device__ __forceinline__ Vector<T, kVec> load_vector(const T* from) {
  Vector<T, kVec> vector;
  if constexpr (sizeof vector == sizeof(uint4)) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    memcpy(&vector, &bits, sizeof vector);
  } else {
    vector = *reinterpret_cast<const Vector<T, kVec>*>(from);
  }
  return vector;
}
template <class T, int kVec>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, kVec>& vector) {
  if constexpr (sizeof vector == sizeof(uint4)) {
    uint4 bits;
    memcpy(&bits, &vector, sizeof vector);
    __stwb(reinterpret_cast<uint4*>(to), bits);  // an assignment may be split again
  } else {
    *reinterpret_cast<Vector<T, kVec>*>(to) = vector;
  }
}

// Whether rows of kVec-element vectors begin on 16-byte boundaries: the base, both strides and the length in elements.
inline bool is_aligned_16(const void* base, int64_t stride_a, int64_t stride_b, int64_t row, int64_t element_bytes) {
  const int64_t vec = 16 / element_bytes;
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride_a % vec == 0 && stride_b % vec == 0 && row % vec == 0;
}

}  // namespace fmkernels
