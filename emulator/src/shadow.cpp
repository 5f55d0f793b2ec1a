// SPDX-License-Identifier: Apache-2.0
// shadow.cpp: what every access to shared memory is checked against. See shadow.h for the model.
#include "shadow.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <new>

namespace emulator {

namespace {

constexpr uint32_t kEveryLane = ~0u;
constexpr uint32_t kSplit = ~0u;              // Cells::change and ::any of a word that is kept by byte: after any floor
constexpr uint32_t kPastIds = 1u << 17;       // accesses whose pc is remembered
constexpr uint32_t kAllWritten = 0x0f0f0f0f;  // four words of SharedShadow::state_

constexpr bool is_plain_write(Access kind) {
  return kind == Access::kWrite || kind == Access::kCopyIssue || kind == Access::kCopyLand;
}
constexpr bool is_read(Access kind) {
  return kind == Access::kRead || kind == Access::kAtomic || kind == Access::kAtomicRead;
}
constexpr bool single(uint32_t lanes) { return (lanes & (lanes - 1)) == 0; }

}  // namespace

// One call of access().
struct SharedShadow::Call {
  Access kind;
  uint32_t warp, id, pc;
  Warp* me;
  std::vector<Finding>* found;
  const SameBytes* same;
  uint32_t reported = 0;  // by fault
  bool overlap = false;   // two lanes wrote one byte

