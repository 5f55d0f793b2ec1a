// SPDX-License-Identifier: Apache-2.0
// A unit of the codec on the CPU: its codes to and from bytes, and vectors of eight floats whatever the instruction set,
// of which the compiler makes two where registers are shorter. Internal linkage, as in common/vec.h.
#pragma once

#include <type_traits>

#include "../common/philox_cpu.h"
#include "../common/vec.h"
#include "block_codec.h"

namespace fmkernels {
namespace {

typedef float V8 __attribute__((vector_size(32)));
typedef int32_t V8i __attribute__((vector_size(32)));
typedef uint32_t V8u __attribute__((vector_size(32)));
typedef int8_t Bytes8 __attribute__((vector_size(8)));
typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint8_t Bytes32 __attribute__((vector_size(32)));

constexpr int kUnitVectors = kUnit / 8;

template <class V>
FM_INLINE V read(const void* p) {
  V x;
  memcpy(&x, p, sizeof x);
  return x;
}
template <class V>
FM_INLINE void write(void* p, V x) {
  memcpy(p, &x, sizeof x);
}

template <class T>
FM_INLINE V8 load8(const T* p) {
  if constexpr (kLanes == 8) {
    return (V8)load(p);
  } else {
    const VecF halves[2] = {load(p), load(p + kLanes)};
    return read<V8>(halves);
  }
}
template <class T>
FM_INLINE void store8(T* p, V8 x) {
  if constexpr (kLanes == 8) {
    store(p, read<VecF>(&x));
  } else {
    VecF halves[2];
    memcpy(halves, &x, sizeof x);
    store(p, halves[0]);
    store(p + kLanes, halves[1]);
  }
}

#ifdef __AVX2__
// One packing of two vectors.
FM_INLINE __m256i bfloat16_of(V8 a, V8 b) {
  auto rounded = [](V8 x) {
    const V8u bits = (V8u)x, upper = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (__m256i)(x != x ? V8u{} + 0x7fffu : upper);
  };
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(a), rounded(b)), 0xd8);
}
#endif

// 16 elements.
template <class T>
FM_INLINE void store16(T* p, V8 a, V8 b) {
#ifdef __AVX2__
  if constexpr (std::is_same_v<T, BFloat16>) return write(p, bfloat16_of(a, b));
#endif
  store8(p, a);
  store8(p + 8, b);
}

// 16 elements past the caches, where the processor and the type allow it. p is on a boundary of kStreamAlignment; what
// other threads see of them is in order after end_stream().
constexpr int64_t kStreamAlignment = 32;
template <class T>
FM_INLINE void stream16(T* p, V8 a, V8 b) {
#ifdef __AVX2__
  if constexpr (std::is_same_v<T, float>) {
    _mm256_stream_ps(p, (__m256)a);
    return _mm256_stream_ps(p + 8, (__m256)b);
  }
  if constexpr (std::is_same_v<T, BFloat16>) {
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bfloat16_of(a, b));
  }
#endif
  store16(p, a, b);
}
FM_INLINE void end_stream() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}

template <int kStep>
FM_INLINE V8 swap8(V8 x) {
  return __builtin_shuffle(x,
                           V8i{0 ^ kStep, 1 ^ kStep, 2 ^ kStep, 3 ^ kStep, 4 ^ kStep, 5 ^ kStep, 6 ^ kStep, 7 ^ kStep});
}

// ---- the rotation ----------------------------------------------------------------------------------------------------

// One stage inside a vector: lane i becomes x[i] + x[i + kStep], lane i + kStep their difference.
template <int kStep>
FM_INLINE V8 butterfly_lanes(V8 x) {
  const uint32_t minus = 0x80000000u;
  constexpr uint32_t m1 = kStep & 1 ? minus : 0, m2 = kStep & 2 ? minus : 0, m4 = kStep & 4 ? minus : 0;
  const V8u signs{0, m1, m2, m1 | m2, m4, m1 | m4, m2 | m4, m1 | m2 | m4};
  return swap8<kStep>(x) + (V8)((V8u)x ^ signs);
}
// H times the kGroup elements of four vectors: places that differ in bit 0 of their number first, in bit 4 last.
FM_INLINE void rotate_group(V8 (&x)[4]) {
  for (V8& v : x) v = butterfly_lanes<4>(butterfly_lanes<2>(butterfly_lanes<1>(v)));
  const V8 a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
  x[0] = a + c;
  x[1] = b + d;
  x[2] = a - c;
  x[3] = b - d;
}

// ---- codes -----------------------------------------------------------------------------------------------------------

