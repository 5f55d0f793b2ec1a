// SPDX-License-Identifier: Apache-2.0
// Logic, shifts and bit fields: and or xor not cnot lop3 shl shr shf bfe bfi bfind brev popc clz fns prmt szext bmsk.
#include <algorithm>
#include <bit>
#include <type_traits>

#include "integer_forms.h"

namespace emulator {
namespace {

template <typename T>
constexpr uint32_t kBits = 8 * sizeof(T);

struct And {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};
struct Not {
  template <typename T>
  static T apply(T a) {
    return static_cast<T>(~a);
  }
};
struct Cnot {
  template <typename T>
  static T apply(T a) {
    return a == 0 ? T{1} : T{0};
  }
};

// Shifts by more than the width shift everything out.
struct Shl {
  template <typename T>
  static T apply(T a, uint32_t b) {
    using U = std::make_unsigned_t<T>;
    return b < kBits<T> ? static_cast<T>(static_cast<U>(a) << b) : T{0};
  }
};
struct Shr {
  template <typename T>
  static T apply(T a, uint32_t b) {
    if constexpr (std::is_signed_v<T>) return static_cast<T>(a >> std::min(b, kBits<T> - 1));
    return b < kBits<T> ? static_cast<T>(a >> b) : T{0};
  }
};
template <bool kLeft, bool kWrap>
struct Funnel {
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t n = kWrap ? c & 31 : std::min(c, 32u);
    uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    if (kLeft) return n == 32 ? a : static_cast<uint32_t>(both << n >> 32);
    return static_cast<uint32_t>(both >> n);
  }
};

struct Popc {
  template <typename T>
  static uint32_t apply(T a) {
    return static_cast<uint32_t>(std::popcount(a));
  }
};
struct Clz {
  template <typename T>
  static uint32_t apply(T a) {
    return static_cast<uint32_t>(std::countl_zero(a));
  }
};
struct Brev {
  template <typename T>
  static T apply(T a) {
    T out = 0;
    for (uint32_t i = 0; i < kBits<T>; i++) out |= (a >> i & 1) << (kBits<T> - 1 - i);
    return out;
  }
};
// Position of the highest bit that is not the sign; all ones when there is none. shiftamt: the shift that brings it to
// the top.
template <bool kShift>
struct Bfind {
  template <typename T>
  static uint32_t apply(T a) {
    using U = std::make_unsigned_t<T>;
    U bits = static_cast<U>(a);
    if (std::is_signed_v<T> && a < 0) bits = static_cast<U>(~bits);
    if (bits == 0) return ~0u;
    uint32_t zeros = static_cast<uint32_t>(std::countl_zero(bits));
    return kShift ? zeros : kBits<T> - 1 - zeros;
  }
};
// Bits [b, b + c) of a, sign-extended when signed; beyond the top the sign is read.
struct Bfe {
  template <typename T>
  static T apply(T a, uint32_t b, uint32_t c) {
    uint32_t pos = b & 0xff, len = c & 0xff;
    if (len == 0) return 0;
    uint32_t top = std::min(pos + len - 1, kBits<T> - 1);
    using U = std::make_unsigned_t<T>;
    U bits = static_cast<U>(a);
    bool sign = std::is_signed_v<T> && (bits >> top & 1);
    U field = pos < kBits<T> ? static_cast<U>(bits >> pos) : U{0};
    uint32_t have = pos < kBits<T> ? std::min(len, kBits<T> - pos) : 0;
    U keep = have >= kBits<T> ? static_cast<U>(~U{0}) : static_cast<U>((U{1} << have) - 1);
    return static_cast<T>((field & keep) | (sign ? static_cast<U>(~keep) : U{0}));
  }
};
// The low d bits of a put into b at c.
struct Bfi {
  template <typename T>
  static T apply(T a, T b, uint32_t c, uint32_t d) {
    uint32_t pos = c & 0xff, len = d & 0xff;
    if (pos >= kBits<T> || len == 0) return b;
    T keep = len >= kBits<T> ? static_cast<T>(~T{0}) : static_cast<T>((T{1} << len) - 1);
    keep = static_cast<T>(keep << pos);
    return static_cast<T>((b & ~keep) | (static_cast<T>(a << pos) & keep));
  }
};
// The c-th set bit of a from position b on (c < 0: below it), as the PTX ISA's own pseudocode.
struct Fns {
  static uint32_t apply(uint32_t mask, uint32_t base, int32_t offset) {
    if (base > 31) return ~0u;
    if (offset == 0) return mask >> base & 1 ? base : ~0u;
    int step = offset > 0 ? 1 : -1;
    int64_t rest = offset > 0 ? int64_t{offset} - 1 : -int64_t{offset} - 1;
    for (int pos = static_cast<int>(base); pos >= 0 && pos < 32; pos += step) {
      if (!(mask >> pos & 1)) continue;
      if (rest-- == 0) return static_cast<uint32_t>(pos);
    }
    return ~0u;
  }
};
template <bool kClamp>
struct Bmsk {
  static uint32_t apply(uint32_t a, uint32_t b) {
    uint32_t pos = kClamp ? std::min(a, 32u) : a & 31, len = kClamp ? std::min(b, 32u) : b & 31;
    uint64_t ones = ((uint64_t{1} << len) - 1) << pos;
    return static_cast<uint32_t>(ones);
  }
};
template <bool kClamp, bool kSigned>
struct Szext {
  static uint32_t apply(uint32_t a, uint32_t b) {
    uint32_t n = kClamp ? std::min(b, 32u) : b & 31;
    if (n >= 32) return a;
    if (n == 0) return 0;
    uint32_t keep = (1u << n) - 1, low = a & keep;
    return kSigned && (low >> (n - 1) & 1) ? low | ~keep : low;
  }
};

// Bytes of {b, a} picked by the nibbles of c; the top bit of a nibble copies the sign of the byte.
struct Prmt {
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
      uint32_t nibble = c >> (4 * i) & 15;
      uint32_t byte = static_cast<uint32_t>(both >> (8 * (nibble & 7))) & 0xff;
      if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
      out |= byte << (8 * i);
    }
    return out;
  }
};
enum class PrmtMode { kF4e, kB4e, kRc8, kEcl, kEcr, kRc16 };
template <PrmtMode kMode>
struct PrmtSpecial {
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    constexpr uint32_t kSelectors[6][4] = {{0x3210, 0x4321, 0x5432, 0x6543}, {0x5670, 0x6701, 0x7012, 0x0123},
                                           {0x0000, 0x1111, 0x2222, 0x3333}, {0x3210, 0x3211, 0x3222, 0x3333},
                                           {0x0000, 0x1110, 0x2210, 0x3210}, {0x1010, 0x3232, 0x1010, 0x3232}};
    return Prmt::apply(a, b, kSelectors[static_cast<int>(kMode)][c & 3]);
  }
};

