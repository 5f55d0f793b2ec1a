# SPDX-License-Identifier: Apache-2.0
"""`python -m emulator`: what is in a file of PTX, and CUDA programs run without a GPU.

    python -m emulator info scale.ptx                   # or an object, a library, a program
    python -m emulator run ./program its arguments      # status 1 where the checks found a fault
    python -m emulator counters ./program its arguments

A program is one that nvcc compiled with `-cudart none` and that is linked to libemulator (docs/emulator.md).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import Error, Module, _emulator, library_dir
from .counters import print_report

FAULTS_FOUND = 1


def texts_of(file: Path) -> list[tuple[str, str]]:
    """(target, PTX) of every text in a .ptx file, an object, a library or a program."""
    data = file.read_bytes()
    texts, num_compressed = _emulator.texts_of(data)
    if texts or num_compressed:
        if num_compressed:
            print(
                f"{num_compressed} texts are compressed and left out; compile with nvcc --no-compress", file=sys.stderr
            )
        return texts
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Error(f"{file} holds no PTX") from None
    targets = [line.split()[1].strip(",") for line in text.splitlines() if line.strip().startswith(".target ")]
    if not targets:
        raise Error(f"{file} holds no PTX: there is no .target line")
    return [(targets[0], text)]


def info(console: Console, file: Path, with_instructions: bool) -> int:
    for target, text in texts_of(file):
        module = Module(text, target)
        table = Table(title=f"{file.name}: {target}", title_justify="left")
        for heading, justify in (
            ("kernel", "left"),
            ("parameters", "left"),
            ("static shared", "right"),
            ("local", "right"),
            ("threads", "right"),
            ("instructions", "right"),
        ):
            table.add_column(heading, justify=justify, overflow="fold")
        for name in module.kernels:
            used = module.instructions(name)
            count = str(sum(used.values()))
            try:
                kernel = module.kernel(name)
            except Error as error:
                table.add_row(_emulator.demangle(name), f"[red]not emulated: {error}[/red]", "", "", "", count)
                continue
            params = ", ".join(
                f".{param.type}" + (f"[{param.num_bytes}]" if param.type == "b8" else "") for param in kernel.params
            )
            threads = str(kernel.max_threads or "")
            local = str(kernel.local_bytes or "")
            table.add_row(kernel.signature, params, str(kernel.static_smem or ""), local, threads, count)
        console.print(table)
        if with_instructions:
            used = {}
            for name in module.kernels:
                for instruction, count in module.instructions(name).items():
                    used[instruction] = used.get(instruction, 0) + count
            console.print(", ".join(f"{name} x{count}" for name, count in sorted(used.items())), highlight=False)
    return 0


def run_program(
    command: list[str], options: argparse.Namespace
) -> tuple[int, list[dict[str, Any]], list[dict[str, Any]]]:
    """(exit status, reports, launches) of a program that is linked to libemulator."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.jsonl"
        variables = dict(os.environ, EMULATOR_OUTPUT=str(output), EMULATOR_ARCHITECTURE=str(options.architecture))
        variables["EMULATOR_CHECKS"] = str(int(not options.no_checks))
        variables["EMULATOR_COUNTERS"] = str(int(options.command == "counters"))
        variables["EMULATOR_THREADS"] = str(options.threads)
        paths = [str(library_dir), *filter(None, [variables.get("LD_LIBRARY_PATH")])]
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
        try:
            status = subprocess.run(command, env=variables).returncode
        except OSError as error:
            raise Error(f"cannot run {command[0]}: {error.strerror}") from None
        lines = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else None
    if status < 0:
        print(f"{command[0]} was ended by {signal.Signals(-status).name}", file=sys.stderr)
    if lines is None and status >= 0:
        raise Error(f"{command[0]} did not use the emulator: is it linked to libemulator (nvcc -cudart none)?")
    kept = {kind: [line[kind] for line in lines or [] if kind in line] for kind in ("report", "launch")}
    return (status if status >= 0 else 128 - status), kept["report"], kept["launch"]


def run(console: Console, command: list[str], options: argparse.Namespace) -> int:
    status, reports, launches = run_program(command, options)
    sys.stdout.flush()
    if options.command == "counters":
        print_report(console, launches, options.lines)
    for report in reports:
        print(f"emulator: {report['message']}", file=sys.stderr)
    blocks = sum(launch["grid"][0] * launch["grid"][1] * launch["grid"][2] for launch in launches)
    what = f"launches: {len(launches)}, blocks: {blocks:,}, sm_{options.architecture}"
    found = f"faults: {len(reports)}" if reports else "no fault found"
    print(f"emulator: {what}: {found}", file=sys.stderr)
    return status or (FAULTS_FOUND if reports else 0)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m emulator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = result.add_subparsers(dest="command", required=True, metavar="command")
    about = "kernels of a .ptx file, object, library or program: parameters, memory, instructions"
    command = commands.add_parser("info", help=about, description=about)
    command.add_argument("file", type=Path)
    command.add_argument(
        "--instructions", action="store_true", help="also every instruction, with how often it stands there"
    )
    for name, about in (
        ("run", "run a program with all checks; its own exit status, or 1 where a fault was found"),
        ("counters", "run a program and print what its kernels did, as tables of counts and estimates"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--architecture", type=int, default=80, help="of the GPU, 80 for sm_80 (the default)")
        command.add_argument("--threads", type=int, default=1, help="of this machine over the blocks of a launch")
        command.add_argument("--no-checks", action="store_true", help="only what is always checked: bounds, barriers")
        if name == "counters":
            command.add_argument("--lines", type=int, default=12, help="hottest source lines that are shown")
        command.add_argument("program", help="what nvcc -cudart none made, linked to libemulator")
        command.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
    return result


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        if options.command == "info":
            return info(console, options.file, options.instructions)
        return run(console, [options.program, *options.arguments], options)
    except (Error, OSError) as error:
        print(f"emulator: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
