// SPDX-License-Identifier: Apache-2.0
// Tiles, shared memory and the work list of the kernels of paged_kv attend. Included by paged_kv_attend_kernel_cuda.h.
#pragma once

#include "../attention/attention_products_cuda.h"
#include "../common/divisor.h"
#include "paged_kv.h"

namespace fmkernels {
namespace {

constexpr int kListed = 128, kListWarps = kListed / kWarp;  // requests that a work list holds, a thread for each
constexpr int kGroupRows = 16;                              // rows of a page that one entry of Smem::rows may stand for
constexpr int kClasses = 4;     // parts of a block of keys whose weights are summed by themselves
constexpr int kShortRows = 16;  // of a short tile
constexpr uint32_t kNoRow = 0xffffffffu;

// ---- tiles ----------------------------------------------------------------------------------------------------------

// A tile of rows, which are (query, head of its group) pairs, and the warps over it. Short tiles, of 16 rows, are
// for requests with no more (decode); tall ones for the others. Warps share rows: then each has some keys of a block in
// q k^T, and some columns of the values in p v. What is computed for a row is the same in every tile.
template <class Element_, class Stored_, int kDim_, bool kTall_>
struct AttendTraits : RowTraits<Element_, kDim_> {
  using Stored = Stored_;
  using Cache = RowTraits<Stored, kDim_>;
  static constexpr bool kTall = kTall_, kQuantized = kIsQuantized<Stored>;
  static constexpr int kDim = kDim_;
  static constexpr int kWarps = kTall && kDim == 256 ? 8 : 4, kThreads = kWarps * kWarp;
  static constexpr int kColumnWarps = kTall && kDim < 256 ? 1 : 4, kRowWarps = kWarps / kColumnWarps;
  static constexpr int kRows = kShortRows * kRowWarps, kRowTiles = 1;
  // Keys that are multiplied at a time; of narrow rows twice as many, for the instructions that a block costs.
  static constexpr int kBlockKeys = kDim == 64 ? 128 : 64, kChunkBlocks = kChunkTokens / kBlockKeys;
  static constexpr int kWarpKeys = kBlockKeys / kColumnWarps, kKeyTiles = kWarpKeys / 8;
  static constexpr int kWarpClasses = kClasses / kColumnWarps, kClassTiles = kKeyTiles / kWarpClasses;
  static constexpr int kWarpColumns = kDim / kColumnWarps, kColumnTiles = kWarpColumns / 8;
  // What weights are multiplied as, and how many of them stand for one.
  using Weight = std::conditional_t<kQuantized, BFloat16, Element_>;
  static constexpr int kWeightTerms = std::is_same_v<Weight, Element_> ? 1 : 2;
  static constexpr bool kKeepsQ = !kTall;  // fragments of q stay in registers
  // Blocks of keys, and of values, in shared memory. 99 KiB hold all of it (sm_86, 89, 120).
  static constexpr int kBlockBytes = kBlockKeys * Cache::kRowBytes;
  static constexpr int kStages = !kTall && kBlockBytes <= 16 * 1024 ? 2 : 1;
  static constexpr int kPassRows = kThreads / Cache::kRowThreads;  // rows that all threads copy at a time
  static constexpr int kBlocksPerSm = kDim == 256 ? 1 : 2;

