# SPDX-License-Identifier: Apache-2.0
"""rope_cache against its definitions and transformers, errors of rope and rope_cache, and the module."""

import math

import pytest
import torch

import fmkernels.nn
from fmkernels import reference, rope, rope_cache

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn of DeepSeek": {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 32, "beta_slow": 1},
    "yarn, not truncated": {**YARN, "truncate": False, "attention_factor": 1.25},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_the_angles_are_those_of_transformers(name, base):
    """Which computes frequencies in float32: near position 0 that hardly shows."""
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=8192,
        rope_parameters={**scaling, "rope_theta": base},
    )
    exponents = torch.arange(0, 64, 2) / 64
    if name == "default":
        frequencies, magnitude = base**-exponents, 1.0
    else:
        frequencies, magnitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    angles = torch.arange(50.0)[:, None] * frequencies
    expected = torch.cat([angles.cos(), angles.sin()], -1) * magnitude
    torch.testing.assert_close(rope_cache(64, 50, base=base, scaling=scaling), expected, rtol=0, atol=2e-5)
    assert torch.equal(
        rope_cache(64, 50, scaling={**scaling, "rope_theta": base}), rope_cache(64, 50, base=base, scaling=scaling)
    )


def test_ntk_keeps_the_fastest_angle_and_divides_the_slowest():
    plain, stretched = rope_cache(64, 2), rope_cache(64, 2, scaling={"type": "ntk", "factor": 4.0})
    angles = [torch.atan2(t[1, 32:].double(), t[1, :32].double()) for t in (plain, stretched)]
    assert [t[0].item() for t in angles] == pytest.approx([1, 1], rel=1e-6)
    assert angles[1][-1].item() == pytest.approx(angles[0][-1].item() / 4, rel=1e-5)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512}
    assert torch.equal(rope_cache(64, 512, scaling=dynamic), rope_cache(64, 512))
    longer = rope_cache(64, 1024, scaling=dynamic)
    assert torch.equal(longer, rope_cache(64, 1024, scaling={"rope_type": "ntk", "factor": 3.0}))


def test_angles_far_out_are_exact():
    """Of float32 frequencies an angle near position 2^20 would be off by a hundredth."""
    cache = rope_cache(16, 2**20)
    position = 2**20 - 1
    for i in range(8):
        angle = position * 10000.0 ** (-2 * i / 16)
        assert cache[-1, i].item() == pytest.approx(math.cos(angle), abs=1e-7)
        assert cache[-1, 8 + i].item() == pytest.approx(math.sin(angle), abs=1e-7)
    assert torch.equal(rope_cache(16, 3, dtype=torch.bfloat16), rope_cache(16, 3).bfloat16())


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"rotary_dim": 7}, ValueError, "rotary_dim must be even, got 7."),
        ({"rotary_dim": 0}, ValueError, "rotary_dim must be at least 2, got 0."),
        ({"num_positions": 1.5}, TypeError, "num_positions must be an integer, got float."),
        ({"base": 1.0}, ValueError, "base must be above 1, got 1.0."),
        ({"dtype": torch.float64}, ValueError, "dtype must be float32 or bfloat16 or float16, got torch.float64."),
        ({"scaling": "yarn"}, TypeError, "scaling must be a mapping or None, got str."),
        (
            {"scaling": {"rope_type": "longrope"}},
            ValueError,
            "scaling must have a rope_type of default, linear, ntk, dynamic, llama3, yarn, got 'longrope'.",
        ),
        (
            {"scaling": {"rope_type": "linear"}},
            ValueError,
            "scaling of type linear must have a factor, got ['rope_type'].",
        ),
        ({"scaling": {"rope_type": "linear", "factor": 0}}, ValueError, "factor must be above 0, got 0."),
        (
            {"scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}},
            ValueError,
            "scaling of type linear must have no beta_fast, got 3.",
        ),
        ({"scaling": {**YARN, "truncate": 1}}, TypeError, "truncate must be True or False, got int."),
        (
            {"scaling": {**LLAMA3, "high_freq_factor": 1.0}},
            ValueError,
            "high_freq_factor must be above low_freq_factor, 1.0, got 1.0.",
        ),
        (
            {"rotary_dim": 2, "scaling": {"rope_type": "ntk", "factor": 2.0}},
            ValueError,
            "scaling of type ntk must have a rotary_dim above 2, got 2.",
        ),
    ],
)
def test_wrong_arguments_of_rope_cache(arguments, error, sentence):
    with pytest.raises(error) as raised:
        rope_cache(**{"rotary_dim": 8, "num_positions": 4, **arguments})
    assert str(raised.value) == f"rope_cache: {sentence}"


