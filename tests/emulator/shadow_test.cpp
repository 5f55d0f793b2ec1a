// SPDX-License-Identifier: Apache-2.0
// Tests of emulator/src/shadow.h, without any PTX. `shadow_test` runs all, and those of the other *_test.cpp;
// `shadow_test bench` prints costs.
#include "shadow_test.h"

#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "global_shadow.h"
#include "memory.h"
#include "shadow.h"

int num_failed = 0;

namespace {

using namespace emulator;

constexpr uint32_t kAll = ~0u;

// A shadow with short names: one access by a warp, and the faults it found.
struct Shared : SharedShadow {
  explicit Shared(uint32_t num_bytes = 1024, int num_warps = 4, uint32_t max_id = 0xfffffff0u)
      : SharedShadow(num_bytes, num_warps, max_id), num_warps(num_warps) {}
  int num_warps;
  uint32_t pc = 0;
  std::vector<Finding> found;
  bool overlap = false;

  std::string name() const {
    std::string names;
    for (const Finding& f : found) {
      const char* n = f.fault == Fault::kRace              ? "race"
                      : f.fault == Fault::kWarpRace        ? "warp race"
                      : f.fault == Fault::kInFlight        ? "in flight"
                      : f.fault == Fault::kUnwrittenShared ? "unwritten"
                                                           : "?";
      names += (names.empty() ? "" : ", ") + std::string(n);
    }
    return names;
  }
  // Lane i of `lanes` accesses begin + i * stride.
  std::string rows(Access kind, int warp, uint32_t lanes, uint32_t begin, uint32_t stride, uint32_t num_bytes,
                   bool collective = false) {
    uint32_t address[32];
    for (uint32_t i = 0; i < 32; i++) address[i] = begin + i * stride;
    found.clear();
    overlap = access(kind, warp, lanes, address, num_bytes, ++pc, collective, found);
    return name();
  }
  std::string one(Access kind, int warp, int lane, uint32_t address, uint32_t num_bytes = 4) {
    return rows(kind, warp, 1u << lane, address, 0, num_bytes);
  }
  std::string write(int warp, int lane, uint32_t address, uint32_t num_bytes = 4) {
    return one(Access::kWrite, warp, lane, address, num_bytes);
  }
  std::string read(int warp, int lane, uint32_t address, uint32_t num_bytes = 4) {
    return one(Access::kRead, warp, lane, address, num_bytes);
  }
  void barrier() {
    VectorClock clock;
    for (int w = 0; w < num_warps; w++) release(w, clock);
    for (int w = 0; w < num_warps; w++) acquire(w, clock);
  }
};

void test_unwritten() {
  Shared s;
  EXPECT(s.read(0, 3, 8) == "unwritten" && s.found[0].address == 8 && s.found[0].lane == 3);
  EXPECT(s.write(0, 0, 16, 2) == "");
  EXPECT(s.read(0, 0, 16, 2) == "");
  EXPECT(s.read(0, 0, 16, 4) == "unwritten" && s.found[0].address == 18);
  EXPECT(s.one(Access::kAtomic, 0, 0, 32) == "unwritten");
  EXPECT(s.one(Access::kAtomic, 0, 0, 32) == "");
  EXPECT(s.one(Access::kAtomicRead, 0, 0, 40) == "unwritten");
  EXPECT(s.one(Access::kAtomicWrite, 0, 0, 40) == "");
  EXPECT(s.one(Access::kAtomicRead, 0, 0, 40) == "");
  s.set_written(101, 107);
  EXPECT(s.read(0, 0, 101, 1) == "" && s.read(1, 0, 104, 2) == "");
  EXPECT(s.read(0, 0, 106, 2) == "unwritten" && s.found[0].address == 107);
  EXPECT(s.rows(Access::kWrite, 0, kAll, 512, 16, 16) == "");
  EXPECT(s.rows(Access::kRead, 0, kAll, 512, 16, 16) == "");
  s.reset();
  EXPECT(s.rows(Access::kRead, 0, kAll, 512, 16, 16) == "unwritten" && s.found[0].address == 512);
}

void test_race_between_warps() {
  Shared s;
  s.pc = 100;
  EXPECT(s.write(0, 5, 64) == "");
  EXPECT(s.read(1, 7, 64) == "race");
  const Finding f = s.found[0];
  EXPECT(f.address == 64 && f.lane == 7 && f.other_warp == 0 && f.other_lane == 5 && f.other_pc == 101 &&
         f.other_is_write);
  EXPECT(s.read(2, 0, 68) == "unwritten");
  s.barrier();
  EXPECT(s.read(1, 7, 64) == "");
  EXPECT(s.read(2, 8, 64) == "");
  EXPECT(s.write(1, 7, 64) == "race");  // warp 2 reads
  EXPECT(s.found[0].other_warp == 2 && s.found[0].other_lane == 8 && !s.found[0].other_is_write);
  EXPECT(s.found[0].other_pc == s.pc - 1);
  EXPECT(s.write(3, 0, 64) == "race" && s.found[0].other_is_write);
  s.barrier();
  EXPECT(s.write(3, 0, 64) == "");
}

void test_many_readers() {
  Shared s(1024, 32);
  s.rows(Access::kWrite, 0, kAll, 0, 4, 4);
  s.barrier();
  for (int w = 0; w < 32; w++) EXPECT(s.rows(Access::kRead, w, kAll, 0, 4, 4) == "");
  // Warp 0 waits for all readers but warp 17.
  VectorClock clock;
  for (int w = 0; w < 32; w++)
    if (w != 17) s.release(w, clock);
  s.acquire(0, clock);
  EXPECT(s.rows(Access::kWrite, 0, kAll, 0, 4, 4) == "race" && s.found[0].other_warp == 17);
  s.reset();
  s.rows(Access::kWrite, 0, kAll, 0, 4, 4);
  s.barrier();
  for (int w = 0; w < 32; w++) s.rows(Access::kRead, w, kAll, 0, 4, 4);
  s.barrier();
  EXPECT(s.rows(Access::kWrite, 0, kAll, 0, 4, 4) == "");
}

void test_bytes() {
  Shared s;
  for (int i = 0; i < 4; i++) EXPECT(s.write(i, 0, 20 + static_cast<uint32_t>(i), 1) == "");
  EXPECT(s.write(1, 0, 22, 1) == "race" && s.found[0].other_warp == 2 && s.found[0].address == 22);
  s.barrier();
  EXPECT(s.read(0, 0, 20, 2) == "" && s.write(1, 0, 22, 2) == "");
  EXPECT(s.read(0, 0, 20, 4) == "race" && s.found[0].address == 22);
  s.barrier();
  EXPECT(s.write(0, 0, 20, 4) == "");  // whole again
  EXPECT(s.read(1, 0, 20, 1) == "race");
  // A word write, then bytes of it by another warp after a barrier, then the first warp in the rest of it.
  EXPECT(s.write(0, 0, 40) == "");
  s.barrier();
  EXPECT(s.write(1, 0, 41, 1) == "" && s.read(0, 0, 42, 2) == "" && s.read(0, 0, 40, 1) == "");
  EXPECT(s.read(0, 0, 41, 1) == "race");
  // 16 bytes that overlap a split word.
  s.barrier();
  EXPECT(s.write(2, 0, 32, 16) == "" && s.read(3, 1, 47, 1) == "race" && s.read(3, 1, 48, 1) == "unwritten");
}

void test_race_within_a_warp() {
  Shared s;
  EXPECT(s.rows(Access::kWrite, 0, kAll, 0, 4, 4) == "");
  EXPECT(s.rows(Access::kRead, 0, kAll, 0, 4, 4) == "");  // each its own
  EXPECT(s.read(0, 1, 0) == "warp race" && s.found[0].lane == 1 && s.found[0].other_lane == 0);
  s.sync_lanes(0, kAll);
  EXPECT(s.read(0, 1, 4 * 9) == "");
  EXPECT(s.write(0, 9, 4 * 9) == "warp race" && !s.found[0].other_is_write && s.found[0].other_lane == 1);
  s.sync_lanes(0, kAll);
  EXPECT(s.write(0, 9, 4 * 9) == "");
  // A broadcast read, then a write by one of the readers.
  s.barrier();
  EXPECT(s.rows(Access::kRead, 0, kAll, 0, 0, 4) == "");
  EXPECT(s.write(0, 4, 0) == "warp race");
  // Another warp's shuffle orders nothing here.
  EXPECT(s.write(1, 0, 512) == "");
  s.sync_lanes(0, kAll);
  EXPECT(s.read(1, 1, 512) == "warp race");
}

void test_partial_masks() {
  Shared s;
  EXPECT(s.write(0, 0, 0) == "" && s.write(0, 20, 80) == "");
  s.sync_lanes(0, 0x3);  // lanes 0 and 1
  EXPECT(s.read(0, 1, 0) == "");
  EXPECT(s.read(0, 2, 0) == "warp race");
  EXPECT(s.read(0, 1, 80) == "warp race");
  s.sync_lanes(0, 0x6);  // 1 and 2: 2 now knows, through 1, what 0 did
  EXPECT(s.read(0, 2, 0) == "");
  s.sync_lanes(0, kAll);
  EXPECT(s.read(0, 7, 0) == "" && s.read(0, 7, 80) == "");
  // A warp of 16 threads: its 16 lanes are all.
  Shared half;
  half.set_absent(2, 0xffff0000u);
  EXPECT(half.rows(Access::kWrite, 2, 0xffff, 0, 4, 4) == "");
  half.sync_lanes(2, 0xffff);
  EXPECT(half.rows(Access::kRead, 2, 0xffff, 60, -4u, 4) == "");
  VectorClock clock;
  half.release(2, clock, 0xffff);
  half.acquire(1, clock);
  EXPECT(half.rows(Access::kWrite, 1, 0xffff, 0, 4, 4) == "");
}

void test_elected_arrival() {
  // Lane 0 arrives for its warp: it vouches for the others only if they are ordered before it.
  for (bool synced : {true, false}) {
    Shared s;
    EXPECT(s.rows(Access::kWrite, 0, kAll, 0, 4, 4) == "");
    if (synced) s.sync_lanes(0, kAll);
    VectorClock clock;
    s.release(0, clock, 1);
    s.acquire(1, clock);
    EXPECT(s.read(1, 3, 0) == "");
    EXPECT(s.read(1, 3, 4) == (synced ? "" : "race"));
  }
  // Lane 0 waits for its warp.
  for (bool synced : {true, false}) {
    Shared s;
    EXPECT(s.rows(Access::kWrite, 0, kAll, 0, 4, 4) == "");
    VectorClock clock;
    s.release(0, clock);
    s.acquire(1, clock, 1);
    EXPECT(s.read(1, 0, 64) == "");
    if (synced) s.sync_lanes(1, kAll);
    EXPECT(s.read(1, 1, 64) == (synced ? "" : "race"));
  }
}

void test_release_acquire() {
  Shared s;
  VectorClock first, second;
  s.write(0, 0, 0);
  s.release(0, first);
  s.write(0, 0, 4);  // after the release
  s.acquire(1, first);
  EXPECT(s.read(1, 0, 0) == "" && s.read(1, 0, 4) == "race");
  s.release(1, second);
  s.acquire(2, second);
  EXPECT(s.read(2, 0, 0) == "");  // through warp 1
  EXPECT(s.write(3, 0, 0) == "race");
  VectorClock empty;
  s.acquire(3, empty);
  EXPECT(s.write(3, 0, 0) == "race");
}

void test_atomics() {
  Shared s;
  s.rows(Access::kWrite, 0, kAll, 0, 4, 4);
  s.barrier();
  for (int w = 0; w < 4; w++) EXPECT(s.rows(Access::kAtomic, w, kAll, 0, 0, 4) == "");
  EXPECT(s.read(2, 0, 0).find("race") != std::string::npos);
  s.barrier();
  EXPECT(s.read(2, 0, 0) == "");
  EXPECT(s.one(Access::kAtomic, 1, 0, 0) == "race" && !s.found[0].other_is_write);
  s.barrier();
  EXPECT(s.write(1, 0, 8) == "" && s.one(Access::kAtomic, 2, 0, 8) == "race");
  s.barrier();
  EXPECT(s.one(Access::kAtomic, 2, 0, 8) == "" && s.write(1, 0, 8) == "race" && s.found[0].other_is_write);
  s.barrier();
  // Relaxed loads and stores: no race among each other and with atomics, nor of two loads.
  EXPECT(s.one(Access::kAtomicWrite, 0, 0, 12) == "" && s.one(Access::kAtomicRead, 1, 0, 12) == "");
  EXPECT(s.one(Access::kAtomic, 2, 0, 12) == "");
  s.barrier();
  EXPECT(s.one(Access::kAtomicRead, 0, 0, 12) == "" && s.read(1, 0, 12) == "");
  EXPECT(s.write(2, 0, 12) == "race");
  // They carry no order.
  s.barrier();
  s.write(0, 0, 16);
  s.one(Access::kAtomicWrite, 0, 0, 12);
  s.one(Access::kAtomicRead, 1, 0, 12);
  EXPECT(s.read(1, 0, 16) == "race");
}

void test_copies() {
  for (uint32_t size : {4u, 8u, 16u}) {
    Shared s;
    EXPECT(s.rows(Access::kCopyIssue, 0, kAll, 0, 16, size) == "");
    EXPECT(s.in_flight(16, 1) && !s.in_flight(size, size == 16 ? 0 : 1));
    EXPECT(s.read(0, 0, 0) == "in flight");  // not unwritten
    EXPECT(s.found[0].other_pc == 1);
    EXPECT(s.write(1, 0, 32) == "in flight");
    EXPECT(s.one(Access::kCopyIssue, 0, 1, 16) == "in flight");
    EXPECT(s.rows(Access::kCopyLand, 0, kAll, 0, 16, size) == "");
    EXPECT(!s.in_flight(0, 512));
    EXPECT(s.read(0, 3, 48) == "");           // landed for the lane itself,
    EXPECT(s.read(0, 4, 48) == "warp race");  // not for the others
    EXPECT(s.read(1, 4, 96) == "race");
    s.sync_lanes(0, kAll);
    EXPECT(s.read(0, 4, 48) == "" && s.read(1, 4, 48) == "race");
    s.barrier();
    EXPECT(s.read(1, 4, 48) == "" && (size == 16 || s.read(1, 4, 60) == "unwritten"));
  }
  // The issue is a write for those who came before it.
  Shared s;
  s.rows(Access::kWrite, 0, kAll, 0, 16, 16);
  s.barrier();
  s.read(2, 0, 20);
  EXPECT(s.rows(Access::kCopyIssue, 1, kAll, 0, 16, 16) == "race" && s.found[0].other_warp == 2 &&
         s.found[0].address == 20);
  // A barrier between issue and landing orders the issue, not the landing.
  Shared t;
  t.rows(Access::kCopyIssue, 0, kAll, 0, 16, 16);
  t.barrier();
  t.rows(Access::kCopyLand, 0, kAll, 0, 16, 16);
  EXPECT(t.read(1, 0, 0) == "race");
}

void test_collective() {
  Shared s;
  s.rows(Access::kWrite, 0, kAll, 0, 16, 16);
  EXPECT(s.rows(Access::kRead, 0, 0xff, 0, 16, 16, true) == "warp race");
  s.reset();
  s.rows(Access::kWrite, 0, kAll, 0, 16, 16);
  s.sync_lanes(0, kAll);
  EXPECT(s.rows(Access::kRead, 0, 0xff, 0, 16, 16, true) == "");
  EXPECT(s.write(0, 9, 0) == "");  // all lanes have been through the ldmatrix
  EXPECT(s.rows(Access::kRead, 1, 0xff, 16, 16, 16, true) == "race");
  // stmatrix: what it wrote is every lane's.
  s.reset();
  EXPECT(s.rows(Access::kWrite, 0, kAll, 0, 16, 16, true) == "");
  EXPECT(s.read(0, 0, 0) == "warp race");
  s.sync_lanes(0, kAll);
  EXPECT(s.read(0, 0, 0) == "");
}

void test_same_instruction() {
  Shared s;
  s.rows(Access::kWrite, 0, kAll, 0, 4, 4);
  EXPECT(!s.overlap);
  s.barrier();
  EXPECT(s.rows(Access::kWrite, 0, kAll, 0, 0, 4) == "" && s.overlap);
  s.barrier();
  EXPECT(s.rows(Access::kWrite, 0, 3, 0, 2, 4) == "" && s.overlap);
  s.barrier();
  EXPECT(s.rows(Access::kWrite, 0, 3, 0, 2, 2) == "" && !s.overlap);
  // Unordered writes of what is there already.
  s.barrier();
  uint32_t address[32] = {};
  const SameBytes yes{[](const void*, int) { return true; }, nullptr},
      no{[](const void*, int) { return false; }, nullptr};
  std::vector<Finding> found;
  s.access(Access::kWrite, 0, 1, address, 4, 0, false, found);
  s.access(Access::kWrite, 1, 1, address, 4, 0, false, found, &yes);
  EXPECT(found.empty());
  s.access(Access::kWrite, 2, 1, address, 4, 0, false, found, &no);
  EXPECT(found.size() == 1);
}

void test_history_ends() {
  // Ids run out every 51 accesses. Nothing is reported that is none, before and after; most races are still seen.
  Shared s(1024, 4, 51);
  VectorClock kept;
  for (int i = 0; i < 1000; i++) {
    EXPECT(s.rows(Access::kWrite, i % 4, kAll, 0, 4, 4) == "");
    s.release(i % 4, kept);
    s.acquire((i + 1) % 4, kept);
  }
  int caught = 0;
  for (int i = 0; i < 1000; i++) {
    s.barrier();
    s.write(0, 0, 0);
    caught += s.read(1, 0, 0) == "race";
  }
  EXPECT(caught > 900 && caught < 1000);
}

// ---- Against an oracle that keeps every access, and the order of all threads ----------------------------------------

struct Oracle {
  struct Past {
    Access kind;
    int thread;
    uint32_t time, call;
  };
  struct Byte {
    bool written = false, flying = false;
    std::vector<Past> past;
  };
  int num_threads;
  std::vector<std::vector<uint32_t>> clock;  // [thread][thread]
  std::vector<Byte> bytes;
  uint32_t call = 0;

