// SPDX-License-Identifier: Apache-2.0
// From the sums of a tile of tile_cuda.h to its elements: through shared memory, so that a thread finishes and stores 16 bytes
// of a line of the result, whichever way that lies.
#pragma once

#include "tile_cuda.h"

namespace fmkernels {
namespace {

// ---- sums -----------------------------------------------------------------------------------------------------------

// Lines of a tile of sums in shared memory: its rows, or its columns where kTransposed. Places of 4 floats are permuted so
// that the lanes of a store, and those of a load of 8 neighbours each, stand on different banks. Every bit of at() is a sum,
// modulo 2, of bits of its arguments: at(x | y) is at(x) ^ at(y).
template <class T, bool kTransposed>
struct SumLines {
  static constexpr int kCount = kTransposed ? T::kColumns : T::kRows, kLength = kTransposed ? T::kRows : T::kColumns;
  static constexpr uint32_t kPlaces = kLength / 4, kLinesApart = kTransposed ? 2 : 1;  // of the lanes of a store

  // Of the element `along` of a line, in floats.
  static __device__ __forceinline__ uint32_t at(uint32_t line, uint32_t along) {
    const uint32_t place = line * kPlaces + along / 4;
    return (place ^ (place / (kPlaces * kLinesApart) % 4 * 2) ^ place / 8 % 2) * 4 + along % 4;
  }
};

template <class T, bool kTransposed>
__device__ __forceinline__ void store_sums(float* to, const Sums<T>& sums, int first_row, int first_column) {
  using L = SumLines<T, kTransposed>;
  auto at = [](int row, int column) { return kTransposed ? L::at(column, row) : L::at(row, column); };
  const int lane = ptx::tid_x() % kWarp;
  const uint32_t first = at(first_row + lane / 4, first_column + lane % 4 * 2);
  auto further = [&](int rows, int columns) {  // bits that are not among those of the lane's
    constexpr uint32_t kPermuted = 32;
    const uint32_t more = at(rows, columns);
    return to + (first ^ more % kPermuted) + more / kPermuted * kPermuted;
  };
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int rows = m * 16 + half * 8, columns = n * 8;
        const float x = sums[m][n][2 * half], y = sums[m][n][2 * half + 1];
        if constexpr (kTransposed) {
          *further(rows, columns) = x;
          *further(rows, columns + 1) = y;
        } else {
          *reinterpret_cast<float2*>(further(rows, columns)) = make_float2(x, y);
        }
      }
    }
  }
}

// Eight elements, rounded.
template <class Element>
__device__ __forceinline__ Vector<Element, kChunk> pack_chunk(const float (&x)[kChunk]) {
  uint4 words;
  words.x = ptx::pack<Element>(x[0], x[1]);
  words.y = ptx::pack<Element>(x[2], x[3]);
  words.z = ptx::pack<Element>(x[4], x[5]);
  words.w = ptx::pack<Element>(x[6], x[7]);
  Vector<Element, kChunk> chunk;
  memcpy(&chunk, &words, sizeof chunk);
  return chunk;
}

// f(line, along, x) for the chunks of a group's sums that this thread finishes, all at one place along their lines.
template <class L, class T, class F>
__device__ __forceinline__ void for_each_chunk(const float* sums, int thread, F&& f) {
  constexpr int kLineChunks = L::kLength / kChunk, kLines = T::kGroupThreads / kLineChunks;  // lines of a pass
  static_assert(kLines * L::kPlaces % (4 * L::kPlaces * L::kLinesApart) == 0 && kLines * L::kPlaces % 16 == 0,
                "a pass further the permutation is the same");
  const int along = thread % kLineChunks * kChunk;
  const uint32_t at = L::at(thread / kLineChunks, along);
#pragma unroll 1
  for (int line = thread / kLineChunks; line < L::kCount; line += kLines) {
    const float* from = sums + (line - thread / kLineChunks) * L::kLength;
    float x[kChunk];
    memcpy(x, __builtin_assume_aligned(from + at, 16), 16);
    memcpy(x + 4, __builtin_assume_aligned(from + (at ^ 4), 16), 16);
    f(line, along, x);
  }
}

}  // namespace
}  // namespace fmkernels
