// SPDX-License-Identifier: Apache-2.0
// Integer arithmetic: add ... rem with their .hi, .lo, .wide, .sat and .cc forms, abs, neg, min, max, sad, dp4a, dp2a.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "integer_forms.h"

namespace emulator {
namespace {

template <typename T>
using Unsigned = std::make_unsigned_t<T>;
template <typename T>
constexpr bool kSigned = std::is_signed_v<T>;
template <typename T>
constexpr int kBits = 8 * sizeof(T);

// The product in twice the width.
template <typename T>
auto wide_product(T a, T b) {
  if constexpr (sizeof(T) == 2) {
    return static_cast<std::conditional_t<kSigned<T>, int32_t, uint32_t>>(static_cast<int64_t>(a) *
                                                                          static_cast<int64_t>(b));
  } else if constexpr (sizeof(T) == 4) {
    using W = std::conditional_t<kSigned<T>, int64_t, uint64_t>;
    return static_cast<W>(a) * static_cast<W>(b);
  } else {
    using W = std::conditional_t<kSigned<T>, __int128, unsigned __int128>;
    return static_cast<W>(a) * static_cast<W>(b);
  }
}

// Unsigned arithmetic throughout: it wraps, as PTX does.
template <typename T>
T wrap_add(T a, T b) {
  return static_cast<T>(static_cast<Unsigned<T>>(static_cast<Unsigned<T>>(a) + static_cast<Unsigned<T>>(b)));
}
template <typename T>
T wrap_sub(T a, T b) {
  return static_cast<T>(static_cast<Unsigned<T>>(static_cast<Unsigned<T>>(a) - static_cast<Unsigned<T>>(b)));
}
template <typename T>
T low_product(T a, T b) {
  return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}
template <typename T>
T high_product(T a, T b) {
  return static_cast<T>(wide_product(a, b) >> kBits<T>);
}
int32_t saturate(int64_t value) {
  return static_cast<int32_t>(
      std::clamp<int64_t>(value, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()));
}

struct Add {
  template <typename T>
  static T apply(T a, T b) {
    return wrap_add(a, b);
  }
};
struct Sub {
  template <typename T>
  static T apply(T a, T b) {
    return wrap_sub(a, b);
  }
};
struct AddSat {
  static int32_t apply(int32_t a, int32_t b) { return saturate(int64_t{a} + b); }
};
struct SubSat {
  static int32_t apply(int32_t a, int32_t b) { return saturate(int64_t{a} - b); }
};
struct MulLo {
  template <typename T>
  static T apply(T a, T b) {
    return low_product(a, b);
  }
};
struct MulHi {
  template <typename T>
  static T apply(T a, T b) {
    return high_product(a, b);
  }
};
struct MulWide {
  template <typename T>
  static auto apply(T a, T b) {
    return wide_product(a, b);
  }
};
struct MadLo {
  template <typename T>
  static T apply(T a, T b, T c) {
    return wrap_add(low_product(a, b), c);
  }
};
struct MadHi {
  template <typename T>
  static T apply(T a, T b, T c) {
    return wrap_add(high_product(a, b), c);
  }
};
struct MadWide {
  template <typename T, typename C>
  static C apply(T a, T b, C c) {
    return wrap_add(static_cast<C>(wide_product(a, b)), c);
  }
};
struct MadHiSat {
  static int32_t apply(int32_t a, int32_t b, int32_t c) { return saturate(int64_t{high_product(a, b)} + c); }
};
// Division by zero has no defined result in PTX; GPUs give all ones and the dividend.
struct Div {
  template <typename T>
  static T apply(T a, T b) {
    if (b == 0) return static_cast<T>(~T{0});
    if constexpr (kSigned<T>) {
      if (b == -1) return wrap_sub(T{0}, a);
    }
    return static_cast<T>(a / b);
  }
};
struct Rem {
  template <typename T>
  static T apply(T a, T b) {
    if (b == 0) return a;
    if constexpr (kSigned<T>) {
      if (b == -1) return 0;
    }
    return static_cast<T>(a % b);
  }
};
struct Min {
  template <typename T>
  static T apply(T a, T b) {
    return a < b ? a : b;
  }
};
struct Max {
  template <typename T>
  static T apply(T a, T b) {
    return a < b ? b : a;
  }
};
struct MinRelu {
  template <typename T>
  static T apply(T a, T b) {
    return std::max(std::min(a, b), T{0});
  }
};
struct MaxRelu {
  template <typename T>
  static T apply(T a, T b) {
    return std::max(std::max(a, b), T{0});
  }
};
struct Abs {
  template <typename T>
  static T apply(T a) {
    return a < 0 ? wrap_sub(T{0}, a) : a;
  }
};
struct Neg {
  template <typename T>
  static T apply(T a) {
    return wrap_sub(T{0}, a);
  }
};
struct Sad {
  template <typename T>
  static T apply(T a, T b, T c) {
    return wrap_add(c, a < b ? wrap_sub(b, a) : wrap_sub(a, b));
  }
};

// mul24: the low 24 bits of both, sign-extended when signed; .hi takes bits 47..16 of the product.
template <typename T>
int64_t low24(T a) {
  int64_t value = static_cast<int64_t>(a) & 0xffffff;
  return kSigned<T> && (value & 0x800000) ? value - 0x1000000 : value;
}
struct Mul24Lo {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(low24(a) * low24(b));
  }
};
struct Mul24Hi {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>((low24(a) * low24(b)) >> 16);
  }
};
struct Mad24Lo {
  template <typename T>
  static T apply(T a, T b, T c) {
    return wrap_add(Mul24Lo::apply(a, b), c);
  }
};
struct Mad24Hi {
  template <typename T>
  static T apply(T a, T b, T c) {
    return wrap_add(Mul24Hi::apply(a, b), c);
  }
};
struct Mad24HiSat {
  static int32_t apply(int32_t a, int32_t b, int32_t c) { return saturate(int64_t{Mul24Hi::apply(a, b)} + c); }
};

