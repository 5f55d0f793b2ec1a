// SPDX-License-Identifier: Apache-2.0
// Rows on the CPU by two vectors at a time. Internal linkage, for the reason that vec.h gives.
//
// bfloat16 is unpacked into the elements at even places and those at odd ones, which is a shift and a mask, and is packed
// likewise: a third of the instructions of an unpacking in order. Sums and elementwise work need no order.
#pragma once

#include <type_traits>

#include "vec.h"

namespace fmkernels {
namespace {

constexpr int kPairLanes = 2 * kLanes;

struct VecPair {
  VecF a, b;
};

FM_INLINE VecPair operator+(VecPair x, VecPair y) { return {x.a + y.a, x.b + y.b}; }
FM_INLINE VecPair operator-(VecPair x, VecPair y) { return {x.a - y.a, x.b - y.b}; }
FM_INLINE VecPair operator*(VecPair x, VecPair y) { return {x.a * y.a, x.b * y.b}; }
FM_INLINE VecPair operator-(VecPair x, float y) { return {x.a - y, x.b - y}; }
FM_INLINE VecPair operator*(VecPair x, float y) { return {x.a * y, x.b * y}; }

// What a NaN may be that is rounded to bfloat16. One that arithmetic has made, or passed on from a bfloat16, has a 0
// lower half and survives the rounding of numbers; one from a float may not, and is looked for.
enum class Nan { kOfBFloat16, kAny };

// The bits of x rounded to bfloat16, in the upper half of each lane; what stands in the lower half is of no use.
template <Nan nan>
FM_INLINE VecU bfloat16_bits(VecF x) {
  const VecU bits = (VecU)x, rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  if constexpr (nan == Nan::kOfBFloat16) return rounded;
  else return x != x ? VecU{} + 0x7fff0000u : rounded;
}
// The upper halves of a at even places and those of b at odd ones.
FM_INLINE VecU join_upper_halves(VecU a, VecU b) {
#ifdef __AVX2__
  return (VecU)_mm256_blend_epi16((__m256i)(a >> 16), (__m256i)b, 0xaa);
#else
  return (a >> 16) | (b & 0xffff0000u);
#endif
}

// kPairLanes elements from p on, in the order of T.
template <class T>
FM_INLINE VecPair load_pair(const T* p) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    VecU bits;
    memcpy(&bits, p, sizeof bits);
    return {(VecF)(bits << 16), (VecF)(bits & 0xffff0000u)};
  } else {
    return {load(p), load(p + kLanes)};
  }
}
template <Nan nan = Nan::kAny, class T>
FM_INLINE void store_pair(T* p, VecPair x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const VecU bits = join_upper_halves(bfloat16_bits<nan>(x.a), bfloat16_bits<nan>(x.b));
    memcpy(p, &bits, sizeof bits);
  } else {
    store(p, x.a);
    store(p + kLanes, x.b);
  }
}

// The lanes of x at even and at odd places; and the reverse.
FM_INLINE VecPair evens_and_odds(VecPair x) {
#ifdef __AVX2__
  return {__builtin_shuffle(x.a, x.b, VecI{0, 2, 4, 6, 8, 10, 12, 14}),
          __builtin_shuffle(x.a, x.b, VecI{1, 3, 5, 7, 9, 11, 13, 15})};
#else
  return {__builtin_shuffle(x.a, x.b, VecI{0, 2, 4, 6}), __builtin_shuffle(x.a, x.b, VecI{1, 3, 5, 7})};
#endif
}
FM_INLINE VecPair interleaved(VecPair x) {
#ifdef __AVX2__
  return {__builtin_shuffle(x.a, x.b, VecI{0, 8, 1, 9, 2, 10, 3, 11}),
          __builtin_shuffle(x.a, x.b, VecI{4, 12, 5, 13, 6, 14, 7, 15})};
#else
  return {__builtin_shuffle(x.a, x.b, VecI{0, 4, 1, 5}), __builtin_shuffle(x.a, x.b, VecI{2, 6, 3, 7})};
#endif
}

// Elements of type U in the order of T: T itself, or float beside a half.
template <class T, class U>
FM_INLINE VecPair load_pair_as(const U* p) {
  if constexpr (std::is_same_v<T, BFloat16> && !std::is_same_v<U, BFloat16>) return evens_and_odds(load_pair(p));
  else return load_pair(p);
}

// x, in the order of T, in the order of memory.
template <class T>
FM_INLINE VecPair in_order(VecPair x) {
  if constexpr (std::is_same_v<T, BFloat16>) return interleaved(x);
  else return x;
}

// load_pair_as and its like of the first `count` elements, the others 0.
template <class T, class U>
FM_INLINE VecPair load_pair_as(const U* p, int count) {
  if (count == kPairLanes) return load_pair_as<T>(p);
  U lanes[kPairLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return load_pair_as<T>(lanes);
}
template <class T>
FM_INLINE VecPair load_pair(const T* p, int count) {
  return load_pair_as<T>(p, count);
}
template <Nan nan = Nan::kAny, class T>
FM_INLINE void store_pair(T* p, VecPair x, int count) {
  if (count == kPairLanes) return store_pair<nan>(p, x);
  T lanes[kPairLanes];
  store_pair<nan>(lanes, x);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
}

// Stores x, which T holds exactly: nothing is left to round.
template <class T>
FM_INLINE void store_exact_pair(T* p, VecPair x, int count) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const VecU bits = join_upper_halves((VecU)x.a, (VecU)x.b);
    memcpy(p, &bits, sizeof(T) * static_cast<size_t>(count));
  } else {
    store_pair(p, x, count);
  }
}

// x as it is after a store in T.
template <class T, Nan nan = Nan::kAny>
FM_INLINE VecPair rounded_to(VecPair x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return {(VecF)(bfloat16_bits<nan>(x.a) & 0xffff0000u), (VecF)(bfloat16_bits<nan>(x.b) & 0xffff0000u)};
  } else {
    T lanes[kPairLanes];
    store_pair(lanes, x);
    return load_pair(lanes);
  }
}

// x times 1 in the first `count` elements, in the order of T, and times 0 in the others.
template <class T>
FM_INLINE VecPair first_elements(VecPair x, int count) {
  if (count == kPairLanes) return x;
  float ones[kPairLanes] = {};
  for (int i = 0; i < count; ++i) ones[i] = 1.0f;
  return x * load_pair_as<T>(ones);
}

// f(first element, number of elements, half) over [0, n), a pair at a time. The number is kPairLanes but for the last
// one, and a constant where the loop is unrolled; so is the half, 0 and 1 alternately.
template <class F>
FM_INLINE void for_each_pair(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + 2 * kPairLanes <= n; i += 2 * kPairLanes) {
    f(i, kPairLanes, 0);
    f(i + kPairLanes, kPairLanes, 1);
  }
  if (i + kPairLanes <= n) {
    f(i, kPairLanes, 0);
    i += kPairLanes;
  }
  if (i < n) f(i, static_cast<int>(n - i), 1);
}

// A sum in four chains of additions, which run side by side and round less than one long one.
struct PairSum {
  VecPair halves[2] = {};

  FM_INLINE void add(VecPair x, int half) { halves[half] = halves[half] + x; }
  FM_INLINE float total() const {
    const VecPair sum = halves[0] + halves[1];
    return horizontal_sum(sum.a + sum.b);
  }
};

}  // namespace
}  // namespace fmkernels
