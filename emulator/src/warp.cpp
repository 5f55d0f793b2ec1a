// SPDX-License-Identifier: Apache-2.0
// A warp: its registers and local memory, and the loop that executes instructions.
#include <algorithm>
#include <cstring>

#include "execute_control.h"
#include "machine.h"

namespace emulator {
namespace {

constexpr uint32_t kMaxLocalBytes = 512 * 1024;  // of a lane
constexpr size_t kAlign = 64;
constexpr size_t kSinkBytes = 16 * kWarpLanes;
constexpr size_t kSpecialsBytes = static_cast<size_t>(Special::kCount) * kSpecialBytes;

std::byte* align_up(std::byte* p) {
  return reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(p) + kAlign - 1) / kAlign * kAlign);
}

std::string hex(uint32_t value) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", value);
  return text;
}

}  // namespace

// ---- start ----------------------------------------------------------------------------------------------------------
void Warp::start(Block& block, int index, uint32_t absent) {
  block_ = &block;
  index_ = index;
  exited_ = absent;
  counters_ = block.counters_;
  checks_ = block.launch().options().checks;
  event_ = Event::kNone;
  joint_ = false;
  turn_ = 0;
  async.reset();
  while (!fragments_.empty()) remove_fragment(fragments_.back());
  const Code& kernel = *block.launch().program().codes[0];
  bool first_block = !bank_storage_;
  if (first_block) {
    bank_storage_ = std::make_unique<std::byte[]>(kSpecialsBytes + kSinkBytes + kAlign);
    banks_[Operand::kSpecials] = align_up(bank_storage_.get());
    banks_[Operand::kSink] = banks_[Operand::kSpecials] + kSpecialsBytes;
  }
  uint32_t need = std::max<uint32_t>((kernel.local_bytes + 15) / 16 * 16, 16);
  if (local_stride_ < need) {
    local_storage_ = std::make_unique<std::byte[]>(static_cast<size_t>(need) * kWarpLanes + kAlign);
    local_ = align_up(local_storage_.get());
    local_stride_ = need;
    block.launch().take_room(uint64_t{need} * kWarpLanes);
  } else if (kernel.local_bytes > 0) {
    for (int lane = 0; lane < kWarpLanes; lane++) std::memset(local(lane), 0, kernel.local_bytes);
  }
  if (first_block) set_special_lanes(block.launch().launch().block);
  for (int dim = 0; dim < 3; dim++) {
    uint32_t special = static_cast<uint32_t>(Special::kCtaidX) + static_cast<uint32_t>(dim);
    std::fill_n(lanes<uint32_t>(Operand::at(Operand::kSpecials, special * kSpecialBytes)), kWarpLanes,
                block.index()[dim]);
  }
  Frame* frame = new_frame(kernel, 0);
  add_fragment(frame, nullptr, 0, ~absent, kNoReconvergence);
}

