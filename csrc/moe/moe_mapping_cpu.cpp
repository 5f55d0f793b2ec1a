// SPDX-License-Identifier: Apache-2.0
// moe_mapping_cpu.cpp: slots to rows, a stable counting sort by expert.
//
// Work       A task is a chunk of tokens: it counts their experts, and, once it is known where its part of each expert
//            begins, ranks them. The chunks follow from the number of slots and not from that of the threads.
// Cost       the slots twice, both lists once. Ids are within range: the op has looked.

#include "moe.h"

#include "../common/integers_cpu.h"
#include "../common/parallel.h"
#include "../common/vec.h"

namespace fmkernels {
namespace {

constexpr int64_t kChunkSlots = 1 << 16;
constexpr int kCounters = 4;  // arrays of counters that slots take turns in: no increment waits for the one before

struct Chunks {
  int64_t num_tokens, num_topk, tokens_per_chunk, count;

  explicit Chunks(const MoeMappingParams& p) : num_topk(p.num_topk.value()) {
    num_tokens = p.num_slots / num_topk;
    tokens_per_chunk = max(kChunkSlots / num_topk, 1);
    count = ceil_div(num_tokens, tokens_per_chunk);
  }
  int64_t begin(int64_t chunk) const { return chunk * tokens_per_chunk; }
  int64_t end(int64_t chunk) const { return min(begin(chunk) + tokens_per_chunk, num_tokens); }
};

// Into counts [1 + experts], of which the first is that of -1.
template <class Id>
void count_chunk(const MoeMappingParams& p, const Chunks& chunks, int64_t chunk, int32_t* counts) {
  int32_t counters[kCounters][kMaxExperts + 1] = {};
  for (int64_t t = chunks.begin(chunk); t < chunks.end(chunk); ++t) {
    const Id* ids = static_cast<const Id*>(p.topk_idx) + t * p.idx_stride;
    int64_t k = 0;
    for (; k + kCounters <= chunks.num_topk; k += kCounters) {
      for (int c = 0; c < kCounters; ++c) ++counters[c][ids[k + c] + 1];
    }
    for (; k < chunks.num_topk; ++k) ++counters[(t + k) % kCounters][ids[k] + 1];
  }
  for (int64_t e = 0; e <= p.num_experts; ++e) {
    counts[e] = (counters[0][e] + counters[1][e]) + (counters[2][e] + counters[3][e]);
  }
}

// Counts become the row of each chunk's first slot of each expert.
void scan_counts(const MoeMappingParams& p, const Chunks& chunks, int32_t* counts) {
  int64_t start = 0;
  for (int64_t e = 0; e < p.num_experts; ++e) {
    int64_t next = start;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      int32_t& count = counts[chunk * (p.num_experts + 1) + e + 1];
      const int32_t of_chunk = count;
      count = static_cast<int32_t>(next);
      next += of_chunk;
    }
    const int64_t end = start + round_up(next - start, p.alignment);
    p.expert_offsets[e] = static_cast<int32_t>(min(end, p.num_rows));
    p.expert_offsets[p.num_experts + e] = static_cast<int32_t>(min(next, p.num_rows));
    for (int64_t row = next; row < min(end, p.num_rows); ++row) p.pos_to_token[row] = -1;
    start = end;
  }
  for (int64_t row = start; row < p.num_rows; ++row) p.pos_to_token[row] = -1;
}

template <class Id>
void rank_chunk(const MoeMappingParams& p, const Chunks& chunks, int64_t chunk, int32_t* next) {
  for (int64_t t = chunks.begin(chunk); t < chunks.end(chunk); ++t) {
    const Id* ids = static_cast<const Id*>(p.topk_idx) + t * p.idx_stride;
    int32_t* positions = p.token_topk_to_pos + t * chunks.num_topk;
    for (int64_t k = 0; k < chunks.num_topk; ++k) {
      if (ids[k] < 0) {
        positions[k] = -1;
      } else {
        const int32_t pos = next[ids[k] + 1]++;  // below num_rows: the op has counted where that could be wrong
        positions[k] = pos;
        p.pos_to_token[pos] = static_cast<int32_t>(t);
      }
    }
  }
}

template <class Id>
void build(const MoeMappingParams& p) {
  const Chunks chunks(p);
  const Workspace memory(Arena::array_bytes<int32_t>(max(chunks.count, 1) * (p.num_experts + 1)));
  int32_t* counts = reinterpret_cast<int32_t*>(memory.data());
  const int workers = workers_for(p.num_slots * 4);
  parallel_for(chunks.count, workers,
               [&](int64_t chunk, int) { count_chunk<Id>(p, chunks, chunk, counts + chunk * (p.num_experts + 1)); });
  scan_counts(p, chunks, counts);
  parallel_for(chunks.count, workers,
               [&](int64_t chunk, int) { rank_chunk<Id>(p, chunks, chunk, counts + chunk * (p.num_experts + 1)); });
}

}  // namespace

template <>
void run_moe_mapping<kIsa>(const MoeMappingParams& p) {
  p.idx_is_long ? build<int64_t>(p) : build<int32_t>(p);
}

}  // namespace fmkernels
