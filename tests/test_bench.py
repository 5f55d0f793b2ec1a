# SPDX-License-Identifier: Apache-2.0
"""bench/: that its clock is the device's, that its report says what was measured, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")
BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import measure  # noqa: E402
from machine import Machine  # noqa: E402
from report import Report  # noqa: E402

MACHINE = Machine("cpu", "A Processor", 8, 1, True, "AVX2", 32 << 20, "2.13.0", 0.5)
RATIOS = {"group": "causal", "case": "b1", "peer": "SDPA", "speedup": 2.0, "speedup_low": 1.9, "speedup_high": 2.1}
ROW = measure.Row(
    **RATIOS, seconds=1e-3, peer_seconds={"SDPA": 2e-3}, rate=50.0, unit="GFLOP/s", ceiling=100.0,
    num_rounds=9, num_calls=2,
)  # fmt: skip


def report_of(folder: Path, *rows: measure.Row) -> Report:
    ceilings = SimpleNamespace(seen={"GFLOP/s": [100.0, 100.0], "GB/s": []})
    result = Report(MACHINE, "abc", "now", ceilings, folder / "rows", folder / "baseline.jsonl")
    for row in rows:
        result.add(row)
    return result


def test_cuda_is_timed_by_events_whatever_library_the_arguments_are_of(monkeypatch):
    """Arrays of cupy are no tensors: the clock of the CPU would stop when their kernels are launched."""
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("record")

        def synchronize(self):
            happened.append("synchronize")

        def elapsed_time(self, end):
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    sets = [("no tensor",), ("no tensor",)]
    assert measure.seconds_of(lambda x: happened.append("run"), sets, torch.device("cuda")) == 0.25
    assert happened == ["record", "run", "run", "record", "synchronize"]


def test_report_shows_the_ratio_its_goal_and_its_change(tmp_path):
    slower = {**vars(ROW), "speedup": 1.0, "speedup_low": 0.9, "speedup_high": 1.1}
    (tmp_path / "baseline.jsonl").write_text(json.dumps(slower) + "\n")
    text = " ".join(report_of(tmp_path, ROW).text(colour=False).split())
    assert "b1 │ 1,000 │ 50.0 GFLOP/s │ 50% │ SDPA │ 2,000 │ 2.00 │ 1.90-2.10 │ +100%" in text
    assert "causal │ 1 │ 2.00 │ 2.00 │ 50% │ 1.6, 1.25 │ met" in text


def test_rows_are_written_at_once_and_the_baseline_keeps_other_cases(tmp_path):
    other = {**vars(ROW), "case": "b2"}
    (tmp_path / "baseline.jsonl").write_text(json.dumps(other) + "\n")
    report = report_of(tmp_path, ROW)
    (line,) = report.rows_path.read_text().splitlines()
    assert (json.loads(line)["speedup"], json.loads(line)["commit"]) == (2.0, "abc")
    report.save_baseline()
    assert [json.loads(row)["case"] for row in report.baseline.read_text().splitlines()] == ["b2", "b1"]


def test_plot_is_a_png(tmp_path):
    assert report_of(tmp_path, ROW).plot().read_bytes().startswith(b"\x89PNG")


def test_a_benchmark_runs_and_compares_without_timing():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "-q",
        "--benchmark-disable",
        "-k",
        "disagreement or (merge and decode and fp32)",
    ]
    run = subprocess.run(
        [*command, "--device=cpu", "-p", "no:cacheprovider"], cwd=BENCH.parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert "passed" in run.stdout
