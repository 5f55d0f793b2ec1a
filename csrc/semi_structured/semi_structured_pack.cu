// SPDX-License-Identifier: Apache-2.0
// semi_structured_pack.cu: the mask of a 2:4 matrix, and the packed form.
//
// Contract   see semi_structured.h. Any strides of rows; four elements are read at a time where all of them are
//            aligned.
// Work       mask: a thread owns four neighbours of a row, or a tile of 4 x 4. pack: a warp owns a row tile in a column
//            block, a lane one word of metadata: 16 columns of rows g and g + 8.
// Shared     none.
// Numerics   Magnitudes in float32, an eighth of them, so that their sums are finite; the same sums as on the CPU, in
//            the same order, so the same masks. Deterministic.
// Cost       bound by memory: x once, a byte an element of mask, half of x and an eighth of a byte an element of the
//            result.

#include "../common/dispatch.h"
#include "../common/launch.h"
#include "../common/ptx.h"
#include "../common/vector_cuda.h"
#include "semi_structured.h"

namespace fmkernels {
namespace {

constexpr int kThreads = 256;

// Four neighbours from memory, in one access where they are aligned.
template <class T>
__device__ __forceinline__ Vector<T, 4> load_four(const T* from, bool is_aligned) {
  if (is_aligned) return load_vector<T, 4>(from);
  Vector<T, 4> four;
#pragma unroll
  for (int i = 0; i < 4; ++i) four.lane[i] = from[i];
  return four;
}

__device__ __forceinline__ uint32_t magnitude_bits(float x) {
  return min(__float_as_uint(x) & 0x7fffffffu, kLargestFinite);
}

// A byte for each of four bits.
__device__ __forceinline__ uint32_t bytes_of(uint32_t kept) {
  return (kept & 1u) | (kept & 2u) << 7 | (kept & 4u) << 14 | (kept & 8u) << 21;
}

struct MaskArgs {
  SemiStructuredMaskParams p;
  bool is_aligned;
};

template <class T>
__global__ void __launch_bounds__(kThreads) semi_structured_groups_kernel(MaskArgs args) {
  const SemiStructuredMaskParams& p = args.p;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, groups = p.columns / 4;
  if (index >= p.rows * groups) return;
  const T* x = static_cast<const T*>(p.x) + index / groups * p.row_stride + index % groups * 4;
  const auto four = load_four(x, args.is_aligned);
  uint32_t magnitude[4], kept = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) magnitude[i] = magnitude_bits(to_float(four.lane[i]));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int ahead = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) ahead += k < i ? magnitude[k] >= magnitude[i] : magnitude[k] > magnitude[i];
    kept |= (ahead < 2 ? 1u : 0u) << i;
  }
  reinterpret_cast<uint32_t*>(p.mask)[index] = bytes_of(kept);
}

template <class T>
__global__ void __launch_bounds__(kThreads) semi_structured_tiles_kernel(MaskArgs args) {
  const SemiStructuredMaskParams& p = args.p;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, groups = p.columns / 4;
  if (index >= p.rows / 4 * groups) return;
  const int64_t row = index / groups * 4, group = index % groups;
  float pairs[4][6];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const auto four = load_four(static_cast<const T*>(p.x) + (row + r) * p.row_stride + group * 4, args.is_aligned);
    float eighth[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) eighth[i] = __uint_as_float(magnitude_bits(to_float(four.lane[i]))) * 0.125f;
    int pair = 0;
#pragma unroll
    for (int first = 0; first < 3; ++first) {
#pragma unroll
      for (int second = first + 1; second < 4; ++second) pairs[r][pair++] = eighth[first] + eighth[second];
    }
  }
  constexpr TileWays kWays;
  float best = -1.0f;
  uint32_t chosen = 0;  // what is kept, four bits a row
#pragma unroll
  for (int way = 0; way < TileWays::kCount; ++way) {
    const float sum = (pairs[0][kWays.pair[way][0]] + pairs[1][kWays.pair[way][1]]) +
                      (pairs[2][kWays.pair[way][2]] + pairs[3][kWays.pair[way][3]]);
    chosen = sum > best ? kWays.kept[way] : chosen;
    best = sum > best ? sum : best;
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    reinterpret_cast<uint32_t*>(p.mask)[(row + r) * groups + group] = bytes_of(chosen >> 4 * r & 15u);
  }
}

