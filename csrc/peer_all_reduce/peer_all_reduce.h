// SPDX-License-Identifier: Apache-2.0
// All-reduce among the ranks of one node through memory that each of them has mapped, and the same with what follows it in
// a transformer: the sum of a residual and RMSNorm.
//
//   sum           acc = 0, acc += v[r] for the ranks r in their order, in float32, and times `factor` at last
//   v[r]          the elements of rank r (code 0), or what its wire stands for (block_codec.h), encoded to nearest
//   one_shot      result = sum
//   two_shot      result = decode(encode(sum)): one rank encodes a part, all decode it; of code 0 a rounding to the dtype
//   residual_out  result + residual in float32, rounded to the dtype once;  out = RMSNorm of it, as norm.h has it
//
// Blocks of the codec are counted from the first element of x. So the bits of a result depend on no rank, lane, round,
// workspace or length, and those of a block on that block alone.
//
// A workspace is memory of one rank: a PeerHeader, then two halves. A lane is a block of the grid, on every rank the one
// of the same number; it uses its own slice of each half, its own flags, and tells other lanes nothing. What a lane does
// is a sequence of steps, numbered by its epoch e = 1, 2, ... (mod 2^32), which goes on from call to call:
//
//   1  write to half e % 2 of its slice in the own workspace, and to the own calls[e % 2][lane]
//   2  store e to flags[lane][own rank] of every rank's workspace (release), wait until flags[lane][p] of the own one has
//      reached e for every rank p (acquire; the difference as a signed number is not negative)
//   3  read half e % 2 of any rank
//
// A half is written again in step e + 2, which begins after the wait of step e + 1, for which every rank has stored e + 1
// after it had read what it wants of step e. So there is no barrier at the end, and steps of any calls may follow each
// other: of other sizes, algorithms and dtypes. A peer that is ahead is ahead by one step.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../block_codec/block_codec.h"
#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/stream.h"

namespace fmkernels {

constexpr int kMaxPeers = 16, kMaxPeerLanes = 64;
constexpr int64_t kPeerSliceAlignment = 256;

// What the ranks of a call must agree about. Written before the first signal of a call and compared after it; `workers`
// may differ.
struct PeerCall {
  int64_t numel, hidden;       // hidden 0: no norm
  int32_t dtype, code, block;  // block 0 where code is
  int32_t one_shot, average;
  uint32_t eps_bits;
  int32_t weight_dtype;
  int32_t workers;  // threads that the rank has, on the CPU
  uint32_t digest;  // on CUDA: of the fields, the number of lanes and their slices
  int32_t unused[3];
};
static_assert(sizeof(PeerCall) == 64);

// All zeros at first.
struct PeerHeader {
  uint32_t flags[kMaxPeerLanes][kMaxPeers];  // [lane, the rank that stored it]
  uint32_t epochs[kMaxPeerLanes];            // of the last step that is done
  uint32_t broken;                           // 0, or peer_broken(...) once a wait was in vain: no call is possible then
  uint32_t unused[15];
  PeerCall calls[2][kMaxPeerLanes];  // [half, lane]
};
static_assert(offsetof(PeerHeader, calls) % 64 == 0);
constexpr uint32_t peer_broken(uint32_t rank, uint32_t peer, uint32_t lane) {
  return 1u | rank << 8 | peer << 16 | lane << 24;  // who waited for whom
}
constexpr int64_t kPeerHeaderBytes = (sizeof(PeerHeader) + 4095) / 4096 * 4096;

// Of one half, for one lane.
constexpr int64_t peer_slice_bytes(int64_t workspace_bytes, int64_t lanes) {
  const int64_t data = workspace_bytes - kPeerHeaderBytes;
  return data < 0 ? 0 : data / (2 * lanes) / kPeerSliceAlignment * kPeerSliceAlignment;
}
// Where it begins.
constexpr int64_t peer_slice_offset(int64_t slice_bytes, int64_t lanes, int64_t half, int64_t lane) {
  return kPeerHeaderBytes + (half * lanes + lane) * slice_bytes;
}

// How elements are written to a slice. A slice holds `parts` payloads, each in bytes(numel); what a kernel writes at least
// at a time is kPeerGranule elements. Rows may be longer than a slice: a norm reads them where the sums are.
constexpr int64_t kPeerGranule = kMaxBlock;
struct PeerPayload {
  DType dtype;
  int32_t code, block_log2;  // code 0: the elements as they are

