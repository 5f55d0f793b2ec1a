# SPDX-License-Identifier: Apache-2.0
"""nn.Attention: against the blocks whose state dicts it takes and against its definition, and its errors."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from fmkernels import BlockMask, BlockTopology, banded_blocks, random_blocks
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
LAYOUTS = pytest.mark.parametrize("layout", ["llama", "multihead"])


def rotate(q, k):
    """A stand-in for RoPE that depends on the position and leaves norms alone."""
    angles = torch.arange(q.shape[1], dtype=q.dtype, device=q.device)[:, None, None]

    def turn(t):
        a, b = t.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)

    return turn(q), turn(k)


def sdpa(q, k, v, *, causal, window, visible=None):
    """torch's own attention, of tensors as fmkernels has them."""
    left, right = (math.inf if side == -1 else side for side in window)
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    if visible is None:
        visible = (i - j <= left) & (j - i <= (min(right, 0) if causal else right))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True).transpose(1, 2)


def definition(module, visible=None):
    """The module as a function of x and its parameters, over torch's attention."""
    names = [name for name, _ in module.named_parameters()]

    def forward(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        if module.layout == "llama":
            q, k, v = (F.linear(x, given[f"{n}_proj.weight"], given.get(f"{n}_proj.bias")) for n in "qkv")
        else:
            q, k, v = F.linear(x, given["in_proj_weight"], given.get("in_proj_bias")).split(module.widths, -1)
        q, k, v = (t.unflatten(-1, (-1, module.head_dim)) for t in (q, k, v))
        if module.rope is not None:
            q, k = module.rope(q, k)
        o = sdpa(q, k, v, causal=module.causal, window=module.window, visible=visible).flatten(-2)
        output = "o_proj" if module.layout == "llama" else "out_proj"
        return F.linear(o, given[f"{output}.weight"], given.get(f"{output}.bias"))

    return forward


def trained(module, x, grad):
    """The result, and the gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    y = module(x)
    return y, *torch.autograd.grad(y, [x, *module.parameters()], grad)


def trained_by(forward):
    """The same of a function of x and the parameters."""

    def run(x, grad, *parameters):
        leaves = [t.requires_grad_() for t in (x, *parameters)]
        y = forward(*leaves)
        return y, *torch.autograd.grad(y, leaves, grad)

    return run


@LAYOUTS
@pytest.mark.parametrize("rope", [None, rotate], ids=["no rope", "rope"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_results_and_gradients_are_those_over_torch_attention(options, rope, layout):
    module = Attention(64, 4, **options, rope=rope, layout=layout)
    x, grad = torch.randn(2, 2, 13, 64)
    assert_as_good_as_torch(trained(module, x, grad), trained_by(definition(module)), x, grad, *module.parameters())


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


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_state_dict_is_that_of_multihead_attention(bias, causal):
    theirs = torch.nn.MultiheadAttention(64, 4, bias=bias, batch_first=True)
    for t in theirs.parameters():
        torch.nn.init.normal_(t, std=0.2)  # biases begin as zeros
    module = Attention(64, 4, bias=bias, causal=causal, layout="multihead")
    module.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(module.state_dict(), strict=True)
    hides = torch.ones(13, 13, dtype=torch.bool).triu(1) if causal else None

    def forward(x, *parameters):
        given = dict(zip(theirs.state_dict(), parameters, strict=True))
        options = {"attn_mask": hides, "is_causal": causal, "need_weights": False}
        return torch.func.functional_call(theirs, given, (x, x, x), options)[0]

    x, grad = torch.randn(2, 2, 13, 64)
    assert_as_good_as_torch(trained(module, x, grad), trained_by(forward), x, grad, *theirs.parameters())


def test_first_values_are_those_of_multihead_attention():
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(64, 4)
    torch.manual_seed(0)
    ours = Attention(64, 4, bias=True, layout="multihead")
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(dtype, layout):
    module, x, grad = Attention(64, 4, 2, rope=rotate, layout=layout), *torch.randn(2, 2, 13, 64)
    with torch.autocast("cpu", dtype):
        actual = trained(module, x, grad.to(dtype))
    assert actual[0].dtype == dtype
    expected = trained(copy.deepcopy(module).to(dtype), x.to(dtype), grad.to(dtype))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.to(dtype), e, rtol=0, atol=4 * torch.finfo(dtype).eps * e.abs().max().item())


@torch.no_grad()
def test_compiles_without_a_graph_break():
    module, x = Attention(64, 4, 2, window=(3, 0), rope=rotate), torch.randn(2, 13, 64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for seq in (13, 1, 7):
        torch.testing.assert_close(compiled(x[:, :seq]), module(x[:, :seq]))


@LAYOUTS
def test_compiled_gradients(layout):
    module, x, grad = Attention(64, 4, 2, rope=rotate, layout=layout), *torch.randn(2, 2, 13, 64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(trained(compiled, x, grad), trained(module, x, grad))


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
        ({"layout": "gpt"}, ValueError, "layout must be 'llama' or 'multihead', got 'gpt'."),
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


@LAYOUTS
def test_block_sparse_attention(layout):
    """A topology of queries and keys, through its mask; the sequence is no multiple of a block."""
    torch.manual_seed(0)
    mask = random_blocks(6, 6, 0.5) | banded_blocks(6, 6, 0)
    module = Attention(64, 4, 2, layout=layout)
    topology = BlockTopology.from_mask(mask, 16, (90, 90))
    x = torch.randn(2, 90, 64, requires_grad=True)
    y = module(x, block_mask=BlockMask.from_topology(topology))
    y.square().sum().backward()
    visible = topology.to_mask().repeat_interleave(16, 0).repeat_interleave(16, 1)[:90, :90].tril()
    given = definition(module, visible)

    def with_gradients(x, *parameters):
        leaves = [t.detach().clone().requires_grad_() for t in (x, *parameters)]
        y = given(*leaves)
        return (y.detach(), *torch.autograd.grad(y.square().sum(), leaves))

    found = (y, x.grad, *(p.grad for p in module.parameters()))
    assert_as_good_as_torch(found, with_gradients, x, *module.parameters())
