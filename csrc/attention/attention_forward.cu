// SPDX-License-Identifier: Apache-2.0
// attention_forward.cu: o = softmax(q k^T) v for float16 and bfloat16, sm_80 and later.
//
// Contract   see attention.h; rows of q, k, v and o begin on 16-byte boundaries.
// Rows       The query rows of a kv head are the (query, head of its group) pairs, query major: a group shares every
// key
//            and value that is loaded, and what a row sees grows with the row.
// Work       grid (units, kv heads, batch). A unit is a tile of kRows rows, the last tile first, or, for a sequence of
// at
//            most kSplitRows rows, a chunk of kSplitKeys keys; chunks are merged in their order by a second kernel. The
//            rule looks at the sequence alone, so its bits depend on nothing else. A warp owns kWarpRows rows; keys and
//            values stream past in blocks of kKeys, from the last visible one to the first.
// Shared     struct Smem below: q, overlaid by o; one block of keys and one of values.
// Pipeline   wait k[i] | B1 | load v[i] | s = q k[i] | wait v[i] | B2 | load k[i-1] | softmax | o += p v[i].
//            B1: all warps see k[i], and have read the values before it. B2: all see v[i], and have read k[i].
// Masks      Blocks that every row of the tile sees whole, and no modifiers: one loop without a mask. Others: a loop
// that
//            modifies and masks scores, where a warp skips a block that none of its rows sees.
// Numerics   float32 accumulation, base-2 exponent. o is rescaled only when a maximum grows by more than 2^8: weights
// up
//            to 2^8 lose nothing. A hidden value never reaches a row, NaN included. Deterministic.
// Cost       4 * visible pairs * dim flops; bound by the tensor cores beyond seq ~ 500.
// After      Dao 2023, FlashAttention-2, algorithm 1.

#include <algorithm>
#include <cmath>
#include <utility>

#include "../common/dispatch.h"
#include "../common/launch.h"
#include "../common/ptx.h"
#include "attention.h"