struct PackArgs {
  SemiStructuredPackParams p;
  bool is_aligned, mask_is_aligned;
};

// Of a transpose nothing is aligned: the columns of the packed matrix are not neighbours in x.
template <class T>
__global__ void __launch_bounds__(kThreads) semi_structured_pack_kernel(PackArgs args) {
  const SemiStructuredPackParams& p = args.p;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t tile = index / kTileWords, column_blocks = p.num_column_blocks();
  if (tile >= p.num_row_tiles() * column_blocks) return;
  const int lane = static_cast<int>(index % kTileWords);
  const int64_t column = tile % column_blocks * kColumnBlock + lane % 4 * kWordColumns;
  uint32_t word = 0x44444444u;  // of columns past the edge
  if (column < p.columns) {
    word = 0;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int64_t row = tile / column_blocks * kRowTile + lane / 4 + half * 8;
      const T* x = static_cast<const T*>(p.x) + row * p.row_stride + column * p.column_stride;
      const uint8_t* mask = p.mask + row * p.mask_row_stride + column * p.mask_column_stride;
      Vector<T, kWordColumns> of_row;
      Vector<uint8_t, kWordColumns> wanted;
      if (args.is_aligned) {
        of_row = load_vector<T, kWordColumns>(x);
      } else {
#pragma unroll
        for (int i = 0; i < kWordColumns; ++i) of_row.lane[i] = x[i * p.column_stride];
      }
      if (args.mask_is_aligned) {
        wanted = load_vector<uint8_t, kWordColumns>(mask);
      } else {
#pragma unroll
        for (int i = 0; i < kWordColumns; ++i) wanted.lane[i] = mask[i * p.mask_column_stride];
      }
      Vector<T, kWordColumns / 2> values;  // 16-byte stores, two of them in float32
#pragma unroll
      for (int group = 0; group < kWordColumns; group += 4) {
        uint32_t kept = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) kept |= (wanted.lane[group + i] ? 1u : 0u) << i;
        const uint32_t two = places_of(kept);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t place = two >> 2 * i & 3u;
          const T value = place < 2 ? (place == 0 ? of_row.lane[group] : of_row.lane[group + 1])
                                    : (place == 2 ? of_row.lane[group + 2] : of_row.lane[group + 3]);
          values.lane[group / 2 + i] = kept >> place & 1u ? value : from_float<T>(0.0f);
        }
        word |= two << (16 * half + group);
      }
      store_vector<T, kWordColumns / 2>(static_cast<T*>(p.values) + (row * p.columns + column) / 2, values);
    }
  }
  p.metadata[index] = word;
}

// Whether every four neighbours of rows at this stride, in elements, can be read at a time.
bool is_aligned_4(const void* data, int64_t bytes, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(4 * bytes) == 0 && row_stride % 4 == 0;
}

}  // namespace

void launch_semi_structured_mask(const SemiStructuredMaskParams& p, cudaStream_t stream) {
  const MaskArgs args{p, is_aligned_4(p.x, element_bytes(p.dtype), p.row_stride)};
  dispatch_dtype(p.dtype, [&]<class T>() {
    const int64_t items = p.rows * p.columns / (p.both_directions ? 16 : 4);
    const dim3 grid = grid_of("semi_structured_mask", items, kThreads);
    const auto kernel = p.both_directions ? semi_structured_tiles_kernel<T> : semi_structured_groups_kernel<T>;
    launch("semi_structured_mask", kernel, grid, kThreads, 0, stream, args);
  });
}

void launch_semi_structured_pack(const SemiStructuredPackParams& p, cudaStream_t stream) {
  const bool in_order = p.column_stride == 1 && p.mask_column_stride == 1;
  const PackArgs args{p, in_order && is_aligned_16(p.x, element_bytes(p.dtype), p.columns, {p.row_stride}),
                      in_order && is_aligned_16(p.mask, 1, p.columns, {p.mask_row_stride})};
  const int64_t num_words = p.num_row_tiles() * p.num_column_blocks() * kTileWords;
  dispatch_dtype(p.dtype, [&]<class T>() {
    launch("semi_structured_pack", semi_structured_pack_kernel<T>, grid_of("semi_structured_pack", num_words, kThreads),
           kThreads, 0, stream, args);
  });
}

}  // namespace fmkernels
