# SPDX-License-Identifier: Apache-2.0
"""Runs one mma on register arrays, and turns matrices of every element type into bit patterns and back."""

import numpy as np
import torch

import emulator

HEAD = ".version 9.0\n.target sm_100\n.address_size 64\n"
BITS = {"f16": 16, "bf16": 16, "tf32": 32, "f64": 64, "s8": 8, "u8": 8, "s4": 4, "u4": 4, "b1": 1, "e4m3": 8, "e5m2": 8}
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def kernel(instruction: str, counts: dict[str, int], wide: bool, selector: int | None) -> str:
    """Loads a, b, c (and metadata) [register][lane], executes, stores d."""
    size, reg = (8, "b64") if wide else (4, "b32")
    names = ["a", "b", "c"] + (["e"] if selector is not None else [])
    lines = [HEAD + ".visible .entry k(" + ", ".join(f".param .u64 p{n}" for n in [*names, "d"]) + ") {"]
    lines.append(f"  .reg .b64 %at, %base, %lane; .reg .b32 %tid, %e<1>; .reg .{reg} %a<8>, %b<8>, %c<8>, %d<8>;")
    lines.append("  mov.u32 %tid, %tid.x; cvt.u64.u32 %lane, %tid;")
    for name in names:
        width = 4 if name == "e" else size
        lines.append(f"  ld.param.u64 %base, [p{name}]; mad.lo.u64 %at, %lane, {width}, %base;")
        for r in range(counts[name]):
            lines.append(f"  ld.global.{'b32' if name == 'e' else reg} %{name}{r}, [%at+{32 * width * r}];")
    lists = {n: "{" + ", ".join(f"%{n}{r}" for r in range(counts[n])) + "}" for n in "dabc"}
    sparse = "" if selector is None else f", %e0, {selector}"
    lines.append(f"  {instruction} {lists['d']}, {lists['a']}, {lists['b']}, {lists['c']}{sparse};")
    lines.append(f"  ld.param.u64 %base, [pd]; mad.lo.u64 %at, %lane, {size}, %base;")
    lines += [f"  st.global.{reg} [%at+{32 * size * r}], %d{r};" for r in range(counts["d"])]
    return "\n".join([*lines, "  ret;", "}"])


def multiply(instruction: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, metadata=None, selector=None) -> np.ndarray:
    """d, as registers [n, 32]; and the FLOPs that were counted are those of the product."""
    d = np.zeros_like(c)
    counts = {"a": len(a), "b": len(b), "c": len(c), "d": len(d), "e": 1}
    arrays = [a, b, c] + ([metadata] if metadata is not None else []) + [d]
    with emulator.watch(architecture=100) as watched:
        module = emulator.Module(kernel(instruction, counts, a.dtype == np.uint64, selector))
        module.launch("k", grid=1, block=32, args=arrays)
    shape = next(part for part in instruction.split(".") if part[0] == "m" and part[1].isdigit())
    m, rest = shape[1:].split("n")
    n, k = rest.split("k")
    assert watched.launches[0]["totals"]["mma_flops"] == 2 * int(m) * int(n) * int(k)
    return d


# ---- numbers ---------------------------------------------------------------------------------------------------------


def random_matrix(name: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Bit patterns; floats are small integers times a power of two, so that float32 sums of products are exact."""
    bits = BITS[name]
    if name[0] in "sub" and name != "bf16":
        return rng.integers(0, 1 << bits, shape, dtype=np.uint64)
    values = rng.integers(-7, 8, shape) * 2.0 ** rng.integers(-2, 3, shape)
    return to_bits(name, values)


def to_bits(name: str, values: np.ndarray) -> np.ndarray:
    if name in FP8:
        return torch.from_numpy(values).to(FP8[name]).view(torch.uint8).numpy().astype(np.uint64)
    if name == "bf16":
        return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).astype(np.uint64)
    dtype = {"f16": np.float16, "tf32": np.float32, "f32": np.float32, "f64": np.float64}[name]
    return np.ascontiguousarray(values.astype(dtype)).view(f"u{np.dtype(dtype).itemsize}").astype(np.uint64)


def to_numbers(name: str, bits: np.ndarray) -> np.ndarray:
    if name in FP8:
        return torch.from_numpy(bits.astype(np.uint8)).view(FP8[name]).double().numpy()
    if name == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if name in ("f16", "tf32", "f32", "f64"):
        dtype = {"f16": np.float16, "tf32": np.float32, "f32": np.float32, "f64": np.float64}[name]
        return bits.astype(f"u{np.dtype(dtype).itemsize}").view(dtype).astype(np.float64)
    width = 32 if name == "s32" else BITS[name]
    signed = bits.astype(np.int64)
    return np.where((name[0] == "s") & (signed >> (width - 1) == 1), signed - (1 << width), signed)
