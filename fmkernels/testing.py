# SPDX-License-Identifier: Apache-2.0
"""What tests share: the backends of this machine, attention cases, and the rule that decides how exact is enough."""

from __future__ import annotations

import importlib.util
import math
import sys
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._library import has_kernel, library_dir, ops
from .block_mask import BlockMask

EMULATED_NAMESPACE = "fmkernels_emulated"
_root = Path(__file__).resolve().parent.parent
_emulated_library = _root / "build" / "emulated" / "_C_emulated.abi3.so"


def _load_emulated() -> str | None:
    """Loads the CUDA kernels over the emulator, which only a build of the repository has; else why they are absent."""
    if library_dir != Path(__file__).parent:
        return "left out: FMKERNELS_LIBRARY_DIR names the libraries under test"
    if not _emulated_library.exists():
        return "not built: `run.py test` builds it, except with FMKERNELS_CUDA=off"
    if importlib.util.find_spec("emulator") is None:
        sys.path.append(str(_root))
    try:
        import emulator

        torch.ops.load_library(_emulated_library)
    except (ImportError, OSError) as error:
        return f"broken: {error}"
    emulator.configure(counters=False)
    return None


emulated_error: str | None = _load_emulated()  # why there is no emulated backend; None where there is


@dataclass(frozen=True)
class Backend:
    """One execution of the kernels: the device of the tensors, and the namespace that the ops are bound to."""

    name: str
    device: str
    namespace: str = "fmkernels"
    architecture: int = 80  # of the emulated GPU
    num_sms: int = 0  # its multiprocessors; 0: those of a well-known one

    def __str__(self) -> str:
        return self.name

    @property
    def has_device(self) -> bool:
        return self.device != "cuda" or torch.cuda.is_available()

    def has_kernel(self, op: str) -> bool:
        return has_kernel(op, self.device, self.namespace)

    @property
    def has_tensor_cores(self) -> bool:
        """Whether its matrix products are those of a GPU: of half inputs, weights rounded to their dtype."""
        return self.name != "cpu"

    @property
    def attention_dtypes(self) -> tuple[torch.dtype, ...]:
        """What attention takes, the first for tests to which it does not matter."""
        return (torch.bfloat16, torch.float16, torch.float32) if self.has_tensor_cores else FLOAT_DTYPES

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a public function of fmkernels over this backend's ops.

        Emulated, it raises `emulator.FaultError` with what the checks found: a kernel that is wrong and happens to give
        the right result is wrong.
        """
        before = ops.namespace
        ops.use(self.namespace)
        try:
            with self._watch():
                return function(*args, **kwargs)
        finally:
            ops.use(before)

    def _watch(self) -> AbstractContextManager[Any]:
        if self.namespace != EMULATED_NAMESPACE:
            return nullcontext()
        import emulator

        return emulator.watch(architecture=self.architecture, num_sms=self.num_sms)


FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = (Backend("cpu", "cpu"), Backend("cuda", "cuda"))
if emulated_error is None:
    BACKENDS += (Backend("emulated", "cpu", EMULATED_NAMESPACE),)


def backends(op: str) -> list[Backend]:
    """Every backend of this machine that has a kernel of the op, as in `backends("attention_forward")`."""
    return [backend for backend in BACKENDS if backend.has_kernel(op) and backend.has_device]


@dataclass(frozen=True)
class Case:
    """The inputs of one attention call. The tensors depend on the fields and on nothing else."""

    name: str
    batch: int = 2
    seq_q: int = 33
    seq_k: int = 65
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    v_head_dim: int | None = None  # None: head_dim
    dtype: torch.dtype = torch.float32
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi: str = ""  # "heads": [heads], "batch": [batch, heads]
    sinks: bool = False
    bias: str | None = None  # the dimensions of b h q k that are not broadcast: "qk" is [1, 1, seq_q, seq_k]
    bias_dtype: torch.dtype | None = None  # None: dtype
    bias_hides: bool = False  # about a quarter of the entries is -inf
    block_mask: BlockMask | None = field(default=None, repr=False)  # has no part in the tensors
    transposed: bool = False  # [batch, heads, seq, dim] in memory
    seqlens: tuple[tuple[int, int], ...] | None = None  # (query, key) lengths of packed sequences
    dropout_p: float = field(default=0.0, repr=False)  # the other tensors do not depend on it

    def __str__(self) -> str:
        return self.name

    @property
    def is_packed(self) -> bool:
        return self.seqlens is not None

    def inputs(self, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(positional arguments, keyword arguments) of `attention`, or of `attention_varlen` for packed sequences."""
        generator = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        def tokens(batch: int, seq: int, heads: int, dim: int) -> Tensor:
            if self.is_packed:
                return normal(seq, heads, dim, dtype=self.dtype)
            if self.transposed:
                return normal(batch, heads, seq, dim, dtype=self.dtype).transpose(1, 2)
            return normal(batch, seq, heads, dim, dtype=self.dtype)

        batch, seq_q, seq_k = self.batch, self.seq_q, self.seq_k
        if self.seqlens is not None:
            batch, seq_q, seq_k = len(self.seqlens), *(sum(pair[i] for pair in self.seqlens) for i in (0, 1))
        v_head_dim = self.head_dim if self.v_head_dim is None else self.v_head_dim
        args: tuple[Any, ...] = (
            tokens(batch, seq_q, self.heads, self.head_dim),
            tokens(batch, seq_k, self.kv_heads, self.head_dim),
            tokens(batch, seq_k, self.kv_heads, v_head_dim),
        )
        if self.seqlens is not None:
            lengths = torch.tensor([(0, 0), *self.seqlens], dtype=torch.int32).to(device)
            prefixes = lengths.cumsum(0, dtype=torch.int32)
            longest = lengths.amax(0).tolist()
            args += (prefixes[:, 0].contiguous(), prefixes[:, 1].contiguous(), *longest)
        kwargs: dict[str, Any] = {
            name: getattr(self, name) for name, default in _OPTION_DEFAULTS.items() if getattr(self, name) != default
        }
        if self.alibi:
            kwargs["alibi_slopes"] = normal(*((batch,) if self.alibi == "batch" else ()), self.heads).abs() * 0.1
        if self.sinks:
            kwargs["sinks"] = normal(self.heads)
        if self.bias is not None:
            full = {"b": batch, "h": self.heads, "q": seq_q, "k": seq_k}
            bias = normal(*(size if dim in self.bias else 1 for dim, size in full.items()))
            if self.bias_hides:
                bias[torch.rand(bias.shape, generator=generator).to(device) < 0.25] = -math.inf
            kwargs["bias"] = bias.to(self.dtype if self.bias_dtype is None else self.bias_dtype)
        kwargs |= {name: value.to(device) for name, value in kwargs.items() if isinstance(value, BlockMask)}
        if self.dropout_p:
            kwargs["dropout_rng"] = torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator).to(device)
        return args, kwargs


