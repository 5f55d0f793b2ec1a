# SPDX-License-Identifier: Apache-2.0
"""Division by multiplication, csrc/common/divisor.h: exact for every quotient's ends, that is for every x."""

# x / d steps where x is a multiple of d: right on both sides of all steps that are tried is right between them.
PROGRAM = """
#include "common/divisor.h"
#include <cstdio>
#include <initializer_list>

int main() {
  constexpr int64_t kEnd = int64_t{1} << 31;
  int64_t wrong = 0, tried = 0;
  const auto check = [&](int64_t d) {
    const fmkernels::Divisor divisor(static_cast<int32_t>(d));
    const auto at = [&](int64_t x) {
      if (x < 0 || x >= kEnd) return;
      ++tried;
      const auto n = static_cast<int32_t>(x);
      wrong += n / divisor != x / d || n % divisor != x % d;
    };
    const int64_t last = (kEnd - 1) / d;
    for (int64_t i = 0; i < 200; ++i)
      for (int64_t q : {i, last - i, last / 2 + i, last / 200 * i}) at(q * d - 1), at(q * d), at(q * d + d - 1);
    at(kEnd - 1);
  };
  for (int64_t d = 1; d <= 2100; ++d) check(d);
  for (int64_t shift = 11; shift < 31; ++shift)
    for (int64_t off : {-1, 0, 1}) check((int64_t{1} << shift) + off);
  check(kEnd - 1);
  std::printf("%lld of %lld wrong", static_cast<long long>(wrong), static_cast<long long>(tried));
}
"""


def test_quotients_and_remainders_are_exact(run_cpp):
    printed = run_cpp(PROGRAM)
    wrong, _, tried = printed.split()[:3]
    assert int(tried) > 2_000_000
    assert int(wrong) == 0