namespace fmkernels {
namespace {

constexpr int kWarp = 32;
constexpr int kChunkElements = 8;  // elements of a 16-byte chunk
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.69314718f;
constexpr float kRescaleLog2 = 8.0f;     // growth of a maximum, in log2 units, from which on o is rescaled
constexpr float kNoMax = 3.4028235e38f;  // shift of a row that has seen no finite score: larger than any growth

// f.template operator()<i>() for i in [0, kCount): a loop whose index is a constant of the instructions in it.
template <int kCount, class F>
__device__ __forceinline__ void static_for(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (f.template operator()<i>(), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

struct Tile {
  int rows, keys, warps;
  bool operator==(const Tile&) const = default;
};

// The tile of an architecture whose blocks may have `smem_kib` of shared memory: 163 and more, or 99 (sm_86, 89, 120).
// 32 rows a warp halve the traffic of keys and values from shared memory; beyond 128 columns o leaves room for 16.
constexpr Tile tile_of(int smem_kib, int dim) {
  const bool small = smem_kib < 163;
  switch (dim) {
    case 64: return {128, 64, 4};
    case 96: return {128, 64, 4};
    case 128: return small ? Tile{128, 32, 4} : Tile{128, 48, 4};
    case 192: return small ? Tile{128, 32, 8} : Tile{128, 64, 8};
    default: return small ? Tile{128, 32, 8} : Tile{128, 64, 8};  // 256
  }
}

// Whether a kernel with this tile is launched on what is being compiled for. Code for sm_80 runs on sm_86 and 89 too.
template <int kSmemKiB, int kDim>
__device__ constexpr bool is_launched() {
#ifdef __CUDA_ARCH__
  constexpr bool is_small = __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200;
  return __CUDA_ARCH__ == 800 || tile_of(99, kDim) == tile_of(163, kDim) || is_small == (kSmemKiB == 99);
#else
  return true;
#endif
}

template <class Element_, int kDim_, int kSmemKiB_>
struct Traits {
  using Element = Element_;
  static constexpr int kSmemKiB = kSmemKiB_;
  static constexpr Tile kTile = tile_of(kSmemKiB, kDim_);
  static constexpr int kDim = kDim_, kRows = kTile.rows, kKeys = kTile.keys, kWarps = kTile.warps;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kWarpRows = kRows / kWarps, kRowTiles = kWarpRows / 16;  // m16 tiles of a warp
  static constexpr int kKeyTiles = kKeys / 8, kColumnTiles = kDim / 8;          // n8 tiles of s and of o
  static constexpr int kRowChunks = kDim / kChunkElements;                      // 16-byte chunks of a row
  // Threads along a row when a tile is loaded: a divisor of its chunks, so that a thread keeps to its columns.
  static constexpr int kRowThreads = kRowChunks % 8 == 0 ? 8 : 4;
  static constexpr int kPassRows = kThreads / kRowThreads, kColumnPasses = kRowChunks / kRowThreads;
  static constexpr int kValueBytes = kKeys * kDim * 2;  // from a key to its value in shared memory
  static constexpr int kBlocksPerSm = kThreads == 128 ? 2 : 1;
  static constexpr bool kKeepsQ = kDim == 64;  // fragments of q stay in registers

  static_assert(kWarpRows % 16 == 0 && kKeys % 16 == 0 && kDim % 32 == 0, "whole fragments");
  static_assert(kKeys % kPassRows == 0 && kRows % kPassRows == 0, "whole passes of a load");
  static_assert(kSplitKeys % kKeys == 0, "whole blocks in a chunk");
  static_assert(kPassRows % 8 == 0, "a pass keeps the swizzle of its rows");
};

// Byte offset of a 16-byte chunk of a row. Eight rows at one column, and one row's columns, fall into different banks.
template <int kDim>
__host__ __device__ constexpr int swizzled(int row, int chunk) {
  constexpr bool whole_lines = kDim * 2 % 128 == 0;  // else rows of 192 bytes: two rows shift by half of the banks
  return row * kDim * 2 + ((chunk ^ (whole_lines ? row & 7 : row >> 1 & 3)) << 4);
}

struct Args {
  AttentionForwardParams p;
  AttentionPartials partials;
  float scale_log2;  // of products, where nothing else modifies them
  bool is_general;   // every block goes through the loop that modifies and masks
};

// ---- geometry -------------------------------------------------------------------------------------------------------

struct KeyRange {
  int begin, end;
};

// One sequence of the batch, and the unit of this block.
struct Unit {
  int q_start, k_start, seq_q, seq_k, group, num_rows;
  int row_begin, chunk;  // chunk: -1 where the keys are not split
  bool exists;
};

// x, the same in every lane of the warp, in a register that the compiler knows to be so.
__device__ __forceinline__ int uniform(int x) { return __reduce_max_sync(ptx::kAllLanes, x); }

__device__ __forceinline__ int clamp(int x, int low, int high) { return min(max(x, low), high); }

__device__ __forceinline__ Unit unit_of(const AttentionForwardParams& p, int tile_rows) {
  Unit u{0,  0,   static_cast<int>(p.seq_q), static_cast<int>(p.seq_k), static_cast<int>(p.heads / p.kv_heads), 0, 0,
         -1, true};
  if (p.cu_seqlens_q != nullptr) {  // lengths that only the device knows stay within the tensors, whatever they are
    const int b = blockIdx.z;
    u.q_start = uniform(clamp(p.cu_seqlens_q[b], 0, static_cast<int>(p.total_q)));
    u.k_start = uniform(clamp(p.cu_seqlens_k[b], 0, static_cast<int>(p.total_k)));
    u.seq_q = uniform(min(clamp(p.cu_seqlens_q[b + 1], u.q_start, static_cast<int>(p.total_q)) - u.q_start, u.seq_q));
    u.seq_k = uniform(min(clamp(p.cu_seqlens_k[b + 1], u.k_start, static_cast<int>(p.total_k)) - u.k_start, u.seq_k));
  }
  u.num_rows = u.seq_q * u.group;
  const int unit = blockIdx.x;
  if (is_split(u.num_rows, u.seq_k)) {
    u.chunk = unit;
    u.exists = unit < (u.seq_k + kSplitKeys - 1) / kSplitKeys && u.num_rows > 0;
  } else {
    const int num_tiles = (u.num_rows + tile_rows - 1) / tile_rows;
    u.exists = unit < num_tiles;
    u.row_begin = (num_tiles - 1 - unit) * tile_rows;  // causal: the longest first
  }
  return u;
}

// Keys that a query sees.
__device__ __forceinline__ KeyRange visible_keys(const AttentionForwardParams& p, const Unit& u, int query) {
  const int diagonal = query + u.seq_k - u.seq_q;
  return {p.window_left < 0 ? 0 : max(0, diagonal - static_cast<int>(p.window_left)),
          p.window_right < 0 ? u.seq_k : clamp(diagonal + static_cast<int>(p.window_right) + 1, 0, u.seq_k)};
}

// For rows [begin, end): keys that any of them sees, and keys that all of them see.
struct RowsVisible {
  KeyRange any, all;
};
__device__ __forceinline__ RowsVisible visible_to(const AttentionForwardParams& p, const Unit& u, int begin, int end) {
  end = min(end, u.num_rows);
  if (begin >= end) return {{0, 0}, {0, 0}};
  const KeyRange first = visible_keys(p, u, begin / u.group), last = visible_keys(p, u, (end - 1) / u.group);
  RowsVisible v{{first.begin, last.end}, {last.begin, first.end}};
  if (u.chunk >= 0) {
    v.any = {max(v.any.begin, u.chunk * kSplitKeys), min(v.any.end, (u.chunk + 1) * kSplitKeys)};
    v.all = {max(v.all.begin, u.chunk * kSplitKeys), min(v.all.end, (u.chunk + 1) * kSplitKeys)};
  }
  return v;
}

template <class T>
struct Smem {
  typename T::Element q[T::kRows][T::kDim];      // [row, column], swizzled; then o
  typename T::Element kv[2][T::kKeys][T::kDim];  // [keys or values, key, column], swizzled
  // What only masks and results ask for: kept here, because the products leave no register for it.
  Unit unit;
  RowsVisible visible[T::kWarps];
};

// ---- copies ---------------------------------------------------------------------------------------------------------

// x, out of a shuffle with itself: the compiler keeps the result instead of computing it again in the loop.
__device__ __forceinline__ uint32_t pinned(uint32_t x) { return __shfl_sync(ptx::kAllLanes, x, threadIdx.x % kWarp); }

// The compiler for sm_90 spills a register of head_dim 128 for it, that for sm_80 three without it.
__device__ __forceinline__ uint32_t pinned_before_sm90(uint32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return x;
#else
  return pinned(x);
#endif
}

// Keys or values of one kv head, and where this thread writes the part of a block that it copies.
template <class T, bool kValues>
struct BlockCopy {
  const char* next;  // this thread's row of the first pass over the block to come, at its first column
  int pass_bytes;
  uint32_t smem;  // where that goes
  int columns;    // 16-byte chunks that the tensor has from this thread's first column on

  // The first block to come is `block`; each is the one before the last.
  __device__ __forceinline__ BlockCopy(const TokenView& view, const Unit& u, int64_t dim, uint32_t offset, int block) {
    const int row = threadIdx.x / T::kRowThreads, chunk = threadIdx.x % T::kRowThreads;
    next = static_cast<const char*>(view.data) + chunk * 16 +
           2 * (blockIdx.z * view.batch_stride + blockIdx.y * view.head_stride +
                (u.k_start + static_cast<int64_t>(block) * T::kKeys + row) * view.token_stride);
    pass_bytes = static_cast<int>(view.token_stride) * T::kPassRows * 2;
    smem = offset;
    columns = static_cast<int>(dim / kChunkElements) - chunk;
  }

  // Of this thread's row in the first pass over the keys, at its first column.
  static __device__ __forceinline__ uint32_t thread_offset() {
    return swizzled<T::kDim>(threadIdx.x / T::kRowThreads, threadIdx.x % T::kRowThreads);
  }
  // From `smem` to the same row and column of another pass; kRowThreads chunks leave the swizzled bits alone.
  static constexpr int smem_bytes(int pass, int c) {
    return (kValues ? T::kValueBytes : 0) + pass * T::kPassRows * T::kDim * 2 + c * T::kRowThreads * 16;
  }
  // A block that lies inside the sequence; with !wanted nothing is read.
  __device__ __forceinline__ void issue(bool wanted) {
    const char* from = next;
    const int wanted_columns = wanted ? columns : 0;
    static_for<T::kKeys / T::kPassRows>([&]<int pass>() {
      static_for<T::kColumnPasses>([&]<int c>() {
        ptx::cp_async_16_if<smem_bytes(pass, c), c * T::kRowThreads * 16, c * T::kRowThreads>(wanted_columns, smem,
                                                                                              from);
      });
      from += pass_bytes;
    });
    next += static_cast<int64_t>(pass_bytes) * -(T::kKeys / T::kPassRows);
  }
  // A block of which the sequence has `num_keys` keys: rows past them are zeros.
  __device__ __forceinline__ void issue_ragged(int num_keys) {
    const char* from = next;
    const int row = threadIdx.x / T::kRowThreads;
    for (int pass = 0; pass < T::kKeys / T::kPassRows; ++pass) {
      const bool valid = row + pass * T::kPassRows < num_keys;
      for (int c = 0; c < T::kColumnPasses; ++c) {
        if (c * T::kRowThreads < columns) {
          ptx::cp_async_16_or_zero(smem + smem_bytes(pass, c), valid ? from + c * T::kRowThreads * 16 : from, valid);
        }
      }
      from += pass_bytes;
    }
    next += static_cast<int64_t>(pass_bytes) * -(T::kKeys / T::kPassRows);
  }
  // Zeros in the columns that the tensor lacks: written once, never loaded over.
  __device__ __forceinline__ void zero_columns() const {
    for (int pass = 0; pass < T::kKeys / T::kPassRows; ++pass) {
      for (int c = 0; c < T::kColumnPasses; ++c) {
        if (c * T::kRowThreads >= columns) {
          *static_cast<uint4*>(__cvta_shared_to_generic(smem + smem_bytes(pass, c))) = uint4{};
        }
      }
    }
  }
  // Whether any of this thread's chunks holds an element that is not finite.
  template <class Element>
  __device__ __forceinline__ bool has_nonfinite() const {
    constexpr uint32_t kExponent =
        sizeof(Element) == 2 && kDType<Element> == DType::kFloat16 ? 0x7c007c00u : 0x7f807f80u;
    constexpr uint32_t kCarry = kDType<Element> == DType::kFloat16 ? 0x04000400u : 0x00800080u;
    uint32_t found = 0;
#pragma unroll
    for (int pass = 0; pass < T::kKeys / T::kPassRows; ++pass) {
#pragma unroll
      for (int c = 0; c < T::kColumnPasses; ++c) {
        const uint4 x = *static_cast<const uint4*>(__cvta_shared_to_generic(smem + smem_bytes(pass, c)));
        for (uint32_t word : {x.x, x.y, x.z, x.w}) found |= (word & kExponent) + kCarry;  // a full exponent carries
      }
    }
    return (found & 0x80008000u) != 0;
  }
  // The elements of this thread's chunks that are not finite become zeros.
  template <class Element>
  __device__ __forceinline__ void zero_nonfinite() const {
    constexpr uint32_t kExponent = kDType<Element> == DType::kFloat16 ? 0x7c00u : 0x7f80u;
    for (int pass = 0; pass < T::kKeys / T::kPassRows; ++pass) {
      for (int c = 0; c < T::kColumnPasses; ++c) {
        auto* element = static_cast<uint16_t*>(__cvta_shared_to_generic(smem + smem_bytes(pass, c)));
        for (int i = 0; i < kChunkElements; ++i) {
          if ((element[i] & kExponent) == kExponent) element[i] = 0;
        }
      }
    }
  }
};

// ---- one warp -------------------------------------------------------------------------------------------------------

// What a lane keeps of its rows: row 16 * m + 8 * half + g of the warp, m < kRowTiles, g = lane / 4.
template <class T>
struct WarpState {
  float o[T::kRowTiles][T::kColumnTiles][4];
  float shift[T::kRowTiles][2];  // minus the maximum that weights refer to, in log2 units; kNoMax: none yet
  float sum[T::kRowTiles][2];    // of this lane's weights
};

template <class T>
using Scores = float[T::kRowTiles][T::kKeyTiles][4];

// The lane's row and 16-byte chunk of a 16 x 16 fragment: ldmatrix.x4 gives its four 8 x 8 matrices column by column,
// as fragments of q and of transposed values are numbered, or row by row, as those of keys are.
template <class T>
__device__ __forceinline__ uint32_t lane_offset(bool by_column) {
  const int lane = threadIdx.x % kWarp;
  return by_column ? swizzled<T::kDim>(lane % 16, lane / 16)
                   : swizzled<T::kDim>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

// ldmatrix.x4 of the fragment at row `row` and column step `step` (16 columns) from that at `first`. Rows are whole
// multiples of what the swizzle permutes, so a step flips bits.
template <class T, int row, int step, bool kTransposed = false>
__device__ __forceinline__ void load_fragment(uint32_t (&r)[4], uint32_t first) {
  constexpr int kSteps = T::kDim * 2 % 128 == 0 ? 4 : 2;
  constexpr int kOffset = row * T::kDim * 2 + step / kSteps * kSteps * 32;
  const uint32_t column = first ^ (step % kSteps * 32);
  if constexpr (kTransposed) ptx::ldmatrix_x4_trans<kOffset>(r, column);
  else ptx::ldmatrix_x4<kOffset>(r, column);
}

template <class T, int step>
__device__ __forceinline__ void load_q(uint32_t (&q)[T::kRowTiles][4], uint32_t at) {
  static_for<T::kRowTiles>([&]<int m>() { load_fragment<T, m * 16, step>(q[m], at); });
}

template <class T>
struct QFragments {
  uint32_t kept[T::kKeepsQ ? T::kDim / 16 : 1][T::kRowTiles][4];
};

// s = q k^T for one block.
template <class T>
__device__ __forceinline__ void multiply_keys(Scores<T>& s, const QFragments<T>& q, uint32_t q_at, uint32_t k_at) {
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < T::kKeyTiles; ++n) {
      for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
    }
  }
  static_for<T::kDim / 16>([&]<int step>() {
    uint32_t loaded[T::kRowTiles][4];
    if constexpr (!T::kKeepsQ) load_q<T, step>(loaded, q_at);
    const auto& a = [&]() -> const uint32_t (&)[T::kRowTiles][4] {
      if constexpr (T::kKeepsQ) return q.kept[step];
      else return loaded;
    }();
    static_for<T::kKeyTiles / 2>([&]<int pair>() {
      constexpr int n = pair * 2;
      uint32_t b[4];
      load_fragment<T, n * 8, step>(b, k_at);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
        ptx::mma_m16n8k16<typename T::Element>(s[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<typename T::Element>(s[m][n + 1], a[m], b[2], b[3]);
      }
    });
  });
}

// o += p v for one block, with the weights p in place of the scores.
template <class T>
__device__ __forceinline__ void multiply_values(WarpState<T>& w, const Scores<T>& s, uint32_t v_at) {
  using Element = typename T::Element;
  static_for<T::kKeys / 16>([&]<int step>() {
    uint32_t a[T::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
      const auto &left = s[m][2 * step], &right = s[m][2 * step + 1];
      a[m][0] = ptx::pack<Element>(left[0], left[1]);
      a[m][1] = ptx::pack<Element>(left[2], left[3]);
      a[m][2] = ptx::pack<Element>(right[0], right[1]);
      a[m][3] = ptx::pack<Element>(right[2], right[3]);
    }
    static_for<T::kColumnTiles / 2>([&]<int pair>() {
      constexpr int n = pair * 2;
      uint32_t b[4];
      load_fragment<T, step * 16, pair, true>(b, v_at);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
        ptx::mma_m16n8k16<Element>(w.o[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<Element>(w.o[m][n + 1], a[m], b[2], b[3]);
      }
    });
  });
}

// The largest of the four lanes that share a row; all four hold it.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ptx::kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(ptx::kAllLanes, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(ptx::kAllLanes, x, 1);
  return x + __shfl_xor_sync(ptx::kAllLanes, x, 2);
}

// Scores, in units of 1 / scale, become weights exp2(score * scale + shift); the sums grow by them.
template <class T>
__device__ __forceinline__ void softmax(WarpState<T>& w, Scores<T>& s, float scale) {
  float largest[T::kRowTiles][2];
  bool grows = false;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x = fmaxf(s[m][0][2 * half], s[m][0][2 * half + 1]);
#pragma unroll
      for (int n = 1; n < T::kKeyTiles; ++n) x = fmaxf(fmaxf(x, s[m][n][2 * half]), s[m][n][2 * half + 1]);
      largest[m][half] = quad_max(x);
      grows = grows || fmaf(largest[m][half], scale, w.shift[m][half]) > kRescaleLog2;
    }
  }
  if (__builtin_expect(__any_sync(ptx::kAllLanes, grows), 0)) {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float old_shift = w.shift[m][half];
        const bool row_grows = fmaf(largest[m][half], scale, old_shift) > kRescaleLog2;
        if (row_grows) w.shift[m][half] = -largest[m][half] * scale;
        const float factor = row_grows ? ptx::ex2(w.shift[m][half] - old_shift) : 1.0f;
        w.sum[m][half] *= factor;
#pragma unroll
        for (int n = 0; n < T::kColumnTiles; ++n) {
          w.o[m][n][2 * half] *= factor;
          w.o[m][n][2 * half + 1] *= factor;
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[m][n][i] = ptx::ex2(fmaf(s[m][n][i], scale, w.shift[m][i / 2]));
        w.sum[m][i / 2] += s[m][n][i];
      }
    }
  }
}

// What the loops address: copies of the blocks to come, and the lane's row of the first fragment of q, k and v.
template <class T>
struct Addresses {
  BlockCopy<T, false> copy_keys;
  BlockCopy<T, true> copy_values;
  uint32_t q, k, v;

