// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding: rotates pairs of columns of q and k by angles that grow with the position of their token.
//
//   pair i of a head, i < rotary_dim / 2, is columns (i, i + rotary_dim / 2), or (2 i, 2 i + 1) where interleaved
//   (u, v) -> (u cos - v sin, v cos + u sin), with cos and sin of row `position` of the cache, columns i and
//   rotary_dim / 2 + i; inverse: sin with the other sign, which is the transposed map and thus the gradient
//   columns from rotary_dim on are copied
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/stream.h"

namespace fmkernels {

// [batch, tokens, heads, head_dim] with head_dim contiguous; strides in elements. No tensor: no heads.
struct RopeSide {
  int64_t num_heads;
  const void* in;
  void* out;                            // may be in
  int64_t in_stride[3], out_stride[3];  // batch, token, head
};

struct RopeParams {
  DType dtype, cache_dtype;  // that of the cache is float32 or dtype
  int64_t batch, num_tokens, head_dim, rotary_dim;
  bool interleaved, inverse;
  bool copies_rest;  // columns from rotary_dim on are not in place already
  RopeSide q, k;
  const void* positions;  // int32 or int64; one outside [0, num_positions) is taken to the nearest end
  bool positions_are_int64;
  int64_t position_stride[2];  // batch, token
  const void* cos_sin;         // [num_positions, rotary_dim]
  int64_t num_positions, cos_sin_stride;
};

FM_HOST_DEVICE int64_t position_of(const RopeParams& p, int64_t batch, int64_t token) {
  const int64_t at = batch * p.position_stride[0] + token * p.position_stride[1];
  return p.positions_are_int64 ? static_cast<const int64_t*>(p.positions)[at]
                               : static_cast<const int32_t*>(p.positions)[at];
}

// The row of the cache for a token.
FM_HOST_DEVICE int64_t cache_row(const RopeParams& p, int64_t batch, int64_t token) {
  const int64_t position = position_of(p, batch, token);
  return position < 0 ? 0 : position < p.num_positions ? position : p.num_positions - 1;
}

template <Isa isa>
void run_rope_forward(const RopeParams& p);

void launch_rope_forward(const RopeParams& p, cudaStream_t stream);

}  // namespace fmkernels
