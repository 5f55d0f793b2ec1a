// SPDX-License-Identifier: Apache-2.0
// Shuffles, votes, matches, reductions; divergence, and lanes that wait for each other.
#include "program.h"

constexpr unsigned kAll = 0xffffffff;

__global__ void shuffles(int* sum, int* scan, int* rotated, double* wide, int* segments) {
  const int lane = threadIdx.x % 32;
  int x = threadIdx.x;
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  sum[threadIdx.x] = x;
  int prefix = lane + 1;
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(kAll, prefix, step);
    if (lane >= step) prefix += below;
  }
  scan[threadIdx.x] = prefix;
  rotated[threadIdx.x] = __shfl_sync(kAll, lane, (lane + 5) % 32);
  wide[threadIdx.x] = __shfl_down_sync(kAll, lane * 1.5, 1);
  segments[threadIdx.x] = __shfl_sync(kAll, lane, 3, 8);
}

__global__ void votes(uint32_t* ballots, int* ranks, int* flags) {
  const int lane = threadIdx.x;
  const bool odd = lane * lane % 3 == 1;
  const uint32_t ballot = __ballot_sync(kAll, odd);
  ballots[lane] = ballot;
  ranks[lane] = __popc(ballot & ((1u << lane) - 1));
  flags[lane] = __any_sync(kAll, lane == 40) + 2 * __any_sync(kAll, lane == 30) + 4 * __all_sync(kAll, lane < 32) +
                8 * __all_sync(kAll, lane < 31);
  if (lane < 20) flags[lane] += 16 * (__activemask() == 0xfffffu) + 32 * (__ballot_sync(0xfffffu, true) == 0xfffffu);
}

__global__ void matches(uint32_t* any, uint32_t* all, int* predicates, int64_t* keys) {
  const int lane = threadIdx.x;
  any[lane] = __match_any_sync(kAll, keys[lane]);
  int same = 0;
  all[lane] = __match_all_sync(kAll, lane / 32, &same);
  predicates[lane] = same;
}

__global__ void reductions(int* out) {
  const int lane = threadIdx.x;
  out[0 * 32 + lane] = __reduce_add_sync(kAll, lane - 3);
  out[1 * 32 + lane] = __reduce_min_sync(kAll, lane - 3);
  out[2 * 32 + lane] = __reduce_max_sync(kAll, unsigned(lane - 3));
  out[3 * 32 + lane] = __reduce_xor_sync(kAll, unsigned(lane * 7));
  // The two halves reduce apart, each with its own mask.
  const unsigned mask = lane < 16 ? 0xffffu : 0xffff0000u;
  out[4 * 32 + lane] = __reduce_add_sync(mask, lane);
}

__global__ void divergent_halves(int* out) {
  const int lane = threadIdx.x % 32;
  int x = lane;
  if (lane < 13) {
    for (int i = 0; i < lane; ++i) x += __popc(__activemask());
    x = __shfl_sync(0x1fffu, x, 12);
  } else {
    x = __shfl_sync(0xffffe000u, x, 31);
  }
  __syncwarp();
  out[threadIdx.x] = x + __shfl_sync(kAll, x, 0);
}

// A lock that lanes of one warp take in turn: it ends only if diverged lanes go on independently.
__device__ int lock = 0;
__global__ void spin_lock(int* counter) {
  bool done = false;
  while (!done) {
    if (atomicCAS(&lock, 0, 1) == 0) {
      __threadfence();
      *counter = *counter + 1;
      __threadfence();
      atomicExch(&lock, 0);
      done = true;
    }
  }
}

__global__ void producer_in_the_same_warp(volatile int* flag, int* out) {
  if (threadIdx.x == 0) {
    while (*flag == 0) {
    }
    out[0] = *flag;
  } else if (threadIdx.x == 1) {
    *flag = 17;
  }
}

