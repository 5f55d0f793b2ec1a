// SPDX-License-Identifier: Apache-2.0
// execute_convert.cpp: cvt and cvt.pack. What compilers emit in inner loops has a function of its own; everything else
// goes lane by lane through numerics::convert and its like, guided by a Conversion.
#include "execute_float.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <utility>

namespace emulator {

using namespace numerics;

namespace {

// ---- types ----------------------------------------------------------------------------------------------------------

// One of the types that cvt knows. Integers have no format.
struct CvtType {
  const char* name;
  Type reg;  // what the register must hold at least
  const Format* format;
  int bits;  // of an element, as it is packed
  int elements;
  bool is_signed;
};

constexpr CvtType kTypes[] = {
    {"u8", Type::kU8, nullptr, 8, 1, false},         {"u16", Type::kU16, nullptr, 16, 1, false},
    {"u32", Type::kU32, nullptr, 32, 1, false},      {"u64", Type::kU64, nullptr, 64, 1, false},
    {"s8", Type::kS8, nullptr, 8, 1, true},          {"s16", Type::kS16, nullptr, 16, 1, true},
    {"s32", Type::kS32, nullptr, 32, 1, true},       {"s64", Type::kS64, nullptr, 64, 1, true},
    {"f16", Type::kF16, &kF16, 16, 1, false},        {"bf16", Type::kBF16, &kBf16, 16, 1, false},
    {"f32", Type::kF32, &kF32, 32, 1, false},        {"f64", Type::kF64, &kF64, 64, 1, false},
    {"tf32", Type::kB32, &kTf32, 32, 1, false},      {"f16x2", Type::kF16x2, &kF16, 16, 2, false},
    {"bf16x2", Type::kBF16x2, &kBf16, 16, 2, false}, {"e4m3x2", Type::kB16, &kE4m3, 8, 2, false},
    {"e5m2x2", Type::kB16, &kE5m2, 8, 2, false},     {"e2m3x2", Type::kB16, &kE2m3, 8, 2, false},
    {"e3m2x2", Type::kB16, &kE3m2, 8, 2, false},     {"e2m1x2", Type::kB8, &kE2m1, 4, 2, false},
};

const CvtType& take_cvt_type(const Decoder& decoder, Modifiers& mods) {
  for (const std::string& part : mods.rest()) {
    for (const CvtType& type : kTypes) {
      if (part != type.name) continue;
      mods.take(type.name);
      return type;
    }
  }
  decoder.error("expected two types");
}

struct Conversion {
  const CvtType* to;
  const CvtType* from;
  ConvertOptions options;
  uint32_t to_bytes, from_bytes;  // of the registers
};
const Conversion& conversion_of(const Instruction& in) { return *static_cast<const Conversion*>(in.data); }

// ---- any conversion -------------------------------------------------------------------------------------------------

void load_lanes(const Warp& warp, Operand from, uint32_t bytes, uint64_t* out) {
  const auto load = [&]<class T>(const T* lanes) {
    for (int i = 0; i < kWarpLanes; ++i) out[i] = lanes[i];
  };
  switch (bytes) {
    case 1: return load(warp.lanes<uint8_t>(from));
    case 2: return load(warp.lanes<uint16_t>(from));
    case 4: return load(warp.lanes<uint32_t>(from));
    default: return load(warp.lanes<uint64_t>(from));
  }
}
void store_lanes(Warp& warp, Operand to, uint32_t bytes, const uint64_t* values) {
  const auto store = [&]<class T>(T) { warp.write<T>(to, [values](int i) { return static_cast<T>(values[i]); }); };
  switch (bytes) {
    case 1: return store(uint8_t{});
    case 2: return store(uint16_t{});
    case 4: return store(uint32_t{});
    default: return store(uint64_t{});
  }
}

uint64_t convert_element(const Conversion& c, uint64_t bits) {
  if (c.from->format == nullptr) {
    return from_integer(*c.to->format, bits, c.from->bits, c.from->is_signed, c.options);
  }
  // tf32 stands above 13 zeros; its NaN fills the register.
  if (c.to->format == nullptr) {
    return to_integer(*c.from->format, bits, c.to->bits, c.to->is_signed, c.options.rounding, c.options.ftz);
  }
  const uint64_t result = convert(*c.to->format, *c.from->format, bits, c.options);
  if (c.to->format != &kTf32) return result;
  return result == kTf32.nan ? kF32.nan : result << 13;
}

void execute_any(Warp& warp, const Instruction& in) {
  const Conversion& c = conversion_of(in);
  uint64_t values[kWarpLanes];
  load_lanes(warp, in.operands[1], c.from_bytes, values);
  warp.for_each([&](int i) { values[i] = convert_element(c, extend(values[i], c.from->bits, false)); });
  store_lanes(warp, in.operands[0], c.to_bytes, values);
}

// Two registers to a pair, the first in the upper half; a pair to a pair.
void execute_pair(Warp& warp, const Instruction& in) {
  const Conversion& c = conversion_of(in);
  uint64_t high[kWarpLanes], low[kWarpLanes];
  load_lanes(warp, in.operands[1], c.from_bytes, high);
  if (c.from->elements == 1) {
    load_lanes(warp, in.operands[2], c.from_bytes, low);
  } else {
    std::copy_n(high, kWarpLanes, low);
    for (uint64_t& bits : high) bits >>= c.from->bits;
  }
  const int width = c.from->format->width(), shift = c.to->bits;
  warp.for_each([&](int i) {
    high[i] =
        convert_element(c, extend(high[i], width, false)) << shift | convert_element(c, extend(low[i], width, false));
  });
  store_lanes(warp, in.operands[0], c.to_bytes, high);
}

void execute_integers(Warp& warp, const Instruction& in) {
  const Conversion& c = conversion_of(in);
  uint64_t values[kWarpLanes];
  load_lanes(warp, in.operands[1], c.from_bytes, values);
  for (uint64_t& value : values) value = extend(value, c.from->bits, c.from->is_signed);
  if (c.options.saturate) {
    for (uint64_t& value : values) value = clamp_integer(value, c.from->is_signed, c.to->bits, c.to->is_signed);
  }
  for (uint64_t& value : values) value = extend(value, c.to->bits, c.to->is_signed);
  store_lanes(warp, in.operands[0], c.to_bytes, values);
}

// ---- conversions of inner loops -------------------------------------------------------------------------------------

// Registers exactly as wide as the types.
template <class To, class From>
void execute_widen(Warp& warp, const Instruction& in) {
  const From* a = warp.lanes<From>(in.operands[1]);
  warp.write<To>(in.operands[0], [=](int i) { return static_cast<To>(a[i]); });
}
template <class To>
Execute choose_widen(const CvtType& from) {
  switch (from.bits) {
    case 8: return from.is_signed ? execute_widen<To, int8_t> : execute_widen<To, uint8_t>;
    case 16: return from.is_signed ? execute_widen<To, int16_t> : execute_widen<To, uint16_t>;
    case 32: return from.is_signed ? execute_widen<To, int32_t> : execute_widen<To, uint32_t>;
    default: return from.is_signed ? execute_widen<To, int64_t> : execute_widen<To, uint64_t>;
  }
}
// The result has the destination's width: its sign does not matter.
Execute choose_widen(const CvtType& to, const CvtType& from) {
  switch (to.bits) {
    case 8: return choose_widen<uint8_t>(from);
    case 16: return choose_widen<uint16_t>(from);
    case 32: return choose_widen<uint32_t>(from);
    default: return choose_widen<uint64_t>(from);
  }
}

template <bool kBf16>
void execute_to_half(Warp& warp, const Instruction& in) {
  const float* a = warp.lanes<float>(in.operands[1]);
  warp.write<uint16_t>(in.operands[0], [=](int i) {
    return static_cast<uint16_t>(kBf16 ? bf16_from_float(a[i]) : f16_from_float(a[i]));
  });
}
template <bool kBf16>
void execute_to_pair(Warp& warp, const Instruction& in) {
  alignas(64) uint32_t result[kWarpLanes];
  const float* high = warp.lanes<float>(in.operands[1]);
  const float* low = warp.lanes<float>(in.operands[2]);
  kBf16 ? lanes_to_bf16x2(result, high, low) : lanes_to_f16x2(result, high, low);
  emulator::store_lanes(warp, in.operands[0], result);
}
template <bool kBf16>
void execute_from_half(Warp& warp, const Instruction& in) {
  const uint16_t* a = warp.lanes<uint16_t>(in.operands[1]);
  warp.write<float>(in.operands[0], [=](int i) { return kBf16 ? float_from_bf16(a[i]) : float_from_f16(a[i]); });
}

// To tf32, ties away: what the hardware does in two integer operations.
void execute_rna_tf32(Warp& warp, const Instruction& in) {
  const uint32_t* a = warp.lanes<uint32_t>(in.operands[1]);
  warp.write<uint32_t>(in.operands[0], [=](int i) {
    const bool nan = (a[i] & 0x7fffffffu) > 0x7f800000u;
    return nan ? 0x7fffffffu : (a[i] + 0x1000u) & 0xffffe000u;
  });
}

template <class To, class From>
void execute_float_to_float(Warp& warp, const Instruction& in) {
  const From* a = warp.lanes<From>(in.operands[1]);
  warp.write<To>(in.operands[0], [=](int i) { return canonical(static_cast<To>(a[i])); });
}

// fp8 to f16 by table.
template <bool kE5m2>
void execute_fp8_to_pair(Warp& warp, const Instruction& in) {
  static const auto table = [] {
    std::array<uint32_t, 256> halves;
    for (uint32_t i = 0; i < 256; ++i) {
      halves[i] = static_cast<uint32_t>(convert(kF16, kE5m2 ? numerics::kE5m2 : kE4m3, i, {}));
    }
    return halves;
  }();
  const uint16_t* a = warp.lanes<uint16_t>(in.operands[1]);
  const uint32_t* halves = table.data();
  warp.write<uint32_t>(in.operands[0], [=](int i) { return halves[a[i] >> 8] << 16 | halves[a[i] & 0xff]; });
}

template <bool kE5m2, bool kFromHalves>
void execute_pair_to_fp8(Warp& warp, const Instruction& in) {
  alignas(64) float high[kWarpLanes], low[kWarpLanes];
  if constexpr (kFromHalves) {
    load_halves<false, true>(warp, in.operands[1], true, high);
    load_halves<false, true>(warp, in.operands[1], false, low);
  } else {
    std::copy_n(warp.lanes<float>(in.operands[1]), kWarpLanes, high);
    std::copy_n(warp.lanes<float>(in.operands[2]), kWarpLanes, low);
  }
  alignas(64) uint16_t result[kWarpLanes];
  for (int i = 0; i < kWarpLanes; ++i) {
    result[i] = static_cast<uint16_t>(fp8_from_float<kE5m2>(high[i]) << 8 | fp8_from_float<kE5m2>(low[i]));
  }
  emulator::store_lanes(warp, in.operands[0], result);
}

template <class T>
inline T round_to_integral(T x, Rounding rounding) {
  switch (rounding) {
    case Rounding::kRz: return std::trunc(x);
    case Rounding::kRm: return std::floor(x);
    case Rounding::kRp: return std::ceil(x);
    default: return std::nearbyint(x);
  }
}

// f32 to f32: floor and its like, .sat, .ftz.
template <Rounding kRounding, bool kIntegral>
void execute_f32_to_f32(Warp& warp, const Instruction& in) {
  const ConvertOptions& options = conversion_of(in).options;
  const float* a = warp.lanes<float>(in.operands[1]);
  alignas(64) float result[kWarpLanes];
  std::copy_n(a, kWarpLanes, result);
  if (options.ftz) {
    for (float& x : result) x = flush(x);
  }
  for (float& x : result) x = canonical(kIntegral ? round_to_integral(x, kRounding) : x);
  if (options.saturate) {
    for (float& x : result) x = saturate(x);
  }
  emulator::store_lanes(warp, in.operands[0], result);
}
Execute choose_f32_to_f32(const ConvertOptions& options) {
  if (!options.to_integral) return execute_f32_to_f32<Rounding::kRn, false>;
  switch (options.rounding) {
    case Rounding::kRz: return execute_f32_to_f32<Rounding::kRz, true>;
    case Rounding::kRm: return execute_f32_to_f32<Rounding::kRm, true>;
    case Rounding::kRp: return execute_f32_to_f32<Rounding::kRp, true>;
    default: return execute_f32_to_f32<Rounding::kRn, true>;
  }
}

// f32 and f64 to integers of up to 32 bits, all of which a double holds.
template <class From, Rounding kRounding>
void execute_to_integer(Warp& warp, const Instruction& in) {
  const Conversion& c = conversion_of(in);
  const From* a = warp.lanes<From>(in.operands[1]);
  const int bits = c.to->bits;
  const double largest = std::ldexp(1.0, c.to->is_signed ? bits - 1 : bits) - 1.0;
  const double smallest = c.to->is_signed ? -std::ldexp(1.0, bits - 1) : 0.0;
  // See to_integer(): what NaN becomes.
  const double of_nan = sizeof(From) < 8 ? 0.0 : c.to->is_signed ? smallest : std::ldexp(1.0, bits - 1);
  alignas(64) double rounded[kWarpLanes];
  for (int i = 0; i < kWarpLanes; ++i) {
    From x = a[i];
    if (sizeof(From) == 4 && c.options.ftz) x = flush(x);
    const double whole = round_to_integral(static_cast<double>(x), kRounding);
    const double above = whole > smallest ? whole : smallest;
    const double clamped = above < largest ? above : largest;
    rounded[i] = x == x ? clamped : of_nan;
  }
  uint64_t values[kWarpLanes];
  for (int i = 0; i < kWarpLanes; ++i) values[i] = static_cast<uint64_t>(static_cast<int64_t>(rounded[i]));
  store_lanes(warp, in.operands[0], c.to_bytes, values);
}
template <class From>
Execute choose_to_integer(Rounding rounding) {
  switch (rounding) {
    case Rounding::kRz: return execute_to_integer<From, Rounding::kRz>;
    case Rounding::kRm: return execute_to_integer<From, Rounding::kRm>;
    case Rounding::kRp: return execute_to_integer<From, Rounding::kRp>;
    default: return execute_to_integer<From, Rounding::kRn>;
  }
}

template <class To>
void execute_from_integer(Warp& warp, const Instruction& in) {
  const Conversion& c = conversion_of(in);
  uint64_t values[kWarpLanes];
  alignas(64) To result[kWarpLanes];
  load_lanes(warp, in.operands[1], c.from_bytes, values);
  for (uint64_t& value : values) value = extend(value, c.from->bits, c.from->is_signed);
  if (c.from->bits == 64 && !c.from->is_signed) {
    for (int i = 0; i < kWarpLanes; ++i) result[i] = static_cast<To>(values[i]);
  } else {
    for (int i = 0; i < kWarpLanes; ++i) result[i] = static_cast<To>(static_cast<int64_t>(values[i]));
  }
  emulator::store_lanes(warp, in.operands[0], result);
}

// The function of a conversion that has one of its own, else null.
Execute find_fast(const Conversion& c) {
  const ConvertOptions& o = c.options;
  const Format* to = c.to->format;
  const Format* from = c.from->format;
  const bool exact_registers = c.to_bytes * 8 == static_cast<uint32_t>(c.to->bits * c.to->elements) &&
                               c.from_bytes * 8 == static_cast<uint32_t>(c.from->bits * c.from->elements);
  const bool plain = !o.ftz && !o.saturate && !o.saturate_finite && !o.relu && !o.to_integral;
  if (to == nullptr && from == nullptr) return exact_registers && !o.saturate ? choose_widen(*c.to, *c.from) : nullptr;
  if (to == nullptr) {
    if (c.to->bits > 32) return nullptr;
    if (from == &kF32) return choose_to_integer<float>(o.rounding);
    return from == &kF64 ? choose_to_integer<double>(o.rounding) : nullptr;
  }
  if (from == nullptr) {
    if (!plain || o.rounding != Rounding::kRn) return nullptr;
    return to == &kF32 ? execute_from_integer<float> : to == &kF64 ? execute_from_integer<double> : nullptr;
  }
  const bool saturates = o.saturate_finite && !o.relu && o.rounding == Rounding::kRn;
  if (saturates && c.to->elements == 2 && (to == &kE4m3 || to == &kE5m2)) {
    if (from == &kF32) return to == &kE5m2 ? execute_pair_to_fp8<true, false> : execute_pair_to_fp8<false, false>;
    if (from == &kF16) return to == &kE5m2 ? execute_pair_to_fp8<true, true> : execute_pair_to_fp8<false, true>;
  }
  if (c.from->elements == 2) {
    if (to != &kF16 || !plain) return nullptr;
    return from == &kE4m3 ? execute_fp8_to_pair<false> : from == &kE5m2 ? execute_fp8_to_pair<true> : nullptr;
  }
  if (to == &kF32 && from == &kF32) return choose_f32_to_f32(o);
  if (to == &kTf32 && plain && o.rounding == Rounding::kRna) return execute_rna_tf32;
  if (!plain || o.rounding != Rounding::kRn) return nullptr;
  if (from == &kF32 && to == &kF16) return c.to->elements == 2 ? execute_to_pair<false> : execute_to_half<false>;
  if (from == &kF32 && to == &kBf16) return c.to->elements == 2 ? execute_to_pair<true> : execute_to_half<true>;
  if (from == &kF32 && to == &kF64) return execute_float_to_float<double, float>;
  if (from == &kF64 && to == &kF32) return execute_float_to_float<float, double>;
  if (to == &kF32 && from == &kF16) return execute_from_half<false>;
  if (to == &kF32 && from == &kBf16) return execute_from_half<true>;
  return nullptr;
}

// ---- cvt ------------------------------------------------------------------------------------------------------------

void check_types(Decoder& decoder, const Conversion& c, bool integral, bool rounds) {
  const CvtType &to = *c.to, &from = *c.from;
  const ConvertOptions& o = c.options;
  const bool to_integer = to.format == nullptr, from_integer = from.format == nullptr;
  const bool narrow = to.elements == 2 || to.format == &kTf32 || to.format == &kF16 || to.format == &kBf16;
  if (from.format == &kTf32 || (from.elements == 2 && to.elements == 1)) decoder.error("no such conversion");
  if (to.elements == 2 && (from.elements == 1 ? from.format != &kF32 : to.bits == from.bits)) {
    decoder.error("no such conversion");
  }
  if (to_integer && !from_integer && !integral) decoder.error("expected an integer rounding such as .rni");
  if ((to_integer || from_integer) && (o.relu || o.saturate_finite)) decoder.error("no such conversion");
  if (from_integer && integral) decoder.error("expected a rounding such as .rn");
  if (to_integer && from_integer && rounds) decoder.error("expected no rounding between integers");
  if (!to_integer && !from_integer && integral && to.format != from.format)
    decoder.error("expected a rounding such as .rn");
  if ((o.relu || o.saturate_finite) && !narrow) decoder.error("no .relu or .satfinite with this type");
  const bool loses = !to_integer && !from_integer && to.format->mantissa_bits < from.format->mantissa_bits;
  if ((loses || (from_integer && !to_integer)) && !rounds) decoder.error("expected a rounding such as .rn");
}

void decode_cvt(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Modifiers& mods) {
  auto c = std::make_shared<Conversion>();
  const int integral = mods.take_one_of({"rni", "rzi", "rmi", "rpi"});
  const int floating = mods.take_one_of({"rn", "rz", "rm", "rp", "rna"});
  if (integral >= 0 && floating >= 0) decoder.error("expected one rounding");
  c->options.rounding = static_cast<Rounding>(std::max({integral, floating, 0}));
  c->options.to_integral = integral >= 0;
  c->options.ftz = mods.take("ftz");
  c->options.saturate = mods.take("sat");
  c->options.saturate_finite = mods.take("satfinite");
  c->options.relu = mods.take("relu");
  c->to = &take_cvt_type(decoder, mods);
  c->from = &take_cvt_type(decoder, mods);
  mods.finish();
  check_types(decoder, *c, integral >= 0, floating >= 0 || integral >= 0);
  if (c->to->format == nullptr) c->options.to_integral = false;

  const bool packs = c->to->elements == 2 && c->from->elements == 1;
  decoder.expect_operands(in, packs ? 3 : 2);
  std::vector<Operand> operands = {decoder.destination(in.operands[0], c->to->reg, &c->to_bytes),
                                   decoder.source(in.operands[1], c->from->reg, &c->from_bytes)};
  if (packs) operands.push_back(decoder.source(in.operands[2], c->from->reg));
  decoder.set_operands(out, operands);
  out.cls = InstructionClass::kConvert;
  out.execute = find_fast(*c);
  if (out.execute == nullptr) {
    const bool integers = c->to->format == nullptr && c->from->format == nullptr;
    out.execute = integers ? execute_integers : c->to->elements == 2 ? execute_pair : execute_any;
  }
  out.data = decoder.keep(std::move(c));
}

// ---- cvt.pack -------------------------------------------------------------------------------------------------------

// d = c shifted left by two elements | sat(a) in the upper | sat(b) in the lower element. aux: bits | signed << 8.
void execute_pack(Warp& warp, const Instruction& in) {
  const int bits = static_cast<int>(in.aux & 0xff);
  const bool is_signed = (in.aux >> 8) != 0;
  const int32_t* a = warp.lanes<int32_t>(in.operands[1]);
  const int32_t* b = warp.lanes<int32_t>(in.operands[2]);
  const uint32_t* c = in.num_operands == 4 ? warp.lanes<uint32_t>(in.operands[3]) : nullptr;
  const auto element = [=](int32_t value) {
    const uint64_t wide = static_cast<uint64_t>(static_cast<int64_t>(value));
    return static_cast<uint32_t>(extend(clamp_integer(wide, true, bits, is_signed), bits, false));
  };
  warp.write<uint32_t>(in.operands[0], [=](int i) {
    const uint32_t above = c != nullptr ? c[i] << (2 * bits) : 0;
    return above | element(a[i]) << bits | element(b[i]);
  });
}

void decode_pack(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Modifiers& mods) {
  constexpr int kBits[] = {16, 16, 8, 8, 4, 4, 2, 2};
  if (!mods.take("sat")) decoder.error("expected .sat");
  const int to = mods.take_one_of({"u16", "s16", "u8", "s8", "u4", "s4", "u2", "s2"});
  if (to < 0 || !mods.take("s32")) decoder.error("expected a type such as .u8 and .s32");
  const bool chains = mods.take("b32");
  mods.finish();
  if (chains != (kBits[to] < 16)) decoder.error("expected .b32 with elements of 8 bits and less");
  decoder.expect_operands(in, chains ? 4 : 3);
  std::vector<Operand> operands = {decoder.destination(in.operands[0], Type::kB32),
                                   decoder.source(in.operands[1], Type::kS32),
                                   decoder.source(in.operands[2], Type::kS32)};
  if (chains) operands.push_back(decoder.source(in.operands[3], Type::kB32));
  decoder.set_operands(out, operands);
  out.cls = InstructionClass::kConvert;
  out.aux = static_cast<uint32_t>(kBits[to]) | (to % 2 == 1 ? 1u << 8 : 0);
  out.execute = execute_pack;
}

}  // namespace

bool decode_convert(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  if (in.parts[0] != "cvt") return false;
  Modifiers mods(decoder, in);
  mods.take("pack") ? decode_pack(decoder, in, out, mods) : decode_cvt(decoder, in, out, mods);
  return true;
}

}  // namespace emulator
