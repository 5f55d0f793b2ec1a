// SPDX-License-Identifier: Apache-2.0
// norm.cu: the CUDA kernels of RMSNorm and LayerNorm, forward and backward.
//
// Contract   see norm.h. kVec elements are read at a time where every row and the weights begin on a 16-byte boundary,
//            else one.
// Work       Forward: a team of whole warps, one for short rows, owns a row; up to kHeld vectors a thread stay in
//            registers, what a longer row has beyond is read again. Backward: a team walks the rows of a chunk, its sums
//            for dweight and dbias in registers; beyond kHeldBackward vectors a thread, in memory, each by its own thread.
//            A last kernel adds the chunks up.
// Shared     sums of the warps of a team, in two buffers that take turns: one barrier a sum.
// Numerics   float32; the variance of LayerNorm about the mean; every sum in a fixed order. Deterministic.
// Cost       2 elements of memory an element (4 with a residual) forward, 3 backward (4): bound by memory.

#include "norm.h"

#include "../common/dispatch.h"
#include "../common/launch.h"
#include "../common/vector_cuda.h"

namespace fmkernels {
namespace {

constexpr int kHeld = 4, kHeldBackward = 2;     // vectors a thread
constexpr int kMaxThreads = 512;                // a team
constexpr int kShortTeams = 4;                  // a block, where a team is one warp
constexpr int kColumns = 32, kColumnLanes = 8;  // a block of the sum over chunks

// The threads that share a row: x of the block. They are the whole block where they are more than a warp.
struct Team {
  int num_threads, thread;
  int64_t index;  // over the grid

  __device__ Team()
      : num_threads(blockDim.x),
        thread(threadIdx.x),
        index(static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y) {}

  // Sums over the team; every thread holds the results. `turn` is 0 and 1 alternately from one call to the next.
  template <int kCount>
  __device__ __forceinline__ void sum(float (&x)[kCount], int turn) const {
    __shared__ float sSums[2][kCount][kWarp];  // [turn, sum, warp]
    for (float& part : x) part = warp_sum(part);
    const int num_warps = num_threads / kWarp, warp = thread / kWarp, lane = thread % kWarp;
    if (num_warps == 1) return;
    for (int i = 0; i < kCount; ++i) {
      if (lane == 0) sSums[turn][i][warp] = x[i];
    }
    __syncthreads();  // this turn is written; the other one, which the next call writes, has been read
    for (int i = 0; i < kCount; ++i) x[i] = warp_sum(lane < num_warps ? sSums[turn][i][lane] : 0.0f);
  }
};

__device__ __forceinline__ float rstd_of(float sum_of_squares, int64_t hidden, float eps) {
  return 1.0f / sqrtf(sum_of_squares / static_cast<float>(hidden) + eps);
}

// The columns of a thread, a vector at a time: the first kCount stay in registers, and f(i, column) knows them by i.
template <int kCount, int kVec, class F>
__device__ __forceinline__ void for_held(const Team& team, int64_t hidden, F&& f) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t column = (static_cast<int64_t>(i) * team.num_threads + team.thread) * kVec;
    if (column < hidden) f(i, column);
  }
}
// f(column) for those beyond.
template <int kCount, int kVec, class F>
__device__ __forceinline__ void for_rest(const Team& team, int64_t hidden, F&& f) {
#pragma unroll 1
  for (int64_t column = (static_cast<int64_t>(kCount) * team.num_threads + team.thread) * kVec; column < hidden;
       column += static_cast<int64_t>(team.num_threads) * kVec) {
    f(column);
  }
}

// weight[column, column + kVec) as floats; `missing` where there are no weights.
template <int kVec, class W>
__device__ __forceinline__ void load_weight(const void* weight, int64_t column, float missing, float (&to)[kVec]) {
  Vector<W, kVec> vector{};
  if (weight != nullptr) vector = load_vector<W, kVec>(static_cast<const W*>(weight) + column);
  for (int i = 0; i < kVec; ++i) to[i] = weight == nullptr ? missing : to_float(vector.lane[i]);
}

