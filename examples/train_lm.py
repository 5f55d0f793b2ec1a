# SPDX-License-Identifier: Apache-2.0
"""Trains a small language model on the sources of Python's standard library, over fmkernels.attention.

    python examples/train_lm.py                             10 M parameters into build/train_lm/fmkernels
    python examples/train_lm.py --resume                    goes on from its last checkpoint, to the same bits
    python examples/train_lm.py --attention both            over torch's attention too, and compares the losses
    python examples/train_lm.py --moe                       a mixture of experts, with as much arithmetic a byte
    torchrun --nproc-per-node 2 examples/train_lm.py        in two processes, with DDP, --fsdp or --expert-parallel

The folder of a run has log.jsonl, a line for each step, and checkpoint.pt; loss.png beside it draws the losses, and
with --moe load.png which experts were chosen.
The exit code is 1 where the two attentions learned differently, 2 where training was not possible.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lm import logs, text
from lm.model import ATTENTIONS, Config, Transformer
from lm.training import Processes, Settings, processes, train
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fmkernels.testing import backends

BUILD_DIR = Path(__file__).resolve().parent.parent / "build"
SMALL = {
    "hidden": 128,
    "layers": 4,
    "heads": 4,
    "seq": 256,
    "batch_size": 8,
    "steps": 200,
    "validate_every": 20,
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if (number := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
        return number

    def seed(text: str) -> int:
        if not 0 <= (number := int(text)) < 2**31:
            raise argparse.ArgumentTypeError(f"must be from 0 to 2**31 - 1, got {number}")
        return number

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--attention", choices=[*ATTENTIONS, "both"], default="fmkernels", help="default: fmkernels")
    add("--small", action="store_true", help="other defaults: a model of 0.9 M parameters that learns in two minutes")
    add("--moe", action="store_true", help="experts in place of each feed-forward layer")
    add("--out", type=Path, help="folder of the runs; default: build/train_lm, with _small and _moe")
    add("--text", type=Path, metavar="DIR", help="folder of .py files to learn; default: Python's standard library")
    add("--resume", action="store_true", help="go on from the checkpoint of a run, where there is one")
    for name, default, meaning in (
        ("steps", 400, "to make"),
        ("batch-size", 4, "windows of text a step, over all processes"),
        ("seq", 512, "bytes of a window"),
        ("hidden", 384, "width of the model"),
        ("layers", 6, "number of blocks"),
        ("heads", 6, "query heads"),
        ("kv-heads", 2, "heads of keys and values"),
        ("experts", 8, "of each block, with --moe"),
        ("topk", 2, "experts of a byte, with --moe"),
        ("save-every", 100, "steps between two checkpoints"),
        ("validate-every", 50, "steps between two validations"),
        ("validation-windows", 32, "windows of text for each"),
    ):
        add(f"--{name}", type=positive, default=default, help=f"{meaning}; default: {default}")
    add("--learning-rate", type=float, default=1e-3, help="at its highest; default: 0.001")
    add("--seed", type=seed, default=0, help="of first weights and of batches; default: 0")
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--checkpoint-activations", action="store_true", help="compute blocks again in the backward pass")
    add("--fsdp", action="store_true", help="under torchrun: shard parameters, gradients and the optimizer's state")
    add(
        "--expert-parallel", action="store_true", help="under torchrun: a part of the experts each, --fsdp for the rest"
    )
    add("--device", choices=["cpu", "cuda"], help="default: cuda with --bf16, where fmkernels trains there")
    add("--threads", type=positive, help="of the CPU; default: torch's choice")
    options = parser.parse_args(arguments)
    if options.small:
        parser.set_defaults(**SMALL)
        options = parser.parse_args(arguments)
    if options.out is None:
        options.out = BUILD_DIR / ("train_lm" + "_small" * options.small + "_moe" * options.moe)
    if not options.learning_rate > 0:
        parser.error(f"argument --learning-rate: must be above 0, got {options.learning_rate}")
    if options.expert_parallel and not options.moe:
        parser.error("argument --expert-parallel: needs --moe")
    if options.topk > options.experts:
        parser.error(f"argument --topk: must be at most the {options.experts} experts, got {options.topk}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Trains; 0 when it came to its end, and two attentions came to the same losses."""
    options = parse(arguments)
    usable = [backend.device for backend in backends("attention_backward")]
    device = options.device or ("cuda" if "cuda" in usable and options.bf16 else "cpu")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with processes(device) as here:
        console = Console(quiet=here.rank != 0)
        try:
            if device not in usable:
                raise ValueError(f"fmkernels cannot train on {device} here: see `python -m fmkernels doctor`")
            return run(options, here, console)
        except (ValueError, TypeError) as error:
            console.print(str(error), markup=False, highlight=False, soft_wrap=True)
            return 2


