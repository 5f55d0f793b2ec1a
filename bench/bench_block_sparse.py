# SPDX-License-Identifier: Apache-2.0
"""`dsd`, `dds` and `sdd` beside the dense product with zeros, torch's BSR, and the best composition of torch's own.

The composition gathers what a row of blocks needs of the dense operand and multiplies once a row of blocks. Beside
dense, and beside sparse, are groups of their own: a user asks whether to be sparse at all, and with whose kernels.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from measure import Contender
from torch import Tensor

from fmkernels import BlockSparse, dds, dsd, sdd

SIZES = {"1024^3": (1024, 1024, 1024), "2048 x 2048 x 512": (2048, 2048, 512)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def matrix(rows: int, inner: int, block: int, density: float, dtype: torch.dtype, device: torch.device) -> BlockSparse:
    """With as many blocks in every row of blocks, up to one, at random places."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.rand(rows // block, inner // block, generator=generator)
    kept = grid.argsort(dim=1) < density * (inner // block)
    dense = torch.randn(rows, inner, generator=generator) * inner**-0.5
    return BlockSparse.from_dense(dense.to(dtype).to(device), block, kept.to(device))


def composition(s: BlockSparse, b: Tensor) -> Tensor:
    """A gather and a product a row of blocks."""
    offsets = s.topology.row_offsets.tolist()
    rows, columns = s.topology.block
    tiles = b.view(-1, columns, b.shape[-1])
    out = b.new_empty(s.shape[0], b.shape[-1])
    for i, (first, last) in enumerate(itertools.pairwise(offsets)):
        left = s.values[first:last].transpose(0, 1).reshape(rows, -1)
        right = tiles[s.topology.column_indices[first:last].long()].view(-1, b.shape[-1])
        torch.mm(left, right, out=out[i * rows : (i + 1) * rows])
    return out


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dsd_beside_dense(compare, device, dtype, size, block, density):
    if device.type == "cuda" and dtype == "fp32":
        pytest.skip("float32 has a kernel on the CPU alone")
    rows, inner, columns = SIZES[size]
    s = matrix(rows, inner, block, density, DTYPES[dtype], device)
    dense, b = s.to_dense(), torch.randn(inner, columns, device=device).to(DTYPES[dtype])
    peers = [Contender("torch.mm, zeros", lambda b: dense @ b, [(b,)])]
    if dtype == "bf16" and device.type == "cpu":  # torch's own product of halves is far slower without AVX-512
        wide = dense.float()
        peers.append(Contender("as float32", lambda b: (wide @ b.float()).to(b.dtype), [(b,)]))
    ours = Contender("fmkernels", lambda b: dsd(s, b), [(b,)])
    flops = 2 * s.num_blocks * block * block * columns
    compare(f"dsd beside dense, density {density}", f"{dtype} {size} b{block} d{density}", ours, peers, flops=flops)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("peer", ["BSR", "composition"])
def test_dsd_beside_sparse(compare, device, peer, size, block, density):
    rows, inner, columns = SIZES[size]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    s = matrix(rows, inner, block, density, dtype, device)
    b = torch.randn(inner, columns, device=device).to(dtype)
    bsr = s.to_bsr()
    run = {"BSR": lambda b: bsr @ b, "composition": lambda b: composition(s, b)}[peer]
    ours = Contender("fmkernels", lambda b: dsd(s, b), [(b,)])
    kind = "small blocks" if block <= 32 else "large blocks"
    group = f"dsd beside {peer}, {kind}"
    flops = 2 * s.num_blocks * block * block * columns
    compare(group, f"{size} b{block} d{density} {peer}", ours, [Contender(peer, run, [(b,)])], flops=flops)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("product", ["dds", "dds transposed", "sdd"])
def test_other_products(compare, device, product, block, density):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    s = matrix(1024, 1024, block, density, dtype, device)
    a = (torch.randn(1024, 1024, device=device) / 32).to(dtype)
    dense, of = s.to_dense(), s.topology
    run, peer = {
        "dds": (lambda a: dds(a, s), lambda a: a @ dense),
        "dds transposed": (lambda a: dds(a, s.t()), lambda a: a @ dense.mT),
        "sdd": (lambda a: sdd(a, a, of).values, lambda a: BlockSparse.from_dense(a @ a, mask=of).values),
    }[product]
    flops = 2 * s.num_blocks * block * block * 1024
    ours, theirs = Contender("fmkernels", run, [(a,)]), Contender("torch.mm, zeros", peer, [(a,)])
    compare(f"{product} beside dense, density {density}", f"{product} b{block} d{density}", ours, [theirs], flops=flops)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_training_step(compare, device, block):
    """Forward and both gradients of a linear layer, 512 tokens, 1024 features in and out, a quarter of the blocks."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    s = matrix(1024, 1024, block, 0.25, dtype, device)
    x, grad = ((torch.randn(512, 1024, device=device) / 32).to(dtype) for _ in range(2))
    dense = s.to_dense()

    def step(layer):
        def run(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                out, weight = layer(x)
                return torch.autograd.grad(out, (x, weight), grad)

        return run

    def sparse(x: Tensor) -> tuple[Tensor, Tensor]:
        values = s.values.detach().requires_grad_()
        return dds(x, s.with_values(values).t()), values

    def whole(x: Tensor) -> tuple[Tensor, Tensor]:
        weight = dense.detach().requires_grad_()
        return x @ weight.mT, weight

    def layout(grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return grads[0], BlockSparse.from_dense(grads[1], mask=s.topology).values

    sets = [(x, grad)]
    peer = Contender("torch.nn.functional.linear, zeros", step(whole), sets, to_layout=layout)
    compare(
        "block-sparse linear, training",
        f"b{block} d0.25",
        Contender("fmkernels", step(sparse), sets),
        [peer],
        flops=6 * s.num_blocks * block**2 * 512,
    )


def copies(s: BlockSparse, num_bytes: int) -> list[BlockSparse]:
    """So many that together they are larger than caches, if one is not small; the lists are shared."""
    count = 1 + (100 << 20) // num_bytes if num_bytes > 8 << 20 else 1
    if s.is_quantized:
        return [BlockSparse.of(s.values.clone(), s.topology, s.is_transposed, s.block_scales) for _ in range(count)]
    return [s.with_values(s.values.clone()) for _ in range(count)]


@pytest.mark.parametrize("tokens", [1, 4, 8, 16])
@pytest.mark.parametrize("density", [0.25, 0.5])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("features", [1024, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["values", "int8"])
def test_decode(compare, device, values, dtype, features, block, density, tokens):
    """A linear layer for few tokens, weight [features, features], beside the dense one: bound by reading the weight.

    Weights of 4096 features come from memory: each call has another copy.
    """
    if device.type == "cuda" and dtype == "fp32":
        pytest.skip("float32 has a kernel on the CPU alone")
    of_dtype = DTYPES[dtype]
    s = matrix(features, features, block, density, of_dtype, device)
    if values == "int8":  # with scales that are powers of two, so that a half has the same value
        q = s.quantize()
        s = BlockSparse.of(q.values, q.topology, block_scales=q.block_scales.log2().round().exp2())
    dense = s.to_dense().to(of_dtype)
    x = torch.randn(tokens, features, device=device).to(of_dtype)
    ours = [(x, w.t()) for w in copies(s, 4 * s.values.numel())]
    peers = [(x, dense.clone()) for _ in range(2 if features > 2048 else 1)]
    peer = Contender("torch.nn.functional.linear", torch.nn.functional.linear, peers)
    compare(
        f"linear of few tokens, {values}, {dtype}, {features} features, density {density}",
        f"{values} {dtype} {features} b{block} d{density} {tokens} tokens",
        Contender("fmkernels", dds, ours),
        [peer],
        num_bytes=s.values.nbytes,
    )
