# SPDX-License-Identifier: Apache-2.0
"""PTX that no compiler writes: control flow at its edges, and texts that must end in an Error, never in a crash."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
from conftest import PRELOADED, ROOT

import emulator

HEADER = ".version 9.0\n.target sm_80\n.address_size 64\n"
REGISTERS = ".reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %r<8>; .reg .b64 %l<8>;"
MALLOC = ".extern .func (.param .b64 r) malloc (.param .b64 s);\n.extern .func free (.param .b64 p);\n"


def module(body: str, params: str = ".param .u64 out", before: str = "") -> emulator.Module:
    return emulator.Module(f"{HEADER}{before}.visible .entry k({params}) {{\n{REGISTERS}\n{body}\n}}\n")


def faults() -> list[str]:
    return [report.fault for report in emulator.take_reports()]


# ---- control flow ----------------------------------------------------------------------------------------------------


def test_a_divergent_branch_to_the_next_instruction():
    out = np.zeros((4, 32), np.uint32)
    k = module("""
        ld.param.u64 %l0, [out]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mad.lo.u32 %r1, %r1, 32, %r0;
        setp.lt.u32 %p0, %r0, 7; @%p0 bra NEXT;
        NEXT: mad.wide.u32 %l0, %r1, 4, %l0; st.global.u32 [%l0], %r1; bar.sync 0; ret;""")
    with emulator.watch():
        k.launch("k", 4, 32, [out])
    assert (out.ravel() == np.arange(128)).all()


def test_endless_recursion_without_variables_is_reported():
    module("call f, (); ret;", before=".func f;\n.func f { call f, (); ret; }\n").launch("k", 4, 64, [0])
    assert faults() == ["out of bounds"]


def test_who_sleeps_until_another_block_comes_is_not_stuck():
    """Warp 1 sleeps until block 1, which works for long, sets a flag; warp 0 waits for warp 1 meanwhile."""
    k = module("""
        .shared .align 8 .b64 bar;
        ld.param.u64 %l0, [out]; mov.u32 %r0, %ctaid.x; mov.u32 %r1, %tid.x; setp.ne.u32 %p0, %r0, 0; @%p0 bra WORK;
        setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared.b64 [bar], 32; bar.sync 0;
        setp.lt.u32 %p2, %r1, 32; @%p2 bra WAIT;
        SLEEP: nanosleep.u32 100; ld.volatile.global.u32 %r2, [%l0]; setp.eq.u32 %p0, %r2, 0; @%p0 bra SLEEP;
        mbarrier.arrive.shared.b64 %l1, [bar]; ret;
        WAIT: mbarrier.test_wait.parity.shared.b64 %p0, [bar], 0; @!%p0 bra WAIT; ret;
        WORK: setp.ne.u32 %p1, %r1, 0; @%p1 ret; mov.u32 %r2, 0;
        MORE: add.u32 %r2, %r2, 1; setp.lt.u32 %p0, %r2, 400000; @%p0 bra MORE;
        st.volatile.global.u32 [%l0], 1; ret;""")
    for threads in (1, 2):
        with emulator.watch(threads=threads, counters=False):
            k.launch("k", 2, 64, [np.zeros(1, np.uint32)])


def test_who_sleeps_between_tries_of_a_wait_in_vain_is_stuck():
    module("""
        .shared .align 8 .b64 bar;
        mbarrier.init.shared.b64 [bar], 2; mbarrier.arrive.shared.b64 %l1, [bar];
        WAIT: nanosleep.u32 100; mbarrier.test_wait.parity.shared.b64 %p0, [bar], 0; @!%p0 bra WAIT; ret;
        """).launch("k", 1, 1, [0])
    assert faults() == ["deadlock"]


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_that_one_block_frees_and_another_gets_is_new():
    out = np.zeros(8, np.uint32)
    k = module(
        """
        ld.param.u64 %l0, [out]; mov.u32 %r0, %ctaid.x; mad.wide.u32 %l0, %r0, 4, %l0;
        { .param .b64 s; .param .b64 r; st.param.b64 [s], 64; call (r), malloc, (s); ld.param.b64 %l1, [r]; }
        ld.u32 %r1, [%l1]; st.global.u32 [%l0], %r1; st.u32 [%l1], %r0; st.u8 [%l1+4], %r0;
        { .param .b64 s; st.param.b64 [s], %l1; call free, (s); }
        ret;""",
        before=MALLOC,
    )
    with emulator.watch():
        k.launch("k", 8, 1, [out])
    assert (out == 0xFFFFFFFF).all()  # as all new memory


def test_launches_from_two_threads_on_views_that_begin_alike():
    k = module(
        """
        ld.param.u64 %l0, [out]; ld.param.u32 %r0, [last]; mov.u32 %r1, 0;
        MORE: add.u32 %r1, %r1, 1; setp.lt.u32 %p0, %r1, 100000; @%p0 bra MORE;
        mad.wide.u32 %l0, %r0, 4, %l0; st.global.u32 [%l0], %r1; ret;""",
        ".param .u64 out, .param .u32 last",
    )
    x = np.zeros(100, np.uint32)
    with emulator.watch(counters=False):
        launches = [threading.Thread(target=k.launch, args=("k", 1, 1, [x[:n], n - 1])) for n in (10, 100, 20, 90)]
        for launch in launches:
            launch.start()
        for launch in launches:
            launch.join()
    assert np.flatnonzero(x).tolist() == [9, 19, 89, 99]


def test_a_large_variable_takes_no_more_memory_than_is_touched():
    k = module("mov.u64 %l0, x; st.global.u8 [%l0+8000000000], 1; ret;", before=".global .b8 x[8589934592];\n")
    with emulator.watch():
        k.launch("k", 1, 1, [0])


LARGE_BLOCKS = """
import resource, sys
import emulator

