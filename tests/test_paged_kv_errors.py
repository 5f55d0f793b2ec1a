# SPDX-License-Identifier: Apache-2.0
"""paged_kv: every wrong argument is one sentence, the ops refuse by themselves, and torch sees the ops as its own."""

import pytest
import torch
from paged_cases import PagedCase, ids
from torch.library import opcheck

from fmkernels import _library, paged_kv

CACHE, K, SLOTS = torch.zeros(4, 2, 2, 16), torch.zeros(3, 2, 16), torch.arange(3)
INT8, SCALE, ANGLES, POSITIONS = CACHE.to(torch.int8), torch.ones(()), torch.zeros(5, 8), torch.arange(3)
TABLE, SEQLENS, CU = (
    torch.zeros(2, 2, dtype=torch.int32),
    torch.ones(2, dtype=torch.int32),
    torch.tensor([0, 1, 3]).int(),
)
Q, PAGES = torch.zeros(3, 4, 16), torch.tensor([1, 2], dtype=torch.int32)
RIGHT = {
    "append": {"k": K, "v": K, "k_cache": CACHE, "v_cache": CACHE, "slot_mapping": SLOTS},
    "attend": {"q": Q, "k_cache": CACHE, "v_cache": CACHE, "block_table": TABLE, "cache_seqlens": SEQLENS,
               "cu_seqlens_q": CU},
    "gather": {"cache": CACHE, "block_table": TABLE, "cu_seqlens": CU, "num_tokens": 3},
    "copy_pages": {"cache": CACHE, "src": PAGES, "dst": PAGES - 1},
    "swap_out": {"cache": CACHE, "pages": PAGES, "host_buffer": CACHE[:2]},
    "swap_in": {"cache": CACHE, "pages": PAGES, "host_buffer": CACHE[:2]},
    "compact": {"cache": CACHE, "keep": PAGES},
    "page_table_from_csr": {"indptr": CU, "indices": torch.zeros(3, dtype=torch.int32), "max_pages": 2},
}  # fmt: skip
RIGHT["copy_pages"]["dst"] = torch.tensor([0, 3], dtype=torch.int32)
EXPANDED = CACHE[:, :1].expand(4, 2, 2, 16)
OVERLAPS = "is written and must have a place for each element, got stride 0 in dimension 1."
ROTARY = {"rotary_cos": ANGLES, "rotary_sin": ANGLES, "positions": POSITIONS}


