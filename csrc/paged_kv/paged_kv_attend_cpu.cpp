// SPDX-License-Identifier: Apache-2.0
// paged_kv_attend_cpu.cpp: attention over a paged cache on the CPU.
//
// Rows       The query rows of one kv head are the (query, head of its group) pairs, query major: a group shares every key
//            and value that is read.
// Two paths  A request of more than kDirectRows rows is cut into row tiles: a tile packs each block of kBlockK keys and
//            values once out of its pages, as floats, and multiplies from cache. Fewer rows (decode) read keys and values
//            where they lie, a task per chunk of kChunkTokens and some kv heads.
// One result Both paths give a row the same bits: blocks and chunks lie at the same keys, a product is summed in the same
//            order (the tile has a sum for each lane of the direct path), and what is done to a row is one function.
// Masks      As in attention: a weight of 0 hides a value; where a block holds one that is not finite, or a row of the
//            tree mask has holes, row by row: nothing hidden reaches a row, NaN included.
// Scales     One a head: a factor of the query, and of the result. One a token: of scores, and of weights.
// Numerics   float32 accumulation; scores in units of log2. Deterministic.
// Cost       Decode reads every key and value once: bound by memory. Prefill: 4 * rows * visible keys * head_dim flops.
// After      Dao 2023, FlashAttention-2, algorithm 1; Kwon et al. 2023, PagedAttention.

#include "paged_kv_direct_cpu.h"
#include "paged_kv_tiled_cpu.h"

namespace fmkernels {
namespace {

constexpr int64_t kPackedBytes = 48 << 20;  // packed blocks that all workers together keep

// What one request contributes, per kv head: row tiles, or chunks of the direct path.
struct RequestPlan {
  int64_t first_task, first_partial;  // over all requests before this one
  int64_t units;                      // tiles per kv head, or chunks
  int64_t first_chunk;                // of kChunkTokens tokens; of a direct request
  bool direct;
};

// Kv heads of a direct task: all of them where the heads of a token lie together, so that whole pages are read, but few
// enough that every worker finds two tasks. The choice changes no bits.
int64_t heads_per_task(const PagedCache& cache, int64_t num_chunks, int64_t workers) {
  auto lie_together = [&](const PagesView& x) {
    return x.head_stride < (cache.page_size == 1 ? x.page_stride : x.slot_stride);
  };
  if (!lie_together(cache.k) || !lie_together(cache.v)) return 1;
  if (workers == 1) return cache.kv_heads;
  return ceil_div(cache.kv_heads, min(cache.kv_heads, ceil_div(2 * workers, max(1, num_chunks))));
}

// Chunks that any row of the request sees; one where none sees any.
Range chunks_of(const Attend& x, const Sequence& s) {
  if (s.num_rows == 0) return {0, 0};
  const int64_t first = visible_keys(x.a, s, 0).begin / kChunkTokens;
  return {first, max(first + 1, ceil_div(visible_keys(x.a, s, s.num_rows - 1).end, kChunkTokens))};
}

template <class T>
void run_attend(const Attend& x) {
  const PagedCache& cache = x.p.cache;
  const int64_t batch = x.p.batch, kv_heads = cache.kv_heads, head_dim = cache.head_dim, v_head_dim = cache.v_head_dim;
  const int64_t columns = round_up(v_head_dim, kPanel);
  auto uses_direct = [](const Sequence& s) { return s.num_rows <= kDirectRows; };

  int64_t total_rows = 0, total_pairs = 0, total_chunks = 0, max_blocks = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const Sequence s = x.request(b, 0);
    total_rows += s.num_rows;
    total_pairs += s.num_rows * s.seq_k;
    if (uses_direct(s)) {
      const Range chunks = chunks_of(x, s);
      total_chunks += chunks.end - chunks.begin;
    } else {
      max_blocks = max(max_blocks, max(1, ceil_div(s.seq_k, kBlockK)));
    }
  }
  const int workers = workers_for(2 * total_pairs * kv_heads * (head_dim + v_head_dim));
  // Tile rows: enough tiles for every worker, never more rows than the cache holds. The choice changes no bits.
  const int64_t wanted = round_up(ceil_div(total_rows * kv_heads, 4 * workers), kGroupRows);
  const int64_t tile_rows = max_blocks == 0 ? 0 : max(kGroupRows, min(max_tile_rows(head_dim, v_head_dim), wanted));
  const int64_t affordable_slots = max(1, kPackedBytes / workers / (kBlockK * (head_dim + columns) * 4));
  const PagedTileShape shape{tile_rows, head_dim, columns, min(max_blocks, affordable_slots)};

