# SPDX-License-Identifier: Apache-2.0
"""`rope` beside the op of vLLM, where it is installed, and the usual text in torch, eager and compiled."""

from __future__ import annotations

import peers_vllm
import pytest
import torch
from measure import Contender, seeds
from torch import Tensor

import fmkernels

SHAPES = [
    ("one token", (1, 32, 8, 128)),
    ("decode", (32, 32, 8, 128)),
    ("chunk", (512, 9, 3, 64)),
    ("prefill", (2048, 32, 8, 128)),
]
DTYPES = [torch.float32, torch.bfloat16]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def half_turned(x: Tensor) -> Tensor:
    u, v = x.chunk(2, -1)
    return torch.cat((-v, u), -1)


def composition(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """As models are written: in the dtype of q, by halves, or by a product of complex numbers where interleaved."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, -1)
    if interleaved:
        turn = torch.complex(cos.float(), sin.float())

        def rotate(x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

        return rotate(q), rotate(k)
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    return q * cos + half_turned(q) * sin, k * cos + half_turned(k) * sin


def offset(rotated: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """For the comparison: a rotation is a difference of products, which torch rounds to bfloat16 first."""
    return rotated[0] + 8, rotated[1] + 8


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    tokens, heads, kv_heads, head_dim = shape
    q, k = (torch.randn(tokens, n, head_dim, generator=generator, device=device).to(dtype) for n in (heads, kv_heads))
    return q, k


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=[name for name, _ in SHAPES])
def test_rope(compare, device, cache_bytes, name, shape, dtype, interleaved):
    """In place, but for torch's eager ops."""
    tokens, head_dim = shape[0], shape[-1]
    positions = torch.arange(tokens, device=device)
    cos_sin = fmkernels.rope_cache(head_dim, max(tokens, 4096), dtype=dtype, device=device)
    first = inputs(shape, dtype, device, 0)
    set_bytes = sum(t.nbytes for t in first)
    sets = [inputs(shape, dtype, device, seed) for seed in seeds(set_bytes, cache_bytes)]

    def own() -> list[tuple[Tensor, ...]]:
        return [tuple(t.clone() for t in pair) for pair in sets]

    def ours(q, k):
        return fmkernels.rope(q, k, positions, cos_sin, interleaved=interleaved, out=(q, k))

    def eager(q, k):
        return composition(q, k, positions, cos_sin, interleaved)

    peers = [Contender("torch", eager, own(), to_layout=offset)]
    if not interleaved:  # the compiler of torch has no complex numbers
        torch.compiler.reset()
        peers.append(Contender("torch.compile", torch.compile(eager, dynamic=False), own(), to_layout=offset))
    theirs = peers_vllm.op("rotary_embedding")
    if theirs is not None:

        def vllm(q, k):
            theirs(positions, q.view(tokens, -1), k.view(tokens, -1), head_dim, cos_sin, not interleaved)
            return q, k

        peers.append(Contender("vLLM", vllm, own(), to_layout=offset))
    layout = "interleaved" if interleaved else "neox"
    compare(
        f"rope {layout} {NAMES[dtype]}",
        f"{name} {list(shape)}",
        Contender("fmkernels", ours, own(), to_layout=offset),
        peers,
        num_bytes=2 * set_bytes,
    )
