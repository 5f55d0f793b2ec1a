// SPDX-License-Identifier: Apache-2.0
// The CPU kernels are compiled once per instruction set; which one runs is decided when the library is loaded.
//
// A kernel file defines `template <> void run_x<kIsa>(const Params&)`; the op calls it through dispatch_isa.
#pragma once

namespace fmkernels {

enum class Isa : int { kGeneric, kAvx2 };

// Instruction set that this file is compiled for.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
constexpr Isa kIsa = Isa::kAvx2;
#else
constexpr Isa kIsa = Isa::kGeneric;
#endif

// The best instruction set of this machine that the library holds. FMKERNELS_CPU_ISA=generic, read once, forces the
// portable kernels: the tests compare the two.
Isa cpu_isa();

// Calls f.template operator()<isa>().
template <class F>
void dispatch_isa(F&& f) {
#ifdef __x86_64__
  if (cpu_isa() == Isa::kAvx2) return f.template operator()<Isa::kAvx2>();
#endif
  f.template operator()<Isa::kGeneric>();
}

}  // namespace fmkernels
