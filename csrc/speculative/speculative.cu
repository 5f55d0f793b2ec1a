// SPDX-License-Identifier: Apache-2.0
// speculative.cu: the CUDA kernel of speculative verification, one request a block.
//
// Contract   see speculative.h. The tokens are those of the CPU kernel, bit by bit: sums are of integers, everything else
//            is a single IEEE operation, and all threads of a block take the same decisions.
// Work       grid (batch). A walk from the root; each place takes a pass over its p and its q.
// Shared     struct Smem.
// Pipeline   sums of p and q | a coin for each child | the sum of R after a rejection | the draw: sums of the warps' parts,
//            then the warp with the number walks its part.
// Cost       4 bytes a token and pass; a request of k accepted tokens reads at least k + 1 rows of p, and k of q.

#include "speculative.h"

#include "../common/block_sum_cuda.h"
#include "../common/launch.h"

namespace fmkernels {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

struct Smem {
  BlockSum<kWarps> block;
  int64_t token;
};

// R of one place: max(p - floor(alpha q), 0), or without q, p but for the tokens of rejected children.
struct Residual {
  const SpeculativeParams& params;
  int64_t row, place, rejected_end;  // children below this node are rejected
  const float *target, *draft;       // draft: null where there is none, or the place is the last
  double alpha;

  __device__ __forceinline__ uint64_t operator()(int64_t v) const {
    const uint64_t p = probability_weight(target[v]);
    if (params.draft != nullptr) return alpha == 0.0 ? p : residual_weight(p, probability_weight(draft[v]), alpha);
    for (int64_t node = place + 1; node < rejected_end; ++node) {
      if (draft_parent(params, row, node) == place && draft_token(params, row, node) == v) return 0;
    }
    return p;
  }
};

// Sum of f(v) over the vocabulary; every thread holds it.
template <class F>
__device__ __forceinline__ uint64_t sum_over(int64_t vocab, Smem& smem, const F& f) {
  uint64_t sum = 0;
  for (int64_t v = threadIdx.x; v < vocab; v += kThreads) sum += f(v);
  return block_reduce(sum, smem.block, Add{});
}

// Sum of a row of probabilities, 0 where one is NaN.
__device__ uint64_t sum_of(const float* x, int64_t vocab, Smem& smem) {
  bool is_nan = false;
  const uint64_t sum = sum_over(vocab, smem, [&](int64_t v) {
    is_nan |= x[v] != x[v];
    return probability_weight(x[v]);
  });
  return __syncthreads_or(is_nan) != 0 ? 0 : sum;
}

// The first token at which the sum of R exceeds `number`; every thread holds it.
__device__ int64_t draw(const Residual& r, int64_t vocab, uint64_t number, Smem& smem) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t part = (vocab + kThreads - 1) / kThreads * kWarp;  // of a warp, in whole turns
  const int64_t begin = warp * part, end = min(begin + part, vocab);
  uint64_t sum = 0;
  for (int64_t v = begin + lane; v < end; v += kWarp) sum += r(v);
  for (int step = kWarp / 2; step > 0; step /= 2) sum += shuffle_xor(sum, step);
  __syncthreads();  // the results of the last reduction have been read
  if (lane == 0) smem.block.warp[warp] = sum;
  __syncthreads();  // every warp has summed its part
  uint64_t before = 0;
  for (int w = 0; w < warp; ++w) before += smem.block.warp[w];
  if (number >= before && number - before < sum) {  // one warp
    for (int64_t turn = begin; turn < end; turn += kWarp) {
      const int64_t v = turn + lane;
      const uint64_t up_to = before + warp_scan(v < end ? r(v) : 0);
      const uint32_t above = __ballot_sync(ptx::kAllLanes, up_to > number);
      if (above != 0) {
        if (lane == __ffs(static_cast<int>(above)) - 1) smem.token = v;
        break;
      }
      before = static_cast<uint64_t>(__shfl_sync(ptx::kAllLanes, static_cast<unsigned long long>(up_to), kWarp - 1));
    }
  }
  __syncthreads();  // one lane has written the token
  return smem.token;
}

__global__ void __launch_bounds__(kThreads) speculative_kernel(SpeculativeParams params) {
  Smem& smem = dynamic_smem<Smem>();
  const int64_t row = blockIdx.x, num_nodes = params.num_nodes, vocab = params.vocab;
  const int64_t seed = params.seed[row], offset = params.offset[row];
  int64_t *tokens = params.tokens + row * (num_nodes + 1), *nodes = params.nodes + row * num_nodes;
  int64_t place = -1, accepted = 0, last = -1;
  for (bool moved = true; moved;) {
    moved = false;
    const float* target = params.target + row * params.target_stride[0] + (place + 1) * params.target_stride[1];
    // The last place has no children, and no row of q.
    const float* draft = params.draft == nullptr || place + 1 >= num_nodes
                             ? nullptr
                             : params.draft + row * params.draft_stride[0] + (place + 1) * params.draft_stride[1];
    Residual r{params, row, place, place + 1, target, draft, 0.0};
    uint64_t r_sum = sum_of(target, vocab, smem), q_sum = 1;
    bool has_q = false;
    for (int64_t node = place + 1; r_sum > 0 && node < num_nodes && !moved; ++node) {
      const int64_t token = draft_token(params, row, node);
      if (token < 0 || draft_parent(params, row, node) != place) continue;
      if (draft != nullptr && !has_q) {
        q_sum = sum_of(draft, vocab, smem);
        has_q = true;
      }
      if (q_sum == 0) {
        r_sum = 0;
        break;
      }
      const uint64_t coin = random_bits(seed, offset, static_cast<uint32_t>(node + 1), kSpeculativeStream);
      const uint64_t r_token = r(token), q_token = has_q ? probability_weight(draft[token]) : 1;
      if (accepts(coin, r_token, r_sum, q_token, q_sum)) {
        if (threadIdx.x == 0) {
          tokens[accepted] = token;
          nodes[accepted] = node;
        }
        ++accepted;
        place = node;
        moved = true;
      } else if (!has_q) {
        r_sum -= r_token;
        r.rejected_end = node + 1;
      } else {
        r.alpha += static_cast<double>(r_sum) / static_cast<double>(q_sum);
        r_sum = sum_over(vocab, smem, r);
        if (r_sum == 0) {  // rounding took the last of it
          r.alpha = 0.0;
          r_sum = sum_over(vocab, smem, r);
        }
      }
    }
    if (!moved && r_sum > 0) {
      const uint64_t bits = random_bits(seed, offset, 0, kSpeculativeStream);
      last = draw(r, vocab, uniform_below(r_sum, bits), smem);
    }
  }
  if (threadIdx.x == 0) {
    params.num_accepted[row] = accepted;
    tokens[accepted] = last;
    for (int64_t i = accepted + 1; i <= num_nodes; ++i) tokens[i] = -1;
    for (int64_t i = accepted; i < num_nodes; ++i) nodes[i] = -1;
  }
}

}  // namespace

void launch_speculative(const SpeculativeParams& p, cudaStream_t stream) {
  launch("speculative", speculative_kernel, grid_of("speculative", p.batch, 1), kThreads, sizeof(Smem), stream, p);
}

}  // namespace fmkernels
