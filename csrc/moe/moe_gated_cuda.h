// SPDX-License-Identifier: Apache-2.0
// What moe_gated_mm.cu copies: rows of a that stand anywhere, and columns of b so that those of a gate and of its up are in one
// tile; and what it makes of the sums of such a tile.
//
// Columns   Where b has all gates before all ups, 8 of 16 columns of a tile are gates and 8 their ups; where they are in
//           turns, a tile has the columns as b has them. Either way a tile of kColumns gives kColumns / 2 elements of a row,
//           and the 8 sums of a chunk, with those of its neighbour, give 4.
#pragma once

#include "../common/sigmoid_cuda.h"
#include "moe_gated.h"
#include "moe_grouped_cuda.h"
#include "moe_slots_cuda.h"

namespace fmkernels {
namespace {

// As Copies of tile_cuda.h, of an operand whose line l is row row_of(l) of a matrix, with rows that are row_bytes apart. A row
// that is none of them is zeros and is not read.
template <class L, class Element, bool kIsFast>
class GatheredCopies {
 public:
  template <class F>
  __device__ __forceinline__ GatheredCopies(const DenseView& view, int64_t row_bytes, bool is_aligned, int thread,
                                            F&& row_of)
      : line_(thread / L::kChunks),
        chunk_(thread % L::kChunks),
        num_rows_(static_cast<uint32_t>(view.rows)),
        is_aligned_(is_aligned),
        row_bytes_(row_bytes),
        from_(static_cast<const Element*>(view.data) + chunk_ * kChunk) {
#pragma unroll
    for (int pass = 0; pass < L::kPasses; ++pass) rows_[pass] = row_of(line_ + pass * L::kPassLines);
  }

  __device__ __forceinline__ void start(uint32_t stage, const Piece& piece, const Piece&, const Passes&) const {
    if (L::kCount < L::kPassLines && line_ >= L::kCount) return;
    // A row is one where, as a number without sign, it is below num_rows; none is where the chunk is behind the end.
    const int left = piece.left - chunk_ * kChunk;
    const uint32_t num_rows = left > 0 ? num_rows_ : 0;
    const void* from = ptx::mad_wide(piece.inner, sizeof(Element), from_);
    if constexpr (kIsFast) {
      [&]<int... pass>(std::integer_sequence<int, pass...>) {
        (start_pass<pass>(stage, from, num_rows), ...);
      }(std::make_integer_sequence<int, L::kPasses>{});
    } else {
      copy(stage, from, num_rows, min(left, kChunk));
    }
  }

 private:
  static_assert(!L::kAcross && L::kChunks < 8 && (L::kPasses == 1 || L::kPassLines % 8 == 0),
                "a pass further the swizzle is the same");

  template <int pass>
  __device__ __forceinline__ void start_pass(uint32_t stage, const void* from, uint32_t num_rows) const {
    const void* row = ptx::mad_wide(rows_[pass], static_cast<int>(row_bytes_), from);
    ptx::cp_async_16_or_zero<pass * L::kPassLines * L::kLineBytes>(stage + L::swizzled(line_, chunk_), row,
                                                                   static_cast<uint32_t>(rows_[pass]) < num_rows);
  }

  __device__ __forceinline__ void copy(uint32_t stage, const void* from, uint32_t num_rows, int count) const {
#pragma unroll
    for (int pass = 0; pass < L::kPasses; ++pass) {
      const uint32_t to = stage + L::swizzled(line_ + pass * L::kPassLines, chunk_);
      const bool exists = static_cast<uint32_t>(rows_[pass]) < num_rows;
      const auto* row = reinterpret_cast<const Element*>(static_cast<const char*>(from) + rows_[pass] * row_bytes_);
      if (is_aligned_) {
        ptx::cp_async_16_padded(to, row, exists ? 2 * count : 0);
      } else {
        copy_elements(to, row, exists ? count : 0);
      }
    }
  }

  int line_, chunk_;
  uint32_t num_rows_;
  bool is_aligned_;
  int64_t row_bytes_;
  const Element* from_;
  int rows_[L::kPasses];
};

// The columns of a tile, of b with `width` gates and as many ups.
struct GatedColumns {
  int64_t first, width;  // `first` of the elements of a row of the result
  bool is_interleaved;

