# SPDX-License-Identifier: Apache-2.0
"""Runs the standard shapes of an op over the emulator and prints what its kernels did, beside the baseline.

    make counters OP=attention_forward
    python3 run.py counters attention_forward --save-baseline

The shapes stand in bench/counters_<op>.py as CASES. Everything is counted from the PTX that ran, with all checks on, so
the numbers of one source and compiler never vary; estimates follow from them and are no times. Results are compared
with the CPU kernels first. The baseline is bench/baseline/counters_<op>.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import emulator
from emulator.counters import Entry, Record, Work, print_entries, ratios, summarize, total
from fmkernels import testing
from fmkernels._library import ops

FOLDER = Path(__file__).parent
LARGEST_ERROR = 0.01  # of the largest value of a tensor
MIN_WIDTH = 170  # a narrower table would crop numbers


@dataclass(frozen=True)
class Case:
    """One call that is counted: `run` calls a public function or an op, on CPU tensors that it always holds alike."""

    name: str
    run: Callable[[], Any]
    work: Work

    @classmethod
    def of(cls, name: str, function: Callable[..., Any], args: Sequence, useful_flops: int = 0, **kwargs: Any) -> Case:
        """A call whose inputs are `args` and whose outputs are as many bytes as the CPU kernels return."""
        outputs = function(*args, **kwargs)
        work = Work(useful_flops, bytes_of(args), bytes_of(outputs))
        return cls(name, lambda: function(*args, **kwargs), work)


def bytes_of(values: Any) -> int:
    """Of all tensors, each as though it stood in memory once and without gaps."""
    tensors = [values] if isinstance(values, torch.Tensor) else [v for v in values if isinstance(v, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def ops_with_shapes() -> list[str]:
    return sorted(path.stem.removeprefix("counters_") for path in FOLDER.glob("counters_*.py"))


def count(case: Case, architecture: int) -> list[Record]:
    """One record a kernel of the call. Raises emulator.FaultError where the checks found something."""
    expected = case.run()
    before = ops.namespace
    ops.use(testing.EMULATED_NAMESPACE)
    try:
        with emulator.watch(architecture=architecture, counters=True) as watched:
            actual = case.run()
    finally:
        ops.use(before)
    require_same(case.name, actual, expected)
    return summarize([{**launch, "name": short_name(launch["name"])} for launch in watched.launches])


def require_same(name: str, actual: Any, expected: Any) -> None:
    """Raises AssertionError where a result is wrong: its work is not worth counting. How exact it is, the tests say."""
    pairs = zip(*([x] if isinstance(x, torch.Tensor) else x for x in (actual, expected)), strict=True)
    for result, truth in pairs:
        finite = truth[truth.isfinite()]
        largest = finite.abs().max().item() if finite.numel() else 0.0
        torch.testing.assert_close(
            result,
            truth,
            rtol=0,
            atol=LARGEST_ERROR * largest,
            msg=lambda text: f"{name}: not what the CPU kernels give. {text}",
        )


def short_name(name: str) -> str:
    return re.sub(r"\bfmkernels(_emulated)?::", "", name)


# ---- Baseline --------------------------------------------------------------------------------------------------------


def baseline_path(op: str) -> Path:
    return FOLDER / "baseline" / f"counters_{op}.json"


def read_baseline(op: str, architecture: int) -> dict[str, list[Record]]:
    """Records by case; empty where there is no baseline, or one of another architecture."""
    path = baseline_path(op)
    saved = json.loads(path.read_text()) if path.exists() else {"architecture": None}
    return saved["cases"] if saved["architecture"] == architecture else {}


def as_json(op: str, architecture: int, entries: Sequence[Entry]) -> str:
    """What is kept of a run: no lines, which change with every edit, and the ratios to the ideal."""

    def kept(record: Record, work: Work) -> Record:
        return {**{key: value for key, value in record.items() if key != "lines"}, "ratios": ratios(record, work)}

    cases = {
        entry.case: [kept(r, entry.work if len(entry.records) == 1 else Work()) for r in entry.records]
        for entry in entries
    }
    return json.dumps({"op": op, "architecture": architecture, "cases": cases}, indent=1) + "\n"


# ---- Command ---------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="run.py counters", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("op", choices=ops_with_shapes(), help="whose shapes to run: %(choices)s", metavar="op")
    result.add_argument("--save-baseline", action="store_true", help="write the counts to bench/baseline")
    result.add_argument("--architecture", type=int, default=80, help="of the emulated GPU, 80 for sm_80 (the default)")
    result.add_argument("--case", default="", help="run only the cases whose name contains this")
    result.add_argument("--lines", type=int, default=12, help="hottest source lines of each kernel (default 12)")
    result.add_argument("--json", type=Path, help="also write the counts to this file")
    return result


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if testing.emulated_error is not None:
        sys.exit(f"counters: the emulated backend is {testing.emulated_error}")
    if options.case and options.save_baseline:
        sys.exit("counters: --save-baseline takes all cases, not those of --case")
    cases = [case for case in importlib.import_module(f"counters_{options.op}").CASES if options.case in case.name]
    if not cases:
        sys.exit(f"counters: no case of {options.op} has {options.case} in its name")
    saved = read_baseline(options.op, options.architecture)
    entries = []
    for index, case in enumerate(cases, 1):
        print(f"[{index}/{len(cases)}] {case.name} ...", end=" ", flush=True)
        start = time.monotonic()
        try:
            records = count(case, options.architecture)
        except (AssertionError, emulator.FaultError) as error:
            sys.exit(f"failed\ncounters: {error}")
        lanes = total(records)["totals"]["lane_instructions"] if records else 0
        seconds = time.monotonic() - start
        print(f"{seconds:.1f} s, {lanes / 1e6:.1f} M lane-instructions", flush=True)
        entries.append(Entry(case.name, records, case.work, saved.get(case.name, [])))

    console = Console(highlight=False)
    console.width = max(console.width, MIN_WIDTH)
    print_entries(console, entries, options.lines)
    text = as_json(options.op, options.architecture, entries)
    if options.json:
        options.json.write_text(text)
    path = baseline_path(options.op)
    if options.save_baseline:
        path.write_text(text)
        print(f"baseline: {path.relative_to(FOLDER.parent)}")
    elif not saved:
        print(f"no baseline of sm_{options.architecture} to compare with; --save-baseline writes {path.name}")
    return 0


if __name__ == "__main__":
    from counters import main as main_of_module  # the module that the shapes import, and not a second one

    sys.exit(main_of_module())
