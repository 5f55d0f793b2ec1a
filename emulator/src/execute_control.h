// SPDX-License-Identifier: Apache-2.0
// What the control family shares with the scheduler: the ends of a function, and calls.
#pragma once

#include <string>
#include <vector>

#include "program.h"

namespace emulator {

// The ends of a function, which core appends to every body.
void execute_exit(Warp&, const Instruction&);
void execute_return(Warp&, const Instruction&);
void execute_barrier(Warp&, const Instruction&);

// One call instruction: where its arguments and results stand in the caller.
struct CallSite {
  const Code* callee = nullptr;  // null: an indirect call of the function whose address `target` holds
  Operand target;
  std::vector<ParamSlot> arguments, results;
};

// A function of the CUDA device library that no PTX defines: vprintf, __assertfail, malloc, free.
using Builtin = void (*)(Warp&, const Instruction&, const CallSite&);
Builtin find_builtin(const std::string& name, size_t num_arguments);

}  // namespace emulator
