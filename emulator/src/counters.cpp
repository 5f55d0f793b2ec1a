// SPDX-License-Identifier: Apache-2.0
// counters.cpp: sectors, bank conflicts and distinct bytes of a warp's accesses.

#include "counters.h"

#include <algorithm>

namespace emulator {
namespace {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kBankBytes = 4;
constexpr uint32_t kWavefrontBytes = 128;

constexpr std::array<const char*, kNumClasses> kClassNames = {
    "int_alu",     "int_mul",      "fma",         "fp_min_max_compare",
    "set_select",  "mufu",         "fp64",        "half",
    "convert",     "move",         "mma",         "matrix_load",
    "shared_load", "shared_store", "global_load", "global_store",
    "local",       "atomic",       "async_copy",  "async_control",
    "barrier",     "shuffle",      "vote",        "branch",
    "param",       "fence",        "other"};

// Whether all lanes access consecutive memory in their order.
template <class Address>
bool is_contiguous(const Address* address, uint32_t num_bytes) {
  Address different = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    different |= address[lane] ^ (address[0] + static_cast<Address>(lane) * num_bytes);
  }
  return different == 0;
}

// Distinct sectors of one warp's access with the bytes touched in each: open addressing, never more than half full.
class SectorTable {
 public:
  SectorTable() { bytes_.fill(0); }

  void add(uint64_t sector, uint32_t bytes) {
    size_t slot = (sector * 0x9e3779b97f4a7c15u) >> 57;
    while (bytes_[slot] != 0 && sectors_[slot] != sector) slot = (slot + 1) % kSlots;
    if (bytes_[slot] == 0) used_[num_used_++] = static_cast<uint8_t>(slot);
    sectors_[slot] = sector;
    bytes_[slot] |= bytes;
  }
  template <class Visit>
  void visit(Visit visit) const {
    for (int i = 0; i < num_used_; ++i) visit(sectors_[used_[i]], bytes_[used_[i]]);
  }

 private:
  static constexpr size_t kSlots = 128;  // 32 lanes of up to 32 bytes touch at most 64 sectors
  std::array<uint64_t, kSlots> sectors_;
  std::array<uint32_t, kSlots> bytes_;  // one bit a byte; 0: free
  std::array<uint8_t, 2 * kWarp> used_;
  int num_used_ = 0;
};

}  // namespace

const char* name_of(InstructionClass c) { return kClassNames.at(static_cast<size_t>(c)); }

void PcCounts::add(const PcCounts& other) {
  if (warps == 0) instruction_class = other.instruction_class;
  warps += other.warps;
  lanes += other.lanes;
  mma_flops += other.mma_flops;
  sectors += other.sectors;
  ideal_sectors += other.ideal_sectors;
  wavefronts += other.wavefronts;
  ideal_wavefronts += other.ideal_wavefronts;
}

// ---- SectorSet -----------------------------------------------------------------------------------------------------

// recent_ points into pages_: what has got other pages, or lost its own, begins without.
SectorSet::SectorSet(const SectorSet& other) : pages_(other.pages_) {}
SectorSet::SectorSet(SectorSet&& other) noexcept { *this = std::move(other); }

SectorSet& SectorSet::operator=(const SectorSet& other) {
  pages_ = other.pages_;
  recent_.fill({});
  return *this;
}

SectorSet& SectorSet::operator=(SectorSet&& other) noexcept {
  pages_ = std::move(other.pages_);
  other.pages_.clear();
  recent_.fill({});
  other.recent_.fill({});
  return *this;
}

SectorSet::Page& SectorSet::find_page(uint64_t index) {
  Page& page = pages_.try_emplace(index).first->second;  // a new page is zero
  recent_[index % kNumRecent] = {index, &page};
  return page;
}

void SectorSet::add_pages(uint64_t first_sector, uint64_t last_sector) {
  const uint64_t first = first_sector >> kPageShift, last = last_sector >> kPageShift;
  for (uint64_t index = first; index <= last; ++index) {
    mark(page(index), index == first ? first_sector & kPageMask : 0,
         index == last ? last_sector & kPageMask : kPageMask);
  }
}

void SectorSet::merge(const SectorSet& other) {
  for (const auto& [index, theirs] : other.pages_) {
    Page& ours = page(index);
    for (size_t word = 0; word < ours.size(); ++word) ours[word] |= theirs[word];
  }
}

uint64_t SectorSet::size() const {
  uint64_t count = 0;
  for (const auto& [index, page] : pages_) {
    for (const uint64_t word : page) count += static_cast<uint64_t>(std::popcount(word));
  }
  return count;
}

