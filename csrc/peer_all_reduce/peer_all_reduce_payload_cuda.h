// SPDX-License-Identifier: Apache-2.0
// What ranks write for each other, on CUDA: elements as they are, or codes. A tile is what a block of threads has in hand at
// a time; in a slice tiles stand one behind another, each so that what a warp reads of it is whole lines of memory.
#pragma once

#include "../block_codec/block_codec_wires_cuda.h"
#include "../common/vector_cuda.h"
#include "peer_all_reduce.h"

namespace fmkernels {
namespace {

// kCount elements from `at` on, zeros behind `numel`. is_aligned: 16 bytes, or those of the vector, are one access.
template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> load_part(const T* data, int at, int numel, bool is_aligned) {
  using Words = std::conditional_t<sizeof(T) * kCount == 16, uint4, uint2>;
  static_assert(sizeof(Words) == sizeof(T) * kCount);
  Vector<T, kCount> part{};
  if (is_aligned && at + kCount <= numel) {
    const Words words = *reinterpret_cast<const Words*>(data + at);
    memcpy(&part, &words, sizeof part);
  } else {
    for (int i = 0; i < kCount; ++i) {
      if (at + i < numel) part.lane[i] = data[at + i];
    }
  }
  return part;
}
template <class T, int kCount>
__device__ __forceinline__ void store_part(T* data, int at, int numel, bool is_aligned, const Vector<T, kCount>& part) {
  using Words = std::conditional_t<sizeof(T) * kCount == 16, uint4, uint2>;
  if (is_aligned && at + kCount <= numel) {
    Words words;
    memcpy(&words, &part, sizeof words);
    __stwb(reinterpret_cast<Words*>(data + at), words);
  } else {
    for (int i = 0; i < kCount; ++i) {
      if (at + i < numel) data[at + i] = part.lane[i];
    }
  }
}

// Code 0. A thread has 16 bytes of a tile.
template <class T>
struct ElementTiles {
  static constexpr int kParts = 1, kPart = 16 / sizeof(T), kCount = kPart, kTile = kTileThreads * kPart;
  static constexpr int kAhead = 4;  // tiles whose loads are in flight together
  using Part = Vector<T, kPart>;
  using Stored = Part;

  __device__ __forceinline__ ElementTiles(const PeerPayload&, TileShared&) {}

  // Where a part of this thread begins in a tile.
  __device__ __forceinline__ int at(int) const { return static_cast<int>(threadIdx.x) * kPart; }

  __device__ __forceinline__ void store(uint8_t* tile, const Part (&x)[kParts]) const {
    store_vector(reinterpret_cast<T*>(tile) + at(0), x[0]);
  }
  __device__ __forceinline__ void store_sum(uint8_t* tile, const float (&sum)[kCount], int) const {
    Part part[1];
    for (int i = 0; i < kCount; ++i) part[0].lane[i] = from_float<T>(sum[i]);
    store(tile, part);
  }
  __device__ __forceinline__ Stored load(const uint8_t* tile) const {
    return load_vector<T, kPart>(reinterpret_cast<const T*>(tile) + at(0));
  }
  __device__ __forceinline__ void add(const Stored& stored, float (&acc)[kCount]) const {
    for (int i = 0; i < kCount; ++i) acc[i] = __fadd_rn(acc[i], to_float(stored.lane[i]));
  }
};

// kBits: 8, 6 or 4. A tile is that of the codec, the two quads of a thread stand together: 8 bytes of 8 bits; a word of 4
// bits, as the codec has it; of 6 bits the same word and, in a second plane, a half word of what is above.
template <class T, int kBits>
struct CodeTiles {
  static constexpr int kParts = 2, kPart = kQuad, kCount = kLaneElements, kTile = kMaxBlock;
  static constexpr int kAhead = 2;
  static constexpr int kCodeBytes = kTileThreads * kBits;  // of a tile; its scales are behind them
  static constexpr int kUpperPlane = kTileThreads * 4;     // where it begins in a tile
  using Part = Vector<T, kPart>;
  struct Stored {
    uint32_t lower, upper;
    float scales[2];
  };

  CodecWire tile_wire;
  LanePlace place;
  TileShared& shared;

