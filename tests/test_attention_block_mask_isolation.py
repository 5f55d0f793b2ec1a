# SPDX-License-Identifier: Apache-2.0
"""attention with a block mask: what is visited, and what may reach a row or a gradient."""

import dataclasses
import math
import subprocess
import sys
import time

import pytest
import torch
from test_attention_backward import on
from test_attention_block_mask import BACKENDS, case_of, results

from fmkernels import create_block_mask
from fmkernels.testing import Case


def diagonal_blocks(b, h, i, j):
    return i // 128 == j // 128


# ---- what is visited -------------------------------------------------------------------------------------------------

UNREADABLE = """
import ctypes, mmap, sys, torch
from fmkernels import attention, create_block_mask

seq, head_dim, page = 1536, 64, mmap.PAGESIZE
memory = [mmap.mmap(-1, 4 * seq * head_dim) for _ in "kv"]
q = torch.randn(1, 256, 1, head_dim)
k, v = (torch.frombuffer(m, dtype=torch.float32).view(1, seq, 1, head_dim) for m in memory)
for t in (k, v):
    t.normal_()
hidden = (384, 1152)  # blocks of 96 keys, as the backward takes them, and of 128 end here
mask = create_block_mask(lambda b, h, i, j: (j < hidden[0]) | (j >= hidden[1]), None, None, 256, seq)
if sys.argv[1] == "hidden":
    first, last = hidden
else:
    first, last = 0, hidden[0]
protect = ctypes.CDLL(None, use_errno=True).mprotect
for t in (k, v):
    begin = ctypes.c_void_p(t.data_ptr() + 4 * first * head_dim)
    assert protect(begin, ctypes.c_size_t(4 * (last - first) * head_dim), 0) == 0
q, k, v = (t.requires_grad_() for t in (q, k, v))
o, lse = attention(q, k, v, block_mask=mask, return_lse=True)
print("forward", flush=True)
torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
print("backward", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect by ctypes")
@pytest.mark.parametrize("unreadable", ["hidden", "visible"])
def test_keys_of_no_listed_block_are_not_read(unreadable):
    """Their pages may not be read; those of the others may not either in the run that shows that this would end it."""
    run = subprocess.run([sys.executable, "-c", UNREADABLE, unreadable], capture_output=True, text=True, check=False)
    if unreadable == "hidden":
        assert run.stdout.split() == ["forward", "backward"], run.stderr
    else:
        assert run.stdout == ""
        assert run.returncode == -11 or "AddressSanitizer: SEGV" in run.stderr, run.stderr


def test_work_follows_the_listed_blocks():
    """32 of 1024 blocks, one thread, processor time: a quarter of the time without a mask is far from the limit."""
    case = Case("work", batch=1, heads=1, kv_heads=1, seq_q=4096, seq_k=4096, head_dim=64)
    diagonal = create_block_mask(diagonal_blocks, None, None, 4096, 4096)
    assert diagonal.column_indices.numel() == 32
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = []
    for mask in (None, diagonal):
        masked = dataclasses.replace(case, block_mask=mask)
        times = []
        for _ in range(3):
            begin = time.process_time()
            results(masked)
            times.append(time.process_time() - begin)
        seconds.append(min(times))
    torch.set_num_threads(threads)
    assert seconds[1] < seconds[0] / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_products_on_cuda_are_those_of_the_listed_blocks(head_dim, dtype):
    """In the forward, and in the pass over queries and those over keys: to the product."""
    for backend in (backend for backend in BACKENDS if backend.name == "emulated"):
        import emulator

        sizes = {"batch": 1, "heads": 2, "kv_heads": 1, "seq_q": 384, "seq_k": 384, "head_dim": head_dim}
        products = {}
        for name in ("everything", "listed"):
            case = case_of(diagonal_blocks if name == "listed" else name, 128, dtype=dtype, **sizes)
            with emulator.watch(counters=True) as watched:
                results(case, backend=backend)
            products[name] = [launch["totals"]["mma_flops"] for launch in watched.launches]
        assert sum(count > 0 for count in products["listed"]) >= 3
        assert [3 * count for count in products["listed"]] == products["everything"]


# ---- what may reach a row --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["k", "v", "q", "grad_o"])
@pytest.mark.parametrize("name", ["dilated", "blocks", "documents", "stripes", "one short row"])
def test_poison_reaches_what_sees_it_and_nothing_else(name, where, poison, backend):
    """Bits of all other rows stay: in listed blocks and in others, in the forward and in the backward."""
    case = on(backend, case_of(name, batch=1, heads=4, kv_heads=4, seq_q=200, seq_k=230, softcap=2.0))
    (q, k, v), _ = case.inputs(backend.device)
    grad_o = torch.randn(q.shape, generator=torch.Generator().manual_seed(0)).to(q)
    visible = case.block_mask.to_dense()[0].expand(4, -1, -1)
    head, place = 1, 130

    def by_head(q, k, v, grad_o):  # [heads, queries or keys, ..]
        o, lse, *grads = results(case, [q, k, v], grad_o, backend)
        return [lse[0], *(t[0].transpose(0, 1) for t in (o, *grads))]

    clean = by_head(q, k, v, grad_o)
    bad = {"q": q.clone(), "k": k.clone(), "v": v.clone(), "grad_o": grad_o.clone()}
    bad[where][0, place, head, 5] = poison
    actual = by_head(**bad)

    rows = torch.zeros(4, 200, dtype=torch.bool)  # that it may reach
    if where in "kv":
        rows[head] = visible[head, :, place]
    else:
        rows[head, place] = True
    assert 0 < rows.sum() < 200
    keys = (visible & rows[:, :, None]).any(1)  # that these rows see
    for t, before, reached in zip(actual, clean, (rows, rows, rows, keys, keys), strict=True):
        assert torch.equal(t[~reached], before[~reached])
    if math.isnan(poison):
        assert actual[1][rows].isnan().any() == (where != "grad_o")
        assert actual[2][rows].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_a_key_that_no_row_sees_reaches_nothing(softcap, backend):
    """It lies between keys that all rows see."""
    case = on(backend, case_of("one hidden key", softcap=softcap))
    (q, k, v), _ = case.inputs(backend.device)
    clean = results(case, backend=backend)
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[:, 70] = bad_v[:, 70] = math.nan
    for actual, expected in zip(results(case, [q, bad_k, bad_v], None, backend), clean, strict=True):
        assert torch.equal(actual, expected)
    assert not clean[3][:, 70].any()
    assert not clean[4][:, 70].any()
