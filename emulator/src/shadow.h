// SPDX-License-Identifier: Apache-2.0
// The shadow of one block's shared memory: who read and wrote each byte last, and whether the program orders it.
//
// Time       Every call of access() takes the next id of one counter. An event of a warp that hands knowledge on (a
//            lane synchronisation, a release) closes an interval of it; all that is known of a warp is "its accesses up
//            to id x".
// Knowledge  A warp knows an id of every warp (`all`), and the accesses up to it happened before whatever it does next.
//            When only some lanes synchronise, release or acquire, what single lanes know beyond it is kept apart
//            (Lanes), so that an elected thread which arrives at an mbarrier does not vouch for lanes it has not waited
//            for.
// Cells      A cell is a 4-byte word, or a byte of a word in which accesses of less than 4 bytes met. It has its last
//            plain write, and for each warp the last reads, atomics and atomic reads that the warp itself does not
//            order.
// Fast path  Four whole words at a time: nothing in flight, all written, and the last change (for a write: the last
//            access) at or before `floor`, the id up to which the warp knows everything of everybody.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <unordered_map>
#include <vector>

#include "report.h"

namespace emulator {

// What a release hands to an acquire; empty: nothing yet. Its makeup is SharedShadow's: the era, an id for each warp
// and, only where lanes of a warp differ, one for each lane.
using VectorClock = std::vector<uint32_t>;

// Copies (cp.async, bulk) are kCopyIssue when they are issued and kCopyLand when they become visible to the lane.
// Relaxed, volatile, acquire and release loads and stores are kAtomicRead and kAtomicWrite, kAtomic reads and writes:
// these three race with plain accesses only, and order nothing by themselves.
enum class Access : uint8_t { kRead, kWrite, kAtomic, kCopyIssue, kCopyLand, kAtomicRead, kAtomicWrite };

constexpr uint32_t kUnknownPc = 0xffffffffu;

// other_*: the access that came first; of an unwritten byte there is none. A reader's pc is forgotten (kUnknownPc)
// after some 100,000 accesses of the block.
struct Finding {
  Fault fault;
  uint32_t address;
  int lane;
  int other_warp, other_lane;
  uint32_t other_pc;
  bool other_is_write;
};

// Asked before two unordered plain writes are called a race: does the lane write what the bytes hold already?
struct SameBytes {
  bool (*holds)(const void* context, int lane);
  const void* context;
};

class SharedShadow {
 public:
  static constexpr int kMaxWarps = 32;

  // Ids above max_id are not given: all history is forgotten then, and what came before counts as ordered.
  SharedShadow(uint32_t num_bytes, int num_warps, uint32_t max_id = 0xfffffff0u);
  ~SharedShadow();
  SharedShadow(const SharedShadow&) = delete;
  SharedShadow& operator=(const SharedShadow&) = delete;

  // The next block: nothing is written, everything before is ordered, no lane is absent. VectorClocks must be emptied.
  void reset();
  // Lanes that the block never had or that have exited: synchronisations do without them.
  void set_absent(int warp, uint32_t lanes);
  // __syncwarp: orders these lanes' accesses among themselves.
  void sync_lanes(int warp, uint32_t lanes);
  // into = max(into, what these lanes know and did). `with_absent`: and what lanes that have exited did, if these are
  // all others of the warp, as at a barrier, where to exit is to arrive.
  void release(int warp, VectorClock& into, uint32_t lanes = ~0u, bool with_absent = true);
  // What `from` knows happened before the next accesses of these lanes.
  void acquire(int warp, const VectorClock& from, uint32_t lanes = ~0u);
  // into = max(into, from).
  void join(VectorClock& into, const VectorClock& from) const;

  // An access elsewhere (global memory), or a piece of knowledge, of these lanes: its id, in the time of this shadow.
  // All in one interval of a warp have one, as nobody can know one of them and not the others of the same lane.
  uint32_t note(int warp, uint32_t lanes);
  // What these lanes of `other_warp` did up to `id` happened before what `lanes` of `warp` do next. `any_lane`: what
  // one of them did, at least.
  bool knows(int warp, uint32_t lanes, int other_warp, uint32_t other_lanes, uint32_t id, bool any_lane) const;
  // All lanes of all warps know it.
  bool all_know(int other_warp, uint32_t id) const;
  // Those of `lanes` whose accesses up to id a clock of a block of so many warps does not cover.
  static uint32_t uncovered(const VectorClock& clock, int num_warps, uint32_t warp, uint32_t lanes, uint32_t id);
  // Another one than before: all was forgotten, and ids began anew.
  uint32_t era() const { return era_; }
  // One instruction of one warp: the lanes of `lanes` access num_bytes at address[lane], inside the block's shared
  // memory. At most one finding of each fault is appended. `collective`: all lanes of the warp take part in every
  // access, and a read orders the lanes like __syncwarp when it is done (ldmatrix). True: two lanes of this call wrote
  // one byte.
  bool access(Access kind, int warp, uint32_t lanes, const uint32_t* address, uint32_t num_bytes, uint32_t pc,
              bool collective, std::vector<Finding>& found, const SameBytes* same = nullptr);
  // Bytes [begin, end) count as written, by nobody.
  void set_written(uint32_t begin, uint32_t end);
  // Bytes in [address, address + num_bytes) that a copy in flight will write.
  bool in_flight(uint32_t address, uint32_t num_bytes) const;

