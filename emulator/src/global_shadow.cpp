// SPDX-License-Identifier: Apache-2.0
// global_shadow.cpp: what every access to global memory of a launch of several blocks is checked against.
#include "global_shadow.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <bitset>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace emulator {
namespace {

constexpr uint64_t kPageBytes = 4096;
constexpr uint32_t kPageWords = kPageBytes / 4;
constexpr int kNumShards = 16;

// The kinds of accesses, and which of them an access may meet unordered only as a race.
enum Kind : uint32_t { kPlainRead, kPlainWrite, kStrongRead, kStrongWrite, kNumKinds };
constexpr uint32_t kMeets[kNumKinds] = {1u << kPlainWrite | 1u << kStrongWrite, 15, 1u << kPlainWrite,
                                        1u << kPlainRead | 1u << kPlainWrite};
constexpr bool is_strong(Kind kind) { return kind == kStrongRead || kind == kStrongWrite; }
constexpr Access kAccessOf[kNumKinds] = {Access::kRead, Access::kWrite, Access::kAtomicRead, Access::kAtomicWrite};

constexpr Kind kind_of(Access access) {
  switch (access) {
    case Access::kRead: return kPlainRead;
    case Access::kWrite: return kPlainWrite;
    case Access::kAtomicRead: return kStrongRead;
    default: return kStrongWrite;
  }
}

std::atomic<uint64_t> last_identity{0};

// Pages by address, found by each thread's own cache mostly.
template <typename Page>
class Pages {
 public:
  Page& find(uint64_t index) {
    Cache& cache = cache_;
    if (cache.identity != identity_) {
      cache = Cache();
      cache.identity = identity_;
    }
    const uint64_t slot = index % Cache::kEntries;
    if (cache.page[slot] == nullptr || cache.index[slot] != index) {
      Shard& shard = shards_[index % kNumShards];
      std::lock_guard lock(shard.mutex);
      std::unique_ptr<Page>& page = shard.pages[index];
      if (!page) page = std::make_unique<Page>();
      cache.page[slot] = page.get();
      cache.index[slot] = index;
    }
    return *cache.page[slot];
  }
  Page* look_up(uint64_t index) {
    Shard& shard = shards_[index % kNumShards];
    std::lock_guard lock(shard.mutex);
    const auto page = shard.pages.find(index);
    return page == shard.pages.end() ? nullptr : page->second.get();
  }

 private:
  struct Shard {
    std::mutex mutex;
    std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;
  };
  struct Cache {
    static constexpr uint64_t kEntries = 64;
    uint64_t identity = 0;
    uint64_t index[kEntries] = {};
    Page* page[kEntries] = {};
  };
  static inline thread_local constinit Cache cache_;
  const uint64_t identity_ = ++last_identity;  // unique among all objects
  Shard shards_[kNumShards];
};

// Held while a page is looked at, when there are several threads.
class PageLock {
 public:
  PageLock(std::atomic_flag& flag, bool needed) : flag_(needed ? &flag : nullptr) {
    while (flag_ != nullptr && flag_->test_and_set(std::memory_order_acquire)) {
    }
  }
  ~PageLock() {
    if (flag_ != nullptr) flag_->clear(std::memory_order_release);
  }
  PageLock(const PageLock&) = delete;
  PageLock& operator=(const PageLock&) = delete;

 private:
  std::atomic_flag* flag_;
};

// f(page index, first word in it, words, the bytes of each) of [address, address + num_bytes), in order, until one
// returns true: runs of whole words, and words of which some bytes are left out by themselves.
template <typename F>
bool for_words(uint64_t address, uint64_t num_bytes, F&& f) {
  const uint64_t end = address + num_bytes;
  while (address < end) {
    const uint64_t index = address / kPageBytes, word = address & ~uint64_t{3};
    const uint32_t at = static_cast<uint32_t>(word % kPageBytes / 4);
    uint64_t count = 1;
    uint32_t bytes = 15;
    if (word < address || word + 4 > end) {
      bytes = 15u << (address - word) & 15u;
      if (word + 4 > end) bytes &= 15u >> (word + 4 - end);
    } else {
      count = std::min<uint64_t>((end - word) / 4, kPageWords - at);
    }
    if (f(index, at, static_cast<uint32_t>(count), bytes)) return true;
    address = word + 4 * count;
  }
  return false;
}

// ---- nothing is ordered ---------------------------------------------------------------------------------------------

// Of each kind: the block + 1 (28 bits) and the bytes (4); 0: nobody. kSeveral: several blocks, all four bytes. kSplit:
// the bytes are kept one by one, each like a word of which only bit 0 is used. Blocks that are equal in 28 bits are not
// told apart.
constexpr uint32_t kSeveral = ~0u, kSplit = ~0u << 4;
constexpr uint32_t tag_of(int64_t block) { return static_cast<uint32_t>(1 + block % 0xffffff0) << 4; }
constexpr bool is_of(uint32_t cell, uint32_t tag) { return (cell & ~15u) == tag; }

class UnorderedShadow final : public GlobalShadow {
 public:
  explicit UnorderedShadow(bool threads) : threads_(threads) {}

