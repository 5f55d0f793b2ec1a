# SPDX-License-Identifier: Apache-2.0
"""Layers of experts out of the checkpoints of transformers: `moe_arguments` and `load_moe_layer`.

    moe = load_moe_layer("Mixtral-8x7B-v0.1", "model.layers.3.block_sparse_moe")

Needs the package safetensors, and no transformers. Only the tensors of the layer are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nn.experts import expert_places, hub_form
from ..nn.moe import MoE

_OP = "load_moe_layer"
_SOFTMAX = ("mixtral", "qwen3_moe", "olmoe", "flex_olmo")
_SIGMOID = ("deepseek_v3", "glm4_moe", "dots1")
_MODELS = (*_SOFTMAX, "deepseek_v2", *_SIGMOID)


def moe_arguments(config: Any) -> dict[str, Any]:
    """The arguments with which `nn.MoE` is the layer of experts of a model.

    Args:
        config: a configuration of transformers, or the dictionary in its config.json. model_type must be mixtral,
            qwen3_moe, olmoe, flex_olmo, deepseek_v2, deepseek_v3, glm4_moe or dots1.

    Returns:
        A dictionary, to be extended: `nn.MoE(**moe_arguments(model.config), capacity_factor=1.25)`.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    op = "moe_arguments"
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise TypeError(f"{op}: config must be a configuration or a dictionary, got {type(config).__name__}.")
    model = config.get("model_type")
    if model not in _MODELS:
        raise ValueError(f"{op}: model_type must be one of {', '.join(_MODELS)}, got {model!r}.")

    def get(*names: str) -> Any:
        found = [config[name] for name in names if config.get(name) is not None]
        if not found:
            raise ValueError(f"{op}: config must have {' or '.join(names)} for model_type {model}, got none.")
        return found[0]

    for name, only in (("hidden_act", "silu"), ("router_jitter_noise", 0)):
        if config.get(name, only) != only:
            raise ValueError(f"{op}: {name} must be {only}: nothing else is supported, got {config[name]!r}.")
    arguments = {
        "hidden": get("hidden_size"),
        "width": get("moe_intermediate_size", "intermediate_size"),
        "num_experts": get("num_local_experts", "n_routed_experts", "num_experts"),
        "num_topk": get("num_experts_per_tok"),
    }
    if model in _SOFTMAX:
        return arguments | {"renormalize": model == "mixtral" or get("norm_topk_prob")}
    shared = arguments["width"] * (config.get("n_shared_experts") or 0)
    arguments |= {"routed_scale": get("routed_scaling_factor"), "shared_width": shared}
    groups = {"num_groups": get("n_group"), "topk_groups": get("topk_group")} if config.get("n_group") else {}
    if model == "deepseek_v2":
        has_groups = config.get("topk_method") == "group_limited_greedy"
        return arguments | {"renormalize": False} | (groups if has_groups else {})
    arguments |= {"scoring": "sigmoid", "group_score": "top2", "selection_bias": True}
    return arguments | {"renormalize": get("norm_topk_prob")} | groups


def load_moe_layer(
    source: str | Path | Iterable[str | Path],
    prefix: str,
    *,
    config: Any = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> MoE:
    """An `nn.MoE` with the weights of one layer of a checkpoint.

    Args:
        source: a folder with config.json and *.safetensors, with an index where there are several; or those files.
        prefix: what the names of the layer's tensors begin with, such as "model.layers.3.mlp"; Mixtral's checkpoints
            have "model.layers.3.block_sparse_moe". The experts may be stacked or have a tensor each.
        config: as of `moe_arguments`; default: the config.json of the folder.
        device: of the layer.
        dtype: of the layer; default: that of the checkpoint, for the router that of its own weight.
        options: further arguments of `nn.MoE`, such as return_losses=False.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came: tensors that are missing, that
            are not of the layer, or that have another shape.
    """
    if not isinstance(prefix, str):
        raise TypeError(f"{_OP}: prefix must be a string, got {type(prefix).__name__}.")
    from safetensors import safe_open

    prefix = prefix if not prefix or prefix.endswith(".") else prefix + "."
    files, config = _files(source, prefix, config)
    layer = MoE(**(moe_arguments(config) | options), device="meta")
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        for path in files:
            tensors = stack.enter_context(safe_open(path, "pt"))
            names = tensors.keys()
            found |= {name.removeprefix(prefix): tensors for name in names if name.startswith(prefix)}
        form = hub_form(found, "experts.", layer.experts.num_experts)
        _check_names(prefix, _places(layer, form).keys(), found.keys())

        def dtype_of(name: str) -> torch.dtype:
            return found[name].get_slice(prefix + name)[:1].dtype if dtype is None else dtype

        down = "experts.down_proj" if form is None else f"experts.0.{form[2]}.weight"
        layer.to(dtype_of(down)).gate.to(dtype_of("gate.weight"))
        layer.to_empty(device="cpu" if device is None else device)
        for name, place in _places(layer, form).items():
            tensor = found[name].get_tensor(prefix + name)
            if tensor.shape != place.shape:
                raise ValueError(
                    f"{_OP}: {prefix}{name} must be {list(place.shape)}, as config has it, got {list(tensor.shape)}."
                )
            place.copy_(tensor)
    return layer


def _places(layer: MoE, form: tuple[str, str, str] | None) -> dict[str, Tensor]:
    """Where the tensors of a checkpoint belong, by their names."""
    places = {name: tensor.detach() for name, tensor in layer.state_dict().items()}
    if form is not None:
        stacks = [places.pop(f"experts.{name}") for name in ("gate_up_proj", "down_proj")]
        places |= {f"experts.{name}": place for name, place in expert_places(*stacks, form).items()}
    return places


def _check_names(prefix: str, wanted: Set[str], found: Set[str]) -> None:
    if not found:
        raise ValueError(f"{_OP}: prefix must begin the names of tensors in the checkpoint, got {prefix!r}.")
    for what, names in (
        ("have all tensors of the layer, got none", wanted - found),
        ("have no others there, got", found - wanted),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{_OP}: the checkpoint must {what} {prefix}{min(names)}{more}.")


def _files(source: Any, prefix: str, config: Any) -> tuple[list[Path], Any]:
    """The files to look into, and the configuration."""
    if not isinstance(source, str | Path):
        if not isinstance(source, Iterable):
            raise TypeError(f"{_OP}: source must be a folder or files, got {type(source).__name__}.")
        files = [Path(path) for path in source]
        if config is None:
            raise ValueError(f"{_OP}: config must be given where source is not a folder, got None.")
    else:
        folder = Path(source)
        if not folder.is_dir():
            raise ValueError(f"{_OP}: source must be a folder or a list of files, got {str(source)!r}.")
        if config is None:
            if not (folder / "config.json").exists():
                raise ValueError(f"{_OP}: config must be given where {folder} has no config.json, got None.")
            config = json.loads((folder / "config.json").read_text())
        index = folder / "model.safetensors.index.json"
        if index.exists():
            weight_map = json.loads(index.read_text())["weight_map"]
            files = [folder / name for name in sorted({f for n, f in weight_map.items() if n.startswith(prefix)})]
        else:
            files = sorted(folder.glob("*.safetensors"))
    for path in files:
        if not path.is_file():
            raise ValueError(f"{_OP}: source must have the file {path}, got none.")
    return files, config
