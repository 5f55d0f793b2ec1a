// SPDX-License-Identifier: Apache-2.0
// The CPU kernels are compiled once per instruction set; which one runs is decided when the library is loaded.
//
// A kernel file x_cpu.cpp defines `template <> void run_x<kIsa>(const Params&)` for the portable set and AVX2; the op calls it through
// dispatch_isa. A file x_avx512.cpp defines one for AVX-512 alone, of a part for which that has an instruction: the kernels for AVX2
// call it where cpu_isa() is kAvx512.
#pragma once

namespace fmkernels {

enum class Isa : int { kGeneric, kAvx2, kAvx512 };  // kAvx512: F, BW, DQ, VL, BF16
constexpr const char* kIsaNames[] = {"generic", "avx2", "avx512"};

// Instruction set that this file is compiled for.
#if defined(__AVX512BF16__)
constexpr Isa kIsa = Isa::kAvx512;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
constexpr Isa kIsa = Isa::kAvx2;
#else
constexpr Isa kIsa = Isa::kGeneric;
#endif

// The best instruction set of this machine that the library holds, or the one that FMKERNELS_CPU_ISA names, which is read once: the
// tests compare them.
Isa cpu_isa();

// Calls f.template operator()<isa>().
template <class F>
void dispatch_isa(F&& f) {
#ifdef __x86_64__
  if (cpu_isa() != Isa::kGeneric) return f.template operator()<Isa::kAvx2>();
#endif
  f.template operator()<Isa::kGeneric>();
}

}  // namespace fmkernels
