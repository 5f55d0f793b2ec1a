// SPDX-License-Identifier: Apache-2.0
// Divergence: how the lanes of a warp part at branches and calls, and come together at post-dominators, returns and
// collectives.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "execute_control.h"
#include "machine.h"

namespace emulator {
namespace {

// A divergence that has lasted this many instructions of the warp: lanes that arrived go on without the others, which
// may well wait for them (a lock within a warp).
constexpr uint64_t kPatience = 8192;

std::string hex(uint32_t value) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", value);
  return text;
}

// num_bytes of one lane; 0: a predicate.
void copy_lanes(std::byte* to, const std::byte* from, uint32_t num_bytes, uint32_t lanes) {
  if (num_bytes == 0) {
    uint32_t a, b;
    std::memcpy(&a, to, 4);
    std::memcpy(&b, from, 4);
    a = (a & ~lanes) | (b & lanes);
    std::memcpy(to, &a, 4);
    return;
  }
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    size_t offset = static_cast<size_t>(std::countr_zero(rest)) * num_bytes;
    std::memcpy(to + offset, from + offset, num_bytes);
  }
}

bool ends_thread(const Frame& frame, uint32_t pc) {
  const Instruction& in = frame.code->instructions[pc];
  return in.execute == &execute_exit && !(in.flags & Instruction::kGuarded);
}

}  // namespace

// ---- the forest -----------------------------------------------------------------------------------------------------
Fragment* Warp::add_fragment(Frame* frame, Fragment* parent, uint32_t pc, uint32_t lanes, uint32_t reconverge) {
  Fragment* fragment = nullptr;
  if (!free_fragments_.empty()) {
    fragment = free_fragments_.back();
    free_fragments_.pop_back();
  } else {
    fragment_pool_.push_back(std::make_unique<Fragment>());
    fragment = fragment_pool_.back().get();
  }
  *fragment = Fragment{};
  fragment->frame = frame;
  fragment->parent = parent;
  fragment->pc = pc;
  fragment->lanes = lanes;
  fragment->reconverge = reconverge;
  frame->fragments++;
  if (parent) parent->children++;
  fragments_.push_back(fragment);
  return fragment;
}

void Warp::remove_fragment(Fragment* fragment) {
  release_frame(fragment->frame);
  fragments_.erase(std::find(fragments_.begin(), fragments_.end(), fragment));
  free_fragments_.push_back(fragment);
}

// A child of `parent` has gone. The last one wakes it with the lanes that came, or takes it along when none did.
void Warp::child_gone(Fragment* parent) {
  while (parent && --parent->children == 0) {
    parent->call = nullptr;
    if (parent->arrived) {
      parent->lanes = std::exchange(parent->arrived, 0);
      parent->state = Fragment::State::kReady;
      return;
    }
    Fragment* gone = parent;
    parent = parent->parent;
    remove_fragment(gone);
  }
}

// All lanes of a leaf have come to where they meet those of its siblings.
void Warp::arrive(Fragment& fragment) {
  Fragment* parent = fragment.parent;
  parent->arrived |= fragment.lanes;
  parent->last_arrival = executed_;
  remove_fragment(&fragment);
  child_gone(parent);
  event_ = Event::kSwitch;
}

// Lanes leave for `target`: at once to the parent when that is where they meet, otherwise as a child of it.
void Warp::send(Fragment& parent, uint32_t target, uint32_t lanes) {
  if (target == parent.pc) {
    parent.arrived |= lanes;
    parent.last_arrival = executed_;
  } else {
    add_fragment(parent.frame, &parent, target, lanes, parent.pc)->released = parent.released;
  }
}