  static __device__ __forceinline__ uint32_t of_q(const Smem<T>& smem) {
    return ptx::smem_address(smem.q[threadIdx.x / kWarp * T::kWarpRows]) + lane_offset<T>(true);
  }
  __device__ __forceinline__ Addresses(const AttentionForwardParams& p, const Unit& u, const Smem<T>& smem, int block)
      : Addresses(p, u, smem, block, pinned(ptx::smem_address(smem.kv) + BlockCopy<T, false>::thread_offset())) {}

 private:
  __device__ __forceinline__ Addresses(const AttentionForwardParams& p, const Unit& u, const Smem<T>& smem, int block,
                                       uint32_t offset)
      : copy_keys(p.k, u, p.head_dim, offset, block - 1),
        copy_values(p.v, u, p.v_head_dim, offset, block),
        q(pinned(of_q(smem))),
        k(pinned(ptx::smem_address(smem.kv[0]) + lane_offset<T>(false))),
        v(pinned_before_sm90(ptx::smem_address(smem.kv[1]) + lane_offset<T>(true))) {}
};

// ---- modifiers and masks --------------------------------------------------------------------------------------------

// tanh to a few units in the last place everywhere: 1 - 2 / (1 + e^2x) or, near zero, where that cancels, an odd
// polynomial.
__device__ __forceinline__ float tanh(float x) {
  const float far = 1.0f - 2.0f * ptx::rcp(1.0f + ptx::ex2(x * (2.0f * kLog2E))), u = x * x;
  float near = u * -5.602740497e-3f + 2.053993824e-2f;
  near = near * u - 5.370532051e-2f;
  near = near * u + 1.333093216e-1f;
  near = near * u - 3.333325220e-1f;
  near = near * u + 1.0f;
  return fabsf(x) < 0.625f ? near * x : far;
}

// x in log2 units; what is finite stays finite.
__device__ __forceinline__ float to_log2(float x) {
  const float scaled = x * kLog2E;
  return isfinite(x) ? fminf(fmaxf(scaled, -0x1.fp127f), 0x1.fp127f) : scaled;
}

// Row of the unit that a lane's accumulators i = 2 * half and 2 * half + 1 of m belong to.
template <class T>
__device__ __forceinline__ int row_of(const Unit& u, int m, int half) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  return u.row_begin + warp * T::kWarpRows + m * 16 + half * 8 + lane / 4;
}

