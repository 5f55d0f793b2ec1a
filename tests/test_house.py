# SPDX-License-Identifier: Apache-2.0
"""The rules of the house that can be executed: every op has its rooms, and every file keeps to its size and place."""

import functools
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fmkernels
from fmkernels import _library, reference, testing

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
ROOMS = sorted(path.name for path in CSRC.iterdir() if path.is_dir() and path.name != "common")
CUDA_ROOMS = [room for room in ROOMS if list((CSRC / room).glob("*.cu"))]
MAX_LINES = {".cu": 500, ".h": 400, ".cpp": 800, "fmkernels": 300, "tests": 450, "bench": 400}
MAX_LINES_ELSEWHERE = 500
MAX_MACROS = 5
# Make arguments of ops on the host, once: no op, no reference, no graph.
BUILDERS = {"block_codec.wire_bytes", "create_block_mask", "moe.quantize_experts", "quantize_weight", "rope_cache"}
BUILDERS |= {"banded_blocks", "block_norms", "butterfly_blocks", "largest_blocks", "random_blocks"}


def schemas():
    """Names of the ops in csrc/ops.cpp, in its order."""
    return re.findall(r'm\.def\(\s*"(\w+)\(', (CSRC / "ops.cpp").read_text())


def room_of(op):
    """An op belongs to the longest folder name that its name begins with."""
    return max((room for room in ROOMS if f"{op}_".startswith(f"{room}_")), key=len, default=None)


def tracked_files():
    """The files of the repository; in an archive of it, which has no git, all but what builds and tools leave."""
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
        return [ROOT / name for name in names if name and (ROOT / name).is_file()]
    left_behind = {"build", "dist", "__pycache__", ".venv", ".git", ".hypothesis", ".pytest_cache", ".ruff_cache"}
    return [path for path in ROOT.rglob("*") if path.is_file() and not left_behind & set(path.relative_to(ROOT).parts)]


def text_of_tests(room):
    """The text of all test files of a room."""
    paths = [ROOT / "tests" / f"test_{room}.py", *(ROOT / "tests").glob(f"test_{room}_*.py")]
    return "".join(path.read_text() for path in paths)


def text_files(*suffixes):
    return [path for path in tracked_files() if path.suffix in suffixes]


