# SPDX-License-Identifier: Apache-2.0
"""integrations.transformers: small random models, against the definition of attention in float64 and against eager."""

import copy
import importlib.metadata

import pytest
import torch

from fmkernels import attention, reference
from fmkernels.integrations import transformers as integration
from fmkernels.testing import assert_as_good_as_torch

transformers = pytest.importorskip("transformers")

SEQ, WINDOW = 13, 5
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}
CAUSAL_MODELS = {
    "Llama": lambda: transformers.LlamaConfig(**SIZES),
    "Mistral, window": lambda: transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
    "Gemma2, softcap, window in every second layer": lambda: transformers.Gemma2Config(
        **SIZES, sliding_window=WINDOW, attn_logit_softcapping=0.05, query_pre_attn_scalar=2
    ),
    "GPT-OSS, sinks, window in every second layer": lambda: transformers.GptOssConfig(
        **SIZES, **EXPERTS, sliding_window=WINDOW
    ),
    "Phimoe, window in the config alone": lambda: transformers.PhimoeConfig(
        **{name: size for name, size in SIZES.items() if name != "head_dim"}, **EXPERTS, sliding_window=WINDOW
    ),
    "Llama4, chunks": lambda: transformers.Llama4TextConfig(
        **SIZES, **EXPERTS, intermediate_size_mlp=64, attention_chunk_size=WINDOW, no_rope_layers=[1, 0]
    ),
}


def reference_attention(module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, position_bias=0, **_):
    """The definition, under the whole mask of transformers: no window and no causality but what the mask says."""
    bias = position_bias + torch.zeros((), dtype=query.dtype).where(mask, -torch.inf)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    options = {"softmax_scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux, "bias": bias}
    return reference.attention(q, k, v, **options)[0], None


def whole_mask(**kwargs):
    return transformers.masking_utils.sdpa_mask(
        **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    )


@pytest.fixture(scope="module", autouse=True)
def _registered():
    integration.register()
    transformers.AttentionInterface.register("reference", reference_attention)
    transformers.AttentionMaskInterface.register("reference", whole_mask)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # the models are tiny


def random_model(config, auto_class=transformers.AutoModelForCausalLM, attn_implementation="fmkernels", dtype=None):
    """The same weights in every call, those of attention large enough to matter."""
    torch.manual_seed(0)
    model = auto_class.from_config(config, attn_implementation=attn_implementation, experts_implementation="eager")
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("q_proj", "k_proj", "sinks")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().to(dtype)


@pytest.fixture(scope="module", params=CAUSAL_MODELS)
def config(request):
    return CAUSAL_MODELS[request.param]()


@pytest.fixture(scope="module")
def model(config):
    return random_model(config)


@pytest.fixture(scope="module")
def embeds():
    return torch.randn(2, SEQ, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch):
    """The calls that reach fmkernels, each as (q, k, v, keyword arguments)."""
    calls = []

    def record(q, k, v, **kwargs):
        calls.append((q, k, v, kwargs))
        return attention(q, k, v, **kwargs)

    monkeypatch.setattr(integration, "attention", record)
    return calls


def definition(config, **model_options):
    """A function from embeddings to logits, with the definition of attention in the dtype of the embeddings."""

    @torch.no_grad()
    def logits(embeds, rows=slice(None), **kwargs):
        model = random_model(
            copy.deepcopy(config), attn_implementation="reference", dtype=embeds.dtype, **model_options
        )
        return model(inputs_embeds=embeds, **kwargs)[0][rows]

    return logits


# ---- values ----


@torch.no_grad()
def test_logits(config, model, embeds, calls):
    actual = model(inputs_embeds=embeds).logits
    assert len(calls) == SIZES["num_hidden_layers"]
    assert_as_good_as_torch(actual, definition(config), embeds)
    eager = random_model(copy.deepcopy(config), attn_implementation="eager")
    torch.testing.assert_close(actual, eager(inputs_embeds=embeds).logits)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(config, model, embeds, side):
    padding = torch.ones(2, SEQ, dtype=torch.long)
    padding[0, :4] = 0
    padding = padding.flip(1) if side == "right" else padding
    rows = padding.bool()
    actual = model(inputs_embeds=embeds, attention_mask=padding).logits[rows]
    assert actual.isfinite().all()
    assert_as_good_as_torch(actual, definition(config), embeds, rows=rows, attention_mask=padding)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "dynamic, left padding", "static"])
