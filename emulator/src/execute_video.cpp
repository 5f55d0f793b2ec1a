// SPDX-License-Identifier: Apache-2.0
// Video instructions on two or four packed integers: vadd2 ... vabsdiff4. CUDA's SIMD intrinsics use some of them.
#include <algorithm>
#include <limits>

#include "integer_forms.h"

namespace emulator {
namespace {

enum class VideoOp : uint8_t { kAdd, kSub, kAvrg, kAbsDiff, kMin, kMax };

struct Video {
  VideoOp op;
  int count;  // 2 or 4 elements
  bool a_signed, b_signed, d_signed, saturate, accumulate;
};

int64_t element(uint32_t value, int width, int i, bool is_signed) {
  uint32_t bits = value >> (width * i) & ((1u << width) - 1);
  bool negative = is_signed && bits >> (width - 1);
  return static_cast<int64_t>(bits) - (negative ? int64_t{1} << width : 0);
}

int64_t apply(VideoOp op, int64_t a, int64_t b) {
  switch (op) {
    case VideoOp::kAdd: return a + b;
    case VideoOp::kSub: return a - b;
    case VideoOp::kAvrg: return a + b >= 0 ? (a + b + 1) >> 1 : (a + b) >> 1;  // rounds away from zero
    case VideoOp::kAbsDiff: return a > b ? a - b : b - a;
    case VideoOp::kMin: return std::min(a, b);
    default: return std::max(a, b);
  }
}

void execute_video(Warp& warp, const Instruction& in) {
  const Video& form = *static_cast<const Video*>(in.data);
  const uint32_t *a = warp.lanes<uint32_t>(in.operands[1]), *b = warp.lanes<uint32_t>(in.operands[2]);
  const uint32_t* c = warp.lanes<uint32_t>(in.operands[3]);
  int width = 32 / form.count;
  int64_t least = form.d_signed ? -(int64_t{1} << (width - 1)) : 0;
  int64_t most = (int64_t{1} << (form.d_signed ? width - 1 : width)) - 1;
  warp.write<uint32_t>(in.operands[0], [&](int lane) {
    uint32_t packed = 0, sum = c[lane];
    for (int i = 0; i < form.count; i++) {
      int64_t value =
          apply(form.op, element(a[lane], width, i, form.a_signed), element(b[lane], width, i, form.b_signed));
      if (form.saturate) value = std::clamp(value, least, most);
      sum += static_cast<uint32_t>(value);
      packed |= (static_cast<uint32_t>(value) & ((1u << width) - 1)) << (width * i);
    }
    return form.accumulate ? sum : packed;
  });
}

}  // namespace

bool decode_video(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  constexpr std::string_view kNames[] = {"vadd", "vsub", "vavrg", "vabsdiff", "vmin", "vmax"};
  const std::string& name = in.parts[0];
  char last = name.back();
  if (last != '2' && last != '4') return false;
  auto known = std::find(std::begin(kNames), std::end(kNames), std::string_view(name).substr(0, name.size() - 1));
  if (known == std::end(kNames)) return false;
  Video form{};
  form.op = static_cast<VideoOp>(known - std::begin(kNames));
  form.count = last - '0';
  Modifiers mods(decoder, in);
  for (bool* is_signed : {&form.d_signed, &form.a_signed, &form.b_signed}) {
    Type type = mods.take_type();
    if (type != Type::kU32 && type != Type::kS32) decoder.error("expected .u32 or .s32");
    *is_signed = type == Type::kS32;
  }
  form.saturate = mods.take("sat");
  form.accumulate = mods.take("add");
  mods.finish();
  out.data = decoder.keep(std::make_shared<Video>(form));
  decode_plain(decoder, in, out, Type::kB32, 3, &execute_video, InstructionClass::kIntAlu);
  return true;
}

}  // namespace emulator
