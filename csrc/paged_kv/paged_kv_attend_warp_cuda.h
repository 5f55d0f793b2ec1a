// SPDX-License-Identifier: Apache-2.0
// Copies of blocks through the block table, products and softmax of paged_kv attend. Included by
// paged_kv_attend_kernel_cuda.h.
#pragma once

#include "paged_kv_attend_stored_cuda.h"
#include "paged_kv_attend_tile_cuda.h"

namespace fmkernels {
namespace {

constexpr float kGrowthLog2 = 8.0f;        // of a maximum, in log2 units, from which on o is rescaled
constexpr float kNoShift = 3.4028235e38f;  // of a row that has seen no finite score: larger than any growth

__device__ __forceinline__ const char* pinned(const char* x) {
  const auto bits = reinterpret_cast<unsigned long long>(x);
  return reinterpret_cast<const char*>(__shfl_sync(ptx::kAllLanes, bits, threadIdx.x % kWarp));
}

// ---- copies ---------------------------------------------------------------------------------------------------------

// The scales of the tokens of a chunk, where each has its own.
template <class T>
__device__ __forceinline__ void locate_scales(AttendSmem<T>& smem, const ScaleView& view, int which,
                                              const AttendArgs& a, const int32_t* table, Range keys, int chunk) {
  if (!view.per_token) return;
  for (int i = threadIdx.x; i < kChunkTokens; i += T::kThreads) {
    const int key = chunk * kChunkTokens + i;
    float scale = 0.0f;
    if (keys.begin <= key && key < keys.end) {
      const int index = key / a.page_size, page = table[index], slot = key - index * a.page_size.value();
      if (static_cast<uint32_t>(page) < static_cast<uint32_t>(a.p.cache.num_pages))
        scale = view.data[page * view.page_stride + slot * view.slot_stride + blockIdx.x * view.head_stride];
    }
    smem.scales[which][key % (2 * kChunkTokens)] = scale;
  }
}

// Works out where the rows of a chunk begin; the block table is read here alone. Whether this thread has found a page that
// does not exist: its rows, and rows that no row of the tile sees, become zeros.
template <class T>
__device__ __forceinline__ bool locate_rows(AttendSmem<T>& smem, const AttendArgs& a, int chunk) {
  const PagedCache& cache = a.p.cache;
  const int32_t* table = a.p.block_table + smem.unit.b * a.p.table_stride;
  const Range keys = smem.any;
  bool is_missing = false;
#pragma unroll 1
  for (int i = threadIdx.x; i < kChunkTokens >> a.row_shift; i += T::kThreads) {
    const int key = chunk * kChunkTokens + (i << a.row_shift);
    RowOffsets at{kNoRow, kNoRow};
    if (key < keys.end && key + (1 << a.row_shift) > keys.begin) {
      const int index = key / a.page_size, page = table[index], slot = key - index * a.page_size.value();
      if (static_cast<uint32_t>(page) < static_cast<uint32_t>(cache.num_pages)) {
        constexpr int kChunk = T::Cache::kChunkElements;
        at.k = static_cast<uint32_t>((page * cache.k.page_stride + slot * cache.k.slot_stride) / kChunk);
        at.v = static_cast<uint32_t>((page * cache.v.page_stride + slot * cache.v.slot_stride) / kChunk);
      } else {
        is_missing = true;
      }
    }
    smem.rows[key % (2 * kChunkTokens) >> a.row_shift] = at;
  }
  if constexpr (T::kQuantized) {
    locate_scales<T>(smem, cache.k_scale, 0, a, table, keys, chunk);
    locate_scales<T>(smem, cache.v_scale, 1, a, table, keys, chunk);
  }
  return is_missing;
}

// The part of a block of keys or values that a thread copies.
template <class T, bool kValues>
struct PageCopy {
  using Cache = typename T::Cache;
  static constexpr int kPasses = T::kBlockKeys / T::kPassRows;
  const char* first;  // the thread's columns of the kv head in page 0, in its row of a group
  uint32_t rows;      // where smem.rows has the thread's row of the first pass over the first block

