// SPDX-License-Identifier: Apache-2.0
// paged_kv_attend.cu: attention of a ragged batch over a paged cache; float16 and bfloat16, sm_80 and later.
//                     paged_kv_attend_int8.cu and _float8.cu have the kernels for quantised caches.
//
// Contract   see paged_kv.h; rows of q, o and the caches begin on 16-byte boundaries.
// Rows       (query, head of its group) pairs of a kv head, query major: a group shares every key and value loaded, and
//            16 rows fill a tile of the tensor cores.
// Work       Units: a tile of rows with all its keys, or with one chunk of them, for requests that one tile holds. They
//            are numbered on the device, from the lengths there; grid (kv heads, blocks), a block takes every gridDim.y'th.
//            So the grid follows from shapes alone, and a batch of any mix fills the GPU.
// Bits       A row's arithmetic is the same in every unit: blocks of keys and chunks of 512 tokens at fixed positions, weights
//            summed by fixed classes of keys, chunks merged in their order by the same operations, in the unit or after it.
// Shared     struct AttendSmem: q, overlaid by o; blocks of keys and of values; where the rows of two chunks begin; for warps
//            that share rows, weights on their way from the warps with the keys to those with the columns.
// Pipeline   wait k[i] | B1 | load v[i+s-1] | s = q k[i] | softmax | wait v[i] | B2 | load k[i+s] | o += p v[i];  s stages
// Masks      Rows of the cache that no row of the tile sees are zeros in shared memory, never read. Others that some see
//            and some do not: scores become -infinity, and values that are not finite go around the product.
// Numerics   float32 accumulation, base-2 exponent; o is rescaled only when a maximum grows by more than 2^8. Deterministic.
// Cost       Decode reads each key and value once: bound by memory. Prefill: 4 * visible pairs * dim flops.
// After      Dao 2023, FlashAttention-2; Kwon et al. 2023, PagedAttention.

#include "paged_kv_attend_kernel_cuda.h"

namespace fmkernels {
namespace {

// Merges the chunks of split requests, a warp for a row; a block takes every gridDim.y'th request of a kv head.
template <class Element, int kRows, bool kTall>
__global__ void __launch_bounds__(kListed, 10) paged_kv_merge_chunks_kernel(const __grid_constant__ AttendArgs a) {
  __shared__ WorkList list;
  const PagedAttendParams& p = a.p;
  const int lane = threadIdx.x % kWarp, v_head_dim = static_cast<int>(p.cache.v_head_dim);
  Work<kRows, kTall> work(a, list);
  const int64_t step = static_cast<int64_t>(gridDim.x) * a.partials.rows;  // from a slot to the next
  const ScaleView& scale = p.cache.v_scale;
  const float value_scale =
      scale.data != nullptr && !scale.per_token ? scale.data[blockIdx.x * scale.head_stride] : 1.0f;
  for (int b = blockIdx.y; b < static_cast<int>(p.batch); b += gridDim.y) {
    const int first_slot = work.entry_of(a, b).slot_begin;
    if (first_slot < 0) continue;
    const Request r = request_of(a, b);
    const Range chunks = chunks_of(a, r);
    const int num_chunks = chunks.end - chunks.begin;
    for (int row = threadIdx.x / kWarp; row < r.seq_q * a.group.value(); row += kListWarps) {
      const int64_t first = (first_slot * static_cast<int64_t>(gridDim.x) + blockIdx.x) * a.partials.rows + row;
      const float2* stats = reinterpret_cast<const float2*>(a.partials.stats) + first;
      const float* of_chunk = a.partials.o + first * v_head_dim + lane * 2;
      RowTotal total{-INFINITY, 0.0f};
      constexpr int kPairs = kMaxHeadDim / (2 * kWarp);
      float2 o[kPairs] = {};
#pragma unroll 4
      for (int chunk = 0; chunk < num_chunks; ++chunk) {
        const float2 s = stats[chunk * step];
        const MergeFactors f = merge_total(total, {s.x, s.y});
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          if (2 * (i * kWarp + lane) >= v_head_dim) break;
          const float2 x = *reinterpret_cast<const float2*>(of_chunk + chunk * step * v_head_dim + 2 * i * kWarp);
          o[i] = {merged(o[i].x, x.x, f), merged(o[i].y, x.y, f)};
        }
      }
      const int query = row / a.group;
      const int64_t head = static_cast<int64_t>(blockIdx.x) * a.group.value() + row % a.group,
                    token = r.q_start + query;
      const RowResult result = result_of(total, p.sinks, head);
      const float factor = __fmul_rn(result.factor, value_scale);
      if (lane == 0) p.lse[head * p.lse_head_stride + token] = result.lse;
      Element* to = static_cast<Element*>(p.o.data) + token * p.o.token_stride + head * p.o.head_stride + lane * 2;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (2 * (i * kWarp + lane) >= v_head_dim) break;
        *reinterpret_cast<uint32_t*>(to + 2 * i * kWarp) =
            ptx::pack<Element>(__fmul_rn(o[i].x, factor), __fmul_rn(o[i].y, factor));
      }
    }
  }
}

template <class Element, int kRows, bool kTall>
void launch_merge(const PagedAttendCall& call, cudaStream_t stream) {
  if (shape_of(call.p, kTall).num_slots == 0) return;
  launch("paged_kv_merge_chunks", paged_kv_merge_chunks_kernel<Element, kRows, kTall>, grid_of(call.p, call.p.batch),
         kListed, 0, stream, args_of(call, kTall));
}

}  // namespace

int64_t paged_kv_attend_workspace_floats(const PagedAttendParams& p) {
  return shape_of(p, false).workspace_floats(p) + shape_of(p, true).workspace_floats(p);
}

void launch_paged_kv_attend(const PagedAttendCall& call, cudaStream_t stream) {
  dispatch_half(call.p.dtype, [&]<class Element>() {
    if (call.p.cache.dtype == CacheDType::kInt8) launch_paged_kv_attend_int8(call, stream);
    else if (call.p.cache.dtype == CacheDType::kFloat8E4M3) launch_paged_kv_attend_float8(call, stream);
    else launch_stored<Element, Element>(call, stream);
    launch_merge<Element, kShortRows, false>(call, stream);
    if (bucket_of_dims(call.p) == 256) launch_merge<Element, 32, true>(call, stream);
    else launch_merge<Element, 64, true>(call, stream);
  });
}

}  // namespace fmkernels
