// SPDX-License-Identifier: Apache-2.0
// execute_async.cpp: cp.async and its groups. A copy is late on purpose: its source is read and its bytes appear when
// the lane waits for them (or somebody asks the mbarrier that does), and not before; until then the shadow holds them
// in flight.
#include <algorithm>
#include <bit>
#include <cstring>

#include "access.h"
#include "machine.h"
#include "memory_modifiers.h"
#include "sync.h"

namespace emulator {
namespace {

// Lanes of a copy land: the first source bytes, then zeros.
void land(Warp& warp, Copy& copy, uint32_t lanes) {
  std::byte* const shared = warp.block().shared();
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    std::byte* const to = shared + copy.to[lane];
    const std::byte* const from = reinterpret_cast<const std::byte*>(copy.from[lane]);
    if (copy.source_bytes[lane] == 16) {
      std::memcpy(to, from, 16);
    } else {
      std::memset(to, 0, copy.num_bytes);
      if (copy.source_bytes[lane] > 0) std::memcpy(to, from, copy.source_bytes[lane]);
    }
  }
  copy.lanes &= ~lanes;
  Block& block = warp.block();
  if (SharedShadow* shadow = block.shadow()) {
    block.findings.clear();
    shadow->access(Access::kCopyLand, warp.index(), lanes, copy.to, copy.num_bytes, copy.in->pc, false, block.findings);
  }
}

void forget_landed(WarpSync& sync) {
  std::erase_if(sync.copies, [](const Copy& copy) { return copy.lanes == 0; });
}

struct CopyOp {
  Address to, from;
  uint32_t num_bytes;
  enum class Size : uint8_t { kWhole, kSourceBytes, kIgnore } size;  // operands[0]: source bytes, or a predicate
};

void execute_copy(Warp& warp, const Instruction& in) {
  const CopyOp& op = *static_cast<const CopyOp*>(in.data);
  const uint32_t num_bytes = op.num_bytes, lanes = warp.active();
  Targets to;
  if (!resolve(warp, in, op.to, num_bytes, num_bytes, "copies to", to)) return;
  if (to.shared != lanes) {
    warp.fault(Fault::kOutOfBounds, in, std::countr_zero(lanes & ~to.shared), [&] {
      return "copies to " + hex(to.address[std::countr_zero(lanes & ~to.shared)]) + ", which is no shared memory";
    });
    return warp.end_launch();
  }
  uint32_t source_bytes[kWarpLanes], whole = lanes;
  std::fill_n(source_bytes, kWarpLanes, num_bytes);
  if (op.size == CopyOp::Size::kIgnore) {
    const uint32_t ignored = warp.mask(in.operands[0]);
    for (int i = 0; i < kWarpLanes; i++)
      if (ignored >> i & 1) source_bytes[i] = 0;
    whole &= ~ignored;
  } else if (op.size == CopyOp::Size::kSourceBytes) {
    const uint32_t* bytes = warp.lanes<uint32_t>(in.operands[0]);
    uint32_t too_many = 0;
    whole = 0;
    for (int i = 0; i < kWarpLanes; i++) {
      source_bytes[i] = std::min(bytes[i], num_bytes);
      too_many |= static_cast<uint32_t>(bytes[i] > num_bytes) << i;
      whole |= static_cast<uint32_t>(bytes[i] == num_bytes) << i;
    }
    whole &= lanes;
    if ((too_many & lanes) != 0) {
      const int lane = std::countr_zero(too_many & lanes);
      warp.fault(Fault::kOutOfBounds, in, lane,
                 [&] { return "a source of " + bytes_text(bytes[lane]) + " for a copy of " + bytes_text(num_bytes); });
      return warp.end_launch();
    }
  }
  Targets from;
  if (whole && !resolve(warp, in, op.from, num_bytes, num_bytes, "copies from", from, whole)) return;
  for (uint32_t rest = lanes & ~whole; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (source_bytes[lane] == 0) continue;
    if (!resolve(warp, in, op.from, source_bytes[lane], num_bytes, "copies from", from, 1u << lane)) return;
  }
  if ((from.shared | from.local) != 0) {
    warp.fault(Fault::kOutOfBounds, in, std::countr_zero(from.shared | from.local),
               [] { return std::string("copies from memory that is not global"); });
    return warp.end_launch();
  }
  check_global(warp, in, Access::kRead, Reach::kBlock, from.global & whole, from, num_bytes, "copies from");
  for (uint32_t rest = from.global & ~whole; rest; rest &= rest - 1)
    check_global(warp, in, Access::kRead, Reach::kBlock, rest & (0 - rest), from, source_bytes[std::countr_zero(rest)],
                 "copies from");
  check_shared(warp, in, Access::kCopyIssue, lanes, to.offset, num_bytes, "copies to");
  if (Counters* counters = warp.counters()) {
    if (from.global) counters->global_access(in.pc, from.global, from.address, num_bytes, false);
    counters->shared_access(in.pc, lanes, to.offset, num_bytes, true);
  }
  WarpSync& sync = sync_of(warp);
  Copy& copy = sync.copies.emplace_back();
  copy.in = &in;
  copy.sequence = ++sync.sequence;
  copy.lanes = lanes;
  copy.num_bytes = num_bytes;
  std::copy_n(to.offset, kWarpLanes, copy.to);
  std::copy_n(from.address, kWarpLanes, copy.from);
  std::copy_n(sync.groups, kWarpLanes, copy.group);
  for (int i = 0; i < kWarpLanes; i++) copy.source_bytes[i] = static_cast<uint8_t>(source_bytes[i]);
}

void execute_commit(Warp& warp, const Instruction&) {
  WarpSync& sync = sync_of(warp);
  warp.for_each([&](int lane) { sync.groups[lane]++; });
}

// immediate: groups that may still be in flight, -1: no copy at all.
void execute_wait(Warp& warp, const Instruction& in) {
  if (!warp.async) return;
  land_groups(warp, warp.active(), in.immediate);
  settle_arrivals(warp.block(), -1);
}

void execute_copy_arrive(Warp& warp, const Instruction& in) {
  const Address& address = *static_cast<const Address*>(in.data);
  Targets to;
  MBarrier* barriers[kWarpLanes];
  if (!find_mbarriers(warp, in, address, Access::kAtomic, to, barriers)) return;
  Block& block = warp.block();
  WarpSync& sync = sync_of(warp);
  for (uint32_t rest = warp.active(); rest;) {  // lanes with one mbarrier at a time
    const int first = std::countr_zero(rest);
    AsyncArrival arrival{&in, warp.index(), 0, sync.sequence, to.offset[first], {}};
    for (uint32_t others = rest; others; others &= others - 1)
      if (const int lane = std::countr_zero(others); to.offset[lane] == to.offset[first]) arrival.lanes |= 1u << lane;
    rest &= ~arrival.lanes;
    if (in.immediate)
      barriers[first]->pending += static_cast<uint32_t>(std::popcount(arrival.lanes));  // without .noinc
    if (SharedShadow* shadow = block.shadow()) shadow->release(warp.index(), arrival.clock, arrival.lanes, false);
    sync_of(block).arrivals.push_back(std::move(arrival));
    store_mbarrier(block, to.offset[first], *barriers[first]);
  }
  settle_arrivals(block, -1);
}

void decode_copy(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Modifiers& mods) {
  auto op = std::make_shared<CopyOp>();
  const int level = mods.take_one_of({"ca", "cg"});
  if (level < 0) decoder.error("expected .ca or .cg");
  if (mods.take_one_of({"shared", "shared::cta"}) < 0 || !mods.take("global")) decoder.error("expected .shared.global");
  const bool has_policy = take_cache_hints(mods);
  mods.finish();
  decoder.expect_operands(in, 3 + has_policy, 4 + has_policy);
  const int64_t num_bytes = decoder.integer(in.operands[2]);
  if (num_bytes != 16 && (level == 1 || (num_bytes != 4 && num_bytes != 8)))
    decoder.error("expected a copy of " + std::string(level == 1 ? "16" : "4, 8 or 16") + " bytes");
  op->num_bytes = static_cast<uint32_t>(num_bytes);
  op->to = decoder.address(in.operands[0], Space::kShared);
  op->from = decoder.address(in.operands[1], Space::kGlobal);
  op->size = CopyOp::Size::kWhole;
  if (in.operands.size() == 4u + has_policy) {
    const bool ignore = decoder.is_predicate(in.operands[3]);
    op->size = ignore ? CopyOp::Size::kIgnore : CopyOp::Size::kSourceBytes;
    decoder.set_operands(out, {decoder.source(in.operands[3], ignore ? Type::kPred : Type::kU32)});
  } else {
    decoder.set_operands(out, {});
  }
  out.cls = InstructionClass::kAsyncCopy;
  out.execute = &execute_copy;
  out.data = decoder.keep(op);
}

}  // namespace