  __device__ __forceinline__ CodeTiles(const PeerPayload& payload, TileShared& tile_shared)
      : tile_wire(payload.wire(kTile)), place(0), shared(tile_shared) {}

  __device__ __forceinline__ int at(int part) const {
    return static_cast<int>(place.first) + part * static_cast<int>(kGroup);
  }

  __device__ __forceinline__ void store(uint8_t* tile, const Part (&x)[kParts]) const {
    float values[kCount];
    for (int i = 0; i < kCount; ++i) values[i] = to_float(x[i / kPart].lane[i % kPart]);
    encode_tile(tile, values);
  }
  // A NaN of the scales stands in no element behind the last one.
  __device__ __forceinline__ void store_sum(uint8_t* tile, float (&sum)[kCount], int numel) const {
    for (int i = 0; i < kCount; ++i) {
      if (at(i / kPart) + i % kPart >= numel) sum[i] = 0.0f;
    }
    encode_tile(tile, sum);
  }
  __device__ __forceinline__ Stored load(const uint8_t* tile) const {
    Stored stored{};
    const int thread = threadIdx.x;
    if constexpr (kBits == 8) {
      const uint2 words = reinterpret_cast<const uint2*>(tile)[thread];
      stored.lower = words.x;
      stored.upper = words.y;
    } else {
      stored.lower = reinterpret_cast<const uint32_t*>(tile)[thread];
      if constexpr (kBits == 6) stored.upper = reinterpret_cast<const uint16_t*>(tile + kUpperPlane)[thread];
    }
    const float* scales = reinterpret_cast<const float*>(tile + kCodeBytes);
    for (int i = 0; i < 2; ++i) stored.scales[i] = scales[at(i) >> tile_wire.block_log2];
    return stored;
  }
  __device__ __forceinline__ void add(const Stored& stored, float (&acc)[kCount]) const {
    uint32_t words[2] = {stored.lower, stored.upper};
    if constexpr (kBits != 8) {
      constexpr uint32_t kLow = 0x0f0f0f0fu, kPair = 0x03030303u;
      words[0] = stored.lower & kLow;
      words[1] = stored.lower >> 4 & kLow;
      if constexpr (kBits == 6) {
        const uint32_t pairs = (stored.upper & 0x3333u) | (stored.upper & 0xccccu) << 14;
        words[0] |= (pairs & kPair) << 4;
        words[1] |= (pairs >> 4 & kPair) << 4;
      }
    }
    add_codes<kBits>(words, stored.scales, acc);
  }

 private:
  // All threads of the block together.
  __device__ __forceinline__ void encode_tile(uint8_t* tile, float (&x)[kCount]) const {
    BlockScale s[2];
    uint32_t words[2];
    find_scales<kBits>(x, tile_wire, kTile, place, false, shared, s);
    encode_as<kBits>(x, s, CodecRounding{}, place, words);
    const int thread = threadIdx.x;
    if constexpr (kBits == 8) {
      __stwb(reinterpret_cast<uint2*>(tile) + thread, make_uint2(words[0], words[1]));
    } else {
      constexpr uint32_t kLow = 0x0f0f0f0fu, kPair = 0x03030303u;
      reinterpret_cast<uint32_t*>(tile)[thread] = (words[0] & kLow) | (words[1] & kLow) << 4;
      if constexpr (kBits == 6) {
        const uint32_t pairs = (words[0] >> 4 & kPair) | (words[1] >> 4 & kPair) << 4;  // 4 of each 8 bits
        reinterpret_cast<uint16_t*>(tile + kUpperPlane)[thread] = static_cast<uint16_t>(pairs | pairs >> 14);
      }
    }
    store_own_scales<kBits>(tile_wire, place, s, false, reinterpret_cast<float*>(tile + kCodeBytes));
  }
};

template <class T, int kBits>
struct ChooseTiles {
  using Type = CodeTiles<T, kBits>;
};
template <class T>
struct ChooseTiles<T, 0> {
  using Type = ElementTiles<T>;
};
template <class T, int kBits>
using TilesOf = typename ChooseTiles<T, kBits>::Type;

}  // namespace
}  // namespace fmkernels
