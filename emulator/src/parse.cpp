// SPDX-License-Identifier: Apache-2.0
// PTX text to syntax tree, by recursive descent.
#include <algorithm>
#include <array>
#include <optional>

#include "lexer.h"
#include "ptx.h"

namespace emulator::ptx {
namespace {

using Kind = Token::Kind;
constexpr int kMaxNesting = 64;  // of operands and initialisers
constexpr uint64_t kMaxVariableBytes = 1ull << 36;
constexpr int kMaxRegistersOfName = 1 << 20;

struct SpaceName {
  std::string_view word;
  Space space;
};
constexpr SpaceName kSpaces[] = {{"reg", Space::kReg},           {"param", Space::kParam},   {"global", Space::kGlobal},
                                 {"const", Space::kConst},       {"shared", Space::kShared}, {"local", Space::kLocal},
                                 {"shared::cta", Space::kShared}};

std::optional<Space> space_of_word(const Token& token) {
  if (token.kind != Kind::kDotted) return std::nullopt;
  for (const SpaceName& name : kSpaces)
    if (token.text == name.word) return name.space;
  return std::nullopt;
}

class Parser {
 public:
  Parser(std::string_view text, const std::string& name) : lexer_(text, name) {}

  using Position = std::array<int, 3>;  // file, line, column

  Module parse() {
    while (!lexer_.at_end()) top_level();
    if (module_.version_major == 0) lexer_.error_at(1, "expected a .version directive: this is no PTX");
    return std::move(module_);
  }

 private:
  // ---- module ----
  void top_level() {
    const Token& token = lexer_.peek();
    if (token.kind != Kind::kDotted) lexer_.error("expected a directive");
    if (lexer_.take_dotted("version")) {
      std::string text(lexer_.next().text);
      module_.version_major = std::atoi(text.c_str());
      size_t dot = text.find('.');
      module_.version_minor = dot == std::string::npos ? 0 : std::atoi(text.c_str() + dot + 1);
      if (module_.version_major <= 0) lexer_.error("expected a version such as 8.0");
    } else if (lexer_.take_dotted("target")) {
      module_.target = lexer_.expect_name("a target such as sm_80");
      while (lexer_.take(',')) lexer_.expect_name("a target");
    } else if (lexer_.take_dotted("address_size")) {
      if (lexer_.expect_integer("an address size") != 64) lexer_.error("only .address_size 64 is emulated");
    } else if (lexer_.take_dotted("file")) {
      file();
    } else if (lexer_.take_dotted("section")) {
      while (!lexer_.at_end() && !lexer_.is('{')) lexer_.next();
      lexer_.skip_braces();
    } else if (lexer_.take_dotted("pragma")) {
      skip_to_semicolon();
    } else if (lexer_.take_dotted("alias")) {
      std::string alias = lexer_.expect_name("the name of an alias");
      lexer_.expect(',');
      module_.aliases[alias] = lexer_.expect_name("the name of a function");
      lexer_.expect(';');
    } else {
      declaration();
    }
  }

  void file() {
    int index = static_cast<int>(lexer_.expect_integer("a file number"));
    if (lexer_.peek().kind != Kind::kString) lexer_.error("expected a file name");
    module_.files[index] = std::string(lexer_.next().text);
    while (lexer_.take(',')) lexer_.next();
  }

  void skip_to_semicolon() {
    while (!lexer_.at_end() && !lexer_.is(';')) lexer_.next();
    lexer_.expect(';');
  }

  bool linkage(bool* is_extern) {
    if (lexer_.take_dotted("extern")) return *is_extern = true;
    for (std::string_view word : {"visible", "weak", "common"})
      if (lexer_.take_dotted(word)) return true;
    if (lexer_.take_dotted("attribute")) {
      skip_parentheses();
      return true;
    }
    return false;
  }

  void skip_parentheses() {
    lexer_.expect('(');
    int depth = 1;
    while (!lexer_.at_end() && depth > 0) {
      if (lexer_.is('(')) depth++;
      if (lexer_.is(')')) depth--;
      lexer_.next();
    }
  }

  void declaration() {
    bool is_extern = false;
    while (linkage(&is_extern)) {
    }
    if (lexer_.take_dotted("entry")) return function(true);
    if (lexer_.take_dotted("func")) return function(false);
    if (!space_of_word(lexer_.peek())) lexer_.error("expected a directive, a variable or a function");
    variables(module_.variables, is_extern, 0);
  }