  __device__ __forceinline__ PageCopy(const AttendSmem<T>& smem, const AttendArgs& a) {
    const int row = threadIdx.x / Cache::kRowThreads, chunk = threadIdx.x % Cache::kRowThreads;
    const PagesView& view = kValues ? a.p.cache.v : a.p.cache.k;
    const int64_t row_of_group = a.row_shift == 0 ? 0 : row % kGroupRows;
    first = pinned(static_cast<const char*>(view.data) + chunk * 16 +
                   Cache::kElementBytes * (blockIdx.x * view.head_stride + row_of_group * view.slot_stride));
    rows = pinned(ptx::smem_address(smem.rows + (row >> a.row_shift)) + (kValues ? offsetof(RowOffsets, v) : 0));
  }
  static __device__ __forceinline__ uint32_t thread_offset() {
    return swizzled<Cache>(threadIdx.x / Cache::kRowThreads, threadIdx.x % Cache::kRowThreads);
  }
  static constexpr int smem_bytes(int pass, int c) {
    return (kValues ? T::kStages * T::kBlockBytes : 0) + pass * T::kPassRows * Cache::kRowBytes +
           c * Cache::kRowThreads * 16;
  }
  __device__ __forceinline__ uint32_t rows_of(const AttendArgs& a, int block) const {
    constexpr uint32_t kBytes = sizeof(RowOffsets) * T::kBlockKeys;
    return rows + (static_cast<uint32_t>(block) % (2 * T::kChunkBlocks) * kBytes >> a.row_shift);
  }

  // A block all of whose rows and columns exist and are wanted; `to`: where the thread's part of a block of keys begins.
  __device__ __forceinline__ void issue(const AttendArgs& a, int block, uint32_t to) const {
    const uint32_t of_block = rows_of(a, block);
    if (a.row_shift != 0) issue_passes<T::kPassRows / kGroupRows>(of_block, to);
    else issue_passes<T::kPassRows>(of_block, to);
  }
  template <int kStep>
  __device__ __forceinline__ void issue_passes(uint32_t rows, uint32_t to) const {
    static_for<kPasses>([&]<int pass>() {
      const uint32_t offset = ptx::ld_shared<pass * kStep* static_cast<int>(sizeof(RowOffsets))>(rows);
      const char* from = first + static_cast<uint64_t>(offset) * 16;
      static_for<Cache::kColumnPasses>(
          [&]<int c>() { ptx::cp_async_16<smem_bytes(pass, c), c * Cache::kRowThreads * 16>(to, from); });
    });
  }
  // Any other block.
  __device__ __forceinline__ void issue_ragged(const AttendArgs& a, int block, Range keys, uint32_t to) const {
    const int columns = static_cast<int>(kValues ? a.p.cache.v_head_dim : a.p.cache.head_dim) / Cache::kChunkElements;
    const int chunk = threadIdx.x % Cache::kRowThreads;
    const uint32_t step = static_cast<uint32_t>(sizeof(RowOffsets)) * (T::kPassRows >> a.row_shift);
    uint32_t at = rows_of(a, block);
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass, at += step) {
      const int key = block * T::kBlockKeys + threadIdx.x / Cache::kRowThreads + pass * T::kPassRows;
      const uint32_t offset = ptx::ld_shared(at);
      const bool exists = offset != kNoRow && keys.begin <= key && key < keys.end;
      const char* from = first + static_cast<uint64_t>(offset) * 16;
      for (int c = 0; c < Cache::kColumnPasses; ++c) {
        ptx::cp_async_16_or_zero(to + smem_bytes(pass, c), from + c * Cache::kRowThreads * 16,
                                 exists && chunk + c * Cache::kRowThreads < columns);
      }
    }
  }
  // Whether any of this thread's chunks of a block holds an element that is not finite: its product with zero is NaN.
  __device__ __forceinline__ bool has_nonfinite(uint32_t to) const {
    uint32_t sum = 0;
    for (int pass = 0; pass < T::kBlockKeys / T::kPassRows; ++pass) {
      for (int c = 0; c < Cache::kColumnPasses; ++c) {
        const uint4 x = *static_cast<const uint4*>(__cvta_shared_to_generic(to + smem_bytes(pass, c)));
        sum = add_nonfinite_stored<typename T::Stored>(sum, x);
      }
    }
    return sum != 0;
  }
  __device__ __forceinline__ void zero_nonfinite(uint32_t to) const {
    for (int pass = 0; pass < T::kBlockKeys / T::kPassRows; ++pass) {
      for (int c = 0; c < Cache::kColumnPasses; ++c)
        zero_nonfinite_stored<typename T::Stored>(__cvta_shared_to_generic(to + smem_bytes(pass, c)));
    }
  }
};

// ---- one warp -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarp; }
// Which of the blocks in shared memory is that of some keys.
template <class T>
__device__ __forceinline__ int stage_of(int block) {
  return static_cast<int>(static_cast<uint32_t>(block) % T::kStages);
}
template <class T>
__device__ __forceinline__ int row_warp() {
  return warp_of_thread() / T::kColumnWarps;
}
template <class T>
__device__ __forceinline__ int column_warp() {
  return warp_of_thread() % T::kColumnWarps;
}

// What a lane keeps of its rows 8 * half + g of the warp's 16: of a chunk, and of the chunks before it.
template <class T>
struct RowState {
  float o[T::kColumnTiles][4];
  float shift[2];                 // minus the maximum that weights refer to, in log2 units; kNoShift: none yet
  float sum[T::kWarpClasses][2];  // of this lane's weights, by the place of their keys in a block

