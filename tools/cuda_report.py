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

Spilled registers and local memory are always an error. So is a kernel without exactly one budget for each architecture,
a budget without a kernel, and a source that takes a minute or 2 GiB to compile. The compile command is the one of the
build (build/cuda/compile_commands.json). Writes build/cuda_report.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tomllib
from occupancy import Occupancy, occupancy
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
BUDGET_ARCHS = ("80", "90a")
OTHER_ARCHS = ("86", "89", "100a", "120a")  # must compile
MAX_COMPILE_SECONDS = 60  # of processor time, for all of BUDGET_ARCHS
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


# ---- Budgets ---------------------------------------------------------------------------------------------------------


def read_budgets(path: Path) -> list[Budget]:
    """The budgets of one budget.toml."""
    fields = {field.name for field in dataclasses.fields(Budget)} - {"room"}
    budgets = []
    for entry in tomllib.loads(path.read_text()).get("kernel", []):
        if set(entry) != fields:
            difference = ", ".join(sorted(set(entry) ^ fields))
            raise ValueError(f"{path}: [[kernel]] {entry.get('name')} has missing or unknown keys: {difference}")
        unknown = set(entry["archs"]) - set(BUDGET_ARCHS)
        if unknown:
            raise ValueError(f"{path}: archs of {entry['name']} must be of {BUDGET_ARCHS}, got {sorted(unknown)}")
        budgets.append(Budget(room=path.parent.name, **entry))
    return budgets


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


def check_report(compilations: list[Compilation], budgets: list[Budget]) -> list[str]:
    """Every sentence to say about the whole report; none when all is well."""
    found = [f"{c.source} does not compile for sm_{c.arch}:\n{c.error}" for c in compilations if c.error]
    kernels = [kernel for c in compilations if c.arch in BUDGET_ARCHS for kernel in c.kernels]
    for kernel in kernels:
        found += check_kernel(kernel, budgets)
    failed = {(Path(c.source).parent.name, c.arch) for c in compilations if c.error}
    for budget in budgets:
        for arch in set(budget.archs) - {arch for room, arch in failed if room == budget.room}:
            if not any(budget.matches(kernel) and kernel.arch == arch for kernel in kernels):
                found.append(f"csrc/{budget.room}/budget.toml: {budget.name} matches no kernel for sm_{arch}")
    for source in sorted({c.source for c in compilations}):
        seconds = sum(c.seconds for c in compilations if c.source == source and c.arch in BUDGET_ARCHS)
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


def short_name(demangled: str) -> str:
    """`merge_attention_kernel<float, 4>` of a demangled signature."""
    name = re.sub(r"\(anonymous namespace\)::|\bfmkernels::|^void ", "", demangled)
    depth = 0
    for position, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:position]
    return name


def demangle(symbols: list[str]) -> list[str]:
    listing = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return [short_name(line) for line in listing.stdout.splitlines()]


def parse_ptxas(text: str) -> dict[str, dict[str, int]]:
    """Resources of each kernel, by symbol, of what `ptxas -v` prints."""

    def numbers(pattern: str, part: str) -> list[int]:
        return [int(number) for number in re.findall(pattern, part)] or [0]

    resources = {}
    for part in text.split("Compiling entry function '")[1:]:
        resources[part.split("'")[0]] = {
            "registers": numbers(r"Used (\d+) registers", part)[0],
            "barriers": numbers(r"used (\d+) barriers", part)[0],
            # The functions that a kernel calls have a line of their own behind it.
            "stack_bytes": sum(numbers(r"(\d+) bytes stack frame", part)),
            "spill_bytes": sum(numbers(r"(\d+) bytes spill (?:stores|loads)", part)),
            "static_smem_bytes": numbers(r"(\d+) bytes smem", part)[0],
        }
    return resources


def parse_sass(text: str) -> dict[str, Counter[str]]:
    """Opcodes of each code section, by symbol, of what `nvdisasm -c` prints; padding is left out."""
    opcodes: dict[str, Counter[str]] = {}
    for line in text.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            current = opcodes.setdefault(section[1], Counter())
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            current[instruction[1]] += instruction[1] != "NOP"
    return {symbol: +counter for symbol, counter in opcodes.items()}


