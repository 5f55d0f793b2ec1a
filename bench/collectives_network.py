# SPDX-License-Identifier: Apache-2.0
"""Steps of DistributedDataParallel between network namespaces with a rate limit, or over the loopback.

    sudo python bench/collectives_network.py --ranks 2 --megabytes 25 --mbit 1000
    python bench/collectives_network.py --ranks 2 --megabytes 25 --mbit 0        # the loopback of this machine
    sudo python bench/collectives_network.py --ranks 2 -- examples/train_lm.py --small --gradients fp32 int8 int4+ef

Each rank is a process in a namespace of its own, joined to the others by a bridge; `tc tbf` limits what leaves a rank
and what comes to it. Compute is as good as free: a gradient of ones. The rows are medians of interleaved steps, `sent`
is what the interface of rank 0 counted in a step, or the loopback of all ranks. A script after `--` is run instead, by
torchrun with a process in each namespace. The namespaces are removed at the end and what runs in them is ended,
whatever happens.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INTERFACE = "eth0"
SECONDS_TO_END = 10
SECONDS_OF_TORCHRUN = 40  # it gives its workers 30
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=25, help="of float32 gradients")
    parser.add_argument("--mbit", type=int, default=1000, help="per second; 0: no namespaces, the loopback")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    parser.add_argument("script", nargs="*", help="after --: a script and its arguments, to run instead")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def address_of(rank: int, options: argparse.Namespace) -> str:
    return f"10.99.0.{rank + 1}" if options.mbit else "127.0.0.1"


# ---- the network -----------------------------------------------------------------------------------------------------


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def limit(namespace: str, device: str, mbit: int) -> None:
    words = ["dev", device, "root", "tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "200ms"]
    ip("netns", "exec", namespace, "tc", "qdisc", "add", *words)


@contextlib.contextmanager
def network(options: argparse.Namespace) -> Iterator[list[str]]:
    """The namespaces of the ranks. A namespace takes its interfaces and limits along when it goes."""
    prefix = f"fm{os.getpid()}"
    hub, names = f"{prefix}-hub", [f"{prefix}-{rank}" for rank in range(options.ranks)]
    try:
        for name in (hub, *names):
            ip("netns", "add", name)
        ip("-n", hub, "link", "add", "bridge0", "type", "bridge")
        ip("-n", hub, "link", "set", "bridge0", "up")
        for rank, name in enumerate(names):
            port = f"port{rank}"
            ip("-n", name, "link", "add", INTERFACE, "type", "veth", "peer", "name", port, "netns", hub)
            ip("-n", name, "addr", "add", f"{address_of(rank, options)}/24", "dev", INTERFACE)
            for words in ((name, INTERFACE), (name, "lo"), (hub, port)):
                ip("-n", words[0], "link", "set", words[1], "up")
            ip("-n", hub, "link", "set", port, "master", "bridge0")
            limit(name, INTERFACE, options.mbit)
            limit(hub, port, options.mbit)
        yield names
    finally:
        ignore_signals()
        for name in (hub, *names):
            end_processes_in(name)
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def end_processes_in(namespace: str) -> None:
    """What has been left there; a namespace lives as long as its processes."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], check=False, capture_output=True, text=True)
    for process in listed.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


# ---- a rank ----------------------------------------------------------------------------------------------------------