  // ---- variables ----
  // The part before the name: space, alignment, vector and type, pointer attributes.
  Variable variable_head(bool is_extern, int scope) {
    Variable variable;
    variable.ptx_line = lexer_.peek().line;
    variable.is_extern = is_extern;
    variable.scope = scope;
    std::optional<Space> space = space_of_word(lexer_.peek());
    if (!space) lexer_.error("expected a state space");
    lexer_.next();
    variable.space = *space;
    for (;;) {
      if (lexer_.take_dotted("align")) {
        int64_t align = lexer_.expect_integer("an alignment");
        if (align < 1 || align > 65536 || (align & (align - 1))) lexer_.error("expected a power of two as alignment");
        if (!pointer_attributes_) variable.align = static_cast<uint32_t>(align);
      } else if (lexer_.take_dotted("ptr")) {
        pointer_attributes_ = true;
      } else if (pointer_attributes_ && space_of_word(lexer_.peek())) {
        lexer_.next();
      } else if (lexer_.take_dotted("attribute")) {
        skip_parentheses();
      } else if (lexer_.is_dotted("v2") || lexer_.is_dotted("v4") || lexer_.is_dotted("v8")) {
        variable.vector_elements = lexer_.next().text[1] - '0';
      } else if (lexer_.peek().kind == Kind::kDotted) {
        if (!variable.type.empty()) lexer_.error("expected a name");
        variable.type = std::string(lexer_.next().text);
      } else {
        break;
      }
    }
    pointer_attributes_ = false;
    if (variable.type.empty()) lexer_.error("expected a type");
    return variable;
  }

  void dimensions(Variable& variable) {
    uint64_t product = 1;
    while (lexer_.take('[')) {
      if (lexer_.take(']')) {
        variable.unsized = true;
        variable.dims.push_back(0);
        continue;
      }
      int64_t dim = lexer_.expect_integer("an array size");
      if (dim < 0 || (dim > 0 && product > kMaxVariableBytes / static_cast<uint64_t>(dim)))
        lexer_.error("the array is too large");
      product *= static_cast<uint64_t>(std::max<int64_t>(dim, 1));
      variable.dims.push_back(static_cast<uint64_t>(dim));
      lexer_.expect(']');
    }
  }

  void initialiser(Variable& variable, int depth) {
    if (depth > kMaxNesting) lexer_.error("the initialiser is nested too deeply");
    if (lexer_.take('{')) {
      if (lexer_.take('}')) return;
      do initialiser(variable, depth + 1);
      while (lexer_.take(','));
      lexer_.expect('}');
      return;
    }
    variable.initial.push_back(initial_value(depth));
  }

  Operand initial_value(int depth) {
    if (depth > kMaxNesting) lexer_.error("the initialiser is nested too deeply");
    if (lexer_.peek().kind == Kind::kName && lexer_.peek().text == "generic") {
      lexer_.next();
      lexer_.expect('(');
      Operand value = operand(0);
      lexer_.expect(')');
      value.generic = true;
      if (lexer_.take('+')) value.value += static_cast<uint64_t>(lexer_.expect_integer("an offset"));
      return value;
    }
    Operand value = operand(0);
    if (value.kind == Operand::Kind::kInteger && lexer_.is('(')) {  // 0xFF00(symbol): one byte of its address
      lexer_.next();
      Operand symbol = initial_value(depth + 1);
      lexer_.expect(')');
      symbol.elements.push_back(value);
      return symbol;
    }
    return value;
  }

  // A whole declaration statement, several names with commas.
  void variables(std::vector<Variable>& into, bool is_extern, int scope) {
    Variable head = variable_head(is_extern, scope);
    do {
      Variable variable = head;
      variable.name = lexer_.expect_name("the name of a variable");
      if (lexer_.take('<')) {
        int64_t count = lexer_.expect_integer("a number of registers");
        if (count < 1 || count > kMaxRegistersOfName) lexer_.error("the number of registers is out of range");
        variable.num_registers = static_cast<int>(count);
        lexer_.expect('>');
      }
      dimensions(variable);
      if (lexer_.take('=')) initialiser(variable, 0);
      into.push_back(std::move(variable));
    } while (lexer_.take(','));
    lexer_.expect(';');
  }

  std::vector<Variable> parameter_list() {
    std::vector<Variable> list;
    lexer_.expect('(');
    if (lexer_.take(')')) return list;
    do {
      Variable variable = variable_head(false, -1);
      variable.name = lexer_.expect_name("the name of a parameter");
      dimensions(variable);
      list.push_back(std::move(variable));
    } while (lexer_.take(','));
    lexer_.expect(')');
    return list;
  }

  // ---- functions ----
  void function(bool is_entry) {
    Function function;
    function.is_entry = is_entry;
    function.ptx_line = lexer_.peek().line;
    if (lexer_.is('(')) function.results = parameter_list();
    function.name = lexer_.expect_name("the name of a function");
    if (lexer_.is('(')) function.params = parameter_list();
    function_directives(function);
    if (!lexer_.take(';')) {
      lexer_.expect('{');
      function.has_body = true;
      body(function);
    }
    module_.functions.push_back(std::move(function));
  }

