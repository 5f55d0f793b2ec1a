// SPDX-License-Identifier: Apache-2.0
// sampling_cpu.cpp: the CPU kernel of sampling.
//
// Work       A task is one row.
// Pass       x and its maximum | weights and their sum | where something is filtered, a histogram of x | the draw. Of the
//            histogram only the bin in which a filter ends is sorted. A small top_k needs the first pass alone.
// Numerics   Integers where an order could matter: the tokens are those of the CUDA kernel, bit by bit.
// Cost       16 bytes of cache a token, read two or three times; twice that where something is filtered.

#include "sampling.h"

#include <algorithm>
#include <cmath>

#include "../common/dispatch.h"
#include "../common/fixed_weight_cpu.h"
#include "../common/parallel.h"
#include "../common/vec.h"

namespace fmkernels {
namespace {

constexpr int kBins = 2048;
constexpr float kBinsPerUnit = 32.0f;
constexpr int64_t kBlock = 64;  // tokens whose largest x, and whose sum of weights, is taken together
constexpr int64_t kNotTold = -2;
constexpr float kInfinity = __builtin_inff();

struct Candidate {
  float x;
  int32_t id;
};
bool comes_before(const Candidate& a, const Candidate& b) { return a.x > b.x || (a.x == b.x && a.id < b.id); }

struct Bin {
  int64_t count;
  uint64_t weight;
};

// What a worker needs for a row.
struct Scratch {
  float* x;            // [vocab]
  uint64_t* weight;    // [vocab]
  Candidate* members;  // [vocab]
  int32_t* bin;        // [vocab]
  Bin* bins;           // [kBins]
  float* block_max;    // [blocks], and as many for a copy

