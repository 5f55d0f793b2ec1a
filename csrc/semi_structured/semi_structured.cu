// SPDX-License-Identifier: Apache-2.0
// semi_structured.cu: y = x W^T + bias with a 2:4 matrix W, as the transpose of W x^T: the sparse operand of mma.sp
// stands on the left.
//
// Contract   see semi_structured.h. Half elements; rows of x on 16-byte boundaries, or the small tile in a kernel that
//            copies element by element, which is slow.
// Work       grid: tiles of rows of W, of each the tiles of tokens. 128 x 128 tiles, or, for up to 64 tokens, 32 x 32.
// Shared     struct Stage: values, tokens and metadata of 64 columns of W.           128 x 128: 75 KiB, 32 x 32: 25 KiB
// Pipeline   kStages - 1 stages are under way while one is multiplied; the fragments of 32 columns come while those of
//            the 32 before them are multiplied. One barrier a stage: the next one has landed for all, and all have read
//            this one. Metadata of 16 rows and 64 columns are one register of each lane: both products of a stage take
//            it, with selector 0 and 1.
// Result     Sums are rounded where they are, transposed in registers 8 x 8 at a time, and go through shared memory, so
//            that a thread stores 16 bytes of a token.
// Edges      What lies past the last row, column or token is zero in shared memory and not read; tokens past it not
//            stored.
// Numerics   float32 accumulation in the order of columns, one rounding. The same for both tiles. Deterministic.
// Cost       tokens * rows * columns flops: half of those of a dense product, at twice its rate.

#include "../common/dispatch.h"
#include "../common/divisor.h"
#include "../common/launch.h"
#include "../common/ptx.h"
#include "../common/vector_cuda.h"
#include "semi_structured.h"

namespace fmkernels {
namespace {

constexpr int kChunk = 8;                           // elements of 16 bytes
constexpr int kStepChunks = kColumnBlock / kChunk;  // of a token in a stage
constexpr int kValueChunks = kStepChunks / 2;       // of a row of W

// A tile of kRows of W x kTokens, of warps of kWarpRows x kWarpTokens.
template <class Element_, int kRows_, int kTokens_, int kWarpRows_, int kWarpTokens_, int kStages_>
struct Traits {
  using Element = Element_;
  static constexpr int kRows = kRows_, kTokens = kTokens_, kWarpRows = kWarpRows_, kWarpTokens = kWarpTokens_;
  static constexpr int kStages = kStages_;
  static constexpr int kWarpsAcross = kTokens / kWarpTokens, kThreads = kRows / kWarpRows * kWarpsAcross * kWarp;
  static constexpr int kRowTiles = kWarpRows / kRowTile, kTokenTiles = kWarpTokens / 8;  // m16 and n8 tiles of a warp
  static constexpr int kBlocksPerSm = 256 / kThreads;  // whose threads may have 255 registers each
  static_assert(kThreads % kStepChunks == 0 && kThreads >= kRows / 2, "copies of a stage, by chunk of a line");
};

template <class T>
struct Stage {
  typename T::Element values[T::kRows][kColumnBlock / 2];  // [row, kept element], chunks swizzled
  typename T::Element x[T::kTokens][kColumnBlock];         // [token, column], chunks swizzled
  uint32_t metadata[T::kRows / kRowTile][kTileWords];      // [row tile, lane]
};
template <class T>
union Smem {
  Stage<T> stages[T::kStages];
  typename T::Element y[T::kTokens][T::kRows];  // [token, row], chunks swizzled
};

// Chunk numbers, from the first of an array, of a line's chunk. Eight lines at one chunk fall into different banks, and
// so do a line's chunks.
__device__ __forceinline__ int value_chunk(int row, int chunk) { return row * kValueChunks + (chunk ^ row / 2 % 4); }
__device__ __forceinline__ int x_chunk(int token, int chunk) { return token * kStepChunks + (chunk ^ token % 8); }
template <class T>
__device__ __forceinline__ int y_chunk(int token, int chunk) {
  return token * (T::kRows / kChunk) + (chunk ^ token % (T::kRows / kChunk < 8 ? T::kRows / kChunk : 8));
}

struct LinearArgs {
  SemiStructuredLinearParams p;
  Divisor token_tiles;
  int num_steps;
};

// The copies of this thread into the stages of a tile.
template <class T, bool kIsAligned>
class Copies {
  using Element = typename T::Element;

