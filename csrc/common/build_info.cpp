// SPDX-License-Identifier: Apache-2.0
// What a library was built for and what it chose at load, as C functions that `python -m fmkernels doctor` reads with
// ctypes: they need no tensor, and thus no op.
#include <exception>

#include "isa.h"

#pragma GCC visibility push(default)
extern "C" {

#ifdef FM_CUDA

// As CMake was given them, comma-separated: "80,90a".
const char* fmkernels_cuda_archs() { return FM_CUDA_ARCHS; }
const char* fmkernels_cuda_version() { return FM_CUDA_VERSION; }

#else

// Null where FMKERNELS_CPU_ISA asks for what this machine does not have; every CPU kernel then raises the reason.
const char* fmkernels_cpu_isa() {
  try {
    return fmkernels::kIsaNames[static_cast<int>(fmkernels::cpu_isa())];
  } catch (const std::exception&) {
    return nullptr;
  }
}
const char* fmkernels_compiler() { return FM_COMPILER; }

#endif

}  // extern "C"
#pragma GCC visibility pop
