# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled libraries and registers what torch needs to know about each op.

The only module that touches `torch.ops.fmkernels`. Fake kernels and FLOP formulas stand beside the public function of
their op and are registered through the helpers here; `autocast` gives a public function its arguments.

Autograd: a public function calls its op directly when no gradient is wanted and an `autograd.Function` otherwise
(`needs_grad`). `torch.library.register_autograd` costs 6-9 us a call even without gradients, the branch 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula as _register_flop_formula

MIN_TORCH = (2, 11)

# FMKERNELS_LIBRARY_DIR, read once: other builds of the libraries, as the sanitizer run uses.
library_dir = Path(os.environ.get("FMKERNELS_LIBRARY_DIR", Path(__file__).parent))
cuda_path = library_dir / "_C_cuda.abi3.so"
# FMKERNELS_CHECK=1, read once: values that only the device can see are copied to the host and checked, which waits for
# the device. On the CPU they always are.
check_values = os.environ.get("FMKERNELS_CHECK", "0") == "1"
cuda_error: str | None = None
"""Why the CUDA kernels are not loaded; None when they are."""


def _load() -> str | None:
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < MIN_TORCH:
        raise ImportError(f"fmkernels needs torch 2.11 or newer, this is torch {torch.__version__}")
    core = library_dir / "_C.abi3.so"
    if not core.exists():
        raise ImportError(f"fmkernels is not built: {core} is missing; run `pip install -e . --no-build-isolation`")
    torch.ops.load_library(core)
    if not cuda_path.exists():
        return "built without CUDA kernels (no nvcc was found, or FMKERNELS_CUDA=off)"
    try:
        torch.ops.load_library(cuda_path)
    except OSError as error:
        return str(error)
    return None


cuda_error = _load()


class Ops:
    """The ops of one namespace as attributes, each the `default` overload (2.7 us a call less than the packet)."""

    attention_forward: Callable[..., tuple[Tensor, Tensor]]
    attention_varlen_forward: Callable[..., tuple[Tensor, Tensor]]
    attention_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    attention_varlen_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    merge_attention_forward: Callable[..., tuple[Tensor, Tensor]]
    merge_attention_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    block_codec_quantize: Callable[..., None]
    block_codec_sum: Callable[..., None]
    block_codec_reduce: Callable[..., None]
    block_sparse_dsd: Callable[..., Tensor]
    block_sparse_sdd: Callable[..., Tensor]
    glu_forward: Callable[..., Tensor]
    glu_forward_out: Callable[..., None]
    glu_backward: Callable[..., tuple[Tensor, Tensor]]
    norm_forward: Callable[..., tuple[Tensor, Tensor]]
    norm_forward_out: Callable[..., None]
    norm_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    peer_all_reduce: Callable[..., None]
    peer_all_reduce_rms_norm: Callable[..., None]
    quantized_linear_forward: Callable[..., Tensor]
    quantized_linear_dequantize: Callable[..., Tensor]
    semi_structured_mask: Callable[..., Tensor]
    semi_structured_pack: Callable[..., tuple[Tensor, Tensor]]
    semi_structured_linear: Callable[..., Tensor]
    lora_shrink: Callable[..., Tensor]
    lora_expand: Callable[..., Tensor]
    rope_forward: Callable[..., tuple[Tensor, Tensor]]
    rope_forward_out: Callable[..., None]
    cross_entropy_forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    cross_entropy_backward: Callable[..., Tensor]
    cross_entropy_gradient_: Callable[..., Tensor]
    sampling_tokens: Callable[..., tuple[Tensor, Tensor]]
    speculative_verify: Callable[..., tuple[Tensor, Tensor, Tensor]]
    paged_kv_append: Callable[..., None]
    paged_kv_attend: Callable[..., tuple[Tensor, Tensor]]
    paged_kv_gather: Callable[..., Tensor]
    paged_kv_copy_pages: Callable[..., None]
    paged_kv_swap_out: Callable[..., None]
    paged_kv_swap_in: Callable[..., None]
    paged_kv_compact: Callable[..., None]
    paged_kv_page_table_from_csr: Callable[..., Tensor]
    moe_build_mapping: Callable[..., tuple[Tensor, Tensor, Tensor]]
    moe_permute: Callable[..., Tensor]
    moe_combine: Callable[..., Tensor]
    moe_combine_backward: Callable[..., tuple[Tensor, Tensor]]
    moe_route: Callable[..., tuple[Tensor, Tensor]]
    moe_route_backward: Callable[..., Tensor]
    moe_load_balance: Callable[..., tuple[Tensor, Tensor]]
    moe_load_balance_backward: Callable[..., Tensor]
    moe_z_loss: Callable[..., tuple[Tensor, Tensor]]
    moe_z_loss_backward: Callable[..., Tensor]
    moe_route_expert_choice: Callable[..., tuple[Tensor, Tensor]]
    moe_capacity: Callable[..., Tensor]
    moe_grouped_mm: Callable[..., Tensor]
    moe_grouped_mm_inner: Callable[..., Tensor]
    moe_grouped_sum: Callable[..., Tensor]
    moe_gated_mm: Callable[..., tuple[Tensor, Tensor]]
    moe_gated_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    moe_mlp: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    moe_quantized_mm: Callable[..., Tensor]

    def __init__(self, namespace: str) -> None:
        self.use(namespace)

    def use(self, namespace: str) -> None:
        """Binds every op to `namespace`; the tests run the same bodies over other executions of the kernels."""
        self.namespace = namespace
        for name in Ops.__annotations__:
            setattr(self, name, getattr(getattr(torch.ops, namespace), name).default)