 public:
  __device__ __forceinline__ Copies(const LinearArgs& args, int64_t first_row, int64_t first_token) {
    const SemiStructuredLinearParams& p = args.p;
    value_row_ = threadIdx.x / kValueChunks;
    value_column_ = threadIdx.x % kValueChunks * kChunk;
    x_token_ = threadIdx.x / kStepChunks;
    x_column_ = threadIdx.x % kStepChunks * kChunk;
    num_rows_ = static_cast<int>(min(p.rows - first_row, int64_t{T::kRows}));
    num_tokens_ = static_cast<int>(min(p.tokens - first_token, int64_t{T::kTokens}));
    columns_left_ = static_cast<int>(p.columns);
    value_stride_ = p.columns / 2;
    x_stride_ = p.x_stride;
    values_ = static_cast<const Element*>(p.values) + (first_row + value_row_) * value_stride_ + value_column_;
    x_ = static_cast<const Element*>(p.x) + (first_token + x_token_) * x_stride_ + x_column_;
    // A tile of rows past the last one has the places of that one: its values are zero, and places must be valid.
    const int64_t row_tile = min(first_row / kRowTile + threadIdx.x / (kTileWords / 4), p.num_row_tiles() - 1);
    metadata_ = p.metadata + row_tile * p.num_column_blocks() * kTileWords + threadIdx.x % (kTileWords / 4) * 4;
  }

  // Starts the copies of a stage, and goes on to the next one; zeros after the last one.
  __device__ __forceinline__ void start(uint32_t stage) {
    const uint32_t to_values = stage + value_chunk(value_row_, value_column_ / kChunk) * 16;
    const uint32_t to_x = stage + sizeof(Stage<T>::values) + x_chunk(x_token_, x_column_ / kChunk) * 16;
    const uint32_t to_metadata = stage + sizeof(Stage<T>::values) + sizeof(Stage<T>::x) + threadIdx.x * 16;
    constexpr int kValueLines = T::kThreads / kValueChunks, kTokenLines = T::kThreads / kStepChunks;
    static_assert(kValueLines % 8 == 0 && kTokenLines % 8 == 0, "a pass further the swizzle is the same");
    const bool has_values = 2 * value_column_ < columns_left_, has_x = x_column_ < columns_left_;
#pragma unroll
    for (int line = 0; line < T::kRows; line += kValueLines) {
      const bool valid = has_values && value_row_ + line < num_rows_;
      ptx::cp_async_16_or_zero(to_values + line * kValueChunks * 16, values_ + line * value_stride_, valid);
    }
#pragma unroll
    for (int line = 0; line < T::kTokens; line += kTokenLines) {
      const bool valid = has_x && x_token_ + line < num_tokens_;
      if constexpr (kIsAligned) {
        ptx::cp_async_16_or_zero(to_x + line * kStepChunks * 16, x_ + line * x_stride_, valid);
      } else {
        Vector<Element, kChunk> chunk{};
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (valid) chunk.lane[i] = x_[line * x_stride_ + i];
        }
        uint4 words;
        memcpy(&words, &chunk, sizeof words);
        *static_cast<uint4*>(__cvta_shared_to_generic(to_x + line * kStepChunks * 16)) = words;
      }
    }
    if (threadIdx.x < T::kRows / 2) ptx::cp_async_16_or_zero(to_metadata, metadata_, columns_left_ > 0);
    ptx::cp_async_commit();
    columns_left_ -= kColumnBlock;
    values_ += kColumnBlock / 2;
    x_ += kColumnBlock;
    metadata_ += kTileWords;
  }

