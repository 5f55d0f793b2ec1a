// SPDX-License-Identifier: Apache-2.0
// The types of PTX.
#include "program.h"

namespace emulator {
namespace {

struct TypeEntry {
  Type type;
  const char* name;
  uint32_t num_bytes;
};
constexpr TypeEntry kTypes[] = {
    {Type::kNone, "none", 0},     {Type::kPred, "pred", 4},     {Type::kB8, "b8", 1},
    {Type::kB16, "b16", 2},       {Type::kB32, "b32", 4},       {Type::kB64, "b64", 8},
    {Type::kB128, "b128", 16},    {Type::kU8, "u8", 1},         {Type::kU16, "u16", 2},
    {Type::kU32, "u32", 4},       {Type::kU64, "u64", 8},       {Type::kS8, "s8", 1},
    {Type::kS16, "s16", 2},       {Type::kS32, "s32", 4},       {Type::kS64, "s64", 8},
    {Type::kF16, "f16", 2},       {Type::kF16x2, "f16x2", 4},   {Type::kBF16, "bf16", 2},
    {Type::kBF16x2, "bf16x2", 4}, {Type::kTF32, "tf32", 4},     {Type::kF32, "f32", 4},
    {Type::kF64, "f64", 8},       {Type::kE4M3, "e4m3", 1},     {Type::kE5M2, "e5m2", 1},
    {Type::kE4M3x2, "e4m3x2", 2}, {Type::kE5M2x2, "e5m2x2", 2}, {Type::kU16x2, "u16x2", 4},
    {Type::kS16x2, "s16x2", 4},   {Type::kF32x2, "f32x2", 8},
};

const TypeEntry& entry_of(Type type) { return kTypes[static_cast<size_t>(type)]; }

}  // namespace

Type type_of(std::string_view name) {
  for (const TypeEntry& entry : kTypes)
    if (entry.type != Type::kNone && name == entry.name) return entry.type;
  return Type::kNone;
}

uint32_t num_bytes(Type type) { return entry_of(type).num_bytes; }
const char* name_of(Type type) { return entry_of(type).name; }
bool is_signed(Type type) { return type >= Type::kS8 && type <= Type::kS64; }
bool is_integer(Type type) { return type >= Type::kB8 && type <= Type::kS64; }
bool is_float(Type type) { return type >= Type::kF16 && type != Type::kU16x2 && type != Type::kS16x2; }

}  // namespace emulator
