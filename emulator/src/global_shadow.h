// SPDX-License-Identifier: Apache-2.0
// The shadow of global memory in one launch: which blocks touched each byte, so that of two accesses of two blocks, one
// of them a plain write or a write against a plain read, the later is reported unless the program orders them.
//
// Unordered  A kernel without a release that reaches beyond its block orders nothing between blocks. A word then keeps
//            which block wrote it, which one read it, or that several did: eight bytes, and a fast path that compares
//            words by the vector.
// Ordered    In other kernels a word keeps its accesses one by one, each with its warp, lanes and time, until a later
//            access stands for it. Whether one happened before another is asked of block_order.h.
#pragma once

#include <cstdint>
#include <memory>

#include "shadow.h"

namespace emulator {

// An access to be checked. Of one warp: the lanes that access the same bytes together.
struct GlobalAccess {
  Access kind;  // kRead, kWrite; kAtomicRead, kAtomicWrite (also of an atomic that reads): never race with each other
  int64_t block;
  uint32_t warp = 0, lanes = 0;
  uint32_t id = 0;  // in the time of the block: SharedShadow::note()
  uint32_t pc = kUnknownPc;
};

// The access that came first.
struct GlobalConflict {
  static constexpr int64_t kSeveral = -1;
  uint64_t word;       // address of the word of 4 bytes in which both meet
  uint32_t bytes = 0;  // of the word: those in which they do
  Access kind;
  int64_t block;       // kSeveral: of the others, nothing is known either
  uint32_t lanes = 0;  // 0: not known, nor is warp
  uint32_t warp = 0;
  uint32_t pc = kUnknownPc;
};

// Whether what was done earlier happened before an access that is being checked.
class Happened {
 public:
  virtual bool before(const GlobalAccess& earlier) = 0;

 protected:
  ~Happened() = default;
};

class GlobalShadow {
 public:
  // `threads`: blocks run on several OS threads, each block on one at a time.
  static std::unique_ptr<GlobalShadow> unordered(bool threads);
  static std::unique_ptr<GlobalShadow> ordered(bool threads);
  virtual ~GlobalShadow() = default;
  // True: up to the end of conflict.word the access is done, and there it meets one that nothing orders before it. The
  // rest is to be asked for anew. Unordered shadows look at kind and block alone.
  virtual bool access(const GlobalAccess& access, uint64_t address, uint32_t num_bytes, Happened* happened,
                      GlobalConflict& conflict) = 0;
  // Nobody has touched these bytes: memory that is given anew.
  virtual void forget(uint64_t address, uint64_t num_bytes) = 0;
};

}  // namespace emulator
