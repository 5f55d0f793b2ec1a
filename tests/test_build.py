# SPDX-License-Identifier: Apache-2.0
"""The libraries as built: binary interface, dependencies, what they leave to the loader; and the build itself."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path

import pytest

import fmkernels

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fmkernels.__file__).parent
CORE = PACKAGE / "_C.abi3.so"
CUDA = PACKAGE / "_C_cuda.abi3.so"
LIBRARIES = [
    pytest.param(CORE, id="_C"),
    pytest.param(CUDA, id="_C_cuda", marks=pytest.mark.skipif(not CUDA.exists(), reason="built without nvcc")),
]
# What Debian 12 and its g++ 12 give; a library built there runs on every later distribution.
NEWEST_SYMBOLS = {"GLIBC": (2, 36), "GLIBCXX": (3, 4, 30)}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the libraries are examined with binutils")


def load_cuda_report():
    sys.path.insert(0, str(ROOT / "tools"))
    import cuda_report

    return cuda_report


def output_of(*command: object, **options) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True, **options).stdout


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


# ---- The binary interface --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
def test_uses_only_the_stable_abi_of_torch_2_11(library):
    audit = Path(sys.executable).parent / "torch-abi-audit"
    report = output_of(audit if audit.exists() else "torch-abi-audit", library)
    assert re.search(r"Torch ABI:\s+STABLE", report), report
    assert re.search(r"Min torch:\s+2\.11\.0", report), report
    assert "unstable=0" in report, report


@pytest.mark.parametrize("library", LIBRARIES)
def test_depends_on_libtorch_and_on_no_python_or_cuda_library(library):
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "-d", library))
    assert "libtorch.so" in needed  # through it a torch with CUDA brings the stream symbol
    forbidden = ("libpython", "libcudart", "libcuda", "libtorch_cuda", "libtorch_python", "libc10_cuda")
    assert not [name for name in needed if name.startswith(forbidden)]


@pytest.mark.skipif(not CUDA.exists(), reason="built without nvcc")
def test_stream_symbol_of_torch_with_cuda_is_weak():
    symbols = output_of("nm", "-D", "--undefined-only", CUDA)
    assert re.findall(r"(\w) aoti_torch_get_current_cuda_stream$", symbols, re.MULTILINE) == ["w"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_runs_on_every_distribution_since_debian_12(library):
    _, libc = platform.libc_ver()
    if numbers(libc) > NEWEST_SYMBOLS["GLIBC"]:
        pytest.skip(f"built on glibc {libc}: not a machine that wheels are built on")
    symbols = output_of("objdump", "-T", library)
    for name, newest in NEWEST_SYMBOLS.items():
        used = [numbers(version) for version in re.findall(rf"\b{name}_([\d.]+)", symbols)]
        assert used, f"no {name} symbols found in {library}"
        assert max(used) <= newest


@pytest.mark.parametrize("library", LIBRARIES)
def test_holds_no_path_of_the_machine_that_built_it(library):
    data = library.read_bytes()
    found = [path for path in (str(ROOT), sys.prefix) if path.encode() in data]
    assert not found, f"{library.name} contains {found}"


def test_wheel_is_for_every_python_from_3_10():
    script = (
        "import runpy, setuptools\n"
        "given = {}\n"
        "setuptools.setup = lambda **options: given.update(options)\n"
        "runpy.run_path('setup.py')\n"
        "command = setuptools.Distribution(given).get_command_obj('bdist_wheel')\n"
        "command.ensure_finalized()\n"
        "print('tag:', *command.get_tag())\n"
    )
    tag = re.search(r"^tag: (\S+) (\S+) (\S+)$", output_of(sys.executable, "-c", script, cwd=ROOT), re.MULTILINE)
    assert tag is not None
    assert tag.groups()[:2] == ("cp310", "abi3")
    assert tag[3] != "any"


# ---- The sources -----------------------------------------------------------------------------------------------------

KERNEL_FILES = sorted([*ROOT.glob("csrc/*/*.cu"), *ROOT.glob("csrc/*/*_cpu.cpp"), *ROOT.glob("csrc/*/*_avx512.cpp")])


def test_source_archive_holds_everything_that_the_build_reads(tmp_path):
    tree = tmp_path / "tree"
    kept = shutil.ignore_patterns("build", ".*", "*.so", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=kept)
    output_of(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=tree)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()} <= names
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} <= names


@pytest.mark.parametrize("source", KERNEL_FILES, ids=lambda path: path.name)
def test_kernel_file_includes_no_torch_header(source):
    _, headers = load_cuda_report().include_closure(source)
    assert headers, "a kernel file without any header: the search for includes finds nothing"
    assert not [name for name in headers if re.match(r"(torch|ATen|c10|pybind11|Python\.h)\b", name)]


@pytest.mark.parametrize(("isa", "number"), [("avx2", 1), ("avx512", 2)])
def test_objects_of_an_instruction_set_lend_no_code_to_other_kernels(isa, number):
    """A weak function of such an object may be the copy that the linker keeps for everyone."""
    folders = [ROOT / "build" / kind / "CMakeFiles" / f"cpu_{isa}.dir" for kind in ("cuda", "cpu")]
    objects = [path for folder in folders for path in folder.glob("csrc/*/*.o")]
    if not objects:
        pytest.skip("no build tree here, or not an x86 machine")
    for path in objects:
        symbols = output_of("nm", "-C", "--defined-only", path).splitlines()
        functions = [line.split(" ", 2)[2] for line in symbols if line.split(" ", 2)[1] in "TWui"]
        entry_point = rf"void fmkernels::run_\w+<\(fmkernels::Isa\){number}>\("
        assert [name for name in functions if re.match(entry_point, name)], f"{path} defines no entry point"
        assert not [name for name in functions if not re.match(entry_point, name)]


RUNTIME = """
#pragma once
struct dim3 { unsigned x = 1, y = 1, z = 1; };
typedef struct CUstream_st* cudaStream_t;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t last = cudaSuccess;
inline int launched = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaSuccess; }
template <class... T> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(T...) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { cudaError_t e = last; last = cudaSuccess; return e; }
template <class F> cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) { return last = cudaErrorInvalidValue; }
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; decltype(sizeof 0) dynamicSmemBytes; cudaStream_t stream; };
inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void** arguments) {
  if (config->gridDim.x == 0) return last = cudaErrorInvalidValue;
  launched = **reinterpret_cast<int**>(arguments);
  return cudaSuccess;
}
"""
LAUNCHES = """
#include "common/launch.h"
#include <iostream>
int main() {
  auto kernel = +[](int) {};
  auto launch = [&](unsigned blocks, int smem_bytes, int argument) {
    try {
      fmkernels::launch<int>("scale", kernel, dim3{blocks}, dim3{32}, smem_bytes, nullptr, argument);
      std::cout << "launched " << launched << "\\n";
    } catch (const std::exception& error) {
      std::cout << error.what() << "\\n";
    }
  };
  launch(1, 65536, 1);
  launch(1, 0, 2);
  launch(0, 0, 3);
  launch(1, 0, 4);
}
"""


def test_launch_reports_its_own_failure_and_no_earlier_one(tmp_path):
    """launch.h over a CUDA runtime that has no large shared memory and refuses a grid without blocks."""
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    (tmp_path / "main.cpp").write_text(LAUNCHES)
    output_of(
        "g++", "-std=c++20", f"-I{tmp_path}", f"-I{ROOT / 'csrc'}", tmp_path / "main.cpp", "-o", tmp_path / "main"
    )
    assert output_of(tmp_path / "main").splitlines() == [
        "scale: this GPU cannot give a block 65536 bytes of shared memory (invalid argument)",
        "launched 2",
        "scale: the launch of 0 x 1 x 1 blocks of 32 threads failed: invalid argument",
        "launched 4",
    ]


# ---- The build -------------------------------------------------------------------------------------------------------


def build_ext(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` in a folder of its own, with the given environment variables set or changed."""
    environment = dict(os.environ, **variables)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / "fmkernels").mkdir()
    shutil.copy(PACKAGE / "_version.py", folder / "fmkernels")
    (folder / "fmkernels" / "__init__.py").touch()
    command = [sys.executable, *(["-S"] if "PYTHONPATH" in variables else []), "setup.py", "build_ext"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_build_that_sees_no_torch_says_what_to_do(tmp_path):
    site = tmp_path / "site"  # setuptools and nothing else, as in the isolated build of `pip install .`
    site.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        (site / name).symlink_to(Path(spec.origin).parent)
    (tmp_path / "source").mkdir()
    result = build_ext(tmp_path / "source", PYTHONPATH=str(site), PATH=str(tmp_path))  # and no tool on the PATH
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-2:] == [
        "fmkernels: torch is not visible to this build, and it is built against the torch you already use.",
        "Install torch 2.11 or newer, then: pip install --no-build-isolation .",
    ]