void Warp::jump(const Instruction& in, uint32_t taken) {
  Fragment& fragment = *current_;
  uint32_t rest = fragment.lanes & ~taken, following = fragment.pc + 1;
  if (!rest || in.target == following) {
    next_ = in.target;
    return;
  }
  if (!fragment.frame->code->is_entry) {
  } else if (ends_thread(*fragment.frame, in.target)) {  // an early return: nothing to meet for
    exit_lanes(taken);
    return;
  } else if (ends_thread(*fragment.frame, following)) {
    next_ = in.target;
    exit_lanes(rest);
    return;
  }
  if (in.reconverge == fragment.reconverge) {  // a loop that lanes leave one by one: no new level
    Fragment* parent = fragment.parent;
    if (parent && in.target == fragment.reconverge) {
      parent->arrived |= taken;
      parent->last_arrival = executed_;
      fragment.lanes = rest;
    } else if (parent && following == fragment.reconverge) {
      parent->arrived |= rest;
      parent->last_arrival = executed_;
      fragment.lanes = taken;
      next_ = in.target;
    } else {
      fragment.lanes = rest;
      add_fragment(fragment.frame, parent, in.target, taken, fragment.reconverge)->released = fragment.released;
    }
    return;
  }
  fragment.state = Fragment::State::kSuspended;
  fragment.pc = in.reconverge;
  fragment.lanes = 0;
  fragment.arrived = 0;
  send(fragment, in.target, taken);
  send(fragment, following, rest);
  event_ = Event::kSwitch;
}

void Warp::jump_many(const Instruction& in, const uint32_t* target) {
  Fragment& fragment = *current_;
  uint32_t first = target[std::countr_zero(active_)], stays = fragment.lanes & ~active_;
  bool uniform = !stays;
  for_each([&](int lane) { uniform &= target[lane] == first; });
  if (uniform) {
    next_ = first;
    return;
  }
  uint32_t following = fragment.pc + 1;
  fragment.state = Fragment::State::kSuspended;
  fragment.pc = in.reconverge;
  fragment.lanes = 0;
  fragment.arrived = 0;
  fragment.children++;  // until all have been sent
  if (stays) send(fragment, following, stays);
  for (uint32_t rest = active_; rest;) {
    uint32_t to = target[std::countr_zero(rest)], group = 0;
    for (uint32_t r = rest; r; r &= r - 1)
      if (target[std::countr_zero(r)] == to) group |= r & (0 - r);
    rest &= ~group;
    send(fragment, to, group);
  }
  child_gone(&fragment);
  event_ = Event::kSwitch;
}

// ---- calls ----------------------------------------------------------------------------------------------------------
void Warp::call(const CallSite& site, const Code& callee, uint32_t group) {
  Fragment& fragment = *current_;
  const Instruction& in = instruction_of(fragment);
  // A call takes some of the stack even where the callee has no variables.
  uint32_t base = std::max((fragment.frame->local_top + 15) / 16 * 16, fragment.frame->local_base + 16);
  if (!grow_local(base + callee.local_bytes, in)) return;
  if (!block_->launch().has_room()) {
    fault(Fault::kOutOfBounds, in, std::countr_zero(group),
          [] { return std::string("the stacks of all threads take more than 4 GiB here: endless recursion?"); });
    return end_launch();
  }
  if (fragment.state != Fragment::State::kSuspended) {  // the first target of this call
    fragment.arrived = fragment.lanes & ~active_;
    fragment.lanes = 0;
    fragment.pc++;
    fragment.state = Fragment::State::kSuspended;
    fragment.call = &site;
    event_ = Event::kSwitch;
  }
  Frame* frame = new_frame(callee, base);
  size_t count = std::min(site.arguments.size(), callee.params.size());
  for (size_t i = 0; i < count; i++) {
    const ParamSlot &from = site.arguments[i], &to = callee.params[i];
    uint32_t bytes = std::min(from.num_bytes, to.num_bytes);
    for (uint32_t rest = group; rest; rest &= rest - 1) {
      int lane = std::countr_zero(rest);
      auto place = [&](const ParamSlot& slot, const Frame& in_frame) {
        if (!slot.in_register) return local(lane) + in_frame.local_base + slot.local_offset;
        std::byte* array = slot.reg.bank() == Operand::kRegisters ? in_frame.registers : banks_[slot.reg.bank()];
        return array + slot.reg.offset() + static_cast<size_t>(lane) * slot.num_bytes;
      };
      std::memcpy(place(to, *frame), place(from, *fragment.frame), bytes);
    }
  }
  add_fragment(frame, &fragment, 0, group, kNoReconvergence)->released = fragment.released;
}

