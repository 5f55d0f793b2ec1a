// SPDX-License-Identifier: Apache-2.0
// block_codec_sum.cu: wires become a tensor, or the wire of their sum.
//
// Contract   see block_codec.h. Wires begin on boundaries of kAlignment bytes.
// Work       As block_codec_quantize.cu; a lane reads its codes of one wire after another, in the order of the ranks.
// Shared     TileShared, where the sum becomes a wire.
// Numerics   float32, each operation rounded by itself: the bits are those of the CPU, whatever the number of elements.
// Cost       One read of the wires, one write: bound by memory; 4 operations for a code of a wire.

#include "block_codec_wires_cuda.h"

#include "../common/dispatch.h"

namespace fmkernels {
namespace {

template <class T, int kCode>
__global__ void __launch_bounds__(kTileThreads) block_codec_sum_kernel(BlockCodecSumParams p) {
  const LanePlace place(blockIdx.x);
  float acc[kLaneElements];
  sum_wires<kCode>(p.sum, place, acc);
  if (p.sum.hadamard) rotate_groups(acc, place.t);
  for (float& v : acc) v = __fmul_rn(v, p.sum.factor);
  const bool is_aligned = is_quad_aligned(p.out, sizeof(T));
  for (int i = 0; i < 2; ++i) {
    store_quad(static_cast<T*>(p.out), place.first + i * kGroup, p.sum.wire.numel, is_aligned, acc + i * kQuad);
  }
}

// kCode: of the result.
template <int kCode>
__global__ void __launch_bounds__(kTileThreads) block_codec_reduce_kernel(BlockCodecReduceParams p) {
  __shared__ TileShared shared;
  const LanePlace place(blockIdx.x);
  float x[kLaneElements];
  switch (p.sum.wire.code) {
    case 8: sum_wires<8>(p.sum, place, x); break;
    case 6: sum_wires<6>(p.sum, place, x); break;
    case 4: sum_wires<4>(p.sum, place, x); break;
    case kFloat8: sum_wires<kFloat8>(p.sum, place, x); break;
    default: sum_wires<1>(p.sum, place, x);
  }
  const int64_t counted = counted_of(p.wire.numel, p.sum.hadamard);
  for (int i = 0; i < kLaneElements; ++i) {
    const bool is_inside = place.first + i / kQuad * kGroup + i % kQuad < counted;
    x[i] = is_inside ? __fmul_rn(x[i], p.sum.factor) : 0.0f;
  }

  BlockScale s[2];
  uint32_t words[2];
  const bool stochastic = p.rounding.stochastic;
  find_scales<kCode>(x, p.wire, counted, place, stochastic, shared, s);
  encode_as<kCode>(x, s, p.rounding, place, words);
  store_codes<kCode>(p.wire, place, words, p.out);
  store_scales<kCode>(p.wire, place, s, stochastic, p.out);
}

}  // namespace

void launch_block_codec_sum(const BlockCodecSumParams& p, cudaStream_t stream) {
  const char* name = "block_codec_sum";
  dispatch_dtype(p.dtype, [&]<class T>() {
    dispatch_int<8, 6, 4, 1, kFloat8>("bits", p.sum.wire.code, [&]<int kCode>() {
      launch(name, block_codec_sum_kernel<T, kCode>, grid_of(name, p.sum.wire.numel, kMaxBlock), kTileThreads, 0,
             stream, p);
    });
  });
}

void launch_block_codec_reduce(const BlockCodecReduceParams& p, cudaStream_t stream) {
  const char* name = "block_codec_reduce";
  dispatch_int<8, 6, 4, 1, kFloat8>("bits", p.wire.code, [&]<int kCode>() {
    launch(name, block_codec_reduce_kernel<kCode>, grid_of(name, p.wire.numel, kMaxBlock), kTileThreads, 0, stream, p);
  });
}

}  // namespace fmkernels
