// SPDX-License-Identifier: Apache-2.0
// Device memory, which is host memory: what may be touched, and which block of a launch wrote it.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace emulator {

// The ranges of host memory that kernels may touch. Safe from several threads.
class DeviceMemory {
 public:
  // Nested and overlapping ranges are legal, and counted: each add is taken back by one remove of the same range, in
  // any order.
  void add(const void* begin, uint64_t num_bytes, std::string name);
  void remove(const void* begin, uint64_t num_bytes);  // none: nothing happens
  // Whether [address, address + num_bytes) lies in a range, or in ranges that overlap. Ranges that only touch are two.
  bool contains(uint64_t address, uint32_t num_bytes) const {
    const Hit& hit = last_hit_;
    if (hit.version == version_.load(std::memory_order_acquire) && address - hit.begin < hit.num_bytes &&
        num_bytes <= hit.num_bytes - (address - hit.begin))
      return true;
    return find(address, num_bytes);
  }
  // Where an access lies, for messages: "12 bytes past the end of 'q' (0x7f..., 4096 bytes)".
  std::string describe(uint64_t address, uint32_t num_bytes) const;

 private:
  struct Range {
    uint64_t num_bytes;
    std::string name;
  };
  // The range that a thread hit last. Versions of all objects come from one counter, so that a hit belongs to one
  // object.
  struct Hit {
    uint64_t version = 0, begin = 0, num_bytes = 0;
  };
  bool find(uint64_t address, uint32_t num_bytes) const;
  size_t merged_behind(uint64_t address) const;  // index of the first of merged_ that begins behind it
  void rebuild();

  static thread_local constinit Hit last_hit_;
  mutable std::shared_mutex mutex_;
  std::multimap<uint64_t, Range> ranges_;
  std::vector<std::pair<uint64_t, uint64_t>> merged_;  // begin, end; sorted, no two overlap
  std::atomic<uint64_t> version_{0};
};

DeviceMemory& device_memory();

// Which block wrote a byte of global memory last in this launch with a plain store. Safe from several threads, as long
// as a block runs on one at a time. Blocks that hand data on by a fence or an atomic of the GPU's scope (release,
// acquire) are ordered: a block may write what another wrote before a release that came before its own last acquire.
class BlockWrites {
 public:
  BlockWrites();
  ~BlockWrites();
  BlockWrites(const BlockWrites&) = delete;
  BlockWrites& operator=(const BlockWrites&) = delete;

  void begin_launch();  // while no block runs
  // The block that wrote one of these bytes before, unordered; -1 when there is none. `conflict`: ends behind the first
  // word that another block wrote, whose address goes there.
  int64_t write(uint64_t address, uint32_t num_bytes, int64_t block, uint64_t* conflict = nullptr);
  // Nobody has written these bytes: memory that is given anew.
  void forget(uint64_t address, uint64_t num_bytes);
  void release(int64_t block);
  void acquire(int64_t block);

 private:
  struct Page;
  struct Shard;
  struct Order;
  struct Cache;
  Page* find_page(uint64_t index);
  int64_t write_word(std::atomic<uint64_t>& word, uint64_t word_address, uint32_t bytes, uint64_t mine);
  int64_t write_bytes(std::atomic<uint64_t>& word, uint64_t word_address, uint32_t bytes, uint64_t mine);
  bool ordered(uint64_t earlier, uint64_t mine) const;
  uint64_t stamp_of(int64_t block);

  static constexpr int kNumShards = 16;
  static thread_local constinit Cache cache_;
  uint64_t launch_ = 0;  // unique among all objects
  std::unique_ptr<Shard[]> shards_;
  std::unique_ptr<Order> order_;
};

}  // namespace emulator
