// SPDX-License-Identifier: Apache-2.0
// sampling.cu: the CUDA kernel of sampling, one row a block.
//
// Contract   see sampling.h. The tokens are those of the CPU kernel, bit by bit: where an order could matter, integers are
//            added, and the atomics are integer additions in shared memory, which commute.
// Work       grid (batch). A pass is read by the block in order; the draw by warps, each a contiguous part of the row.
// Shared     struct Smem.
// Pipeline   largest x | sum of weights | top_k, then top_p: a radix select of 4 digits of x each, only where the row has
//            them | sums of the warps' parts | the warp with the drawn number walks its part.
// Registers  A multiprocessor holds one block: held to the 64 registers of two, the compiler spills.
// Cost       3 passes over a row without filters, 4 more for each: the row is in L2 after the first.

#include "sampling.h"

#include "../common/block_sum_cuda.h"
#include "../common/dispatch.h"
#include "../common/launch.h"
#include "../common/ptx.h"
#include "../common/vector_cuda.h"

namespace fmkernels {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kDigits = 256;
constexpr int kDigitBits = 8;

struct Smem {
  BlockSum<kWarps> block;
  uint64_t warp_ties[kWarps];  // members with the last key, in the warp's part of the row
  uint64_t digit_weight[kDigits];
  uint32_t digit_count[kDigits];
  uint64_t chosen_below;  // what a select found: the sum before the chosen digit,
  uint32_t chosen_digit;  // and the digit
  uint32_t is_nan;
  int64_t token;
};

// A set of tokens: those with a key above `key`, and of those with this key the `ties` of the lowest ids.
struct Cut {
  uint32_t key;
  uint64_t ties;
  uint64_t total;  // of their weights
};

// Rises with x; no two numbers share one, since -0 does not occur.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = float_bits(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float x_of(uint32_t key) {
  return float_from_bits(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

template <class T>
struct RowView {
  const SamplingRow& options;
  const T* logits;
  int64_t vocab;
  float max;

  __device__ __forceinline__ float x(int64_t v) const { return adjusted_logit(options, to_float(logits[v]), v); }
  __device__ __forceinline__ uint64_t weight(float x) const { return sampling_weight(x, max, options.temperature); }
};

// ---- the filters ----------------------------------------------------------------------------------------------------

// By one warp: the highest digit at which the sum from the highest down reaches `wanted`.
__device__ __forceinline__ void choose_digit(Smem& smem, bool by_weight, uint64_t wanted) {
  constexpr int kPerLane = kDigits / kWarp;
  const int first = kDigits - 1 - threadIdx.x % kWarp * kPerLane;
  const auto at = [&](int digit) { return by_weight ? smem.digit_weight[digit] : uint64_t{smem.digit_count[digit]}; };
  uint64_t own = 0;
  for (int i = 0; i < kPerLane; ++i) own += at(first - i);
  const uint64_t up_to = warp_scan(own);
  uint64_t sum = up_to - own;
  if (sum < wanted && wanted <= up_to) {  // in one lane
    int digit = first;
    while (sum + at(digit) < wanted) sum += at(digit--);
    smem.chosen_digit = static_cast<uint32_t>(digit);
    smem.chosen_below = sum;
  }
}

// The shortest beginning of the set `within`, by falling key and rising id, with `wanted` tokens or weight in it.
template <class T>
__device__ __forceinline__ Cut select(const RowView<T>& row, const Cut& within, bool by_weight, uint64_t wanted,
                                      Smem& smem) {
  uint32_t prefix = 0, mask = 0;
  uint64_t sum = 0;
#pragma unroll 1
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int digit = threadIdx.x; digit < kDigits; digit += kThreads) {
      smem.digit_count[digit] = 0;
      smem.digit_weight[digit] = 0;
    }
    __syncthreads();  // the digits are cleared
#pragma unroll 2
    for (int64_t v = threadIdx.x; v < row.vocab; v += kThreads) {
      const float x = row.x(v);
      const uint32_t key = key_of(x);
      if ((key & mask) != prefix || key <= within.key) continue;
      const uint64_t weight = row.weight(x);
      if (weight < row.options.min_weight) continue;
      const uint32_t digit = key >> shift & (kDigits - 1);
      atomicAdd(&smem.digit_count[digit], 1u);
      if (by_weight) {
        atomicAdd(reinterpret_cast<unsigned long long*>(&smem.digit_weight[digit]),
                  static_cast<unsigned long long>(weight));
      }
    }
    __syncthreads();  // all tokens above the last key of the set are counted
    if (threadIdx.x == 0 && (within.key & mask) == prefix && within.ties > 0) {
      const uint32_t digit = within.key >> shift & (kDigits - 1);
      smem.digit_count[digit] += static_cast<uint32_t>(within.ties);
      if (by_weight) smem.digit_weight[digit] += within.ties * row.weight(x_of(within.key));
    }
    __syncthreads();  // and those that share it
    if (threadIdx.x < kWarp) choose_digit(smem, by_weight, wanted - sum);
    __syncthreads();  // the digit is chosen
    prefix |= smem.chosen_digit << shift;
    mask |= uint32_t{kDigits - 1} << shift;
    sum += smem.chosen_below;
    __syncthreads();  // and read
  }
  const uint64_t weight = row.weight(x_of(prefix)), unit = by_weight ? weight : 1;
  const uint64_t ties = (wanted - sum + unit - 1) / unit;
  return {prefix, ties, by_weight ? sum + ties * weight : 0};
}