template <class T, class W, int kVec>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_forward_kernel(NormForwardParams p) {
  using Vec = Vector<T, kVec>;
  const Team team;
  if (team.index >= p.rows.count) return;  // whole teams: the sums below need all threads of one
  const RowPlace place = place_of(p.rows, team.index);
  const bool adds = p.residual.data != nullptr;
  const T *x = row_of<T>(p.x, place), *residual = row_of<T>(p.residual, place);
  T *summed = row_of<T>(p.summed, place), *y = row_of<T>(p.y, place);
  const T* stored = adds ? summed : x;  // where s is read again

  // s = x + residual, and the sum of squares, or of elements for a mean. All loads stand before the first store.
  Vec held[kHeld] = {}, added[kHeld] = {};
  for_held<kHeld, kVec>(team, p.hidden, [&](int i, int64_t column) {
    held[i] = load_vector<T, kVec>(x + column);
    if (adds) added[i] = load_vector<T, kVec>(residual + column);
  });
  float sum[1] = {};
  const auto take = [&](Vec& s, const Vec& more, int64_t column) {
    if (adds) {
      for (int k = 0; k < kVec; ++k) s.lane[k] = from_float<T>(to_float(s.lane[k]) + to_float(more.lane[k]));
      store_vector<T, kVec>(summed + column, s);
    }
    for (int k = 0; k < kVec; ++k) {
      const float element = to_float(s.lane[k]);
      sum[0] += p.is_centred ? element : element * element;
    }
  };
  for_held<kHeld, kVec>(team, p.hidden, [&](int i, int64_t column) { take(held[i], added[i], column); });
  for_rest<kHeld, kVec>(team, p.hidden, [&](int64_t column) {
    Vec s = load_vector<T, kVec>(x + column), more{};
    if (adds) more = load_vector<T, kVec>(residual + column);
    take(s, more, column);
  });
  team.sum(sum, 0);

  // The variance of LayerNorm.
  float mean = 0.0f;
  if (p.is_centred) {
    mean = sum[0] / static_cast<float>(p.hidden);
    sum[0] = 0.0f;
    const auto deviate = [&](const Vec& s) {
      for (int k = 0; k < kVec; ++k) sum[0] += (to_float(s.lane[k]) - mean) * (to_float(s.lane[k]) - mean);
    };
    for_held<kHeld, kVec>(team, p.hidden, [&](int i, int64_t) { deviate(held[i]); });
    for_rest<kHeld, kVec>(team, p.hidden, [&](int64_t column) { deviate(load_vector<T, kVec>(stored + column)); });
    team.sum(sum, 1);
  }
  const float rstd = rstd_of(sum[0], p.hidden, p.eps);

  const auto finish = [&](const Vec& s, int64_t column) {
    float weight[kVec], bias[kVec];
    load_weight<kVec, W>(p.weight, column, 1.0f, weight);
    load_weight<kVec, W>(p.bias, column, 0.0f, bias);
    Vec out;
    for (int k = 0; k < kVec; ++k) {
      const float h = (to_float(s.lane[k]) - mean) * rstd * weight[k];
      out.lane[k] = from_float<T>(p.bias == nullptr ? h : h + bias[k]);
    }
    store_vector<T, kVec>(y + column, out);
  };
  for_held<kHeld, kVec>(team, p.hidden, [&](int i, int64_t column) { finish(held[i], column); });
  for_rest<kHeld, kVec>(team, p.hidden, [&](int64_t column) { finish(load_vector<T, kVec>(stored + column), column); });
}

// Sums of kVec columns. The 32 bytes of eight stand as two times 16 at a distance, so that the 16 bytes of neighbouring
// threads are neighbours: of the 256 columns of a warp the first four of every eight come first, then the others.
constexpr int kSplitDistance = kSumsBlock / 2;
__device__ __forceinline__ int64_t split_column(int64_t column) {
  return column / kSumsBlock * kSumsBlock + column % 8 / 4 * kSplitDistance + column % kSumsBlock / 8 * 4 + column % 4;
}
template <int kVec>
__device__ __forceinline__ void load_sums(const float* sums, int64_t column, float (&to)[kVec]) {
  constexpr int kPart = kVec < 4 ? kVec : 4;
  const float* from = sums + (kVec == 8 ? split_column(column) : column);
  for (int part = 0; part < kVec / kPart; ++part) {
    const auto vector = load_vector<float, kPart>(from + part * kSplitDistance);
    for (int k = 0; k < kPart; ++k) to[part * kPart + k] = vector.lane[k];
  }
}
template <int kVec>
__device__ __forceinline__ void store_sums(float* sums, int64_t column, const float (&from)[kVec]) {
  constexpr int kPart = kVec < 4 ? kVec : 4;
  float* to = sums + (kVec == 8 ? split_column(column) : column);
  for (int part = 0; part < kVec / kPart; ++part) {
    Vector<float, kPart> vector;
    for (int k = 0; k < kPart; ++k) vector.lane[k] = from[part * kPart + k];
    store_vector<float, kPart>(to + part * kSplitDistance, vector);
  }
}