Q, AT, CACHE = torch.zeros(2, 5, 3, 8), torch.zeros(2, 5, dtype=torch.int64), torch.zeros(7, 6)
NARROW = torch.zeros(2, 5, 3, 16)[..., ::2]
LAYOUT = "[batch, seq, heads, head_dim] or [tokens, heads, head_dim]"
ERRORS = [
    ("q", None, TypeError, "q must be a tensor, got NoneType."),
    ("q", Q[0, 0], ValueError, f"q must be {LAYOUT}, got 2 dimensions [3, 8]."),
    ("q", Q.double(), ValueError, "q must be float32 or bfloat16 or float16, got float64."),
    ("q", NARROW, ValueError, "q must have a contiguous last dimension, got stride 2."),
    ("k", Q[:1], ValueError, "k must have the shape of q but for the heads, [2, 5, 3, 8], got [1, 5, 3, 8]."),
    ("k", Q[..., :4], ValueError, "k must have the shape of q but for the heads, [2, 5, 3, 8], got [2, 5, 3, 4]."),
    ("k", Q.half(), ValueError, "k must have the dtype of q, float32, got float16."),
    ("k", Q.to("meta"), ValueError, "k must be on the device of q, cpu, got meta."),
    ("k", NARROW, ValueError, "k must have a contiguous last dimension, got stride 2."),
    ("positions", [0], TypeError, "positions must be a tensor, got list."),
    ("positions", AT.float(), ValueError, "positions must be int32 or int64, got float32."),
    ("positions", AT[:, :4], ValueError, "positions must be [2, 5] or [5] for this q, got [2, 4]."),
    ("positions", AT[:1], ValueError, "positions must be [2, 5] or [5] for this q, got [1, 5]."),
    ("positions", AT - 1, ValueError, "positions must be at least 0 and below the 7 rows of cos_sin, got -1."),
    ("positions", AT + 7, ValueError, "positions must be at least 0 and below the 7 rows of cos_sin, got 7."),
    ("cos_sin", CACHE[0], ValueError, "cos_sin must be [positions, rotary_dim], got 1 dimensions [6]."),
    ("cos_sin", CACHE.half(), ValueError, "cos_sin must be float32 for this q, got float16."),
    ("cos_sin", CACHE[:, :5], ValueError, "cos_sin must have an even rotary_dim from 2 to head_dim, 8, got 5."),
    ("cos_sin", torch.zeros(7, 10), ValueError,
     "cos_sin must have an even rotary_dim from 2 to head_dim, 8, got 10."),
    ("cos_sin", CACHE[:0], ValueError, "cos_sin must have at least 1 row, got 0."),
    ("cos_sin", torch.zeros(7, 12)[:, ::2], ValueError, "cos_sin must have a contiguous last dimension, got stride 2."),
    ("cos_sin", CACHE.clone().requires_grad_(), ValueError, "cos_sin cannot have a gradient."),
    ("interleaved", 1, TypeError, "interleaved must be True or False, got int."),
    ("out", Q, TypeError, "out must be a pair of tensors (q, k), got Tensor."),
    ("out", (Q, None), ValueError, "out must have a k where there is one, got None."),
    ("out", (Q[:1], Q), ValueError, "out[0] must have the shape of q, [2, 5, 3, 8], got [1, 5, 3, 8]."),
    ("out", (Q, Q[:, :, :1].expand(2, 5, 3, 8)), ValueError,
     "out[1] is written and must have a place for each element, got stride 0 in dimension 2."),
    ("out", (Q, Q.half()), ValueError, "out[1] must have the dtype of q, float32, got float16."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "sentence"), ERRORS)
