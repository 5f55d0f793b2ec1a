// SPDX-License-Identifier: Apache-2.0
// sync.cpp: release and acquire by memory accesses and fences, and the check of global memory against them.
#include "sync.h"

#include <algorithm>
#include <bit>

#include "access.h"

namespace emulator {
namespace {

constexpr bool releases(Order order) { return order == Order::kRelease || order == Order::kAcquireRelease; }
constexpr bool acquires(Order order) { return order == Order::kAcquire || order == Order::kAcquireRelease; }

// In a launch whose kernel orders blocks.
Threads threads_of(const Warp& warp, uint32_t lanes) {
  Block& block = warp.block();
  return {*block.shadow(), sync_of(block).knowledge, static_cast<uint32_t>(block.linear()), warp.index(), lanes};
}

}  // namespace

void order_before(Warp& warp, uint32_t lanes, uint32_t global, std::byte* const* host, Order order, Reach reach,
                  bool chain) {
  Block& block = warp.block();
  SharedShadow* shadow = block.shadow();
  if (shadow == nullptr) return;
  if (releases(order)) {
    BlockSync& sync = sync_of(block);
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      shadow->release(warp.index(), sync.released[host[lane]], 1u << lane, false);
    }
  } else if (warp.async && !sync_of(warp).fenced.empty()) {
    BlockSync& sync = sync_of(block);
    for (uint32_t rest = lanes; rest; rest &= rest - 1)
      shadow->join(sync.released[host[std::countr_zero(rest)]], sync_of(warp).fenced);
  }
  if (BlockOrder* between = block.block_order())
    for (uint32_t rest = global; rest; rest &= rest - 1)
      between->write(threads_of(warp, rest & (0 - rest)), host[std::countr_zero(rest)], reach, releases(order), chain);
}

void order_after(Warp& warp, uint32_t lanes, uint32_t global, std::byte* const* host, Order order, Reach reach) {
  Block& block = warp.block();
  SharedShadow* shadow = block.shadow();
  if (shadow == nullptr) return;
  if (BlockOrder* between = block.block_order())
    for (uint32_t rest = global; rest;) {  // lanes with one address at a time
      const int first = std::countr_zero(rest);
      uint32_t same = 0;
      for (uint32_t others = rest; others; others &= others - 1)
        if (host[std::countr_zero(others)] == host[first]) same |= others & (0 - others);
      rest &= ~same;
      between->read(threads_of(warp, same), host[first], reach, acquires(order));
    }
  if (!block.async || sync_of(block).released.empty()) return;
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    auto at = sync_of(block).released.find(host[lane]);
    if (at == sync_of(block).released.end()) continue;
    if (acquires(order)) {
      shadow->acquire(warp.index(), at->second, 1u << lane);
    } else {
      shadow->join(sync_of(warp).pending, at->second);
    }
  }
}

void fence(Warp& warp, Reach reach) {
  Block& block = warp.block();
  SharedShadow* shadow = block.shadow();
  if (shadow == nullptr) return;
  WarpSync& sync = sync_of(warp);
  if (!sync.pending.empty()) {
    shadow->acquire(warp.index(), sync.pending, warp.active());
    sync.pending.clear();
  }
  shadow->release(warp.index(), sync.fenced, warp.active(), false);
  if (BlockOrder* between = block.block_order()) between->fence(threads_of(warp, warp.active()), reach);
}

// ---- global memory --------------------------------------------------------------------------------------------------

namespace {

// The lanes' accesses to [begin, begin + count); the lane of each byte follows from `step`, bytes from lane to lane.
struct GlobalCheck {
  Warp& warp;
  const Instruction& in;
  const char* verb;
  const Targets& to;
  uint32_t num_bytes;
  const SameStored* same;

  void report(const GlobalConflict& conflict, int lane, uint64_t first, uint64_t last) const {
    warp.fault(Fault::kBlockRace, in, lane, [&] {
      std::string text = std::string(verb) + " " + bytes_text(last - first) + " at " + hex(to.address[lane] + first) +
                         ", " + device_memory().describe(to.address[lane] + first, 1) + ", which ";
      if (conflict.lanes != 0)
        text += thread_name(warp, static_cast<int>(conflict.warp), std::countr_zero(conflict.lanes)) + " of ";
      text += conflict.block == GlobalConflict::kSeveral ? "other blocks" : "block " + std::to_string(conflict.block);
      text += conflict.kind == Access::kRead || conflict.kind == Access::kAtomicRead ? " read" : " wrote";
      if (conflict.pc != kUnknownPc) text += " by " + place(warp, conflict.pc);
      return text + " in this launch, and nothing orders the two";
    });
  }