  void add(Fault fault, uint32_t address, int lane, uint32_t other_warp, int other_lane, uint32_t other_pc,
           bool other_is_write) {
    const uint32_t bit = 1u << static_cast<int>(fault);
    if (reported & bit) return;
    reported |= bit;
    found->push_back({fault, address, lane, static_cast<int>(other_warp), other_lane, other_pc, other_is_write});
  }
  void add_race(uint32_t address, int pair, uint32_t other_warp, uint32_t other_pc, bool other_is_write) {
    add(other_warp == warp ? Fault::kWarpRace : Fault::kRace, address, pair >> 8, other_warp, pair & 255, other_pc,
        other_is_write);
  }
};

template <typename T>
SharedShadow::Array<T> SharedShadow::zeros(size_t count) {
  T* data = static_cast<T*>(std::calloc(std::max<size_t>(count, 1), sizeof(T)));
  if (data == nullptr) throw std::bad_alloc();
  return Array<T>(data);
}

SharedShadow::SharedShadow(uint32_t num_bytes, int num_warps, uint32_t max_id)
    : num_bytes_(num_bytes),
      num_warps_(static_cast<uint32_t>(num_warps)),
      max_id_(max_id),
      warps_(static_cast<size_t>(num_warps)),
      past_(std::bit_ceil(std::clamp(max_id, 2u, kPastIds))) {
  const uint32_t words = (num_bytes + 3) / 4;
  state_ = zeros<uint8_t>(words + 3);
  make(words_, words);
  forget();
}

SharedShadow::~SharedShadow() = default;

void SharedShadow::make(Cells& cells, uint32_t count) {
  cells.count = count;
  cells.change = zeros<uint32_t>(count);
  cells.any = zeros<uint32_t>(count);
  cells.write = zeros<Write>(count);
  for (auto& warps : cells.warps) warps = zeros<uint32_t>(count);
}

SharedShadow::Entry* SharedShadow::entries(Cells& cells, Kind kind, uint32_t warp) {
  Array<Entry>& array = cells.entries[kind][warp];
  if (!array) array = zeros<Entry>(cells.count);
  return array.get();
}

// ---- Time and knowledge ---------------------------------------------------------------------------------------------

// What came before is ordered from now on: all ids are nothing, and clocks of the era that ends say nothing.
void SharedShadow::forget() {
  era_++;
  next_ = 1;
  for (Cells* cells : {&words_, &bytes_}) {
    std::fill_n(cells->change.get(), cells->count, 0);
    std::fill_n(cells->any.get(), cells->count, 0);
    for (uint32_t i = 0; i < cells->count; i++) cells->write[i].id = 0;
    for (auto& warps : cells->warps) std::fill_n(warps.get(), cells->count, 0);
  }
  for (Past& past : past_) past.id = 0;
  spilled_.clear();
  for (Warp& warp : warps_) {
    const uint32_t absent = warp.absent;
    warp = Warp();
    warp.absent = absent;
    warp.all.assign(1 + num_warps_, 0);
    warp.all[0] = era_;
  }
}

void SharedShadow::reset() {
  std::memset(state_.get(), 0, words_.count);
  spilled_.clear();
  for (Warp& warp : warps_) {
    warp.all.assign(1 + num_warps_, next_ - 1);
    warp.all[0] = era_;
    warp.lanes.reset();
    warp.absent = warp.accessed = 0;
    warp.interval = next_;
    warp.floor_valid = false;
  }
}

void SharedShadow::set_absent(int warp, uint32_t lanes) { warps_[static_cast<size_t>(warp)].absent |= lanes; }

uint32_t SharedShadow::next_id(Warp& me, uint32_t lanes, uint32_t pc) {
  if (next_ > max_id_) forget();
  if (!me.floor_valid) update_floor(me);
  const uint32_t id = next_++;
  me.last = id;
  me.accessed |= lanes;
  if (me.after_release == 0) me.after_release = id;
  past_[id & (past_.size() - 1)] = {id, pc};
  return id;
}

uint32_t SharedShadow::note(int warp, uint32_t lanes) {
  Warp& me = warps_[static_cast<size_t>(warp)];
  me.accessed |= lanes;
  if (me.noted < me.interval) me.noted = next_id(me, lanes, kUnknownPc);
  return me.noted;
}

bool SharedShadow::knows(int warp, uint32_t lanes, int other_warp, uint32_t other_lanes, uint32_t id,
                         bool any_lane) const {
  const uint32_t w = static_cast<uint32_t>(warp), v = static_cast<uint32_t>(other_warp);
  if (id <= warps_[w].all[1 + v]) return true;
  if (!any_lane) return unordered(w, lanes, v, other_lanes, id) < 0;
  for (uint32_t mine = lanes; mine; mine &= mine - 1) {
    bool known = false;
    for (uint32_t others = other_lanes; others && !known; others &= others - 1)
      known = unordered(w, mine & (0 - mine), v, others & (0 - others), id) < 0;
    if (!known) return false;
  }
  return true;
}

bool SharedShadow::all_know(int other_warp, uint32_t id) const {
  return std::all_of(warps_.begin(), warps_.end(),
                     [&](const Warp& warp) { return warp.all[1 + static_cast<size_t>(other_warp)] >= id; });
}

uint32_t SharedShadow::uncovered(const VectorClock& clock, int num_warps, uint32_t warp, uint32_t lanes, uint32_t id) {
  if (clock.empty()) return lanes;
  if (clock[1 + warp] >= id) return 0;
  const size_t first = 1 + static_cast<size_t>(num_warps) + 32 * size_t{warp};
  if (clock.size() <= first) return lanes;
  uint32_t left = lanes;
  for (uint32_t rest = lanes; rest; rest &= rest - 1)
    if (clock[first + static_cast<size_t>(std::countr_zero(rest))] >= id) left &= ~(rest & (0 - rest));
  return left;
}

uint32_t SharedShadow::pc_of(uint32_t id) const {
  const Past& past = past_[id & (past_.size() - 1)];
  return past.id == id ? past.pc : kUnknownPc;
}

// The largest id up to which this warp, all its lanes, knows every access there was.
void SharedShadow::update_floor(Warp& me) {
  uint32_t floor = next_ - 1;
  for (uint32_t v = 0; v < num_warps_; v++) {
    const Warp& other = warps_[v];
    const uint32_t known = me.all[1 + v];
    if (known >= other.last) continue;  // what it does next has an id that does not exist yet
    floor = std::min(floor, known >= other.released ? std::max(known, other.after_release - 1) : known);
  }
  me.floor = floor;
  me.floor_valid = true;
}

SharedShadow::Lanes& SharedShadow::lanes_of(Warp& me) {
  if (!me.lanes) me.lanes = std::make_unique<Lanes>();  // zeroed
  return *me.lanes;
}

void SharedShadow::join(VectorClock& into, const VectorClock& from) const {
  if (from.empty() || from[0] != era_) return;
  if (into.empty() || into[0] != era_) {
    into = from;
    return;
  }
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 1; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
}

bool SharedShadow::covers(const VectorClock& clock, uint32_t warp, uint32_t lane, uint32_t id) const {
  if (clock.empty() || clock[0] != era_) return false;
  return clock[1 + warp] >= id || (clock.size() > 1 + num_warps_ && clock[1 + num_warps_ + 32 * warp + lane] >= id);
}

int SharedShadow::unordered(uint32_t warp, uint32_t lanes, uint32_t other_warp, uint32_t other_lanes,
                            uint32_t id) const {
  const Warp& me = warps_[warp];
  if (id <= me.all[1 + other_warp]) return -1;
  if (warp == other_warp && single(lanes) && lanes == other_lanes) return -1;
  const bool by_lane = me.lanes || me.all.size() > 1 + num_warps_;
  for (uint32_t mine = lanes; mine; mine &= mine - 1) {
    const int lane = std::countr_zero(mine);
    for (uint32_t others = other_lanes; others; others &= others - 1) {
      const int other = std::countr_zero(others);
      if (warp == other_warp && lane == other) continue;
      if (by_lane) {
        if (covers(me.all, other_warp, static_cast<uint32_t>(other), id)) continue;
        if (me.lanes && ((warp == other_warp && me.lanes->own[lane][other] >= id) ||
                         covers(me.lanes->foreign[lane], other_warp, static_cast<uint32_t>(other), id)))
          continue;
      }
      return lane << 8 | other;
    }
  }
  return -1;
}

void SharedShadow::sync_lanes(int warp, uint32_t lanes) {
  Warp& me = warps_[static_cast<size_t>(warp)];
  uint32_t& known = me.all[1 + static_cast<size_t>(warp)];
  if ((lanes | me.absent) == kEveryLane && (me.accessed & ~lanes) == 0) {
    if (known >= me.last && !me.lanes) return;
    known = std::max(known, me.last);
    if (me.lanes) {
      for (uint32_t rest = lanes; rest; rest &= rest - 1) join(me.all, me.lanes->foreign[std::countr_zero(rest)]);
      me.lanes.reset();
    }
    me.accessed = 0;
    me.floor_valid = false;
  } else {
    if (single(lanes)) return;
    if (known >= me.last && !me.lanes) return;
    Lanes& knowledge = lanes_of(me);
    uint32_t own[32] = {};
    VectorClock foreign;
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      for (int i = 0; i < 32; i++) own[i] = std::max(own[i], knowledge.own[lane][i]);
      join(foreign, knowledge.foreign[lane]);
    }
    for (uint32_t rest = lanes; rest; rest &= rest - 1) own[std::countr_zero(rest)] = me.last;
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      std::copy_n(own, 32, knowledge.own[lane]);
      if (!foreign.empty()) knowledge.foreign[lane] = foreign;
    }
  }
  me.interval = next_;
}

