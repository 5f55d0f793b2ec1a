# SPDX-License-Identifier: Apache-2.0
"""Layers of experts out of checkpoints: small random models of transformers, saved, and against them in float64."""

import json
import re

import pytest
import torch
from nn_layers import moe_definition
from torch.profiler import profile

from fmkernels import nn
from fmkernels.integrations import transformers as integration
from fmkernels.integrations.moe_checkpoints import load_moe_layer, moe_arguments
from fmkernels.nn.experts import expert_places
from fmkernels.testing import assert_as_good_as_torch

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {**SIZES, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_routed_experts": 8}
DEEPSEEK |= {"n_group": 4, "topk_group": 2, "n_shared_experts": 2}
QWEN = {**SIZES, "moe_intermediate_size": 24, "num_experts": 8, "head_dim": 16}
MODELS = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=5),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**DEEPSEEK, **LATENT),
    "deepseek_v3, not renormalised": lambda: transformers.DeepseekV3Config(**DEEPSEEK, **LATENT, norm_topk_prob=False),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(**DEEPSEEK, **LATENT, routed_scaling_factor=1.5),
    "deepseek_v2, groups": lambda: transformers.DeepseekV2Config(
        **DEEPSEEK, **LATENT, routed_scaling_factor=16.0, topk_method="group_limited_greedy"
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**QWEN, norm_topk_prob=True),
    "olmoe, not renormalised": lambda: transformers.OlmoeConfig(**SIZES, num_experts=8),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(**DEEPSEEK, head_dim=16),
}


def model(name, dtype=torch.float32):
    """A random model, with weights large enough that experts differ, and a bias that changes the choice."""
    torch.manual_seed(0)
    result = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).to(dtype)
    block = result.model.layers[1].mlp
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        if hasattr(block.gate, "e_score_correction_bias"):
            block.gate.e_score_correction_bias.uniform_(-0.3, 0.3)
    return result


def prefix(name):
    return "model.layers.1." + ("block_sparse_moe" if name == "mixtral" else "mlp")


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_layer_computes_what_it_computed(name, tmp_path):
    """Both are as good as torch against the same definition in float64."""
    source = model(name)
    source.save_pretrained(tmp_path)
    layer = load_moe_layer(tmp_path, prefix(name), return_losses=False)
    block = source.model.layers[1].mlp
    assert layer.state_dict().keys() == block.state_dict().keys()
    for key, tensor in block.state_dict().items():
        assert torch.equal(layer.state_dict()[key], tensor), key
    x = torch.randn(2, 9, 32)
    for module in (layer, block):
        with torch.no_grad():
            out = module(x)
        assert_as_good_as_torch(out, lambda *t: moe_definition(layer)(*t)[0], x, *layer.state_dict().values())


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_the_state_dict_of_a_block_loads_and_goes_back(name):
    source = model(name)
    block = source.model.layers[1].mlp
    layer = nn.MoE(**moe_arguments(source.config))
    layer.load_state_dict(block.state_dict())
    other = model(name).model.layers[1].mlp
    other.load_state_dict(layer.state_dict())
    for key, tensor in block.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_with_a_tensor_an_expert_loads(name, assign, tmp_path):
    source = model(name)
    source.save_pretrained(tmp_path)
    saved = safetensors_torch.load_file(tmp_path / "model.safetensors")
    part = {key.removeprefix(f"{prefix(name)}."): t for key, t in saved.items() if key.startswith(prefix(name))}
    assert not any(key.endswith("gate_up_proj") for key in part)
    layer = nn.MoE(**moe_arguments(source.config), device="meta" if assign else None)
    layer.load_state_dict(part, assign=assign)
    for key, tensor in source.model.layers[1].mlp.state_dict().items():
        assert torch.equal(layer.state_dict()[key], tensor), key


def test_stacked_experts_in_a_file_load(tmp_path):
    source = model("deepseek_v3")
    state = {f"some.layer.{key}": t for key, t in source.model.layers[1].mlp.state_dict().items()}
    safetensors_torch.save_file(state, tmp_path / "layer.safetensors")
    layer = load_moe_layer([tmp_path / "layer.safetensors"], "some.layer.", config=source.config)
    assert all(torch.equal(state[f"some.layer.{key}"], t) for key, t in layer.state_dict().items())


