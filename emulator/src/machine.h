// SPDX-License-Identifier: Apache-2.0
// What executes: a launch, its blocks in flight, their warps, and the fragments into which divergence splits a warp.
//
// An execute function sees one Warp, positioned at one Instruction with the lanes active() (never none). It reads and
// writes lane arrays, and does nothing else to the outside than what Warp offers:
//
//   values       warp.lanes<uint32_t>(in.operands[1])[lane], warp.mask(op) of predicates; warp.write(), set_mask()
//   faults       warp.fault(Fault::kRace, in, lane, [&] { return std::string("..."); }), text made the first time only
//   end          warp.end_launch() after the fault, when nothing sensible can follow (wild access, trap)
//   waiting      warp.retry(in, "mbarrier.wait") and return: not done, executed again when its turn comes;
//                warp.spin(in, "mbarrier.try_wait"): done, but found nothing, so others run before the next try;
//                warp.block().note_progress() when something that others may wait for has changed
//   collectives  if (!warp.collective(in, mask)) return;
//   memory       warp.block().shared(), warp.local(lane), params(); shadow(), global_shadow(), counters(): maybe null
//
// Bounds and alignment are checked always (the emulator must not crash), the rest only if the object is there.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "block_order.h"
#include "counters.h"
#include "divergence.h"
#include "emulator.h"
#include "global_shadow.h"
#include "memory.h"
#include "program.h"
#include "report.h"
#include "shadow.h"

namespace emulator {

class Block;
class LaunchState;

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

  // The carry flag of each lane (CC.CF), of add.cc and the like.
  uint32_t carry() const { return carry_; }
  void set_carry(uint32_t value) { carry_ = (carry_ & ~active_) | (value & active_); }

  // Of operands that are moved (program.h): lanes where the first, or the second, is all that the result depends on, if
  // it is written; the lane from which each lane has its result.
  void set_deciding(uint32_t first, uint32_t second) { deciding_[0] = first, deciding_[1] = second; }
  void set_sources(const uint32_t (&from)[kWarpLanes]) { std::copy_n(from, kWarpLanes, sources_); }

  // ---- who ----
  Block& block() const { return *block_; }
  int index() const { return index_; }                               // in the block
  uint32_t exited() const { return exited_; }                        // lanes that ended, or that the block never had
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
  // execution serves all. False: return at once: the fragment waits, or all has been done. `mask` [32]: for each active
  // lane the lanes it names; those that have exited before need not come. Waiting for lanes that can never come, and
  // lanes that do not name themselves, are reported by this function (kCollective); it then goes on with the lanes
  // there are. Aligned instructions (mma, ldmatrix) call collective_all(): every lane that has not exited.
  // any_instruction: lanes at another instruction with the same execute function count as come (bar.warp.sync, which
  // has no operand but the mask); then use the for_each_group() without a mask.
  bool collective(const Instruction& in, const uint32_t* mask, bool any_instruction = false);
  bool collective_all(const Instruction& in, Fault fault = Fault::kCollective);
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
  template <typename F>
  void for_each_group(F&& f) {
    for_each_group(named_, f);
  }

  // ---- memory ----
  std::byte* local(int lane) const { return local_ + static_cast<size_t>(lane) * local_stride_; }
  // Accessible: local(lane)[0 ... local_bytes() - 1], the frames up to the current one.
  uint32_t local_bytes() const { return current_->frame->local_top; }
  Counters* counters() const { return counters_; }  // null when off
  std::unique_ptr<Extension> async;                 // of execute_async.cpp: copies in flight of this warp

  // ---- for the scheduler and the control family ----
  enum class Event : uint8_t { kNone, kYield, kRetry, kSwitch };
  void start(Block& block, int index, uint32_t absent);
  // Runs up to `quantum` instructions, less when it waits. False: nothing could run.
  bool run(int quantum);
  bool done() const { return fragments_.empty(); }
  bool is_joint() const { return joint_; }
  uint64_t executed() const { return executed_; }
  const std::vector<Fragment*>& fragments() const { return fragments_; }
  Fragment& current() const { return *current_; }
  Frame& frame() const { return *current_->frame; }
  std::byte* registers(const Frame& frame, uint32_t offset) const { return frame.registers + offset; }

