// SPDX-License-Identifier: Apache-2.0
// Who runs when: warps of a block in turns, blocks one after another or several in flight, barriers, and the end of a
// launch in which nobody can run.
#include <algorithm>
#include <bit>
#include <cstring>
#include <new>
#include <thread>

#include "emulator.h"
#include "machine.h"
#include "memory.h"

namespace emulator {
namespace {

constexpr int kQuantum = 256;                    // warp-instructions of a turn
constexpr uint64_t kFirstTurn = 4'000'000;       // of a block, before the next blocks start beside it
constexpr uint64_t kTurnWithoutStores = 20'000;  // likewise, of a block that may be waiting for others
constexpr uint64_t kPollsWithoutStores = 128;    // likewise, of one that looks at flags
constexpr size_t kFewInFlight = 64;              // so many blocks may wait before new ones start more slowly
constexpr uint64_t kSpinsUntilStuck = 20'000;    // tries of waits that found nothing, with no progress between
constexpr size_t kSharedAlign = 1024;

std::byte* align_up(std::byte* p, size_t align) {
  return reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(p) + align - 1) / align * align);
}

}  // namespace

// ---- block ----------------------------------------------------------------------------------------------------------
Block::Block(LaunchState& launch, Counters* counters) : launch_(&launch), counters_(counters) {
  const uint32_t* dims = launch.launch().block;
  num_threads_ = static_cast<int>(dims[0] * dims[1] * dims[2]);
  num_warps_ = (static_cast<size_t>(num_threads_) + kWarpLanes - 1) / kWarpLanes;
  shared_bytes_ = launch.shared_bytes();
  static_bytes_ = launch.program().static_smem;
  shared_storage_ = std::make_unique<std::byte[]>(shared_bytes_ + kSharedAlign);
  shared_ = align_up(shared_storage_.get(), kSharedAlign);
  if (launch.options().checks) shadow_ = std::make_unique<SharedShadow>(shared_bytes_, static_cast<int>(num_warps_));
  for (size_t i = 0; i < num_warps_; i++) warps_.push_back(std::make_unique<Warp>());
}

void Block::start(int64_t linear) {
  const uint32_t* grid = launch_->launch().grid;
  linear_ = linear;
  index_[0] = static_cast<uint32_t>(linear % grid[0]);
  index_[1] = static_cast<uint32_t>(linear / grid[0] % grid[1]);
  index_[2] = static_cast<uint32_t>(linear / grid[0] / grid[1]);
  std::memset(shared_, 0, shared_bytes_);
  async.reset();
  live_threads_ = static_cast<uint32_t>(num_threads_);
  progress_ = spins_ = progress_at_spin_ = 0;
  for (Barrier& barrier : barriers_) barrier = Barrier{};
  if (shadow_) shadow_->reset(), first_era_ = shadow_->era();
  for (size_t i = 0; i < num_warps_; i++) {
    int lanes = std::min(num_threads_ - static_cast<int>(i) * kWarpLanes, kWarpLanes);
    uint32_t absent = lanes == kWarpLanes ? 0 : ~uint32_t{0} << lanes;
    if (shadow_ && absent) shadow_->set_absent(static_cast<int>(i), absent);
    warps_[i]->start(*this, static_cast<int>(i), absent);
  }
}

Block::Progress Block::run(uint64_t budget) {
  uint64_t executed = 0, last_stores = stores_, last_change = 0, last_polls = polls_;
  bool waits = false;
  while (executed < budget) {
    bool any = false, done = true;
    for (size_t i = 0; i < num_warps_; i++) {
      Warp& warp = *warps_[i];
      if (warp.done()) continue;
      uint64_t before = warp.executed();
      any |= warp.run(kQuantum);
      executed += warp.executed() - before;
      done &= warp.done();
      if (launch_->stopped()) return Progress::kDone;
    }
    if (done) {
      launch_->count_executed(executed, *this);
      return Progress::kDone;
    }
    if (!any && !unstick()) return Progress::kStuck;
    if (spins_ > kSpinsUntilStuck * num_warps_ && progress_ == progress_at_spin_) return Progress::kStuck;
    if (stores_ != last_stores) {
      last_stores = stores_;
      last_change = executed;
      last_polls = polls_;
    }
    waits = executed - last_change > kTurnWithoutStores || polls_ - last_polls > kPollsWithoutStores;
    if (waits) break;
  }
  if (!launch_->count_executed(executed, *this)) return Progress::kDone;
  return waits ? Progress::kWaits : Progress::kRan;
}

// Nobody can run. True when that could be changed.
bool Block::unstick() {
  bool any = false;
  for (size_t i = 0; i < num_warps_; i++) any |= warps_[i]->release_arrived(false);
  if (any) return true;
  for (size_t i = 0; i < num_warps_; i++) any |= warps_[i]->force_collectives();
  return any;
}