def test_a_checkpoint_in_several_files_is_read_where_the_layer_is(tmp_path):
    source = model("mixtral")
    source.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for key, file in index.items() if key.startswith(prefix("mixtral"))}
    assert 1 < len(needed) < len(set(index.values()))
    for file in set(index.values()) - needed:
        (tmp_path / file).unlink()
    layer = load_moe_layer(tmp_path, prefix("mixtral"))
    for key, tensor in source.model.layers[1].mlp.state_dict().items():
        assert torch.equal(layer.state_dict()[key], tensor), key
    (tmp_path / sorted(needed)[0]).unlink()
    with pytest.raises(ValueError, match=r"^load_moe_layer: source must have the file .*safetensors, got none\.$"):
        load_moe_layer(tmp_path, prefix("mixtral"))


def test_the_dtypes_are_those_of_the_checkpoint_or_as_asked(tmp_path):
    source = model("deepseek_v3", torch.bfloat16)
    gate = source.model.layers[1].mlp.gate
    gate.weight.data = gate.weight.data.float()
    source.save_pretrained(tmp_path)
    layer = load_moe_layer(tmp_path, prefix("deepseek_v3"))
    assert layer.experts.down_proj.dtype == layer.shared_experts.up_proj.weight.dtype == torch.bfloat16
    assert layer.gate.weight.dtype == layer.gate.e_score_correction_bias.dtype == torch.float32
    assert layer(torch.randn(3, 32, dtype=torch.bfloat16))[0].dtype == torch.bfloat16
    layer = load_moe_layer(tmp_path, prefix("deepseek_v3"), dtype=torch.float16, capacity_factor=2.0)
    assert {p.dtype for p in layer.parameters()} == {torch.float16}
    assert layer.gate.e_score_correction_bias.dtype == torch.float32
    assert layer.capacity_factor == 2.0


# ---- the experts of a model that stays ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "olmoe, not renormalised"])
def test_a_model_runs_on_our_experts(name):
    integration.register()
    source = model(name)
    source.set_experts_implementation("fmkernels")
    block = source.model.layers[1].mlp
    layer = nn.MoE(**moe_arguments(source.config))
    layer.load_state_dict(block.state_dict())
    x = torch.randn(2, 9, 32)
    with profile() as profiler:
        out = block(x)
    assert any("fmkernels::moe" in event.key for event in profiler.key_averages())
    assert_as_good_as_torch(out, lambda *t: moe_definition(layer)(*t)[0], x, *layer.state_dict().values())
    tokens = torch.randint(0, 64, (2, 7))
    source(tokens, labels=tokens).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in block.experts.parameters())


def test_experts_that_are_others_are_refused():
    integration.register()
    sizes = SIZES | {"num_local_experts": 4, "head_dim": 16}
    gpt_oss = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes))
    gpt_oss.set_experts_implementation("fmkernels")
    with pytest.raises(ValueError, match=r"^experts_implementation='fmkernels': has_bias must be False, got True\.$"):
        gpt_oss(torch.zeros(1, 3, dtype=torch.long))
    mixtral = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_local_experts=4, hidden_act="gelu")
    )
    mixtral.set_experts_implementation("fmkernels")
    with pytest.raises(ValueError, match=r"^experts_implementation='fmkernels': the activation must be SiLU, got GELU"):
        mixtral(torch.zeros(1, 3, dtype=torch.long))


# ---- errors ----------------------------------------------------------------------------------------------------------


def layer_file(folder, change):
    """The configuration, and a file with the tensors of a layer of Mixtral that `change` was given."""
    source = model("mixtral")
    source.save_pretrained(folder)
    saved = safetensors_torch.load_file(folder / "model.safetensors")
    part = {
        key.removeprefix(f"{prefix('mixtral')}."): t for key, t in saved.items() if key.startswith(prefix("mixtral"))
    }
    change(part)
    safetensors_torch.save_file({f"m.{key}": t.contiguous() for key, t in part.items()}, folder / "model.safetensors")
    return part