  __device__ __forceinline__ void reset() {
    for (int half = 0; half < 2; ++half) {
      shift[half] = kNoShift;
      for (int c = 0; c < T::kWarpClasses; ++c) sum[c][half] = 0.0f;
    }
    for_each<1, T::kColumnTiles>([&](int, int n, int i) { o[n][i] = 0.0f; });
  }
};

template <class T>
using BlockScores = float[T::kKeyTiles][4];

// s = q k^T of the warp's rows and keys of a block; q_at, k_at: the lane's place in its first fragments.
template <class T, class Q>
__device__ __forceinline__ void multiply_block(BlockScores<T>& s, const Q& q, uint32_t q_at, uint32_t k_at) {
  for_each<1, T::kKeyTiles>([&](int, int n, int i) { s[n][i] = 0.0f; });
  const Columns<typename T::Cache, false> keys{k_at};
  static_for<T::Cache::kRowBytes / 32>([&]<int step>() {
    constexpr int kSteps = T::kQuantized ? 2 : 1;  // of q, for one of 32 bytes of the keys
    uint32_t a[kSteps][4];
    static_for<kSteps>([&]<int i>() {
      if constexpr (T::kKeepsQ) memcpy(a[i], q.kept[step * kSteps + i], sizeof a[i]);
      else load_queries<T, step * kSteps + i>(a[i], q_at);
    });
    static_for<T::kKeyTiles / 2>([&]<int pair>() {
      uint32_t b[4];
      ptx::ldmatrix_x4<kFragmentOffset<typename T::Cache, pair * 16, step>>(b, keys.template of<step>());
      static_for<2>([&]<int i>() {
        uint32_t stored[kSteps][2];
        if constexpr (T::kQuantized) {
          for (int j = 0; j < kSteps; ++j) unpack_keys<T>(stored[j], b[2 * i + j]);
        } else {
          stored[0][0] = b[2 * i], stored[0][1] = b[2 * i + 1];
        }
        for (int j = 0; j < kSteps; ++j)
          ptx::mma_m16n8k16<typename T::Element>(s[2 * pair + i], a[j], stored[j][0], stored[j][1]);
      });
    });
  });
}

// The first row of the block that the lane reads of the keys, and of the values, of a warp, in a stage whose keys begin at 0.
template <class T>
__device__ __forceinline__ uint32_t lane_of_keys() {
  return column_warp<T>() * T::kWarpKeys * T::Cache::kRowBytes + lane_offset<typename T::Cache>(false);
}
template <class T>
__device__ __forceinline__ uint32_t lane_of_values() {
  using Cache = typename T::Cache;
  const int bytes = column_warp<T>() * T::kWarpColumns * Cache::kElementBytes;  // in steps that keep the swizzle
  const int in_permuted = bytes % Cache::kPermutedBytes;
  return ((lane_offset<Cache>(true) ^ in_permuted) + bytes - in_permuted) + T::kStages * T::kBlockBytes;
}

// ---- softmax --------------------------------------------------------------------------------------------------------

// Whether a score of the lane asks for another reference of its row: then, for the warps that share the rows, the
// largest of each row decides.
template <class T>
__device__ __forceinline__ bool grows(const RowState<T>& w, const BlockScores<T>& s, float scale) {
  bool any = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float x = fmaxf(s[0][2 * half], s[0][2 * half + 1]);
#pragma unroll
    for (int n = 1; n < T::kKeyTiles; ++n) x = fmaxf(fmaxf(x, s[n][2 * half]), s[n][2 * half + 1]);
    any = any || fmaf(x, scale, w.shift[half]) > kGrowthLog2;
  }
  return any;
}
// The rows whose maximum grew refer to it from now on. All threads together where warps share rows.
template <class T>
__device__ __forceinline__ void rescale(RowState<T>& w, const BlockScores<T>& s, float scale, AttendSmem<T>& smem) {
  const int lane = threadIdx.x % kWarp;
  float largest[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float x = fmaxf(s[0][2 * half], s[0][2 * half + 1]);
#pragma unroll
    for (int n = 1; n < T::kKeyTiles; ++n) x = fmaxf(fmaxf(x, s[n][2 * half]), s[n][2 * half + 1]);
    largest[half] = quad_max(x);
  }
  if constexpr (T::kColumnWarps > 1) {
    const int row = row_warp<T>() * 16 + lane / 4;
    for (int half = 0; half < 2; ++half) {
      if (lane % 4 == 0) smem.of_warps[column_warp<T>()][row + 8 * half] = largest[half];
    }
    __syncthreads();  // every warp sees the maxima
    for (int half = 0; half < 2; ++half) {
      largest[half] = smem.of_warps[0][row + 8 * half];
#pragma unroll
      for (int c = 1; c < T::kColumnWarps; ++c) largest[half] = fmaxf(largest[half], smem.of_warps[c][row + 8 * half]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float old = w.shift[half];
    const bool row_grows = fmaf(largest[half], scale, old) > kGrowthLog2;
    if (row_grows) w.shift[half] = -largest[half] * scale;
    const float factor = row_grows ? ptx::ex2(w.shift[half] - old) : 1.0f;
#pragma unroll
    for (int c = 0; c < T::kWarpClasses; ++c) w.sum[c][half] = __fmul_rn(w.sum[c][half], factor);
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n) {
      w.o[n][2 * half] *= factor;
      w.o[n][2 * half + 1] *= factor;
    }
  }
}
// Scores, in units of 1 / scale, become weights exp2(score * scale + shift); the sums grow by them.
template <class T>
__device__ __forceinline__ void exponentiate(RowState<T>& w, BlockScores<T>& s, float scale) {
#pragma unroll
  for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] = ptx::ex2(fmaf(s[n][i], scale, w.shift[i / 2]));
      w.sum[n / T::kClassTiles][i / 2] += s[n][i];
    }
  }
}