void Block::report_stuck(Fault fault) {
  if (fault == Fault::kDeadlock) {
    for (int id = 0; id < kNumBarriers; id++) {
      const Barrier& barrier = barriers_[id];
      bool left = barrier.arrived && barrier.expected != Barrier::kAllThreads &&
                  live_threads_ < static_cast<uint32_t>(num_threads_);
      if (left) fault = Fault::kBarrier;
    }
  }
  std::string text;
  for (int id = 0; id < kNumBarriers; id++) {
    const Barrier& barrier = barriers_[id];
    if (!barrier.arrived) continue;
    uint32_t expected = barrier.expected == Barrier::kAllThreads ? live_threads_ : barrier.expected;
    text += "barrier " + std::to_string(id) + " has " + std::to_string(barrier.arrived) + " of " +
            std::to_string(expected) + " threads; ";
  }
  uint32_t gone = static_cast<uint32_t>(num_threads_) - live_threads_;
  if (gone) text += std::to_string(gone) + " threads have ended; ";
  Warp* first = nullptr;
  int described = 0;
  for (size_t i = 0; i < num_warps_; i++) {
    if (warps_[i]->done()) continue;
    if (!first) first = warps_[i].get();
    if (++described > 8) continue;
    text += "warp " + std::to_string(i) + ": " + warps_[i]->describe_waits() + "; ";
  }
  if (described > 8) text += std::to_string(described - 8) + " more warps; ";
  text.resize(text.size() - std::min<size_t>(text.size(), 2));
  if (first) {
    for (const Fragment* fragment : first->fragments()) {
      if (fragment->state == Fragment::State::kSuspended) continue;
      const Instruction& in = first->instruction_of(*fragment);
      const char* what = fault == Fault::kLivelock ? "the launch takes too many instructions: " : "nobody can go on: ";
      first->fault(fault, in, std::countr_zero(fragment->lanes), [&] { return what + text; });
      break;
    }
  }
  launch_->stop();
}

// ---- barriers -------------------------------------------------------------------------------------------------------
void Block::arrive_at_barrier(int id, Warp& warp, uint32_t lanes, uint32_t counted, uint32_t lanes_true) {
  Barrier& barrier = barriers_[id];
  barrier.arrived += counted;
  barrier.threads += static_cast<uint32_t>(std::popcount(lanes));
  barrier.count_true += static_cast<uint32_t>(std::popcount(lanes_true));
  if (shadow_) shadow_->release(warp.index(), barrier.clock, lanes);
  uint32_t expected = barrier.expected == Barrier::kAllThreads ? live_threads_ : barrier.expected;
  uint32_t have = barrier.expected == Barrier::kAllThreads ? barrier.threads : barrier.arrived;
  if (have >= expected) complete_barrier(id);
}

void Block::complete_barrier(int id) {
  Barrier& barrier = barriers_[id];
  for (size_t i = 0; i < num_warps_; i++) {
    Warp& warp = *warps_[i];
    bool any = false;
    for (Fragment* fragment : warp.fragments()) {
      if (fragment->state != Fragment::State::kBarrier || fragment->barrier != id) continue;
      fragment->state = Fragment::State::kReady;
      fragment->passed = true;
      fragment->barrier_true = barrier.count_true;
      fragment->barrier_threads = barrier.threads;
      if (shadow_) shadow_->acquire(warp.index(), barrier.clock, fragment->participating);
      any = true;
    }
    if (any && warp.fragments().size() > 1 && !warp.is_joint()) warp.merge_siblings();
  }
  barrier = Barrier{};
  note_progress();
  stores_++;
}