// All but the block's index: a Warp object stays the same warp of every block of one launch.
void Warp::set_special_lanes(const uint32_t (&ntid)[3]) {
  const Launch& launch = block_->launch().launch();
  auto all = [&](Special special, uint32_t value) {
    std::fill_n(lanes<uint32_t>(Operand::at(Operand::kSpecials, static_cast<uint32_t>(special) * kSpecialBytes)),
                kWarpLanes, value);
  };
  auto each = [&](Special special, auto&& value) {
    uint32_t* out = lanes<uint32_t>(Operand::at(Operand::kSpecials, static_cast<uint32_t>(special) * kSpecialBytes));
    for (uint32_t lane = 0; lane < kWarpLanes; lane++) out[lane] = value(lane);
  };
  auto wide = [&](Special special, uint64_t value) {
    std::fill_n(lanes<uint64_t>(Operand::at(Operand::kSpecials, static_cast<uint32_t>(special) * kSpecialBytes)),
                kWarpLanes, value);
  };
  uint32_t first = static_cast<uint32_t>(index_) * kWarpLanes;
  each(Special::kTidX, [&](uint32_t lane) { return (first + lane) % ntid[0]; });
  each(Special::kTidY, [&](uint32_t lane) { return (first + lane) / ntid[0] % ntid[1]; });
  each(Special::kTidZ, [&](uint32_t lane) { return (first + lane) / ntid[0] / ntid[1]; });
  all(Special::kNtidX, ntid[0]);
  all(Special::kNtidY, ntid[1]);
  all(Special::kNtidZ, ntid[2]);
  all(Special::kNctaidX, launch.grid[0]);
  all(Special::kNctaidY, launch.grid[1]);
  all(Special::kNctaidZ, launch.grid[2]);
  each(Special::kLaneid, [](uint32_t lane) { return lane; });
  all(Special::kWarpid, static_cast<uint32_t>(index_));
  all(Special::kNwarpid, 64);
  wide(Special::kSmid, 0);
  all(Special::kNsmid, 1);
  each(Special::kLanemaskEq, [](uint32_t lane) { return 1u << lane; });
  each(Special::kLanemaskLt, [](uint32_t lane) { return (1u << lane) - 1; });
  each(Special::kLanemaskLe, [](uint32_t lane) { return (2u << lane) - 1; });
  each(Special::kLanemaskGt, [](uint32_t lane) { return ~((2u << lane) - 1); });
  each(Special::kLanemaskGe, [](uint32_t lane) { return ~((1u << lane) - 1); });
  all(Special::kDynamicSmem, launch.dynamic_smem);
  all(Special::kTotalSmem, block_->shared_bytes());
  all(Special::kWorkspaceHigh, static_cast<uint32_t>(launch.grid_workspace >> 32));
  all(Special::kWorkspaceLow, static_cast<uint32_t>(launch.grid_workspace));
  wide(Special::kZero, 0);
  all(Special::kOne, 1);
  wide(Special::kGridid, 1);
  wide(Special::kParamBase, reinterpret_cast<uint64_t>(block_->params()));
}

// ---- frames ---------------------------------------------------------------------------------------------------------
Frame* Warp::new_frame(const Code& code, uint32_t local_base) {
  Frame* frame = nullptr;
  if (!free_frames_.empty()) {
    frame = free_frames_.back();
    free_frames_.pop_back();
  } else {
    frame_pool_.push_back(std::make_unique<Frame>());
    frame = frame_pool_.back().get();
  }
  if (frame->capacity < code.register_bytes) {
    frame->storage = std::make_unique<std::byte[]>(code.register_bytes + kAlign);
    block_->launch().take_room(code.register_bytes + sizeof(Frame) + sizeof(Fragment));
    frame->registers = align_up(frame->storage.get());
    frame->capacity = code.register_bytes;
  } else {
    std::memset(frame->registers, 0, code.register_bytes);
  }
  frame->code = &code;
  frame->local_base = local_base;
  frame->local_top = local_base + code.local_bytes;
  frame->fragments = 0;
  std::fill_n(reinterpret_cast<uint64_t*>(frame->registers), kWarpLanes, local_base);
  frame->written.assign(code.num_tracked, 0);
  for (uint32_t tracked : code.written_at_entry) frame->written[tracked] = kAllLanes;
  return frame;
}

void Warp::release_frame(Frame* frame) {
  if (--frame->fragments == 0) free_frames_.push_back(frame);
}

bool Warp::grow_local(uint32_t top, const Instruction& in) {
  if (top <= local_stride_) return true;
  if (top > kMaxLocalBytes) {
    fault(Fault::kOutOfBounds, in, std::countr_zero(active_),
          [] { return std::string("the stack of a thread grew beyond 512 KiB: endless recursion?"); });
    end_launch();
    return false;
  }
  uint32_t stride = std::min(std::max(top, 2 * local_stride_) + 15, kMaxLocalBytes) / 16 * 16;
  auto storage = std::make_unique<std::byte[]>(static_cast<size_t>(stride) * kWarpLanes + kAlign);
  std::byte* base = align_up(storage.get());
  for (int lane = 0; lane < kWarpLanes; lane++)
    std::memcpy(base + static_cast<size_t>(lane) * stride, local(lane), local_stride_);
  local_storage_ = std::move(storage);
  local_ = base;
  block_->launch().take_room(uint64_t{stride - local_stride_} * kWarpLanes);
  local_stride_ = stride;
  return true;
}

