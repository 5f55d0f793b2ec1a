// SPDX-License-Identifier: Apache-2.0
#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "isa.h"

namespace fmkernels {

Isa cpu_isa() {
  static const Isa isa = [] {
    const char* forced = std::getenv("FMKERNELS_CPU_ISA");
    bool has[] = {true, false, false};
#ifdef __x86_64__
    has[1] = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    has[2] = has[1] && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512bf16");
#endif
    int isa = has[2] ? 2 : has[1] ? 1 : 0;
    if (forced != nullptr) {
      for (isa = 0; isa < 3 && std::strcmp(forced, kIsaNames[isa]) != 0;) ++isa;
      FM_CHECK(isa < 3, "FMKERNELS_CPU_ISA must be generic, avx2 or avx512, got ", forced);
      FM_CHECK(has[isa], "FMKERNELS_CPU_ISA=", forced, ", but this processor has no ",
               isa == 1 ? "AVX2, FMA and F16C" : "AVX-512 with F, BW, DQ, VL and BF16");
    }
    return static_cast<Isa>(isa);
  }();
  return isa;
}

int num_workers() { return static_cast<int>(torch::stable::get_num_threads()); }

void parallel_for_erased(int64_t num_tasks, int workers, TaskFunction run, void* context) {
  if (workers <= 1 || num_tasks <= 1) {
    for (int64_t task = 0; task < num_tasks; ++task) run(context, task, 0);
    return;
  }
  std::atomic<int64_t> next_task{0};
  torch::stable::parallel_for(0, std::min<int64_t>(workers, num_tasks), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task; (task = next_task.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
        run(context, task, static_cast<int>(worker));
      }
    }
  });
}

namespace {

struct KeptBuffer {
  char* data = nullptr;
  int64_t num_bytes = 0;
  ~KeptBuffer() { std::free(data); }
};
thread_local KeptBuffer kept;

constexpr int64_t kMinHugeBytes = 32 << 20;  // malloc keeps smaller blocks, with their pages, for the next call

}  // namespace

void prefer_huge_pages(void* data, int64_t num_bytes) {
#ifdef MADV_HUGEPAGE
  if (num_bytes < kMinHugeBytes) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(num_bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: where it fails, pages are small
#else
  (void)data, (void)num_bytes;
#endif
}

Workspace::Workspace(int64_t num_bytes) {
  if (kept.num_bytes >= num_bytes) {
    data_ = std::exchange(kept.data, nullptr);
    num_bytes_ = std::exchange(kept.num_bytes, 0);
    return;
  }
  num_bytes_ = Arena::array_bytes<char>(num_bytes);
  data_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(num_bytes_)));
  FM_CHECK(data_ != nullptr, "out of memory: a workspace of ", num_bytes_, " bytes could not be allocated");
}

Workspace::~Workspace() {
  if (num_bytes_ > kKeptBytes || num_bytes_ <= kept.num_bytes) {
    std::free(data_);
    return;
  }
  std::free(std::exchange(kept.data, data_));
  kept.num_bytes = num_bytes_;
}

}  // namespace fmkernels