  static_assert(kPassRows % kGroupRows == 0 && kBlockKeys % kPassRows == 0, "a thread keeps to its row of a group");
  static_assert(kChunkTokens % kBlockKeys == 0, "whole blocks in a chunk");
};

// ---- launch arguments -----------------------------------------------------------------------------------------------

// Results of chunks that are merged by another kernel: o [slot][kv head][row][v_head_dim], and (maximum in log2 units,
// sum) [slot][kv head][row].
struct AttendPartials {
  float *o, *stats;
  int num_slots, rows;
};

struct AttendArgs {
  PagedAttendParams p;
  AttendPartials partials;
  float scale_log2;     // of products, where nothing else modifies them
  bool modifies;        // scores, beyond their scale
  bool stores_padding;  // rows of q that no request has
  Divisor group;        // query heads of a kv head
  Divisor page_size;
  int row_shift;  // entries of Smem::rows stand for 2^row_shift rows: kGroupRows where pages are made of such, else 1
  int max_keys;   // that a row of the table holds
};

// ---- requests -------------------------------------------------------------------------------------------------------

struct Request {
  int q_start, seq_q, seq_k;
};

// One of the batch. Lengths that only the device knows stay within the tensors, whatever they are.
__device__ __forceinline__ Request request_of(const AttendArgs& a, int b) {
  const PagedAttendParams& p = a.p;
  Request r{b, 1, clamp(p.cache_seqlens[b], 0, a.max_keys)};
  if (p.cu_seqlens_q != nullptr) {
    const int total = static_cast<int>(p.total_q);
    r.q_start = clamp(p.cu_seqlens_q[b], 0, total);
    r.seq_q = clamp(p.cu_seqlens_q[b + 1], r.q_start, total) - r.q_start;
  }
  return r;
}

// Keys that a query may see, but for a tree mask.
__device__ __forceinline__ Range keys_of_query(const PagedAttendParams& p, const Request& r, int query) {
  const int position = query + r.seq_k - r.seq_q;
  return {p.window_left < 0 ? 0 : max(0, position - static_cast<int>(p.window_left)),
          p.window_right < 0 ? r.seq_k : clamp(position + static_cast<int>(p.window_right) + 1, 0, r.seq_k)};
}
// The first key that a tree mask may hide.
__device__ __forceinline__ int tree_begin(const PagedAttendParams& p, const Request& r) {
  return p.tree_mask == nullptr ? 1 << 30 : r.seq_k - r.seq_q;
}
// From the first key of the first of some queries to the last of the last one.
__device__ __forceinline__ Range keys_of_queries(const PagedAttendParams& p, const Request& r, int first, int last) {
  return {keys_of_query(p, r, first).begin, keys_of_query(p, r, last).end};
}

// ---- work list ------------------------------------------------------------------------------------------------------

// A unit is a tile of rows of a request with all its keys or, for a request that one tile holds and that has slots in the
// workspace, with one chunk of them. Which of the two is free to choose: the bits are the same.
struct Unit {
  Request request;
  int b, row_begin, num_rows;
  int chunk, slot;  // slot -1: all keys
};

struct WorkList {
  struct Entry {
    int unit_end, slot_begin;  // slot -1: not split
  };
  Entry entries[kListed];  // of as many requests from `first` on
  int warp_sums[2][kListWarps];
  int first, units_before, slots_end;  // slots: after the entries
};

// Sums of x over the threads up to this one, of the first kListed. All threads together.
__device__ __forceinline__ int inclusive_sum(int x, int (&warp_sums)[kListWarps]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (__any_sync(ptx::kAllLanes, x != 0)) {
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int below = __shfl_up_sync(ptx::kAllLanes, x, distance);
      if (lane >= distance) x += below;
    }
  }
  if (lane == kWarp - 1 && warp < kListWarps) warp_sums[warp] = x;
  __syncthreads();  // every thread sees the sums of the warps
#pragma unroll
  for (int w = 0; w < kListWarps - 1; ++w) x += w < warp ? warp_sums[w] : 0;
  return x;
}

__device__ __forceinline__ Range chunks_of(const AttendArgs& a, const Request& r) {
  const Range keys = keys_of_queries(a.p, r, 0, r.seq_q - 1);
  const int begin = keys.begin / kChunkTokens;
  return {begin, keys.begin < keys.end ? (keys.end + kChunkTokens - 1) / kChunkTokens : begin};
}

// The units of the requests that this kernel is for, numbered request by request; a block takes some of them in ascending
// order. Every thread calls together. All state is in shared memory: the products leave no register for it.
template <int kRows, bool kTall>
class Work {
 public:
  __device__ __forceinline__ Work(const AttendArgs& a, WorkList& list) : list_(list) { load(a, 0, 0, 0); }

