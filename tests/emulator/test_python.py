# SPDX-License-Identifier: Apache-2.0
"""The Python API: modules, launches with numpy arrays, options, reports, `watch`, and `python -m emulator info`."""

from __future__ import annotations

import numpy as np
import pytest

import emulator
from emulator.__main__ import main

SCALE = """
// a comment with .target sm_99
.version 9.0
.target sm_80
.address_size 64
.global .align 8 .u64 calls[2] = {5, 7};
.visible .entry scale(.param .u64 x, .param .u32 n, .param .f32 factor) .maxntid 256
{
  .reg .pred %p; .reg .b32 %n, %i, %t; .reg .f32 %v, %f; .reg .b64 %x, %at;
  ld.param.u64 %x, [x]; ld.param.u32 %n, [n]; ld.param.f32 %f, [factor];
  mov.u32 %i, %ctaid.x; mov.u32 %t, %ntid.x; mul.lo.u32 %i, %i, %t; mov.u32 %t, %tid.x; add.u32 %i, %i, %t;
  setp.ge.u32 %p, %i, %n; @%p ret;
  mad.wide.u32 %at, %i, 4, %x; ld.global.f32 %v, [%at]; mul.f32 %v, %v, %f; st.global.f32 [%at], %v;
  ret;
}
.visible .entry _Z3twoIfEvPT_(.param .u64 x) { ret; }
.visible .entry _Z3twoIdEvPT_(.param .u64 x) { ret; }
.visible .entry by_value(.param .u64 out, .param .align 8 .b8 p[16], .param .s8 small, .param .f64 wide)
{
  .reg .b64 %o, %l; .reg .b32 %r; .reg .f64 %d;
  ld.param.u64 %o, [out];
  ld.param.u64 %l, [p]; st.global.u64 [%o], %l; ld.param.u64 %l, [p+8]; st.global.u64 [%o+8], %l;
  ld.param.s8 %r, [small]; cvt.s64.s32 %l, %r; st.global.u64 [%o+16], %l;
  ld.param.f64 %d, [wide]; st.global.f64 [%o+24], %d;
  ret;
}
"""


@pytest.fixture
def module():
    return emulator.Module(SCALE)


# ---- modules and launches from Python --------------------------------------------------------------------------------


def test_kernel_over_an_array(module):
    x = np.arange(1000, dtype=np.float32)
    with emulator.watch() as watched:
        module.launch("scale", grid=4, block=256, args=[x, 1000, 0.5])
    assert (x == np.arange(1000) / 2).all()
    (launch,) = watched.launches
    assert (launch["name"], launch["grid"], launch["block"]) == ("scale", [4, 1, 1], [256, 1, 1])
    assert launch["totals"]["warp_instructions"] > 32 * 10


def test_only_the_memory_of_the_array_is_accessible(module):
    x = np.zeros(1000, np.float32)
    with pytest.raises(emulator.FaultError) as raised, emulator.watch():
        module.launch("scale", grid=4, block=256, args=[x[10:90], 81, 0.5])
    (report,) = raised.value.reports
    assert report.fault == "out of bounds"
    assert report.kernel == "scale"
    assert (report.block, report.thread) == ((0, 0, 0), (80, 0, 0))
    assert "at the end of 'argument 0 [80]'" in report.text
    assert str(report) in str(raised.value)


def test_strided_and_reversed_views_are_accessible_from_first_to_last_element(module):
    x = np.ones((4, 6), np.float32)
    with emulator.watch():
        module.launch("scale", 1, 32, [x[:, ::2], 1, 2.0])
    assert x[0, 0] == 2
    with emulator.watch():
        module.launch(
            "scale", 1, 32, [x[::-1, ::-1], 1, 3.0]
        )  # its address is that of its first element, the last of x
    assert x[3, 5] == 3
    with pytest.raises(emulator.FaultError), emulator.watch():
        module.launch("scale", 1, 32, [x[::-1, ::-1], 2, 3.0])


