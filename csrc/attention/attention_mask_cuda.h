// SPDX-License-Identifier: Apache-2.0
// The block mask on CUDA: which blocks of what is streamed a tile visits. Its values are on the device, where nobody has
// checked them: whatever they are, places stay within the lists, tiles within the tiles, and a walk ends.
//
// A tile owns rows of at most two blocks of the mask, its lines; a streamed block lies in one block of the mask.
#pragma once

#include "attention_fragments_cuda.h"

namespace fmkernels {
namespace {

constexpr int kLines = 2;
constexpr int kSmallestMaskBlock = 64;

// ---- lists ----------------------------------------------------------------------------------------------------------

// Places of a line in its list.
__device__ __forceinline__ Range line_of(const BlockMaskView& m, const BlockList& list, int batch, int64_t head,
                                         int line) {
  if (line >= list.num_lines) return {0, 0};
  const int32_t* offsets = lines_of(m, list, batch, head) + line;
  const int end = clamp(offsets[1], 0, static_cast<int>(list.num_listed));
  return {clamp(offsets[0], 0, end), end};
}

// The block of the mask, of 64 or of 128, that a position lies in.
__device__ __forceinline__ int block_of(const BlockMaskView& m, int position) {
  return position >> (m.block == kSmallestMaskBlock ? 6 : 7);
}

// What is seen of the block at a place: a tile, kWhole or kHidden.
__device__ __forceinline__ int tile_at(const BlockMaskView& m, const BlockList& list, int place) {
  const int tile = list.tile_idx[place];
  return tile < kWhole || tile >= m.num_tiles ? kHidden : tile;
}

// What a line sees of the block that `position` lies in.
__device__ __forceinline__ int tile_of_block(const BlockMaskView& m, const BlockList& list, Range line, int position) {
  const int place = find_from(list, line.begin, line.end, block_of(m, position));
  return place < line.end && list.indices[place] == block_of(m, position) ? tile_at(m, list, place) : kHidden;
}

// ---- walks ----------------------------------------------------------------------------------------------------------

// The streamed blocks that a tile visits, up (kStep 1) or down (-1), and what its lines see of each. In shared memory, one
// for each warp, whose lanes call together. After the last block comes `past`. What begin() and advance() write the lanes
// see after a barrier that follows.
template <int kStreamed, int kStep>
class BlockWalk {
 public:
  struct Visit {
    int block, tiles[kLines];
  };

  // The visit at hand, and the one after it.
  __device__ __forceinline__ const Visit& now() const { return visits_[0]; }
  __device__ __forceinline__ const Visit& next() const { return visits_[1]; }

  // To the first visit from block `from` on, whose block it returns; the first line is that of position `first_owned`. No
  // lane has read the walk since it advanced last.
  __device__ __forceinline__ int begin(const BlockMaskView& m, const BlockList& list, int batch, int64_t head,
                                       int first_owned, int from, int past) {
    int first = past;
    if (threadIdx.x % kWarp == 0) {
      past_ = past;
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        Range line = line_of(m, list, batch, head, block_of(m, first_owned) + i);
        if (kStep > 0) line.begin = find_from(list, line.begin, line.end, block_of(m, from * kStreamed));
        else line.end = find_from(list, line.begin, line.end, block_of(m, from * kStreamed) + 1);
        lines_[i] = line;
      }
      visits_[0] = find(m, list, from);
      visits_[1] = find(m, list, visits_[0].block + kStep);
      first = visits_[0].block;
    }
    return __shfl_sync(ptx::kAllLanes, first, 0);
  }
  __device__ __noinline__ void advance(const BlockMaskView& m, const BlockList& list) {
    __syncwarp();  // every lane has read the visits
    if (threadIdx.x % kWarp == 0) {
      visits_[0] = visits_[1];
      visits_[1] = find(m, list, visits_[0].block + kStep);
    }
  }

 private:
  // The first visit from block `from` on.
  __device__ __forceinline__ Visit find(const BlockMaskView& m, const BlockList& list, int from) {
    const Visit none{past_, {kHidden, kHidden}};
    if (kStep * (past_ - from) <= 0) return none;
    constexpr int kNone = 1 << 30, kFarthest = 1 << 24;  // a block of the mask beyond all that a tensor has
    const int first = block_of(m, from * kStreamed);
    int distances[kLines], tiles[kLines];
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      Range line = lines_[i];
      // Of a line at most the block that was visited last is behind.
      if (line.begin < line.end) {
        const bool is_behind = kStep * (list.indices[kStep > 0 ? line.begin : line.end - 1] - first) < 0;
        if (kStep > 0) line.begin += is_behind;
        else line.end -= is_behind;
      }
      lines_[i] = line;
      distances[i] = kNone;
      tiles[i] = kHidden;
      if (line.begin >= line.end) continue;
      const int place = kStep > 0 ? line.begin : line.end - 1;
      distances[i] = kStep * (clamp(list.indices[place], -1, kFarthest) - first);
      tiles[i] = tile_at(m, list, place);
    }
    const int distance = min(distances[0], distances[1]);
    if (distance == kNone) return none;
    // Of the block of the mask, the streamed block that comes first.
    const int in_block = static_cast<int>(m.block) / kStreamed, begin = (first + kStep * distance) * in_block;
    Visit visit{kStep > 0 ? max(from, begin) : min(from, begin + in_block - 1), {kHidden, kHidden}};
    if (kStep * (past_ - visit.block) <= 0) return none;
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      if (distances[i] == distance) visit.tiles[i] = tiles[i];
    }
    return visit;
  }

  int past_;
  Range lines_[kLines];  // what is ahead of the next visit, and its own block
  Visit visits_[2];
};

}  // namespace
}  // namespace fmkernels
