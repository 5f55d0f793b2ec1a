// SPDX-License-Identifier: Apache-2.0
// memory.cpp: the table of device memory.
#include "memory.h"

#include <algorithm>
#include <cstdio>

namespace emulator {

namespace {

std::atomic<uint64_t> last_version{0};

std::string hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string bytes(uint64_t count) { return std::to_string(count) + (count == 1 ? " byte" : " bytes"); }

}  // namespace

// ---- DeviceMemory ---------------------------------------------------------------------------------------------------

thread_local constinit DeviceMemory::Hit DeviceMemory::last_hit_;

DeviceMemory& device_memory() {
  static DeviceMemory& memory = *new DeviceMemory;  // outlives every module, at the end of the process too
  return memory;
}

DeviceMemory& peer_memory() {
  static DeviceMemory& memory = *new DeviceMemory;
  return memory;
}

void DeviceMemory::add(const void* begin, uint64_t num_bytes, std::string name) {
  if (num_bytes == 0) return;
  std::unique_lock lock(mutex_);
  const uint64_t first = reinterpret_cast<uint64_t>(begin), end = first + num_bytes;
  ranges_.emplace(first, Range{num_bytes, std::move(name)});
  const size_t at = merged_behind(first);
  const bool overlaps = (at > 0 && merged_[at - 1].second > first) || (at < merged_.size() && merged_[at].first < end);
  if (overlaps) return rebuild();
  merged_.emplace(merged_.begin() + static_cast<std::ptrdiff_t>(at), first, end);
  version_.store(++last_version, std::memory_order_release);
}

void DeviceMemory::remove(const void* begin, uint64_t num_bytes) {
  std::unique_lock lock(mutex_);
  auto [first, last] = ranges_.equal_range(reinterpret_cast<uint64_t>(begin));
  while (first != last && std::prev(last)->second.num_bytes != num_bytes) --last;
  if (first == last) return;
  const uint64_t address = std::prev(last)->first, end = address + num_bytes;
  const auto next = ranges_.erase(std::prev(last));
  const size_t at = merged_behind(address) - 1;
  const bool alone = merged_[at] == std::pair(address, end) && ranges_.lower_bound(address) == next &&
                     (next == ranges_.end() || next->first >= end);
  if (!alone) return rebuild();
  merged_.erase(merged_.begin() + static_cast<std::ptrdiff_t>(at));
  version_.store(++last_version, std::memory_order_release);
}

size_t DeviceMemory::merged_behind(uint64_t address) const {
  const auto behind = std::upper_bound(merged_.begin(), merged_.end(), address,
                                       [](uint64_t a, const auto& range) { return a < range.first; });
  return static_cast<size_t>(behind - merged_.begin());
}

void DeviceMemory::rebuild() {
  merged_.clear();
  for (const auto& [begin, range] : ranges_) {
    const uint64_t end = begin + range.num_bytes;
    if (!merged_.empty() && begin < merged_.back().second) {
      merged_.back().second = std::max(merged_.back().second, end);
    } else {
      merged_.emplace_back(begin, end);
    }
  }
  version_.store(++last_version, std::memory_order_release);
}

bool DeviceMemory::find(uint64_t address, uint32_t num_bytes) const {
  std::shared_lock lock(mutex_);
  const size_t behind = merged_behind(address);
  if (behind == 0) return false;
  const auto [begin, end] = merged_[behind - 1];
  if (address >= end || num_bytes > end - address) return false;
  last_hit_ = {version_.load(std::memory_order_relaxed), begin, end - begin};
  return true;
}

std::string DeviceMemory::describe(uint64_t address, uint32_t num_bytes) const {
  std::shared_lock lock(mutex_);
  // The nearest range; of those that the access begins in, the one with the latest end.
  const std::pair<const uint64_t, Range>* best = nullptr;
  uint64_t best_distance = ~uint64_t{0};
  for (const auto& entry : ranges_) {
    const uint64_t begin = entry.first, end = begin + entry.second.num_bytes;
    const uint64_t distance = address < begin ? begin - address : address < end ? 0 : address - end + 1;
    if (best != nullptr &&
        (distance > best_distance || (distance == best_distance && end <= best->first + best->second.num_bytes)))
      continue;
    best = &entry;
    best_distance = distance;
  }
  if (best == nullptr) return "no memory is known that it could belong to";
  const uint64_t begin = best->first, end = begin + best->second.num_bytes;
  const std::string what = "'" + best->second.name + "' (" + hex(begin) + ", " + bytes(best->second.num_bytes) + ")";
  if (address < begin) return bytes(begin - address) + " before " + what;
  if (address >= end)
    return (address == end ? "at" : bytes(address - end) + " past") + std::string(" the end of ") + what;
  if (num_bytes > end - address) return bytes(num_bytes - (end - address)) + " over the end of " + what;
  return "at byte " + std::to_string(address - begin) + " of " + what;
}

}  // namespace emulator
