// SPDX-License-Identifier: Apache-2.0
// What executes: a launch, its blocks in flight, their warps, and in a warp the fragments into which divergence splits it.
//
// An execute function sees one Warp, positioned at one Instruction with the lanes active() (never none). It reads and
// writes lane arrays, and may do nothing else to the outside than what Warp offers:
//   values      warp.lanes<uint32_t>(in.operands[1])[lane]; warp.mask(op) of predicates; warp.write(...), warp.set_mask(...)
//   faults      warp.fault(Fault::kRace, in, lane, [&] { return std::string("..."); }); the text is made only the first time
//   end         warp.end_launch() after the fault, when nothing sensible can follow (wild access, trap)
//   waiting     warp.retry(in, "mbarrier.wait") and return: not done, executed again when its turn comes;
//               warp.spin(in, "mbarrier.try_wait"): done, but it found nothing, so others should run before the next try;
//               warp.block().note_progress() when something that others may wait for has changed
//   collectives if (!warp.collective(in, mask)) return;   see there
//   memory      warp.block().shared(), warp.local(lane), params(); shadow(), block_writes(), counters() may be null: test
// Bounds and alignment are checked always (the emulator must not crash), everything else only if the object is there.
#pragma once

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "counters.h"
#include "emulator.h"
#include "memory.h"
#include "program.h"
#include "report.h"
#include "shadow.h"

namespace emulator {

class Block;
class LaunchState;
class Warp;

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
  kTidX, kTidY, kTidZ, kNtidX, kNtidY, kNtidZ, kCtaidX, kCtaidY, kCtaidZ, kNctaidX, kNctaidY, kNctaidZ, kLaneid, kWarpid,
  kNwarpid, kSmid, kNsmid, kLanemaskEq, kLanemaskLe, kLanemaskLt, kLanemaskGe, kLanemaskGt, kDynamicSmem, kTotalSmem,
  kZero, kOne, kGridid /* u64 */, kParamBase /* u64: host address of the parameters */, kCount
};

// ---- Divergence ------------------------------------------------------------------------------------------------------
// An activation of a function: its registers and where its local memory begins.
struct Frame {
  const Code* code = nullptr;
  std::byte* registers = nullptr;
  std::unique_ptr<std::byte[]> storage;
  size_t capacity = 0;
  std::vector<uint32_t> written;  // [tracked register]: lanes that wrote it
  uint32_t local_base = 0;
  uint32_t local_top = 0;         // above it: callees and alloca
  int fragments = 0;              // that point here
};

// Lanes of a warp that stand at one pc. A branch that diverges suspends its fragment until the children have come to the
// branch's post-dominator, a call until the callee's lanes have returned. So the fragments of a warp are a forest, whose
// leaves run. Invariant: the lanes of live leaves and the `arrived` of suspended ones are disjoint.
struct Fragment {
  enum class State : uint8_t { kReady, kSuspended, kCollective, kBarrier };
  Frame* frame = nullptr;
  Fragment* parent = nullptr;
  uint32_t pc = 0;
  uint32_t lanes = 0;
  uint32_t reconverge = kNoReconvergence;  // where these lanes join the parent
  uint32_t arrived = 0;                    // of a suspended one: lanes that children brought
  int children = 0;
  State state = State::kReady;
  bool is_call = false;                    // suspended by a call: results are copied when the callee's lanes return
  bool forced = false;                     // a collective that goes ahead without the lanes it waits for
  uint32_t passed = 0;                     // lanes that have been through the barrier this fragment stands at
  int barrier = -1;
  const char* waits_for = nullptr;         // for reports; set by retry and spin
  uint64_t suspended_at = 0;               // instruction count of the warp, for letting arrived lanes go on
};

class Warp {
 public:
  // ---- values ----
  template <typename T>
  T* lanes(Operand operand) const {
    return reinterpret_cast<T*>(banks_[operand.bank()] + operand.offset());
  }
  // A predicate operand as a mask of lanes, its negation applied. Only bits of active() mean something.
  uint32_t mask(Operand operand) const {
    uint32_t value = *reinterpret_cast<const uint32_t*>(banks_[operand.bank()] + operand.offset());
    return operand.negated() ? ~value : value;
  }
  // Sets the active lanes of a predicate.
  void set_mask(Operand operand, uint32_t value) {
    uint32_t& old = *reinterpret_cast<uint32_t*>(banks_[operand.bank()] + operand.offset());
    old = (old & ~active_) | (value & active_);
  }
  uint32_t active() const { return active_; }
  bool full() const { return active_ == kAllLanes; }
  // lanes<D>(to)[i] = value(i) for the active lanes. `value` must be pure: a full warp is one loop, which vectorises.
  template <typename D, typename F>
  void write(Operand to, F&& value) {
    D* out = lanes<D>(to);
    if (full()) {
#pragma GCC ivdep
      for (int i = 0; i < kWarpLanes; i++) out[i] = value(i);
    } else {
      for (uint32_t rest = active_; rest; rest &= rest - 1) {
        int i = std::countr_zero(rest);
        out[i] = value(i);
      }
    }
  }
  // f(lane) for each active lane, in order.
  template <typename F>
  void for_each(F&& f) const {
    for (uint32_t rest = active_; rest; rest &= rest - 1) f(std::countr_zero(rest));
  }
  // Predicate: bit i = value(i) != 0.
  template <typename F>
  void write_mask(Operand to, F&& value) {
    uint32_t bits = 0;
    for (int i = 0; i < kWarpLanes; i++) bits |= static_cast<uint32_t>(value(i) ? 1 : 0) << i;
    set_mask(to, bits);
  }