  bool access(const GlobalAccess& access, uint64_t address, uint32_t num_bytes, Happened*,
              GlobalConflict& conflict) override {
    switch (kind_of(access.kind)) {
      case kPlainRead: return access_range<kPlainRead>(access, address, num_bytes, conflict);
      case kPlainWrite: return access_range<kPlainWrite>(access, address, num_bytes, conflict);
      case kStrongRead: return access_range<kStrongRead>(access, address, num_bytes, conflict);
      default: return access_range<kStrongWrite>(access, address, num_bytes, conflict);
    }
  }

  void forget(uint64_t address, uint64_t num_bytes) override {
    for_words(address, num_bytes, [&](uint64_t index, uint32_t at, uint32_t count, uint32_t) {
      Page* const page = pages_.look_up(index);
      if (page == nullptr) return false;
      PageLock lock(page->lock, threads_);
      for (uint32_t i = at; i < at + count; i++) {
        page->plain[kPlainRead][i] = page->plain[kPlainWrite][i] = 0;
        if (page->strong) (*page->strong)[0][i] = (*page->strong)[1][i] = 0;
        page->split.erase(i);
      }
      return false;
    });
  }

 private:
  using Row = uint32_t[kPageWords];
  using Bytes = std::array<std::array<uint32_t, 4>, kNumKinds>;  // [kind][byte]
  struct Page {
    std::atomic_flag lock;
    Row plain[2] = {};                           // read, written
    std::unique_ptr<std::array<Row, 2>> strong;  // likewise by atomics; where there were any
    std::unordered_map<uint32_t, Bytes> split;   // by word
  };

  template <Kind kKind>
  bool access_range(const GlobalAccess& access, uint64_t address, uint32_t num_bytes, GlobalConflict& conflict) {
    const uint32_t tag = tag_of(access.block);
    return for_words(address, num_bytes, [&](uint64_t index, uint32_t at, uint32_t count, uint32_t bytes) {
      Page& page = pages_.find(index);
      PageLock lock(page.lock, threads_);
      if (bytes == 15 && access_clean<kKind>(page, at, count, tag | 15)) return false;
      for (uint32_t i = at; i < at + count; i++) {
        conflict.word = index * kPageBytes + 4 * uint64_t{i};
        if (access_word(page, i, kKind, bytes, tag, conflict)) return true;
      }
      return false;
    });
  }

  // Whole words. True: no conflict, all is recorded. False: some want a closer look, the others are recorded.
  template <Kind kKind>
  static bool access_clean(Page& page, uint32_t at, uint32_t count, uint32_t mine) {
    if constexpr (kKind == kStrongRead || kKind == kStrongWrite) return false;
    uint32_t* const reads = &page.plain[kPlainRead][at];
    uint32_t* const writes = &page.plain[kPlainWrite][at];
    uint32_t closer = 0;
    if (page.strong)
      for (uint32_t k = kKind == kPlainRead; k < 2; k++)
        for (uint32_t i = 0; i < count; i++) closer |= (*page.strong)[k][at + i];
    if (closer != 0) return false;
    if constexpr (kKind == kPlainRead) {
      for (uint32_t i = 0; i < count; i++) {
        const uint32_t read = reads[i], write = writes[i];
        const uint32_t first = (read == 0) | ((read | 15) == mine), whole = (read & 15) == 15;
        const uint32_t good = ((write == 0) | ((write | 15) == mine)) & (first | whole);
        reads[i] = good ? (first ? mine : kSeveral) : read;
        closer |= good ^ 1;
      }
    } else {
      for (uint32_t i = 0; i < count; i++) {
        const uint32_t read = reads[i], write = writes[i];
        const uint32_t good = ((write == 0) | ((write | 15) == mine)) & ((read == 0) | ((read | 15) == mine));
        writes[i] = good ? mine : write;
        closer |= good ^ 1;
      }
    }
    return closer == 0;
  }

