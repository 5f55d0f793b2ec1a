// SPDX-License-Identifier: Apache-2.0
// execute_compare.cpp: set, setp and testp of floating-point numbers. Halves are compared as floats.
#include "execute_float.h"

namespace emulator {

using namespace numerics;

namespace {

enum class BoolOp : uint8_t { kNone, kAnd, kOr, kXor };
enum class Result : uint8_t { kInteger, kFloat, kHalf, kBf16 };  // of set: what true looks like

// in.aux of a comparison.
struct Comparison {
  Compare how;
  BoolOp combine;
  bool ftz;
  Type type;      // of the operands
  Result result;  // set only
  Type to;        // set only

  uint32_t pack() const {
    return static_cast<uint32_t>(how) | static_cast<uint32_t>(combine) << 4 | (ftz ? 1u << 6 : 0) |
           static_cast<uint32_t>(type) << 8 | static_cast<uint32_t>(result) << 16 | static_cast<uint32_t>(to) << 24;
  }
  static Comparison unpack(uint32_t aux) {
    return {static_cast<Compare>(aux & 15),     static_cast<BoolOp>(aux >> 4 & 3),     (aux & 1u << 6) != 0,
            static_cast<Type>(aux >> 8 & 0xff), static_cast<Result>(aux >> 16 & 0xff), static_cast<Type>(aux >> 24)};
  }
};

template <class T, Compare kHow>
uint32_t compare_lanes(const T* a, const T* b) {
  uint32_t mask = 0;
  for (int i = 0; i < kWarpLanes; ++i) mask |= static_cast<uint32_t>(compare(kHow, a[i], b[i])) << i;
  return mask;
}

template <class T>
constexpr uint32_t (*kCompareLanes[])(const T*, const T*) = {
    compare_lanes<T, Compare::kEq>,  compare_lanes<T, Compare::kNe>,  compare_lanes<T, Compare::kLt>,
    compare_lanes<T, Compare::kLe>,  compare_lanes<T, Compare::kGt>,  compare_lanes<T, Compare::kGe>,
    compare_lanes<T, Compare::kEqu>, compare_lanes<T, Compare::kNeu>, compare_lanes<T, Compare::kLtu>,
    compare_lanes<T, Compare::kLeu>, compare_lanes<T, Compare::kGtu>, compare_lanes<T, Compare::kGeu>,
    compare_lanes<T, Compare::kNum>, compare_lanes<T, Compare::kNan>};

// Lanes where the comparison holds; `high`: of the upper halves of pairs.
uint32_t compare_operands(Warp& warp, const Comparison& comparison, Operand a, Operand b, bool high) {
  const auto how = static_cast<size_t>(comparison.how);
  if (comparison.type == Type::kF64) return kCompareLanes<double>[how](warp.lanes<double>(a), warp.lanes<double>(b));
  const float* x = warp.lanes<float>(a);
  const float* y = warp.lanes<float>(b);
  alignas(64) float copies[2][kWarpLanes];
  if (comparison.type != Type::kF32) {
    load_halves(warp, a, comparison.type, high, copies[0]);
    load_halves(warp, b, comparison.type, high, copies[1]);
    if (comparison.ftz) {  // of f16: subnormal halves
      for (auto& copy : copies) {
        for (float& number : copy) {
          if (bits_of(number) << 1 < bits_of(0x1p-14f) << 1) number = as_float(bits_of(number) & 0x80000000u);
        }
      }
    }
    x = copies[0], y = copies[1];
  } else if (comparison.ftz) {
    for (int i = 0; i < kWarpLanes; ++i) copies[0][i] = flush(x[i]), copies[1][i] = flush(y[i]);
    x = copies[0], y = copies[1];
  }
  return kCompareLanes<float>[how](x, y);
}

uint32_t combine(BoolOp op, uint32_t holds, uint32_t other) {
  switch (op) {
    case BoolOp::kAnd: return holds & other;
    case BoolOp::kOr: return holds | other;
    case BoolOp::kXor: return holds ^ other;
    default: return holds;
  }
}

// Operands p, q, a, b[, c]. q is the opposite of p, or of pairs the comparison of the upper halves.
void execute_setp(Warp& warp, const Instruction& in) {
  const Comparison comparison = Comparison::unpack(in.aux);
  const uint32_t other = comparison.combine == BoolOp::kNone ? 0 : warp.mask(in.operands[4]);
  const Operand a = in.operands[2], b = in.operands[3];
  const uint32_t low = compare_operands(warp, comparison, a, b, false);
  const uint32_t second = is_pair(comparison.type) ? compare_operands(warp, comparison, a, b, true) : ~low;
  warp.set_mask(in.operands[0], combine(comparison.combine, low, other));
  if (in.operands[1].bank() != Operand::kSink)
    warp.set_mask(in.operands[1], combine(comparison.combine, second, other));
}

// setp.lt.f32 p, a, b and its like, without modifiers.
template <Compare kHow>
void execute_setp_f32(Warp& warp, const Instruction& in) {
  warp.set_mask(in.operands[0],
                compare_lanes<float, kHow>(warp.lanes<float>(in.operands[2]), warp.lanes<float>(in.operands[3])));
}
constexpr Execute kSetpF32[] = {
    execute_setp_f32<Compare::kEq>,  execute_setp_f32<Compare::kNe>,  execute_setp_f32<Compare::kLt>,
    execute_setp_f32<Compare::kLe>,  execute_setp_f32<Compare::kGt>,  execute_setp_f32<Compare::kGe>,
    execute_setp_f32<Compare::kEqu>, execute_setp_f32<Compare::kNeu>, execute_setp_f32<Compare::kLtu>,
    execute_setp_f32<Compare::kLeu>, execute_setp_f32<Compare::kGtu>, execute_setp_f32<Compare::kGeu>,
    execute_setp_f32<Compare::kNum>, execute_setp_f32<Compare::kNan>};

// Operands d, a, b[, c].
void execute_set(Warp& warp, const Instruction& in) {
  const Comparison comparison = Comparison::unpack(in.aux);
  const uint32_t other = comparison.combine == BoolOp::kNone ? 0 : warp.mask(in.operands[3]);
  const Operand a = in.operands[1], b = in.operands[2];
  const uint32_t low = combine(comparison.combine, compare_operands(warp, comparison, a, b, false), other);
  const bool pair = is_pair(comparison.type);
  const uint32_t high = pair ? combine(comparison.combine, compare_operands(warp, comparison, a, b, true), other) : 0;
  uint32_t truth = num_bytes(comparison.to) == 2 || pair ? 0xffffu : 0xffffffffu;
  if (comparison.result == Result::kFloat) truth = bits_of(1.0f);
  if (comparison.result == Result::kHalf) truth = static_cast<uint32_t>(kF16.one());
  if (comparison.result == Result::kBf16) truth = static_cast<uint32_t>(kBf16.one());
  const auto value = [=](int i) { return (low >> i & 1 ? truth : 0) | (high >> i & 1 ? truth << 16 : 0); };
  if (num_bytes(comparison.to) == 2) {
    warp.write<uint16_t>(in.operands[0], [=](int i) { return static_cast<uint16_t>(value(i)); });
  } else {
    warp.write<uint32_t>(in.operands[0], value);
  }
}

void execute_testp(Warp& warp, const Instruction& in) {
  const auto test = static_cast<Test>(in.aux & 0xff);
  uint32_t mask = 0;
  for (int i = 0; i < kWarpLanes; ++i) {
    const bool holds = (in.aux >> 8) != 0 ? test_property(test, kF64, warp.lanes<uint64_t>(in.operands[1])[i])
                                          : test_property(test, kF32, warp.lanes<uint32_t>(in.operands[1])[i]);
    mask |= static_cast<uint32_t>(holds) << i;
  }
  warp.set_mask(in.operands[0], mask);
}

InstructionClass class_of(Type type) {
  return type == Type::kF64 ? InstructionClass::kFp64
         : is_half(type)    ? InstructionClass::kHalf
                            : InstructionClass::kFpMinMaxCompare;
}

// Takes .CmpOp, .BoolOp and .ftz.
Comparison take_comparison(const Decoder& decoder, Modifiers& mods, Type type) {
  const int how =
      mods.take_one_of({"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"});
  if (how < 0) decoder.error("expected a comparison such as .lt");
  const int combine = mods.take_one_of({"and", "or", "xor"});
  const bool ftz = mods.take("ftz");
  if (ftz && (type == Type::kF64 || is_bf16(type))) decoder.error("unknown modifier .ftz");
  return {static_cast<Compare>(how), static_cast<BoolOp>(combine + 1), ftz, type, Result::kInteger, Type::kNone};
}

void decode_setp(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Type type) {
  Modifiers mods(decoder, in);
  const Comparison comparison = take_comparison(decoder, mods, type);
  mods.take_type();
  mods.finish();
  const bool combines = comparison.combine != BoolOp::kNone;
  decoder.expect_operands(in, combines ? 4 : 3);
  const bool two = in.operands[0].kind == ptx::Operand::Kind::kPair;
  std::vector<Operand> operands;
  operands.push_back(decoder.destination(two ? in.operands[0].elements[0] : in.operands[0], Type::kPred));
  operands.push_back(two ? decoder.destination(in.operands[0].elements[1], Type::kPred) : decoder.sink());
  operands.push_back(decoder.source(in.operands[1], type));
  operands.push_back(decoder.source(in.operands[2], type));
  if (combines) operands.push_back(decoder.source(in.operands[3], Type::kPred));
  const bool plain = type == Type::kF32 && !comparison.ftz && !combines && !two;
  out.execute = plain ? kSetpF32[static_cast<size_t>(comparison.how)] : execute_setp;
  out.aux = comparison.pack();
  out.cls = class_of(type);
  out.flags |= Instruction::kPropagates;
  decoder.set_operands(out, operands);
}

void decode_set(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Type type) {
  Modifiers mods(decoder, in);
  Comparison comparison = take_comparison(decoder, mods, type);
  comparison.to = mods.take_type();
  mods.take_type();
  mods.finish();
  switch (comparison.to) {
    case Type::kU32:
    case Type::kS32:
    case Type::kB32:
    case Type::kU16:
    case Type::kS16:
    case Type::kB16: comparison.result = Result::kInteger; break;
    case Type::kF32: comparison.result = Result::kFloat; break;
    case Type::kF16:
    case Type::kF16x2: comparison.result = Result::kHalf; break;
    case Type::kBF16:
    case Type::kBF16x2: comparison.result = Result::kBf16; break;
    default: decoder.error(std::string("no result of type .") + name_of(comparison.to));
  }
  if (is_pair(type) && num_bytes(comparison.to) != 4) decoder.error("a comparison of pairs has a 32-bit result");
  const bool combines = comparison.combine != BoolOp::kNone;
  decoder.expect_operands(in, combines ? 4 : 3);
  std::vector<Operand> operands = {decoder.destination(in.operands[0], comparison.to),
                                   decoder.source(in.operands[1], type), decoder.source(in.operands[2], type)};
  if (combines) operands.push_back(decoder.source(in.operands[3], Type::kPred));
  out.execute = execute_set;
  out.aux = comparison.pack();
  out.cls = class_of(type);
  decoder.set_operands(out, operands);
}

void decode_testp(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  const int test = mods.take_one_of({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  if (test < 0) decoder.error("expected a property such as .finite");
  const Type type = mods.take_type();
  mods.finish();
  if (type != Type::kF32 && type != Type::kF64) decoder.error("expected .f32 or .f64");
  decoder.expect_operands(in, 2);
  out.execute = execute_testp;
  out.aux = static_cast<uint32_t>(test) | (type == Type::kF64 ? 1u << 8 : 0);
  out.cls = class_of(type);
  decoder.set_operands(out, {decoder.destination(in.operands[0], Type::kPred), decoder.source(in.operands[1], type)});
}

}  // namespace

bool decode_compare(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Type type) {
  const bool of_floats = type == Type::kF32 || type == Type::kF64 || is_half(type);
  if (!of_floats) return false;
  if (in.parts[0] == "setp") return decode_setp(decoder, in, out, type), true;
  if (in.parts[0] == "set") return decode_set(decoder, in, out, type), true;
  if (in.parts[0] == "testp") return decode_testp(decoder, in, out), true;
  return false;
}

}  // namespace emulator
