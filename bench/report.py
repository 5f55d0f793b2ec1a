# SPDX-License-Identifier: Apache-2.0
"""What a benchmark run says at its end: a table, the groups against their goals, JSON lines, a plot, the baseline."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from machine import Machine
from measure import Ceilings, Row
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Goal:
    """Least speed-up over the peer: of the geometric mean and of every case."""

    mean: float
    each: float


# On one CPU thread. Half dtypes: their peer is the own fp32, whose speed they must keep within 20 percent.
GOALS = {
    "causal": Goal(mean=1.6, each=1.25),
    "full": Goal(mean=1.15, each=1.0),
    "half / own fp32": Goal(mean=0.8, each=0.8),
    "cross-entropy": Goal(mean=4.0, each=4.0),
    "decode": Goal(mean=1.5, each=1.5),
    "documents / training": Goal(mean=4.0, each=4.0),
    "training": Goal(mean=1.6, each=1.6),
    "training / bias": Goal(mean=2.0, each=2.0),
    "training / bias, full": Goal(mean=2.0, each=2.0),
    "training / bf16": Goal(mean=1.5, each=1.5),
    "int8 decode, memory": Goal(mean=2.5, each=2.5),
    "int8 decode, cache": Goal(mean=2.5, each=2.5),
    "int4 decode, memory": Goal(mean=4.0, each=4.0),
    "int4 decode, cache": Goal(mean=4.0, each=4.0),
    **{f"quantize int8 {name} / copy": Goal(mean=0.6, each=0.6) for name in ("fp32", "bf16")},
    **{f"quantize int4 {name} / copy": Goal(mean=0.5, each=0.5) for name in ("fp32", "bf16")},
    **{f"quantize int{bits} {name} / torch": Goal(mean=4.0, each=4.0) for bits in (8, 4) for name in ("fp32", "bf16")},
    "dequantize int8 fp32 / copy": Goal(mean=0.6, each=0.6),
    "dequantize int4 fp32 / copy": Goal(mean=0.5, each=0.5),
    **{f"dequantize int{bits} fp32 / torch": Goal(mean=4.0, each=4.0) for bits in (8, 4)},
    **{f"reduce_wires int{bits}": Goal(mean=4.0, each=4.0) for bits in (8, 4)},
    "route": Goal(mean=3.0, each=3.0),
    "moe mapping": Goal(mean=5.0, each=5.0),
    "moe permute": Goal(mean=1.5, each=1.5),
    "moe combine": Goal(mean=1.5, each=1.5),
    "moe grouped_mm, few experts": Goal(mean=1.1, each=1.1),
    "moe grouped_mm, many experts": Goal(mean=1.25, each=1.25),
    "rms_norm fp32": Goal(mean=1.0, each=1.0),
    "rms_norm bf16": Goal(mean=1.3, each=1.3),
    "add_rms_norm fp32": Goal(mean=1.0, each=1.0),
    "add_rms_norm bf16": Goal(mean=1.3, each=1.3),
    "rope neox fp32": Goal(mean=1.0, each=1.0),
    "rope neox bf16": Goal(mean=1.3, each=1.3),
    "rope interleaved fp32": Goal(mean=1.0, each=1.0),
    "rope interleaved bf16": Goal(mean=1.3, each=1.3),
    "2:4, many tokens, fp32": Goal(mean=1.5, each=1.5),
    "2:4, few tokens, fp32": Goal(mean=1.5, each=1.5),
    "swiglu fp32": Goal(mean=2.5, each=2.5),
    "swiglu bf16": Goal(mean=2.5, each=2.5),
}


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.{1 if seconds < 1e-3 else 0}f}"


@dataclass
class Report:
    machine: Machine
    commit: str
    time: str
    ceilings: Ceilings
    folder: Path
    baseline: Path
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        lines = self.baseline.read_text().splitlines() if self.baseline.exists() else []
        self.before: dict[tuple[str, str], dict] = {(r["group"], r["case"]): r for r in map(json.loads, lines)}

    @property
    def rows_path(self) -> Path:
        return self.folder / f"{self.machine.slug}.jsonl"

    def add(self, row: Row) -> None:
        """Takes the row and appends it to the JSON lines of this machine at once, so that a broken run keeps it."""
        self.rows.append(row)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.rows_path.open("a") as file:
            file.write(json.dumps(self._record(row)) + "\n")

    def save_baseline(self) -> None:
        """Puts this run's rows into the committed file; rows of cases that did not run stay as they are."""
        merged = self.before | {(row.group, row.case): self._record(row) for row in self.rows}
        self.baseline.parent.mkdir(parents=True, exist_ok=True)
        self.baseline.write_text("".join(json.dumps(record) + "\n" for record in merged.values()))

    def _record(self, row: Row) -> dict:
        about = {"time": self.time, "commit": self.commit, "indication": self.machine.indication}
        return vars(row) | about | {"machine": vars(self.machine)}

    def text(self, colour: bool) -> str:
        """The tables, as wide as their rows need: a narrow terminal would crop numbers."""
        console = Console(width=165, force_terminal=colour, highlight=False)
        with console.capture() as capture:
            console.print(self.machine.heading())
            console.print(f"commit {self.commit}; {self._ceilings()}")
            console.print(self._table())
            console.print(self._groups())
        return capture.get()

    def _ceilings(self) -> str:
        parts = []
        for name, unit in (("matrix product", "GFLOP/s"), ("memory read", "GB/s")):
            low, middle, high = statistics.quantiles(self.ceilings.seen[unit] or [0.0, 0.0], n=4)
            if middle > 0:
                parts.append(f"{name} {middle:.1f} {unit} ({low:.1f} to {high:.1f})")
        return "ceilings, median (quartiles): " + ", ".join(parts)

    def _table(self) -> Table:
        table = Table(
            caption="x peer: median over the interleaved rounds, above 1 ours is faster; ~: quartiles too far apart, "
            "measure again; baseline: change of x peer, coloured where the quartiles of both runs do not meet"
        )
        for name in ("group", "case"):
            table.add_column(name, no_wrap=True)
        for name in ("us", "rate", "% of ceiling"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("strongest peer", no_wrap=True)
        for name in ("its us", "x peer", "quartiles", "baseline"):
            table.add_column(name, justify="right", no_wrap=True)
        group = None
        for row in self.rows:
            if row.group != group:
                table.add_section()
            table.add_row(
                "" if row.group == group else row.group,
                row.case,
                microseconds(row.seconds),
                f"{row.rate:.1f} {row.unit}",
                f"{row.share:.0%}",
                row.peer,
                microseconds(row.peer_seconds[row.peer]),
                f"[bold {'red' if row.speedup < 1 else 'green'}]{row.speedup:.2f}[/]",
                f"{'~ ' if row.unsteady else ''}{row.speedup_low:.2f}-{row.speedup_high:.2f}",
                self._change(row),
            )
            group = row.group
        return table

    def _change(self, row: Row) -> str:
        before = self.before.get((row.group, row.case))
        if before is None:
            return "-"
        change = row.speedup / before["speedup"] - 1
        apart = row.speedup_high < before["speedup_low"] or row.speedup_low > before["speedup_high"]
        other = "" if row.peer == before["peer"] else " (other peer)"
        return f"[{'red' if change < 0 else 'green'}]{change:+.0%}[/]{other}" if apart else f"{change:+.0%}{other}"

    def groups(self) -> dict[str, list[Row]]:
        result: dict[str, list[Row]] = {}
        for row in self.rows:
            result.setdefault(row.group, []).append(row)
        return result

    def _groups(self) -> Table:
        table = Table(title="groups")
        table.add_column("group")
        for name in ("cases", "geometric mean", "least", "% of ceiling", "goal: mean, each"):
            table.add_column(name, justify="right")
        table.add_column("goal")
        for group, rows in self.groups().items():
            mean, least = statistics.geometric_mean(r.speedup for r in rows), min(r.speedup for r in rows)
            goal = GOALS.get(group) if self.machine.device == "cpu" and not self.machine.indication else None
            verdict = ""
            if goal is not None:
                verdict = "[green]met[/]" if mean >= goal.mean and least >= goal.each else "[red]missed[/]"
            table.add_row(
                group,
                str(len(rows)),
                f"{mean:.2f}",
                f"{least:.2f}",
                f"{statistics.geometric_mean(r.share for r in rows):.0%}",
                "" if goal is None else f"{goal.mean}, {goal.each}",
                verdict,
            )
        return table

    def plot(self) -> Path:
        """Draws the speed-up of every case as a bar; the path of the PNG."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib import ticker

        colours = plt.get_cmap("tab10")
        fig, ax = plt.subplots(figsize=(11, 1.6 + 0.22 * len(self.rows)), layout="constrained")
        labels: dict[float, str] = {}
        y = 0.0
        for index, (group, rows) in enumerate(self.groups().items()):
            for row in rows:
                labels[y] = f"{group}:  {row.case}"
                spread = [[row.speedup - row.speedup_low], [row.speedup_high - row.speedup]]
                ax.barh(y, row.speedup - 1, left=1, xerr=spread, color=colours(index % 10), ecolor="0.3", capsize=2)
                ax.annotate(
                    f"{row.speedup:.2f}  {row.peer}",
                    (max(1.0, row.speedup_high), y),
                    (5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
                y += 1
            y += 0.5
        ax.axvline(1.0, color="black", linewidth=1)
        ax.set_yticks(list(labels), labels.values(), fontsize=8)
        ax.set_ylim(y - 0.5, -1)
        ax.set_xscale("log", base=2)
        ax.set_xlim(0.9 * min(0.5, *(r.speedup_low for r in self.rows)), 2.5 * max(r.speedup_high for r in self.rows))
        ax.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        ax.grid(axis="x", linewidth=0.4)
        ax.set_axisbelow(True)
        ax.set_xlabel("speed over the strongest peer (median and quartiles of the rounds); 1.0: as fast")
        ax.set_title(self.machine.heading().replace(", torch", ",\ntorch"), fontsize=8)
        path = self.folder / f"{self.machine.slug}.png"
        fig.savefig(path, dpi=130)
        plt.close(fig)
        return path
