// SPDX-License-Identifier: Apache-2.0
// A module of PTX: its variables in host memory, its kernels decoded on demand.
#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>

#include "builder.h"
#include "emulator.h"
#include "memory.h"

namespace emulator {
namespace {

// Function pointers are tokens in a window of their own: nothing can be read there.
constexpr uint64_t kFunctionWindow = uint64_t{3} << 56;
constexpr uint64_t kMaxVariableBytes = uint64_t{1} << 34;

}  // namespace

std::shared_ptr<Module> Module::parse(const std::string& text, const std::string& name, const Options& options) {
  auto module = std::shared_ptr<Module>(new Module);
  module->name_ = name;
  module->options_ = options;
  module->syntax_ = std::make_unique<ptx::Module>(ptx::parse(text, name));
  uint64_t token = kFunctionWindow;
  for (const ptx::Function& function : module->syntax_->functions) {
    if (!function.has_body) continue;
    if (!module->function_addresses_.try_emplace(function.name, token += 16).second)
      throw Error(name + ":" + std::to_string(function.ptx_line) + ": function " + function.name + " is defined twice");
  }
  for (const auto& [alias, target] : module->syntax_->aliases) {
    auto it = module->function_addresses_.find(target);
    if (it != module->function_addresses_.end()) module->function_addresses_.try_emplace(alias, it->second);
  }
  module->place_variables();
  module->initialise_variables();
  return module;
}

Module::~Module() {
  for (auto& [name, variable] : variables_) device_memory().remove(variable.data, variable.num_bytes);
}

void Module::place_variables() {
  for (const ptx::Variable& variable : syntax_->variables) {
    if (variable.space != ptx::Space::kGlobal && variable.space != ptx::Space::kConst) continue;
    std::string where = name_ + ":" + std::to_string(variable.ptx_line) + ": ";
    Type type = type_of(variable.type);
    if (type == Type::kNone &&
        (variable.type == "texref" || variable.type == "samplerref" || variable.type == "surfref"))
      throw Error(where + "textures and surfaces are not emulated");
    if (type == Type::kNone || type == Type::kPred) throw Error(where + "unknown type ." + variable.type);
    if (variable.is_extern) continue;
    ptx::Variable sized = variable;
    if (variable.unsized) {  // the initialiser says how many
      uint64_t rest = 1;
      for (uint64_t dim : variable.dims) rest *= std::max<uint64_t>(dim, 1);
      sized.dims = {std::max<uint64_t>(variable.initial.size(), rest)};
    }
    Variable placed{variable.name, nullptr, bytes_of(sized), {nullptr, std::free}};
    if (placed.num_bytes > kMaxVariableBytes) throw Error(where + variable.name + " is larger than 16 GiB");
    // The runtime hands out 256-byte aligned memory; kernels may rely on what the declaration says only.
    uint64_t align = std::max<uint64_t>(align_of(variable), 16);
    placed.storage.reset(std::calloc(placed.num_bytes + align, 1));  // pages that nobody touches cost nothing
    if (!placed.storage) throw Error(where + "there is no memory for " + variable.name);
    uint64_t address = (reinterpret_cast<uint64_t>(placed.storage.get()) + align - 1) / align * align;
    placed.data = reinterpret_cast<std::byte*>(address);
    auto [it, added] = variables_.try_emplace(variable.name, std::move(placed));
    if (!added) throw Error(where + variable.name + " is defined twice");
    device_memory().add(it->second.data, it->second.num_bytes, variable.name);
  }
}

void Module::initialise_variables() {
  for (const ptx::Variable& variable : syntax_->variables) {
    auto placed = variables_.find(variable.name);
    if (placed == variables_.end() || variable.is_extern) continue;
    if (variable.space != ptx::Space::kGlobal && variable.space != ptx::Space::kConst) continue;
    std::string where = name_ + ":" + std::to_string(variable.ptx_line) + ": ";
    uint32_t bytes = num_bytes(type_of(variable.type));
    std::byte* at = placed->second.data;
    if (variable.initial.size() * bytes > placed->second.num_bytes)
      throw Error(where + "the initialiser of " + variable.name + " is longer than the variable");
    for (const ptx::Operand& initial : variable.initial) {
      using Kind = ptx::Operand::Kind;
      uint64_t value = initial.value;
      if (initial.kind == Kind::kSymbol) {
        auto other = variables_.find(initial.name);
        uint64_t function = function_address(initial.name);
        if (other == variables_.end() && function == 0)
          throw Error(where + "unknown name " + initial.name + " in the initialiser of " + variable.name);
        value += function ? function : reinterpret_cast<uint64_t>(other->second.data);
        if (!initial.elements.empty()) {  // 0xFF00(symbol)
          uint64_t mask = initial.elements[0].value;
          value = mask ? (value & mask) >> std::countr_zero(mask) : 0;
        }
      } else if (initial.kind == Kind::kFloat && bytes == 8) {
        value = std::bit_cast<uint64_t>(static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(value))));
      } else if (initial.kind == Kind::kDouble && bytes == 4) {
        value = std::bit_cast<uint32_t>(static_cast<float>(std::bit_cast<double>(value)));
      } else if (initial.kind != Kind::kInteger && initial.kind != Kind::kFloat && initial.kind != Kind::kDouble) {
        throw Error(where + "expected numbers and names in the initialiser of " + variable.name);
      }
      std::memset(at, 0, bytes);
      std::memcpy(at, &value, std::min<uint32_t>(bytes, 8));
      at += bytes;
    }
  }
}

