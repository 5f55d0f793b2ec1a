# SPDX-License-Identifier: Apache-2.0
"""`attention` and `attention_varlen` beside torch's scaled_dot_product_attention (SDPA).

Tensors are made [batch, seq, heads, head_dim]; SDPA gets transposed views of them, made outside the timed region.
float32 on the CPU, bfloat16 on CUDA, unless the case says otherwise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from measure import Contender, num_sets
from torch import Tensor

import fmkernels
from fmkernels._library import has_kernel

sdpa = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    head_dim: int
    seq: int
    kv_heads: int | None = None

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.kv_heads is None else f"{self.heads}/{self.kv_heads}"
        return f"b{self.batch} h{heads} d{self.head_dim} s{self.seq}"

    def qkv(self, dtype: torch.dtype, device: torch.device, seed: int = 0, seq_q: int | None = None) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = [(self.seq if seq_q is None else seq_q, self.heads)] + 2 * [(self.seq, self.kv_heads or self.heads)]
        return [
            torch.randn(self.batch, seq, heads, self.head_dim, generator=generator, device=device).to(dtype)
            for seq, heads in shapes
        ]

    def flops(self, pairs: int, training: bool = False) -> int:
        """Both products over `pairs` visible (query, key) pairs a head; training has five more."""
        return (14 if training else 4) * self.batch * self.heads * self.head_dim * pairs


def causal_pairs(seq: int) -> int:
    return seq * (seq + 1) // 2


def swap(x: Tensor) -> Tensor:
    """[batch, seq, heads, head_dim] as [batch, heads, seq, head_dim] and back: a view."""
    return x.transpose(1, 2)


def torch_contender(name: str, run, qkv: list[Tensor]) -> Contender:
    return Contender(name, run, [tuple(swap(x) for x in qkv)], to_layout=swap)


def trained(attention):
    """Forward and backward of `attention`, as a function of its inputs and the gradient of its result."""

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        *inputs, grad = given
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in inputs]
            return torch.autograd.grad(attention(*leaves), leaves, grad)

    return run


def swap_grads(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of q, k and v, and of a bias, whose layout all share."""
    return (*map(swap, grads[:3]), *grads[3:])


DENSE = [
    Case(batch=4, heads=16, head_dim=64, seq=512),
    Case(batch=1, heads=16, head_dim=128, seq=512),
    Case(batch=2, heads=16, head_dim=64, seq=1024),
    Case(batch=1, heads=8, head_dim=128, seq=1024),
    Case(batch=1, heads=8, head_dim=64, seq=2048),
    Case(batch=1, heads=16, head_dim=128, seq=2048),
    Case(batch=1, heads=8, head_dim=64, seq=4096),
    Case(batch=1, heads=8, head_dim=128, seq=4096),
]
HALF = [
    Case(batch=4, heads=16, head_dim=64, seq=512),
    Case(batch=1, heads=8, head_dim=128, seq=1024),
    Case(batch=1, heads=8, head_dim=64, seq=2048),
]
DECODE = [
    Case(batch=1, heads=32, kv_heads=8, head_dim=128, seq=4096),
    Case(batch=4, heads=32, kv_heads=8, head_dim=64, seq=4096),
    Case(batch=1, heads=9, kv_heads=3, head_dim=64, seq=4096),
    Case(batch=8, heads=9, kv_heads=3, head_dim=64, seq=4096),
    Case(batch=1, heads=9, kv_heads=3, head_dim=128, seq=4096),
]
SHORT = [Case(batch=1, heads=9, kv_heads=3, head_dim=64, seq=seq) for seq in (16, 32, 64, 128)]
SHORT += [Case(batch=8, heads=9, kv_heads=3, head_dim=64, seq=64), Case(batch=1, heads=16, head_dim=128, seq=64)]


@pytest.fixture(autouse=True)
def _kernel_of_this_device(device):
    if not has_kernel("attention_forward", device.type):
        pytest.skip(f"attention has no {device.type} kernel in this build")


