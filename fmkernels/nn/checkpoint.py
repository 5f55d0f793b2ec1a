# SPDX-License-Identifier: Apache-2.0
"""What to keep of a checkpointed block: `checkpoint_policy`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch._ops import OpOverload
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from .._library import ops


def checkpoint_policy(*also_save: OpOverload) -> Callable[[], Any]:
    """The `context_fn` with which a checkpointed block keeps what attention computed and recomputes the rest.

        y = torch.utils.checkpoint.checkpoint(
            block, x, use_reentrant=False, context_fn=fmkernels.nn.checkpoint_policy()
        )

    Attention is the one part of a block whose time grows with the square of the sequence, and its results, o and lse,
    are as small as the block's own output. Without the policy every backward pass runs attention forward again.

    Args:
        also_save: other ops whose results are kept, such as torch.ops.aten.mm.default, the projections: each result
            that is kept is memory, and a matrix product that is not computed again.

    Returns:
        A callable for `context_fn` of `torch.utils.checkpoint.checkpoint`. It may serve any number of calls.

    Raises:
        TypeError: one sentence with the argument, its rule and what came.

    Gradients have the same bits as without checkpointing. Works under `torch.compile(fullgraph=True)` too, which then
    decides about the other ops by itself.
    """
    for op in also_save:
        if not isinstance(op, OpOverload):
            raise TypeError(
                "nn.checkpoint_policy: also_save must be overloads of ops, such as torch.ops.aten.mm.default, "
                f"got {type(op).__name__}."
            )
    saved = [ops.attention_forward, ops.attention_varlen_forward, *also_save]
    return partial(create_selective_checkpoint_contexts, saved)
