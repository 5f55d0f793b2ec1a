// SPDX-License-Identifier: Apache-2.0
// Arithmetic of sizes and positions in CPU kernels, in 64 bits whatever it is given. Internal linkage, as in vec.h.
#pragma once

#include <cstdint>

namespace fmkernels {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Parts of each of num_tasks tasks, `most` at most, that make four a worker.
constexpr int64_t parts_of(int64_t num_tasks, int64_t most, int workers) {
  return workers == 1 || num_tasks == 0 ? 1 : max(1, min(ceil_div(4 * workers, num_tasks), most));
}

}  // namespace
}  // namespace fmkernels