template <typename T, typename Op>
void execute_bfi(Warp& warp, const Instruction& in) {
  const T *a = warp.lanes<T>(in.operands[1]), *b = warp.lanes<T>(in.operands[2]);
  const uint32_t *c = warp.lanes<uint32_t>(in.operands[3]), *d = warp.lanes<uint32_t>(in.operands[4]);
  warp.write<T>(in.operands[0], [=](int i) { return Op::apply(a[i], b[i], c[i], d[i]); });
}

// ---- lop3 -----------------------------------------------------------------------------------------------------------
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t out = 0;
  for (uint32_t i = 0; i < 8; i++) {
    if (!(table >> i & 1)) continue;
    out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return out;
}

// One loop for each of the 256 tables: the compiler reduces the expression.
template <uint32_t kTable>
void execute_lop3(Warp& warp, const Instruction& in) {
  const uint32_t* a = warp.lanes<uint32_t>(in.operands[1]);
  const uint32_t* b = warp.lanes<uint32_t>(in.operands[2]);
  const uint32_t* c = warp.lanes<uint32_t>(in.operands[3]);
  warp.write<uint32_t>(in.operands[0], [=](int i) {
    uint32_t out = 0;
    if constexpr (kTable & 1) out |= ~a[i] & ~b[i] & ~c[i];
    if constexpr (kTable & 2) out |= ~a[i] & ~b[i] & c[i];
    if constexpr (kTable & 4) out |= ~a[i] & b[i] & ~c[i];
    if constexpr (kTable & 8) out |= ~a[i] & b[i] & c[i];
    if constexpr (kTable & 16) out |= a[i] & ~b[i] & ~c[i];
    if constexpr (kTable & 32) out |= a[i] & ~b[i] & c[i];
    if constexpr (kTable & 64) out |= a[i] & b[i] & ~c[i];
    if constexpr (kTable & 128) out |= a[i] & b[i] & c[i];
    return out;
  });
}
template <uint32_t... kTables>
Execute lop3_of(uint32_t table, std::integer_sequence<uint32_t, kTables...>) {
  static constexpr Execute kAll[] = {&execute_lop3<kTables>...};
  return kAll[table];
}

