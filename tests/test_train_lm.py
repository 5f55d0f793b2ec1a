# SPDX-License-Identifier: Apache-2.0
"""examples/train_lm.py with a tiny model: it learns, goes on exactly, and notices an attention that is wrong."""

import importlib.util
import io
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from example_scripts import FOLDER, TEXT, example, torchrun
from rich.console import Console

import fmkernels

TINY = ["--hidden=32", "--layers=2", "--heads=2", "--kv-heads=1", "--seq=64"]
TINY += ["--batch-size=4", "--validation-windows=4", "--threads=1", f"--text={TEXT}"]
STEPS = ["--steps=8", "--save-every=3", "--validate-every=4"]
MOE = ["--moe", "--experts=4"]


class Stopped(Exception):
    """What ends a run in its middle."""


@pytest.fixture(scope="module")
def demo():
    with example("train_lm") as module:
        yield module


def run(demo, capsys, *arguments):
    status = demo.main([*TINY, *arguments])
    return status, " ".join(capsys.readouterr().out.split())


def losses(demo, folder):
    return [(line["step"], line["loss"], line.get("validation_loss")) for line in demo.logs.read(folder)]


def stopped(demo, last, *arguments):
    """A run that is stopped when the log has its line of step `last`."""
    append = demo.logs.append

    def stopping(folder, line):
        append(folder, line)
        if line["step"] == last:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.logs, "append", stopping)
        with pytest.raises(Stopped):
            demo.main([*TINY, *arguments])


# ---- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["float32", "bf16"])
def test_both_attentions_learn_the_same(demo, capsys, tmp_path, precision):
    arguments = ["--attention=both", "--steps=40", "--learning-rate=0.01", f"--out={tmp_path}", *precision]
    status, shown = run(demo, capsys, *arguments)
    assert status == 0, shown
    assert "The two attentions learn the same: the losses of a step differ by" in shown
    for name in ("fmkernels", "torch"):
        lines = demo.logs.read(tmp_path / name)
        assert [line["step"] for line in lines] == list(range(1, 41))
        assert abs(lines[0]["loss"] - torch.tensor(256.0).log().item()) < 0.1, "at first every byte is as likely"
        assert lines[-1]["validation_loss"] < 4
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert "Nothing is drawn, matplotlib is not installed." in shown


def test_wrong_attention_is_noticed(demo, capsys, tmp_path, monkeypatch):
    def blind(q, k, v, *, causal, window, block_mask):
        return fmkernels.attention(q, k, v, causal=causal, window=(0, 0))

    monkeypatch.setattr(sys.modules["fmkernels.nn.attention"], "attention", blind)
    status, shown = run(demo, capsys, "--attention=both", "--steps=40", "--learning-rate=0.01", f"--out={tmp_path}")
    assert status == 1
    assert "The two attentions do not learn the same" in shown


def test_a_loss_that_is_no_number_is_not_the_same(demo):
    steps = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3, 4)]
    assert demo.judge_attentions({"a": steps, "b": steps}, Console(file=io.StringIO())) == 0
    lost = [*steps[:3], {"step": 4, "loss": math.nan}]
    for other in (steps, lost):
        assert demo.judge_attentions({"a": lost, "b": other}, Console(file=io.StringIO())) == 1


def test_checkpointed_activations_change_no_bit(demo, capsys, tmp_path):
    for name, more in (("plain", []), ("checkpointed", ["--checkpoint-activations"])):
        assert run(demo, capsys, *STEPS, f"--out={tmp_path / name}", *more)[0] == 0
    assert losses(demo, tmp_path / "plain" / "fmkernels") == losses(demo, tmp_path / "checkpointed" / "fmkernels")


def test_a_mixture_learns_and_shows_its_loads(demo, capsys, tmp_path):
    status, shown = run(demo, capsys, *MOE, "--steps=40", "--learning-rate=0.01", f"--out={tmp_path}")
    assert status == 0, shown
    lines = demo.logs.read(tmp_path / "fmkernels")
    assert lines[-1]["validation_loss"] < 4
    assert all(sum(block) == 4 * 64 * 2 for line in lines for block in line["load"]), "bytes of a step times topk"
    assert [len(block) for block in lines[0]["load"]] == [4, 4]
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "fmkernels" / "load.png").read_bytes().startswith(b"\x89PNG")


def test_the_text_is_the_standard_library_without_its_tests(demo):
    source = demo.text.load()
    assert Path(os.__file__).read_bytes() in source.train.numpy().tobytes() + source.validation.numpy().tobytes()
    assert 20 * len(source.validation) < 2 * len(source.train)
    assert demo.text.load().digest == source.digest


def test_the_entropy_of_bytes_that_are_as_likely_is_the_logarithm_of_their_number(demo):
    for count in (1, 2, 256):
        train = torch.arange(count, dtype=torch.uint8).repeat(3)
        source = demo.text.Text(train, torch.zeros(1, dtype=torch.uint8), "")
        assert demo.text.entropy(source) == pytest.approx(math.log(count))


def test_files_held_out_are_whole_and_in_no_batch(demo, tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02}.py").write_text(f"# {number:02}\n" * 50)
    source = demo.text.load(tmp_path)
    assert source.validation.numpy().tobytes().split(b"\0")[:-1] == [b"# 19\n" * 50, b"# 39\n" * 50]
    assert b"19" not in source.train.numpy().tobytes()
    assert source.train.numpy().tobytes().count(b"\0") == 38
    windows = demo.text.validation_windows(source, 64, 5)
    assert windows.shape == (5, 65)
    assert bytes(windows[-1].tolist()) == source.validation[-65:].numpy().tobytes()


