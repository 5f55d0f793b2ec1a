# SPDX-License-Identifier: Apache-2.0
"""nn.MoE and nn.Experts: values, gradients, capacity, balancing, and what happens to modules in training."""

import copy
import re

import pytest
import torch
from nn_layers import CountOps, moe_definition
from torch.utils.checkpoint import checkpoint

from fmkernels import moe
from fmkernels.nn import Experts, MoE, checkpoint_policy
from fmkernels.testing import FLOAT_DTYPES, assert_as_good_as_torch, backends

# The emulated kernels, on CPU tensors, have no float32 products for the router: they run the experts.
EVERY_DEVICE = pytest.mark.parametrize("device", [b.device for b in backends("moe_grouped_mm") if b.name != "emulated"])
HIDDEN, WIDTH, NUM_EXPERTS, NUM_TOPK = 32, 16, 8, 2
LAYERS = {
    "plain": {},
    "not renormalised, scaled": {"renormalize": False, "routed_scale": 2.5},
    "groups, a bias, a shared expert": {
        "scoring": "sigmoid",
        "num_groups": 4,
        "topk_groups": 2,
        "group_score": "top2",
        "selection_bias": True,
        "shared_width": 24,
    },
    "a capacity": {"capacity_factor": 0.75},
}
LAYERS["all of it"] = LAYERS["groups, a bias, a shared expert"] | {"capacity_factor": 0.75, "policy": "weight"}
EVERY_LAYER = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def _one_thread():
    """The layers here are too small for more."""
    torch.set_num_threads(1)


def layer(name="plain", device="cpu", dtype=torch.float32, **options):
    torch.manual_seed(0)
    result = MoE(HIDDEN, WIDTH, NUM_EXPERTS, NUM_TOPK, **LAYERS[name], **options).to(device, dtype)
    if result.gate.e_score_correction_bias is not None:
        result.gate.e_score_correction_bias.uniform_(-0.2, 0.2)
    return result


def tokens(*shape, device="cpu", dtype=torch.float32):
    return torch.randn(*(shape or (3, 11)), HIDDEN, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def gradients(function, x, *tensors):
    """Of a sum of the output and of both losses."""
    x, leaves = x.detach().requires_grad_(), [t.detach().requires_grad_(t.dim() > 1) for t in tensors]
    out, balance, z = function(x, *leaves)
    grad = torch.randint(-4, 5, out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    wanted = [x, *(t for t in leaves if t.requires_grad)]
    return torch.autograd.grad((out * grad).sum() + 3 * balance + 2 * z, wanted)


def as_function(module):
    """Of x and the tensors of the state, as the definition is."""
    names = list(module.state_dict())

    def run(x, *tensors):
        out, losses = torch.func.functional_call(module, dict(zip(names, tensors, strict=True)), (x,))
        return out, losses.load_balance, losses.z_loss

    return run


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda dtype: str(dtype)[6:])
@EVERY_LAYER
@EVERY_DEVICE
def test_matches_the_moe_definition(device, name, dtype):
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("tensor cores have no float32")
    module = layer(name, device, dtype)
    x = tokens(device=device, dtype=dtype)
    out, losses = module(x)
    state = module.state_dict().values()
    for i, actual in enumerate((out, losses.load_balance, losses.z_loss)):
        wanted = lambda *t, i=i: moe_definition(module)(*t)[i]  # noqa: E731
        assert_as_good_as_torch(actual, wanted, x, *state, computed_in=dtype if i == 0 else None)
    assert out.dtype == dtype
    assert losses.load.dtype == torch.int64
    assert losses.load.sum() == 33 * NUM_TOPK


@EVERY_LAYER
def test_gradients_match_the_moe_definition(name):
    module, x = layer(name), tokens()
    state = list(module.state_dict().values())
    actual = gradients(as_function(module), x, *state)
    for i, found in enumerate(actual):
        wanted = lambda *t, i=i: gradients(moe_definition(module), *t)[i]  # noqa: E731
        assert_as_good_as_torch(found, wanted, x, *state)


@pytest.mark.parametrize("backend", backends("moe_grouped_mm"), ids=str)
def test_experts_are_moe_mlp(backend):
    experts = Experts(NUM_EXPERTS, HIDDEN, WIDTH, device=backend.device, dtype=torch.bfloat16)
    x, weights = tokens(7, device=backend.device, dtype=torch.bfloat16), torch.rand(7, 3, device=backend.device)
    idx = torch.randint(-1, NUM_EXPERTS, (7, 3), device=backend.device)
    expected = backend.run(moe.moe_mlp, x, experts.gate_up_proj, experts.down_proj, weights, idx)
    assert torch.equal(backend.run(experts, x, weights, idx), expected)


def test_any_leading_dimensions():
    module, x = layer("not renormalised, scaled"), tokens(2, 3, 4)
    out = module(x)[0]
    assert out.shape == x.shape
    assert torch.equal(module(x.view(24, HIDDEN))[0].view_as(x), out)
    assert torch.equal(module(x[0, 0, 0])[0], out[0, 0, 0])
    assert torch.equal(module(x.transpose(0, 2))[0], out.transpose(0, 2))


@EVERY_LAYER
def test_no_tokens(name):
    module = layer(name)
    x = tokens(0).requires_grad_()
    out, losses = module(x)
    assert out.shape == (0, HIDDEN)
    assert [losses.load_balance.item(), losses.z_loss.item(), losses.load.sum().item()] == [0, 0, 0]
    (out.sum() + losses.load_balance + losses.z_loss).backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    assert grads
    assert not any(grad.any() for grad in grads)


def test_the_default_device_is_not_that_of_the_layer():
    module, x = layer(), tokens()
    with torch.device("meta"):
        out = module(x)[0]
    assert torch.equal(out, module(x)[0])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES[:2], ids=["float32", "bfloat16"])