  const int64_t num_partials = total_chunks * kv_heads, direct_heads = heads_per_task(cache, total_chunks, workers);
  const int64_t acc_floats = num_partials * kDirectRows * v_head_dim, state_floats = num_partials * kDirectRows;
  const int64_t direct_bytes = total_chunks == 0 ? 0 : DirectScratch::num_bytes(direct_heads, head_dim);
  const int64_t scratch_bytes = direct_bytes + PagedTileScratch::num_bytes(shape);
  const Workspace workspace(Arena::array_bytes<RequestPlan>(batch) + Arena::array_bytes<float>(acc_floats) +
                            2 * Arena::array_bytes<float>(state_floats) + Arena::array_bytes<Partial>(num_partials) +
                            workers * scratch_bytes);
  Arena arena(workspace.data());
  RequestPlan* plan = arena.take<RequestPlan>(batch);
  float* partial_acc = arena.take<float>(acc_floats);
  const RowStates partial_state{arena.take<float>(state_floats), arena.take<float>(state_floats)};
  Partial* partials = arena.take<Partial>(num_partials);  // [request][chunk][kv head]
  char* scratch = arena.take<char>(workers * scratch_bytes);
  for (int64_t i = 0; i < num_partials; ++i) {
    partials[i] = {partial_acc + i * kDirectRows * v_head_dim, partial_state.from(i * kDirectRows)};
  }
  for (int worker = 0; worker < workers; ++worker) {
    const PagedTileScratch buffers(Arena(scratch + worker * scratch_bytes + direct_bytes), shape);
    for (int64_t slot = 0; slot < shape.num_slots; ++slot) buffers.blocks[slot] = {-1, false};
  }

  int64_t num_tasks = 0, first_partial = 0;
  bool has_chunks = false;
  for (int64_t b = 0; b < batch; ++b) {
    const Sequence s = x.request(b, 0);
    const bool direct = uses_direct(s);
    const Range chunks = direct ? chunks_of(x, s) : Range{0, 0};
    const int64_t units = direct ? chunks.end - chunks.begin : ceil_div(s.num_rows, tile_rows);
    plan[b] = {num_tasks, first_partial, units, chunks.begin, direct};
    num_tasks += units * (direct ? ceil_div(kv_heads, direct_heads) : kv_heads);
    if (direct) first_partial += units * kv_heads;
    has_chunks = has_chunks || (direct && units > 1);
  }
  auto partial_of = [&](const RequestPlan& unit, int64_t kv_head, int64_t chunk) -> const Partial& {
    return partials[unit.first_partial + chunk * kv_heads + kv_head];
  };
  auto finish_direct = [&](const Sequence& s, const RequestPlan& unit) {
    float acc[kMaxHeadDim], state[2];
    const RowStates whole{state, state + 1};
    for (int64_t row = 0; row < s.num_rows; ++row) {
      whole.set(0, {-kInfinity, 0.0f});
      memset(acc, 0, static_cast<size_t>(v_head_dim) * sizeof(float));
      for (int64_t chunk = 0; chunk < unit.units; ++chunk) {
        const Partial& part = partial_of(unit, s.kv_head, chunk);
        merge_chunk(whole, part.state.from(row), 0, acc, part.acc + row * v_head_dim, v_head_dim);
      }
      write_row(x, s, row, whole[0], acc);
    }
  };

  parallel_for(num_tasks, workers, [&](int64_t task, int worker) {
    int64_t b = 0;
    for (int64_t end = batch; end - b > 1;) {
      const int64_t middle = (b + end) / 2;
      (plan[middle].first_task <= task ? b : end) = middle;
    }
    const RequestPlan& unit = plan[b];
    const int64_t local = task - unit.first_task;
    if (unit.direct) {
      const int64_t chunk = local % unit.units, first = local / unit.units * direct_heads;
      const int64_t last = min(first + direct_heads, kv_heads);
      const Sequence s = x.request(b, first);
      const int64_t key = (unit.first_chunk + chunk) * kChunkTokens, end = min(key + kChunkTokens, s.seq_k);
      Following following{-1, 0, 0};
      if (workers == 1 && chunk + 1 < unit.units) {
        following = {b, end, s.seq_k};
      } else if (workers == 1 && direct_heads == kv_heads && b + 1 < batch && plan[b + 1].direct) {
        following = {b + 1, plan[b + 1].first_chunk * kChunkTokens, x.request(b + 1, 0).seq_k};
      }
      run_direct<T>(x, s, last - first, key, end, following,
                    DirectScratch(Arena(scratch + worker * scratch_bytes), direct_heads, head_dim),
                    &partial_of(unit, first, chunk));
      for (int64_t head = first; unit.units == 1 && head < last; ++head) finish_direct(x.request(b, head), unit);
    } else {
      const Sequence s = x.request(b, local / unit.units);
      const int64_t tile = unit.units - 1 - local % unit.units;  // causal: the longest first
      run_paged_tile<T>(x, s, tile * tile_rows, min((tile + 1) * tile_rows, s.num_rows),
                        PagedTileScratch(Arena(scratch + worker * scratch_bytes + direct_bytes), shape), shape);
    }
  });
  if (!has_chunks) return;
  parallel_for(batch * kv_heads, workers, [&](int64_t task, int) {
    const RequestPlan& unit = plan[task / kv_heads];
    if (unit.direct && unit.units > 1) finish_direct(x.request(task / kv_heads, task % kv_heads), unit);
  });
}

}  // namespace

template <>
void run_paged_kv_attend<kIsa>(const PagedAttendParams& p) {
  const Attend x(p);
  dispatch_cache(p.cache.dtype, [&]<class T>() { run_attend<T>(x); });
}

}  // namespace fmkernels