// The sum of the weights of a set that `select` has found by count.
template <class T>
__device__ __forceinline__ uint64_t sum_of(const RowView<T>& row, const Cut& cut, Smem& smem) {
  uint64_t sum = 0;
#pragma unroll 2
  for (int64_t v = threadIdx.x; v < row.vocab; v += kThreads) {
    const float x = row.x(v);
    const uint64_t weight = row.weight(x);
    if (key_of(x) > cut.key && weight >= row.options.min_weight) sum += weight;
  }
  return block_reduce(sum, smem.block, Add{}) + cut.ties * row.weight(x_of(cut.key));
}

// ---- the draw -------------------------------------------------------------------------------------------------------

// The first member, by rising id, at which the sum of weights exceeds `number`; written by one lane to smem.token.
template <class T>
__device__ __forceinline__ void draw(const RowView<T>& row, const Cut& cut, uint64_t number, Smem& smem) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t part = (row.vocab + kThreads - 1) / kThreads * kWarp;  // of a warp, in whole turns
  const int64_t begin = warp * part, end = min(begin + part, row.vocab);
  const uint64_t tie_weight = cut.ties > 0 ? row.weight(x_of(cut.key)) : 0;
  // weight of a token without the ties; is_tie where it has the last key
  const auto weight_at = [&](int64_t v, bool& is_tie) -> uint64_t {
    is_tie = false;
    if (v >= end) return 0;
    const float x = row.x(v);
    const uint32_t key = key_of(x);
    const uint64_t weight = row.weight(x);
    if (weight < row.options.min_weight || key < cut.key) return 0;
    is_tie = key == cut.key && cut.ties > 0;
    return key > cut.key ? weight : 0;
  };

  uint64_t sum = 0, ties = 0;
#pragma unroll 2
  for (int64_t v = begin + lane; v < end; v += kWarp) {
    bool is_tie;
    sum += weight_at(v, is_tie);
    ties += is_tie ? 1 : 0;
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    sum += shuffle_xor(sum, step);
    ties += shuffle_xor(ties, step);
  }
  __syncthreads();  // the results of the last reduction have been read
  if (lane == 0) {
    smem.block.warp[warp] = sum;
    smem.warp_ties[warp] = ties;
  }
  __syncthreads();  // every warp has summed its part

  uint64_t before = 0, ties_left = cut.ties;
  for (int w = 0; w < warp; ++w) {
    const uint64_t taken = min(ties_left, smem.warp_ties[w]);
    before += smem.block.warp[w] + taken * tie_weight;
    ties_left -= taken;
  }
  const uint64_t own = smem.block.warp[warp] + min(ties_left, smem.warp_ties[warp]) * tie_weight;
  if (number < before || number - before >= own) return;  // whole warps
#pragma unroll 1
  for (int64_t v = begin + lane; v - lane < end; v += kWarp) {
    bool is_tie;
    uint64_t weight = weight_at(v, is_tie);
    const uint32_t tied = __ballot_sync(ptx::kAllLanes, is_tie);
    if (is_tie && static_cast<uint64_t>(__popc(tied & ((1u << lane) - 1))) < ties_left) weight = tie_weight;
    const uint64_t up_to = before + warp_scan(weight);
    const uint32_t above = __ballot_sync(ptx::kAllLanes, up_to > number);
    if (above != 0) {
      if (lane == __ffs(static_cast<int>(above)) - 1) smem.token = v;
      return;
    }
    before = static_cast<uint64_t>(__shfl_sync(ptx::kAllLanes, static_cast<unsigned long long>(up_to), kWarp - 1));
    ties_left -= min(ties_left, static_cast<uint64_t>(__popc(tied)));
  }
}

