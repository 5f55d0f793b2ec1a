// SPDX-License-Identifier: Apache-2.0
// execute_half.cpp: f16 and bf16 arithmetic, alone and in pairs. The numbers are floats in between: sums, products and
// fma come as floats that round to the right half (numerics.h), everything else is exact in a float.
#include "execute_float.h"

namespace emulator {

using namespace numerics;

namespace {

enum class HalfOp : uint8_t { kAdd, kSub, kMul, kFma, kMin, kMax, kAbs, kNeg };

struct HalfControl {
  bool ftz = false, saturate = false, relu = false, nan = false, xorsign = false;
  bool any() const { return ftz || saturate || relu || nan || xorsign; }
  uint32_t pack() const { return ftz | saturate << 1 | relu << 2 | nan << 3 | xorsign << 4; }
  static HalfControl unpack(uint32_t bits) {
    return {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0, (bits & 16) != 0};
  }
};

inline uint32_t flush_f16(uint32_t bits) { return (bits & 0x7c00u) != 0 ? bits : bits & 0x8000u; }

template <bool kBf16>
inline float to_float(uint32_t bits) {
  return kBf16 ? float_from_bf16(bits) : float_from_f16(bits);
}
template <bool kBf16>
inline uint32_t from_float(float x) {
  return kBf16 ? bf16_from_float(x) : f16_from_float(x);
}

// One half. kPlain: `control` is empty.
template <bool kBf16, HalfOp kOp, bool kPlain>
inline uint32_t operate(uint32_t a, uint32_t b, uint32_t c, HalfControl control) {
  if constexpr (kOp == HalfOp::kAbs || kOp == HalfOp::kNeg) {
    if (!kPlain && control.ftz) a = flush_f16(a);
    if (!kBf16 && (a & 0x7fffu) > 0x7c00u) return 0x7fffu;  // f16 goes through the adder, bf16 does not
    return kOp == HalfOp::kAbs ? a & 0x7fffu : a ^ 0x8000u;
  } else {
    if (!kPlain && control.ftz) a = flush_f16(a), b = flush_f16(b), c = flush_f16(c);
    const uint32_t sign = (a ^ b) & 0x8000u;
    if (!kPlain && control.xorsign) a &= 0x7fffu, b &= 0x7fffu;
    const float x = to_float<kBf16>(a), y = to_float<kBf16>(b);
    float result;
    if constexpr (kOp == HalfOp::kAdd) result = x + y;
    if constexpr (kOp == HalfOp::kSub) result = x - y;
    if constexpr (kOp == HalfOp::kMul) {
      // A product of bf16 may be subnormal as a float; the fma rounds it once. -0 keeps the sign of a zero product.
      result = kBf16 ? bf16_fma(x, y, -0.0f) : x * y;
    }
    if constexpr (kOp == HalfOp::kFma) {
      const float z = to_float<kBf16>(c);
      result = kBf16 ? bf16_fma(x, y, z) : f16_fma(x, y, z);
    }
    if constexpr (kOp == HalfOp::kMin) {
      result = !kPlain && control.nan ? minimum<true>(x, y) : minimum<false>(x, y);
    }
    if constexpr (kOp == HalfOp::kMax) {
      result = !kPlain && control.nan ? maximum<true>(x, y) : maximum<false>(x, y);
    }
    if (!kPlain && control.saturate) result = saturate(result);
    if (!kPlain && control.relu) result = maximum<true>(result, 0.0f);
    uint32_t bits = from_float<kBf16>(result);
    if (!kPlain && control.ftz) bits = flush_f16(bits);
    if (!kPlain && control.xorsign && result == result) bits |= sign;
    return bits;
  }
}

template <bool kBf16, bool kPair, HalfOp kOp, bool kPlain>
void execute_half(Warp& warp, const Instruction& in) {
  const HalfControl control = HalfControl::unpack(in.aux);
  using Word = std::conditional_t<kPair, uint32_t, uint16_t>;
  const Word* a = warp.lanes<Word>(in.operands[1]);
  const Word* b = warp.lanes<Word>(in.operands[2]);
  const Word* c = warp.lanes<Word>(in.operands[3]);
  warp.write<Word>(in.operands[0], [=](int i) {
    const uint32_t x = a[i], y = b[i], z = c[i];
    uint32_t bits = operate<kBf16, kOp, kPlain>(x & 0xffffu, y & 0xffffu, z & 0xffffu, control);
    if constexpr (kPair) bits |= operate<kBf16, kOp, kPlain>(x >> 16, y >> 16, z >> 16, control) << 16;
    return static_cast<Word>(bits);
  });
}

template <HalfOp kOp, bool kPlain>
Execute choose_half(Type type) {
  switch (type) {
    case Type::kF16: return execute_half<false, false, kOp, kPlain>;
    case Type::kF16x2: return execute_half<false, true, kOp, kPlain>;
    case Type::kBF16: return execute_half<true, false, kOp, kPlain>;
    default: return execute_half<true, true, kOp, kPlain>;
  }
}
template <HalfOp kOp>
Execute choose_half(Type type, bool plain) {
  return plain ? choose_half<kOp, true>(type) : choose_half<kOp, false>(type);
}

void decode_operation(Decoder& decoder, const ptx::Instruction& in, Instruction& out, HalfOp op, Modifiers& mods) {
  const bool arithmetic = op <= HalfOp::kFma, minmax = op == HalfOp::kMin || op == HalfOp::kMax;
  HalfControl control;
  if (arithmetic) {
    mods.take("rn");
    control.saturate = mods.take("sat");
    control.relu = op == HalfOp::kFma && mods.take("relu");
  }
  if (minmax) {
    control.nan = mods.take("NaN");
    control.xorsign = mods.take("xorsign");
    if (control.xorsign && !mods.take("abs")) decoder.error("expected .abs behind .xorsign");
  }
  control.ftz = mods.take("ftz");
  const Type type = mods.take_type();
  mods.finish();
  if (is_bf16(type) && (control.ftz || control.saturate)) decoder.error("expected no .ftz or .sat with bf16");
  const int num_sources = op == HalfOp::kFma ? 3 : op == HalfOp::kAbs || op == HalfOp::kNeg ? 1 : 2;
  decoder.expect_operands(in, static_cast<size_t>(num_sources) + 1);

  std::vector<Operand> operands = {decoder.destination(in.operands[0], type)};
  for (int s = 1; s <= num_sources; ++s) operands.push_back(decoder.source(in.operands[static_cast<size_t>(s)], type));
  while (operands.size() < 4) operands.push_back(operands.back());
  decoder.set_operands(out, operands);
  out.cls = InstructionClass::kHalf;
  out.aux = control.pack();
  const bool plain = !control.any();
  switch (op) {
    case HalfOp::kAdd: out.execute = choose_half<HalfOp::kAdd>(type, plain); break;
    case HalfOp::kSub: out.execute = choose_half<HalfOp::kSub>(type, plain); break;
    case HalfOp::kMul: out.execute = choose_half<HalfOp::kMul>(type, plain); break;
    case HalfOp::kFma: out.execute = choose_half<HalfOp::kFma>(type, plain); break;
    case HalfOp::kMin: out.execute = choose_half<HalfOp::kMin>(type, plain); break;
    case HalfOp::kMax: out.execute = choose_half<HalfOp::kMax>(type, plain); break;
    case HalfOp::kAbs: out.execute = choose_half<HalfOp::kAbs>(type, plain); break;
    case HalfOp::kNeg: out.execute = choose_half<HalfOp::kNeg>(type, plain); break;
  }
}

// ex2 and tanh. .ftz belongs to ex2 of bf16, whose subnormal results become zero.
template <void (*kFunction)(float*, const float*), bool kBf16, bool kPair>
void execute_function(Warp& warp, const Instruction& in) {
  using Word = std::conditional_t<kPair, uint32_t, uint16_t>;
  alignas(64) float argument[kWarpLanes], result[2][kWarpLanes] = {};
  for (int half = 0; half <= (kPair ? 1 : 0); ++half) {
    load_halves<kBf16, kPair>(warp, in.operands[1], half == 1, argument);
    kFunction(result[half], argument);
    if constexpr (kBf16) {
      if (in.aux != 0) {
        for (float& number : result[half]) number = flush(number);
      }
    }
  }
  const float* low = result[0];
  const float* high = result[1];
  warp.write<Word>(in.operands[0], [=](int i) {
    uint32_t bits = from_float<kBf16>(low[i]);
    if constexpr (kPair) bits |= from_float<kBf16>(high[i]) << 16;
    return static_cast<Word>(bits);
  });
}

template <void (*kFunction)(float*, const float*)>
Execute choose_function(Type type) {
  switch (type) {
    case Type::kF16: return execute_function<kFunction, false, false>;
    case Type::kF16x2: return execute_function<kFunction, false, true>;
    case Type::kBF16: return execute_function<kFunction, true, false>;
    default: return execute_function<kFunction, true, true>;
  }
}

void decode_function(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Modifiers& mods) {
  const bool ex2 = in.parts[0] == "ex2";
  if (!mods.take("approx")) decoder.error("expected .approx");
  const bool ftz = ex2 && mods.take("ftz");
  const Type type = mods.take_type();
  mods.finish();
  if (ex2 && is_bf16(type) != ftz) decoder.error("expected .ftz with bf16 and only there");
  decoder.expect_operands(in, 2);
  out.cls = InstructionClass::kMufu;
  out.aux = ftz;
  out.execute = ex2 ? choose_function<lanes_ex2>(type) : choose_function<lanes_tanh>(type);
  decoder.set_operands(out, {decoder.destination(in.operands[0], type), decoder.source(in.operands[1], type)});
}

// add, sub and fma of f32 whose first operands are halves (sm_100).
template <bool kSubtract>
void execute_mixed(Warp& warp, const Instruction& in) {
  alignas(64) float a[kWarpLanes], b[kWarpLanes], result[kWarpLanes];
  const Type type = static_cast<Type>(in.aux & 0xff);
  const bool fma = (in.aux & 1u << 16) != 0;
  load_halves(warp, in.operands[1], type, false, a);
  if (fma) load_halves(warp, in.operands[2], type, false, b);
  const float* c = warp.lanes<float>(in.operands[3]);
  const FloatControl control{static_cast<Rounding>(in.aux >> 8 & 0xff), false, (in.aux & 1u << 17) != 0};
  if (fma) {
    lanes_arithmetic(FloatOp::kFma, control, result, a, b, c);
  } else {
    lanes_arithmetic(kSubtract ? FloatOp::kSub : FloatOp::kAdd, control, result, a, c, c);
  }
  store_lanes(warp, in.operands[0], result);
}

void decode_mixed(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Modifiers& mods) {
  const bool fma = in.parts[0] == "fma", subtract = in.parts[0] == "sub";
  decoder.require_architecture(100);
  const Rounding rounding = take_rounding(mods);
  const bool saturate = mods.take("sat");
  const Type to = mods.take_type(), from = mods.take_type();
  mods.finish();
  if (to != Type::kF32 || is_pair(from)) decoder.error("expected .f32.f16 or .f32.bf16");
  decoder.expect_operands(in, fma ? 4 : 3);
  const Operand a = decoder.source(in.operands[1], from);
  const Operand b = fma ? decoder.source(in.operands[2], from) : a;
  const Operand c = decoder.source(in.operands[fma ? 3 : 2], Type::kF32);
  decoder.set_operands(out, {decoder.destination(in.operands[0], Type::kF32), a, b, c});
  out.cls = InstructionClass::kFma;
  out.aux = static_cast<uint32_t>(from) | static_cast<uint32_t>(rounding) << 8 | (fma ? 1u << 16 : 0) |
            (saturate ? 1u << 17 : 0);
  out.execute = subtract ? execute_mixed<true> : execute_mixed<false>;
}

}  // namespace

bool decode_half(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Type) {
  constexpr const char* kNames[] = {"add", "sub", "mul", "fma", "min", "max", "abs", "neg"};
  const std::string& name = in.parts[0];
  Modifiers mods(decoder, in);
  const bool mixed = in.parts.size() > 2 && in.parts[in.parts.size() - 2] == "f32";
  if (mixed && (name == "add" || name == "sub" || name == "fma")) return decode_mixed(decoder, in, out, mods), true;
  if (name == "ex2" || name == "tanh") return decode_function(decoder, in, out, mods), true;
  for (int op = 0; op < 8; ++op) {
    if (name == kNames[op]) return decode_operation(decoder, in, out, static_cast<HalfOp>(op), mods), true;
  }
  return false;
}

}  // namespace emulator
