// SPDX-License-Identifier: Apache-2.0
// See numerics.h.
#include "numerics.h"

#include <algorithm>
#include <cfenv>
#include <cmath>

namespace emulator::numerics {

// ---- formats --------------------------------------------------------------------------------------------------------

Decoded decode(const Format& format, uint64_t bits) {
  const uint64_t magnitude = bits & (format.sign() - 1);
  Decoded result{Kind::kFinite, (bits & format.sign()) != 0, 0, 0};
  if (magnitude == 0) {
    result.kind = Kind::kZero;
  } else if (format.has_infinity ? magnitude >= format.infinity() : magnitude > format.max_finite()) {
    result.kind = format.has_infinity && magnitude == format.infinity() ? Kind::kInfinity : Kind::kNan;
  } else {
    const uint64_t hidden = uint64_t{1} << format.mantissa_bits;
    const int exponent = static_cast<int>(magnitude >> format.mantissa_bits);
    result.significand = (magnitude & (hidden - 1)) | (exponent != 0 ? hidden : 0);
    result.exponent = std::max(exponent, 1) - format.bias() - format.mantissa_bits;
  }
  return result;
}

namespace {

// significand / 2^shift as an integer; shift is positive. What is cut off decides by the rounding mode.
uint64_t shift_rounded(Rounding rounding, bool negative, uint64_t significand, int shift) {
  const uint64_t kept = shift >= 64 ? 0 : significand >> shift;
  // The rest as a fraction of one unit, in units of 2^-64; beyond that it only matters that it is not zero.
  const uint64_t rest = shift > 64 ? (significand != 0) : significand << (64 - shift);
  constexpr uint64_t kHalf = uint64_t{1} << 63;
  bool up = false;
  switch (rounding) {
    case Rounding::kRn: up = rest > kHalf || (rest == kHalf && (kept & 1) != 0); break;
    case Rounding::kRna: up = rest >= kHalf; break;
    case Rounding::kRz: break;
    case Rounding::kRm: up = negative && rest != 0; break;
    case Rounding::kRp: up = !negative && rest != 0; break;
  }
  return kept + up;
}

}  // namespace

uint64_t round_to(const Format& format, Rounding rounding, bool saturate_finite, bool negative, uint64_t significand,
                  int exponent) {
  const int leading = exponent + 63 - std::countl_zero(significand);
  const int lowest = 1 - format.bias();  // exponent of the smallest normal number
  const int step = std::max(leading, lowest) - format.mantissa_bits;
  const int shift = step - exponent;
  const uint64_t kept = shift <= 0 ? significand << -shift : shift_rounded(rounding, negative, significand, shift);
  // The hidden bit of a normal number adds one to the exponent field, and so does a carry out of the mantissa.
  const uint64_t sign = negative ? format.sign() : 0;
  const int field = std::max(leading, lowest) - lowest;
  const bool too_large = field >= (1 << format.exponent_bits);
  const uint64_t magnitude = too_large ? 0 : (static_cast<uint64_t>(field) << format.mantissa_bits) + kept;
  if (!too_large && magnitude <= format.max_finite()) return sign | magnitude;

  const bool to_largest = saturate_finite || rounding == Rounding::kRz || (rounding == Rounding::kRm && !negative) ||
                          (rounding == Rounding::kRp && negative);
  if (to_largest) return sign | format.max_finite();
  return format.has_infinity ? sign | format.infinity() : format.nan;
}

uint64_t convert(const Format& to, const Format& from, uint64_t bits, const ConvertOptions& options) {
  const bool from_f32 = from.width() == 32, to_f32 = to.width() == 32;
  Decoded x = decode(from, bits);
  if (options.ftz && from_f32 && x.kind == Kind::kFinite && (bits & kF32.infinity()) == 0) x.kind = Kind::kZero;
  if (x.kind == Kind::kNan) return options.saturate ? 0 : to.has_nan ? to.nan : to.max_finite();
  if (options.relu && x.negative) return 0;
  if (x.kind == Kind::kFinite && options.to_integral && x.exponent < 0) {
    x.significand = shift_rounded(options.rounding, x.negative, x.significand, -x.exponent);
    x.exponent = 0;
    if (x.significand == 0) x.kind = Kind::kZero;
  }
  uint64_t result = x.negative ? to.sign() : 0;
  if (x.kind == Kind::kInfinity) {
    const bool largest = options.saturate_finite || !to.has_infinity;
    result |= largest ? to.max_finite() : to.infinity();
  } else if (x.kind == Kind::kFinite) {
    result = round_to(to, options.rounding, options.saturate_finite, x.negative, x.significand, x.exponent);
    if (options.ftz && to_f32 && (result & kF32.infinity()) == 0) result &= kF32.sign();
  }
  if (options.saturate) result = (result & to.sign()) != 0 ? 0 : std::min(result, to.one());
  return result;
}

uint64_t to_integer(const Format& from, uint64_t bits, int num_bits, bool is_signed, Rounding rounding, bool ftz) {
  const Decoded x = decode(from, bits);
  const uint64_t highest_bit = uint64_t{1} << (num_bits - 1);
  if (x.kind == Kind::kNan) {
    return from.width() == 64 || num_bits == 64 ? extend(highest_bit, num_bits, is_signed) : 0;
  }
  if (x.kind == Kind::kZero) return 0;
  if (ftz && from.width() == 32 && (bits & kF32.infinity()) == 0) return 0;
  // As a magnitude below 2^64, or something that is clamped in any case.
  uint64_t magnitude = ~uint64_t{0};
  bool huge = x.kind == Kind::kInfinity;
  if (!huge && x.exponent < 0) {
    magnitude = shift_rounded(rounding, x.negative, x.significand, -x.exponent);
  } else if (!huge) {
    huge = x.exponent > std::countl_zero(x.significand);
    if (!huge) magnitude = x.significand << x.exponent;
  }
  const uint64_t largest = is_signed ? highest_bit - 1 : highest_bit | (highest_bit - 1);
  const uint64_t smallest = is_signed ? highest_bit : 0;  // its magnitude
  if (x.negative) return huge || magnitude >= smallest ? uint64_t{0} - smallest : uint64_t{0} - magnitude;
  return huge || magnitude > largest ? largest : magnitude;
}

uint64_t from_integer(const Format& to, uint64_t value, int num_bits, bool is_signed, const ConvertOptions& options) {
  value = extend(value, num_bits, is_signed);
  const bool negative = is_signed && static_cast<int64_t>(value) < 0;
  const uint64_t magnitude = negative ? uint64_t{0} - value : value;
  if (magnitude == 0) return 0;
  uint64_t result = round_to(to, options.rounding, options.saturate_finite, negative, magnitude, 0);
  if (options.saturate) result = negative ? 0 : std::min(result, to.one());
  return result;
}

uint64_t clamp_integer(uint64_t value, bool value_is_signed, int num_bits, bool is_signed) {
  const uint64_t highest_bit = uint64_t{1} << (num_bits - 1);
  const uint64_t largest = is_signed ? highest_bit - 1 : highest_bit | (highest_bit - 1);
  if (value_is_signed && static_cast<int64_t>(value) < 0) {
    const uint64_t smallest = is_signed ? uint64_t{0} - highest_bit : 0;
    return static_cast<int64_t>(value) < static_cast<int64_t>(smallest) ? smallest : value;
  }
  return std::min(value, largest);
}

double maximum(double a, double b) {
  if (a != a) return canonical(b);
  if (b != b) return a;
  return a == b ? as_double(bits_of(a) & bits_of(b)) : a > b ? a : b;
}
double minimum(double a, double b) {
  if (a != a) return canonical(b);
  if (b != b) return a;
  return a == b ? as_double(bits_of(a) | bits_of(b)) : a < b ? a : b;
}

bool test_property(Test test, const Format& format, uint64_t bits) {
  const Decoded x = decode(format, bits);
  const bool hidden = (x.significand >> format.mantissa_bits) != 0;
  switch (test) {
    case Test::kFinite: return x.kind == Kind::kZero || x.kind == Kind::kFinite;
    case Test::kInfinite: return x.kind == Kind::kInfinity;
    case Test::kNumber: return x.kind != Kind::kNan;
    case Test::kNotANumber: return x.kind == Kind::kNan;
    case Test::kNormal: return x.kind == Kind::kFinite && hidden;
    case Test::kSubnormal: return x.kind == Kind::kFinite && !hidden;
  }
  return false;
}

// ---- arithmetic of 32 lanes -----------------------------------------------------------------------------------------

namespace {

// The host's own rounding mode, within a scope.
class HostRounding {
 public:
  explicit HostRounding(Rounding rounding) : changed_(rounding != Rounding::kRn) {
    if (!changed_) return;
    std::fesetround(rounding == Rounding::kRz ? FE_TOWARDZERO : rounding == Rounding::kRm ? FE_DOWNWARD : FE_UPWARD);
    asm volatile("" ::: "memory");
  }
  ~HostRounding() {
    if (!changed_) return;
    asm volatile("" ::: "memory");
    std::fesetround(FE_TONEAREST);
  }
  HostRounding(const HostRounding&) = delete;
  HostRounding& operator=(const HostRounding&) = delete;