 private:
  enum Kind { kReads, kAtomics, kAtomicReads, kNumKinds };  // of the accesses that are kept for each warp
  struct Entry {                                            // accesses of one interval, or ordered ones before it
    uint32_t id, lanes;
  };
  struct Write {
    uint32_t id, lanes, pc, warp;
  };
  template <typename T>
  struct Freed {
    void operator()(T* p) const { std::free(p); }
  };
  template <typename T>
  using Array = std::unique_ptr<T[], Freed<T>>;  // zeroed; pages that nobody touches cost nothing
  template <typename T>
  static Array<T> zeros(size_t count);

  struct Cells {
    uint32_t count = 0;
    Array<uint32_t> change;  // id of the last write or atomic, kSplit for a word that is kept by byte
    Array<uint32_t> any;     // id of the last access
    Array<Write> write;
    Array<uint32_t> warps[kNumKinds];            // warps with an entry that the next write has to look at
    Array<Entry> entries[kNumKinds][kMaxWarps];  // made when first needed
  };
  struct Lanes {
    uint32_t own[32][32];     // [lane][other lane of the warp] -> id
    VectorClock foreign[32];  // what a lane has acquired
  };
  struct Warp {
    VectorClock all;  // what all lanes know, of their own warp too
    std::unique_ptr<Lanes> lanes;
    uint32_t absent = 0;
    uint32_t accessed = 0;       // lanes with accesses that not all other lanes know
    uint32_t last = 0;           // id of the last access
    uint32_t interval = 1;       // accesses with ids from here on are in the interval that is open
    uint32_t noted = 0;          // id of the last note()
    uint32_t released = 0;       // `last` at the last release
    uint32_t after_release = 0;  // id of the first access after it, 0: none yet
    uint32_t floor = 0;
    bool floor_valid = false;
  };
  struct Call;
  // What a write of the current call replaced: other lanes of the call that write the same cell are checked against it.
  struct Replaced {
    const Cells* cells;
    uint32_t cell;
    Write write;
    uint32_t warps[kNumKinds];
  };

  uint32_t next_id(Warp& me, uint32_t lanes, uint32_t pc);
  void forget();
  void update_floor(Warp& me);
  Lanes& lanes_of(Warp& me);
  bool covers(const VectorClock& clock, uint32_t warp, uint32_t lane, uint32_t id) const;
  // A pair of lanes that nothing orders, as lane << 8 | other lane; -1 when all are ordered.
  int unordered(uint32_t warp, uint32_t lanes, uint32_t other_warp, uint32_t other_lanes, uint32_t id) const;
  template <Access kKind>
  void access_lanes(Call& call, uint32_t lanes, const uint32_t* address, uint32_t num_bytes);
  template <Access kKind>
  void access_words(Call& call, uint32_t word, uint32_t count, uint32_t lanes);
  template <Access kKind, int kCount>
  bool access_fast(Call& call, Cells& cells, uint32_t cell, const uint32_t* lanes, uint32_t& state, uint32_t bytes);
  template <Access kKind>
  bool access_four(Call& call, uint32_t word, const uint32_t* lanes);
  template <Access kKind>
  void access_part(Call& call, uint32_t word, uint32_t bytes, uint32_t lanes);
  void access_word(Call& call, uint32_t word, uint32_t bytes, uint32_t lanes);
  bool access_cell(Call& call, Cells& cells, uint32_t cell, uint32_t lanes, uint32_t address);
  bool check_write(Call& call, const Write& write, uint32_t lanes, uint32_t address);
  bool check_entries(Call& call, Cells& cells, uint32_t cell, Kind kind, uint32_t warps, uint32_t lanes,
                     uint32_t address);
  bool check_before_write(Call& call, Cells& cells, uint32_t cell, const Replaced& before, uint32_t lanes,
                          uint32_t address);
  Replaced before(const Cells& cells, uint32_t cell) const;
  void keep(Call& call, Cells& cells, uint32_t cell, Kind kind, uint32_t lanes);
  void make(Cells& cells, uint32_t count);
  Entry* entries(Cells& cells, Kind kind, uint32_t warp);
  void split(uint32_t word);
  void merge(uint32_t word);
  uint64_t spill_key(const Cells& cells, Kind kind, uint32_t warp, uint32_t cell) const;
  uint32_t pc_of(uint32_t id) const;

  uint32_t num_bytes_, num_warps_, max_id_;
  uint32_t era_ = 1;
  uint32_t next_ = 1;
  Array<uint8_t> state_;  // of a word: bytes written (low half), bytes in flight (high half)
  Cells words_, bytes_;
  std::vector<Warp> warps_;
  // Entries of lanes of one warp that cannot be told by one id, with partial synchronisation only: each with its id.
  std::unordered_map<uint64_t, std::vector<Entry>> spilled_;
  std::vector<Replaced> replaced_;
  struct Past {
    uint32_t id, pc;
  };
  std::vector<Past> past_;  // a ring
};

}  // namespace emulator
