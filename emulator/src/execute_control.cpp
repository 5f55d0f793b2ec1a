// SPDX-License-Identifier: Apache-2.0
// Control: branches, calls, the end of threads, barriers of a block, and hints that change nothing here.
#include "execute_control.h"

#include <algorithm>
#include <bit>

#include "builder.h"
#include "machine.h"

namespace emulator {
namespace {

// ---- branches and ends ----------------------------------------------------------------------------------------------
void execute_bra(Warp& warp, const Instruction& in) { warp.jump(in, warp.active()); }

void execute_brx(Warp& warp, const Instruction& in) {
  const auto& targets = *static_cast<const std::vector<uint32_t>*>(in.data);
  const uint32_t* index = warp.lanes<uint32_t>(in.operands[0]);
  uint32_t target[kWarpLanes] = {};
  bool wild = false;
  warp.for_each([&](int lane) {
    if (index[lane] < targets.size()) {
      target[lane] = targets[index[lane]];
      return;
    }
    wild = true;
    warp.fault(Fault::kOutOfBounds, in, lane, [&] {
      return "brx.idx takes entry " + std::to_string(index[lane]) + " of a table of " + std::to_string(targets.size());
    });
  });
  if (wild) warp.end_launch();
  else warp.jump_many(in, target);
}

void execute_call(Warp& warp, const Instruction& in) {
  const CallSite& site = *static_cast<const CallSite*>(in.data);
  warp.call(site, *site.callee, warp.active());
}

void execute_indirect_call(Warp& warp, const Instruction& in) {
  const CallSite& site = *static_cast<const CallSite*>(in.data);
  const auto& known = warp.block().launch().program().code_at_address;
  const uint64_t* address = warp.lanes<uint64_t>(site.target);
  for (uint32_t rest = warp.active(); rest;) {
    int lane = std::countr_zero(rest);
    uint32_t group = 0;
    for (uint32_t r = rest; r; r &= r - 1)
      if (address[std::countr_zero(r)] == address[lane]) group |= r & (0 - r);
    rest &= ~group;
    auto callee = known.find(address[lane]);
    if (callee == known.end()) {
      warp.fault(Fault::kOutOfBounds, in, lane, [&] { return std::string("a call to what is no function"); });
      warp.end_launch();
      return;
    }
    warp.call(site, *callee->second, group);
  }
}

struct BuiltinCall {
  CallSite site;
  Builtin run;
};
void execute_builtin(Warp& warp, const Instruction& in) {
  const BuiltinCall& call = *static_cast<const BuiltinCall*>(in.data);
  call.run(warp, in, call.site);
}

void execute_trap(Warp& warp, const Instruction& in) {
  warp.fault(Fault::kTrap, in, std::countr_zero(warp.active()),
             [] { return std::string("the kernel executed a trap"); });
  warp.end_launch();
}

void execute_nothing(Warp&, const Instruction&) {}

void execute_yield(Warp& warp, const Instruction&) { warp.yield(); }

// alloca d, size: moves the top of this frame's local memory, for all lanes alike.
void execute_alloca(Warp& warp, const Instruction& in) {
  const uint64_t* size = warp.lanes<uint64_t>(in.operands[1]);
  uint64_t most = 0;
  warp.for_each([&](int lane) { most = std::max(most, std::min<uint64_t>(size[lane], 1u << 30)); });
  Frame& frame = warp.frame();
  uint32_t base = static_cast<uint32_t>((frame.local_top + in.aux - 1) / in.aux * in.aux);
  if (!warp.grow_local(static_cast<uint32_t>(base + most), in)) return;
  frame.local_top = static_cast<uint32_t>(base + most);
  warp.write<uint64_t>(in.operands[0], [=](int) { return uint64_t{base}; });
}
void execute_stacksave(Warp& warp, const Instruction& in) {
  uint64_t top = warp.frame().local_top;
  warp.write<uint64_t>(in.operands[0], [=](int) { return top; });
}
void execute_stackrestore(Warp& warp, const Instruction& in) {
  uint64_t top = warp.lanes<uint64_t>(in.operands[0])[std::countr_zero(warp.active())];
  Frame& frame = warp.frame();
  bool inside = top >= frame.local_base + frame.code->local_bytes && top <= frame.local_top;
  if (inside && warp.active() == warp.current().lanes) frame.local_top = static_cast<uint32_t>(top);
}

// ---- barriers of a block --------------------------------------------------------------------------------------------
enum BarrierFlag : uint32_t { kArrive = 1, kAligned = 2, kCounted = 4, kPopc = 8, kAnd = 16, kOr = 32 };
constexpr uint32_t kReduction = kPopc | kAnd | kOr;

void write_reduction(Warp& warp, const Instruction& in, const Fragment& fragment) {
  Operand d = in.operands[2];
  if (in.aux & kPopc) warp.write<uint32_t>(d, [&](int) { return fragment.barrier_true; });
  if (in.aux & kAnd) warp.set_mask(d, fragment.barrier_true == fragment.barrier_threads ? kAllLanes : 0);
  if (in.aux & kOr) warp.set_mask(d, fragment.barrier_true ? kAllLanes : 0);
}

}  // namespace

void execute_exit(Warp& warp, const Instruction&) { warp.exit_lanes(warp.active()); }
void execute_return(Warp& warp, const Instruction&) { warp.return_lanes(warp.active()); }

// operands: barrier, count, result, predicate
void execute_barrier(Warp& warp, const Instruction& in) {
  Fragment& fragment = warp.current();
  if (fragment.passed) {
    fragment.passed = false;
    if (in.aux & kReduction) write_reduction(warp, in, fragment);
    return;
  }
  if ((in.aux & kAligned) && !warp.collective_all(in, Fault::kBarrier)) return;
  uint32_t lanes = warp.active();
  int first = std::countr_zero(lanes);
  Block& block = warp.block();
  const uint32_t *ids = warp.lanes<uint32_t>(in.operands[0]), *counts = warp.lanes<uint32_t>(in.operands[1]);
  uint32_t id = ids[first], count = in.aux & kCounted ? counts[first] : Barrier::kAllThreads;
  uint32_t all = static_cast<uint32_t>(block.num_warps() * kWarpLanes);
  bool differ = false;
  warp.for_each([&](int lane) { differ |= ids[lane] != id || counts[lane] != counts[first]; });
  bool wrong_count = count != Barrier::kAllThreads && (count == 0 || count % kWarpLanes || count > all);
  if (id >= kNumBarriers || wrong_count || differ) {
    warp.fault(Fault::kBarrier, in, first, [&] {
      if (differ) return std::string("lanes of one warp name different barriers or counts");
      if (id >= kNumBarriers) return "there is no barrier " + std::to_string(id);
      return "barrier " + std::to_string(id) + " with " + std::to_string(count) + " threads, in a block of " +
             std::to_string(block.num_threads()) + ": a multiple of 32 is needed";
    });
    warp.end_launch();
    return;
  }
  Barrier& barrier = block.barrier(static_cast<int>(id));
  // No count and a count of all threads may be mixed. They differ when threads have ended: a count still waits for
  // them.
  bool both_all = (count == all && barrier.expected == Barrier::kAllThreads) ||
                  (count == Barrier::kAllThreads && barrier.expected == all);
  if (barrier.arrived == 0 || both_all) {
    barrier.expected = both_all && barrier.arrived ? all : count;
  } else if (barrier.expected != count) {
    auto number = [&](uint32_t n) { return n == Barrier::kAllThreads ? std::string("all") : std::to_string(n); };
    uint32_t earlier = barrier.expected;
    warp.fault(Fault::kBarrier, in, first, [&] {
      return "barrier " + std::to_string(id) + " with " + number(count) + " threads, others wait there for " +
             number(earlier);
    });
  }
  bool whole = (lanes | warp.exited()) == kAllLanes;
  uint32_t counted = whole ? kWarpLanes : static_cast<uint32_t>(std::popcount(lanes));
  uint32_t lanes_true = in.aux & kReduction ? warp.mask(in.operands[3]) & lanes : 0;
  if (!(in.aux & kArrive)) warp.wait_at_barrier(static_cast<int>(id));
  block.arrive_at_barrier(static_cast<int>(id), warp, lanes, counted, lanes_true);
}

// ---- decoding -------------------------------------------------------------------------------------------------------
namespace {

bool decode_barrier(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  bool bar = in.parts[0] == "bar";
  if (in.parts.size() > 1 && (in.parts[1] == "warp" || in.parts[1] == "cluster")) return false;
  mods.take("cta");
  int kind = mods.take_one_of({"sync", "arrive", "red"});
  bool aligned = mods.take("aligned") || bar;
  int op = kind == 2 ? mods.take_one_of({"popc", "and", "or"}) : -1;
  if (kind == 2 && !mods.take(op == 0 ? "u32" : "pred")) decoder.error("expected the type of the result");
  mods.finish();
  if (kind < 0 || (kind == 2 && op < 0)) decoder.error("expected .sync, .arrive or .red and its operation");
  size_t first = kind == 2 ? 1 : 0, last = kind == 2 ? 1 : 0, count = in.operands.size();
  decoder.expect_operands(in, first + (kind == 1 ? 2 : 1) + last, first + 2 + last);
  bool counted = count == first + 2 + last;
  out.aux = (kind == 1 ? kArrive : 0u) | (aligned ? kAligned : 0u) | (counted ? kCounted : 0u) |
            (op == 0   ? kPopc
             : op == 1 ? kAnd
             : op == 2 ? kOr
                       : 0u);
  std::vector<Operand> operands = {decoder.source(in.operands[first], Type::kU32)};
  operands.push_back(counted ? decoder.source(in.operands[first + 1], Type::kU32) : decoder.constant(0, 4));
  if (kind == 2) {
    operands.push_back(decoder.destination(in.operands[0], op == 0 ? Type::kU32 : Type::kPred));
    operands.push_back(decoder.source(in.operands[count - 1], Type::kPred));
  }
  out.execute = &execute_barrier;
  out.cls = InstructionClass::kBarrier;
  decoder.set_operands(out, std::move(operands));
  return true;
}

void decode_bra(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  mods.take("uni");
  mods.finish();
  decoder.expect_operands(in, 1);
  out.execute = &execute_bra;
  out.cls = InstructionClass::kBranch;
  out.flags |= Instruction::kBranch | Instruction::kEndsBlock;
  out.target = decoder.label(in.operands[0]);
}

void decode_brx(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  Modifiers mods(decoder, in);
  if (!mods.take("idx")) decoder.error("expected .idx");
  mods.take("uni");
  mods.finish();
  decoder.expect_operands(in, 2);
  CodeBuilder& builder = decoder.builder();
  const std::vector<std::string>* names = builder.find_targets(in.operands[1].name, in.scope);
  if (!names) decoder.error("unknown list of targets " + in.operands[1].name);
  auto targets = std::make_shared<std::vector<uint32_t>>();
  for (const std::string& name : *names) targets->push_back(builder.find_label(name, in.scope, in.ptx_line));
  builder.code().jump_tables[static_cast<uint32_t>(builder.code().instructions.size())] = *targets;
  out.data = decoder.keep(targets);
  out.execute = &execute_brx;
  out.cls = InstructionClass::kBranch;
  out.flags |= Instruction::kBranch | Instruction::kEndsBlock;
  out.target = targets->front();
  decoder.set_operands(out, {decoder.source(in.operands[0], Type::kU32)});
}

ParamSlot argument_slot(Decoder& decoder, const ptx::Instruction& in, const ptx::Operand& operand, uint32_t bytes,
                        bool result) {
  using Kind = ptx::Operand::Kind;
  CodeBuilder& builder = decoder.builder();
  bool named = operand.kind == Kind::kSymbol || operand.kind == Kind::kRegister;
  if (named) {
    if (auto reg = builder.find_register(operand.name, in.scope)) {
      if (reg->type == Type::kPred) decoder.error("a predicate as an argument or a result is not emulated");
      ParamSlot slot;
      slot.in_register = true;
      slot.num_bytes = num_bytes(reg->type);
      slot.reg = result ? decoder.destination(operand, reg->type) : decoder.source(operand, reg->type);
      return slot;
    }
    if (auto slot = builder.call_slot(operand.name, in.scope)) return *slot;
    decoder.error("unknown parameter " + operand.name);
  }
  if (result && operand.kind == Kind::kSink) {
    ParamSlot slot;
    slot.in_register = true;
    slot.reg = decoder.sink();
    slot.num_bytes = bytes;
    return slot;
  }
  if (result || operand.kind != Kind::kInteger || bytes == 0) decoder.error("expected a parameter or a register");
  ParamSlot slot;
  slot.in_register = true;
  slot.num_bytes = bytes;
  slot.reg = decoder.constant(operand.value, bytes);
  return slot;
}

std::vector<ParamSlot> argument_slots(Decoder& decoder, const ptx::Instruction& in, const ptx::Operand* list,
                                      const std::vector<ptx::Variable>& formals, bool result) {
  std::vector<ParamSlot> slots;
  size_t count = list ? list->elements.size() : 0;
  if (count != formals.size())
    decoder.error("expected " + std::to_string(formals.size()) + (result ? " results" : " arguments") + ", found " +
                  std::to_string(count));
  for (size_t i = 0; i < count; i++) {
    uint32_t bytes = static_cast<uint32_t>(bytes_of(formals[i]));
    slots.push_back(argument_slot(decoder, in, list->elements[i], bytes, result));
    if (slots.back().num_bytes != bytes)
      decoder.error(std::string(result ? "result " : "argument ") + std::to_string(i) + " has " +
                    std::to_string(slots.back().num_bytes) + " bytes, not the " + std::to_string(bytes) +
                    " of the declaration");
  }
  return slots;
}

void decode_call(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  using Kind = ptx::Operand::Kind;
  Modifiers mods(decoder, in);
  mods.take("uni");
  mods.finish();
  size_t at = 0;
  auto list = [&]() -> const ptx::Operand* {
    return at < in.operands.size() && in.operands[at].kind == Kind::kList ? &in.operands[at++] : nullptr;
  };
  const ptx::Operand* results = list();
  if (at >= in.operands.size()) decoder.error("expected a function");
  const ptx::Operand& target = in.operands[at++];
  const ptx::Operand* arguments = list();
  const ptx::Operand* prototype_name = at < in.operands.size() ? &in.operands[at++] : nullptr;
  if (at != in.operands.size()) decoder.error("expected no more operands");
  if (target.kind != Kind::kSymbol && target.kind != Kind::kRegister) decoder.error("expected a function");

  CodeBuilder& builder = decoder.builder();
  CallSite site;
  out.cls = InstructionClass::kBranch;
  bool indirect = builder.find_register(target.name, in.scope).has_value();
  if (indirect) {
    const ptx::Prototype* prototype = prototype_name ? builder.find_prototype(prototype_name->name, in.scope) : nullptr;
    if (!prototype) decoder.error("expected the prototype of an indirect call");
    site.target = decoder.source(target, Type::kB64);
    site.results = argument_slots(decoder, in, results, prototype->results, true);
    site.arguments = argument_slots(decoder, in, arguments, prototype->params, false);
    out.execute = &execute_indirect_call;
    out.data = decoder.keep(std::make_shared<CallSite>(std::move(site)));
    return;
  }
  const ptx::Function* declared = builder.program().declaration(target.name);
  if (!declared) decoder.error("unknown function " + target.name);
  site.results = argument_slots(decoder, in, results, declared->results, true);
  site.arguments = argument_slots(decoder, in, arguments, declared->params, false);
  site.callee = builder.program().code_of(target.name);
  if (site.callee) {
    out.execute = &execute_call;
    out.data = decoder.keep(std::make_shared<CallSite>(std::move(site)));
    return;
  }
  Builtin builtin = find_builtin(target.name, site.arguments.size());
  if (!builtin) decoder.error("the function " + target.name + " is declared and defined nowhere");
  out.execute = &execute_builtin;
  out.data = decoder.keep(std::make_shared<BuiltinCall>(BuiltinCall{std::move(site), builtin}));
}

void decode_setmaxnreg(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  decoder.require_architecture(90);
  Modifiers mods(decoder, in);
  if (mods.take_one_of({"inc", "dec"}) < 0) decoder.error("expected .inc or .dec");
  mods.take("sync");
  mods.take("aligned");
  mods.take("u32");
  mods.finish();
  decoder.expect_operands(in, 1);
  int64_t count = decoder.integer(in.operands[0]);
  if (count < 24 || count > 256 || count % 8) decoder.error("expected a multiple of 8 from 24 to 256");
  out.execute = &execute_nothing;
}

void decode_stack(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  const std::string& name = in.parts[0];
  Modifiers mods(decoder, in);
  Type type = mods.take_type();
  mods.finish();
  if (num_bytes(type) != 8) decoder.error("expected a type of 64 bits");
  if (name == "alloca") {
    decoder.expect_operands(in, 2, 3);
    int64_t align = in.operands.size() == 3 ? decoder.integer(in.operands[2]) : 8;
    if (align < 1 || align > 1 << 16 || (align & (align - 1))) decoder.error("expected a power of two as alignment");
    out.aux = static_cast<uint32_t>(align);
    out.execute = &execute_alloca;
    decoder.set_operands(out, {decoder.destination(in.operands[0], type), decoder.source(in.operands[1], type)});
    return;
  }
  decoder.expect_operands(in, 1);
  bool save = name == "stacksave";
  out.execute = save ? &execute_stacksave : &execute_stackrestore;
  decoder.set_operands(out, {save ? decoder.destination(in.operands[0], type) : decoder.source(in.operands[0], type)});
}

}  // namespace

bool decode_control(Decoder& decoder, const ptx::Instruction& in, Instruction& out) {
  const std::string& name = in.parts[0];
  if (name == "bar" || name == "barrier") return decode_barrier(decoder, in, out);
  if (name == "bra") {
    decode_bra(decoder, in, out);
  } else if (name == "brx") {
    decode_brx(decoder, in, out);
  } else if (name == "call") {
    decode_call(decoder, in, out);
  } else if (name == "setmaxnreg") {
    decode_setmaxnreg(decoder, in, out);
  } else if (name == "alloca" || name == "stacksave" || name == "stackrestore") {
    decode_stack(decoder, in, out);
  } else if (name == "ret" || name == "exit") {
    Modifiers mods(decoder, in);
    mods.take("uni");
    mods.finish();
    out.execute = name == "exit" || decoder.builder().code().is_entry ? &execute_exit : &execute_return;
    out.cls = InstructionClass::kBranch;
    out.flags |= Instruction::kEndsBlock;
  } else if (name == "trap" || name == "brkpt") {
    out.execute = &execute_trap;
    out.flags |= Instruction::kEndsBlock;
  } else if (name == "nanosleep") {
    Modifiers mods(decoder, in);
    mods.take("u32");
    mods.finish();
    decoder.expect_operands(in, 1);
    decoder.set_operands(out, {decoder.source(in.operands[0], Type::kU32)});
    out.execute = &execute_yield;
  } else if (name == "griddepcontrol") {
    Modifiers mods(decoder, in);
    if (mods.take_one_of({"launch_dependents", "wait"}) < 0) decoder.error("expected .launch_dependents or .wait");
    mods.finish();
    out.execute = &execute_nothing;
  } else if (name == "pmevent") {
    out.execute = &execute_nothing;
  } else {
    return false;
  }
  return true;
}

}  // namespace emulator