uint64_t Module::function_address(const std::string& name) const {
  auto it = function_addresses_.find(name);
  return it == function_addresses_.end() ? 0 : it->second;
}

void* Module::symbol(const std::string& name, uint64_t* num_bytes) const {
  auto it = variables_.find(name);
  if (it == variables_.end()) return nullptr;
  if (num_bytes) *num_bytes = it->second.num_bytes;
  return it->second.data;
}

std::vector<std::string> Module::kernel_names() const {
  std::vector<std::string> names;
  for (const ptx::Function& function : syntax_->functions)
    if (function.is_entry && function.has_body) names.push_back(function.name);
  return names;
}

std::vector<const Function*> Module::kernels() const {
  std::vector<const Function*> out;
  for (const std::string& name : kernel_names()) out.push_back(find(name));
  return out;
}

const Function* Module::find(const std::string& name) const {
  std::lock_guard lock(mutex_);
  auto known = functions_.find(name);
  if (known != functions_.end()) return known->second.get();
  auto syntax = std::find_if(syntax_->functions.begin(), syntax_->functions.end(), [&](const ptx::Function& function) {
    return function.is_entry && function.has_body && function.name == name;
  });
  if (syntax == syntax_->functions.end()) return nullptr;
  auto function = std::make_unique<Function>();
  function->program_ = decode_program(*this, *syntax_, name, options_.architecture);
  FunctionInfo& info = function->info_;
  info.name = name;
  ParamLayout layout = layout_of(syntax->params);
  for (size_t i = 0; i < syntax->params.size(); i++)
    info.params.push_back({syntax->params[i].name, layout.offsets[i], layout.sizes[i], layout.aligns[i]});
  info.params_bytes = layout.num_bytes;
  info.static_smem = function->program_->static_smem;
  info.local_bytes = function->program_->codes[0]->local_bytes;
  info.num_registers = function->program_->codes[0]->words_alive;
  auto count = [](const uint32_t (&dims)[3]) { return dims[0] * dims[1] * dims[2]; };
  info.max_threads = count(syntax->max_threads);
  if (uint32_t required = count(syntax->required_threads)) {
    info.max_threads = required;
    std::copy(std::begin(syntax->required_threads), std::end(syntax->required_threads), info.required_threads);
  }
  info.min_blocks = static_cast<uint32_t>(std::max(syntax->min_blocks, 0));
  return functions_.emplace(name, std::move(function)).first->second.get();
}

uint32_t Function::num_instructions() const { return program_->num_instructions; }

SourceLine Function::source_line(uint32_t pc) const {
  return pc < program_->num_instructions ? program_->info(pc).where : SourceLine{};
}

std::string Function::instruction_text(uint32_t pc) const {
  return pc < program_->num_instructions ? program_->info(pc).text : "";
}

}  // namespace emulator