ops = Ops("fmkernels")
op_names: tuple[str, ...] = tuple(Ops.__annotations__)


def has_kernel(op: str, device: str, namespace: str = "fmkernels") -> bool:
    """Whether a loaded library holds a kernel of the op for this type of device; there need be no such device."""
    name = f"{namespace}::{op}"
    if not torch._C._dispatch_has_kernel(name):  # nor does the op exist, which the next line would not take
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())


cuda_ops = frozenset(name for name in op_names if has_kernel(name, "cuda"))


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function gives the shapes and dtypes of the op's outputs, and nothing else."""
    return torch.library.register_fake(f"fmkernels::{name}")


def under_autocast(value: Any) -> bool:
    """Whether ops on the device of this tensor are given other dtypes than the caller's."""
    if not torch._C._is_any_autocast_enabled():  # 0.1 us
        return False
    has_autocast = isinstance(value, Tensor) and value.device.type in ("cpu", "cuda")  # asking for meta raises
    return has_autocast and torch.is_autocast_enabled(value.device.type)


def autocast(num_cast: int, *args: Any) -> tuple[Any, ...]:
    """Under autocast the first `num_cast` arguments take the autocast dtype, and tensors of the other half dtype too.

    float32 among the later arguments stays, it is there for its precision; float64 is left alone, as torch does. Public
    functions ask before anything else looks at a dtype. A rule of the dispatcher would come too late: the checks under
    torch.compile and FMKERNELS_CHECK=1, and an autograd.Function, had seen the caller's dtypes and not those of the op.
    """
    if not under_autocast(args[0]):
        return args
    halves = (torch.bfloat16, torch.float16)
    dtype = torch.get_autocast_dtype(args[0].device.type)
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and (x.dtype in halves or (i < num_cast and x.dtype == torch.float32))
        else x
        for i, x in enumerate(args)
    )


def register_flop_formula(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator: the function counts the floating-point operations of the op from its arguments' shapes."""
    return _register_flop_formula(getattr(torch.ops.fmkernels, name))


def call(op: Callable[..., Any], args: tuple[Any, ...], check_tensors: Callable[..., None]) -> Any:
    """op(*args); where that fails, `check_tensors(*args)` raises the sentence for what is wrong with the arguments.

    Under FMKERNELS_CHECK=1 it is asked before: on CUDA no op sees the values that it would have to refuse.
    """
    if torch.compiler.is_compiling():
        check_tensors(*args)
        return op(*_distinct(args))
    if check_values:
        check_tensors(*args)
        return op(*args)
    try:
        return op(*args)
    except (RuntimeError, TypeError) as error:
        failure = error
    try:
        check_tensors(*args)
        raise failure
    finally:
        del failure  # its traceback holds this frame: without the cycle a caught failure frees the tensors at once


def _distinct(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Without a tensor that comes twice, as cu_seqlens may: dynamo does not trace an autograd.Function given one."""
    result: list[Any] = []
    for i, x in enumerate(args):
        is_again = isinstance(x, Tensor) and any(x is before for before in args[:i])
        result.append(x.view_as(x) if is_again else x)
    return tuple(result)


def as_rows(x: Tensor) -> Tensor:
    """[..., columns] as [rows, columns], also where there are no columns; a view where strides allow it."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def no_view(result: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A result that nobody else holds, in another shape: who gets it may detach it in place, as pipelines do."""
    return torch.ops.aten._unsafe_view(result, shape)


def needs_grad(*tensors: Any) -> bool:
    """Whether autograd has to record a call with these inputs, or refuse it: forward mode would lose tangents."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