  void dimension_list(uint32_t (&out)[3]) {
    for (uint32_t& dim : out) dim = 1;
    int i = 0;
    do {
      int64_t value = lexer_.expect_integer("a size");
      if (i >= 3 || value < 0 || value > 0x7fffffff) lexer_.error("expected up to three sizes");
      out[i++] = static_cast<uint32_t>(value);
    } while (lexer_.take(','));
  }

  void function_directives(Function& function) {
    while (lexer_.peek().kind == Kind::kDotted) {
      std::string word(lexer_.next().text);
      uint32_t ignored[3];
      if (word == "maxntid") dimension_list(function.max_threads);
      else if (word == "reqntid") dimension_list(function.required_threads);
      else if (word == "minnctapersm") function.min_blocks = static_cast<int>(lexer_.expect_integer("a number"));
      else if (word == "maxnreg") function.max_registers = static_cast<int>(lexer_.expect_integer("a number"));
      else if (word == "maxclusterrank" || word == "maxnctapersm" || word == "abi_preserve" ||
               word == "abi_preserve_control")
        lexer_.expect_integer("a number");
      else if (word == "reqnctapercluster") dimension_list(ignored);
      else if (word == "pragma") skip_to_semicolon();
      else if (word == "attribute") skip_parentheses();
      else if (word != "noreturn" && word != "explicitcluster" && word != "blocksareclusters")
        lexer_.error("unknown directive ." + word + " of a function");
    }
  }

  void body(Function& function) {
    function.scope_parents = {-1};
    std::vector<int> scopes = {0};
    function.locations = {{}};
    inlined_.clear();
    for (;;) {
      if (lexer_.at_end()) lexer_.error("expected '}'");
      int scope = scopes.back();
      if (lexer_.take('{')) {
        function.scope_parents.push_back(scope);
        scopes.push_back(static_cast<int>(function.scope_parents.size()) - 1);
      } else if (lexer_.take('}')) {
        scopes.pop_back();
        if (scopes.empty()) return;
      } else if (lexer_.take(';')) {
      } else if (lexer_.peek().kind == Kind::kDotted) {
        directive(function, scope);
      } else {
        statement(function, scope);
      }
    }
  }

  // .loc file line column [, function_name label [+ n], inlined_at file line column]
  void location(Function& function) {
    Position at = position(), inlined_at{};
    while (lexer_.take(',')) {
      if (lexer_.expect_name("'inlined_at'") == "inlined_at") {
        inlined_at = position();
      } else {
        lexer_.next();
        if (lexer_.take('+')) lexer_.expect_integer("an offset");
      }
    }
    if (at[1] <= 0) return;  // made by the compiler: stays with the line before
    inlined_[at] = inlined_at;
    Locations locations;
    for (Position p = at; p[1] > 0 && locations.size() < kMaxNesting; p = inlined_[p])
      locations.push_back({p[0], p[1]});
    function.locations.push_back(std::move(locations));
  }

  Position position() {
    Position out;
    for (int& value : out) value = static_cast<int>(lexer_.expect_integer("a file, a line and a column"));
    return out;
  }

  void directive(Function& function, int scope) {
    if (lexer_.take_dotted("loc")) {
      location(function);
    } else if (lexer_.take_dotted("pragma")) {
      skip_to_semicolon();
    } else if (lexer_.take_dotted("file")) {
      file();
    } else {
      bool is_extern = false;
      while (linkage(&is_extern)) {
      }
      variables(function.variables, is_extern, scope);
    }
  }

  void statement(Function& function, int scope) {
    Instruction in;
    in.scope = scope;
    in.locations = static_cast<uint32_t>(function.locations.size()) - 1;
    in.ptx_line = lexer_.peek().line;
    if (lexer_.take('@')) {
      in.guard_negated = lexer_.take('!');
      in.guard = lexer_.expect_name("a predicate");
    }
    std::string name = lexer_.expect_name("an instruction");
    if (in.guard.empty() && lexer_.take(':')) {
      if (!labelled_directive(function, scope, name)) {
        auto [it, added] = function.labels.try_emplace({scope, name}, function.instructions.size());
        if (!added) lexer_.error_at(in.ptx_line, "the label " + name + " stands twice");
      }
      return;
    }
    in.parts.push_back(std::move(name));
    while (lexer_.peek().kind == Kind::kDotted) in.parts.emplace_back(lexer_.next().text);
    if (!lexer_.is(';')) {
      do in.operands.push_back(operand(0));
      while (lexer_.take(','));
    }
    lexer_.expect(';');
    function.instructions.push_back(std::move(in));
  }

