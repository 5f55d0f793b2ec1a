// SPDX-License-Identifier: Apache-2.0
// Codes of 8, 6, 4 or 1 bit, or float8 e4m3, with one float32 scale a block: what a quantised collective sends.
//
//   extreme  the element of largest magnitude of a block, the positive one of two;  levels = 2^(bits - 1)
//   nearest     inverse = -levels / extreme, q = min(rint(x * inverse), levels - 1), ties to even; x ~ q * (-extreme / levels)
//   stochastic  levels - 1 in place of levels, so that nothing is clipped; v = x * inverse, q = floor(v), and one more where
//               v - floor(v) exceeds the (k + 1/2) / 2^16 of a 16-bit k that belongs to the element
//   1 bit       q is the sign, + of what is nearer to 0 than kSmallest; the scale is the mean of |x|
//   float8      levels = 448, the largest of its numbers; q is that nearest to x * inverse, ties to even, 0 without a sign
//
// Every operation is one of float32, rounded to nearest, in the order given here: all backends write the same bytes.
// A block with a NaN or an infinity has a scale of NaN and codes of 0; one whose extreme (mean) is below kSmallest
// has a scale of 0 and codes of 0, so that a processor that flushes subnormal numbers writes
// the same bytes (but for means and rotated numbers of blocks within 2^20 of kSmallest).
// Rotated blocks hold H x / 32 for each kGroup elements, H the Hadamard matrix in its natural order: the same codes as of
// H x / sqrt(32), and nothing to round; H goes back. Sums stay rotated.
//
// A wire is planes of codes, then scales, each in a multiple of kAlignment bytes, what lies between them 0. Of a unit of
// kUnit elements, byte j of its part of a plane has
//   8 bits   code j
//   4 bits   code j in the low half, code j + 32 in the high one
//   6 bits   the low 4 bits as above; in a second plane bits 4 and 5 of the codes j, j + 16, j + 32, j + 48, from low to high
//   float8   number j
//   1 bit    the signs of 8 j, ... 8 j + 7, from low to high, 1 for -
// Codes are in two's complement. Elements behind the last, rotated ones behind the last kGroup, have codes of 0.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/stream.h"

namespace fmkernels {

constexpr int64_t kUnit = 64, kGroup = 32;
constexpr int64_t kMinBlock = 32, kMaxBlock = 2048;
constexpr int64_t kAlignment = 16;
constexpr float kSmallest = 0x1p-100f;
constexpr uint32_t kNanBits = 0x7fc00000u, kInfinityBits = 0x7f800000u;
constexpr float kRotation = 0x1p-5f;

// What a code is: the bits of an integer, or kFloat8.
constexpr int kFloat8 = -8;
constexpr int bits_of(int code) { return code == kFloat8 ? 8 : code; }
constexpr float levels_of(int code, bool stochastic) {
  return code == kFloat8 ? 448.0f : static_cast<float>((1 << (code - 1)) - stochastic);
}
constexpr int64_t lower_plane_bytes(int code) { return code == 6 ? 32 : 8 * bits_of(code); }  // of a unit
constexpr int64_t upper_plane_bytes(int code) { return code == 6 ? 16 : 0; }
// float8: what its exponent is less than that of a float32, where its normal numbers begin, and 2^14, to which a smaller
// number is added so that its multiple of 2^-9 lies in the low bits.
constexpr uint32_t kFloat8Rebias = (127 - 7) << 3, kFloat8SmallestNormal = (127 - 6) << 23;
constexpr float kFloat8Shifter = 0x1p14f;

struct CodecWire {
  int64_t numel;
  int32_t code, block_log2;

  FM_HOST_DEVICE int64_t block() const { return int64_t{1} << block_log2; }
  FM_HOST_DEVICE int64_t units() const { return (numel + kUnit - 1) / kUnit; }
  FM_HOST_DEVICE int64_t blocks() const { return (numel + block() - 1) >> block_log2; }
  FM_HOST_DEVICE int64_t code_bytes() const { return units() * 8 * bits_of(code); }  // without what follows them
  FM_HOST_DEVICE int64_t upper_plane() const { return units() * 32; }                // where it begins
  FM_HOST_DEVICE int64_t scales() const { return aligned(code_bytes()); }            // where they begin
  FM_HOST_DEVICE int64_t scale_bytes() const { return blocks() * 4; }
  FM_HOST_DEVICE int64_t bytes() const { return scales() + aligned(scale_bytes()); }

  FM_HOST_DEVICE static int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
};

// How codes are rounded. The random bits are those of Philox with the key `seed` and the counter (call, step), call
// (offset + unit) / kUnit * 8 + t, t = 0 .. 7: its 8 times 16 bits, from low to high, are those of the elements 4 t .. 4 t + 3
// and 32 + 4 t .. 32 + 4 t + 3 of the unit.
struct CodecRounding {
  bool stochastic;
  uint64_t seed, step;
  int64_t offset;  // the number of elements before the first one, a multiple of kUnit where it matters
};

struct BlockCodecQuantizeParams {
  DType dtype;
  CodecWire wire;
  bool hadamard;
  CodecRounding rounding;
  const void* x;
  float*
      residual;  // added to x, and what the wire lacks of the sum after the call; unchanged where a scale is NaN. Or null
  uint8_t* out;
};

// The sum of the wires of ranks, from the first to the last: acc = 0, acc += q * scale, and times `factor` at last.
struct CodecSum {
  CodecWire wire;
  const uint8_t* wires;
  int64_t wire_stride;
  int32_t num_wires;
  float factor;
  bool hadamard;
};

struct BlockCodecSumParams {
  DType dtype;
  CodecSum sum;
  void* out;
};

struct BlockCodecReduceParams {
  CodecSum sum;
  CodecWire wire;  // of the result; the same elements and blocks
  CodecRounding rounding;
  uint8_t* out;
};

template <Isa isa>
void run_block_codec_quantize(const BlockCodecQuantizeParams& p);
template <Isa isa>
void run_block_codec_sum(const BlockCodecSumParams& p);
template <Isa isa>
void run_block_codec_reduce(const BlockCodecReduceParams& p);
// `count` whole tiles of kMaxBlock elements, of wires of 4 bits that are not rotated; `streams`: past the caches, to a boundary
// of 64 bytes.
template <Isa isa>
void run_block_codec_sum_tiles(const BlockCodecSumParams& p, int64_t first, int64_t count, bool streams);
// The same of tiles of which nothing is drawn, and no product or sum is NaN; rotated ones stay so.
template <Isa isa>
void run_block_codec_reduce_tiles(const BlockCodecReduceParams& p, int64_t first, int64_t count);

void launch_block_codec_quantize(const BlockCodecQuantizeParams& p, cudaStream_t stream);
void launch_block_codec_sum(const BlockCodecSumParams& p, cudaStream_t stream);
void launch_block_codec_reduce(const BlockCodecReduceParams& p, cudaStream_t stream);

}  // namespace fmkernels