// lop3.or/.and d|p: p = (d != 0) op q.
template <bool kAnd>
void execute_lop3_predicate(Warp& warp, const Instruction& in) {
  const uint32_t *a = warp.lanes<uint32_t>(in.operands[1]), *b = warp.lanes<uint32_t>(in.operands[2]);
  const uint32_t* c = warp.lanes<uint32_t>(in.operands[3]);
  uint32_t q = warp.mask(in.operands[5]), nonzero = 0;
  uint32_t result[kWarpLanes];
  for (int i = 0; i < kWarpLanes; i++) {
    result[i] = lop3(a[i], b[i], c[i], in.aux);
    nonzero |= static_cast<uint32_t>(result[i] != 0) << i;
  }
  warp.write<uint32_t>(in.operands[0], [&](int i) { return result[i]; });
  warp.set_mask(in.operands[4], kAnd ? nonzero & q : nonzero | q);
}

bool decode_lop3(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  mods.take("b32");
  int op = mods.take_one_of({"or", "and"});
  mods.finish();
  decoder.expect_operands(in, op < 0 ? 5 : 6);
  out.aux = static_cast<uint32_t>(decoder.integer(in.operands[4])) & 0xff;
  out.cls = InstructionClass::kIntAlu;
  const ptx::Operand& d = in.operands[0];
  bool pair = d.kind == ptx::Operand::Kind::kPair;
  if (pair != (op >= 0)) decoder.error(pair ? "expected .or or .and" : "expected d|p");
  Type type = Type::kB32;
  std::vector<Operand> operands = {decoder.destination(pair ? d.elements[0] : d, type),
                                   decoder.source(in.operands[1], type), decoder.source(in.operands[2], type),
                                   decoder.source(in.operands[3], type)};
  if (pair) {
    operands.push_back(decoder.destination(d.elements[1], Type::kPred));
    operands.push_back(decoder.source(in.operands[5], Type::kPred));
    out.execute = op == 1 ? &execute_lop3_predicate<true> : &execute_lop3_predicate<false>;
  } else {
    out.execute = lop3_of(out.aux, std::make_integer_sequence<uint32_t, 256>());
  }
  decoder.set_operands(out, std::move(operands));
  return true;
}

// ---- predicates -----------------------------------------------------------------------------------------------------
enum class PredicateOp { kAnd, kOr, kXor, kNot };
template <PredicateOp kOp>
void execute_predicate(Warp& warp, const Instruction& in) {
  uint32_t a = warp.mask(in.operands[1]), b = kOp == PredicateOp::kNot ? 0 : warp.mask(in.operands[2]);
  uint32_t result = kOp == PredicateOp::kAnd   ? a & b
                    : kOp == PredicateOp::kOr  ? a | b
                    : kOp == PredicateOp::kXor ? a ^ b
                                               : ~a;
  if (kOp == PredicateOp::kAnd) warp.set_deciding(~a, ~b);
  if (kOp == PredicateOp::kOr) warp.set_deciding(a, b);
  warp.set_mask(in.operands[0], result);
}

template <typename Op>
Execute bits_to_u32(Type type) {
  if (num_bytes(type) == 4) return &execute_unary<uint32_t, uint32_t, Op>;
  return num_bytes(type) == 8 ? &execute_unary<uint32_t, uint64_t, Op> : nullptr;
}

