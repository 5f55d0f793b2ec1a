// SPDX-License-Identifier: Apache-2.0
// The PTX texts that nvcc put into an object: what __cudaRegisterFatBinary is handed, or a whole file that holds it.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace emulator {

// One PTX text, by the architecture of its `.target` line. One for sm_90a runs on sm_90 alone, one for sm_80 on every
// later architecture.
struct PtxText {
  std::string text;
  std::string target;  // "sm_90a"
  int architecture = 0;
  bool is_exact = false;  // the target ends in a letter: "a" is this architecture alone, "f" its family
};

// What stands in a fat binary; `num_machine_codes` and `num_compressed` are for messages.
struct FatBinary {
  std::vector<PtxText> texts;
  int num_machine_codes = 0, num_compressed = 0;
};

// One PTX text as it stands in a .ptx file. Throws Error where it has no .target line.
PtxText ptx_text(std::string_view text);
// Of the wrapper that a host stub registers; throws Error where it is none.
FatBinary read_registered(const void* wrapper);
// All fat binaries in the bytes of an object, a library or a program, one after another.
std::vector<FatBinary> read_file(std::span<const std::byte> bytes);

// The text for the newest target that runs on an architecture. Throws Error, which says what there is and which option
// of nvcc is missing.
const PtxText& choose(const FatBinary& binary, int architecture);

}  // namespace emulator