// ---- Global memory -------------------------------------------------------------------------------------------------

void Counters::global_access(uint32_t pc, uint32_t lanes, const uint64_t* address, uint32_t num_bytes, bool write) {
  if (lanes == 0 || num_bytes == 0) return;
  SectorSet& seen = write ? written_ : read_;
  Sectors sectors{};
  if (lanes == kAllLanes && is_contiguous(address, num_bytes)) {
    const uint64_t first = address[0] / kSectorBytes;
    const uint64_t last = (address[0] + uint64_t{kWarp} * num_bytes - 1) / kSectorBytes;
    seen.add(first, last);
    sectors = {last - first + 1, (uint64_t{kWarp} * num_bytes + kSectorBytes - 1) / kSectorBytes};
  } else if (!count_ascending(lanes, address, num_bytes, seen, sectors)) {
    sectors = count_scattered(lanes, address, num_bytes, seen);
  }
  PcCounts& counts = at(pc);
  counts.sectors += sectors.touched;
  counts.ideal_sectors += sectors.ideal;
  global_[write].touched += sectors.touched;
  global_[write].ideal += sectors.ideal;
}

// Lanes whose addresses never fall, as rows of a tile or a broadcast have them: runs of bytes, each after the last one.
// False where an address falls; `seen` has then got sectors that it gets anyway.
bool Counters::count_ascending(uint32_t lanes, const uint64_t* address, uint32_t num_bytes, SectorSet& seen,
                               Sectors& sectors) {
  uint64_t touched = 0, num_distinct = 0;
  uint64_t begin = address[std::countr_zero(lanes)], end = begin + num_bytes;  // of the current run
  uint64_t next_sector = 0;                                                    // those before it are counted
  auto close_run = [&] {
    const uint64_t first = begin / kSectorBytes, last = (end - 1) / kSectorBytes;
    seen.add(first, last);
    touched += last + 1 - std::max(first, next_sector);
    next_sector = last + 1;
    num_distinct += end - begin;
  };
  for (uint32_t rest = lanes & (lanes - 1); rest != 0; rest &= rest - 1) {
    const uint64_t at = address[std::countr_zero(rest)];
    if (at < begin) return false;
    if (at > end) {
      close_run();
      begin = at;
    }
    end = std::max(end, at + num_bytes);
  }
  close_run();
  sectors = {touched, (num_distinct + kSectorBytes - 1) / kSectorBytes};
  return true;
}

Counters::Sectors Counters::count_scattered(uint32_t lanes, const uint64_t* address, uint32_t num_bytes,
                                            SectorSet& seen) {
  if (num_bytes > kSectorBytes) {  // bulk copies: their lanes are taken apart, they do not overlap
    Sectors sum{};
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
      Sectors one{};
      count_ascending(rest & -rest, address, num_bytes, seen, one);
      sum.touched += one.touched;
      sum.ideal += one.ideal;
    }
    return sum;
  }
  SectorTable table;
  const uint32_t bytes = num_bytes == kSectorBytes ? ~0u : (1u << num_bytes) - 1;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const uint64_t at = address[std::countr_zero(rest)];
    const uint32_t offset = at % kSectorBytes;
    table.add(at / kSectorBytes, bytes << offset);
    if (offset + num_bytes > kSectorBytes) table.add(at / kSectorBytes + 1, bytes >> (kSectorBytes - offset));
  }
  uint64_t touched = 0, num_distinct = 0;
  table.visit([&](uint64_t sector, uint32_t mask) {
    seen.add(sector, sector);
    ++touched;
    num_distinct += static_cast<uint64_t>(std::popcount(mask));
  });
  return {touched, (num_distinct + kSectorBytes - 1) / kSectorBytes};
}

// ---- Shared memory -------------------------------------------------------------------------------------------------

uint32_t wavefronts_of_group(const uint32_t* address, int num_lanes, uint32_t lanes, uint32_t num_bytes) {
  // An access fills a slot of the 128 bytes that all banks give at once; two in one slot of different lines conflict.
  const uint32_t slot_bytes = std::max(num_bytes, kBankBytes), num_slots = kWavefrontBytes / slot_bytes;
  const int shift = std::countr_zero(slot_bytes);
  uint32_t line[kWarp], taken = 0, conflicts = 0;
  for (int lane = 0; lane < num_lanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const uint32_t slot = address[lane] >> shift & (num_slots - 1), in_line = address[lane] / kWavefrontBytes;
    const uint32_t bit = 1u << slot;
    if (!(taken & bit)) line[slot] = in_line;
    conflicts |= line[slot] ^ in_line;
    taken |= bit;
  }
  if (conflicts == 0) return taken != 0;

  uint32_t lines[kWarp][kWarp], num_lines[kWarp] = {}, most = 0;  // [slot][distinct line]
  for (int lane = 0; lane < num_lanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const uint32_t slot = address[lane] >> shift & (num_slots - 1), in_line = address[lane] / kWavefrontBytes;
    uint32_t* const known = lines[slot];
    if (std::find(known, known + num_lines[slot], in_line) != known + num_lines[slot]) continue;
    known[num_lines[slot]++] = in_line;
    most = std::max(most, num_lines[slot]);
  }
  return most;
}

