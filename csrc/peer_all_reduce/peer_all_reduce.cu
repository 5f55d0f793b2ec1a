// SPDX-License-Identifier: Apache-2.0
// peer_all_reduce.cu: the sum over the ranks of a node, which read each other's memory, and what follows it.
//
// Contract   see peer_all_reduce.h. Tensors are read and written 16 bytes at a time where all begin on their boundary, else
//            one element at a time. Every rank launches lanes blocks, which must all be resident: who waits holds its place.
// Work       grid (lanes, ranks of this launch). A lane has a stretch of the elements, whole rows where there is a norm, and
//            takes it through its slice in rounds. One shot: writes x, meets, sums all. Two shots: writes x, meets, sums a
//            part and writes that, meets, reads all parts, its own first.
// Shared     PeerShared: what warps tell each other of a long block of the codec, and of a row.
// Meetings   symmetric.h: a release of a flag in the memory of each peer, and an acquire of those in the own. A round of one
//            shot has one, of two shots two; nothing is cleared, and nobody waits at the end.
// Numerics   float32, each operation rounded by itself, ranks in their order: the bits of the CPU, but for the sum of squares
//            of a row, whose order depends on its length alone. Deterministic.
// Cost       Links: one shot world_size - 1 payloads in, two shots 2 (world_size - 1) / world_size. Bound by them, or by the
//            meetings, of which each is a write to and a read from a peer.
// After      Two-shot and one-shot all-reduce as NCCL and TensorRT-LLM have them; epochs as device memory counts them.

#include "peer_all_reduce_kernel_cuda.h"

#include "../common/dispatch.h"
#include "../common/launch.h"

namespace fmkernels {
namespace {

template <class T, int kBits>
__global__ void __launch_bounds__(kTileThreads, 1) peer_all_reduce_kernel(PeerKernelParams p) {
  __shared__ PeerShared shared;
  reduce_lane<T, TilesOf<T, kBits>>(p, shared);
}

// Different for calls that differ, as good as always.
uint32_t digest_of(const PeerAllReduceParams& p) {
  uint64_t digest = 0xcbf29ce484222325u;
  const auto add = [&](int64_t value) {
    digest = (digest ^ static_cast<uint64_t>(value)) * 0x9e3779b97f4a7c15u;
    digest ^= digest >> 29;
  };
  for (int field = 0; field < kNumPeerFields; ++field) add(peer_call_field(p.call, field));
  add(p.lanes);
  add(p.slice_bytes);
  add(p.world_size);
  return static_cast<uint32_t>(digest >> 32);
}

// A block that waits keeps its place on the GPU, so those that it waits for must have theirs.
void check_resident(const char* name, void (*kernel)(PeerKernelParams), int num_lanes, int num_ranks) {
  const int64_t resident = resident_blocks(name, kernel, kTileThreads, 0);
  FM_CHECK(num_lanes * num_ranks <= resident, name, ": ", num_lanes, " lanes of ", num_ranks,
           " ranks are more blocks than the ", resident, " that this GPU holds at once");
}

template <class Tiles>
void complete(const char* name, PeerKernelParams& p) {
  const PeerAllReduceParams& reduce = p.norm.reduce;
  p.tile_bytes = static_cast<int32_t>(reduce.payload.bytes(Tiles::kTile));
  FM_CHECK(p.tile_bytes <= reduce.slice_bytes, name, ": a slice of a workspace must have ", p.tile_bytes,
           " bytes, it has ", reduce.slice_bytes);
  const int64_t tiles = reduce.slice_bytes / p.tile_bytes;
  constexpr int64_t kMaxTiles = 1 << 18;  // of 4 KiB at most: below 2^31 bytes
  p.round_tiles = static_cast<int32_t>(tiles < kMaxTiles ? tiles : kMaxTiles);
  const int64_t unit = p.norm.hidden > 0 ? p.norm.hidden : Tiles::kTile;
  const int64_t units = (reduce.numel + unit - 1) / unit;
  p.lane_numel = (units + reduce.lanes - 1) / reduce.lanes * unit;
}

void launch_lanes(const char* name, PeerKernelParams p, cudaStream_t stream) {
  const PeerAllReduceParams& reduce = p.norm.reduce;
  p.digest = digest_of(reduce);
  dispatch_dtype(reduce.payload.dtype, [&]<class T>() {
    dispatch_int<0, 8, 6, 4>("bits", reduce.payload.code, [&]<int kBits>() {
      complete<TilesOf<T, kBits>>(name, p);
      check_resident(name, peer_all_reduce_kernel<T, kBits>, reduce.lanes, reduce.num_ranks);
      launch(name, peer_all_reduce_kernel<T, kBits>, dim3(reduce.lanes, reduce.num_ranks), kTileThreads, 0, stream, p);
    });
  });
}

}  // namespace

void launch_peer_all_reduce(const PeerAllReduceParams& p, cudaStream_t stream) {
  PeerKernelParams params{};
  params.norm.reduce = p;
  launch_lanes("peer_all_reduce", params, stream);
}

void launch_peer_all_reduce_rms_norm(const PeerAllReduceRmsNormParams& p, cudaStream_t stream) {
  PeerKernelParams params{};
  params.norm = p;
  launch_lanes("peer_all_reduce_rms_norm", params, stream);
}

}  // namespace fmkernels
