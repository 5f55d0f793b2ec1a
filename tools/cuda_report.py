# SPDX-License-Identifier: Apache-2.0
"""Compiles every CUDA kernel, reads what ptxas and the machine code say, and holds it against the budgets.

No GPU is needed. A budget is one `[[kernel]]` of csrc/<room>/budget.toml:

    name               glob over demangled names: "merge_attention_kernel<*, 1>"
    archs              architectures that it holds for: all of "80", "90a", in one entry or in several
    threads            threads a block is launched with
    dynamic_smem_bytes dynamic shared memory that it is launched with
    max_registers      registers per thread
    max_instructions   machine instructions, without padding
    min_blocks_per_sm  blocks that must be resident on a multiprocessor
    require            globs over opcodes with their modifiers, each of which must occur: "LDG.E.128*"

A `[[loop]]` holds one turn of the main loop of a tensor-core kernel (tools/sass_loop.py), per 4096 mma FLOPs:

    name, archs                     as above
    max_not_mma_per_unit            instructions other than mma
    max_int_per_unit                integer instructions, without those of the uniform datapath
    max_shared_wavefronts_per_unit  128-byte accesses to shared memory, without conflicts
    max_spills                      local memory instructions anywhere in the loop

Spilled registers and local memory are always an error. So is a kernel without exactly one budget for each architecture,
a budget without a kernel or loop, and a source that takes a minute or 2 GiB to compile. The compile command is the one
of the build (build/cuda/compile_commands.json). Writes build/cuda_report.json. `--budgets-only` leaves out the
architectures without budgets, which only have to compile: two thirds of the time.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import device_code
import sass_loop
import tomllib
from device_code import Toolchain, count_opcodes, demangle, parse_ptxas, parse_sections
from occupancy import Occupancy, occupancy
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sass_loop import KernelLoops, Loop, loop_tables, mma_loops

ROOT = Path(__file__).resolve().parent.parent
BUDGET_ARCHS = ("80", "90a")
OTHER_ARCHS = ("86", "89", "100a", "120a")  # must compile
MAX_COMPILE_SECONDS = 60  # of processor time, for each of BUDGET_ARCHS
MAX_COMPILE_BYTES = 2 << 30  # of the largest process of one compilation
NO_COMPILER = "no CUDA build to report on (build/cuda): run `FMKERNELS_CUDA=pip python3 run.py setup`"


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of one kernel for one architecture."""

    name: str
    room: str
    arch: str
    registers: int
    barriers: int
    spill_bytes: int
    stack_bytes: int
    static_smem_bytes: int
    opcodes: dict[str, int]  # with modifiers: {"LDG.E.128": 4}; functions that it calls included
    loops: list[Loop] = field(default_factory=list)  # with mma, the main one first

    @property
    def num_instructions(self) -> int:
        return sum(self.opcodes.values())

    @property
    def num_local(self) -> int:
        """Instructions that touch local memory."""
        return sum(count for opcode, count in self.opcodes.items() if opcode.split(".")[0] in ("LDL", "STL"))


@dataclass(frozen=True)
class Compilation:
    """One source compiled for one architecture; `error` is the compiler's output where it failed."""

    source: str
    arch: str
    seconds: float
    peak_bytes: int
    kernels: list[Kernel]
    error: str = ""


@dataclass(frozen=True)
class Budget:
    """One `[[kernel]]` of a budget.toml; the fields are those of the module's text."""

    room: str
    name: str
    archs: list[str]
    threads: int
    dynamic_smem_bytes: int
    max_registers: int
    max_instructions: int
    min_blocks_per_sm: int
    require: list[str]

    def matches(self, kernel: Kernel) -> bool:
        return self.room == kernel.room and fnmatch.fnmatchcase(kernel.name, self.name)

    def occupancy(self, kernel: Kernel) -> Occupancy:
        smem_bytes = kernel.static_smem_bytes + self.dynamic_smem_bytes
        return occupancy(kernel.arch, self.threads, kernel.registers, smem_bytes, kernel.barriers)


@dataclass(frozen=True)
class LoopBudget:
    """One `[[loop]]` of a budget.toml; the fields are those of the module's text."""

    room: str
    name: str
    archs: list[str]
    max_not_mma_per_unit: float
    max_int_per_unit: float
    max_shared_wavefronts_per_unit: float
    max_spills: int

    def matches(self, kernel: Kernel) -> bool:
        return self.room == kernel.room and fnmatch.fnmatchcase(kernel.name, self.name)


# ---- Budgets ---------------------------------------------------------------------------------------------------------


