# SPDX-License-Identifier: Apache-2.0
"""bench/collectives_network.py: what it runs in its network, and that nothing of either is left, whatever happens."""

import os
import shutil
import signal
import subprocess
import sys
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
names = [line.split(":")[0].strip() for line in open("/proc/self/net/dev").read().splitlines()[2:]]
name = os.environ["GLOO_SOCKET_IFNAME"]
line = f"sum {x[0].item()} of {dist.get_world_size()} over {name} of {' '.join(sorted(names))}\\n"
os.write(1, line.encode())  # at once: the processes share their output
"""
WAITS = """
import os
import signal
import time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.write(1, f"process {os.getpid()}\\n".encode())
time.sleep(600)
"""

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def can_make_namespaces():
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        return False
    name = f"fmtest{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode:
        return False
    kinds = ["ip", "-n", name, "link", "add", "bridge0", "type", "bridge"]
    is_possible = subprocess.run(kinds, check=False, capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", name], check=False)
    return is_possible


needs_namespaces = pytest.mark.skipif(not can_make_namespaces(), reason="network namespaces need root, ip and tc")


@pytest.fixture
def begin(tmp_path):
    """Begins a script in the network; what is still there after the test is ended in its own way."""
    processes = []

    def begin(text, *options):
        script = tmp_path / "script.py"
        script.write_text(text)
        command = [sys.executable, SCRIPT, "--ranks=2", *options, "--", script]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return processes[-1]

    yield begin
    for process in processes:
        process.terminate()
        process.communicate(timeout=60)


def namespaces_of(process):
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in names if name.startswith(f"fm{process.pid}-")]


def is_running(process):
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_script_runs_over_the_loopback(begin):
    process = begin(SUMS_RANKS, "--mbit=0")
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert shown.count("sum 3.0 of 2 over lo of") == 2


@needs_namespaces
def test_a_script_runs_with_a_namespace_for_each_process(begin):
    process = begin(SUMS_RANKS, "--mbit=1000")
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert shown.count("sum 3.0 of 2 over eth0 of eth0 lo") == 2
    assert namespaces_of(process) == []


@needs_namespaces
def test_namespaces_and_processes_go_when_it_is_ended(begin):
    """Processes that torchrun cannot end in its own way, too."""
    process = begin(WAITS, "--mbit=1000")
    waiting = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    assert len(namespaces_of(process)) == 3
    assert all(map(is_running, waiting))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert namespaces_of(process) == []
    end = time.monotonic() + 10
    while any(map(is_running, waiting)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_running, waiting))


@needs_namespaces
def test_namespaces_go_when_a_script_fails(begin):
    process = begin("raise SystemExit(3)", "--mbit=1000")
    process.communicate(timeout=120)
    assert process.returncode == 1
    assert namespaces_of(process) == []
