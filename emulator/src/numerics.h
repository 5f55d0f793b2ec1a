// SPDX-License-Identifier: Apache-2.0
// numerics.h: the arithmetic of PTX ISA 9.0 on bit patterns. Pure functions; nothing here knows a warp or an
// instruction.
//
// Scalar part  round_to(), decode() and convert() handle every floating format the ISA has, with every rounding mode,
//              by one integer algorithm. The rest of the file is arithmetic that must be fast.
// Lane part    functions named lanes_* work on the 32 lanes of a warp. They are straight loops without branches, so
//              that -O3 -mavx2 -mfma vectorises them; they compute the same bits without these options.
// NaN          results are canonical: 0x7fffffff (f32, tf32), 0x7fff (f16, bf16), 0x7f (e4m3, e5m2), 0xfff8000000000000
//              (f64). Conversions that only widen bf16 keep the payload, as the hardware's shift does.
// Must be compiled with -ffp-contract=off: a product and a sum that PTX rounds twice are never fused. gcc vectorises a
// loop that selects between two floats with -fno-trapping-math -fno-math-errno alone: nobody reads exceptions or errno.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace emulator::numerics {

inline constexpr int kLanes = 32;

// kRna is to nearest, ties away from zero. The integer roundings rni rzi rmi rpi are kRn kRz kRm kRp.
enum class Rounding : uint8_t { kRn, kRz, kRm, kRp, kRna };

// ---- formats --------------------------------------------------------------------------------------------------------

struct Format {
  int exponent_bits, mantissa_bits;
  uint64_t nan;       // canonical
  bool has_infinity;  // e4m3 has none: its largest exponent holds numbers, and one NaN per sign
  bool has_nan = true;

  constexpr int width() const { return 1 + exponent_bits + mantissa_bits; }
  constexpr int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  constexpr uint64_t sign() const { return uint64_t{1} << (exponent_bits + mantissa_bits); }
  constexpr uint64_t infinity() const { return ((uint64_t{1} << exponent_bits) - 1) << mantissa_bits; }
  constexpr uint64_t max_finite() const {
    if (has_infinity) return infinity() - 1;
    return has_nan ? nan - 1 : sign() - 1;
  }
  constexpr uint64_t one() const { return static_cast<uint64_t>(bias()) << mantissa_bits; }
};

inline constexpr Format kF64{11, 52, 0xfff8000000000000, true};
inline constexpr Format kF32{8, 23, 0x7fffffff, true};
inline constexpr Format kTf32{8, 10, 0x3ffff, true};  // as 19 bits; in a register they stand above 13 zeros
inline constexpr Format kF16{5, 10, 0x7fff, true};
inline constexpr Format kBf16{8, 7, 0x7fff, true};
inline constexpr Format kE4m3{4, 3, 0x7f, false};
inline constexpr Format kE5m2{5, 2, 0x7f, true};
inline constexpr Format kE2m1{2, 1, 0, false, false};  // the fp6 and fp4 formats hold numbers only
inline constexpr Format kE2m3{2, 3, 0, false, false};
inline constexpr Format kE3m2{3, 2, 0, false, false};

enum class Kind : uint8_t { kZero, kFinite, kInfinity, kNan };

// (-1)^negative * significand * 2^exponent, of a finite number.
struct Decoded {
  Kind kind;
  bool negative;
  uint64_t significand;
  int exponent;
};

Decoded decode(const Format& format, uint64_t bits);

// The pattern of a nonzero number rounded to a format. The lowest bit of the significand may be sticky (stand for
// anything between it and the next), provided that at least two bits are rounded away. Too large numbers become
// infinity, or the largest finite number where the rounding mode, `saturate_finite` or the format says so; NaN in a
// format with nothing else.
uint64_t round_to(const Format& format, Rounding rounding, bool saturate_finite, bool negative, uint64_t significand,
                  int exponent);

struct ConvertOptions {
  Rounding rounding = Rounding::kRn;
  bool ftz = false;              // subnormal f32 inputs and results become zeros of their sign
  bool saturate = false;         // to [0, 1], NaN to +0
  bool saturate_finite = false;  // beyond the largest finite number, infinity included: that number
  bool relu = false;             // negative numbers become +0
  bool to_integral = false;      // the value is first rounded to an integer (cvt.rni.f32.f32)
};

uint64_t convert(const Format& to, const Format& from, uint64_t bits, const ConvertOptions& options);

// Two's complement of the rounded value in num_bits, clamped to the range; see the ISA for NaN: 0, or the pattern with
// only the highest bit set when the source is f64 or the destination has 64 bits. Sign- or zero-extended to 64 bits.
uint64_t to_integer(const Format& from, uint64_t bits, int num_bits, bool is_signed, Rounding rounding, bool ftz);
uint64_t from_integer(const Format& to, uint64_t value, int num_bits, bool is_signed, const ConvertOptions& options);

