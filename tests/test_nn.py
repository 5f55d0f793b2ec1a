# SPDX-License-Identifier: Apache-2.0
"""nn.Attention: against the attention block of transformers and against its definition, and its errors."""

import pytest
import torch
import torch.nn.functional as F

from fmkernels import reference
from fmkernels.nn import Attention
from fmkernels.testing import assert_as_good_as_torch

CASES = {
    "plain": {},
    "grouped heads": {"num_kv_heads": 2},
    "one head of keys, bias": {"num_kv_heads": 1, "bias": True},
    "head_dim of its own": {"head_dim": 24},
    "bidirectional": {"causal": False},
    "window": {"window": (3, 0)},
    "bidirectional window": {"causal": False, "window": (2, 4)},
}


def rotate(q, k):
    """A stand-in for RoPE that depends on the position and leaves norms alone."""
    angles = torch.arange(q.shape[1], dtype=q.dtype, device=q.device)[:, None, None]

    def turn(t):
        a, b = t.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)

    return turn(q), turn(k)


def definition(module):
    def forward(x):
        weights = {name: t.to(x.dtype) for name, t in module.state_dict().items()}
        q, k, v, o = (
            lambda t, name=name: F.linear(t, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        q, k, v = (project(x).unflatten(-1, (-1, module.head_dim)) for project in (q, k, v))
        if module.rope is not None:
            q, k = module.rope(q, k)
        return o(reference.attention(q, k, v, causal=module.causal, window=module.window)[0].flatten(-2))

    return forward


@torch.no_grad()
@pytest.mark.parametrize("rope", [None, rotate], ids=["no rope", "rope"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_forward_matches_its_definition(options, rope):
    torch.manual_seed(0)
    module = Attention(64, 4, **options, rope=rope)
    x = torch.randn(2, 13, 64)
    actual = module(x)
    assert actual.shape == x.shape
    assert_as_good_as_torch(actual, definition(module), x)


@torch.no_grad()
def test_state_dict_is_that_of_a_llama_attention_block():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, attention_bias=True
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    block = llama.LlamaAttention(config, layer_idx=0).eval()
    x = torch.randn(2, 13, 64)
    cos, sin = llama.LlamaRotaryEmbedding(config)(x, torch.arange(13)[None])

    def rope(q, k):
        return llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)

    module = Attention(64, 4, 2, bias=True, rope=rope)
    module.load_state_dict(block.state_dict(), strict=True)
    torch.testing.assert_close(module(x), block(x, (cos, sin), None)[0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(dtype):
    torch.manual_seed(0)
    module, x = Attention(64, 4, 2, rope=rotate), torch.randn(2, 13, 64)
    with torch.autocast("cpu", dtype):
        actual = module(x)
    assert actual.dtype == dtype
    expected = module.to(dtype)(x.to(dtype))
    torch.testing.assert_close(actual, expected, rtol=0, atol=4 * torch.finfo(dtype).eps * expected.abs().max().item())


@torch.no_grad()
def test_compiles_without_a_graph_break():
    module, x = Attention(64, 4, 2, window=(3, 0), rope=rotate), torch.randn(2, 13, 64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for seq in (13, 1, 7):
        torch.testing.assert_close(compiled(x[:, :seq]), module(x[:, :seq]))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(0, 5, 64), (2, 0, 64)], ids=str)
def test_empty(shape):
    assert Attention(64, 4)(torch.randn(shape)).shape == shape


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"hidden": 0}, ValueError, "hidden must be at least 1, got 0."),
        ({"hidden": 64.0}, TypeError, "hidden must be an integer, got float."),
        ({"num_heads": -1}, ValueError, "num_heads must be at least 1, got -1."),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads must divide num_heads, 4, got 3."),
        ({"num_heads": 5}, ValueError, "num_heads must divide hidden, 64, where head_dim is None, got 5."),
        ({"head_dim": 12}, ValueError, "head_dim must be a multiple of 8 from 8 to 256, got 12."),
        ({"head_dim": 264}, ValueError, "head_dim must be a multiple of 8 from 8 to 256, got 264."),
        ({"bias": 1}, TypeError, "bias must be True or False, got int."),
        ({"causal": None}, TypeError, "causal must be True or False, got NoneType."),
        ({"window": 4}, TypeError, "window must be a pair (left, right), got 4."),
        ({"window": (-2, 0)}, ValueError, "window[0] must be at least -1, got -2."),
        ({"rope": "llama"}, TypeError, "rope must be callable with (q, k), got str."),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, error, sentence):
    with pytest.raises(error) as raised:
        Attention(**{"hidden": 64, "num_heads": 4} | arguments)
    assert str(raised.value) == f"nn.Attention: {sentence}"


@pytest.mark.parametrize(
    ("x", "error", "sentence"),
    [
        (None, TypeError, "x must be a tensor, got NoneType."),
        (torch.ones(3, 64), ValueError, "x must be [batch, seq, hidden], got 2 dimensions [3, 64]."),
        (torch.ones(1, 3, 32), ValueError, "x must have hidden 64, got 32."),
    ],
    ids=["no tensor", "rank", "width"],
)
def test_wrong_input(x, error, sentence):
    with pytest.raises(error) as raised:
        Attention(64, 4)(x)
    assert str(raised.value) == f"nn.Attention: {sentence}"
