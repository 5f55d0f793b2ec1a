# SPDX-License-Identifier: Apache-2.0
"""What this installation is, and whether its kernels are right on this machine: the text of a bug report."""

from __future__ import annotations

import ctypes
import json
import platform
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import (
    _library,
    _self_tests_block_codec,
    _self_tests_layers,
    _self_tests_moe,
    _self_tests_paged_kv,
    _self_tests_peer_all_reduce,
    _self_tests_tokens,
    reference,
)
from ._version import __version__
from .attention import attention, attention_varlen
from .merge_attention import merge_attention
from .testing import BACKENDS as ALL_BACKENDS
from .testing import Backend, Case, as_multiplied, assert_as_good_as_torch, assert_attention

BACKENDS = tuple(backend for backend in ALL_BACKENDS if backend.namespace == "fmkernels")
"""Those of an installation: the emulated one belongs to the tests."""


def report() -> dict[str, Any]:
    """Versions, machine, the op x backend table and the outcome of one small case per op, as plain JSON values.

    An op is, on each backend, "passed", "missing" (the library has no kernel), "no device", or the text of its failure.
    "problems" has a sentence for each case that failed, for an op without a kernel on the CPU, and for CUDA kernels
    that were built and do not load.
    """
    ops = {name: {backend.name: _outcome(name, backend) for backend in BACKENDS} for name in _library.op_names}
    problems = [
        f"{name} on {backend}: {outcome}"
        for name, outcomes in ops.items()
        for backend, outcome in outcomes.items()
        if outcome not in (("passed",) if backend == "cpu" else ("passed", "missing", "no device"))
    ]
    if _library.cuda_error is not None and _library.cuda_path.exists():
        problems.append(f"the CUDA kernels were built and do not load: {_library.cuda_error}")
    return {"problems": problems, "versions": _versions(), "machine": _machine(), "ops": ops}


def run(as_json: bool = False) -> int:
    """Prints the report; returns the exit code: 0 when there is no problem."""
    found = report()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        console = Console()
        for title in ("versions", "machine"):
            table = Table("", "", title=title, title_justify="left", show_header=False)
            for key, value in found[title].items():
                table.add_row(key, escape(str(value)))
            console.print(table)
        console.print(op_table(found))
        for problem in found["problems"] or ["All self-tests passed."]:
            console.print(problem, style="bold red" if found["problems"] else "", markup=False)
    return 1 if found["problems"] else 0


def op_table(found: dict[str, Any]) -> Table:
    """Which ops run on which backend of this machine, from a `report()`."""
    table = Table("op", *(backend.name for backend in BACKENDS), title="ops", title_justify="left")
    for name, outcomes in found["ops"].items():
        table.add_row(name, *(escape(outcomes[backend.name]) for backend in BACKENDS))
    return table


def _versions() -> dict[str, str | None]:
    return {
        "fmkernels": __version__,
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda,
        "Python": platform.python_version(),
        "compiler of _C": _text("_C", "fmkernels_compiler"),
        "nvcc of _C_cuda": _text("_C_cuda", "fmkernels_cuda_version"),
        "architectures of _C_cuda": _text("_C_cuda", "fmkernels_cuda_archs"),
        "CUDA driver": _driver(),
    }


def _machine() -> dict[str, Any]:
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            gpus.append(f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "CPU kernels": instruction_set() or "none: FMKERNELS_CPU_ISA does not fit this processor",
        "CUDA kernels": _library.cuda_error or "loaded",
        "GPUs": ", ".join(gpus) or "none",
    }


def instruction_set() -> str | None:
    """That of the CPU kernels: generic, avx2 or avx512; None where FMKERNELS_CPU_ISA asks for what is not here."""
    return _text("_C", "fmkernels_cpu_isa")


def _text(library: str, function: str) -> str | None:
    """The result of a C function of a loaded library; None where the library is not there, or it returns null."""
    if library == "_C_cuda" and _library.cuda_error is not None:
        return None
    getter = getattr(ctypes.CDLL(str(_library.library_dir / f"{library}.abi3.so")), function)
    getter.restype = ctypes.c_char_p
    value = getter()
    return None if value is None else value.decode()