void SharedShadow::release(int warp, VectorClock& into, uint32_t lanes, bool with_absent) {
  const size_t w = static_cast<size_t>(warp);
  Warp& me = warps_[w];
  if (into.empty() || into[0] != era_) {
    into.assign(1 + num_warps_, 0);
    into[0] = era_;
  }
  join(into, me.all);
  if (with_absent && (lanes | me.absent) == kEveryLane) lanes = kEveryLane;
  if ((me.accessed & ~lanes) == 0) {
    into[1 + w] = std::max(into[1 + w], me.last);
  } else {
    if (into.size() == 1 + num_warps_) into.resize(1 + 33 * num_warps_, 0);
    uint32_t* by_lane = &into[1 + num_warps_ + 32 * w];
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      by_lane[lane] = std::max(by_lane[lane], me.last);
      if (!me.lanes) continue;
      for (int i = 0; i < 32; i++) by_lane[i] = std::max(by_lane[i], me.lanes->own[lane][i]);
    }
  }
  if (me.lanes)
    for (uint32_t rest = lanes; rest; rest &= rest - 1) join(into, me.lanes->foreign[std::countr_zero(rest)]);
  me.interval = next_;
  me.released = me.last;
  me.after_release = 0;
}

void SharedShadow::acquire(int warp, const VectorClock& from, uint32_t lanes) {
  if (from.empty() || from[0] != era_) return;
  const size_t w = static_cast<size_t>(warp);
  Warp& me = warps_[w];
  if ((lanes | me.absent) != kEveryLane) {
    bool news = from.size() > me.all.size();
    for (size_t i = 1; !news && i < from.size(); i++) news = from[i] > me.all[i];
    if (!news) return;
    Lanes& knowledge = lanes_of(me);
    for (uint32_t rest = lanes; rest; rest &= rest - 1) join(knowledge.foreign[std::countr_zero(rest)], from);
    return;
  }
  join(me.all, from);
  if (me.all.size() > 1 + num_warps_) {
    bool differs = false;
    for (uint32_t i = 0; i < 32 * num_warps_; i++) differs |= me.all[1 + num_warps_ + i] > me.all[1 + i / 32];
    if (!differs) me.all.resize(1 + num_warps_);
  }
  if (me.all[1 + w] >= me.last) me.accessed = 0;
  me.floor_valid = false;
}

