# SPDX-License-Identifier: Apache-2.0
"""The log of a run, a JSON object in a line for each step, and what is drawn and said of it."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from . import gradients

NAME = "log.jsonl"


def append(folder: Path, line: dict[str, Any]) -> None:
    with (folder / NAME).open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines in the order of steps; one that a crash has cut off ends them."""
    lines: list[dict[str, Any]] = []
    for line in (folder / NAME).read_text().splitlines() if (folder / NAME).exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def cut(folder: Path, last: int) -> None:
    """Removes what a run that stopped has logged after step `last`, its checkpoint: these steps are made again."""
    kept = [line for line in read(folder) if line["step"] <= last]
    partial = folder / f"{NAME}.partial"
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
    partial.replace(folder / NAME)


def validation(lines: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]


def apart(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> tuple[float, float]:
    """(the largest difference of the training losses of a step, the usual one between a step and the next).

    Two runs with the same batches that compute the same function differ by rounding, which training amplifies; the
    second number is what another batch does to a loss, the noise of such curves.
    """
    losses = [[line["loss"] for line in lines] for lines in (a, b)]
    noise = statistics.median(abs(x - y) for curve in losses for x, y in itertools.pairwise(curve))
    return largest(x - y for x, y in zip(*losses, strict=True)), noise


def largest(differences: Iterable[float]) -> float:
    """Of their sizes. NaN where one is, whatever the order; `max` keeps it only in the first place."""
    sizes = [abs(x) for x in differences]
    return math.nan if any(map(math.isnan, sizes)) else max(sizes)


def last(lines: list[dict[str, Any]]) -> tuple[float, float]:
    """(training loss, the mean of the last tenth of the steps; last validation loss)."""
    tenth = lines[-max(1, len(lines) // 10) :]
    return statistics.fmean(line["loss"] for line in tenth), validation(lines)[-1][1]


def beyond(lines: list[dict[str, Any]], base: list[dict[str, Any]]) -> list[float]:
    """By how much these last losses are above those of another run, as parts of them."""
    return [a / b - 1 for a, b in zip(last(lines), last(base), strict=True)]


def median(lines: list[dict[str, Any]], name: str) -> float | None:
    """Of what steps have measured; None where none has."""
    values = [line[name] for line in lines if name in line]
    return statistics.median(values) if values else None


def tables_of_gradients(
    runs: dict[str, list[dict[str, Any]]], numels: list[int], world_size: int
) -> tuple[Table, Table]:
    """(losses, costs) of runs that differ in how gradients travel. Bytes are those of a step.

    Interfaces are those of the network namespace of the first process; payload and formula are of all processes, for
    the parameters of DDP with so many elements.
    """
    first, base = next(iter(runs.items()))
    losses, costs = (Table(title=title, title_justify="left") for title in ("loss, in nats a byte", "cost of a step"))
    for heading in ("gradients", "steps", "last tenth", f"to {first}", "validation", f"to {first}"):
        losses.add_column(heading, justify="left" if heading == "gradients" else "right")
    for heading in ("gradients", "ms", f"x {first}", "MB at interfaces", "MB of payload", "by the formula"):
        costs.add_column(heading, justify="left" if heading == "gradients" else "right")
    for name, lines in runs.items():
        pairs = zip(last(lines), beyond(lines, base), strict=True)
        numbers = (text for loss, more in pairs for text in (f"{loss:.4f}", f"{more:+.2%}"))
        losses.add_row(name, str(len(lines)), *numbers)
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(base, lines, strict=True))
        num_calls = int(median(lines, "num_calls") or 0)
        formula = gradients.payload_bytes(numels, name, world_size, num_calls) if numels else None
        counts = median(lines, "interface_bytes"), median(lines, "payload_bytes"), formula
        sizes = ("-" if count is None else f"{count / 1e6:.4f}" for count in counts)
        costs.add_row(name, f"{1000 * (median(lines, 'seconds') or 0):.1f}", f"{ratio:.2f}", *sizes)
    return losses, costs


def table(runs: dict[str, list[dict[str, Any]]]) -> Table:
    result = Table(title="loss, in nats a byte", title_justify="left")
    for heading in ("run", "steps", "last training", "validation", "ms a step", "tokens/s"):
        result.add_column(heading, justify="left" if heading == "run" else "right")
    for name, lines in runs.items():
        seconds = statistics.median(line["seconds"] for line in lines)
        losses = f"{lines[-1]['loss']:.4f}", f"{validation(lines)[-1][1]:.4f}"
        speed = statistics.median(line["tokens_per_second"] for line in lines)
        result.add_row(name, str(len(lines)), *losses, f"{1000 * seconds:.0f}", f"{speed:.0f}")
    return result


def plot(runs: dict[str, list[dict[str, Any]]], path: Path, title: str) -> None:
    """Draws the losses of all runs, and where there are several also how far they are from the first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {"height_ratios": (3, 1)} if len(runs) > 1 else {}
    num_rows = 1 + (len(runs) > 1)
    fig, axes = plt.subplots(num_rows, sharex=True, squeeze=False, figsize=(9, 6), layout="constrained", **rows)
    ax, first = axes[0, 0], next(iter(runs.values()))
    for (name, lines), style in zip(runs.items(), itertools.cycle(("-", "--", ":", "-.")), strict=False):
        steps = [line["step"] for line in lines]
        (curve,) = ax.plot(steps, [line["loss"] for line in lines], style, linewidth=1, label=f"{name}, training")
        steps, losses = zip(*validation(lines), strict=True)
        marker, color = "o" if style == "-" else "x", curve.get_color()
        ax.plot(steps, losses, marker, color=color, label=f"{name}, validation")
        if lines is not first:
            pairs = list(zip(first, lines, strict=True))
            steps, differences = [a["step"] for a, _ in pairs], [abs(a["loss"] - b["loss"]) for a, b in pairs]
            axes[1, 0].semilogy(steps, differences, color=color, linewidth=1)
            axes[1, 0].set_ylabel("training losses,\nto the first run")
    ax.set_ylabel("loss, in nats a byte")
    ax.set_title(title, fontsize=9)
    ax.legend()
    axes[-1, 0].set_xlabel("step")
    for each in axes.flat:
        each.grid(linewidth=0.4)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def plot_load(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws for each block which share of the choices each expert had, step by step; 1 is an even share."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    load = np.array([line["load"] for line in lines], dtype=float)  # [steps, layers, experts]
    share = load / load.mean(2, keepdims=True)
    layers = share.shape[1]
    fig, axes = plt.subplots(layers, sharex=True, squeeze=False, figsize=(9, 1 + 1.2 * layers), layout="constrained")
    extent = (lines[0]["step"] - 0.5, lines[-1]["step"] + 0.5, share.shape[2] - 0.5, -0.5)
    for layer, ax in enumerate(axes[:, 0]):
        image = ax.imshow(
            share[:, layer].T, aspect="auto", interpolation="nearest", extent=extent, vmin=0, vmax=2, cmap="RdBu_r"
        )
        ax.set_ylabel(f"block {layer + 1}\nexpert")
    axes[0, 0].set_title(title, fontsize=9)
    axes[-1, 0].set_xlabel("step")
    fig.colorbar(image, ax=axes[:, 0], label="load / even load", extend="max")
    fig.savefig(path, dpi=130)
    plt.close(fig)
