// SPDX-License-Identifier: Apache-2.0
// What paged_kv attend does with stored numbers, which become halves on their way from shared memory to fragments, and the
// places that follow from it. Included by paged_kv_attend_warp_cuda.h.
//
// ldmatrix moves pairs of bytes as if they were halves. Of the keys a lane gets columns 4t .. 4t+3 of 16, which stand for
// k = 2t, 2t+1, 2t+8, 2t+9 of a fragment; the order of k is free, so q is read in the same order. Of the transposed values
// a register holds columns 2g, 2g+1 of the keys 2t, 2t+1: the even columns are one tile of the product, the odd ones
// another.
#pragma once

#include "paged_kv_attend_tile_cuda.h"

namespace fmkernels {
namespace {

// ---- unpacking ------------------------------------------------------------------------------------------------------

// Bytes i and j of a register as two numbers; exact.
template <class Element, class Stored, int i, int j>
__device__ __forceinline__ uint32_t unpack(uint32_t bytes) {
  constexpr bool kHalf = std::is_same_v<Element, Half>;
  if constexpr (std::is_same_v<Stored, Int8> && kHalf) {
    // 1024 + the byte, its sign flipped, are the bits 0x64 and the byte.
    const uint32_t shifted = __byte_perm(bytes ^ 0x80808080u, 0x64646464u, 0x4040 | j << 8 | i);
    return ptx::fma_x2<Half>(shifted, 0x3c003c00u, 0xe480e480u);  // - 1152
  } else if constexpr (std::is_same_v<Stored, Int8>) {
    // 128 + the low seven bits, less 128 or, of a negative one, 256.
    const uint32_t shifted = __byte_perm(bytes, 0x43434343u, 0x4040 | j << 8 | i);
    return ptx::fma_x2<BFloat16>(shifted & 0xff80ff80u, 0xbf80bf80u, shifted & 0xff7fff7fu);
  } else {
    // The bits of a byte in the upper places of a half stand for a number that is smaller by a power of two, subnormals
    // included. NaN stands for one and seven eighths of the largest power: a product with which only it overflows.
    const uint32_t upper = __byte_perm(bytes, 0, 0x0404 | j << 12 | i << 4), sign = upper & 0x80008000u;
    constexpr uint32_t kToRange = kHalf ? 0x5c005c00u : 0x7b807b80u;  // 2^8, 2^120
    const uint32_t small = sign | (kHalf ? upper >> 1 & 0x3f803f80u : upper >> 4 & 0x07f007f0u);
    const uint32_t x = ptx::fma_x2<Element>(small, kToRange, 0);
    const uint32_t overflown =
        kHalf ? ptx::fma_x2<Element>(small, 0x78657865u, 0) : ptx::fma_x2<Element>(x, 0x7b0d7b0du, 0);
    return ptx::fma_x2<Element>(overflown, 0, x);
  }
}

// ---- queries and keys -----------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ uint32_t lane_of_queries() {
  const int lane = threadIdx.x % kWarp;
  if constexpr (T::kQuantized) return swizzled<T>(lane / 4, lane % 4 / 2) + lane % 2 * 8;
  else return lane_offset<T>(true);
}
// The fragment of q of 16 rows and the columns [16 * step, 16 * step + 16).
template <class T, int step>
__device__ __forceinline__ void load_queries(uint32_t (&a)[4], uint32_t q_at) {
  const Columns<T, false> columns{q_at};
  if constexpr (T::kQuantized) {
    const uint32_t at = columns.template of<step>() + kFragmentOffset<T, 0, step>;
    for (int half = 0; half < 2; ++half) {
      const uint2 x = *static_cast<const uint2*>(__cvta_shared_to_generic(at + half * 8 * T::kRowBytes));
      a[half] = x.x, a[2 + half] = x.y;
    }
  } else {
    load_fragment<T, 0, step>(a, columns);
  }
}
template <class T>
__device__ __forceinline__ void unpack_keys(uint32_t (&b)[2], uint32_t bytes) {
  b[0] = unpack<typename T::Element, typename T::Stored, 0, 1>(bytes);
  b[1] = unpack<typename T::Element, typename T::Stored, 2, 3>(bytes);
}

// ---- weights and values ---------------------------------------------------------------------------------------------

// Weights of 16 keys as the left operand of a product with values. They are halves of the type of q; where a cache has
// scales for each token, weights times scales, whose range a float16 lacks: then they are bfloat16, two for one weight.
template <class T>
using Weights = uint32_t[T::kWeightTerms][4];

// The accumulators of two tiles of scores as such a fragment.
template <class T>
__device__ __forceinline__ void pack_weights(Weights<T>& p, const float (&left)[4], const float (&right)[4]) {
  using Weight = typename T::Weight;
  const auto pack_pair = [&](int i, float x, float y) {
    p[0][i] = ptx::pack<Weight>(x, y);
    if constexpr (T::kWeightTerms == 2)
      p[1][i] = ptx::pack<Weight>(x - float_from_bits(p[0][i] << 16), y - float_from_bits(p[0][i] & 0xffff0000u));
  };
  pack_pair(0, left[0], left[1]);
  pack_pair(1, left[2], left[3]);
  pack_pair(2, right[0], right[1]);
  pack_pair(3, right[2], right[3]);
}

template <class T>
__device__ __forceinline__ void multiply_weights(float (&o)[4], const Weights<T>& p, uint32_t b0, uint32_t b1) {
  static_for<T::kWeightTerms>(
      [&]<int i>() { ptx::mma_m16n8k16<typename T::Weight>(o, p[T::kWeightTerms - 1 - i], b0, b1); });
}

// o += p v for the keys [16 * step, 16 * step + 16) of a block; v_at: the lane's place in the first fragment of values.
template <class T, int step>
__device__ __forceinline__ void add_values(float (&o)[T::kColumnTiles][4], const Weights<T>& p, uint32_t v_at) {
  using Cache = typename T::Cache;
  const Columns<Cache, false> values{v_at};
  constexpr int kLoads = (T::kWarpColumns * Cache::kElementBytes + 31) / 32;  // of 32 bytes of each key
  static_for<kLoads>([&]<int load>() {
    uint32_t b[4];
    ptx::ldmatrix_x4_trans<kFragmentOffset<Cache, step * 16, load>>(b, values.template of<load>());
    if constexpr (!T::kQuantized) {
      multiply_weights<T>(o[2 * load], p, b[0], b[1]);
      multiply_weights<T>(o[2 * load + 1], p, b[2], b[3]);
    } else {
      using Weight = typename T::Weight;
      using Stored = typename T::Stored;
      static_for<(T::kWarpColumns >= 32 ? 2 : 1)>([&]<int i>() {
        const uint32_t low = b[2 * i], high = b[2 * i + 1];  // keys 0 .. 7 and 8 .. 15
        constexpr int n = 4 * load + 2 * i;
        multiply_weights<T>(o[n], p, unpack<Weight, Stored, 0, 2>(low), unpack<Weight, Stored, 0, 2>(high));
        multiply_weights<T>(o[n + 1], p, unpack<Weight, Stored, 1, 3>(low), unpack<Weight, Stored, 1, 3>(high));
      });
    }
  });
}

// Of the lane's accumulators of o of a row, numbers 2n and 2n+1 in the order of their columns, and where they stand among the
// columns of the warp.
template <class T>
__device__ __forceinline__ float2 pair_of(const float (&o)[T::kColumnTiles][4], int n, int half) {
  if constexpr (T::kQuantized) return {o[n & ~1][2 * half + n % 2], o[n | 1][2 * half + n % 2]};
  else return {o[n][2 * half], o[n][2 * half + 1]};
}
template <class T>
__device__ __forceinline__ int first_column() {
  return threadIdx.x % 4 * (T::kQuantized ? 4 : 2);
}
template <class T>
constexpr int to_column(int n) {  // from the first to that of pair n
  return T::kQuantized ? n / 2 * 16 + n % 2 * 2 : n * 8;
}

// ---- not finite -----------------------------------------------------------------------------------------------------

// sum, or something else than 0 where an element of a chunk is not finite: its product with zero is NaN.
template <class Stored>
__device__ __forceinline__ uint32_t add_nonfinite_stored(uint32_t sum, const uint4& chunk) {
  if constexpr (std::is_same_v<Stored, Float8E4M3>) {
    for (uint32_t word : {chunk.x, chunk.y, chunk.z, chunk.w})
      sum |= ((word & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
  } else if constexpr (!kIsQuantized<Stored>) {
    sum = add_nonfinite_of<Stored>(sum, chunk);
  }
  return sum;
}
// The elements of a chunk that are not finite become zeros.
template <class Stored>
__device__ __forceinline__ void zero_nonfinite_stored(void* chunk) {
  if constexpr (std::is_same_v<Stored, Float8E4M3>) {
    auto* bits = static_cast<uint8_t*>(chunk);
    for (int i = 0; i < 16; ++i) {
      if ((bits[i] & 0x7fu) == 0x7fu) bits[i] = 0;
    }
  } else if constexpr (!kIsQuantized<Stored>) {
    zero_nonfinite_of<Stored>(chunk);
  }
}

}  // namespace
}  // namespace fmkernels
