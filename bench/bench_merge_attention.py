# SPDX-License-Identifier: Apache-2.0
"""`merge_attention` beside torch compositions, eager and compiled, and on CUDA beside cupy."""

from __future__ import annotations

import pytest
import torch
from measure import Contender, num_sets
from torch import Tensor

import fmkernels

Pair = tuple[Tensor, Tensor]


def composition(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> Pair:
    """The usual eager text, in float32."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (torch.exp(x - lse).transpose(-1, -2).unsqueeze(-1) for x in (lse_a, lse_b))
    return (weight_a * o_a.float() + weight_b * o_b.float()).to(o_a.dtype), lse


def lerp(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> Pair:
    """One pass over o, the shortest eager text: right while one side saw a key; torch has it in float32 only."""
    weight = torch.sigmoid(lse_a - lse_b).transpose(-1, -2).unsqueeze(-1)
    return torch.lerp(o_b, o_a, weight), torch.logaddexp(lse_a, lse_b)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    batch, seq_q, heads, _ = shape
    o_a, o_b = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    lse_a, lse_b = (torch.randn(batch, heads, seq_q, generator=generator, device=device) for _ in range(2))
    return o_a, lse_a, o_b, lse_b


def bytes_of(args: tuple[Tensor, ...]) -> int:
    """Four tensors read and two, as large as the first two, written."""
    return sum(x.nbytes for x in args) + args[0].nbytes + args[1].nbytes


@pytest.mark.parametrize(
    ("name", "shape"), [("prefill", (2, 2048, 16, 128)), ("chunk", (1, 512, 16, 64)), ("decode", (8, 1, 32, 128))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_merge(compare, device, cache_bytes, name, shape, dtype):
    case = f"{name} {list(shape)} {'fp32' if dtype == torch.float32 else 'bf16'}"
    first = inputs(shape, dtype, device)
    cold = bytes_of(first) > cache_bytes  # a small result was written a moment ago, so it is in the cache
    seeds = range(1, num_sets(bytes_of(first), cache_bytes)) if cold else ()
    sets = [first] + [inputs(shape, dtype, device, seed) for seed in seeds]
    torch.compiler.reset()  # each case has its own shapes: static code, as the strongest peer has
    peers = [
        Contender("torch", composition, sets),
        Contender("torch.compile", torch.compile(composition, dynamic=False), sets),
    ]
    if dtype == torch.float32:
        peers.append(Contender("torch.lerp", lerp, sets))
    compare("merge", case, Contender("fmkernels", fmkernels.merge_attention, sets), peers, num_bytes=bytes_of(first))


@pytest.fixture
def cupy(device):
    """The module, where there is a GPU."""
    if device.type != "cuda":
        pytest.skip("cupy is a peer on CUDA, and this run is on the CPU")
    return pytest.importorskip("cupy", reason="cupy is not installed: pip install fmkernels[cupy13] (or cupy12)")


@pytest.mark.parametrize("shape", [(4, 8192, 32, 128)], ids=["fp16 prefill"])
def test_merge_cupy(compare, cupy, device, cache_bytes, shape):
    """float16, since cupy has no bfloat16: one fused elementwise kernel over the broadcast weights."""
    kernel = cupy.ElementwiseKernel(
        "T o_a, float32 lse_a, T o_b, float32 lse_b",
        "T o",
        "float w = 1.0f / (1.0f + expf(lse_b - lse_a)); o = T(w * float(o_a) + (1.0f - w) * float(o_b))",
        "merge_attention",
    )

    def merge(o_a, lse_a, o_b, lse_b):
        weights = (lse.swapaxes(-1, -2)[..., None] for lse in (lse_a, lse_b))
        return kernel(o_a, next(weights), o_b, next(weights)), cupy.logaddexp(lse_a, lse_b)

    first = inputs(shape, torch.float16, device)
    sets = [first] + [
        inputs(shape, torch.float16, device, seed) for seed in range(1, num_sets(bytes_of(first), cache_bytes))
    ]
    peer = Contender(
        "cupy",
        merge,
        [tuple(map(cupy.from_dlpack, args)) for args in sets],
        to_layout=lambda pair: tuple(map(torch.from_dlpack, pair)),
    )
    compare(
        "merge",
        "prefill fp16 cupy",
        Contender("fmkernels", fmkernels.merge_attention, sets),
        [peer],
        num_bytes=bytes_of(first),
    )


def test_dlpack_interchange(cupy, device):
    """cupy arrays go through the op and come back without a copy, in the values that torch tensors give."""
    args = inputs((2, 33, 4, 64), torch.float16, device)
    arrays = tuple(cupy.from_dlpack(x.clone()) for x in args)
    tensors = tuple(map(torch.from_dlpack, arrays))
    assert [t.data_ptr() for t in tensors] == [a.data.ptr for a in arrays]
    o, lse = fmkernels.merge_attention(*tensors)
    back = cupy.from_dlpack(o)
    assert back.data.ptr == o.data_ptr()
    expected_o, expected_lse = fmkernels.merge_attention(*args)
    assert (back == cupy.from_dlpack(expected_o)).all()
    assert torch.equal(lse, expected_lse)