// s[m][n][2 * half + e] = f(that, row of the unit, key of the sequence).
template <class T, class F>
__device__ __forceinline__ void for_each_score(Scores<T>& s, const Unit& u, int first_key, F&& f) {
  const int column = first_key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto of_row = f(min(row_of<T>(u, m, half), u.num_rows - 1));
#pragma unroll
      for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) s[m][n][2 * half + e] = of_row(s[m][n][2 * half + e], column + n * 8 + e);
      }
    }
  }
}

template <class T, class Bias>
__device__ __forceinline__ void add_bias(Scores<T>& s, const AttentionForwardParams& p, const Unit& u, int first_key) {
  for_each_score<T>(s, u, first_key, [&](int row) {
    const int64_t head = static_cast<int64_t>(blockIdx.y) * u.group + row % u.group;
    const Bias* bias = static_cast<const Bias*>(p.bias) + blockIdx.z * p.bias_stride[0] + head * p.bias_stride[1] +
                       row / u.group * p.bias_stride[2];
    return
        [&, bias](float x, int key) { return key < u.seq_k ? x + to_log2(to_float(bias[key * p.bias_stride[3]])) : x; };
  });
}

// Products become scores in log2 units.
template <class T>
__device__ __forceinline__ void modify(Scores<T>& s, const AttentionForwardParams& p, const Unit& u, int first_key) {
  if (p.softcap != 0.0f) {
    const float to_argument = p.softmax_scale / p.softcap, cap = p.softcap * kLog2E;
    for_each_score<T>(s, u, first_key, [&](int) { return [&](float x, int) { return tanh(x * to_argument) * cap; }; });
  } else {
    const float scale = p.softmax_scale * kLog2E;
    for_each_score<T>(s, u, first_key, [&](int) { return [&](float x, int) { return x * scale; }; });
  }
  if (p.bias != nullptr) {
    if (p.bias_dtype == DType::kFloat32) add_bias<T, float>(s, p, u, first_key);
    else add_bias<T, typename T::Element>(s, p, u, first_key);
  }
  if (p.alibi_slopes != nullptr) {
    for_each_score<T>(s, u, first_key, [&](int row) {
      const int64_t head = static_cast<int64_t>(blockIdx.y) * u.group + row % u.group;
      const float slope = to_log2(p.alibi_slopes[blockIdx.z * p.alibi_batch_stride + head]);
      const int diagonal = row / u.group + u.seq_k - u.seq_q;
      return [=](float x, int key) { return x - slope * static_cast<float>(abs(diagonal - key)); };
    });
  }
}

