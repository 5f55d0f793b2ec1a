// SPDX-License-Identifier: Apache-2.0
// What the checks found.
#include "report.h"

namespace emulator {

const char* name_of(Fault fault) {
  switch (fault) {
    case Fault::kOutOfBounds: return "out of bounds";
    case Fault::kMisaligned: return "misaligned";
    case Fault::kUnwrittenShared: return "unwritten shared memory";
    case Fault::kUnwrittenRegister: return "unwritten register";
    case Fault::kRace: return "race";
    case Fault::kWarpRace: return "race within a warp";
    case Fault::kInFlight: return "copy in flight";
    case Fault::kBarrier: return "barrier";
    case Fault::kCollective: return "collective";
    case Fault::kDeadlock: return "deadlock";
    case Fault::kLivelock: return "livelock";
    case Fault::kBlockRace: return "race of blocks";
    case Fault::kLaunch: return "launch";
    case Fault::kTrap: return "trap";
  }
  return "unknown";
}

bool Reports::again(Fault fault, const void* instruction) {
  std::lock_guard lock(mutex_);
  auto it = index_.find({fault, instruction});
  if (it == index_.end()) return false;
  reports_[it->second].count++;
  return true;
}

void Reports::add(Fault fault, const void* instruction, Report report) {
  std::lock_guard lock(mutex_);
  auto [it, added] = index_.try_emplace({fault, instruction}, reports_.size());
  if (added) reports_.push_back(std::move(report));
  else reports_[it->second].count += report.count;
}

std::vector<Report> Reports::take() {
  std::lock_guard lock(mutex_);
  index_.clear();
  return std::exchange(reports_, {});
}

bool Reports::empty() const {
  std::lock_guard lock(mutex_);
  return reports_.empty();
}

}  // namespace emulator