void land_groups(Warp& warp, uint32_t lanes, int64_t keep) {
  WarpSync& sync = sync_of(warp);
  for (Copy& copy : sync.copies) {
    uint32_t landing = 0;
    for (int i = 0; i < kWarpLanes; i++)
      landing |= static_cast<uint32_t>(keep < 0 || copy.group[i] + keep < sync.groups[i]) << i;
    landing &= lanes & copy.lanes;
    if (landing) land(warp, copy, landing);
  }
  forget_landed(sync);
}

void land_until(Warp& warp, uint32_t lanes, uint64_t sequence) {
  WarpSync& sync = sync_of(warp);
  for (Copy& copy : sync.copies)
    if (copy.sequence <= sequence && (copy.lanes & lanes) != 0) land(warp, copy, copy.lanes & lanes);
  forget_landed(sync);
}

void settle_arrivals(Block& block, int64_t mbarrier) {
  if (!block.async || sync_of(block).arrivals.empty()) return;
  BlockSync& sync = sync_of(block);
  std::vector<AsyncArrival> later;
  for (AsyncArrival& arrival : sync.arrivals) {
    Warp& warp = block.warp(arrival.warp);
    if (arrival.mbarrier == mbarrier) land_until(warp, arrival.lanes, arrival.sequence);
    uint32_t ready = arrival.lanes;
    for (const Copy& copy : sync_of(warp).copies)
      if (copy.sequence <= arrival.sequence) ready &= ~copy.lanes;
    if (ready != 0) {
      MBarrier& barrier = sync.mbarriers[arrival.mbarrier];
      if (SharedShadow* shadow = block.shadow()) {
        shadow->join(barrier.clock, arrival.clock);
        shadow->release(arrival.warp, barrier.clock, ready, false);  // the copies that have landed
      }
      arrive(warp, *arrival.in, arrival.mbarrier, barrier, std::countr_zero(ready),
             static_cast<uint32_t>(std::popcount(ready)));
      arrival.lanes &= ~ready;
    }
    if (arrival.lanes != 0) later.push_back(std::move(arrival));
  }
  sync.arrivals = std::move(later);
}

