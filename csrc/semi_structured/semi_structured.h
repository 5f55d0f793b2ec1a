// SPDX-License-Identifier: Apache-2.0
// semi_structured.h: matrices of which at most two of each four neighbours in a row are not zero (2:4 sparsity).
//
//   mask    of each four along a row the two largest magnitudes; or, of each tile of 4 x 4, two in every row and in
//           every column, the largest sum of all 90 ways to do that, so that the transpose is 2:4 too
//   pack    W [rows, columns] -> values [rows, columns / 2], the kept elements of each row in their order, and
//           metadata, which tell where in its four each of them stands
//   linear  y[t, r] = sum_j values[r, j] x[t, column(r, j)] + bias[r]
//
// Metadata   words of 32 bits [row tiles of 16, column blocks of 64, 32], as the PTX ISA has the lanes of a warp hold
//            them for mma.sp.m16n8k32 of 16-bit elements: word 4 g + w belongs to rows g (low half) and g + 8 (high
//            half) and columns 16 w .. 16 w + 15 of the block, four bits for each four of them, from the lowest: the
//            place of the first kept element, and of the second, which is the larger one. Words 4 g and 4 g + 1 are
//            those of sparsity selector 0, the block's first 32 columns; the others of selector 1. Columns past the
//            edge have the places 0 and 1.
// Order      an element of y is a sum in the order of columns, cut into chains of 256 columns on the CPU.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/stream.h"

namespace fmkernels {

constexpr int kRowTile = 16, kColumnBlock = 64;   // of metadata; rows and columns are multiples of 16
constexpr int kTileWords = 32;                    // of a row tile in a column block
constexpr int kWordColumns = 16;                  // that a half of a word belongs to
constexpr uint32_t kLargestFinite = 0x7f7fffffu;  // as the bits of a float; infinity and NaN count as that

struct SemiStructuredMaskParams {
  DType dtype;
  const void* x;  // [rows, columns], columns contiguous
  int64_t rows, columns, row_stride;
  bool both_directions;
  bool* mask;  // [rows, columns], contiguous
};

struct SemiStructuredPackParams {
  DType dtype;
  int64_t rows, columns;  // of the packed matrix
  const void* x;          // and the strides of its rows and columns in x, which may be those of a transpose
  int64_t row_stride, column_stride;
  const uint8_t* mask;  // bytes, of which any but 0 is true
  int64_t mask_row_stride, mask_column_stride;
  void* values;        // [rows, columns / 2]
  uint32_t* metadata;  // [row tiles, column blocks, 32]

  constexpr int64_t num_row_tiles() const { return rows / kRowTile; }
  constexpr int64_t num_column_blocks() const { return (columns + kColumnBlock - 1) / kColumnBlock; }
};

struct SemiStructuredLinearParams {
  DType dtype;
  int64_t tokens, rows, columns;
  const void* x;  // [tokens, columns], columns contiguous
  int64_t x_stride;
  const void* values;        // [rows, columns / 2], contiguous
  const uint32_t* metadata;  // [row tiles, column blocks, 32], contiguous
  const float* bias;         // [rows]; null: none
  void* y;                   // [tokens, rows], contiguous

  constexpr int64_t num_row_tiles() const { return rows / kRowTile; }
  constexpr int64_t num_column_blocks() const { return (columns + kColumnBlock - 1) / kColumnBlock; }
};

// The two kept places of a group of four, in the low and the high two bits, from four bits of what is kept. Where fewer
// are kept, the lowest free places stand for them; where more, the first two count. A table of 16 times four bits.
constexpr uint64_t make_places() {
  uint64_t table = 0;
  for (int kept = 0; kept < 16; ++kept) {
    int chosen = 0, count = 0;
    for (int wanted = 1; wanted >= 0; --wanted) {  // what is kept first
      for (int place = 0; place < 4; ++place) {
        if ((kept >> place & 1) == wanted && count < 2) chosen |= 1 << place, ++count;
      }
    }
    int first = 0, second = 3;
    while (!(chosen >> first & 1)) ++first;
    while (!(chosen >> second & 1)) --second;
    table |= static_cast<uint64_t>(first | second << 2) << 4 * kept;
  }
  return table;
}
constexpr uint64_t kPlaces = make_places();
FM_HOST_DEVICE uint32_t places_of(uint32_t kept) { return static_cast<uint32_t>(kPlaces >> 4 * kept) & 15u; }

// The ways to keep two of four in each row and in each column of a tile: in each row one of these pairs, as bits of
// what is kept, in the order of the list; the first row counts most. At equal sums the lowest way is chosen.
struct TileWays {
  static constexpr int kCount = 90;
  static constexpr uint8_t kPairs[6] = {0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100};
  uint8_t pair[kCount][4];  // of each row
  uint16_t kept[kCount];    // four bits a row

  constexpr TileWays() : pair(), kept() {
    int count = 0;
    for (int way = 0; way < 6 * 6 * 6 * 6; ++way) {
      const int rows[4] = {way / 216, way / 36 % 6, way / 6 % 6, way % 6};
      bool two_in_each = true;
      for (int column = 0; column < 4; ++column) {
        int in_column = 0;
        for (const int row : rows) in_column += kPairs[row] >> column & 1;
        two_in_each = two_in_each && in_column == 2;
      }
      if (!two_in_each) continue;
      for (int row = 0; row < 4; ++row) {
        pair[count][row] = static_cast<uint8_t>(rows[row]);
        kept[count] = static_cast<uint16_t>(kept[count] | kPairs[rows[row]] << 4 * row);
      }
      ++count;
    }
  }
};

template <Isa>
void run_semi_structured_mask(const SemiStructuredMaskParams& p);
template <Isa>
void run_semi_structured_pack(const SemiStructuredPackParams& p);
template <Isa>
void run_semi_structured_linear(const SemiStructuredLinearParams& p);

void launch_semi_structured_mask(const SemiStructuredMaskParams& p, cudaStream_t stream);
void launch_semi_structured_pack(const SemiStructuredPackParams& p, cudaStream_t stream);
void launch_semi_structured_linear(const SemiStructuredLinearParams& p, cudaStream_t stream);

}  // namespace fmkernels
