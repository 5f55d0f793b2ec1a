# SPDX-License-Identifier: Apache-2.0
"""fmkernels.nn.QuantizedLinear: what it makes of a linear layer, its state, and the meta device."""

import copy

import pytest
import torch

import fmkernels.nn
from fmkernels import quantize_weight, quantized_linear

FORMATS = {
    "int8": {"bits": 8},
    "int8 in groups": {"bits": 8, "group_size": 64},
    "int4": {"bits": 4, "group_size": 128},
    "int4 with zeros": {"bits": 4, "group_size": 32, "symmetric": False},
}
OUT, IN = 40, 200


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_module_of_a_linear_layer(form, bias):
    linear = torch.nn.Linear(IN, OUT, bias)
    module = fmkernels.nn.QuantizedLinear.from_linear(linear, **FORMATS[form])
    x = torch.randn(3, IN)
    expected = quantized_linear(x, quantize_weight(linear.weight, **FORMATS[form]), linear.bias)
    assert torch.equal(module(x), expected)
    other = fmkernels.nn.QuantizedLinear(IN, OUT, bias, **FORMATS[form])
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(module).to(torch.bfloat16)(x.bfloat16()), module.bfloat16()(x.bfloat16()))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    assert module.scales.dtype == torch.float32  # whatever dtype the module takes
    assert len(list(module.parameters())) == int(bias)


def test_module_is_made_on_the_meta_device():
    """Whose values nobody can look at."""
    module = fmkernels.nn.QuantizedLinear(64, 40, bits=4, group_size=32, device="meta")
    like = fmkernels.nn.QuantizedLinear(64, 40, bits=4, group_size=32)
    assert {n: (t.shape, t.dtype) for n, t in module.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in like.state_dict().items()
    }
    assert all(t.is_meta for t in module.state_dict().values())


def test_module_says_what_it_is_and_what_it_takes():
    module = fmkernels.nn.QuantizedLinear.from_linear(torch.nn.Linear(64, 40), bits=4, group_size=32)
    assert repr(module) == "QuantizedLinear(in_features=64, out_features=40, bias=True, bits=4, group_size=32)"
    with pytest.raises(TypeError, match=r"nn.QuantizedLinear.from_linear: module must be a torch.nn.Linear, got ReLU"):
        fmkernels.nn.QuantizedLinear.from_linear(torch.nn.ReLU())