def test_a_token_has_the_same_bits_whatever_the_others_are(dtype):
    """The router's too: by torch's product a token had other logits, and perhaps other experts, alone."""
    module, x = layer(dtype=dtype), tokens(300, dtype=dtype)
    out = module(x)[0]
    for rows in (slice(0, 1), slice(13, 20), slice(100, 300)):
        assert torch.equal(module(x[rows])[0], out[rows])
        assert torch.equal(module.gate(x[rows]), module.gate(x)[rows])
    x[3] = torch.nan
    x[5] *= 100
    again = module(x)[0]
    kept = torch.tensor([t for t in range(300) if t not in (3, 5)])
    assert torch.equal(again[kept], out[kept])
    assert not again[3].any()  # no expert: the token itself carries its NaN on


def test_a_nan_reaches_a_shared_expert_and_the_z_loss():
    module, x = layer("groups, a bias, a shared expert"), tokens(6)
    x[2, 7] = torch.nan
    out, losses = module(x)
    assert out[2].isnan().all()
    assert out[[0, 1, 3, 4, 5]].isfinite().all()
    assert losses.z_loss.isnan()
    assert losses.load_balance.isfinite()
    assert losses.load.sum() == 5 * NUM_TOPK


# ---- capacity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "num_tokens", "expected"),
    [(1.0, 32, 8), (1.1, 400, 110), (1.25, 7, 3), (0.5, 1, 1), (2, 0, 0), (1 / 3, 12, 1)],
)
def test_the_capacity_follows_from_the_shapes(factor, num_tokens, expected):
    """ceil(1.1 * 100) is 111 in binary floating point."""
    assert MoE(HIDDEN, WIDTH, 8, 2, capacity_factor=factor).capacity(num_tokens) == expected


@pytest.mark.parametrize("policy", ["position", "weight"])
def test_slots_over_the_capacity_are_dropped(policy):
    """All tokens want the same two experts, of which each has room for a quarter of them."""
    module = MoE(HIDDEN, WIDTH, NUM_EXPERTS, NUM_TOPK, capacity_factor=1.0, policy=policy)
    with torch.no_grad():
        module.gate.weight.zero_()
        module.gate.weight[2], module.gate.weight[5] = 0.02, 0.01
    x = tokens(32).abs()
    out, losses = module(x)
    assert losses.load.tolist() == [0, 0, 32, 0, 0, 32, 0, 0]
    kept = out.any(-1)
    if policy == "position":
        assert kept.tolist() == [t < 8 for t in range(32)]
        assert torch.equal(module(x[:20])[0][:5], out[:5])
    else:  # the largest weights of expert 2 are the smallest of expert 5
        assert kept.sum() == 16
        order = x.sum(-1).argsort()
        assert kept[order].tolist() == [rank < 8 or rank >= 24 for rank in range(32)]


def test_a_capacity_that_suffices_changes_nothing():
    plain, roomy = layer(), layer(capacity_factor=float(NUM_EXPERTS))
    assert torch.equal(plain(tokens())[0], roomy(tokens())[0])


# ---- balancing -------------------------------------------------------------------------------------------------------


def test_the_bias_moves_against_the_load():
    module = MoE(HIDDEN, WIDTH, 4, 2, selection_bias=True)
    module.update_bias(torch.tensor([10, 2, 6, 6]), 0.125)
    assert module.gate.e_score_correction_bias.tolist() == [-0.125, 0.125, 0, 0]
    module.update_bias(torch.tensor([0, 0, 1, 0], dtype=torch.int32), 0.5)
    assert module.gate.e_score_correction_bias.tolist() == [0.375, 0.625, -0.5, 0.5]


def one_sided(**options):
    """A layer, and 128 tokens, all of which prefer two of its experts."""
    module, x = MoE(HIDDEN, WIDTH, NUM_EXPERTS, NUM_TOPK, **options), tokens(128)
    x[:, 0] = 1
    with torch.no_grad():
        module.gate.weight[:2, 0] += 3
    return module, x


def test_the_bias_balances_a_router():
    module, x = one_sided(scoring="sigmoid", selection_bias=True)
    loads = []
    for _ in range(120):
        loads.append(module(x)[1].load)
        module.update_bias(loads[-1], 0.01)
    mean = 128 * NUM_TOPK / NUM_EXPERTS
    assert loads[0].max() > 3 * mean
    assert torch.stack(loads[-10:]).sum(0).max() < 1.5 * 10 * mean


def test_the_balance_loss_trains_a_router():
    module, x = one_sided()
    optimizer = torch.optim.SGD([module.gate.weight], 1.0)
    first = module(x)[1]
    for _ in range(30):
        optimizer.zero_grad()
        module(x)[1].load_balance.backward()
        optimizer.step()
    last = module(x)[1]
    assert first.load_balance > 2
    assert last.load_balance < 1.2
    assert last.load.max() < first.load.max() / 2


# ---- as modules are used ---------------------------------------------------------------------------------------------


def test_compile_is_one_graph():
    torch._dynamo.reset()
    module = layer("all of it")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for x in (tokens(), tokens(2, 5)):
        results = []
        for call in (module, compiled):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            out, losses = call(leaf)
            (out.square().sum() + losses.load_balance + losses.z_loss).backward()
            results.append([out, *losses, leaf.grad, *(p.grad for p in module.parameters())])
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_under_autocast_the_router_is_float32(is_compiled):
    module, x = layer("groups, a bias, a shared expert"), tokens()
    call = torch.compile(module, fullgraph=True, backend="aot_eager") if is_compiled else module
    with torch.autocast("cpu", torch.bfloat16):
        out, losses = call(x)
        topk_weights, topk_idx, _ = module.route(x.view(-1, HIDDEN))
    assert out.dtype == torch.bfloat16
    wanted, expected, _ = module.route(x.view(-1, HIDDEN))
    assert torch.equal(topk_idx, expected)
    assert torch.equal(topk_weights, wanted)
    assert torch.equal(losses.z_loss, module(x)[1].z_loss)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_without_losses_it_gives_the_output_alone():
    module, x = layer(return_losses=False), tokens()
    assert torch.equal(module(x), layer()(x)[0])


def test_the_bias_stays_float32():
    module = layer("groups, a bias, a shared expert")
    bias = module.gate.e_score_correction_bias.clone()
    module.bfloat16()
    assert module.gate.weight.dtype == torch.bfloat16
    assert torch.equal(module.gate.e_score_correction_bias, bias)
    module.load_state_dict({**module.state_dict(), "gate.e_score_correction_bias": bias.half()}, assign=True)
    assert torch.equal(module.gate.e_score_correction_bias, bias.half().float())
    assert module(tokens(dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_a_layer_made_on_meta():
    module = MoE(HIDDEN, WIDTH, NUM_EXPERTS, NUM_TOPK, selection_bias=True, shared_width=8, device="meta")
    assert module(torch.empty(5, HIDDEN, device="meta"))[0].shape == (5, HIDDEN)
    module.to_empty(device="cpu")
    module.reset_parameters()
    assert module.gate.e_score_correction_bias.tolist() == [0.0] * NUM_EXPERTS
    for parameter in module.parameters():
        bound = parameter.shape[-1] ** -0.5
        assert 0.8 * bound < parameter.abs().max() <= bound
    assert module(tokens())[0].isfinite().all()


def test_a_copy_and_a_state_dict():
    module, x = layer("groups, a bias, a shared expert"), tokens()
    other = copy.deepcopy(module)
    assert torch.equal(other(x)[0], module(x)[0])
    with torch.no_grad():
        other.experts.down_proj += 1
    assert not torch.equal(other(x)[0], module(x)[0])
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x)[0], module(x)[0])


