# SPDX-License-Identifier: Apache-2.0
"""`make counters`: its shapes, its baseline and its sentences; and a run of merge_attention, whose counts are known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fmkernels import testing

ROOT = Path(__file__).resolve().parent.parent.parent
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))

if testing.emulated_error is not None:
    pytest.skip(f"the emulated backend is {testing.emulated_error}", allow_module_level=True)

import counters  # noqa: E402


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCH / "counters.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_merge_attention_moves_every_byte_once(tmp_path):
    """Memory bounds the kernel: sectors and distinct bytes must be those of its tensors, to the byte."""
    path = tmp_path / "counts.json"
    result = run("merge_attention", "--case", "chunk", "--json", str(path))
    assert result.returncode == 0, result.stderr
    for expected in ("[1/2] chunk [1, 512, 16, 64] fp32", "over the ideal", "busy cycles of an SM, H100", "hottest"):
        assert expected in result.stdout
    cases = json.loads(path.read_text())["cases"]
    for name, bytes_of_o in (("chunk [1, 512, 16, 64] fp32", 4 * 64), ("chunk [1, 512, 16, 128] bf16", 2 * 128)):
        (record,) = cases[name]
        side = 512 * 16 * (bytes_of_o + 4)  # o and lse
        assert record["totals"]["distinct_bytes_read"] == 2 * side
        assert record["totals"]["distinct_bytes_written"] == side
        assert record["ratios"]["sectors_read"] < 1.06  # a warp reads lse of two heads, in two sectors
        assert record["totals"]["mma_flops"] == record["totals"]["local_bytes_read"] == 0


def test_a_call_of_several_kernels_is_compared_with_its_baseline():
    """The sum over its kernels asked the baseline for the lines that a baseline does not keep."""
    result = run("attention_backward", "--case", "head_dim 64 causal")
    assert result.returncode == 0, result.stderr
    assert len(counters.read_baseline("attention_backward", 80)["head_dim 64 causal"]) > 1
    assert "all 3 kernels" in result.stdout


def test_every_case_says_what_it_has_to_do_at_least():
    assert {"attention_forward", "merge_attention"} <= set(counters.ops_with_shapes())
    case = counters.Case.of("pair", lambda x, scale: (x * scale, None), (counters.torch.ones(6), 2.0), useful_flops=6)
    assert case.work == counters.Work(useful_flops=6, input_bytes=24, output_bytes=24)
    assert case.run()[0].tolist() == [2.0] * 6


def test_baseline_of_another_architecture_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(counters, "FOLDER", tmp_path)
    assert counters.read_baseline("op", 80) == {}
    path = counters.baseline_path("op")
    path.parent.mkdir()
    totals = dict.fromkeys(("mma_flops", "sectors_read", "sectors_written", "wavefronts"), 2)
    totals |= {f"ideal_{name}": 1 for name in ("sectors_read", "sectors_written", "wavefronts")}
    totals |= {"distinct_bytes_read": 64, "distinct_bytes_written": 32}
    record = {"name": "kernel", "totals": totals, "lines": [{"line": 3}]}
    path.write_text(counters.as_json("op", 80, [counters.Entry("case", [record], counters.Work(1, 64, 32))]))
    (kept,) = counters.read_baseline("op", 80)["case"]
    assert kept["ratios"]["mma_over_useful"] == 2.0
    assert "lines" not in kept
    assert counters.read_baseline("op", 90) == {}


def test_result_that_is_not_that_of_the_cpu_kernels_is_not_counted(monkeypatch):
    results = iter([1.0, 2.0])
    case = counters.Case("wrong", lambda: counters.torch.tensor(next(results)), counters.Work())
    with pytest.raises(AssertionError, match="wrong: not what the CPU kernels give"):
        counters.count(case, 80)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: op"),
        (["wonder"], "invalid choice: 'wonder'"),
        (["merge_attention", "--case", "wonder"], "no case of merge_attention has wonder in its name"),
        (["merge_attention", "--case", "chunk", "--save-baseline"], "--save-baseline takes all cases"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, sentence):
    result = run(*arguments)
    assert result.returncode != 0
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
