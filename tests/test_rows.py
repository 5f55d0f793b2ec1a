# SPDX-License-Identifier: Apache-2.0
"""Rows of tensors, csrc/common/rows.h and row_tensors.h, and pairs of vectors on the CPU, csrc/common/vec_pair.h."""

import itertools

import torch

from fmkernels import rms_norm, swiglu

PLACES = """
#include "common/rows.h"
#include <cstdio>

int main() {
  const fmkernels::Rows rows{2 * 3 * 1 * 5, {2, 3, 1, 5}, false}, flat{7, {1, 1, 1, 7}, true};
  const fmkernels::RowView view{nullptr, {1000, 100, 7, 11}};
  for (int64_t row = 0; row < rows.count; ++row) std::printf("%lld ", (long long)offset_of(view, place_of(rows, row)));
  for (int64_t row = 0; row < flat.count; ++row) std::printf("%lld ", (long long)offset_of(view, place_of(flat, row)));
  const fmkernels::Rows large{int64_t{3} << 40, {3, 1, 1, int64_t{1} << 40}, false};
  std::printf("%lld", (long long)offset_of(view, place_of(large, (int64_t{2} << 40) + 5)));
}
"""

PAIRS = """
#include "common/vec_pair.h"
#include <cstdio>

using namespace fmkernels;

template <class T>
int wrong() {
  int wrong = 0;
  float values[kPairLanes];
  T stored[kPairLanes], expected[kPairLanes];
  uint32_t bits = 0x12345678u;
  for (int round = 0; round < 200000; ++round) {
    for (int i = 0; i < kPairLanes; ++i) {
      bits = bits * 1664525u + 1013904223u;
      values[i] = round % 16 == 0 ? float_from_bits(bits | 0x7f800000u) : float_from_bits(bits);  // many NaN
      expected[i] = from_float<T>(values[i]);
    }
    const VecPair x = load_pair_as<T>(values);  // in the order of T
    store_pair(stored, x);
    wrong += memcmp(stored, expected, sizeof stored) != 0;
    const VecPair again = in_order<T>(load_pair(stored)), rounded = in_order<T>(rounded_to<T>(x));
    for (int i = 0; i < kPairLanes; ++i) {
      const float truth = to_float(expected[i]), a = i < kLanes ? again.a[i] : again.b[i - kLanes],
                  b = i < kLanes ? rounded.a[i] : rounded.b[i - kLanes];
      wrong += float_bits(a) != float_bits(truth) || float_bits(b) != float_bits(truth);
    }
    const int count = round % (kPairLanes + 1);
    T part[kPairLanes] = {}, whole[kPairLanes] = {};
    memcpy(whole, expected, sizeof(T) * count);
    store_pair(part, load_pair(expected, count), count);
    wrong += memcmp(part, whole, sizeof part) != 0;
  }
  return wrong;
}

int main() { std::printf("%d %d %d", wrong<float>(), wrong<BFloat16>(), wrong<Half>()); }
"""


def test_places_of_rows(run_cpp):
    *printed, large = map(int, run_cpp(PLACES).split())
    by_hand = [1000 * a + 100 * b + 11 * c for a, b, c in itertools.product(range(2), range(3), range(5))]
    assert printed == by_hand + [11 * row for row in range(7)]
    assert large == 2 * 1000 + 5 * 11


def test_pairs_of_vectors_round_and_keep_their_order(run_cpp):
    """Bit for bit what the scalar conversions give, NaN of every payload included."""
    assert run_cpp(PAIRS) == "0 0 0"


def test_dimensions_merge_for_all_tensors_alike():
    """Six dimensions that are one, and the same beside a tensor of which two are swapped."""
    x = torch.randn(2, 1, 3, 2, 2, 2, 8)
    swapped = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(rms_norm(x), rms_norm(x.flatten(0, -2)).view_as(x))
    assert torch.equal(swiglu(x, swapped), swiglu(x, x))