// d and the sources after the types given; kNone ends them.
void decode_mixed(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Execute execute,
                  std::initializer_list<Type> types) {
  Type first = *types.begin();
  if (!execute) decoder.error(std::string("the type .") + name_of(first) + " does not go with this instruction");
  decoder.expect_operands(in, types.size());
  out.execute = execute;
  out.cls = InstructionClass::kIntAlu;
  std::vector<Operand> operands;
  size_t i = 0;
  for (Type type : types) {
    operands.push_back(i == 0 ? decoder.destination(in.operands[i], type) : decoder.source(in.operands[i], type));
    i++;
  }
  decoder.set_operands(out, std::move(operands));
}

bool decode_bit_field(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  const std::string& name = in.parts[0];
  Modifiers mods(decoder, in);
  Type type = mods.take_type(), u32 = Type::kU32;
  uint32_t bytes = num_bytes(type);
  if (name == "bfe") {
    mods.finish();
    Execute execute = with_integer(type, []<typename T>() -> Execute {
      if constexpr (sizeof(T) >= 4) return &execute_ternary<T, T, uint32_t, uint32_t, Bfe>;
      return nullptr;
    });
    decode_mixed(decoder, in, out, execute, {type, type, u32, u32});
  } else if (name == "bfi") {
    mods.finish();
    Execute execute = bytes == 4 ? &execute_bfi<uint32_t, Bfi> : bytes == 8 ? &execute_bfi<uint64_t, Bfi> : nullptr;
    decode_mixed(decoder, in, out, execute, {type, type, type, u32, u32});
  } else if (name == "bfind") {
    bool shift = mods.take("shiftamt");
    mods.finish();
    Execute execute = with_integer(type, [&]<typename T>() -> Execute {
      if constexpr (sizeof(T) >= 4)
        return shift ? &execute_unary<uint32_t, T, Bfind<true>> : &execute_unary<uint32_t, T, Bfind<false>>;
      return nullptr;
    });
    decode_mixed(decoder, in, out, execute, {u32, type});
  } else if (name == "fns") {
    mods.finish();
    decode_mixed(decoder, in, out, &execute_ternary<uint32_t, uint32_t, uint32_t, int32_t, Fns>,
                 {u32, u32, u32, Type::kS32});
  } else if (name == "bmsk") {
    bool clamp = mods.take_one_of({"clamp", "wrap"}) == 0;
    mods.finish();
    Execute execute = clamp ? &execute_binary<uint32_t, uint32_t, uint32_t, Bmsk<true>>
                            : &execute_binary<uint32_t, uint32_t, uint32_t, Bmsk<false>>;
    decode_mixed(decoder, in, out, execute, {u32, u32, u32});
  } else {
    bool clamp = mods.take_one_of({"clamp", "wrap"}) == 0, sign = type == Type::kS32;
    mods.finish();
    Execute with_clamp = sign ? &execute_binary<uint32_t, uint32_t, uint32_t, Szext<true, true>>
                              : &execute_binary<uint32_t, uint32_t, uint32_t, Szext<true, false>>;
    Execute with_wrap = sign ? &execute_binary<uint32_t, uint32_t, uint32_t, Szext<false, true>>
                             : &execute_binary<uint32_t, uint32_t, uint32_t, Szext<false, false>>;
    decode_mixed(decoder, in, out, clamp ? with_clamp : with_wrap, {u32, u32, u32});
  }
  return true;
}

bool decode_shift(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  if (in.parts[0] == "shf") {
    bool left = mods.take("l"), right = mods.take("r");
    int mode = mods.take_one_of({"clamp", "wrap"});
    mods.take("b32");
    mods.finish();
    if (left == right || mode < 0) decoder.error("expected .l or .r and .clamp or .wrap");
    using U = uint32_t;
    Execute execute = left ? (mode == 1 ? &execute_ternary<U, U, U, U, Funnel<true, true>>
                                        : &execute_ternary<U, U, U, U, Funnel<true, false>>)
                           : (mode == 1 ? &execute_ternary<U, U, U, U, Funnel<false, true>>
                                        : &execute_ternary<U, U, U, U, Funnel<false, false>>);
    decode_plain(decoder, in, out, Type::kB32, 3, execute, InstructionClass::kIntAlu);
    return true;
  }
  bool left = in.parts[0] == "shl";
  Type type = mods.take_type();
  mods.finish();
  Execute execute = with_integer(type, [&]<typename T>() -> Execute {
    return left ? &execute_binary<T, T, uint32_t, Shl> : &execute_binary<T, T, uint32_t, Shr>;
  });
  decode_mixed(decoder, in, out, execute, {type, type, Type::kU32});
  return true;
}