  void jump(const Instruction& in, uint32_t taken);  // lanes of active() that go to in.target, the others go on
  void jump_many(const Instruction& in, const uint32_t* target /* [32] */);
  void call(const CallSite& site, const Code& callee, uint32_t lanes);
  void return_lanes(uint32_t lanes);
  void exit_lanes(uint32_t lanes);
  // The current fragment, and those that came to this barrier with it, wait until complete_barrier.
  void wait_at_barrier(int barrier);
  // Fragments at one place, which will meet at one place, become one.
  void merge_siblings();
  // Lanes that wait at a post-dominator go on without the others. True when there were any.
  bool release_arrived(bool only_old);
  // Collectives that wait go ahead, with a report. True when there were any.
  bool force_collectives();
  // Makes local memory hold `top` bytes a lane. False, and reported: more than a stack may have.
  bool grow_local(uint32_t top, const Instruction& in);
  // "lanes 0x0000ffff wait at bar.sync (file.cu:12)", for all of them.
  std::string describe_waits() const;
  const Instruction& instruction_of(const Fragment& fragment) const;

 private:
  bool again(Fault fault, const Instruction& in);
  void add_report(Fault fault, const Instruction& in, int lane, std::string text);
  void check_reads(const Instruction& in, uint32_t lanes);
  void track_writes(const Instruction& in);
  Fragment* next_ready();
  void run_fragment(Fragment& fragment, int& quantum);
  void set_special_lanes(const uint32_t (&ntid)[3]);
  bool gather(const Instruction& in, Fault fault, bool any_instruction);
  void execute_jointly(const Instruction& in);
  struct Loan {
    RegisterUse use;
    std::vector<std::byte> kept;
  };
  void lend_operands(const Instruction& in, Fragment& from, std::vector<Loan>& loans);
  void return_loans(Fragment& from, const std::vector<Loan>& loans);
  Fragment* add_fragment(Frame* frame, Fragment* parent, uint32_t pc, uint32_t lanes, uint32_t reconverge);
  void remove_fragment(Fragment* fragment);
  void arrive(Fragment& fragment);
  void child_gone(Fragment* parent);
  void send(Fragment& parent, uint32_t target, uint32_t lanes);
  Frame* new_frame(const Code& code, uint32_t local_base);
  void release_frame(Frame* frame);

  std::byte* banks_[4] = {};
  uint32_t active_ = 0;
  uint32_t carry_ = 0;
  uint32_t deciding_[2] = {}, sources_[kWarpLanes] = {};
  uint32_t next_ = 0;
  Event event_ = Event::kNone;
  bool checks_ = true;
  bool joint_ = false;  // execute runs for all of participants_
  Counters* counters_ = nullptr;
  Fragment* current_ = nullptr;
  Block* block_ = nullptr;
  int index_ = 0;
  uint32_t exited_ = 0;
  std::byte* local_ = nullptr;
  uint32_t local_stride_ = 0;
  uint64_t executed_ = 0;
  size_t turn_ = 0;
  uint32_t named_[kWarpLanes] = {};   // lanes that each lane names at the collective where it stands
  std::vector<Fragment*> fragments_;  // all that live, leaves and suspended
  std::vector<Fragment*> participants_;
  std::vector<std::unique_ptr<Fragment>> fragment_pool_;
  std::vector<Fragment*> free_fragments_;
  std::vector<std::unique_ptr<Frame>> frame_pool_;
  std::vector<Frame*> free_frames_;
  std::unique_ptr<std::byte[]> local_storage_, bank_storage_;
};

// One of the 16 named barriers of a block.
struct Barrier {
  uint32_t expected = 0;    // threads; kAllThreads: all of the block that have not exited
  uint32_t arrived = 0;     // 0: not in use
  uint32_t threads = 0;     // that arrived, exactly: a whole warp counts as 32 in `arrived`
  uint32_t count_true = 0;  // barrier.red: threads whose predicate holds
  VectorClock clock;
  static constexpr uint32_t kAllThreads = 0xffffffffu;
};

constexpr int kNumBarriers = 16;

class Block {
 public:
  std::byte* shared() const { return shared_; }
  uint32_t shared_bytes() const { return shared_bytes_; }  // static and dynamic
  uint32_t static_shared_bytes() const { return static_bytes_; }
  const std::byte* params() const;
  uint32_t params_bytes() const;
  SharedShadow* shadow() const { return shadow_.get(); }  // null without checks
  GlobalShadow* global_shadow() const;                    // null without checks, and in launches of one block
  BlockOrder* block_order() const;                        // null also when the kernel orders no blocks
  // Whether the order between accesses can still be told; not after some 4 billion of one block.
  bool order_is_kept() const { return shadow_->era() == first_era_; }
  std::unique_ptr<Extension> async;  // of execute_async.cpp: the mbarriers, with their vector clocks
  int64_t linear() const { return linear_; }
  const uint32_t* index() const { return index_; }
  int num_warps() const { return static_cast<int>(num_warps_); }
  int num_threads() const { return num_threads_; }
  Warp& warp(int i) { return *warps_[i]; }
  LaunchState& launch() const { return *launch_; }
  // Something that others of the block may wait for has changed: a store, an atomic, an mbarrier.
  void note_progress() { progress_++; }
  // A strong read of global memory, or an atomic that changed nothing: perhaps it waits for another block.
  void note_poll() { polls_++; }
  std::vector<Finding> findings;  // scratch of SharedShadow::access, so that it never allocates: clear, pass, read

