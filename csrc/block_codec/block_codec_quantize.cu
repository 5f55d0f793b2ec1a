// SPDX-License-Identifier: Apache-2.0
// block_codec_quantize.cu: a tensor becomes a wire.
//
// Contract   see block_codec.h. Quads of x and residual are read as words where those begin on their boundary, else one by
//            one.
// Work       A block of threads owns a tile of kMaxBlock elements; block_codec_cuda.h says what a lane has of it.
// Shared     TileShared below: what eight warps know of a block longer than 256.
// Numerics   float32, each operation rounded by itself. The bytes are those of the CPU.
// Cost       One read of x and one write of the wire: bound by memory; about 10 operations an element, 25 where they draw.

#include "block_codec_cuda.h"

#include "../common/dispatch.h"

namespace fmkernels {
namespace {

template <class T, int kCode>
__global__ void __launch_bounds__(kTileThreads, 5) block_codec_quantize_kernel(BlockCodecQuantizeParams p) {
  __shared__ TileShared shared;
  const LanePlace place(blockIdx.x);
  const int64_t numel = p.wire.numel;

  // h = x + residual, and x as it is coded.
  float h[kLaneElements], x[kLaneElements];
  const bool is_aligned = is_quad_aligned(p.x, sizeof(T)), is_residual_aligned = is_quad_aligned(p.residual, 4);
  for (int i = 0; i < 2; ++i) {
    load_quad(static_cast<const T*>(p.x), place.first + i * kGroup, numel, is_aligned, h + i * kQuad);
    if (p.residual == nullptr) continue;
    float r[kQuad];
    load_quad(p.residual, place.first + i * kGroup, numel, is_residual_aligned, r);
    for (int j = 0; j < kQuad; ++j) h[i * kQuad + j] = __fadd_rn(h[i * kQuad + j], r[j]);
  }
  for (int i = 0; i < kLaneElements; ++i) x[i] = p.hadamard ? h[i] * kRotation : h[i];
  if (p.hadamard) rotate_groups(x, place.t);

  // Its wire.
  BlockScale s[2];
  uint32_t words[2];
  const bool stochastic = p.rounding.stochastic;
  find_scales<kCode>(x, p.wire, counted_of(numel, p.hadamard), place, stochastic, shared, s);
  encode_as<kCode>(x, s, p.rounding, place, words);
  store_codes<kCode>(p.wire, place, words, p.out);
  store_scales<kCode>(p.wire, place, s, stochastic, p.out);

  // What the wire lacks of h.
  if (p.residual == nullptr) return;
  for (int i = 0; i < 2; ++i) {
    const float scale = s[i].template scale<kCode>(stochastic);
    for (int j = i * kQuad; j < (i + 1) * kQuad; ++j) {
      if constexpr (kCode == kFloat8) x[j] = float8_as_float(words[i] >> (8 * (j % kQuad)));
      x[j] = __fadd_rn(0.0f, __fmul_rn(x[j], scale));
    }
  }
  if (p.hadamard) rotate_groups(x, place.t);
  for (int i = 0; i < 2; ++i) {
    for (int j = i * kQuad; j < (i + 1) * kQuad; ++j) h[j] = __fsub_rn(h[j], x[j]);
    if (s[i].is_finite) {
      store_quad(p.residual, place.first + i * kGroup, numel, is_residual_aligned, h + i * kQuad);
    }
  }
}

}  // namespace

void launch_block_codec_quantize(const BlockCodecQuantizeParams& p, cudaStream_t stream) {
  const char* name = "block_codec_quantize";
  dispatch_dtype(p.dtype, [&]<class T>() {
    dispatch_int<8, 6, 4, 1, kFloat8>("bits", p.wire.code, [&]<int kCode>() {
      launch(name, block_codec_quantize_kernel<T, kCode>, grid_of(name, p.wire.numel, kMaxBlock), kTileThreads, 0,
             stream, p);
    });
  });
}

}  // namespace fmkernels
