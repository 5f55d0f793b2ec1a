// SPDX-License-Identifier: Apache-2.0
// Device memory, which is host memory: what may be touched.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <string>
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
  bool empty() const { return version_.load(std::memory_order_relaxed) == 0; }  // nothing was ever added
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
// Of it, what is another GPU's, or what another GPU touches meanwhile: only what reaches the system orders it.
DeviceMemory& peer_memory();

}  // namespace emulator