// Sum of exp(logits - largest), in one order; every thread holds it.
template <class T>
__device__ __forceinline__ float logprob_of(const T* logits, int64_t vocab, int64_t token, Smem& smem) {
  uint64_t largest_key = 0;
#pragma unroll 2
  for (int64_t v = threadIdx.x; v < vocab; v += kThreads) {
    largest_key = max(largest_key, uint64_t{key_of(to_float(logits[v]) + 0.0f)});
  }
  const float largest = x_of(static_cast<uint32_t>(block_reduce(largest_key, smem.block, Largest{})));
  float sum = 0.0f;
#pragma unroll 2
  for (int64_t v = threadIdx.x; v < vocab; v += kThreads) sum += expf(to_float(logits[v]) - largest);
  sum = warp_sum(sum);
  __syncthreads();  // the results of the last reduction have been read
  if (threadIdx.x % kWarp == 0) smem.block.warp[threadIdx.x / kWarp] = float_bits(sum);
  __syncthreads();  // every warp has written
  sum = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) sum += float_from_bits(static_cast<uint32_t>(smem.block.warp[warp]));
  return (to_float(logits[token]) - largest) - logf(sum);
}

template <class T>
__device__ __forceinline__ int64_t token_of(const SamplingParams& p, int64_t index, const SamplingRow& options,
                                            const T* logits, Smem& smem) {
  RowView<T> row{options, logits, p.vocab, 0.0f};
  if (threadIdx.x == 0) smem.is_nan = 0;
  __syncthreads();    // is_nan is cleared
  uint64_t best = 0;  // key, then the lowest id
#pragma unroll 2
  for (int64_t v = threadIdx.x; v < p.vocab; v += kThreads) {
    const float x = row.x(v);
    if (x != x) smem.is_nan = 1;
    best = max(best, uint64_t{key_of(x)} << 32 | (0xffffffffu - static_cast<uint32_t>(v)));
  }
  best = block_reduce(best, smem.block, Largest{});
  row.max = x_of(static_cast<uint32_t>(best >> 32));
  if (smem.is_nan != 0 || row.max == -INFINITY) return -1;
  if (options.temperature == 0.0f) return static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(best));

  uint64_t sum = 0, count = 0;
#pragma unroll 2
  for (int64_t v = threadIdx.x; v < p.vocab; v += kThreads) {
    const uint64_t weight = row.weight(row.x(v));
    if (weight < options.min_weight) continue;
    sum += weight;
    ++count;
  }
  Cut cut{0, 0, block_reduce(sum, smem.block, Add{})};  // no x has the key 0
  count = block_reduce(count, smem.block, Add{});
#pragma unroll 1
  for (int by_weight = 0; by_weight < 2; ++by_weight) {  // top_k, then top_p: one copy of the code
    if (by_weight ? options.top_p == 1.0f : static_cast<uint64_t>(options.top_k) >= count) continue;
    const uint64_t wanted = by_weight ? share_of(options.top_p, cut.total) : static_cast<uint64_t>(options.top_k);
    cut = select(row, cut, by_weight != 0, wanted, smem);
    if (!by_weight) cut.total = sum_of(row, cut, smem);
  }
  draw(row, cut, uniform_below(cut.total, random_bits(p.seed[index], p.offset[index], 0, kSamplingStream)), smem);
  __syncthreads();  // one lane has written the token
  return smem.token;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) sampling_kernel(SamplingParams p) {
  Smem& smem = dynamic_smem<Smem>();
  const int64_t index = blockIdx.x;
  const SamplingRow options = sampling_row(p, index);
  const T* logits = static_cast<const T*>(p.logits) + index * p.logits_stride;
  const int64_t token = token_of(p, index, options, logits, smem);
  const float logprob = p.logprobs == nullptr || token < 0 ? NAN : logprob_of(logits, p.vocab, token, smem);
  if (threadIdx.x == 0) {
    p.tokens[index] = token;
    if (p.logprobs != nullptr) p.logprobs[index] = logprob;
  }
}

}  // namespace

void launch_sampling(const SamplingParams& p, cudaStream_t stream) {
  dispatch_dtype(p.dtype, [&]<class T>() {
    launch("sampling", sampling_kernel<T>, grid_of("sampling", p.batch, 1), kThreads, sizeof(Smem), stream, p);
  });
}

}  // namespace fmkernels
