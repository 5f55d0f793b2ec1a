// SPDX-License-Identifier: Apache-2.0
// What orders the blocks of a launch: a value that one thread releases and another acquires.
//
// Time       Of each block: its SharedShadow's, which knows what each lane did and knows, over barriers, warps and lanes.
// Known      What a release hands on: of each block the clock up to which its accesses happened before.
// Events     A block keeps what its threads acquired as things that happened in it, at a time and to a lane. So whoever
//            of the block is ordered after that (a barrier) knows it too, and nobody else. Fences are kept likewise: a
//            relaxed write releases what the fences before it saw, and a relaxed read is acquired by the fences after it.
// Reach      Of the GPU, or of the whole system, each with knowledge of its own: a release of the system is one of the
//            GPU too. Memory of peers (another GPU may be the other side) is ordered by the system's alone.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "global_shadow.h"
#include "shadow.h"

namespace emulator {

enum class Reach : int8_t { kBlock = -1, kGpu = 0, kSystem = 1 };
constexpr int kNumReaches = 2;

using Known = std::vector<std::pair<uint32_t, std::shared_ptr<const VectorClock>>>;  // by block, ascending
using KnownPtr = std::shared_ptr<Known>;                                             // null: nothing

// Of one block.
struct BlockKnowledge {
  struct Event {
    int warp;
    uint32_t lanes, id;
    KnownPtr known;
  };
  enum Kind { kAcquired, kRead, kFenced, kNumKinds };  // kRead: by relaxed reads, for a fence to acquire
  struct OfReach {
    std::vector<Event> events[kNumKinds];
    KnownPtr all[kNumKinds];  // what every thread of the block knows of them
  };
  OfReach reach[kNumReaches];
};

// One thread's side of a synchronisation, or several lanes' of a warp.
struct Threads {
  SharedShadow& shadow;
  BlockKnowledge& knowledge;
  uint32_t block;
  int warp;
  uint32_t lanes;
};

class BlockOrder {
 public:
  explicit BlockOrder(int num_warps) : num_warps_(num_warps) {}

  // A write that is no plain one. `releases`: it is a release; else it hands on what fences saw, and what the thread
  // released at this address before. `chain`: an atomic that reads too, so what stood behind the value before stands
  // behind the new one.
  void write(const Threads& me, const void* address, Reach reach, bool releases, bool chain);
  void read(const Threads& me, const void* address, Reach reach, bool acquires);
  void fence(const Threads& me, Reach reach);
  // Whether `earlier`, of any block, happened before what these threads do now. Of other blocks over `reach`.
  bool before(const GlobalAccess& earlier, const Threads& me, Reach reach) const;
  // The time of some block began anew: from now on everything counts as ordered.
  void lose() { lost_.store(true, std::memory_order_relaxed); }

 private:
  using Event = BlockKnowledge::Event;
  using Kind = BlockKnowledge::Kind;
  struct Value {
    KnownPtr known;         // what who reads it may know
    KnownPtr own;           // of it, or of a value before: what the thread that released here last handed on
    uint32_t block, lanes;  // that thread
    int warp;
  };
  static void join(KnownPtr& into, const KnownPtr& from);
  static void join(std::shared_ptr<const VectorClock>& into, const std::shared_ptr<const VectorClock>& from);
  static void add(const Threads& me, BlockKnowledge::OfReach& of, Kind kind, uint32_t lanes, KnownPtr known);
  static void tidy(const Threads& me, BlockKnowledge::OfReach& of, Kind kind);
  static KnownPtr known(const Threads& me, const BlockKnowledge::OfReach& of, Kind kind);
  static KnownPtr released(const Threads& me, const BlockKnowledge::OfReach& of);

  const int num_warps_;
  std::atomic<bool> lost_{false};
  std::mutex mutex_;
  std::unordered_map<const void*, Value> values_[kNumReaches];
};

// What `me` may know when it accesses memory over `reach`.
class Asked final : public Happened {
 public:
  Asked(const BlockOrder& order, const Threads& me, Reach reach) : order_(order), me_(me), reach_(reach) {}
  bool before(const GlobalAccess& earlier) override { return order_.before(earlier, me_, reach_); }

 private:
  const BlockOrder& order_;
  const Threads me_;
  const Reach reach_;
};

}  // namespace emulator
