// SPDX-License-Identifier: Apache-2.0
// The header libraries of CUDA: CUB, cooperative groups, barriers and atomics of libcu++.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>

#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/device/device_reduce.cuh>
#include <cub/warp/warp_reduce.cuh>
#include <cuda/atomic>
#include <cuda/barrier>

#include "program.h"

namespace cg = cooperative_groups;

__global__ void cub_block(const int* in, int* sum, int* scan, unsigned* sorted) {
  using Reduce = cub::BlockReduce<int, 128>;
  using Scan = cub::BlockScan<int, 128>;
  using Sort = cub::BlockRadixSort<unsigned, 128, 2>;
  __shared__ union {
    Reduce::TempStorage reduce;
    Scan::TempStorage scan;
    Sort::TempStorage sort;
  } temp;
  const int total = Reduce(temp.reduce).Sum(in[threadIdx.x]);
  if (threadIdx.x == 0) *sum = total;
  __syncthreads();
  int prefix;
  Scan(temp.scan).InclusiveSum(in[threadIdx.x], prefix);
  scan[threadIdx.x] = prefix;
  __syncthreads();
  unsigned keys[2] = {in[threadIdx.x] * 2654435761u, in[threadIdx.x] * 40503u};
  Sort(temp.sort).Sort(keys);
  sorted[2 * threadIdx.x] = keys[0];
  sorted[2 * threadIdx.x + 1] = keys[1];
}

__global__ void groups(int* out, int* segments) {
  const cg::thread_block block = cg::this_thread_block();
  const auto tile = cg::tiled_partition<8>(block);
  const int lane = block.thread_rank();
  out[lane] = cg::reduce(tile, lane, cg::plus<int>());
  segments[lane] = cg::inclusive_scan(tile, 1) + 100 * tile.meta_group_rank();
  block.sync();
  if (lane % 3 == 0) {
    const auto active = cg::coalesced_threads();
    out[lane] += 1000 * active.size() + 100000 * active.thread_rank();
  }
}

__global__ void across_the_grid(int* values, int* out) {
  const auto grid = cg::this_grid();
  values[grid.thread_rank()] = grid.thread_rank() + 1;
  grid.sync();
  out[grid.thread_rank()] = values[grid.size() - 1 - grid.thread_rank()];
  grid.sync();
  values[grid.thread_rank()] = 0;
}

__global__ void block_barrier(int* out) {
  __shared__ cuda::barrier<cuda::thread_scope_block> ready;
  __shared__ int s[64];
  if (threadIdx.x == 0) init(&ready, blockDim.x);
  __syncthreads();
  for (int round = 0; round < 4; ++round) {
    s[threadIdx.x] = threadIdx.x + round;
    ready.arrive_and_wait();
    out[threadIdx.x] += s[63 - threadIdx.x];
    ready.arrive_and_wait();
  }
}

__global__ void copies_in_the_background(const int* in, int* out) {
  __shared__ alignas(16) int s[2][128];
  const auto block = cg::this_thread_block();
  __shared__ cuda::barrier<cuda::thread_scope_block> ready[2];
  if (threadIdx.x < 2) init(&ready[threadIdx.x], blockDim.x);
  block.sync();
  cuda::memcpy_async(block, s[0], in, sizeof s[0], ready[0]);
  int sum = 0;
  for (int stage = 0; stage < 4; ++stage) {
    if (stage + 1 < 4)
      cuda::memcpy_async(block, s[(stage + 1) % 2], in + 128 * (stage + 1), sizeof s[0], ready[(stage + 1) % 2]);
    ready[stage % 2].arrive_and_wait();
    sum += s[stage % 2][127 - threadIdx.x];
    block.sync();
  }
  out[threadIdx.x] = sum;
}

__global__ void atomics(int* counter, float* total) {
  cuda::atomic_ref<int, cuda::thread_scope_device> count(*counter);
  count.fetch_add(2, cuda::memory_order_relaxed);
  cuda::atomic_ref<float, cuda::thread_scope_device> sum(*total);
  sum.fetch_add(0.5f);
}

int main() {
  {
    const auto values = generate<int>(128, [](size_t i) { return int(i * 37 % 101); });
    Array<int> in(values), sum(1), scan(128);
    Array<unsigned> sorted(256);
    cub_block<<<1, 128>>>(in, sum, scan, sorted);
    launched("cub_block");
    std::vector<int> prefix;
    int total = 0;
    for (const int value : values) prefix.push_back(total += value);
    expect_all(sum, [&](size_t) { return total; }, "cub::BlockReduce");
    expect_all(scan, [&](size_t i) { return prefix[i]; }, "cub::BlockScan");
    const auto keys = sorted.host();
    bool ascending = true;
    for (int i = 1; i < 256; ++i) ascending = ascending && keys[i - 1] <= keys[i];
    expect(ascending, "cub::BlockRadixSort");
  }
  {
    Array<float> in(generate<float>(3000, [](size_t i) { return i % 10; })), out(1);
    size_t bytes = 0;
    succeed(cub::DeviceReduce::Sum(nullptr, bytes, static_cast<float*>(in), static_cast<float*>(out), 3000), "size");
    Array<char> temp(bytes);
    succeed(cub::DeviceReduce::Sum(temp, bytes, static_cast<float*>(in), static_cast<float*>(out), 3000), "sum");
    launched("cub::DeviceReduce");
    expect_all(out, [](size_t) { return 13500.0f; }, "cub::DeviceReduce");
  }
  {
    Array<int> out(64), segments(64);
    groups<<<1, 64>>>(out, segments);
    launched("groups");
    const auto truth = [](size_t i) {
      const int sum = i / 8 * 64 + 28;
      const int warp = i / 32, first = (warp * 32 + 2) / 3 * 3;
      const int members = warp == 0 ? 11 : 11;
      return i % 3 == 0 ? sum + 1000 * members + 100000 * int((i - first) / 3) : sum;
    };
    expect_all(out, truth, "tiles and coalesced groups");
    expect_all(segments, [](size_t i) { return int(i % 8 + 1 + 100 * (i / 8)); }, "a scan in tiles");
  }
  {
    Array<int> values(5 * 64), out(5 * 64);
    int *v = values, *o = out;
    void* args[] = {&v, &o};
    succeed(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(across_the_grid), dim3(5), dim3(64), args, 0, 0),
            "cudaLaunchCooperativeKernel");
    launched("across_the_grid");
    expect_all(out, [](size_t i) { return 320 - int(i); }, "a barrier of the grid");
  }
  {
    Array<int> out(64);
    block_barrier<<<1, 64>>>(out);
    launched("block_barrier");
    expect_all(out, [](size_t i) { return 4 * (63 - int(i)) + 6; }, "cuda::barrier");
    Array<int> in(generate<int>(512, [](size_t i) { return int(i); })), sums(128);
    copies_in_the_background<<<1, 128>>>(in, sums);
    launched("copies_in_the_background");
    expect_all(sums, [](size_t i) { return 4 * (127 - int(i)) + 768; }, "cuda::memcpy_async");
  }
  {
    Array<int> counter(1);
    Array<float> total(1);
    atomics<<<3, 32>>>(counter, total);
    launched("atomics");
    expect_all(counter, [](size_t) { return 192; }, "cuda::atomic_ref");
    expect_all(total, [](size_t) { return 48.0f; }, "cuda::atomic_ref of float");
  }
  return failures != 0;
}
