# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/ as modules."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent.parent / "examples"


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