def test_a_batch_follows_from_seed_and_step(demo):
    source = demo.text.load(TEXT)
    batches = [demo.text.training_windows(source, 64, 4, seed, step) for seed in (0, 1) for step in (0, 1, 2)]
    assert len({str(windows.tolist()) for windows in batches}) == 6
    torch.manual_seed(5)
    assert torch.equal(demo.text.training_windows(source, 64, 4, 1, 2), batches[-1])


# ---- going on --------------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(demo, capsys, tmp_path):
    whole, parts = (tmp_path / name / "fmkernels" for name in ("whole", "parts"))
    assert run(demo, capsys, *STEPS, f"--out={whole.parent}")[0] == 0
    stopped(demo, 5, *STEPS, f"--out={parts.parent}")  # two steps after its checkpoint
    with (parts / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')
    assert run(demo, capsys, *STEPS, f"--out={parts.parent}", "--resume")[0] == 0
    assert losses(demo, parts) == losses(demo, whole)
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, parts)]
    assert states[0]["settings"] == states[1]["settings"]
    states = [(state["model"], state["optimizer"]["state"]) for state in states]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_checkpoint_is_whole_or_the_one_before(demo, capsys, tmp_path, monkeypatch):
    path = tmp_path / "fmkernels" / "checkpoint.pt"
    save = torch.save

    def save_half(value, file):
        save(value, file)
        if value["step"] == 6:
            file.truncate(1000)
            raise Stopped

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(Stopped):
        run(demo, capsys, *STEPS, f"--out={tmp_path}")
    assert torch.load(path, weights_only=True)["step"] == 3


def test_another_run_is_not_gone_on_with(demo, capsys, tmp_path):
    run(demo, capsys, *STEPS, f"--out={tmp_path}")
    status, shown = run(demo, capsys, *STEPS, f"--out={tmp_path}", "--resume", "--seed=1")
    assert status == 2
    assert shown.endswith("checkpoint.pt is of a run with seed 0, this one has 1")


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "more"),
    [([], []), ([], ["--fsdp"]), (MOE, []), (MOE, ["--expert-parallel"])],
    ids=["ddp", "fsdp", "moe-ddp", "moe-expert-parallel"],
)
def test_processes_share_a_run(demo, capsys, tmp_path, model, more):
    """One process begins and two go on, to the losses of one alone but for the order of sums."""
    alone, together = (tmp_path / name / "fmkernels" for name in ("alone", "together"))
    assert run(demo, capsys, *STEPS, *model, f"--out={alone.parent}")[0] == 0
    stopped(demo, 3, *STEPS, *model, "--save-every=2", f"--out={together.parent}")
    arguments = [*TINY, *STEPS, *model, f"--out={together.parent}", "--resume", *more]
    status, shown = torchrun(FOLDER / "train_lm.py", *arguments)
    assert status == 0, shown
    expected, actual = losses(demo, alone), losses(demo, together)
    assert actual[:2] == expected[:2]
    assert [line[:1] for line in actual] == [line[:1] for line in expected]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    loads = [[line.get("load") for line in demo.logs.read(folder)] for folder in (alone, together)]
    assert loads[0] == loads[1]


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_help(demo, capsys):
    with pytest.raises(SystemExit) as raised:
        demo.main(["--help"])
    assert raised.value.code == 0
    assert "--checkpoint-activations" in capsys.readouterr().out


def test_small_changes_what_is_not_given(demo):
    options = demo.parse(["--small", "--layers=3"])
    assert (options.hidden, options.layers, options.kv_heads) == (128, 3, 2)
    assert options.out != demo.parse([]).out


@pytest.mark.parametrize(
    "option",
    [
        "--steps=0",
        "--seq=x",
        "--learning-rate=0",
        "--seed=-1",
        "--attention=flash",
        "--device=tpu",
        "--expert-parallel",
        "--topk=9",
    ],
)
def test_wrong_options(demo, capsys, option):
    with pytest.raises(SystemExit) as raised:
        demo.main([option])
    assert raised.value.code == 2
    assert option.removeprefix("--").split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--kv-heads=3"], "nn.Attention: num_kv_heads must divide num_heads, 2, got 3."),
        (["--attention=both", "--steps=1"], "--attention both needs at least 2 --steps: the noise of one is not known"),
        (["--seq=10000000"], "bytes of the shorter part of the text"),
        (["--text=nowhere"], "the text must have at least 20 .py files, nowhere has 0"),
        (["--device=cuda"], "fmkernels cannot train on cuda here: see `python -m fmkernels doctor`"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_a_sentence(demo, capsys, tmp_path, monkeypatch, arguments, sentence):
    usable = [backend for backend in demo.backends("attention_backward") if backend.device == "cpu"]
    monkeypatch.setattr(demo, "backends", lambda op: usable)
    status, shown = run(demo, capsys, *arguments, f"--out={tmp_path}")
    assert status == 2
    assert shown.endswith(sentence)


def test_experts_are_shared_evenly(demo, tmp_path):
    options = demo.parse(["--moe", "--expert-parallel", "--experts=5", f"--out={tmp_path}"])
    with pytest.raises(ValueError, match="--experts must be a multiple of the 2 processes"):
        demo.run(options, demo.Processes(0, 2, torch.device("cpu")), None)


def test_batch_is_shared_evenly(demo, tmp_path):
    options = demo.parse(["--batch-size=3", f"--out={tmp_path}"])
    with pytest.raises(ValueError, match="--batch-size and --validation-windows must be multiples of the 2 processes"):
        demo.run(options, demo.Processes(0, 2, torch.device("cpu")), None)
