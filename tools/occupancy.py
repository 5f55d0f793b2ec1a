# SPDX-License-Identifier: Apache-2.0
"""Blocks of a kernel that are resident on one multiprocessor, from its resources; no GPU is asked."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
SUBPARTITIONS = 4  # of a multiprocessor, each with a quarter of its registers
REGISTERS = 65536  # of a multiprocessor, and the most that one block may have
REGISTER_GRANULARITY = 256  # a warp gets a multiple of it
RESERVED_SMEM = 1024  # bytes of every block that the driver keeps
SMEM_GRANULARITY = 128


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor of an architecture holds."""

    max_blocks: int
    max_warps: int
    smem_kib: int  # a block can have 1 KiB less
    barriers: int


LIMITS = {
    "80": Limits(max_blocks=32, max_warps=64, smem_kib=164, barriers=64),
    "86": Limits(max_blocks=16, max_warps=48, smem_kib=100, barriers=16),
    "89": Limits(max_blocks=24, max_warps=48, smem_kib=100, barriers=24),
    "90": Limits(max_blocks=32, max_warps=64, smem_kib=228, barriers=64),
    "100": Limits(max_blocks=32, max_warps=64, smem_kib=228, barriers=64),
    "120": Limits(max_blocks=24, max_warps=48, smem_kib=100, barriers=24),
}


@dataclass(frozen=True)
class Occupancy:
    blocks_per_sm: int
    limit: str  # the resource that runs out first
    warps: float  # share of the warps that the multiprocessor could hold


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def occupancy(arch: str, threads: int, registers: int, smem_bytes: int, barriers: int = 0) -> Occupancy:
    """Occupancy of a kernel.

    Args:
        arch: as nvcc names it, "80" or "90a".
        threads: of a block.
        registers: of a thread.
        smem_bytes: shared memory of a block, static and dynamic.
        barriers: named barriers of a block.
    """
    limits = LIMITS[arch.rstrip("af")]
    warps = -(-threads // WARP)
    warp_registers = round_up(max(registers, 1) * WARP, REGISTER_GRANULARITY)
    fits_registers = warp_registers * round_up(warps, SUBPARTITIONS) <= REGISTERS and registers <= 255
    block_smem = round_up(smem_bytes + RESERVED_SMEM, SMEM_GRANULARITY)
    blocks = {
        "blocks": limits.max_blocks,
        "warps": limits.max_warps // warps if threads <= 1024 else 0,
        "registers": REGISTERS // SUBPARTITIONS // warp_registers * SUBPARTITIONS // warps if fits_registers else 0,
        "smem": limits.smem_kib * 1024 // block_smem,
        "barriers": limits.barriers // barriers if barriers else limits.max_blocks,
    }
    limit = min(blocks, key=lambda resource: blocks[resource])
    return Occupancy(blocks[limit], limit, blocks[limit] * warps / limits.max_warps)