@pytest.fixture
def dtype(device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.mark.parametrize("case", DENSE, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_dense(compare, device, dtype, case, causal):
    qkv = case.qkv(dtype, device)
    compare(
        "causal" if causal else "full",
        str(case),
        Contender("fmkernels", functools.partial(fmkernels.attention, causal=causal), [tuple(qkv)]),
        [torch_contender("SDPA", functools.partial(sdpa, is_causal=causal), qkv)],
        flops=case.flops(causal_pairs(case.seq) if causal else case.seq**2),
    )


@pytest.mark.parametrize("case", HALF, ids=str)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("peer", ["own fp32", "upcast"])
def test_half(compare, device, case, half, causal, peer):
    """Half inputs beside the own fp32 kernel on the same values, and beside the job in torch: upcast, SDPA, round."""
    if device.type != "cpu":
        pytest.skip("on CUDA half dtypes are the native ones, fp32 and upcasting are no yardstick")
    qkv = case.qkv(half, device)
    dtype_name = "bf16" if half == torch.bfloat16 else "fp16"
    attention = functools.partial(fmkernels.attention, causal=causal)

    def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q.float(), k.float(), v.float(), is_causal=causal).to(half)

    if peer == "upcast":
        other = torch_contender("upcast + SDPA", upcast, qkv)
    else:
        other = Contender("fmkernels fp32", attention, [tuple(x.float() for x in qkv)])
    compare(
        f"half / {peer}",
        f"{case} {dtype_name} {'causal' if causal else 'full'}",
        Contender("fmkernels", attention, [tuple(qkv)]),
        [other],
        flops=case.flops(causal_pairs(case.seq) if causal else case.seq**2),
        check_dtype=peer == "upcast",
    )


@pytest.mark.parametrize("case", DECODE, ids=str)
@pytest.mark.parametrize("peer", ["enable_gqa", "folded"])
def test_decode(compare, device, dtype, cache_bytes, case, peer):
    """One query a sequence, keys and values cold in memory. The peer may keep them in either layout, the faster counts.

    `folded` is SDPA after the caller's own trick for decoding: the query heads of a group become queries of one head.
    """
    kv_heads, group = case.kv_heads, case.heads // case.kv_heads
    element_bytes = torch.finfo(dtype).bits // 8
    kv_bytes = 2 * case.batch * case.seq * kv_heads * case.head_dim * element_bytes
    q_bytes = case.batch * case.heads * case.head_dim * element_bytes
    sets = [case.qkv(dtype, device, seed, seq_q=1) for seed in range(num_sets(kv_bytes, cache_bytes))]

    def fold(q: Tensor) -> Tensor:
        return q.view(case.batch, kv_heads, group, case.head_dim) if peer == "folded" else swap(q)

    def unfold(o: Tensor) -> Tensor:
        return o.reshape(case.batch, 1, case.heads, case.head_dim) if peer == "folded" else swap(o)

    run = sdpa if peer == "folded" else functools.partial(sdpa, enable_gqa=True)
    compare(
        "decode" if peer == "enable_gqa" else "decode / folded",
        str(case),
        Contender("fmkernels", fmkernels.attention, [tuple(qkv) for qkv in sets]),
        [
            Contender("SDPA bshd", run, [(fold(q), swap(k), swap(v)) for q, k, v in sets], unfold),
            Contender(
                "SDPA bhsd", run, [(fold(q), swap(k).contiguous(), swap(v).contiguous()) for q, k, v in sets], unfold
            ),
        ],
        num_bytes=kv_bytes + 2 * q_bytes,
    )


@pytest.mark.parametrize("window", [256, 1024], ids="w{}".format)
@pytest.mark.parametrize("case", [Case(1, 8, 64, 4096), Case(1, 8, 128, 2048)], ids=str)
def test_window(compare, device, dtype, case, window):
    """Causal sliding window: a query sees `window` keys, itself the last. SDPA's mask is made before the timing."""
    qkv = case.qkv(dtype, device)
    distance = torch.arange(case.seq, device=device)[:, None] - torch.arange(case.seq, device=device)
    mask = (distance >= 0) & (distance < window)
    compare(
        "window",
        f"{case} w{window}",
        Contender(
            "fmkernels", functools.partial(fmkernels.attention, causal=True, window=(window - 1, 0)), [tuple(qkv)]
        ),
        [torch_contender("SDPA, bool mask", functools.partial(sdpa, attn_mask=mask), qkv)],
        flops=case.flops(int(mask.sum())),
    )


@pytest.mark.parametrize("passes", ["forward", "forward + backward"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("case", [Case(1, 4, 64, 4096), Case(1, 2, 128, 4096)], ids=str)
def test_documents(compare, device, dtype, case, causal, passes):
    """Eight documents that see themselves alone: by a block mask and by a dense one, both made before the timing."""
    lengths = torch.tensor([1024, 37, 300, 511, 1200, 64, 160, 800], device=device)
    document = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    sizes = {"batch": None, "heads": None, "seq_q": case.seq, "seq_k": case.seq}
    mask = fmkernels.create_block_mask(
        lambda b, h, i, j: (document[i] == document[j]) & (j <= i if causal else True), **sizes, device=device
    )
    dense = mask.to_dense()
    q, k, v = case.qkv(dtype, device)
    pairs = int(dense.sum())

    ours, theirs = functools.partial(fmkernels.attention, block_mask=mask), functools.partial(sdpa, attn_mask=dense)
    inputs = [q, k, v]
    peer = torch_contender("SDPA, bool mask", theirs, inputs)
    if passes != "forward":
        ours, inputs = trained(ours), [q, k, v, torch.randn_like(q)]
        peer = Contender("SDPA, bool mask", trained(theirs), [tuple(map(swap, inputs))], swap_grads)
    compare(
        "documents" if passes == "forward" else "documents / training",
        f"{case} {'causal' if causal else 'full'}",
        Contender("fmkernels", ours, [tuple(inputs)]),
        [peer],
        flops=case.flops(pairs, training=passes != "forward"),
    )


@pytest.mark.parametrize(
    "lengths",
    [[1024, 37, 300, 511, 2000, 64, 160], [17, 128, 64, 33, 96, 250, 8, 71] * 4],
    ids=["7 sequences to 2000", "32 sequences to 250"],
)
def test_varlen(compare, device, dtype, lengths):
    """Packed causal sequences beside a loop of SDPA over them, its results packed again."""
    case = Case(batch=1, heads=16, head_dim=64, seq=sum(lengths))
    q, k, v = (x[0] for x in case.qkv(dtype, device))
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        # [seq, heads, head_dim] -> [1, heads, seq, head_dim]: SDPA keeps its fused kernel for four dimensions only
        results = [sdpa(*(x.transpose(0, 1)[None] for x in part), is_causal=True)[0].transpose(0, 1) for part in parts]
        return torch.cat(results)

    args = (q, k, v, cu_seqlens, cu_seqlens, max(lengths), max(lengths))
    compare(
        "varlen",
        f"{len(lengths)} sequences to {max(lengths)}",
        Contender("fmkernels", functools.partial(fmkernels.attention_varlen, causal=True), [args]),
        [Contender("loop of SDPA", loop, [(q, k, v)])],
        flops=case.flops(sum(map(causal_pairs, lengths))),
    )


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_short(compare, device, dtype, case):
    """Short prompts, everything in the cache: the cost of a call counts."""
    qkv = case.qkv(dtype, device)
    compare(
        "short",
        str(case),
        Contender("fmkernels", functools.partial(fmkernels.attention, causal=True), [tuple(qkv)]),
        [torch_contender("SDPA", functools.partial(sdpa, is_causal=True, enable_gqa=case.kv_heads is not None), qkv)],
        flops=case.flops(causal_pairs(case.seq)),
    )


def naive(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
    """The composition that a framework without a kernel runs, [batch, heads, seq, head_dim]."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v


TRAINING = [Case(1, 4, head_dim, seq) for head_dim in (64, 128) for seq in (512, 1024, 2048)]


def contiguous_swap(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The layout that torch likes best."""
    return tuple(swap(t).contiguous() for t in tensors)


@pytest.mark.parametrize("case", TRAINING, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_training(compare, device, dtype, case, causal):
    """Forward and backward."""
    inputs = case.qkv(dtype, device)
    inputs.append(torch.randn_like(inputs[0]))
    compare(
        "training" if causal else "training / full",
        str(case),
        Contender("fmkernels", trained(functools.partial(fmkernels.attention, causal=causal)), [tuple(inputs)]),
        [
            Contender(name, trained(functools.partial(peer, is_causal=causal)), [contiguous_swap(inputs)], swap_grads)
            for name, peer in (("SDPA", sdpa), ("naive", naive))
        ],
        flops=case.flops(causal_pairs(case.seq) if causal else case.seq**2, training=True),
    )


@pytest.mark.parametrize("case", TRAINING[:2] + TRAINING[3:5], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_training_with_bias(compare, device, dtype, case, causal):
    """A bias [heads, seq, seq] that gets a gradient. Causal, the peers get its sum with a mask made before the timing:
    SDPA takes a mask or `is_causal`, never both."""
    qkv = case.qkv(dtype, device)
    grad = torch.randn_like(qkv[0])
    bias = torch.randn(1, case.heads, case.seq, case.seq, device=device).to(dtype)
    hidden = torch.full((case.seq, case.seq), -torch.inf, dtype=dtype, device=device).triu(1)
    swapped = (*contiguous_swap(qkv), bias, swap(grad).contiguous())

    def masked(attention):
        return trained(lambda q, k, v, bias: attention(q, k, v, bias + hidden if causal else bias))

    ours = trained(lambda q, k, v, bias: fmkernels.attention(q, k, v, bias=bias, causal=causal))
    compare(
        "training / bias" if causal else "training / bias, full",
        str(case),
        Contender("fmkernels", ours, [(*qkv, bias, grad)]),
        [Contender(name, masked(peer), [swapped], swap_grads) for name, peer in (("SDPA", sdpa), ("naive", naive))],
        flops=case.flops(causal_pairs(case.seq) if causal else case.seq**2, training=True),
    )


@pytest.mark.parametrize("case", TRAINING[:2] + TRAINING[3:5], ids=str)
def test_training_half(compare, device, case):
    """bfloat16 beside the same job in torch on a CPU: upcast, SDPA and its gradients, round.

    The gradients of v are compared: those of q and k go through o, which only torch keeps in float32 till then.
    """
    if device.type != "cpu":
        pytest.skip("on CUDA bfloat16 is the native dtype, upcasting is no yardstick")
    inputs = case.qkv(torch.bfloat16, device)
    inputs.append(torch.randn_like(inputs[0]))

    def upcast(*given: Tensor) -> tuple[Tensor, ...]:
        grads = trained(functools.partial(sdpa, is_causal=True))(*(t.float() for t in given))
        return tuple(grad.to(torch.bfloat16) for grad in grads)

    ours = trained(functools.partial(fmkernels.attention, causal=True))
    compare(
        "training / bf16",
        f"{case} causal",
        Contender("fmkernels", ours, [tuple(inputs)], lambda grads: grads[2]),
        [Contender("upcast + SDPA", upcast, [contiguous_swap(inputs)], lambda grads: swap(grads[2]))],
        flops=case.flops(causal_pairs(case.seq), training=True),
    )


@pytest.mark.parametrize("case", [Case(1, 4, 64, 1024), Case(1, 4, 128, 1024)], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("peer", ["no dropout", "SDPA"])
def test_dropout(compare, device, dtype, case, training, peer):
    """Beside the same without dropout, which tells what it costs, and beside torch, forward and with gradients.

    Each drops weights of its own, so of the results the shapes alone are compared.
    """
    inputs = case.qkv(dtype, device)
    inputs += [torch.randn_like(inputs[0])] if training else []

    def run(attention):
        return trained(attention) if training else attention

    def shapes(results):
        return tuple(map(torch.zeros_like, results)) if training else torch.zeros_like(results)

    dropping = functools.partial(fmkernels.attention, dropout_p=0.1)
    if peer == "no dropout":
        other = Contender("no dropout", run(fmkernels.attention), [tuple(inputs)], shapes)
    else:
        swapped = tuple(map(swap, inputs))
        to_layout = (lambda grads: shapes(swap_grads(grads))) if training else (lambda o: shapes(swap(o)))
        other = Contender("SDPA", run(functools.partial(sdpa, dropout_p=0.1)), [swapped], to_layout)
    compare(
        f"dropout / {peer}",
        f"{case} {'training' if training else 'forward'}",
        Contender("fmkernels", run(dropping), [tuple(inputs)], shapes),
        [other],
        flops=case.flops(case.seq**2, training),
    )