def read_entries(path: Path, kind: str, entry_type: type) -> list:
    """The `[[kind]]` entries of one budget.toml."""
    names = {field.name for field in dataclasses.fields(entry_type)} - {"room"}
    entries = []
    for entry in tomllib.loads(path.read_text()).get(kind, []):
        if set(entry) != names:
            difference = ", ".join(sorted(set(entry) ^ names))
            raise ValueError(f"{path}: [[{kind}]] {entry.get('name')} has missing or unknown keys: {difference}")
        unknown = set(entry["archs"]) - set(BUDGET_ARCHS)
        if unknown:
            raise ValueError(f"{path}: archs of {entry['name']} must be of {BUDGET_ARCHS}, got {sorted(unknown)}")
        entries.append(entry_type(room=path.parent.name, **entry))
    return entries


def read_budgets(path: Path) -> list[Budget]:
    return read_entries(path, "kernel", Budget)


def read_loop_budgets(path: Path) -> list[LoopBudget]:
    return read_entries(path, "loop", LoopBudget)


def budgets_of(kernel: Kernel, budgets: list[Budget]) -> list[Budget]:
    """Those that hold for the kernel on its architecture; there should be one."""
    return [budget for budget in budgets if budget.matches(kernel) and kernel.arch in budget.archs]


def check_kernel(kernel: Kernel, budgets: list[Budget]) -> list[str]:
    """The sentences to say about one kernel; none when it keeps its budget."""
    which = f"{kernel.name} for sm_{kernel.arch}"
    found = []
    if kernel.spill_bytes:
        found.append(f"{which} spills {kernel.spill_bytes} bytes of registers")
    if kernel.num_local:
        found.append(f"{which} has {kernel.num_local} local memory instructions")
    if kernel.stack_bytes and not kernel.num_local:  # read or written through generic addresses
        found.append(f"{which} has {kernel.stack_bytes} bytes of local memory")
    matching = budgets_of(kernel, budgets)
    if len(matching) != 1:
        return [*found, f"{which} must have one budget in csrc/{kernel.room}/budget.toml, has {len(matching)}"]
    budget = matching[0]
    if kernel.registers > budget.max_registers:
        found.append(f"{which} uses {kernel.registers} registers, over its budget of {budget.max_registers}")
    if kernel.num_instructions > budget.max_instructions:
        found.append(
            f"{which} has {kernel.num_instructions} instructions, over its budget of {budget.max_instructions}"
        )
    resident = budget.occupancy(kernel)
    if resident.blocks_per_sm < budget.min_blocks_per_sm:
        found.append(
            f"{which} has {resident.blocks_per_sm} blocks per multiprocessor (limited by {resident.limit}), "
            f"under its budget of {budget.min_blocks_per_sm}"
        )
    for pattern in budget.require:
        if not fnmatch.filter(kernel.opcodes, pattern):
            found.append(f"{which} has no instruction {pattern}, which its budget requires")
    return found


def check_loop(kernel: Kernel, budgets: list[LoopBudget]) -> list[str]:
    """The sentences to say about the main loop of one kernel; none when it keeps its budget or has none."""
    which = f"main loop of {kernel.name} for sm_{kernel.arch}"
    matching = [budget for budget in budgets if budget.matches(kernel) and kernel.arch in budget.archs]
    if len(matching) > 1:
        return [f"{which} must have one budget in csrc/{kernel.room}/budget.toml, has {len(matching)}"]
    if not matching:
        return []
    if not kernel.loops:
        return [f"{kernel.name} for sm_{kernel.arch} has no loop with tensor-core instructions, but a budget for one"]
    loop, budget = kernel.loops[0], matching[0]
    held = [
        ("instructions other than mma a unit", loop.not_mma_per_unit, budget.max_not_mma_per_unit),
        ("integer instructions a unit", loop.int_per_unit, budget.max_int_per_unit),
        ("shared wavefronts a unit", loop.wavefronts_per_unit, budget.max_shared_wavefronts_per_unit),
        ("spill instructions", max(loop.num_spills for loop in kernel.loops), budget.max_spills),
    ]
    return [f"{which} has {x:.4g} {what}, over its budget of {limit:g}" for what, x, limit in held if x > limit]


def check_report(
    compilations: list[Compilation], budgets: list[Budget], loop_budgets: list[LoopBudget] | None = None
) -> list[str]:
    """Every sentence to say about the whole report; none when all is well."""
    found = [f"{c.source} does not compile for sm_{c.arch}:\n{c.error}" for c in compilations if c.error]
    kernels = [kernel for c in compilations if c.arch in BUDGET_ARCHS for kernel in c.kernels]
    for kernel in kernels:
        found += check_kernel(kernel, budgets) + check_loop(kernel, loop_budgets or [])
    failed = {(Path(c.source).parent.name, c.arch) for c in compilations if c.error}
    for budget in [*budgets, *(loop_budgets or [])]:
        for arch in set(budget.archs) - {arch for room, arch in failed if room == budget.room}:
            if not any(budget.matches(kernel) and kernel.arch == arch for kernel in kernels):
                found.append(f"csrc/{budget.room}/budget.toml: {budget.name} matches no kernel for sm_{arch}")
    for source in sorted({c.source for c in compilations}):
        seconds = max(c.seconds for c in compilations if c.source == source and c.arch in BUDGET_ARCHS)
        peak_bytes = max(c.peak_bytes for c in compilations if c.source == source)
        if seconds > MAX_COMPILE_SECONDS:
            found.append(f"{source} takes {seconds:.0f} s to compile, over {MAX_COMPILE_SECONDS}")
        if peak_bytes > MAX_COMPILE_BYTES:
            found.append(f"{source} takes {peak_bytes >> 20} MiB to compile, over {MAX_COMPILE_BYTES >> 20}")
    return found