// Hides the keys from `first_key` on that a row does not see. `low`, `high`: which end of a range may lie in the block.
template <class T>
__device__ __forceinline__ void mask(Scores<T>& s, const AttentionForwardParams& p, const Unit& u, int first_key,
                                     bool low, bool high) {
  const int column = first_key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of<T>(u, m, half);
      KeyRange keys = visible_keys(p, u, u.group == 1 ? row : row / u.group);
      if (u.chunk >= 0) keys = {max(keys.begin, u.chunk * kSplitKeys), min(keys.end, (u.chunk + 1) * kSplitKeys)};
      const int begin = keys.begin - column, end = keys.end - column;
      if (high) {
#pragma unroll
        for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (n * 8 + e >= end) s[m][n][2 * half + e] = -INFINITY;
          }
        }
      }
      if (low) {
#pragma unroll
        for (int n = 0; n < T::kKeyTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (n * 8 + e < begin) s[m][n][2 * half + e] = -INFINITY;
          }
        }
      }
    }
  }
}

// o += v for the values of a block that are not finite, in the rows that see them. A product with the weight 0 of a
// hidden key would be NaN, so these values go this way and are zeros in the product.
template <class T>
__device__ __forceinline__ void add_nonfinite(WarpState<T>& w, const typename T::Element* values,
                                              const AttentionForwardParams& p, const Unit& u, int first_key) {
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const KeyRange keys = visible_keys(p, u, row_of<T>(u, m, half) / u.group);
      const int end = min(keys.end - first_key, T::kKeys);
#pragma unroll 1
      for (int key = max(keys.begin - first_key, 0); key < end; ++key) {
#pragma unroll
        for (int n = 0; n < T::kColumnTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float v = to_float(values[swizzled<T::kDim>(key, n) / 2 + threadIdx.x % 4 * 2 + e]);
            if (!isfinite(v)) w.o[m][n][2 * half + e] += v;
          }
        }
      }
    }
  }
}

