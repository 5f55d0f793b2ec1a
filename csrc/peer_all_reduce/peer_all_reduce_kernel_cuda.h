// SPDX-License-Identifier: Apache-2.0
// The kernel of peer_all_reduce on CUDA: what a lane does, whatever the payload.
#pragma once

#include "../common/symmetric.h"
#include "peer_all_reduce_payload_cuda.h"

namespace fmkernels {
namespace {

constexpr int kRanksAhead = 8;  // peers whose loads are in flight together

// What the launcher finds out once. A lane has lane_numel elements, whole rows where there is a norm, else whole tiles; they
// go through its slice in rounds of round_tiles.
struct PeerKernelParams {
  PeerAllReduceRmsNormParams norm;  // hidden 0: there is none
  int64_t lane_numel;
  int32_t round_tiles, tile_bytes;
  uint32_t digest;  // of the call
};

struct PeerShared {
  TileShared tile;
  float sums[2][kTileWarps];  // [turn, warp]
};

__device__ __forceinline__ PeerHeader& header_of(uint8_t* workspace) {
  return *reinterpret_cast<PeerHeader*>(workspace);
}

// One lane of one rank, and its steps.
class PeerLane {
 public:
  __device__ __forceinline__ explicit PeerLane(const PeerKernelParams& p)
      : p_(p.norm.reduce),
        rank_(p.norm.reduce.rank + static_cast<int>(blockIdx.y)),
        lane_(static_cast<int>(blockIdx.x)),
        epoch_(own().epochs[blockIdx.x]),
        was_broken_(is_broken()),
        slice_(peer_slice_offset(p_.slice_bytes, p_.lanes, 0, lane_)) {}

  __device__ __forceinline__ int rank() const { return rank_; }

  // The next step: what it writes, it writes before it meets.
  __device__ __forceinline__ void begin() { ++epoch_; }
  __device__ __forceinline__ void meet() {
    if (was_broken_ != 0) __trap();
    const bool has_met = meet_peers(
        p_.world_size, rank_, epoch_, static_cast<int64_t>(p_.timeout_ms) * 1000000,
        [&](int of, int by) { return &header_of(p_.workspaces[of]).flags[lane_][by]; },
        [&] { return is_broken() != 0; }, [&](int peer) { give_up(peer); });
    if (!has_met) __trap();
  }
  // That of a rank in this step, or in the next one.
  __device__ __forceinline__ uint8_t* slice(int rank, bool is_next = false) const {
    const bool is_upper = ((epoch_ & 1) != 0) != is_next;
    return p_.workspaces[rank] + slice_ + (is_upper ? static_cast<int64_t>(p_.lanes) * p_.slice_bytes : 0);
  }

  // The same call on every rank: written before the first meeting of a call, read behind it, and compared when it has come.
  __device__ __forceinline__ void tell(uint32_t digest) {
    if (threadIdx.x == 0) own().calls[epoch_ & 1][lane_].digest = digest;
  }
  __device__ __forceinline__ uint32_t told(uint32_t digest) const {
    const int peer = threadIdx.x;
    return peer < p_.world_size ? header_of(p_.workspaces[peer]).calls[epoch_ & 1][lane_].digest : digest;
  }
  // All threads of the block together: __syncthreads besides.
  __device__ __forceinline__ void compare(uint32_t told, uint32_t digest) const {
    if (told != digest) give_up(static_cast<int>(threadIdx.x));
    if (__syncthreads_or(told != digest)) __trap();
  }

  // Behind the last step.
  __device__ __forceinline__ void end() {
    if (threadIdx.x == 0) own().epochs[lane_] = epoch_;
  }
  // No call is possible any more, and all ranks learn of it.
  __device__ __forceinline__ void give_up(int peer) const {
    const uint32_t word =
        peer_broken(static_cast<uint32_t>(rank_), static_cast<uint32_t>(peer), static_cast<uint32_t>(lane_));
#pragma unroll 1
    for (int r = 0; r < p_.world_size; ++r) atomicCAS_system(&header_of(p_.workspaces[r]).broken, 0u, word);
    __threadfence_system();
  }

 private:
  __device__ __forceinline__ PeerHeader& own() const { return header_of(p_.workspaces[rank_]); }
  __device__ __forceinline__ uint32_t is_broken() const {
    return *static_cast<volatile const uint32_t*>(&own().broken);
  }

  const PeerAllReduceParams& p_;
  int rank_, lane_;
  uint32_t epoch_, was_broken_;
  int64_t slice_;  // of half 0
};

// ---- what follows the sum --------------------------------------------------------------------------------------------

// The sum of x over the block; every thread holds it. `turn` is 0 and 1 alternately.
__device__ __forceinline__ float block_sum(float x, float (&sums)[2][kTileWarps], int turn) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) sums[turn][threadIdx.x / kWarp] = x;
  __syncthreads();  // this turn is written; the other one, which the next call writes, has been read
  x = 0.0f;
  for (int warp = 0; warp < kTileWarps; ++warp) x += sums[turn][warp];
  return x;
}

