// SPDX-License-Identifier: Apache-2.0
// The steps of peer_all_reduce.h for a rank on the CPU, which has one lane. Internal linkage, as in common/vec.h.
#pragma once

#include <sched.h>
#include <time.h>

#include "peer_all_reduce.h"

namespace fmkernels {
namespace {

// A rank that comes soon is waited for in a loop; then others may have the processor; then it is slept.
constexpr int kSpins = 300, kYields = 500;
constexpr long kSleepNanoseconds = 100000;

inline void pause_processor() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#endif
}

inline int64_t now_in_ms() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<int64_t>(now.tv_sec) * 1000 + now.tv_nsec / 1000000;
}

class PeerSteps {
 public:
  explicit PeerSteps(const PeerAllReduceParams& p) : p_(p), next_(header(p.rank)->epochs[0] + 1) {}
  ~PeerSteps() { header(p_.rank)->epochs[0] = next_ - 1; }
  PeerSteps(const PeerSteps&) = delete;
  PeerSteps& operator=(const PeerSteps&) = delete;

  // Where this rank writes before it meets the others, and where, after that, rank r has written.
  uint8_t* mine() const { return slice(p_.rank, next_); }
  const uint8_t* of(int r) const { return slice(r, next_ - 1); }

  // Writes what the call is, before the first step.
  bool begin() {
    if (const uint32_t broken = __atomic_load_n(&header(p_.rank)->broken, __ATOMIC_ACQUIRE)) return is_broken(broken);
    header(p_.rank)->calls[next_ % 2][0] = p_.call;
    return true;
  }
  // After it: whether all ranks mean the same call. *workers becomes the least of theirs.
  bool compare(int32_t* workers) const {
    const auto call_of = [&](int r) -> const PeerCall& { return header(r)->calls[(next_ - 1) % 2][0]; };
    for (int field = 0; field < kNumPeerFields; ++field) {
      const int64_t first = peer_call_field(call_of(0), field);
      for (int r = 1; r < p_.world_size; ++r) {
        const int64_t other = peer_call_field(call_of(r), field);
        if (other == first) continue;
        *p_.failure = {PeerFailure::kDiffers, field, 0, r, first, other};
        return false;
      }
    }
    *workers = call_of(0).workers;
    for (int r = 1; r < p_.world_size; ++r) {
      if (call_of(r).workers < *workers) *workers = call_of(r).workers;
    }
    return true;
  }

  // Tells the others that this rank has written, and waits until they have, for all of them together as long as it may.
  bool meet() {
    for (int i = 0; i < p_.world_size; ++i) {
      __atomic_store_n(&header((p_.rank + i) % p_.world_size)->flags[0][p_.rank], next_, __ATOMIC_RELEASE);
    }
    int64_t deadline = 0;
    for (int r = 0; r < p_.world_size; ++r) {
      if (!has_come(r) && !wait_for(r, deadline)) return false;
    }
    ++next_;
    return true;
  }

 private:
  PeerHeader* header(int r) const { return reinterpret_cast<PeerHeader*>(p_.workspaces[r]); }
  uint8_t* slice(int r, uint32_t step) const {
    return p_.workspaces[r] + peer_slice_offset(p_.slice_bytes, 1, step % 2, 0);
  }

  bool has_come(int r) const {
    const uint32_t flag = __atomic_load_n(&header(p_.rank)->flags[0][r], __ATOMIC_ACQUIRE);
    return static_cast<int32_t>(flag - next_) >= 0;
  }

  // deadline: 0 until the first that is waited for longer than a loop.
  bool wait_for(int r, int64_t& deadline) {
    for (int i = 0; i < kSpins; ++i) {
      pause_processor();
      if (has_come(r)) return true;
    }
    if (deadline == 0) deadline = now_in_ms() + p_.timeout_ms;
    for (int i = 0;; ++i) {
      if (has_come(r)) return true;
      if (const uint32_t broken = __atomic_load_n(&header(p_.rank)->broken, __ATOMIC_ACQUIRE)) return is_broken(broken);
      if (now_in_ms() >= deadline) return is_late(r);
      if (i < kYields) {
        sched_yield();
      } else {
        const timespec little{0, kSleepNanoseconds};
        nanosleep(&little, nullptr);
      }
    }
  }

  // All ranks learn of it, whatever they wait for: this one goes no further.
  bool is_late(int r) {
    const uint32_t word = peer_broken(static_cast<uint32_t>(p_.rank), static_cast<uint32_t>(r), 0);
    for (int i = 0; i < p_.world_size; ++i) {
      uint32_t whole = 0;
      __atomic_compare_exchange_n(&header(i)->broken, &whole, word, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
    }
    *p_.failure = {PeerFailure::kLate, 0, p_.rank, r, 0, 0};
    return false;
  }
  bool is_broken(uint32_t word) {
    const auto byte = [&](int i) { return static_cast<int32_t>(word >> (8 * i) & 255u); };
    *p_.failure = {PeerFailure::kBroken, 0, byte(1), byte(2), 0, 0};
    return false;
  }

  const PeerAllReduceParams& p_;
  uint32_t next_;  // the number of the step that is being written
};

}  // namespace
}  // namespace fmkernels
