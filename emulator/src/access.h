// SPDX-License-Identifier: Apache-2.0
// What the memory families share: where the lanes of an instruction point, whether they may, and the reports when not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "machine.h"

namespace emulator {

// The targets of the active lanes, generic addresses resolved.
struct Targets {
  alignas(64) uint64_t address[kWarpLanes];  // global: host address; else the offset in shared or local memory
  alignas(64) std::byte* host[kWarpLanes];
  alignas(64) uint32_t offset[kWarpLanes];     // of lanes in shared memory
  uint32_t global = 0, shared = 0, local = 0;  // lanes
  bool consecutive = false;                    // a full warp in global memory, each lane behind the one before
};

// False: some lane is out of bounds or misaligned; that is reported and the launch ends. `verb`: "reads", "writes", ...
// `lanes`: of active(), those that access anything.
bool resolve(Warp& warp, const Instruction& in, const Address& address, uint32_t num_bytes, uint32_t align,
             const char* verb, Targets& targets, uint32_t lanes);
inline bool resolve(Warp& warp, const Instruction& in, const Address& address, uint32_t num_bytes, uint32_t align,
                    const char* verb, Targets& targets) {
  return resolve(warp, in, address, num_bytes, align, verb, targets, warp.active());
}

// The shadow's verdict on an access to shared memory, reported. Without checks: nothing. `collective` and the result:
// see SharedShadow::access; of a collective the lane that gave the address is reported.
bool check_shared(Warp& warp, const Instruction& in, Access kind, uint32_t lanes, const uint32_t* offset,
                  uint32_t num_bytes, const char* verb, const SameBytes* same = nullptr, bool collective = false);

// Does the lane write what the bytes [first, last) of its target hold already?
struct SameStored {
  bool (*holds)(const void* context, int lane, uint32_t first, uint32_t last);
  const void* context;
};
// The verdict on an access of `lanes` to global memory, against those of other blocks of the launch, reported; before
// it is performed (sync.cpp). `reach`: of a strong access (kAtomicRead, kAtomicWrite). A plain write of what is there
// already is no fault: it does not matter who comes last.
void check_global(Warp& warp, const Instruction& in, Access kind, Reach reach, uint32_t lanes, const Targets& to,
                  uint32_t num_bytes, const char* verb, const SameStored* same = nullptr);

std::string hex(uint64_t value);
std::string bytes_text(uint64_t count);                            // "1 byte", "4 bytes"
std::string place(const Warp& warp, uint32_t pc);                  // "st.shared.u32 at file.cu:12"
std::string thread_name(const Warp& warp, int in_warp, int lane);  // "thread (3, 0, 0)"

}  // namespace emulator
