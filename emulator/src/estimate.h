// SPDX-License-Identifier: Apache-2.0
// estimate.h: how long each unit of a GPU is busy with the events of a launch, from nominal rates.
//
// An estimate from counts, good for comparing two kernels on the same work and never to be quoted as a time: no
// latency, no dependence of one instruction on another, no occupancy, no cache, and blocks spread evenly over all SMs.
// The instructions are those of the PTX: what ptxas fuses, moves or spills does not show.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "counters.h"

namespace emulator {

enum class Unit : uint8_t {
  kIssue,    // warp-instructions, without those that vanish
  kTensor,   // every mma at the dense bf16 rate of mma.sync
  kFp32,     // fp32 and half arithmetic
  kInt,      // integer arithmetic, comparisons, selects, fp min and max
  kMufu,     // ex2, lg2, rcp, rsqrt, sin, cos, tanh
  kConvert,  //
  kFp64,     //
  kShared,   // wavefronts, and shuffles, which use the same path
  kL1,       // sectors through the SM's global path
  kL2,       // the same sectors, as though L1 held none
  kDram,     // distinct bytes, as though the L2 cache were cold and large enough
  kCount
};
constexpr int kNumUnits = static_cast<int>(Unit::kCount);
const char* name_of(Unit);  // "issue": the key in JSON

// Nominal rates, a clock and SM where nothing else is said. Lanes: 32 of them are one warp-instruction.
struct GpuRates {
  const char* name;
  int architecture;
  int num_sms;
  double clock_ghz;           // at which the published peaks hold
  double mma_flops;           // dense bf16 with fp32 accumulation, by mma.sync
  double fp32_lanes;          //
  double half_lanes;          // of packed pairs
  double int_lanes;           //
  double mufu_lanes;          //
  double convert_lanes;       //
  double fp64_lanes;          //
  double shuffle_lanes;       //
  double l1_bytes;            //
  double l2_bytes_per_clock;  // of the whole GPU
  double dram_gb_per_second;  // of the whole GPU
};
std::span<const GpuRates> known_gpus();

struct Estimate {
  std::array<double, kNumUnits> cycles{};  // of one SM
  double of(Unit unit) const { return cycles[static_cast<size_t>(unit)]; }
  Unit binds() const;  // the busiest; the first of equals
};
Estimate estimate(const Totals&, const GpuRates&);

}  // namespace emulator
