// SPDX-License-Identifier: Apache-2.0
// attention_forward_cpu.cpp: the CPU kernel of attention, fixed-length and packed.
//
// Rows       The query rows of one kv head are the (query, head of its group) pairs, query major: a group shares every
//            packed key and value, and the visible range grows with the row.
// Two paths  A sequence of more than kDirectRows rows is cut into row tiles. A tile packs each block of kBlockK keys
//            and values once, converted to float, and multiplies from cache with a register tile of kStrip rows x
//            kPanel columns. Fewer rows (decode) read keys and values where they lie; the keys are cut into chunks of
//            kChunk, so that a single long sequence keeps every core busy, and the chunks are merged in order.
// Masks      Every row has a visible range [begin, end) of keys. Scores are computed in whole panels and the softmax
//            reads the visible range alone. Inside a strip a weight of 0 hides a value; where a block holds a value
//            that is not finite, the ragged ends of a strip go row by row: nothing hidden reaches a row, NaN included.
// Dropout    The weights of dropped keys become 0 once they are in the sum of the row, and before they meet the values.
// Numerics   float32 accumulation; scores in units of log2; blocks and chunks lie at fixed key positions, so a
//            sequence's bits depend neither on the batch nor on the number of threads. Deterministic.
// Cost       4 * rows * visible keys * head_dim flops. Decode reads every key and value once: bound by memory.
// After      Dao 2023, FlashAttention-2, algorithm 1; Goto and van de Geijn 2008 for the register tile.

#include "attention.h"
#include "attention_direct_cpu.h"
#include "attention_tiled_cpu.h"

namespace fmkernels {
namespace {

constexpr int64_t kPackedBytes = 48 << 20;  // packed blocks that all workers together keep
static_assert(kBlockK % kDropoutGroup == 0 && kDirectBlock % kDropoutGroup == 0 && kChunk % kDropoutGroup == 0);

// What one sequence of the batch contributes, per kv head: row tiles, or chunks of the direct path.
struct SequencePlan {
  int64_t first_task, first_partial;  // over all sequences before this one
  int64_t units;                      // tiles per kv head, or chunks
  int64_t first_chunk;                // of kChunk keys; of a direct sequence
  bool direct;
};

// Kv heads of a direct task: all of them where the heads of a token lie together, so that whole pages are read, but
// few enough that every worker finds two tasks. The choice changes no bits.
int64_t heads_per_task(const AttentionForwardParams& p, int64_t num_chunks, int64_t workers) {
  if (p.k.head_stride >= p.k.token_stride || p.v.head_stride >= p.v.token_stride) return 1;
  return ceil_div(p.kv_heads, min(p.kv_heads, ceil_div(2 * workers, max(1, num_chunks))));
}

template <class T>
void run_forward(const AttentionForwardParams& p) {
  const int64_t columns = round_up(p.v_head_dim, kPanel);

  auto uses_direct = [&](const Sequence& s) { return s.num_rows <= kDirectRows && p.block_mask.block == 0; };
  auto chunks_of = [&](const Sequence& s) {  // those that any of its rows sees; one where none sees any
    if (s.num_rows == 0) return Range{0, 0};
    const int64_t first = visible_keys(p, s, 0).begin / kChunk;
    return Range{first, max(first + 1, ceil_div(visible_keys(p, s, s.num_rows - 1).end, kChunk))};
  };
  int64_t total_rows = 0, total_pairs = 0, total_chunks = 0, max_blocks = 1;
  bool has_chunks = false;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b, 0);
    total_rows += s.num_rows;
    total_pairs += s.num_rows * s.seq_k;
    if (uses_direct(s)) {
      const Range chunks = chunks_of(s);
      total_chunks += chunks.end - chunks.begin;
      has_chunks = has_chunks || chunks.end - chunks.begin > 1;
    } else {  // decode alone asks for no packed blocks beyond the one of an empty scratch
      max_blocks = max(max_blocks, ceil_div(s.seq_k, kBlockK));
    }
  }
  const int workers = workers_for(2 * total_pairs * p.kv_heads * (p.head_dim + p.v_head_dim));
  // Tile rows: enough tiles for every worker, never more rows than the cache holds. The choice changes no bits.
  const int64_t wanted = round_up(ceil_div(total_rows * p.kv_heads, 4 * workers), kGroupRows);
  const int64_t tile_rows = max(kGroupRows, min(max_tile_rows(p.head_dim, p.v_head_dim), wanted));
  const int64_t affordable_slots = kPackedBytes / workers / (kBlockK * (p.head_dim + columns) * 4);
  const TileShape shape{tile_rows, p.head_dim, columns, max(1, min(max_blocks, affordable_slots))};

