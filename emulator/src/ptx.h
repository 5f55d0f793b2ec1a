// SPDX-License-Identifier: Apache-2.0
// The syntax tree of a PTX module. The parser knows statements, declarations and operands, and no instruction.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace emulator::ptx {

struct Operand {
  enum class Kind : uint8_t {
    kRegister,  // name begins with '%': a declared register or a special one (%tid.x, with its component)
    kInteger,   // value (two's complement of 64 bits)
    kFloat,     // value: bit pattern of a float32 (0f3F800000)
    kDouble,    // value: bit pattern of a float64 (0d..., 1.5)
    kSymbol,    // name (+ value): variable, function, label, register without '%', or .param name
    kAddress,   // [elements[0] + value]; more elements as written: [tensor, {x, y}]
    kVector,    // {elements}
    kList,      // (elements), of calls
    kPair,      // elements[0] | elements[1], a destination and its predicate
    kSink,      // _
  };
  Kind kind = Kind::kSink;
  bool negated = false;  // !p, and -x for a register
  bool generic = false;  // generic(name), in initialisers
  std::string name;
  uint64_t value = 0;
  std::vector<Operand> elements;
};

// Of .loc: where an instruction comes from, the innermost line first, then where each was inlined.
struct Location {
  int file = 0, line = 0;
};
using Locations = std::vector<Location>;

struct Instruction {
  std::vector<std::string> parts;  // "ld", "global", "u32"; "sp::ordered_metadata" stays one part
  std::vector<Operand> operands;
  std::string guard;  // predicate register, or empty
  bool guard_negated = false;
  int ptx_line = 0;
  int scope = 0;             // of Function::scope_parents
  uint32_t locations = 0;    // index of Function::locations
  std::string text() const;  // "ld.global.u32"
};

enum class Space : uint8_t { kReg, kParam, kGlobal, kConst, kShared, kLocal };

// A declared variable, register, register range or parameter.
struct Variable {
  std::string name;
  Space space = Space::kReg;
  std::string type;         // "b32", "pred", ...
  int vector_elements = 1;  // .v2, .v4
  int num_registers = 0;    // %r<36>: names %r0 ... %r35; 0: one variable
  uint32_t align = 0;       // 0: natural
  std::vector<uint64_t> dims;
  bool unsized = false;  // [] of extern shared arrays
  bool is_extern = false;
  std::vector<Operand> initial;  // flattened; the rest is zero
  int scope = 0;
  int ptx_line = 0;
};

struct Prototype {  // .callprototype
  std::vector<Variable> results, params;
};

struct Function {
  std::string name;
  bool is_entry = false, has_body = false;
  std::vector<Variable> results, params;
  std::vector<Variable> variables;  // .reg, .param, .local, .shared of all scopes
  std::vector<int> scope_parents;   // [scope] -> enclosing scope; scope 0 is the body and has parent -1
  std::vector<Instruction> instructions;
  std::vector<Locations> locations;                        // 0: none
  std::map<std::pair<int, std::string>, uint32_t> labels;  // (scope, label) -> index of the next instruction
  std::map<std::pair<int, std::string>, std::vector<std::string>> branch_targets;  // .branchtargets, .calltargets
  std::map<std::pair<int, std::string>, Prototype> prototypes;
  uint32_t max_threads[3] = {0, 0, 0};       // .maxntid
  uint32_t required_threads[3] = {0, 0, 0};  // .reqntid
  int max_registers = 0;                     // .maxnreg
  int min_blocks = 0;                        // .minnctapersm
  int ptx_line = 0;
};

struct Module {
  int version_major = 0, version_minor = 0;
  std::string target;  // "sm_80"
  std::map<int, std::string> files;
  std::vector<Variable> variables;
  std::vector<Function> functions;             // declarations without a definition stay, has_body = false
  std::map<std::string, std::string> aliases;  // .alias name, function
};

// Throws Error with a line number, and what was expected there.
Module parse(std::string_view text, const std::string& name);

}  // namespace emulator::ptx
