# SPDX-License-Identifier: Apache-2.0
"""The conversions of csrc/common, seen through merge_attention: every bit pattern in, every kind of rounding out.

A side without keys leaves o as the other side's, converted to float and back. A vector of dim 1 takes the scalar
conversions, one of dim 256 those of whole registers.
"""

import math

import pytest
import torch

from fmkernels import merge_attention
from fmkernels.testing import backends

BACKENDS = backends("merge_attention_forward")
HALVES = [torch.float16, torch.bfloat16]
NO_KEYS, ONE_KEY = -math.inf, 0.0


def merged(backend, a, b, lse_a, lse_b):
    """merge_attention of [rows, dim] and lse [rows], on a backend."""
    sides = (a[:, None], lse_a[None], b[:, None], lse_b[None])
    return backend.run(merge_attention, *(t.to(backend.device) for t in sides))[0][:, 0].cpu()


def every_pattern(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def bits_of(t):
    """Bit patterns, all NaN alike."""
    return torch.where(t.isnan(), 0x7FFF, t.view(torch.int16))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dim", [1, 256])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_conversion_there_and_back_keeps_every_pattern(dtype, dim, backend):
    x = every_pattern(dtype).reshape(-1, dim)
    rows = x.shape[0]
    there_and_back = merged(
        backend, x, torch.full_like(x, math.nan), torch.full((rows,), ONE_KEY), torch.full((rows,), NO_KEYS)
    )
    # 1 * x + 0 turns -0 into 0, and the bits of a NaN are not kept; nothing else may change.
    assert torch.equal(bits_of(there_and_back), bits_of(x + 0.0))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dim", [1, 256])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_conversion_to_half_rounds_as_torch_does(dtype, dim, backend):
    """The same merge in float32, rounded by torch: every pattern beside its neighbour makes ties, beside a random one
    everything else, subnormals, overflow and infinity among them."""
    patterns = every_pattern(dtype)
    shuffled = patterns[torch.randperm(2**16, generator=torch.Generator().manual_seed(1))]
    for other in (patterns.roll(1), shuffled):
        a, b = patterns.reshape(-1, dim), other.reshape(-1, dim)
        lse_a = torch.zeros(a.shape[0])
        lse_b = torch.linspace(-30, 1, a.shape[0]) if other is shuffled else lse_a
        narrow = merged(backend, a, b, lse_a, lse_b)
        wide = merged(backend, a.float(), b.float(), lse_a, lse_b)
        assert torch.equal(bits_of(narrow), bits_of(wide.to(dtype)))
