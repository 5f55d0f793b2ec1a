# SPDX-License-Identifier: Apache-2.0
"""Modules of PTX: their kernels, their variables, and launches with numpy arrays and scalars as arguments."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _emulator
from ._emulator import Error

Dim = int | Sequence[int]


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str  # as PTX declares it: "u64", "f32", "b8" for structs
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Kernel:
    name: str  # mangled
    params: tuple[Parameter, ...]
    params_bytes: int
    static_smem: int  # bytes
    local_bytes: int  # of a thread
    registers: int  # 32-bit words that the PTX names: ptxas needs fewer
    max_threads: int  # of a block by its launch bounds; 0: none

    @property
    def signature(self) -> str:
        return _emulator.demangle(self.name)


class Module:
    """The kernels and variables of one PTX text. Raises Error where it is not understood."""

    def __init__(self, text: str, name: str = "ptx") -> None:
        self._module = _emulator.Module(text, name)

    @property
    def kernels(self) -> list[str]:
        """Names as the PTX has them, mangled."""
        return self._module.kernel_names()

    def kernel(self, name: str) -> Kernel:
        """A kernel by its mangled name, or by its C++ name where that is the name of one kernel alone.

        Raises Error where it holds an instruction that is not emulated.
        """
        name = self._resolve(name)
        facts = self._module.kernel(name)
        params = tuple(Parameter(**param) for param in facts.pop("params"))
        return Kernel(name=name, params=params, **facts)

    def instructions(self, name: str) -> dict[str, int]:
        """How often each instruction stands in a kernel: {"ld.global.f32": 3}."""
        return self._module.instructions(self._resolve(name))

    def symbol(self, name: str, dtype: Any = np.uint8) -> np.ndarray:
        """The memory of a module variable as an array."""
        view = self._module.symbol(name)
        if view is None:
            raise Error(f"there is no variable {name}")
        return np.frombuffer(view, dtype)

    def launch(self, name: str, grid: Dim, block: Dim, args: Sequence[Any], dynamic_smem: int = 0) -> None:
        """Runs a kernel to its end; faults are kept as reports. Raises Error for a launch that the GPU would refuse.

        Args:
            name: as in `kernel`.
            grid: blocks, in x or in (x, y, z).
            block: threads of a block, likewise.
            args: a numpy array for a pointer (the kernel works on its memory, and may touch no byte more), an integer
                for a pointer or an integer, a float for a float, bytes or a numpy scalar of that size for a struct.
            dynamic_smem: bytes; up to what the architecture has, nothing need be opted in to.
        """
        kernel = self.kernel(name)
        if len(args) != len(kernel.params):
            raise Error(f"{kernel.signature} takes {len(kernel.params)} arguments, got {len(args)}")
        packed, memory = bytearray(kernel.params_bytes), []
        for index, (param, arg) in enumerate(zip(kernel.params, args, strict=True)):
            if isinstance(arg, np.ndarray) and arg.ndim > 0 and param.num_bytes == 8:
                begin, end = _byte_bounds(arg)
                memory.append((begin, end - begin, f"argument {index} {list(arg.shape)}"))
                arg = arg.ctypes.data
            packed[param.offset : param.offset + param.num_bytes] = _pack(param, index, arg)
        self._module.launch(kernel.name, _dim3(grid), _dim3(block), bytes(packed), dynamic_smem, memory)

    def _resolve(self, name: str) -> str:
        names = self.kernels
        if name in names:
            return name
        found = [mangled for mangled in names if name in _short_names(mangled)]
        if len(found) == 1:
            return found[0]
        listed = ", ".join(found or names) or "none"
        raise Error(
            f"{len(found)} kernels are called {name}; there are {listed}"
            if found
            else f"there is no kernel {name}; there are {listed}"
        )


def _short_names(mangled: str) -> set[str]:
    """`scale(float*, int)` and `scale`; of a template `void scale<float>(float*)`, `scale<float>` and `scale`."""
    signature = _emulator.demangle(mangled)
    if signature == mangled:
        return {mangled}
    anonymous = "(anonymous namespace)::"
    name = signature.replace(anonymous, "")
    depth = 0
    for index, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            name = name[:index]
            break
    name = name.removeprefix("void ")
    return {signature, name, name.split("<")[0], name.split("<")[0].rsplit("::", 1)[-1]}


def _byte_bounds(array: np.ndarray) -> tuple[int, int]:
    """First and last address of an array's elements; views with gaps include them."""
    begin = end = array.ctypes.data
    if array.size == 0:
        return begin, end
    for size, stride in zip(array.shape, array.strides, strict=True):
        begin, end = begin + min(0, (size - 1) * stride), end + max(0, (size - 1) * stride)
    return begin, end + array.itemsize


def _dim3(dim: Dim) -> tuple[int, int, int]:
    given = (dim,) if isinstance(dim, int | np.integer) else tuple(dim)
    if not 1 <= len(given) <= 3 or any(not 0 <= size < 2**32 for size in given):
        raise Error(f"grid and block are one to three sizes, got {dim}")
    x, y, z = (*map(int, given), 1, 1)[:3]
    return x, y, z


_FLOATS = {"f16": "e", "f32": "f", "f64": "d"}


def _pack(param: Parameter, index: int, arg: Any) -> bytes:
    """The bytes of a by-value argument as the parameter wants them."""

    def wrong(what: str) -> Error:
        return Error(
            f"argument {index} is {what}, the parameter .{param.type} {param.name} has {param.num_bytes} bytes"
        )

    if isinstance(arg, bytes | bytearray | memoryview | np.void | np.ndarray):
        data = bytes(arg) if not isinstance(arg, np.ndarray | np.void) else arg.tobytes()
        if len(data) != param.num_bytes:
            raise wrong(f"{len(data)} bytes")
        return data
    if param.type in _FLOATS:
        if not isinstance(arg, int | float | np.integer | np.floating):
            raise wrong(f"a {type(arg).__name__}")
        return struct.pack("<" + _FLOATS[param.type], float(arg))
    if isinstance(arg, np.floating) and arg.itemsize == param.num_bytes:
        return arg.tobytes()
    if not isinstance(arg, int | np.integer):
        raise wrong(f"a {type(arg).__name__}")
    bits = 8 * param.num_bytes
    if not -(1 << (bits - 1)) <= int(arg) < 1 << bits:
        raise wrong(f"{arg}")
    return (int(arg) & ((1 << bits) - 1)).to_bytes(param.num_bytes, "little")
