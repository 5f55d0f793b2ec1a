# SPDX-License-Identifier: Apache-2.0
"""examples/train_lm.py --gradients: codes between processes are compared with float32, counted, and survive a stop."""

import importlib.util
import io
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from example_scripts import FOLDER, TEXT, example, torchrun
from rich.console import Console

from fmkernels import block_codec

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

TINY = [
    "--hidden=64",
    "--layers=1",
    "--heads=2",
    "--kv-heads=1",
    "--seq=32",
    "--batch-size=4",
    "--validation-windows=4",
]
TINY += ["--threads=1", f"--text={TEXT}", "--steps=8", "--save-every=3", "--validate-every=4", "--learning-rate=0.01"]
FORMS = ["fp32", "int8", "int4+ef"]
TRAINS = """
import os
import sys

sys.path.insert(0, {folder!r})
import train_lm
from lm import logs
from lm.training import processes
from rich.console import Console

out, last, *arguments = sys.argv[1:]
append = logs.append


def stopping(folder, line):
    append(folder, line)
    if line["step"] == 5 and folder.name == last:
        os._exit(7)


logs.append = stopping
with processes("cpu") as here:
    for name in ("parts", "whole"):
        options = train_lm.parse([*arguments, "--resume", f"--out={{out}}/{{name}}"])
        assert train_lm.run(options, here, Console(quiet=here.rank != 0)) == 0
sys.stdout.flush()
os._exit(0)  # as train_lm.py itself
"""


@pytest.fixture(scope="module")
def demo():
    with example("train_lm") as module:
        yield module


