// SPDX-License-Identifier: Apache-2.0
// A tile of a product on the tensor cores: c [rows, columns] += a [rows, inner] b [inner, columns], in stages of kStep of the
// inner dimension.
//
// Operands   A stage of an operand lies in shared memory as in global memory: lines of 16-byte chunks, that run along the
//            inner dimension, or across it (kAcross), swizzled. Fragments come by ldmatrix, transposed where lines of a, or
//            of b, run so that they must be. What lies past the edges is zero and is not read.
// Pipeline   kStages - 1 stages are under way while one is multiplied, and the fragments of 16 inner indices while those of
//            the 16 before them are. One barrier a stage: the next one has landed for all, and all have read this one.
// int8       Values of a in bytes are copied to the first half of the chunk that they become. Who copied a chunk makes it of
//            Elements in its place, a stage before it is multiplied: between its arrival and the barrier that shows it to all.
#pragma once

#include <utility>

#include "dense_view.h"
#include "dispatch.h"
#include "divisor.h"
#include "launch.h"
#include "ptx.h"
#include "vector_cuda.h"

namespace fmkernels {
namespace {

constexpr int kStep = 32;  // inner indices of a stage
constexpr int kChunk = 8;  // elements of 16 bytes

// A tile of kRows x kColumns, of warps of kWarpRows x kWarpColumns, and how many such groups of warps a block has.
template <class Element_, int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_, int kGroups_ = 1,
          int kStages_ = 4>
struct TileTraits {
  using Element = Element_;
  static constexpr int kRows = kRows_, kColumns = kColumns_, kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kGroups = kGroups_, kStages = kStages_;
  static constexpr int kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kGroupThreads = kRows / kWarpRows * kWarpsAcross * kWarp, kThreads = kGroups * kGroupThreads;
  static constexpr int kRowTiles = kWarpRows / 16, kColumnTiles = kWarpColumns / 8;  // m16 and n8 tiles of a warp
  static constexpr int kBlocksPerSm = 256 / kThreads;  // whose threads may have 255 registers each
  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 16 == 0, "whole fragments");
};

template <class T>
struct Stage {
  typename T::Element a[T::kGroups][T::kRows * kStep];     // [group, line, chunk], swizzled
  typename T::Element b[T::kGroups][kStep * T::kColumns];  // likewise
};
template <class T>
union Smem {
  Stage<T> stages[T::kStages];
  float sums[T::kGroups][T::kRows * T::kColumns];  // [group, line of the result, 4 floats], swizzled
  static_assert(sizeof(Stage<T>::a[0]) % 128 == 0 && sizeof(Stage<T>::b[0]) % 128 == 0, "a swizzle permutes addresses");
};

// ---- operands -------------------------------------------------------------------------------------------------------

// A stage of an operand with kExtent rows of a, or columns of b.
template <int kExtent, bool kAcross_, int kThreads>
struct Lines {
  static constexpr bool kAcross = kAcross_;  // lines run along rows of a or columns of b, one for each inner index
  static constexpr int kCount = kAcross ? kStep : kExtent;
  static constexpr int kChunks = (kAcross ? kExtent : kStep) / kChunk;  // of a line
  static constexpr int kLineBytes = kChunks * 16;
  static constexpr int kPassLines = kThreads / kChunks;  // that all threads copy at a time
  static constexpr int kPasses = kCount < kPassLines ? 1 : kCount / kPassLines;
  static_assert(kThreads % kChunks == 0 && (kCount % kPassLines == 0 || kCount < kPassLines), "whole passes");