  // ---- who ----
  Block& block() const { return *block_; }
  int index() const { return index_; }             // in the block
  uint32_t exited() const { return exited_; }      // lanes that ended, or that the block never had
  int thread(int lane) const { return index_ * kWarpLanes + lane; }  // linear in the block

  // ---- faults and waiting; see the head of this file ----
  template <typename Text>
  void fault(Fault fault, const Instruction& in, int lane, Text&& text) {
    if (!again(fault, in)) add_report(fault, in, lane, text());
  }
  void end_launch();
  void retry(const Instruction& in, const char* what);
  void spin(const Instruction& in, const char* what);
  void yield();  // done; others of the block run before this goes on

  // True: go on, with active() now all lanes that take part (other fragments at this instruction with them); one
  // execution serves all. False: return at once, the fragment waits. `mask` [32]: for each active lane the lanes it
  // names; those that have exited before need not come. Waiting for lanes that can never come, and lanes that do not
  // name themselves, are reported by this function (kCollective), and it then goes on with the lanes that are there.
  // aligned instructions (mma, ldmatrix) pass collective_all(): every lane that has not exited.
  bool collective(const Instruction& in, const uint32_t* mask);
  bool collective_all(const Instruction& in);
  // After collective(): f(mask, group) once for each distinct mask of active lanes; group: those active that name it.
  template <typename F>
  void for_each_group(const uint32_t* mask, F&& f) {
    for (uint32_t rest = active_; rest;) {
      uint32_t named = mask[std::countr_zero(rest)], group = 0;
      for (uint32_t r = rest; r; r &= r - 1)
        if (mask[std::countr_zero(r)] == named) group |= r & (0 - r);
      rest &= ~group;
      f(named, group);
    }
  }

  // ---- memory ----
  std::byte* local(int lane) const { return local_ + static_cast<size_t>(lane) * local_stride_; }
  uint32_t local_bytes() const { return local_stride_; }  // accessible: local(lane)[0 ... local_bytes() - 1]
  Counters* counters() const { return counters_; }        // null when off
  std::unique_ptr<Extension> async;                       // of execute_async.cpp: copies in flight of this warp

  // ---- for the scheduler and the control family ----
  enum class Event : uint8_t { kNone, kYield, kRetry, kSwitch, kStop };
  void start(Block& block, int index, uint32_t exited);
  // Runs up to `quantum` instructions. False: nothing could run.
  bool run(int quantum);
  bool done() const { return fragments_.empty(); }
  void branch(const Instruction& in, uint32_t taken, uint32_t target);            // lanes of active() that jump
  void branch_many(const Instruction& in, const uint32_t* target /* [32] */);     // brx.idx
  void call(const Instruction& in, const Code& callee, uint32_t lanes);
  void return_from_call(uint32_t lanes);
  void exit_lanes(uint32_t lanes);
  // Lets lanes that wait at a post-dominator go on without the others. True when there were any.
  bool release_arrived(bool only_old);
  // When no warp of the block can run: collectives that wait go ahead, with a report. True when there were any.
  bool force_collectives();
  const std::vector<Fragment*>& fragments() const { return fragments_; }
  Fragment* current() const { return current_; }
  void wait_at_barrier(int barrier);
  uint64_t executed() const { return executed_; }
  uint32_t grow_local(uint32_t top);  // makes local memory hold `top` bytes a lane; false: more than a stack may have
  void set_event(Event event) { event_ = event; }
  Frame& frame() const { return *current_->frame; }
  std::string describe_waits() const;
  void release_extension() { async.reset(); }

 private:
  friend class Block;
  friend class LaunchState;
  bool again(Fault fault, const Instruction& in);
  void add_report(Fault fault, const Instruction& in, int lane, std::string text);
  bool check_reads(const Instruction& in);
  void track_writes(const Instruction& in);
  void enter(Fragment* fragment);
  void arrive(Fragment* fragment);
  void finish_child(Fragment* parent);
  bool run_fragment(Fragment* fragment, int quantum);
  void execute_collective(const Instruction& in);
  Fragment* new_fragment();
  void free_fragment(Fragment* fragment);
  Frame* new_frame(const Code& code, uint32_t local_base);
  void release_frame(Frame* frame);

