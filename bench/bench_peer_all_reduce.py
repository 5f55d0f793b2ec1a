# SPDX-License-Identifier: Apache-2.0
"""All-reduce through shared memory beside gloo's: torchrun --nproc-per-node 2 bench/bench_peer_all_reduce.py

The peers are `torch.distributed.all_reduce` over gloo, which crosses the loopback interface, and the quantised
collectives over the same group. Contenders take turns; a row is the median over the rounds of the slowest rank's time
for one call, and how many times that of gloo's uncompressed call it is faster, with quartiles.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
from ranks import begin_rank, seconds

from fmkernels import PeerWorkspace, quantized_collectives, rms_norm

PEER = "gloo"
HIDDEN = 1024


def contenders(workspace: PeerWorkspace, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    exact, quantized, summed, out = x.clone(), x.clone(), x.clone(), torch.empty_like(x)
    rows, weight = x.view(-1, HIDDEN), torch.ones(HIDDEN)
    residual = torch.randn(rows.shape).to(x.dtype)
    into = {"out": out.view(-1, HIDDEN), "residual_out": residual}

    def unfused() -> None:
        dist.all_reduce(summed)
        y = summed.view(-1, HIDDEN)
        rms_norm(y, weight, 1e-6, residual, out=y, residual_out=residual)

    result: dict[str, Callable[[], object]] = {
        PEER: lambda: dist.all_reduce(exact),
        "gloo, int8": lambda: quantized_collectives.all_reduce(quantized, op="avg"),  # stays finite, in place
    }
    for algorithm in ("one_shot", "two_shot"):
        result[algorithm] = lambda a=algorithm: workspace.all_reduce(x, algorithm=a, out=out)
    for bits in (8, 4):
        result[f"two_shot, int{bits}"] = lambda b=bits: workspace.all_reduce(x, bits=b, out=out)
    result["gloo, rms_norm"] = unfused
    result["two_shot, rms_norm"] = lambda: workspace.all_reduce_rms_norm(rows, residual, weight, **into)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kib", type=int, nargs="+", default=[64, 1024, 25 * 1024], help="of the message")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    rank = begin_rank()
    dtype = getattr(torch, options.dtype)
    with PeerWorkspace() as workspace:
        for kib in options.kib:
            generator = torch.Generator().manual_seed(rank)
            x = torch.randn(kib * 1024 // dtype.itemsize, generator=generator).to(dtype)
            calls = max(1, (1 << 20) // x.nbytes)
            expected = x.clone()
            dist.all_reduce(expected)
            if dist.get_world_size() == 2:  # one sum, and so the same bits
                assert torch.equal(workspace.all_reduce(x), expected)
            functions = contenders(workspace, x)
            times: dict[str, list[float]] = {name: [] for name in functions}
            for index in range(options.rounds + 1):
                for name, function in functions.items():
                    took = seconds(function, calls)
                    if index:
                        times[name].append(took)
            if rank == 0:
                print(f"{kib} KiB of {options.dtype}, {dist.get_world_size()} ranks")
                for name, list_of in times.items():
                    against = "gloo, rms_norm" if "rms_norm" in name else PEER
                    ratios = sorted(a / b for a, b in zip(times[against], list_of, strict=True))
                    quartiles = f"{ratios[len(ratios) // 4]:.2f}-{ratios[-1 - len(ratios) // 4]:.2f}"
                    middle = statistics.median(list_of)
                    print(
                        f"  {name:20} {middle * 1e6:9.0f} us   {x.nbytes / middle / 1e9:6.2f} GB/s   "
                        f"x {against} {statistics.median(ratios):5.2f} ({quartiles})",
                        flush=True,
                    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