  bool access_word(Page& page, uint32_t at, Kind kind, uint32_t bytes, uint32_t tag, GlobalConflict& conflict) {
    if (!page.strong && (kind == kStrongRead || kind == kStrongWrite)) {
      page.strong = std::make_unique<std::array<Row, 2>>();
      for (const auto& [word, cells] : page.split) (*page.strong)[0][word] = (*page.strong)[1][word] = kSplit;
    }
    uint32_t none[2] = {};
    uint32_t* cells[kNumKinds] = {&page.plain[0][at], &page.plain[1][at],
                                  page.strong ? &(*page.strong)[0][at] : &none[0],
                                  page.strong ? &(*page.strong)[1][at] : &none[1]};
    bool found = false;
    conflict.bytes = 0;
    if (*cells[kPlainRead] != kSplit) {
      if (access_cell(cells, kind, bytes, 15, tag, 0, conflict, found)) return found;
      Bytes& by_byte = page.split[at];
      for (uint32_t k = 0; k < kNumKinds; k++) {
        for (uint32_t i = 0; i < 4; i++)
          by_byte[k][i] = *cells[k] == kSeveral ? kSeveral : *cells[k] >> i & 1 ? (*cells[k] & ~15u) | 1 : 0;
        *cells[k] = kSplit;
      }
    }
    Bytes& by_byte = page.split[at];
    for (uint32_t rest = bytes; rest; rest &= rest - 1) {
      const uint32_t i = static_cast<uint32_t>(std::countr_zero(rest));
      for (uint32_t k = 0; k < kNumKinds; k++) cells[k] = &by_byte[k][i];
      access_cell(cells, kind, 1, 1, tag, i, conflict, found);
    }
    return found;
  }

  // `all`: the bits of a cell, which are the word's from `shift` on. False: what is known of the word must be split
  // first, and nothing has been recorded.
  static bool access_cell(uint32_t* const* cells, Kind kind, uint32_t bytes, uint32_t all, uint32_t tag, uint32_t shift,
                          GlobalConflict& conflict, bool& found) {
    for (uint32_t k = 0; k < kNumKinds; k++) {
      const uint32_t earlier = *cells[k];
      if (!(kMeets[kind] >> k & 1) || (earlier & bytes) == 0 || is_of(earlier, tag)) continue;
      found = true;
      conflict.bytes |= (earlier & bytes) << shift;
      conflict.kind = kAccessOf[k];
      conflict.block = earlier == kSeveral ? GlobalConflict::kSeveral : static_cast<int64_t>(earlier >> 4) - 1;
      conflict.lanes = 0;
      conflict.pc = kUnknownPc;
    }
    uint32_t& cell = *cells[kind];
    if (cell == 0) {
      cell = tag | bytes;
    } else if (is_of(cell, tag)) {
      cell |= bytes;
    } else if (kind == kPlainWrite) {  // the later one stands for it
      if ((cell & 15 & ~bytes) != 0) return false;
      cell = tag | bytes;
    } else if (cell != kSeveral) {
      if ((bytes & cell & 15) != all) return false;
      cell = kSeveral;
    }
    return true;
  }

  const bool threads_;
  Pages<Page> pages_;
};

// ---- release and acquire order blocks -------------------------------------------------------------------------------

constexpr uint32_t kMaxEntries = 16;  // of a word; more are forgotten, the oldest first

class OrderedShadow final : public GlobalShadow {
 public:
  explicit OrderedShadow(bool threads) : threads_(threads) {}

  bool access(const GlobalAccess& access, uint64_t address, uint32_t num_bytes, Happened* happened,
              GlobalConflict& conflict) override {
    const Kind kind = kind_of(access.kind);
    return for_words(address, num_bytes, [&](uint64_t index, uint32_t at, uint32_t count, uint32_t bytes) {
      Page& page = pages_.find(index);
      PageLock lock(page.lock, threads_);
      for (uint32_t i = at; i < at + count; i++) {
        conflict.word = index * kPageBytes + 4 * uint64_t{i};
        if (access_word(page, i, kind, bytes, access, *happened, conflict)) return true;
      }
      return false;
    });
  }

  void forget(uint64_t address, uint64_t num_bytes) override {
    for_words(address, num_bytes, [&](uint64_t index, uint32_t at, uint32_t count, uint32_t) {
      Page* const page = pages_.look_up(index);
      if (page == nullptr) return false;
      PageLock lock(page->lock, threads_);
      std::fill_n(page->count + at, count, uint8_t{0});
      for (uint32_t i = at; i < at + count; i++) page->forgotten.reset(i);
      return false;
    });
  }