void Block::threads_exited(uint32_t count) {
  live_threads_ -= count;
  note_progress();
  stores_++;
  for (int id = 0; id < kNumBarriers; id++) {
    Barrier& barrier = barriers_[id];
    if (barrier.arrived && barrier.expected == Barrier::kAllThreads && barrier.threads >= live_threads_)
      complete_barrier(id);
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------
LaunchState::LaunchState(const Function& function, const Launch& launch, const Options& options)
    : function_(function), launch_(launch), options_(options) {
  params_storage_ = std::make_unique<std::byte[]>(launch.params_bytes + 2 * 64);
  params_ = align_up(params_storage_.get(), 64);
  if (launch.params_bytes) std::memcpy(params_, launch.params, launch.params_bytes);
  launch_.params = params_;
  device_memory().add(params_, launch.params_bytes, "the parameters of the kernel");
  shared_bytes_ = program().static_smem + launch.dynamic_smem;
  num_blocks_ = static_cast<int64_t>(launch.grid[0]) * launch.grid[1] * launch.grid[2];
  if (options.checks && num_blocks_ > 1) {
    const bool threads = options.threads > 1;
    global_shadow_ = program().orders_blocks ? GlobalShadow::ordered(threads) : GlobalShadow::unordered(threads);
    const uint64_t num_threads = uint64_t{launch.block[0]} * launch.block[1] * launch.block[2];
    if (program().orders_blocks)
      block_order_ = std::make_unique<BlockOrder>(static_cast<int>((num_threads + kWarpLanes - 1) / kWarpLanes));
  }
}

LaunchState::~LaunchState() { device_memory().remove(params_, launch_.params_bytes); }

// False, and reported: more than a launch may take.
bool LaunchState::count_executed(uint64_t executed, Block& block) {
  uint64_t total = executed_.fetch_add(executed, std::memory_order_relaxed) + executed;
  if (total <= options_.max_instructions) return true;
  block.report_stuck(Fault::kLivelock);
  return false;
}

void LaunchState::run_blocks(Counters* counters) {
  std::vector<std::unique_ptr<Block>> in_flight;
  std::unique_ptr<Block> idle;
  size_t turn = 0;
  bool more = true, waits = false;
  // Blocks of a cooperative launch wait for all others; of an ordinary one, for a few at most, or they only look as if.
  size_t many = launch_.grid_workspace ? static_cast<size_t>(num_blocks_) : kFewInFlight;
  while (!stopped()) {
    // A new block starts when one may be waiting for it, or when those in flight have had their turn.
    bool next = turn >= in_flight.size() || (waits && in_flight.size() < many);
    if (more && next && (in_flight.empty() || has_room())) {
      int64_t linear = next_block_.fetch_add(1, std::memory_order_relaxed);
      more = linear < num_blocks_;
      if (more) {
        in_flight.push_back(idle ? std::move(idle) : std::make_unique<Block>(*this, counters));
        in_flight.back()->start(linear);
        turn = in_flight.size() - 1;
      }
    }
    if (in_flight.empty()) return;
    if (turn >= in_flight.size()) turn = 0;
    Block& block = *in_flight[turn];
    Block::Progress progress = block.run(kFirstTurn);
    waits = progress == Block::Progress::kWaits;
    if (waits) std::this_thread::yield();  // what it waits for may be another process
    switch (progress) {
      case Block::Progress::kDone:
        idle = std::move(in_flight[turn]);
        in_flight.erase(in_flight.begin() + static_cast<std::ptrdiff_t>(turn));
        break;
      case Block::Progress::kStuck: block.report_stuck(Fault::kDeadlock); break;  // no other block could help it
      default: turn++;
    }
  }
}

LaunchOutcome LaunchState::run() {
  LaunchOutcome outcome;
  std::copy_n(launch_.grid, 3, outcome.record.grid);
  std::copy_n(launch_.block, 3, outcome.record.block);
  outcome.record.kernel = kernel();
  outcome.record.static_smem = program().static_smem;
  outcome.record.dynamic_smem = launch_.dynamic_smem;
  outcome.record.registers = static_cast<int>(function_.info().num_registers);
  int64_t threads = std::clamp<int64_t>(options_.threads, 1, std::min<int64_t>(num_blocks_, 256));
  std::vector<Counters> counters(static_cast<size_t>(threads));
  std::vector<std::thread> workers;
  std::atomic<bool> no_memory{false};
  auto work = [&](size_t i) {
    try {
      run_blocks(options_.counters ? &counters[i] : nullptr);
    } catch (const std::bad_alloc&) {
      no_memory = true;
      stop();
    }
  };
  for (size_t i = 1; i < counters.size(); i++) workers.emplace_back(work, i);
  work(0);
  for (std::thread& worker : workers) worker.join();
  if (no_memory) throw Error("launch of " + kernel() + ": its blocks take more memory than there is here");
  outcome.record.counters = std::move(counters[0]);
  for (size_t i = 1; i < counters.size(); i++) outcome.record.counters.merge(counters[i]);
  outcome.completed = !stopped();
  outcome.reports = reports_.take();
  return outcome;
}

LaunchOutcome launch(const Module&, const Function& function, const Launch& launch, const Options& options) {
  const FunctionInfo& info = function.info();
  auto fail = [&](const std::string& text) { throw Error("launch of " + info.name + ": " + text); };
  if (launch.params_bytes != info.params_bytes)
    fail("the kernel takes " + std::to_string(info.params_bytes) + " bytes of parameters, not " +
         std::to_string(launch.params_bytes));
  uint64_t threads = 1;
  for (int i = 0; i < 3; i++) {
    if (launch.grid[i] == 0 || launch.block[i] == 0) fail("a grid or block of size zero");
    if (launch.grid[i] > 0x7fffffffu || launch.block[i] > 1024) fail("a grid or block that no GPU has");
    threads *= launch.block[i];
    if (info.required_threads[i] && info.required_threads[i] != launch.block[i])
      fail("the kernel is compiled for a block of " + std::to_string(info.required_threads[0]) + " x " +
           std::to_string(info.required_threads[1]) + " x " + std::to_string(info.required_threads[2]) + " threads");
  }
  if (threads > 1024) fail(std::to_string(threads) + " threads in a block, at most 1024 are possible");
  if (info.max_threads && threads > info.max_threads)
    fail(std::to_string(threads) + " threads in a block, the kernel is compiled for at most " +
         std::to_string(info.max_threads));
  if (launch.dynamic_smem > 1u << 24) fail("more than 16 MiB of shared memory");
  return LaunchState(function, launch, options).run();
}

}  // namespace emulator