_OPTIONS = ("causal", "window", "softmax_scale", "softcap", "block_mask", "dropout_p")
_OPTION_DEFAULTS = {option.name: option.default for option in fields(Case) if option.name in _OPTIONS}


# Where the error of torch is measured: at the inputs and at neighbours with full mantissas, two or, for few elements,
# more. A run of few elements can be right by luck, and float32 arithmetic on the short mantissas of half inputs rounds
# hardly at all.
_ENOUGH_ELEMENTS, _MOST_NEIGHBOURS = 2048, 8


def _neighbours(num_elements: int) -> list[float]:
    count = min(max(2, _ENOUGH_ELEMENTS // max(num_elements, 1)), _MOST_NEIGHBOURS)
    return [1.0, *(1.0 + (math.pi if i % 2 else -math.e) * (i // 2 + 1) / 4096 for i in range(count))]


def assert_as_good_as_torch(
    actual: Tensor | Sequence[Tensor],
    reference: Callable[..., Tensor | Sequence[Tensor]],
    *inputs: Any,
    computed_in: torch.dtype | None = None,
    **kwargs: Any,
) -> None:
    """Asserts that a result is about as accurate as plain torch: no tolerance is typed by hand.

    The truth is the reference in float64. Allowed is twice the largest error that the same reference makes in float32,
    plus one unit in the last place of the output's dtype, at the largest value of the truth. Half inputs are held to
    float32 as well, since the kernels accumulate in it: hardly more than the rounding of the output is allowed. Where
    that cannot be promised, `computed_in` names the dtype that the reference may compute in.

    Infinities and NaN must stand exactly where the truth, rounded to the output's dtype, has them.
    """

    def run(dtype: torch.dtype, factor: float) -> list[Tensor]:
        def cast(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            value = value.detach()
            return (value if factor == 1.0 else value.to(computed_in) * factor).to(dtype)

        return _results(reference(*map(cast, inputs), **{name: cast(value) for name, value in kwargs.items()}))

    computed_in = computed_in or torch.float32
    truths = run(torch.float64, 1.0)
    torch_errors = [0.0] * len(truths)
    for factor in _neighbours(min(truth.numel() for truth in truths)):
        pairs = zip(run(computed_in, factor), truths if factor == 1.0 else run(torch.float64, factor), strict=True)
        torch_errors = [max(known, _error(*pair)) for known, pair in zip(torch_errors, pairs, strict=True)]
    results = _results(actual)
    assert len(results) == len(truths), f"{len(results)} outputs, the reference has {len(truths)}"
    for index, (result, truth, torch_error) in enumerate(zip(results, truths, torch_errors, strict=True)):
        assert result.shape == truth.shape, f"output {index}: shape {list(result.shape)}, not {list(truth.shape)}"
        rounded = truth.to(result.dtype)
        for what, found, expected in (
            ("NaN", result.isnan(), rounded.isnan()),
            ("infinity", torch.sign(result) * result.isinf(), torch.sign(rounded) * rounded.isinf()),
        ):
            wrong = (found.nan_to_num() != expected.nan_to_num()).sum().item()
            assert wrong == 0, f"output {index}: {what} at {wrong} places of {truth.numel()} other than in the truth"
        finite = truth[rounded.isfinite()]
        largest = finite.abs().max().item() if finite.numel() > 0 else 0.0
        error = _error(result, truth)
        allowed = 2 * torch_error + _unit_in_last_place(result.dtype, largest)
        assert error <= allowed, (
            f"output {index}: error {error:.3g}, allowed {allowed:.3g}; torch in {computed_in} has {torch_error:.3g}"
        )


def assert_attention(
    backend: Backend, actual: Sequence[Tensor], reference: Callable[..., Sequence[Tensor]], *inputs: Any, **kwargs: Any
) -> None:
    """`assert_as_good_as_torch` for (o, lse): on tensor cores o may be computed in the dtype of the inputs."""
    dtype = inputs[0].dtype if backend.has_tensor_cores else None
    reference = as_multiplied(backend, reference)
    o, lse = ((lambda *a, _i=i, **k: reference(*a, **k)[_i]) for i in (0, 1))
    assert_as_good_as_torch(actual[0], o, *inputs, computed_in=dtype, **kwargs)
    assert_as_good_as_torch(actual[1], lse, *inputs, **kwargs)


def as_multiplied(backend: Backend, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference; in float32 and for tensor cores of q, k and v as split_tf32 has them, which halves are already."""

    def run(*inputs: Any, **kwargs: Any) -> Any:
        if backend.has_tensor_cores and inputs[0].dtype == torch.float32:
            inputs = (*map(split_tf32, inputs[:3]), *inputs[3:])
        return reference(*inputs, **kwargs)

    return run


def split_tf32(x: Tensor) -> Tensor:
    """The sum of two tf32 that stands for a float32: its first 11 bits, and the nearest 11 of what is left."""
    high = (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
    low = ((x - high).view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), high + low, x)


def _error(result: Tensor, truth: Tensor) -> float:
    """The largest deviation where both are finite."""
    finite = truth.isfinite() & result.isfinite()
    return (result.double() - truth)[finite].abs().max().item() if finite.any() else 0.0


def _results(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [t.detach() for t in ([value] if isinstance(value, Tensor) else value)]


def _unit_in_last_place(dtype: torch.dtype, value: float) -> float:
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** (math.frexp(max(value, info.tiny))[1] - 1)