ERRORS = [
    ("append", {"k": None}, TypeError, "k must be a tensor, got NoneType."),
    ("append", {"k": K[0]}, ValueError, "k must be [num_tokens, kv_heads, head_dim], got 2 dimensions [2, 16]."),
    ("append", {"k": K.double()}, ValueError, "k must be float32 or bfloat16 or float16, got float64."),
    ("append", {"v": K.half()}, ValueError, "v must have the dtype of k, float32, got float16."),
    ("append", {"v": K[:2]}, ValueError, "v must have num_tokens 3, got 2."),
    ("append", {"k": K[:, :1]}, ValueError, "k must have the kv_heads of the caches, 2, got 1."),
    ("append", {"k": torch.zeros(3, 2, 32)[..., ::2]}, ValueError,
     "k must have a contiguous last dimension, got stride 2."),
    ("append", {"k_cache": CACHE[0]}, ValueError,
     "k_cache must be [num_pages, page_size, kv_heads, dim], got 3 dimensions [2, 2, 16]."),
    ("append", {"k_cache": CACHE[:, :0]}, ValueError, "k_cache must have a page_size of at least 1, got 0."),
    ("append", {"k_cache": CACHE[..., :4]}, ValueError,
     "k_cache must have a dim that is a multiple of 8 from 8 to 256, got 4."),
    ("append", {"v_cache": CACHE.half()}, ValueError, "v_cache must have the dtype of k_cache, float32, got float16."),
    ("append", {"v_cache": CACHE[:3]}, ValueError, "v_cache must have the num_pages of k_cache, 4, got 3."),
    ("append", {"k_cache": INT8, "v_cache": INT8}, ValueError, "k_scale must be given for an int8 cache."),
    ("append", {"k_scale": SCALE}, ValueError, "k_scale must be None for a cache of float32, which needs none."),
    ("append", {"k_cache": INT8, "v_cache": INT8, "k_scale": torch.ones(3), "v_scale": SCALE}, ValueError,
     "k_scale must be one number, [kv_heads] or [num_pages, page_size, kv_heads] of k_cache, "
     "[2] or [4, 2, 2], got [3]."),
    ("append", {"slot_mapping": SLOTS.int()}, ValueError, "slot_mapping must be int64, got int32."),
    ("append", {"slot_mapping": SLOTS[:2]}, ValueError, "slot_mapping must have num_tokens 3, got 2."),
    ("append", {"slot_mapping": SLOTS + 6}, ValueError, "slot_mapping must be below the 8 slots of the cache, got 8."),
    ("append", {"rotary_cos": ANGLES}, ValueError, "rotary_cos, rotary_sin and positions must be given together."),
    ("append", {"q": K}, ValueError, "q must be None without rotary_cos: it is there to be rotated."),
    ("append", {**ROTARY, "rotary_cos": ANGLES.half()}, ValueError, "rotary_cos must be float32, got float16."),
    ("append", {**ROTARY, "rotary_sin": ANGLES[:4]}, ValueError,
     "rotary_sin must have the shape of rotary_cos, [5, 8], got [4, 8]."),
    ("append", {**ROTARY, "positions": POSITIONS + 3}, ValueError, "positions must be from 0 to 4, got 5."),
    ("append", {"v_cache": EXPANDED}, ValueError, f"v_cache {OVERLAPS}"),
    ("append", {"k_cache": INT8, "v_cache": INT8, "v_scale": SCALE, "k_scale": torch.ones(4, 1, 2).expand(4, 2, 2)},
     ValueError, f"k_scale {OVERLAPS}"),
    ("append", {**ROTARY, "q": Q[:, :1].expand(3, 4, 16)}, ValueError, f"q {OVERLAPS}"),
    ("append", {**ROTARY, "interleaved": 1}, TypeError, "interleaved must be True or False, got int."),
    ("append", {"k": K.clone().requires_grad_()}, ValueError,
     "k must not require a gradient: none is computed for it."),
    ("attend", {"q": Q.clone().requires_grad_()}, ValueError,
     "q must not require a gradient: none is computed for it."),
    ("attend", {"q": Q[0]}, ValueError, "q must be [total_q, heads, head_dim], got 2 dimensions [4, 16]."),
    ("attend", {"q": Q[..., :8]}, ValueError, "k_cache must have the head_dim of q, 8, got 16."),
    ("attend", {"q": Q[:, :3]}, ValueError, "k_cache has 2 kv_heads, which must divide the 3 heads of q."),
    ("attend", {"block_table": TABLE.long()}, ValueError, "block_table must be int32, got int64."),
    ("attend", {"block_table": TABLE[0]}, ValueError, "block_table must be [batch, max_pages], got 1 dimensions [2]."),
    ("attend", {"block_table": TABLE - 1}, ValueError,
     "block_table must name pages from 0 to 3, got -1 for request 0."),
    ("attend", {"block_table": TABLE + 4}, ValueError, "block_table must name pages from 0 to 3, got 4 for request 0."),
    ("attend", {"cache_seqlens": SEQLENS[:1]}, ValueError,
     "cache_seqlens must have the batch of block_table, 2, got 1."),
    ("attend", {"cache_seqlens": SEQLENS * 5}, ValueError,
     "request 0 must have from 0 to 4 tokens, max_pages * page_size, got 5."),
    ("attend", {"cache_seqlens": -SEQLENS}, ValueError,
     "request 0 must have from 0 to 4 tokens, max_pages * page_size, got -1."),
    ("attend", {"cu_seqlens_q": None}, ValueError, "q must have one query a request, 2, without cu_seqlens_q, got 3."),
    ("attend", {"cu_seqlens_q": CU + 1}, ValueError, "cu_seqlens_q must begin with 0, got 1."),
    ("attend", {"cu_seqlens_q": ids(0, 4, 3)}, ValueError, "cu_seqlens_q must not decrease, got 4 before 3."),
    ("attend", {"cu_seqlens_q": ids(0, 1, 2)}, ValueError, "cu_seqlens_q must end with total_q, 3, got 2."),
    ("attend", {"tree_mask": torch.zeros(2, 1).int()}, ValueError, "tree_mask must have the total_q of q, 3, got 2."),
    ("attend", {"window": (1, -2)}, ValueError, "window[1] must be at least -1, got -2."),
    ("attend", {"sinks": torch.zeros(3)}, ValueError, "sinks must have heads 4, got 3."),
    ("attend", {"softcap": -1.0}, ValueError, "softcap must not be negative, got -1.0."),
    ("gather", {"num_tokens": 2}, ValueError, "cu_seqlens must end with num_tokens, 2, got 3."),
    ("gather", {"dtype": torch.int8}, ValueError, "dtype must be float32 or bfloat16 or float16, got torch.int8."),
    ("gather", {"block_table": TABLE + 9}, ValueError, "block_table must name pages from 0 to 3, got 9 for request 0."),
    ("copy_pages", {"src": ids(1, 4)}, ValueError, "src must be from 0 to 3, got 4."),
    ("copy_pages", {"dst": ids(0, -1)}, ValueError, "dst must be from 0 to 3, got -1."),
    ("copy_pages", {"dst": ids(0, 2)}, ValueError, "dst must not name a page of src, got 2."),
    ("copy_pages", {"dst": ids(0, 0)}, ValueError, "dst must not name a page twice, got 0."),
    ("copy_pages", {"dst": ids(0)}, ValueError, "dst must have as many pages as src, 2, got 1."),
    ("copy_pages", {"cache": CACHE.flatten()}, ValueError,
     "cache must be [num_pages, ...] with 2 to 5 dimensions, got [256]."),
    ("copy_pages", {"cache": EXPANDED}, ValueError, f"cache {OVERLAPS}"),
    ("compact", {"cache": EXPANDED}, ValueError, f"cache {OVERLAPS}"),
    ("swap_in", {"cache": EXPANDED}, ValueError, f"cache {OVERLAPS}"),
    ("swap_out", {"host_buffer": EXPANDED}, ValueError, f"host_buffer {OVERLAPS}"),
    ("swap_out", {"host_buffer": CACHE[:1]}, ValueError, "host_buffer must hold 2 pages, got 1."),
    ("swap_out", {"host_buffer": CACHE[:2].half()}, ValueError,
     "host_buffer must have the dtype of cache, float32, got float16."),
    ("swap_in", {"host_buffer": CACHE[:2, :1]}, ValueError,
     "host_buffer must have pages as those of cache, [2, 2, 16], got [2, 1, 2, 16]."),
    ("swap_in", {"pages": ids(1, 1)}, ValueError, "pages must not name a page twice, got 1."),
    ("compact", {"keep": ids(2, 1)}, ValueError, "keep must ascend, got 2 before 1."),
    ("compact", {"keep": torch.zeros(2)}, ValueError, "keep must be int32, got float32."),
    ("page_table_from_csr", {"max_pages": 1}, ValueError, "max_pages must be at least the longest list, 2, got 1."),
    ("page_table_from_csr", {"indptr": ids(0, 2)}, ValueError, "indptr must end with the number of indices, 3, got 2."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "wrong", "error", "sentence"), ERRORS)
