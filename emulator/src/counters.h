// SPDX-License-Identifier: Apache-2.0
// counters.h: what the warps of one launch did, counted by instruction: classes, lanes, mma FLOPs, memory traffic.
//
// Every number is a count of events of the PTX that ran, none is a time. "Ideal" is the least that the same access can
// cost: of global memory its distinct bytes over 32, rounded up; of shared memory the same access without a bank
// conflict. One object serves one thread; those of a launch's threads are merged at the end, in any order.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "report.h"

namespace emulator {

enum class InstructionClass : uint8_t {
  kIntAlu,
  kIntMul,
  kFma,  // fp32 add, mul, fma
  kFpMinMaxCompare,
  kSetSelect,
  kMufu,
  kFp64,
  kHalf,
  kConvert,
  kMove,
  kMma,
  kMatrixLoad,
  kSharedLoad,
  kSharedStore,
  kGlobalLoad,
  kGlobalStore,
  kLocal,
  kAtomic,
  kAsyncCopy,
  kAsyncControl,
  kBarrier,
  kShuffle,
  kVote,
  kBranch,
  kParam,
  kFence,
  kOther,
  kCount
};
constexpr int kNumClasses = static_cast<int>(InstructionClass::kCount);

const char* name_of(InstructionClass);  // "int_alu": the key in JSON

// Whether an instruction takes an issue slot: moves, parameter loads and fences mostly vanish in machine code.
constexpr bool takes_issue_slot(InstructionClass c) {
  return c != InstructionClass::kMove && c != InstructionClass::kParam && c != InstructionClass::kFence;
}

constexpr uint32_t kSectorBytes = 32;

// The events of one instruction of the program. A warp is counted once for each time that it executes the instruction.
struct PcCounts {
  uint64_t warps = 0;
  uint64_t lanes = 0;
  uint64_t mma_flops = 0;
  uint64_t sectors = 0;
  uint64_t ideal_sectors = 0;
  uint64_t wavefronts = 0;
  uint64_t ideal_wavefronts = 0;
  InstructionClass instruction_class = InstructionClass::kOther;

  void add(const PcCounts&);
};

// Totals of a launch. Distinct bytes are whole 32-byte sectors, which is what memory moves, each counted once.
struct Totals {
  uint64_t warp_instructions = 0;
  uint64_t issue_slots = 0;
  uint64_t lane_instructions = 0;
  uint64_t mma_flops = 0;
  uint64_t sectors_read = 0;
  uint64_t ideal_sectors_read = 0;
  uint64_t sectors_written = 0;
  uint64_t ideal_sectors_written = 0;
  uint64_t wavefronts = 0;
  uint64_t ideal_wavefronts = 0;
  uint64_t distinct_bytes_read = 0;
  uint64_t distinct_bytes_written = 0;
  uint64_t local_bytes_read = 0;
  uint64_t local_bytes_written = 0;
  std::array<uint64_t, kNumClasses> warps_of_class{};

  uint64_t of(InstructionClass c) const { return warps_of_class[static_cast<size_t>(c)]; }
};

// The fields of Totals by their names in JSON, in its order; warps_of_class is apart.
constexpr std::pair<const char*, uint64_t Totals::*> kTotalFields[] = {
    {"warp_instructions", &Totals::warp_instructions},
    {"issue_slots", &Totals::issue_slots},
    {"lane_instructions", &Totals::lane_instructions},
    {"mma_flops", &Totals::mma_flops},
    {"sectors_read", &Totals::sectors_read},
    {"ideal_sectors_read", &Totals::ideal_sectors_read},
    {"sectors_written", &Totals::sectors_written},
    {"ideal_sectors_written", &Totals::ideal_sectors_written},
    {"wavefronts", &Totals::wavefronts},
    {"ideal_wavefronts", &Totals::ideal_wavefronts},
    {"distinct_bytes_read", &Totals::distinct_bytes_read},
    {"distinct_bytes_written", &Totals::distinct_bytes_written},
    {"local_bytes_read", &Totals::local_bytes_read},
    {"local_bytes_written", &Totals::local_bytes_written},
};

// Which 32-byte sectors of memory were touched: a bit each, in pages that are allocated when they are.
class SectorSet {
 public:
  SectorSet() = default;
  SectorSet(const SectorSet&);
  SectorSet& operator=(const SectorSet&);
  SectorSet(SectorSet&&) noexcept;
  SectorSet& operator=(SectorSet&&) noexcept;

  void add(uint64_t first_sector, uint64_t last_sector) {
    if (first_sector >> kPageShift != last_sector >> kPageShift) return add_pages(first_sector, last_sector);
    mark(page(first_sector >> kPageShift), first_sector & kPageMask, last_sector & kPageMask);
  }
  void merge(const SectorSet&);
  uint64_t size() const;

 private:
  static constexpr int kPageShift = 11;  // 2048 sectors: 64 KiB of memory in 256 bytes
  static constexpr uint64_t kPageMask = (uint64_t{1} << kPageShift) - 1;
  static constexpr size_t kNumRecent = 64;
  static constexpr uint64_t kNoPage = ~uint64_t{0};
  using Page = std::array<uint64_t, (kPageMask + 1) / 64>;
  struct Recent {
    uint64_t index = kNoPage;
    Page* page = nullptr;
  };

  Page& page(uint64_t index) {
    const Recent& entry = recent_[index % kNumRecent];
    return entry.index == index ? *entry.page : find_page(index);
  }
  Page& find_page(uint64_t index);
  void add_pages(uint64_t first_sector, uint64_t last_sector);
  static void mark(Page& page, uint64_t first, uint64_t last) {
    const uint64_t from = ~uint64_t{0} << (first % 64), upto = ~uint64_t{0} >> (63 - last % 64);
    uint64_t word = first / 64;
    if (word == last / 64) {
      page[word] |= from & upto;
      return;
    }
    page[word++] |= from;
    while (word < last / 64) page[word++] = ~uint64_t{0};
    page[word] |= upto;
  }

  std::unordered_map<uint64_t, Page> pages_;  // its elements stay where they are
  std::array<Recent, kNumRecent> recent_{};   // direct-mapped, over pages_
};

// Counters of one launch. `pc` numbers the instructions of a kernel and of what it calls; `lanes` is a mask.
class Counters {
 public:
  // Once per warp-instruction that executes with any lane.
  void instruction(InstructionClass c, uint32_t pc, uint32_t lanes) {
    PcCounts& counts = at(pc);
    counts.instruction_class = c;
    ++counts.warps;
    counts.lanes += static_cast<uint64_t>(std::popcount(lanes));
  }
  // Dense FLOPs that the instruction executes: 2 m n k.
  void mma(uint32_t pc, uint64_t flops) { at(pc).mma_flops += flops; }
  // One access of a warp to global memory, num_bytes at address[lane]. An atomic is one access that writes.
  void global_access(uint32_t pc, uint32_t lanes, const uint64_t* address, uint32_t num_bytes, bool write);
  // One access of a warp to shared memory: 32 banks of 4 bytes, 8 bytes a lane by half warps, 16 by quarter warps.
  void shared_access(uint32_t pc, uint32_t lanes, const uint32_t* address, uint32_t num_bytes, bool write);
  // ldmatrix, stmatrix: row_address[num_matrices * 8], 16 bytes each; a matrix is one wavefront at best.
  void matrix_access(uint32_t pc, int num_matrices, const uint32_t* row_address, bool write);
  // Local memory is interleaved by lane: its traffic is the bytes that the lanes move.
  void local_access(uint32_t pc, uint32_t lanes, uint32_t num_bytes, bool write);
  void merge(const Counters&);

  Totals totals() const;
  const std::vector<PcCounts>& by_pc() const { return by_pc_; }

 private:
  // What a warp's access costs: sectors it touches, and the least that its distinct bytes need.
  struct Sectors {
    uint64_t touched, ideal;
  };

  PcCounts& at(uint32_t pc) {
    if (pc >= by_pc_.size()) grow(pc);
    return by_pc_[pc];
  }
  void grow(uint32_t pc);
  bool count_ascending(uint32_t lanes, const uint64_t* address, uint32_t num_bytes, SectorSet& seen, Sectors& sectors);
  Sectors count_scattered(uint32_t lanes, const uint64_t* address, uint32_t num_bytes, SectorSet& seen);

  std::vector<PcCounts> by_pc_;
  SectorSet read_, written_;
  Sectors global_[2] = {};  // [write]
  uint64_t local_bytes_[2] = {};
};

// Wavefronts of shared memory for one group of lanes that the hardware serves together: 32 lanes of up to 4 bytes, 16
// of 8 or 8 of 16. Equal words are broadcast; different words of one bank are served one after another.
uint32_t wavefronts_of_group(const uint32_t* address, int num_lanes, uint32_t lanes, uint32_t num_bytes);

// One launch as it is handed on.
struct LaunchRecord {
  std::string kernel;
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1};
  uint32_t static_smem = 0, dynamic_smem = 0;
  int registers = 0;
  Counters counters;
};

// The record as JSON: totals, classes, the lines that ran, and the estimates for every known GPU (estimate.h).
std::string to_json(const LaunchRecord&, const std::function<SourceLine(uint32_t pc)>& line_of);

}  // namespace emulator
