# SPDX-License-Identifier: Apache-2.0
"""The generator of random bits, csrc/common/philox.h and its reference, against the published answers."""

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
