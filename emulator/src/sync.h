// SPDX-License-Identifier: Apache-2.0
// What warps of a block hand on to each other without a barrier: by atomics and fences, mbarriers, copies in flight.
#pragma once

#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

#include "access.h"
#include "block_order.h"
#include "machine.h"

namespace emulator {

// Memory orderings of loads, stores and atomics; volatile is relaxed.
enum class Order : uint8_t { kWeak, kRelaxed, kAcquire, kRelease, kAcquireRelease };

struct MBarrier {
  uint32_t expected = 0;  // arrivals of a phase
  uint32_t pending = 0;
  int64_t tx = 0;  // bytes expected less bytes that came
  uint64_t phase = 0;
  VectorClock clock;      // of all arrivals
  VectorClock completed;  // of those that the last completed phase waited for
};

// cp.async of one warp, not yet landed.
struct Copy {
  const Instruction* in;
  uint64_t sequence;  // of the warp
  uint32_t lanes;     // that have not landed
  uint32_t num_bytes;
  uint32_t to[kWarpLanes];
  uint64_t from[kWarpLanes];
  uint32_t group[kWarpLanes];  // the lane's group it belongs to
  uint8_t source_bytes[kWarpLanes];
};

// cp.async.mbarrier.arrive: arrives when the copies of these lanes up to `sequence` have landed.
struct AsyncArrival {
  const Instruction* in;
  int warp;
  uint32_t lanes;
  uint64_t sequence;
  uint32_t mbarrier;
  VectorClock clock;
};

struct BlockSync : Extension {
  std::map<uint32_t, MBarrier> mbarriers;  // by shared offset
  std::vector<AsyncArrival> arrivals;
  std::unordered_map<const std::byte*, VectorClock> released;  // what stands behind a value in memory
  BlockKnowledge knowledge;                                    // of other blocks
};

struct WarpSync : Extension {
  VectorClock fenced;   // what the warp's last fence releases by a later relaxed write
  VectorClock pending;  // what its relaxed reads acquire at the next fence
  std::vector<Copy> copies;
  uint64_t sequence = 0;
  uint32_t groups[kWarpLanes] = {};  // committed
};

inline BlockSync& sync_of(Block& block) {
  if (!block.async) block.async = std::make_unique<BlockSync>();
  return static_cast<BlockSync&>(*block.async);
}
inline WarpSync& sync_of(Warp& warp) {
  if (!warp.async) warp.async = std::make_unique<WarpSync>();
  return static_cast<WarpSync&>(*warp.async);
}

// Ordering by memory: an access of `lanes` at host[lane], before (release) and after (acquire) it is performed. A
// release by a plain relaxed write is what the last fence saw, an acquire by a relaxed read waits for the next fence.
// `global`: those of `lanes` that point to global memory, where other blocks may meet them. `chain`: what stood behind
// the value before stands behind the new one too, as it does for atomics.
void order_before(Warp& warp, uint32_t lanes, uint32_t global, std::byte* const* host, Order order, Reach reach,
                  bool chain);
void order_after(Warp& warp, uint32_t lanes, uint32_t global, std::byte* const* host, Order order, Reach reach);
void fence(Warp& warp, Reach reach);

// Copies of these lanes land: those in all but the last `keep` groups that a lane has committed, and with keep < 0 all.
void land_groups(Warp& warp, uint32_t lanes, int64_t keep);
// Those that were issued up to `sequence`.
void land_until(Warp& warp, uint32_t lanes, uint64_t sequence);
// Arrivals (cp.async.mbarrier.arrive) whose copies have landed arrive. `mbarrier`: copies that it waits for land
// before; -1: none does.
void settle_arrivals(Block& block, int64_t mbarrier);

// The mbarrier at which each active lane points. False: there is none, which is reported and ends the launch.
bool find_mbarriers(Warp& warp, const Instruction& in, const Address& address, Access access, Targets& to,
                    MBarrier** barriers);
void store_mbarrier(Block& block, uint32_t offset, const MBarrier& barrier);  // after every change
void report_not_shared(Warp& warp, const Instruction& in, const Targets& to);
void arrive(Warp& warp, const Instruction& in, uint32_t offset, MBarrier& barrier, int lane, uint32_t count);

}  // namespace emulator