// Two 16-bit values in a register.
template <typename T, typename Op>
struct Packed {
  static uint32_t apply(uint32_t a, uint32_t b) {
    T low = Op::apply(static_cast<T>(a), static_cast<T>(b)),
      high = Op::apply(static_cast<T>(a >> 16), static_cast<T>(b >> 16));
    return static_cast<uint32_t>(static_cast<uint16_t>(low)) | static_cast<uint32_t>(static_cast<uint16_t>(high)) << 16;
  }
};
template <typename Op>
Execute packed_of(Type type) {
  if (type == Type::kU16x2) return &execute_binary<uint32_t, uint32_t, uint32_t, Packed<uint16_t, Op>>;
  return &execute_binary<uint32_t, uint32_t, uint32_t, Packed<int16_t, Op>>;
}

template <bool kASigned, bool kBSigned>
struct Dp4a {
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 32; i += 8) {
      int32_t x = kASigned ? int32_t{static_cast<int8_t>(a >> i)} : int32_t{static_cast<uint8_t>(a >> i)};
      int32_t y = kBSigned ? int32_t{static_cast<int8_t>(b >> i)} : int32_t{static_cast<uint8_t>(b >> i)};
      c += static_cast<uint32_t>(x * y);
    }
    return c;
  }
};
template <bool kASigned, bool kBSigned, bool kHigh>
struct Dp2a {
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 2; i++) {
      uint32_t byte = b >> (8 * i + (kHigh ? 16 : 0)), half = a >> (16 * i);
      int32_t x = kASigned ? int32_t{static_cast<int16_t>(half)} : int32_t{static_cast<uint16_t>(half)};
      int32_t y = kBSigned ? int32_t{static_cast<int8_t>(byte)} : int32_t{static_cast<uint8_t>(byte)};
      c += static_cast<uint32_t>(x * y);
    }
    return c;
  }
};

// ---- carries
// --------------------------------------------------------------------------------------------------------- d = a + b +
// carry-in, or a - b - borrow-in; in.aux says which ends exist. The flag is the carry of a + ~b + 1 after a
// subtraction, so set when there is no borrow: nvcc's 128-bit division mixes sub.cc with addc and relies on it.
enum CarryFlag : uint32_t { kCarryIn = 1, kCarryOut = 2, kSubtract = 4 };

