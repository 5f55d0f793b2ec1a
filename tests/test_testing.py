# SPDX-License-Identifier: Apache-2.0
"""fmkernels.testing: that the rule of exactness can fail, and that another execution of the ops can be a backend."""

import math

import pytest
import torch

from fmkernels import _library, attention, reference, testing
from fmkernels.testing import Backend, Case, assert_as_good_as_torch, backends

X = torch.linspace(-3, 3, 40).reshape(5, 8)


def softmax(x):
    return torch.softmax(x, -1), torch.logsumexp(x, -1)


def at(t, place, value):
    t = t.clone()
    t[place] = value
    return t


def test_plain_torch_is_as_good_as_itself():
    assert_as_good_as_torch(softmax(X), softmax, X)
    assert_as_good_as_torch([t.half() for t in softmax(X.half().float())], softmax, X.half())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda o, lse: (o * (1 + 1e-5), lse), "output 0: error"),
        (lambda o, lse: (o, lse + 1e-4), "output 1: error"),
        (lambda o, lse: (o.half() * 1.01, lse), "output 0: error"),
        (lambda o, lse: (at(o, (2, 3), math.nan), lse), "output 0: NaN at 1 places of 40"),
        (lambda o, lse: (o, at(lse, 1, math.inf)), "output 1: infinity at 1 places of 5"),
        (lambda o, lse: (o[:4], lse), r"output 0: shape \[4, 8\], not \[5, 8\]"),
        (lambda o, lse: (o,), "1 outputs, the reference has 2"),
    ],
)
def test_what_is_worse_than_torch_fails(wrong, sentence):
    with pytest.raises(AssertionError, match=sentence):
        assert_as_good_as_torch(wrong(*softmax(X)), softmax, X)


def test_infinity_of_the_other_sign_and_a_lost_nan_fail():
    x = torch.tensor([1.0, math.inf, math.nan])
    assert_as_good_as_torch(x * 2, lambda x: x * 2, x)
    for wrong in (at(x, 1, -math.inf), at(x, 2, 0.0)):
        with pytest.raises(AssertionError, match="at 1 places of 3"):
            assert_as_good_as_torch(wrong * 2, lambda x: x * 2, x)


@pytest.fixture
def elsewhere(monkeypatch):
    """Another execution of every op, as the emulator is one: the same schemas in a namespace of its own."""
    calls = []
    library = torch.library.Library("fmkernels_elsewhere", "DEF")

    def register(name):
        op = getattr(torch.ops.fmkernels, name).default

        def run(*args):
            calls.append(name)
            return op(*args)

        library.define(str(op._schema).removeprefix("fmkernels::"))
        library.impl(name, run, "CPU")

    for name in _library.op_names:
        register(name)
    backend = Backend("elsewhere", "cpu", "fmkernels_elsewhere")
    monkeypatch.setattr(testing, "BACKENDS", (*testing.BACKENDS, backend, Backend("absent", "cpu", "fmkernels_absent")))
    yield backend, calls
    library._destroy()


def test_another_execution_of_the_ops_is_a_backend(elsewhere):
    backend, calls = elsewhere
    assert [b.name for b in backends("attention_forward") if b.name in ("elsewhere", "absent")] == ["elsewhere"]
    args, kwargs = Case("elsewhere").inputs(backend.device)
    assert_as_good_as_torch(backend.run(attention, *args, **kwargs, return_lse=True), reference.attention, *args)
    assert calls == ["attention_forward"]
    with pytest.raises(ValueError, match="attention: q must be"):
        backend.run(attention, args[0][0], *args[1:])
    attention(*args)
    assert calls == ["attention_forward", "attention_forward"], "the ops of the library are bound again"


# ---- the emulated backend --------------------------------------------------------------------------------------------

EMULATED = [backend for backend in testing.BACKENDS if backend.name == "emulated"]


@pytest.mark.parametrize("backend", EMULATED, ids=str)
def test_a_fault_in_an_emulated_run_is_raised_even_where_the_result_is_right(backend):
    import emulator

    ptx = """.version 9.0\n.target sm_80\n.address_size 64
    .visible .entry reads(.param .u64 x) { .reg .b64 %x; .reg .b32 %v; ld.param.u64 %x, [x]; ld.global.u32 %v, [%x+8];
    st.global.u32 [%x], %v; ret; }"""
    x = torch.arange(3, dtype=torch.int32)

    def run():
        emulator.Module(ptx).launch("reads", 1, 1, [x[:2].numpy()])
        return "a result"

    with pytest.raises(emulator.FaultError, match="out of bounds: reads"):
        backend.run(run)
    assert emulator.reports() == []
    assert Backend("cpu", "cpu").run(lambda: "a result") == "a result"


VIEWS = """
#include "common/emulated_memory.h"
#include <cstdio>

void emulator_register_memory(const void* begin, uint64_t bytes, const char* name) {
  std::printf("+%llu %llu %s;", (unsigned long long)begin, (unsigned long long)bytes, name);
}
void emulator_unregister_memory(const void* begin, uint64_t bytes) {
  std::printf("-%llu %llu;", (unsigned long long)begin, (unsigned long long)bytes);
}

int main() {
  using Sizes = std::vector<int64_t>;
  const auto note = [](int64_t address, const Sizes& sizes, const Sizes& strides, int64_t bytes) {
    fmkernels::note_view(reinterpret_cast<void*>(address), sizes, strides, bytes);
  };
  note(1000, {2, 3}, {100, 2}, 4);  // 1 * 100 + 2 * 2 + 1 elements
  note(2000, {5, 0}, {1, 1}, 4);    // nothing
  note(3000, {7, 4}, {0, 1}, 2);    // expanded
  { const fmkernels::EmulatedLaunch first; }
  std::puts("");
  { const fmkernels::EmulatedLaunch second_of_the_same_op; }
  std::puts("");
  note(4000, {}, {}, 8);
  { const fmkernels::EmulatedLaunch of_the_next_op; }
}
"""


def test_kernels_reach_the_views_of_their_op_to_the_byte(run_cpp):
    lines = run_cpp(VIEWS).splitlines()
    both = "+1000 420 tensor [2, 3];+3000 8 tensor [7, 4];-1000 420;-3000 8;"
    assert lines == [both, both, "+4000 8 tensor [];-4000 8;"]
