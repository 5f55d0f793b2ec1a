# SPDX-License-Identifier: Apache-2.0
"""bench/collectives_network.py: what it runs in its network, and that nothing of either is left, whatever happens."""

import argparse
import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

SCRIPT = Path(__file__).parent.parent / "bench" / "collectives_network.py"
SUMS_RANKS = """
import os
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
x = torch.full((3,), dist.get_rank() + 1.0)
dist.all_reduce(x)
interface, namespace = os.environ["GLOO_SOCKET_IFNAME"], os.readlink("/proc/self/ns/net")
line = f"sum {x[0].item()} of {dist.get_world_size()} over {interface} in {namespace}\\n"
os.write(1, line.encode())  # at once: the processes share their output
dist.destroy_process_group()
"""
WAITS = """
import os
import signal
import time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.write(1, f"process {os.getpid()}\\n".encode())
time.sleep(600)
"""

ONE_FAILS = """
import os
import time

if os.environ["RANK"] == "1":
    raise SystemExit(3)
time.sleep(600)
"""

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.skipif(sys.platform != "linux", reason="the loopback has the name and the namespaces of Linux"),
]


@functools.cache
def can_make_namespaces():
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        return False
    name = f"fmtest{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode:
        return False
    bridge = ["ip", "-n", name, "link", "add", "bridge0", "type", "bridge"]
    limit = ["tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", "1mbit", "burst", "256kb", "latency", "200ms"]
    commands = bridge, ["ip", "netns", "exec", name, *limit]
    is_possible = all(subprocess.run(words, check=False, capture_output=True).returncode == 0 for words in commands)
    subprocess.run(["ip", "netns", "del", name], check=False)
    return is_possible


@pytest.fixture
def namespaces():
    if not can_make_namespaces():
        pytest.skip("network namespaces need root, ip, tc, and a kernel with bridges and tbf")


@pytest.fixture
def begin(tmp_path):
    """Begins a script in the network; what is still there after the test, or two minutes, is ended in its own way."""
    processes, timers = [], []

    def begin(text, *options):
        script = tmp_path / "script.py"
        script.write_text(text)
        command = [sys.executable, SCRIPT, "--ranks=2", *options, "--", script]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        timers.append(threading.Timer(120, processes[-1].terminate))
        timers[-1].start()
        return processes[-1]

    yield begin
    for process, timer in zip(processes, timers, strict=True):
        timer.cancel()
        process.terminate()
        process.communicate(timeout=60)


def namespaces_of(process):
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in names if name.startswith(f"fm{process.pid}-")]


def own_namespace():
    return str(Path("/proc/self/ns/net").readlink())


def is_running(process):
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_script_runs_over_the_loopback(begin):
    process = begin(SUMS_RANKS, "--mbit=0")
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert shown.splitlines() == [f"sum 3.0 of 2 over lo in {own_namespace()}"] * 2


def test_a_script_runs_with_a_namespace_for_each_process(begin, namespaces):
    process = begin(SUMS_RANKS, "--mbit=1000")
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    places = [line.removeprefix("sum 3.0 of 2 over eth0 in ") for line in shown.splitlines()]
    assert all(place.startswith("net:[") for place in places), shown
    assert len({*places, own_namespace()}) == 3
    assert namespaces_of(process) == []


def assert_ends_with_its_processes(process):
    """When it gets a signal; processes, too, that ignore that of torchrun."""
    lines = [process.stdout.readline() for _ in range(2)]
    assert all(line.startswith("process ") for line in lines), process.communicate(timeout=60)[1]
    waiting = [int(line.split()[1]) for line in lines]
    assert all(map(is_running, waiting))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 1
    end = time.monotonic() + 10
    while any(map(is_running, waiting)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_running, waiting))


def test_namespaces_and_processes_go_when_it_is_ended(begin, namespaces):
    process = begin(WAITS, "--mbit=1000")
    assert_ends_with_its_processes(process)
    assert namespaces_of(process) == []


@pytest.mark.slow  # torchrun gives its processes half a minute
def test_processes_on_the_loopback_go_when_it_is_ended(begin):
    assert_ends_with_its_processes(begin(WAITS, "--mbit=0"))


def test_no_rank_waits_for_one_that_has_failed_and_namespaces_go(begin):
    has_namespaces = can_make_namespaces()
    process = begin(ONE_FAILS, f"--mbit={1000 * has_namespaces}")
    process.communicate(timeout=110)
    assert process.returncode == 1
    assert not has_namespaces or namespaces_of(process) == []


# ---- signals while it cleans up --------------------------------------------------------------------------------------


@pytest.fixture
def network_script():
    """The script as a module that answers signals as it does where it runs."""
    spec = importlib.util.spec_from_file_location("collectives_network", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = {number: signal.signal(number, module.leave) for number in module.SIGNALS}
    yield module
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_while_namespaces_are_removed_keeps_none(network_script, monkeypatch):
    removed = []

    def run(words, **how):
        removed.append(words)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(network_script, "ip", lambda *words: None)
    monkeypatch.setattr(network_script, "end_processes_in", lambda namespace: None)
    monkeypatch.setattr(network_script.subprocess, "run", run)
    with network_script.network(argparse.Namespace(ranks=2, mbit=1)) as names:
        assert len(names) == 2
    assert [words[:3] for words in removed] == [["ip", "netns", "del"]] * 3
    assert {words[3] for words in removed} > set(names)


def test_a_signal_while_processes_are_ended_keeps_none(network_script, monkeypatch):
    calls = []

    class Process:
        def __init__(self, *_, **how):
            self.poll = self.wait = lambda *_: 0
            self.kill = lambda: calls.append("kill")

        def terminate(self):
            calls.append("terminate")
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(network_script.subprocess, "Popen", Process)
    assert network_script.run_ranks(argparse.Namespace(ranks=2, mbit=0, script=["x.py"]), []) == 0
    assert calls == ["terminate", "terminate", "kill", "kill"]