def test_arguments_by_value(module):
    out = np.zeros(4, np.int64)
    struct = np.array([(7, -3)], dtype=[("a", np.int64), ("b", np.int64)])
    with emulator.watch():
        module.launch("by_value", 1, 1, [out, struct[0], -5, 1.5])
    assert out[:3].tolist() == [7, -3, -5]
    assert out[3:].view(np.float64) == 1.5
    with emulator.watch():
        module.launch("by_value", 1, 1, [out, bytes(range(16)), np.int8(9), 2])
    assert out[0] == int.from_bytes(bytes(range(8)), "little")
    assert out[2] == 9


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([1, 2], r"scale takes 3 arguments, got 2"),
        ([np.zeros(1), "3", 0.5], r"argument 1 is a str, the parameter .u32 n has 4 bytes"),
        ([np.zeros(1), 2**32, 0.5], r"argument 1 is 4294967296, the parameter .u32 n has 4 bytes"),
        ([np.zeros(1), 2.5, 0.5], r"argument 1 is a float"),
        ([np.zeros(1), b"abc", 0.5], r"argument 1 is 3 bytes"),
        ([np.zeros(1), 1, None], r"argument 2 is a NoneType"),
        ([None, 1, 0.5], r"argument 0 is a NoneType"),
    ],
)
def test_wrong_arguments(module, args, message):
    with pytest.raises(emulator.Error, match=message):
        module.launch("scale", 1, 32, args)


@pytest.mark.parametrize(
    ("grid", "block", "smem", "message"),
    [
        (0, 32, 0, "a grid of 0 x 1 x 1 blocks"),
        ((1, 65536), 32, 0, "a grid of 1 x 65536 x 1 blocks"),
        (1, 2000, 0, "blocks of 2000 x 1 x 1 threads"),
        (1, (8, 8, 80), 0, "blocks of 8 x 8 x 80 threads"),
        (1, 512, 0, "blocks of 512 threads; the launch bounds of the kernel allow 256"),
        (1, 32, 200_000, "200000 bytes of dynamic shared memory .* up to 166912 on sm_80"),
        (-1, 32, 0, "grid and block are one to three sizes"),
    ],
)
def test_launches_that_the_gpu_refuses(module, grid, block, smem, message):
    with pytest.raises(emulator.Error, match=message):
        module.launch("scale", grid, block, [np.zeros(1, np.float32), 1, 0.5], dynamic_smem=smem)


def test_names_of_kernels(module):
    assert module.kernels == ["scale", "_Z3twoIfEvPT_", "_Z3twoIdEvPT_", "by_value"]
    assert module.kernel("two<float>").name == "_Z3twoIfEvPT_"
    assert module.kernel("void two<double>(double*)").name == "_Z3twoIdEvPT_"
    with pytest.raises(emulator.Error, match="2 kernels are called two; there are _Z3twoIfEvPT_, _Z3twoIdEvPT_"):
        module.kernel("two")
    with pytest.raises(emulator.Error, match="there is no kernel three; there are scale, "):
        module.kernel("three")


def test_facts_of_a_kernel(module):
    kernel = module.kernel("scale")
    assert [(p.name, p.type, p.offset, p.num_bytes) for p in kernel.params] == [
        ("x", "u64", 0, 8),
        ("n", "u32", 8, 4),
        ("factor", "f32", 12, 4),
    ]
    assert (kernel.params_bytes, kernel.max_threads, kernel.static_smem) == (16, 256, 0)
    used = module.instructions("scale")
    assert used["ld.param.u32"] == 1
    assert used["mov.u32"] == 3


def test_variables_of_a_module(module):
    assert module.symbol("calls", np.uint64).tolist() == [5, 7]
    with pytest.raises(emulator.Error, match="there is no variable nothing"):
        module.symbol("nothing")