  void range(const GlobalAccess& access, uint64_t begin, uint32_t count, int lane, uint32_t step, Happened* happened) {
    GlobalShadow& shadow = *warp.block().global_shadow();
    const uint64_t start = begin;
    GlobalConflict conflict;
    while (count > 0 && shadow.access(access, begin, count, happened, conflict)) {
      const uint64_t word = conflict.word;
      for (uint32_t rest = conflict.bytes; rest != 0; rest &= rest - 1) {
        const uint64_t byte = word + static_cast<uint64_t>(std::countr_zero(rest));
        const int at = step == 0 ? lane : lane + static_cast<int>((byte - start) / step);
        const uint32_t of_lane = static_cast<uint32_t>(byte - to.address[at]);
        if (access.kind == Access::kWrite && same != nullptr && same->holds(same->context, at, of_lane, of_lane + 1))
          continue;
        const uint64_t first = word < to.address[at] ? 0 : word - to.address[at];
        report(conflict, at, first, std::min<uint64_t>(word + 4 - to.address[at], num_bytes));
        break;
      }
      const uint64_t next = word + 4;
      if (next >= begin + count) return;
      count = static_cast<uint32_t>(begin + count - next);
      begin = next;
    }
  }
};

}  // namespace

void check_global(Warp& warp, const Instruction& in, Access kind, Reach reach, uint32_t lanes, const Targets& to,
                  uint32_t num_bytes, const char* verb, const SameStored* same) {
  Block& block = warp.block();
  if (block.global_shadow() == nullptr || lanes == 0) return;
  GlobalCheck check{warp, in, verb, to, num_bytes, same};
  const Access plain = kind == Access::kRead || kind == Access::kAtomicRead ? Access::kRead : Access::kWrite;
  if (reach == Reach::kBlock) kind = plain;  // no stronger for another block
  BlockOrder* const order = block.block_order();
  const bool peers = (order != nullptr || (kind != plain && reach == Reach::kGpu)) && !peer_memory().empty();
  auto is_peer = [&](int lane) { return peers && peer_memory().contains(to.address[lane], num_bytes); };
  GlobalAccess access{kind, block.linear(), static_cast<uint32_t>(warp.index()), lanes, 0, in.pc};
  if (order == nullptr) {
    if (to.consecutive && lanes == kAllLanes && !peers)
      return check.range(access, to.address[0], kWarpLanes * num_bytes, 0, num_bytes, nullptr);
    for (uint32_t rest = lanes; rest;) {  // lanes of which each begins where the one before ends, or all at one place
      const int first = std::countr_zero(rest);
      rest &= rest - 1;
      int next = first + 1;
      uint32_t step = 0, count = num_bytes;
      if (rest != 0 && !peers) step = static_cast<uint32_t>(to.address[std::countr_zero(rest)] - to.address[first]);
      if (step == num_bytes) {
        for (; (rest >> next & 1) != 0 && to.address[next] == to.address[next - 1] + step; next++) {
          count += num_bytes;
          rest &= rest - 1;
          if (next == kWarpLanes - 1) break;
        }
      } else {
        while (rest != 0 && !peers && to.address[std::countr_zero(rest)] == to.address[first]) rest &= rest - 1;
        step = 0;
      }
      access.kind = reach == Reach::kGpu && is_peer(first) ? plain : kind;
      check.range(access, to.address[first], count, first, step, nullptr);
    }
    return;
  }
  access.id = block.shadow()->note(warp.index(), lanes);
  if (!block.order_is_kept()) return order->lose();
  for (uint32_t rest = lanes; rest;) {  // lanes with one address at a time
    const int first = std::countr_zero(rest);
    access.lanes = rest & (0 - rest);
    rest &= rest - 1;
    while (rest != 0 && to.address[std::countr_zero(rest)] == to.address[first]) {
      access.lanes |= rest & (0 - rest);
      rest &= rest - 1;
    }
    const bool peer = is_peer(first);
    access.kind = reach == Reach::kGpu && peer ? plain : kind;
    Asked asked(*order, threads_of(warp, access.lanes), peer ? Reach::kSystem : Reach::kGpu);
    check.range(access, to.address[first], num_bytes, first, 0, &asked);
  }
}

}  // namespace emulator