  FM_HOST_DEVICE CodecWire wire(int64_t numel) const { return {numel, code, block_log2}; }
  FM_HOST_DEVICE int64_t bytes(int64_t numel) const {  // whole lines of a cache
    const int64_t used = code == 0 ? numel * (dtype == DType::kFloat32 ? 4 : 2) : wire(numel).bytes();
    return (used + 63) / 64 * 64;
  }
};

// What went wrong, for the CPU: the sentence is made where there are no instruction sets.
struct PeerFailure {
  enum Kind : int32_t { kNone, kDiffers, kLate, kBroken } kind;
  int32_t field;       // of kDiffers: which one, as in peer_call_field
  int32_t rank, peer;  // of kDiffers: rank 0 and the first that differs; else who waited for whom
  int64_t rank_value, peer_value;
};

// The fields of a PeerCall that are compared, in their order, with what they are called.
constexpr int kNumPeerFields = 9;
constexpr const char* kPeerFieldNames[kNumPeerFields] = {
    "the operation", "dtype", "numel", "hidden", "bits", "block", "algorithm", "op", "eps or the dtype of weight"};
FM_HOST_DEVICE int64_t peer_call_field(const PeerCall& call, int field) {
  switch (field) {
    case 0: return call.hidden > 0;
    case 1: return call.dtype;
    case 2: return call.numel;
    case 3: return call.hidden;
    case 4: return call.code;
    case 5: return call.block;
    case 6: return call.one_shot;
    case 7: return call.average;
    default: return static_cast<int64_t>(call.eps_bits) << 2 | call.weight_dtype;
  }
}

// One launch computes the ranks `rank` .. rank + num_ranks - 1 together, which a user has one of: blockIdx.y + rank.
struct PeerAllReduceParams {
  PeerPayload payload;
  int64_t numel;  // may be 0: the ranks then still meet
  int32_t world_size, rank, num_ranks, lanes;
  int64_t slice_bytes;
  int32_t timeout_ms;
  bool one_shot;
  float factor;  // 1, or 1 / world_size
  PeerCall call;
  uint8_t* workspaces[kMaxPeers];  // [world_size]
  const void* x[kMaxPeers];        // [num_ranks], each numel elements, at boundaries of an element alone
  void* out[kMaxPeers];            // [num_ranks], written; each may be x
  PeerFailure* failure;            // of the CPU; null on CUDA, where the kernel traps
};

struct PeerAllReduceRmsNormParams {
  PeerAllReduceParams reduce;  // its numel is rows * hidden, its factor 1
  int64_t rows, hidden;        // hidden is a multiple of the block where there is a code
  float eps;
  DType weight_dtype;  // float32 or that of x
  const void* weight;  // [hidden]
  const void* residual[kMaxPeers];
  void* residual_out[kMaxPeers];  // written; each may be residual or x. reduce.out is that of the norm
};

// num_ranks is 1 here.
template <Isa isa>
void run_peer_all_reduce(const PeerAllReduceParams& p);
template <Isa isa>
void run_peer_all_reduce_rms_norm(const PeerAllReduceRmsNormParams& p);

void launch_peer_all_reduce(const PeerAllReduceParams& p, cudaStream_t stream);
void launch_peer_all_reduce_rms_norm(const PeerAllReduceRmsNormParams& p, cudaStream_t stream);

}  // namespace fmkernels