bool decode_async(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  if (in.parts[0] == "mbarrier") {
    decode_mbarrier(decoder, in, out);
    return true;
  }
  if (in.parts[0] != "cp" || in.parts.size() < 3 || in.parts[1] != "async") return false;
  Modifiers mods(decoder, in);
  mods.take("async");
  if (in.parts[2] == "bulk" || in.parts[2] == "reduce") return false;
  out.cls = InstructionClass::kAsyncControl;
  if (mods.take("commit_group")) {
    mods.finish();
    decoder.expect_operands(in, 0);
    out.execute = &execute_commit;
    decoder.set_operands(out, {});
  } else if (mods.take("wait_all")) {
    mods.finish();
    decoder.expect_operands(in, 0);
    out.immediate = -1;
    out.execute = &execute_wait;
    decoder.set_operands(out, {});
  } else if (mods.take("wait_group")) {
    mods.finish();
    decoder.expect_operands(in, 1);
    out.immediate = decoder.integer(in.operands[0]);
    if (out.immediate < 0) decoder.error("expected a number of groups");
    out.execute = &execute_wait;
    decoder.set_operands(out, {});
  } else if (mods.take("mbarrier")) {
    if (!mods.take("arrive")) decoder.error("expected .arrive");
    out.immediate = !mods.take("noinc");
    const Space space = take_space(mods);
    if (mods.take_type() != Type::kB64) decoder.error("expected .b64");
    mods.finish();
    decoder.expect_operands(in, 1);
    out.execute = &execute_copy_arrive;
    out.data = decoder.keep(std::make_shared<Address>(decoder.address(in.operands[0], space)));
    decoder.set_operands(out, {});
  } else {
    decode_copy(decoder, in, out, mods);
  }
  return true;
}

}  // namespace emulator