void Warp::return_lanes(uint32_t lanes) {
  Fragment& fragment = *current_;
  Fragment* caller = fragment.parent;
  while (caller && !(caller->call && caller->frame != fragment.frame)) caller = caller->parent;
  if (!caller) {
    exit_lanes(lanes);
    return;
  }
  const CallSite& site = *caller->call;
  const Code& callee = *fragment.frame->code;
  size_t count = std::min(site.results.size(), callee.results.size());
  for (size_t i = 0; i < count; i++) {
    const ParamSlot &from = callee.results[i], &to = site.results[i];
    uint32_t bytes = std::min(from.num_bytes, to.num_bytes);
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
      size_t lane = static_cast<size_t>(std::countr_zero(rest));
      auto place = [&](const ParamSlot& slot, const Frame& in_frame) {
        if (!slot.in_register) return local(static_cast<int>(lane)) + in_frame.local_base + slot.local_offset;
        std::byte* array = slot.reg.bank() == Operand::kRegisters ? in_frame.registers : banks_[slot.reg.bank()];
        return array + slot.reg.offset() + lane * slot.num_bytes;
      };
      std::memcpy(place(to, *caller->frame), place(from, *fragment.frame), bytes);
    }
  }
  caller->arrived |= lanes;
  caller->last_arrival = executed_;
  fragment.lanes &= ~lanes;
  if (fragment.lanes) return;
  Fragment* parent = fragment.parent;
  remove_fragment(&fragment);
  child_gone(parent);
  event_ = Event::kSwitch;
}

void Warp::exit_lanes(uint32_t lanes) {
  Fragment& fragment = *current_;
  exited_ |= lanes;
  if (!fragment.released) {  // an early return: collectives that wait for these lanes do without them
    for (Fragment* other : fragments_) {
      if (other->state != Fragment::State::kCollective) continue;
      other->exited_before |= lanes;
      other->state = Fragment::State::kReady;
    }
  }
  if (SharedShadow* shadow = block_->shadow()) shadow->set_absent(index_, exited_);
  fragment.lanes &= ~lanes;
  if (!fragment.lanes) {
    Fragment* parent = fragment.parent;
    remove_fragment(&fragment);
    child_gone(parent);
    event_ = Event::kSwitch;
  }
  block_->threads_exited(static_cast<uint32_t>(std::popcount(lanes)));
}

// ---- lanes that wait for others -------------------------------------------------------------------------------------
bool Warp::release_arrived(bool only_old) {
  bool any = false;
  for (size_t i = 0; i < fragments_.size(); i++) {
    Fragment* fragment = fragments_[i];
    if (fragment->state != Fragment::State::kSuspended || !fragment->arrived) continue;
    if (only_old && executed_ - fragment->last_arrival < kPatience) continue;
    // They become a sibling of the fragment that stays suspended for the others.
    add_fragment(fragment->frame, fragment->parent, fragment->pc, std::exchange(fragment->arrived, 0),
                 fragment->reconverge)
        ->released = true;
    any = true;
  }
  return any;
}

// Fragments that stand at the same place and will meet at the same place are one.
void Warp::merge_siblings() {
  for (size_t i = 0; i < fragments_.size(); i++) {
    Fragment* a = fragments_[i];
    if (a->state != Fragment::State::kReady) continue;
    for (size_t j = i + 1; j < fragments_.size();) {
      Fragment* b = fragments_[j];
      bool same = b->state == Fragment::State::kReady && a->passed == b->passed && a->frame == b->frame &&
                  a->pc == b->pc && a->parent == b->parent && a->reconverge == b->reconverge;
      if (!same) {
        j++;
        continue;
      }
      a->lanes |= b->lanes;
      a->released &= b->released;
      if (b->parent) b->parent->children--;
      remove_fragment(b);
    }
  }
}