  const int64_t num_partials = total_chunks * p.kv_heads, direct_heads = heads_per_task(p, total_chunks, workers);
  const int64_t acc_floats = num_partials * kDirectRows * p.v_head_dim, state_floats = num_partials * kStateRows;
  const int64_t direct_floats = total_chunks == 0 ? 0 : direct_heads * kDirectRows * p.head_dim;  // q of a worker
  const int64_t scratch_bytes = TileScratch::num_bytes(shape);
  const Workspace workspace(Arena::array_bytes<SequencePlan>(p.batch) + Arena::array_bytes<float>(acc_floats) +
                            2 * Arena::array_bytes<float>(state_floats) + Arena::array_bytes<Partial>(num_partials) +
                            Arena::array_bytes<float>(workers * direct_floats) + workers * scratch_bytes);
  Arena arena(workspace.data());
  SequencePlan* plan = arena.take<SequencePlan>(p.batch);
  float* partial_acc = arena.take<float>(acc_floats);
  const RowStates partial_state{arena.take<float>(state_floats), arena.take<float>(state_floats)};
  Partial* partials = arena.take<Partial>(num_partials);  // [sequence][chunk][kv head]
  float* direct_q = arena.take<float>(workers * direct_floats);
  char* scratch = arena.take<char>(workers * scratch_bytes);
  for (int64_t i = 0; i < num_partials; ++i) {
    partials[i] = {partial_acc + i * kDirectRows * p.v_head_dim, partial_state.from(i * kStateRows)};
  }

  for (int worker = 0; worker < workers; ++worker) {
    const TileScratch buffers(Arena(scratch + worker * scratch_bytes), shape);
    for (int64_t slot = 0; slot < shape.num_slots; ++slot) buffers.slots[slot] = {-1, false};
  }
  int64_t num_tasks = 0, first_partial = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b, 0);
    const bool direct = uses_direct(s);
    const Range chunks = direct ? chunks_of(s) : Range{0, 0};
    const int64_t units = direct ? chunks.end - chunks.begin : ceil_div(s.num_rows, tile_rows);
    plan[b] = {num_tasks, first_partial, units, chunks.begin, direct};
    num_tasks += units * (direct ? ceil_div(p.kv_heads, direct_heads) : p.kv_heads);
    if (direct) first_partial += units * p.kv_heads;
  }
  auto partial_of = [&](const SequencePlan& unit, int64_t kv_head, int64_t chunk) -> const Partial& {
    return partials[unit.first_partial + chunk * p.kv_heads + kv_head];
  };
  auto finish_direct = [&](const Sequence& s, const SequencePlan& unit) {
    const Partial& total = partial_of(unit, s.kv_head, 0);
    for (int64_t row = 0; row < s.num_rows; ++row) {
      RowState state = total.state[row];
      float* acc = total.acc + row * p.v_head_dim;
      for (int64_t chunk = 1; chunk < unit.units; ++chunk) {
        const Partial& part = partial_of(unit, s.kv_head, chunk);
        const RowState other = part.state[row];
        if (other.sum == 0.0f) continue;
        const float new_max = other.max_log2 > state.max_log2 ? other.max_log2 : state.max_log2;
        const float mine = std::exp2(state.max_log2 - new_max), theirs = std::exp2(other.max_log2 - new_max);
        const float* other_acc = part.acc + row * p.v_head_dim;
        for (int64_t c = 0; c < p.v_head_dim; c += kLanes) {
          store(acc + c, load(acc + c) * mine + load(other_acc + c) * theirs);
        }
        state = {new_max, state.sum * mine + other.sum * theirs};
      }
      finish_row<T>(p, s, row, state, acc);
    }
  };

  parallel_for(num_tasks, workers, [&](int64_t task, int worker) {
    int64_t b = 0;
    for (int64_t end = p.batch; end - b > 1;) {
      const int64_t middle = (b + end) / 2;
      (plan[middle].first_task <= task ? b : end) = middle;
    }
    const SequencePlan& unit = plan[b];
    const int64_t local = task - unit.first_task;
    if (unit.direct) {
      const int64_t chunk = local % unit.units, first = local / unit.units * direct_heads;
      const int64_t last = min(first + direct_heads, p.kv_heads);
      const Sequence s = sequence_of(p, b, first);
      const int64_t key = (unit.first_chunk + chunk) * kChunk;
      run_direct<T>(p, s, last - first, key, min(key + kChunk, s.seq_k), direct_q + worker * direct_floats,
                    &partial_of(unit, first, chunk));
      for (int64_t head = first; unit.units == 1 && head < last; ++head) finish_direct(sequence_of(p, b, head), unit);
    } else {
      const Sequence s = sequence_of(p, b, local / unit.units);
      const int64_t tile = unit.units - 1 - local % unit.units;  // causal: the longest first
      run_tile<T>(p, s, tile * tile_rows, min((tile + 1) * tile_rows, s.num_rows),
                  TileScratch(Arena(scratch + worker * scratch_bytes), shape), shape);
    }
  });
  if (!has_chunks) return;
  parallel_for(p.batch * p.kv_heads, workers, [&](int64_t task, int) {
    const SequencePlan& unit = plan[task / p.kv_heads];
    if (unit.direct && unit.units > 1) finish_direct(sequence_of(p, task / p.kv_heads, task % p.kv_heads), unit);
  });
}

}  // namespace

template <>
void run_attention_forward<kIsa>(const AttentionForwardParams& p) {
  dispatch_dtype(p.dtype, [&]<class T>() { run_forward<T>(p); });
}

}  // namespace fmkernels
