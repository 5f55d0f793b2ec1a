// SPDX-License-Identifier: Apache-2.0
// The emulator as its users see it: modules of PTX, kernels in them, launches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "counters.h"
#include "report.h"

namespace emulator {

namespace ptx {
struct Module;
struct Function;
}  // namespace ptx
struct Program;

struct Options {
  int architecture = 80;                      // 10 * compute capability
  int num_sms = 0;                            // multiprocessors; 0: as many as the architecture's device has
  bool checks = true;                         // bounds, alignment, barriers and traps are checked even without
  bool counters = true;                       //
  int threads = 1;                            // OS threads over the blocks of a launch
  uint64_t max_instructions = 4'000'000'000;  // warp-instructions of a launch, then it is a livelock
};

struct ParamInfo {
  std::string name;
  uint32_t offset = 0, num_bytes = 0, align = 0;
};

struct FunctionInfo {
  std::string name;
  std::vector<ParamInfo> params;
  uint32_t params_bytes = 0;
  uint32_t static_smem = 0;           // bytes of the shared variables that the kernel reaches
  uint32_t local_bytes = 0;           // of the kernel itself, a thread
  uint32_t num_registers = 0;         // 32-bit values alive at one time at most; ptxas may need more, or fewer
  uint32_t max_threads = 0;           // .maxntid or .reqntid, 0: the architecture's limit
  uint32_t required_threads[3] = {};  // .reqntid, or zeros
  uint32_t min_blocks = 0;            // .minnctapersm
};

class Module;

// A kernel, decoded when it is first asked for.
class Function {
 public:
  const FunctionInfo& info() const { return info_; }
  const Program& program() const { return *program_; }  // program.h
  // Of an instruction, by the pc that Counters and reports know it by; pcs are 0 ... num_instructions() - 1.
  uint32_t num_instructions() const;
  SourceLine source_line(uint32_t pc) const;
  std::string instruction_text(uint32_t pc) const;  // "ld.global.u32"

 private:
  friend class Module;
  FunctionInfo info_;
  std::shared_ptr<const Program> program_;
};

class Module : public std::enable_shared_from_this<Module> {
 public:
  // Throws Error. Every kernel of the module is decoded when it is first found.
  static std::shared_ptr<Module> parse(const std::string& text, const std::string& name, const Options& options);
  ~Module();
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;

  // The kernel of this name, decoded; null when there is none. Throws Error when it holds what is not known.
  const Function* find(const std::string& name) const;
  std::vector<std::string> kernel_names() const;
  std::vector<const Function*> kernels() const;  // all, decoded
  // The memory of a .global or .const variable; null when there is none.
  void* symbol(const std::string& name, uint64_t* num_bytes) const;
  // The value of a function's address, a token; 0 when there is no such function.
  uint64_t function_address(const std::string& name) const;
  const std::string& name() const { return name_; }
  const ptx::Module& syntax() const { return *syntax_; }

 private:
  struct Variable {
    std::string name;
    std::byte* data;
    uint64_t num_bytes;
    std::unique_ptr<void, void (*)(void*)> storage;
  };
  Module() = default;
  void place_variables();
  void initialise_variables();

  std::string name_;
  Options options_;
  std::unique_ptr<ptx::Module> syntax_;
  std::map<std::string, Variable> variables_;
  std::map<std::string, uint64_t> function_addresses_;
  mutable std::mutex mutex_;
  mutable std::map<std::string, std::unique_ptr<Function>> functions_;
};

struct Launch {
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1};
  uint32_t dynamic_smem = 0;
  const std::byte* params = nullptr;  // packed as FunctionInfo::params says
  uint64_t params_bytes = 0;
  uint64_t grid_workspace = 0;  // of a cooperative launch: address of memory in which its blocks wait for each other
};

struct LaunchOutcome {
  std::vector<Report> reports;
  LaunchRecord record;
  bool completed = false;  // false: a deadlock, livelock, trap or wild access ended the launch
};

// Runs a whole grid. Throws Error for a launch that the PTX itself forbids (parameter bytes, .maxntid, .reqntid,
// zero sizes); limits of the architecture are the business of the caller (device.h).
LaunchOutcome launch(const Module& module, const Function& function, const Launch& launch, const Options& options);

}  // namespace emulator