// `value` as num_bits of it, extended; and clamped to another integer type (cvt.sat, cvt.pack).
inline uint64_t extend(uint64_t value, int num_bits, bool is_signed) {
  const int shift = 64 - num_bits;
  return is_signed ? static_cast<uint64_t>(static_cast<int64_t>(value << shift) >> shift) : value << shift >> shift;
}
uint64_t clamp_integer(uint64_t value, bool value_is_signed, int num_bits, bool is_signed);

// ---- f32 and f64, one lane ------------------------------------------------------------------------------------------

inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline double as_double(uint64_t bits) { return std::bit_cast<double>(bits); }
inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline uint64_t bits_of(double x) { return std::bit_cast<uint64_t>(x); }

inline float canonical(float x) { return x == x ? x : as_float(0x7fffffffu); }
inline double canonical(double x) { return x == x ? x : as_double(0xfff8000000000000u); }

inline float flush(float x) {
  const uint32_t bits = bits_of(x);
  return as_float((bits & 0x7f800000u) != 0 ? bits : bits & 0x80000000u);
}
inline double flush(double x) { return x; }  // f64 has no .ftz

template <class T>
inline T saturate(T x) {
  const T below = x < T{1} ? x : T{1};
  return x > T{0} ? below : T{0};
}

// PTX: the other operand when one is NaN (kNan: NaN when one is), and -0 < +0.
template <bool kNan>
inline float maximum(float a, float b) {
  const float larger = a > b ? a : b;
  const float ordered = a == b ? as_float(bits_of(a) & bits_of(b)) : larger;
  if constexpr (kNan) return (a == a) & (b == b) ? ordered : as_float(0x7fffffffu);
  return canonical(a == a ? (b == b ? ordered : a) : b);
}
template <bool kNan>
inline float minimum(float a, float b) {
  const float smaller = a < b ? a : b;
  const float ordered = a == b ? as_float(bits_of(a) | bits_of(b)) : smaller;
  if constexpr (kNan) return (a == a) & (b == b) ? ordered : as_float(0x7fffffffu);
  return canonical(a == a ? (b == b ? ordered : a) : b);
}
double maximum(double a, double b);
double minimum(double a, double b);

// ---- f16 and bf16, one lane -----------------------------------------------------------------------------------------