  std::byte* banks_[4] = {};
  uint32_t active_ = 0;
  uint32_t next_ = 0;
  Event event_ = Event::kNone;
  Counters* counters_ = nullptr;
  Fragment* current_ = nullptr;
  Block* block_ = nullptr;
  int index_ = 0;
  uint32_t exited_ = 0;
  std::byte* local_ = nullptr;
  uint32_t local_stride_ = 0;
  uint64_t executed_ = 0;
  size_t turn_ = 0;
  std::vector<Fragment*> fragments_;  // all that live, leaves and suspended
  std::vector<std::unique_ptr<Fragment>> fragment_pool_;
  std::vector<Fragment*> free_fragments_;
  std::vector<std::unique_ptr<Frame>> frame_pool_;
  std::vector<Frame*> free_frames_;
  std::unique_ptr<std::byte[]> local_storage_, bank_storage_;
  size_t local_capacity_ = 0;
};

// One of the 16 named barriers of a block.
struct Barrier {
  uint32_t expected = 0;  // threads; 0: nobody has come yet
  uint32_t arrived = 0;
  uint32_t generation = 0;
  bool reduction = false;
  uint32_t count_true = 0;             // barrier.red: threads whose predicate holds
  uint32_t result_true = 0, result_of = 0;
  VectorClock clock, completed;
};

class Block {
 public:
  std::byte* shared() const { return shared_; }
  uint32_t shared_bytes() const { return shared_bytes_; }  // static and dynamic
  uint32_t static_shared_bytes() const { return static_bytes_; }
  const std::byte* params() const;
  uint32_t params_bytes() const;
  SharedShadow* shadow() const { return shadow_.get(); }   // null without checks
  BlockWrites* block_writes() const;                       // null without checks
  std::unique_ptr<Extension> async;                        // of execute_async.cpp: the mbarriers, with their vector clocks
  int64_t linear() const { return linear_; }
  const uint32_t* index() const { return index_; }
  int num_warps() const { return static_cast<int>(num_warps_); }
  int num_threads() const { return num_threads_; }
  Warp& warp(int i) { return *warps_[i]; }
  LaunchState& launch() const { return *launch_; }
  void note_progress() { progress_++; }
  std::vector<Finding> findings;  // scratch of SharedShadow::access, so that it never allocates: clear, pass, read

  // ---- for the scheduler and the control family ----
  Block(LaunchState& launch, Counters* counters);
  ~Block();
  void start(int64_t linear);
  enum class Progress : uint8_t { kDone, kRan, kStuck };
  Progress run(uint64_t budget);  // until done, stuck or so many instructions
  Barrier& barrier(int id) { return barriers_[id]; }
  void complete_barrier(int id);
  void thread_exited(uint32_t count);
  void report_stuck(Fault fault);

 private:
  friend class Warp;
  friend class LaunchState;
  LaunchState* launch_;
  Counters* counters_;
  std::byte* shared_ = nullptr;
  std::unique_ptr<std::byte[]> shared_storage_;
  uint32_t shared_bytes_ = 0, static_bytes_ = 0;
  std::unique_ptr<SharedShadow> shadow_;
  int64_t linear_ = 0;
  uint32_t index_[3] = {};
  int num_threads_ = 0;
  size_t num_warps_ = 0;
  int live_threads_ = 0;
  uint64_t progress_ = 0, spins_ = 0, spins_progress_ = 0;
  std::vector<std::unique_ptr<Warp>> warps_;
  Barrier barriers_[16];
};

// One launch: what its blocks share.
class LaunchState {
 public:
  LaunchState(const Module& module, const Function& function, const Launch& launch, const Options& options);
  LaunchOutcome run();
  const Launch& launch() const { return launch_; }
  const Options& options() const { return options_; }
  const Program& program() const { return program_; }
  const std::string& kernel() const { return kernel_; }
  Reports& reports() { return reports_; }
  bool stopped() const { return stop_.load(std::memory_order_relaxed); }
  void stop() { stop_.store(true, std::memory_order_relaxed); }
  uint32_t shared_bytes() const { return shared_bytes_; }

 private:
  friend class Block;
  friend class Warp;
  void run_blocks(Counters* counters);
  const Program& program_;
  std::string kernel_;
  Launch launch_;
  Options options_;
  Reports reports_;
  std::unique_ptr<BlockWrites> block_writes_;
  std::unique_ptr<std::byte[]> params_storage_;
  std::byte* params_ = nullptr;
  uint32_t shared_bytes_ = 0;
  int64_t num_blocks_ = 0;
  std::atomic<int64_t> next_block_{0};
  std::atomic<uint64_t> executed_{0};
  std::atomic<bool> stop_{false};
};

inline const std::byte* Block::params() const { return launch_->params_; }
inline uint32_t Block::params_bytes() const { return static_cast<uint32_t>(launch_->launch_.params_bytes); }
inline BlockWrites* Block::block_writes() const { return launch_->block_writes_.get(); }

}  // namespace emulator
