// SPDX-License-Identifier: Apache-2.0
// estimate.cpp: the table of nominal rates, and busy cycles from it.

#include "estimate.h"

#include <algorithm>

namespace emulator {
namespace {

// Rates: CUDA C++ Programming Guide (throughput of native arithmetic instructions) and the data sheets. Peaks at these
// clocks: 312, 989 and 165 TFLOP/s. On H100 mma.sync reaches about 0.62 of what wgmma does, by a published
// microbenchmark.
constexpr double kMmaSyncShareOfWgmma = 0.62;
constexpr GpuRates kGpus[] = {
    {.name = "A100",
     .architecture = 80,
     .num_sms = 108,
     .clock_ghz = 1.41,
     .mma_flops = 2048,
     .fp32_lanes = 64,
     .half_lanes = 128,
     .int_lanes = 64,
     .mufu_lanes = 16,
     .convert_lanes = 16,
     .fp64_lanes = 32,
     .shuffle_lanes = 32,
     .l1_bytes = 64,
     .l2_bytes_per_clock = 5120,
     .dram_gb_per_second = 2039},
    {.name = "RTX 4090",
     .architecture = 89,
     .num_sms = 128,
     .clock_ghz = 2.52,
     .mma_flops = 512,
     .fp32_lanes = 128,
     .half_lanes = 128,
     .int_lanes = 64,
     .mufu_lanes = 16,
     .convert_lanes = 64,
     .fp64_lanes = 2,
     .shuffle_lanes = 32,
     .l1_bytes = 64,
     .l2_bytes_per_clock = 2048,
     .dram_gb_per_second = 1008},
    {.name = "H100",
     .architecture = 90,
     .num_sms = 132,
     .clock_ghz = 1.83,
     .mma_flops = 4096 * kMmaSyncShareOfWgmma,
     .fp32_lanes = 128,
     .half_lanes = 128,
     .int_lanes = 64,
     .mufu_lanes = 16,
     .convert_lanes = 64,
     .fp64_lanes = 64,
     .shuffle_lanes = 32,
     .l1_bytes = 64,
     .l2_bytes_per_clock = 5120,
     .dram_gb_per_second = 3350},
};

constexpr double kWarp = 32;
constexpr double kIssueSlots = 4;  // a clock: one of each quarter of an SM
constexpr std::array<const char*, kNumUnits> kUnitNames = {"issue", "tensor", "fp32", "int", "mufu", "convert",
                                                           "fp64",  "shared", "l1",   "l2",  "dram"};

}  // namespace

const char* name_of(Unit unit) { return kUnitNames.at(static_cast<size_t>(unit)); }

std::span<const GpuRates> known_gpus() { return kGpus; }

Unit Estimate::binds() const {
  return static_cast<Unit>(std::max_element(cycles.begin(), cycles.end()) - cycles.begin());
}

Estimate estimate(const Totals& totals, const GpuRates& gpu) {
  using Class = InstructionClass;
  auto warps = [&](auto... classes) { return (static_cast<double>(totals.of(classes)) + ...); };
  const double sectors = static_cast<double>(totals.sectors_read + totals.sectors_written);
  const double distinct = static_cast<double>(totals.distinct_bytes_read + totals.distinct_bytes_written);
  Estimate result;
  auto put = [&](Unit unit, double cycles) { result.cycles[static_cast<size_t>(unit)] = cycles; };
  auto spread = [&](Unit unit, double cycles) { put(unit, cycles / gpu.num_sms); };  // over all SMs

  spread(Unit::kIssue, static_cast<double>(totals.issue_slots) / kIssueSlots);
  spread(Unit::kTensor, static_cast<double>(totals.mma_flops) / gpu.mma_flops);
  spread(Unit::kFp32, warps(Class::kFma) * kWarp / gpu.fp32_lanes + warps(Class::kHalf) * kWarp / gpu.half_lanes);
  spread(Unit::kInt,
         warps(Class::kIntAlu, Class::kIntMul, Class::kSetSelect, Class::kFpMinMaxCompare) * kWarp / gpu.int_lanes);
  spread(Unit::kMufu, warps(Class::kMufu) * kWarp / gpu.mufu_lanes);
  spread(Unit::kConvert, warps(Class::kConvert) * kWarp / gpu.convert_lanes);
  spread(Unit::kFp64, warps(Class::kFp64) * kWarp / gpu.fp64_lanes);
  spread(Unit::kShared, static_cast<double>(totals.wavefronts) + warps(Class::kShuffle) * kWarp / gpu.shuffle_lanes);
  spread(Unit::kL1, sectors * kSectorBytes / gpu.l1_bytes);
  put(Unit::kL2, sectors * kSectorBytes / gpu.l2_bytes_per_clock);
  put(Unit::kDram, distinct / gpu.dram_gb_per_second * gpu.clock_ghz);
  return result;
}

}  // namespace emulator
