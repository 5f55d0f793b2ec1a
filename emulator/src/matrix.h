// SPDX-License-Identifier: Apache-2.0
// matrix.h: mma.sync, ldmatrix, stmatrix and movmatrix as pure functions on the lane arrays of a warp.
//
// Layouts    lane = 4 g + t. With p elements in a 32-bit register (f64: one in 64 bits), for every shape:
//              A  register r, element i   row g + 8 (r % 2), column 4 p (r / 2) + p t + i   (m8: row g, one register)
//              B  register r, element i   row 4 p r + p t + i, column g
//              C  element i (D likewise)  row g + 8 (i / 2), column 2 t + i % 2             (f16: two in a register)
//            mma.sp: A as in the dense shape of half the k, the nonzeros of a row moved together; metadata: matrix.cpp.
// Numerics   floats narrower than f64: products exact, added to C in float32 in ascending k, each sum rounded to
//            nearest even; f16 results are rounded once, at the end. A tensor core adds the products of a step together
//            with fewer guard bits and truncates: its inner rounding is not modelled, so compare with a tolerance of a
//            few float32 ulps of the largest product. tf32 operands lose their last 13 bits first, as the hardware
//            ignores them. f64: a chain of fma. Integers: exact, wrapped to 32 bits or clamped (.satfinite). NaN:
//            0x7fffffff.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

struct MatrixOp {
  int num_d, num_a, num_b, num_c;  // registers of a lane
  int num_metadata;                // 1: mma.sp, which has a metadata register and a selector, else 0
  int num_selectors;               // the selector is below it
  uint64_t flops;                  // 2 m n k of the dense product
  uint64_t a_bytes_per_reg;        // 4, or 8 for f64 (a, b, c and d)
  // Each of d, a, b, c points to arrays of 32 lanes, one a register, aligned to 32 bytes. d may be among a, b, c.
  void (*run)(void* const* d, const void* const* a, const void* const* b, const void* const* c,
              const uint32_t* metadata, int selector);
};

// By the dotted parts after "mma": {"sync", "aligned", "m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"}, or
// {"sp::ordered_metadata", "sync", ...}. Null when unknown.
const MatrixOp* find_matrix_op(const std::vector<std::string>& parts);

// One 8 x 8 matrix of 16-bit elements: lane 4 g + t holds row g, columns 2 t and 2 t + 1, the first in the low half;
// with `transpose`, row and column change places. A row is 16 bytes, aligned to 4 at least.
void ldmatrix(const uint8_t* const rows[8], bool transpose, uint32_t* lanes);
void stmatrix(uint8_t* const rows[8], bool transpose, const uint32_t* lanes);
void movmatrix_trans(const uint32_t* in, uint32_t* out);

}  // namespace emulator
