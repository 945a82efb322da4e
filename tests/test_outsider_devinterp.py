"""devinterp's own chains as an oracle of the local learning coefficient (bench/install_peers.sh): equal within errors."""

import math
import warnings

import pytest
import torch
from torch import nn

import funcscope as fs
from funcscope.landscape import learning_coefficient

pytestmark = [pytest.mark.outsider, pytest.mark.filterwarnings("ignore")]

ROWS = 2
STRENGTH = 50 / math.log(50)
CHAINS = 24


class Quadratic(nn.Module):
    """Every row sum_i h_i w_i^2 / 2."""

    def __init__(self, curvatures):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(curvatures)))
        self.register_buffer("h", torch.tensor(curvatures))

    def forward(self, x):
        return (self.h * self.w.square()).sum() / 2 + 0 * x[:, 0]


class Crossing(nn.Module):
    """Every row the product of w_i^(2 k_i)."""

    def __init__(self, powers):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(powers)))
        self.powers = powers

    def forward(self, x):
        factors = [self.w[i] ** (2 * k) for i, k in enumerate(self.powers)]
        return torch.stack(factors).prod() + 0 * x[:, 0]


@pytest.fixture
def estimate():
    """Mean and error over chains of devinterp's estimator, on the whole loss; the global generator is put back."""
    sampler = pytest.importorskip("devinterp.slt.sampler", reason="not installed: `sh bench/install_peers.sh VENV`")

    def of(model, *, step_size, localization, num_steps, burn_in, strength=STRENGTH):
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(ROWS, 1)), batch_size=ROWS)
        state = torch.random.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that draws are more than batches, that seeds are set, ...
            made = sampler.estimate_learning_coeff_with_summary(
                model, data, evaluate=lambda net, batch: net(batch[0]).mean(), num_chains=CHAINS, seed=0, verbose=False,
                num_draws=num_steps - burn_in, num_burnin_steps=burn_in,
                optimizer_kwargs={"lr": step_size, "localization": localization, "nbeta": strength},
            )  # fmt: skip
        torch.random.set_rng_state(state)
        return float(made["llc/mean"]), float(made["llc/std"]) / CHAINS**0.5

    return of


def ours(model, *, strength=STRENGTH, **run):
    net = fs.functional(model)
    loss = fs.objective(net, [(torch.zeros(ROWS, 1), torch.zeros(ROWS))], fs.custom(lambda out, _: out))
    found = learning_coefficient(
        loss, net.theta, key=fs.key(0), num_chains=CHAINS, chunk_size=CHAINS, inverse_temperature=strength / ROWS, **run
    )  # fmt: skip
    return float(found.learning_coefficient.value), float(found.learning_coefficient.stderr)


RUNS = {
    "quadratic": (
        Quadratic([60.0, 5.0, 0.5]),
        {"step_size": 4e-3, "localization": 20.0, "num_steps": 400, "burn_in": 125},
    ),
    "quartic": (Crossing((2,)), {"step_size": 0.02, "localization": 1.0, "num_steps": 500, "burn_in": 250}),
    "normal crossing": (
        Crossing((1, 2)),
        {"step_size": 6e-3, "localization": 3.0, "num_steps": 1000, "burn_in": 250, "strength": 10.0},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_learning_coefficient_is_that_of_devinterp_within_errors(name, estimate):
    model, run = RUNS[name]
    value, error = ours(model, **run)
    theirs, their_error = estimate(model, **run)
    assert abs(value - theirs) < 4 * math.hypot(error, their_error)
    assert math.hypot(error, their_error) < 0.2 * value


def test_another_localisation_is_told_apart(estimate):
    """The negative control: of the same errors."""
    model, run = RUNS["quadratic"]
    value, error = ours(model, **run)
    other, other_error = estimate(model, **run | {"localization": 5 * run["localization"]})
    assert abs(value - other) > 4 * math.hypot(error, other_error)