// ---- Accesses -------------------------------------------------------------------------------------------------------

bool SharedShadow::access(Access kind, int warp, uint32_t lanes, const uint32_t* address, uint32_t num_bytes,
                          uint32_t pc, bool collective, std::vector<Finding>& found, const SameBytes* same) {
  if (lanes == 0 || num_bytes == 0) return false;
  Warp& me = warps_[static_cast<size_t>(warp)];
  const uint32_t everybody = kEveryLane & ~me.absent;
  Call call{kind, static_cast<uint32_t>(warp), 0, pc, &me, &found, same};
  call.id = next_id(me, collective ? everybody : lanes, pc);
  replaced_.clear();
  if (collective) {
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
      const uint32_t begin = address[std::countr_zero(rest)];
      if (kind == Access::kRead) {
        access_words<Access::kRead>(call, begin / 4, num_bytes / 4, everybody);
      } else {
        access_words<Access::kWrite>(call, begin / 4, num_bytes / 4, everybody);
      }
    }
    if (kind == Access::kRead) sync_lanes(warp, everybody);
    return call.overlap;
  }
  switch (kind) {
    case Access::kRead: access_lanes<Access::kRead>(call, lanes, address, num_bytes); break;
    case Access::kWrite: access_lanes<Access::kWrite>(call, lanes, address, num_bytes); break;
    case Access::kCopyIssue: access_lanes<Access::kCopyIssue>(call, lanes, address, num_bytes); break;
    case Access::kCopyLand: access_lanes<Access::kCopyLand>(call, lanes, address, num_bytes); break;
    default: access_lanes<Access::kAtomic>(call, lanes, address, num_bytes); break;
  }
  return call.overlap;
}

template <Access kKind>
void SharedShadow::access_lanes(Call& call, uint32_t lanes, const uint32_t* address, uint32_t num_bytes) {
  const uint32_t first = address[std::countr_zero(lanes)];
  if (num_bytes == 4 && lanes == kEveryLane) {
    uint32_t apart = 0, unaligned = 0;
    for (int i = 0; i < 32; i++) {
      apart |= address[i] ^ first;
      unaligned |= address[i] & 3;
    }
    if (unaligned == 0) {
      if (kKind == Access::kRead && apart == 0) return access_words<kKind>(call, first / 4, 1, lanes);
      for (int i = 0; i < 32; i += 4) {
        const uint32_t* four = address + i;
        const uint32_t word = four[0] / 4;
        const uint32_t bits[4] = {1u << i, 2u << i, 4u << i, 8u << i};
        const bool row = four[1] == four[0] + 4 && four[2] == four[0] + 8 && four[3] == four[0] + 12;
        if (row && access_four<kKind>(call, word, bits)) continue;
        for (int j = 0; j < 4; j++) access_words<kKind>(call, four[j] / 4, 1, bits[j]);
      }
      return;
    }
  }
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    const uint32_t begin = address[lane], bit = 1u << lane;
    if (((begin | num_bytes) & 3) == 0) {
      access_words<kKind>(call, begin / 4, num_bytes / 4, bit);
      continue;
    }
    const uint32_t end = begin + num_bytes;
    for (uint32_t word = begin / 4; word * 4 < end; word++) {
      uint32_t bytes = 15;
      if (word * 4 < begin) bytes &= 15u << (begin & 3);
      if (word * 4 + 4 > end) bytes &= 15u >> (word * 4 + 4 - end);
      access_part<kKind>(call, word, bytes, bit);
    }
  }
}

