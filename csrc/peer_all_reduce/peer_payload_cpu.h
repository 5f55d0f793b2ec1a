// SPDX-License-Identifier: Apache-2.0
// What ranks on the CPU write to their slices and read from those of others. Internal linkage, as in common/vec.h.
//
// A payload is tiles of kTile elements, each a wire of its own or, without codes, its elements. It is written past the
// caches: its lines are those that others have read, and to ask each for the right to write costs 3 to 5 times as much.
#pragma once

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "../block_codec/block_codec_tiles_cpu.h"
#include "../common/parallel.h"
#include "peer_all_reduce.h"

namespace fmkernels {
namespace {

static_assert(kTile == kPeerGranule);

// `to` on a boundary of 16 bytes. Others may see it after publish() alone.
FM_INLINE void write_past_caches(uint8_t* to, const void* from, int64_t num_bytes) {
  int64_t i = 0;
#ifdef __SSE2__
  const char* bytes = static_cast<const char*>(from);
  for (; i + 16 <= num_bytes; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i)));
  }
#endif
  memcpy(to + i, static_cast<const char*>(from) + i, static_cast<size_t>(num_bytes - i));
}
FM_INLINE void publish() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// What a rank does with a sum: writes it, or adds the residual and leaves it to the norm.
template <class T>
struct Result {
  T* out;
  const T* residual;  // or null

  Result from(int64_t first) const { return {out + first, residual == nullptr ? nullptr : residual + first}; }

  // A unit from `at` on, of which `count` elements are there.
  FM_INLINE void store(int64_t at, int64_t count, V8 (&acc)[kUnitVectors]) const {
    if (count < kUnit) return store_last(at, count, acc);
    if (residual != nullptr) {
      for (int i = 0; i < kUnitVectors; ++i) acc[i] += load8(residual + at + 8 * i);
    }
    for (int i = 0; i < kUnitVectors; i += 2) store16(out + at + 8 * i, acc[i], acc[i + 1]);
  }
  void store_last(int64_t at, int64_t count, const V8 (&acc)[kUnitVectors]) const {
    float sum[kUnit];
    for (int i = 0; i < kUnitVectors; ++i) store8(sum + 8 * i, acc[i]);
    for (int64_t i = 0; i < count; ++i) {
      out[at + i] = from_float<T>(residual == nullptr ? sum[i] : sum[i] + to_float(residual[at + i]));
    }
  }
};

// Payloads of one number of elements.
template <class T, int kCode>
class Payloads {
 public:
  Payloads(const PeerPayload& payload, int64_t numel, int workers)
      : payload_(payload), tile_bytes_(payload.bytes(kTile)), numel_(numel), workers_(workers) {}

  int64_t bytes() const { return ceil_div(numel_, kTile) * tile_bytes_; }

  void encode(const T* x, uint8_t* to) const {
    for_each_tile([&](int64_t tile, int64_t valid) {
      const T* from = x + tile * kTile;
      if constexpr (kCode == 0) {
        write_past_caches(to + tile * tile_bytes_, from, valid * static_cast<int64_t>(sizeof(T)));
      } else if (valid % kUnit == 0) {
        write_codes_of(from, valid, to + tile * tile_bytes_);
      } else {
        alignas(64) T last[kTile];
        memcpy(last, from, static_cast<size_t>(valid) * sizeof(T));
        memset(last + valid, 0, static_cast<size_t>(round_up(valid, kUnit) - valid) * sizeof(T));
        write_codes_of(last, valid, to + tile * tile_bytes_);
      }
    });
  }

  // The payload of the sum of payloads of the ranks, and the result that all ranks make of it.
  void reduce(const uint8_t* const* from, int count, float factor, uint8_t* to, const Result<T>& result) const {
    for_each_tile([&](int64_t tile, int64_t valid) {
      alignas(64) std::conditional_t<kCode == 0, T, float> h[kTile];
      for (int64_t at = 0; at < valid; at += kUnit) {
        V8 acc[kUnitVectors];
        sum_unit_of(from, count, tile, at, factor, acc);
        for (int i = 0; i < kUnitVectors; i += 2) store16(h + at + 8 * i, acc[i], acc[i + 1]);
      }
      uint8_t* to_tile = to + tile * tile_bytes_;
      if constexpr (kCode == 0) {
        write_past_caches(to_tile, h, valid * static_cast<int64_t>(sizeof(T)));
        copy_tile(reinterpret_cast<const uint8_t*>(h), tile, valid, result);
      } else {
        for (int64_t i = valid; i < round_up(valid, kUnit); ++i) h[i] = 0.0f;
        Codes codes;
        encode_tile<kCode>(payload_.wire(valid), nullptr, h, 0, valid, codes.bytes);
        write_past_caches(to_tile, codes.bytes, payload_.wire(valid).bytes());
        copy_tile(codes.bytes, tile, valid, result);
      }
    });
  }

