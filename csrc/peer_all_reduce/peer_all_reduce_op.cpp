// SPDX-License-Identifier: Apache-2.0
// peer_all_reduce, peer_all_reduce_rms_norm: tensors in, checks, Params out.
#include "../common/tensor.h"
#include "peer_all_reduce.h"

#include <string>
#include <vector>

#ifndef FM_CUDA
#include <future>

#include "../common/parallel.h"
#endif

namespace fmkernels {
namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t kMaxNumel = int64_t{1} << 40;  // so that no number of bytes overflows

// What the public function says before the name of its argument.
constexpr const char* kNames[] = {"all_reduce", "all_reduce_rms_norm"};

int32_t int_from(const char* name, int64_t value, int64_t lowest, int64_t highest) {
  FM_CHECK(value >= lowest && value <= highest, name, " must be from ", lowest, " to ", highest, ", got ", value);
  return static_cast<int32_t>(value);
}

// The data of the tensors of a list, contiguous, of the dtype, shape and device of x[0].
void view_list(const char* name, const Tensors& list, const Tensors& x, bool is_written, const void** data) {
  FM_CHECK(list.size() == x.size(), name, " must have as many tensors as x, ", x.size(), ", got ", list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const Tensor &t = list[i], &like = x[0];
    check_same_device(name, t, like);
    FM_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of the first x");
    check_rank(name, t, like.dim());
    for (int64_t dim = 0; dim < like.dim(); ++dim) check_size(name, t, dim, like.size(dim));
    FM_CHECK(t.is_contiguous(), name, " must be contiguous");
    data[i] = data_of(t);
    FM_CHECK(reinterpret_cast<uintptr_t>(data[i]) % t.element_size() == 0, name,
             " must begin on a boundary of its elements");
    for (size_t j = 0; is_written && j < i; ++j) {
      FM_CHECK(data[i] != data[j] || t.numel() == 0, name, " must be another tensor for every rank");
    }
  }
}

void view_outputs(const char* name, const Tensors& list, const Tensors& x, void** data) {
  const void* seen[kMaxPeers];
  view_list(name, list, x, true, seen);
  for (size_t i = 0; i < list.size(); ++i) data[i] = const_cast<void*>(seen[i]);
}

PeerPayload payload_of(const Tensor& x, int64_t bits, int64_t block) {
  const DType dtype = dtype_of("x", x);
  if (bits == 0) return {dtype, 0, 0};
  FM_CHECK(bits == 8 || bits == 6 || bits == 4, "bits must be 8, 6, 4 or 0 for the elements as they are, got ", bits);
  FM_CHECK(block >= kMinBlock && block <= kMaxBlock && (block & (block - 1)) == 0,
           "block must be a power of two from 32 to 2048, got ", block);
  return {dtype, static_cast<int32_t>(bits), __builtin_ctzll(static_cast<unsigned long long>(block))};
}

// All but what the norm adds to the call.
PeerAllReduceParams reduce_params(const Tensors& x, const Tensors& workspaces, const Tensors& out, int64_t rank,
                                  bool one_shot, int64_t bits, int64_t block, bool average, int64_t lanes,
                                  int64_t timeout_ms) {
  PeerAllReduceParams p{};
  p.world_size = int_from("the number of workspaces", static_cast<int64_t>(workspaces.size()), 1, kMaxPeers);
  p.num_ranks = int_from("the number of x", static_cast<int64_t>(x.size()), 1, p.world_size);
  p.rank = int_from("rank", rank, 0, p.world_size - p.num_ranks);
  p.lanes = int_from("lanes", lanes, 1, kMaxPeerLanes);
  p.timeout_ms = int_from("timeout_ms", timeout_ms, 1, INT32_MAX);
  p.payload = payload_of(x[0], bits, block);
  p.numel = x[0].numel();
  FM_CHECK(p.numel <= kMaxNumel, "x must have at most 2^40 elements, got ", p.numel);
  p.one_shot = one_shot;
  p.factor = average ? static_cast<float>(1.0 / p.world_size) : 1.0f;
  view_list("x", x, x, false, p.x);
  view_outputs("out", out, x, p.out);

  const int64_t workspace_bytes = workspaces[0].numel();
  for (size_t i = 0; i < workspaces.size(); ++i) {
    const Tensor& t = workspaces[i];
    check_scalar_type("workspaces", t, ScalarType::Byte, "uint8");
    check_rank("workspaces", t, 1);
    check_size("workspaces", t, 0, workspace_bytes);
    check_same_device("workspaces", t, x[0]);
    FM_CHECK(t.is_contiguous(), "workspaces must be contiguous");
    p.workspaces[i] = static_cast<uint8_t*>(data_of(t));
    FM_CHECK(reinterpret_cast<uintptr_t>(p.workspaces[i]) % 64 == 0, "workspaces must begin on boundaries of 64 bytes");
    for (size_t j = 0; j < i; ++j) {
      FM_CHECK(p.workspaces[i] != p.workspaces[j], "workspaces must be another tensor for every rank");
    }
  }
  p.slice_bytes = peer_slice_bytes(workspace_bytes, lanes);
  const int64_t needed = (one_shot ? 1 : p.world_size) * p.payload.bytes(kPeerGranule);
  FM_CHECK(p.slice_bytes >= needed, "workspaces of ", workspace_bytes, " bytes have ", p.slice_bytes,
           " for a lane at a time, and this call needs ", needed);

  p.call.numel = p.numel;
  p.call.dtype = static_cast<int32_t>(p.payload.dtype);
  p.call.code = p.payload.code;
  p.call.block = p.payload.code == 0 ? 0 : static_cast<int32_t>(block);
  p.call.one_shot = one_shot;
  p.call.average = average;
  return p;
}

#ifdef FM_CUDA
template <class Params>
void execute(const Params& p, [[maybe_unused]] const Tensor& x) {
  if constexpr (requires { p.reduce; }) FM_EXECUTE(peer_all_reduce_rms_norm, p, x);
  else FM_EXECUTE(peer_all_reduce, p, x);
}
#else
// The sentence for what a rank met.
[[noreturn]] void fail_with(const char* name, const PeerAllReduceParams& p, const PeerFailure& failure) {
  if (failure.kind == PeerFailure::kDiffers) {
    if (failure.field == 0) name = "PeerWorkspace";  // for ranks that call another function, too
    const auto text = [&](int64_t value) -> std::string {
      switch (failure.field) {
        case 0: return kNames[value != 0];
        case 1: return value == 0 ? "float32" : value == 1 ? "float16" : "bfloat16";
        case 4: return value == 0 ? "None" : std::to_string(value);
        case 6: return value != 0 ? "one_shot" : "two_shot";
        case 7: return value != 0 ? "avg" : "sum";
        default: return std::to_string(value);
      }
    };
    if (failure.field == kNumPeerFields - 1) {
      fail(name, ": ", kPeerFieldNames[failure.field], " must be the same on every rank, those of rank 0 and rank ",
           failure.peer, " differ");
    }
    fail(name, ": ", kPeerFieldNames[failure.field], " must be the same on every rank, rank 0 has ",
         text(failure.rank_value), " and rank ", failure.peer, " ", text(failure.peer_value));
  }
  if (failure.kind == PeerFailure::kLate) {
    fail(name, ": rank ", failure.peer, " is gone or late: rank ", failure.rank, " waited for it for ", p.timeout_ms,
         " ms, and the workspace is of no use any more");
  }
  fail(name, ": the workspace is of no use any more, rank ", failure.rank, " has waited in vain for rank ",
       failure.peer);
}

PeerAllReduceParams& reduce_of(PeerAllReduceParams& p) { return p; }
PeerAllReduceParams& reduce_of(PeerAllReduceRmsNormParams& p) { return p.reduce; }
void run_rank(const PeerAllReduceParams& p) { FM_EXECUTE(peer_all_reduce, p, ); }
void run_rank(const PeerAllReduceRmsNormParams& p) { FM_EXECUTE(peer_all_reduce_rms_norm, p, ); }

// The ranks of the call, each in a thread of its own where they are several.
template <class Params>
void execute(const Params& all, const Tensor&) {
  constexpr bool kHasNorm = std::is_same_v<Params, PeerAllReduceRmsNormParams>;
  Params ranks[kMaxPeers];
  PeerFailure failures[kMaxPeers] = {};
  std::future<void> others[kMaxPeers];  // which end the threads, also when one throws
  Params common = all;
  const int num_ranks = reduce_of(common).num_ranks;
  const auto take = [](auto* list, int i) { list[0] = list[i]; };
  for (int i = 0; i < num_ranks; ++i) {
    ranks[i] = all;
    PeerAllReduceParams& p = reduce_of(ranks[i]);
    p.rank += i;
    p.num_ranks = 1;
    p.call.workers = num_ranks == 1 ? num_workers() : 1;
    p.failure = &failures[i];
    take(p.x, i), take(p.out, i);
    if constexpr (kHasNorm) take(ranks[i].residual, i), take(ranks[i].residual_out, i);
  }
  for (int i = 1; i < num_ranks; ++i) {
    others[i] = std::async(std::launch::async, [p = &ranks[i]] { run_rank(*p); });
  }
  run_rank(ranks[0]);
  for (int i = 1; i < num_ranks; ++i) others[i].get();
  for (int i = 0; i < num_ranks; ++i) {
    if (failures[i].kind != PeerFailure::kNone) fail_with(kNames[kHasNorm], reduce_of(ranks[i]), failures[i]);
  }
}
#endif

void check_lanes(int64_t lanes) {
#ifndef FM_CUDA
  FM_CHECK(lanes == 1, "lanes must be 1 on the CPU, got ", lanes);
#else
  (void)lanes;
#endif
}

void peer_all_reduce(Tensors x, Tensors workspaces, Tensors out, int64_t rank, bool one_shot, int64_t bits,
                     int64_t block, bool average, int64_t lanes, int64_t timeout_ms) {
  check_lanes(lanes);
  const PeerAllReduceParams p =
      reduce_params(x, workspaces, out, rank, one_shot, bits, block, average, lanes, timeout_ms);
  execute(p, x[0]);
}

void peer_all_reduce_rms_norm(Tensors x, Tensors residual, const Tensor& weight, Tensors workspaces, Tensors out,
                              Tensors residual_out, int64_t rank, bool one_shot, int64_t bits, int64_t block,
                              int64_t lanes, double eps, int64_t timeout_ms) {
  check_lanes(lanes);
  FM_CHECK(!x.empty() && x[0].dim() >= 1, "x must have at least 1 tensor of at least 1 dimension");
  PeerAllReduceRmsNormParams p{};
  p.hidden = x[0].size(x[0].dim() - 1);
  FM_CHECK(p.hidden > 0, "x must have a last dimension of at least 1");
  FM_CHECK(p.hidden <= kMaxNumel, "x must have a last dimension of at most 2^40, got ", p.hidden);
  p.reduce = reduce_params(x, workspaces, out, rank, one_shot, bits, block, false, lanes, timeout_ms);
  FM_CHECK(bits == 0 || p.hidden % block == 0, "the last dimension of x must be a multiple of block, ", block, ", got ",
           p.hidden);
  p.rows = p.reduce.numel / p.hidden;
  p.eps = static_cast<float>(eps);
  check_rank("weight", weight, 1);
  check_size("weight", weight, 0, p.hidden);
  check_same_device("weight", weight, x[0]);
  check_last_dim_contiguous("weight", weight);
  p.weight_dtype = dtype_of("weight", weight);
  FM_CHECK(p.weight_dtype == DType::kFloat32 || p.weight_dtype == p.reduce.payload.dtype,
           "weight must be float32 or have the dtype of x");
  p.weight = data_of(weight);
  view_list("residual", residual, x, false, p.residual);
  view_outputs("residual_out", residual_out, x, p.residual_out);
  for (size_t i = 0; i < x.size(); ++i) {
    FM_CHECK(p.reduce.out[i] != p.residual_out[i] || p.reduce.numel == 0, "out and residual_out must be two tensors");
  }
  p.reduce.call.hidden = p.hidden;
  p.reduce.call.eps_bits = float_bits(p.eps);
  p.reduce.call.weight_dtype = static_cast<int32_t>(p.weight_dtype);
  execute(p, x[0]);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) {
  m.impl("peer_all_reduce", TORCH_BOX(&peer_all_reduce));
  m.impl("peer_all_reduce_rms_norm", TORCH_BOX(&peer_all_reduce_rms_norm));
}

}  // namespace fmkernels
