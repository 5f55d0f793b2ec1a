# SPDX-License-Identifier: Apache-2.0
"""Counts one turn of a kernel's main loop, the innermost loops with tensor-core instructions, in machine code.

    python tools/sass_loop.py file.cubin [--kernel 'attention*'] [--json]

A turn is the shortest way around the loop that passes the most mma FLOPs: what it branches over (tiles that need a
mask, a rare rescale) is not counted, but shown as "of all". Counts are for one warp, per unit of 4096 dense FLOPs where
it says so (one m16n8k16; of a wgmma, which four warps execute, a warp has a quarter). Shares are the time of a unit
over that of the tensor core, for a quarter of a multiprocessor at nominal rates: no measurement, and without conflicts.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from device_code import Instruction, Section, demangle, find_tool, parse_sections
from rich import box
from rich.console import Console
from rich.table import Table

FLOPS_PER_UNIT = 4096
WARPS_OF_A_GROUP = 4  # that execute one wgmma


# ---- Instructions ----------------------------------------------------------------------------------------------------

CATEGORIES = {
    "spill": {"LDL", "STL"},
    "move_select": {"MOV", "MOV32I", "SEL", "FSEL", "CS2R"},
    "fp32": {"FADD", "FMUL", "FFMA", "FADD32I", "FMUL32I", "FFMA32I", "FADD2", "FMUL2", "FFMA2", "FSWZADD"},
    "fp_max_compare": {"FMNMX", "FMNMX3", "FSETP", "FSET", "FCHK"},
    "mufu": {"MUFU"},
    "convert": {"F2F", "F2FP", "F2I", "F2IP", "I2F", "I2FP", "I2I", "I2IP", "FRND", "F2FS"},
    "matrix_load": {"LDSM", "STSM", "MOVM"},
    "shared": {"LDS", "STS", "ATOMS"},
    "async_copy": {"LDGSTS", "UBLKCP", "UTMALDG", "UTMASTG", "UTMAREDG", "UBLKRED"},
    "global": {"LDG", "STG", "LD", "ST", "ATOM", "ATOMG", "RED", "REDG", "LDGMC"},
    "shuffle": {"SHFL", "REDUX", "CREDUX", "VOTE", "MATCH", "ELECT"},
    "half": {"HADD2", "HMUL2", "HFMA2", "HMNMX2", "HSETP2", "HSET2", "HADD2_32I", "HMUL2_32I", "HFMA2_32I"},
    "fp64": {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"},
    "control": {"BAR", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "BSSY", "BSYNC", "BREAK", "MEMBAR", "ERRBAR"}
    | {
        "CCTL",
        "SYNCS",
        "ARRIVES",
        "WARPGROUP",
        "FENCE",
        "NANOSLEEP",
        "YIELD",
        "WARPGROUPSET",
        "ACQBULK",
        "UTMACMDFLUSH",
    }
    | {"BRA", "BRX", "EXIT", "CALL", "RET", "JMP", "BMOV", "USETMAXREG", "KILL", "BPT"},
    "integer": {"LOP3", "LOP", "SHF", "SHL", "SHR", "LEA", "PRMT", "POPC", "FLO", "BREV", "BMSK", "SGXT", "PLOP3"}
    | {"P2R", "R2P", "PSETP", "VIADD", "VIMNMX", "VIMNMX3", "VIADDMNMX", "VABSDIFF", "VABSDIFF4"}
    | {"IADD", "IADD3", "IADD32I", "ISETP", "IMNMX", "ISCADD", "IABS", "IDP", "ISET", "IADD64", "ISCADD32I"},
    "uniform": {"R2UR", "S2UR", "REDUX2UR"},
    "constant": {"LDC", "LDCU", "S2R"},
}
CATEGORY_OF = {base: category for category, bases in CATEGORIES.items() for base in bases}
NEVER = ("!PT", "!UPT")  # guards of instructions that only fill time


def category(instruction: Instruction) -> str:
    base = instruction.base
    if instruction.guard in NEVER:
        return "filler"
    if base.endswith("MMA"):
        return "mma"
    if base == "IMAD":  # both run on the fp32 pipe
        return "imad_move" if ".MOV" in instruction.opcode else "imad"
    if base == "HFMA2" and re.search(r"-RZ, RZ,", instruction.operands):
        return "move_select"  # a constant
    return CATEGORY_OF.get(base) or ("uniform" if base.startswith("U") else "other")


def mma_flops(opcode: str) -> int:
    """Dense FLOPs that one warp has of a tensor-core instruction; 0 for any other."""
    base = opcode.split(".")[0]
    if not base.endswith("MMA"):
        return 0
    if shape := re.search(r"\.(\d+)x(\d+)x(\d+)", opcode):  # m, n, k of a whole warpgroup
        m, n, k = map(int, shape.groups())
        return 2 * m * n * k // WARPS_OF_A_GROUP
    if shape := re.search(r"\.(16|8)8(\d+)(?=\.|$)", opcode):  # m, 8, k
        return 2 * int(shape[1]) * 8 * int(shape[2])
    return 0


def wavefronts(instruction: Instruction) -> int:
    """128-byte accesses to shared memory of a full warp without conflicts."""
    kind = category(instruction)
    if kind == "matrix_load" and instruction.base != "MOVM":
        return int(instruction.opcode[-1]) if instruction.opcode.endswith((".2", ".4")) else 1
    if kind == "shared" or instruction.base == "LDGSTS":
        width = re.search(r"\.[US]?(64|128)(?=\.|$)", instruction.opcode)
        return int(width[1]) // 32 if width else 1
    return 0


# ---- Loops -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    begin: int  # indices of instructions
    end: int
    successors: tuple[int, ...]  # indices of blocks


def control_flow(section: Section) -> list[Block]:
    """The basic blocks of a section, in its order."""
    code, labels = section.instructions, section.labels

    def leaves(i: int) -> tuple[list[int], bool] | None:
        """(where the instruction may jump to, whether it may also fall through); None where it does not branch."""
        instruction = code[i]
        if instruction.base not in ("BRA", "JMP", "BRX", "JMX", "EXIT", "RET", "KILL") or instruction.guard in NEVER:
            return None
        target = instruction.label
        names = instruction.branch_targets or ([target] if target else [])
        # `BRA !P0, (label)`, `BRA.DIV UR4, (label)`: conditional without a guard
        alone = re.fullmatch(r"`?\(\.L\w+\)", instruction.operands) is not None
        conditional = instruction.guard != "" or (target is not None and not instruction.branch_targets and not alone)
        return [labels[name] for name in names if labels.get(name, len(code)) < len(code)], conditional

    if not code:
        return []
    exits = {i: found for i in range(len(code)) if (found := leaves(i)) is not None}
    starts = {0, *(i + 1 for i in exits), *labels.values(), *(t for targets, _ in exits.values() for t in targets)}
    begins = sorted(start for start in starts if start < len(code))
    index_of = {begin: index for index, begin in enumerate(begins)}
    blocks = []
    for begin, end in zip(begins, [*begins[1:], len(code)], strict=True):
        targets, falls = exits.get(end - 1, ([], True))
        targets = targets + [end] * (falls and end < len(code))
        blocks.append(Block(begin, end, tuple(dict.fromkeys(index_of[target] for target in targets))))
    return blocks


def reverse_postorder(blocks: list[Block]) -> list[int]:
    """Blocks that are reached from the first, each after its predecessors but for the back edges of loops."""
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(blocks[0].successors))]
    while stack:
        block, rest = stack[-1]
        successor = next((s for s in rest if s not in seen), None)
        if successor is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(successor)
            stack.append((successor, iter(blocks[successor].successors)))
    return order[::-1]


def dominators(blocks: list[Block], order: list[int]) -> dict[int, set[int]]:
    """For each reached block those that every way to it passes."""
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for successor in blocks[block].successors:
            predecessors[successor].append(block)
    dominating = {block: {block} if block == order[0] else set(order) for block in order}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            common = set.intersection(*(dominating[p] for p in predecessors[block])) | {block}
            changed |= common != dominating[block]
            dominating[block] = common
    return dominating


def natural_loops(blocks: list[Block]) -> dict[int, set[int]]:
    """Header of each loop -> its blocks."""
    order = reverse_postorder(blocks) if blocks else []
    dominating = dominators(blocks, order)
    loops: dict[int, set[int]] = {}
    for latch in order:
        for header in blocks[latch].successors:
            if header in dominating[latch]:
                body, pending = loops.setdefault(header, {header}), [latch]
                while pending:
                    block = pending.pop()
                    if block not in body:
                        body.add(block)
                        pending += [p for p in order if block in blocks[p].successors]
    return loops


def shortest_turn(section: Section, blocks: list[Block], header: int, body: set[int]) -> list[int]:
    """Blocks of the way around that has the most FLOPs and, of such, the fewest instructions."""
    order = [block for block in reverse_postorder(blocks) if block in body]
    place = {block: index for index, block in enumerate(order)}

    def value(block: int) -> tuple[int, int]:
        code = section.instructions[blocks[block].begin : blocks[block].end]
        return sum(mma_flops(instruction.opcode) for instruction in code), -len(code)

    best: dict[int, tuple[tuple[int, int], list[int]]] = {header: (value(header), [header])}
    around = []
    for block in order:
        if block not in best:
            continue
        known, way = best[block]
        for successor in blocks[block].successors:
            if successor == header:
                around.append((known, way))
            elif successor in body and place[successor] > place[block]:  # not around an inner loop again
                more = value(successor)
                total = known[0] + more[0], known[1] + more[1]
                if successor not in best or total > best[successor][0]:
                    best[successor] = total, [*way, successor]
    return max(around)[1]


# ---- Counts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """One turn of a loop with mma, of one warp."""

    address: int  # of its first instruction
    units: float  # of 4096 dense FLOPs
    is_warpgroup: bool  # wgmma
    num_instructions: int
    num_all_instructions: int  # with what the turn branches over
    num_spills: int  # anywhere in the loop
    num_wavefronts: int
    counts: dict[str, int]  # by category
    tf32_units: float = 0.0  # of the units those of tf32, which take a tensor core twice as long as halves

    def of(self, *categories: str) -> int:
        return sum(self.counts.get(name, 0) for name in categories)

    @property
    def not_mma_per_unit(self) -> float:
        return (self.num_instructions - self.of("mma")) / self.units

    @property
    def num_int(self) -> int:
        return self.of("integer", "imad")

    @property
    def int_per_unit(self) -> float:
        return self.num_int / self.units

    @property
    def uniform_per_unit(self) -> float:
        return self.of("uniform") / self.units

    @property
    def wavefronts_per_unit(self) -> float:
        return self.num_wavefronts / self.units


def count_turn(section: Section, blocks: list[Block], header: int, body: set[int]) -> Loop:
    def code_of(chosen: list[int]) -> list[Instruction]:
        return [i for block in chosen for i in section.instructions[blocks[block].begin : blocks[block].end]]

    turn, everything = code_of(shortest_turn(section, blocks, header, body)), code_of(sorted(body))
    return Loop(
        address=turn[0].address,
        units=sum(mma_flops(i.opcode) for i in turn) / FLOPS_PER_UNIT,
        is_warpgroup=any(".64x" in i.opcode for i in turn if i.base.endswith("MMA")),
        num_instructions=len(turn),
        num_all_instructions=len(everything),
        num_spills=sum(category(i) == "spill" for i in everything),
        num_wavefronts=sum(map(wavefronts, turn)),
        counts=dict(Counter(map(category, turn))),
        tf32_units=sum(mma_flops(i.opcode) for i in turn if ".TF32" in i.opcode) / FLOPS_PER_UNIT,
    )


def mma_loops(section: Section) -> list[Loop]:
    """The innermost loops with tensor-core instructions, the main one first.

    That is the one with the most FLOPs a turn and, of such, the least code: loops for tiles that need a mask have more.
    """
    blocks = control_flow(section)
    with_mma = {
        header: body
        for header, body in natural_loops(blocks).items()
        if any(mma_flops(i.opcode) for b in body for i in section.instructions[blocks[b].begin : blocks[b].end])
    }
    innermost = {h: body for h, body in with_mma.items() if not any(other < body for other in with_mma.values())}
    loops = [count_turn(section, blocks, header, body) for header, body in innermost.items()]
    return sorted(loops, key=lambda loop: (-loop.units, loop.num_all_instructions, loop.address))


# ---- Shares of the pipes ---------------------------------------------------------------------------------------------

# Cycles of a quarter of a multiprocessor: for a unit of halves on its tensor core, and for an fp32 instruction (else
# 1). The figure of sm_90 is that of wgmma, of which mma.sync reaches a part.
TENSOR_CYCLES = {"80": 8.0, "86": 16.0, "89": 16.0, "90": 4.0}
FP32_CYCLES = {"80": 2}
MMA_SYNC_SHARE = {"90": 0.62}


def pipe_shares(loop: Loop, arch: str) -> dict[str, float]:
    """Time of each pipe over that of the tensor core; empty for architectures without a published rate."""
    number = arch.rstrip("af")
    if number not in TENSOR_CYCLES:
        return {}
    tensor = TENSOR_CYCLES[number] * (loop.units + loop.tf32_units)
    if not loop.is_warpgroup:
        tensor /= MMA_SYNC_SHARE.get(number, 1.0)
    cycles = {
        "issue": loop.num_instructions,
        "mufu": 8 * loop.of("mufu"),
        "fp32": FP32_CYCLES.get(number, 1) * loop.of("fp32", "imad", "imad_move"),
        "int/max/cvt": 2 * loop.of("integer", "fp_max_compare", "convert"),
        "shared": 4 * loop.num_wavefronts,  # four quarters share one access a clock
    }
    return {pipe: round(count / tensor, 4) for pipe, count in cycles.items()}


# ---- Report ----------------------------------------------------------------------------------------------------------

COLUMNS = {
    "units": lambda loop: f"{loop.units:g}",
    "instr.": lambda loop: str(loop.num_instructions),
    "of\nall": lambda loop: str(loop.num_all_instructions),
    "not mma\n/ unit": lambda loop: f"{loop.not_mma_per_unit:.2f}",
    "int +\nuniform": lambda loop: f"{loop.num_int} + {loop.of('uniform')}",
    "spill": lambda loop: str(loop.num_spills),
    "mov,\nsel": lambda loop: str(loop.of("move_select", "imad_move")),
    "fp32": lambda loop: str(loop.of("fp32")),
    "fp\nmax": lambda loop: str(loop.of("fp_max_compare")),
    "mufu": lambda loop: str(loop.of("mufu")),
    "cvt": lambda loop: str(loop.of("convert")),
    "ldsm": lambda loop: str(loop.of("matrix_load")),
    "lds,\nsts": lambda loop: str(loop.of("shared")),
    "cp.\nasync": lambda loop: str(loop.of("async_copy")),
    "waves\n/ unit": lambda loop: f"{loop.wavefronts_per_unit:.2f}",
    "filler": lambda loop: str(loop.of("filler")),
    "other": lambda loop: str(loop.of("half", "fp64", "global", "shuffle", "control", "constant", "other")),
}
PIPES = ("issue", "mufu", "fp32", "int/max/cvt", "shared")


@dataclass(frozen=True)
class KernelLoops:
    kernel: str
    arch: str
    loops: list[Loop]  # the main one first


def as_dict(loop: Loop, arch: str) -> dict[str, object]:
    """The JSON form of a loop: its fields, what follows from them, and the shares of the pipes."""
    derived = {n: round(getattr(loop, n), 4) for n in ("not_mma_per_unit", "int_per_unit", "uniform_per_unit")}
    derived["wavefronts_per_unit"] = round(loop.wavefronts_per_unit, 4)
    return {**dataclasses.asdict(loop), **derived, "shares": pipe_shares(loop, arch)}


def loop_tables(kernels: list[KernelLoops]) -> list[Table]:
    """The counts, and the shares of the pipes where there are any."""
    counts = _table("one turn of the loops with mma: machine instructions of one warp", COLUMNS)
    shares = _table("time of each pipe for the turn, over that of the tensor core", PIPES)
    for entry in kernels:
        for index, loop in enumerate(entry.loops):
            about = entry.kernel if index == 0 else f"  also at {loop.address:#x}", f"sm_{entry.arch}"
            counts.add_row(*about, *(column(loop) for column in COLUMNS.values()))
            if of_pipe := pipe_shares(loop, entry.arch):
                shares.add_row(*about, *(f"{of_pipe[pipe]:.0%}" for pipe in PIPES))
    return [counts, shares] if shares.rows else [counts]


def _table(title: str, headings: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("kernel", overflow="fold", min_width=24)
    table.add_column("arch", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def arch_of(text: str) -> str:
    """The architecture that nvdisasm names in its listing."""
    found = re.search(r"^\s*\.target\s+sm_(\w+)", text, re.MULTILINE)
    return found[1] if found else "?"


def disassemble(path: Path) -> list[str]:
    """The listings of a cubin, or of every cubin in an object or library."""
    nvdisasm = find_tool("nvdisasm")
    if nvdisasm is None:
        raise FileNotFoundError("nvdisasm is missing; run: python3 run.py setup")
    with tempfile.TemporaryDirectory() as folder:
        cubins = [path.resolve()]
        if path.read_bytes()[18:20] != CUDA_MACHINE:
            cuobjdump = find_tool("cuobjdump", nvdisasm.parent)
            if cuobjdump is None:
                raise FileNotFoundError("cuobjdump is missing, and only it takes an object apart; give a cubin")
            command = [cuobjdump, "-xelf", "all", path.resolve()]
            subprocess.run(command, cwd=folder, capture_output=True, check=True)
            cubins = sorted(Path(folder).glob("*.cubin"))
        return [
            subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout
            for cubin in cubins
        ]


CUDA_MACHINE = (190).to_bytes(2, "little")  # of an ELF header


def loops_of_file(path: Path, kernel: str = "*") -> list[KernelLoops]:
    """Every kernel of the file that has such a loop and whose name matches the glob."""
    found = []
    for listing in disassemble(path):
        sections = parse_sections(listing)
        for name, section in zip(demangle(list(sections)), sections.values(), strict=True):
            if fnmatch.fnmatchcase(name, kernel) and (loops := mma_loops(section)):
                found.append(KernelLoops(name, arch_of(listing), loops))
    return sorted(found, key=lambda entry: (entry.kernel, entry.arch))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="cubin, object or library")
    parser.add_argument("--kernel", default="*", help="glob over demangled names")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    arguments = parser.parse_args()
    try:
        kernels = loops_of_file(arguments.file, arguments.kernel)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"sass_loop: {error}")
    if arguments.json:
        entries = [
            {"kernel": e.kernel, "arch": e.arch, "loops": [as_dict(loop, e.arch) for loop in e.loops]} for e in kernels
        ]
        print(json.dumps(entries, indent=1))
    elif kernels:
        console = Console()
        console.width = max(console.width, 160)
        console.print(*loop_tables(kernels))
    else:
        print(f"{arguments.file}: no kernel {arguments.kernel} has a loop with tensor-core instructions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
