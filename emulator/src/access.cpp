// SPDX-License-Identifier: Apache-2.0
// access.cpp: addresses of lanes, bounds, alignment, and how the findings of the shadow read.
#include "access.h"

#include <algorithm>
#include <bit>
#include <cstdio>

namespace emulator {
namespace {

// One lane: its space, host pointer and offset, or the fault that it makes.
enum class Verdict : uint8_t { kGood, kOutOfBounds, kMisaligned };

struct Resolver {
  Warp& warp;
  const Instruction& in;
  uint32_t num_bytes, align;
  const char* verb;
  Targets& to;

  static bool fits(uint64_t offset, uint32_t bytes, uint64_t size) { return bytes <= size && offset <= size - bytes; }

  Verdict lane(Space space, uint64_t address, int i) const {
    if ((address & (align - 1)) != 0) return Verdict::kMisaligned;
    const uint32_t bit = 1u << i;
    uint64_t offset = address;
    if (space == Space::kGeneric) {
      space = space_of(address);
      if (space != Space::kGlobal) offset = address & ~kWindowMask;
    }
    switch (space) {
      case Space::kShared:
      case Space::kSharedCluster:
        if (!fits(offset, num_bytes, warp.block().shared_bytes())) return Verdict::kOutOfBounds;
        to.offset[i] = static_cast<uint32_t>(offset);
        to.host[i] = warp.block().shared() + offset;
        to.shared |= bit;
        break;
      case Space::kLocal:
        if (!fits(offset, num_bytes, warp.local_bytes())) return Verdict::kOutOfBounds;
        to.host[i] = warp.local(i) + offset;
        to.local |= bit;
        break;
      default:
        if (!device_memory().contains(address, num_bytes)) return Verdict::kOutOfBounds;
        to.host[i] = reinterpret_cast<std::byte*>(address);
        to.global |= bit;
    }
    to.address[i] = offset;
    return Verdict::kGood;
  }

  void report(Verdict verdict, Space space, uint64_t address, int i, int count) const {
    const bool bounds = verdict == Verdict::kOutOfBounds;
    warp.fault(bounds ? Fault::kOutOfBounds : Fault::kMisaligned, in, i, [&] {
      std::string text = std::string(verb) + " " + bytes_text(num_bytes);
      uint64_t offset = address;
      if (space == Space::kGeneric) {
        space = space_of(address);
        if (space != Space::kGlobal) offset = address & ~kWindowMask;
      }
      if (space == Space::kShared || space == Space::kSharedCluster) {
        text += " of shared memory at " + hex(offset);
        if (bounds) text += ", where the block has " + bytes_text(warp.block().shared_bytes());
      } else if (space == Space::kLocal) {
        text += " of local memory at " + hex(offset);
        if (bounds) text += ", where the thread has " + bytes_text(warp.local_bytes());
      } else {
        text += " at " + hex(address);
        if (bounds) text += ", " + device_memory().describe(address, num_bytes);
      }
      if (!bounds) text += ", which is not a multiple of " + std::to_string(align);
      if (count > 1) text += "; so do " + std::to_string(count - 1) + " more lanes of the warp";
      return text;
    });
  }

  // All lanes of `lanes` one by one.
  bool each(Space space, uint32_t lanes, const uint64_t* address) const {
    uint32_t bad[2] = {};
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
      const int i = std::countr_zero(rest);
      const Verdict verdict = lane(space, address[i], i);
      if (verdict != Verdict::kGood) bad[verdict == Verdict::kMisaligned] |= 1u << i;
    }
    if ((bad[0] | bad[1]) == 0) return true;
    for (Verdict verdict : {Verdict::kOutOfBounds, Verdict::kMisaligned}) {
      const uint32_t lanes_bad = bad[verdict == Verdict::kMisaligned];
      if (lanes_bad == 0) continue;
      const int first = std::countr_zero(lanes_bad);
      report(verdict, space, address[first], first, std::popcount(lanes_bad));
    }
    warp.end_launch();
    return false;
  }
};

}  // namespace

