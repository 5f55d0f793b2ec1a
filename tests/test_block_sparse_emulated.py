# SPDX-License-Identifier: Apache-2.0
"""block_sparse on emulated GPUs: every tile, layout and kind of copy, lists that lie, and what the checks see."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from faults import missing_synchronisations
from torch import Tensor
from torch.nn.functional import gelu, silu

from fmkernels._library import ops
from fmkernels.testing import backends

EMULATED = [backend for backend in backends("block_sparse_dsd") if backend.name == "emulated"]
pytestmark = pytest.mark.skipif(not EMULATED, reason="the emulated backend is not built")

ACTIVATIONS = (lambda x: x, torch.relu, gelu, silu)
BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128), (128, 16), (16, 64), (64, 32), (32, 128))
# rows, inner, columns: multiples of 16-byte chunks and of blocks, of chunks, of neither
WHOLE, RAGGED, ODD = (128, 256, 264), (100, 72, 40), (33, 50, 9)
NAN = float("nan")


@dataclass(frozen=True)
class Product:
    """One product with NaN wherever nothing may be read, and what it is."""

    block: tuple[int, int] = (64, 64)
    shape: tuple[int, int, int] = RAGGED  # rows, inner, columns
    transposed: tuple[bool, bool, bool] = (False, False, False)  # dsd: op(S), dense, out; sdd: a, b
    dtype: torch.dtype = torch.bfloat16
    density: float = 0.5
    batch: int = 1
    num_lists: int = 1
    gap: int = 0  # elements between the lines of the dense operands
    offset: int = 0  # elements before the first one
    activation: int = 0
    has_epilogue: bool = False
    architecture: int = 80

    def normal(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)

    def strided(self, x: Tensor, transposed: bool) -> Tensor:
        lines = x.transpose(1, 2) if transposed else x
        batch, count, length = lines.shape
        storage = x.new_full((self.offset + batch * count * (length + self.gap),), NAN)
        view = storage[self.offset :].view(batch, count, -1)[..., :length]
        view.copy_(lines)
        return view.transpose(1, 2) if transposed else view

    def epilogue(self, length: int) -> tuple[Tensor | None, Tensor | None]:
        if not self.has_epilogue:
            return None, None
        return self.normal(length, seed=3).float(), self.normal(length, seed=4).float()

    def finish(self, product: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        scaled = product if scale is None or bias is None else product * scale.double() + bias.double()
        return ACTIVATIONS[self.activation](scaled)

    def run(self, function: str, *arguments) -> Tensor:
        backend = replace(EMULATED[0], architecture=self.architecture)
        return backend.run(lambda: getattr(ops, function)(*arguments))

    def expect(self, actual: Tensor, expected: Tensor) -> None:
        rounding = torch.finfo(self.dtype).eps
        torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=1e-4)

    def dsd(self) -> tuple[list, Tensor]:
        """(arguments of the op, result)."""
        rows, inner, columns = self.shape
        transposed, dense_transposed, out_transposed = self.transposed
        tile = self.block[::-1] if transposed else self.block
        num_rows, num_columns = -(-rows // tile[0]), -(-inner // tile[1])
        generator = torch.Generator().manual_seed(1)
        mask = torch.rand(self.num_lists, num_rows, num_columns, generator=generator) < self.density
        matrix = self.normal(self.num_lists, rows, inner, seed=2)
        padded = matrix.new_full((self.num_lists, num_rows * tile[0], num_columns * tile[1]), NAN)
        padded[:, :rows, :inner] = matrix
        blocks = padded.view(self.num_lists, num_rows, tile[0], num_columns, tile[1]).transpose(2, 3)[mask]
        positions = torch.randperm(len(blocks) + 2, generator=generator)[: len(blocks)]
        values = matrix.new_full((len(blocks) + 2, *tile), NAN)
        values[positions] = blocks
        if transposed:
            values = values.transpose(1, 2).contiguous()
        offsets = torch.cat([torch.zeros(1), mask.sum(2).flatten().cumsum(0)]).int()
        rows_of_list = torch.arange(num_rows + 1) + num_rows * torch.arange(self.num_lists)[:, None]
        order = torch.randperm(self.num_lists * num_rows, generator=generator).int()
        dense = self.normal(self.batch, inner, columns)
        scale, bias = self.epilogue(rows)
        arguments = [values, self.strided(dense, dense_transposed), offsets[rows_of_list], mask.nonzero()[:, 2].int()]
        arguments += [positions.int(), order, scale, bias, rows, transposed, out_transposed, self.activation]
        filled = mask.repeat_interleave(tile[0], 1).repeat_interleave(tile[1], 2)[:, :rows, :inner]
        product = (matrix.double() * filled) @ dense.double()
        columns_of = [None if x is None else x[:, None] for x in (scale, bias)]
        result = self.finish(product, *columns_of)
        return arguments, result.transpose(1, 2) if out_transposed else result

    def sdd(self) -> tuple[list, Tensor]:
        """(arguments of the op, result); the last entry of the list is no block."""
        rows, inner, columns = self.shape
        num_rows, num_columns = -(-rows // self.block[0]), -(-columns // self.block[1])
        mask = torch.rand(self.batch * num_rows, num_columns, generator=torch.Generator().manual_seed(1)) < self.density
        a, b = self.normal(self.batch, rows, inner, seed=2), self.normal(self.batch, inner, columns)
        row_indices, column_indices = (torch.cat([x, torch.tensor([-1])]).int() for x in mask.nonzero().unbind(1))
        epilogue = self.epilogue(columns)
        arguments = [self.strided(a, self.transposed[0]), self.strided(b, self.transposed[1])]
        arguments += [row_indices, column_indices, *epilogue, *self.block, self.activation]
        padded = torch.zeros(self.batch, num_rows * self.block[0], num_columns * self.block[1], dtype=torch.float64)
        padded[:, :rows, :columns] = self.finish(a.double() @ b.double(), *epilogue)
        blocks = padded.view(self.batch * num_rows, self.block[0], num_columns, self.block[1]).transpose(1, 2)[mask]
        return arguments, torch.cat([blocks, torch.zeros(1, *self.block, dtype=torch.float64)])


# ---- values ----------------------------------------------------------------------------------------------------------


def products(num_flags: int) -> Iterator[Product]:
    """All tiles, ways of lying and kinds of copy; the rest of the fields goes around with them."""
    copies = [(WHOLE, 0, 0), (RAGGED, 0, 0), (RAGGED, 8, 8), (RAGGED, 1, 0), (ODD, 0, 3)]
    flags = itertools.product((False, True), repeat=num_flags)
    for i, (block, transposed) in enumerate(itertools.product(BLOCKS, flags)):
        shape, gap, offset = copies[i % len(copies)]
        batch = 1 + 2 * (i % 3 == 0)
        yield Product(
            block,
            shape,
            transposed,
            (torch.bfloat16, torch.float16)[i % 2],
            (0.5, 1.0, 0.1, 0.0)[i % 7 % 4],
            batch,
            batch if i % 2 else 1,
            gap,
            offset,
            i % 4,
            i % 3 != 1,
            (80, 90)[i % 11 == 0],
        )


@pytest.mark.parametrize("product", [*products(3)], ids=str)
def test_dsd(product):
    arguments, expected = product.dsd()
    product.expect(product.run("block_sparse_dsd", *arguments), expected)


@pytest.mark.parametrize("product", [*products(2)], ids=str)
def test_sdd(product):
    arguments, expected = product.sdd()
    product.expect(product.run("block_sparse_sdd", *arguments), expected)


def test_nan_stays_in_its_row_and_passes_relu():
    product = Product(activation=1)
    arguments, _ = product.dsd()
    arguments[1][0, 3, 5] = NAN  # dense: of one column
    actual = product.run("block_sparse_dsd", *arguments)
    reads = product.dsd()[0][3]  # some row of blocks reads the first rows of dense
    assert (reads == 0).any()
    assert actual[0, :, 5].isnan().any()
    assert not actual[0, :, :5].isnan().any()
    assert not actual[0, :, 6:].isnan().any()


def test_zeros_past_the_edge_are_no_products():
    """Of an infinity in a row or a column of the matrix and the zeros that stand in for those past its edge."""
    product = Product(density=1.0)
    arguments, expected = product.sdd()
    arguments[0][0, :, 3] = arguments[1][0, 5] = float("inf")
    blocks = product.run("block_sparse_sdd", *arguments)
    assert not blocks[expected != 0].isfinite().any()
    assert (blocks[expected == 0] == 0).all()


def test_float32_is_refused():
    product = Product(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="dtype must be float16 or bfloat16"):
        product.run("block_sparse_dsd", *product.dsd()[0])
    with pytest.raises(RuntimeError, match="dtype must be float16 or bfloat16"):
        product.run("block_sparse_sdd", *product.sdd()[0])


# ---- lists that only the device sees ---------------------------------------------------------------------------------

LIES = (-1, -(2**31), 2**31 - 1, 1 << 20)


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("which", ["indices", "positions"])
@pytest.mark.parametrize("block", [16, 64])
def test_an_entry_out_of_range_is_skipped(block, which, lie):
    product = Product(block=(block, block), density=1.0)
    arguments, expected = product.dsd()
    kept = Product(block=(block, block), density=1.0).dsd()[1]
    arguments[3 if which == "indices" else 4][1] = lie  # the second block of the first row of blocks
    actual = product.run("block_sparse_dsd", *arguments)
    dense = arguments[1].double()
    position = product.dsd()[0][4][1]
    skipped = arguments[0][position].double()[:, : 72 - block] @ dense[:, block : 2 * block]
    expected = kept.clone()
    expected[:, :block] -= skipped[:, : min(block, 100)]
    product.expect(actual, expected)


@pytest.mark.parametrize("lie", LIES)
def test_offsets_that_lie_reach_nothing_outside_the_tensors(lie):
    product = Product(block=(16, 16), batch=2, num_lists=2)
    for place in ((0, 0), (0, 3), (1, 6)):
        arguments, _ = product.dsd()
        arguments[2][place] = lie
        product.run("block_sparse_dsd", *arguments)


@pytest.mark.parametrize("lie", LIES)
def test_an_order_that_lies_reaches_nothing_outside_the_tensors(lie):
    product = Product(block=(16, 16))
    arguments, _ = product.dsd()
    arguments[5][2] = lie
    product.run("block_sparse_dsd", *arguments)


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("which", [2, 3])  # row_indices, column_indices
@pytest.mark.parametrize("block", [16, 64])
def test_a_block_out_of_range_is_zeros(block, which, lie):
    """Its neighbour in the list, which shares its rows of a, is not."""
    product = Product(block=(block, block), density=1.0, has_epilogue=True)
    arguments, expected = product.sdd()
    arguments[which][0] = lie
    expected[0] = 0
    product.expect(product.run("block_sparse_sdd", *arguments), expected)


# ---- the checks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["dsd", "sdd"])
@pytest.mark.parametrize("block", [64, 128])
def test_every_barrier_and_wait_that_is_taken_out_is_reported(function, block):
    """A kernel has a loop for each way that its operands lie, so all of them run."""
    lying = [(*transposed, transposed[1]) for transposed in itertools.product((False, True), repeat=2)]
    ways = [Product((block, block), (128, 256, 256), transposed, density=1.0) for transposed in lying]
    arguments = [getattr(way, function)()[0] for way in ways]

    def run() -> None:
        for way, of_way in zip(ways, arguments, strict=True):
            way.run(f"block_sparse_{function}", *of_way)

    instance = f"{function.capitalize()}TraitsINS_8BFloat16ELi{block}EEELb1E" + "Lb0E" * (function == "dsd")  # not int8
    total, unseen = missing_synchronisations(f"block_sparse_{function}_kernel", instance, run)
    assert total >= 4 * 6
    assert unseen == ([0] if function == "sdd" else [])  # a vote, before which nothing is written
