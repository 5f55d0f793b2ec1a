# SPDX-License-Identifier: Apache-2.0
"""semi_structured on emulated GPUs: tiles and edges, what is not read, and what the checks see."""

from dataclasses import replace

import pytest
import torch
from faults import missing_synchronisations

from fmkernels import SemiStructured, reference
from fmkernels._library import ops
from fmkernels.testing import assert_as_good_as_torch, backends

EMULATED = [backend for backend in backends("semi_structured_linear") if backend.name == "emulated"]
pytestmark = pytest.mark.skipif(not EMULATED, reason="the emulated backend is not built")
NAN = float("nan")


def normal(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(x, w, bias=None, architecture=80):
    backend = replace(EMULATED[0], architecture=architecture)
    return backend.run(lambda: ops.semi_structured_linear(x, w.values, w.metadata, bias))


SHAPES = [  # tokens, rows, columns: multiples of tiles; edges of each; of all
    (128, 128, 128), (65, 128, 64), (200, 144, 64), (66, 16, 208), (129, 272, 336),
    (64, 32, 64), (33, 48, 64), (1, 16, 16), (31, 80, 592), (32, 64, 48),
]  # fmt: skip


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_and_edges(shape, architecture):
    tokens, rows, columns = shape
    dtype = torch.float16 if rows % 32 else torch.bfloat16
    w = SemiStructured.from_dense(normal(rows, columns, dtype=dtype))
    x, bias = normal(tokens, columns, dtype=dtype, seed=1), normal(rows, seed=2).float()
    y = linear(x, w, bias, architecture)
    assert_as_good_as_torch(y, reference.semi_structured_linear, x, w, bias)


@pytest.mark.parametrize(("gap", "offset"), [(8, 8), (8, 1), (3, 0)])
@pytest.mark.parametrize("tokens", [20, 80])
def test_what_lies_between_rows_is_not_read(tokens, gap, offset):
    """NaN, in chunks of 16 bytes and not."""
    w, x = SemiStructured.from_dense(normal(48, 80)), normal(tokens, 80, seed=1)
    storage = x.new_full((offset + tokens * (80 + gap),), NAN)
    view = storage[offset:].view(tokens, -1)[:, :80]
    view.copy_(x)
    assert torch.equal(linear(view, w), linear(x, w))


def test_float32_is_refused():
    w = SemiStructured.from_dense(normal(16, 16).float())
    with pytest.raises(RuntimeError, match="dtype must be float16 or bfloat16"):
        linear(torch.zeros(2, 16), w)


def test_metadata_that_lie_reach_nothing_outside_the_tensors():
    """The op takes any words: two bits never leave their four. Which products they give is not defined."""
    w, x = SemiStructured.from_dense(normal(48, 80)), normal(70, 80, seed=1)
    words = torch.randint(-(2**31), 2**31, w.metadata.shape, generator=torch.Generator().manual_seed(0)).int()
    for tokens in (3, 70):
        EMULATED[0].run(lambda t=tokens: ops.semi_structured_linear(x[:t], w.values, words, None))
        ops.semi_structured_linear(x[:tokens], w.values, words, None)


@pytest.mark.parametrize(("tokens", "columns", "tile"), [(128, 512, "Li128ELi128E"), (64, 448, "Li32ELi32E")])
def test_every_barrier_and_wait_that_is_taken_out_is_reported(tokens, columns, tile):
    """So many columns that the copies under way in the end are into what the result overlays."""
    w, x = SemiStructured.from_dense(normal(128, columns)), normal(tokens, columns, seed=1)
    instance = f"TraitsINS_8BFloat16E{tile}"
    total, unseen = missing_synchronisations("semi_structured_linear_kernel", instance, lambda: linear(x, w))
    assert total >= 7
    assert unseen == []