 private:
  int value_row_, value_column_, x_token_, x_column_, num_rows_, num_tokens_, columns_left_;
  int64_t value_stride_, x_stride_;
  const Element *values_, *x_;
  const uint32_t* metadata_;
};

template <class T>
using Sums = float[T::kRowTiles][T::kTokenTiles][4];

// The fragments of 32 columns.
template <class T>
struct Half32 {
  uint32_t values[T::kRowTiles][4];
  uint32_t x[T::kTokenTiles][4];
};

template <class T>
__device__ __forceinline__ void load_half(Half32<T>& half, uint32_t values, uint32_t x, int which) {
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
    ptx::ldmatrix_x4(half.values[m], (values ^ which * 32) + m * kRowTile * kValueChunks * 16);
  }
#pragma unroll
  for (int n = 0; n < T::kTokenTiles; ++n) ptx::ldmatrix_x4(half.x[n], (x ^ which * 64) + n * 8 * kStepChunks * 16);
}

template <class T, int kSelector>
__device__ __forceinline__ void multiply_half(Sums<T>& sums, const Half32<T>& half,
                                              const uint32_t (&metadata)[T::kRowTiles]) {
#pragma unroll
  for (int n = 0; n < T::kTokenTiles; ++n) {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
      ptx::mma_sp_m16n8k32<typename T::Element, kSelector>(sums[m][n], half.values[m], half.x[n], metadata[m]);
    }
  }
}

// The product of the tile, of this warp's part of it.
template <class T, bool kIsAligned>
__device__ __forceinline__ void multiply(Sums<T>& sums, Stage<T>* stages, const LinearArgs& args, int64_t first_row,
                                         int64_t first_token, int warp_row, int warp_token) {
  constexpr uint32_t kStageBytes = sizeof(Stage<T>);
  constexpr uint32_t kOffsetX = sizeof(Stage<T>::values), kOffsetMetadata = kOffsetX + sizeof(Stage<T>::x);
  Copies<T, kIsAligned> copies(args, first_row, first_token);
  const int lane = threadIdx.x % kWarp;
  // ldmatrix.x4: of values the matrices stand column by column in [16 rows, 16 kept elements]; of x one after another
  // along 32 columns of 8 tokens.
  const uint32_t of_values = value_chunk(warp_row + lane % 16, lane / 16) * 16;
  const uint32_t of_x = kOffsetX + x_chunk(warp_token + lane % 8, lane / 8) * 16;
  const uint32_t of_metadata = kOffsetMetadata + (warp_row / kRowTile * kTileWords + lane) * 4;
  uint32_t metadata[T::kRowTiles];
  auto load_metadata = [&](uint32_t stage) {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) metadata[m] = ptx::ld_shared(stage + of_metadata + m * kTileWords * 4);
  };

  const uint32_t first_stage = ptx::smem_address(stages), last_stage = first_stage + (T::kStages - 1) * kStageBytes;
#pragma unroll
  for (int step = 0; step < T::kStages - 1; ++step) copies.start(first_stage + step * kStageBytes);
  ptx::cp_async_wait<T::kStages - 2>();
  __syncthreads();  // the first stage has landed for all
  Half32<T> first, second;
  load_half(first, first_stage + of_values, first_stage + of_x, 0);
  uint32_t stage = first_stage, stage_before = last_stage;
#pragma unroll 1
  for (int step = 0; step < args.num_steps; ++step) {
    load_metadata(stage);
    load_half(second, stage + of_values, stage + of_x, 1);
    copies.start(stage_before);
    multiply_half<T, 0>(sums, first, metadata);
    stage_before = stage;
    stage = stage == last_stage ? first_stage : stage + kStageBytes;
    ptx::cp_async_wait<T::kStages - 2>();
    __syncthreads();  // the next stage has landed for all, and all have read this one
    load_half(first, stage + of_values, stage + of_x, 0);
    multiply_half<T, 1>(sums, second, metadata);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // all have read all stages, and nothing is copied any more
}