 private:
  struct Entry {
    uint32_t who;  // block and warp (5 bits)
    uint32_t id, lanes;
    uint32_t what;  // pc (26 bits), kind (2), bytes (4)
    uint32_t bytes() const { return what & 15; }
    Kind kind() const { return static_cast<Kind>(what >> 4 & 3); }
    GlobalAccess access() const {
      return {kAccessOf[kind()], static_cast<int64_t>(who >> 5), who & 31, lanes, id, what >> 6};
    }
  };
  using Slots = std::array<Entry, kPageWords>;
  struct Page {
    std::atomic_flag lock;
    uint8_t count[kPageWords] = {};
    std::bitset<kPageWords> forgotten;          // words that more than kMaxEntries strong accesses met
    std::vector<std::unique_ptr<Slots>> slots;  // slots[0 ... count - 1][word], in the order of their time
    Entry& at(uint32_t slot, uint32_t word) { return (*slots[slot])[word]; }
  };

  // What may meet `earlier` as a race would meet `later` as one.
  static bool stands_for(Kind later, Kind earlier) { return (kMeets[earlier] & ~kMeets[later]) == 0; }

  // After the strong write in this slot the block looked at the word itself, by a strong access that happened before: as
  // the last of all that count does, before it sets the counter back. With several threads an access is recorded and
  // performed in two steps, so the later of two values may have been recorded first, and forgotten by now.
  bool observed(Page& page, uint32_t word, uint32_t slot, uint32_t num, uint32_t who, Happened& happened) const {
    if (threads_ && page.forgotten[word]) return true;
    for (uint32_t i = threads_ ? 0 : slot + 1; i < num; i++) {
      const Entry& e = page.at(i, word);
      if (is_strong(e.kind()) && e.who >> 5 == who >> 5 && happened.before(e.access())) return true;
    }
    return false;
  }

  bool access_word(Page& page, uint32_t word, Kind kind, uint32_t bytes, const GlobalAccess& access, Happened& happened,
                   GlobalConflict& conflict) const {
    const uint32_t who = static_cast<uint32_t>(access.block << 5) | access.warp, num = page.count[word];
    Entry mine{who, access.id, access.lanes, access.pc << 6 | static_cast<uint32_t>(kind) << 4 | bytes};
    // Again, with nothing between that would have removed it. A strong access must also stay behind those it observes.
    for (uint32_t i = num; i-- > (is_strong(kind) ? std::max(num, 1u) - 1 : 0);) {
      const Entry& e = page.at(i, word);
      if (e.who == who && e.id == mine.id && e.kind() == kind && (bytes & ~e.bytes()) == 0 &&
          (mine.lanes & ~e.lanes) == 0)
        return false;
    }
    uint32_t kept = 0;
    bool found = false;
    conflict.bytes = 0;
    for (uint32_t i = 0; i < num; i++) {
      const Entry e = page.at(i, word);
      bool drop = (e.bytes() & ~bytes) == 0 && stands_for(kind, e.kind());
      if (e.who >> 5 == who >> 5) {
        if (e.who == who && e.id == mine.id && e.kind() == kind && e.bytes() == bytes) {
          mine.lanes |= e.lanes;
        } else if (e.who == who && (e.lanes & ~mine.lanes) == 0) {
          // in the order of the program
        } else {
          drop = drop && happened.before(e.access());
        }
      } else if ((kMeets[kind] >> e.kind() & 1) != 0 && (e.bytes() & bytes) != 0) {
        if (!happened.before(e.access()) &&
            !(e.kind() == kStrongWrite && observed(page, word, i, num, who, happened))) {
          if (!found) {
            const GlobalAccess earlier = e.access();
            conflict.kind = earlier.kind;
            conflict.block = earlier.block;
            conflict.warp = earlier.warp;
            conflict.lanes = earlier.lanes;
            conflict.pc = earlier.pc;
          }
          conflict.bytes |= e.bytes() & bytes;
          found = true;
        }
      } else {
        drop = drop && happened.before(e.access());
      }
      if (!drop) page.at(kept++, word) = e;
    }
    if (kept == 0) page.forgotten.reset(word);
    if (kept == kMaxEntries) {
      if (is_strong(page.at(0, word).kind())) page.forgotten.set(word);
      for (uint32_t i = 1; i < kept; i++) page.at(i - 1, word) = page.at(i, word);
      kept--;
    }
    if (kept == page.slots.size()) page.slots.push_back(std::make_unique_for_overwrite<Slots>());
    page.at(kept, word) = mine;
    page.count[word] = static_cast<uint8_t>(kept + 1);
    return found;
  }

  const bool threads_;
  Pages<Page> pages_;
};

}  // namespace

std::unique_ptr<GlobalShadow> GlobalShadow::unordered(bool threads) {
  return std::make_unique<UnorderedShadow>(threads);
}
std::unique_ptr<GlobalShadow> GlobalShadow::ordered(bool threads) { return std::make_unique<OrderedShadow>(threads); }

}  // namespace emulator
