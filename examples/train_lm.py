# SPDX-License-Identifier: Apache-2.0
"""Trains a small language model on the sources of Python's standard library, over fmkernels.attention.

    python examples/train_lm.py                             10 M parameters into build/train_lm/fmkernels
    python examples/train_lm.py --resume                    goes on from its last checkpoint, to the same bits
    python examples/train_lm.py --attention both            over torch's attention too, and compares the losses
    python examples/train_lm.py --moe                       a mixture of experts, with as much arithmetic a byte
    torchrun --nproc-per-node 2 examples/train_lm.py        in two processes, with DDP, --fsdp or --expert-parallel
    torchrun --nproc-per-node 2 examples/train_lm.py --gradients fp32 int8 int4+ef    and gradients as codes, compared

The folder of a run has log.jsonl, a line for each step, and checkpoint.pt; loss.png beside it draws the losses, and
with --moe load.png which experts were chosen. Runs that are compared take turns, step by step.
The exit code is 1 where the two attentions learned differently, or a loss came out further from that of fp32 than
it may, or bytes are not those of the formula; 2 where training was not possible.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lm import gradients, logs, text
from lm.model import ATTENTIONS, Config, Transformer
from lm.training import Processes, Settings, processes, train
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
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
    add(
        "--gradients",
        nargs="+",
        choices=gradients.FORMS,
        default=["fp32"],
        metavar="FORM",
        help=f"under torchrun, how they travel: {', '.join(gradients.FORMS)} (ef: with error feedback); several "
        "are compared; default: fp32",
    )
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
    if len(options.gradients) > 1 and options.gradients[0] != "fp32":
        parser.error(f"argument --gradients: several must begin with fp32, got {' '.join(options.gradients)}")
    if options.gradients != ["fp32"] and options.attention == "both":
        parser.error("argument --gradients: codes and comparisons are by one attention, --attention is both")
    if len(set(options.gradients)) < len(options.gradients):
        parser.error(f"argument --gradients: must be different, got {' '.join(options.gradients)}")
    if options.topk > options.experts:
        parser.error(f"argument --topk: must be at most the {options.experts} experts, got {options.topk}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Trains; 0 when it came to its end, and what was compared came to the same losses."""
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
    if options.gradients != ["fp32"] and not dist.is_initialized():
        raise ValueError(f"--gradients {' '.join(options.gradients)} needs processes that send them: use torchrun")
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
    numbers = options.steps, options.batch_size, options.learning_rate, options.seed
    plain = Settings(attentions[0], config, *numbers, options.bf16)
    if options.gradients == ["fp32"]:
        runs = {name: replace(plain, attention=name) for name in attentions}
    else:
        runs = {name: replace(plain, gradients=name if gradients.FORMS[name] else None) for name in options.gradients}
    first_made: dict[str, int] = {}  # steps before it may be those of other processes
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bars = {name: progress.add_task(name, total=options.steps) for name in runs}
        training = [train(settings, source, options.out / name, here, **how) for name, settings in runs.items()]
        for steps in itertools.zip_longest(*training):
            for (name, bar), step in zip(bars.items(), steps, strict=True):
                if step is not None:
                    first_made.setdefault(name, step[0])
                    progress.update(bar, completed=step[0], description=f"{name:9} loss {step[1]:.4f}")
    if here.rank != 0:
        return 0
    results = {name: logs.read(options.out / name) for name in runs}
    if options.gradients == ["fp32"]:
        console.print(logs.table(results))
        draw(results, options.out, title, console)
        return judge_attentions(results, console) if len(attentions) > 1 else 0
    numels = [] if options.fsdp or options.expert_parallel else [t.numel() for t in model.parameters()]
    console.print(*logs.tables_of_gradients(results, numels, here.world_size), sep="\n")
    console.print(f"A byte has an entropy of {text.entropy(source):.4f} nats.")
    draw(results, options.out, title, console)
    counted = numels if here.group is not None else []
    return judge_gradients(results, first_made, counted, here.world_size, console)


def judge_attentions(runs: dict[str, list[dict[str, Any]]], console: Console) -> int:
    largest, noise = logs.apart(*runs.values())
    same = largest < noise
    console.print(
        f"The two attentions {'learn the same' if same else 'do not learn the same'}: the losses of a step differ by "
        f"{largest:.2g} at most, those of a step and the next usually by {noise:.2g}."
    )
    return 0 if same else 1


def judge_gradients(
    runs: dict[str, list[dict[str, Any]]],
    first_made: dict[str, int],
    numels: list[int],
    world_size: int,
    console: Console,
) -> int:
    """1 where a loss is further from that of fp32 than GOALS allow, or bytes are not those of the formula.

    Bytes are judged from the steps `first_made` on, and where they are counted, of parameters with so many elements.
    """
    missed = []
    for name, lines in runs.items():
        distance = logs.largest(logs.beyond(lines, next(iter(runs.values()))))
        goal = gradients.GOALS.get(name)
        if goal is not None and not distance <= goal:  # NaN is none
            missed.append(f"The loss of {name} must be within {goal:.0%} of that of fp32, it is {distance:.2%} away.")
        is_exact = name != "fp32" and 0 < sum(numels) * world_size <= gradients.MAX_STRIP
        for line in lines if is_exact else []:
            expected = gradients.payload_bytes(numels, name, world_size, line.get("num_calls", 0))
            if line["step"] >= first_made.get(name, math.inf) and line.get("payload_bytes") != expected:
                sent = line.get("payload_bytes", "uncounted")
                missed.append(f"{name} sent {sent} bytes in step {line['step']}, not {expected}.")
    for sentence in missed or ["All losses are as close to that of fp32 as they must be."] * ("fp32" in runs):
        console.print(sentence, soft_wrap=True)
    return 1 if missed else 0


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
