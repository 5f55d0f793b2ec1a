// SPDX-License-Identifier: Apache-2.0
// execute_float.cpp: f32 and f64 arithmetic. Each instruction becomes one function that has its modifiers compiled in,
// except for the rounding modes rz, rm and rp, which are rare and read them from in.aux.
#include "execute_float.h"

#include <cmath>
#include <cstring>

namespace emulator {

using namespace numerics;

namespace {

constexpr InstructionClass class_of(Type type) {
  return type == Type::kF64 ? InstructionClass::kFp64 : InstructionClass::kFma;
}

// ---- add sub mul fma, to nearest even -------------------------------------------------------------------------------

struct Add {
  template <class T>
  static T run(T a, T b, T) {
    return a + b;
  }
};
struct Sub {
  template <class T>
  static T run(T a, T b, T) {
    return a - b;
  }
};
struct Mul {
  template <class T>
  static T run(T a, T b, T) {
    return a * b;
  }
};
struct Fma {
  template <class T>
  static T run(T a, T b, T c) {
    return std::fma(a, b, c);
  }
};

// For two operands decode passes the second again as the third.
template <class T, class Op, bool kFtz, bool kSat>
void execute_arithmetic(Warp& warp, const Instruction& in) {
  const T* a = warp.lanes<T>(in.operands[1]);
  const T* b = warp.lanes<T>(in.operands[2]);
  const T* c = warp.lanes<T>(in.operands[3]);
  warp.write<T>(in.operands[0], [=](int i) {
    T x = a[i], y = b[i], z = c[i];
    if constexpr (kFtz) x = flush(x), y = flush(y), z = flush(z);
    T result = canonical(Op::run(x, y, z));
    if constexpr (kFtz) result = flush(result);
    if constexpr (kSat) result = saturate(result);
    return result;
  });
}

template <class T, class Op>
Execute choose_arithmetic(bool ftz, bool sat) {
  if (ftz) return sat ? execute_arithmetic<T, Op, true, true> : execute_arithmetic<T, Op, true, false>;
  return sat ? execute_arithmetic<T, Op, false, true> : execute_arithmetic<T, Op, false, false>;
}

// ---- any operation, any rounding ------------------------------------------------------------------------------------

constexpr uint32_t pack(FloatOp op, FloatControl control) {
  return static_cast<uint32_t>(op) | static_cast<uint32_t>(control.rounding) << 8 | (control.ftz ? 1u << 16 : 0) |
         (control.saturate ? 1u << 17 : 0);
}

template <class T>
void execute_rounded(Warp& warp, const Instruction& in) {
  alignas(64) T result[kWarpLanes];
  const FloatControl control{static_cast<Rounding>(in.aux >> 8 & 0xff), (in.aux & 1u << 16) != 0,
                             (in.aux & 1u << 17) != 0};
  lanes_arithmetic(static_cast<FloatOp>(in.aux & 0xff), control, result, warp.lanes<T>(in.operands[1]),
                   warp.lanes<T>(in.operands[2]), warp.lanes<T>(in.operands[3]));
  store_lanes(warp, in.operands[0], result);
}

void decode_arithmetic(Decoder& decoder, const ptx::Instruction& in, Instruction& out, FloatOp op, Modifiers& mods) {
  const bool three = op == FloatOp::kFma, one = op == FloatOp::kSqrt || op == FloatOp::kRcp;
  FloatControl control;
  control.rounding = take_rounding(mods);
  control.ftz = mods.take("ftz");
  control.saturate = mods.take("sat");
  const Type type = mods.take_type();
  mods.finish();
  if (type == Type::kF64 && (control.ftz || control.saturate)) decoder.error("expected no .ftz or .sat with .f64");
  const bool divides = op == FloatOp::kDiv || one;
  if (divides && control.saturate) decoder.error("unknown modifier .sat");
  decoder.expect_operands(in, three ? 4 : one ? 2 : 3);

  out.cls = type == Type::kF64 ? InstructionClass::kFp64 : divides ? InstructionClass::kMufu : InstructionClass::kFma;
  const Operand d = decoder.destination(in.operands[0], type);
  const Operand a = decoder.source(in.operands[1], type);
  const Operand b = one ? a : decoder.source(in.operands[2], type);
  const Operand c = three ? decoder.source(in.operands[3], type) : b;
  decoder.set_operands(out, {d, a, b, c});
  const bool f64 = type == Type::kF64;
  if (control.rounding != Rounding::kRn || divides) {
    out.aux = pack(op, control);
    out.execute = f64 ? execute_rounded<double> : execute_rounded<float>;
    return;
  }
  const bool ftz = control.ftz, sat = control.saturate;
  switch (op) {
    case FloatOp::kAdd:
      out.execute = f64 ? execute_arithmetic<double, Add, false, false> : choose_arithmetic<float, Add>(ftz, sat);
      break;
    case FloatOp::kSub:
      out.execute = f64 ? execute_arithmetic<double, Sub, false, false> : choose_arithmetic<float, Sub>(ftz, sat);
      break;
    case FloatOp::kMul:
      out.execute = f64 ? execute_arithmetic<double, Mul, false, false> : choose_arithmetic<float, Mul>(ftz, sat);
      break;
    default:
      out.execute = f64 ? execute_arithmetic<double, Fma, false, false> : choose_arithmetic<float, Fma>(ftz, sat);
      break;
  }
}

// ---- min max abs neg copysign ---------------------------------------------------------------------------------------

template <bool kMax, bool kNan, bool kFtz, bool kXorsign>
void execute_min_max(Warp& warp, const Instruction& in) {
  const float* a = warp.lanes<float>(in.operands[1]);
  const float* b = warp.lanes<float>(in.operands[2]);
  warp.write<float>(in.operands[0], [=](int i) {
    float x = a[i], y = b[i];
    if constexpr (kFtz) x = flush(x), y = flush(y);
    const uint32_t sign = (bits_of(x) ^ bits_of(y)) & 0x80000000u;
    if constexpr (kXorsign) x = as_float(bits_of(x) & 0x7fffffffu), y = as_float(bits_of(y) & 0x7fffffffu);
    const float result = kMax ? maximum<kNan>(x, y) : minimum<kNan>(x, y);
    if constexpr (kXorsign) return result == result ? as_float(bits_of(result) | sign) : result;
    return result;
  });
}
template <bool kMax>
void execute_min_max_f64(Warp& warp, const Instruction& in) {
  const double* a = warp.lanes<double>(in.operands[1]);
  const double* b = warp.lanes<double>(in.operands[2]);
  warp.write<double>(in.operands[0], [=](int i) { return kMax ? maximum(a[i], b[i]) : minimum(a[i], b[i]); });
}

template <bool kMax, bool kNan, bool kFtz>
Execute choose_min_max(bool xorsign) {
  return xorsign ? execute_min_max<kMax, kNan, kFtz, true> : execute_min_max<kMax, kNan, kFtz, false>;
}
template <bool kMax>
Execute choose_min_max(bool nan, bool ftz, bool xorsign) {
  if (nan) return ftz ? choose_min_max<kMax, true, true>(xorsign) : choose_min_max<kMax, true, false>(xorsign);
  return ftz ? choose_min_max<kMax, false, true>(xorsign) : choose_min_max<kMax, false, false>(xorsign);
}

void decode_min_max(Decoder& decoder, const ptx::Instruction& in, Instruction& out, bool is_max, Modifiers& mods) {
  const bool ftz = mods.take("ftz"), nan = mods.take("NaN"), xorsign = mods.take("xorsign");
  if (xorsign && !mods.take("abs")) decoder.error("expected .abs behind .xorsign");
  const Type type = mods.take_type();
  mods.finish();
  if (type == Type::kF64 && (ftz || nan || xorsign)) decoder.error("expected no modifier with .f64");
  decoder.expect_operands(in, 3);
  out.cls = type == Type::kF64 ? InstructionClass::kFp64 : InstructionClass::kFpMinMaxCompare;
  if (type == Type::kF64) {
    out.execute = is_max ? execute_min_max_f64<true> : execute_min_max_f64<false>;
  } else {
    out.execute = is_max ? choose_min_max<true>(nan, ftz, xorsign) : choose_min_max<false>(nan, ftz, xorsign);
  }
  decoder.set_operands(out, {decoder.destination(in.operands[0], type), decoder.source(in.operands[1], type),
                             decoder.source(in.operands[2], type)});
}

template <class Bits, bool kNegate, bool kFtz>
void execute_sign(Warp& warp, const Instruction& in) {
  constexpr Bits kSign = Bits{1} << (8 * sizeof(Bits) - 1);
  const Bits* a = warp.lanes<Bits>(in.operands[1]);
  warp.write<Bits>(in.operands[0], [=](int i) {
    Bits bits = a[i];
    if constexpr (kFtz) bits = static_cast<Bits>(bits_of(flush(as_float(static_cast<uint32_t>(bits)))));
    return kNegate ? bits ^ kSign : bits & ~kSign;
  });
}

void decode_sign(Decoder& decoder, const ptx::Instruction& in, Instruction& out, bool negate, Modifiers& mods) {
  const bool ftz = mods.take("ftz");
  const Type type = mods.take_type();
  mods.finish();
  decoder.expect_operands(in, 2);
  out.cls = class_of(type);
  if (type == Type::kF64) {
    if (ftz) decoder.error("expected no .ftz with .f64");
    out.execute = negate ? execute_sign<uint64_t, true, false> : execute_sign<uint64_t, false, false>;
  } else if (ftz) {
    out.execute = negate ? execute_sign<uint32_t, true, true> : execute_sign<uint32_t, false, true>;
  } else {
    out.execute = negate ? execute_sign<uint32_t, true, false> : execute_sign<uint32_t, false, false>;
  }
  decoder.set_operands(out, {decoder.destination(in.operands[0], type), decoder.source(in.operands[1], type)});
}

// d has the sign of the first operand and the magnitude of the second.
template <class Bits>
void execute_copysign(Warp& warp, const Instruction& in) {
  constexpr Bits kSign = Bits{1} << (8 * sizeof(Bits) - 1);
  const Bits* a = warp.lanes<Bits>(in.operands[1]);
  const Bits* b = warp.lanes<Bits>(in.operands[2]);
  warp.write<Bits>(in.operands[0], [=](int i) { return (a[i] & kSign) | (b[i] & ~kSign); });
}

void decode_copysign(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Modifiers& mods) {
  const Type type = mods.take_type();
  mods.finish();
  decoder.expect_operands(in, 3);
  out.cls = InstructionClass::kIntAlu;
  out.execute = type == Type::kF64 ? execute_copysign<uint64_t> : execute_copysign<uint32_t>;
  decoder.set_operands(out, {decoder.destination(in.operands[0], type), decoder.source(in.operands[1], type),
                             decoder.source(in.operands[2], type)});
}

// ---- approximations -------------------------------------------------------------------------------------------------

void lanes_rcp(float* d, const float* a) {
  for (int i = 0; i < kWarpLanes; ++i) d[i] = canonical(1.0f / a[i]);
}
void lanes_sqrt(float* d, const float* a) {
  for (int i = 0; i < kWarpLanes; ++i) d[i] = canonical(std::sqrt(a[i]));
}

template <void (*kFunction)(float*, const float*), bool kFtz>
void execute_function(Warp& warp, const Instruction& in) {
  alignas(64) float argument[kWarpLanes], result[kWarpLanes];
  const float* a = warp.lanes<float>(in.operands[1]);
  if constexpr (kFtz) {
    for (int i = 0; i < kWarpLanes; ++i) argument[i] = flush(a[i]);
    a = argument;
  }
  kFunction(result, a);
  if constexpr (kFtz) {
    for (int i = 0; i < kWarpLanes; ++i) result[i] = flush(result[i]);
  }
  store_lanes(warp, in.operands[0], result);
}

template <double (*kFunction)(double)>
void execute_function_f64(Warp& warp, const Instruction& in) {
  const double* a = warp.lanes<double>(in.operands[1]);
  warp.write<double>(in.operands[0], [=](int i) { return kFunction(a[i]); });
}
double rsqrt_approx(double a) { return canonical(1.0 / std::sqrt(a)); }

struct Approximation {
  const char* name;
  Execute plain, ftz, f64, f64_ftz;
};
constexpr Approximation kApproximations[] = {
    {"ex2", execute_function<lanes_ex2, false>, execute_function<lanes_ex2, true>, nullptr, nullptr},
    {"lg2", execute_function<lanes_lg2, false>, execute_function<lanes_lg2, true>, nullptr, nullptr},
    {"rcp", execute_function<lanes_rcp, false>, execute_function<lanes_rcp, true>, nullptr,
     execute_function_f64<rcp_approx_ftz>},
    {"rsqrt", execute_function<lanes_rsqrt, false>, execute_function<lanes_rsqrt, true>,
     execute_function_f64<rsqrt_approx>, execute_function_f64<rsqrt_approx_ftz>},
    {"sqrt", execute_function<lanes_sqrt, false>, execute_function<lanes_sqrt, true>, nullptr, nullptr},
    {"sin", execute_function<lanes_sin, false>, execute_function<lanes_sin, true>, nullptr, nullptr},
    {"cos", execute_function<lanes_cos, false>, execute_function<lanes_cos, true>, nullptr, nullptr},
    {"tanh", execute_function<lanes_tanh, false>, nullptr, nullptr, nullptr},
};

bool decode_approximation(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Modifiers& mods) {
  for (const Approximation& function : kApproximations) {
    if (in.parts[0] != function.name) continue;
    if (!mods.take("approx")) {
      if (in.parts[0] == "rcp") return decode_arithmetic(decoder, in, out, FloatOp::kRcp, mods), true;
      if (in.parts[0] == "sqrt") return decode_arithmetic(decoder, in, out, FloatOp::kSqrt, mods), true;
      decoder.error("expected .approx");
    }
    const bool ftz = mods.take("ftz");
    const Type type = mods.take_type();
    mods.finish();
    decoder.expect_operands(in, 2);
    const bool f64 = type == Type::kF64;
    out.execute = f64 ? (ftz ? function.f64_ftz : function.f64) : ftz ? function.ftz : function.plain;
    if (out.execute == nullptr) decoder.error(std::string("no such form of ") + function.name);
    out.cls = InstructionClass::kMufu;
    decoder.set_operands(out, {decoder.destination(in.operands[0], type), decoder.source(in.operands[1], type)});
    return true;
  }
  return false;
}

template <bool kFull, bool kFtz>
void execute_div_approx(Warp& warp, const Instruction& in) {
  alignas(64) float x[kWarpLanes], y[kWarpLanes], result[kWarpLanes];
  const float* a = warp.lanes<float>(in.operands[1]);
  const float* b = warp.lanes<float>(in.operands[2]);
  for (int i = 0; i < kWarpLanes; ++i) {
    x[i] = kFtz ? flush(a[i]) : a[i];
    y[i] = kFtz ? flush(b[i]) : b[i];
  }
  if constexpr (kFull) {
    for (int i = 0; i < kWarpLanes; ++i) result[i] = canonical(x[i] / y[i]);
  } else {
    lanes_div_approx(result, x, y);
  }
  if constexpr (kFtz) {
    for (int i = 0; i < kWarpLanes; ++i) result[i] = flush(result[i]);
  }
  store_lanes(warp, in.operands[0], result);
}

void decode_div(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Modifiers& mods) {
  const bool approx = mods.take("approx"), full = !approx && mods.take("full");
  if (!approx && !full) return decode_arithmetic(decoder, in, out, FloatOp::kDiv, mods);
  const bool ftz = mods.take("ftz");
  const Type type = mods.take_type();
  mods.finish();
  if (type != Type::kF32) decoder.error("expected .f32");
  decoder.expect_operands(in, 3);
  out.cls = InstructionClass::kMufu;
  out.execute = full ? (ftz ? execute_div_approx<true, true> : execute_div_approx<true, false>)
                     : (ftz ? execute_div_approx<false, true> : execute_div_approx<false, false>);
  decoder.set_operands(out, {decoder.destination(in.operands[0], type), decoder.source(in.operands[1], type),
                             decoder.source(in.operands[2], type)});
}

}  // namespace

Rounding take_rounding(Modifiers& mods, int* index) {
  const int found = mods.take_one_of({"rn", "rz", "rm", "rp"});
  if (index != nullptr) *index = found;
  return found < 0 ? Rounding::kRn : static_cast<Rounding>(found);
}

bool decode_float(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  if (in.parts.size() < 2) return false;
  const Type type = type_of(in.parts.back());
  if (decode_compare(decoder, in, out, type)) return true;
  if (is_half(type)) return decode_half(decoder, in, out, type);
  if (type != Type::kF32 && type != Type::kF64) return false;
  const std::string& name = in.parts[0];
  Modifiers mods(decoder, in);
  if (name == "add") {
    decode_arithmetic(decoder, in, out, FloatOp::kAdd, mods);
  } else if (name == "sub") {
    decode_arithmetic(decoder, in, out, FloatOp::kSub, mods);
  } else if (name == "mul") {
    decode_arithmetic(decoder, in, out, FloatOp::kMul, mods);
  } else if (name == "fma" || name == "mad") {  // mad is fma since sm_20
    decode_arithmetic(decoder, in, out, FloatOp::kFma, mods);
  } else if (name == "div") {
    decode_div(decoder, in, out, mods);
  } else if (name == "min" || name == "max") {
    decode_min_max(decoder, in, out, name == "max", mods);
  } else if (name == "abs" || name == "neg") {
    decode_sign(decoder, in, out, name == "neg", mods);
  } else if (name == "copysign") {
    decode_copysign(decoder, in, out, mods);
  } else {
    return decode_approximation(decoder, in, out, mods);
  }
  return true;
}

}  // namespace emulator