def _driver() -> str | None:
    """The newest CUDA that the driver supports."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    status = driver.cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}" if status == 0 else f"error {status}"


def _processor() -> str:
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "unknown")()
    try:
        with open("/proc/cpuinfo") as lines:  # noqa: PTH123 - platform.processor() is empty on Linux
            name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} (torch: {capability})"


def _outcome(name: str, backend: Backend) -> str:
    if not backend.has_kernel(name):
        return "missing"
    if not backend.has_device:
        return "no device"
    if not __debug__:
        return "not tested: python -O removes the checks"
    try:
        backend.run(SELF_TESTS[name], backend)
    except Exception as error:  # whatever it is, it is what the report is for
        return f"{type(error).__name__}: {error}"
    return "passed"


_EVERYTHING = Case("doctor", causal=True, window=(40, -1), softcap=20.0, alibi="heads", sinks=True, bias="hqk")
_PACKED = Case("doctor", seqlens=((1, 70), (0, 3), (33, 33)), causal=True)


def _inputs(case: Case, backend: Backend) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """In float32 and, on a GPU, in a dtype whose products are others."""
    dtypes = dict.fromkeys((backend.attention_dtypes[0], torch.float32))
    return [replace(case, dtype=dtype).inputs(backend.device) for dtype in dtypes]


def _test_attention(backend: Backend) -> None:
    for args, kwargs in _inputs(_EVERYTHING, backend):
        assert_attention(backend, attention(*args, **kwargs, return_lse=True), reference.attention, *args, **kwargs)


def _test_attention_varlen(backend: Backend) -> None:
    for args, kwargs in _inputs(_PACKED, backend):
        actual = attention_varlen(*args, **kwargs, return_lse=True)
        assert_attention(backend, actual, reference.attention_varlen, *args[:5], **kwargs)


def _gradients(function: Callable[..., Any], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of the sum of all o squared and all lse; lse squared would weigh its rounding, which no backward can undo."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    o, lse = function(*leaves)
    return torch.autograd.grad([o.square().sum(), lse.sum()], leaves)


def _assert_gradients(backend: Backend, function: Callable[..., Any], expected: Any, *tensors: torch.Tensor) -> None:
    actual = _gradients(lambda *leaves: function(*leaves, return_lse=True), *tensors)
    truth = as_multiplied(backend, lambda *leaves: _gradients(expected, *leaves))
    assert_as_good_as_torch(actual, truth, *tensors, computed_in=tensors[0].dtype)


def _test_attention_backward(backend: Backend) -> None:
    for args, kwargs in _inputs(_EVERYTHING, backend):
        _test_gradients(backend, args, kwargs)


def _test_gradients(backend: Backend, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    leaves = (*args, kwargs.pop("sinks"), kwargs.pop("bias"))
    slopes = kwargs.pop("alibi_slopes")

    def run(q: Any, k: Any, v: Any, sinks: Any, bias: Any, **more: Any) -> Any:
        return attention(q, k, v, sinks=sinks, bias=bias, alibi_slopes=slopes, **kwargs, **more)

    def expected(q: Any, k: Any, v: Any, sinks: Any, bias: Any) -> Any:
        return reference.attention(q, k, v, sinks=sinks, bias=bias, alibi_slopes=slopes.to(q.dtype), **kwargs)

    _assert_gradients(backend, run, expected, *leaves)


def _test_attention_varlen_backward(backend: Backend) -> None:
    for args, kwargs in _inputs(_PACKED, backend):
        _test_packed_gradients(backend, args, kwargs)


def _test_packed_gradients(backend: Backend, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    def run(*leaves: Any, **more: Any) -> Any:
        return attention_varlen(*leaves, *args[3:], **kwargs, **more)

    def expected(*leaves: Any) -> Any:
        return reference.attention_varlen(*leaves, *args[3:5], **kwargs)

    _assert_gradients(backend, run, expected, *args[:3])


def _partial_results(backend: Backend) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 3, 16), (2, 3, 5)) * 2
    return tuple(torch.randn(shape, generator=generator).to(backend.device) for shape in shapes)


def _test_merge_attention(backend: Backend) -> None:
    inputs = _partial_results(backend)
    assert_as_good_as_torch(merge_attention(*inputs), reference.merge_attention, *inputs)


def _test_merge_attention_backward(backend: Backend) -> None:
    inputs = _partial_results(backend)
    expected = lambda *tensors: _gradients(reference.merge_attention, *tensors)  # noqa: E731
    assert_as_good_as_torch(_gradients(merge_attention, *inputs), expected, *inputs)


SELF_TESTS: dict[str, Callable[[Backend], None]] = {
    "attention_forward": _test_attention,
    "attention_varlen_forward": _test_attention_varlen,
    "attention_backward": _test_attention_backward,
    "attention_varlen_backward": _test_attention_varlen_backward,
    "merge_attention_forward": _test_merge_attention,
    "merge_attention_backward": _test_merge_attention_backward,
    **_self_tests_paged_kv.SELF_TESTS,
    **_self_tests_block_codec.SELF_TESTS,
    **_self_tests_layers.SELF_TESTS,
    **_self_tests_moe.SELF_TESTS,
    **_self_tests_peer_all_reduce.SELF_TESTS,
    **_self_tests_tokens.SELF_TESTS,
}
"""One small case for each op, on the given backend, against the reference in float64."""
