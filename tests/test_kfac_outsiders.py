"""Kronecker factors, measured eigenvalues, damped inverses: the same by curvlinops (bench/install_peers.sh)."""

import pytest
import torch
from problems import mlp, relative, seeded
from torch import nn

import funcscope as fs
from funcscope.curvature import ekfac_factors, kfac_factors

pytestmark = [pytest.mark.outsider, pytest.mark.filterwarnings("ignore")]


class Flat(nn.Module):
    """One row for every position."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).flatten(0, -2)


@pytest.mark.parametrize("shape", [(7,), (3, 5)], ids=["rows", "positions"])
@pytest.mark.parametrize("kind", ["KFAC", "EKFAC"])
def test_products_traces_and_damped_inverses_are_those_of_curvlinops(kind, shape):
    peer = pytest.importorskip("curvlinops")
    net = seeded(0, mlp).double()
    x, y = seeded(1, lambda: (torch.randn(*shape, 4).double(), torch.randint(0, 3, shape)))
    loss = fs.objective(fs.functional(net), [(x, y)], fs.classification)
    theta, v = loss.net.theta, fs.normal(fs.key(1), loss.net.theta)
    ours = {"KFAC": kfac_factors, "EKFAC": ekfac_factors}[kind](loss, theta, labels="data")
    arguments = (Flat(net), nn.CrossEntropyLoss(), list(net.parameters()), [(x, y.flatten())])
    options = {"separate_weight_and_bias": False, "check_deterministic": False}
    theirs = getattr(peer, f"{kind}LinearOperator")(
        *arguments, fisher_type="empirical", num_data=shape[0], num_per_example_loss_terms=y[0].numel(), **options
    )
    assert relative(ours.matvec(v), theirs @ v) < 1e-10
    assert float(ours.trace) == pytest.approx(float(theirs.trace))
    inverse = peer.KFACInverseLinearOperator(theirs, damping=0.1, use_exact_damping=True)
    assert relative(ours.solve(v, 0.1), inverse @ v) < 1e-10
    if kind == "KFAC":
        inverse = peer.KFACInverseLinearOperator(theirs, damping=0.1, use_heuristic_damping=True)
        assert relative(ours.solve(v, 0.1, pi=True), inverse @ v) < 1e-10
        assert relative(ours.solve(v, 0.2, pi=True), inverse @ v) > 0.05  # negative control
