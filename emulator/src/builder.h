// SPDX-License-Identifier: Apache-2.0
// Behind Decoder: what stands where while a function, and the program around it, is decoded.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "program.h"

namespace emulator {

// One kernel with the functions and shared variables it reaches.
class ProgramBuilder {
 public:
  ProgramBuilder(const Module& module, const ptx::Module& syntax, int architecture);
  std::shared_ptr<const Program> build(const std::string& kernel);

  int architecture() const { return architecture_; }
  const Module& module() const { return module_; }
  const ptx::Module& syntax() const { return syntax_; }
  Program& program() { return *program_; }
  // The definition of a function (aliases followed), null when the module only declares it or does not know it.
  const ptx::Function* definition(const std::string& name) const;
  const ptx::Function* declaration(const std::string& name) const;
  Code* code_of(const std::string& name) const;  // null when this program does not reach it
  std::optional<uint32_t> shared_offset(const ptx::Function* function, const ptx::Variable& variable) const;
  const ptx::Variable* global_variable(const std::string& name) const;

 private:
  void reach(const std::string& kernel);
  void lay_out_shared();
  void add_functions_with_address();

  const Module& module_;
  const ptx::Module& syntax_;
  int architecture_;
  std::shared_ptr<Program> program_;
  std::map<std::string, const ptx::Function*> functions_;
  std::map<std::string, const ptx::Variable*> variables_;
  std::vector<const ptx::Function*> reached_;
  std::set<std::string> names_;  // symbols that the reached functions mention
  std::map<const ptx::Variable*, uint32_t> shared_offsets_;
  std::map<std::string, Code*> codes_;
};

// One function of it.
class CodeBuilder {
 public:
  CodeBuilder(ProgramBuilder& program, const ptx::Function& function, Code& code);
  void declare();  // parameters and results: callers need them before the body is decoded
  void decode();

  struct Register {
    uint32_t offset = 0;
    Type type = Type::kNone;
    int vector_elements = 1;
  };
  // What a name stands for that is no register.
  struct Symbol {
    enum class Kind { kAddress, kShared, kLocal, kParam, kFunction };
    Kind kind = Kind::kAddress;
    uint64_t value = 0;       // host address, offset, or function token
    bool call_param = false;  // a .param variable in local memory
  };
  [[noreturn]] void error_at(int ptx_line, const std::string& message) const;
  std::optional<Register> find_register(const std::string& name, int scope);
  std::optional<Symbol> find_symbol(const std::string& name, int scope);
  Operand constant(uint64_t low, uint64_t high, uint32_t num_bytes);
  uint32_t find_label(const std::string& name, int scope, int ptx_line) const;
  const std::vector<std::string>* find_targets(const std::string& name, int scope) const;
  const ptx::Prototype* find_prototype(const std::string& name, int scope) const;
  uint32_t local_variable(uint64_t num_bytes, uint32_t align);
  ParamSlot slot_of(const ptx::Variable& variable);
  // The slot of a .param variable of a call, as the caller sees it.
  std::optional<ParamSlot> call_slot(const std::string& name, int scope);

  ProgramBuilder& program() { return program_; }
  void note_release() { program_.program().orders_blocks = true; }
  Code& code() { return code_; }
  const ptx::Function& function() const { return function_; }
  static Operand frame_pointer() { return Operand::at(Operand::kRegisters, 0); }

 private:
  friend class Decoder;
  void index_variables();
  Register allocate(const ptx::Variable& variable);
  void set_lines(const ptx::Locations& locations, InstructionInfo& info) const;
  void decode_one(const ptx::Instruction& in);
  void append_end();
  void fill_constants();

  struct Place {
    const ptx::Variable* variable = nullptr;
    bool placed = false;
    uint32_t offset = 0;
  };
  ProgramBuilder& program_;
  const ptx::Function& function_;
  Code& code_;
  std::map<std::pair<int, std::string>, Place> variables_;              // of this function, by scope and name
  std::map<std::pair<int, std::string>, const ptx::Variable*> ranges_;  // %r<n>, by scope and prefix
  std::map<std::pair<int, std::string>, Register> registers_;
  std::map<std::string, std::pair<ParamSlot, uint32_t>>
      params_;  // params and results of a .func: slot; of an entry: offset
  std::map<std::pair<std::pair<uint64_t, uint64_t>, uint32_t>, uint32_t> constant_offsets_;
  std::vector<std::pair<uint64_t, uint64_t>> constant_values_;  // with its width in constant_bytes_
  std::vector<uint32_t> constant_bytes_;
  uint32_t constants_size_ = 0;
};

// Parameters of a kernel: offset and size of each in the parameter block.
struct ParamLayout {
  std::vector<uint32_t> offsets, sizes, aligns;
  uint32_t num_bytes = 0;
};
ParamLayout layout_of(const std::vector<ptx::Variable>& params);
uint64_t bytes_of(const ptx::Variable& variable);
uint32_t align_of(const ptx::Variable& variable);

}  // namespace emulator