def test_malformed_ptx_and_unknown_instructions_are_errors_that_name_the_line():
    with pytest.raises(emulator.Error, match="2"):
        emulator.Module(".version 9.0\nnonsense")
    text = SCALE.replace("mul.f32 %v, %v, %f;", "frobnicate.f32 %v, %v, %f;")
    with pytest.raises(emulator.Error, match=r"frobnicate\.f32"):
        emulator.Module(text).kernel("scale")


# ---- options and what is kept ----------------------------------------------------------------------------------------


def test_options_are_checked_and_kept_until_changed():
    emulator.configure(architecture=90, threads=2)
    emulator.configure(checks=False)
    assert emulator.options() == {
        "architecture": 90,
        "num_sms": 0,
        "checks": False,
        "counters": True,
        "threads": 2,
        "max_instructions": 4_000_000_000,
    }
    with pytest.raises(emulator.Error, match="architecture must be one of 80, 86, 89, 90, 100, 120, got 75"):
        emulator.configure(architecture=75)
    with pytest.raises(emulator.Error, match="num_sms must be from 0 to 1024, got -1"):
        emulator.configure(num_sms=-1)
    with pytest.raises(emulator.Error, match="threads must be from 1 to 1024, got 0"):
        emulator.configure(threads=0)
    assert emulator.options()["architecture"] == 90


def test_watch_restores_options_and_hands_over_what_happened(module):
    x = np.zeros(10, np.float32)
    with emulator.watch(architecture=90, counters=False) as watched:
        assert emulator.options()["architecture"] == 90
        module.launch("scale", 1, 32, [x, 10, 0.5])
    assert emulator.options()["architecture"] == 80
    assert len(watched.launches) == 1
    assert emulator.launches() == []


def test_faults_outweigh_another_exception_of_the_block(module):
    with pytest.raises(emulator.FaultError) as raised, emulator.watch():  # noqa: PT012
        module.launch("scale", 1, 32, [np.zeros(1, np.float32), 2, 0.5])
        raise ValueError("what the op said when its launch failed")
    assert isinstance(raised.value.__context__, ValueError)
    assert emulator.reports() == []


def test_a_watch_within_a_watch_leaves_its_launches_to_both(module):
    x = np.zeros(10, np.float32)
    with emulator.watch() as outer:
        module.launch("scale", 1, 32, [x, 10, 0.5])
        with emulator.watch() as inner:
            module.launch("scale", 2, 32, [x, 10, 0.5])
        module.launch("scale", 3, 32, [x, 10, 0.5])
    assert [launch["grid"][0] for launch in inner.launches] == [2]
    assert [launch["grid"][0] for launch in outer.launches] == [1, 2, 3]


def test_equal_reports_are_counted(module):
    for _ in range(3):
        module.launch("scale", 1, 32, [np.zeros(1, np.float32)[:0], 1, 0.5])
    assert sum(report.count for report in emulator.take_reports()) == 3


# ---- the command line ------------------------------------------------------------------------------------------------


def test_info_of_a_ptx_file(tmp_path, capsys):
    file = tmp_path / "scale.ptx"
    file.write_text(SCALE)
    assert main(["info", "--instructions", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "scale.ptx: sm_80" in printed
    assert "void two<double>(double*)" in printed
    assert "mul.lo.u32 x1" in printed


def test_info_names_what_is_not_emulated(tmp_path, capsys):
    file = tmp_path / "new.ptx"
    file.write_text(SCALE.replace("mul.f32 %v, %v, %f;", "frobnicate.f32 %v, %v, %f;"))
    assert main(["info", str(file)]) == 0
    assert "not emulated" in capsys.readouterr().out


def test_info_of_no_ptx(tmp_path, capsys):
    (tmp_path / "text").write_text("nothing")
    assert main(["info", str(tmp_path / "text")]) == 2
    assert main(["info", str(tmp_path / "absent")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].endswith("text holds no PTX: there is no .target line")
    assert "No such file" in errors[1]
