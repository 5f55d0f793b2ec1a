// SPDX-License-Identifier: Apache-2.0
// What an emulated GPU has: the figures that the CUDA runtime reports, and the limits that a launch is held to.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

// Published figures of one well-known GPU of an architecture.
struct Device {
  int architecture;  // 80 is compute capability 8.0
  const char* name;
  int num_sms;
  int clock_khz, memory_clock_khz, memory_bus_bits;
  uint64_t memory_bytes;
  int l2_bytes;
  int shared_per_sm;     // bytes
  int shared_per_block;  // bytes, after opting in: what a multiprocessor has, less what the driver keeps of every block
  int threads_per_sm, blocks_per_sm;
};

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;                       // of a block
constexpr uint32_t kMaxBlockDim[3] = {1024, 1024, 64};  // x, y, z
constexpr uint32_t kMaxGridDim[3] = {0x7fffffff, 0xffff, 0xffff};
constexpr int kSharedWithoutOptIn = 48 * 1024;  // bytes of a block
constexpr int kSharedReserved = 1024;           // bytes of every block that the driver keeps
constexpr int kRegisters = 65536;               // of a multiprocessor, and the most that one block may have
constexpr int kMaxThreadRegisters = 255;
constexpr int kMaxSms = 1024;  // of a device that somebody asks for
constexpr int kConstantBytes = 64 * 1024;

// The device of an architecture; null for one that is not emulated.
const Device* find_device(int architecture);
// "80, 86, 89, 90, 100, 120", for messages.
std::string emulated_architectures();

// Blocks of a kernel that are resident on one multiprocessor at a time.
int resident_blocks(const Device& device, int threads, int registers, uint64_t shared_bytes);

}  // namespace emulator
