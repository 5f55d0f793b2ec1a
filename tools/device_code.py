# SPDX-License-Identifier: Apache-2.0
"""What the tools that read device code share: the compiler of the build, its disassembler, and their text."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


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


# ---- Machine code ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """One line of nvdisasm: `@!P0 LDG.E.128 R4, [R2.64]` has the guard "!P0"; that of most is empty."""

    address: int
    guard: str
    opcode: str  # with modifiers
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def label(self) -> str | None:
        """The label that a branch names."""
        found = re.search(r"\((\.L\w+)\)", self.operands)
        return found[1] if found else None

    @property
    def branch_targets(self) -> list[str]:
        """The labels that an indirect branch may go to."""
        found = re.search(r'BRANCH_TARGETS ([^"]*)"', self.operands)
        return re.split(r"[,\s]+", found[1].strip()) if found else []


@dataclass
class Section:
    """The code of one kernel, functions that it calls included."""

    instructions: list[Instruction] = field(default_factory=list)  # without padding at the end
    labels: dict[str, int] = field(default_factory=dict)  # label -> index of the instruction behind it


_SECTION = re.compile(r"\s*\.section\s+\.text\.([^,\s]+)")
_LABEL = re.compile(r"(\.L\w+):")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*)")


def parse_sections(text: str) -> dict[str, Section]:
    """The code sections, by symbol, of what `nvdisasm -c` prints."""
    sections: dict[str, Section] = {}
    current = Section()
    for line in text.splitlines():
        if instruction := _INSTRUCTION.match(line):
            address, guard, opcode, operands = instruction.groups()
            if opcode != "NOP":
                current.instructions.append(Instruction(int(address, 16), guard or "", opcode, operands.strip()))
        elif section := _SECTION.match(line):
            current = sections.setdefault(section[1], Section())
        elif label := _LABEL.match(line):
            current.labels[label[1]] = len(current.instructions)
    return sections


def count_opcodes(section: Section) -> Counter[str]:
    """How often each opcode with its modifiers stands in the code."""
    return Counter(instruction.opcode for instruction in section.instructions)


# ---- The tools -------------------------------------------------------------------------------------------------------


def find_tool(name: str, *folders: Path) -> Path | None:
    """A program of the CUDA toolkit: in one of the folders, on the PATH, or in this Python's packages."""
    spec = importlib.util.find_spec("nvidia")
    packages = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    on_path = shutil.which(name)
    places = [*(folder / name for folder in folders), *([Path(on_path)] if on_path else [])]
    places += [found for folder in packages for found in sorted(folder.glob(f"*/bin/{name}"))]
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
        nvdisasm = find_tool("nvdisasm", nvcc.parent)
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
