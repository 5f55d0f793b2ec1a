// SPDX-License-Identifier: Apache-2.0
// The parts of an opcode that loads, stores, atomics and asynchronous copies have in common.
#pragma once

#include <span>
#include <string_view>

#include "program.h"
#include "sync.h"

namespace emulator {

enum class Scope : uint8_t { kNone, kBlock, kCluster, kGpu, kSystem };

inline Space take_space(Modifiers& mods) {
  switch (mods.take_one_of({"global", "const", "shared", "shared::cta", "shared::cluster", "local", "param",
                            "param::entry", "param::func"})) {
    case 0: return Space::kGlobal;
    case 1: return Space::kConst;
    case 2:
    case 3: return Space::kShared;
    case 4: return Space::kSharedCluster;
    case 5: return Space::kLocal;
    case -1: return Space::kGeneric;
    default: return Space::kParam;
  }
}

inline Scope take_scope(Modifiers& mods) {
  switch (mods.take_one_of({"cta", "cluster", "gpu", "sys"})) {
    case 0: return Scope::kBlock;
    case 1: return Scope::kCluster;
    case 2: return Scope::kGpu;
    case 3: return Scope::kSystem;
    default: return Scope::kNone;
  }
}

// How far an access or fence orders. A cluster is one block here.
constexpr Reach reach_of(Scope scope) {
  switch (scope) {
    case Scope::kBlock:
    case Scope::kCluster: return Reach::kBlock;
    case Scope::kGpu: return Reach::kGpu;
    default: return Reach::kSystem;
  }
}

// Of memory accesses: volatile reaches the system, and so does what names no scope and may not, but not atomics.
inline Reach take_reach(Modifiers& mods, bool atomic) {
  const Scope scope = take_scope(mods);
  return scope == Scope::kNone && atomic ? Reach::kGpu : reach_of(scope);
}

constexpr std::string_view kLoadOrders[] = {"weak", "relaxed", "acquire", "volatile", "mmio"};
constexpr std::string_view kStoreOrders[] = {"weak", "relaxed", "release", "volatile", "mmio"};
constexpr std::string_view kAtomicOrders[] = {"relaxed", "acquire", "release", "acq_rel"};

inline Order take_order(Modifiers& mods, std::span<const std::string_view> names) {
  Order order = Order::kWeak;
  for (std::string_view name : names) {
    if (!mods.take(name)) continue;
    if (name == "relaxed" || name == "volatile") order = Order::kRelaxed;
    if (name == "mmio" && order == Order::kWeak) order = Order::kRelaxed;
    if (name == "acquire") order = Order::kAcquire;
    if (name == "release") order = Order::kRelease;
    if (name == "acq_rel") order = Order::kAcquireRelease;
  }
  return order;
}

// Cache operators, eviction priorities, prefetch sizes. True: a cache policy is the last operand.
inline bool take_cache_hints(Modifiers& mods) {
  mods.take_one_of({"ca", "cg", "cs", "lu", "cv", "wb", "wt"});
  for (std::string_view hint : {"L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last",
                                "L1::no_allocate", "L2::evict_normal", "L2::evict_first", "L2::evict_last",
                                "L2::evict_unchanged", "L2::64B", "L2::128B", "L2::256B"})
    while (mods.take(hint)) {
    }
  return mods.take("L2::cache_hint");
}

void decode_atomic(Decoder& decoder, const ptx::Instruction& in, Instruction& out);    // execute_atomic.cpp
void decode_mbarrier(Decoder& decoder, const ptx::Instruction& in, Instruction& out);  // execute_mbarrier.cpp

}  // namespace emulator