template <Access kKind>
void SharedShadow::access_words(Call& call, uint32_t word, uint32_t count, uint32_t lanes) {
  const uint32_t four[4] = {lanes, lanes, lanes, lanes};
  for (; count >= 4; count -= 4, word += 4) {
    if (access_four<kKind>(call, word, four)) continue;
    for (uint32_t i = 0; i < 4; i++) access_word(call, word + i, 15, lanes);
  }
  for (; count > 0; count--, word++) {
    uint32_t state = state_[word];
    if (access_fast<kKind, 1>(call, words_, word, four, state, 15)) {
      state_[word] = static_cast<uint8_t>(state);
    } else {
      access_word(call, word, 15, lanes);
    }
  }
}

template <Access kKind>
bool SharedShadow::access_four(Call& call, uint32_t word, const uint32_t* lanes) {
  uint32_t state;
  std::memcpy(&state, state_.get() + word, 4);
  if (!access_fast<kKind, 4>(call, words_, word, lanes, state, kAllWritten)) return false;
  if (kKind != Access::kRead) std::memcpy(state_.get() + word, &state, 4);
  return true;
}

// Some bytes of a word.
template <Access kKind>
void SharedShadow::access_part(Call& call, uint32_t word, uint32_t bytes, uint32_t lanes) {
  if (words_.change[word] == kSplit && (kKind == Access::kRead || kKind == Access::kWrite)) {
    const uint32_t two[2] = {lanes, lanes}, first = word * 4 + static_cast<uint32_t>(std::countr_zero(bytes));
    uint32_t state = state_[word];
    const bool pair = bytes == 3 || bytes == 12;
    if (pair ? access_fast<kKind, 2>(call, bytes_, first, two, state, bytes)
             : single(bytes) && access_fast<kKind, 1>(call, bytes_, first, two, state, bytes)) {
      state_[word] = static_cast<uint8_t>(state);
      return;
    }
  }
  access_word(call, word, bytes, lanes);
}