bool Warp::collective(const Instruction& in, const uint32_t* mask, bool any_instruction) {
  if (joint_) return true;
  uint32_t named = 0;
  bool all_self = true;
  for_each([&](int lane) {
    named_[lane] = mask[lane];
    named |= mask[lane];
    all_self &= mask[lane] >> lane & 1;
  });
  if (!all_self) {
    for_each([&](int lane) {
      if (named_[lane] >> lane & 1) return;
      fault(Fault::kCollective, in, lane, [&] {
        return block_->launch().program().info(in.pc).text + " with the mask " + hex(named_[lane]) +
               ", which does not name the lane itself";
      });
      named_[lane] |= 1u << lane;
    });
  }
  if (!(named & ~exited_ & ~active_)) {
    int first = std::countr_zero(active_);
    for_each([&](int lane) {
      uint32_t other = named_[lane] & active_;
      for (uint32_t rest = named_[lane] == named_[first] ? 0 : other; rest; rest &= rest - 1) {
        int peer = std::countr_zero(rest);
        if (named_[peer] == named_[lane]) continue;
        fault(Fault::kCollective, in, lane, [&] {
          return block_->launch().program().info(in.pc).text + " with the mask " + hex(named_[lane]) + ", but lane " +
                 std::to_string(peer) + ", which that names, has the mask " + hex(named_[peer]);
        });
        return;
      }
    });
    current_->forced = false;
    return true;
  }
  return gather(in, Fault::kCollective, any_instruction);
}

bool Warp::collective_all(const Instruction& in, Fault fault) {
  if (joint_ || (active_ | exited_) == kAllLanes) {
    current_->forced = false;
    return true;
  }
  for_each([&](int lane) { named_[lane] = kAllLanes; });
  return gather(in, fault, false);
}

// Not all lanes that the active ones name are in this fragment: runs the instruction for all fragments that wait at it
// when the last one comes.
bool Warp::gather(const Instruction& in, Fault, bool any_instruction) {
  Fragment& self = *current_;
  if (self.forced) {
    self.forced = false;
    return true;
  }
  self.participating = active_;
  self.exited_before = exited_;
  participants_.assign(1, &self);
  for (Fragment* other : fragments_) {
    if (other == &self || other->state != Fragment::State::kCollective) continue;
    const Instruction& at = instruction_of(*other);
    if (any_instruction ? at.execute == in.execute : &at == &in) participants_.push_back(other);
  }
  // Whoever names a lane that has not come, or that names others, waits on; and with it those that name him.
  uint32_t present = 0;
  for (bool changed = true; changed;) {
    changed = false;
    present = 0;
    for (Fragment* fragment : participants_) present |= fragment->participating;
    for (size_t i = 0; i < participants_.size() && !changed; i++) {
      Fragment* fragment = participants_[i];
      for (uint32_t rest = fragment->participating; rest && !changed; rest &= rest - 1) {
        int lane = std::countr_zero(rest);
        uint32_t need = named_[lane] & ~fragment->exited_before;
        bool complete = !(need & ~present);
        for (uint32_t peers = need & present; peers; peers &= peers - 1)
          complete &= named_[std::countr_zero(peers)] == named_[lane];
        if (complete) continue;
        participants_.erase(participants_.begin() + static_cast<std::ptrdiff_t>(i));
        changed = true;
      }
    }
  }
  if (participants_.empty() || participants_[0] != &self) {
    self.state = Fragment::State::kCollective;
    event_ = Event::kRetry;
    return false;
  }
  active_ = present;
  execute_jointly(in);
  return false;
}