  Oracle(int num_warps, uint32_t num_bytes) : num_threads(num_warps * 32), bytes(num_bytes) {
    clock.assign(num_threads, std::vector<uint32_t>(num_threads, 0));
    for (int t = 0; t < num_threads; t++) clock[t][t] = 1;
  }
  static void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
    into.resize(std::max(into.size(), from.size()), 0);
    for (size_t i = 0; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
  }
  template <typename F>
  static void each(int warp, uint32_t lanes, F&& f) {
    for (int l = 0; l < 32; l++)
      if (lanes >> l & 1) f(warp * 32 + l);
  }
  void sync(int warp, uint32_t lanes) {
    std::vector<uint32_t> joint;
    each(warp, lanes, [&](int t) { join(joint, clock[t]); });
    each(warp, lanes, [&](int t) { clock[t] = joint, clock[t][t]++; });
  }
  void release(int warp, std::vector<uint32_t>& into, uint32_t lanes) {
    each(warp, lanes, [&](int t) { join(into, clock[t]), clock[t][t]++; });
  }
  void acquire(int warp, const std::vector<uint32_t>& from, uint32_t lanes) {
    each(warp, lanes, [&](int t) { join(clock[t], from); });
  }
  static bool conflict(Access a, Access b) {
    auto plain_write = [](Access k) {
      return k == Access::kWrite || k == Access::kCopyIssue || k == Access::kCopyLand;
    };
    auto atomic = [](Access k) { return k == Access::kAtomic || k == Access::kAtomicWrite; };
    if (plain_write(a) || plain_write(b)) return true;
    return (a == Access::kRead && atomic(b)) || (b == Access::kRead && atomic(a));
  }
  struct Verdict {
    std::set<Fault> faults;
    std::set<std::tuple<Fault, uint32_t, int, int>> pairs;  // fault, address, thread, earlier thread
  };
  void touch(Access kind, int thread, uint32_t address, bool keep, Verdict& v) {
    Byte& b = bytes[address];
    const bool reads = kind == Access::kRead || kind == Access::kAtomic || kind == Access::kAtomicRead;
    if (kind != Access::kCopyLand) {
      if (b.flying) {
        v.faults.insert(Fault::kInFlight);
        return;
      }
      if (reads && !b.written) v.faults.insert(Fault::kUnwrittenShared);
      for (const Past& p : b.past) {
        if (p.call == call || p.thread == thread || clock[thread][p.thread] >= p.time || !conflict(p.kind, kind))
          continue;
        const Fault fault = p.thread / 32 == thread / 32 ? Fault::kWarpRace : Fault::kRace;
        v.faults.insert(fault);
        v.pairs.insert({fault, address, thread, p.thread});
      }
    }
    if (!keep) return;
    if (kind == Access::kCopyIssue) b.flying = true;
    if (kind == Access::kCopyLand) b.flying = false;
    if (kind != Access::kRead && kind != Access::kAtomicRead && kind != Access::kCopyIssue) b.written = true;
    b.past.push_back({kind, thread, clock[thread][thread], call});
  }
};

struct Fuzz {
  int num_warps;
  uint32_t num_bytes, lanes_used;  // lanes beyond are absent (or never used)
  bool absent, sub_words;
  double sync;  // share of steps that order something
};

void fuzz(const Fuzz& config, uint32_t seed, int num_runs) {
  std::mt19937 random(seed);
  auto below = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
  Shared s(config.num_bytes, config.num_warps);
  long steps = 0, racy = 0, faulty = 0;
  for (int run = 0; run < num_runs && num_failed < 5; run++) {
    s.reset();
    Oracle oracle(config.num_warps, config.num_bytes);
    if (config.absent)
      for (int w = 0; w < config.num_warps; w++) s.set_absent(w, ~config.lanes_used);
    const uint32_t full = config.absent ? config.lanes_used : kAll;
    VectorClock clocks[3];
    std::vector<uint32_t> oracle_clocks[3];
    struct Copy {
      int warp;
      uint32_t lanes, address[32], num_bytes;
    };
    std::vector<Copy> copies;
    auto some_lanes = [&]() -> uint32_t {
      switch (below(4)) {
        case 0: return full;
        case 1: return 1u << (random() % std::bit_width(config.lanes_used));
        default: return (random() & config.lanes_used) | 1u << (random() % std::bit_width(config.lanes_used));
      }
    };
    bool ended = false;
    if (run & 1) {
      s.set_written(0, config.num_bytes);
      for (Oracle::Byte& b : oracle.bytes) b.written = true;
    }
    for (int step = 0; step < 200 && !ended; step++, steps++) {
      const int warp = static_cast<int>(below(static_cast<uint32_t>(config.num_warps)));
      if (random() % 1000 < config.sync * 1000) {
        const uint32_t lanes = some_lanes();
        const uint32_t c = below(3);
        switch (below(5)) {
          case 0: s.sync_lanes(warp, lanes), oracle.sync(warp, lanes); break;
          case 1: s.release(warp, clocks[c], lanes), oracle.release(warp, oracle_clocks[c], lanes); break;
          case 2: s.acquire(warp, clocks[c], lanes), oracle.acquire(warp, oracle_clocks[c], lanes); break;
          case 3: {
            VectorClock clock;
            std::vector<uint32_t> joint;
            const bool all_warps = below(2);
            for (int w = 0; w < config.num_warps; w++)
              if (all_warps || w == warp || below(2)) s.release(w, clock), oracle.release(w, joint, full);
            for (int w = 0; w < config.num_warps; w++)
              if (all_warps || w == warp || below(2)) s.acquire(w, clock), oracle.acquire(w, joint, full);
            break;
          }
          default: s.sync_lanes(warp, full), oracle.sync(warp, full);
        }
        continue;
      }
      Access kind = Access::kRead;
      switch (below(12)) {
        case 0:
        case 1:
        case 2:
        case 3:
        case 4: break;
        case 5:
        case 6:
        case 7: kind = Access::kWrite; break;
        case 8: kind = Access::kAtomic; break;
        case 9: kind = below(2) ? Access::kAtomicRead : Access::kAtomicWrite; break;
        case 10: kind = Access::kCopyIssue; break;
        default: kind = Access::kCopyLand;
      }
      uint32_t lanes = some_lanes() & config.lanes_used;
      uint32_t address[32] = {};
      const bool copy = kind == Access::kCopyIssue;
      uint32_t num_bytes = 1u << below(5);
      if (!config.sub_words || copy) num_bytes = 4u << below(3);
      const bool collective = (kind == Access::kRead || kind == Access::kWrite) && below(4) == 0;
      if (collective) num_bytes = 16;
      const uint32_t slots = config.num_bytes / num_bytes, base = below(slots), pattern = below(3);
      for (uint32_t l = 0; l < 32; l++)
        address[l] = num_bytes * (pattern == 0 ? base : pattern == 1 ? (base + l) % slots : below(slots));
      int owner = warp;
      if (kind == Access::kCopyLand) {
        if (copies.empty()) continue;
        const size_t i = below(static_cast<uint32_t>(copies.size()));
        owner = copies[i].warp, lanes = copies[i].lanes, num_bytes = copies[i].num_bytes;
        std::memcpy(address, copies[i].address, sizeof(address));
        copies.erase(copies.begin() + static_cast<long>(i));
      }
      Oracle::Verdict verdict;
      oracle.call++;
      auto judge = [&](bool keep) {
        verdict = {};
        Oracle::each(0, lanes, [&](int l) {
          for (uint32_t b = 0; b < num_bytes; b++)
            Oracle::each(owner, collective ? full : 1u << l,
                         [&](int t) { oracle.touch(kind, t, address[l] + b, keep, verdict); });
        });
      };
      judge(false);  // most accesses that would fault are left out, so that histories grow long
      if (!verdict.faults.empty() && below(16) != 0) continue;
      judge(true);
      if (collective && kind == Access::kRead) oracle.sync(owner, full);
      if (copy) {
        Copy c{warp, lanes, {}, num_bytes};
        std::memcpy(c.address, address, sizeof(address));
        copies.push_back(c);
      }
      s.found.clear();
      s.access(kind, owner, lanes, address, num_bytes, static_cast<uint32_t>(step), collective, s.found);
      std::set<Fault> faults;
      for (const Finding& f : s.found) {
        faults.insert(f.fault);
        if (f.fault == Fault::kRace || f.fault == Fault::kWarpRace) {
          bool real = false;  // the pair is one of the oracle's, at some byte of the word
          for (uint32_t b = 0; b < 4; b++)
            real |=
                verdict.pairs.count({f.fault, f.address + b, owner * 32 + f.lane, f.other_warp * 32 + f.other_lane});
          EXPECT(real);
        }
      }
      // A copy touched is told alone for its word, so other faults of such a call may be missing. And who races with a
      // write may not be told that he races with a reader too, whom that write was ordered after.
      auto races = [](const std::set<Fault>& f) { return f.count(Fault::kRace) + f.count(Fault::kWarpRace) != 0; };
      const bool same =
          verdict.faults.count(Fault::kInFlight)
              ? faults.count(Fault::kInFlight) != 0
              : races(faults) == races(verdict.faults) && !faults.count(Fault::kInFlight) &&
                    faults.count(Fault::kUnwrittenShared) == verdict.faults.count(Fault::kUnwrittenShared);
      if (!same) {
        std::printf("run %d step %d kind %d: shadow %zu faults, oracle %zu\n", run, step, static_cast<int>(kind),
                    faults.size(), verdict.faults.size());
        EXPECT(false && "differs from the oracle");
      }
      verdict.faults.erase(Fault::kUnwrittenShared);
      ended = !verdict.faults.empty();
      racy += ended;
      faulty += !faults.empty();
    }
  }
  std::printf("fuzz: %ld steps, %ld racy, %ld with a fault\n", steps, racy, faulty);
}

// ---- Costs ----------------------------------------------------------------------------------------------------------

double cpu_seconds() {  // of this thread: other work on the machine does not count
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

void bench(const char* what, const std::function<void(int)>& f) {
  double best = 1e9;
  for (int repeat = 0; repeat < 5; repeat++) {
    const double begin = cpu_seconds();
    constexpr int kCalls = 200000;
    for (int i = 0; i < kCalls; i++) f(i);
    best = std::min(best, (cpu_seconds() - begin) * 1e9 / kCalls);
  }
  std::printf("%-58s %7.1f ns\n", what, best);
}

void run_bench() {
  Shared s(64 * 1024, 4);
  uint32_t row16[4][32], row4[4][32], row2[4][32], matrix[4][32], one[32] = {}, random4[32];
  for (uint32_t w = 0; w < 4; w++)
    for (uint32_t i = 0; i < 32; i++) {
      row16[w][i] = w * 512 + i * 16, row4[w][i] = w * 128 + i * 4, row2[w][i] = 8192 + w * 64 + i * 2;
      matrix[w][i] = 16384 + i * 128 + w * 16;
      random4[i] = 32768 + (i * 7 % 32) * 132;
    }
  std::vector<Finding> found;
  auto go = [&](Access kind, int warp, const uint32_t* a, uint32_t n, bool collective = false) {
    s.access(kind, warp, kAll, a, n, 1, collective, found);
    if (!found.empty()) std::printf("fault %s\n", s.name().c_str()), std::exit(1);
  };
  s.set_written(0, 64 * 1024);
  bench("st.shared.v4, a barrier every 4 (4 warps)", [&](int i) {
    if (i % 4 == 0) s.barrier();
    go(Access::kWrite, i & 3, row16[i & 3], 16);
  });
  s.barrier();
  bench("ld.shared.v4 of what other warps wrote", [&](int i) { go(Access::kRead, i & 3, row16[i >> 2 & 3], 16); });
  bench("ldmatrix.x4 of what other warps wrote",
        [&](int i) { go(Access::kRead, i & 3, matrix[i >> 2 & 3], 16, true); });
  s.barrier();
  bench("cp.async 16: issue and land, a barrier every 4", [&](int i) {
    if (i % 4 == 0) s.barrier();
    go(Access::kCopyIssue, i & 3, row16[i & 3], 16);
    go(Access::kCopyLand, i & 3, row16[i & 3], 16);
  });
  s.barrier();
  bench("ld.shared.b32, in a row", [&](int i) { go(Access::kRead, i & 3, row4[i >> 2 & 3], 4); });
  bench("ld.shared.b32, scattered", [&](int i) { go(Access::kRead, i & 3, random4, 4); });
  bench("ld.shared.b32, broadcast", [&](int i) { go(Access::kRead, i & 3, one, 4); });
  s.barrier();
  bench("own += x: ld and st.shared.b32, in a row", [&](int i) {
    go(Access::kRead, i & 3, row4[i & 3], 4);
    go(Access::kWrite, i & 3, row4[i & 3], 4);
  });
  s.barrier();
  bench("st.shared.b16, in a row", [&](int i) { go(Access::kWrite, i & 3, row2[i & 3], 2); });
  s.barrier();
  bench("ld.shared.b16, in a row", [&](int i) { go(Access::kRead, i & 3, row2[i >> 2 & 3], 2); });
  s.barrier();
  bench("red.shared, one address", [&](int i) { go(Access::kAtomic, i & 3, one, 4); });
  bench("__syncwarp", [&](int i) { s.sync_lanes(i & 3, kAll); });
  bench("__syncthreads of 4 warps", [&](int) { s.barrier(); });

  DeviceMemory m;
  for (uint64_t i = 0; i < 100; i++) m.add(at(0x100000 + i * 0x1000), 0x800, "x");
  bool all = true;
  bench("contains, 32 lanes, one range", [&](int i) {
    for (uint64_t l = 0; l < 32; l++) all &= m.contains(0x105000 + (i & 7) * 128 + l * 4, 4);
  });
  bench("contains, ranges in turn",
        [&](int i) { all &= m.contains(0x100000 + static_cast<uint64_t>(i % 100) * 0x1000, 4); });
  const auto unordered = GlobalShadow::unordered(false), ordered = GlobalShadow::ordered(false);
  struct Never final : Happened {
    bool before(const GlobalAccess&) override { return false; }
  } never;
  GlobalConflict conflict;
  for (const Access kind : {Access::kRead, Access::kWrite}) {
    const std::string what = kind == Access::kRead ? "global reads" : "global writes";
    const uint64_t base = kind == Access::kRead ? 0x800000 : 0x1000000;
    bench((what + ", v4 of a warp").c_str(), [&](int i) {
      all &= !unordered->access({kind, i & 1023}, base + static_cast<uint64_t>(i & 1023) * 512, 512, nullptr, conflict);
    });
    bench((what + ", ordered, v4 of a warp").c_str(), [&](int i) {
      for (uint32_t l = 0; l < 32; l++)
        all &= !ordered->access({kind, i & 1023, 0, 1u << l, 5, 0},
                                base + static_cast<uint64_t>(i & 1023) * 512 + l * 16, 16, &never, conflict);
    });
  }
  bench("global reads of many blocks, v4 of a warp", [&](int i) {
    all &= !unordered->access({Access::kRead, i >> 10}, 0x800000 + static_cast<uint64_t>(i & 1023) * 512, 512, nullptr,
                              conflict);
  });
  if (!all) std::printf("unexpected\n");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "bench") {
    run_bench();
    return 0;
  }
  test_unwritten();
  test_race_between_warps();
  test_many_readers();
  test_bytes();
  test_race_within_a_warp();
  test_partial_masks();
  test_elected_arrival();
  test_release_acquire();
  test_atomics();
  test_copies();
  test_collective();
  test_same_instruction();
  test_history_ends();
  const int runs = argc > 1 ? std::atoi(argv[1]) : 2000;
  uint32_t seed = 1;
  for (double sync : {0.2, 0.5, 0.8, 0.93})
    for (bool absent : {false, true})
      for (bool sub_words : {false, true}) {
        fuzz({3, 32, 0xf, absent, sub_words, sync}, seed++, runs);
        fuzz({2, 64, kAll, false, sub_words, sync}, seed++, runs / 4);
      }
  test_device_memory();
  test_global_shadow();
  std::printf(num_failed == 0 ? "all good\n" : "%d failed\n", num_failed);
  return num_failed != 0;
}