// Rounds to nearest even. Two roundings to one are avoided where it matters by round_odd below.
inline uint32_t bf16_from_float(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x == x ? rounded : 0x7fffu;
}
inline uint32_t f16_from_float(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the sum with 0.5 has the subnormal, rounded, in its last bits. Elsewhere: round, then rebase the
  // exponent.
  const uint32_t subnormal = bits_of(as_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 is the tie between 65504 and 2^16
  return magnitude > 0x7f800000u ? 0x7fffu : result | sign;
}
// e4m3 and e5m2, saturating to the largest finite number: what cvt.rn.satfinite gives.
template <bool kE5m2Format>
inline uint32_t fp8_from_float(float x) {
  constexpr const Format& kFormat = kE5m2Format ? kE5m2 : kE4m3;
  constexpr int kShift = 23 - kFormat.mantissa_bits;
  constexpr uint32_t kRebase = static_cast<uint32_t>(127 - kFormat.bias()) << 23;
  constexpr uint32_t kNormal = kRebase + (1u << 23);                                               // the smallest one
  constexpr uint32_t kUnit = kRebase + (static_cast<uint32_t>(24 - kFormat.mantissa_bits) << 23);  // see f16_from_float
  const uint32_t bits = bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = bits_of(as_float(magnitude) + as_float(kUnit)) - kUnit;
  const uint32_t normal = (magnitude + ((1u << (kShift - 1)) - 1) + ((magnitude >> kShift) & 1u) - kRebase) >> kShift;
  const uint32_t rounded = magnitude < kNormal ? subnormal : normal;
  constexpr uint32_t kLargest = static_cast<uint32_t>(kFormat.max_finite());
  const uint32_t finite = rounded < kLargest ? rounded : kLargest;
  return magnitude > 0x7f800000u ? 0x7fu : finite | (bits >> 24 & 0x80u);
}
inline float float_from_bf16(uint32_t bits) { return as_float(bits << 16); }
inline float float_from_f16(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t magnitude = (bits & 0x7fffu) << 13;
  // Moved to the place of a float's exponent the value is 2^112 too small; the product is exact, for subnormals too.
  const uint32_t finite = bits_of(as_float(magnitude) * 0x1p112f);
  const uint32_t special = magnitude == 0x0f800000u ? 0x7f800000u : 0x7fffffffu;
  return as_float(magnitude < 0x0f800000u ? finite | sign : special == 0x7f800000u ? special | sign : special);
}

// The sum s + error, error being what rounding s lost, rounded to odd: the last bit of an inexact result is set, so
// that a second rounding to a format at least two bits shorter gives what one rounding of the exact sum gives.
inline float round_odd(float s, float error) {
  const uint32_t bits = bits_of(s);
  const bool inexact = (error > 0.0f) | (error < 0.0f);
  const bool outward = (error > 0.0f) == (s > 0.0f);
  const uint32_t odd = (bits & 1u) != 0 ? bits : outward ? bits + 1 : bits - 1;
  return as_float(inexact ? odd : bits);
}
inline double round_odd(double s, double error) {
  const uint64_t bits = bits_of(s);
  const bool inexact = (error > 0.0) | (error < 0.0);
  const bool outward = (error > 0.0) == (s > 0.0);
  const uint64_t odd = (bits & 1u) != 0 ? bits : outward ? bits + 1 : bits - 1;
  return as_double(inexact ? odd : bits);
}
// What a + b loses when rounded to s (Knuth's two-sum).
template <class T>
inline T sum_error(T a, T b, T s) {
  const T virtual_b = s - a;
  return (a - (s - virtual_b)) + (b - virtual_b);
}
// A double as the float next to it whose last bit is set when it is inexact; overflow becomes the largest float, which
// every shorter format rounds as it would round the double.
inline float odd_float(double x) {
  const float nearest = static_cast<float>(x);
  const double rest = x - static_cast<double>(nearest);
  const uint32_t bits = bits_of(nearest);
  const bool inexact = (rest > 0.0) | (rest < 0.0);
  const bool outward = (rest > 0.0) == (x > 0.0);
  const uint32_t odd = (bits & 1u) != 0 ? bits : outward ? bits + 1 : bits - 1;
  return as_float(inexact ? odd : bits);
}

// Products and sums of halves as a float that rounds to the right half. f16: 22-bit products are exact in a float.
// bf16: products leave the range of a float, so they are made in a double.
inline float f16_fma(float a, float b, float c) {
  const float product = a * b;
  const float sum = product + c;
  return round_odd(sum, sum_error(product, c, sum));
}
inline float bf16_fma(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double sum = product + static_cast<double>(c);
  return odd_float(round_odd(sum, sum_error(product, static_cast<double>(c), sum)));
}

// ---- comparisons ----------------------------------------------------------------------------------------------------

// As PTX names them; those ending in u are true also when an operand is NaN.
enum class Compare : uint8_t { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };

template <class T>
inline bool compare(Compare how, T a, T b) {
  switch (how) {
    case Compare::kEq: return a == b;
    case Compare::kNe: return (a < b) | (a > b);
    case Compare::kLt: return a < b;
    case Compare::kLe: return a <= b;
    case Compare::kGt: return a > b;
    case Compare::kGe: return a >= b;
    case Compare::kEqu: return !((a < b) | (a > b));
    case Compare::kNeu: return !(a == b);
    case Compare::kLtu: return !(a >= b);
    case Compare::kLeu: return !(a > b);
    case Compare::kGtu: return !(a <= b);
    case Compare::kGeu: return !(a < b);
    case Compare::kNum: return (a == a) & (b == b);
    case Compare::kNan: return (a != a) | (b != b);
  }
  return false;
}

// testp
enum class Test : uint8_t { kFinite, kInfinite, kNumber, kNotANumber, kNormal, kSubnormal };
bool test_property(Test test, const Format& format, uint64_t bits);

// ---- 32 lanes -------------------------------------------------------------------------------------------------------

// d = a op b (op c), rounded in any direction. kSqrt and kRcp use a only.
enum class FloatOp : uint8_t { kAdd, kSub, kMul, kFma, kDiv, kSqrt, kRcp };
struct FloatControl {
  Rounding rounding = Rounding::kRn;
  bool ftz = false, saturate = false;
};
void lanes_arithmetic(FloatOp op, FloatControl control, float* d, const float* a, const float* b, const float* c);
void lanes_arithmetic(FloatOp op, FloatControl control, double* d, const double* a, const double* b, const double* c);

// Within one unit in the last place of the exact result; the ISA allows more. div is a * (1 / b) with its limits.
void lanes_ex2(float* d, const float* a);
void lanes_lg2(float* d, const float* a);
void lanes_rsqrt(float* d, const float* a);
void lanes_sin(float* d, const float* a);
void lanes_cos(float* d, const float* a);
void lanes_tanh(float* d, const float* a);
void lanes_div_approx(float* d, const float* a, const float* b);
double rcp_approx_ftz(double a);  // from the upper half of a; the lower half of the result is zero
double rsqrt_approx_ftz(double a);

// Packed pairs: the low half of the register is the element that PTX numbers first.
inline void lanes_to_bf16x2(uint32_t* d, const float* high, const float* low) {
  for (int i = 0; i < kLanes; ++i) d[i] = bf16_from_float(high[i]) << 16 | bf16_from_float(low[i]);
}
inline void lanes_to_f16x2(uint32_t* d, const float* high, const float* low) {
  for (int i = 0; i < kLanes; ++i) d[i] = f16_from_float(high[i]) << 16 | f16_from_float(low[i]);
}

}  // namespace emulator::numerics