  // ---- for the scheduler and the control family ----
  Block(LaunchState& launch, Counters* counters);
  void start(int64_t linear);
  // kWaits: it has run for a while without storing anything, perhaps until another block does something.
  enum class Progress : uint8_t { kDone, kRan, kWaits, kStuck };
  Progress run(uint64_t budget);  // until done, stuck or so many instructions
  Barrier& barrier(int id) { return barriers_[id]; }
  // Counts `threads` of this warp, `counted` in the sense of the barrier; completes it when all have come.
  void arrive_at_barrier(int id, Warp& warp, uint32_t lanes, uint32_t counted, uint32_t lanes_true);
  void threads_exited(uint32_t count);
  void report_stuck(Fault fault);

 private:
  friend class Warp;
  LaunchState* launch_;
  Counters* counters_;
  std::byte* shared_ = nullptr;
  std::unique_ptr<std::byte[]> shared_storage_;
  uint32_t shared_bytes_ = 0, static_bytes_ = 0;
  std::unique_ptr<SharedShadow> shadow_;
  uint32_t first_era_ = 0;
  int64_t linear_ = 0;
  uint32_t index_[3] = {};
  int num_threads_ = 0;
  size_t num_warps_ = 0;
  bool unstick();
  void complete_barrier(int id);

  uint32_t live_threads_ = 0;
  uint64_t progress_ = 0;                      // calls of note_progress, and turns used up without waiting
  uint64_t stores_ = 0;                        // plain stores, barriers passed, threads ended
  uint64_t polls_ = 0;                         // calls of note_poll
  uint64_t spins_ = 0, progress_at_spin_ = 0;  // spins since progress_ changed
  std::vector<std::unique_ptr<Warp>> warps_;
  Barrier barriers_[kNumBarriers];
};

// One launch: what its blocks share.
class LaunchState {
 public:
  LaunchState(const Function& function, const Launch& launch, const Options& options);
  ~LaunchState();
  LaunchOutcome run();
  const Launch& launch() const { return launch_; }
  const Options& options() const { return options_; }
  const Program& program() const { return function_.program(); }
  const std::string& kernel() const { return function_.info().name; }
  Reports& reports() { return reports_; }
  bool stopped() const { return stop_.load(std::memory_order_relaxed); }
  void stop() { stop_.store(true, std::memory_order_relaxed); }
  uint32_t shared_bytes() const { return shared_bytes_; }
  // Of this process, for registers and local memory. Without room no more blocks start, and nobody calls a function.
  void take_room(uint64_t num_bytes) { taken_.fetch_add(num_bytes, std::memory_order_relaxed); }
  bool has_room() const { return taken_.load(std::memory_order_relaxed) < uint64_t{4} << 30; }

 private:
  friend class Block;
  void run_blocks(Counters* counters);
  bool count_executed(uint64_t executed, Block& block);
  const Function& function_;
  Launch launch_;
  Options options_;
  Reports reports_;
  std::unique_ptr<GlobalShadow> global_shadow_;
  std::unique_ptr<BlockOrder> block_order_;
  std::unique_ptr<std::byte[]> params_storage_;
  std::byte* params_ = nullptr;
  uint32_t shared_bytes_ = 0;
  int64_t num_blocks_ = 0;
  std::atomic<int64_t> next_block_{0};
  std::atomic<uint64_t> executed_{0}, taken_{0};
  std::atomic<bool> stop_{false};
};

inline const std::byte* Block::params() const { return launch_->params_; }
inline uint32_t Block::params_bytes() const { return static_cast<uint32_t>(launch_->launch_.params_bytes); }
inline GlobalShadow* Block::global_shadow() const { return launch_->global_shadow_.get(); }
inline BlockOrder* Block::block_order() const { return launch_->block_order_.get(); }

}  // namespace emulator
