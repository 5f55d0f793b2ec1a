# SPDX-License-Identifier: Apache-2.0
"""`semi_structured_linear` beside torch's dense linear layer of the same matrix, zeros and all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import Contender, num_sets

from fmkernels import SemiStructured, semi_structured_linear, semi_structured_mask
from fmkernels.nn import SemiStructuredLinear


def kind(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "bf16"


def pairs(rows: int, columns: int, count: int, dtype: torch.dtype, device: torch.device):
    """(packed, dense) of `count` matrices."""
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * columns**-0.5
    dense = dense.to(device, dtype)
    dense *= semi_structured_mask(dense)
    rolled = [dense.roll(4 * i, 1) for i in range(count)]  # other values in other memory
    return [(SemiStructured.from_dense(w), w) for w in rolled]


def contenders(tokens, rows, columns, dtype, device, cache_bytes):
    """Sets are rotated where the dense matrix is beyond the cache. On the CPU halves are multiplied in float32 too:
    that is the faster way where the processor has no instruction for them."""
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("CUDA multiplies halves")
    dense_bytes = rows * columns * 4
    count = num_sets(dense_bytes // 2, cache_bytes) if dense_bytes > cache_bytes else 1
    matrices = pairs(rows, columns, count, dtype, device)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    ours = Contender("fmkernels", semi_structured_linear, [(x, packed) for packed, _ in matrices])
    peers = [Contender("F.linear", F.linear, [(x, w) for _, w in matrices])]
    if device.type == "cpu" and dtype != torch.float32:
        wide = [(x, w.float()) for _, w in matrices]
        peers.append(Contender("F.linear fp32", lambda x, w: F.linear(x.float(), w).to(x.dtype), wide))
    return ours, peers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [16, 32, 128, 512, 2048])
@pytest.mark.parametrize(("rows", "columns"), [(1024, 1024), (2048, 2048)])
def test_many_tokens(compare, device, cache_bytes, rows, columns, tokens, dtype):
    ours, peers = contenders(tokens, rows, columns, dtype, device, cache_bytes)
    name = f"{tokens} x {rows} x {columns} {kind(dtype)}"
    compare(f"2:4, many tokens, {kind(dtype)}", name, ours, peers, flops=tokens * rows * columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_few_tokens(compare, device, cache_bytes, tokens, dtype):
    """Weights from memory."""
    ours, peers = contenders(tokens, 4096, 4096, dtype, device, cache_bytes)
    name = f"{tokens} x 4096 x 4096 {kind(dtype)}"
    compare(f"2:4, few tokens, {kind(dtype)}", name, ours, peers, num_bytes=ours.inputs[0][1].nbytes)


def test_training_step(compare, device):
    """Forward and backward: mask, both packings, two sparse products and a dense one, beside three dense ones."""
    tokens, size = 2048, 1024
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    linear = torch.nn.Linear(size, size, bias=False, device=device, dtype=dtype)
    sparse = SemiStructuredLinear.from_linear(linear)
    x = torch.randn(tokens, size, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, size, device=device, dtype=dtype) * tokens**-0.5

    def sparse_step(x, grad):
        with torch.enable_grad():
            return torch.autograd.grad(sparse(x), (x, linear.weight), grad)

    def dense_step(x, grad):
        """Of a dense weight that is masked anew in each step, in one multiplication."""
        with torch.enable_grad():
            weight = linear.weight * semi_structured_mask(linear.weight, both_directions=True)
            return torch.autograd.grad(F.linear(x, weight), (x, weight), grad)

    ours, peer = (
        Contender(name, step, [(x, grad)]) for name, step in (("fmkernels", sparse_step), ("F.linear", dense_step))
    )
    compare("2:4, training step", f"{tokens} x {size} x {size}", ours, [peer], flops=4 * tokens * size * size)
