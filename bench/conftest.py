# SPDX-License-Identifier: Apache-2.0
"""`python -m pytest bench`: options, the `compare` fixture, and the report at the end. See docs/benchmarks.md."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import machine
import measure
import pytest
import report
import torch
from measure import Contender

ROOT = Path(__file__).parent.parent
REPORT = pytest.StashKey[report.Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fmkernels")
    group.addoption(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu", help="what to time"
    )
    group.addoption("--threads", type=int, default=1, metavar="N", help="CPU threads; more than one: indications only")
    group.addoption("--save-baseline", action="store_true", help="write the rows to bench/baseline/<device>.jsonl")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.option.benchmark_quiet = True  # its table shows our rounds without the peers; --benchmark-verbose prints it
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a CUDA device, and this torch sees none.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 1 <= config.getoption("threads") <= cores:
        raise pytest.UsageError(f"--threads must be from 1 to the {cores} cores, got {config.getoption('threads')}.")


@pytest.fixture(scope="session")
def _report(request: pytest.FixtureRequest) -> Iterator[report.Report]:
    """The rows of this run; the process stays pinned while they are measured."""
    config = request.config
    cpu_info = config.hook.pytest_benchmark_generate_machine_info(config=config)["cpu"]
    commit = config.hook.pytest_benchmark_generate_commit_info(config=config)
    described = machine.describe(config.getoption("device"), config.getoption("threads"), cpu_info)
    with machine.held_still(described), torch.no_grad():
        read_bytes = max(256 << 20, 4 * described.cache_bytes)
        config.stash[REPORT] = report.Report(
            machine=described,
            commit=str(commit["id"])[:12] + ("+changes" if commit["dirty"] else ""),
            time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            ceilings=measure.Ceilings(torch.device(described.device), read_bytes),
            folder=ROOT / "build" / "bench",
            baseline=ROOT / "bench" / "baseline" / f"{described.slug}.jsonl",
        )
        yield config.stash[REPORT]


@pytest.fixture(scope="session")
def device(_report: report.Report) -> torch.device:
    return torch.device(_report.machine.device)


@pytest.fixture(scope="session")
def cache_bytes(_report: report.Report) -> int:
    """Last-level cache, for `measure.num_sets`."""
    return _report.machine.cache_bytes


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark, _report: report.Report) -> Callable[..., None]:
    """compare(group, case, ours, peers, flops=... or num_bytes=...): times the contenders, adds a row to the report."""

    def _compare(
        group: str,
        case: str,
        ours: Contender,
        peers: Sequence[Contender],
        *,
        flops: float | None = None,
        num_bytes: float | None = None,
        check_dtype: bool = True,
    ) -> None:
        row = measure.measure(
            benchmark,
            ours,
            peers,
            _report.ceilings,
            group=group,
            case=case,
            unit="GB/s" if flops is None else "GFLOP/s",
            amount=num_bytes if flops is None else flops,
            min_rounds=request.config.getoption("benchmark_min_rounds"),
            max_seconds=float(request.config.getoption("benchmark_max_time")),
            check_dtype=check_dtype,
        )
        if row is not None:
            _report.add(row)

    return _compare


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    finished = config.stash.get(REPORT, None)
    if finished is None or not finished.rows:
        return
    terminalreporter.section("fmkernels")
    terminalreporter.write(finished.text(colour=terminalreporter.hasmarkup))
    terminalreporter.write_line(f"rows: {finished.rows_path}\nplot: {finished.plot()}")
    if config.getoption("save_baseline"):
        finished.save_baseline()
        terminalreporter.write_line(f"baseline: {finished.baseline}")
