// SPDX-License-Identifier: Apache-2.0
// execute_warp.cpp: shuffles, votes, matches, reductions over a warp, bar.warp.sync, elect, activemask. All but the
// last wait until every lane of their mask has come. bar.warp.sync alone orders accesses to memory: CUDA promises that of
// no other.
#include <bit>

#include "access.h"
#include "machine.h"
#include "numerics.h"

namespace emulator {
namespace {

// A source lane that does not take part: its value is undefined.
void report_absent(Warp& warp, const Instruction& in, int lane, int from, uint32_t named) {
  warp.fault(Fault::kCollective, in, lane, [&] {
    return "reads a register of lane " + std::to_string(from) +
           (named >> from & 1 ? ", which has exited or is not there" : ", which is not in the mask " + hex(named));
  });
}

// ---- shfl -----------------------------------------------------------------------------------------------------------

enum class Shuffle : uint8_t { kUp, kDown, kButterfly, kIndex };

// operands: d, p (or the sink), a, b, c, mask.
template <Shuffle kMode>
void execute_shuffle(Warp& warp, const Instruction& in) {
  const uint32_t* mask = warp.lanes<uint32_t>(in.operands[5]);
  if (!warp.collective(in, mask)) return;
  const uint32_t* a = warp.lanes<uint32_t>(in.operands[2]);
  const uint32_t* b = warp.lanes<uint32_t>(in.operands[3]);
  const uint32_t* c = warp.lanes<uint32_t>(in.operands[4]);
  alignas(64) uint32_t result[kWarpLanes];
  uint32_t from[kWarpLanes], in_range = 0;
  for (uint32_t lane = 0; lane < kWarpLanes; lane++) {
    const uint32_t segment = c[lane] >> 8 & 31, clamp = c[lane] & 31, distance = b[lane] & 31;
    const uint32_t lowest = lane & segment, highest = lowest | (clamp & ~segment);
    uint32_t source = 0;
    bool inside = false;
    switch (kMode) {
      case Shuffle::kUp:
        source = lane - distance;
        inside = static_cast<int32_t>(source) >= static_cast<int32_t>(highest);
        break;
      case Shuffle::kDown:
        source = lane + distance;
        inside = source <= highest;
        break;
      case Shuffle::kButterfly:
        source = lane ^ distance;
        inside = source <= highest;
        break;
      case Shuffle::kIndex:
        source = lowest | (distance & ~segment);
        inside = source <= highest;
        break;
    }
    if (!inside) source = lane;
    from[lane] = source;
    in_range |= static_cast<uint32_t>(inside) << lane;
    result[lane] = a[source];
  }
  auto finish_group = [&](uint32_t named, uint32_t group) {
    if (group != kAllLanes)
      for (uint32_t rest = group; rest; rest &= rest - 1) {
        const int lane = std::countr_zero(rest);
        if (group >> from[lane] & 1) continue;
        report_absent(warp, in, lane, static_cast<int>(from[lane]), named);
        result[lane] = a[lane];
      }
  };
  warp.for_each_group(mask, finish_group);
  warp.set_sources(from);
  warp.write<uint32_t>(in.operands[0], [&](int i) { return result[i]; });
  warp.set_mask(in.operands[1], in_range);
}

void decode_shuffle(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  if (!mods.take("sync")) decoder.error("expected .sync");
  const int mode = mods.take_one_of({"up", "down", "bfly", "idx"});
  if (mode < 0) decoder.error("expected .up, .down, .bfly or .idx");
  if (num_bytes(mods.take_type()) != 4) decoder.error("expected .b32");
  mods.finish();
  decoder.expect_operands(in, 5);
  const bool pair = in.operands[0].kind == ptx::Operand::Kind::kPair;
  const ptx::Operand& to = pair ? in.operands[0].elements[0] : in.operands[0];
  constexpr Execute kExecute[] = {execute_shuffle<Shuffle::kUp>, execute_shuffle<Shuffle::kDown>,
                                  execute_shuffle<Shuffle::kButterfly>, execute_shuffle<Shuffle::kIndex>};
  out.cls = InstructionClass::kShuffle;
  out.execute = kExecute[mode];
  decoder.set_operands(
      out, {decoder.destination(to, Type::kB32),
            pair ? decoder.destination(in.operands[0].elements[1], Type::kPred) : decoder.sink(),
            decoder.source(in.operands[1], Type::kB32, Moved::kFromLane), decoder.source(in.operands[2], Type::kB32),
            decoder.source(in.operands[3], Type::kB32), decoder.source(in.operands[4], Type::kB32)});
}

// ---- vote -----------------------------------------------------------------------------------------------------------

enum class Vote : uint8_t { kAll, kAny, kUniform, kBallot };

template <Vote kVote>
void execute_vote(Warp& warp, const Instruction& in) {
  const uint32_t* mask = warp.lanes<uint32_t>(in.operands[2]);
  if (!warp.collective(in, mask)) return;
  const uint32_t value = warp.mask(in.operands[1]);
  uint32_t result = 0;
  uint32_t ballot[kWarpLanes] = {};
  warp.for_each_group(mask, [&](uint32_t, uint32_t group) {
    const uint32_t votes = value & group;
    if (kVote == Vote::kBallot) {
      for (uint32_t rest = group; rest; rest &= rest - 1) ballot[std::countr_zero(rest)] = votes;
    } else if (kVote == Vote::kAll ? votes == group : kVote == Vote::kAny ? votes != 0 : votes == 0 || votes == group) {
      result |= group;
    }
  });
  if (kVote == Vote::kBallot) {
    warp.write<uint32_t>(in.operands[0], [&](int i) { return ballot[i]; });
  } else {
    warp.set_mask(in.operands[0], result);
  }
}

void decode_vote(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  if (!mods.take("sync")) decoder.error("expected .sync");
  const int mode = mods.take_one_of({"all", "any", "uni", "ballot"});
  if (mode < 0) decoder.error("expected .all, .any, .uni or .ballot");
  const Type type = mode == 3 ? Type::kB32 : Type::kPred;
  if (mods.take_type(true) != type) decoder.error("this vote has another type");
  mods.finish();
  decoder.expect_operands(in, 3);
  constexpr Execute kExecute[] = {execute_vote<Vote::kAll>, execute_vote<Vote::kAny>, execute_vote<Vote::kUniform>,
                                  execute_vote<Vote::kBallot>};
  out.cls = InstructionClass::kVote;
  out.execute = kExecute[mode];
  decoder.set_operands(out, {decoder.destination(in.operands[0], type), decoder.source(in.operands[1], Type::kPred),
                             decoder.source(in.operands[2], Type::kB32)});
}

// ---- match ----------------------------------------------------------------------------------------------------------

// operands: d, p (or the sink), a, mask.
template <typename T, bool kAll>
void execute_match(Warp& warp, const Instruction& in) {
  const uint32_t* mask = warp.lanes<uint32_t>(in.operands[3]);
  if (!warp.collective(in, mask)) return;
  const T* a = warp.lanes<T>(in.operands[2]);
  uint32_t result[kWarpLanes] = {}, all_equal = 0;
  warp.for_each_group(mask, [&](uint32_t, uint32_t group) {
    for (uint32_t rest = group; rest; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      for (uint32_t others = group; others; others &= others - 1)
        if (const int other = std::countr_zero(others); a[other] == a[lane]) result[lane] |= 1u << other;
      if (kAll && result[lane] != group) result[lane] = 0;
    }
    if (result[std::countr_zero(group)] == group) all_equal |= group;
  });
  warp.write<uint32_t>(in.operands[0], [&](int i) { return result[i]; });
  if (kAll) warp.set_mask(in.operands[1], all_equal);
}

void decode_match(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  const int mode = mods.take_one_of({"any", "all"});
  if (mode < 0 || !mods.take("sync")) decoder.error("expected .any.sync or .all.sync");
  const Type type = mods.take_type();
  if (type != Type::kB32 && type != Type::kB64) decoder.error("expected .b32 or .b64");
  mods.finish();
  decoder.expect_operands(in, 3);
  const bool pair = mode == 1 && in.operands[0].kind == ptx::Operand::Kind::kPair;
  const ptx::Operand& to = pair ? in.operands[0].elements[0] : in.operands[0];
  out.cls = InstructionClass::kVote;
  if (type == Type::kB32) {
    out.execute = mode == 1 ? execute_match<uint32_t, true> : execute_match<uint32_t, false>;
  } else {
    out.execute = mode == 1 ? execute_match<uint64_t, true> : execute_match<uint64_t, false>;
  }
  decoder.set_operands(out, {decoder.destination(to, Type::kB32),
                             pair ? decoder.destination(in.operands[0].elements[1], Type::kPred) : decoder.sink(),
                             decoder.source(in.operands[1], type), decoder.source(in.operands[2], Type::kB32)});
}

// ---- redux ----------------------------------------------------------------------------------------------------------

struct Redux {
  uint32_t (*combine)(uint32_t, uint32_t);
  bool absolute;  // of floats
};

void execute_redux(Warp& warp, const Instruction& in) {
  const uint32_t* mask = warp.lanes<uint32_t>(in.operands[2]);
  if (!warp.collective(in, mask)) return;
  const Redux& redux = *static_cast<const Redux*>(in.data);
  const uint32_t* a = warp.lanes<uint32_t>(in.operands[1]);
  const uint32_t kept = redux.absolute ? 0x7fffffffu : ~0u;
  uint32_t result[kWarpLanes] = {};
  warp.for_each_group(mask, [&](uint32_t, uint32_t group) {
    uint32_t value = a[std::countr_zero(group)] & kept;
    for (uint32_t rest = group & (group - 1); rest; rest &= rest - 1)
      value = redux.combine(value, a[std::countr_zero(rest)] & kept);
    for (uint32_t rest = group; rest; rest &= rest - 1) result[std::countr_zero(rest)] = value;
  });
  warp.write<uint32_t>(in.operands[0], [&](int i) { return result[i]; });
}

template <bool kMax, bool kNan>
uint32_t extreme_float(uint32_t a, uint32_t b) {
  const float x = numerics::as_float(a), y = numerics::as_float(b);
  return numerics::bits_of(kMax ? numerics::maximum<kNan>(x, y) : numerics::minimum<kNan>(x, y));
}

void decode_redux(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  if (!mods.take("sync")) decoder.error("expected .sync");
  const int operation = mods.take_one_of({"add", "min", "max", "and", "or", "xor"});
  const bool absolute = mods.take("abs"), nan = mods.take("NaN");
  const Type type = mods.take_type();
  mods.finish();
  using Combine = uint32_t (*)(uint32_t, uint32_t);
  const bool is_float = type == Type::kF32, is_bits = type == Type::kB32, signs = type == Type::kS32;
  Combine combine = nullptr;
  switch (operation) {
    case 0: combine = [](uint32_t x, uint32_t y) { return x + y; }; break;
    case 1:
      combine = signs ? Combine([](uint32_t x, uint32_t y) {
        return static_cast<int32_t>(x) < static_cast<int32_t>(y) ? x : y;
      })
                      : Combine([](uint32_t x, uint32_t y) { return x < y ? x : y; });
      if (is_float) combine = nan ? extreme_float<false, true> : extreme_float<false, false>;
      break;
    case 2:
      combine = signs ? Combine([](uint32_t x, uint32_t y) {
        return static_cast<int32_t>(x) > static_cast<int32_t>(y) ? x : y;
      })
                      : Combine([](uint32_t x, uint32_t y) { return x > y ? x : y; });
      if (is_float) combine = nan ? extreme_float<true, true> : extreme_float<true, false>;
      break;
    case 3: combine = [](uint32_t x, uint32_t y) { return x & y; }; break;
    case 4: combine = [](uint32_t x, uint32_t y) { return x | y; }; break;
    case 5: combine = [](uint32_t x, uint32_t y) { return x ^ y; }; break;
    default: decoder.error("expected an operation such as .add");
  }
  if (is_float) decoder.require_architecture(100);
  const bool known = is_float  ? operation == 1 || operation == 2
                     : is_bits ? operation >= 3
                               : operation <= 2 && (type == Type::kU32 || signs);
  if (!known || (!is_float && (absolute || nan))) decoder.error("no such reduction of this type");
  decoder.expect_operands(in, 3);
  out.cls = InstructionClass::kVote;
  out.execute = &execute_redux;
  out.data = decoder.keep(std::make_shared<Redux>(Redux{combine, absolute}));
  decoder.set_operands(out, {decoder.destination(in.operands[0], type), decoder.source(in.operands[1], type),
                             decoder.source(in.operands[2], Type::kB32)});
}

// ---- bar.warp.sync, elect, activemask -------------------------------------------------------------------------------

void execute_warp_barrier(Warp& warp, const Instruction& in) {
  if (!warp.collective(in, warp.lanes<uint32_t>(in.operands[0]), true)) return;
  if (SharedShadow* shadow = warp.block().shadow())
    warp.for_each_group([&](uint32_t, uint32_t group) { shadow->sync_lanes(warp.index(), group); });
}

// operands: d (or the sink), p, mask. The lowest lane is elected.
void execute_elect(Warp& warp, const Instruction& in) {
  const uint32_t* mask = warp.lanes<uint32_t>(in.operands[2]);
  if (!warp.collective(in, mask)) return;
  uint32_t leader[kWarpLanes] = {}, elected = 0;
  warp.for_each_group(mask, [&](uint32_t, uint32_t group) {
    for (uint32_t rest = group; rest; rest &= rest - 1)
      leader[std::countr_zero(rest)] = static_cast<uint32_t>(std::countr_zero(group));
    elected |= group & (0 - group);
  });
  warp.write<uint32_t>(in.operands[0], [&](int i) { return leader[i]; });
  warp.set_mask(in.operands[1], elected);
}

void execute_activemask(Warp& warp, const Instruction& in) {
  const uint32_t active = warp.active();
  warp.write<uint32_t>(in.operands[0], [=](int) { return active; });
}

}  // namespace

bool decode_warp(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  const std::string& name = in.parts[0];
  if (name == "shfl") {
    decode_shuffle(decoder, in, out);
  } else if (name == "vote") {
    decode_vote(decoder, in, out);
  } else if (name == "match") {
    decode_match(decoder, in, out);
  } else if (name == "redux") {
    decode_redux(decoder, in, out);
  } else if (name == "bar" && in.parts.size() > 1 && in.parts[1] == "warp") {
    Modifiers mods(decoder, in);
    mods.take("warp");
    if (!mods.take("sync")) decoder.error("expected .sync");
    mods.finish();
    decoder.expect_operands(in, 1);
    out.cls = InstructionClass::kBarrier;
    out.execute = &execute_warp_barrier;
    decoder.set_operands(out, {decoder.source(in.operands[0], Type::kB32)});
  } else if (name == "elect") {
    Modifiers mods(decoder, in);
    if (!mods.take("sync")) decoder.error("expected .sync");
    mods.finish();
    decoder.require_architecture(90);
    decoder.expect_operands(in, 2);
    if (in.operands[0].kind != ptx::Operand::Kind::kPair) decoder.error("expected d|p");
    const ptx::Operand& pair = in.operands[0];
    out.cls = InstructionClass::kVote;
    out.execute = &execute_elect;
    decoder.set_operands(
        out, {decoder.destination(pair.elements[0], Type::kB32), decoder.destination(pair.elements[1], Type::kPred),
              decoder.source(in.operands[1], Type::kB32)});
  } else if (name == "activemask") {
    Modifiers mods(decoder, in);
    if (mods.take_type() != Type::kB32) decoder.error("expected .b32");
    mods.finish();
    decoder.expect_operands(in, 1);
    out.cls = InstructionClass::kVote;
    out.execute = &execute_activemask;
    decoder.set_operands(out, {decoder.destination(in.operands[0], Type::kB32)});
  } else {
    return false;
  }
  return true;
}

}  // namespace emulator