template <class T, class W, int kVec>
__global__ void __launch_bounds__(kMaxThreads) norm_backward_kernel(NormBackwardParams p) {
  using Vec = Vector<T, kVec>;
  const Team team;
  if (team.index >= p.num_chunks) return;  // whole teams
  const int64_t begin = team.index * p.rows_per_chunk;
  const int64_t end = begin + p.rows_per_chunk < p.rows.count ? begin + p.rows_per_chunk : p.rows.count;
  const float n = static_cast<float>(p.hidden);
  const bool adds = p.grad_summed.data != nullptr;
  float* weight_sums = p.weight_sums == nullptr ? nullptr : p.weight_sums + team.index * p.sums_stride;
  float* bias_sums = p.bias_sums == nullptr ? nullptr : p.bias_sums + team.index * p.sums_stride;
  float weight_sum[kHeldBackward][kVec] = {}, bias_sum[kHeldBackward][kVec] = {};
  int turn = 0;

#pragma unroll 1
  for (int64_t row = begin; row < end; ++row) {
    const RowPlace place = place_of(p.rows, row);
    const T *s_row = row_of<T>(p.summed, place), *grad_row = row_of<T>(p.grad_y, place);
    const T* added_row = row_of<T>(p.grad_summed, place);
    T* grad_x = row_of<T>(p.grad_x, place);

    Vec s[kHeldBackward] = {}, grad[kHeldBackward] = {};
    for_held<kHeldBackward, kVec>(team, p.hidden, [&](int i, int64_t column) {
      s[i] = load_vector<T, kVec>(s_row + column);
      grad[i] = load_vector<T, kVec>(grad_row + column);
    });

    float mean[1] = {};
    if (p.is_centred) {
      const auto take = [&](const Vec& s) {
        for (int k = 0; k < kVec; ++k) mean[0] += to_float(s.lane[k]);
      };
      for_held<kHeldBackward, kVec>(team, p.hidden, [&](int i, int64_t) { take(s[i]); });
      for_rest<kHeldBackward, kVec>(team, p.hidden, [&](int64_t c) { take(load_vector<T, kVec>(s_row + c)); });
      team.sum(mean, turn);
      turn ^= 1;
      mean[0] /= n;
    }
    float sums[3] = {};  // of d^2, d * g and g, for the deviation d from the mean
    const auto take = [&](const Vec& s, const Vec& grad, int64_t column) {
      float weight[kVec];
      load_weight<kVec, W>(p.weight, column, 1.0f, weight);
      for (int k = 0; k < kVec; ++k) {
        const float d = to_float(s.lane[k]) - mean[0], g = to_float(grad.lane[k]) * weight[k];
        sums[0] += d * d;
        sums[1] += d * g;
        sums[2] += g;
      }
    };
    for_held<kHeldBackward, kVec>(team, p.hidden, [&](int i, int64_t column) { take(s[i], grad[i], column); });
    for_rest<kHeldBackward, kVec>(team, p.hidden, [&](int64_t column) {
      take(load_vector<T, kVec>(s_row + column), load_vector<T, kVec>(grad_row + column), column);
    });
    team.sum(sums, turn);
    turn ^= 1;
    const float rstd = rstd_of(sums[0], p.hidden, p.eps);
    const float mean_gh = sums[1] * rstd / n, mean_g = p.is_centred ? sums[2] / n : 0.0f;

    const auto finish = [&](const Vec& s, const Vec& grad, int64_t column, float (&for_weight)[kVec],
                            float (&for_bias)[kVec]) {
      Vec added{};
      if (adds) added = load_vector<T, kVec>(added_row + column);
      float weight[kVec];
      load_weight<kVec, W>(p.weight, column, 1.0f, weight);
      Vec out;
      for (int k = 0; k < kVec; ++k) {
        const float h = (to_float(s.lane[k]) - mean[0]) * rstd, dy = to_float(grad.lane[k]);
        const float dx = (dy * weight[k] - mean_g - h * mean_gh) * rstd;
        out.lane[k] = from_float<T>(adds ? dx + to_float(added.lane[k]) : dx);
        for_weight[k] += dy * h;
        for_bias[k] += dy;
      }
      store_vector<T, kVec>(grad_x + column, out);
    };
    for_held<kHeldBackward, kVec>(
        team, p.hidden, [&](int i, int64_t column) { finish(s[i], grad[i], column, weight_sum[i], bias_sum[i]); });
    for_rest<kHeldBackward, kVec>(team, p.hidden, [&](int64_t column) {
      float for_weight[kVec] = {}, for_bias[kVec] = {};
      if (row > begin && weight_sums != nullptr) load_sums(weight_sums, column, for_weight);
      if (row > begin && bias_sums != nullptr) load_sums(bias_sums, column, for_bias);
      finish(load_vector<T, kVec>(s_row + column), load_vector<T, kVec>(grad_row + column), column, for_weight,
             for_bias);
      if (weight_sums != nullptr) store_sums(weight_sums, column, for_weight);
      if (bias_sums != nullptr) store_sums(bias_sums, column, for_bias);
    });
  }

  for_held<kHeldBackward, kVec>(team, p.hidden, [&](int i, int64_t column) {
    if (weight_sums != nullptr) store_sums(weight_sums, column, weight_sum[i]);
    if (bias_sums != nullptr) store_sums(bias_sums, column, bias_sum[i]);
  });
}