// ---- results --------------------------------------------------------------------------------------------------------

// What a row's weights add up to, the sink included: the factor of what it accumulated, and its lse.
struct Total {
  float factor, lse;
};
// `largest`: what the weights refer to, in log2 units; -infinity with a sum of 0 where no key was seen.
__device__ __forceinline__ Total total_of(float largest, float sum, const float* sinks, int64_t head) {
  float scale = 1.0f;
  if (sinks != nullptr) {
    const float sink = to_log2(sinks[head]), joint = fmaxf(largest, sink);
    const float reference = joint == -INFINITY ? 0.0f : joint;
    scale = ptx::ex2(largest - reference);
    sum = sum * scale + ptx::ex2(sink - reference);
    largest = joint;
  }
  if (sum == 0.0f) return {0.0f, -INFINITY};
  return {scale * ptx::rcp(sum), (largest + ptx::lg2(sum)) * kLn2};
}

// A query row of o or q.
__device__ __forceinline__ int64_t row_offset(const TokenView& view, const Unit& u, int row) {
  return blockIdx.z * view.batch_stride + static_cast<int64_t>(u.q_start + row / u.group) * view.token_stride +
         (static_cast<int64_t>(blockIdx.y) * u.group + row % u.group) * view.head_stride;
}

template <class T>
__device__ __forceinline__ void store_results(WarpState<T>& w, Smem<T>& smem, const Args& a, const Unit& u) {
  using Element = typename T::Element;
  const AttentionForwardParams& p = a.p;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t first_o =
      ptx::smem_address(smem.q[warp * T::kWarpRows]) + swizzled<T::kDim>(lane / 4, 0) + lane % 4 * 4;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of<T>(u, m, half);
      const float sum = quad_sum(w.sum[m][half]), largest = sum == 0.0f ? -INFINITY : -w.shift[m][half];
      const int64_t head = static_cast<int64_t>(blockIdx.y) * u.group + row % u.group;
      const int64_t partial = u.chunk < 0 ? 0 : a.partials.index(blockIdx.z, row, blockIdx.y, p.kv_heads, u.chunk);
      const bool exists = row < u.num_rows;
      Total total{0.0f, -INFINITY};
      if (exists) total = total_of(largest, sum, u.chunk < 0 ? p.sinks : nullptr, head);
      if (exists && lane % 4 == 0) {
        float* lse = u.chunk >= 0 ? a.partials.lse + partial
                                  : p.lse + blockIdx.z * p.lse_batch_stride + head * p.lse_head_stride + u.q_start +
                                        row / u.group;
        *lse = total.lse;
      }
#pragma unroll
      for (int n = 0; n < T::kColumnTiles; ++n) {
        const float x = w.o[m][n][2 * half] * total.factor, y = w.o[m][n][2 * half + 1] * total.factor;
        if (u.chunk < 0) {
          constexpr int kPermuted = T::kDim * 2 % 128 == 0 ? 8 : 4;  // chunks that a swizzle permutes
          const uint32_t at =
              (first_o ^ (n % kPermuted * 16)) + (m * 16 + half * 8) * T::kDim * 2 + n / kPermuted * kPermuted * 16;
          *static_cast<uint32_t*>(__cvta_shared_to_generic(at)) = ptx::pack<Element>(x, y);
        } else if (exists && n * 8 < p.v_head_dim) {
          *reinterpret_cast<float2*>(a.partials.o + partial * p.v_head_dim + n * 8 + lane % 4 * 2) = make_float2(x, y);
        }
      }
    }
  }
  if (u.chunk >= 0) return;
  __syncwarp();  // a warp's rows of o are written and read by the warp alone
  const int chunks = static_cast<int>(p.v_head_dim) / kChunkElements;
  for (int i = lane; i < T::kWarpRows * T::kRowChunks; i += kWarp) {
    const int r = warp * T::kWarpRows + i / T::kRowChunks, chunk = i % T::kRowChunks, row = u.row_begin + r;
    if (row >= u.num_rows || chunk >= chunks) continue;
    const uint4 bits = *reinterpret_cast<const uint4*>(&smem.q[0][0] + swizzled<T::kDim>(r, chunk) / 2);
    Element* o = static_cast<Element*>(p.o.data) + row_offset(p.o, u, row);
    *reinterpret_cast<uint4*>(o + chunk * kChunkElements) = bits;
  }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void run_tile(const Args& a) {
  using Element = typename T::Element;
  const AttentionForwardParams& p = a.p;
  auto& smem = dynamic_smem<Smem<T>>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Unit u = unit_of(p, T::kRows);
  if (!u.exists) return;

  const int warp_row = u.row_begin + warp * T::kWarpRows;
  const RowsVisible tile = visible_to(p, u, u.row_begin, u.row_begin + T::kRows);
  const int first_block = tile.any.begin / T::kKeys;
  const int end_block = tile.any.begin < tile.any.end ? (tile.any.end + T::kKeys - 1) / T::kKeys : first_block;

  // Queries, and the first keys and values; rows and columns that do not exist are zeros.
  const uint32_t sQ = ptx::smem_address(smem.q);
  {
    const int q_chunks = static_cast<int>(p.head_dim) / kChunkElements;
    const int chunk = threadIdx.x % T::kRowThreads;
    const int first = threadIdx.x / T::kRowThreads;
    const uint32_t to = sQ + swizzled<T::kDim>(first, chunk);
    for (int pass = 0; pass < T::kRows / T::kPassRows; ++pass) {
      const int row = u.row_begin + first + pass * T::kPassRows;
      const Element* q = static_cast<const Element*>(p.q.data) + (row < u.num_rows ? row_offset(p.q, u, row) : 0);
#pragma unroll
      for (int c = 0; c < T::kColumnPasses; ++c) {
        const int column = chunk + c * T::kRowThreads;
        const bool valid = row < u.num_rows && column < q_chunks;
        ptx::cp_async_16_or_zero(to + pass * T::kPassRows * T::kDim * 2 + c * T::kRowThreads * 16,
                                 valid ? q + column * kChunkElements : q, valid);
      }
    }
  }
  if (lane == 0) smem.visible[warp] = visible_to(p, u, warp_row, warp_row + T::kWarpRows);
  if (threadIdx.x == 0) smem.unit = u;
  int block = end_block - 1;
  {
    const uint32_t offset = ptx::smem_address(smem.kv) + BlockCopy<T, false>::thread_offset();
    BlockCopy<T, false> keys(p.k, u, p.head_dim, offset, block);
    BlockCopy<T, true> values(p.v, u, p.v_head_dim, offset, block);
    keys.zero_columns();
    values.zero_columns();
    if (first_block < end_block) keys.issue_ragged(u.seq_k - block * T::kKeys);
  }
  ptx::cp_async_commit();

  WarpState<T> w;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
    for (int half = 0; half < 2; ++half) w.shift[m][half] = kNoMax, w.sum[m][half] = 0.0f;
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n) {
      for (int i = 0; i < 4; ++i) w.o[m][n][i] = 0.0f;
    }
  }
  // Made anew for every run of plain blocks and every other block: nothing of it lives through the other loop.
  auto addresses = [&] { return Addresses<T>(p, smem.unit, smem, block); };
  ptx::cp_async_wait<0>();
  __syncthreads();  // every warp sees q, the unit and what is visible
  QFragments<T> q;
  if constexpr (T::kKeepsQ) {
    static_for<T::kDim / 16>([&]<int step>() { load_q<T, step>(q.kept[step], Addresses<T>::of_q(smem)); });
  }

  // One block. With kGeneral it modifies, masks and may skip.
  auto step = [&]<bool kGeneral>(Addresses<T>& at) {
    Scores<T> s;
    const int first_key = block * T::kKeys;

    ptx::cp_async_wait<0>();
    __syncthreads();  // B1: every warp sees k[block], and has read the values of the block before
    const RowsVisible mine = kGeneral ? smem.visible[warp] : RowsVisible{};
    const bool works = !kGeneral || (first_key < mine.any.end && first_key + T::kKeys > mine.any.begin);
    if (kGeneral && block == end_block - 1) at.copy_values.issue_ragged(smem.unit.seq_k - first_key);
    else at.copy_values.issue(true);
    ptx::cp_async_commit();
    float scale = a.scale_log2;
    if (works) {
      multiply_keys<T>(s, q, at.q, at.k);
      if constexpr (kGeneral) {
        const Unit& u = smem.unit;
        if (a.is_general) modify<T>(s, p, u, first_key), scale = 1.0f;
        const bool low = first_key < (mine.all.begin), high = mine.all.end < first_key + T::kKeys;
        if (low || high) mask<T>(s, p, u, first_key, low, high);
      }
    }

    ptx::cp_async_wait<0>();
    bool nonfinite = false;
    if constexpr (kGeneral) nonfinite = __syncthreads_or(at.copy_values.template has_nonfinite<Element>());
    else __syncthreads();
    // B2: every warp sees v[block], and has read k[block]
    at.copy_keys.issue(block > first_block);
    ptx::cp_async_commit();
    if (works) softmax<T>(w, s, scale);
    if (kGeneral && nonfinite) {
      if (works) add_nonfinite<T>(w, &smem.kv[1][0][0], p, smem.unit, first_key);
      __syncthreads();  // every warp has read what is not finite
      at.copy_values.template zero_nonfinite<Element>();
      __syncthreads();  // every warp sees zeros in its place
    }
    if (works) multiply_values<T>(w, s, at.v);
    --block;
  };

  // Blocks [plain_begin, plain_end) are seen whole by every row.
  const int plain_begin = a.is_general ? first_block : max(first_block, (tile.all.begin + T::kKeys - 1) / T::kKeys);
  const int plain_end = a.is_general ? first_block : clamp(tile.all.end / T::kKeys, plain_begin, end_block);
  while (block >= first_block) {
    Addresses<T> at = addresses();
    if (block >= plain_begin && block < plain_end) {
      do step.template operator()<false>(at);
      while (block >= plain_begin);
    } else {
      step.template operator()<true>(at);
    }
  }
  store_results<T>(w, smem, a, smem.unit);
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm)
    attention_forward_kernel(const __grid_constant__ Args a) {
  if constexpr (is_launched<T::kSmemKiB, T::kDim>()) run_tile<T>(a);
  else __trap();
}