// kCount cells that are clean, with what is written and in flight of them in `state` (bits of `bytes`, and of bytes <<
// 4); false, and nothing done, when one is not certainly so. Without branches where that is usual.
template <Access kKind, int kCount>
inline __attribute__((always_inline)) bool SharedShadow::access_fast(Call& call, Cells& cells, uint32_t cell,
                                                                     const uint32_t* lanes, uint32_t& state,
                                                                     uint32_t bytes) {
  if constexpr (kKind == Access::kAtomic) return false;
  const Warp& me = *call.me;
  const uint32_t warp_bit = 1u << call.warp, known = me.all[1 + call.warp], floor = me.floor, id = call.id;
  using Row = uint32_t[kCount];  // of locals, so that the compiler need not think of what a store may change
  Row change, any, readers, ids;
  std::memcpy(change, &cells.change[cell], sizeof(Row));
  std::memcpy(readers, &cells.warps[kReads][cell], sizeof(Row));
  for (int i = 0; i < kCount; i++) ids[i] = id;
  Write* const write = &cells.write[cell];
  // The last change is a plain write that this lane made or this warp knows.
  auto change_is_known = [&](int i) {
    return write[i].id == change[i] && (write[i].id <= me.all[1 + write[i].warp] ||
                                        (write[i].warp == call.warp && write[i].lanes == lanes[i] && single(lanes[i])));
  };
  auto largest = [](const Row& row) {
    uint32_t value = row[0];
    for (int i = 1; i < kCount; i++) value = std::max(value, row[i]);
    return value;
  };
  if constexpr (kKind == Access::kRead) {
    if ((state & (bytes | bytes << 4)) != bytes) return false;
    if (largest(change) > floor) {
      for (int i = 0; i < kCount; i++)
        if (change[i] > floor && !change_is_known(i)) return false;
    }
    Entry* const entry = entries(cells, kReads, call.warp) + cell;
    Entry old[kCount], mine[kCount];
    std::memcpy(old, entry, sizeof(old));
    for (int i = 0; i < kCount; i++) mine[i] = {id, lanes[i]};
    uint32_t last_read = 0;
    for (int i = 0; i < kCount; i++) last_read = std::max(last_read, old[i].id);
    if (last_read > known) {
      for (int i = 0; i < kCount; i++) {
        if (old[i].id <= known || (readers[i] & warp_bit) == 0) continue;
        if (old[i].lanes == lanes[i] && single(lanes[i])) continue;
        if (old[i].id < me.interval || old[i].lanes == 0) return false;
        mine[i].lanes |= old[i].lanes;
      }
    }
    for (int i = 0; i < kCount; i++) readers[i] |= warp_bit;
    std::memcpy(entry, mine, sizeof(mine));
    std::memcpy(&cells.warps[kReads][cell], readers, sizeof(Row));
    std::memcpy(&cells.any[cell], ids, sizeof(Row));
  } else {
    if constexpr (kKind == Access::kCopyLand) {
      for (int i = 0; i < kCount; i++)
        if (change[i] == kSplit) return false;
      state = (state & ~(bytes << 4)) | bytes;
    } else {
      if ((state & bytes << 4) != 0) return false;
      std::memcpy(any, &cells.any[cell], sizeof(Row));
      if (largest(any) > floor) {
        const Entry* const entry = entries(cells, kReads, call.warp) + cell;
        for (int i = 0; i < kCount; i++) {
          if (any[i] <= floor) continue;
          const uint32_t at = cell + static_cast<uint32_t>(i);
          if ((readers[i] & ~warp_bit) != 0 || cells.warps[kAtomics][at] != 0 || cells.warps[kAtomicReads][at] != 0 ||
              !change_is_known(i))
            return false;
          if (readers[i] != 0 && entry[i].id > known && !(entry[i].lanes == lanes[i] && single(lanes[i]))) return false;
        }
        for (int i = 0; i < kCount; i++)
          if (any[i] > floor) replaced_.push_back(before(cells, cell + static_cast<uint32_t>(i)));
      }
      state |= kKind == Access::kCopyIssue ? bytes << 4 : bytes;
    }
    for (int i = 0; i < kCount; i++) write[i] = {id, lanes[i], call.pc, call.warp};
    std::memcpy(&cells.change[cell], ids, sizeof(Row));
    std::memcpy(&cells.any[cell], ids, sizeof(Row));
    for (auto& warps : cells.warps) std::memset(&warps[cell], 0, sizeof(Row));
  }
  return true;
}

// Any access to the bytes (bits of `bytes`) of one word.
void SharedShadow::access_word(Call& call, uint32_t word, uint32_t bytes, uint32_t lanes) {
  const bool is_split = words_.change[word] == kSplit;
  uint8_t& state = state_[word];
  const uint32_t flying = state >> 4 & bytes;
  if (call.kind == Access::kCopyLand) {
    state = static_cast<uint8_t>((state & ~(bytes << 4)) | bytes);
  } else if (flying != 0) {
    const uint32_t address = word * 4 + static_cast<uint32_t>(std::countr_zero(flying));
    const Write& copy = is_split ? bytes_.write[address] : words_.write[word];
    call.add(Fault::kInFlight, address, std::countr_zero(lanes), copy.warp, std::countr_zero(copy.lanes), copy.pc,
             true);
    if (!is_read(call.kind)) state |= static_cast<uint8_t>(bytes);
    return;
  } else {
    const uint32_t unwritten = bytes & ~state;
    if (is_read(call.kind) && unwritten != 0)
      call.add(Fault::kUnwrittenShared, word * 4 + static_cast<uint32_t>(std::countr_zero(unwritten)),
               std::countr_zero(lanes), 0, -1, kUnknownPc, false);
    if (call.kind == Access::kCopyIssue) {
      state |= static_cast<uint8_t>(bytes << 4);
    } else if (call.kind != Access::kRead && call.kind != Access::kAtomicRead) {
      state |= static_cast<uint8_t>(bytes);
    }
  }
  if (!is_split && bytes == 15) {
    access_cell(call, words_, word, lanes, word * 4);
    return;
  }
  if (!is_split) split(word);
  bool clean = true;
  for (uint32_t rest = bytes; rest; rest &= rest - 1) {
    const uint32_t byte = word * 4 + static_cast<uint32_t>(std::countr_zero(rest));
    clean &= access_cell(call, bytes_, byte, lanes, byte);
  }
  if (clean && bytes == 15 && is_plain_write(call.kind)) merge(word);
}

