// SPDX-License-Identifier: Apache-2.0
// sync.cpp: release and acquire by memory accesses and fences.
#include "sync.h"

#include <bit>

namespace emulator {
namespace {

constexpr bool releases(Order order) { return order == Order::kRelease || order == Order::kAcquireRelease; }
constexpr bool acquires(Order order) { return order == Order::kAcquire || order == Order::kAcquireRelease; }

}  // namespace

void order_before(Warp& warp, uint32_t lanes, std::byte* const* host, Order order, bool writes, bool gpu_scope) {
  Block& block = warp.block();
  SharedShadow* shadow = block.shadow();
  if (shadow == nullptr || !writes) return;
  if (releases(order)) {
    BlockSync& sync = sync_of(block);
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      shadow->release(warp.index(), sync.released[host[lane]], 1u << lane, false);
    }
    if (gpu_scope && block.block_writes()) block.block_writes()->release(block.linear());
  } else if (warp.async && !sync_of(warp).fenced.empty()) {
    BlockSync& sync = sync_of(block);
    for (uint32_t rest = lanes; rest; rest &= rest - 1)
      shadow->join(sync.released[host[std::countr_zero(rest)]], sync_of(warp).fenced);
  }
}

void order_after(Warp& warp, uint32_t lanes, std::byte* const* host, Order order, bool reads, bool gpu_scope) {
  Block& block = warp.block();
  SharedShadow* shadow = block.shadow();
  if (shadow == nullptr || !reads) return;
  if (acquires(order) && gpu_scope && block.block_writes()) block.block_writes()->acquire(block.linear());
  if (!block.async || sync_of(block).released.empty()) return;
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    auto at = sync_of(block).released.find(host[lane]);
    if (at == sync_of(block).released.end()) continue;
    if (acquires(order)) {
      shadow->acquire(warp.index(), at->second, 1u << lane);
    } else {
      shadow->join(sync_of(warp).pending, at->second);
    }
  }
}

void fence(Warp& warp, bool gpu_scope) {
  Block& block = warp.block();
  SharedShadow* shadow = block.shadow();
  if (shadow == nullptr) return;
  WarpSync& sync = sync_of(warp);
  if (!sync.pending.empty()) {
    shadow->acquire(warp.index(), sync.pending, warp.active());
    sync.pending.clear();
  }
  shadow->release(warp.index(), sync.fenced, warp.active(), false);
  if (gpu_scope && block.block_writes()) {
    block.block_writes()->release(block.linear());
    block.block_writes()->acquire(block.linear());
  }
}

}  // namespace emulator