def test_wrong_arguments_of_rope(name, value, error, sentence):
    with pytest.raises(error) as raised:
        rope(**{"q": Q, "k": Q, "positions": AT, "cos_sin": CACHE, name: value})
    assert str(raised.value) == f"rope: {sentence}"


def test_out_is_refused_where_a_gradient_is_recorded():
    with pytest.raises(ValueError, match=r"^rope: out cannot be given where a gradient is recorded\.$"):
        rope(Q.clone().requires_grad_(), Q, AT, CACHE, out=(Q, Q))
    with pytest.raises(ValueError, match=r"^rope: out must have no k where there is none, got a Tensor\.$"):
        rope(Q, None, AT, CACHE, out=(Q, Q))


HOSTILE = {
    "q": [torch.zeros(()), Q[0], Q[:1], Q[..., :4], Q[..., :0], Q.double(), Q.int(), NARROW, Q.to_sparse()],
    "positions": [torch.zeros((), dtype=torch.int64), AT[:, :4], AT[:1], AT.short(), AT - 1, AT + 7, AT[None]],
    "cos_sin": [CACHE[0], CACHE[:, :5], CACHE[:, :0], CACHE[:0], torch.zeros(7, 10), CACHE.half(), CACHE.double(),
                torch.zeros(7, 12)[:, ::2]],
}  # fmt: skip


@pytest.mark.parametrize("name", ["q", "k", "q_out", "k_out", "positions", "cos_sin"])
def test_the_ops_themselves_refuse(name):
    right = {"q": Q, "k": Q, "positions": AT, "cos_sin": CACHE, "interleaved": False, "inverse": False}
    right |= {"q_out": Q.clone(), "k_out": Q.clone()}
    torch.ops.fmkernels.rope_forward_out(**right)
    shrunk = right[name].clone()
    shrunk.untyped_storage().resize_(shrunk.nbytes - 1)
    for value in (*HOSTILE[name if name in HOSTILE else "q"], shrunk):
        with pytest.raises(RuntimeError):
            torch.ops.fmkernels.rope_forward_out(**{**right, name: value})
    with pytest.raises(RuntimeError, match="given together"):
        torch.ops.fmkernels.rope_forward_out(**{**right, "k_out": None})


# ---- the module ------------------------------------------------------------------------------------------------------


def test_the_module_rotates_and_keeps_its_angles():
    module = fmkernels.nn.RotaryEmbedding(16, 40, base=5e5, scaling=LLAMA3, interleaved=True)
    assert module.state_dict() == {}
    q, k = torch.randn(2, 9, 4, 24), torch.randn(2, 9, 1, 24)
    positions = torch.arange(9)
    cos_sin = rope_cache(16, 40, base=5e5, scaling=LLAMA3)
    expected = reference.rope(q, k, positions.expand(2, 9), cos_sin, interleaved=True)
    torch.testing.assert_close(module(q, k), expected)
    torch.testing.assert_close(module(q, k, positions + 3), rope(q, k, positions + 3, cos_sin, interleaved=True))
    assert module.bfloat16().cos_sin.dtype == torch.float32
    assert module(q.bfloat16(), None)[0].dtype == torch.bfloat16
    with pytest.raises(
        ValueError, match=r"^nn.RotaryEmbedding: q must have at most num_positions, 40, tokens, got 41\.$"
    ):
        module(torch.zeros(41, 1, 16), None)
    assert repr(module) == "RotaryEmbedding(rotary_dim=16, num_positions=40, interleaved=True)"


def test_attention_takes_the_module():
    torch.manual_seed(0)
    block = fmkernels.nn.Attention(64, 4, 2, rope=fmkernels.nn.RotaryEmbedding(16, 32))
    x = torch.randn(2, 11, 64)
    shifted = block(x)
    assert shifted.shape == x.shape
    assert sorted(block.state_dict()) == sorted(fmkernels.nn.Attention(64, 4, 2).state_dict())
    shifted.square().sum().backward()
    assert block.q_proj.weight.grad.isfinite().all()
