# SPDX-License-Identifier: Apache-2.0
"""`rms_norm` and `layer_norm` beside the ops of vLLM, where it is installed, and torch's own, eager and compiled.

All write into memory that they are given, where they can: an output of 32 MB in fresh pages would measure the kernel of
the operating system. vLLM adds a residual in place, and so do we there.
"""

from __future__ import annotations

from collections.abc import Sequence

import peers_vllm
import pytest
import torch
import torch.nn.functional as F
from measure import Contender, seeds
from torch import Tensor

import fmkernels

EPS = 1e-6
SHAPES = [("one token", (1, 2048)), ("decode", (32, 4096)), ("chunk", (512, 2048)), ("prefill", (2048, 4096))]
DTYPES = [torch.float32, torch.bfloat16]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
EACH_SHAPE = pytest.mark.parametrize(("name", "shape"), SHAPES, ids=[name for name, _ in SHAPES])
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)


def normal(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def own(sets: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Copies for a contender that writes over its inputs."""
    return [tuple(t.clone() for t in tensors) for tensors in sets]


@EACH_DTYPE
@EACH_SHAPE
def test_rms_norm(compare, device, cache_bytes, name, shape, dtype):
    weight = normal(shape[-1:], dtype, device, 1)
    num_bytes = 2 * normal(shape, dtype, device, 0).nbytes
    sets = [(normal(shape, dtype, device, seed),) for seed in seeds(num_bytes, cache_bytes)]
    with_out = [(x, torch.empty_like(x)) for (x,) in sets]

    def ours(x, out):
        return fmkernels.rms_norm(x, weight, EPS, out=out)

    def eager(x, out):
        return F.rms_norm(x, shape[-1:], weight, EPS)

    torch.compiler.reset()
    compiled = torch.compile(lambda x, out: out.copy_(F.rms_norm(x, shape[-1:], weight, EPS)), dynamic=False)
    peers = [Contender("torch", eager, with_out), Contender("torch.compile", compiled, with_out)]
    theirs = peers_vllm.op("rms_norm")
    if theirs is not None:

        def vllm(x, out):
            theirs(out, x, weight, EPS)
            return out

        peers.append(Contender("vLLM", vllm, with_out))
    compare(
        f"rms_norm {NAMES[dtype]}",
        f"{name} {list(shape)}",
        Contender("fmkernels", ours, with_out),
        peers,
        num_bytes=num_bytes,
    )


@EACH_DTYPE
@EACH_SHAPE
def test_add_rms_norm(compare, device, cache_bytes, name, shape, dtype):
    """(norm(x + residual), x + residual), in place but for torch, whose compiler fails at the text in place."""
    weight = normal(shape[-1:], dtype, device, 1)
    num_bytes = 4 * normal(shape, dtype, device, 0).nbytes
    sets = [
        (normal(shape, dtype, device, seed), normal(shape, dtype, device, seed + 100))
        for seed in seeds(num_bytes // 2, cache_bytes)
    ]

    def ours(x, residual):
        return fmkernels.rms_norm(x, weight, EPS, residual, out=x, residual_out=residual)

    def eager(x, residual):
        residual = x + residual
        return F.rms_norm(residual, shape[-1:], weight, EPS), residual

    torch.compiler.reset()
    peers = [
        Contender("torch", eager, sets),
        Contender("torch.compile", torch.compile(eager, dynamic=False), sets),
    ]
    theirs = peers_vllm.op("fused_add_rms_norm")
    if theirs is not None:

        def vllm(x, residual):
            theirs(x, residual, weight, EPS)
            return x, residual

        peers.append(Contender("vLLM", vllm, own(sets)))
    compare(
        f"add_rms_norm {NAMES[dtype]}",
        f"{name} {list(shape)}",
        Contender("fmkernels", ours, own(sets)),
        peers,
        num_bytes=num_bytes,
    )


@EACH_DTYPE
@EACH_SHAPE
def test_layer_norm(compare, device, cache_bytes, name, shape, dtype):
    weight, bias = (normal(shape[-1:], dtype, device, seed) for seed in (1, 2))
    num_bytes = 2 * normal(shape, dtype, device, 0).nbytes
    sets = [(normal(shape, dtype, device, seed),) for seed in seeds(num_bytes, cache_bytes)]
    peer = Contender("torch", lambda x: F.layer_norm(x, shape[-1:], weight, bias, EPS), sets)
    ours = Contender("fmkernels", lambda x: fmkernels.layer_norm(x, weight, bias, EPS), sets)
    compare(f"layer_norm {NAMES[dtype]}", f"{name} {list(shape)}", ours, [peer], num_bytes=num_bytes)


def offset(grads: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """For the comparison: gradients are differences and sums over all rows, exact beside their largest values alone."""
    grad_x, grad_weight = grads
    return grad_x + 16, grad_weight / grad_x.shape[0] + 1


def with_gradients(function):
    def run(x, weight, grad):
        with torch.enable_grad():
            return torch.autograd.grad(function(x, weight), (x, weight), grad)

    return run


@EACH_DTYPE
@pytest.mark.parametrize(("name", "shape"), SHAPES[2:], ids=["chunk", "prefill"])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_gradients(compare, device, cache_bytes, name, shape, dtype, norm):
    """Forward and backward."""
    num_bytes = 5 * normal(shape, dtype, device, 0).nbytes
    sets = [
        tuple(
            normal(s, dtype, device, seed + k).requires_grad_(k < 200)
            for s, k in ((shape, 0), (shape[-1:], 100), (shape, 200))
        )
        for seed in seeds(num_bytes, cache_bytes)
    ]
    if norm == "rms_norm":
        ours = with_gradients(lambda x, weight: fmkernels.rms_norm(x, weight, EPS))
        theirs = with_gradients(lambda x, weight: F.rms_norm(x, shape[-1:], weight, EPS))
    else:
        ours = with_gradients(lambda x, weight: fmkernels.layer_norm(x, weight, None, EPS))
        theirs = with_gradients(lambda x, weight: F.layer_norm(x, shape[-1:], weight, None, EPS))
    compare(
        f"{norm} and gradients {NAMES[dtype]}",
        f"{name} {list(shape)}",
        Contender("fmkernels", ours, sets, to_layout=offset),
        [Contender("torch", theirs, sets, to_layout=offset)],
        num_bytes=num_bytes,
    )