 private:
  bool changed_;
};

// Not inlined: the operands are then memory to the compiler, which cannot move the arithmetic out of the scope.
template <class T>
__attribute__((noinline)) void rounded(FloatOp op, Rounding rounding, T* d, const T* a, const T* b, const T* c) {
  const HostRounding scope(rounding);
  switch (op) {
    case FloatOp::kAdd:
      for (int i = 0; i < kLanes; ++i) d[i] = a[i] + b[i];
      break;
    case FloatOp::kSub:
      for (int i = 0; i < kLanes; ++i) d[i] = a[i] - b[i];
      break;
    case FloatOp::kMul:
      for (int i = 0; i < kLanes; ++i) d[i] = a[i] * b[i];
      break;
    case FloatOp::kFma:
      for (int i = 0; i < kLanes; ++i) d[i] = std::fma(a[i], b[i], c[i]);
      break;
    case FloatOp::kDiv:
      for (int i = 0; i < kLanes; ++i) d[i] = a[i] / b[i];
      break;
    case FloatOp::kSqrt:
      for (int i = 0; i < kLanes; ++i) d[i] = std::sqrt(a[i]);
      break;
    case FloatOp::kRcp:
      for (int i = 0; i < kLanes; ++i) d[i] = T{1} / a[i];
      break;
  }
}

template <class T>
void arithmetic(FloatOp op, FloatControl control, T* d, const T* a, const T* b, const T* c) {
  alignas(64) T flushed[3][kLanes];
  const T* sources[3] = {a, b, c};
  if (control.ftz) {
    const int num_sources = op == FloatOp::kFma ? 3 : op == FloatOp::kSqrt || op == FloatOp::kRcp ? 1 : 2;
    for (int s = 0; s < num_sources; ++s) {
      for (int i = 0; i < kLanes; ++i) flushed[s][i] = flush(sources[s][i]);
      sources[s] = flushed[s];
    }
  }
  rounded(op, control.rounding, d, sources[0], sources[1], sources[2]);
  for (int i = 0; i < kLanes; ++i) d[i] = canonical(d[i]);
  if (control.ftz) {
    for (int i = 0; i < kLanes; ++i) d[i] = flush(d[i]);
  }
  if (control.saturate) {
    for (int i = 0; i < kLanes; ++i) d[i] = saturate(d[i]);
  }
}

template <class Function>
void each_in_double(float* d, const float* a, Function function) {
  for (int i = 0; i < kLanes; ++i) d[i] = canonical(static_cast<float>(function(static_cast<double>(a[i]))));
}

}  // namespace

void lanes_arithmetic(FloatOp op, FloatControl control, float* d, const float* a, const float* b, const float* c) {
  arithmetic(op, control, d, a, b, c);
}
void lanes_arithmetic(FloatOp op, FloatControl control, double* d, const double* a, const double* b, const double* c) {
  arithmetic(op, control, d, a, b, c);
}

// ---- functions ------------------------------------------------------------------------------------------------------

void lanes_ex2(float* d, const float* a) {
  // 2^f on [-1/2, 1/2], interpolated at Chebyshev nodes: relative error 2^-51.
  constexpr double kC[] = {0x1p+0,
                           0x1.62e42fefa3a19p-1,
                           0x1.ebfbdff82c598p-3,
                           0x1.c6b08d703ce49p-5,
                           0x1.3b2ab6fba1ddap-7,
                           0x1.5d87fe9d7a584p-10,
                           0x1.430913096fd9fp-13,
                           0x1.ffcb54062e698p-17,
                           0x1.62bfd47773353p-20,
                           0x1.b675bca4eeebbp-24,
                           0x1.e6063f7217bc7p-28};
  constexpr double kToInteger = 0x1.8p52;  // added, leaves the nearest integer in the last bits
  for (int i = 0; i < kLanes; ++i) {
    const double x = static_cast<double>(a[i]);
    const double above = x > -160.0 ? x : -160.0;  // 2^-160 is a zero float and 2^130 an infinite one; NaN: see below
    const double clamped = above < 130.0 ? above : 130.0;
    const double shifted = clamped + kToInteger;
    const double f = clamped - (shifted - kToInteger);
    const double f2 = f * f, f4 = f2 * f2;
    const double low = (kC[0] + f * kC[1]) + f2 * (kC[2] + f * kC[3]);
    const double high = (kC[4] + f * kC[5]) + f2 * (kC[6] + f * kC[7]) + f4 * ((kC[8] + f * kC[9]) + f2 * kC[10]);
    const double power = as_double((bits_of(shifted) + 1023) << 52);
    const float result = static_cast<float>((low + f4 * high) * power);
    d[i] = a[i] == a[i] ? result : as_float(0x7fffffffu);
  }
}

void lanes_lg2(float* d, const float* a) {
  each_in_double(d, a, [](double x) { return std::log2(x); });
}
void lanes_rsqrt(float* d, const float* a) {
  each_in_double(d, a, [](double x) { return 1.0 / std::sqrt(x); });
}
void lanes_sin(float* d, const float* a) {
  each_in_double(d, a, [](double x) { return std::sin(x); });
}
void lanes_cos(float* d, const float* a) {
  each_in_double(d, a, [](double x) { return std::cos(x); });
}
void lanes_tanh(float* d, const float* a) {
  each_in_double(d, a, [](double x) { return std::tanh(x); });
}

void lanes_div_approx(float* d, const float* a, const float* b) {
  for (int i = 0; i < kLanes; ++i) {
    // Beyond 2^126 the reciprocal is flushed to zero, so that infinity over it is NaN.
    const float magnitude = as_float(bits_of(b[i]) & 0x7fffffffu);
    const bool flushed = (magnitude > 0x1p126f) & (magnitude < as_float(0x7f800000u));
    const float zero = as_float((bits_of(a[i]) ^ bits_of(b[i])) & 0x80000000u);
    const float tiny = a[i] - a[i] == 0.0f ? zero : as_float(0x7fffffffu);
    d[i] = flushed ? tiny : canonical(a[i] / b[i]);
  }
}

namespace {

// The f64 approximations see the upper half of their operand, without subnormals, and leave the lower half zero.
double upper(double x) {
  const uint64_t bits = bits_of(x) & 0xffffffff00000000u;
  return as_double((bits & kF64.infinity()) != 0 ? bits : bits & kF64.sign());
}

}  // namespace

double rcp_approx_ftz(double a) { return canonical(a == a ? upper(1.0 / upper(a)) : a); }
double rsqrt_approx_ftz(double a) { return canonical(a == a ? upper(1.0 / std::sqrt(upper(a))) : a); }

}  // namespace emulator::numerics
