# SPDX-License-Identifier: Apache-2.0
"""`quantized_linear` beside torch's linear layer in float32, and torch's own products with packed weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import Contender, num_sets

from fmkernels import QuantizedWeight, dequantize_weight, quantize_weight, quantized_linear

FORMATS = {
    "int8": {"bits": 8},
    "int8 /64": {"bits": 8, "group_size": 64},
    "int4 /128": {"bits": 4, "group_size": 128},
    "int4 /32 zeros": {"bits": 4, "group_size": 32, "symmetric": False},
}
LARGE = [(4096, 4096), (2048, 8192), (49152, 576)]  # out, in
SMALL = [(1536, 576), (576, 1536), (576, 576)]  # a layer of a model of 135 M parameters: in the cache even as float32


def weights(size: tuple[int, int], form: str, count: int) -> list[QuantizedWeight]:
    generator = torch.Generator().manual_seed(0)
    first = quantize_weight(torch.randn(size, generator=generator) * size[1] ** -0.5, **FORMATS[form])
    q, scales, zeros = first.integers()
    form_of = {"bits": first.bits, "group_size": first.group_size}
    # Rows in another order: other values in other memory, cheaper than to quantise anew.
    return [QuantizedWeight.from_integers(*_rolled(i, q, scales, zeros), **form_of) for i in range(count)]


def _rolled(i: int, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.roll(i, 0) for t in tensors]


def contenders(size, form, num_rows, device, cache_bytes, dtype=torch.float32):
    """Ours, and the dense layer of the same values; sets are rotated where the dense one is beyond the cache."""
    dense_bytes = size[0] * size[1] * 4
    count = min(num_sets(dense_bytes // 8, cache_bytes), 16) if dense_bytes > cache_bytes else 1
    packed = [w.to(device) for w in weights(size, form, count)]
    dense = [dequantize_weight(w) for w in packed[: min(count, num_sets(dense_bytes, cache_bytes))]]
    x = torch.randn(num_rows, size[1], generator=torch.Generator().manual_seed(1)).to(device, dtype)
    ours = Contender("fmkernels", quantized_linear, [(x, w) for w in packed])
    sets = [(x, dense[i % len(dense)]) for i in range(count)]
    return ours, Contender("F.linear fp32", lambda x, w: F.linear(x.float(), w).to(dtype), sets[:1]), sets


@pytest.mark.parametrize("size", LARGE + SMALL, ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_decode(compare, device, cache_bytes, form, size):
    """One row. The weights come from memory (large) or from the cache (small)."""
    ours, linear, sets = contenders(size, form, 1, device, cache_bytes)
    # All contenders have equal values in a set: the dense sets are as many as the packed ones, some of them shared.
    ours = Contender(ours.name, ours.run, [ours.inputs[i % len(sets)] for i in range(len(sets))])
    where = "memory" if size in LARGE else "cache"
    peers = [Contender(linear.name, linear.run, sets)]
    packed = ours.inputs[0][1]
    compare(f"{form[:4]} decode, {where}", f"{form} {size[0]}x{size[1]}", ours, peers, num_bytes=packed.nbytes)


@pytest.mark.parametrize("num_rows", [2, 4, 8, 32, 128])
@pytest.mark.parametrize("form", ["int8", "int4 /128"])
def test_batch(compare, device, cache_bytes, form, num_rows):
    size = (2048, 2048)
    ours, linear, sets = contenders(size, form, num_rows, device, cache_bytes)
    flops = 2 * num_rows * size[0] * size[1]
    peers = [Contender(linear.name, linear.run, sets)]
    compare(f"{form[:4]} batch", f"{form} {num_rows} rows, 2048x2048", ours, peers, flops=flops)


@pytest.mark.parametrize("form", ["int8", "int4 /128"])
def test_half(compare, device, cache_bytes, form):
    """bfloat16 rows beside float32's layer, upcast and rounded: torch's products of halves are slower on this CPU."""
    size = LARGE[0]
    ours, linear, sets = contenders(size, form, 1, device, cache_bytes, torch.bfloat16)
    peers = [Contender(linear.name, linear.run, sets)]
    packed = ours.inputs[0][1]
    compare(f"{form[:4]} decode, bf16", f"{form} {size[0]}x{size[1]}", ours, peers, num_bytes=packed.nbytes)


def test_torch_int8(compare, device, cache_bytes):
    """Torch's own product with bytes, in bfloat16, in which it is fastest; it rounds the scales to bfloat16."""
    if device.type != "cpu":
        pytest.skip("torch._weight_int8pack_mm is of the CPU")
    size = LARGE[0]
    packed = weights(size, "int8", num_sets(size[0] * size[1], cache_bytes))
    x = torch.randn(1, size[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    rounded = []
    for w in packed:
        q, scales, _ = w.integers()
        rounded.append((q, scales.bfloat16()))
    exact = [QuantizedWeight.from_integers(q, scales.float()) for q, scales in rounded]
    peer = Contender(
        "_weight_int8pack_mm",
        torch._weight_int8pack_mm,
        [(x, q, scales.flatten()) for q, scales in rounded],
    )
    ours = Contender("fmkernels", quantized_linear, [(x, w) for w in exact])
    compare("int8 decode, torch's", f"int8 {size[0]}x{size[1]} bf16", ours, [peer], num_bytes=packed[0].nbytes)