  // Whether there is such a unit.
  __device__ __forceinline__ bool find(const AttendArgs& a, int number, Unit& unit) {
    while (number >= list_.entries[kListed - 1].unit_end) {
      if (!next(a)) return false;
    }
    int before = 0;  // entries whose units all come before
#pragma unroll
    for (int i = 0; i < kListWarps; ++i) {
      const bool is_before = list_.entries[i * kWarp + threadIdx.x % kWarp].unit_end <= number;
      before += __popc(__ballot_sync(ptx::kAllLanes, is_before));
    }
    const WorkList::Entry entry = list_.entries[before];
    const int b = list_.first + before,
              index = number - (before == 0 ? list_.units_before : list_.entries[before - 1].unit_end);
    const bool is_split = entry.slot_begin >= 0;
    const Request r = request_of(a, b);
    unit = {r, b, is_split ? 0 : index * kRows, r.seq_q * a.group.value(), 0, -1};
    if (is_split) unit.chunk = chunks_of(a, r).begin + index, unit.slot = entry.slot_begin + index;
    return true;
  }
  // The entry of a request.
  __device__ __forceinline__ const WorkList::Entry& entry_of(const AttendArgs& a, int b) {
    while (b >= list_.first + kListed) next(a);
    return list_.entries[b - list_.first];
  }

 private:
  __device__ __forceinline__ bool next(const AttendArgs& a) {
    const int first = list_.first + kListed;
    if (first >= static_cast<int>(a.p.batch)) return false;
    const int units = list_.entries[kListed - 1].unit_end, slots = list_.slots_end;
    load(a, first, units, slots);  // whose first barrier every thread reaches when it has read the list
    return true;
  }
  __device__ __forceinline__ void load(const AttendArgs& a, int first, int units_before, int slots_before) {
    const int b = first + threadIdx.x;
    Request r{0, 0, 0};
    if (threadIdx.x < kListed && b < static_cast<int>(a.p.batch)) r = request_of(a, b);
    const int num_rows = r.seq_q * a.group.value();
    const bool is_mine = num_rows > 0 && (num_rows > kShortRows) == kTall;
    int units = 0, slots = 0;
    if (is_mine) {
      const Range chunks = chunks_of(a, r);
      units = (num_rows + kRows - 1) / kRows;
      if (units == 1 && chunks.end - chunks.begin > 1) slots = chunks.end - chunks.begin;
    }
    const int slot_end = slots_before + inclusive_sum(slots, list_.warp_sums[0]);
    const bool is_split = slots > 0 && slot_end <= a.partials.num_slots;
    const int unit_end = units_before + inclusive_sum(is_split ? slots : units, list_.warp_sums[1]);
    if (threadIdx.x < kListed) list_.entries[threadIdx.x] = {unit_end, is_split ? slot_end - slots : -1};
    if (threadIdx.x == kListed - 1) {
      list_.first = first;
      list_.units_before = units_before;
      list_.slots_end = slot_end;
    }
    __syncthreads();  // every thread sees the list
  }

  WorkList& list_;
};

// ---- shared memory --------------------------------------------------------------------------------------------------

// Where a row of keys and of values begins, in 16-byte steps from that of page 0, row 0 and the kv head; kNoRow: zeros.
struct RowOffsets {
  uint32_t k, v;
};

template <class T>
struct AttendSmem {
  typename T::Element q[T::kRows][T::kDim];                      // [row, column], swizzled; then o
  typename T::Stored kv[2][T::kStages][T::kBlockKeys][T::kDim];  // [keys or values, stage, key, column], swizzled
  // [term, row, key], swizzled; where warps share rows
  typename T::Weight weights[T::kWeightTerms][T::kColumnWarps > 1 ? T::kRows : 1][T::kBlockKeys];
  RowOffsets rows[2 * kChunkTokens];  // [key of two chunks, by groups of 2^row_shift]
  float scales[T::kQuantized ? 2 : 1][T::kQuantized ? 2 * kChunkTokens : 1];  // [keys or values, key of two chunks]
  float of_warps[T::kColumnWarps][T::kRows], of_classes[kClasses][T::kRows];  // maxima in a block, sums of a chunk
  // What only masks, ragged copies and results ask for.
  Unit unit;
  Range any, all;  // keys that any row of the tile sees, and keys that all of them see, but for a tree mask
  Range plain;     // blocks whose keys all rows see
  WorkList work;
};

}  // namespace
}  // namespace fmkernels
