// SPDX-License-Identifier: Apache-2.0
// rope.cu: the CUDA kernel of the rotary embedding.
//
// Contract   see rope.h. kVec elements are read at a time where every head, its halves and the rows of the cache begin on
//            a 16-byte boundary, else one.
// Work       A block owns a token. A thread owns kVec columns, with cos and sin in registers, of every n-th head, first of
//            q and then of k, so that a warp walks neighbouring heads. Columns beyond rotary_dim are copied.
// Shared     none.
// Numerics   float32. Deterministic.
// Cost       2 elements of memory an element: bound by memory on every GPU.

#include "rope.h"

#include "../common/dispatch.h"
#include "../common/launch.h"
#include "../common/vector_cuda.h"

namespace fmkernels {
namespace {

constexpr int kThreads = 256;

template <class T>
struct Heads {
  const T* in;  // of the token
  T* out;
};

template <class T>
__device__ __forceinline__ Heads<T> heads_of(const RopeSide& side, int64_t batch, int64_t token) {
  return {static_cast<const T*>(side.in) + batch * side.in_stride[0] + token * side.in_stride[1],
          static_cast<T*>(side.out) + batch * side.out_stride[0] + token * side.out_stride[1]};
}

// The columns of `num_columns` that this thread owns, kVec at a time, and its first head among those walked at once.
struct Walk {
  int columns, head, heads_at_once;
  int64_t first;