// Weights on their way from the warps that have their keys to those that have the columns of values.
template <class T>
using WeightRows = RowTraits<typename T::Weight, T::kBlockKeys>;
// The lane's places in the weights of its first keys, and in the first fragment of all of them.
template <class T>
__device__ __forceinline__ uint32_t lane_of_stored_weights() {
  const int lane = threadIdx.x % kWarp;
  return row_warp<T>() * 16 * WeightRows<T>::kRowBytes +
         swizzled<WeightRows<T>>(lane / 4, column_warp<T>() * T::kKeyTiles) + lane % 4 * 4;
}
template <class T>
__device__ __forceinline__ uint32_t lane_of_loaded_weights() {
  return row_warp<T>() * 16 * WeightRows<T>::kRowBytes + lane_offset<WeightRows<T>>(true);
}
template <class T>
__device__ __forceinline__ void store_weights(const BlockScores<T>& s, uint32_t at) {
  constexpr int kRowBytes = WeightRows<T>::kRowBytes;
  static_for<T::kKeyTiles / 2>([&]<int pair>() {
    Weights<T> p;
    pack_weights<T>(p, s[2 * pair], s[2 * pair + 1]);
    static_for<T::kWeightTerms>([&]<int term>() {
      static_for<4>([&]<int i>() {  // rows g and g + 8 of the left tile, then of the right one
        ptx::st_shared<term * T::kRows * kRowBytes + i % 2 * 8 * kRowBytes>(at ^ ((2 * pair + i / 2) * 16), p[term][i]);
      });
    });
  });
}
template <class T, int step>
__device__ __forceinline__ void load_weights(Weights<T>& p, uint32_t at) {
  static_for<T::kWeightTerms>([&]<int term>() {
    load_fragment<WeightRows<T>, 0, step>(
        p[term], Columns<WeightRows<T>, false>{at + term * T::kRows * WeightRows<T>::kRowBytes});
  });
}