  // The sum as the result.
  void finish(const uint8_t* const* from, int count, float factor, const Result<T>& result) const {
    for_each_tile([&](int64_t tile, int64_t valid) {
      for (int64_t at = 0; at < valid; at += kUnit) {
        V8 acc[kUnitVectors];
        sum_unit_of(from, count, tile, at, factor, acc);
        result.store(tile * kTile + at, min(kUnit, valid - at), acc);
      }
    });
  }

  // One payload as the result: that of a sum.
  void copy(const uint8_t* from, const Result<T>& result) const {
    for_each_tile([&](int64_t tile, int64_t valid) { copy_tile(from + tile * tile_bytes_, tile, valid, result); });
  }

 private:
  static constexpr int64_t kTaskTiles = 8;

  // f(number of the tile, its elements).
  template <class F>
  void for_each_tile(F&& f) const {
    const int64_t tiles = ceil_div(numel_, kTile);
    parallel_for(ceil_div(tiles, kTaskTiles), workers_, [&](int64_t task, int) {
      const int64_t end = min(tiles, (task + 1) * kTaskTiles);
      for (int64_t tile = task * kTaskTiles; tile < end; ++tile) f(tile, min(kTile, numel_ - tile * kTile));
      publish();
    });
  }

  struct Codes {
    alignas(64) uint8_t bytes[kTile + kTileBlocks * 4];
  };

  // x has zeros behind `valid` elements, to a multiple of kUnit.
  void write_codes_of(const T* x, int64_t valid, uint8_t* to) const {
    if constexpr (kCode != 0) {
      Codes codes;
      encode_tile<kCode>(payload_.wire(valid), nullptr, x, 0, valid, codes.bytes);
      write_past_caches(to, codes.bytes, payload_.wire(valid).bytes());
    }
  }

  FM_INLINE void copy_tile(const uint8_t* data, int64_t tile, int64_t valid, const Result<T>& result) const {
    if (kCode == 0 && result.residual == nullptr) {
      memcpy(result.out + tile * kTile, data, static_cast<size_t>(valid) * sizeof(T));
      return;
    }
    for (int64_t at = 0; at < valid; at += kUnit) {
      V8 acc[kUnitVectors];
      for (V8& v : acc) v = kCode == 0 ? -V8{} : V8{};  // -0, of which and x the sum is x
      add(data, valid, at, acc);
      result.store(tile * kTile + at, min(kUnit, valid - at), acc);
    }
  }

  FM_INLINE void sum_unit_of(const uint8_t* const* from, int count, int64_t tile, int64_t at, float factor,
                             V8 (&acc)[kUnitVectors]) const {
    const int64_t valid = min(kTile, numel_ - tile * kTile);
    for (V8& v : acc) v = V8{};
    for (int r = 0; r < count; ++r) add(from[r] + tile * tile_bytes_, valid, at, acc);
    if (factor != 1.0f) {
      for (V8& v : acc) v *= factor;
    }
  }
  // The unit at `at` of a tile of `valid` elements.
  FM_INLINE void add(const uint8_t* data, int64_t valid, int64_t at, V8 (&acc)[kUnitVectors]) const {
    if constexpr (kCode != 0) {
      add_unit<kCode>(payload_.wire(valid), data, at / kUnit, acc);
    } else {
      const T* x = reinterpret_cast<const T*>(data) + at;
      if (at + kUnit <= valid) {
        for (int i = 0; i < kUnitVectors; ++i) acc[i] += load8(x + 8 * i);
      } else {
        T last[kUnit] = {};
        memcpy(last, x, static_cast<size_t>(valid - at) * sizeof(T));
        for (int i = 0; i < kUnitVectors; ++i) acc[i] += load8(last + 8 * i);
      }
    }
  }

  const PeerPayload& payload_;
  int64_t tile_bytes_, numel_;
  int workers_;
};

}  // namespace
}  // namespace fmkernels