def test_wrong_arguments(name, wrong, error, sentence):
    with pytest.raises(error) as raised:
        getattr(paged_kv, name)(**{**RIGHT[name], **wrong})
    assert str(raised.value) == f"paged_kv.{name}: {sentence}"


@pytest.mark.parametrize("name", RIGHT)
def test_right_arguments(name):
    getattr(paged_kv, name)(**RIGHT[name])


@pytest.mark.parametrize("name", RIGHT)
def test_the_checks_before_a_call_let_right_ones_pass(name, monkeypatch):
    """FMKERNELS_CHECK=1: the sentences come before the op, and so they must not stop what is right."""
    monkeypatch.setattr(_library, "check_values", True)
    getattr(paged_kv, name)(**RIGHT[name])


HOSTILE = [torch.zeros(()), torch.zeros(4), torch.zeros(0), K, Q, CACHE, CACHE.half(), CACHE.double(), TABLE, SEQLENS]
HOSTILE += [CACHE[:, :, :1], CACHE[..., ::2], TABLE.long(), SLOTS, CU[:1], CACHE.to_sparse(), torch.zeros(4, 2, 2, 12)]
SHRUNK = torch.zeros(4, 2, 2, 16)
SHRUNK.untyped_storage().resize_(64)


def raw(name):
    """The op and its right arguments by position, as the public function passes them."""
    calls = []
    op = getattr(_library.ops, f"paged_kv_{name}")
    setattr(_library.ops, f"paged_kv_{name}", lambda *args: calls.append(args) or op(*args))
    try:
        getattr(paged_kv, name)(**RIGHT[name])
    finally:
        setattr(_library.ops, f"paged_kv_{name}", op)
    return op, list(calls[0])


@pytest.mark.parametrize("name", RIGHT)
def test_the_ops_themselves_refuse_or_stay_inside(name):
    """Whatever tensor comes in the place of another: an error, or a result; the sanitizer runs this too."""
    op, args = raw(name)
    refused = 0
    for place, given in enumerate(args):
        if not isinstance(given, torch.Tensor):
            continue
        for hostile in [*HOSTILE, SHRUNK]:
            try:
                op(*args[:place], hostile, *args[place + 1 :])
            except (RuntimeError, TypeError):
                refused += 1
    assert refused > 10