def run(options: argparse.Namespace, here: Processes, console: Console) -> int:
    if options.batch_size % here.world_size or options.validation_windows % here.world_size:
        raise ValueError(f"--batch-size and --validation-windows must be multiples of the {here.world_size} processes")
    attentions = list(ATTENTIONS) if options.attention == "both" else [options.attention]
    if len(attentions) > 1 and options.steps == 1:
        raise ValueError("--attention both needs at least 2 --steps: the noise of one is not known")
    source = text.load(options.text)
    if options.seq >= (shortest := min(len(source.train), len(source.validation))):
        raise ValueError(f"--seq must be less than the {shortest} bytes of the shorter part of the text")
    if options.expert_parallel and options.experts % here.world_size:
        raise ValueError(f"--experts must be a multiple of the {here.world_size} processes")
    config = Config(options.hidden, options.layers, options.heads, options.kv_heads, options.seq)
    if options.moe:
        config = replace(config, experts=options.experts, topk=options.topk)
    model = Transformer(config, "fmkernels")
    size = sum(t.numel() for t in model.parameters())
    title = f"{size / 1e6:.1f} M parameters, "
    if options.moe:
        in_experts = sum(t.numel() for block in model.blocks for t in block.feed_forward.experts.parameters())
        active = size - in_experts + in_experts * options.topk / options.experts
        title += f"{active / 1e6:.1f} M of them for a byte, "
    title += f"{options.batch_size} x {options.seq} bytes a step, "
    title += (
        f"{len(source.train) / 1e6:.1f} MB of text, {'bfloat16' if options.bf16 else 'float32'}, {here.device.type}"
    )
    console.print(title)
    columns = TextColumn("{task.description:22}"), BarColumn(), MofNCompleteColumn()
    names = ("resume", "fsdp", "expert_parallel", "checkpoint_activations", "save_every", "validate_every")
    names += ("validation_windows",)
    how = {name: getattr(options, name) for name in names}
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        for attention in attentions:
            bar = progress.add_task(attention, total=options.steps)

            def advance(step: int, loss: float, attention: str = attention, bar: TaskID = bar) -> None:
                progress.update(bar, completed=step, description=f"{attention:9} loss {loss:.4f}")

            numbers = options.steps, options.batch_size, options.learning_rate, options.seed
            settings = Settings(attention, config, *numbers, options.bf16)
            train(settings, source, options.out / attention, here, advance=advance, **how)
    if here.rank == 0:
        runs = {name: logs.read(options.out / name) for name in attentions}
        console.print(logs.table(runs))
        draw(runs, options.out, title, console)
    if len(attentions) == 1:
        return 0
    largest, noise = logs.apart(*(logs.read(options.out / name) for name in attentions))
    same = largest < noise
    console.print(
        f"The two attentions {'learn the same' if same else 'do not learn the same'}: the losses of a step differ by "
        f"{largest:.2g} at most, those of a step and the next usually by {noise:.2g}."
    )
    return 0 if same else 1


def draw(runs: dict[str, list[dict[str, Any]]], folder: Path, title: str, console: Console) -> None:
    try:
        logs.plot(runs, folder / "loss.png", title)
        console.print(f"Drawn in {folder / 'loss.png'}", soft_wrap=True)
        for name, lines in runs.items():
            if "load" in lines[0]:
                logs.plot_load(lines, folder / name / "load.png", title)
                console.print(f"The loads of the experts in {folder / name / 'load.png'}", soft_wrap=True)
    except ImportError:
        console.print("Nothing is drawn, matplotlib is not installed.")


if __name__ == "__main__":
    status = main()
    if "RANK" in os.environ:
        # DTensor's caches keep the process group, whose threads can abort an ordinary exit (pytorch/pytorch#190489).
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