// `numel` elements at most, zeros behind them.
template <class W, int kVec>
__device__ __forceinline__ void load_floats(const void* data, int numel, bool is_wide, float (&to)[kVec]) {
  constexpr int kPart = 16 / sizeof(W);
  for (int first = 0; first < kVec; first += kPart) {
    const auto part = load_part<W, kPart>(static_cast<const W*>(data), first, numel, is_wide);
    for (int i = 0; i < kPart; ++i) to[first + i] = to_float(part.lane[i]);
  }
}

// out = RMSNorm of a row of residual_out, which this block has written before a barrier. is_wide: 16 bytes are one access;
// which thread has which elements, and so the order of a sum, does not depend on it.
template <class T>
__device__ __forceinline__ void norm_row(const PeerAllReduceRmsNormParams& p, const T* row, T* out, bool is_wide,
                                         PeerShared& shared, int turn) {
  constexpr int kVec = 16 / sizeof(T), kStride = kTileThreads * kVec, kAhead = 4;
  const int64_t begin = static_cast<int64_t>(threadIdx.x) * kVec;
  const auto numel_at = [&](int64_t column) {
    return p.hidden - column < kVec ? static_cast<int>(p.hidden - column) : kVec;
  };
  float sum = 0.0f;
#pragma unroll 1
  for (int64_t column = begin; column < p.hidden; column += kAhead * kStride) {
    Vector<T, kVec> s[kAhead];
    for (int i = 0; i < kAhead; ++i) {
      const int64_t at = column + i * kStride;
      s[i] = load_part<T, kVec>(row + at, 0, numel_at(at), is_wide);
    }
    for (int i = 0; i < kAhead; ++i) {
      for (int k = 0; k < kVec; ++k) sum = __fmaf_rn(to_float(s[i].lane[k]), to_float(s[i].lane[k]), sum);
    }
  }
  sum = block_sum(sum, shared.sums, turn);
  const float rstd = 1.0f / sqrtf(sum / static_cast<float>(p.hidden) + p.eps);
  const bool is_float = p.weight_dtype == DType::kFloat32;
#pragma unroll 1
  for (int64_t column = begin; column < p.hidden; column += kStride) {
    const int numel = numel_at(column);
    Vector<T, kVec> s = load_part<T, kVec>(row + column, 0, numel, is_wide);
    float weight[kVec];
    if (is_float) load_floats<float>(static_cast<const float*>(p.weight) + column, numel, is_wide, weight);
    else load_floats<T>(static_cast<const T*>(p.weight) + column, numel, is_wide, weight);
    for (int i = 0; i < kVec; ++i) s.lane[i] = from_float<T>(to_float(s.lane[i]) * rstd * weight[i]);
    store_part(out + column, 0, numel, is_wide, s);
  }
}