// Checks and records an access to a cell; false when it raced.
bool SharedShadow::access_cell(Call& call, Cells& cells, uint32_t cell, uint32_t lanes, uint32_t address) {
  Write& write = cells.write[cell];
  bool clean = true;
  switch (call.kind) {
    case Access::kRead:
      clean &= check_write(call, write, lanes, address);
      clean &= check_entries(call, cells, cell, kAtomics, cells.warps[kAtomics][cell], lanes, address);
      keep(call, cells, cell, kReads, lanes);
      break;
    case Access::kAtomicRead:
      clean &= check_write(call, write, lanes, address);
      keep(call, cells, cell, kAtomicReads, lanes);
      break;
    case Access::kAtomic:
    case Access::kAtomicWrite:
      clean &= check_write(call, write, lanes, address);
      clean &= check_entries(call, cells, cell, kReads, cells.warps[kReads][cell], lanes, address);
      keep(call, cells, cell, kAtomics, lanes);
      cells.change[cell] = call.id;
      break;
    default:
      if (write.id == call.id) {  // another lane of this instruction
        call.overlap = true;
        lanes |= write.lanes;
        const uint32_t mine = lanes & ~write.lanes;
        for (const Replaced& earlier : replaced_)
          if (earlier.cells == &cells ? earlier.cell == cell : &cells == &words_ && earlier.cell / 4 == cell)
            clean &= check_before_write(call, const_cast<Cells&>(*earlier.cells), earlier.cell, earlier, mine, address);
      } else if (call.kind != Access::kCopyLand) {
        const Replaced earlier = before(cells, cell);
        clean &= check_before_write(call, cells, cell, earlier, lanes, address);
        if (cells.any[cell] > call.me->floor) replaced_.push_back(earlier);
      }
      if (clean)
        for (auto& warps : cells.warps) warps[cell] = 0;
      write = {call.id, lanes, call.pc, call.warp};
      cells.change[cell] = call.id;
  }
  cells.any[cell] = call.id;
  return clean;
}

bool SharedShadow::check_write(Call& call, const Write& write, uint32_t lanes, uint32_t address) {
  if (write.id == 0) return true;
  const int pair = unordered(call.warp, lanes, write.warp, write.lanes, write.id);
  if (pair < 0) return true;
  if (call.kind == Access::kWrite && call.same && call.same->holds(call.same->context, pair >> 8)) return true;
  call.add_race(address, pair, write.warp, write.pc, true);
  return false;
}

SharedShadow::Replaced SharedShadow::before(const Cells& cells, uint32_t cell) const {
  return {&cells,
          cell,
          cells.write[cell],
          {cells.warps[kReads][cell], cells.warps[kAtomics][cell], cells.warps[kAtomicReads][cell]}};
}

bool SharedShadow::check_before_write(Call& call, Cells& cells, uint32_t cell, const Replaced& before, uint32_t lanes,
                                      uint32_t address) {
  bool clean = check_write(call, before.write, lanes, address);
  for (Kind kind : {kReads, kAtomics, kAtomicReads})
    clean &= check_entries(call, cells, cell, kind, before.warps[kind], lanes, address);
  return clean;
}

