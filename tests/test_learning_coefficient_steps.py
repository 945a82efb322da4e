"""What the sampler adds to the local learning coefficient. Oracles: the exact mean of finite Langevin steps on a quadratic,
the limit of small steps on a small trained network."""

import math

import pytest
import torch
from problems import seeded
from test_learning_coefficient import exact, quadratic
from torch import nn

import funcscope as fs
from funcscope.landscape import learning_coefficient
from funcscope.landscape.learning_coefficient_result import MOSTLY, NOTABLE, UNFELT

STRENGTH = 100 / math.log(100)
DEFAULTS = {"localization": 1000.0, "burn_in": 200, "num_steps": 600}


def estimated(curvatures, **changes):
    loss = quadratic([curvatures] * 100)
    run = {"num_chains": 24, "chunk_size": 24} | changes
    return learning_coefficient(loss, loss.net.theta, key=fs.key(3), **run)


def added(curvatures, step_size=1e-4):
    """By the steps, in the exact mean."""
    chain = exact(curvatures, strength=STRENGTH, step_size=step_size, **DEFAULTS)
    return chain - sum(STRENGTH * h / (STRENGTH * h + 1000) for h in curvatures) / 2


@pytest.mark.slow
@pytest.mark.parametrize(("curvatures", "named"), [([400.0, 0.0, 0.0], True), ([60.0, 30.0, 0.0], False)])
def test_what_steps_of_the_default_size_add_is_measured_and_named(curvatures, named):
    found = estimated(curvatures)
    wanted, steps = added(curvatures), found.step_excess
    assert abs(float(steps.value) - wanted) < 4 * float(steps.stderr) < 0.3 * wanted
    share = float(steps.value) / float(found.learning_coefficient.value)
    assert (share > NOTABLE) is named
    assert (
        any(f"about {share:.0%} of the estimate is of the size of the steps" in text for text in found.notes) is named
    )
    assert found.unresolved == []


@pytest.mark.slow
def test_an_estimate_that_is_mostly_of_the_steps_is_not_resolved():
    found = estimated([1000.0], num_chains=40, chunk_size=40)  # eps p = 2.3
    assert float(found.step_excess.value) > MOSTLY * float(found.learning_coefficient.value)
    assert found.unresolved == ["learning_coefficient"]
    assert "not resolved" in str(found)


def test_steps_that_chance_hides_and_minibatches_have_no_note():
    few = estimated([400.0], num_chains=2, num_steps=210)
    assert float(few.step_excess.value) < 2 * float(few.learning_coefficient.stderr)
    assert not any("size of the steps, by" in text for text in few.notes)
    assert estimated([400.0], num_chains=2, num_steps=210, batch_size=10).step_excess is None


def test_chains_that_the_localisation_alone_holds_are_named():
    held, free = (estimated([h] * 5, num_chains=4, num_steps=300) for h in (1.0, 100.0))
    assert float(held.learning_coefficient.value) < UNFELT
    assert any("the localisation holds them" in text for text in held.notes)
    assert not any("the localisation holds them" in text for text in free.notes)


@pytest.mark.slow
def test_without_what_the_steps_add_a_trained_network_has_one_estimate_at_all_sizes():
    x = seeded(0, lambda: torch.randn(1500, 3, dtype=torch.float64))
    flipped = seeded(1, lambda: torch.rand(1500) < 0.15)
    y = ((x[:, 0] * x[:, 1] > 0) ^ flipped).long()
    model = seeded(2, lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double())
    descended(model, x, y)
    net = fs.functional(model)
    loss = fs.objective(net, [(x, y)], fs.classification)
    small, large = (
        learning_coefficient(
            loss, net.theta, key=fs.key(1), step_size=size, num_chains=16, chunk_size=16, burn_in=burn_in,
            num_steps=burn_in + 800,
        )
        for size, burn_in in ((5e-5, 400), (2e-4, 100))
    )  # fmt: skip
    low, high = (float(each.learning_coefficient.value) for each in (small, large))
    least, most = (float(each.step_excess.value) for each in (small, large))
    error = 4 * math.hypot(*(float(each.learning_coefficient.stderr) for each in (small, large)))
    assert high - low > 3 * error
    assert abs((high - most) - (low - least)) < error < 0.2 * low
    assert any("of the size of the steps" in text for text in large.notes)


def descended(model, x, y):
    how = {"max_iter": 5000, "tolerance_grad": 1e-10, "tolerance_change": 1e-15, "line_search_fn": "strong_wolfe"}
    optimiser = torch.optim.LBFGS(model.parameters(), **how)

    def closure():
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimiser.step(closure)