// Merges the chunks of the sequences that were split, a warp for each (row, kv head, sequence).
template <class Element>
__global__ void __launch_bounds__(128) attention_merge_chunks_kernel(const __grid_constant__ Args a) {
  const AttentionForwardParams& p = a.p;
  const Unit u = unit_of(p, 1 << 20);
  const int lane = threadIdx.x % kWarp, row = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (!is_split(u.num_rows, u.seq_k) || row >= u.num_rows) return;
  const int num_chunks = (u.seq_k + kSplitKeys - 1) / kSplitKeys;
  const int64_t first = a.partials.index(blockIdx.z, row, blockIdx.y, p.kv_heads, 0);
  float largest = -INFINITY;
  for (int chunk = 0; chunk < num_chunks; ++chunk) largest = fmaxf(largest, a.partials.lse[first + chunk]);
  const float reference = largest == -INFINITY ? 0.0f : largest;
  float sum = 0.0f;
  for (int chunk = 0; chunk < num_chunks; ++chunk)
    sum += ptx::ex2((a.partials.lse[first + chunk] - reference) * kLog2E);
  const int64_t head = static_cast<int64_t>(blockIdx.y) * u.group + row % u.group;
  const Total total = total_of(largest * kLog2E, sum, p.sinks, head);
  Element* o = static_cast<Element*>(p.o.data) + row_offset(p.o, u, row);
  for (int column = lane; column < p.v_head_dim; column += kWarp) {
    float x = 0.0f;
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      const float lse = a.partials.lse[first + chunk];
      if (lse == -INFINITY) continue;  // a chunk without a visible key
      x += ptx::ex2((lse - reference) * kLog2E) * a.partials.o[(first + chunk) * p.v_head_dim + column];
    }
    o[column] = from_float<Element>(x * total.factor);
  }
  if (lane == 0)
    p.lse[blockIdx.z * p.lse_batch_stride + head * p.lse_head_stride + u.q_start + row / u.group] = total.lse;
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class T>
void launch_with(const Args& a, int64_t units, cudaStream_t stream) {
  launch("attention_forward", attention_forward_kernel<T>, dim3(units, a.p.kv_heads, a.p.batch), T::kThreads,
         sizeof(Smem<T>), stream, a);
}

