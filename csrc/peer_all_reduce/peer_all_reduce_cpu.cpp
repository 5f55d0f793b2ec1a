// SPDX-License-Identifier: Apache-2.0
// peer_all_reduce_cpu.cpp: all-reduce of a rank on the CPU, through memory that the processes of a node share.
//
// Work       Rounds of kRoundBytes a worker, which stay in the second-level cache of those who wrote them and in the last
//            level for those who read; a task is kTaskTiles tiles. Ranks agree about workers in the first round, since a
//            round must be as long on all of them; no bit depends on it.
// Numerics   As peer_all_reduce.h says, and compiled without contraction: a product is rounded before it is added.
// Cost       x is read and out written once from and to memory. one_shot has one step a round, two_shot two, but reads
//            2 payloads of peers and not world_size - 1.

#include "../common/dispatch_cpu.h"
#include "../norm/norm.h"
#include "peer_payload_cpu.h"
#include "peer_steps_cpu.h"

namespace fmkernels {
namespace {

constexpr int64_t kRoundBytes = 256 << 10;
static_assert(kRoundBytes >= kMaxPeers * kPeerGranule * 4);

// A call of one rank. rows_done(numel): the elements before it have their results.
template <class T, int kCode, class RowsDone>
class Call {
 public:
  Call(const PeerAllReduceParams& p, Result<T> result, RowsDone& rows_done)
      : p_(p), steps_(p), x_(static_cast<const T*>(p.x[0])), result_(result), rows_done_(rows_done) {}

  void run() {
    if (!steps_.begin()) return;
    int64_t done = 0;
    bool is_first = true;
    do {
      const int64_t part = part_numel(p_.numel - done);
      const bool has_met =
          p_.one_shot ? one_shot(done, min(part, p_.numel - done), is_first) : two_shot(done, part, is_first);
      if (!has_met) return;
      done = min(p_.numel, done + part * (p_.one_shot ? 1 : p_.world_size));
      is_first = false;
      rows_done_(done);
    } while (done < p_.numel);
  }

 private:
  // Elements of one payload of a round, of `left` elements that there still are.
  int64_t part_numel(int64_t left) const {
    const int64_t parts = p_.one_shot ? 1 : p_.world_size, bytes = min(p_.slice_bytes, kRoundBytes * workers_);
    const int64_t most = bytes / parts / p_.payload.bytes(kPeerGranule) * kPeerGranule;
    return min(most,
               round_up(ceil_div(left, parts), kCode == 0 ? kUnit : max(kUnit, int64_t{1} << p_.payload.block_log2)));
  }

  bool meet(bool is_first) { return steps_.meet() && (!is_first || steps_.compare(&workers_)); }

  bool one_shot(int64_t first, int64_t numel, bool is_first) {
    const Payloads<T, kCode> payload(p_.payload, numel, workers_);
    payload.encode(x_ + first, steps_.mine());
    if (!meet(is_first)) return false;
    const uint8_t* from[kMaxPeers];
    for (int r = 0; r < p_.world_size; ++r) from[r] = steps_.of(r);
    if (kCode == 0) from[p_.rank] = reinterpret_cast<const uint8_t*>(x_ + first);  // which is in the caches
    payload.finish(from, p_.world_size, p_.factor, result_.from(first));
    return true;
  }

  bool two_shot(int64_t first, int64_t part, bool is_first) {
    const int64_t stride = Payloads<T, kCode>(p_.payload, part, workers_).bytes();
    const auto payload_of = [&](int r) {
      return Payloads<T, kCode>(p_.payload, max(int64_t{0}, min(part, p_.numel - first - r * part)), workers_);
    };
    for (int r = 0; r < p_.world_size; ++r) {
      if (r != p_.rank || kCode != 0) payload_of(r).encode(x_ + first + r * part, steps_.mine() + r * stride);
    }
    if (!meet(is_first)) return false;
    const uint8_t* from[kMaxPeers];
    for (int r = 0; r < p_.world_size; ++r) from[r] = steps_.of(r) + p_.rank * stride;
    if (kCode == 0) from[p_.rank] = reinterpret_cast<const uint8_t*>(x_ + first + p_.rank * part);
    payload_of(p_.rank).reduce(from, p_.world_size, p_.factor, steps_.mine(), result_.from(first + p_.rank * part));
    if (!meet(false)) return false;
    for (int r = 0; r < p_.world_size; ++r) {
      if (r != p_.rank) payload_of(r).copy(steps_.of(r), result_.from(first + r * part));
    }
    return true;
  }

  const PeerAllReduceParams& p_;
  PeerSteps steps_;
  const T* x_;
  Result<T> result_;
  RowsDone& rows_done_;
  int32_t workers_ = 1;
};

template <class RowsDone>
void run(const PeerAllReduceParams& p, const void* residual, void* out, RowsDone&& rows_done) {
  dispatch_dtype(p.payload.dtype, [&]<class T>() {
    dispatch_checked_int<0, 4, 6, 8>(p.payload.code, [&]<int kCode>() {
      const Result<T> result{static_cast<T*>(out), static_cast<const T*>(residual)};
      Call<T, kCode, RowsDone>(p, result, rows_done).run();
    });
  });
}

}  // namespace

template <>
void run_peer_all_reduce<kIsa>(const PeerAllReduceParams& p) {
  run(p, nullptr, p.out[0], [](int64_t) {});
}

template <>
void run_peer_all_reduce_rms_norm<kIsa>(const PeerAllReduceRmsNormParams& p) {
  const int64_t row_bytes = p.hidden * element_bytes(p.reduce.payload.dtype);
  int64_t rows = 0;  // that are done
  run(p.reduce, p.residual[0], p.residual_out[0], [&](int64_t numel) {
    NormForwardParams norm{};
    const int64_t count = numel / p.hidden - rows;
    const auto view = [&](void* data) {
      return RowView{static_cast<char*>(data) + rows * row_bytes, {0, 0, 0, p.hidden}};
    };
    norm.dtype = p.reduce.payload.dtype;
    norm.weight_dtype = p.weight_dtype;
    norm.rows = {count, {1, 1, 1, count}, true};
    norm.hidden = p.hidden;
    norm.eps = p.eps;
    norm.x = view(p.residual_out[0]);
    norm.weight = p.weight;
    norm.y = view(p.reduce.out[0]);
    if (count > 0) run_norm_forward<kIsa>(norm);
    rows += count;
  });
}

}  // namespace fmkernels