TWO = ("experts.1.w2.weight", "experts.4.w1.weight")
CHANGES = {
    "missing": (
        lambda part: [part.pop(key) for key in TWO],
        "the checkpoint must have all tensors of the layer, got none m.experts.1.w2.weight and 1 more.",
        {"experts.1.w2.weight", "experts.4.w1.weight"},
    ),
    "unexpected": (
        lambda part: part.update({"experts.5.w1.weight": torch.zeros(48, 32)}),
        "the checkpoint must have no others there, got m.experts.5.w1.weight.",
        {"experts.5.w1.weight"},
    ),
    "another shape": (
        lambda part: part.update({"experts.3.w3.weight": torch.zeros(32, 48)}),
        "m.experts.3.w3.weight must be [48, 32], as config has it, got [32, 48].",
        {r"experts.3.w3.weight must be \[48, 32\], got \[32, 48\]"},
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_wrong_with_a_checkpoint_is_said(case, tmp_path):
    change, sentence, names = CHANGES[case]
    part = layer_file(tmp_path, change)
    with pytest.raises(ValueError, match=rf"^load_moe_layer: {re.escape(sentence)}$"):
        load_moe_layer(tmp_path, "m")
    layer = nn.MoE(32, 48, 5, 3)
    before = {key: t.clone() for key, t in layer.experts.state_dict().items()}
    with pytest.raises(RuntimeError) as raised:
        layer.load_state_dict(part)
    assert all(re.search(name, str(raised.value)) for name in names), raised.value
    after = layer.experts.state_dict()
    if case == "another shape":
        assert all(torch.equal(t, before[key]) for key, t in after.items())
    if case == "missing":  # what is there is loaded, as torch does
        places, old = (expert_places(*state.values(), ("w1", "w3", "w2")) for state in (after, before))
        for key, place in places.items():
            assert torch.equal(place, old[key] if f"experts.{key}" in TWO else part[f"experts.{key}"]), key
        assert set(layer.load_state_dict(part, strict=False).missing_keys) == set(TWO)


def test_what_else_is_refused(tmp_path):
    layer_file(tmp_path, lambda part: None)
    for call, error, sentence in (
        (lambda: load_moe_layer(tmp_path, 3), TypeError, "prefix must be a string, got int."),
        (lambda: load_moe_layer(3, "m"), TypeError, "source must be a folder or files, got int."),
        (
            lambda: load_moe_layer("no/such", "m"),
            ValueError,
            "source must be a folder or a list of files, got 'no/such'.",
        ),
        (
            lambda: load_moe_layer(tmp_path, "mlp"),
            ValueError,
            "prefix must begin the names of tensors in the checkpoint, got 'mlp.'.",
        ),
        (
            lambda: load_moe_layer([tmp_path / "model.safetensors"], "m"),
            ValueError,
            "config must be given where source is not a folder, got None.",
        ),
    ):
        with pytest.raises(error, match=rf"^load_moe_layer: {re.escape(sentence)}$"):
            call()
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"^load_moe_layer: config must be given where .* has no config.json, got None\.$"
    ):
        load_moe_layer(tmp_path, "m")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"model_type": "llama"},
            "model_type must be one of mixtral, qwen3_moe, olmoe, flex_olmo, deepseek_v2, .* got 'llama'",
        ),
        ({"hidden_act": "gelu"}, "hidden_act must be silu: nothing else is supported, got 'gelu'"),
        ({"router_jitter_noise": 0.1}, r"router_jitter_noise must be 0: nothing else is supported, got 0\.1"),
        ({"num_experts_per_tok": None}, "config must have num_experts_per_tok for model_type mixtral, got none"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configurations_that_are_refused(change, sentence):
    with pytest.raises(ValueError, match=rf"^moe_arguments: {sentence}\.$"):
        moe_arguments(MODELS["mixtral"]().to_dict() | change)


def test_a_configuration_that_is_none():
    with pytest.raises(
        TypeError, match=r"^moe_arguments: config must be a configuration or a dictionary, got NoneType\.$"
    ):
        moe_arguments(None)