def lines_with(pattern, paths):
    """'path:line: text' for every line that the pattern is found in."""
    found = []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(pattern, line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    return found


def public_functions():
    """By their names below fmkernels; a room whose name is a module has those of the module, as in paged_kv.append."""
    functions = {name: getattr(fmkernels, name) for name in fmkernels.__all__}
    for room in sorted(functions.keys() & set(ROOMS)):
        if inspect.ismodule(functions[room]):
            functions |= {f"{room}.{name}": getattr(functions[room], name) for name in functions[room].__all__}
    return {name: value for name, value in functions.items() if inspect.isfunction(value)}


def operations():
    return {name: value for name, value in public_functions().items() if name not in BUILDERS}


# ---- rooms -----------------------------------------------------------------------------------------------------------


def test_the_schemas_are_found():
    assert len(schemas()) == (CSRC / "ops.cpp").read_text().count("m.def(") > 0


def test_every_op_has_a_room_and_every_room_an_op():
    assert {op: room_of(op) for op in schemas() if room_of(op) is None} == {}
    assert {room_of(op) for op in schemas()} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_complete(room):
    folder = CSRC / room
    wanted = [folder / f"{room}.h", folder / f"{room}_op.cpp", ROOT / "fmkernels" / f"{room}.py"]
    wanted += [ROOT / "fmkernels" / "reference" / f"{room}.py", ROOT / "tests" / f"test_{room}.py"]
    wanted += [ROOT / "bench" / f"bench_{room}.py", ROOT / "docs" / f"{room}.md"]
    wanted += [folder / "budget.toml"] if room in CUDA_ROOMS else []
    assert [str(path.relative_to(ROOT)) for path in wanted if not path.exists()] == []
    assert list(folder.glob(f"{room}*_cpu.cpp")), f"csrc/{room} has no CPU kernel"


@pytest.mark.parametrize("op", schemas())
def test_every_op_is_registered(op):
    assert _library.has_kernel(op, "cpu")
    if room_of(op) in CUDA_ROOMS and _library.cuda_error is None:
        assert _library.has_kernel(op, "cuda")
    assert torch._library.simple_registry.singleton.find(f"fmkernels::{op}").fake_impl.kernel is not None
    assert op in _library.op_names


def test_the_library_lists_no_other_ops():
    assert sorted(_library.op_names) == sorted(schemas())


@pytest.mark.parametrize("op", schemas())
def test_every_op_passes_opcheck(op):
    assert f"opcheck(torch.ops.fmkernels.{op}.default" in text_of_tests(room_of(op))


@pytest.mark.parametrize("op", [op for op in schemas() if room_of(op) in CUDA_ROOMS])
def test_every_cuda_op_is_tested_on_the_emulator(op):
    """A kernel that nobody can run is a guess: its tests run over `backends(op)`, of which the emulated one is one."""
    tested = re.findall(r'\bbackends\(\s*"(\w+)"', text_of_tests(room_of(op)))
    assert [name for name in tested if room_of(name) == room_of(op)], f"no test of {op} runs over its backends"
    assert not (testing.emulated_error or "").startswith("broken")
    if testing.emulated_error is None:
        assert _library.has_kernel(op, "cpu", testing.EMULATED_NAMESPACE)
        assert "emulated" in [backend.name for backend in testing.backends(op)]


@pytest.mark.parametrize("name", operations())
def test_every_operation_compiles_to_one_graph(name):
    tests = (path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert any(f"torch.compile({name}, fullgraph=True" in text for text in tests)


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_row_in_the_table_of_the_readme(room):
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    assert any(f"`{room}`" in row.split("|")[1] for row in rows), (
        f"README.md has no table row that begins with `{room}`"
    )


def test_every_public_function_is_in_its_reference_and_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for name in public_functions():
        *modules, function = name.split(".")
        place = functools.reduce(getattr, modules, reference)
        assert hasattr(place, function) or name in BUILDERS, f"fmkernels/reference has no {name}"
        assert f"`{name}" in readme


# ---- the public names ------------------------------------------------------------------------------------------------


def test_the_public_names_are_sorted_and_there():
    assert fmkernels.__all__ == sorted(fmkernels.__all__)
    assert [name for name in fmkernels.__all__ if not hasattr(fmkernels, name)] == []


@pytest.mark.parametrize("name", public_functions())
def test_every_public_function_is_documented(name):
    function = public_functions()[name]
    documentation = inspect.getdoc(function)
    assert "Args:" in documentation
    assert "Returns:" in documentation
    described = documentation[documentation.index("Args:") : documentation.index("Returns:")]
    assert [p for p in inspect.signature(function).parameters if not re.search(rf"\b{p}\b", described)] == []


def test_the_examples_import_what_they_use():
    """Seen from another process, where no test has imported a submodule before."""
    command = [sys.executable, "-c", "import fmkernels, sys; print(*sys.modules)"]
    loaded = set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            imported = " ".join(re.findall(r"^(?:import|from) (fmkernels[\w.]*)", block, re.MULTILINE))
            for name in re.findall(r"(?<![\w.\"])fmkernels(?:\.\w+)+", block):
                for module in (name.rsplit(".", count)[0] for count in range(name.count("."))):
                    path = ROOT / module.replace(".", "/")
                    if path.is_dir() or path.with_suffix(".py").exists():
                        assert module in loaded or module in imported, f"{page.name} does not import {module}"


# ---- the places of things --------------------------------------------------------------------------------------------


def code_files():
    return [path for path in text_files(".h", ".cpp", ".cu") if CSRC in path.parents]


def test_inline_assembly_stands_in_ptx_h():
    elsewhere = [path for path in code_files() if path != CSRC / "common" / "ptx.h"]
    assert lines_with(r"\basm\b\s*(volatile|__volatile__|\()|__asm__", elsewhere) == []


def test_torch_headers_stand_in_op_files():
    allowed = [CSRC / "ops.cpp", CSRC / "common" / "tensor.h", CSRC / "common" / "parallel.cpp"]
    elsewhere = [path for path in code_files() if path not in allowed and not path.name.endswith("_op.cpp")]
    assert lines_with(r'#\s*include\s*[<"](torch|ATen|c10)/', elsewhere) == []


def test_the_headers_of_torch_are_those_of_the_stable_abi():
    stable = r"torch/(csrc/stable|headeronly|csrc/inductor/aoti_torch/c)/"
    includes = lines_with(r'#\s*include\s*[<"](torch|ATen|c10)/', code_files())
    assert includes
    assert [line for line in includes if not re.search(stable, line)] == []


def test_kernels_know_no_tensor_header():
    kernels = [path for path in code_files() if path.suffix == ".cu" or path.name.endswith(("_cpu.cpp", "_avx512.cpp"))]
    assert lines_with(r'#\s*include\s*".*tensor\.h"', kernels) == []


def test_macros_are_few():
    names = {
        line.split()[1].split("(")[0]
        for line in (text.split(": ", 1)[1] for text in lines_with(r"^\s*#\s*define\s", code_files()))
    }
    assert {name for name in names if not name.startswith("FM_")} == set()
    assert len(names) <= MAX_MACROS, sorted(names)


def test_files_keep_to_their_size():
    too_long = []
    for path in text_files(".h", ".cpp", ".cu", ".py"):
        relative = path.relative_to(ROOT)
        limit = (
            MAX_LINES.get(relative.parts[0], MAX_LINES_ELSEWHERE) if path.suffix == ".py" else MAX_LINES[path.suffix]
        )
        num_lines = len(path.read_text().splitlines())
        if num_lines > limit:
            too_long.append(f"{relative}: {num_lines} lines, at most {limit}")
    assert too_long == []


def test_every_source_begins_with_its_licence():
    sources = [*text_files(".h", ".cpp", ".cu", ".py"), ROOT / "CMakeLists.txt"]
    wrong = []
    for path in sources:
        lines = path.read_text().splitlines()
        first = lines[1] if lines and lines[0].startswith("#!") else lines[0] if lines else ""
        if first not in ("# SPDX-License-Identifier: Apache-2.0", "// SPDX-License-Identifier: Apache-2.0"):
            wrong.append(str(path.relative_to(ROOT)))
    assert wrong == []


def test_no_file_names_the_host_of_a_package_registry():
    """An installer takes its index from the machine's own settings, so that mirrors and closed networks work."""
    host = "|".join(
        (r"py" r"pi\.org", r"python" r"hosted\.org", r"download\.py" r"torch\.org", r"pyp" r"i\.nvidia\.com")
    )
    host += "|" + "|".join((r"conda\." r"anaconda\.org", r"registry\.npm" r"js\.org", r"ghcr" r"\.io"))
    readable = [path for path in tracked_files() if path.suffix not in (".png", ".so", ".gguf", ".jpg")]
    assert lines_with(host, readable) == []


def test_kernels_read_no_environment():
    """Environment variables are read once, at load."""
    allowed = [CSRC / "common" / "parallel.cpp"]
    assert lines_with(r"\bgetenv\b", [path for path in code_files() if path not in allowed]) == []


def test_no_todo_and_no_test_that_is_switched_off():
    paths = [path for path in text_files(".h", ".cpp", ".cu", ".py") if path != Path(__file__)]
    assert lines_with(r"\b(TODO|FIXME|XXX|HACK)\b|pytest\.mark\.xfail|#if 0\b", paths) == []
