// SPDX-License-Identifier: Apache-2.0
// execute_mbarrier.cpp: barriers that live in shared memory. What they are is kept beside the block (sync.h); the 8
// bytes in memory hold a copy, so that a barrier which was never made, or was written over, is seen.
#include <bit>
#include <cstring>

#include "access.h"
#include "machine.h"
#include "memory_modifiers.h"
#include "sync.h"

namespace emulator {
namespace {

constexpr uint32_t kMaxCount = (1u << 20) - 1;

// Also the state that an arrival returns.
uint64_t token_of(const MBarrier& barrier) {
  return uint64_t{0xb} << 60 | uint64_t{barrier.expected & kMaxCount} << 40 |
         uint64_t{barrier.pending & kMaxCount} << 20 | (barrier.phase & kMaxCount);
}
uint32_t pending_of(uint64_t token) { return static_cast<uint32_t>(token >> 20) & kMaxCount; }
uint32_t phase_of(uint64_t token) { return static_cast<uint32_t>(token) & kMaxCount; }

void complete_phases(Block& block, MBarrier& barrier) {
  while (barrier.pending == 0 && barrier.tx == 0) {
    barrier.phase++;
    barrier.pending = barrier.expected;
    barrier.completed = barrier.clock;
    block.note_progress();
    if (barrier.expected == 0) break;
  }
}

enum class Do : uint8_t { kArrive, kArriveDrop, kExpect, kComplete };
struct Arrival {
  Address address;
  Do what = Do::kArrive;
  bool expects = false;  // .expect_tx with the arrival
  bool no_complete = false;
  bool relaxed = false;
};

// operands: state (or the sink), count or bytes.
void execute_arrive(Warp& warp, const Instruction& in) {
  const Arrival& op = *static_cast<const Arrival*>(in.data);
  Targets to;
  MBarrier* barriers[kWarpLanes];
  if (!find_mbarriers(warp, in, op.address, Access::kAtomic, to, barriers)) return;
  Block& block = warp.block();
  const uint32_t* amount = warp.lanes<uint32_t>(in.operands[1]);
  SharedShadow* shadow = block.shadow();
  if (shadow && !op.relaxed && (op.what == Do::kArrive || op.what == Do::kArriveDrop)) {
    for (uint32_t rest = warp.active(); rest;) {
      const int first = std::countr_zero(rest);
      uint32_t same = 0;
      for (uint32_t others = rest; others; others &= others - 1)
        if (barriers[std::countr_zero(others)] == barriers[first]) same |= others & (0 - others);
      rest &= ~same;
      shadow->release(warp.index(), barriers[first]->clock, same, false);
    }
  }
  uint64_t state[kWarpLanes] = {};
  warp.for_each([&](int lane) {
    MBarrier& barrier = *barriers[lane];
    state[lane] = token_of(barrier);
    if (op.expects || op.what == Do::kExpect) barrier.tx += amount[lane];
    if (op.what == Do::kComplete) barrier.tx -= amount[lane];
    if (op.what == Do::kArrive || op.what == Do::kArriveDrop) {
      const uint32_t count = op.expects ? 1 : amount[lane];
      if (op.what == Do::kArriveDrop) barrier.expected -= std::min(barrier.expected, count);
      if (op.no_complete && barrier.pending <= count)
        warp.fault(Fault::kBarrier, in, lane, [&] {
          return "an arrival with .noComplete would complete the phase of the mbarrier at " + hex(to.offset[lane]);
        });
      arrive(warp, in, to.offset[lane], barrier, lane, count);
    } else {
      complete_phases(block, barrier);
      store_mbarrier(block, to.offset[lane], barrier);
    }
  });
  if (in.operands[0].bank() != Operand::kSink) warp.write<uint64_t>(in.operands[0], [&](int i) { return state[i]; });
}

struct Wait {
  Address address;
  bool parity = false, relaxed = false;
  const char* name = nullptr;
};

// operands: done, state or parity.
void execute_test(Warp& warp, const Instruction& in) {
  const Wait& op = *static_cast<const Wait*>(in.data);
  Targets to;
  MBarrier* barriers[kWarpLanes];
  if (!find_mbarriers(warp, in, op.address, Access::kAtomicRead, to, barriers)) return;
  Block& block = warp.block();
  warp.for_each([&](int lane) { settle_arrivals(block, to.offset[lane]); });
  uint32_t done = 0;
  warp.for_each([&](int lane) {
    const uint64_t phase = barriers[lane]->phase;
    const bool complete = op.parity ? (phase & 1) != (warp.lanes<uint32_t>(in.operands[1])[lane] & 1)
                                    : (phase & kMaxCount) != phase_of(warp.lanes<uint64_t>(in.operands[1])[lane]);
    done |= static_cast<uint32_t>(complete) << lane;
  });
  warp.set_mask(in.operands[0], done);
  if (SharedShadow* shadow = block.shadow(); shadow && !op.relaxed) {
    for (uint32_t rest = done; rest;) {
      const int first = std::countr_zero(rest);
      uint32_t same = 0;
      for (uint32_t others = rest; others; others &= others - 1)
        if (barriers[std::countr_zero(others)] == barriers[first]) same |= others & (0 - others);
      rest &= ~same;
      shadow->acquire(warp.index(), barriers[first]->completed, same);
    }
  }
  if (done != warp.active()) warp.spin(in, op.name);
}

// operands: count.
void execute_init(Warp& warp, const Instruction& in) {
  const Address& address = *static_cast<const Address*>(in.data);
  Targets to;
  if (!resolve(warp, in, address, 8, 8, "makes an mbarrier of", to)) return;
  if (to.shared != warp.active()) return report_not_shared(warp, in, to);
  check_shared(warp, in, Access::kWrite, to.shared, to.offset, 8, "makes an mbarrier of");
  const uint32_t* count = warp.lanes<uint32_t>(in.operands[0]);
  warp.for_each([&](int lane) {
    if (count[lane] == 0 || count[lane] > kMaxCount)
      warp.fault(Fault::kBarrier, in, lane, [&] {
        return "an mbarrier for " + std::to_string(count[lane]) + " arrivals; 1 to " + std::to_string(kMaxCount) +
               " are possible";
      });
    MBarrier& barrier = sync_of(warp.block()).mbarriers[to.offset[lane]];
    barrier = MBarrier();
    barrier.expected = barrier.pending = count[lane];
    store_mbarrier(warp.block(), to.offset[lane], barrier);
  });
}

void execute_inval(Warp& warp, const Instruction& in) {
  const Address& address = *static_cast<const Address*>(in.data);
  Targets to;
  MBarrier* barriers[kWarpLanes];
  if (!find_mbarriers(warp, in, address, Access::kWrite, to, barriers)) return;
  warp.for_each([&](int lane) {
    sync_of(warp.block()).mbarriers.erase(to.offset[lane]);
    std::memset(warp.block().shared() + to.offset[lane], 0, 8);
  });
}

void execute_pending_count(Warp& warp, const Instruction& in) {
  const uint64_t* state = warp.lanes<uint64_t>(in.operands[1]);
  warp.write<uint32_t>(in.operands[0], [=](int i) { return pending_of(state[i]); });
}

void decode_arrival(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Modifiers& mods, Do what) {
  auto op = std::make_shared<Arrival>();
  op->what = what;
  const bool arrives = what == Do::kArrive || what == Do::kArriveDrop;
  if (arrives) {
    op->expects = mods.take("expect_tx");
    op->no_complete = mods.take("noComplete");
  }
  if (!arrives || op->expects) decoder.require_architecture(90);
  op->relaxed = mods.take("relaxed");
  mods.take("release");
  mods.take_one_of({"cta", "cluster"});
  const Space space = take_space(mods);
  if (space == Space::kSharedCluster) decoder.require_architecture(90);
  if (mods.take_type() != Type::kB64) decoder.error("expected .b64");
  mods.finish();
  const size_t results = arrives ? 1 : 0;
  decoder.expect_operands(in, results + (arrives && !op->expects && !op->no_complete ? 1 : 2), results + 2);
  op->address = decoder.address(in.operands[results], space);
  const bool has_amount = in.operands.size() == results + 2;
  out.execute = &execute_arrive;
  decoder.set_operands(out,
                       {arrives ? decoder.destination(in.operands[0], Type::kB64) : decoder.sink(),
                        has_amount ? decoder.source(in.operands[results + 1], Type::kU32) : decoder.constant(1, 4)});
  out.data = decoder.keep(op);
}

void decode_wait(Decoder& decoder, const ptx::Instruction& in, Instruction& out, Modifiers& mods, bool tries) {
  auto op = std::make_shared<Wait>();
  if (tries) decoder.require_architecture(90);
  op->name = tries ? "mbarrier.try_wait" : "mbarrier.test_wait";
  op->parity = mods.take("parity");
  op->relaxed = mods.take("relaxed");
  mods.take("acquire");
  mods.take_one_of({"cta", "cluster"});
  const Space space = take_space(mods);
  if (mods.take_type() != Type::kB64) decoder.error("expected .b64");
  mods.finish();
  decoder.expect_operands(in, 3, tries ? 4 : 3);
  op->address = decoder.address(in.operands[1], space);
  out.execute = &execute_test;
  decoder.set_operands(out, {decoder.destination(in.operands[0], Type::kPred),
                             decoder.source(in.operands[2], op->parity ? Type::kU32 : Type::kB64)});
  if (in.operands.size() == 4) decoder.source(in.operands[3], Type::kU32);  // how long it may wait: as long as a turn
  out.data = decoder.keep(op);
}

}  // namespace

void store_mbarrier(Block& block, uint32_t offset, const MBarrier& barrier) {
  const uint64_t token = token_of(barrier);
  std::memcpy(block.shared() + offset, &token, 8);
}

void report_not_shared(Warp& warp, const Instruction& in, const Targets& to) {
  const int lane = std::countr_zero(warp.active() & ~to.shared);
  warp.fault(Fault::kOutOfBounds, in, lane,
             [&] { return "an mbarrier at " + hex(to.address[lane]) + ", which is no shared memory"; });
  warp.end_launch();
}

bool find_mbarriers(Warp& warp, const Instruction& in, const Address& address, Access access, Targets& to,
                    MBarrier** barriers) {
  if (!resolve(warp, in, address, 8, 8, "uses an mbarrier of", to)) return false;
  if (to.shared != warp.active()) {
    report_not_shared(warp, in, to);
    return false;
  }
  Block& block = warp.block();
  check_shared(warp, in, access, to.shared, to.offset, 8, "uses the mbarrier in");
  BlockSync& sync = sync_of(block);
  for (uint32_t rest = warp.active(); rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    auto barrier = sync.mbarriers.find(to.offset[lane]);
    uint64_t token = 0;
    std::memcpy(&token, block.shared() + to.offset[lane], 8);
    if (barrier == sync.mbarriers.end() || token != token_of(barrier->second)) {
      warp.fault(Fault::kBarrier, in, lane, [&] {
        return "no mbarrier is at shared memory " + hex(to.offset[lane]) +
               (barrier == sync.mbarriers.end() ? ": nobody has initialised it" : ": it has been written over");
      });
      warp.end_launch();
      return false;
    }
    barriers[lane] = &barrier->second;
  }
  return true;
}

void arrive(Warp& warp, const Instruction& in, uint32_t offset, MBarrier& barrier, int lane, uint32_t count) {
  if (count > barrier.pending) {
    warp.fault(Fault::kBarrier, in, lane, [&] {
      return "an arrival of " + std::to_string(count) + " at the mbarrier at " + hex(offset) + ", which waits for " +
             std::to_string(barrier.pending) + " more";
    });
    count = barrier.pending;
  }
  barrier.pending -= count;
  complete_phases(warp.block(), barrier);
  store_mbarrier(warp.block(), offset, barrier);
}

void decode_mbarrier(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  out.cls = InstructionClass::kAsyncControl;
  switch (mods.take_one_of({"init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx", "test_wait",
                            "try_wait", "pending_count"})) {
    case 0:
    case 1: {
      const bool init = in.parts[1] == "init";
      const Space space = take_space(mods);
      if (mods.take_type() != Type::kB64) decoder.error("expected .b64");
      mods.finish();
      decoder.expect_operands(in, init ? 2 : 1);
      out.execute = init ? &execute_init : &execute_inval;
      out.data = decoder.keep(std::make_shared<Address>(decoder.address(in.operands[0], space)));
      decoder.set_operands(
          out, init ? std::vector<Operand>{decoder.source(in.operands[1], Type::kU32)} : std::vector<Operand>{});
      break;
    }
    case 2: decode_arrival(decoder, in, out, mods, Do::kArrive); break;
    case 3: decode_arrival(decoder, in, out, mods, Do::kArriveDrop); break;
    case 4: decode_arrival(decoder, in, out, mods, Do::kExpect); break;
    case 5: decode_arrival(decoder, in, out, mods, Do::kComplete); break;
    case 6: decode_wait(decoder, in, out, mods, false); break;
    case 7: decode_wait(decoder, in, out, mods, true); break;
    case 8:
      if (mods.take_type() != Type::kB64) decoder.error("expected .b64");
      mods.finish();
      decoder.expect_operands(in, 2);
      out.execute = &execute_pending_count;
      decoder.set_operands(
          out, {decoder.destination(in.operands[0], Type::kU32), decoder.source(in.operands[1], Type::kB64)});
      break;
    default: decoder.error("expected .init, .arrive, .test_wait or another mbarrier operation");
  }
}

}  // namespace emulator