  // Byte offset of a chunk. Eight lines at one chunk, and a line's chunks, fall into different banks.
  static __device__ constexpr int swizzled(int line, int chunk) {
    constexpr int kShift = kChunks >= 8 ? 0 : kChunks == 4 ? 1 : 2;  // lines that share 128 bytes do not differ
    constexpr int kMask = kChunks >= 8 ? 7 : kChunks - 1;
    return line * kLineBytes + ((chunk ^ (line >> kShift & kMask)) << 4);
  }
};

// Factors of the bytes from one pass of a thread's copies to the next. The kernel reads them from its arguments, where one
// instruction multiplies and adds; of factors that it knows the compiler makes two.
struct Passes {
  int number[8] = {0, 1, 2, 3, 4, 5, 6, 7};
};

inline int64_t line_stride_of(const DenseView& view) {
  return view.is_row_major() ? view.row_stride : view.column_stride;
}
// Whether all lines begin on 16-byte boundaries.
inline bool is_aligned(const DenseView& view) {
  return is_aligned_16(view.data, 2, 0, {view.batch_stride, line_stride_of(view)});
}
// Whether they are, moreover, whole chunks, and the bytes from one pass to the next are a 32-bit number.
inline bool is_fast(const DenseView& view) {
  const int64_t stride = line_stride_of(view), length = view.is_row_major() ? view.columns : view.rows;
  return is_aligned(view) && length % kChunk == 0 && stride < 1 << 24 && stride > -(1 << 24);
}

// What a stage holds of an operand: of the one that begins `shift` bytes further, inner indices `inner` .. inner + left - 1.
struct Piece {
  int64_t shift;
  int inner, left;  // 0 or less: zeros; of more than kStep the first
};

// values * scale of 8 bytes, in float32, rounded.
template <class Element>
__device__ __forceinline__ uint4 convert_bytes(uint2 bytes, float scale) {
  auto value = [&](uint32_t biased,
                   uint32_t selector) {  // a biased byte is the lowest of the mantissa of 2^23 + 128 + value
    return (__uint_as_float(__byte_perm(biased, 0x4b000000u, selector)) - 8388736.0f) * scale;
  };
  auto two = [&](uint32_t biased, uint32_t low, uint32_t high) {
    return ptx::pack<Element>(value(biased, low), value(biased, high));
  };
  const uint32_t first = bytes.x ^ 0x80808080u, second = bytes.y ^ 0x80808080u;
  return {two(first, 0x7440, 0x7441), two(first, 0x7442, 0x7443), two(second, 0x7440, 0x7441),
          two(second, 0x7442, 0x7443)};
}

// Stores the first `count` elements from `from` on, and zeros behind them, as a chunk of shared memory; at once.
template <class Element>
__device__ __forceinline__ void copy_elements(uint32_t to, const Element* from, int count) {
  Vector<Element, kChunk> chunk{};
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i < count) chunk.lane[i] = from[i];
  }
  uint4 words;
  memcpy(&words, &chunk, sizeof words);
  *static_cast<uint4*>(__cvta_shared_to_generic(to)) = words;
}

// What a thread copies of an operand. kIsFast: chunks that exist are whole, and as in is_fast(). kIsWhole: the operand has
// all kExtent rows of a, or columns of b. kIsPaired: the second 16 inner indices of a stage are those of another piece.
// Copies that are not fast are asynchronous where the operand is aligned, else by elements, and at once. Stored is Element, or
// int8_t, of an operand that is aligned.
template <class L, class Element, bool kIsFast, bool kIsWhole = false, bool kIsPaired = false, class Stored = Element>
class Copies {
 public:
  static constexpr bool kConverts = sizeof(Stored) != sizeof(Element);

  // The operand begins at `first`, its lines are line_stride elements apart, and it has `extent` rows of a or columns of b.
  __device__ __forceinline__ Copies(const Stored* first, int64_t line_stride, int extent, bool is_aligned, int thread)
      : Copies(first + thread / L::kChunks * line_stride + thread % L::kChunks * kChunk, line_stride,
               line_stride * L::kPassLines, extent - (L::kAcross ? thread % L::kChunks * kChunk : thread / L::kChunks),
               is_aligned, thread) {}