def test_build_by_a_setuptools_that_is_too_old_says_what_to_do(tmp_path):
    site = tmp_path / "site"  # as Python 3.10 and 3.11 put into a new environment, and torch 2.11 leaves it
    (site / "setuptools").mkdir(parents=True)
    (site / "setuptools" / "__init__.py").write_text("__version__ = '65.5.0'\n")
    (tmp_path / "source").mkdir()
    result = build_ext(tmp_path / "source", PYTHONPATH=str(site))
    assert result.returncode == 1
    assert result.stderr.strip() == (
        'fmkernels: setuptools 77 or newer is needed, this is 65.5.0; run: pip install "setuptools>=77"'
    )


def test_cmake_of_this_python_is_used_where_its_environment_is_not_activated(tmp_path):
    if not (Path(sysconfig.get_path("scripts")) / "cmake").exists():
        pytest.skip("the cmake here is not of the package index")
    other = tmp_path / "bin"  # as Debian 12 has it: a cmake that is too old
    other.mkdir()
    for tool in ("cmake", "ninja"):
        (other / tool).write_text("#!/bin/sh\necho the other cmake >&2\nexit 1\n")
        (other / tool).chmod(0o755)
    (tmp_path / "source").mkdir()
    result = build_ext(tmp_path / "source", FMKERNELS_CUDA="off", PATH=f"{other}{os.pathsep}{os.defpath}")
    assert "the other cmake" not in result.stderr
    assert "CMakeLists.txt" in result.stderr  # the real one misses it in this folder