FM_INLINE V8 round_to_even(V8 x) {  // of |x| < 2^22
  const float shifter = 0x1.8p23f;
  return (x + shifter) - shifter;
}
FM_INLINE V8 floor_of(V8 x) {  // of |x| < 2^22
#ifdef __AVX2__
  return (V8)_mm256_floor_ps((__m256)x);
#else
  const V8 nearest = round_to_even(x);
  return nearest - (V8)((V8i)(nearest > x) & (V8i)(V8{} + 1.0f));
#endif
}

#ifdef __AVX2__
// Bytes of four vectors that were packed, of which words 0 and 4 are those of the first.
FM_INLINE Bytes32 in_order(__m256i packed) {
  return (Bytes32)_mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
#endif

// v[i] to the nearest integer, as bytes from -2^(kCode - 1) to 2^(kCode - 1) - 1, for kGroup numbers.
template <int kCode>
FM_INLINE Bytes32 codes_of(const V8 (&v)[4]) {
  constexpr int kMax = (1 << (kCode - 1)) - 1, kMin = -kMax - 1;
#ifdef __AVX2__
  __m256i q[4];
  for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32((__m256)v[i]);
  const __m256i low = _mm256_packs_epi32(q[0], q[1]), high = _mm256_packs_epi32(q[2], q[3]);
  __m256i bytes = _mm256_packs_epi16(low, high);  // saturates
  if constexpr (kCode < 8) {
    bytes = _mm256_max_epi8(_mm256_min_epi8(bytes, _mm256_set1_epi8(kMax)), _mm256_set1_epi8(kMin));
  }
  return in_order(bytes);
#else
  Bytes8 bytes[4];
  for (int i = 0; i < 4; ++i) {
    V8i q = __builtin_convertvector(round_to_even(v[i]), V8i);
    q = q > kMax ? V8i{} + kMax : q;
    q = q < kMin ? V8i{} + kMin : q;
    bytes[i] = __builtin_convertvector(q, Bytes8);
  }
  return read<Bytes32>(bytes);
#endif
}

// v[i] to the nearest float8 e4m3, of |v[i]| up to 448.
FM_INLINE Bytes32 float8_of(const V8 (&v)[4]) {
  V8u codes[4];
  for (int i = 0; i < 4; ++i) {
    const V8u bits = (V8u)v[i], magnitude = bits & 0x7fffffffu;
    const V8u normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - kFloat8Rebias;
    const V8u small = (V8u)((V8)magnitude + kFloat8Shifter) - float_bits(kFloat8Shifter);
    const V8i is_small = (V8i)magnitude < static_cast<int32_t>(kFloat8SmallestNormal);
    const V8u code = is_small ? small : normal;
    codes[i] = code | ((bits >> 24) & 0x80u & (V8u)(code != 0));
  }
#ifdef __AVX2__
  const __m256i low = _mm256_packus_epi32((__m256i)codes[0], (__m256i)codes[1]);
  const __m256i high = _mm256_packus_epi32((__m256i)codes[2], (__m256i)codes[3]);
  return in_order(_mm256_packus_epi16(low, high));
#else
  Bytes8 bytes[4];
  for (int i = 0; i < 4; ++i) bytes[i] = __builtin_convertvector(codes[i], Bytes8);
  return read<Bytes32>(bytes);
#endif
}

// Of each byte.
typedef uint16_t Pairs __attribute__((vector_size(32)));
template <int kShift>
FM_INLINE Bytes32 shifted_left(Bytes32 x) {
  constexpr uint8_t kKept = 0xff << kShift & 0xff;
  return (Bytes32)((Pairs)x << kShift) & kKept;
}
template <int kShift>
FM_INLINE Bytes32 shifted_right(Bytes32 x) {
  constexpr uint8_t kKept = 0xff >> kShift;
  return (Bytes32)((Pairs)x >> kShift) & kKept;
}

// The planes of a wire at one of its units.
template <int kCode, class Byte>
struct Planes {
  Byte *lower, *upper;

  Planes(const CodecWire& wire, Byte* data, int64_t unit)
      : lower(data + unit * lower_plane_bytes(kCode)),
        upper(kCode == 6 ? data + wire.upper_plane() + unit * upper_plane_bytes(kCode) : nullptr) {}
};

// The codes of a unit, its first and its second half, to its planes.
template <int kCode>
FM_INLINE void write_codes(const Planes<kCode, uint8_t>& to, Bytes32 first, Bytes32 second) {
  if constexpr (bits_of(kCode) == 8) {
    write(to.lower, first);
    write(to.lower + 32, second);
  } else {
    write(to.lower, (first & 15) | shifted_left<4>(second));
    if constexpr (kCode == 6) {
      const Bytes32 pairs = (shifted_right<4>(first) & 3) | (second & 0x30);
      const char* halves = reinterpret_cast<const char*>(&pairs);
      const Bytes16 even = read<Bytes16>(halves), odd = read<Bytes16>(halves + 16);
      write(to.upper, even | (odd << 2));
    }
  }
}

// The codes of a unit as bytes: where they are on the wire, or in `buffer`.
template <int kCode>
FM_INLINE const int8_t* read_codes(const Planes<kCode, const uint8_t>& from, int8_t* buffer) {
  if constexpr (bits_of(kCode) == 8) {
    return reinterpret_cast<const int8_t*>(from.lower);
  } else {
    constexpr uint8_t kSign = 1 << (kCode - 1);
    const Bytes32 lower = read<Bytes32>(from.lower);
    Bytes32 first = lower & 15, second = shifted_right<4>(lower);
    if constexpr (kCode == 6) {
      const Bytes16 upper = read<Bytes16>(from.upper), later = upper >> 2;  // bits 0, 1 and 4, 5 of each byte
#ifdef __AVX2__  // two halves in memory would be read before they are written
      const Bytes32 pairs = (Bytes32)_mm256_set_m128i((__m128i)later, (__m128i)upper);
#else
      const Bytes16 halves[2] = {upper, later};
      const Bytes32 pairs = read<Bytes32>(halves);
#endif
      first |= shifted_left<4>(pairs & 3);
      second |= pairs & 0x30;
    }
    write(buffer, (first ^ kSign) - kSign);
    write(buffer + 32, (second ^ kSign) - kSign);
    return buffer;
  }
}

// The scale of 1 bit, with its signs.
FM_INLINE V8 with_signs(float scale, uint32_t signs) {
  const V8i minus = (V8i{} + static_cast<int32_t>(signs)) << V8i{31, 30, 29, 28, 27, 26, 25, 24};
  return (V8)((minus & INT32_MIN) ^ (V8i)(V8{} + scale));
}

FM_INLINE V8 as_floats(V8i x) {
#ifdef __AVX2__
  return (V8)_mm256_cvtepi32_ps((__m256i)x);
#else
  return __builtin_convertvector(x, V8);
#endif
}
FM_INLINE V8i codes_as_integers(const int8_t* codes) {
#ifdef __AVX2__
  return (V8i)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
#else
  return __builtin_convertvector(read<Bytes8>(codes), V8i);
#endif
}
template <int kCode>
FM_INLINE V8 codes_as_floats(const int8_t* codes) {
  const V8i code = codes_as_integers(codes);
  if constexpr (kCode == kFloat8) {
    const V8i magnitude = code & 0x7f, normal = (magnitude + static_cast<int32_t>(kFloat8Rebias)) << 20;
    const V8 small = as_floats(magnitude) * 0x1p-9f;
    return (V8)((magnitude < 8 ? (V8i)small : normal) | (code & INT32_MIN));
  } else {
    return as_floats(code);
  }
}

// ---- random bits -----------------------------------------------------------------------------------------------------

// What the elements of a unit draw: k, of kUnit elements, and (k + 1/2) / 2^16 of eight of them.
class Draws {
 public:
  explicit Draws(const CodecRounding& rounding)
      : keys_(rounding.seed), step_(rounding.step), first_unit_(rounding.offset / kUnit) {}

  FM_INLINE void draw(int64_t unit, uint16_t* k) const {
    for (int half = 0; half < 2; ++half) {
      const Philox64 call = Philox64{0, 1, 2, 3} + static_cast<uint64_t>((first_unit_ + unit) * 8 + half * 4);
      PhiloxWords x[4] = {{call}, {call >> 32}, {Philox64{} + step_}, {Philox64{} + (step_ >> 32)}};
      philox(x, keys_);
      const uint64_t low = 0xffffffffu;
      write(k + half * 16, (x[0].bits & low) | (x[1].bits << 32));
      write(k + 32 + half * 16, (x[2].bits & low) | (x[3].bits << 32));
    }
  }
  FM_INLINE static V8 fractions(const uint16_t* k) {
#ifdef __AVX2__
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(k));
    const V8 x = as_floats((V8i)_mm256_cvtepu16_epi32(bits));
#else
    typedef uint16_t V8u16 __attribute__((vector_size(16)));
    const V8 x = as_floats(__builtin_convertvector(read<V8u16>(k), V8i));
#endif
    return (x + 0.5f) * 0x1p-16f;
  }

 private:
  PhiloxKeys keys_;
  uint64_t step_;
  int64_t first_unit_;
};

}  // namespace
}  // namespace fmkernels
