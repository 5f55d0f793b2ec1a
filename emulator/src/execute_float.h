// SPDX-License-Identifier: Apache-2.0
// What the files of the floating-point family share.
#pragma once

#include "numerics.h"

#include "machine.h"
#include "program.h"

namespace emulator {

static_assert(numerics::kLanes == kWarpLanes);

// decode_float() asks these in turn. `type` is the last part of the opcode, which all of the family end with.
bool decode_compare(Decoder&, const ptx::Instruction&, Instruction&, Type type);  // set, setp, testp
bool decode_half(Decoder&, const ptx::Instruction&, Instruction&, Type type);     // f16 and bf16, alone or in pairs

constexpr bool is_half(Type type) {
  return type == Type::kF16 || type == Type::kF16x2 || type == Type::kBF16 || type == Type::kBF16x2;
}
constexpr bool is_pair(Type type) { return type == Type::kF16x2 || type == Type::kBF16x2; }
constexpr bool is_bf16(Type type) { return type == Type::kBF16 || type == Type::kBF16x2; }

// rn rz rm rp, kRn when none is there; -1 in `index` then.
numerics::Rounding take_rounding(Modifiers& mods, int* index = nullptr);

// 32 results of which the active lanes count.
template <typename T>
inline void store_lanes(Warp& warp, Operand to, const T* values) {
  warp.write<T>(to, [values](int i) { return values[i]; });
}

// The numbers of a register of halves; of a pair `high` picks the upper one.
template <bool kBf16, bool kPair>
inline void load_halves(const Warp& warp, Operand from, bool high, float* out) {
  const int shift = high ? 16 : 0;
  if constexpr (kPair) {
    const uint32_t* words = warp.lanes<uint32_t>(from);
    for (int i = 0; i < kWarpLanes; ++i) {
      const uint32_t bits = words[i] >> shift & 0xffffu;
      out[i] = kBf16 ? numerics::float_from_bf16(bits) : numerics::float_from_f16(bits);
    }
  } else {
    const uint16_t* words = warp.lanes<uint16_t>(from);
    for (int i = 0; i < kWarpLanes; ++i) {
      out[i] = kBf16 ? numerics::float_from_bf16(words[i]) : numerics::float_from_f16(words[i]);
    }
  }
}
inline void load_halves(const Warp& warp, Operand from, Type type, bool high, float* out) {
  switch (type) {
    case Type::kF16: return load_halves<false, false>(warp, from, high, out);
    case Type::kF16x2: return load_halves<false, true>(warp, from, high, out);
    case Type::kBF16: return load_halves<true, false>(warp, from, high, out);
    default: return load_halves<true, true>(warp, from, high, out);
  }
}

}  // namespace emulator
