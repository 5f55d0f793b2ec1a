// SPDX-License-Identifier: Apache-2.0
// memory.cpp: the table of device memory, and the record of which block wrote what.
#include "memory.h"

#include <algorithm>
#include <bit>
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

// ---- BlockWrites ----------------------------------------------------------------------------------------------------

namespace {

constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t kPageWords = kPageBytes / 4;
constexpr size_t kMaxPagesKept = 1 << 14;  // of a shard, for later launches: 8 KiB each

// A word: the bytes written (4 bits), the block (28 bits), and how many releases the block had made before (31 bits).
// Blocks that are equal in 28 bits are not told apart. kByBytes: two blocks share the word, see Shard::split.
constexpr uint64_t kByBytes = uint64_t{1} << 63;
constexpr uint64_t kBlockMask = (uint64_t{1} << 28) - 1;
constexpr uint64_t pack(uint64_t block, uint64_t releases) {
  return (releases & 0x7fffffff) << 32 | (block & kBlockMask) << 4;
}
constexpr uint64_t block_of(uint64_t word) { return word >> 4 & kBlockMask; }
constexpr uint64_t releases_of(uint64_t word) { return word >> 32 & 0x7fffffff; }

}  // namespace

struct BlockWrites::Page {
  uint64_t launch = 0;
  std::atomic<uint64_t> words[kPageWords] = {};
};

struct BlockWrites::Shard {
  std::mutex mutex;
  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;
  std::unordered_map<uint64_t, std::array<uint64_t, 4>> split;  // [word address][byte]
};

struct BlockWrites::Order {
  mutable std::shared_mutex mutex;
  uint32_t time = 0;
  struct State {
    std::vector<uint32_t> releases;  // times, of those that had something to release
    bool wrote = false;              // since the last of them
    uint32_t acquired = 0;           // time
  };
  std::unordered_map<uint64_t, State> blocks;
  std::atomic<bool> any{false};
};

// What the calling thread used last: pages by their low bits, and the stamp of its block.
struct BlockWrites::Cache {
  static constexpr uint64_t kEntries = 32;
  uint64_t launch = 0;
  uint64_t index[kEntries] = {};
  Page* page[kEntries] = {};
  int64_t block = -1;
  uint64_t stamp = 0;
};
thread_local constinit BlockWrites::Cache BlockWrites::cache_;

BlockWrites::BlockWrites() : shards_(new Shard[kNumShards]), order_(new Order) { begin_launch(); }
BlockWrites::~BlockWrites() = default;

void BlockWrites::begin_launch() {
  launch_ = ++last_version;
  for (int i = 0; i < kNumShards; i++) {
    if (shards_[i].pages.size() > kMaxPagesKept) shards_[i].pages.clear();
    shards_[i].split.clear();
  }
  order_->blocks.clear();
  order_->time = 0;
  order_->any = false;
}

BlockWrites::Page* BlockWrites::find_page(uint64_t index) {
  Shard& shard = shards_[index % kNumShards];
  std::lock_guard lock(shard.mutex);
  std::unique_ptr<Page>& page = shard.pages[index];
  if (!page) page = std::make_unique<Page>();
  if (page->launch != launch_) {
    for (auto& word : page->words) word.store(0, std::memory_order_relaxed);
    page->launch = launch_;
  }
  return page.get();
}

uint64_t BlockWrites::stamp_of(int64_t block) {
  uint64_t releases = 0;
  if (order_->any.load(std::memory_order_relaxed)) {
    std::unique_lock lock(order_->mutex);
    Order::State& state = order_->blocks[static_cast<uint64_t>(block) & kBlockMask];
    state.wrote = true;
    releases = state.releases.size();
  }
  return pack(static_cast<uint64_t>(block), releases);
}

int64_t BlockWrites::write(uint64_t address, uint32_t num_bytes, int64_t block, uint64_t* conflict) {
  Cache& cache = cache_;
  if (cache.launch != launch_) {
    cache = Cache();
    cache.launch = launch_;
  }
  if (cache.block != block) {
    cache.block = block;
    cache.stamp = stamp_of(block);
  }
  int64_t other = -1;
  const uint64_t end = address + num_bytes;
  for (uint64_t word = address & ~uint64_t{3}; word < end; word += 4) {
    const uint64_t index = word / kPageBytes, slot = index % Cache::kEntries;
    if (cache.page[slot] == nullptr || cache.index[slot] != index) {
      cache.page[slot] = find_page(index);
      cache.index[slot] = index;
    }
    uint32_t bytes = 15;
    if (word < address) bytes &= 15u << (address - word);
    if (word + 4 > end) bytes &= 15u >> (word + 4 - end);
    std::atomic<uint64_t>& entry = cache.page[slot]->words[word % kPageBytes / 4];
    if (entry.load(std::memory_order_relaxed) == (cache.stamp | 15)) continue;
    const int64_t earlier = write_word(entry, word, bytes, cache.stamp);
    if (earlier < 0) continue;
    other = earlier;
    if (conflict != nullptr) {
      *conflict = word;
      break;
    }
  }
  return other;
}

