# SPDX-License-Identifier: Apache-2.0
"""Times one op beside its peers: equal inputs, checked results, interleaved rounds, the machine's ceilings nearby."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

MIN_ROUND_SECONDS = 2e-3  # far above the clock's resolution and the cost of reading it
MAX_ROUNDS = 200
CEILING_SAMPLES = 3  # before a case, and as many after it


@dataclass(frozen=True)
class Contender:
    """One way to do the job. `inputs` holds one argument tuple a set; all contenders have equal values in them."""

    name: str
    run: Callable[..., object]
    inputs: Sequence[tuple]
    to_layout: Callable[[object], object] = field(default=lambda output: output)
    """Brings the output to the layout of the first contender, outside the timed region."""


@dataclass(frozen=True)
class Row:
    """One measured case, as printed and as written to JSON. Times are seconds of one call, medians over the rounds."""

    group: str
    case: str
    seconds: float
    peer: str
    """The fastest of the peers, decided by this run."""
    peer_seconds: dict[str, float]
    speedup: float
    """Median over the rounds of (time of the peer) / (own time), and its quartiles."""
    speedup_low: float
    speedup_high: float
    rate: float
    unit: str
    ceiling: float
    """What the machine reached around this case, in `unit`: a matrix product or a read of memory."""
    num_rounds: int
    num_calls: int
    """Calls a round."""

    @property
    def share(self) -> float:
        return self.rate / self.ceiling

    @property
    def unsteady(self) -> bool:
        """Whether the ratio moved too much between the rounds to be worth a second look: repeat on a quiet machine."""
        return self.speedup_high > 1.3 * self.speedup_low


class Ceilings:
    """The best the machine does: torch.mm (fp32 1024^3 on the CPU, bf16 8192^3 on CUDA), a sum over uncached memory."""

    def __init__(self, device: torch.device, read_bytes: int) -> None:
        self.device = device
        size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
        self.a, self.b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        self.product = torch.empty(size, size, device=device, dtype=dtype)
        self.memory = torch.ones(read_bytes // 4, device=device)
        self.seen: dict[str, list[float]] = {"GFLOP/s": [], "GB/s": []}
        for unit in self.seen:  # fresh pages, thread pools, library handles
            self.sample(unit)
            self.seen[unit].clear()

    def sample(self, unit: str) -> list[float]:
        """CEILING_SAMPLES rates, in `unit`."""
        if unit == "GFLOP/s":
            amount, run, args = 2 * self.a.shape[0] ** 3, torch.mm, (self.a, self.b)
            keywords = {"out": self.product}
        else:
            amount, run, args, keywords = self.memory.nbytes, torch.sum, (self.memory,), {}
        calls = [seconds_of(lambda *a: run(*a, **keywords), [args], self.device) for _ in range(CEILING_SAMPLES)]
        rates = [amount / seconds / 1e9 for seconds in calls]
        self.seen[unit] += rates
        return rates


def seconds_of(run: Callable[..., object], sets: Sequence[tuple], device: torch.device) -> float:
    """Seconds to call `run` once on each argument tuple: by the wall on the CPU, by events on CUDA.

    The device is told and not read from the arguments, which may be those of another library. Its work must go to
    torch's current stream, as cupy's does: both use the default stream.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for args in sets:
            run(*args)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    for args in sets:
        run(*args)
    return time.perf_counter() - begin


def num_sets(set_bytes: int, cache_bytes: int) -> int:
    """How many input sets to rotate so that none is in the cache when its turn comes again."""
    return max(2, math.ceil(4 * cache_bytes / set_bytes))


def seeds(set_bytes: int, cache_bytes: int) -> range:
    """A set that fits the cache was written a moment ago, so it is there; larger ones rotate."""
    return range(num_sets(set_bytes, cache_bytes) if set_bytes > cache_bytes else 1)


def require_agreement(ours: Contender, peers: Iterable[Contender], *, check_dtype: bool = True) -> None:
    """Runs every contender on its first set; raises AssertionError where a result is not ours.

    The tolerances are those that torch.testing.assert_close has for the dtypes.
    """
    actual = ours.to_layout(ours.run(*ours.inputs[0]))
    for peer in peers:
        expected = peer.to_layout(peer.run(*peer.inputs[0]))
        torch.testing.assert_close(
            actual,
            expected,
            check_dtype=check_dtype,
            check_stride=False,
            msg=lambda text, name=peer.name: f"{ours.name} and {name} disagree, so neither is timed. {text}",
        )


def measure(
    benchmark,
    ours: Contender,
    peers: Sequence[Contender],
    ceilings: Ceilings,
    *,
    group: str,
    case: str,
    unit: str,
    amount: float,
    min_rounds: int,
    max_seconds: float,
    check_dtype: bool = True,
) -> Row | None:
    """One row: rounds of peer, peer, ..., ours until the slowest contender has run for `max_seconds`.

    `amount` is the work of one call, in FLOPs or bytes. pytest-benchmark drives the rounds, so its own statistics and
    `--benchmark-json` hold the wall time of our rounds. None under `--benchmark-disable`, where each runs once.
    """
    contenders = [*peers, ours]
    require_agreement(ours, peers, check_dtype=check_dtype)

    # One counter for all: whatever ran last, the next call takes the set that was used longest ago.
    turn = itertools.cycle(range(len(ours.inputs)))

    def round_of(contender: Contender, num_calls: int) -> float:
        sets = [contender.inputs[next(turn)] for _ in range(num_calls)]
        return seconds_of(contender.run, sets, ceilings.device) / num_calls

    once = {c.name: statistics.median(round_of(c, 1) for _ in range(3)) for c in contenders}
    num_calls = math.ceil(MIN_ROUND_SECONDS / min(once.values()))
    num_rounds = int(max_seconds / (max(once.values()) * num_calls))
    num_rounds = min(max(num_rounds, min_rounds), MAX_ROUNDS)
    times: dict[str, list[float]] = {c.name: [] for c in contenders}

    def run_peers() -> None:
        for peer in peers:
            times[peer.name].append(round_of(peer, num_calls))

    benchmark.group = group
    ceiling = ceilings.sample(unit)
    gc.collect()
    gc.disable()  # pytest-benchmark could do so for our rounds only
    try:
        benchmark.pedantic(
            lambda: times[ours.name].append(round_of(ours, num_calls)), setup=run_peers, rounds=num_rounds
        )
    finally:
        gc.enable()
    ceiling += ceilings.sample(unit)
    if not benchmark.enabled:
        return None

    medians = {name: statistics.median(values) for name, values in times.items()}
    seconds = medians.pop(ours.name)
    strongest = min(medians, key=medians.__getitem__)
    ratios = [theirs / own for theirs, own in zip(times[strongest], times[ours.name], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    row = Row(
        group=group,
        case=case,
        seconds=seconds,
        peer=strongest,
        peer_seconds=medians,
        speedup=middle,
        speedup_low=low,
        speedup_high=high,
        rate=amount / seconds / 1e9,
        unit=unit,
        ceiling=statistics.median(ceiling),
        num_rounds=num_rounds,
        num_calls=num_calls,
    )
    benchmark.extra_info.update(vars(row))
    return row