def test_a_checkpointed_layer_may_keep_its_products():
    module, x = layer("a capacity"), tokens()
    policy = checkpoint_policy(torch.ops.fmkernels.moe_grouped_mm.default)
    results, counts = [], []
    for options in (None, {}, {"context_fn": policy}):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        with CountOps() as counter:
            call = module if options is None else lambda x, o=options: checkpoint(module, x, use_reentrant=False, **o)
            out, losses = call(leaf)
            (out.square().sum() + losses.load_balance).backward()
        results.append([leaf.grad, *(p.grad for p in module.parameters())])
        counts.append(counter.counts["moe_grouped_mm"])
    assert counts[0] == counts[2] < counts[1]
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "sentence"),
    [
        ({"hidden": 0}, ValueError, "nn.MoE: hidden must be at least 1, got 0."),
        ({"width": 1.0}, TypeError, "nn.MoE: width must be an integer, got float."),
        ({"num_experts": 2000}, ValueError, "moe.route: logits must have from 1 to 1024 experts, got 2000."),
        ({"num_topk": 9}, ValueError, "moe.route: num_topk must be at most 8 for these experts and groups, got 9."),
        ({"num_groups": 3}, ValueError, "moe.route: num_groups must divide the 8 experts and be at most 32, got 3."),
        (
            {"scoring": "tanh"},
            ValueError,
            "moe.route: scoring must be softmax or sigmoid or sqrt_softplus, got 'tanh'.",
        ),
        ({"group_score": "min"}, ValueError, "moe.route: group_score must be max or top2 or sum, got 'min'."),
        ({"renormalize": 1}, TypeError, "moe.route: renormalize must be True or False, got int."),
        ({"selection_bias": None}, TypeError, "nn.MoE: selection_bias must be True or False, got NoneType."),
        ({"policy": "random"}, ValueError, "nn.MoE: policy must be position or weight, got 'random'."),
        ({"capacity_factor": -1.0}, ValueError, "nn.MoE: capacity_factor must not be negative, got -1.0."),
        ({"routed_scale": torch.inf}, ValueError, "nn.MoE: routed_scale must be finite in float32, got inf."),
        ({"shared_width": -1}, ValueError, "nn.MoE: shared_width must be at least 0, got -1."),
        ({"weight_grad_store": 3}, TypeError, "nn.Experts: weight_grad_store must be a WeightGradStore, got int."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_are_refused(changed, error, sentence):
    arguments = {"hidden": HIDDEN, "width": WIDTH, "num_experts": NUM_EXPERTS, "num_topk": NUM_TOPK} | changed
    with pytest.raises(error, match=rf"^{re.escape(sentence)}$"):
        MoE(**arguments)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: layer()(None), TypeError, "nn.MoE: x must be a tensor, got NoneType."),
        (lambda: layer()(torch.zeros(3, 31)), ValueError, "nn.MoE: x must be [..., 32], got [3, 31]."),
        (
            lambda: layer()(tokens(dtype=torch.bfloat16)),
            ValueError,
            "moe.moe_mlp: w_gate_up must have the dtype of x, bfloat16, got float32.",
        ),
        (
            lambda: layer().update_bias(torch.zeros(8, dtype=torch.int64), 0.1),
            ValueError,
            "nn.MoE.update_bias: the layer must have a selection_bias, got one without.",
        ),
        (
            lambda: layer("groups, a bias, a shared expert").update_bias(torch.zeros(8), 0.1),
            ValueError,
            "nn.MoE.update_bias: load must be int64 or int32, got float32.",
        ),
        (
            lambda: layer("groups, a bias, a shared expert").update_bias(torch.zeros(7, dtype=torch.int64), 0.1),
            ValueError,
            "nn.MoE.update_bias: load must have as many elements as the layer has experts, 8, got 7.",
        ),
        (lambda: Experts(2000, 8, 8), ValueError, "nn.Experts: num_experts must be at most 1024, got 2000."),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_calls_that_are_refused(call, error, sentence):
    with pytest.raises(error, match=rf"^{re.escape(sentence)}$"):
        call()