def test_cache(config, model, embeds, cache):
    """A prompt, then a chunk of three tokens, then single ones, past the end of the window."""
    padded = "padding" in cache
    padding = torch.ones(2, SEQ, dtype=torch.long)
    padding[0, :2] = 0 if padded else 1
    if cache == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=SEQ + 4)
    else:
        cache = transformers.DynamicCache(config=model.config)
    steps, begin = [], 0
    for end in (4, 7, *range(8, SEQ + 1)):
        mask = padding[:, :end] if padded else None
        output = model(inputs_embeds=embeds[:, begin:end], attention_mask=mask, past_key_values=cache)
        steps.append(output.logits)
        begin = end
    rows = padding.bool()
    assert_as_good_as_torch(torch.cat(steps, 1)[rows], definition(config), embeds, rows=rows, attention_mask=padding)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(config, model, cache):
    if cache == "static" and "Llama4" in type(model).__name__:
        pytest.skip("transformers 5.17 makes no chunked mask for a static cache")
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(2))
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    options = {"attention_mask": padding, "max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    actual = model.generate(ids, **options)
    eager = random_model(copy.deepcopy(config), attn_implementation="eager")
    assert torch.equal(actual, eager.generate(ids, **options))


@torch.no_grad()
@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
def test_custom_mask(embeds, additive):
    """A mask with four dimensions stands for everything: here the first four tokens see one another (prefix-LM)."""
    config = CAUSAL_MODELS["Llama"]()
    visible = torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool).tril()
    visible[..., :4, :4] = True
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min) if additive else visible
    actual = random_model(config)(inputs_embeds=embeds, attention_mask=mask).logits
    assert_as_good_as_torch(actual, definition(config), embeds, attention_mask=visible)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padding"])
def test_bidirectional_model(embeds, padded, calls):
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = transformers.BertConfig(**sizes, num_attention_heads=4)
    padding = torch.ones(2, SEQ, dtype=torch.long)
    padding[0, 9:] = 0 if padded else 1
    rows = padding.bool()
    model = random_model(config, transformers.AutoModel)
    actual = model(inputs_embeds=embeds, attention_mask=padding).last_hidden_state[rows]
    assert [call[3]["causal"] for call in calls] == [False, False]
    assert all((call[3]["bias"] is not None) == padded for call in calls)
    expected = definition(config, auto_class=transformers.AutoModel)
    assert_as_good_as_torch(actual, expected, embeds, rows=rows, attention_mask=padding)


@torch.no_grad()
def test_position_bias(embeds, calls):
    """T5: a learned bias for each head; encoder, decoder and cross attention."""
    config = transformers.T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    padding = torch.ones(2, SEQ, dtype=torch.long)
    padding[0, 9:] = 0
    inputs = {"attention_mask": padding, "decoder_input_ids": torch.arange(12).reshape(2, 6)}
    auto_class = transformers.AutoModelForSeq2SeqLM
    actual = random_model(config, auto_class)(inputs_embeds=embeds, **inputs).logits
    assert len(calls) == 6
    assert_as_good_as_torch(actual, definition(config, auto_class=auto_class), embeds, **inputs)


# ---- what the kernel is given ----


@torch.no_grad()
def test_no_mask_where_causality_and_window_suffice(model, embeds, calls):
    if "Llama4" in type(model).__name__:
        pytest.skip("chunks are no window")
    cache = transformers.DynamicCache(config=model.config)
    padding = torch.ones(2, SEQ, dtype=torch.long)
    for begin, end in ((0, 7), (7, 10), (10, 11)):
        model(inputs_embeds=embeds[:, begin:end], attention_mask=padding[:, :end], past_key_values=cache)
    assert len(calls) == 3 * SIZES["num_hidden_layers"]
    for _, k, _, kwargs in calls:
        assert kwargs["bias"] is None
        assert kwargs["causal"]
        assert k.shape[2] == SIZES["num_key_value_heads"]
    windows = {call[3]["window"] for call in calls}
    assert windows <= {(-1, -1), (WINDOW - 1, 0)}
    assert ((WINDOW - 1, 0) in windows) == bool(getattr(model.config, "sliding_window", None))


def test_inputs_are_read_where_they_lie(calls):
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    integration.attention_forward(torch.nn.Module(), q, k, v, None)
    assert [t.data_ptr() for t in calls[0][:3]] == [t.data_ptr() for t in (q, k, v)]


def test_compiles_without_a_graph_break(embeds):
    model = random_model(CAUSAL_MODELS["Mistral, window"]())
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(inputs_embeds=embeds, use_cache=False).logits, expected)


def test_attention_dropout_while_training(calls, embeds):
    model = random_model(transformers.LlamaConfig(**SIZES, attention_dropout=0.5))
    torch.manual_seed(3)
    first, second = (model.train()(inputs_embeds=embeds).logits for _ in range(2))
    assert {call[3]["dropout_p"] for call in calls} == {0.5}
    torch.manual_seed(3)
    assert torch.equal(model(inputs_embeds=embeds).logits, first)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.model.layers.parameters())
    calls.clear()
    model.eval()(inputs_embeds=embeds)
    assert {call[3]["dropout_p"] for call in calls} == {0.0}


# ---- errors ----


def test_weights_are_refused():
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="output_attentions must be False"):
        integration.attention_forward(torch.nn.Module(), q, q, q, None, output_attentions=True)


@pytest.mark.parametrize("version", [None, "4.57.1"])
def test_register_without_a_fitting_transformers(version, monkeypatch):
    def find(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    with pytest.raises(ImportError, match=r"needs transformers 5\.0 or newer, found (none|4\.57\.1); run: pip install"):
        integration.register()
