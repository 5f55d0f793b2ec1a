// SPDX-License-Identifier: Apache-2.0
// Tests of emulator/src/global_shadow.h and block_order.h: what is a race between blocks. A part of shadow_test.
#include "global_shadow.h"

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "block_order.h"
#include "shadow_test.h"

using namespace emulator;

namespace {

constexpr Access kRead = Access::kRead, kWrite = Access::kWrite;
constexpr Access kStrongRead = Access::kAtomicRead, kStrongWrite = Access::kAtomicWrite;

// A launch whose kernel orders nothing: the block that an access meets, kGood when there is none.
struct Unordered {
  static constexpr int64_t kGood = -2;
  std::unique_ptr<GlobalShadow> shadow = GlobalShadow::unordered(true);
  GlobalConflict conflict{};
  int64_t operator()(Access kind, int64_t block, uint64_t address, uint32_t num_bytes) {
    return shadow->access({kind, block}, address, num_bytes, nullptr, conflict) ? conflict.block : kGood;
  }
};

void test_unordered() {
  constexpr int64_t kGood = Unordered::kGood, kSeveral = GlobalConflict::kSeveral;
  {
    Unordered a;  // writes
    EXPECT(a(kWrite, 3, 0x1000, 16) == kGood && a(kWrite, 3, 0x1000, 16) == kGood);
    EXPECT(a(kWrite, 4, 0x100c, 4) == 3 && a(kWrite, 4, 0x1010, 4) == kGood);
    EXPECT(a(kWrite, 1, 0x1020, 1) == kGood && a(kWrite, 2, 0x1021, 1) == kGood && a(kWrite, 3, 0x1022, 2) == kGood);
    EXPECT(a(kWrite, 1, 0x1021, 1) == 2 && a(kWrite, 2, 0x1022, 2) == 3 && a(kWrite, 1, 0x1020, 1) == kGood);
    EXPECT(a(kWrite, 9, 0x1fff, 1) == kGood && a(kWrite, 8, 0x1ffe, 4) == 9);  // over a page's end, misaligned
    a.shadow->forget(0x1000, 16);
    EXPECT(a(kWrite, 5, 0x1000, 16) == kGood);
  }
  {
    Unordered a;  // reads and writes
    EXPECT(a(kWrite, 0, 0x1000, 4) == kGood && a(kRead, 0, 0x1000, 4) == kGood && a(kRead, 1, 0x1000, 4) == 0);
    EXPECT(a(kRead, 0, 0x2000, 64) == kGood && a(kWrite, 0, 0x2004, 4) == kGood);
    EXPECT(a(kRead, 1, 0x2008, 8) == kGood && a(kRead, 2, 0x2008, 8) == kGood);
    EXPECT(a(kWrite, 3, 0x2008, 4) == kSeveral && a(kWrite, 1, 0x200c, 4) == kSeveral);
    EXPECT(a(kRead, 1, 0x2000, 64) == 0);  // that of 0x2004
    EXPECT(a(kWrite, 7, 0x203c, 4) == kSeveral);
    EXPECT(a(kWrite, 7, 0x2040, 4) == kGood);
  }
  {
    Unordered a;  // halves of one word, each read and written by a block of its own
    EXPECT(a(kRead, 0, 0x1000, 2) == kGood && a(kRead, 1, 0x1002, 2) == kGood);
    EXPECT(a(kWrite, 0, 0x1000, 2) == kGood && a(kWrite, 1, 0x1002, 2) == kGood);
    EXPECT(a(kRead, 0, 0x1000, 2) == kGood && a(kRead, 1, 0x1000, 4) == 0 && a(kRead, 0, 0x1000, 4) == 1);
    EXPECT(a(kRead, 2, 0x1004, 1) == kGood && a(kRead, 3, 0x1004, 1) == kGood);
    EXPECT(a(kWrite, 4, 0x1005, 3) == kGood && a(kWrite, 4, 0x1004, 1) == kSeveral);
  }
  {
    Unordered a;  // the bytes of a word that meet
    EXPECT(a(kWrite, 0, 0x1002, 2) == kGood && a(kWrite, 1, 0x1000, 4) == 0 && a.conflict.bytes == 12);
    EXPECT(a(kWrite, 0, 0x1004, 1) == kGood && a(kRead, 2, 0x1007, 1) == kGood);
    EXPECT(a(kWrite, 3, 0x1004, 3) == 0 && a.conflict.bytes == 1);
    EXPECT(a(kRead, 3, 0x1008, 8) == kGood && a(kWrite, 2, 0x1008, 1) == 3 && a.conflict.bytes == 1);
    EXPECT(a(kRead, 5, 0x1008, 4) == 2 && a.conflict.bytes == 1);
    EXPECT(a(kWrite, 6, 0x100a, 6) == kSeveral && a.conflict.word == 0x1008 && a.conflict.bytes == 12);
  }
  {
    Unordered a;  // atomics
    EXPECT(a(kStrongWrite, 0, 0x1000, 4) == kGood && a(kStrongWrite, 1, 0x1000, 4) == kGood);
    EXPECT(a(kStrongRead, 2, 0x1000, 4) == kGood && a(kRead, 0, 0x1000, 4) == kSeveral);
    EXPECT(a(kStrongRead, 2, 0x1004, 4) == kGood && a(kRead, 3, 0x1004, 4) == kGood && a(kWrite, 3, 0x1004, 4) == 2);
    EXPECT(a(kWrite, 0, 0x1008, 4) == kGood && a(kStrongRead, 1, 0x1008, 4) == 0 && a(kStrongWrite, 1, 0x1008, 4) == 0);
    EXPECT(a(kStrongWrite, 1, 0x100e, 2) == kGood && a(kWrite, 0, 0x100c, 2) == kGood && a(kWrite, 0, 0x100e, 2) == 1);
  }
  Unordered a;
  std::atomic<int> conflicts{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; t++)
    threads.emplace_back([&, t] {
      for (uint64_t i = 0; i < 20000; i++) {
        conflicts += a(kWrite, t, 0x4000000 + i * 16 + static_cast<uint64_t>(t) * 4, 4) != kGood;
        conflicts += a(kRead, t, 0x5000000 + i * 4, 16) != kGood;
      }
      for (uint64_t i = 0; i < 2000; i++)
        conflicts += a(kWrite, t, 0x8000000 + i * 4 + static_cast<uint64_t>(t), 1) != kGood;
    });
  for (std::thread& t : threads) t.join();
  EXPECT(conflicts == 0);
  threads.clear();
  for (int t = 0; t < 4; t++)
    threads.emplace_back([&, t] {
      for (uint64_t i = 0; i < 1000; i++) conflicts += a(kWrite, t, 0xc000000 + i * 4, 4) != kGood;
    });
  for (std::thread& t : threads) t.join();
  EXPECT(conflicts >= 3000);
}

constexpr int kWarps = 2;
constexpr Reach kGpu = Reach::kGpu, kSystem = Reach::kSystem;
constexpr uint32_t kAll = ~0u;

// A launch of some blocks of two warps; `good` accesses are in order.
struct Ordered {
  std::unique_ptr<GlobalShadow> shadow = GlobalShadow::ordered(false);
  GlobalConflict conflict{};
  BlockOrder order{kWarps};
  struct Block {
    SharedShadow shared{64, kWarps};
    BlockKnowledge knowledge;
  };
  Block blocks[20];