@pytest.mark.parametrize("name", ["append", "attend"])
def test_a_cache_whose_storage_was_shrunk(name):
    op, args = raw(name)
    place = next(i for i, t in enumerate(args) if isinstance(t, torch.Tensor) and t.dim() == 4)
    args[place] = SHRUNK
    with pytest.raises(RuntimeError, match=r"storage of 64 bytes, which does not hold its elements"):
        op(*args)


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_opcheck():
    cache, quantized = torch.randn(4, 2, 2, 16), torch.zeros(4, 2, 2, 16, dtype=torch.int8)
    scales = [torch.zeros(4, 2, 2) for _ in "kv"]
    rotary = (torch.randn(3, 4, 16), ANGLES, ANGLES, POSITIONS, False)
    opcheck(torch.ops.fmkernels.paged_kv_append.default, (K, K, quantized, quantized.clone(), SLOTS, *scales, *rotary))
    attend = (Q, cache, cache.clone(), TABLE, SEQLENS, CU, *[None] * 5, True, -1, -1, 0.25, 0.0)
    opcheck(torch.ops.fmkernels.paged_kv_attend.default, attend)
    opcheck(torch.ops.fmkernels.paged_kv_gather.default, (cache, TABLE, CU, 3, None, torch.float16))
    opcheck(torch.ops.fmkernels.paged_kv_copy_pages.default, (cache, PAGES, ids(0, 3)))
    opcheck(torch.ops.fmkernels.paged_kv_swap_out.default, (cache, PAGES, cache[:2].clone()))
    opcheck(torch.ops.fmkernels.paged_kv_swap_in.default, (cache, PAGES, cache[:2].clone()))
    opcheck(torch.ops.fmkernels.paged_kv_compact.default, (cache, PAGES))
    opcheck(torch.ops.fmkernels.paged_kv_page_table_from_csr.default, (CU, torch.zeros(3, dtype=torch.int32), 2))


def clones(arguments):
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


PREFIX = {"q": Q, "k_cache": CACHE, "v_cache": CACHE, "prefix_pages": PAGES, "prefix_seqlen": SEQLENS[:1] * 3,
          "block_table": TABLE, "cache_seqlens": SEQLENS, "cu_seqlens_q": CU}  # fmt: skip


@pytest.mark.parametrize("name", [*RIGHT, "attend_shared_prefix"])
def test_compile_is_one_graph(name):
    torch._dynamo.reset()
    compiled = {
        "append": torch.compile(paged_kv.append, fullgraph=True, backend="aot_eager"),
        "attend": torch.compile(paged_kv.attend, fullgraph=True, backend="aot_eager"),
        "attend_shared_prefix": torch.compile(paged_kv.attend_shared_prefix, fullgraph=True, backend="aot_eager"),
        "gather": torch.compile(paged_kv.gather, fullgraph=True, backend="aot_eager"),
        "copy_pages": torch.compile(paged_kv.copy_pages, fullgraph=True, backend="aot_eager"),
        "swap_out": torch.compile(paged_kv.swap_out, fullgraph=True, backend="aot_eager"),
        "swap_in": torch.compile(paged_kv.swap_in, fullgraph=True, backend="aot_eager"),
        "compact": torch.compile(paged_kv.compact, fullgraph=True, backend="aot_eager"),
        "page_table_from_csr": torch.compile(paged_kv.page_table_from_csr, fullgraph=True, backend="aot_eager"),
    }[name]
    arguments = clones(RIGHT.get(name, PREFIX))
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.normal_()
    theirs, ours = clones(arguments), clones(arguments)
    results = compiled(**theirs), getattr(paged_kv, name)(**ours)
    assert results[0] is results[1] is None or torch.equal(*results)
    assert all(torch.equal(theirs[n], ours[n]) for n, value in ours.items() if isinstance(value, torch.Tensor))


def test_a_decode_step_exports():
    class Step(torch.nn.Module):
        def forward(self, q, k, v, k_cache, v_cache, slots, table, seqlens):
            paged_kv.append(k, v, k_cache, v_cache, slots)
            return paged_kv.attend(q, k_cache, v_cache, table, seqlens)

    args, _ = PagedCase("step", seqlens=((1, 20), (1, 33))).inputs()
    q, k_cache, v_cache, table, seqlens = args
    last = [(int(table[b, (n - 1) // 16]), (n - 1) % 16) for b, n in enumerate(seqlens.tolist())]
    inputs = (q, torch.randn(2, 2, 16), torch.randn(2, 2, 16), k_cache, v_cache)
    inputs += (torch.tensor([page * 16 + row for page, row in last]), table, seqlens)
    with torch.no_grad():
        program = torch.export.export(Step(), tuple(t.clone() for t in inputs), strict=True)
        expected = Step()(*(t.clone() for t in inputs))
        assert torch.equal(program.module()(*inputs), expected)
