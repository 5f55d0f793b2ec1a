// SPDX-License-Identifier: Apache-2.0
// Execute functions made from an operation on one lane: Op::apply(a, b) for every lane of a warp.
#pragma once

#include <cstdint>

#include "machine.h"
#include "program.h"

namespace emulator {

template <typename D, typename A, typename Op>
void execute_unary(Warp& warp, const Instruction& in) {
  const A* a = warp.lanes<A>(in.operands[1]);
  warp.write<D>(in.operands[0], [=](int i) { return static_cast<D>(Op::apply(a[i])); });
}

template <typename D, typename A, typename B, typename Op>
void execute_binary(Warp& warp, const Instruction& in) {
  const A* a = warp.lanes<A>(in.operands[1]);
  const B* b = warp.lanes<B>(in.operands[2]);
  warp.write<D>(in.operands[0], [=](int i) { return static_cast<D>(Op::apply(a[i], b[i])); });
}

template <typename D, typename A, typename B, typename C, typename Op>
void execute_ternary(Warp& warp, const Instruction& in) {
  const A* a = warp.lanes<A>(in.operands[1]);
  const B* b = warp.lanes<B>(in.operands[2]);
  const C* c = warp.lanes<C>(in.operands[3]);
  warp.write<D>(in.operands[0], [=](int i) { return static_cast<D>(Op::apply(a[i], b[i], c[i])); });
}

// f.template operator()<T>() with the C++ type of an integer type of 16, 32 or 64 bits; null for another type.
template <typename F>
Execute with_integer(Type type, F&& f) {
  switch (type) {
    case Type::kU16:
    case Type::kB16: return f.template operator()<uint16_t>();
    case Type::kU32:
    case Type::kB32: return f.template operator()<uint32_t>();
    case Type::kU64:
    case Type::kB64: return f.template operator()<uint64_t>();
    case Type::kS16: return f.template operator()<int16_t>();
    case Type::kS32: return f.template operator()<int32_t>();
    case Type::kS64: return f.template operator()<int64_t>();
    default: return nullptr;
  }
}

template <typename Op>
Execute unary_of(Type type) {
  return with_integer(type, []<typename T>() -> Execute { return &execute_unary<T, T, Op>; });
}
template <typename Op>
Execute binary_of(Type type) {
  return with_integer(type, []<typename T>() -> Execute { return &execute_binary<T, T, T, Op>; });
}
template <typename Op>
Execute ternary_of(Type type) {
  return with_integer(type, []<typename T>() -> Execute { return &execute_ternary<T, T, T, T, Op>; });
}

// d, a, b, ... all of one type.
void decode_plain(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Type type, size_t num_sources,
                  Execute execute, InstructionClass cls);

// Parts of the integer family.
bool decode_arithmetic(Decoder&, const ptx::Instruction&, Instruction&);  // add ... rem, abs, dp4a, carries
bool decode_logic(Decoder&, const ptx::Instruction&, Instruction&);       // and, lop3, shifts, bit fields, prmt
bool decode_video(Decoder&, const ptx::Instruction&, Instruction&);       // vadd2 ... vabsdiff4
bool decode_select(Decoder&, const ptx::Instruction&, Instruction&);      // setp, set, selp, slct, mov

}  // namespace emulator