  // The column of b that is column c of the tile. 16 further it is 8 further, or 16 where they are in turns.
  __device__ __forceinline__ int64_t at(int c) const {
    return is_interleaved ? 2 * first + c : first + c / 16 * 8 + c % 8 + c / 8 % 2 * width;
  }
  // Columns of b from there on, to the end of the gates or of the ups.
  __device__ __forceinline__ int left_from(int c) const {
    const int64_t left = (is_interleaved || c / 8 % 2 == 0 ? 0 : width) + (is_interleaved ? 2 * width : width) - at(c);
    return static_cast<int>(max(min(left, int64_t{1} << 20), int64_t{0}));
  }
};

// How a thread copies these columns of one of the matrices of b, which begins at `matrix`.
template <class L, class Element, bool kIsFast>
__device__ __forceinline__ Copies<L, Element, kIsFast> copies_of_columns(const Element* matrix, const DenseView& b,
                                                                         const GatedColumns& columns, bool is_aligned,
                                                                         int thread) {
  const int line = thread / L::kChunks, along = thread % L::kChunks * kChunk;
  if constexpr (L::kAcross) {
    return {matrix + line * b.row_stride + columns.at(along),
            b.row_stride,
            b.row_stride * L::kPassLines,
            columns.left_from(along),
            is_aligned,
            thread};
  } else {
    static_assert(L::kPasses == 1 || L::kPassLines % 16 == 0, "a pass further the columns are half as many further");
    const int per_column = columns.is_interleaved ? 1 : 2;  // lines of a pass
    return {matrix + columns.at(line) * b.column_stride + along,
            b.column_stride,
            b.column_stride * (L::kPassLines / per_column),
            columns.left_from(line) * per_column,
            is_aligned,
            thread};
  }
}

// Stores what the first rows of a tile of sums give: silu(gate) * up at `out`, and at `gate_up`, if that is not null, the sums
// themselves; both begin at the first of the rows. is_row(line): it is a token's, and not zeros. All threads of a block together.
template <class T, bool kIsInterleaved, class F>
__device__ __forceinline__ void store_gated(const float* sums, typename T::Element* out, typename T::Element* gate_up,
                                            const GatedColumns& columns, int num_rows, bool is_aligned, F&& is_row) {
  using Element = typename T::Element;
  const int own_along = ptx::tid_x() % (T::kColumns / kChunk) * kChunk;  // of every chunk of a thread
  const bool is_up = own_along / kChunk % 2 != 0;
  const int64_t column = columns.first + own_along / 2, kept_column = columns.at(own_along);
  const int count = static_cast<int>(min(columns.width - column, int64_t{4})), left = columns.left_from(own_along);
  for_each_chunk<SumLines<T, false>, T>(sums, ptx::tid_x(), [&](int line, int, float (&x)[kChunk]) {
    // Gates and ups of 4 elements: those of a chunk in turns; or a lane's chunk has 8 gates and its neighbour's the ups.
    float gate[4], unit[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kIsInterleaved) {
        gate[i] = x[2 * i];
        unit[i] = x[2 * i + 1];
      } else {
        const float other = __shfl_xor_sync(ptx::kAllLanes, is_up ? x[i] : x[i + 4], 1);
        gate[i] = is_up ? other : x[i];
        unit[i] = is_up ? x[i + 4] : other;
      }
    }
    if (line >= num_rows) return;
    if (!is_row(line)) {  // of a row of zeros what is infinite in b makes NaN
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i] = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) gate[i] = unit[i] = 0.0f;
    }
    if (gate_up != nullptr) {
      const Vector<Element, kChunk> chunk = pack_chunk<Element>(x);
      Element* to = gate_up + line * 2 * columns.width + kept_column;
      if (is_aligned && left >= kChunk) {
        store_vector<Element, kChunk>(to, chunk);
      } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (i < left) to[i] = chunk.lane[i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) unit[i] *= gate[i] * sigmoid(gate[i]).value;
    const uint2 words = {ptx::pack<Element>(unit[0], unit[1]), ptx::pack<Element>(unit[2], unit[3])};
    Element* to = out + line * columns.width + column;
    if (is_aligned && count == 4) return __stwb(reinterpret_cast<uint2*>(to), words);
    Vector<Element, 4> chunk;
    memcpy(&chunk, &words, sizeof chunk);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) to[i] = chunk.lane[i];
    }
  });
}

}  // namespace
}  // namespace fmkernels