template <typename T>
void execute_carry(Warp& warp, const Instruction& in) {
  const T *a = warp.lanes<T>(in.operands[1]), *b = warp.lanes<T>(in.operands[2]);
  T* d = warp.lanes<T>(in.operands[0]);
  uint32_t in_bits = in.aux & kCarryIn ? warp.carry() : 0, out_bits = 0;
  warp.for_each([&](int i) {
    T carry = static_cast<T>(in_bits >> i & 1), result;
    bool out;
    if (in.aux & kSubtract) {
      T borrow = in.aux & kCarryIn ? static_cast<T>(1 - carry) : T{0};
      out = __builtin_sub_overflow(a[i], b[i], &result);
      out |= __builtin_sub_overflow(result, borrow, &result);
      out = !out;
    } else {
      out = __builtin_add_overflow(a[i], b[i], &result);
      out |= __builtin_add_overflow(result, carry, &result);
    }
    d[i] = result;
    out_bits |= static_cast<uint32_t>(out) << i;
  });
  if (in.aux & kCarryOut) warp.set_carry(out_bits);
}

// d = lo or hi of a * b, + c + carry-in.
template <typename T, bool kHigh>
void execute_mad_carry(Warp& warp, const Instruction& in) {
  const T *a = warp.lanes<T>(in.operands[1]), *b = warp.lanes<T>(in.operands[2]), *c = warp.lanes<T>(in.operands[3]);
  T* d = warp.lanes<T>(in.operands[0]);
  uint32_t in_bits = in.aux & kCarryIn ? warp.carry() : 0, out_bits = 0;
  warp.for_each([&](int i) {
    using U = Unsigned<T>;
    U product = static_cast<U>(kHigh ? high_product(a[i], b[i]) : low_product(a[i], b[i])), result;
    bool out = __builtin_add_overflow(product, static_cast<U>(c[i]), &result);
    out |= __builtin_add_overflow(result, static_cast<U>(in_bits >> i & 1), &result);
    d[i] = static_cast<T>(result);
    out_bits |= static_cast<uint32_t>(out) << i;
  });
  if (in.aux & kCarryOut) warp.set_carry(out_bits);
}

// ---- decoding -------------------------------------------------------------------------------------------------------
bool is_16x2(Type type) { return type == Type::kU16x2 || type == Type::kS16x2; }

// The last part that names a type; modifiers such as .relu may follow it.
Type last_type(const ptx::Instruction& in) {
  for (size_t i = in.parts.size(); i-- > 1;)
    if (Type type = type_of(in.parts[i]); type != Type::kNone) return type;
  return Type::kNone;
}

bool decode_add(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  const std::string& name = in.parts[0];
  Modifiers mods(decoder, in);
  Type type = mods.take_type();
  bool sub = name[0] == 's', carry_in = name.size() == 4, carry_out = mods.take("cc");
  if (carry_in || carry_out) {
    mods.finish();
    out.aux = (carry_in ? kCarryIn : 0u) | (carry_out ? kCarryOut : 0u) | (sub ? kSubtract : 0u);
    uint32_t bytes = num_bytes(type);
    if (!is_integer(type) || bytes < 4) decoder.error("expected a type of 32 or 64 bits");
    decode_plain(decoder, in, out, type, 2, bytes == 4 ? &execute_carry<uint32_t> : &execute_carry<uint64_t>,
                 InstructionClass::kIntAlu);
    return true;
  }
  bool sat = mods.take("sat");
  mods.finish();
  Execute execute = sub ? binary_of<Sub>(type) : binary_of<Add>(type);
  if (sat)
    execute = type != Type::kS32 ? nullptr
              : sub              ? &execute_binary<int32_t, int32_t, int32_t, SubSat>
                                 : &execute_binary<int32_t, int32_t, int32_t, AddSat>;
  if (is_16x2(type)) execute = sub || sat ? nullptr : packed_of<Add>(type);
  decode_plain(decoder, in, out, type, 2, execute, InstructionClass::kIntAlu);
  return true;
}

