// SPDX-License-Identifier: Apache-2.0
#include "device.h"

#include <algorithm>

namespace emulator {
namespace {

constexpr int kKiB = 1024, kMiB = 1024 * kKiB;
constexpr uint64_t kGiB = uint64_t{1024} * kMiB;
constexpr int kRegisterGranularity = 256;  // a warp gets a multiple of it
constexpr int kSubpartitions = 4;          // of a multiprocessor, each with a quarter of its registers
constexpr int kSharedGranularity = 128;

constexpr Device kDevices[] = {
    {80, "A100-SXM4-80GB (emulated)", 108, 1410000, 1593000, 5120, 80 * kGiB, 40 * kMiB, 164 * kKiB, 163 * kKiB, 2048,
     32},
    {86, "GeForce RTX 3090 (emulated)", 82, 1695000, 9751000, 384, 24 * kGiB, 6 * kMiB, 100 * kKiB, 99 * kKiB, 1536,
     16},
    {89, "GeForce RTX 4090 (emulated)", 128, 2520000, 10501000, 384, 24 * kGiB, 72 * kMiB, 100 * kKiB, 99 * kKiB, 1536,
     24},
    {90, "H100 SXM (emulated)", 132, 1980000, 2619000, 5120, 80 * kGiB, 50 * kMiB, 228 * kKiB, 227 * kKiB, 2048, 32},
    {100, "B200 (emulated)", 148, 1965000, 3996000, 8192, 180 * kGiB, 126 * kMiB, 228 * kKiB, 227 * kKiB, 2048, 32},
    {120, "GeForce RTX 5090 (emulated)", 170, 2407000, 14001000, 512, 32 * kGiB, 96 * kMiB, 100 * kKiB, 99 * kKiB, 1536,
     24},
};

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

const Device* find_device(int architecture) {
  for (const Device& device : kDevices) {
    if (device.architecture == architecture) return &device;
  }
  return nullptr;
}

std::string emulated_architectures() {
  std::string list;
  for (const Device& device : kDevices) {
    list += (list.empty() ? "" : ", ") + std::to_string(device.architecture);
  }
  return list;
}

int resident_blocks(const Device& device, int threads, int registers, uint64_t shared_bytes) {
  if (threads < 1 || threads > kMaxThreads || registers > kMaxThreadRegisters) return 0;
  if (shared_bytes > static_cast<uint64_t>(device.shared_per_block)) return 0;
  const int warps = (threads + kWarpSize - 1) / kWarpSize;
  const int warp_registers = round_up(std::max(registers, 1) * kWarpSize, kRegisterGranularity);
  if (warp_registers * round_up(warps, kSubpartitions) > kRegisters) return 0;
  const int by_registers = kRegisters / kSubpartitions / warp_registers * kSubpartitions / warps;
  const int by_threads = device.threads_per_sm / kWarpSize / warps;
  const int block_shared = round_up(static_cast<int>(shared_bytes) + kSharedReserved, kSharedGranularity);
  const int by_shared = device.shared_per_sm / block_shared;
  return std::min({device.blocks_per_sm, by_registers, by_threads, by_shared});
}

}  // namespace emulator