def check_sources(tools: Toolchain) -> list[str]:
    """A sentence for every CUDA source that the build does not know, and the report thus does not hold."""
    unknown = sorted(set(ROOT.glob("csrc/*/*.cu")) - set(tools.commands))
    return [
        f"{source.relative_to(ROOT)} is not part of the CUDA build; run: python3 run.py setup" for source in unknown
    ]


# ---- Compiler and disassembler ---------------------------------------------------------------------------------------


def include_closure(source: Path) -> tuple[set[Path], set[str]]:
    """The files of the repository that `source` includes, itself among them, and the names of all other headers."""
    files, others, pending = set(), set(), [source.resolve()]
    while pending:
        path = pending.pop()
        if path in files:
            continue
        files.add(path)
        for quote, name in re.findall(r'^\s*#\s*include\s*(["<])([^">]+)[">]', path.read_text(), re.MULTILINE):
            target = (path.parent / name).resolve()
            if quote == '"' and target.exists():
                pending.append(target)
            else:
                others.add(name)
    return files, others


def compile_source(tools: Toolchain, source: Path, arch: str) -> Compilation:
    """Compiles for one architecture and takes the result apart."""
    name, room = str(source.relative_to(ROOT)), source.parent.name
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        cubin = Path(folder) / "cubin"
        process = subprocess.Popen([*tools.command(source, arch), "-o", cubin], stdout=log, stderr=log, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds, peak_bytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
        log.seek(0)
        printed = log.read()
        if process.returncode != 0:
            return Compilation(name, arch, seconds, peak_bytes, [], printed or f"exit status {process.returncode}")
        sass = subprocess.run([tools.nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout
    resources, sections = parse_ptxas(printed), parse_sections(sass)
    kernels = [
        Kernel(
            name=short,
            room=room,
            arch=arch,
            opcodes=dict(count_opcodes(sections[symbol])),
            loops=mma_loops(sections[symbol]),
            **resources[symbol],
        )
        for symbol, short in zip(resources, demangle(list(resources)), strict=True)
    ]
    return Compilation(name, arch, seconds, peak_bytes, sorted(kernels, key=lambda kernel: kernel.name))


def compile_cached(tools: Toolchain, source: Path, arch: str, cache_dir: Path) -> tuple[Compilation, Path]:
    """The compilation, from the cache where sources, flags and tools are the same; and its file there."""
    files, _ = include_closure(source)
    readers = [Path(module.__file__) for module in (device_code, sass_loop)]
    parts = [path.read_bytes() for path in (*sorted(files), Path(__file__), *readers)] + [tools.version.encode()]
    parts.append(shlex.join(tools.command(source, arch)).encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    path = cache_dir / f"{source.stem}-{arch}-{key}.json"
    if path.exists():
        record = json.loads(path.read_text())
        kernels = [Kernel(**{**k, "loops": [Loop(**loop) for loop in k["loops"]]}) for k in record["kernels"]]
        return Compilation(**{**record, "kernels": kernels}), path
    result = compile_source(tools, source, arch)
    if not result.error:
        path.with_suffix(".part").write_text(json.dumps(dataclasses.asdict(result)))
        path.with_suffix(".part").replace(path)
    return result, path


def compile_all(tools: Toolchain, archs: tuple[str, ...], cache_dir: Path, console: Console) -> list[Compilation]:
    cache_dir.mkdir(parents=True, exist_ok=True)
    jobs = [(source, arch) for source in sorted(tools.commands) for arch in archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool, Progress(console=console, transient=True) as progress:
        futures = [pool.submit(compile_cached, tools, source, arch, cache_dir) for source, arch in jobs]
        results = [future.result() for future in progress.track(futures, description="device code")]
    of_archs = {path for arch in archs for path in cache_dir.glob(f"*-{arch}-*")}
    for stale in of_archs - {path for _, path in results}:
        stale.unlink()
    return [compilation for compilation, _ in results]


# ---- Report ----------------------------------------------------------------------------------------------------------

WIDTHS = ("LDG", "STG", "LD", "ST", "LDS", "STS", "LDL", "STL", "LDGSTS")
COUNTED = (
    "LDSM",
    "STSM",
    "UTMALDG",
    "UTMASTG",
    "UBLKCP",
    "MUFU",
    "SHFL",
    "BAR",
    "ATOM",
    "ATOMG",
    "ATOMS",
    "RED",
    "REDG",
)


def instruction_mix(opcodes: dict[str, int]) -> dict[str, int]:
    """Counts of the instructions that say how a kernel works: tensor cores, copies by width in bits, local memory."""
    mix: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        base = opcode.split(".")[0]
        if base in WIDTHS:
            width = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", opcode)
            mix[f"{base}.{width[1] if width else 32}"] += count
        elif base.endswith("MMA") or base in COUNTED:
            mix[base] += count
    return dict(sorted(mix.items()))


def print_report(console: Console, compilations: list[Compilation], budgets: list[Budget]) -> None:
    table = Table(title="CUDA kernels", title_justify="left")
    table.add_column("kernel", overflow="fold")
    table.add_column("arch")
    for heading in ("registers", "spilled", "stack", "static smem", "instructions"):
        table.add_column(heading, justify="right")
    table.add_column("mix", overflow="fold")
    table.add_column("blocks/SM")
    for kernel in (kernel for c in compilations if c.arch in BUDGET_ARCHS for kernel in c.kernels):
        budget = next(iter(budgets_of(kernel, budgets)), None)
        resident = budget.occupancy(kernel) if budget else None
        mix = " ".join(f"{name}:{count}" for name, count in instruction_mix(kernel.opcodes).items())
        sizes = (kernel.registers, kernel.spill_bytes, kernel.stack_bytes, kernel.static_smem_bytes)
        cells = [f"sm_{kernel.arch}", *map(str, sizes), str(kernel.num_instructions), mix]
        table.add_row(kernel.name, *cells, f"{resident.blocks_per_sm} ({resident.limit})" if resident else "no budget")
    console.print(table)
    loops = [KernelLoops(k.name, k.arch, k.loops) for c in compilations for k in c.kernels if k.loops]
    if loops := [entry for entry in loops if entry.arch in BUDGET_ARCHS]:
        console.print(*loop_tables(loops))
    costs = Table(title="compilation", title_justify="left")
    for heading, justify in (("source", "left"), ("arch", "left"), ("processor s", "right"), ("peak MiB", "right")):
        costs.add_column(heading, justify=justify)
    for c in compilations:
        costs.add_row(c.source, f"sm_{c.arch}", f"{c.seconds:.1f}", str(c.peak_bytes >> 20))
    console.print(costs)


def as_json(tools: Toolchain, compilations: list[Compilation], budgets: list[Budget], violations: list[str]) -> str:
    records = []
    for c in compilations:
        record = dataclasses.asdict(c)
        for kernel, entry in zip(c.kernels, record["kernels"], strict=True):
            budget = next(iter(budgets_of(kernel, budgets)), None)
            entry["num_instructions"] = kernel.num_instructions
            entry["mix"] = instruction_mix(kernel.opcodes)
            entry["loops"] = [sass_loop.as_dict(loop, kernel.arch) for loop in kernel.loops]
            entry["occupancy"] = dataclasses.asdict(budget.occupancy(kernel)) if budget else None
        records.append(record)
    report = {"nvcc": tools.version.splitlines()[-1], "compilations": records, "violations": violations}
    return json.dumps(report, indent=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets-only", action="store_true", help=f"only {' and '.join(BUDGET_ARCHS)}")
    archs = BUDGET_ARCHS if parser.parse_args().budgets_only else (*BUDGET_ARCHS, *OTHER_ARCHS)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    try:
        tools = Toolchain.of_build(ROOT / "build" / "cuda")
        files = sorted(ROOT.glob("csrc/*/budget.toml"))
        budgets = [budget for path in files for budget in read_budgets(path)]
        loop_budgets = [budget for path in files for budget in read_loop_budgets(path)]
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"cuda-report: {error}")
    if tools is None:
        sys.exit(f"cuda-report: {NO_COMPILER}")
    compilations = compile_all(tools, archs, ROOT / "build" / "cuda_report", console)
    violations = check_sources(tools) + check_report(compilations, budgets, loop_budgets)
    (ROOT / "build" / "cuda_report.json").write_text(as_json(tools, compilations, budgets, violations))
    print_report(console, compilations, budgets)
    for violation in violations:
        console.print(violation, style="red", markup=False, highlight=False)
    num_kernels = sum(len(c.kernels) for c in compilations if c.arch == BUDGET_ARCHS[0])
    names = ", ".join(f"sm_{arch}" for arch in archs)
    console.print(
        f"{num_kernels} kernels for {names}: {len(violations)} violations; build/cuda_report.json", highlight=False
    )
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