bool decode_multiply(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  bool mad = in.parts[0] != "mul", carry_in = in.parts[0] == "madc";
  Modifiers mods(decoder, in);
  Type type = mods.take_type();
  int form = mods.take_one_of({"lo", "hi", "wide"});
  bool carry_out = mods.take("cc"), sat = mods.take("sat");
  mods.finish();
  if (form < 0) decoder.error("expected .lo, .hi or .wide");
  if (!is_integer(type)) decoder.error("expected an integer type");
  size_t sources = mad ? 3 : 2;
  InstructionClass cls = InstructionClass::kIntMul;
  if (carry_in || carry_out) {
    if (!mad || form == 2 || num_bytes(type) < 4) decoder.error("expected a type of 32 or 64 bits, and .lo or .hi");
    out.aux = (carry_in ? kCarryIn : 0u) | (carry_out ? kCarryOut : 0u);
    Execute execute = with_integer(type, [&]<typename T>() -> Execute {
      if constexpr (sizeof(T) >= 4) return form == 1 ? &execute_mad_carry<T, true> : &execute_mad_carry<T, false>;
      return nullptr;
    });
    decode_plain(decoder, in, out, type, sources, execute, cls);
    return true;
  }
  if (form == 2) {
    Type wide = type == Type::kU16   ? Type::kU32
                : type == Type::kS16 ? Type::kS32
                : type == Type::kU32 ? Type::kU64
                : type == Type::kS32 ? Type::kS64
                                     : Type::kNone;
    if (wide == Type::kNone || sat) decoder.error("expected a type of 16 or 32 bits");
    decoder.expect_operands(in, sources + 1);
    out.cls = cls;
    switch (type) {
      case Type::kU16:
        out.execute = mad ? &execute_ternary<uint32_t, uint16_t, uint16_t, uint32_t, MadWide>
                          : &execute_binary<uint32_t, uint16_t, uint16_t, MulWide>;
        break;
      case Type::kS16:
        out.execute = mad ? &execute_ternary<int32_t, int16_t, int16_t, int32_t, MadWide>
                          : &execute_binary<int32_t, int16_t, int16_t, MulWide>;
        break;
      case Type::kU32:
        out.execute = mad ? &execute_ternary<uint64_t, uint32_t, uint32_t, uint64_t, MadWide>
                          : &execute_binary<uint64_t, uint32_t, uint32_t, MulWide>;
        break;
      default:
        out.execute = mad ? &execute_ternary<int64_t, int32_t, int32_t, int64_t, MadWide>
                          : &execute_binary<int64_t, int32_t, int32_t, MulWide>;
        break;
    }
    std::vector<Operand> operands = {decoder.destination(in.operands[0], wide), decoder.source(in.operands[1], type),
                                     decoder.source(in.operands[2], type)};
    if (mad) operands.push_back(decoder.source(in.operands[3], wide));
    decoder.set_operands(out, std::move(operands));
    return true;
  }
  Execute execute;
  if (sat)
    execute = mad && form == 1 && type == Type::kS32 ? &execute_ternary<int32_t, int32_t, int32_t, int32_t, MadHiSat>
                                                     : nullptr;
  else if (mad) execute = form == 1 ? ternary_of<MadHi>(type) : ternary_of<MadLo>(type);
  else execute = form == 1 ? binary_of<MulHi>(type) : binary_of<MulLo>(type);
  decode_plain(decoder, in, out, type, sources, execute, cls);
  return true;
}

bool decode_multiply24(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  bool mad = in.parts[0] == "mad24";
  Modifiers mods(decoder, in);
  Type type = mods.take_type();
  int form = mods.take_one_of({"lo", "hi"});
  bool sat = mods.take("sat");
  mods.finish();
  if (form < 0 || (type != Type::kU32 && type != Type::kS32))
    decoder.error("expected .lo or .hi and a type of 32 bits");
  Execute execute;
  if (sat)
    execute = mad && form == 1 && type == Type::kS32 ? &execute_ternary<int32_t, int32_t, int32_t, int32_t, Mad24HiSat>
                                                     : nullptr;
  else if (mad) execute = form == 1 ? ternary_of<Mad24Hi>(type) : ternary_of<Mad24Lo>(type);
  else execute = form == 1 ? binary_of<Mul24Hi>(type) : binary_of<Mul24Lo>(type);
  decode_plain(decoder, in, out, type, mad ? 3 : 2, execute, InstructionClass::kIntMul);
  return true;
}

bool decode_min_max(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  bool max = in.parts[0] == "max";
  Modifiers mods(decoder, in);
  Type type = mods.take_type();
  bool relu = mods.take("relu");
  mods.finish();
  Execute execute = max ? binary_of<Max>(type) : binary_of<Min>(type);
  if (relu)
    execute = type != Type::kS32 ? nullptr
              : max              ? &execute_binary<int32_t, int32_t, int32_t, MaxRelu>
                                 : &execute_binary<int32_t, int32_t, int32_t, MinRelu>;
  if (type == Type::kS16x2 && relu) execute = max ? packed_of<MaxRelu>(type) : packed_of<MinRelu>(type);
  else if (is_16x2(type)) execute = relu ? nullptr : max ? packed_of<Max>(type) : packed_of<Min>(type);
  decode_plain(decoder, in, out, type, 2, execute, InstructionClass::kIntAlu);
  return true;
}