// Lanes of another frame lend their operands to the frame that executes, whose own values of those lanes are put back.
void Warp::lend_operands(const Instruction& in, Fragment& from, std::vector<Loan>& loans) {
  for (const RegisterUse& use : block_->launch().program().info(in.pc).uses) {
    auto known =
        std::find_if(loans.begin(), loans.end(), [&](const Loan& loan) { return loan.use.offset == use.offset; });
    if (known != loans.end()) {
      known->use.write |= use.write;
      continue;
    }
    std::byte *mine = current_->frame->registers + use.offset, *other = from.frame->registers + use.offset;
    size_t size = use.num_bytes ? use.num_bytes * kWarpLanes : sizeof(uint32_t);
    loans.push_back({use, std::vector<std::byte>(mine, mine + size)});
    copy_lanes(mine, other, use.num_bytes, from.participating);
  }
}

void Warp::return_loans(Fragment& from, const std::vector<Loan>& loans) {
  for (const Loan& loan : loans) {
    std::byte *mine = current_->frame->registers + loan.use.offset, *other = from.frame->registers + loan.use.offset;
    if (loan.use.write) copy_lanes(other, mine, loan.use.num_bytes, from.participating);
    copy_lanes(mine, loan.kept.data(), loan.use.num_bytes, from.participating);
  }
}

void Warp::execute_jointly(const Instruction& in) {
  std::vector<std::vector<Loan>> loans(participants_.size());
  for (size_t i = 1; i < participants_.size(); i++) {
    Fragment& other = *participants_[i];
    if (other.frame != current_->frame && &instruction_of(other) == &in) lend_operands(in, other, loans[i]);
  }
  joint_ = true;
  in.execute(*this, in);
  joint_ = false;
  for (size_t i = participants_.size(); i-- > 1;) {
    Fragment& other = *participants_[i];
    return_loans(other, loans[i]);
    if (checks_ && (in.flags & Instruction::kTracksWrites) && other.frame != current_->frame) {
      const RegisterCheck& check = other.frame->code->checks[in.check];
      for (uint32_t to : check.writes) other.frame->written[to] |= other.participating;
    }
    if (other.state == Fragment::State::kBarrier) continue;
    other.state = Fragment::State::kReady;
    if (event_ != Event::kRetry && !other.passed) other.pc++;
  }
  if (event_ == Event::kNone && participants_.size() > 1) {
    current_->pc = next_;
    merge_siblings();
    event_ = Event::kSwitch;
  }
}

bool Warp::force_collectives() {
  bool any = false;
  uint32_t waiting = 0;
  for (Fragment* fragment : fragments_)
    if (fragment->state == Fragment::State::kCollective) waiting |= fragment->participating;
  for (Fragment* fragment : fragments_) {
    if (fragment->state != Fragment::State::kCollective) continue;
    const Instruction& in = instruction_of(*fragment);
    current_ = fragment;
    active_ = fragment->participating;
    int lane = std::countr_zero(active_);
    uint32_t missing = named_[lane] & ~fragment->exited_before & ~fragment->participating;
    bool barrier = in.cls == InstructionClass::kBarrier && named_[lane] == kAllLanes && in.execute == &execute_barrier;
    fault(barrier ? Fault::kBarrier : Fault::kCollective, in, lane, [&] {
      std::string text = "lanes " + hex(fragment->participating) + " of warp " + std::to_string(index_) + " wait in " +
                         block_->launch().program().info(in.pc).text + " for lanes " + hex(missing) + ", which ";
      if (!(missing & ~exited_)) text += "ended without it";
      else if (!(missing & ~waiting)) text += "wait elsewhere";
      else text += "do not come";
      return text + ": " + describe_waits();
    });
    fragment->forced = true;
    fragment->state = Fragment::State::kReady;
    any = true;
  }
  return any;
}

void Warp::wait_at_barrier(int barrier) {
  if (!joint_) participants_.assign(1, current_);
  for (Fragment* fragment : participants_) {
    if (!joint_) fragment->participating = active_;
    fragment->state = Fragment::State::kBarrier;
    fragment->barrier = barrier;
  }
  event_ = Event::kRetry;
}

}  // namespace emulator