  Threads threads(uint32_t block, int warp, uint32_t lanes) {
    return {blocks[block].shared, blocks[block].knowledge, block, warp, lanes};
  }
  bool good(Access kind, uint32_t block, int warp, int lane, uint64_t address, uint32_t num_bytes = 4,
            Reach reach = kGpu) {
    Asked asked(order, threads(block, warp, 1u << lane), reach);
    const uint32_t id = blocks[block].shared.note(warp, 1u << lane);
    return !shadow->access({kind, block, static_cast<uint32_t>(warp), 1u << lane, id, 0}, address, num_bytes, &asked,
                           conflict);
  }
  void store(uint32_t block, int warp, int lane, uint64_t flag, bool releases, Reach reach = kGpu) {
    EXPECT(good(kStrongWrite, block, warp, lane, flag));
    order.write(threads(block, warp, 1u << lane), at(flag), reach, releases, false);
  }
  void add(uint32_t block, int warp, int lane, uint64_t flag, bool releases, bool acquires) {
    EXPECT(good(kStrongWrite, block, warp, lane, flag));
    order.write(threads(block, warp, 1u << lane), at(flag), kGpu, releases, true);
    order.read(threads(block, warp, 1u << lane), at(flag), kGpu, acquires);
  }
  void load(uint32_t block, int warp, int lane, uint64_t flag, bool acquires, Reach reach = kGpu) {
    EXPECT(good(kStrongRead, block, warp, lane, flag));
    order.read(threads(block, warp, 1u << lane), at(flag), reach, acquires);
  }
  void fence(uint32_t block, int warp, uint32_t lanes, Reach reach = kGpu) {
    order.fence(threads(block, warp, lanes), reach);
  }
  void barrier(uint32_t block) {
    VectorClock clock;
    for (int w = 0; w < kWarps; w++) blocks[block].shared.release(w, clock);
    for (int w = 0; w < kWarps; w++) blocks[block].shared.acquire(w, clock);
  }
};

constexpr uint64_t kData = 0x1000, kFlag = 0x9000, kBack = 0x9100;

void test_release_and_acquire() {
  for (int fault = 0; fault < 6; fault++) {  // one thing left out, or wrong
    Ordered l;
    EXPECT(l.good(kWrite, 0, 0, 3, kData));
    if (fault != 1) l.barrier(0);
    l.store(0, 1, 0, kFlag, fault != 2);
    if (fault == 3) l.store(0, 1, 1, kFlag, false);  // what stood behind the value is gone
    l.load(1, 0, 7, fault == 4 ? kBack : kFlag, true);
    if (fault != 5) l.barrier(1);
    EXPECT(l.good(kRead, 1, 1, 9, kData) == (fault == 0));
  }
}

// What a thread released at an address stands behind what it writes there later, too, without a release.
void test_released_and_written_again() {
  for (const bool chain : {false, true})  // another thread in between: by a store, by an atomic
    for (const bool over : {false, true})
      for (int fault = 0; fault < 4; fault++) {
        Ordered l;
        EXPECT(l.good(kWrite, 0, 1, 0, kData) && l.good(kWrite, 2, 0, 0, kData + 8));
        l.store(0, 1, 0, kFlag, fault != 1);
        EXPECT(l.good(kWrite, 0, 1, 0, kData + 4));  // not released
        if (over && !chain) l.store(2, 0, 0, kFlag, false);
        if (over && chain) l.add(2, 0, 0, kFlag, false, false);
        l.store(0, 1, fault == 2 ? 1 : 0, kFlag, false, fault == 3 ? Reach::kBlock : kGpu);
        l.load(1, 0, 0, kFlag, true);
        EXPECT(l.good(kRead, 1, 0, 0, kData) == (fault == 0));
        EXPECT(!l.good(kRead, 1, 0, 0, kData + 4) && !l.good(kRead, 1, 0, 0, kData + 8));
      }
  Ordered l;  // what others released before it does not, unless it is an atomic
  EXPECT(l.good(kWrite, 0, 0, 0, kData));
  l.add(0, 0, 0, kFlag, true, false);
  l.add(2, 0, 0, kFlag, false, false);
  l.load(1, 0, 0, kFlag, true);
  EXPECT(l.good(kRead, 1, 0, 0, kData));
  l.store(2, 0, 0, kFlag, false);
  l.load(3, 0, 0, kFlag, true);
  EXPECT(!l.good(kRead, 3, 0, 0, kData));
}

// The last of all that count sets the counter back. On several threads its access may have been recorded first.
void test_counter_recorded_in_another_order() {
  for (const bool several : {false, true})
    for (const bool counts : {false, true}) {
      Ordered l;
      l.shadow = GlobalShadow::ordered(several);
      if (counts) l.add(1, 0, 0, kFlag, false, false);
      l.add(0, 0, 0, kFlag, false, false);
      EXPECT(l.good(kWrite, 1, 0, 0, kFlag) == (several && counts));
    }
  Ordered l;  // nor when it has been forgotten since; until the counter begins anew
  l.shadow = GlobalShadow::ordered(true);
  for (uint32_t b = 0; b < 20; b++) l.add(b, 0, 0, kFlag, false, false);
  EXPECT(l.good(kWrite, 0, 0, 0, kFlag));
  l.shadow->forget(kFlag, 4);
  l.add(1, 0, 0, kFlag, false, false);
  EXPECT(!l.good(kWrite, 0, 0, 0, kFlag));
}

void test_bytes_of_a_word() {
  Ordered l;
  EXPECT(l.good(kWrite, 0, 0, 0, kData + 1, 1) && l.good(kWrite, 2, 0, 0, kData + 2, 2));
  EXPECT(!l.good(kWrite, 1, 0, 0, kData, 4) && l.conflict.bytes == 14 && l.conflict.word == kData);
  EXPECT(l.good(kRead, 0, 0, 0, kData + 5, 2) && l.good(kRead, 2, 0, 0, kData + 6, 2));
  EXPECT(!l.good(kWrite, 1, 0, 0, kData + 6, 1) && l.conflict.bytes == 4);
}

void test_fences() {
  for (int fault = 0; fault < 5; fault++) {
    Ordered l;
    EXPECT(l.good(kWrite, 0, 0, 3, kData));
    if (fault == 1) l.fence(0, 1, 1);
    if (fault != 2) l.barrier(0);
    if (fault != 1) l.fence(0, 1, 1);
    l.store(0, 1, 0, kFlag, false);
    if (fault == 3) l.fence(1, 0, 1);
    l.load(1, 0, 0, kFlag, false);
    if (fault != 3 && fault != 4) l.fence(1, 0, 1);
    l.barrier(1);
    EXPECT(l.good(kRead, 1, 1, 9, kData) == (fault == 0));
  }
  {
    Ordered l;  // each thread fences, one tells and hears for all
    EXPECT(l.good(kWrite, 0, 0, 3, kData));
    l.fence(0, 0, kAll);
    l.barrier(0);
    l.store(0, 1, 0, kFlag, false);
    l.load(1, 0, 0, kFlag, false);
    l.barrier(1);
    EXPECT(!l.good(kRead, 1, 0, 5, kData));
    l.fence(1, 1, kAll);
    EXPECT(l.good(kRead, 1, 1, 9, kData));
  }
}

void test_lanes() {
  for (const bool synced : {false, true}) {
    Ordered l;
    for (int lane = 0; lane < 32; lane++) EXPECT(l.good(kWrite, 0, 0, lane, kData + 4 * static_cast<uint64_t>(lane)));
    if (synced) l.blocks[0].shared.sync_lanes(0, kAll);
    l.store(0, 0, 0, kFlag, true);
    l.load(1, 0, 0, kFlag, true);
    EXPECT(l.good(kRead, 1, 0, 0, kData));  // what the lane wrote itself
    EXPECT(l.good(kRead, 1, 0, 0, kData + 4) == synced);
    EXPECT(!l.good(kRead, 1, 0, 1, kData));
    l.blocks[1].shared.sync_lanes(0, kAll);
    EXPECT(l.good(kRead, 1, 0, 1, kData + 8) == synced);
  }
}

void test_reads_before_writes() {
  for (const bool closing : {false, true}) {
    Ordered l;  // three read what a fourth rewrites when it has heard of all
    EXPECT(l.good(kWrite, 0, 0, 0, kData));
    l.store(0, 0, 0, kFlag, true);
    for (uint32_t b = 1; b < 4; b++) {
      l.load(b, 0, 0, kFlag, true);
      EXPECT(l.good(kRead, b, 0, 0, kData));
      if (closing || b != 2) l.add(b, 0, 0, kBack, true, false);
    }
    l.load(0, 0, 0, kBack, true);
    EXPECT(l.good(kWrite, 0, 0, 0, kData) == closing);
  }
  Ordered l;  // over a third block, and not what came after it
  EXPECT(l.good(kWrite, 0, 0, 0, kData));
  l.store(0, 0, 0, kFlag, true);
  EXPECT(l.good(kWrite, 0, 0, 0, kData + 4));
  l.load(1, 0, 0, kFlag, true);
  l.store(1, 0, 0, kBack, true);
  l.load(2, 0, 0, kBack, true);
  EXPECT(l.good(kRead, 2, 0, 0, kData) && !l.good(kRead, 2, 0, 0, kData + 4));
  EXPECT(l.good(kStrongWrite, 3, 0, 0, kData + 8) && !l.good(kRead, 2, 0, 0, kData + 8));
  EXPECT(!l.good(kStrongWrite, 2, 0, 0, kData + 4) && l.good(kStrongRead, 3, 0, 0, kData + 8));
}

void test_chains() {
  Ordered l;  // the last of all that count
  for (uint32_t b = 0; b < 4; b++) {
    EXPECT(l.good(kWrite, b, 0, 0, kData + 4 * b));
    l.fence(b, 0, 1);
    l.add(b, 0, 0, kFlag, false, false);
  }
  l.fence(3, 0, 1);
  for (uint32_t b = 0; b < 4; b++) EXPECT(l.good(kRead, 3, 0, 0, kData + 4 * b));
  EXPECT(!l.good(kRead, 2, 0, 0, kData + 12));
  for (int turn = 0; turn < 500; turn++) {  // a long conversation
    const uint32_t from = static_cast<uint32_t>(turn & 1), to = 1 - from;
    const uint64_t data = 0x20000 + 4 * static_cast<uint64_t>(turn % 3);
    EXPECT(l.good(kWrite, from, 1, 0, data));
    l.store(from, 1, 0, kBack, true);
    l.load(to, 1, 0, kBack, true);
    EXPECT(l.good(kRead, to, 1, 0, data));
  }
}

void test_reaches() {
  for (const Reach reach : {kGpu, kSystem})
    for (const bool fences : {false, true}) {
      Ordered l;
      EXPECT(l.good(kWrite, 0, 0, 0, kData));
      if (fences) l.fence(0, 0, 1, reach);
      l.store(0, 0, 0, kFlag, !fences, fences ? kSystem : reach);
      l.load(1, 0, 0, kFlag, !fences, kSystem);
      if (fences) l.fence(1, 0, 1, kSystem);
      EXPECT(l.good(kRead, 1, 0, 0, kData));
      EXPECT(l.good(kRead, 1, 0, 1, kData, 4, kSystem) == false);
      Ordered again;
      EXPECT(again.good(kWrite, 0, 0, 0, kData));
      again.store(0, 0, 0, kFlag, true, reach);
      again.load(1, 0, 0, kFlag, true, kSystem);
      EXPECT(again.good(kRead, 1, 0, 0, kData, 4, kSystem) == (reach == kSystem));
    }
  Ordered l;
  EXPECT(l.good(kWrite, 0, 0, 0, kData));
  l.store(0, 0, 0, kFlag, true, Reach::kBlock);
  l.load(1, 0, 0, kFlag, true);
  EXPECT(!l.good(kRead, 1, 0, 0, kData));
}

}  // namespace

void test_global_shadow() {
  test_unordered();
  test_release_and_acquire();
  test_released_and_written_again();
  test_counter_recorded_in_another_order();
  test_bytes_of_a_word();
  test_fences();
  test_lanes();
  test_reads_before_writes();
  test_chains();
  test_reaches();
}