bool resolve(Warp& warp, const Instruction& in, const Address& from, uint32_t num_bytes, uint32_t align,
             const char* verb, Targets& to, uint32_t lanes) {
  alignas(64) uint64_t address[kWarpLanes];
  const uint64_t added = static_cast<uint64_t>(from.offset) +
                         (from.space == Space::kParam ? reinterpret_cast<uint64_t>(warp.block().params()) : 0);
  if (from.base_bytes == 8) {
    const uint64_t* base = warp.lanes<uint64_t>(from.base);
    for (int i = 0; i < kWarpLanes; i++) address[i] = base[i] + added;
  } else if (from.space == Space::kShared || from.space == Space::kLocal || from.space == Space::kSharedCluster) {
    const uint32_t* base = warp.lanes<uint32_t>(from.base);  // 32-bit arithmetic, which may wrap
    for (int i = 0; i < kWarpLanes; i++) address[i] = base[i] + static_cast<uint32_t>(added);
  } else {
    const uint32_t* base = warp.lanes<uint32_t>(from.base);
    for (int i = 0; i < kWarpLanes; i++) address[i] = base[i] + added;
  }
  const Resolver resolver{warp, in, num_bytes, align, verb, to};
  if (from.space == Space::kLocal || lanes != kAllLanes) return resolver.each(from.space, lanes, address);

  // A full warp at once: the extremes and the low bits of all addresses.
  uint64_t low = ~uint64_t{0}, high = 0, any = 0, apart = 0;
  for (int i = 0; i < kWarpLanes; i++) {
    any |= address[i];
    apart |= address[i] ^ (address[0] + static_cast<uint64_t>(i) * num_bytes);
  }
  if ((any & (align - 1)) != 0) return resolver.each(from.space, lanes, address);
  if (apart == 0) {
    low = address[0];
    high = address[0] + 31 * uint64_t{num_bytes};
    if (high < low) return resolver.each(from.space, lanes, address);
  } else {
    for (int i = 0; i < kWarpLanes; i++) {
      low = std::min(low, address[i]);
      high = std::max(high, address[i]);
    }
  }
  const Space space = from.space == Space::kGeneric ? space_of(low) : from.space;
  if (from.space == Space::kGeneric && ((low ^ high) & kWindowMask) != 0)
    return resolver.each(from.space, lanes, address);
  if (space == Space::kShared || space == Space::kSharedCluster) {
    if (from.space == Space::kGeneric) {
      low &= ~kWindowMask;
      high &= ~kWindowMask;
    }
    if (!Resolver::fits(high, num_bytes, warp.block().shared_bytes())) return resolver.each(from.space, lanes, address);
    std::byte* const shared = warp.block().shared();
    for (int i = 0; i < kWarpLanes; i++) to.offset[i] = static_cast<uint32_t>(address[i]);
    for (int i = 0; i < kWarpLanes; i++) to.host[i] = shared + to.offset[i];
    to.shared = kAllLanes;
    return true;
  }
  if (space == Space::kLocal) return resolver.each(from.space, lanes, address);
  const uint64_t span = high - low + num_bytes;
  if (span > 0xffffffffu || !device_memory().contains(low, static_cast<uint32_t>(span)))
    return resolver.each(from.space, lanes, address);
  for (int i = 0; i < kWarpLanes; i++) to.address[i] = address[i];
  for (int i = 0; i < kWarpLanes; i++) to.host[i] = reinterpret_cast<std::byte*>(address[i]);
  to.global = kAllLanes;
  to.consecutive = apart == 0;
  return true;
}

bool check_shared(Warp& warp, const Instruction& in, Access kind, uint32_t lanes, const uint32_t* offset,
                  uint32_t num_bytes, const char* verb, const SameBytes* same, bool collective) {
  Block& block = warp.block();
  SharedShadow* shadow = block.shadow();
  if (shadow == nullptr) return false;
  block.findings.clear();
  const bool overlap =
      shadow->access(kind, warp.index(), lanes, offset, num_bytes, in.pc, collective, block.findings, same);
  for (const Finding& finding : block.findings) {
    int lane = finding.lane;
    if (collective)
      for (lane = 0; lane + 1 < kWarpLanes && finding.address - offset[lane] >= num_bytes;) lane++;
    warp.fault(finding.fault, in, lane, [&] {
      std::string text = std::string(verb) + " shared memory at " + hex(finding.address);
      if (finding.fault == Fault::kUnwrittenShared) return text + ", which nobody wrote";
      const std::string who = thread_name(warp, finding.other_warp, finding.other_lane) + " (warp " +
                              std::to_string(finding.other_warp) + ")";
      const std::string where = finding.other_pc == kUnknownPc ? "" : " by " + place(warp, finding.other_pc);
      if (finding.fault == Fault::kInFlight) return text + ", where a copy of " + who + where + " is still in flight";
      text += std::string(finding.other_is_write ? ", written" : ", read") + " by " + who + where;
      return text + (finding.fault == Fault::kWarpRace ? ", and nothing orders these lanes of the warp"
                                                       : ", and nothing orders the two");
    });
  }
  return overlap;
}

std::string hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string bytes_text(uint64_t count) { return std::to_string(count) + (count == 1 ? " byte" : " bytes"); }

std::string place(const Warp& warp, uint32_t pc) {
  const InstructionInfo& info = warp.block().launch().program().info(pc);
  if (info.where.line == 0) return info.text;
  const size_t slash = info.where.file.find_last_of('/');
  return info.text + " at " + info.where.file.substr(slash == std::string::npos ? 0 : slash + 1) + ":" +
         std::to_string(info.where.line);
}

std::string thread_name(const Warp& warp, int in_warp, int lane) {
  const uint32_t* dims = warp.block().launch().launch().block;
  const uint32_t linear = static_cast<uint32_t>(in_warp * kWarpLanes + lane);
  return "thread (" + std::to_string(linear % dims[0]) + ", " + std::to_string(linear / dims[0] % dims[1]) + ", " +
         std::to_string(linear / dims[0] / dims[1]) + ")";
}

}  // namespace emulator