def test_unknown_choice_of_cuda_is_named(tmp_path):
    result = build_ext(tmp_path, FMKERNELS_CUDA="bogus")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == "fmkernels: FMKERNELS_CUDA must be auto, off or pip, got bogus"


@pytest.fixture
def cuda_archs(monkeypatch, tmp_path):
    """setup.py's choice of architectures on a machine whose GPUs have the given compute capabilities."""
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("FMKERNELS_CUDA_ARCHS", raising=False)
    choose = runpy.run_path(str(ROOT / "setup.py"))["cuda_archs"]

    def on(*capabilities: str) -> str:
        lines = "\n".join(capabilities)
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        return choose()

    return on


@pytest.mark.parametrize(
    ("capabilities", "archs"),
    [
        (["8.0"], "80"),
        (["9.0", "9.0"], "90a"),
        (["8.9", "12.0"], "89;120a"),
        (["7.5", "8.6"], "86"),
        (["7.5"], "80;90a"),
        (["[N/A]"], "80;90a"),
    ],
    ids=str,
)
def test_architectures_are_those_of_the_gpus_that_the_kernels_run_on(cuda_archs, capabilities, archs, capsys):
    assert cuda_archs(*capabilities) == archs
    assert ("nothing is built for the sm_75 of this machine" in capsys.readouterr().out) == ("7.5" in capabilities)


def test_given_architectures_are_taken_and_wrong_ones_named(cuda_archs, monkeypatch):
    for given, archs in (("", "80"), ("90a", "90a"), ("80;120a", "80;120a")):
        monkeypatch.setenv("FMKERNELS_CUDA_ARCHS", given)
        assert cuda_archs("8.0") == archs
    monkeypatch.setenv("FMKERNELS_CUDA_ARCHS", "80,90")
    with pytest.raises(SystemExit, match="FMKERNELS_CUDA_ARCHS must be architectures as in 80;90a, got 80,90"):
        cuda_archs("8.0")


def cuda_compiler() -> Path | None:
    toolchain = load_cuda_report().Toolchain.of_build(ROOT / "build" / "cuda")
    return toolchain.nvcc if toolchain else None


def test_touching_one_cuda_file_recompiles_that_file_alone(tmp_path):
    nvcc = cuda_compiler()
    if nvcc is None:
        pytest.skip("no nvcc here")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    shutil.copytree(ROOT / "csrc" / "common", tmp_path / "csrc" / "common")
    shutil.copy(ROOT / "csrc" / "ops.cpp", tmp_path / "csrc")
    for room in ("first", "second"):
        (tmp_path / "csrc" / room).mkdir()
        (tmp_path / "csrc" / room / f"{room}.cu").write_text(f"__global__ void {room}() {{}}\n")
        for part in ("cpu", "avx512"):
            (tmp_path / "csrc" / room / f"{room}_{part}.cpp").touch()
    tools = {"env": dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")}
    torch = Path(importlib.util.find_spec("torch").origin).parent
    flags = [f"-L{nvcc.parent.parent / 'lib'}"] if (nvcc.parent.parent / "lib").exists() else []
    options = [f"-DTORCH_DIR={torch}", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_FLAGS={' '.join(flags)}"]
    build = tmp_path / "build"
    output_of("cmake", "-S", tmp_path, "-B", build, "-G", "Ninja", "-DFMKERNELS_CUDA_ARCHS=80", *options, **tools)

    def compiled() -> list[str]:
        return re.findall(r"-c \S+/(\w+\.cu)\b", output_of("ninja", "-C", build, "-v", "cuda_kernels", **tools))

    assert sorted(compiled()) == ["first.cu", "second.cu"]
    assert compiled() == []
    later = time.time() + 10
    os.utime(tmp_path / "csrc" / "second" / "second.cu", (later, later))
    assert compiled() == ["second.cu"]
