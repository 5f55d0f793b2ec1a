# SPDX-License-Identifier: Apache-2.0
"""Which weights of attention are dropped, in integer arithmetic of plain torch: the bits of every kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of Salmon, Moraes, Dror and Shaw 2011: words of 32 bits, each in an int64."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # modulo 2^64, of which the halves below take what they need
        x0, x1, x2, x3 = (b >> 32 & _LOW) ^ x1 ^ k0, b & _LOW, (a >> 32 & _LOW) ^ x3 ^ k1, a & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return x0, x1, x2, x3


def dropout_threshold(dropout_p: float) -> int:
    """Of 2^16: the nearest to dropout_p that keeps something."""
    return min(math.floor(dropout_p * 65536 + 0.5), 65535)


def dropout_factors(
    dropout_p: float, dropout_rng: Tensor, batch: int, heads: int, seq_q: int, seq_k: int, *, first_batch: int = 0
) -> Tensor:
    """[batch, heads, seq_q, seq_k], float64: what dropout multiplies each weight by."""
    seed, offset = dropout_rng
    b, h, i, j = (
        torch.arange(size, device=dropout_rng.device).reshape(-1, *[1] * after)
        for after, size in zip((3, 2, 1, 0), (batch, heads, seq_q, seq_k), strict=True)
    )
    head = (b + first_batch) * heads + h
    counter = torch.broadcast_tensors(j // 32 * 4 + j % 8 // 2, i, head, offset & _LOW)
    words = torch.stack(philox(counter, (seed & _LOW, seed >> 32 & _LOW)))
    word = words.gather(0, (j % 32 // 8).expand(1, *words.shape[1:]))[0]
    bits = word >> j % 2 * 16 & 0xFFFF
    threshold = dropout_threshold(dropout_p)
    return (bits >= threshold).double() * (65536 / (65536 - threshold))
