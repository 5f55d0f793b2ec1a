// SPDX-License-Identifier: Apache-2.0
// What machine.h is made of: the windows of generic addresses, special registers, and the frames and fragments of a
// warp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "program.h"

namespace emulator {

struct CallSite;

constexpr uint64_t kSharedWindow = uint64_t{1} << 56;  // generic address of shared memory: window + offset
constexpr uint64_t kLocalWindow = uint64_t{2} << 56;
constexpr uint64_t kWindowMask = uint64_t{0xff} << 56;
inline Space space_of(uint64_t generic) {
  switch (generic >> 56) {
    case 1: return Space::kShared;
    case 2: return Space::kLocal;
    default: return Space::kGlobal;
  }
}
inline uint32_t window_offset(uint64_t generic) { return static_cast<uint32_t>(generic); }  // check the rest is zero

// What a family keeps with a block or a warp (mbarriers, copies in flight); made by the family, gone with the block.
struct Extension {
  virtual ~Extension() = default;
};

// Lane arrays of special registers: Operand::at(kSpecials, index * kSpecialBytes), u32 lanes (u64 for the last ones).
constexpr uint32_t kSpecialBytes = 256;
enum class Special : uint8_t {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneid,
  kWarpid,
  kNwarpid,
  kSmid,
  kNsmid,
  kLanemaskEq,
  kLanemaskLe,
  kLanemaskLt,
  kLanemaskGe,
  kLanemaskGt,
  kDynamicSmem,
  kTotalSmem,
  kWorkspaceHigh,
  kWorkspaceLow,
  kZero,
  kOne,
  kGridid /* u64 */,
  kParamBase /* u64: host address of the parameters */,
  kCount
};

// ---- Divergence
// ------------------------------------------------------------------------------------------------------ An activation
// of a function: its registers and where its local memory begins.
struct Frame {
  const Code* code = nullptr;
  std::byte* registers = nullptr;
  std::unique_ptr<std::byte[]> storage;
  size_t capacity = 0;
  std::vector<uint32_t> written;  // [tracked register]: lanes that wrote it
  uint32_t local_base = 0;
  uint32_t local_top = 0;  // above it: callees and alloca
  int fragments = 0;       // that point here
};

// Lanes of a warp that stand at one pc. A branch that diverges suspends its fragment until the children have come to
// the branch's post-dominator, a call until the callee's lanes have returned. So the fragments of a warp are a forest,
// whose leaves run. Invariant: the lanes of live leaves and the `arrived` of suspended ones are disjoint.
struct Fragment {
  enum class State : uint8_t { kReady, kSuspended, kCollective, kBarrier };
  Frame* frame = nullptr;
  Fragment* parent = nullptr;
  uint32_t pc = 0;                         // of a suspended one: where it goes on
  uint32_t lanes = 0;                      // of a leaf
  uint32_t reconverge = kNoReconvergence;  // where these lanes join the parent
  uint32_t arrived = 0;                    // of a suspended one: lanes that children brought
  int children = 0;
  State state = State::kReady;
  const CallSite* call = nullptr;  // suspended by a call: where results go
  uint32_t participating = 0;      // lanes that wait at a collective or barrier (guard applied)
  uint32_t exited_before = 0;      // lanes that had exited when it came there
  bool forced = false;             // the collective goes ahead without the lanes it waits for
  bool released = false;           // its lanes went past a post-dominator without their siblings
  bool passed = false;             // the barrier it stands at has completed
  int barrier = -1;
  uint32_t barrier_true = 0, barrier_threads = 0;  // barrier.red: the outcome
  const char* waits_for = nullptr;                 // for reports; set by retry and spin
  bool spun = false;                               // it has tried to wait for its own block since it slept
  uint64_t last_arrival = 0;                       // of a suspended one: instruction count of the warp
};

}  // namespace emulator
