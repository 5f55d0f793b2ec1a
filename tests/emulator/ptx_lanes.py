# SPDX-License-Identifier: Apache-2.0
"""Runs one PTX instruction, or a few, on arrays: thread i loads element i of each array and stores one result."""

from collections.abc import Sequence

import numpy as np

import emulator

SOURCES = "abcef"  # the registers of a body: %a, %b, ...; %d is its result
_REGISTERS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


def kernel(body: str, result: np.dtype, sources: Sequence[np.dtype], architecture: int = 100) -> str:
    """PTX of a kernel `k` in which `body` computes %d from %a, %b, %c, %e, %f with registers as wide as the arrays'."""
    lines = [".version 9.0", f".target sm_{architecture}", ".address_size 64"]
    lines.append(".visible .entry k(.param .u64 pd, " + ", ".join(f".param .u64 p{i}" for i in range(len(sources))))
    lines[-1] += ", .param .u32 count) {"
    lines.append("  .reg .pred %in, %p, %q, %r; .reg .b32 %tid, %n, %i; .reg .b64 %index, %base, %at;")
    lines.append("  .reg .b16 %h<8>; .reg .b32 %w<8>; .reg .b64 %l<8>;")
    lines.append(f"  .reg .{_REGISTERS[result.itemsize]} %d;")
    for name, dtype in zip(SOURCES, sources, strict=False):
        lines.append(f"  .reg .{_REGISTERS[dtype.itemsize]} %{name};")
    lines.append("  mov.u32 %tid, %tid.x; mov.u32 %n, %ctaid.x; mov.u32 %i, %ntid.x; mad.lo.u32 %i, %n, %i, %tid;")
    lines.append("  ld.param.u32 %n, [count]; setp.ge.u32 %in, %i, %n; @%in ret; cvt.u64.u32 %index, %i;")
    for i, (name, dtype) in enumerate(zip(SOURCES, sources, strict=False)):
        size = dtype.itemsize
        lines.append(f"  ld.param.u64 %base, [p{i}]; mad.lo.u64 %at, %index, {size}, %base;")
        lines.append(f"  ld.global.{'u8' if size == 1 else f'b{8 * size}'} %{name}, [%at];")
    lines.append(f"  {body}")
    size = result.itemsize
    lines.append(f"  ld.param.u64 %base, [pd]; mad.lo.u64 %at, %index, {size}, %base;")
    lines.append(f"  st.global.{'u8' if size == 1 else f'b{8 * size}'} [%at], %d; ret;")
    lines.append("}")
    return "\n".join(lines)


def run(body: str, result: type, *sources: np.ndarray, architecture: int = 100) -> np.ndarray:
    """The results of `body` for every element, as bit patterns of the unsigned dtype `result`."""
    out = np.zeros(sources[0].size, result)
    arrays = [np.ascontiguousarray(source) for source in sources]
    with emulator.watch(architecture=architecture, counters=False):
        module = emulator.Module(kernel(body, out.dtype, [array.dtype for array in arrays], architecture))
        blocks = (out.size + 255) // 256
        module.launch("k", grid=blocks, block=256, args=[out, *arrays, out.size])
    return out


def load(body: str, result: type, *sources: type, architecture: int = 100) -> None:
    """Only decodes; raises emulator.Error for what is not known."""
    with emulator.watch(architecture=architecture):
        emulator.Module(kernel(body, np.dtype(result), [np.dtype(s) for s in sources], architecture)).kernel("k")
