# SPDX-License-Identifier: Apache-2.0
"""Self-tests of norms, gates, rotations, packed weights and adapters, for `doctor`: a small case of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .block_sparse import dsd, sdd
from .block_sparse_matrix import BlockSparse
from .glu import swiglu
from .lora import lora_expand, lora_shrink
from .norm import rms_norm
from .quantized_linear import dequantize_weight, quantized_linear
from .quantized_weight import quantize_weight
from .rope import rope
from .rope_cache import rope_cache
from .semi_structured import semi_structured_linear
from .semi_structured_matrix import SemiStructured, semi_structured_mask
from .testing import Backend, assert_as_good_as_torch


def _random(backend: Backend, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(backend.device) for shape in shapes]


def _gradients(function: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves).square().sum(), leaves)


def _assert_gradients(function: Callable[..., Any], expected: Callable[..., Any], *tensors: Tensor) -> None:
    actual = _gradients(function, *tensors)
    assert_as_good_as_torch(actual, lambda *leaves: _gradients(expected, *leaves), *tensors)


def _test_norm(backend: Backend) -> None:
    x, weight = _random(backend, (5, 70), (70,))
    assert_as_good_as_torch(rms_norm(x, weight), reference.rms_norm, x, weight)


def _test_norm_out(backend: Backend) -> None:
    x, weight = _random(backend, (5, 70), (70,))
    assert_as_good_as_torch(rms_norm(x, weight, out=torch.zeros_like(x)), reference.rms_norm, x, weight)


def _test_norm_backward(backend: Backend) -> None:
    _assert_gradients(rms_norm, reference.rms_norm, *_random(backend, (5, 70), (70,)))


def _test_glu(backend: Backend) -> None:
    (gate,) = _random(backend, (5, 70))
    assert_as_good_as_torch(swiglu(gate), reference.swiglu, gate)


def _test_glu_out(backend: Backend) -> None:
    (gate,) = _random(backend, (5, 70))
    assert_as_good_as_torch(swiglu(gate, out=torch.zeros_like(gate[:, :35])), reference.swiglu, gate)


def _test_glu_backward(backend: Backend) -> None:
    _assert_gradients(swiglu, reference.swiglu, *_random(backend, (5, 70)))


def _rotated(backend: Backend) -> tuple[Tensor, ...]:
    q, k = _random(backend, (5, 4, 16), (5, 2, 16))
    return q, k, torch.arange(5, device=backend.device), rope_cache(16, 8).to(backend.device)


def _test_rope(backend: Backend) -> None:
    args = _rotated(backend)
    assert_as_good_as_torch(rope(*args), reference.rope, *args)


def _test_rope_out(backend: Backend) -> None:
    q, k, *rest = _rotated(backend)
    out = rope(q, k, *rest, out=(torch.zeros_like(q), torch.zeros_like(k)))
    assert_as_good_as_torch(out, reference.rope, q, k, *rest)


def _test_quantized_linear(backend: Backend) -> None:
    x, weight = _random(backend, (3, 128), (70, 128))
    for form in ({"bits": 8}, {"bits": 4, "group_size": 32}):
        packed = quantize_weight(weight, **form)
        assert_as_good_as_torch(quantized_linear(x, packed), reference.quantized_linear, x, packed)


def _test_dequantize(backend: Backend) -> None:
    packed = quantize_weight(_random(backend, (70, 128))[0], bits=4, group_size=32)
    actual = dequantize_weight(packed)
    # an argument of float type is what tells the reference the dtype to compute in
    assert_as_good_as_torch(actual, lambda x: reference.dequantize_weight(packed, x.dtype), actual.new_zeros(1))


def _adapted(backend: Backend) -> tuple[Tensor, ...]:
    idx = torch.tensor([1, -1, 0, 1, 1], dtype=torch.int32, device=backend.device)
    return *_random(backend, (5, 40), (5, 24), (2, 8, 40), (2, 24, 8), (5, 8)), idx


def _test_lora_shrink(backend: Backend) -> None:
    x, _, a, _, _, idx = _adapted(backend)
    assert_as_good_as_torch(lora_shrink(x, a, idx), reference.lora_shrink, x, a, idx)


def _test_lora_expand(backend: Backend) -> None:
    _, base, _, b, h, idx = _adapted(backend)
    assert_as_good_as_torch(lora_expand(h, base, b, idx), reference.lora_expand, h, base, b, idx)


def _blocks(backend: Backend) -> tuple[BlockSparse, Tensor, Tensor]:
    """A sparse matrix and two dense ones; halves where float32 has no kernel."""
    dtype = torch.float32 if backend.name == "cpu" else torch.bfloat16
    s, a, b = (t.to(dtype) for t in _random(backend, (40, 50), (40, 24), (24, 50)))
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]], dtype=torch.bool, device=backend.device)
    return BlockSparse.from_dense(s, 16, mask), a, b


def _test_block_sparse_dsd(backend: Backend) -> None:
    s, _, b = _blocks(backend)
    assert_as_good_as_torch(dsd(s, b.mT), reference.dsd, s.to_dense(), b.mT)


def _test_block_sparse_sdd(backend: Backend) -> None:
    s, a, b = _blocks(backend)
    assert_as_good_as_torch(sdd(a, b, s.topology).to_dense(), reference.sdd, a, b, s.topology)


def _half_kept(backend: Backend) -> tuple[Tensor, Tensor]:
    """x and a matrix; halves where float32 has no kernel."""
    dtype = torch.float32 if backend.name == "cpu" else torch.bfloat16
    x, w = (t.to(dtype) for t in _random(backend, (5, 80), (32, 80)))
    return x, w


def _test_semi_structured_mask(backend: Backend) -> None:
    _, w = _half_kept(backend)
    for both in (False, True):

        def kept(w: Tensor, both: bool = both) -> Tensor:  # ones and zeros in the dtype that it is computed in
            return reference.semi_structured_mask(w, both_directions=both).to(w.dtype)

        assert_as_good_as_torch(semi_structured_mask(w, both_directions=both).to(w.dtype), kept, w)


def _test_semi_structured_pack(backend: Backend) -> None:
    _, w = _half_kept(backend)
    mask = reference.semi_structured_mask(w, both_directions=True)
    packed = SemiStructured.from_dense(w, mask, both_directions=True)
    assert_as_good_as_torch((packed.to_dense(), packed.t().to_dense()), lambda w: (w * mask, (w * mask).mT), w)


def _test_semi_structured_linear(backend: Backend) -> None:
    x, w = _half_kept(backend)
    packed = SemiStructured.from_dense(w, reference.semi_structured_mask(w))
    assert_as_good_as_torch(semi_structured_linear(x, packed), reference.semi_structured_linear, x, packed)


SELF_TESTS: dict[str, Callable[[Backend], None]] = {
    "norm_forward": _test_norm,
    "norm_forward_out": _test_norm_out,
    "norm_backward": _test_norm_backward,
    "glu_forward": _test_glu,
    "glu_forward_out": _test_glu_out,
    "glu_backward": _test_glu_backward,
    "rope_forward": _test_rope,
    "rope_forward_out": _test_rope_out,
    "quantized_linear_forward": _test_quantized_linear,
    "quantized_linear_dequantize": _test_dequantize,
    "block_sparse_dsd": _test_block_sparse_dsd,
    "block_sparse_sdd": _test_block_sparse_sdd,
    "semi_structured_mask": _test_semi_structured_mask,
    "semi_structured_pack": _test_semi_structured_pack,
    "semi_structured_linear": _test_semi_structured_linear,
    "lora_shrink": _test_lora_shrink,
    "lora_expand": _test_lora_expand,
}
