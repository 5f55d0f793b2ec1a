// SPDX-License-Identifier: Apache-2.0
// Threads and scratch memory of the CPU kernels, over torch's own thread pool (torch.set_num_threads counts).
#pragma once

#include <cstdint>

namespace fmkernels {

// Number of workers that parallel_for uses at most.
int num_workers();

using TaskFunction = void (*)(void* context, int64_t task, int worker);
void parallel_for_erased(int64_t num_tasks, int workers, TaskFunction run, void* context);

// Workers worth waking for so many floating-point operations or bytes: below about 20 us of work, one.
inline int workers_for(int64_t operations) { return operations < (int64_t{1} << 20) ? 1 : num_workers(); }

// Runs f(task, worker) once for every task in [0, num_tasks). Workers take tasks in increasing order from one counter,
// so uneven tasks balance; worker < workers, and no two tasks run on one worker at a time. f must not throw.
template <class F>
static void parallel_for(int64_t num_tasks, int workers, F&& f) {
  parallel_for_erased(
      num_tasks, workers, [](void* context, int64_t task, int worker) { (*static_cast<F*>(context))(task, worker); },
      &f);
}

// Uninitialised 64-byte aligned memory for the length of a scope, kept by the calling thread for its next call while it
// is at most kKeptBytes. Throws when the memory cannot be had. Made outside parallel_for, used inside.
class Workspace {
 public:
  static constexpr int64_t kKeptBytes = 64 << 20;

  explicit Workspace(int64_t num_bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  char* data() const { return data_; }

 private:
  char* data_;
  int64_t num_bytes_;
};

// Tells the system that the pages of a new and large result may be huge ones: to make its first writes find a page each
// takes longer than many a kernel. Nothing where the system has none, or the result is small.
void prefer_huge_pages(void* data, int64_t num_bytes);

// Hands out 64-byte aligned arrays of a block of memory, one after another.
class Arena {
 public:
  explicit Arena(char* memory) : next_(memory) {}

  template <class T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(next_);
    next_ += array_bytes<T>(count);
    return result;
  }
  // What take<T>(count) uses of the block.
  template <class T>
  static constexpr int64_t array_bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  char* next_;
};

}  // namespace fmkernels