int64_t BlockWrites::write_word(std::atomic<uint64_t>& word, uint64_t word_address, uint32_t bytes, uint64_t mine) {
  uint64_t old = word.load(std::memory_order_relaxed);
  for (;;) {
    if (old & kByBytes) return write_bytes(word, word_address, bytes, mine);
    const uint64_t old_bytes = old & 15;
    uint64_t next = mine | bytes;
    int64_t other = -1;
    if (old_bytes != 0) {
      if (block_of(old) == block_of(mine)) {
        if ((old_bytes & ~uint64_t{bytes}) != 0) next |= old_bytes;  // the later stamp stands for all
      } else if ((old_bytes & bytes) == 0) {
        return write_bytes(word, word_address, bytes, mine);
      } else {
        if (!ordered(old, mine)) other = static_cast<int64_t>(block_of(old));
        if ((old_bytes & ~uint64_t{bytes}) != 0) {
          write_bytes(word, word_address, bytes, mine);
          return other;
        }
      }
    }
    if (word.compare_exchange_weak(old, next, std::memory_order_relaxed)) return other;
  }
}

int64_t BlockWrites::write_bytes(std::atomic<uint64_t>& word, uint64_t word_address, uint32_t bytes, uint64_t mine) {
  Shard& shard = shards_[word_address / kPageBytes % kNumShards];
  std::lock_guard lock(shard.mutex);
  std::array<uint64_t, 4>& by_byte = shard.split[word_address];
  const uint64_t old = word.exchange(kByBytes, std::memory_order_relaxed);
  if (!(old & kByBytes))
    for (uint64_t i = 0; i < 4; i++) by_byte[i] = old >> i & 1 ? old : 0;
  int64_t other = -1;
  for (uint64_t i = 0; i < 4; i++) {
    if (!(bytes >> i & 1)) continue;
    if (by_byte[i] != 0 && block_of(by_byte[i]) != block_of(mine) && !ordered(by_byte[i], mine))
      other = static_cast<int64_t>(block_of(by_byte[i]));
    by_byte[i] = mine | 15;
  }
  return other;
}

// Whether the block of `earlier` released after that write, and the block of `mine` acquired after that.
bool BlockWrites::ordered(uint64_t earlier, uint64_t mine) const {
  if (!order_->any.load(std::memory_order_relaxed)) return false;
  std::shared_lock lock(order_->mutex);
  auto from = order_->blocks.find(block_of(earlier)), to = order_->blocks.find(block_of(mine));
  if (from == order_->blocks.end() || to == order_->blocks.end()) return false;
  const uint64_t before = releases_of(earlier);
  return before < from->second.releases.size() && from->second.releases[before] < to->second.acquired;
}

void BlockWrites::forget(uint64_t address, uint64_t num_bytes) {
  const uint64_t end = address + num_bytes;
  for (uint64_t index = address / kPageBytes; index * kPageBytes < end; index++) {
    Shard& shard = shards_[index % kNumShards];
    std::lock_guard lock(shard.mutex);
    const auto page = shard.pages.find(index);
    if (page == shard.pages.end()) continue;
    const uint64_t first = std::max(address & ~uint64_t{3}, index * kPageBytes);
    for (uint64_t word = first; word < std::min(end, (index + 1) * kPageBytes); word += 4) {
      if (page->second->words[word % kPageBytes / 4].exchange(0, std::memory_order_relaxed) & kByBytes)
        shard.split.erase(word);
    }
  }
}

void BlockWrites::release(int64_t block) {
  {
    std::unique_lock lock(order_->mutex);
    order_->any = true;
    Order::State& state = order_->blocks[static_cast<uint64_t>(block) & kBlockMask];
    if (!state.releases.empty() && !state.wrote) return;  // one that spins with fences would fill the memory
    state.releases.push_back(++order_->time);
    state.wrote = false;
  }
  cache_.block = -1;
}

void BlockWrites::acquire(int64_t block) {
  std::unique_lock lock(order_->mutex);
  order_->any = true;
  order_->blocks[static_cast<uint64_t>(block) & kBlockMask].acquired = ++order_->time;
}

}  // namespace emulator