// ---- chunks ---------------------------------------------------------------------------------------------------------

// What a row knows of some chunks besides its o: the maximum in log2 units, -infinity for none, and the sum relative to it.
struct RowTotal {
  float largest, sum;
};
// The merge of a chunk into those before it: o = o * before + o_of_chunk * chunk, in this order of operations. The
// kernel and the merge of what it wrote share it, so that it does not matter which of them merges.
struct MergeFactors {
  float before, chunk;
};
__device__ __forceinline__ MergeFactors merge_total(RowTotal& total, const RowTotal& chunk) {
  const float largest = fmaxf(total.largest, chunk.largest);
  const float reference = largest == -INFINITY ? 0.0f : largest;
  const MergeFactors f{ptx::ex2(total.largest - reference), ptx::ex2(chunk.largest - reference)};
  total = {largest, fmaf(chunk.sum, f.chunk, __fmul_rn(total.sum, f.before))};
  return f;
}
__device__ __forceinline__ float merged(float before, float chunk, const MergeFactors& f) {
  return fmaf(chunk, f.chunk, __fmul_rn(before, f.before));
}

// The factor of what a row accumulated, and its lse, the sink included.
struct RowResult {
  float factor, lse;
};
__device__ __forceinline__ RowResult result_of(RowTotal total, const float* sinks, int64_t head) {
  float scale = 1.0f;
  if (sinks != nullptr) {
    const float sink = to_log2(sinks[head]), joint = fmaxf(total.largest, sink);
    const float reference = joint == -INFINITY ? 0.0f : joint;
    scale = ptx::ex2(total.largest - reference);
    total = {joint, fmaf(total.sum, scale, ptx::ex2(sink - reference))};
  }
  if (total.sum == 0.0f) return {0.0f, -INFINITY};
  return {scale * ptx::rcp(total.sum), (total.largest + ptx::lg2(total.sum)) * kLn2};
}

}  // namespace
}  // namespace fmkernels
