# SPDX-License-Identifier: Apache-2.0
"""Tokens drawn from logits: every request with its own options and its own seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _check as check
from ._library import call, ops, register_fake

Option = float | Tensor | None
MAX_VOCAB = 1 << 23

# What every value of an option, a number or a tensor, must be, and how it is said.
_RULES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "temperature": (lambda x: (x >= 0) & (x < math.inf), "finite and not negative"),
    "top_k": (lambda x: x >= 0, "not negative"),
    "top_p": (lambda x: (x >= 0) & (x <= 1), "from 0 to 1"),
    "min_p": (lambda x: (x >= 0) & (x <= 1), "from 0 to 1"),
    "repetition_penalty": (lambda x: (x > 0) & (x < math.inf), "finite and positive in float32"),
    "frequency_penalty": (lambda x: abs(x) < math.inf, "finite"),
    "presence_penalty": (lambda x: abs(x) < math.inf, "finite"),
}


def sample(
    logits: Tensor,
    *,
    seed: Tensor,
    offset: Tensor,
    temperature: Option = None,
    top_k: int | Tensor | None = None,
    top_p: Option = None,
    min_p: Option = None,
    repetition_penalty: Option = None,
    frequency_penalty: Option = None,
    presence_penalty: Option = None,
    output_counts: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    return_logprobs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draws one token a row, after penalties, temperature, min_p, top_k and top_p, in this order.

        x = logits; of a token in the prompt or the output: x / repetition if x > 0 else x * repetition
        x = x - frequency * count - presence * (count > 0);  p = softmax(x / temperature)
        S1 = {p >= min_p * max p};  S2 = the first top_k of S1;  S3 = the shortest beginning of S2 with top_p of its p

    Order is by falling x, and equal x by rising id. The token is drawn from p over S3. What is drawn is a function of
    the row, its options, its seed and its offset: not of the batch, and the same on the CPU and on CUDA. p is rounded
    down to multiples of 2**-40 of the largest; the sets and the draw are exact over these integers.

    Args:
        logits: [batch, vocab]; float32, bfloat16 or float16, any strides with a contiguous last dimension; vocab at
            most 2**23.
        seed: [batch], int64, of each request.
        offset: [batch], int64, to be changed before every draw of a request, as by adding 1.
        temperature: not negative; 0 takes the largest x, of equal ones the lowest id. Default 1.
        top_k: at least 1, or 0 for all tokens. Default 0.
        top_p: from 0 to 1; at least one token stays. Default 1.
        min_p: from 0 to 1. Default 0.
        repetition_penalty: positive. Default 1.
        frequency_penalty, presence_penalty: finite. Default 0.
        output_counts: [batch, vocab], int32: how often each token is in the output; without it, no token is.
        prompt_mask: [batch, vocab], bool: which tokens are in the prompt; without it, none is.
        return_logprobs: whether to return the tokens' log-probabilities under softmax(logits), float32, too.

    Options are numbers for all rows or tensors [batch], float32 (top_k int32), on the device of logits.

    Returns:
        tokens [batch], int64, or (tokens, logprobs). A row with a NaN in x, or with nothing above -infinity, gives -1
        and a NaN.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. Values in tensors are checked on
            the CPU, and on CUDA under FMKERNELS_CHECK=1; there they are otherwise clamped to their range, and NaN, a
            penalty that is not finite or a repetition_penalty that is not positive is taken as the default.

    CPU and CUDA (sm_80 and later). Not differentiable. Deterministic. The generator is Philox4x32-10: Salmon, Moraes,
    Dror and Shaw 2011; its key is the seed, its counter the offset.
    """
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
    }
    check.flag("sample", "return_logprobs", return_logprobs)
    values = [_as_tensor(name, value, logits) for name, value in options.items()]
    args = (logits, seed, offset, *values, output_counts, prompt_mask, return_logprobs)
    tokens, logprobs = call(ops.sampling_tokens, args, _check_tensors)
    return (tokens, logprobs) if return_logprobs else tokens


def _as_tensor(name: str, value: Any, logits: Any) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    if name == "top_k":
        check.integer("sample", name, value, 0)
        dtype, value = torch.int32, min(value, MAX_VOCAB)
    else:
        check.number("sample", name, value)
        dtype = torch.float32
        rule, sentence = _RULES[name]
        if not rule(0.0 if check.vanishes(value) else value):  # of the number that the kernel is given
            raise ValueError(f"sample: {name} must be {sentence}, got {value}.")
    if not isinstance(logits, Tensor) or logits.dim() != 2:  # refused later
        return None
    return torch.full((logits.shape[0],), value, dtype=dtype, device=logits.device)


def _check_tensors(logits: Tensor, seed: Tensor, offset: Tensor, *rest: Any) -> None:
    op = "sample"
    check.is_tensor(op, "logits", logits)
    check.rank(op, "logits", logits, 2, "[batch, vocab]")
    check.dtype(op, "logits", logits, check.FLOAT_DTYPES)
    check.last_dim_contiguous(op, "logits", logits)
    if not 1 <= logits.shape[1] <= MAX_VOCAB:
        raise ValueError(f"{op}: logits must have a vocabulary from 1 to {MAX_VOCAB}, got {logits.shape[1]}.")
    *options, output_counts, prompt_mask, _ = rest
    vectors = {"seed": (seed, torch.int64), "offset": (offset, torch.int64)}
    for name, value in zip(_RULES, options, strict=True):
        vectors[name] = (value, torch.int32 if name == "top_k" else torch.float32)
    for name, (value, dtype) in vectors.items():
        if value is None and name in _RULES:
            continue
        check.one_a_row(op, name, value, dtype, "logits", logits)
        _check_values(name, value)
    for name, rows, dtype in (("output_counts", output_counts, torch.int32), ("prompt_mask", prompt_mask, torch.bool)):
        if rows is not None:
            check.is_tensor(op, name, rows)
            check.same_device(op, name, rows, "logits", logits)
            check.dtype(op, name, rows, (dtype,))
            check.shape(op, name, rows, "logits", logits)
            check.last_dim_contiguous(op, name, rows)
    check.kernel_exists(op, "sampling_tokens", logits)


def _check_values(name: str, value: Tensor) -> None:
    if name not in _RULES or not check.sees_values(value):
        return
    rule, sentence = _RULES[name]
    wrong = value[~rule(value)]
    if wrong.numel() > 0:
        raise ValueError(f"sample: {name} must be {sentence}, got {wrong[0].item():g}.")


@register_fake("sampling_tokens")
def _(*args):
    _check_tensors(*args)
    logits, batch = args[0], args[0].shape[0]
    logprobs = logits.new_empty(batch if args[-1] else 0, dtype=torch.float32)
    return logits.new_empty(batch, dtype=torch.int64), logprobs
