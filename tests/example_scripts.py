# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/ as modules, and under torchrun."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

FOLDER = Path(__file__).parent.parent / "examples"
TEXT = Path(torch.__file__).parent / "nn"  # to learn: read in a tenth of the time of the standard library


@contextmanager
def example(name: str) -> Iterator[ModuleType]:
    """The script as a module; its folder is where Python looks for `lm` meanwhile."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"demo_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        for added in set(sys.modules) - before:
            if added == spec.name or added.split(".")[0] == "lm":
                del sys.modules[added]


def torchrun(script: Path, *arguments: str) -> tuple[int, str]:
    """(exit code, what it has printed) of two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, " ".join(done.stdout.split()) + done.stderr