template <class T, bool kIsAligned>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSm)
    semi_structured_linear_kernel(const __grid_constant__ LinearArgs args) {
  using Element = typename T::Element;
  const SemiStructuredLinearParams& p = args.p;
  auto& smem = dynamic_smem<Smem<T>>();
  const int row_tile = static_cast<int>(blockIdx.x) / args.token_tiles;
  const int token_tile = static_cast<int>(blockIdx.x) % args.token_tiles;
  const int64_t first_row = int64_t{row_tile} * T::kRows, first_token = int64_t{token_tile} * T::kTokens;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warp_row = warp / T::kWarpsAcross * T::kWarpRows, warp_token = warp % T::kWarpsAcross * T::kWarpTokens;

  // The product.
  Sums<T> sums = {};
  multiply<T, kIsAligned>(sums, smem.stages, args, first_row, first_token, warp_row, warp_token);

  // Its transpose, rounded, in shared memory.
  const uint32_t y = ptx::smem_address(smem.y);
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + m * kRowTile + half * 8;
      const int64_t bias_row = first_row + row + lane / 4;
      const float bias = p.bias != nullptr && bias_row < p.rows ? __ldg(p.bias + bias_row) : 0.0f;
#pragma unroll
      for (int n = 0; n < T::kTokenTiles; ++n) {
        const float low = sums[m][n][2 * half] + bias, high = sums[m][n][2 * half + 1] + bias;
        const uint32_t pair = ptx::movmatrix_trans(ptx::pack<Element>(low, high));
        const int token = warp_token + n * 8 + lane / 4;
        ptx::st_shared(y + y_chunk<T>(token, row / kChunk) * 16 + lane % 4 * 4, pair);
      }
    }
  }
  __syncthreads();  // the tile is there

  // The result: 16 bytes of a token a thread.
  constexpr int kLineChunks = T::kRows / kChunk;
#pragma unroll 1
  for (int i = threadIdx.x; i < T::kTokens * kLineChunks; i += T::kThreads) {
    const int token = i / kLineChunks, chunk = i % kLineChunks;
    const int64_t row = first_row + chunk * kChunk;
    if (first_token + token >= p.tokens || row >= p.rows) continue;
    const auto of_token = load_vector<Element, kChunk>(&smem.y[0][0] + y_chunk<T>(token, chunk) * kChunk);
    store_vector<Element, kChunk>(static_cast<Element*>(p.y) + (first_token + token) * p.rows + row, of_token);
  }
}

template <class T, bool kIsAligned>
void launch_with(const SemiStructuredLinearParams& p, cudaStream_t stream) {
  const int64_t token_tiles = (p.tokens + T::kTokens - 1) / T::kTokens, row_tiles = (p.rows + T::kRows - 1) / T::kRows;
  const dim3 grid = grid_of("semi_structured_linear", token_tiles * row_tiles, 1);
  const LinearArgs args{p, Divisor(static_cast<int32_t>(token_tiles)), static_cast<int>(p.num_column_blocks())};
  launch("semi_structured_linear", semi_structured_linear_kernel<T, kIsAligned>, grid, T::kThreads, sizeof(Smem<T>),
         stream, args);
}

}  // namespace

void launch_semi_structured_linear(const SemiStructuredLinearParams& p, cudaStream_t stream) {
  constexpr int64_t kMostFewTokens = 64;
  const bool is_aligned = is_aligned_16(p.x, 2, p.columns, {p.x_stride});
  dispatch_half(p.dtype, [&]<class Element>() {
    using Small = Traits<Element, 32, 32, 16, 16, 4>;
    if (!is_aligned) launch_with<Small, false>(p, stream);  // the large tile has no registers left for it
    else if (p.tokens <= kMostFewTokens) launch_with<Small, true>(p, stream);
    else launch_with<Traits<Element, 128, 128, 64, 64, 3>, true>(p, stream);
  });
}

}  // namespace fmkernels
