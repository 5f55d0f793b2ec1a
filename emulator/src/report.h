// SPDX-License-Identifier: Apache-2.0
// What the checks found: one report for each kind of fault and instruction, however often it happens.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace emulator {

// Whatever keeps a module from being loaded or a kernel from being launched: one sentence.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class Fault : uint8_t {
  kOutOfBounds,
  kMisaligned,
  kUnwrittenShared,
  kUnwrittenRegister,
  kRace,
  kWarpRace,
  kInFlight,
  kBarrier,
  kCollective,
  kDeadlock,
  kLivelock,
  kBlockRace,
  kLaunch,
  kTrap
};
const char* name_of(Fault fault);  // "race", "out of bounds", ...

// Innermost line of an instruction, the file as .file gives it; line 0: compiled without -lineinfo.
struct SourceLine {
  std::string file;
  int line = 0;
};

struct Report {
  Fault fault = Fault::kTrap;
  std::string kernel;  // name as in the PTX (mangled)
  SourceLine where;
  uint32_t block[3] = {};
  uint32_t thread[3] = {};
  std::string text;  // one sentence
  uint64_t count = 1;
};

// Safe from several threads.
class Reports {
 public:
  // True, and counted, when this fault of this instruction has been added before: no text need be made then.
  bool again(Fault fault, const void* instruction);
  void add(Fault fault, const void* instruction, Report report);
  // In the order of their first occurrence; empties.
  std::vector<Report> take();
  bool empty() const;

 private:
  mutable std::mutex mutex_;
  std::map<std::pair<Fault, const void*>, size_t> index_;
  std::vector<Report> reports_;
};

}  // namespace emulator