// Sums over the chunks, of dweight in the blocks with y = 0 and of dbias in those with y = 1. A thread adds every
// kColumnLanes-th chunk of one column, in their order; the lanes of a column are added in theirs.
template <class W, bool kSplit>
__global__ void __launch_bounds__(kColumns* kColumnLanes) norm_chunks_kernel(NormBackwardParams p) {
  __shared__ float sSums[kColumnLanes][kColumns];
  const float* sums = blockIdx.y == 0 ? p.weight_sums : p.bias_sums;
  void* grad = blockIdx.y == 0 ? p.grad_weight : p.grad_bias;
  if (sums == nullptr) return;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  float sum = 0.0f;
  if (column < p.hidden) {
    for (int64_t chunk = threadIdx.y; chunk < p.num_chunks; chunk += kColumnLanes) {
      sum += sums[chunk * p.sums_stride + (kSplit ? split_column(column) : column)];
    }
  }
  sSums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();  // all lanes have written their sums
  if (threadIdx.y == 0 && column < p.hidden) {
    for (int lane = 1; lane < kColumnLanes; ++lane) sum += sSums[lane][threadIdx.x];
    static_cast<W*>(grad)[column] = from_float<W>(sum);
  }
}

// Calls f.template operator()<T, W, kVec>() with the widest vectors that hidden and the alignment allow.
template <class F>
void dispatch_types(DType dtype, DType weight_dtype, int64_t hidden, bool aligned, F&& f) {
  dispatch_dtypes(dtype, weight_dtype, [&]<class T, class W>() {
    constexpr int kVec = 16 / sizeof(T);
    if (aligned && hidden % kVec == 0) f.template operator()<T, W, kVec>();
    else f.template operator()<T, W, 1>();
  });
}

// A block of teams, each of as many warps as hold the row in registers, at most max_threads.
dim3 block_of(int64_t hidden, int vec, int held, int max_threads) {
  const int64_t per_warp = static_cast<int64_t>(kWarp) * vec * held, warps = (hidden + per_warp - 1) / per_warp;
  const int threads = warps * kWarp < max_threads ? static_cast<int>(warps) * kWarp : max_threads;
  return dim3(threads, threads == kWarp ? kShortTeams : 1);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

void launch_norm_forward(const NormForwardParams& p, cudaStream_t stream) {
  bool aligned = is_aligned(p.weight) && is_aligned(p.bias);
  for (const RowView* view : {&p.x, &p.residual, &p.y, &p.summed}) {
    aligned = aligned && rows_are_aligned(*view, element_bytes(p.dtype), 16);
  }
  dispatch_types(p.dtype, p.weight_dtype, p.hidden, aligned, [&]<class T, class W, int kVec>() {
    const dim3 block = block_of(p.hidden, kVec, kHeld, kMaxThreads);
    launch("norm_forward", norm_forward_kernel<T, W, kVec>, grid_of("norm_forward", p.rows.count, block.y), block, 0,
           stream, p);
  });
}

void launch_norm_backward(const NormBackwardParams& p, cudaStream_t stream) {
  bool aligned = is_aligned(p.weight) && is_aligned(p.weight_sums) && is_aligned(p.bias_sums);
  for (const RowView* view : {&p.summed, &p.grad_y, &p.grad_summed, &p.grad_x}) {
    aligned = aligned && rows_are_aligned(*view, element_bytes(p.dtype), 16);
  }
  dispatch_types(p.dtype, p.weight_dtype, p.hidden, aligned, [&]<class T, class W, int kVec>() {
    const dim3 block = block_of(p.hidden, kVec, kHeldBackward, kMaxThreads);
    launch("norm_backward", norm_backward_kernel<T, W, kVec>, grid_of("norm_backward", p.num_chunks, block.y), block, 0,
           stream, p);
    if (p.grad_weight == nullptr && p.grad_bias == nullptr) return;
    const dim3 grid(grid_of("norm_backward", p.hidden, kColumns).x, 2);
    launch("norm_backward", norm_chunks_kernel<W, kVec == 8>, grid, dim3(kColumns, kColumnLanes), 0, stream, p);
  });
}

}  // namespace fmkernels