bool decode_dot(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  bool four = in.parts[0] == "dp4a";
  Modifiers mods(decoder, in);
  int form = four ? 0 : mods.take_one_of({"lo", "hi"});
  bool a_signed = mods.take_type() == Type::kS32, b_signed = mods.take_type() == Type::kS32;
  mods.finish();
  if (form < 0) decoder.error("expected .lo or .hi");
  auto pick = [&](Execute uu, Execute us, Execute su, Execute ss) {
    return a_signed ? (b_signed ? ss : su) : (b_signed ? us : uu);
  };
  using U = uint32_t;
  Execute execute;
  if (four)
    execute = pick(&execute_ternary<U, U, U, U, Dp4a<false, false>>, &execute_ternary<U, U, U, U, Dp4a<false, true>>,
                   &execute_ternary<U, U, U, U, Dp4a<true, false>>, &execute_ternary<U, U, U, U, Dp4a<true, true>>);
  else if (form == 1)
    execute = pick(
        &execute_ternary<U, U, U, U, Dp2a<false, false, true>>, &execute_ternary<U, U, U, U, Dp2a<false, true, true>>,
        &execute_ternary<U, U, U, U, Dp2a<true, false, true>>, &execute_ternary<U, U, U, U, Dp2a<true, true, true>>);
  else
    execute = pick(
        &execute_ternary<U, U, U, U, Dp2a<false, false, false>>, &execute_ternary<U, U, U, U, Dp2a<false, true, false>>,
        &execute_ternary<U, U, U, U, Dp2a<true, false, false>>, &execute_ternary<U, U, U, U, Dp2a<true, true, false>>);
  decode_plain(decoder, in, out, Type::kB32, 3, execute, InstructionClass::kIntMul);
  return true;
}

}  // namespace

void decode_plain(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Type type, size_t num_sources,
                  Execute execute, InstructionClass cls) {
  if (!execute) decoder.error(std::string("the type .") + name_of(type) + " does not go with this instruction");
  decoder.expect_operands(in, num_sources + 1);
  out.execute = execute;
  out.cls = cls;
  std::vector<Operand> operands = {decoder.destination(in.operands[0], type)};
  for (size_t i = 1; i <= num_sources; i++) operands.push_back(decoder.source(in.operands[i], type));
  decoder.set_operands(out, std::move(operands));
}

bool decode_arithmetic(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  const std::string& name = in.parts[0];
  Type type = last_type(in);
  bool is_int = is_integer(type) || is_16x2(type);
  if (name == "dp4a" || name == "dp2a") return decode_dot(decoder, in, out);
  if (!is_int) return false;
  if (name == "add" || name == "sub" || name == "addc" || name == "subc") return decode_add(decoder, in, out);
  if (name == "mul" || name == "mad" || name == "madc") return decode_multiply(decoder, in, out);
  if (name == "mul24" || name == "mad24") return decode_multiply24(decoder, in, out);
  if (name == "min" || name == "max") return decode_min_max(decoder, in, out);
  Execute execute = nullptr;
  size_t sources = 2;
  InstructionClass cls = InstructionClass::kIntAlu;
  if (name == "div" || name == "rem") {
    execute = name == "div" ? binary_of<Div>(type) : binary_of<Rem>(type);
    cls = InstructionClass::kIntMul;
  } else if (name == "abs" || name == "neg") {
    execute = name == "abs" ? unary_of<Abs>(type) : unary_of<Neg>(type);
    sources = 1;
  } else if (name == "sad") {
    execute = ternary_of<Sad>(type);
    sources = 3;
  } else {
    return false;
  }
  Modifiers mods(decoder, in);
  mods.take_type();
  mods.finish();
  decode_plain(decoder, in, out, type, sources, execute, cls);
  return true;
}

bool decode_integer(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  return decode_arithmetic(decoder, in, out) || decode_logic(decoder, in, out) || decode_select(decoder, in, out) ||
         decode_video(decoder, in, out);
}

}  // namespace emulator
