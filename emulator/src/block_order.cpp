// SPDX-License-Identifier: Apache-2.0
// block_order.cpp: releases, acquires and fences between blocks. See block_order.h for the model.
#include "block_order.h"

#include <algorithm>

namespace emulator {
namespace {

constexpr size_t kMaxEvents = 64;  // of a kind and reach; of more the oldest count as known to the whole block
constexpr size_t kLookedBack = 8;  // events among which the same one is looked for

// The entry of a block.
template <typename K>
auto find(K& known, uint32_t block) {
  return std::lower_bound(known.begin(), known.end(), block,
                          [](const auto& entry, uint32_t wanted) { return entry.first < wanted; });
}

// a holds all that b does.
bool covers(const VectorClock& a, const VectorClock& b) {
  if (a.size() < b.size()) return false;
  for (size_t i = 0; i < b.size(); i++)
    if (a[i] < b[i]) return false;
  return true;
}

// Of these threads, those for which an event happened before.
uint32_t lanes_that_know(const Threads& me, int warp, uint32_t lanes, uint32_t id) {
  if (me.shadow.knows(me.warp, me.lanes, warp, lanes, id, true)) return me.lanes;
  uint32_t know = 0;
  for (uint32_t rest = me.lanes; rest; rest &= rest - 1)
    if (const uint32_t lane = rest & (0 - rest); me.shadow.knows(me.warp, lane, warp, lanes, id, true)) know |= lane;
  return know;
}

}  // namespace

void BlockOrder::join(std::shared_ptr<const VectorClock>& into, const std::shared_ptr<const VectorClock>& from) {
  if (into == from || covers(*into, *from)) return;
  if (covers(*from, *into)) {
    into = from;
    return;
  }
  auto both = std::make_shared<VectorClock>(*into);
  if (both->size() < from->size()) both->resize(from->size(), 0);
  for (size_t i = 0; i < from->size(); i++) (*both)[i] = std::max((*both)[i], (*from)[i]);
  into = std::move(both);
}

void BlockOrder::join(KnownPtr& into, const KnownPtr& from) {
  if (!from || into == from) return;
  if (!into) {
    into = from;
    return;
  }
  for (const auto& [block, clock] : *from) {
    auto at = find(*into, block);
    if (at != into->end() && at->first == block && (at->second == clock || covers(*at->second, *clock))) continue;
    if (into.use_count() > 1) {  // others hold it as it is
      into = std::make_shared<Known>(*into);
      at = find(*into, block);
    }
    if (at != into->end() && at->first == block) {
      join(at->second, clock);
    } else {
      into->emplace(at, block, clock);
    }
  }
}

// ---- events of a block ----------------------------------------------------------------------------------------------

void BlockOrder::add(const Threads& me, BlockKnowledge::OfReach& of, Kind kind, uint32_t lanes, KnownPtr known) {
  std::vector<Event>& events = of.events[kind];
  size_t looked = 0;
  for (auto e = events.rbegin(); e != events.rend() && looked < kLookedBack; ++e, ++looked)
    if (e->warp == me.warp && (lanes & ~e->lanes) == 0 && e->known == known) return;
  const uint32_t id = me.shadow.note(me.warp, lanes);
  if (!events.empty() && events.back().warp == me.warp && events.back().lanes == lanes && events.back().id == id) {
    join(events.back().known, known);
    return;
  }
  if (events.size() >= kMaxEvents) tidy(me, of, kind);
  events.push_back({me.warp, lanes, id, std::move(known)});
}

void BlockOrder::tidy(const Threads& me, BlockKnowledge::OfReach& of, Kind kind) {
  std::vector<Event>& events = of.events[kind];
  std::erase_if(events, [&](const Event& e) {
    if (!me.shadow.all_know(e.warp, e.id)) return false;
    join(of.all[kind], e.known);
    return true;
  });
  if (events.size() < kMaxEvents / 2) return;
  const size_t many = events.size() - kMaxEvents / 2;
  for (size_t i = 0; i < many; i++) join(of.all[kind], events[i].known);
  events.erase(events.begin(), events.begin() + static_cast<std::ptrdiff_t>(many));
}

// What any of these threads knows: a fence is one of all lanes that execute it together.
KnownPtr BlockOrder::known(const Threads& me, const BlockKnowledge::OfReach& of, Kind kind) {
  KnownPtr result = of.all[kind];
  for (const Event& e : of.events[kind])
    if (lanes_that_know(me, e.warp, e.lanes, e.id) != 0) join(result, e.known);
  return result;
}

// All that these threads did and know.
KnownPtr BlockOrder::released(const Threads& me, const BlockKnowledge::OfReach& of) {
  auto clock = std::make_shared<VectorClock>();
  me.shadow.release(me.warp, *clock, me.lanes, false);
  auto mine = std::make_shared<Known>();
  mine->emplace_back(me.block, std::move(clock));
  join(mine, known(me, of, BlockKnowledge::kAcquired));
  return mine;
}

// ---- synchronisation ------------------------------------------------------------------------------------------------

void BlockOrder::write(const Threads& me, const void* address, Reach reach, bool releases, bool chain) {
  for (int r = 0; r < kNumReaches; r++) {
    const bool reaches = r <= static_cast<int>(reach);
    KnownPtr handed;
    if (reaches) {
      BlockKnowledge::OfReach& of = me.knowledge.reach[r];
      handed = releases ? released(me, of) : known(me, of, BlockKnowledge::kFenced);
    }
    std::lock_guard lock(mutex_);
    const auto found = values_[r].find(address);
    if (found == values_[r].end() && !handed) continue;
    Value& value = found != values_[r].end() ? found->second : values_[r][address];
    if (!chain) value.known = nullptr;
    if (reaches && value.own && value.block == me.block && value.warp == me.warp && value.lanes == me.lanes)
      join(value.known, value.own);
    join(value.known, handed);
    if (releases && handed) value = {value.known, handed, me.block, me.lanes, me.warp};
    if (!value.known && !value.own) values_[r].erase(address);
  }
}

void BlockOrder::read(const Threads& me, const void* address, Reach reach, bool acquires) {
  for (int r = 0; r <= static_cast<int>(reach); r++) {
    KnownPtr handed;
    {
      std::lock_guard lock(mutex_);
      const auto value = values_[r].find(address);
      if (value != values_[r].end()) handed = value->second.known;
    }
    if (handed)
      add(me, me.knowledge.reach[r], acquires ? BlockKnowledge::kAcquired : BlockKnowledge::kRead, me.lanes,
          std::move(handed));
  }
}

void BlockOrder::fence(const Threads& me, Reach reach) {
  for (int r = 0; r <= static_cast<int>(reach); r++) {
    BlockKnowledge::OfReach& of = me.knowledge.reach[r];
    join(of.all[BlockKnowledge::kAcquired], of.all[BlockKnowledge::kRead]);
    of.all[BlockKnowledge::kRead] = nullptr;
    for (const Event& e : of.events[BlockKnowledge::kRead])
      if (const uint32_t lanes = lanes_that_know(me, e.warp, e.lanes, e.id))
        add(me, of, BlockKnowledge::kAcquired, lanes, e.known);
    add(me, of, BlockKnowledge::kFenced, me.lanes, released(me, of));
  }
}

bool BlockOrder::before(const GlobalAccess& earlier, const Threads& me, Reach reach) const {
  if (lost_.load(std::memory_order_relaxed)) return true;
  const int warp = static_cast<int>(earlier.warp);
  const uint32_t block = static_cast<uint32_t>(earlier.block);
  if (block == me.block) return me.shadow.knows(me.warp, me.lanes, warp, earlier.lanes, earlier.id, false);
  const BlockKnowledge::OfReach& of = me.knowledge.reach[static_cast<int>(reach)];
  uint32_t left = earlier.lanes;
  auto learn = [&](const KnownPtr& known) {
    if (!known) return;
    const auto entry = find(std::as_const(*known), block);
    if (entry != known->end() && entry->first == block)
      left = SharedShadow::uncovered(*entry->second, num_warps_, earlier.warp, left, earlier.id);
  };
  learn(of.all[BlockKnowledge::kAcquired]);
  const std::vector<Event>& events = of.events[BlockKnowledge::kAcquired];
  for (auto e = events.rbegin(); e != events.rend() && left != 0; ++e)
    if (me.shadow.knows(me.warp, me.lanes, e->warp, e->lanes, e->id, true)) learn(e->known);
  return left == 0;
}

}  // namespace emulator
