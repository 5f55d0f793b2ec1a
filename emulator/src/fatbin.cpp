// SPDX-License-Identifier: Apache-2.0
#include "fatbin.h"

#include <cctype>
#include <cstdint>
#include <cstring>

#include "report.h"

namespace emulator {
namespace {

// The layout, from the public fatbinary_section.h (the wrapper) and from what nvcc 13.0 writes (the rest).
constexpr uint32_t kWrapperMagic = 0x466243b1, kBinaryMagic = 0xba55ed50;
struct Wrapper {
  uint32_t magic, version;
  const std::byte* binary;
  const void* more;
};
struct BinaryHeader {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t entries_bytes;
};
struct EntryHeader {
  uint16_t kind, version;
  uint32_t header_bytes;
  uint64_t padded_bytes;
  uint32_t compressed_bytes;  // 0: plain
};
constexpr uint16_t kKindPtx = 1, kKindMachineCode = 2;

template <class T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// `available`: bytes that may be read, the header's among them.
FatBinary read_binary(const std::byte* bytes, size_t available) {
  const auto header = load<BinaryHeader>(bytes);
  if (header.header_bytes < sizeof header || header.header_bytes > available ||
      header.entries_bytes > available - header.header_bytes) {
    throw Error("a fat binary is longer than what holds it");
  }
  FatBinary result;
  const std::byte* entry = bytes + header.header_bytes;
  const std::byte* const end = entry + header.entries_bytes;
  while (entry + sizeof(EntryHeader) <= end) {
    const auto head = load<EntryHeader>(entry);
    const uint64_t left = end - entry;
    if (head.header_bytes < sizeof head || head.header_bytes > left || head.padded_bytes > left - head.header_bytes) {
      throw Error("an entry of a fat binary is longer than the fat binary");
    }
    if (head.kind == kKindPtx && head.compressed_bytes == 0) {
      const std::string_view padded(reinterpret_cast<const char*>(entry + head.header_bytes), head.padded_bytes);
      result.texts.push_back(ptx_text(padded.substr(0, padded.find('\0'))));
    } else if (head.kind == kKindPtx) {
      ++result.num_compressed;
    } else if (head.kind == kKindMachineCode) {
      ++result.num_machine_codes;
    }
    entry += head.header_bytes + head.padded_bytes;
  }
  return result;
}

}  // namespace

PtxText ptx_text(std::string_view text) {
  constexpr std::string_view kDirective = ".target";
  size_t at = text.find(kDirective);
  // The directive, not the word in a comment: nothing but spaces stand before it on its line.
  while (at != std::string_view::npos) {
    size_t begin = at;
    while (begin > 0 && (text[begin - 1] == ' ' || text[begin - 1] == '\t')) --begin;
    if (begin == 0 || text[begin - 1] == '\n') break;
    at = text.find(kDirective, at + 1);
  }
  at = at == std::string_view::npos ? at : text.find("sm_", at);
  if (at == std::string_view::npos) throw Error("this is no PTX: it has no .target line");
  const size_t begin = at;
  PtxText result;
  result.text = text;
  for (at += 3; at < text.size() && std::isdigit(static_cast<unsigned char>(text[at])); ++at) {
    if (result.architecture < 100000) result.architecture = result.architecture * 10 + (text[at] - '0');
  }
  result.is_exact = at < text.size() && std::isalpha(static_cast<unsigned char>(text[at]));
  result.target = text.substr(begin, at - begin + result.is_exact);
  return result;
}

FatBinary read_registered(const void* wrapper) {
  if (wrapper == nullptr || load<Wrapper>(static_cast<const std::byte*>(wrapper)).magic != kWrapperMagic) {
    throw Error("what was registered is no fat binary of nvcc");
  }
  const std::byte* binary = load<Wrapper>(static_cast<const std::byte*>(wrapper)).binary;
  const auto header = load<BinaryHeader>(binary);
  if (header.magic != kBinaryMagic) throw Error("the registered fat binary does not begin as nvcc's do");
  return read_binary(binary, header.header_bytes + header.entries_bytes);
}

std::vector<FatBinary> read_file(std::span<const std::byte> bytes) {
  std::vector<FatBinary> result;
  constexpr size_t kAlignment = 8;
  for (size_t at = 0; at + sizeof(BinaryHeader) <= bytes.size();) {
    const auto header = load<BinaryHeader>(bytes.data() + at);
    if (header.magic == kBinaryMagic && header.header_bytes == sizeof header &&
        header.entries_bytes <= bytes.size() - at - sizeof header) {
      result.push_back(read_binary(bytes.data() + at, bytes.size() - at));
      at += sizeof header + header.entries_bytes;
      at = (at + kAlignment - 1) / kAlignment * kAlignment;
    } else {
      at += kAlignment;
    }
  }
  return result;
}

const PtxText& choose(const FatBinary& binary, int architecture) {
  const PtxText* best = nullptr;
  std::string all;
  for (const PtxText& text : binary.texts) {
    all += (all.empty() ? "" : ", ") + text.target;
    const bool runs = text.is_exact ? text.architecture == architecture : text.architecture <= architecture;
    const bool is_newer = best == nullptr || text.architecture > best->architecture ||
                          (text.architecture == best->architecture && text.is_exact);
    if (runs && is_newer) best = &text;
  }
  if (best != nullptr) return *best;
  const std::string wanted = std::to_string(architecture);
  std::string message = "no PTX that sm_" + wanted + " runs";
  if (!all.empty()) message += ": there is PTX for " + all;
  if (binary.num_compressed > 0) {
    throw Error(message + "; " + std::to_string(binary.num_compressed) +
                " more are compressed: compile with nvcc --no-compress");
  }
  if (all.empty() && binary.num_machine_codes > 0) message += ": there is machine code alone";
  throw Error(message + "; compile with nvcc -gencode arch=compute_" + wanted + ",code=compute_" + wanted);
}

}  // namespace emulator
