// SPDX-License-Identifier: Apache-2.0
// Comparisons of integers (setp, set), selections (selp, slct) and moves, to and from vectors and special registers
// too.
#include <chrono>
#include <cstring>
#include <limits>
#include <type_traits>

#include "builder.h"
#include "integer_forms.h"

namespace emulator {
namespace {

// ---- comparisons ----------------------------------------------------------------------------------------------------
struct Equal {
  template <typename T>
  static bool apply(T a, T b) {
    return a == b;
  }
};
struct NotEqual {
  template <typename T>
  static bool apply(T a, T b) {
    return a != b;
  }
};
struct Less {
  template <typename T>
  static bool apply(T a, T b) {
    return a < b;
  }
};
struct LessEqual {
  template <typename T>
  static bool apply(T a, T b) {
    return a <= b;
  }
};
struct Greater {
  template <typename T>
  static bool apply(T a, T b) {
    return a > b;
  }
};
struct GreaterEqual {
  template <typename T>
  static bool apply(T a, T b) {
    return a >= b;
  }
};

enum Bool : uint32_t { kPlain, kAnd, kOr, kXor };

uint32_t combine(uint32_t op, uint32_t compared, uint32_t c) {
  switch (op) {
    case kAnd: return compared & c;
    case kOr: return compared | c;
    case kXor: return compared ^ c;
    default: return compared;
  }
}

template <typename T, typename Op>
uint32_t compare(const T* a, const T* b) {
  uint8_t bytes[kWarpLanes];
#pragma GCC ivdep
  for (int i = 0; i < kWarpLanes; i++) bytes[i] = Op::apply(a[i], b[i]) ? 1 : 0;
  uint32_t bits = 0;
  for (int i = 0; i < kWarpLanes; i += 8) {  // the lowest bit of eight bytes, gathered by a product
    uint64_t eight;
    std::memcpy(&eight, bytes + i, 8);
    bits |= static_cast<uint32_t>((eight * 0x0102040810204080u) >> 56) << i;
  }
  return bits;
}

// operands: p, q, a, b, c
template <typename T, typename Op>
void execute_setp(Warp& warp, const Instruction& in) {
  uint32_t compared = compare<T, Op>(warp.lanes<T>(in.operands[2]), warp.lanes<T>(in.operands[3]));
  if (in.aux == kPlain) {
    warp.set_mask(in.operands[0], compared);
    warp.set_mask(in.operands[1], ~compared);
    return;
  }
  uint32_t c = warp.mask(in.operands[4]);
  warp.set_mask(in.operands[0], combine(in.aux, compared, c));
  warp.set_mask(in.operands[1], combine(in.aux, ~compared, c));
}

// operands: d, a, b, c; in.immediate: the bits of true
template <typename T, typename Op>
void execute_set(Warp& warp, const Instruction& in) {
  uint32_t result = compare<T, Op>(warp.lanes<T>(in.operands[1]), warp.lanes<T>(in.operands[2]));
  if (in.aux != kPlain) result = combine(in.aux, result, warp.mask(in.operands[3]));
  uint32_t yes = static_cast<uint32_t>(in.immediate);
  warp.write<uint32_t>(in.operands[0], [=](int i) { return result >> i & 1 ? yes : 0; });
}

enum Comparison { kEq, kNe, kLt, kLe, kGt, kGe };

template <bool kSetp, typename T>
Execute comparison_of(int comparison) {
  switch (comparison) {
    case kEq: return kSetp ? &execute_setp<T, Equal> : &execute_set<T, Equal>;
    case kNe: return kSetp ? &execute_setp<T, NotEqual> : &execute_set<T, NotEqual>;
    case kLt: return kSetp ? &execute_setp<T, Less> : &execute_set<T, Less>;
    case kLe: return kSetp ? &execute_setp<T, LessEqual> : &execute_set<T, LessEqual>;
    case kGt: return kSetp ? &execute_setp<T, Greater> : &execute_set<T, Greater>;
    default: return kSetp ? &execute_setp<T, GreaterEqual> : &execute_set<T, GreaterEqual>;
  }
}

bool decode_comparison(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  bool setp = in.parts[0] == "setp";
  if (!is_integer(type_of(in.parts.back()))) return false;
  Modifiers mods(decoder, in);
  Type dtype = setp ? Type::kPred : mods.take_type();
  Type type = mods.take_type();
  int comparison = mods.take_one_of({"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs"});
  if (comparison < 0) decoder.error("expected a comparison");
  if (comparison > kGe) {  // lo ls hi hs: unsigned, whatever the type
    comparison = comparison - 6 + kLt;
    if (is_signed(type)) decoder.error("expected an unsigned type");
  }
  int op = mods.take_one_of({"and", "or", "xor"});
  mods.finish();
  out.aux = static_cast<uint32_t>(op + 1);
  decoder.expect_operands(in, op < 0 ? 3 : 4);
  out.execute = with_integer(type, [&]<typename T>() {
    return setp ? comparison_of<true, T>(comparison) : comparison_of<false, T>(comparison);
  });
  if (!out.execute) decoder.error(std::string("cannot compare the type .") + name_of(type));
  out.cls = InstructionClass::kSetSelect;
  std::vector<Operand> operands;
  const ptx::Operand& d = in.operands[0];
  if (setp) {
    bool pair = d.kind == ptx::Operand::Kind::kPair;
    operands.push_back(decoder.destination(pair ? d.elements[0] : d, Type::kPred));
    operands.push_back(pair ? decoder.destination(d.elements[1], Type::kPred) : decoder.sink());
  } else {
    if (dtype != Type::kU32 && dtype != Type::kS32 && dtype != Type::kF32)
      decoder.error("expected .u32, .s32 or .f32 as the type of the result");
    out.immediate = dtype == Type::kF32 ? 0x3f800000 : 0xffffffff;
    operands.push_back(decoder.destination(d, dtype));
  }
  operands.push_back(decoder.source(in.operands[1], type));
  operands.push_back(decoder.source(in.operands[2], type));
  if (op >= 0) operands.push_back(decoder.source(in.operands[3], Type::kPred));
  if (setp) out.flags |= Instruction::kPropagates;
  decoder.set_operands(out, std::move(operands));
  return true;
}

// ---- selections -----------------------------------------------------------------------------------------------------
template <typename T>
void execute_selp(Warp& warp, const Instruction& in) {
  const T *a = warp.lanes<T>(in.operands[1]), *b = warp.lanes<T>(in.operands[2]);
  uint32_t p = warp.mask(in.operands[3]);
  warp.set_deciding(p, ~p);
  warp.write<T>(in.operands[0], [=](int i) { return p >> i & 1 ? a[i] : b[i]; });
}

// in.aux: .ftz, a negative denormal is a zero, which is not below zero.
template <typename T, typename C>
void execute_slct(Warp& warp, const Instruction& in) {
  const T *a = warp.lanes<T>(in.operands[1]), *b = warp.lanes<T>(in.operands[2]);
  const C* c = warp.lanes<C>(in.operands[3]);
  C least = 0;
  if constexpr (std::is_floating_point_v<C>) least = in.aux ? -std::numeric_limits<C>::min() : C{0};
  warp.write<T>(in.operands[0], [=](int i) { return c[i] >= 0 || c[i] > least ? a[i] : b[i]; });
}

bool decode_selection(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  Type type = mods.take_type();
  uint32_t bytes = num_bytes(type);
  Type selector = Type::kPred;
  if (in.parts[0] == "selp") {
    mods.finish();
    out.execute = bytes == 2   ? &execute_selp<uint16_t>
                  : bytes == 4 ? &execute_selp<uint32_t>
                  : bytes == 8 ? &execute_selp<uint64_t>
                               : nullptr;
  } else {
    selector = mods.take_type();
    out.aux = mods.take("ftz") ? 1 : 0;
    mods.finish();
    bool is_float = selector == Type::kF32;
    if (!is_float && selector != Type::kS32) decoder.error("expected .s32 or .f32 as the type of the selector");
    if (bytes == 2) out.execute = is_float ? &execute_slct<uint16_t, float> : &execute_slct<uint16_t, int32_t>;
    if (bytes == 4) out.execute = is_float ? &execute_slct<uint32_t, float> : &execute_slct<uint32_t, int32_t>;
    if (bytes == 8) out.execute = is_float ? &execute_slct<uint64_t, float> : &execute_slct<uint64_t, int32_t>;
  }
  if (!out.execute) decoder.error(std::string("the type .") + name_of(type) + " does not go with this instruction");
  decoder.expect_operands(in, 4);
  out.cls = InstructionClass::kSetSelect;
  const bool selp = selector == Type::kPred;
  decoder.set_operands(out, {decoder.destination(in.operands[0], type),
                             decoder.source(in.operands[1], type, selp ? Moved::kFirst : Moved::kNot),
                             decoder.source(in.operands[2], type, selp ? Moved::kSecond : Moved::kNot),
                             decoder.source(in.operands[3], selector)});
  return true;
}

// ---- moves ----------------------------------------------------------------------------------------------------------
template <typename T>
void execute_mov(Warp& warp, const Instruction& in) {
  const T* a = warp.lanes<T>(in.operands[1]);
  warp.write<T>(in.operands[0], [=](int i) { return a[i]; });
}

void execute_mov_mask(Warp& warp, const Instruction& in) { warp.set_mask(in.operands[0], warp.mask(in.operands[1])); }

// The address of a local variable or of a parameter: what stands in a register, and an offset.
template <typename T>
void execute_mov_address(Warp& warp, const Instruction& in) {
  const uint64_t* base = warp.lanes<uint64_t>(in.operands[1]);
  uint64_t offset = static_cast<uint64_t>(in.immediate);
  warp.write<T>(in.operands[0], [=](int i) { return static_cast<T>(base[i] + offset); });
}

// {elements} into one register or out of it, the first lowest.
template <typename W, typename E>
void execute_pack(Warp& warp, const Instruction& in) {
  constexpr size_t kCount = sizeof(W) / sizeof(E);
  const E* from[kCount];
  for (size_t k = 0; k < kCount; k++) from[k] = warp.lanes<E>(in.operands[1 + k]);
  warp.write<W>(in.operands[0], [&](int i) {
    W out = 0;
    for (size_t k = 0; k < kCount; k++) out |= static_cast<W>(from[k][i]) << (8 * sizeof(E) * k);
    return out;
  });
}
template <typename W, typename E>
void execute_unpack(Warp& warp, const Instruction& in) {
  constexpr size_t kCount = sizeof(W) / sizeof(E);
  const W* from = warp.lanes<W>(in.operands[kCount]);
  for (size_t k = 0; k < kCount; k++)
    warp.write<E>(in.operands[k], [=](int i) { return static_cast<E>(from[i] >> (8 * sizeof(E) * k)); });
}

template <typename F>
Execute with_parts(uint32_t whole, uint32_t part, F&& f) {
  using U128 = unsigned __int128;
  if (whole == 2 && part == 1) return f.template operator()<uint16_t, uint8_t>();
  if (whole == 4 && part == 1) return f.template operator()<uint32_t, uint8_t>();
  if (whole == 4 && part == 2) return f.template operator()<uint32_t, uint16_t>();
  if (whole == 8 && part == 1) return f.template operator()<uint64_t, uint8_t>();
  if (whole == 8 && part == 2) return f.template operator()<uint64_t, uint16_t>();
  if (whole == 8 && part == 4) return f.template operator()<uint64_t, uint32_t>();
  if (whole == 16 && part == 4) return f.template operator()<U128, uint32_t>();
  if (whole == 16 && part == 8) return f.template operator()<U128, uint64_t>();
  return nullptr;
}

Type bits_of(uint32_t bytes) {
  switch (bytes) {
    case 1: return Type::kB8;
    case 2: return Type::kB16;
    case 4: return Type::kB32;
    case 8: return Type::kB64;
    default: return Type::kB128;
  }
}

void decode_vector_move(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Type type) {
  const ptx::Operand &d = in.operands[0], &a = in.operands[1];
  bool pack = a.kind == ptx::Operand::Kind::kVector;
  if (pack && d.kind == ptx::Operand::Kind::kVector) decoder.error("expected one register on one side");
  if (type == Type::kPred) decoder.error("expected a type other than .pred");
  const std::vector<ptx::Operand>& elements = pack ? a.elements : d.elements;
  uint32_t whole = num_bytes(type), count = static_cast<uint32_t>(elements.size());
  uint32_t part = count && whole % count == 0 ? whole / count : 0;
  out.execute = with_parts(whole, part, [&]<typename W, typename E>() -> Execute {
    return pack ? &execute_pack<W, E> : &execute_unpack<W, E>;
  });
  if (!out.execute) decoder.error("expected a vector that is as wide as ." + std::string(name_of(type)));
  std::vector<Operand> operands;
  if (pack) operands.push_back(decoder.destination(d, type));
  for (const ptx::Operand& element : elements)
    operands.push_back(pack ? decoder.source(element, bits_of(part)) : decoder.destination(element, bits_of(part)));
  if (!pack) operands.push_back(decoder.source(a, type));
  out.flags |= Instruction::kPropagates;
  decoder.set_operands(out, std::move(operands));
}

// ---- special registers that change ----------------------------------------------------------------------------------
uint64_t nanoseconds() {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

// in.aux: bits to shift right.
template <typename T>
void execute_mov_time(Warp& warp, const Instruction& in) {
  T now = static_cast<T>(nanoseconds() >> in.aux);
  warp.write<T>(in.operands[0], [=](int) { return now; });
}

bool decode_special_move(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Type type) {
  const std::string& name = in.operands[1].name;
  uint32_t bytes = num_bytes(type);
  bool low = name == "%clock" || name == "%globaltimer_lo", high = name == "%clock_hi" || name == "%globaltimer_hi";
  bool wide = name == "%clock64" || name == "%globaltimer";
  if (low || high || wide) {
    if (bytes != (wide ? 8 : 4)) decoder.error("special register " + name + " does not fit the type ." + name_of(type));
    out.execute = wide ? &execute_mov_time<uint64_t> : &execute_mov_time<uint32_t>;
    out.aux = high ? 32 : 0;
    decoder.set_operands(out, {decoder.destination(in.operands[0], type)});
    return true;
  }
  const bool workspace = name == "%envreg1" || name == "%envreg2";
  if ((name.starts_with("%envreg") && !workspace) || name.starts_with("%pm")) {  // of drivers and profilers: zeros
    out.execute = bytes == 8 ? &execute_mov<uint64_t> : &execute_mov<uint32_t>;
    if (bytes != 4 && bytes != 8)
      decoder.error("special register " + name + " does not fit the type ." + name_of(type));
    decoder.set_operands(out, {decoder.destination(in.operands[0], type), decoder.constant(0, bytes)});
    return true;
  }
  return false;
}

bool decode_address_move(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Type type) {
  using Kind = CodeBuilder::Symbol::Kind;
  const ptx::Operand& a = in.operands[1];
  if (a.kind != ptx::Operand::Kind::kSymbol || decoder.builder().find_register(a.name, in.scope)) return false;
  auto symbol = decoder.builder().find_symbol(a.name, in.scope);
  if (!symbol || (symbol->kind != Kind::kLocal && symbol->kind != Kind::kParam)) return false;
  uint32_t bytes = num_bytes(type);
  if (bytes != 8 && bytes != 4)
    decoder.error("the address of " + a.name + " does not fit an operand of type ." + name_of(type));
  out.execute = bytes == 8 ? &execute_mov_address<uint64_t> : &execute_mov_address<uint32_t>;
  out.immediate = static_cast<int64_t>(symbol->value + a.value);
  if (symbol->call_param) out.immediate += static_cast<int64_t>(kLocalWindow);  // ld.param takes it as generic
  Operand base = symbol->kind == Kind::kLocal
                     ? CodeBuilder::frame_pointer()
                     : Operand::at(Operand::kSpecials, static_cast<uint32_t>(Special::kParamBase) * kSpecialBytes);
  decoder.set_operands(out, {decoder.destination(in.operands[0], type), base});
  return true;
}

bool decode_move(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  Type type = mods.take_type(true);
  mods.finish();
  decoder.expect_operands(in, 2);
  out.cls = InstructionClass::kMove;
  using Kind = ptx::Operand::Kind;
  if (in.operands[0].kind == Kind::kVector || in.operands[1].kind == Kind::kVector) {
    decode_vector_move(decoder, in, out, type);
    return true;
  }
  if (in.operands[1].kind == Kind::kRegister && decode_special_move(decoder, in, out, type)) return true;
  if (decode_address_move(decoder, in, out, type)) return true;
  switch (num_bytes(type)) {
    case 1: out.execute = &execute_mov<uint8_t>; break;
    case 2: out.execute = &execute_mov<uint16_t>; break;
    case 4: out.execute = type == Type::kPred ? &execute_mov_mask : &execute_mov<uint32_t>; break;
    case 8: out.execute = &execute_mov<uint64_t>; break;
    default: out.execute = &execute_mov<unsigned __int128>; break;
  }
  decoder.set_operands(out, {decoder.destination(in.operands[0], type), decoder.source(in.operands[1], type)});
  out.flags |= Instruction::kPropagates;
  return true;
}

}  // namespace

bool decode_select(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  const std::string& name = in.parts[0];
  if (name == "setp" || name == "set") return decode_comparison(decoder, in, out);
  if (name == "selp" || name == "slct") return decode_selection(decoder, in, out);
  if (name == "mov") return decode_move(decoder, in, out);
  return false;
}

}  // namespace emulator