__device__ __forceinline__ bool is_multiple_of_16(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// ---- the kernel ------------------------------------------------------------------------------------------------------

template <class T, class Tiles>
__device__ __forceinline__ void reduce_lane(const PeerKernelParams& p, PeerShared& shared) {
  using Part = typename Tiles::Part;
  constexpr int kTile = Tiles::kTile;
  const PeerAllReduceParams& reduce = p.norm.reduce;
  const int64_t begin = blockIdx.x * p.lane_numel;
  if (begin >= reduce.numel && blockIdx.x > 0) return;  // on every rank; lane 0 meets even for no elements
  const int64_t numel = reduce.numel - begin < p.lane_numel ? reduce.numel - begin : p.lane_numel;
  const bool has_norm = p.norm.hidden > 0;
  const T *x = static_cast<const T*>(reduce.x[blockIdx.y]) + begin, *residual = nullptr;
  T *out = static_cast<T*>(reduce.out[blockIdx.y]) + begin, *to = out;  // to: of what an element becomes at first
  if (has_norm) {
    residual = static_cast<const T*>(p.norm.residual[blockIdx.y]) + begin;
    to = static_cast<T*>(p.norm.residual_out[blockIdx.y]) + begin;
  }
  const bool is_aligned =
      is_multiple_of_16(x) && is_multiple_of_16(residual) && is_multiple_of_16(to) && is_multiple_of_16(out);
  const Tiles tiles(reduce.payload, shared.tile);
  PeerLane lane(p);
  const int world_size = reduce.world_size;

  // The sum of a tile over the ranks, in their order.
  const auto sum_tile = [&](int tile, float (&sum)[Tiles::kCount]) {
    for (float& v : sum) v = 0.0f;
#pragma unroll 1
    for (int first = 0; first < world_size; first += kRanksAhead) {
      typename Tiles::Stored stored[kRanksAhead];
      for (int i = 0; i < kRanksAhead; ++i) {
        if (first + i < world_size) stored[i] = tiles.load(lane.slice(first + i) + tile * p.tile_bytes);
      }
      for (int i = 0; i < kRanksAhead; ++i) {
        if (first + i < world_size) tiles.add(stored[i], sum);
      }
    }
    for (float& v : sum) v = __fmul_rn(v, reduce.factor);
  };

#pragma unroll 1
  for (int64_t first = 0, row = 0; first == 0 || first < numel; first += static_cast<int64_t>(p.round_tiles) * kTile) {
    const int64_t left = numel - first;
    const int num_tiles = left < static_cast<int64_t>(p.round_tiles) * kTile
                              ? static_cast<int>((left + kTile - 1) / kTile)
                              : p.round_tiles;
    const auto numel_of = [&](int tile) {
      const int64_t behind = left - static_cast<int64_t>(tile) * kTile;
      return behind < kTile ? static_cast<int>(behind) : kTile;
    };
    const auto finish = [&](int tile, const float (&result)[Tiles::kCount]) {
      const int64_t base = first + static_cast<int64_t>(tile) * kTile;
      for (int part = 0; part < Tiles::kParts; ++part) {
        Part more{}, done;
        if (has_norm) more = load_part<T, Tiles::kPart>(residual + base, tiles.at(part), numel_of(tile), is_aligned);
        for (int i = 0; i < Tiles::kPart; ++i) {
          const float v = result[part * Tiles::kPart + i];
          done.lane[i] = from_float<T>(has_norm ? __fadd_rn(v, to_float(more.lane[i])) : v);
        }
        store_part(to + base, tiles.at(part), numel_of(tile), is_aligned, done);
      }
    };

    // Step: x.
    lane.begin();
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; tile += Tiles::kAhead) {
      Part parts[Tiles::kAhead][Tiles::kParts];
      for (int i = 0; i < Tiles::kAhead; ++i) {
        if (tile + i >= num_tiles) continue;
        const T* from = x + first + static_cast<int64_t>(tile + i) * kTile;
        for (int part = 0; part < Tiles::kParts; ++part) {
          parts[i][part] = load_part<T, Tiles::kPart>(from, tiles.at(part), numel_of(tile + i), is_aligned);
        }
      }
      for (int i = 0; i < Tiles::kAhead; ++i) {
        if (tile + i < num_tiles) tiles.store(lane.slice(lane.rank()) + (tile + i) * p.tile_bytes, parts[i]);
      }
    }
    if (first == 0) lane.tell(p.digest);
    lane.meet();
    const uint32_t told = first == 0 ? lane.told(p.digest) : p.digest;

    if (reduce.one_shot) {
#pragma unroll 1
      for (int tile = 0; tile < num_tiles; ++tile) {
        float sum[Tiles::kCount];
        sum_tile(tile, sum);
        finish(tile, sum);
      }
    } else {
      // Step: the sum of the own part, which goes to the other half.
      const int part_tiles = (num_tiles + world_size - 1) / world_size;
      const auto end_of = [&](int rank) {
        return (rank + 1) * part_tiles < num_tiles ? (rank + 1) * part_tiles : num_tiles;
      };
#pragma unroll 1
      for (int tile = lane.rank() * part_tiles; tile < end_of(lane.rank()); ++tile) {
        float sum[Tiles::kCount];
        sum_tile(tile, sum);
        tiles.store_sum(lane.slice(lane.rank(), true) + tile * p.tile_bytes, sum, numel_of(tile));
      }
      lane.begin();
      lane.meet();
      // All parts, each rank beginning with its own, so that not all read from one.
#pragma unroll 1
      for (int i = 0, owner = lane.rank(); i < world_size; ++i, owner = owner + 1 < world_size ? owner + 1 : 0) {
#pragma unroll 1
        for (int tile = owner * part_tiles; tile < end_of(owner); tile += Tiles::kAhead) {
          typename Tiles::Stored stored[Tiles::kAhead];
          for (int k = 0; k < Tiles::kAhead; ++k) {
            if (tile + k < end_of(owner)) stored[k] = tiles.load(lane.slice(owner) + (tile + k) * p.tile_bytes);
          }
          for (int k = 0; k < Tiles::kAhead; ++k) {
            float result[Tiles::kCount] = {};
            if (tile + k >= end_of(owner)) continue;
            tiles.add(stored[k], result);
            finish(tile + k, result);
          }
        }
      }
    }
    // Rows that are complete.
    if (first == 0 || has_norm) lane.compare(told, p.digest);  // residual_out of the round is written, besides
    if (has_norm) {
      const int64_t done =
          left < static_cast<int64_t>(p.round_tiles) * kTile ? numel : first + int64_t{p.round_tiles} * kTile;
      constexpr int kVec = 16 / sizeof(T);
      const bool is_wide = is_aligned && p.norm.hidden % kVec == 0 && is_multiple_of_16(p.norm.weight);
      for (; (row + 1) * p.norm.hidden <= done; ++row) {
        const int64_t at = row * p.norm.hidden;
        const int turn = static_cast<int>(row & 1);
        norm_row<T>(p.norm, to + at, out + at, is_wide, shared, turn);
      }
    }
  }
  lane.end();
}

}  // namespace
}  // namespace fmkernels