void Counters::shared_access(uint32_t pc, uint32_t lanes, const uint32_t* address, uint32_t num_bytes, bool) {
  if (lanes == 0 || num_bytes == 0) return;
  uint64_t wavefronts = 0, ideal = 0;
  if (num_bytes > 16) {  // bulk copies, by whole lines
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
      wavefronts += (num_bytes + kWavefrontBytes - 1) / kWavefrontBytes;
    }
    ideal = wavefronts;
  } else {
    const uint32_t slot_bytes = std::bit_ceil(std::max(num_bytes, kBankBytes));
    const int group = static_cast<int>(kWavefrontBytes / slot_bytes);
    if (lanes == kAllLanes && is_contiguous(address, slot_bytes)) {
      wavefronts = ideal = static_cast<uint64_t>(kWarp / group);
    } else {
      for (int first = 0; first < kWarp; first += group) {
        const uint32_t of_group = lanes >> first & (group == kWarp ? kAllLanes : (1u << group) - 1);
        wavefronts += wavefronts_of_group(address + first, group, of_group, slot_bytes);
        ideal += of_group != 0;
      }
    }
  }
  PcCounts& counts = at(pc);
  counts.wavefronts += wavefronts;
  counts.ideal_wavefronts += ideal;
}

void Counters::matrix_access(uint32_t pc, int num_matrices, const uint32_t* row_address, bool) {
  constexpr int kRows = 8;
  constexpr uint32_t kRowBytes = 16;
  uint64_t wavefronts = 0;
  for (int matrix = 0; matrix < num_matrices; ++matrix) {
    wavefronts += wavefronts_of_group(row_address + matrix * kRows, kRows, (1u << kRows) - 1, kRowBytes);
  }
  PcCounts& counts = at(pc);
  counts.wavefronts += wavefronts;
  counts.ideal_wavefronts += static_cast<uint64_t>(num_matrices);
}

void Counters::local_access(uint32_t, uint32_t lanes, uint32_t num_bytes, bool write) {
  local_bytes_[write] += static_cast<uint64_t>(std::popcount(lanes)) * num_bytes;
}

// ---- The whole launch ----------------------------------------------------------------------------------------------

void Counters::grow(uint32_t pc) { by_pc_.resize(std::max<size_t>(pc + size_t{1}, 2 * by_pc_.size())); }

void Counters::merge(const Counters& other) {
  if (!other.by_pc_.empty()) at(static_cast<uint32_t>(other.by_pc_.size() - 1));
  for (size_t pc = 0; pc < other.by_pc_.size(); ++pc) by_pc_[pc].add(other.by_pc_[pc]);
  read_.merge(other.read_);
  written_.merge(other.written_);
  for (int write = 0; write < 2; ++write) {
    global_[write].touched += other.global_[write].touched;
    global_[write].ideal += other.global_[write].ideal;
    local_bytes_[write] += other.local_bytes_[write];
  }
}

Totals Counters::totals() const {
  Totals sum;
  for (const PcCounts& counts : by_pc_) {
    sum.warp_instructions += counts.warps;
    sum.issue_slots += takes_issue_slot(counts.instruction_class) ? counts.warps : 0;
    sum.lane_instructions += counts.lanes;
    sum.mma_flops += counts.mma_flops;
    sum.wavefronts += counts.wavefronts;
    sum.ideal_wavefronts += counts.ideal_wavefronts;
    sum.warps_of_class[static_cast<size_t>(counts.instruction_class)] += counts.warps;
  }
  sum.sectors_read = global_[0].touched;
  sum.ideal_sectors_read = global_[0].ideal;
  sum.sectors_written = global_[1].touched;
  sum.ideal_sectors_written = global_[1].ideal;
  sum.distinct_bytes_read = read_.size() * kSectorBytes;
  sum.distinct_bytes_written = written_.size() * kSectorBytes;
  sum.local_bytes_read = local_bytes_[0];
  sum.local_bytes_written = local_bytes_[1];
  return sum;
}

}  // namespace emulator
