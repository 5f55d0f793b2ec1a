# SPDX-License-Identifier: Apache-2.0
"""The package stk by its names, on the products of `fmkernels.BlockSparse`.

    from fmkernels.integrations import stk

    hidden = stk.ops.sdd(x, w1, topology)
    y = stk.ops.dsd(hidden, w2)

Blocks of 16, 32, 64 and 128, on the CPU too; indices are int32 inside. docs/integrations.md lists the differences.
"""

from . import ops, random
from .matrix import Matrix

__all__ = ["Matrix", "ops", "random"]