  __device__ Walk(int64_t num_vectors) {
    columns = num_vectors < kThreads ? static_cast<int>(num_vectors) : kThreads;
    heads_at_once = kThreads / columns;
    head = threadIdx.x / columns;
    first = threadIdx.x % columns;
  }
  __device__ bool is_idle() const { return head >= heads_at_once; }
};

// f(in, out) of every head of q and k that this thread walks. Two calls and no loop over pointers to q and k, which would
// copy the parameters to local memory.
template <class T, class F>
__device__ __forceinline__ void for_each_head(const RopeSide& side, const Walk& walk, int64_t batch, int64_t token,
                                              F&& f) {
  const Heads<T> heads = heads_of<T>(side, batch, token);
#pragma unroll 1
  for (int64_t head = walk.head; head < side.num_heads; head += walk.heads_at_once) {
    f(heads.in + head * side.in_stride[2], heads.out + head * side.out_stride[2]);
  }
}
template <class T, class F>
__device__ __forceinline__ void for_each_head(const RopeParams& p, const Walk& walk, int64_t batch, int64_t token,
                                              F&& f) {
  for_each_head<T>(p.q, walk, batch, token, f);
  for_each_head<T>(p.k, walk, batch, token, f);
}

template <class W, int kCount>
__device__ __forceinline__ void load_angles(const W* from, float (&to)[kCount]) {
  const auto vector = load_vector<W, kCount>(from);
  for (int i = 0; i < kCount; ++i) to[i] = to_float(vector.lane[i]);
}

// Pairs of columns (i, i + half).
template <class T, class W, int kVec>
__device__ __forceinline__ void rotate_halves(const RopeParams& p, const W* row, int64_t batch, int64_t token) {
  using Vec = Vector<T, kVec>;
  const int64_t half = p.rotary_dim / 2, num_vectors = half / kVec;
  const Walk walk(num_vectors);
  if (walk.is_idle()) return;
  for (int64_t column = walk.first; column < num_vectors; column += walk.columns) {
    float cos[kVec], sin[kVec];
    load_angles(row + column * kVec, cos);
    load_angles(row + half + column * kVec, sin);
    for_each_head<T>(p, walk, batch, token, [&](const T* in, T* out) {
      const Vec u = load_vector<T, kVec>(in + column * kVec), v = load_vector<T, kVec>(in + half + column * kVec);
      Vec first, second;
      for (int i = 0; i < kVec; ++i) {
        const float a = to_float(u.lane[i]), b = to_float(v.lane[i]), s = p.inverse ? -sin[i] : sin[i];
        first.lane[i] = from_float<T>(a * cos[i] - b * s);
        second.lane[i] = from_float<T>(b * cos[i] + a * s);
      }
      store_vector<T, kVec>(out + column * kVec, first);
      store_vector<T, kVec>(out + half + column * kVec, second);
    });
  }
}

// Pairs of neighbouring columns; a vector has kPairs of them.
template <class T, class W, int kPairs>
__device__ __forceinline__ void rotate_neighbours(const RopeParams& p, const W* row, int64_t batch, int64_t token) {
  constexpr int kLoad = kPairs == 1 ? 1 : 2 * kPairs;  // what is not aligned is read one element at a time
  const int64_t half = p.rotary_dim / 2, num_vectors = half / kPairs;
  const Walk walk(num_vectors);
  if (walk.is_idle()) return;
  for (int64_t column = walk.first; column < num_vectors; column += walk.columns) {
    float cos[kPairs], sin[kPairs];
    load_angles(row + column * kPairs, cos);
    load_angles(row + half + column * kPairs, sin);
    for_each_head<T>(p, walk, batch, token, [&](const T* in, T* out) {
      Vector<T, kLoad> x[2 * kPairs / kLoad];
      for (int i = 0; i < 2 * kPairs / kLoad; ++i) x[i] = load_vector<T, kLoad>(in + column * 2 * kPairs + i * kLoad);
      for (int i = 0; i < kPairs; ++i) {
        T &first = x[2 * i / kLoad].lane[2 * i % kLoad], &second = x[(2 * i + 1) / kLoad].lane[(2 * i + 1) % kLoad];
        const float a = to_float(first), b = to_float(second), s = p.inverse ? -sin[i] : sin[i];
        first = from_float<T>(a * cos[i] - b * s);
        second = from_float<T>(b * cos[i] + a * s);
      }
      for (int i = 0; i < 2 * kPairs / kLoad; ++i) store_vector<T, kLoad>(out + column * 2 * kPairs + i * kLoad, x[i]);
    });
  }
}

template <class T, class W, int kVec>
__global__ void __launch_bounds__(kThreads) rope_forward_kernel(RopeParams p) {
  const int64_t batch = blockIdx.x / p.num_tokens, token = blockIdx.x % p.num_tokens;
  const W* row = static_cast<const W*>(p.cos_sin) + cache_row(p, batch, token) * p.cos_sin_stride;
  if (p.interleaved) rotate_neighbours<T, W, kVec == 1 ? 1 : kVec / 2>(p, row, batch, token);
  else rotate_halves<T, W, kVec>(p, row, batch, token);

  if (p.rotary_dim == p.head_dim || !p.copies_rest) return;
  const int64_t num_vectors = (p.head_dim - p.rotary_dim) / kVec;
  const Walk walk(num_vectors);
  if (walk.is_idle()) return;
  for (int64_t column = walk.first; column < num_vectors; column += walk.columns) {
    for_each_head<T>(p, walk, batch, token, [&](const T* in, T* out) {
      const int64_t at = p.rotary_dim + column * kVec;
      store_vector<T, kVec>(out + at, load_vector<T, kVec>(in + at));
    });
  }
}

}  // namespace

void launch_rope_forward(const RopeParams& p, cudaStream_t stream) {
  const int64_t bytes = element_bytes(p.dtype);
  bool aligned = is_aligned_16(p.cos_sin, element_bytes(p.cache_dtype), 0, {p.cos_sin_stride}) &&
                 p.rotary_dim * bytes % 32 == 0;  // of either half of the pairs
  for (const RopeSide* side : {&p.q, &p.k}) {
    const int64_t (&in)[3] = side->in_stride, (&out)[3] = side->out_stride;
    aligned = aligned && is_aligned_16(side->in, bytes, p.head_dim, {in[0], in[1], in[2]}) &&
              is_aligned_16(side->out, bytes, p.head_dim, {out[0], out[1], out[2]});
  }
  const dim3 grid = grid_of("rope_forward", p.batch * p.num_tokens, 1);
  dispatch_dtypes(p.dtype, p.cache_dtype, [&]<class T, class W>() {
    constexpr int kVec = 16 / sizeof(T);
    if (aligned) launch("rope_forward", rope_forward_kernel<T, W, kVec>, grid, kThreads, 0, stream, p);
    else launch("rope_forward", rope_forward_kernel<T, W, 1>, grid, kThreads, 0, stream, p);
  });
}

}  // namespace fmkernels