// ---- faults and waiting ---------------------------------------------------------------------------------------------
bool Warp::again(Fault fault, const Instruction& in) { return block_->launch().reports().again(fault, &in); }

void Warp::add_report(Fault fault, const Instruction& in, int lane, std::string text) {
  LaunchState& launch = block_->launch();
  Report report;
  report.fault = fault;
  report.kernel = launch.kernel();
  const InstructionInfo& info = launch.program().info(in.pc);
  report.where = info.where;
  if (info.caller.line > 0) {
    size_t slash = info.caller.file.find_last_of('/');
    text += " (inlined at " + info.caller.file.substr(slash == std::string::npos ? 0 : slash + 1) + ":" +
            std::to_string(info.caller.line) + ")";
  }
  std::copy_n(block_->index(), 3, report.block);
  const uint32_t* ntid = launch.launch().block;
  uint32_t linear = static_cast<uint32_t>(thread(lane & (kWarpLanes - 1)));
  report.thread[0] = linear % ntid[0];
  report.thread[1] = linear / ntid[0] % ntid[1];
  report.thread[2] = linear / ntid[0] / ntid[1];
  report.text = std::move(text);
  launch.reports().add(fault, &in, std::move(report));
}

void Warp::end_launch() {
  block_->launch().stop();
  event_ = Event::kSwitch;
}

void Warp::retry(const Instruction& in, const char* what) {
  spin(in, what);
  event_ = Event::kRetry;
}

void Warp::spin(const Instruction&, const char* what) {
  current_->waits_for = what;
  current_->spun = true;
  if (block_->progress_at_spin_ != block_->progress_) {
    block_->progress_at_spin_ = block_->progress_;
    block_->spins_ = 0;
  }
  block_->spins_++;
  event_ = Event::kYield;
}

void Warp::yield() {
  if (!std::exchange(current_->spun, false)) block_->progress_++;  // sleeps until another block has done something?
  event_ = Event::kYield;
}

const Instruction& Warp::instruction_of(const Fragment& fragment) const {
  return fragment.frame->code->instructions[fragment.pc];
}

std::string Warp::describe_waits() const {
  std::string out;
  const Program& program = block_->launch().program();
  for (const Fragment* fragment : fragments_) {
    if (fragment->state == Fragment::State::kSuspended) continue;
    const InstructionInfo& info = program.info(instruction_of(*fragment).pc);
    if (!out.empty()) out += ", ";
    if (fragment->lanes != ~0u) out += "lanes " + hex(fragment->lanes) + " ";
    bool waits = fragment->state != Fragment::State::kReady || fragment->waits_for;
    out += waits ? "at " : "running at ";
    out += fragment->state == Fragment::State::kReady && fragment->waits_for ? fragment->waits_for : info.text;
    if (fragment->state == Fragment::State::kBarrier) out += " of barrier " + std::to_string(fragment->barrier);
    if (info.where.line > 0) {
      size_t slash = info.where.file.find_last_of('/');
      out += " (" + info.where.file.substr(slash == std::string::npos ? 0 : slash + 1) + ":" +
             std::to_string(info.where.line) + ")";
    }
  }
  return out;
}

// ---- unwritten registers --------------------------------------------------------------------------------------------
void Warp::check_reads(const Instruction& in, uint32_t lanes) {
  const RegisterCheck& check = current_->frame->code->checks[in.check];
  uint32_t guarded = in.flags & Instruction::kGuarded ? lanes & mask(in.guard) : lanes;
  for (uint32_t tracked : check.reads) {
    if (tracked != check.guard) lanes &= guarded;  // the guard stands first
    uint32_t bad = lanes & ~current_->frame->written[tracked];
    if (!bad) continue;
    fault(Fault::kUnwrittenRegister, in, std::countr_zero(bad), [&] {
      return block_->launch().program().info(in.pc).text + " reads a register that this thread has not written";
    });
  }
}

