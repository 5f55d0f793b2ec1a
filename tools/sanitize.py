# SPDX-License-Identifier: Apache-2.0
"""Builds the CPU kernels and the emulator with AddressSanitizer and UndefinedBehaviorSanitizer and runs their tests.

`run.py sanitize` calls it. Arguments go to pytest; where they name tests, the others are left out. `--kernels` leaves
the emulator out, whose build takes longer than the rest of the gate.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import run  # noqa: E402

FOLDER = run.BUILD / "sanitize"
# At -O3 the kernels compile for five minutes.
BUILD_TYPE = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1"]
HINT = "The sanitizer build needs g++ with libasan and libubsan, which Debian's g++ carries."
EMULATOR_TESTS = ROOT / "tests" / "emulator"

# Left out under the sanitizers: they say nothing about the kernels and take minutes there.
NOT_SANITIZED = "not compile and not opcheck and not hypothesis"


def preload() -> str:
    """The sanitizers' libraries, which have to come before all others of a process that they did not build."""
    names = ("libasan.so", "libstdc++.so")
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout for name in names
    ]
    return ":".join(str(Path(path.strip()).resolve()) for path in found)


def build(name: str, configure: list[object]) -> None:
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    folder = FOLDER / name

    def build_it() -> str:
        command = ["cmake", "-B", folder, "-G", "Ninja", *BUILD_TYPE, *configure]
        run.run_logged(f"sanitizer configuration of {name}", command, HINT, dict(os.environ))
        command = ["cmake", "--build", folder, "--parallel", jobs]
        run.run_logged(f"sanitizer build of {name}", command, HINT, dict(os.environ))
        return str(folder.relative_to(run.BUILD.parent))

    run.run_steps([(f"sanitizer build of {name}", build_it)])


def pytest(*words: object, **variables: str) -> int:
    # The sanitizers write to the process's own error output, which pytest must not keep to itself.
    command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", *map(str, words)]
    options = {"LD_PRELOAD": preload(), "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **options, **variables}).returncode


def sanitize_kernels(extra: list[str]) -> int:
    torch = importlib.util.find_spec("torch").submodule_search_locations[0]
    output = FOLDER / "kernels" / "lib"
    options = [f"-DTORCH_DIR={torch}", "-DFMKERNELS_SANITIZE=ON", f"-DFMKERNELS_OUTPUT_DIR={output}"]
    build("kernels", ["-S", ROOT, *options, "-DFMKERNELS_CUDA_ARCHS="])
    rooms = sorted(path.parent.name for path in ROOT.glob("csrc/*/*_op.cpp"))
    files = [path for room in ("dtype", *rooms) for path in sorted(ROOT.glob(f"tests/test_{room}*.py"))]
    tests, parallel, variables = files, *run.in_parallel(run.Environment(Path(sys.executable), in_place=True))
    if run.names_path(extra):
        tests, parallel, variables = [], [], {}
    return pytest("-k", NOT_SANITIZED, *parallel, *tests, *extra, FMKERNELS_LIBRARY_DIR=str(output), **variables)


def sanitize_emulator(extra: list[str]) -> int:
    """Over the CUDA headers of the build, and the runtime's tests with its nvcc, where there is one."""
    cache = run.BUILD / "cuda" / "CMakeCache.txt"
    include = (
        re.search(r"^EMULATOR_CUDA_INCLUDE:\w+=(.*)$", cache.read_text(), re.MULTILINE) if cache.exists() else None
    )
    output = FOLDER / "emulator" / "lib"
    options = ["-DEMULATOR_SANITIZE=ON", f"-DEMULATOR_OUTPUT_DIR={output}", f"-DPython_EXECUTABLE={sys.executable}"]
    build("emulator", ["-S", ROOT / "emulator", *options, f"-DEMULATOR_CUDA_INCLUDE={include[1] if include else ''}"])
    # bench/counters.py runs fmkernels over the emulator of its own build.
    tests = [] if run.names_path(extra) else [EMULATOR_TESTS]
    other_build = f"--ignore={EMULATOR_TESTS / 'test_counters_command.py'}"
    return pytest(other_build, *tests, *extra, EMULATOR_LIBRARY_DIR=str(output))


def main(extra: list[str]) -> int:
    if extra[:1] == ["--kernels"]:
        return sanitize_kernels(extra[1:])
    of_emulator = [word for word in extra if EMULATOR_TESTS in (ROOT / word.split("::")[0], *(ROOT / word).parents)]
    status = 0
    if not (run.names_path(extra) and of_emulator):
        status = sanitize_kernels(extra)
    if of_emulator or not run.names_path(extra):
        status = sanitize_emulator(extra) or status
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except run.StepFailed as failure:
        sys.exit(f"run.py: {failure}")