// Whether every row of the tensor begins on a 16-byte boundary.
bool is_aligned(const TokenView& view) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.batch_stride % kChunkElements == 0 &&
         view.token_stride % kChunkElements == 0 && view.head_stride % kChunkElements == 0;
}

}  // namespace

AttentionPartials attention_partials(const AttentionForwardParams& p) {
  const int64_t max_rows = p.seq_q * (p.heads / p.kv_heads);
  // Packed sequences may be shorter than the longest, in any way.
  const bool may_split = p.cu_seqlens_q != nullptr ? p.seq_k > kSplitKeys : is_split(max_rows, p.seq_k);
  return {nullptr, nullptr, std::min<int64_t>(max_rows, kSplitRows),
          may_split ? (p.seq_k + kSplitKeys - 1) / kSplitKeys : 0};
}

void launch_attention_forward(const AttentionForwardCall& call, cudaStream_t stream) {
  const AttentionPartials& partials = call.partials;
  Args a{call.p, partials, static_cast<float>(call.p.softmax_scale * kLog2E), false};
  AttentionForwardParams& p = a.p;
  constexpr int64_t kMaxLength = 1 << 30, kMaxGrid = 65535, kMaxStride = 1 << 23;
  FM_CHECK(p.dtype != DType::kFloat32, "attention_forward: CUDA tensors must be float16 or bfloat16");
  FM_CHECK(p.batch <= kMaxGrid && p.kv_heads <= kMaxGrid, "attention_forward: batch and kv_heads must be at most ",
           kMaxGrid, " on CUDA, got ", p.batch, " and ", p.kv_heads);
  FM_CHECK(p.seq_q * (p.heads / p.kv_heads) <= kMaxLength && p.seq_k <= kMaxLength && p.total_q <= kMaxLength &&
               p.total_k <= kMaxLength,
           "attention_forward: sequences must be at most ", kMaxLength, " rows long on CUDA");
  for (const TokenView* view : {&p.q, &p.k, &p.v, &p.o}) {
    FM_CHECK(is_aligned(*view), "attention_forward: rows of q, k, v and o must begin on 16-byte boundaries");
    FM_CHECK(view->token_stride < kMaxStride, "attention_forward: a token stride must be below ", kMaxStride,
             " elements on CUDA, got ", view->token_stride);
  }
  p.window_left = std::min<int64_t>(p.window_left, kMaxLength);
  p.window_right = std::min<int64_t>(p.window_right, kMaxLength);
  a.is_general = p.softcap != 0.0f || p.bias != nullptr || p.alibi_slopes != nullptr || !(p.softmax_scale > 0.0f);

  int device = 0, smem_bytes = 0;
  check_cuda("attention_forward", cudaGetDevice(&device));
  check_cuda("attention_forward", cudaDeviceGetAttribute(&smem_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  FM_CHECK(smem_bytes >= 99 * 1024, "attention_forward: this GPU gives a block ", smem_bytes,
           " bytes of shared memory; 99 KiB are needed (sm_80 and later)");
  const int64_t max_rows = p.seq_q * (p.heads / p.kv_heads), dim = std::max(p.head_dim, p.v_head_dim);
  dispatch_half(p.dtype, [&]<class Element>() {
    const int bucket = dim <= 64 ? 64 : dim <= 96 ? 96 : dim <= 128 ? 128 : dim <= 192 ? 192 : 256;
    auto with = [&]<class T>() {
      const int64_t tiles = (max_rows + T::kRows - 1) / T::kRows;
      launch_with<T>(a, std::max(tiles, partials.num_chunks), stream);
    };
    dispatch_int<64, 96, 128, 192, 256>("dim", bucket, [&]<int kDim>() {
      if constexpr (tile_of(99, kDim) == tile_of(163, kDim)) with.template operator()<Traits<Element, kDim, 163>>();
      else if (smem_bytes >= 163 * 1024) with.template operator()<Traits<Element, kDim, 163>>();
      else with.template operator()<Traits<Element, kDim, 99>>();
    });
    if (partials.num_chunks == 0) return;
    const int64_t rows = std::min<int64_t>(max_rows, kSplitRows);
    launch("attention_merge_chunks", attention_merge_chunks_kernel<Element>, dim3((rows + 3) / 4, p.kv_heads, p.batch),
           128, 0, stream, a);
  });
}

}  // namespace fmkernels