void Warp::track_writes(const Instruction& in) {
  Frame& frame = *current_->frame;
  const RegisterCheck& check = frame.code->checks[in.check];
  uint32_t written = active_, first = kAllLanes, second = kAllLanes;
  for (const auto& [tracked, moved] : check.moved_from) {
    const uint32_t from = frame.written[tracked];
    if (moved == Moved::kAlways) written &= from;
    if (moved == Moved::kFirst) first &= from;
    if (moved == Moved::kSecond) second &= from;
    if (moved == Moved::kFromLane) {
      uint32_t known = from;
      for (const Fragment* other : fragments_)  // lanes of another call have lent what they wrote there
        if (other->frame != &frame) known |= other->lanes;
      for (uint32_t rest = active_; rest; rest &= rest - 1)
        if (const int lane = std::countr_zero(rest); !(known >> sources_[lane] & 1)) written &= ~(1u << lane);
    }
  }
  written &= (first & second) | (first & deciding_[0]) | (second & deciding_[1]);
  for (uint32_t to : check.writes) frame.written[to] = (frame.written[to] & ~active_) | written;
}

// ---- the loop -------------------------------------------------------------------------------------------------------
Fragment* Warp::next_ready() {
  for (size_t tried = 0; tried < fragments_.size(); tried++) {
    if (turn_ >= fragments_.size()) turn_ = 0;
    if (fragments_[turn_]->state == Fragment::State::kReady) return fragments_[turn_];
    turn_++;
  }
  return nullptr;
}

bool Warp::run(int quantum) {
  bool ran = false;
  while (quantum > 0 && !block_->launch().stopped()) {
    Fragment* fragment = next_ready();
    if (!fragment) {
      // Perhaps only lanes that wait at a post-dominator can bring a collective what it waits for.
      bool only_collectives = !fragments_.empty(), any = false;
      for (Fragment* f : fragments_) {
        any |= f->state == Fragment::State::kCollective;
        only_collectives &= f->state != Fragment::State::kBarrier;
      }
      if (any && release_arrived(false)) continue;
      if (any && only_collectives && force_collectives()) continue;
      break;
    }
    ran = true;
    int before = quantum;
    run_fragment(*fragment, quantum);
    executed_ += static_cast<uint64_t>(before - quantum);
    if (event_ == Event::kYield || event_ == Event::kRetry) {
      event_ = Event::kNone;
      turn_++;
      break;
    }
    event_ = Event::kNone;
    if (quantum <= 0) {
      turn_++;
      block_->progress_++;  // a turn that was used up without waiting
    }
  }
  if (fragments_.size() > 1) release_arrived(true);
  return ran;
}

void Warp::run_fragment(Fragment& fragment, int& quantum) {
  current_ = &fragment;
  const Code& code = *fragment.frame->code;
  const Instruction* instructions = code.instructions.data();
  banks_[Operand::kRegisters] = fragment.frame->registers;
  banks_[Operand::kConstants] = code.constants;
  const uint32_t reconverge = fragment.reconverge;
  const uint8_t slow = checks_ ? Instruction::kSlow : 0;
  uint32_t pc = fragment.pc;
  while (quantum > 0) {
    if (pc == reconverge) {
      fragment.pc = pc;
      arrive(fragment);
      return;
    }
    const Instruction& in = instructions[pc];
    quantum--;
    uint32_t lanes = fragment.lanes;
    if (in.flags & slow & Instruction::kChecksReads) [[unlikely]]
      check_reads(in, lanes);
    if (in.flags & Instruction::kGuarded) {
      lanes &= mask(in.guard);
      if (!lanes) {
        pc++;
        continue;
      }
    }
    active_ = lanes;
    next_ = pc + 1;
    fragment.pc = pc;
    in.execute(*this, in);
    if (event_ == Event::kNone) [[likely]] {
      pc = next_;
    } else if (event_ == Event::kRetry) {
      return;
    }
    if (in.flags & slow & Instruction::kTracksWrites) [[unlikely]]
      track_writes(in);
    if (counters_) counters_->instruction(in.cls, in.pc, active_);
    if (in.cls == InstructionClass::kGlobalStore || in.cls == InstructionClass::kSharedStore) block_->stores_++;
    if (event_ != Event::kNone) {
      if (event_ == Event::kYield) fragment.pc = next_;
      return;
    }
  }
  fragment.pc = pc;
}

}  // namespace emulator