bool decode_prmt(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  mods.take("b32");
  int mode = mods.take_one_of({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"});
  mods.finish();
  using U = uint32_t;
  constexpr Execute kModes[] = {&execute_ternary<U, U, U, U, PrmtSpecial<PrmtMode::kF4e>>,
                                &execute_ternary<U, U, U, U, PrmtSpecial<PrmtMode::kB4e>>,
                                &execute_ternary<U, U, U, U, PrmtSpecial<PrmtMode::kRc8>>,
                                &execute_ternary<U, U, U, U, PrmtSpecial<PrmtMode::kEcl>>,
                                &execute_ternary<U, U, U, U, PrmtSpecial<PrmtMode::kEcr>>,
                                &execute_ternary<U, U, U, U, PrmtSpecial<PrmtMode::kRc16>>};
  decode_plain(decoder, in, out, Type::kB32, 3, mode < 0 ? &execute_ternary<U, U, U, U, Prmt> : kModes[mode],
               InstructionClass::kIntAlu);
  return true;
}

}  // namespace

bool decode_logic(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  const std::string& name = in.parts[0];
  if (name == "lop3") return decode_lop3(decoder, in, out);
  if (name == "prmt") return decode_prmt(decoder, in, out);
  if (name == "shl" || name == "shr" || name == "shf") return decode_shift(decoder, in, out);
  if (name == "bfe" || name == "bfi" || name == "bfind" || name == "fns" || name == "bmsk" || name == "szext")
    return decode_bit_field(decoder, in, out);
  bool two = name == "and" || name == "or" || name == "xor";
  bool one = name == "not" || name == "cnot" || name == "popc" || name == "clz" || name == "brev";
  if (!one && !two) return false;
  Modifiers mods(decoder, in);
  Type type = mods.take_type(true);
  mods.finish();
  if (type == Type::kPred) {
    Execute execute = name == "and"   ? &execute_predicate<PredicateOp::kAnd>
                      : name == "or"  ? &execute_predicate<PredicateOp::kOr>
                      : name == "xor" ? &execute_predicate<PredicateOp::kXor>
                      : name == "not" ? &execute_predicate<PredicateOp::kNot>
                                      : nullptr;
    if (!execute) decoder.error("the type .pred does not go with this instruction");
    decoder.expect_operands(in, two ? 3 : 2);
    const bool decide = name == "and" || name == "or";
    std::vector<Operand> operands = {decoder.destination(in.operands[0], type),
                                     decoder.source(in.operands[1], type, decide ? Moved::kFirst : Moved::kAlways)};
    if (two) operands.push_back(decoder.source(in.operands[2], type, decide ? Moved::kSecond : Moved::kAlways));
    out.execute = execute;
    out.cls = InstructionClass::kSetSelect;
    decoder.set_operands(out, std::move(operands));
    return true;
  }
  if (name == "popc" || name == "clz") {
    decode_mixed(decoder, in, out, name == "clz" ? bits_to_u32<Clz>(type) : bits_to_u32<Popc>(type),
                 {Type::kU32, type});
    return true;
  }
  Execute execute = nullptr;
  if (name == "and") execute = binary_of<And>(type);
  else if (name == "or") execute = binary_of<Or>(type);
  else if (name == "xor") execute = binary_of<Xor>(type);
  else if (name == "not") execute = unary_of<Not>(type);
  else if (name == "cnot") execute = unary_of<Cnot>(type);
  else if (num_bytes(type) == 4) execute = &execute_unary<uint32_t, uint32_t, Brev>;
  else if (num_bytes(type) == 8) execute = &execute_unary<uint64_t, uint64_t, Brev>;
  decode_plain(decoder, in, out, type, two ? 2 : 1, execute, InstructionClass::kIntAlu);
  return true;
}

}  // namespace emulator
