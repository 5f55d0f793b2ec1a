# SPDX-License-Identifier: Apache-2.0
"""torch's `torch.nn.functional.grouped_mm`, on the kernels of `fmkernels.moe.grouped_mm`.

    from fmkernels.integrations.grouped_mm import grouped_mm

What torch leaves unwritten is zeros here, float32 and float16 work, and no row need be a multiple of 16 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check
from .. import moe
from .._moe_grouped import by_rows


def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A product for each group; offs, int32, has where the groups end along the dimension that has no place for them.

    mat_a [M, K],    mat_b [G, K, N]:  groups of rows of mat_a:                      [M, N]
    mat_a [G, M, K], mat_b [K, N]:     groups of columns of mat_b:                   [M, N]
    mat_a [M, K],    mat_b [K, N]:     groups of columns of mat_a and rows of mat_b: [G, M, N]
    mat_a [G, M, K], mat_b [G, K, N]:  without offs, as torch.bmm:                   [G, M, N]

    Args:
        mat_a, mat_b: CPU: float32, bfloat16 or float16, CUDA: bfloat16 or float16. Three dimensions may lie by rows
            or by columns. mat_a [M, K] of the first form lies by rows. What must lie otherwise is copied: mat_b of the
            second form that lies by rows, the operands of the third as `moe.grouped_mm` says, mat_a of the fourth.
        offs: [G], not decreasing; the last may be less than the length, and what lies behind gives zeros.
        bias: [G, N], of the first form alone.
        out_dtype: None, or the dtype of mat_a.

    Returns:
        Contiguous, in the dtype of mat_a.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    Determinism, gradients, autocast: as `moe.grouped_mm`.
    """
    op = "grouped_mm"
    for name, t in (("mat_a", mat_a), ("mat_b", mat_b)):
        check.is_tensor(op, name, t)
        if t.dim() not in (2, 3):
            raise ValueError(f"{op}: {name} must have 2 or 3 dimensions, got {t.dim()} dimensions {list(t.shape)}.")
    check.same_dtype(op, "mat_b", mat_b, "mat_a", mat_a)
    if out_dtype not in (None, mat_a.dtype):
        wanted, came = (check.dtype_names((dtype,)) for dtype in (mat_a.dtype, out_dtype))
        raise ValueError(f"{op}: out_dtype must be None or the dtype of mat_a, {wanted}, got {came}.")
    dims = mat_a.dim(), mat_b.dim()
    if bias is not None and dims != (2, 3):
        raise ValueError(
            f"{op}: bias must be None but for mat_a [M, K] and mat_b [G, K, N], got {type(bias).__name__}."
        )
    if (offs is None) != (dims == (3, 3)):
        rule = "must be None for two operands of three dimensions" if offs is not None else "must be given"
        raise ValueError(f"{op}: offs {rule}, got {type(offs).__name__}.")
    check.size(op, "mat_b", mat_b, -2, "for this mat_a K =", mat_a.shape[-1])
    if mat_a.dim() == 2:
        return moe.grouped_mm(mat_a, mat_b, offs, bias=bias)
    if mat_b.dim() == 2:
        return moe.grouped_mm(by_rows(mat_b.t()), mat_a.transpose(1, 2), offs).t().contiguous()
    num_groups, rows, inner = mat_a.shape
    check.size(op, "mat_b", mat_b, 0, "the groups of mat_a,", num_groups)
    ends = torch.arange(1, num_groups + 1, dtype=torch.int32, device=mat_a.device) * rows
    flat = by_rows(mat_a.reshape(num_groups * rows, inner))
    return moe.grouped_mm(flat, mat_b, ends).view(num_groups, rows, mat_b.shape[2])