  static int64_t num_blocks(int64_t vocab) { return (vocab + kBlock - 1) / kBlock; }
  static int64_t num_bytes(int64_t vocab) {
    return Arena::array_bytes<float>(vocab) + Arena::array_bytes<uint64_t>(vocab) +
           Arena::array_bytes<Candidate>(vocab) + Arena::array_bytes<int32_t>(vocab) + Arena::array_bytes<Bin>(kBins) +
           Arena::array_bytes<float>(2 * num_blocks(vocab));
  }
  Scratch(char* memory, int64_t vocab) {
    Arena arena(memory);
    x = arena.take<float>(vocab);
    weight = arena.take<uint64_t>(vocab);
    members = arena.take<Candidate>(vocab);
    bin = arena.take<int32_t>(vocab);
    bins = arena.take<Bin>(kBins);
    block_max = arena.take<float>(2 * num_blocks(vocab));
  }
};

// The last token, in the order of falling x and rising id, that may be drawn; and the sum of weights up to it.
struct Cut {
  Candidate last;
  uint64_t total;
};

FM_INLINE float largest_lane(VecF x) {
  float result = x[0];
  for (int i = 1; i < kLanes; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// x of all tokens, and the largest of each block; their maximum, NaN where one is.
template <class T>
float fill(const SamplingRow& r, const T* logits, int64_t vocab, const Scratch& s) {
  int64_t v = 0;
  for (; v + kLanes <= vocab; v += kLanes) store(s.x + v, load(logits + v) + VecF{});
  for (; v < vocab; ++v) s.x[v] = to_float(logits[v]) + 0.0f;
  if (r.has_penalties) {
    for (int64_t i = 0; i < vocab; ++i) s.x[i] = adjusted_logit(r, s.x[i], i);
  }
  VecI is_nan{};
  float result = -kInfinity;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, vocab);
    VecF top = broadcast(-kInfinity);
    for (v = begin; v + kLanes <= end; v += kLanes) {
      const VecF lanes = load(s.x + v);
      top = max(lanes, top);
      is_nan |= lanes != lanes;
    }
    float block_max = largest_lane(top);
    for (; v < end; ++v) {
      block_max = s.x[v] > block_max ? s.x[v] : block_max;
      is_nan[0] |= s.x[v] != s.x[v];
    }
    s.block_max[begin / kBlock] = block_max;
    result = std::max(result, block_max);
  }
  for (int i = 0; i < kLanes; ++i) result = is_nan[i] != 0 ? __builtin_nanf("") : result;
  return result;
}

int64_t first_of(const float* x, int64_t vocab, float value) {
  for (int64_t v = 0; v < vocab; ++v) {
    if (x[v] == value) return v;
  }
  return -1;
}

#ifdef __AVX2__
// The operations of exp_bits, eight tokens at a time.
FM_INLINE __m256 exp_bits(__m256 x) {
  const auto all = [](float value) { return _mm256_set1_ps(value); };
  const __m256 shifter = all(0x1.8p23f + 127.0f);
  x = _mm256_max_ps(all(-88.0f), x);
  const __m256 shifted = _mm256_fmadd_ps(x, all(1.442695041f), shifter), n = _mm256_sub_ps(shifted, shifter);
  const __m256 r = _mm256_fmadd_ps(n, all(2.121944401e-4f), _mm256_fmadd_ps(n, all(-0.693359375f), x));
  __m256 p = _mm256_fmadd_ps(r, all(1.383684614e-3f), all(8.374815799e-3f));
  for (float term : {4.166822557e-2f, 1.666642017e-1f, 4.999999208e-1f, 1.0f, 1.0f})
    p = _mm256_fmadd_ps(p, r, all(term));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
}
#endif

uint64_t fill_weights(const float* x, int64_t vocab, float max, float temperature, uint64_t* weight) {
  uint64_t total = 0;
  int64_t v = 0;
#ifdef __AVX2__
  __m256i sum = _mm256_setzero_si256();
  for (; v + 8 <= vocab; v += 8) {
    const __m256 lanes = _mm256_loadu_ps(x + v), largest = _mm256_set1_ps(max);
    const __m256 below = _mm256_div_ps(_mm256_sub_ps(lanes, largest), _mm256_set1_ps(temperature));
    const __m256 is_largest = _mm256_cmp_ps(lanes, largest, _CMP_EQ_OQ);
    const Weights8 weights = weights_of(exp_bits(_mm256_andnot_ps(is_largest, below)));
    sum = _mm256_add_epi64(sum, store_weights(weight + v, weights));
  }
  total = sum_of_lanes(sum);
#endif
  for (; v < vocab; ++v) {
    weight[v] = sampling_weight(x[v], max, temperature);
    total += weight[v];
  }
  return total;
}

// Falls with rising x.
FM_INLINE VecI bin_of(VecF x, float max) {
  const VecF distance = (max - x) * kBinsPerUnit, last = broadcast(kBins - 1);
  const VecF bounded = distance < last ? distance : last;
  return x == max ? VecI{} : __builtin_convertvector(bounded, VecI);
}

// The bins of all tokens, and what of S1 is in each.
void fill_bins(const Scratch& s, int64_t vocab, float max, uint64_t min_weight) {
  std::fill_n(s.bins, kBins, Bin{});
  int64_t v = 0;
  for (; v + kLanes <= vocab; v += kLanes) {
    const VecI bin = bin_of(load(s.x + v), max);
    memcpy(s.bin + v, &bin, sizeof bin);
  }
  for (; v < vocab; ++v) s.bin[v] = bin_of(broadcast(s.x[v]), max)[0];
  for (v = 0; v < vocab; ++v) {
    const bool is_member = s.weight[v] >= min_weight;
    Bin& bin = s.bins[s.bin[v]];
    bin.count += is_member;
    bin.weight += is_member ? s.weight[v] : 0;
  }
}

// The members of a bin of S1, sorted; how many.
int64_t sorted_members(const Scratch& s, int64_t vocab, uint64_t min_weight, int bin) {
  int64_t count = 0;
  const auto take = [&](int64_t v) {
    if (s.bin[v] == bin && s.weight[v] >= min_weight) s.members[count++] = {s.x[v], static_cast<int32_t>(v)};
  };
  constexpr int64_t kTurn = 32;
  int64_t begin = 0;
  for (; begin + kTurn <= vocab; begin += kTurn) {
    int32_t found = 0;
    for (int64_t i = 0; i < kTurn; ++i) found |= s.bin[begin + i] == bin;
    for (int64_t v = begin; found != 0 && v < begin + kTurn; ++v) take(v);
  }
  for (; begin < vocab; ++begin) take(begin);
  std::sort(s.members, s.members + count, comes_before);
  return count;
}

// S3 of a row whose options leave something out.
Cut filtered(const SamplingRow& r, const Scratch& s, int64_t vocab, float max) {
  fill_bins(s, vocab, max, r.min_weight);
  // The bins before `end` are in S2 as a whole, of `end` the first `rest` of its members, if any.
  int end = 0;
  int64_t count = 0, rest = 0;
  uint64_t total = 0;
  while (end < kBins && count + s.bins[end].count <= r.top_k) {
    count += s.bins[end].count;
    total += s.bins[end++].weight;
  }
  if (end < kBins) {
    rest = r.top_k - count;
    if (rest > 0) sorted_members(s, vocab, r.min_weight, end);
    for (int64_t i = 0; i < rest; ++i) total += s.weight[s.members[i].id];
  }
  // Tokens without weight are never drawn: where nothing is left out by top_p, all weight is wanted.
  const uint64_t wanted = r.top_p < 1.0f ? share_of(r.top_p, total) : total;
  uint64_t sum = 0;
  int bin = 0;
  while (bin < end && sum + s.bins[bin].weight < wanted) sum += s.bins[bin++].weight;
  const int64_t members = bin < end ? sorted_members(s, vocab, r.min_weight, bin) : rest;
  int64_t i = 0;
  while ((sum += s.weight[s.members[i].id]) < wanted && i + 1 < members) ++i;
  return {s.members[i], sum};
}

int64_t draw(const SamplingRow& r, const Scratch& s, int64_t vocab, const Cut& cut, uint64_t bits) {
  const uint64_t number = uniform_below(cut.total, bits);
  const auto weight_at = [&](int64_t v) {
    const bool is_member = (s.x[v] > cut.last.x) | ((s.x[v] == cut.last.x) & (v <= cut.last.id));
    return is_member & (s.weight[v] >= r.min_weight) ? s.weight[v] : uint64_t{0};
  };
  return first_above<kBlock>(vocab, number, weight_at);
}

// The token of a row with a top_k below its number of blocks: no token outside the top_k is weighed. Every block whose
// largest x is among the top_k of these holds one token at or above the last of them, so that the first top_k tokens are
// at or above it. kNotTold where min_p may keep others beyond.
int64_t draw_of_top(const SamplingRow& r, const Scratch& s, int64_t vocab, float max, uint64_t bits) {
  const int64_t num_blocks = Scratch::num_blocks(vocab);
  float* sorted = s.block_max + num_blocks;
  std::copy_n(s.block_max, num_blocks, sorted);
  std::nth_element(sorted, sorted + (r.top_k - 1), sorted + num_blocks, [](float a, float b) { return a > b; });
  const float bound = sorted[r.top_k - 1];
  int64_t count = 0;
  for (int64_t block = 0; block < num_blocks; ++block) {
    if (s.block_max[block] < bound) continue;
    for (int64_t v = block * kBlock; v < std::min((block + 1) * kBlock, vocab); ++v) {
      if (s.x[v] >= bound && (r.min_weight == 0 || sampling_weight(s.x[v], max, r.temperature) >= r.min_weight)) {
        s.members[count++] = {s.x[v], static_cast<int32_t>(v)};
      }
    }
  }
  // min_p keeps fewer, or more below the bound: weights there are below its own, but for rounding
  if (count < r.top_k) {
    const uint64_t at_bound = sampling_weight(bound, max, r.temperature);
    if (at_bound + (at_bound >> 18) + 2 >= r.min_weight) return kNotTold;
  }
  const int64_t kept = std::min(count, r.top_k);
  std::partial_sort(s.members, s.members + kept, s.members + count, comes_before);
  uint64_t total = 0, sum = 0;
  for (int64_t i = 0; i < kept; ++i) total += s.weight[i] = sampling_weight(s.members[i].x, max, r.temperature);
  const uint64_t wanted = r.top_p < 1.0f ? share_of(r.top_p, total) : total;
  int64_t end = 0;
  while (sum < wanted) sum += s.weight[end++];
  std::sort(s.members, s.members + end, [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  const uint64_t number = uniform_below(sum, bits);
  uint64_t up_to = 0;
  for (int64_t i = 0;; ++i) {
    up_to += sampling_weight(s.members[i].x, max, r.temperature);
    if (up_to > number) return s.members[i].id;
  }
}

template <class T>
float logprob_of(const T* logits, int64_t vocab, int64_t token) {
  VecF top = broadcast(-kInfinity);
  int64_t v = 0;
  for (; v + kLanes <= vocab; v += kLanes) top = max(load(logits + v), top);
  float largest = largest_lane(top);
  for (; v < vocab; ++v) largest = std::max(largest, to_float(logits[v]));
  double sum = 0.0;
  v = 0;
  for (; v + 16 * kLanes <= vocab; v += 16 * kLanes) {
    VecF part{};
    for (int i = 0; i < 16; ++i) part += exp_nonpositive(load(logits + v + i * kLanes) - largest);
    sum += horizontal_sum(part);
  }
  for (; v < vocab; ++v) sum += exp_nonpositive(broadcast(to_float(logits[v]) - largest))[0];
  return (to_float(logits[token]) - largest) - static_cast<float>(std::log(sum));
}

template <class T>
int64_t sample(const SamplingParams& p, int64_t row, const T* logits, const Scratch& s) {
  const SamplingRow r = sampling_row(p, row);
  const float max = fill(r, logits, p.vocab, s);
  if (!(max > -kInfinity)) return -1;
  if (r.temperature == 0.0f) return first_of(s.x, p.vocab, max);
  const uint64_t bits = random_bits(p.seed[row], p.offset[row], 0, kSamplingStream);
  if (r.top_k <= Scratch::num_blocks(p.vocab) && r.top_k < p.vocab) {
    const int64_t token = draw_of_top(r, s, p.vocab, max, bits);
    if (token != kNotTold) return token;
  }
  Cut cut{{-kInfinity, static_cast<int32_t>(p.vocab)}, fill_weights(s.x, p.vocab, max, r.temperature, s.weight)};
  if (r.top_k < p.vocab || r.top_p < 1.0f || r.min_weight > 0) cut = filtered(r, s, p.vocab, max);
  return draw(r, s, p.vocab, cut, bits);
}

}  // namespace

template <>
void run_sampling<kIsa>(const SamplingParams& p) {
  const int workers = static_cast<int>(std::min<int64_t>(workers_for(p.batch * p.vocab * 16), p.batch));
  const int64_t scratch_bytes = Scratch::num_bytes(p.vocab);
  const Workspace workspace(workers * scratch_bytes);
  dispatch_dtype(p.dtype, [&]<class T>() {
    parallel_for(p.batch, workers, [&](int64_t row, int worker) {
      const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride;
      const int64_t token = sample(p, row, logits, Scratch(workspace.data() + worker * scratch_bytes, p.vocab));
      p.tokens[row] = token;
      if (p.logprobs != nullptr) {
        p.logprobs[row] = token < 0 ? __builtin_nanf("") : logprob_of(logits, p.vocab, token);
      }
    });
  });
}

}  // namespace fmkernels