def stopped_once(folder, *forms, how=()):
    """Trains into `parts`, where the first process is gone in the fifth step of the last form, two after a checkpoint.

    Other processes go on there, and train into `whole` with nothing in the way; what they have printed.
    """
    script = folder / "trains.py"
    script.write_text(TRAINS.format(folder=str(FOLDER)))
    arguments = [*TINY, "--gradients", *forms, *how]
    status, shown = torchrun(script, str(folder), forms[-1], *arguments)
    assert status != 0
    assert "exitcode  : 7" in shown
    assert checkpoint(folder / "parts" / forms[-1])["step"] == 3
    status, shown = torchrun(script, str(folder), "none", *arguments)
    assert status == 0, shown
    return shown


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(the folder of runs of all forms, stopped once in `parts` and never in `whole`, what they have printed)."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, stopped_once(folder, *FORMS)


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_run(demo, actual, expected):
    for key in ("step", "loss", "validation_loss", "gradient_norm", "payload_bytes"):
        lines = [[line.get(key) for line in demo.logs.read(folder)] for folder in (actual, expected)]
        assert lines[0] == lines[1], key
    states = [checkpoint(folder) for folder in (actual, expected)]
    assert states[0]["settings"] == states[1]["settings"]
    errors = [[of["states"] for of in state["errors"] or []] for state in states]
    states = [(state["model"], state["optimizer"]["state"], of) for state, of in zip(states, errors, strict=True)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


# ---- two processes ---------------------------------------------------------------------------------------------------


def test_forms_are_compared(demo, runs):
    folder, shown = runs[0] / "whole", runs[1]
    assert shown.count("All losses are as close to that of fp32 as they must be.") == 2
    assert shown.count("A byte has an entropy of") == 2
    for form in FORMS:
        lines = demo.logs.read(folder / form)
        assert [line["step"] for line in lines] == list(range(1, 9))
        assert all(line["seconds"] > 0 for line in lines)
    if importlib.util.find_spec("matplotlib"):
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert demo.logs.read(folder / "int8")[-1]["loss"] != demo.logs.read(folder / "fp32")[-1]["loss"]


@pytest.mark.skipif(sys.platform != "linux", reason="the counters of interfaces are those of Linux")
def test_bytes_sent_are_those_of_the_formula_and_pass_the_interface(demo, runs):
    """The formula as docs/quantized_collectives.md has it; on the loopback an interface counts all processes."""
    folder = runs[0] / "whole"
    numels = [tensor.numel() for tensor in checkpoint(folder / "fp32")["model"].values()]
    least = {}  # other programs' bytes come on top
    for form, bits in (("int8", 8), ("int4+ef", 4)):
        wires = 0
        for numel in numels:
            blocks = -(-numel // 128)
            parts = [blocks // 2 * 128, numel - blocks // 2 * 128] if blocks * 128 >= 2 * 4096 else [numel]
            wires += sum(block_codec.wire_bytes(part, bits=bits) for part in parts)
        for line in demo.logs.read(folder / form):
            assert line["payload_bytes"] == 2 * wires + line["num_calls"] * 2 * 8 * (16 + 2 * 2)
        least[form] = min(line["interface_bytes"] for line in demo.logs.read(folder / form))
        assert least[form] > 2 * wires
    least["fp32"] = min(line["interface_bytes"] for line in demo.logs.read(folder / "fp32"))
    assert least["fp32"] > 2 * 4 * sum(numels)
    assert least["int4+ef"] < least["int8"] < least["fp32"] - 4 * sum(numels)


def test_a_run_that_was_stopped_goes_on_with_the_errors_of_every_process(demo, runs):
    parts, whole = (runs[0] / name for name in ("parts", "whole"))
    for form in FORMS:
        assert_same_run(demo, parts / form, whole / form)
    assert [checkpoint(parts / form)["errors"] for form in ("fp32", "int8")] == [None, None]
    saved = checkpoint(parts / "int4+ef")
    assert [errors["wrapping"] for errors in saved["errors"]] == ["DDP", "DDP"]
    first, second = (errors["states"][""]["errors"] for errors in saved["errors"])
    assert first.keys() == second.keys() == saved["model"].keys()
    for name, error in first.items():
        assert error.any(), name
        assert not torch.equal(error, second[name]), name


@pytest.mark.slow  # three more starts of torchrun
def test_fsdp_goes_on_with_its_errors_and_not_with_those_of_expert_parallelism(demo, tmp_path):
    model = ["--moe", "--experts=2", "--topk=1"]
    stopped_once(tmp_path, "int4+ef", how=[*model, "--fsdp"])
    assert_same_run(demo, tmp_path / "parts" / "int4+ef", tmp_path / "whole" / "int4+ef")
    for errors in checkpoint(tmp_path / "parts" / "int4+ef")["errors"]:
        assert len(errors["states"]) == 2, "the block, and what is around it"
        assert all(state["error"].any() for state in errors["states"].values())
    arguments = [
        *TINY,
        *model,
        "--expert-parallel",
        "--gradients",
        "int4+ef",
        f"--out={tmp_path / 'parts'}",
        "--resume",
    ]
    status, shown = torchrun(FOLDER / "train_lm.py", *arguments)
    assert status != 0
    sentence = (
        "checkpoint.pt has the errors of 2 processes with FSDP, which must be those of the run, it has 2 processes"
    )
    assert f"{sentence} with expert parallelism" in shown


# ---- what is judged --------------------------------------------------------------------------------------------------


def lines_of(loss, payload=None):
    line = {"loss": loss, "validation_loss": loss, "seconds": 0.1, "num_calls": 1}
    return [line | {"step": step} | ({} if payload is None else {"payload_bytes": payload}) for step in (1, 2)]


@pytest.mark.parametrize(
    ("form", "loss", "more", "sentence"),
    [
        ("int8", 2.0199, 0, "All losses are as close to that of fp32 as they must be."),
        ("int8", 2.021, 0, "The loss of int8 must be within 1% of that of fp32, it is 1.05% away."),
        ("int4+ef", 1.93, 0, "The loss of int4+ef must be within 3% of that of fp32, it is 3.50% away."),
        ("int4+ef", 2.05, 0, "All losses are as close to that of fp32 as they must be."),
        ("int8", math.nan, 0, "The loss of int8 must be within 1% of that of fp32, it is nan% away."),
        ("int8", 2.0, 1, "int8 sent 8929 bytes in step 1, not 8928."),
        ("int8", 2.0, None, "int8 sent uncounted bytes in step 1, not 8928."),
    ],
)
def test_losses_and_bytes_are_judged(demo, form, loss, more, sentence):
    """8928: there and back 4096 codes with 32 scales and 40 codes, as 64, with one, as 4; a header each way."""
    numels = [4096, 40]
    payload = 2 * (4096 + 128 + 64 + 16) + 2 * 160 if form == "int8" else 2 * (2048 + 128 + 32 + 16) + 2 * 160
    console = Console(record=True, width=200, file=io.StringIO())
    runs = {"fp32": lines_of(2.0), form: lines_of(loss, None if more is None else payload + more)}
    assert demo.judge_gradients(runs, {form: 1}, numels, 2, console) == (0 if sentence.startswith("All") else 1)
    assert console.export_text().splitlines()[0] == sentence


def test_bytes_of_steps_that_others_made_and_that_nobody_counted_are_not_judged(demo):
    runs = {"fp32": lines_of(2.0), "int8": lines_of(2.0)}
    runs["int8"][1]["payload_bytes"] = 8928
    console = Console(file=io.StringIO())
    assert demo.judge_gradients(runs, {"int8": 2}, [4096, 40], 2, console) == 0
    assert demo.judge_gradients(runs, {}, [4096, 40], 2, console) == 0
    assert demo.judge_gradients(runs, {"int8": 1}, [], 2, console) == 0


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["int5"], ["int8", "int4"], ["int8", "int8"], ["fp32", "int8", "--attention=both"], ["int8", "--attention=both"]],
    ids=" ".join,
)
def test_wrong_options(demo, capsys, arguments):
    with pytest.raises(SystemExit) as raised:
        demo.main(["--gradients", *arguments])
    assert raised.value.code == 2
    assert "argument --gradients: " in capsys.readouterr().err


def test_codes_need_processes(demo, capsys, tmp_path):
    assert demo.main([*TINY, "--gradients", "int8", f"--out={tmp_path}"]) == 2
    assert "--gradients int8 needs processes that send them: use torchrun" in capsys.readouterr().out


def test_errors_of_two_processes_are_not_those_of_one(demo, runs):
    errors = checkpoint(runs[0] / "whole" / "int4+ef")["errors"]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        compression = demo.gradients.Compression(model, "int4+ef", "DDP", None)
        sharded = [{"wrapping": "FSDP", "states": {}}]
        for gathered, whose in ((errors, "2 processes with DDP"), (sharded, "1 processes with FSDP")):
            sentence = f"has the errors of {whose}, which must be those of the run, it has 1 processes with DDP$"
            with pytest.raises(ValueError, match=sentence):
                compression.scatter(gathered, Path("x.pt"))
        compression.scatter(compression.gather(), Path("x.pt"))
    finally:
        dist.destroy_process_group()