__global__ void exchange_in_shared(int* out) {
  __shared__ int s[64];
  s[threadIdx.x] = threadIdx.x;
  __syncwarp();
  const int neighbour = s[threadIdx.x ^ 1];
  __syncwarp();
  s[threadIdx.x] = neighbour * 2;
  __syncwarp();
  out[threadIdx.x] = s[threadIdx.x ^ 31];
}

int main() {
  {
    Array<int> sum(64), scan(64), rotated(64), segments(64);
    Array<double> wide(64);
    shuffles<<<1, 64>>>(sum, scan, rotated, wide, segments);
    launched("shuffles");
    expect_all(sum, [](size_t i) { return i < 32 ? 496 : 496 + 32 * 32; }, "a butterfly sum");
    expect_all(scan, [](size_t i) { return int((i % 32 + 1) * (i % 32 + 2) / 2); }, "a scan");
    expect_all(rotated, [](size_t i) { return int((i % 32 + 5) % 32); }, "a rotation");
    expect_all(wide, [](size_t i) { return (i % 32 == 31 ? 31 : i % 32 + 1) * 1.5; }, "64 bits move in halves");
    expect_all(segments, [](size_t i) { return int(i % 32 / 8 * 8 + 3); }, "segments of eight");
  }
  {
    Array<uint32_t> ballots(32);
    Array<int> ranks(32), flags(32);
    votes<<<1, 32>>>(ballots, ranks, flags);
    launched("votes");
    uint32_t truth = 0;
    for (int i = 0; i < 32; ++i) truth |= uint32_t{i * i % 3 == 1} << i;
    expect_all(ballots, [&](size_t) { return truth; }, "a ballot");
    expect_all(ranks, [&](size_t i) { return __builtin_popcount(truth & ((1u << i) - 1)); }, "ranks by ballot");
    expect_all(flags, [](size_t i) { return 2 + 4 + (i < 20 ? 48 : 0); }, "any, all and the active lanes");
  }
  {
    Array<int64_t> keys(generate<int64_t>(32, [](size_t i) { return int64_t(i % 5) << 40; }));
    Array<uint32_t> any(32), all(32);
    Array<int> predicates(32);
    matches<<<1, 32>>>(any, all, predicates, keys);
    launched("matches");
    const auto same = [](size_t i) {
      uint32_t m = 0;
      for (size_t j = i % 5; j < 32; j += 5) m |= 1u << j;
      return m;
    };
    expect_all(any, same, "match any, of 64 bits");
    expect_all(all, [](size_t) { return kAll; }, "match all");
    expect_all(predicates, [](size_t) { return 1; }, "its predicate");
  }
  {
    Array<int> out(5 * 32);
    reductions<<<1, 32>>>(out);
    launched("reductions");
    int exclusive = 0;
    for (int i = 0; i < 32; ++i) exclusive ^= i * 7;
    const int truth[] = {496 - 96, -3, -1, exclusive};
    expect_all(out, [&](size_t i) { return i < 128 ? truth[i / 32] : i % 32 < 16 ? 120 : 376; }, "redux");
  }
  {
    Array<int> out(64);
    divergent_halves<<<1, 64>>>(out);
    launched("divergent_halves");
    const auto host = out.host();
    expect(host[31] - 31 == host[0] / 2 && host[13] == host[31] && host[0] == host[12], "halves shuffle apart");
  }
  {
    Array<int> counter(1);
    spin_lock<<<2, 64>>>(counter);
    launched("spin_lock");
    expect_all(counter, [](size_t) { return 128; }, "a spin lock within a warp");
    Array<int> flag(1), out(1);
    producer_in_the_same_warp<<<1, 32>>>(flag, out);
    launched("producer_in_the_same_warp");
    expect_all(out, [](size_t) { return 17; }, "a lane that waits for another");
  }
  {
    Array<int> out(64);
    exchange_in_shared<<<1, 64>>>(out);
    launched("exchange_in_shared");
    expect_all(out, [](size_t i) { return 2 * int(i ^ 30); }, "shared memory between __syncwarp");
  }
  return failures != 0;
}