  bool labelled_directive(Function& function, int scope, const std::string& name) {
    if (lexer_.take_dotted("branchtargets") || lexer_.take_dotted("calltargets")) {
      std::vector<std::string>& targets = function.branch_targets[{scope, name}];
      do targets.push_back(lexer_.expect_name("a target"));
      while (lexer_.take(','));
      lexer_.expect(';');
      return true;
    }
    if (!lexer_.take_dotted("callprototype")) return false;
    Prototype prototype;
    if (lexer_.is('(')) prototype.results = parameter_list();
    lexer_.expect_name("'_'");
    if (lexer_.is('(')) prototype.params = parameter_list();
    while (lexer_.peek().kind == Kind::kDotted) {
      lexer_.next();
      if (lexer_.peek().kind == Kind::kInteger) lexer_.next();
    }
    lexer_.expect(';');
    function.prototypes[{scope, name}] = std::move(prototype);
    return true;
  }

  // ---- operands ----
  Operand operand(int depth) {
    Operand first = single_operand(depth);
    if (!lexer_.take('|')) return first;
    Operand pair;
    pair.kind = Operand::Kind::kPair;
    pair.elements.push_back(std::move(first));
    pair.elements.push_back(single_operand(depth + 1));
    return pair;
  }

  void elements(Operand& into, char end, int depth) {
    if (lexer_.take(end)) return;
    do into.elements.push_back(operand(depth + 1));
    while (lexer_.take(','));
    lexer_.expect(end);
  }

  Operand single_operand(int depth) {
    if (depth > kMaxNesting) lexer_.error("the operand is nested too deeply");
    Operand out;
    if (lexer_.take('{')) {
      out.kind = Operand::Kind::kVector;
      elements(out, '}', depth);
      return out;
    }
    if (lexer_.take('(')) {
      out.kind = Operand::Kind::kList;
      elements(out, ')', depth);
      return out;
    }
    if (lexer_.take('[')) return address(depth);
    if (lexer_.take('!')) {
      out = single_operand(depth + 1);
      out.negated = !out.negated;
      return out;
    }
    if (lexer_.take('-')) {
      out = single_operand(depth + 1);
      if (out.kind == Operand::Kind::kInteger) out.value = 0 - out.value;
      else if (out.kind == Operand::Kind::kFloat) out.value ^= uint64_t{1} << 31;
      else if (out.kind == Operand::Kind::kDouble) out.value ^= uint64_t{1} << 63;
      else lexer_.error("expected a number behind '-'");
      return out;
    }
    if (lexer_.take('+')) return single_operand(depth + 1);
    if (lexer_.take('~')) {
      out = single_operand(depth + 1);
      if (out.kind != Operand::Kind::kInteger) lexer_.error("expected an integer behind '~'");
      out.value = ~out.value;
      return out;
    }
    const Token& token = lexer_.peek();
    switch (token.kind) {
      case Kind::kInteger: out.kind = Operand::Kind::kInteger; break;
      case Kind::kFloat: out.kind = Operand::Kind::kFloat; break;
      case Kind::kDouble: out.kind = Operand::Kind::kDouble; break;
      case Kind::kName: return name_operand();
      default: lexer_.error("expected an operand");
    }
    out.value = lexer_.next().value;
    return out;
  }

  Operand name_operand() {
    Operand out;
    out.name = std::string(lexer_.next().text);
    if (out.name == "_") {
      out.name.clear();
      return out;
    }
    if (out.name == "WARP_SZ") {
      out.kind = Operand::Kind::kInteger;
      out.value = 32;
      return out;
    }
    out.kind = out.name[0] == '%' ? Operand::Kind::kRegister : Operand::Kind::kSymbol;
    while (lexer_.peek().kind == Kind::kDotted && lexer_.peek().adjacent)
      out.name += "." + std::string(lexer_.next().text);
    out.value = offset();
    return out;
  }

  uint64_t offset() {
    uint64_t value = 0;
    for (;;) {
      bool negative = lexer_.is('-');
      if (!negative && !lexer_.is('+')) return value;
      lexer_.next();
      uint64_t next = static_cast<uint64_t>(lexer_.expect_integer("an offset"));
      value += negative ? 0 - next : next;
    }
  }

  Operand address(int depth) {
    Operand out;
    out.kind = Operand::Kind::kAddress;
    Operand base = single_operand(depth + 1);
    if (base.kind == Operand::Kind::kInteger) base.value += offset();
    else out.value = std::exchange(base.value, 0);
    out.elements.push_back(std::move(base));
    while (lexer_.take(',')) out.elements.push_back(operand(depth + 1));
    lexer_.expect(']');
    return out;
  }

  Lexer lexer_;
  Module module_;
  bool pointer_attributes_ = false;
  std::map<Position, Position> inlined_;  // where the code of a position was inlined last, {} for nowhere
};

}  // namespace

std::string Instruction::text() const {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : ".") + part;
  return text;
}

Module parse(std::string_view text, const std::string& name) { return Parser(text, name).parse(); }

}  // namespace emulator::ptx
