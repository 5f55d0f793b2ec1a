// SPDX-License-Identifier: Apache-2.0
// From the syntax tree to the dense form: the table of instruction families, and what Decoder offers them.
#include <algorithm>
#include <bit>
#include <cstring>

#include "builder.h"
#include "emulator.h"
#include "machine.h"

namespace emulator {
namespace {

using Family = bool (*)(Decoder&, const ptx::Instruction&, Instruction&);
constexpr Family kFamilies[] = {decode_integer, decode_control, decode_float, decode_convert,
                                decode_matrix,  decode_memory,  decode_async, decode_warp};

struct SpecialName {
  std::string_view name;
  Special special;
  uint32_t num_bytes;
};
constexpr SpecialName kSpecialNames[] = {
    {"%tid.x", Special::kTidX, 4},
    {"%tid.y", Special::kTidY, 4},
    {"%tid.z", Special::kTidZ, 4},
    {"%ntid.x", Special::kNtidX, 4},
    {"%ntid.y", Special::kNtidY, 4},
    {"%ntid.z", Special::kNtidZ, 4},
    {"%ctaid.x", Special::kCtaidX, 4},
    {"%ctaid.y", Special::kCtaidY, 4},
    {"%ctaid.z", Special::kCtaidZ, 4},
    {"%nctaid.x", Special::kNctaidX, 4},
    {"%nctaid.y", Special::kNctaidY, 4},
    {"%nctaid.z", Special::kNctaidZ, 4},
    {"%laneid", Special::kLaneid, 4},
    {"%warpid", Special::kWarpid, 4},
    {"%nwarpid", Special::kNwarpid, 4},
    {"%smid", Special::kSmid, 4},
    {"%nsmid", Special::kNsmid, 4},
    {"%lanemask_eq", Special::kLanemaskEq, 4},
    {"%lanemask_le", Special::kLanemaskLe, 4},
    {"%lanemask_lt", Special::kLanemaskLt, 4},
    {"%lanemask_ge", Special::kLanemaskGe, 4},
    {"%lanemask_gt", Special::kLanemaskGt, 4},
    {"%dynamic_smem_size", Special::kDynamicSmem, 4},
    {"%total_smem_size", Special::kTotalSmem, 4},
    {"%aggr_smem_size", Special::kTotalSmem, 4},
    {"%envreg1", Special::kWorkspaceHigh, 4},  // as cooperative groups read them
    {"%envreg2", Special::kWorkspaceLow, 4},
    {"%gridid", Special::kGridid, 8},
    {"%current_graph_exec", Special::kZero, 8},
    // A grid without clusters is one of clusters of one block.
    {"%clusterid.x", Special::kCtaidX, 4},
    {"%clusterid.y", Special::kCtaidY, 4},
    {"%clusterid.z", Special::kCtaidZ, 4},
    {"%nclusterid.x", Special::kNctaidX, 4},
    {"%nclusterid.y", Special::kNctaidY, 4},
    {"%nclusterid.z", Special::kNctaidZ, 4},
    {"%cluster_ctaid.x", Special::kZero, 4},
    {"%cluster_ctaid.y", Special::kZero, 4},
    {"%cluster_ctaid.z", Special::kZero, 4},
    {"%cluster_nctaid.x", Special::kOne, 4},
    {"%cluster_nctaid.y", Special::kOne, 4},
    {"%cluster_nctaid.z", Special::kOne, 4},
    {"%cluster_ctarank", Special::kZero, 4},
    {"%cluster_nctarank", Special::kOne, 4},
    {"%is_explicit_cluster", Special::kZero, 4},
};

float to_float(const ptx::Operand& operand) {
  return operand.kind == ptx::Operand::Kind::kFloat ? std::bit_cast<float>(static_cast<uint32_t>(operand.value))
                                                    : static_cast<float>(std::bit_cast<double>(operand.value));
}

// The bits of a number as an immediate of `type`.
uint64_t immediate_bits(const Decoder& decoder, const ptx::Operand& operand, Type type) {
  using Kind = ptx::Operand::Kind;
  bool wide = num_bytes(type) >= 8;
  if (operand.kind == Kind::kInteger) {
    if (type == Type::kF32 || type == Type::kF64) decoder.error("expected a float, found an integer");
    if (type == Type::kPred) return operand.value ? kAllLanes : 0;
    return operand.value;
  }
  if (type == Type::kPred || num_bytes(type) < 4) decoder.error("expected an integer, found a float");
  if (!wide) {
    if (operand.kind == Kind::kFloat) return operand.value;
    return std::bit_cast<uint32_t>(to_float(operand));
  }
  if (operand.kind == Kind::kDouble) return operand.value;
  return std::bit_cast<uint64_t>(static_cast<double>(to_float(operand)));
}

bool is_number(const ptx::Operand& operand) {
  using Kind = ptx::Operand::Kind;
  return operand.kind == Kind::kInteger || operand.kind == Kind::kFloat || operand.kind == Kind::kDouble;
}

}  // namespace

// ---- Decoder --------------------------------------------------------------------------------------------------------
void Decoder::error(const std::string& message) const {
  builder_.error_at(current_->ptx_line, message + " in '" + current_->text() + "'");
}

void Decoder::expect_operands(const ptx::Instruction& in, size_t count) const { expect_operands(in, count, count); }

void Decoder::expect_operands(const ptx::Instruction& in, size_t at_least, size_t at_most) const {
  size_t count = in.operands.size();
  if (count >= at_least && count <= at_most) return;
  std::string range = std::to_string(at_least);
  if (at_most != at_least) range += " to " + std::to_string(at_most);
  error("expected " + range + " operands, found " + std::to_string(count));
}

int Decoder::architecture() const { return builder_.program().architecture(); }

void Decoder::require_architecture(int at_least) const {
  if (architecture() >= at_least) return;
  error("needs sm_" + std::to_string(at_least) + ", but sm_" + std::to_string(architecture()) + " is emulated,");
}

Operand Decoder::constant(uint64_t bits, uint32_t num_bytes) { return builder_.constant(bits, 0, num_bytes); }

Operand Decoder::source(const ptx::Operand& operand, Type type, uint32_t* register_bytes) {
  using Kind = ptx::Operand::Kind;
  uint32_t bytes = num_bytes(type);
  if (register_bytes) *register_bytes = bytes;
  if (is_number(operand)) {
    uint64_t bits = immediate_bits(*this, operand, type);
    uint64_t high = operand.kind == Kind::kInteger && static_cast<int64_t>(bits) < 0 ? ~uint64_t{0} : 0;
    return builder_.constant(bits, high, bytes);
  }
  if (operand.kind != Kind::kRegister && operand.kind != Kind::kSymbol) error("expected a register or a number");
  if (auto reg = builder_.find_register(operand.name, current_->scope)) {
    if (operand.value != 0) error("expected no offset on register " + operand.name);
    bool is_pred = reg->type == Type::kPred;
    if (is_pred != (type == Type::kPred)) {
      error(is_pred ? "expected no predicate, found " + operand.name : "expected a predicate, found " + operand.name);
    }
    if (operand.negated && !is_pred) error("expected a predicate behind '!', found " + operand.name);
    uint32_t declared = num_bytes(reg->type);
    if (register_bytes ? declared < bytes : declared != bytes)
      error("register " + operand.name + " of type ." + name_of(reg->type) + " does not fit an operand of type ." +
            name_of(type));
    if (register_bytes) *register_bytes = declared;
    uses_.push_back({reg->offset, is_pred ? 0 : declared, false});
    Operand out = Operand::at(Operand::kRegisters, reg->offset);
    if (operand.negated) out.bits |= Operand::kNegate;
    return out;
  }
  if (operand.kind == Kind::kRegister) {
    for (const SpecialName& special : kSpecialNames) {
      if (special.name != operand.name) continue;
      if (type == Type::kPred || (register_bytes ? special.num_bytes < bytes : special.num_bytes != bytes))
        error("special register " + operand.name + " does not fit an operand of type ." + name_of(type));
      if (register_bytes) *register_bytes = special.num_bytes;
      return Operand::at(Operand::kSpecials, static_cast<uint32_t>(special.special) * kSpecialBytes);
    }
    error("unknown register " + operand.name);
  }
  auto symbol = builder_.find_symbol(operand.name, current_->scope);
  if (!symbol) error("unknown name " + operand.name);
  if (symbol->kind == CodeBuilder::Symbol::Kind::kLocal || symbol->kind == CodeBuilder::Symbol::Kind::kParam)
    error("the address of " + operand.name + " can only be taken by mov");
  if (bytes < 4) error("the address of " + operand.name + " does not fit an operand of type ." + name_of(type));
  return builder_.constant(symbol->value + operand.value, 0, bytes);
}

Operand Decoder::source(const ptx::Operand& operand, Type type, Moved moved) {
  const size_t before = uses_.size();
  const Operand out = source(operand, type);
  if (uses_.size() > before) uses_.back().moved = moved;
  return out;
}

Operand Decoder::destination(const ptx::Operand& operand, Type type, uint32_t* register_bytes) {
  uint32_t bytes = num_bytes(type);
  if (register_bytes) *register_bytes = bytes;
  if (operand.kind == ptx::Operand::Kind::kSink) return sink();
  if (operand.kind != ptx::Operand::Kind::kRegister && operand.kind != ptx::Operand::Kind::kSymbol)
    error("expected a register to write");
  auto reg = builder_.find_register(operand.name, current_->scope);
  if (!reg) error("unknown register " + operand.name);
  if (operand.negated) error("expected a plain register to write, found a negated one");
  bool is_pred = reg->type == Type::kPred;
  uint32_t declared = num_bytes(reg->type);
  if (is_pred != (type == Type::kPred) || (register_bytes ? declared < bytes : declared != bytes))
    error("register " + operand.name + " of type ." + name_of(reg->type) + " cannot take a result of type ." +
          name_of(type));
  if (register_bytes) *register_bytes = declared;
  uses_.push_back({reg->offset, is_pred ? 0 : declared, true});
  return Operand::at(Operand::kRegisters, reg->offset);
}

Operand Decoder::destination_and_source(const ptx::Operand& operand, Type type) {
  Operand out = destination(operand, type);
  if (out.bank() == Operand::kRegisters) {
    RegisterUse use = uses_.back();
    use.write = false;
    uses_.push_back(use);
  }
  return out;
}

std::vector<Operand> Decoder::sources(const ptx::Operand& operand, Type type, uint32_t* register_bytes) {
  if (operand.kind != ptx::Operand::Kind::kVector) return {source(operand, type, register_bytes)};
  std::vector<Operand> out;
  uint32_t widest = 0;
  for (const ptx::Operand& element : operand.elements) {
    uint32_t bytes = 0;
    out.push_back(source(element, type, register_bytes ? &bytes : nullptr));
    if (!register_bytes) continue;
    bool is_constant = out.back().bank() != Operand::kRegisters;
    if (widest && bytes != widest && !is_constant) error("expected registers of one width in a vector");
    if (!is_constant) widest = bytes;
  }
  if (out.empty()) error("expected registers in a vector");
  if (register_bytes) {
    *register_bytes = widest ? widest : num_bytes(type);
    // Numbers among wider registers: as wide as those.
    for (size_t i = 0; i < out.size(); i++) {
      const ptx::Operand& element = operand.elements[i];
      if (is_number(element)) out[i] = builder_.constant(immediate_bits(*this, element, type), 0, *register_bytes);
    }
  }
  return out;
}

std::vector<Operand> Decoder::destinations(const ptx::Operand& operand, Type type, uint32_t* register_bytes) {
  if (operand.kind != ptx::Operand::Kind::kVector) return {destination(operand, type, register_bytes)};
  std::vector<Operand> out;
  uint32_t widest = 0;
  for (const ptx::Operand& element : operand.elements) {
    uint32_t bytes = 0;
    out.push_back(destination(element, type, register_bytes ? &bytes : nullptr));
    if (!register_bytes || out.back().bank() == Operand::kSink) continue;
    if (widest && bytes != widest) error("expected registers of one width in a vector");
    widest = bytes;
  }
  if (out.empty()) error("expected registers in a vector");
  if (register_bytes) *register_bytes = widest ? widest : num_bytes(type);
  return out;
}

Address Decoder::address(const ptx::Operand& operand, Space space) {
  using Kind = ptx::Operand::Kind;
  using SymbolKind = CodeBuilder::Symbol::Kind;
  if (operand.kind != Kind::kAddress || operand.elements.size() != 1) error("expected an address such as [%rd1+16]");
  const ptx::Operand& base = operand.elements[0];
  Address out;
  out.space = space;
  out.offset = static_cast<int64_t>(operand.value);
  out.uniform = true;
  out.base = builder_.constant(0, 0, 8);
  if (base.kind == Kind::kInteger) {
    out.offset = static_cast<int64_t>(base.value);
    return out;
  }
  if (base.kind != Kind::kRegister && base.kind != Kind::kSymbol) error("expected an address such as [%rd1+16]");
  if (auto reg = builder_.find_register(base.name, current_->scope)) {
    out.base_bytes = num_bytes(reg->type);
    if (reg->type == Type::kPred || (out.base_bytes != 4 && out.base_bytes != 8))
      error("register " + base.name + " of type ." + name_of(reg->type) + " holds no address");
    uses_.push_back({reg->offset, out.base_bytes, false});
    out.base = Operand::at(Operand::kRegisters, reg->offset);
    out.uniform = false;
    if (space == Space::kParam) out.space = Space::kGeneric;
    return out;
  }
  auto symbol = builder_.find_symbol(base.name, current_->scope);
  if (!symbol) error("unknown name " + base.name);
  out.offset += static_cast<int64_t>(symbol->value);
  bool fits = space == Space::kGeneric;
  switch (symbol->kind) {
    case SymbolKind::kFunction: error(base.name + " is a function, no memory");
    case SymbolKind::kAddress: fits |= space == Space::kGlobal || space == Space::kConst; break;
    case SymbolKind::kShared:
      fits |= space == Space::kShared || space == Space::kSharedCluster;
      if (space == Space::kGeneric) out.offset += static_cast<int64_t>(kSharedWindow);
      break;
    case SymbolKind::kLocal:
      fits |= space == (symbol->call_param ? Space::kParam : Space::kLocal);
      out.base = CodeBuilder::frame_pointer();
      out.uniform = false;
      if (space == Space::kGeneric) out.offset += static_cast<int64_t>(kLocalWindow);
      else out.space = Space::kLocal;
      break;
    case SymbolKind::kParam:
      fits |= space == Space::kParam;
      out.space = Space::kParam;
      break;
  }
  if (!fits) error(base.name + " does not lie in the state space of the instruction");
  return out;
}

int64_t Decoder::integer(const ptx::Operand& operand) {
  if (operand.kind != ptx::Operand::Kind::kInteger) error("expected an integer constant");
  return static_cast<int64_t>(operand.value);
}

bool Decoder::is_predicate(const ptx::Operand& operand) const {
  if (operand.kind != ptx::Operand::Kind::kRegister && operand.kind != ptx::Operand::Kind::kSymbol) return false;
  auto reg = builder_.find_register(operand.name, current_->scope);
  return reg && reg->type == Type::kPred;
}

uint32_t Decoder::label(const ptx::Operand& operand) {
  if (operand.kind != ptx::Operand::Kind::kSymbol) error("expected a label");
  return builder_.find_label(operand.name, current_->scope, current_->ptx_line);
}

void Decoder::set_operands(Instruction& out, std::vector<Operand> operands) {
  if (operands.size() > 0xffff) error("too many operands");
  out.num_operands = static_cast<uint16_t>(operands.size());
  builder_.code().operand_lists.push_back(std::move(operands));
  out.operands = builder_.code().operand_lists.back().data();
}

const void* Decoder::keep(std::shared_ptr<const void> object) {
  builder_.program().program().kept.push_back(object);
  return object.get();
}

// ---- Modifiers ------------------------------------------------------------------------------------------------------
bool Modifiers::take(std::string_view part) {
  auto it = std::find(parts_.begin(), parts_.end(), part);
  if (it == parts_.end()) return false;
  parts_.erase(it);
  return true;
}

Type Modifiers::take_type(bool or_predicate) {
  for (auto it = parts_.begin(); it != parts_.end(); ++it) {
    Type type = type_of(*it);
    if (type == Type::kNone) continue;
    if (type == Type::kPred && !or_predicate) decoder_.error("expected a type other than .pred");
    parts_.erase(it);
    return type;
  }
  decoder_.error("expected a type");
}

int Modifiers::take_one_of(std::initializer_list<std::string_view> names) {
  int i = 0;
  for (std::string_view name : names) {
    if (take(name)) return i;
    i++;
  }
  return -1;
}

void Modifiers::finish() const {
  if (!parts_.empty()) decoder_.error("unknown modifier ." + parts_.front());
}

// ---- source lines ---------------------------------------------------------------------------------------------------
void CodeBuilder::set_lines(const ptx::Locations& locations, InstructionInfo& info) const {
  auto line_of = [&](const ptx::Location& location) {
    auto file = program_.syntax().files.find(location.file);
    return SourceLine{file == program_.syntax().files.end() ? "" : file->second, location.line};
  };
  for (const ptx::Location& location : locations) {
    SourceLine line = line_of(location);
    bool toolkit = line.file.find("/targets/") != std::string::npos && line.file.find("/include/") != std::string::npos;
    if (info.where.line > 0) {
      info.caller = line;
    } else if (!toolkit) {
      info.where = line;
    }
  }
  if (info.where.line == 0 && !locations.empty()) info.where = line_of(locations[0]);
}

// ---- one instruction ------------------------------------------------------------------------------------------------
void CodeBuilder::decode_one(const ptx::Instruction& in) {
  Decoder decoder(*this);
  decoder.current_ = &in;
  Operand guard;
  std::vector<RegisterUse> guard_use;
  if (!in.guard.empty()) {
    ptx::Operand predicate;
    predicate.kind = ptx::Operand::Kind::kRegister;
    predicate.name = in.guard;
    predicate.negated = in.guard_negated;
    guard = decoder.source(predicate, Type::kPred);
    guard_use = decoder.uses_;
  }
  for (Family family : kFamilies) {
    Instruction out;
    decoder.uses_ = guard_use;
    if (!family(decoder, in, out)) continue;
    if (!in.guard.empty()) {
      out.guard = guard;
      out.flags |= Instruction::kGuarded;
    }
    out.pc = code_.first_pc + static_cast<uint32_t>(code_.instructions.size());
    code_.instructions.push_back(out);
    if (out.flags & Instruction::kPropagates)
      for (size_t i = guard_use.size(); i < decoder.uses_.size(); i++) decoder.uses_[i].moved = Moved::kAlways;
    InstructionInfo info{in.text(), {}, {}, in.ptx_line, std::move(decoder.uses_)};
    set_lines(function_.locations[in.locations], info);
    code_.info.push_back(std::move(info));
    return;
  }
  decoder.error("unknown instruction");
}

}  // namespace emulator