  // Of an operand whose lines, or chunks of a line, stand elsewhere: the thread's first chunk is at `own`, those of its next
  // pass pass_stride elements further, and the operand has `extent_left` rows of a or columns of b from there on, in whose
  // count those of a pass are kPassLines.
  __device__ __forceinline__ Copies(const Stored* own, int64_t line_stride, int64_t pass_stride, int extent_left,
                                    bool is_aligned, int thread)
      : line_(thread / L::kChunks),
        chunk_(thread % L::kChunks),
        extent_left_(extent_left),
        is_aligned_(is_aligned),
        stride_bytes_(int64_t{sizeof(Stored)} * line_stride),
        pass_bytes_(int64_t{sizeof(Stored)} * pass_stride),
        from_(own) {
    first_line_ = kIsFast && L::kAcross && !kIsWhole && extent_left_ <= 0 ? kNever : line_;
  }

  // Copies a stage: of one piece, or of two, where those of `second` lie 16 inner indices behind the place that it names.
  __device__ __forceinline__ void start(uint32_t stage, Piece piece, const Piece& second, const Passes& passes) const {
    if (L::kCount < L::kPassLines && line_ >= L::kCount) return;
    if (kIsPaired && !kByPass && is_of_second()) piece = second;
    const int lines_left = lines_left_of(piece), lines_left_of_second = lines_left_of(second);
    const void *from = place_of(piece), *from_second = place_of(second);
    if constexpr (kIsFast) {
      auto start_pass_of = [&]<int pass>() {
        constexpr bool kSecond = kIsPaired && kByPass && pass * L::kPassLines >= 16;
        start_pass<pass>(stage, kSecond ? from_second : from, kSecond ? lines_left_of_second : lines_left, passes);
      };
      [&]<int... pass>(std::integer_sequence<int, pass...>) {
        (start_pass_of.template operator()<pass>(), ...);
      }(std::make_integer_sequence<int, L::kPasses>{});
    } else {
      static_assert(!kIsPaired);
      copy(stage, static_cast<const Stored*>(from), lines_left,
           min(max(L::kAcross ? extent_left_ : piece.left - chunk_ * kChunk, 0), kChunk));
    }
  }

  // Makes Elements of the bytes of a stage that have landed for this thread; `second` is the scale of the second piece.
  __device__ __forceinline__ void convert(uint32_t stage, float scale, float second) const {
    if (L::kCount < L::kPassLines && line_ >= L::kCount) return;
    if (kIsPaired && !kByPass && is_of_second()) scale = second;
#pragma unroll
    for (int pass = 0; pass < L::kPasses; ++pass) {
      void* chunk = __cvta_shared_to_generic(stage + L::swizzled(line_ + pass * L::kPassLines, chunk_));
      const bool is_second = kIsPaired && kByPass && pass * L::kPassLines >= 16;
      *static_cast<uint4*>(chunk) = convert_bytes<Element>(*static_cast<uint2*>(chunk), is_second ? second : scale);
    }
  }

 private:
  static constexpr bool kByPass =
      L::kAcross && L::kPassLines <= 16;  // which piece is asked for by the pass, or the thread
  static constexpr int kNever = 1 << 30;  // a line that does not exist
  static constexpr int kFlip = L::kChunks >= 8 ? L::kPassLines % 8 : 0;  // of a swizzle from one pass to the next
  static_assert(kFlip == 0 || kFlip == 4);
  static_assert(L::kPasses <= 8, "Passes");
  static_assert(L::kPasses == 1 || L::kChunks >= 8 || L::kPassLines % 8 == 0);

  __device__ __forceinline__ bool is_of_second() const { return L::kAcross ? line_ >= 16 : chunk_ * kChunk >= 16; }
  // From the thread's first line on; 0 or less where its chunk does not exist.
  __device__ __forceinline__ int lines_left_of(const Piece& piece) const {
    if (L::kAcross) return piece.left - first_line_;
    return kIsFast && chunk_ * kChunk >= piece.left ? 0 : kIsWhole ? L::kCount : extent_left_;
  }
  __device__ __forceinline__ const void* place_of(const Piece& piece) const {
    const char* from = static_cast<const char*>(from_) + piece.shift;
    constexpr int kBytes = sizeof(Stored);
    if constexpr (kIsFast)
      return ptx::mad_wide(piece.inner, L::kAcross ? static_cast<int>(stride_bytes_) : kBytes, from);
    else return from + piece.inner * (L::kAcross ? stride_bytes_ : kBytes);
  }

