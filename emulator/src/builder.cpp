// SPDX-License-Identifier: Apache-2.0
// Where the names of a kernel and of the functions it reaches stand: registers, constants, local and shared memory.
#include "builder.h"

#include <algorithm>
#include <cstring>

#include "emulator.h"
#include "execute_control.h"

namespace emulator {
namespace {

constexpr uint32_t kMaxLocalBytes = 512 * 1024;  // of a thread, as on every GPU
constexpr uint32_t kMaxSharedBytes = 1 << 24;    // far above any GPU; the launch checks the real limit
constexpr uint32_t kLaneArrayAlign = 64;
constexpr uint32_t kMaxBankBytes = Operand::kOffsetMask / 2;

uint64_t round_up(uint64_t value, uint64_t align) { return (value + align - 1) / align * align; }

// Calls f(name) for every name that an operand mentions.
template <typename F>
void for_each_name(const ptx::Operand& operand, F&& f) {
  if (!operand.name.empty()) f(operand.name);
  for (const ptx::Operand& element : operand.elements) for_each_name(element, f);
}

bool is_indirect_call(const ptx::Instruction& in) {
  if (in.parts[0] != "call") return false;
  for (const ptx::Operand& operand : in.operands)
    if (operand.kind == ptx::Operand::Kind::kRegister) return true;
  return false;
}

}  // namespace

uint64_t bytes_of(const ptx::Variable& variable) {
  uint64_t bytes = num_bytes(type_of(variable.type)) * static_cast<uint64_t>(variable.vector_elements);
  for (uint64_t dim : variable.dims) bytes *= dim;
  return bytes;
}

uint32_t align_of(const ptx::Variable& variable) {
  uint32_t natural = num_bytes(type_of(variable.type)) * static_cast<uint32_t>(variable.vector_elements);
  return std::max({variable.align, natural, 1u});
}

ParamLayout layout_of(const std::vector<ptx::Variable>& params) {
  ParamLayout layout;
  uint64_t at = 0;
  for (const ptx::Variable& param : params) {
    uint32_t align = align_of(param);
    at = round_up(at, align);
    layout.offsets.push_back(static_cast<uint32_t>(at));
    layout.sizes.push_back(static_cast<uint32_t>(bytes_of(param)));
    layout.aligns.push_back(align);
    at += bytes_of(param);
    if (at > 1 << 20) throw Error("the parameters of a kernel take more than a megabyte");
  }
  layout.num_bytes = static_cast<uint32_t>(at);
  return layout;
}

// ---- program --------------------------------------------------------------------------------------------------------
ProgramBuilder::ProgramBuilder(const Module& module, const ptx::Module& syntax, int architecture)
    : module_(module), syntax_(syntax), architecture_(architecture), program_(std::make_shared<Program>()) {
  for (const ptx::Function& function : syntax.functions) {
    const ptx::Function*& known = functions_[function.name];
    if (!known || function.has_body) known = &function;
  }
  for (const auto& [alias, name] : syntax.aliases) {
    auto it = functions_.find(name);
    if (it != functions_.end()) functions_[alias] = it->second;
  }
  for (const ptx::Variable& variable : syntax.variables) {
    const ptx::Variable*& known = variables_[variable.name];
    if (!known || known->is_extern) known = &variable;
  }
}

const ptx::Function* ProgramBuilder::declaration(const std::string& name) const {
  auto it = functions_.find(name);
  return it == functions_.end() ? nullptr : it->second;
}

const ptx::Function* ProgramBuilder::definition(const std::string& name) const {
  const ptx::Function* function = declaration(name);
  return function && function->has_body ? function : nullptr;
}

Code* ProgramBuilder::code_of(const std::string& name) const {
  const ptx::Function* function = definition(name);
  if (!function) return nullptr;
  auto it = codes_.find(function->name);
  return it == codes_.end() ? nullptr : it->second;
}

const ptx::Variable* ProgramBuilder::global_variable(const std::string& name) const {
  auto it = variables_.find(name);
  return it == variables_.end() ? nullptr : it->second;
}

// Functions whose address something takes: any of them can be the target of an indirect call.
void ProgramBuilder::add_functions_with_address() {
  std::set<std::string> taken;
  auto take = [&](const std::string& name) { taken.insert(name); };
  for (const ptx::Variable& variable : syntax_.variables)
    for (const ptx::Operand& value : variable.initial) for_each_name(value, take);
  for (const ptx::Function& function : syntax_.functions) {
    for (const ptx::Instruction& in : function.instructions) {
      if (in.parts[0] == "call") continue;
      for (const ptx::Operand& operand : in.operands) for_each_name(operand, take);
    }
  }
  for (const std::string& name : taken) {
    const ptx::Function* function = definition(name);
    if (!function || function->is_entry) continue;
    if (std::find(reached_.begin(), reached_.end(), function) == reached_.end()) reached_.push_back(function);
  }
}

void ProgramBuilder::reach(const std::string& kernel) {
  const ptx::Function* entry = definition(kernel);
  if (!entry || !entry->is_entry) throw Error("the module " + module_.name() + " has no kernel " + kernel);
  reached_ = {entry};
  bool indirect = false;
  for (size_t i = 0; i < reached_.size(); i++) {
    for (const ptx::Instruction& in : reached_[i]->instructions) {
      for (const ptx::Operand& operand : in.operands) {
        for_each_name(operand, [&](const std::string& name) {
          if (!names_.insert(name).second) return;
          const ptx::Function* function = definition(name);
          if (!function || function->is_entry) return;
          if (std::find(reached_.begin(), reached_.end(), function) == reached_.end()) reached_.push_back(function);
        });
      }
      if (!indirect && is_indirect_call(in)) {
        indirect = true;
        add_functions_with_address();
      }
    }
  }
}

void ProgramBuilder::lay_out_shared() {
  uint64_t at = 0;
  std::vector<const ptx::Variable*> dynamic;
  auto place = [&](const ptx::Variable& variable) {
    if (variable.space != ptx::Space::kShared) return;
    if (variable.unsized || variable.is_extern) {
      dynamic.push_back(&variable);
      return;
    }
    at = round_up(at, align_of(variable));
    shared_offsets_[&variable] = static_cast<uint32_t>(at);
    at += bytes_of(variable);
    if (at > kMaxSharedBytes) throw Error("the shared variables of a kernel take more than 16 MiB");
  };
  for (const ptx::Variable& variable : syntax_.variables)
    if (names_.count(variable.name) && variables_[variable.name] == &variable) place(variable);
  for (const ptx::Function* function : reached_)
    for (const ptx::Variable& variable : function->variables) place(variable);
  uint32_t align = 16;
  for (const ptx::Variable* variable : dynamic) align = std::max(align, align_of(*variable));
  if (!dynamic.empty()) at = round_up(at, align);
  for (const ptx::Variable* variable : dynamic) shared_offsets_[variable] = static_cast<uint32_t>(at);
  program_->static_smem = static_cast<uint32_t>(at);
  program_->dynamic_smem_align = align;
}

std::optional<uint32_t> ProgramBuilder::shared_offset(const ptx::Function*, const ptx::Variable& variable) const {
  auto it = shared_offsets_.find(&variable);
  if (it == shared_offsets_.end()) return std::nullopt;
  return it->second;
}

std::shared_ptr<const Program> ProgramBuilder::build(const std::string& kernel) {
  program_->module = &module_;
  reach(kernel);
  lay_out_shared();
  std::vector<std::unique_ptr<CodeBuilder>> builders;
  uint32_t pc = 0;
  for (const ptx::Function* function : reached_) {
    auto code = std::make_unique<Code>();
    code->name = function->name;
    code->is_entry = function->is_entry;
    code->first_pc = pc;
    pc += static_cast<uint32_t>(function->instructions.size()) + 1;
    codes_[function->name] = code.get();
    builders.push_back(std::make_unique<CodeBuilder>(*this, *function, *code));
    program_->codes.push_back(std::move(code));
  }
  program_->num_instructions = pc;
  program_->params_bytes = layout_of(reached_[0]->params).num_bytes;
  for (auto& builder : builders) builder->declare();
  for (auto& builder : builders) builder->decode();
  for (const auto& code : program_->codes) {
    analyse(*code);
    for (uint32_t i = 0; i < code->instructions.size(); i++) program_->places.push_back({code.get(), i});
  }
  for (const auto& [name, code] : codes_) program_->code_at_address[module_.function_address(name)] = code;
  for (const auto& [alias, name] : syntax_.aliases)
    if (Code* code = code_of(alias)) program_->code_at_address[module_.function_address(alias)] = code;
  return program_;
}

// ---- code: declarations ---------------------------------------------------------------------------------------------
CodeBuilder::CodeBuilder(ProgramBuilder& program, const ptx::Function& function, Code& code)
    : program_(program), function_(function), code_(code) {
  code_.register_bytes = kWarpLanes * 8;  // the frame pointer
}

void CodeBuilder::error_at(int ptx_line, const std::string& message) const {
  throw Error(program_.module().name() + ":" + std::to_string(ptx_line) + ": " + message);
}

uint32_t CodeBuilder::local_variable(uint64_t num_bytes, uint32_t align) {
  uint64_t at = round_up(code_.local_bytes, align);
  if (at + num_bytes > kMaxLocalBytes)
    error_at(function_.ptx_line, "function " + function_.name + " needs more than 512 KiB of local memory");
  code_.local_bytes = static_cast<uint32_t>(at + num_bytes);
  return static_cast<uint32_t>(at);
}

CodeBuilder::Register CodeBuilder::allocate(const ptx::Variable& variable) {
  Register out;
  out.type = type_of(variable.type);
  if (out.type == Type::kNone) error_at(variable.ptx_line, "unknown type ." + variable.type + " of " + variable.name);
  if (variable.vector_elements != 1)
    error_at(variable.ptx_line, "vector register " + variable.name + " is not emulated");
  bool is_pred = out.type == Type::kPred;
  uint32_t bytes = is_pred ? 4 : static_cast<uint32_t>(round_up(num_bytes(out.type) * kWarpLanes, kLaneArrayAlign));
  code_.register_bytes = static_cast<uint32_t>(round_up(code_.register_bytes, is_pred ? 4 : kLaneArrayAlign));
  out.offset = code_.register_bytes;
  code_.register_bytes += bytes;
  if (code_.register_bytes > kMaxBankBytes) error_at(variable.ptx_line, "too many registers");
  return out;
}

ParamSlot CodeBuilder::slot_of(const ptx::Variable& variable) {
  ParamSlot slot;
  slot.num_bytes = static_cast<uint32_t>(bytes_of(variable));
  slot.align = align_of(variable);
  slot.in_register = variable.space == ptx::Space::kReg;
  if (slot.in_register) {
    Register reg = allocate(variable);
    if (reg.type == Type::kPred) error_at(variable.ptx_line, "a predicate as a parameter is not emulated");
    registers_[{0, variable.name}] = reg;
    slot.reg = Operand::at(Operand::kRegisters, reg.offset);
    slot.num_bytes = num_bytes(reg.type);
  } else {
    slot.local_offset = local_variable(bytes_of(variable), slot.align);
  }
  return slot;
}

void CodeBuilder::declare() {
  index_variables();
  if (function_.is_entry) {
    ParamLayout layout = layout_of(function_.params);
    for (size_t i = 0; i < function_.params.size(); i++)
      params_[function_.params[i].name] = {ParamSlot{}, layout.offsets[i]};
    return;
  }
  for (const ptx::Variable& param : function_.params) {
    code_.params.push_back(slot_of(param));
    params_[param.name] = {code_.params.back(), 0};
  }
  for (const ptx::Variable& result : function_.results) {
    code_.results.push_back(slot_of(result));
    params_[result.name] = {code_.results.back(), 0};
  }
}

void CodeBuilder::index_variables() {
  for (const ptx::Variable& variable : function_.variables) {
    if (type_of(variable.type) == Type::kNone)
      error_at(variable.ptx_line, "unknown type ." + variable.type + " of " + variable.name);
    bool added;
    if (variable.num_registers > 0) added = ranges_.try_emplace({variable.scope, variable.name}, &variable).second;
    else added = variables_.try_emplace({variable.scope, variable.name}, Place{&variable, false, 0}).second;
    if (!added) error_at(variable.ptx_line, variable.name + " is declared twice");
  }
}

std::optional<CodeBuilder::Register> CodeBuilder::find_register(const std::string& name, int scope) {
  for (int s = scope; s >= 0; s = function_.scope_parents[static_cast<size_t>(s)]) {
    auto known = registers_.find({s, name});
    if (known != registers_.end()) return known->second;
    auto single = variables_.find({s, name});
    if (single != variables_.end()) {
      if (single->second.variable->space != ptx::Space::kReg) return std::nullopt;
      return registers_[{s, name}] = allocate(*single->second.variable);
    }
    // %r12 is the register 12 of a range %r<n>; the prefix may itself end in digits.
    for (size_t split = name.size(); split > 1 && name[split - 1] >= '0' && name[split - 1] <= '9'; split--) {
      size_t digits = name.size() - (split - 1);
      if (digits > 7 || (digits > 1 && name[split - 1] == '0')) continue;
      auto range = ranges_.find({s, name.substr(0, split - 1)});
      if (range == ranges_.end()) continue;
      if (std::stoi(name.substr(split - 1)) >= range->second->num_registers) continue;
      return registers_[{s, name}] = allocate(*range->second);
    }
  }
  auto param = params_.find(name);
  if (param != params_.end() && param->second.first.in_register) return registers_[{0, name}];
  return std::nullopt;
}

std::optional<CodeBuilder::Symbol> CodeBuilder::find_symbol(const std::string& name, int scope) {
  using Kind = Symbol::Kind;
  for (int s = scope; s >= 0; s = function_.scope_parents[static_cast<size_t>(s)]) {
    auto it = variables_.find({s, name});
    if (it == variables_.end()) continue;
    Place& place = it->second;
    const ptx::Variable& variable = *place.variable;
    switch (variable.space) {
      case ptx::Space::kReg: return std::nullopt;
      case ptx::Space::kLocal:
      case ptx::Space::kParam:
        if (!place.placed) place.offset = local_variable(bytes_of(variable), align_of(variable));
        place.placed = true;
        return Symbol{Kind::kLocal, place.offset, variable.space == ptx::Space::kParam};
      case ptx::Space::kShared: {
        auto offset = program_.shared_offset(&function_, variable);
        if (!offset) return std::nullopt;
        return Symbol{Kind::kShared, *offset};
      }
      default: break;  // .global and .const within a function: not written by nvcc
    }
    error_at(variable.ptx_line, "a ." + std::string(variable.space == ptx::Space::kConst ? "const" : "global") +
                                    " variable within a function is not emulated");
  }
  auto param = params_.find(name);
  if (param != params_.end()) {
    if (function_.is_entry) return Symbol{Kind::kParam, param->second.second};
    if (param->second.first.in_register) return std::nullopt;
    return Symbol{Kind::kLocal, param->second.first.local_offset, true};
  }
  if (const ptx::Variable* variable = program_.global_variable(name)) {
    if (variable->space == ptx::Space::kShared) {
      auto offset = program_.shared_offset(&function_, *variable);
      if (offset) return Symbol{Kind::kShared, *offset};
      return std::nullopt;
    }
    uint64_t bytes = 0;
    void* data = program_.module().symbol(name, &bytes);
    if (!data) error_at(variable->ptx_line, "the variable " + name + " is declared extern and defined nowhere");
    return Symbol{Kind::kAddress, reinterpret_cast<uint64_t>(data)};
  }
  if (uint64_t address = program_.module().function_address(name)) return Symbol{Kind::kFunction, address};
  return std::nullopt;
}

std::optional<ParamSlot> CodeBuilder::call_slot(const std::string& name, int scope) {
  auto symbol = find_symbol(name, scope);
  if (!symbol || symbol->kind != Symbol::Kind::kLocal) return std::nullopt;
  ParamSlot slot;
  slot.local_offset = static_cast<uint32_t>(symbol->value);
  for (int s = scope; s >= 0; s = function_.scope_parents[static_cast<size_t>(s)]) {
    auto it = variables_.find({s, name});
    if (it == variables_.end()) continue;
    slot.num_bytes = static_cast<uint32_t>(bytes_of(*it->second.variable));
    slot.align = align_of(*it->second.variable);
    return slot;
  }
  return params_.at(name).first;
}

Operand CodeBuilder::constant(uint64_t low, uint64_t high, uint32_t num_bytes) {
  if (num_bytes < 8) low &= (uint64_t{1} << (8 * num_bytes)) - 1;
  if (num_bytes < 16) high = 0;
  auto [it, added] = constant_offsets_.try_emplace({{low, high}, num_bytes}, constants_size_);
  if (added) {
    constant_values_.push_back({low, high});
    constant_bytes_.push_back(num_bytes);
    constants_size_ += static_cast<uint32_t>(round_up(std::max(num_bytes, 1u) * kWarpLanes, kLaneArrayAlign));
    if (constants_size_ > kMaxBankBytes) error_at(function_.ptx_line, "too many constants");
  }
  return Operand::at(Operand::kConstants, it->second);
}

void CodeBuilder::fill_constants() {
  code_.constants_storage = std::make_unique<std::byte[]>(constants_size_ + kLaneArrayAlign);
  uint64_t address = round_up(reinterpret_cast<uint64_t>(code_.constants_storage.get()), kLaneArrayAlign);
  code_.constants = reinterpret_cast<std::byte*>(address);
  std::byte* at = code_.constants;
  for (size_t i = 0; i < constant_values_.size(); i++) {
    uint32_t bytes = constant_bytes_[i];
    std::byte value[16];
    std::memcpy(value, &constant_values_[i].first, 8);
    std::memcpy(value + 8, &constant_values_[i].second, 8);
    for (uint32_t lane = 0; lane < kWarpLanes; lane++) std::memcpy(at + lane * bytes, value, bytes);
    at += round_up(std::max(bytes, 1u) * kWarpLanes, kLaneArrayAlign);
  }
}

uint32_t CodeBuilder::find_label(const std::string& name, int scope, int ptx_line) const {
  for (int s = scope; s >= 0; s = function_.scope_parents[static_cast<size_t>(s)]) {
    auto it = function_.labels.find({s, name});
    if (it != function_.labels.end()) return it->second;
  }
  error_at(ptx_line, "unknown label " + name);
}

const std::vector<std::string>* CodeBuilder::find_targets(const std::string& name, int scope) const {
  for (int s = scope; s >= 0; s = function_.scope_parents[static_cast<size_t>(s)]) {
    auto it = function_.branch_targets.find({s, name});
    if (it != function_.branch_targets.end()) return &it->second;
  }
  return nullptr;
}

const ptx::Prototype* CodeBuilder::find_prototype(const std::string& name, int scope) const {
  for (int s = scope; s >= 0; s = function_.scope_parents[static_cast<size_t>(s)]) {
    auto it = function_.prototypes.find({s, name});
    if (it != function_.prototypes.end()) return &it->second;
  }
  return nullptr;
}

void CodeBuilder::decode() {
  for (const ptx::Instruction& in : function_.instructions) decode_one(in);
  append_end();
  code_.register_bytes = static_cast<uint32_t>(round_up(code_.register_bytes, kLaneArrayAlign));
  fill_constants();
}

void CodeBuilder::append_end() {
  Instruction end;
  end.execute = code_.is_entry ? &execute_exit : &execute_return;
  end.flags = Instruction::kEndsBlock;
  end.pc = code_.first_pc + static_cast<uint32_t>(code_.instructions.size());
  code_.instructions.push_back(end);
  SourceLine where = code_.info.empty() ? SourceLine{} : code_.info.back().where;
  code_.info.push_back({"end of " + function_.name, where, {}, function_.ptx_line, {}});
}

std::shared_ptr<const Program> decode_program(const Module& module, const ptx::Module& syntax, const std::string& name,
                                              int architecture) {
  return ProgramBuilder(module, syntax, architecture).build(name);
}

}  // namespace emulator