def sent_bytes(interface: str) -> int:
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def run_rank(options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
    from torch.nn.parallel import DistributedDataParallel

    from fmkernels.hooks import QuantizedAllReduce

    torch.set_num_threads(1)
    store = dist.TCPStore(address_of(0, options), options.port, options.ranks, is_master=options.rank == 0)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=options.rank, world_size=options.ranks, timeout=timeout)

    class Free(torch.nn.Module):
        """Matrices of 1 MB whose gradient is a number times a number."""

        def __init__(self) -> None:
            super().__init__()
            count = max(1, round(options.megabytes))
            self.weights = torch.nn.ParameterList(torch.zeros(512, 512) for _ in range(count))

        def forward(self) -> Any:
            return sum(weight.sum() for weight in self.weights)

    def no_hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    no_hook.__annotations__ = {}

    def quantized(**how: Any) -> Any:
        def register(model: Any) -> None:
            QuantizedAllReduce(model, **how).register(model)

        return register

    contenders = {
        "fp32": lambda model: None,
        "fp16 hook": lambda model: model.register_comm_hook(None, default_hooks.fp16_compress_hook),
        "PowerSGD rank 4": lambda model: model.register_comm_hook(
            powerSGD_hook.PowerSGDState(None, 4, start_powerSGD_iter=2), powerSGD_hook.powerSGD_hook
        ),
        "int8": quantized(bits=8),
        "int8 + error feedback": quantized(bits=8, error_feedback=True),
        "int4": quantized(bits=4),
        "int4 + error feedback": quantized(bits=4, error_feedback=True),
        "nothing sent": lambda model: model.register_comm_hook(None, no_hook),
    }
    models = {}
    for name, register in contenders.items():
        # torch's PowerSGD hook begins collectives in Future.then: over gloo it hangs with several buckets under way.
        cap = 2 * options.megabytes if name.startswith("PowerSGD") else None
        models[name] = DistributedDataParallel(Free(), bucket_cap_mb=cap)
        register(models[name])
    interface = INTERFACE if options.mbit else "lo"
    seconds: dict[str, list[float]] = {name: [] for name in models}
    sent: dict[str, list[int]] = {name: [] for name in models}
    for index in range(options.rounds + 3):  # buckets are formed anew after the first, PowerSGD begins with the third
        for name, model in models.items():
            dist.barrier()
            before, begin = sent_bytes(interface), time.perf_counter()
            model().backward()
            model.zero_grad(set_to_none=False)
            dist.barrier()
            if index >= 3:
                seconds[name].append(time.perf_counter() - begin)
                sent[name].append(sent_bytes(interface) - before)
    if options.rank == 0:
        report(options, seconds, sent)
    dist.barrier()
    dist.destroy_process_group()


def report(options: argparse.Namespace, seconds: dict[str, list[float]], sent: dict[str, list[int]]) -> None:
    where = f"{options.mbit} Mbit/s" if options.mbit else "loopback"
    print(f"{options.ranks} ranks, {options.megabytes:g} MB of float32 gradients, {where}, {options.rounds} rounds")
    print(f"{'step':24} {'ms':>8} {'quartiles':>17} {'x fp32':>8} {'MB sent':>9}")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["fp32"], times, strict=True))
        low, middle, high = (1e3 * t for t in statistics.quantiles(times, n=4))
        megabytes = statistics.median(sent[name]) / 1e6
        print(f"{name:24} {middle:8.1f} {low:8.1f} {high:8.1f} {ratio:8.2f} {megabytes:9.2f}")
        if options.json:
            row = {"ranks": options.ranks, "megabytes": options.megabytes, "mbit": options.mbit, "step": name}
            row |= {"ms": round(middle, 2), "x_fp32": round(ratio, 3), "mb_sent": round(megabytes, 3)}
            with options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


# ---- all of them -----------------------------------------------------------------------------------------------------


def run_ranks(options: argparse.Namespace, namespaces: list[str]) -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": INTERFACE if namespaces else "lo"}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(options.ranks):
            inside = ["ip", "netns", "exec", namespaces[rank]] if namespaces else []
            processes.append(subprocess.Popen([*inside, *command_of(rank, options, port)], env=environment))
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.1)
        return int(any(codes))  # of the first that has failed, for which the others would wait
    finally:
        ignore_signals()
        for process in processes:
            process.terminate()
        # torchrun ends its workers first; where there are no namespaces nobody else does.
        end = time.monotonic() + (SECONDS_TO_END if namespaces else SECONDS_OF_TORCHRUN)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, end - time.monotonic()))
            process.kill()


def command_of(rank: int, options: argparse.Namespace, port: int) -> list[str]:
    if not options.script:
        return [sys.executable, __file__, *sys.argv[1:], "--rank", str(rank), "--port", str(port)]
    first, own = address_of(0, options), address_of(rank, options)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", f"--nnodes={options.ranks}"]
    torchrun += [f"--node-rank={rank}", f"--master-addr={first}", f"--master-port={port}", f"--local-addr={own}"]
    return [*torchrun, *options.script]


def ignore_signals() -> None:
    """While things are ended and removed: another signal, as `timeout` sends to a whole group, must not keep them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave(*_: object) -> None:
    ignore_signals()
    sys.exit(1)


def main() -> int:
    options = arguments()
    if options.rank is not None:
        run_rank(options)
        return 0
    for number in SIGNALS:
        signal.signal(number, leave)
    if not options.mbit:
        return run_ranks(options, [])
    if os.geteuid() != 0:
        print("Namespaces need root; --mbit 0 measures over the loopback.", file=sys.stderr)
        return 2
    with network(options) as namespaces:
        return run_ranks(options, namespaces)


if __name__ == "__main__":
    sys.exit(main())
