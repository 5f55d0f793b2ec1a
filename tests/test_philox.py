# SPDX-License-Identifier: Apache-2.0
"""The generator of random bits, csrc/common/philox.h and its reference: published answers, and statistics of drops."""

import pytest
import torch

from fmkernels import reference

KNOWN_ANSWERS = """
00000000 00000000 00000000 00000000  00000000 00000000  6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  d16cfe09 94fdcceb 5001e420 24126ea1
"""  # philox4x32 10 of kat_vectors in Random123: counter, key, result
PROGRAM = """
#include "common/philox.h"
#include <cstdio>

int main() {
  const uint32_t rows[][6] = {ROWS};
  for (const auto& row : rows) {
    uint32_t x[4] = {row[0], row[1], row[2], row[3]};
    const uint64_t key = uint64_t{row[5]} << 32 | row[4];
    fmkernels::philox(x, [&](int half, int round) { return fmkernels::philox_round_key(key, half, round); });
    for (uint32_t word : x) std::printf("%08x ", word);
  }
}
"""


def test_the_generator_gives_the_published_answers(run_cpp):
    rows = [line.split() for line in KNOWN_ANSWERS.strip().splitlines()]
    answers = [word for row in rows for word in row[6:]]
    literals = ", ".join("{" + ", ".join(f"0x{word}" for word in row[:6]) + "}" for row in rows)
    assert run_cpp(PROGRAM.replace("ROWS", literals)).split() == answers
    numbers = torch.tensor([[int(word, 16) for word in row] for row in rows])
    words = torch.stack(reference.philox(numbers.T[:4], numbers.T[4:6]), dim=1)
    assert [f"{word:08x}" for word in words.flatten().tolist()] == answers


def kept(dropout_p, *shape, seed=1, offset=0):
    return (reference.dropout_factors(dropout_p, torch.tensor([seed, offset]), *shape) != 0).double()


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_the_kept_are_as_many_as_said_and_independent(dropout_p):
    """Within five standard deviations: of all, of every row, column and head, and of pairs at any small distance."""
    rate = 1 - round(dropout_p * 65536) / 65536
    shape = (2, 4, 128, 512)
    keep = (kept(dropout_p, *shape) - rate) / (rate * (1 - rate)) ** 0.5  # of mean 0 and variance 1

    def check_mean(x):
        assert (x.mean(-1).abs() < 5 * x.shape[-1] ** -0.5).all()

    for dim in range(4):
        check_mean(keep.movedim(dim, 0).flatten(1))
    check_mean(keep.flatten(0, 2))
    for d in (1, 2, 7, 8, 16, 32, 64):
        check_mean((keep[..., d:] * keep[..., :-d]).flatten())
        check_mean((keep[:, :, d:] * keep[:, :, :-d]).flatten())
    check_mean((keep[:, 1:] * keep[:, :-1]).flatten())
    check_mean((keep[1] * keep[0]).flatten())
    for other in ({"offset": 1}, {"seed": 2}, {"seed": 1 << 32}):
        check_mean((keep * (kept(dropout_p, *shape, **other) - rate)).flatten())