emulator.configure(threads=2)
k = emulator.Module(sys.argv[1])
most = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (1 << 28)  # and a block takes 2^29
resource.setrlimit(resource.RLIMIT_AS, (most, most))
k.launch("k", 4, 1024, [])
print(emulator.take_reports()[0].text)
"""


@pytest.mark.skipif(bool(PRELOADED), reason="sanitizers take all addresses")
def test_blocks_that_take_more_memory_than_there_is(run):
    text = HEADER + ".visible .entry k() { .local .b8 x[500000]; st.local.u8 [x], 1; ret; }"
    status, output, errors = run(sys.executable, "-c", LARGE_BLOCKS, text, PYTHONPATH=str(ROOT))
    assert status == 0, errors
    assert "take more memory than there is" in output


# ---- texts that are wrong --------------------------------------------------------------------------------------------

CALLED = ".func f(.reg .{type} %q) {{ ret; }}\n"


@pytest.mark.parametrize(
    ("body", "before"),
    [
        ("call f, (%p0);", CALLED.format(type="pred")),
        ("call f, (%p0);", CALLED.format(type="b32")),
        ("mov.pred %p0, {%h0, %h1};", ""),
        ("mov.pred {%h0, %h1}, %p0;", ""),
        ("selp.pred %p0, %p1, %p2, %p3;", ""),
        ("slct.pred.s32 %p0, %p1, %p2, %r0;", ""),
        ("brev.pred %p0, %p1;", ""),
        ("bfi.pred %p0, %p1, %p2, %r0, %r1;", ""),
        ("ld.global.pred %p0, [%l0];", ""),
    ],
)
def test_predicates_are_no_numbers(body, before):
    with pytest.raises(emulator.Error, match="pred"):
        module(body + " ret;", before=before).kernel("k")


def test_an_initialiser_that_is_nested_too_deeply():
    text = HEADER + ".global .u32 x = " + "1(" * 100_000 + "x" + ")" * 100_000 + ";"
    with pytest.raises(emulator.Error, match="nested too deeply"):
        emulator.Module(text)


def test_a_kernel_that_is_declared_with_other_parameters_than_it_is_defined_with():
    text = HEADER + ".visible .entry k();\n.visible .entry k(.param .u64 a, .param .f32 b) { ret; }\n"
    assert [param.type for param in emulator.Module(text).kernel("k").params] == ["u64", "f32"]


@pytest.mark.parametrize("text", ["\u00e9", '.file 1 "\u00e9', "\u20ac" * 100, ".global .u32 \u00e9;", "\0\x01\x7f"])
def test_text_that_is_not_ascii(text):
    with pytest.raises(emulator.Error):
        emulator.Module(HEADER + text)
