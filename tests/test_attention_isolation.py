# SPDX-License-Identifier: Apache-2.0
"""attention: what may reach a row of the result, and that its bits depend on nothing else."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_attention import BACKENDS, EVERYTHING, KINDS

from fmkernels import attention, reference
from fmkernels.testing import Case, assert_attention

# ---- NaN and infinity reach what depends on them and nothing else ----------------------------------------------------


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("window", [(-1, 0), (20, 5), (0, 0), (-1, 3), (70, -1)])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(4, 700), (8, 40), (97, 97), (150, 290), (60, 20)])
def test_a_poisoned_key_reaches_the_rows_that_see_it(seq_q, seq_k, window, poison, backend, dtype):
    if backend.name == "emulated" and dtype == torch.float32 and ((seq_q, seq_k) != (97, 97) or window[1] != 0):
        pytest.skip("several times as long as in half; its masks are the same, and its products are tested here")
    (q, k, v), _ = Case("poison", batch=1, heads=1, kv_heads=1, seq_q=seq_q, seq_k=seq_k, dtype=dtype).inputs(
        backend.device
    )
    clean = backend.run(attention, q, k, v, window=window, return_lse=True)
    diagonal = torch.arange(seq_q) + seq_k - seq_q
    for key in sorted({0, 1, 15, 16, 63, 64, 127, 128, 511, 512, seq_k // 2, seq_k - 2, seq_k - 1} & set(range(seq_k))):
        left, right = (seq_k + seq_q if side < 0 else side for side in window)
        sees = (key >= diagonal - left) & (key <= diagonal + right)
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[:, key] = bad_v[:, key] = poison
        o, lse = backend.run(attention, q, bad_k, bad_v, window=window, return_lse=True)
        assert torch.equal(o[:, ~sees], clean[0][:, ~sees]), f"key {key} leaks"
        assert torch.equal(lse[:, :, ~sees], clean[1][:, :, ~sees]), f"key {key} leaks"
        if math.isnan(poison):
            assert o[:, sees].isnan().all()
            assert lse[:, :, sees].isnan().all()


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("seq_q", [3, 8, 50])
def test_a_poisoned_query_reaches_its_own_row(seq_q, poison, backend, dtype):
    args, kwargs = Case("poison", seq_q=seq_q, softcap=3.0, bias="bhqk", dtype=dtype).inputs(backend.device)
    clean = backend.run(attention, *args, **kwargs, return_lse=True)
    bad = args[0].clone()
    bad[1, seq_q // 2, 2] = poison
    o, lse = backend.run(attention, bad, *args[1:], **kwargs, return_lse=True)
    others = torch.ones(2, seq_q, 4, dtype=torch.bool)
    others[1, seq_q // 2, 2] = False
    assert torch.equal(o[others], clean[0][others])
    assert torch.equal(lse.transpose(1, 2)[others], clean[1].transpose(1, 2)[others])
    assert_attention(backend, (o, lse), reference.attention, bad, *args[1:], **kwargs)


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
@pytest.mark.parametrize("seq_q", [2, 50])
def test_a_poisoned_bias_entry_reaches_its_own_row(seq_q, backend, dtype):
    args, kwargs = Case("poison", seq_q=seq_q, bias="bhqk", dtype=dtype).inputs(backend.device)
    clean = backend.run(attention, *args, **kwargs)
    kwargs["bias"][0, 1, 1, 7] = math.nan
    o = backend.run(attention, *args, **kwargs)
    assert o[0, 1, 1].isnan().all()
    o[0, 1, 1] = clean[0, 1, 1]
    assert torch.equal(o, clean)


# ---- the same bits, whatever the surroundings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [Case("tiled", seq_q=130, seq_k=300, **EVERYTHING), Case("decode", seq_q=2, seq_k=1100)], ids=str
)
def test_threads_change_no_bits(case):
    args, kwargs = case.inputs()
    results = []
    for num_threads in (1, 2, 3, 1):
        torch.set_num_threads(num_threads)
        results.append(attention(*args, **kwargs, return_lse=True))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@given(
    batch=st.integers(2, 5), seq_q=st.integers(1, 60), seq_k=st.integers(1, 200), causal=st.booleans(), data=st.data()
)
def test_a_sequence_has_the_same_bits_in_every_batch(batch, seq_q, seq_k, causal, data):
    backend = data.draw(st.sampled_from(BACKENDS))
    dtype = data.draw(st.sampled_from(backend.attention_dtypes))
    case = Case("batch", batch=batch, seq_q=seq_q, seq_k=seq_k, causal=causal, dtype=dtype, softcap=5.0)
    args, kwargs = case.inputs(backend.device)
    whole = backend.run(attention, *args, **kwargs, return_lse=True)
    index = data.draw(st.integers(0, batch - 1))
    alone = backend.run(attention, *(t[index : index + 1] for t in args), **kwargs, return_lse=True)
    assert all(torch.equal(a[index], b[0]) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
@pytest.mark.parametrize("dropped", [1, 5, 6, 17, 24, 96, 130])
def test_a_row_has_the_same_bits_in_every_tile(dropped, backend, dtype):
    """Causal rows see the same keys when the queries before them are left out: only their place in a tile moves."""
    args, _ = Case("shift", seq_q=200, seq_k=230, dtype=dtype).inputs(backend.device)
    whole = backend.run(attention, *args, causal=True, window=(100, 0), return_lse=True)
    part = backend.run(attention, args[0][:, dropped:], *args[1:], causal=True, window=(100, 0), return_lse=True)
    assert torch.equal(whole[0][:, dropped:], part[0])
    assert torch.equal(whole[1][:, :, dropped:], part[1])


def test_the_portable_kernels_keep_subnormal_halves_where_subnormal_floats_are_flushed():
    program = "import torch; from fmkernels import attention; torch.set_flush_denormal(True); "
    program += "v = torch.full((1, 1, 1, 8), 1e-6, dtype=torch.float16); assert torch.equal(attention(v, v, v), v)"
    environment = {**os.environ, "FMKERNELS_CPU_ISA": "generic"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)


@pytest.mark.skipif("FMKERNELS_CPU_ISA" in os.environ, reason="this is that run")
def test_the_portable_kernels():
    """The generic instruction set is chosen when the library is loaded, hence another process."""
    here = Path(__file__).parent
    files = [here / f"test_{name}.py" for name in ("attention", "attention_dropout", "attention_isolation", "dtype")]
    chosen = "(forward_matches and (everything or window or plain or 513)) or poisoned or conversion or drops_the_same"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files), "-k", chosen]
    run = subprocess.run(command, env={**os.environ, "FMKERNELS_CPU_ISA": "generic"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout
