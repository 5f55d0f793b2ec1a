# SPDX-License-Identifier: Apache-2.0
"""Tables of what emulated launches did, and their JSON form: events, ratios to the ideal, estimates, hottest lines.

Everything is a count of the PTX that ran, or arithmetic on counts, and nothing is a time. A unit is 4096 dense mma
FLOPs, one m16n8k16, so that kernels of different tiles and architectures compare. An estimate says how long each unit
of a GPU is busy at nominal rates if blocks are spread evenly over it: good for comparing two kernels on the same work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

FLOPS_PER_UNIT = 4096

Launch = dict[str, Any]  # one of emulator.launches()
Record = dict[str, Any]  # the JSON form of equal launches of one kernel


@dataclass(frozen=True)
class Work:
    """What a call has to do at least, to hold the counts against; 0 where it is not known."""

    useful_flops: int = 0
    input_bytes: int = 0
    output_bytes: int = 0


@dataclass(frozen=True)
class Entry:
    """One call of an op: its launches, summed by kernel, and the same of the baseline."""

    case: str
    records: list[Record]
    work: Work = field(default_factory=Work)
    before: list[Record] = field(default_factory=list)


# ---- Records ---------------------------------------------------------------------------------------------------------


def summarize(launches: Iterable[Launch]) -> list[Record]:
    """One record a kernel and launch configuration, in the order of their first launch; counts are sums."""
    groups: dict[tuple, list[Launch]] = defaultdict(list)
    for launch in launches:
        groups[launch["name"], str(launch["grid"]), str(launch["block"]), launch["dynamic_smem"]].append(launch)
    return [_sum(group) for group in groups.values()]


def total(records: Sequence[Record]) -> Record:
    """The sum over all kernels of a call; bytes that two kernels touch count for both."""
    return {**_sum(records), "name": f"all {len(records)} kernels", "grid": None, "block": None}


def _sum(parts: Sequence[dict]) -> Record:
    first = parts[0]
    totals = {key: sum(part["totals"][key] for part in parts) for key in first["totals"]}
    classes = {key: sum(part["classes"][key] for part in parts) for key in first["classes"]}
    lines: dict[tuple[str, int], dict] = {}
    for line in (line for part in parts for line in part.get("lines", ())):  # a baseline keeps none
        place = line["file"], line["line"]
        known = lines.setdefault(place, dict.fromkeys(line, 0) | {"file": place[0], "line": place[1]})
        for key in line.keys() - {"file", "line"}:
            known[key] += line[key]
    estimates = {}
    for gpu, estimate in first["estimates"].items():
        cycles = {u: round(sum(p["estimates"][gpu]["cycles"][u] for p in parts), 2) for u in estimate["cycles"]}
        estimates[gpu] = {**estimate, "cycles": cycles, "binds": max(cycles, key=cycles.__getitem__)}
    return {
        "name": first["name"],
        "launches": sum(part.get("launches", 1) for part in parts),
        "grid": first["grid"],
        "block": first["block"],
        "dynamic_smem": first["dynamic_smem"],
        "totals": totals,
        "classes": classes,
        "per_unit": per_unit(totals, classes),
        "estimates": estimates,
        "lines": [lines[place] for place in sorted(lines)],
    }


def per_unit(totals: dict[str, int], classes: dict[str, int]) -> dict[str, float]:
    """Events per 4096 mma FLOPs; empty for a kernel without mma."""
    if totals["mma_flops"] == 0:
        return {}
    integer = classes["int_alu"] + classes["int_mul"]
    counts = {
        "not_mma": totals["issue_slots"] - classes["mma"],
        "int": integer,
        "int_select": integer + classes["set_select"],
        "mufu": classes["mufu"],
        "fp32": classes["fma"],
        "fp_max": classes["fp_min_max_compare"],
        "cvt": classes["convert"],
        "wavefronts": totals["wavefronts"],
        "shfl": classes["shuffle"],
        "mov": classes["move"],
    }
    return {name: round(count * FLOPS_PER_UNIT / totals["mma_flops"], 4) for name, count in counts.items()}


def ratios(record: Record, work: Work) -> dict[str, float]:
    """Counts over what they would be at best: 1.0 is perfect. Those without an ideal are left out."""
    counts = record["totals"]
    pairs = {
        "mma_over_useful": (counts["mma_flops"], work.useful_flops if counts["mma_flops"] else 0),
        "sectors_read": (counts["sectors_read"], counts["ideal_sectors_read"]),
        "sectors_written": (counts["sectors_written"], counts["ideal_sectors_written"]),
        "wavefronts": (counts["wavefronts"], counts["ideal_wavefronts"]),
        "distinct_over_inputs": (counts["distinct_bytes_read"], work.input_bytes),
        "distinct_over_outputs": (counts["distinct_bytes_written"], work.output_bytes),
    }
    return {name: round(count / ideal, 4) for name, (count, ideal) in pairs.items() if ideal}


# ---- Tables ----------------------------------------------------------------------------------------------------------

# Where the baseline differs by less, nothing is said: rounding, not another program.
SAME = 5e-5

EVENTS = {
    "issue_slots": "issue slots",
    "sectors_read": "sectors read",
    "sectors_written": "written",
    "distinct_bytes_read": "distinct B read",
    "distinct_bytes_written": "written",
    "wavefronts": "wavefronts",
    "local_bytes": "local B",
}
RATIOS = {
    "mma_over_useful": "mma / useful",
    "sectors_read": "sectors / ideal",
    "sectors_written": "written / ideal",
    "distinct_over_inputs": "distinct / inputs",
    "distinct_over_outputs": "distinct / outputs",
    "wavefronts": "waves / ideal",
}
PER_UNIT = {
    "not_mma": "not mma",
    "int": "int",
    "int_select": "int + select",
    "mufu": "mufu",
    "fp32": "fp32",
    "fp_max": "fp max",
    "cvt": "cvt",
    "wavefronts": "shared waves",
    "shfl": "shfl",
    "mov": "mov (PTX only)",
}


def events(record: Record) -> dict[str, int]:
    totals = record["totals"]
    local = totals["local_bytes_read"] + totals["local_bytes_written"]
    return {name: local if name == "local_bytes" else totals[name] for name in EVENTS}


def changed(value: float, before: float | None) -> float:
    """Relative change against the baseline; 0 where there is none."""
    if before is None or abs(value - before) <= SAME * max(abs(value), abs(before)):
        return 0.0
    return value / before - 1 if before else float("inf")


def cell(text: str, value: float, before: float | None) -> Text:
    """The value, and behind it how much more (red) or less (green) it is than in the baseline."""
    change = changed(value, before)
    if change == 0.0:
        return Text(text)
    shown = f"{change:+.1%}" if abs(change) < 10 else "new"
    return Text.assemble(text, " ", (shown, "red" if change > 0 else "green"))


def _rows(entries: Sequence[Entry]) -> list[tuple[Entry, Record, Record | None, bool]]:
    """(entry, record, the same of the baseline, whether it is the whole call): the kernels, then their sum."""
    rows = []
    for entry in entries:
        pairs = [(record, _same(record, entry)) for record in entry.records]
        rows += [(entry, record, before, len(pairs) == 1) for record, before in pairs]
        if len(pairs) > 1:
            rows.append((entry, total(entry.records), total(entry.before) if entry.before else None, True))
    return rows


def _same(record: Record, entry: Entry) -> Record | None:
    """The record of the baseline at the same place among those of the same name."""
    ours = [other for other in entry.records if other["name"] == record["name"]]
    theirs = [other for other in entry.before if other["name"] == record["name"]]
    index = next(i for i, other in enumerate(ours) if other is record)
    return theirs[index] if index < len(theirs) else None


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("case", overflow="fold")
    table.add_column("kernel", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _fill(
    table: Table,
    entries: Sequence[Entry],
    values_of: Callable[[Record, Work], dict[str, float]],
    names: Iterable[str],
    form: str,
) -> Table | None:
    """One row a kernel; None where no row has a value."""
    filled = False
    last: Entry | None = None
    for entry, record, before, whole in _rows(entries):
        work = entry.work if whole else Work()
        values, known = values_of(record, work), values_of(before, work) if before else {}
        if entry is not last:
            table.add_section()
        name = record["name"] + (f" x{record['launches']}" if record["launches"] > 1 and record["grid"] else "")
        cells = [cell(format(values[n], form), values[n], known.get(n)) if n in values else Text("-") for n in names]
        if values:
            table.add_row("" if entry is last else entry.case, name, *cells)
            filled, last = True, entry
    return table if filled else None


def estimate_table(entries: Sequence[Entry], gpu: str) -> Table:
    """Busy cycles of one SM by unit, and how far the second is behind the first."""
    units = list(entries[0].records[0]["estimates"][gpu]["cycles"])
    about = entries[0].records[0]["estimates"][gpu]
    title = f"busy cycles of an SM, {gpu} ({about['sms']} SMs): an estimate from counts and nominal rates, not a time"
    table = _table(title, [*units, "binds", "second"])
    last: Entry | None = None
    for entry, record, before, _ in _rows(entries):
        cycles = record["estimates"][gpu]["cycles"]
        known = before["estimates"].get(gpu, {}).get("cycles", {}) if before else {}
        first, second = sorted(cycles, key=cycles.__getitem__, reverse=True)[:2]
        share = f"{second} {cycles[second] / cycles[first]:.0%}" if cycles[first] else "-"
        cells = [cell(f"{cycles[unit]:,.0f}", cycles[unit], known.get(unit)) for unit in units]
        if entry is not last:
            table.add_section()
        table.add_row("" if entry is last else entry.case, record["name"], *cells, first, share)
        last = entry
    return table


def line_table(record: Record, num_lines: int) -> Table:
    """The source lines that execute most, and those whose memory accesses are not ideal."""
    all_warps = max(1, sum(line["warp_instructions"] for line in record["lines"]))
    hottest = sorted(record["lines"], key=lambda line: -line["warp_instructions"])
    shown = hottest[:num_lines]
    shown += [line for line in hottest[num_lines:] if _excess(line) > 0.01 * all_warps]
    table = Table(title=f"hottest lines of {record['name']}", title_justify="left")
    table.add_column("line", overflow="fold")
    for heading in ("warp-instructions", "share", "lanes", "units", "sectors", "/ ideal", "waves", "/ ideal"):
        table.add_column(heading, justify="right")
    for line in shown:
        place = f"{PurePath(line['file']).name}:{line['line']}" if line["line"] else "unknown (compile with -lineinfo)"
        warps = line["warp_instructions"]
        cells = [f"{warps:,}", f"{warps / all_warps:.1%}", f"{line['lanes'] / max(1, warps):.1f}"]
        cells.append(f"{line['mma_flops'] / FLOPS_PER_UNIT:,.0f}" if line["mma_flops"] else "-")
        for count, ideal in (("sectors", "ideal_sectors"), ("wavefronts", "ideal_wavefronts")):
            ratio = line[count] / line[ideal] if line[ideal] else 0.0
            style = "red" if ratio > 1.005 else ""
            cells += [f"{line[count]:,}", Text(f"{ratio:.2f}", style)] if line[ideal] else ["-", "-"]
        table.add_row(place, *cells)
    return table


def _excess(line: dict) -> int:
    return max(line["sectors"] - line["ideal_sectors"], line["wavefronts"] - line["ideal_wavefronts"])


def print_entries(console: Console, entries: Sequence[Entry], num_lines: int = 12) -> None:
    """All tables: events, ratios, counts per unit, an estimate for each GPU, the hottest lines of each kernel."""
    entries = [entry for entry in entries if entry.records]
    if not entries:
        console.print("no kernel was launched")
        return
    unit_title = f"per unit of {FLOPS_PER_UNIT} mma FLOPs"
    tables = [
        _fill(_table("events", EVENTS.values()), entries, lambda r, _: events(r), EVENTS, ","),
        _fill(_table("over the ideal: 1.00 at best", RATIOS.values()), entries, ratios, RATIOS, ".3f"),
        _fill(_table(unit_title, PER_UNIT.values()), entries, lambda r, _: r["per_unit"], PER_UNIT, ".3f"),
        *(estimate_table(entries, gpu) for gpu in entries[0].records[0]["estimates"]),
    ]
    for table in tables:
        if table is not None:
            console.print(table)
    if num_lines:
        seen = {record["name"]: record for entry in reversed(entries) for record in entry.records}
        for record in reversed(seen.values()):
            console.print(line_table(record, num_lines))


def print_report(console: Console, launches: Iterable[Launch], num_lines: int = 12) -> None:
    """The tables of a program's launches, without anything to hold them against."""
    print_entries(console, [Entry("", summarize(launches))], num_lines)