bool SharedShadow::check_entries(Call& call, Cells& cells, uint32_t cell, Kind kind, uint32_t warps, uint32_t lanes,
                                 uint32_t address) {
  bool clean = true;
  for (uint32_t rest = warps; rest; rest &= rest - 1) {
    const uint32_t other = static_cast<uint32_t>(std::countr_zero(rest));
    const Entry entry = cells.entries[kind][other][cell];
    auto check = [&](const Entry& accesses) {
      const int pair = unordered(call.warp, lanes, other, accesses.lanes, accesses.id);
      if (pair < 0) return;
      call.add_race(address, pair, other, pc_of(accesses.id), kind == kAtomics);
      clean = false;
    };
    if (entry.lanes != 0) {
      check(entry);
    } else {
      for (const Entry& part : spilled_[spill_key(cells, kind, other, cell)]) check(part);
    }
  }
  return clean;
}

// Adds an access to those of this warp that a later write must be ordered after. Earlier ones that happened before it
// need not be kept. Invariant: an entry without lanes is spilled.
void SharedShadow::keep(Call& call, Cells& cells, uint32_t cell, Kind kind, uint32_t lanes) {
  const Warp& me = *call.me;
  Entry& entry = entries(cells, kind, call.warp)[cell];
  uint32_t& warps = cells.warps[kind][cell];
  const bool there = (warps >> call.warp & 1) != 0;
  warps |= 1u << call.warp;
  if (!there || entry.id <= me.all[1 + call.warp]) {
    entry = {call.id, lanes};
  } else if (entry.lanes != 0 && entry.id >= me.interval) {
    entry = {call.id, entry.lanes | lanes};  // no one can know one of them and not the other
  } else if (entry.lanes != 0 && unordered(call.warp, lanes, call.warp, entry.lanes, entry.id) < 0) {
    entry = {call.id, lanes};
  } else {
    std::vector<Entry>& parts = spilled_[spill_key(cells, kind, call.warp, cell)];
    if (entry.lanes != 0) parts.assign(1, entry);
    for (Entry& part : parts) part.lanes &= ~lanes;
    std::erase_if(parts, [](const Entry& part) { return part.lanes == 0; });
    if (!parts.empty() && parts.back().id >= me.interval) {
      parts.back() = {call.id, parts.back().lanes | lanes};
    } else {
      parts.push_back({call.id, lanes});
    }
    entry = {call.id, 0};
  }
}

uint64_t SharedShadow::spill_key(const Cells& cells, Kind kind, uint32_t warp, uint32_t cell) const {
  return uint64_t{cell} << 16 | warp << 8 | static_cast<uint32_t>(kind) << 1 | (&cells == &bytes_);
}

void SharedShadow::split(uint32_t word) {
  if (!bytes_.change) make(bytes_, words_.count * 4);
  for (uint32_t byte = word * 4; byte < word * 4 + 4; byte++) {
    bytes_.change[byte] = words_.change[word];
    bytes_.any[byte] = words_.any[word];
    bytes_.write[byte] = words_.write[word];
    for (int k = 0; k < kNumKinds; k++) {
      const Kind kind = static_cast<Kind>(k);
      bytes_.warps[kind][byte] = words_.warps[kind][word];
      for (uint32_t rest = words_.warps[kind][word]; rest; rest &= rest - 1) {
        const uint32_t warp = static_cast<uint32_t>(std::countr_zero(rest));
        const Entry entry = words_.entries[kind][warp][word];
        entries(bytes_, kind, warp)[byte] = entry;
        if (entry.lanes == 0)
          spilled_[spill_key(bytes_, kind, warp, byte)] = spilled_[spill_key(words_, kind, warp, word)];
      }
    }
  }
  words_.change[word] = words_.any[word] = kSplit;
}

// After a clean write of the whole word nothing else need be known of it.
void SharedShadow::merge(uint32_t word) {
  words_.write[word] = bytes_.write[word * 4];
  words_.change[word] = words_.any[word] = bytes_.change[word * 4];
  for (auto& warps : words_.warps) warps[word] = 0;
}

void SharedShadow::set_written(uint32_t begin, uint32_t end) {
  for (uint32_t byte = begin; byte < end; byte++) state_[byte / 4] |= static_cast<uint8_t>(1u << byte % 4);
}

bool SharedShadow::in_flight(uint32_t address, uint32_t num_bytes) const {
  for (uint32_t byte = address; byte < address + num_bytes; byte++)
    if (state_[byte / 4] >> (4 + byte % 4) & 1) return true;
  return false;
}

}  // namespace emulator
