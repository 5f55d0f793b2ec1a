// SPDX-License-Identifier: Apache-2.0
// block_codec_quantize, block_codec_sum, block_codec_reduce: tensors in, checks, Params out.
#include "../common/tensor.h"
#include "block_codec.h"

namespace fmkernels {
namespace {

constexpr int64_t kMaxNumel = int64_t{1} << 40;  // so that no number of bytes overflows

CodecWire wire_of(int64_t numel, int64_t bits, int64_t block) {
  FM_CHECK(numel >= 0 && numel <= kMaxNumel, "numel must be from 0 to 2^40, got ", numel);
  FM_CHECK(bits == 8 || bits == 6 || bits == 4 || bits == 1 || bits == kFloat8,
           "bits must be 8, 6, 4, 1 or -8 for float8, got ", bits);
  FM_CHECK(block >= kMinBlock && block <= kMaxBlock && (block & (block - 1)) == 0,
           "block must be a power of two from 32 to 2048, got ", block);
  return {numel, static_cast<int32_t>(bits), __builtin_ctzll(static_cast<unsigned long long>(block))};
}

CodecRounding rounding_of(const CodecWire& wire, bool stochastic, int64_t seed, int64_t step, int64_t offset) {
  FM_CHECK(!stochastic || wire.code > 1, "rounding of 1 bit and of float8 is not stochastic");
  FM_CHECK(offset >= 0 && (!stochastic || offset % (wire.block() > kUnit ? wire.block() : kUnit) == 0),
           "offset must be a multiple of block and of 64 where rounding is stochastic, got ", offset);
  return {stochastic, static_cast<uint64_t>(seed), static_cast<uint64_t>(step), offset};
}

// The data of a dense tensor that the kernels read or write from its first element to its last.
void* dense_data(const char* name, const Tensor& t, const Tensor& like) {
  check_same_device(name, t, like);
  FM_CHECK(t.is_contiguous(), name, " must be contiguous");
  return data_of(t);
}

uint8_t* wire_data(const char* name, const Tensor& t, const Tensor& like, const CodecWire& wire) {
  check_scalar_type(name, t, ScalarType::Byte, "uint8");
  check_rank(name, t, 1);
  check_size(name, t, 0, wire.bytes());
  uint8_t* data = static_cast<uint8_t*>(dense_data(name, t, like));
  FM_CHECK(reinterpret_cast<uintptr_t>(data) % kAlignment == 0, name, " must begin on a boundary of 16 bytes");
  return data;
}

CodecSum sum_of(const Tensor& wires, const CodecWire& wire, double factor, bool hadamard) {
  check_scalar_type("wires", wires, ScalarType::Byte, "uint8");
  check_rank("wires", wires, 2);
  check_extent("the number of wires", wires.size(0));
  FM_CHECK(wires.size(0) > 0, "there must be at least 1 wire");
  check_size("wires", wires, 1, wire.bytes());
  check_last_dim_contiguous("wires", wires);
  CodecSum p{};
  p.wire = wire;
  p.wires = static_cast<const uint8_t*>(data_of(wires));
  p.wire_stride = stride_of(wires, 0);
  FM_CHECK((reinterpret_cast<uintptr_t>(p.wires) | static_cast<uintptr_t>(p.wire_stride)) % kAlignment == 0 ||
               wire.numel == 0,
           "wires must begin on boundaries of 16 bytes");
  p.num_wires = static_cast<int32_t>(wires.size(0));
  p.factor = static_cast<float>(factor);
  p.hadamard = hadamard;
  return p;
}

void block_codec_quantize(const Tensor& x, const std::optional<Tensor>& residual, int64_t bits, int64_t block,
                          bool hadamard, bool stochastic, int64_t seed, int64_t step, int64_t offset,
                          const Tensor& out) {
  BlockCodecQuantizeParams p{};
  p.dtype = dtype_of("x", x);
  p.wire = wire_of(x.numel(), bits, block);
  p.hadamard = hadamard;
  p.rounding = rounding_of(p.wire, stochastic, seed, step, offset);
  p.x = dense_data("x", x, x);
  if (residual.has_value()) {
    check_scalar_type("residual", *residual, ScalarType::Float, "float32");
    FM_CHECK(residual->numel() == p.wire.numel, "residual must have as many elements as x, ", p.wire.numel, ", got ",
             residual->numel());
    p.residual = static_cast<float*>(dense_data("residual", *residual, x));
  }
  p.out = wire_data("out", out, x, p.wire);
  if (p.wire.numel > 0) FM_EXECUTE(block_codec_quantize, p, x);
}

void block_codec_sum(const Tensor& wires, int64_t bits, int64_t block, bool hadamard, double factor,
                     const Tensor& out) {
  BlockCodecSumParams p{};
  p.dtype = dtype_of("out", out);
  p.sum = sum_of(wires, wire_of(out.numel(), bits, block), factor, hadamard);
  p.out = dense_data("out", out, wires);
  if (p.sum.wire.numel > 0) FM_EXECUTE(block_codec_sum, p, wires);
}

void block_codec_reduce(const Tensor& wires, int64_t numel, int64_t bits, int64_t out_bits, int64_t block,
                        bool hadamard, double factor, bool stochastic, int64_t seed, int64_t step, int64_t offset,
                        const Tensor& out) {
  BlockCodecReduceParams p{};
  p.sum = sum_of(wires, wire_of(numel, bits, block), factor, hadamard);
  p.wire = wire_of(numel, out_bits, block);
  p.rounding = rounding_of(p.wire, stochastic, seed, step, offset);
  p.out = wire_data("out", out, wires, p.wire);
  if (numel > 0) FM_EXECUTE(block_codec_reduce, p, wires);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) {
  m.impl("block_codec_quantize", TORCH_BOX(&block_codec_quantize));
  m.impl("block_codec_sum", TORCH_BOX(&block_codec_sum));
  m.impl("block_codec_reduce", TORCH_BOX(&block_codec_reduce));
}

}  // namespace fmkernels
