# SPDX-License-Identifier: Apache-2.0
"""`swiglu` and `geglu` beside torch's two ops, eager and compiled, and the ops of vLLM, where it is installed.

Of packed rows, as a fused projection gives them. Those who can write into memory that they are given: an output of
many megabytes in fresh pages would measure the operating system.
"""

from __future__ import annotations

import functools

import peers_vllm
import pytest
import torch
import torch.nn.functional as F
from measure import Contender, seeds
from torch import Tensor

import fmkernels

SHAPES = [("one token", (1, 8192)), ("decode", (32, 8192)), ("chunk", (128, 8192)), ("prefill", (1024, 8192))]
DTYPES = [torch.float32, torch.bfloat16]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
TANH = {"approximate": "tanh"}
KINDS = {
    "swiglu": (fmkernels.swiglu, F.silu, "silu_and_mul"),
    "geglu": (fmkernels.geglu, F.gelu, "gelu_and_mul"),
    "geglu tanh": (
        functools.partial(fmkernels.geglu, **TANH),
        functools.partial(F.gelu, **TANH),
        "gelu_tanh_and_mul",
    ),
}
EACH_SHAPE = pytest.mark.parametrize(("name", "shape"), SHAPES, ids=[name for name, _ in SHAPES])
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)


def packed(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape[0], 2 * shape[1], generator=generator, device=device).to(dtype)


@EACH_DTYPE
@EACH_SHAPE
@pytest.mark.parametrize("kind", KINDS)
def test_glu(compare, device, cache_bytes, kind, name, shape, dtype):
    if kind == "geglu" and name == "prefill":
        pytest.skip("the chunk says it already")
    function, activation, vllm_name = KINDS[kind]
    set_bytes = packed(shape, dtype, device, 0).nbytes
    sets = [
        (x, torch.empty(shape, dtype=dtype, device=device))
        for x in (packed(shape, dtype, device, s) for s in seeds(set_bytes, cache_bytes))
    ]

    def eager(x, out):
        return activation(x[:, : shape[1]]) * x[:, shape[1] :]

    torch.compiler.reset()
    compiled = torch.compile(lambda x, out: out.copy_(eager(x, out)), dynamic=False)
    peers = [Contender("torch", eager, sets), Contender("torch.compile", compiled, sets)]
    theirs = peers_vllm.op(vllm_name)
    if theirs is not None:

        def vllm(x, out):
            theirs(out, x)
            return out

        peers.append(Contender("vLLM", vllm, sets))
    compare(
        f"{kind} {NAMES[dtype]}",
        f"{name} {list(shape)}",
        Contender("fmkernels", lambda x, out: function(x, out=out), sets),
        peers,
        num_bytes=set_bytes * 3 // 2,
    )


def with_gradients(function):
    def run(x, grad):
        with torch.enable_grad():
            return torch.autograd.grad(function(x), x, grad)[0]

    return run


@EACH_DTYPE
@EACH_SHAPE
def test_gradients(compare, device, cache_bytes, name, shape, dtype):
    """Forward and backward."""
    set_bytes = packed(shape, dtype, device, 0).nbytes
    sets = [
        (packed(shape, dtype, device, seed).requires_grad_(), packed(shape, dtype, device, seed + 100)[:, : shape[1]])
        for seed in seeds(set_bytes, cache_bytes)
    ]
    theirs = with_gradients(lambda x: F.silu(x[:, : shape[1]]) * x[:, shape[1] :])
    compare(
        f"swiglu and gradients {NAMES[dtype]}",
        f"{name} {list(shape)}",
        Contender("fmkernels", with_gradients(fmkernels.swiglu), sets),
        [Contender("torch", theirs, sets)],
        num_bytes=set_bytes * 4,
    )