  template <int pass>
  __device__ __forceinline__ void start_pass(uint32_t stage, const void* from, int lines_left,
                                             const Passes& passes) const {
    const uint32_t to = stage + (L::swizzled(line_, chunk_) ^ (pass % 2 * kFlip * 16));
    if (pass > 0) from = ptx::mad_wide(passes.number[pass], static_cast<int>(pass_bytes_), from);
    constexpr int kTo = pass * L::kPassLines * L::kLineBytes;
    const bool exists = pass * L::kPassLines < lines_left;
    if constexpr (kConverts) ptx::cp_async_8_padded<kTo>(to, from, exists ? 8 : 0);
    else ptx::cp_async_16_or_zero<kTo>(to, from, exists);
  }

  // Lines and elements of them that may end anywhere.
  __device__ __forceinline__ void copy(uint32_t stage, const Stored* from, int lines_left, int count) const {
#pragma unroll 1
    for (int pass = 0; pass < L::kPasses; ++pass, from += pass_bytes_ / int{sizeof(Stored)}) {
      const int line = pass * L::kPassLines;
      const uint32_t to = stage + L::swizzled(line_ + line, chunk_);
      if constexpr (kConverts) {
        ptx::cp_async_8_padded<0>(to, from, line < lines_left ? count : 0);
      } else if (is_aligned_) {
        ptx::cp_async_16_padded(to, from, line < lines_left ? 2 * count : 0);
      } else {
        copy_elements(to, from, line < lines_left ? count : 0);
      }
    }
  }

  int line_, chunk_, extent_left_, first_line_;
  bool is_aligned_;
  int64_t stride_bytes_, pass_bytes_;
  const void* from_;
};

// Where a lane's fragments of an operand, which begins at byte `operand`, lie in a stage, for a warp whose rows or columns
// begin with `first`.
template <class L, bool kIsA>
class Fragments {
 public:
  __device__ __forceinline__ Fragments(uint32_t operand, int first) {
    // ldmatrix.x4 gives four 8 x 8 matrices. As registers of a are numbered they stand column by column in [row, inner],
    // those of two of b row by row in [column, inner]; read across, the other way round.
    const int lane = ptx::tid_x() % kWarp;
    const bool by_column = kIsA != L::kAcross;
    const int line = by_column ? lane % 16 : lane % 8 + lane / 16 * 8, chunk = by_column ? lane / 16 : lane / 8 % 2;
    at_ = operand + (L::kAcross ? L::swizzled(line, first / kChunk + chunk) : L::swizzled(first + line, chunk));
    at_ = __shfl_sync(ptx::kAllLanes, at_,
                      lane);  // its own: or the compiler, to save a register, makes it anew every time
  }
  // 16 rows or columns from `first` + 16 * tile on, 16 inner indices from 16 * half on.
  __device__ __forceinline__ void load(uint32_t (&fragment)[4], uint32_t stage, int tile, int half) const {
    const uint32_t at = stage + at_;
    constexpr int kLines = 16 * L::kLineBytes;  // 16 lines further the swizzle is the same
    if constexpr (L::kAcross) ptx::ldmatrix_x4_trans(fragment, (at ^ (tile * 32)) + half * kLines);
    else ptx::ldmatrix_x4(fragment, (at ^ (half * 32)) + tile * kLines);
  }

 private:
  uint32_t at_;
};

// ---- the product ----------------------------------------------------------------------------------------------------

template <class T>
using Sums = float[T::kRowTiles][T::kColumnTiles][4];

// The fragments of 16 inner indices of both operands.
template <class T>
struct Half16 {
  uint32_t a[T::kRowTiles][4];
  uint32_t b[T::kColumnTiles / 2][4];
};

