# SPDX-License-Identifier: Apache-2.0
"""sparsify and calibration: which layers change, which blocks stay, and that the refit is the least-squares one."""

import pytest
import torch
from torch import nn

from fmkernels import block_norms, largest_blocks
from fmkernels.nn import BlockSparseLinear, calibration, sparsify
from fmkernels.nn.sparsify import DAMPING
from fmkernels.testing import assert_as_good_as_torch

BLOCK = 16


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 40)
        self.mlp = nn.Sequential(nn.Linear(40, 70), nn.ReLU(), nn.Linear(70, 40, bias=False))
        self.head = nn.Linear(40, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mlp(self.embed(ids)))


def rows_of_inputs(count=300):
    """Correlated, as activations are."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 8, generator=generator) @ torch.randn(8, 40, generator=generator) + 0.3 * torch.randn(
        count, 40, generator=generator
    )


def moments_of(model, x):
    with torch.no_grad(), calibration(model) as moments:
        for part in x.split(100):
            model(part)
    return moments


def test_layers_become_sparse_and_tied_ones_do_not():
    model = Model()
    dense = model.mlp[0].weight.detach().clone()
    bias = model.mlp[0].bias
    assert sparsify(model, 0.5, BLOCK) == ["mlp.0", "mlp.2"]
    assert type(model.head) is nn.Linear
    assert isinstance(model.mlp[0], BlockSparseLinear)
    assert model.mlp[0].bias is bias
    assert model.mlp[2].bias is None
    mask = largest_blocks(block_norms(dense, BLOCK), 0.5).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    assert torch.equal(model.mlp[0].matrix.to_dense(), torch.where(mask[:70, :40], dense, 0))
    assert model(torch.arange(50)).shape == (50, 50)


def test_a_layer_at_two_places_is_left_alone():
    shared = nn.Linear(40, 40)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(40, 40))
    assert sparsify(model, 0.5, BLOCK) == ["3"]
    assert model[0] is model[2] is shared


def test_only_the_layers_that_are_named():
    model = Model()
    assert sparsify(model, 0.5, (16, 32), layers="*.2") == ["mlp.2"]
    assert model.mlp[2].topology.block == (16, 32)
    assert type(model.mlp[0]) is nn.Linear


def test_calibration_sums_what_the_layers_are_given():
    model, x = Model().mlp, rows_of_inputs()
    moments = moments_of(model, x)
    assert moments.keys() == {"0", "2"}
    for name, given in (("0", x), ("2", model[1](model[0](x)).detach())):
        assert_as_good_as_torch(moments[name], lambda x: x.mT @ x, given)
    with torch.no_grad(), calibration(model, "0") as named:
        model[0](input=x)
    assert_as_good_as_torch(named["0"], lambda x: x.mT @ x, x)
    before = moments["0"].clone()
    model(x)
    assert torch.equal(moments["0"], before)  # it watches no longer


def test_the_refit_is_the_least_squares_solution():
    model, x = Model().mlp, rows_of_inputs().double()
    dense = model[0].weight.detach().double()
    moments = moments_of(model, x.float())
    sparsify(model, 0.5, BLOCK, layers="0", moments=moments)
    found = model[0].matrix.to_dense().double()
    damping = DAMPING * moments["0"].diagonal().mean().double()
    for row, topology_row in enumerate(found.split(BLOCK)):
        kept = (topology_row != 0).any(0)
        # Ridge regression of what is missing: min |x_S d - x_R w_R|^2 + damping |d|^2, by another way.
        left = torch.cat([x[:, kept], damping.sqrt() * torch.eye(int(kept.sum()), dtype=torch.double)])
        rows = dense.split(BLOCK)[row]
        right = torch.cat([x[:, ~kept] @ rows[:, ~kept].T, torch.zeros(int(kept.sum()), len(rows))])
        expected = rows[:, kept] + torch.linalg.lstsq(left, right).solution.T
        torch.testing.assert_close(topology_row[:, kept], expected, rtol=1e-4, atol=1e-4 * dense.abs().max().item())


def test_the_block_is_lost_whose_loss_costs_least():
    """Every choice of one block is tried; the one that sparsify makes has the least error, refitted."""
    x = rows_of_inputs()
    torch.manual_seed(2)
    source = nn.Linear(40, 16, bias=False)
    moments = moments_of(nn.Sequential(source), x)
    model = nn.Sequential(source)
    sparsify(model, 2 / 3, BLOCK, moments=moments)
    columns = (model[0].matrix.to_dense() == 0).all(0).nonzero()[:, 0]
    errors = []
    for lost in torch.arange(40).split(BLOCK):
        kept = torch.tensor([i for i in range(40) if i not in lost.tolist()])
        target = x @ source.weight.detach().T
        solution = torch.linalg.lstsq(x[:, kept].double(), target.double()).solution
        errors.append((x[:, kept].double() @ solution - target).square().sum().item())
    assert columns.tolist() == torch.arange(40).split(BLOCK)[errors.index(min(errors))].tolist()


def test_calibration_loses_less_of_the_output():
    x = rows_of_inputs()
    errors = []
    for is_calibrated in (False, True):
        model = Model().mlp
        y = model(x)
        sparsify(model, 0.5, BLOCK, moments=moments_of(model, x) if is_calibrated else None)
        errors.append((model(x) - y).norm().item())
    assert errors[1] < errors[0]


@pytest.mark.parametrize("density", [0, 1])
def test_nothing_and_everything(density):
    model, x = Model().mlp, rows_of_inputs()
    y = model(x)
    sparsify(model, density, BLOCK, moments=moments_of(model, x))
    if density == 1:
        torch.testing.assert_close(model(x), y)
    else:
        assert (model(x) == 0).all()  # the second layer has no bias


def test_a_layer_that_was_given_zeros():
    model = Model().mlp
    sparsify(model, 0.5, BLOCK, moments=moments_of(model, torch.zeros(10, 40)))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_errors_leave_the_model_as_it_was():
    model, x = Model().mlp, rows_of_inputs()
    moments = moments_of(model, x)
    for arguments, sentence in (
        ({"density": 1.5}, r"nn.sparsify: density must be from 0 to 1, got 1.5\."),
        ({"block": 20}, r"block must be 16, 32, 64 or 128, or two of these, got 20\."),
        ({"layers": "attention"}, r"layers must name a torch.nn.Linear of the model whose weight is its own, got 'att"),
        ({"moments": {"0": moments["0"]}}, r"moments must have all layers, got none of '2'"),
        ({"moments": {**moments, "2": torch.eye(3)}}, r"moments of '2' must be \[70, 70\], got \[3, 3\]\."),
        ({"moments": {**moments, "2": moments["2"] * float("nan")}}, r"moments of '2' must be finite"),
    ):
        with pytest.raises(ValueError, match=sentence):
            sparsify(model, **{"density": 0.5, "block": BLOCK, **arguments})
    assert type(model[0]) is type(model[2]) is nn.Linear
    with pytest.raises(TypeError, match=r"nn.sparsify: model must be a torch.nn.Module, got int\."):
        sparsify(3, 0.5)
    with (
        pytest.raises(TypeError, match=r"nn.calibration: layers must be a pattern of names, got list\."),
        calibration(model, ["0"]),
    ):
        pass
