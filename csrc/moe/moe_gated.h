// SPDX-License-Identifier: Apache-2.0
// The first product of an expert's feed-forward layer, with the gather before it and the gated unit behind it.
//
//   gated_mm   (g | u) = a[t] b[e], out[r] = silu(g) * u, for the rows r of expert e; t = pos_to_token[r], or r without a list.
//              Zeros where t is -1 and for rows of no expert.
//   backward   of the row r, whose slot is (t, k), with d = grad_inner[r] and w = weights[t, k], or 1 without weights:
//                grad_gate_up = (w d u silu'(g) | w d silu(g)),  inner = w silu(g) u,  grad_weights[t, k] = <d, silu(g) u>
//              With weights the layer is sum over k of w (inner W), and d is W^T times the gradient of the token: the weighted
//              inner is then the left operand of the gradient of W. Zeros where t is -1, and where no slot of t is r.
//   columns    g, then u, width each; or in turns, g first, where is_interleaved.
//
// A row of gated_mm depends on its own row of a and its expert's b, and nothing else.
#pragma once

#include <cstdint>

#include "../common/dense_view.h"
#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/stream.h"

namespace fmkernels {

struct MoeGatedMmParams {
  DType dtype;
  bool is_interleaved;
  DenseView a;                  // [tokens, inner], or [rows, inner] without pos_to_token; row-major
  DenseView b;                  // [groups, inner, 2 * width]
  DenseView out;                // [rows, width], contiguous, written
  void* gate_up;                // [rows, 2 * width], contiguous, columns as those of b, written; null: not wanted
  const int32_t* pos_to_token;  // [rows]; null: row r is row r of a
  const int32_t* offsets;       // [groups], as in moe_grouped.h
  int64_t num_groups;
};

struct MoeGatedBackwardParams {
  DType dtype;
  bool is_interleaved;
  int64_t num_rows, width, num_tokens, num_topk;
  const void* grad_inner;            // [rows, width]
  int64_t grad_stride;               // of a row, in elements
  const void* gate_up;               // [rows, 2 * width], contiguous
  const int32_t* pos_to_token;       // [rows]; null: no row is left out, and there are no weights
  const int32_t* token_topk_to_pos;  // [tokens, topk]; null without weights
  const float* weights;              // [tokens, topk]; null: all are 1
  int64_t weights_stride;
  void* grad_gate_up;   // [rows, 2 * width], contiguous, written
  void* inner;          // [rows, width], contiguous, written; null without weights
  float* grad_weights;  // [tokens, topk], zeros before, written where a slot has a row; null without weights
};

// On the CPU lists are checked before. On CUDA they are in device memory: offsets are taken as moe_grouped.h says, and a token or
// a row out of range for -1.
template <Isa isa>
void run_moe_gated_mm(const MoeGatedMmParams& p);
template <Isa isa>
void run_moe_gated_backward(const MoeGatedBackwardParams& p);

void launch_moe_gated_mm(const MoeGatedMmParams& p, cudaStream_t stream);
void launch_moe_gated_backward(const MoeGatedBackwardParams& p, cudaStream_t stream);

}  // namespace fmkernels
