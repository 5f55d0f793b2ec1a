// SPDX-License-Identifier: Apache-2.0
// block_codec_cpu.cpp: the CPU kernels of the codec.
//
// Work       A task is kTaskTiles tiles. Of a tile all scales are found first, which brings it into the first-level cache,
//            then its codes. Sums are in registers for a unit at a time, over all wires.
// Numerics   As block_codec.h says, and compiled without contraction: a product is rounded before it is added.
// Cost       Bound by memory: 4 + bits / 8 bytes an element of float32 for a few operations on eight elements each.

#include "../common/dispatch_cpu.h"
#include "../common/parallel.h"
#include "block_codec_tiles_cpu.h"

namespace fmkernels {
namespace {

constexpr int64_t kTaskTiles = 8;
// Results of so many bytes are gone from most caches when they are read: written past them, they are not read
// from memory first. Of 1 bit and float8 decoding takes longer than memory does.
constexpr int64_t kStreamBytes = 16 << 20;

// f(first element, number of elements) for every tile, and end_of_task() after the last of a task. Of the tiles [tile, end) of
// a task begin_task(tile, end) does as many as it can, and returns the next one.
template <class F, class End, class Begin>
void for_each_tile(int64_t numel, int64_t num_bytes, F&& f, End&& end_of_task, Begin&& begin_task) {
  const int64_t tiles = ceil_div(numel, kTile);
  parallel_for(ceil_div(tiles, kTaskTiles), workers_for(num_bytes), [&](int64_t task, int) {
    const int64_t end = min(tiles, (task + 1) * kTaskTiles);
    for (int64_t tile = begin_task(task * kTaskTiles, end); tile < end; ++tile) {
      f(tile * kTile, min(kTile, numel - tile * kTile));
    }
    end_of_task();
  });
}
template <class F, class End>
void for_each_tile(int64_t numel, int64_t num_bytes, F&& f, End&& end_of_task) {
  for_each_tile(numel, num_bytes, f, end_of_task, [](int64_t tile, int64_t) { return tile; });
}
template <class F>
void for_each_tile(int64_t numel, int64_t num_bytes, F&& f) {
  for_each_tile(numel, num_bytes, f, [] {});
}

void clear_padding(const CodecWire& wire, uint8_t* out) {
  memset(out + wire.code_bytes(), 0, static_cast<size_t>(wire.scales() - wire.code_bytes()));
  const int64_t end = wire.scales() + wire.scale_bytes();
  memset(out + end, 0, static_cast<size_t>(wire.bytes() - end));
}

// Elements of a tile that a scale counts: of rotated groups all.
FM_INLINE int64_t counted(int64_t valid, bool hadamard) { return hadamard ? round_up(valid, kGroup) : valid; }

// x + residual of a tile as floats, zeros behind them.
template <class T>
FM_INLINE void gather_tile(const T* x, const float* residual, int64_t valid, float* h) {
  int64_t i = 0;
  for (; i + 8 <= valid; i += 8) store8(h + i, residual == nullptr ? load8(x + i) : load8(x + i) + load8(residual + i));
  for (; i < valid; ++i) h[i] = residual == nullptr ? to_float(x[i]) : to_float(x[i]) + residual[i];
  for (; i < round_up(valid, kUnit); ++i) h[i] = 0.0f;
}

template <class T>
FM_INLINE void rotate_tile(const T* x, int64_t count, float* rotated) {
  for (int64_t i = 0; i < count; i += kGroup) {
    V8 group[4];
    for (int j = 0; j < 4; ++j) group[j] = load8(x + i + 8 * j) * kRotation;
    rotate_group(group);
    for (int j = 0; j < 4; ++j) store8(rotated + i + 8 * j, group[j]);
  }
}

// residual = h less what the wire stands for, but where its scale is NaN.
template <int kCode>
void update_residual(const CodecSum& sum, const float* h, int64_t first, int64_t valid, float* residual) {
  for (int64_t at = 0; at < valid; at += kUnit) {
    V8 acc[kUnitVectors];
    sum_unit<kCode>(sum, (first + at) / kUnit, acc);
    if (sum.hadamard) rotate_unit(acc);
    const uint8_t* scales = sum.wires + sum.wire.scales();
    for (int half = 0; half < 2 && at + half * kGroup < valid; ++half) {
      const int64_t i = at + half * kGroup, n = min(kGroup, valid - i);
      const float s = read<float>(scales + ((first + i) >> sum.wire.block_log2) * 4);
      if (s != s) continue;
      float lost[kGroup];
      float* to = n == kGroup ? residual + i : lost;
      for (int j = 0; j < 4; ++j) store8(to + 8 * j, load8(h + i + 8 * j) - acc[4 * half + j]);
      if (n < kGroup) memcpy(residual + i, lost, static_cast<size_t>(n) * 4);
    }
  }
}

// Whether the kernel for AVX-512 may have whole tiles of wires of 4 bits. A sum that is NaN it would not notice.
[[maybe_unused]] bool has_wide_kernel(const BlockCodecReduceParams& p) {
  const float factor = __builtin_fabsf(p.sum.factor);
  return cpu_isa() == Isa::kAvx512 && !p.rounding.stochastic && factor >= kSmallest && factor <= 1.0f;
}
// Whether `count` elements from `first` on have products that are finite: sums may then be infinite and not NaN.
[[maybe_unused]] bool has_finite_products(const CodecSum& p, int64_t first, int64_t count) {
  const int64_t begin = p.wire.scales() + (first >> p.wire.block_log2) * 4, num_blocks = count >> p.wire.block_log2;
  constexpr float kLimit = 0x1p125f;  // an eighth of infinity
  V8i others{};
  for (int64_t w = 0; w < p.num_wires; ++w) {
    const uint8_t* scales = p.wires + w * p.wire_stride + begin;
    int64_t b = 0;
    for (; b + 8 <= num_blocks; b += 8) others |= ~((V8)(read<V8i>(scales + 4 * b) & 0x7fffffff) < kLimit);
    for (; b < num_blocks; ++b) others[0] |= !(__builtin_fabsf(read<float>(scales + 4 * b)) < kLimit);
  }
  int32_t any = 0;
  for (int i = 0; i < 8; ++i) any |= others[i];
  return any == 0;
}

// The sum of a tile, to `out` from its first element on.
template <int kCode, bool kStreams, class T>
void decode_tile(const CodecSum& sum, int64_t first, int64_t valid, T* out) {
  for (int64_t at = first; at < first + valid; at += kUnit) {
    V8 acc[kUnitVectors];
    sum_unit<kCode>(sum, at / kUnit, acc);
    if (sum.hadamard) rotate_unit(acc);
    for (V8& v : acc) v *= sum.factor;
    if (at + kUnit <= first + valid) {
      for (int i = 0; i < kUnitVectors; i += 2) {
        if constexpr (kStreams) stream16(out + at + 8 * i, acc[i], acc[i + 1]);
        else store16(out + at + 8 * i, acc[i], acc[i + 1]);
      }
    } else {
      T last[kUnit];
      for (int i = 0; i < kUnitVectors; ++i) store8(last + 8 * i, acc[i]);
      memcpy(out + at, last, static_cast<size_t>(first + valid - at) * sizeof(T));
    }
  }
}

}  // namespace

template <>
void run_block_codec_quantize<kIsa>(const BlockCodecQuantizeParams& p) {
  const int64_t numel = p.wire.numel, num_bytes = numel * element_bytes(p.dtype);
  clear_padding(p.wire, p.out);
  const Draws own(p.rounding), *draws = p.rounding.stochastic ? &own : nullptr;
  dispatch_dtype(p.dtype, [&]<class T>() {
    dispatch_checked_int<1, 4, 6, 8, kFloat8>(p.wire.code, [&]<int kCode>() {
      const T* x = static_cast<const T*>(p.x);
      for_each_tile(numel, num_bytes, [&](int64_t first, int64_t valid) {
        if (p.residual == nullptr && !p.hadamard && valid == kTile) {
          return encode_tile<kCode>(p.wire, draws, x + first, first, valid, p.out);
        }
        alignas(64) float h[kTile], rotated[kTile];
        float* residual = p.residual == nullptr ? nullptr : p.residual + first;
        const bool is_direct = residual == nullptr && valid == kTile;
        if (!is_direct) gather_tile(x + first, residual, valid, h);
        if (p.hadamard)
          is_direct ? rotate_tile(x + first, kTile, rotated) : rotate_tile(h, round_up(valid, kUnit), rotated);
        encode_tile<kCode>(p.wire, draws, p.hadamard ? rotated : h, first, counted(valid, p.hadamard), p.out);
        if (residual != nullptr) {
          update_residual<kCode>({p.wire, p.out, 0, 1, 1.0f, p.hadamard}, h, first, valid, residual);
        }
      });
    });
  });
}

template <>
void run_block_codec_sum<kIsa>(const BlockCodecSumParams& p) {
  const int64_t numel = p.sum.wire.numel, out_bytes = numel * element_bytes(p.dtype);
  const int64_t num_bytes = out_bytes + numel * p.sum.num_wires;
  const bool streams = out_bytes >= kStreamBytes && reinterpret_cast<uintptr_t>(p.out) % kStreamAlignment == 0;
  dispatch_dtype(p.dtype, [&]<class T>() {
    dispatch_checked_int<1, 4, 6, 8, kFloat8>(p.sum.wire.code, [&]<int kCode>() {
      T* out = static_cast<T*>(p.out);
      auto tile = [&](int64_t first, int64_t valid) { decode_tile<kCode, false>(p.sum, first, valid, out); };
      auto streamed = [&](int64_t first, int64_t valid) { decode_tile<kCode, (kCode > 1)>(p.sum, first, valid, out); };
      auto whole_tiles = [&](int64_t tile, int64_t end) {
        if constexpr (kIsa == Isa::kAvx2 && kCode == 4) {
          const int64_t count = min(end, numel / kTile) - tile;
          const bool is_aligned = reinterpret_cast<uintptr_t>(p.out) % 64 == 0;
          if (count > 0 && cpu_isa() == Isa::kAvx512 && !p.sum.hadamard && (is_aligned || !streams)) {
            run_block_codec_sum_tiles<Isa::kAvx512>(p, tile, count, streams);
            return tile + count;
          }
        }
        return tile;
      };
      if (streams && kCode > 1) for_each_tile(numel, num_bytes, streamed, end_stream, whole_tiles);
      else for_each_tile(numel, num_bytes, tile, [] {}, whole_tiles);
    });
  });
}

template <>
void run_block_codec_reduce<kIsa>(const BlockCodecReduceParams& p) {
  const int64_t numel = p.wire.numel, num_bytes = numel * (1 + p.sum.num_wires);
  clear_padding(p.wire, p.out);
  const Draws own(p.rounding), *draws = p.rounding.stochastic ? &own : nullptr;
  dispatch_checked_int<1, 4, 6, 8, kFloat8>(p.sum.wire.code, [&]<int kCode>() {
    dispatch_checked_int<1, 4, 6, 8, kFloat8>(p.wire.code, [&]<int kOutCode>() {
      auto reduce_tile = [&](int64_t first, int64_t valid) {
        alignas(64) float h[kTile];
        for (int64_t i = 0; i < valid; i += kUnit) {
          V8 acc[kUnitVectors];
          sum_unit<kCode>(p.sum, (first + i) / kUnit, acc);
          for (int j = 0; j < kUnitVectors; ++j) store8(h + i + 8 * j, acc[j] * p.sum.factor);
        }
        const int64_t count = counted(valid, p.sum.hadamard);
        for (int64_t i = count; i < round_up(valid, kUnit); ++i) h[i] = 0.0f;
        encode_tile<kOutCode>(p.wire, draws, h, first, count, p.out);
      };
      auto reduce_whole_tiles = [&](int64_t tile, int64_t end) {
        if constexpr (kIsa == Isa::kAvx2 && kCode == 4 && kOutCode == 4) {
          const int64_t count = min(end, numel / kTile) - tile;
          if (count > 0 && has_wide_kernel(p) && has_finite_products(p.sum, tile * kTile, count * kTile)) {
            run_block_codec_reduce_tiles<Isa::kAvx512>(p, tile, count);
            return tile + count;
          }
        }
        return tile;
      };
      for_each_tile(numel, num_bytes, reduce_tile, [] {}, reduce_whole_tiles);
    });
  });
}

}  // namespace fmkernels
