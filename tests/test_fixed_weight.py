# SPDX-License-Identifier: Apache-2.0
"""csrc/common/fixed_weight.h: weights are the floors they claim to be, the exponential is exact, draws are uniform."""

import pytest

EXPONENTIAL = """
#include "common/fixed_weight.h"
#include <cstdio>

int main() {
  using namespace fmkernels;
  double largest = 0.0;
  long decreasing = 0;
  float before = 2.0f;
  for (uint32_t bits = 0x80000000u; bits <= float_bits(-87.0f); bits += 331) {  // 0 and on, down to -87
    const float x = float_from_bits(bits), y = exp_bits(x);
    const double error = fabs(y / exp(double(x)) - 1.0);
    largest = error > largest ? error : largest;
    decreasing += y > before * (1.0f + 0x1p-22f);
    before = y;
  }
  std::printf("%g %ld %g %g %g", largest, decreasing, exp_bits(0.0f), exp_bits(-89.0f), exp_bits(-HUGE_VALF));
}
"""
WEIGHTS = """
#include "common/fixed_weight.h"
#include <cstdio>

int main() {
  using namespace fmkernels;
  long wrong = 0, count = 0;
  for (uint32_t bits = 0; bits <= 0x3f800000u; bits += 127, ++count) {
    const float w = float_from_bits(bits);
    wrong += weight_of(w) != static_cast<uint64_t>(floor(double(w) * 0x1p40));
  }
  wrong += weight_of(1.0f) != kWeightOne;
  std::printf("%ld %d", wrong, count > 8000000);
}
"""
DRAWS = """
#include "common/fixed_weight.h"
#include <cstdio>

int main() {
  using namespace fmkernels;
  long counts[10] = {};
  for (int i = 0; i < 100000; ++i) ++counts[uniform_below(10, random_bits(5, i, 0, 9))];
  for (long count : counts) std::printf("%ld ", count);
  const uint64_t last = ~uint64_t{0};
  std::printf("| %d %d %d", uniform_below(10, 0) == 0, uniform_below(10, last) == 9, uniform_below(1, last) == 0);
  std::printf(" | %d %d %d", share_of(0.0f, 7) == 1, share_of(1.0f, 7) == 7, share_of(0.5f, 7) == 4);
}
"""
FIRST_ABOVE = """
#include "common/fixed_weight_cpu.h"
#include <cstdio>

int main() {
  using namespace fmkernels;
  long wrong = 0;
  for (int64_t count = 1; count <= 23; ++count) {  // parts of a block of 4, whole blocks, and both
    uint64_t weights[23], sum = 0;
    for (int64_t v = 0; v < count; ++v) weights[v] = v % 3;  // some are 0
    weights[count - 1] = 2;
    for (int64_t v = 0; v < count; ++v) {
      for (uint64_t i = 0; i < weights[v]; ++i, ++sum) {
        wrong += first_above<4>(count, sum, [&](int64_t at) { return weights[at]; }) != v;
      }
    }
  }
  std::printf("%ld", wrong);
}
"""


def test_the_exponential(run_cpp):
    error, decreasing, *ends = run_cpp(EXPONENTIAL).split()
    assert float(error) < 2.0**-22
    assert decreasing == "0"
    assert ends == ["1", "0", "0"]


def test_weights_are_floors(run_cpp):
    assert run_cpp(WEIGHTS).split() == ["0", "1"]


def test_draws(run_cpp):
    counts, edges, shares = run_cpp(DRAWS).split("|")
    counts = [int(count) for count in counts.split()]
    assert sum((count - 10000) ** 2 / 10000 for count in counts) < 58  # chi-square of 9: a false alarm in 10^8
    assert counts != pytest.approx([10000] * 10, abs=5)  # nor are they a sequence
    assert edges.split() == ["1", "1", "1"]
    assert shares.split() == ["1", "1", "1"]


def test_a_draw_finds_every_number_in_its_block(run_cpp):
    assert run_cpp(FIRST_ABOVE) == "0"