// sums += a b over num_steps stages of a group of warps, which multiplies what the group group_of_a copies of a.
// walk.start(a, b) copies the next stage to these addresses in shared memory, and walk.advance() goes on to the one after it;
// after the last one come kStages - 1 of zeros. If Walk::kConverts, walk.convert(a) converts the stage that was started
// kStages - 1 calls of advance() ago, and a stage less is under way. The warp's part begins at row `first_row` and column `first_column` of the
// tile; nobody asks for it if !is_wanted.
template <class T, class LinesA, class LinesB, class Walk>
__device__ __forceinline__ void multiply(Sums<T>& sums, Stage<T>* stages, int num_steps, int group, int group_of_a,
                                         int first_row, int first_column, bool is_wanted, Walk& walk) {
  constexpr uint32_t kStageBytes = sizeof(Stage<T>), kBytesA = sizeof(Stage<T>::a[0]), kBytesB = sizeof(Stage<T>::b[0]);
  const Fragments<LinesA, true> a(group_of_a * kBytesA, first_row);
  const Fragments<LinesB, false> b(T::kGroups * kBytesA + group * kBytesB, first_column);
  auto load = [&](Half16<T>& half, uint32_t stage, int which) {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) a.load(half.a[m], stage, m, which);
#pragma unroll
    for (int pair = 0; pair < T::kColumnTiles / 2; ++pair) b.load(half.b[pair], stage, pair, which);
  };
  auto add = [&](const Half16<T>& half) {
#pragma unroll
    for (int pair = 0; pair < T::kColumnTiles / 2; ++pair) {
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m) {
        ptx::mma_m16n8k16<typename T::Element>(sums[m][2 * pair], half.a[m], half.b[pair][0], half.b[pair][1]);
        ptx::mma_m16n8k16<typename T::Element>(sums[m][2 * pair + 1], half.a[m], half.b[pair][2], half.b[pair][3]);
      }
    }
  };
  constexpr int kPending = T::kStages - (Walk::kConverts ? 3 : 2);
  auto convert = [&](uint32_t stage) {
    if constexpr (Walk::kConverts) walk.convert(stage + group * kBytesA);
  };
  auto start = [&](uint32_t stage) {
    walk.start(stage + group * kBytesA, stage + T::kGroups * kBytesA + group * kBytesB);
    ptx::cp_async_commit();
  };

  const uint32_t first_stage = ptx::smem_address(stages), last_stage = first_stage + (T::kStages - 1) * kStageBytes;
#pragma unroll
  for (int step = 0; step < T::kStages - 1; ++step) {
    start(first_stage + step * kStageBytes);
    walk.advance();
  }
  ptx::cp_async_wait<kPending>();
  convert(first_stage);
  __syncthreads();  // the first stage has landed for all
  Half16<T> first, second;
  if (is_wanted) load(first, first_stage, 0);
  uint32_t stage = first_stage, stage_before = last_stage;
#pragma unroll 1
  for (int step = 0; step < num_steps; ++step) {
    if (is_wanted) {
      load(second, stage, 1);
      start(stage_before);
      add(first);
    } else {
      start(stage_before);
    }
    walk.advance();
    stage_before = stage;
    stage = stage == last_stage ? first_stage : stage + kStageBytes;
    convert(stage);
    ptx::cp_async_wait<kPending>();
    __syncthreads();  // the next stage has landed for all, and all have read this one
    if (is_wanted) {
      load(first, stage, 0);
      add(second);
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // all have read all stages, and nothing is copied any more
}

// Calls f.template operator()<LinesA, LinesB>() for operands whose lines run across the inner dimension or along it.
template <class T, class F>
__device__ __forceinline__ void dispatch_lines(bool a_across, bool b_across, F&& f) {
  auto with_a = [&]<bool kA>() {
    using LinesA = Lines<T::kRows, kA, T::kGroupThreads>;
    if (b_across) f.template operator()<LinesA, Lines<T::kColumns, true, T::kGroupThreads>>();
    else f.template operator()<LinesA, Lines<T::kColumns, false, T::kGroupThreads>>();
  };
  if (a_across) with_a.template operator()<true>();
  else with_a.template operator()<false>();
}

}  // namespace
}  // namespace fmkernels