def find_nvdisasm(nvcc: Path) -> Path | None:
    """nvdisasm of the toolkit, of the PATH, or of this Python's packages."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    on_path = shutil.which("nvdisasm")
    places = [nvcc.parent / "nvdisasm", *([Path(on_path)] if on_path else [])]
    places += [found for folder in folders for found in sorted(folder.glob("*/bin/nvdisasm"))]
    return next((place for place in places if place.exists()), None)


@dataclass(frozen=True)
class Toolchain:
    nvcc: Path
    nvdisasm: Path
    version: str  # of both, as they print it
    commands: dict[Path, list[str]]  # source -> the build's command, without architecture, action and output

    @classmethod
    def of_build(cls, build_dir: Path) -> Toolchain | None:
        """The compiler and the flags of a CUDA build; None where there was none or its compiler is gone."""
        database = build_dir / "compile_commands.json"
        entries = json.loads(database.read_text()) if database.exists() else []
        commands = {Path(e["file"]): strip_command(e["command"]) for e in entries if e["file"].endswith(".cu")}
        commands = {source: command for source, command in commands.items() if source.exists()}
        nvcc = Path(next(iter(commands.values()))[0]) if commands else None
        if nvcc is None or not nvcc.exists():
            return None
        nvdisasm = find_nvdisasm(nvcc)
        if nvdisasm is None:
            raise FileNotFoundError("nvdisasm is missing; run: python3 run.py setup")
        printed = [
            subprocess.run([tool, "--version"], capture_output=True, text=True).stdout for tool in (nvcc, nvdisasm)
        ]
        return cls(nvcc, nvdisasm, "".join(printed), commands)

    def command(self, source: Path, arch: str) -> list[str]:
        return [*self.commands[source], f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v", "-cubin"]


def strip_command(command: str) -> list[str]:
    words = iter(shlex.split(command))
    kept = []
    for word in words:
        if word in ("-o", "-MF", "-MT"):
            next(words)
        elif not word.startswith("-gencode") and word not in ("-c", "-MD"):
            kept.append(word)
    return kept


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
    resources, opcodes = parse_ptxas(printed), parse_sass(sass)
    kernels = [
        Kernel(name=short, room=room, arch=arch, opcodes=dict(opcodes[symbol]), **resources[symbol])
        for symbol, short in zip(resources, demangle(list(resources)), strict=True)
    ]
    return Compilation(name, arch, seconds, peak_bytes, sorted(kernels, key=lambda kernel: kernel.name))


def compile_cached(tools: Toolchain, source: Path, arch: str, cache_dir: Path) -> tuple[Compilation, Path]:
    """The compilation, from the cache where sources, flags and tools are the same; and its file there."""
    files, _ = include_closure(source)
    parts = [path.read_bytes() for path in sorted(files)] + [Path(__file__).read_bytes(), tools.version.encode()]
    parts.append(shlex.join(tools.command(source, arch)).encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    path = cache_dir / f"{source.stem}-{arch}-{key}.json"
    if path.exists():
        record = json.loads(path.read_text())
        return Compilation(**{**record, "kernels": [Kernel(**kernel) for kernel in record["kernels"]]}), path
    result = compile_source(tools, source, arch)
    if not result.error:
        path.with_suffix(".part").write_text(json.dumps(dataclasses.asdict(result)))
        path.with_suffix(".part").replace(path)
    return result, path


def compile_all(tools: Toolchain, cache_dir: Path, console: Console) -> list[Compilation]:
    cache_dir.mkdir(parents=True, exist_ok=True)
    jobs = [(source, arch) for source in sorted(tools.commands) for arch in (*BUDGET_ARCHS, *OTHER_ARCHS)]
    with ThreadPoolExecutor(os.cpu_count()) as pool, Progress(console=console, transient=True) as progress:
        futures = [pool.submit(compile_cached, tools, source, arch, cache_dir) for source, arch in jobs]
        results = [future.result() for future in progress.track(futures, description="device code")]
    for stale in set(cache_dir.iterdir()) - {path for _, path in results}:
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
            entry["occupancy"] = dataclasses.asdict(budget.occupancy(kernel)) if budget else None
        records.append(record)
    report = {"nvcc": tools.version.splitlines()[-1], "compilations": records, "violations": violations}
    return json.dumps(report, indent=1)


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    console = Console()
    if not console.is_terminal:
        console.width = 160
    try:
        tools = Toolchain.of_build(ROOT / "build" / "cuda")
        budgets = [budget for path in sorted(ROOT.glob("csrc/*/budget.toml")) for budget in read_budgets(path)]
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"cuda-report: {error}")
    if tools is None:
        sys.exit(f"cuda-report: {NO_COMPILER}")
    compilations = compile_all(tools, ROOT / "build" / "cuda_report", console)
    violations = check_sources(tools) + check_report(compilations, budgets)
    (ROOT / "build" / "cuda_report.json").write_text(as_json(tools, compilations, budgets, violations))
    print_report(console, compilations, budgets)
    for violation in violations:
        console.print(violation, style="red", markup=False, highlight=False)
    archs = ", ".join(f"sm_{arch}" for arch in (*BUDGET_ARCHS, *OTHER_ARCHS))
    num_kernels = sum(len(c.kernels) for c in compilations if c.arch == BUDGET_ARCHS[0])
    console.print(
        f"{num_kernels} kernels for {archs}: {len(violations)} violations; build/cuda_report.json", highlight=False
    )
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
