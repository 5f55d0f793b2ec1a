# SPDX-License-Identifier: Apache-2.0
"""Calls CMake, the one build description, and puts the two libraries into the package.

    FMKERNELS_CUDA        auto (default): build the CUDA kernels where an nvcc is found; off: never; pip: with the nvcc
                          of the package index in this Python (`FMKERNELS_CUDA=pip python run.py setup` installs it)
    FMKERNELS_CUDA_ARCHS  as in "80;90a"; default: the GPU of this machine, else 80;90a
    MAX_JOBS              compilers at a time; default: one per processor

torch is not imported and not a build requirement: an isolated build would download a second one.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

MIN_SETUPTOOLS = 77
if 0 < int(setuptools.__version__.split(".")[0]) < MIN_SETUPTOOLS:  # the imports below may fail; 0: not known
    sys.exit(
        f"fmkernels: setuptools {MIN_SETUPTOOLS} or newer is needed, this is {setuptools.__version__}; "
        f'run: pip install "setuptools>={MIN_SETUPTOOLS}"'
    )

from setuptools import Extension, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402

ROOT = Path(__file__).parent.resolve()
DEFAULT_ARCHS = "80;90a"
OLDEST_ARCH = 80


def torch_dir() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(
            "fmkernels: torch is not visible to this build, and it is built against the torch you already use.\n"
            "Install torch 2.11 or newer, then: pip install --no-build-isolation ."
        )
    return Path(spec.origin).parent


def find_nvcc() -> Path | None:
    """The CUDA compiler to build with, or None for a library without CUDA kernels; says which in one line."""
    choice = os.environ.get("FMKERNELS_CUDA", "auto")
    if choice not in ("auto", "off", "pip"):
        sys.exit(f"fmkernels: FMKERNELS_CUDA must be auto, off or pip, got {choice}")
    if choice == "off":
        print("fmkernels: FMKERNELS_CUDA=off: the CUDA kernels are left out")
        return None
    if choice == "pip":
        spec = importlib.util.find_spec("nvidia")
        folders = list(spec.submodule_search_locations or []) if spec else []
        found = [Path(folder) / "cu13" / "bin" / "nvcc" for folder in folders]
        found = [nvcc for nvcc in found if nvcc.exists()]
        if not found:
            sys.exit(
                "fmkernels: FMKERNELS_CUDA=pip, but this Python has no nvcc.\n"
                "Run: FMKERNELS_CUDA=pip python run.py setup"
            )
        return found[0]
    homes = [Path(os.environ[name]) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    on_path = shutil.which("nvcc")
    homes += [Path(on_path)] if on_path else []
    homes += [Path("/usr/local/cuda/bin/nvcc")]
    for nvcc in homes:
        if nvcc.exists():
            return nvcc
    print("fmkernels: no nvcc found: the CUDA kernels are left out, the CPU kernels are complete")
    return None


def cuda_archs() -> str:
    given = os.environ.get("FMKERNELS_CUDA_ARCHS", "")
    if given:
        if not re.fullmatch(r"\d+[af]?(;\d+[af]?)*", given):
            sys.exit(f"fmkernels: FMKERNELS_CUDA_ARCHS must be architectures as in 80;90a, got {given}")
        return given
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return DEFAULT_ARCHS
    numbers = {int(cap.replace(".", "")) for cap in found if cap.replace(".", "").isdigit()}
    for number in sorted(number for number in numbers if number < OLDEST_ARCH):
        print(f"fmkernels: the kernels need sm_{OLDEST_ARCH}: nothing is built for the sm_{number} of this machine")
        numbers.remove(number)
    # From Hopper on the kernels use instructions that exist for one architecture alone.
    return ";".join(f"{number}a" if number >= 90 else str(number) for number in sorted(numbers)) or DEFAULT_ARCHS


def cuda_options(nvcc: Path) -> list[str]:
    """What CMake needs to use this compiler, checked by compiling nothing: its own test does that."""
    options = [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DFMKERNELS_CUDA_ARCHS={cuda_archs()}"]
    library_dir = nvcc.parent.parent / "lib"
    if not (nvcc.parent.parent / "lib64").exists() and library_dir.exists():  # the compiler of the package index
        options.append(f"-DCMAKE_CUDA_FLAGS=-L{library_dir}")
    return options


class CMakeBuild(build_ext):
    def run(self) -> None:
        torch = torch_dir()  # first: where it is missing, no tool helps
        # What pip installed for this Python comes first, also where its environment is not activated.
        os.environ["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                sys.exit(f"fmkernels: {tool} is missing; run: pip install {tool}")
        output = ROOT / "fmkernels" if self.inplace else Path(self.build_lib).resolve() / "fmkernels"
        nvcc = find_nvcc()
        build_dir = ROOT / "build" / ("cuda" if nvcc else "cpu")
        output.mkdir(parents=True, exist_ok=True)
        if nvcc is None:
            (output / "_C_cuda.abi3.so").unlink(missing_ok=True)  # of an earlier build, whose schemas may be others
        configure = ["cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", f"-DTORCH_DIR={torch}"]
        configure += [f"-DFMKERNELS_OUTPUT_DIR={output}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += cuda_options(nvcc) if nvcc else ["-DFMKERNELS_CUDA_ARCHS="]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        for command in (configure, ["cmake", "--build", str(build_dir), "--parallel", jobs]):
            if subprocess.run(command).returncode != 0:
                sys.exit(f"fmkernels: {' '.join(command[:3])} failed; what it says stands above")

    def get_outputs(self) -> list[str]:
        return []


class Abi3Wheel(bdist_wheel):
    """The libraries know no Python and the stable ABI of torch: one wheel for every Python from 3.10."""

    def get_tag(self) -> tuple[str, str, str]:
        return "cp310", "abi3", super().get_tag()[2]


setup(ext_modules=[Extension("fmkernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Abi3Wheel})
