"""The local learning coefficient. Oracles: the exact mean of finite Langevin steps on a quadratic, quadrature of densities
with singular minima, AR(1) processes, the whole loss for minibatches of all; devinterp."""

import inspect
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import seeded
from torch import nn

import funcscope as fs
from funcscope.core.estimate import Estimate, interval
from funcscope.core.keys import key, normal
from funcscope.landscape import LearningCoefficient, learning_coefficient, learning_coefficient_sweep
from funcscope.landscape.chain_diagnostics import effective_samples, split_r_hat
from funcscope.landscape.langevin import _parts, langevin_chains
from funcscope.landscape.learning_coefficient_result import MIXED, RELAXED
from funcscope.landscape.learning_coefficient_sweep import _swept, plateau

HALF_SQUARE = fs.custom(lambda out, _: out.square().sum(-1) / 2)


class Scaled(nn.Module):
    def __init__(self, num):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(num, dtype=torch.float64))

    def forward(self, x):
        return x * self.w


def quadratic(curvatures):
    """Of every row its own curvatures: L(w) = mean_b sum_i h_bi w_i^2 / 2."""
    h = torch.tensor(curvatures, dtype=torch.float64)
    net = fs.functional(Scaled(h.shape[1]))
    return fs.objective(net, [(h.sqrt(), torch.zeros(len(h)))], HALF_SQUARE)


def exact(curvatures, *, strength, localization, step_size, burn_in, num_steps, noise=0.0):
    """The mean of the estimate over chains; noise: variance of a curvature from step to step."""
    total = 0.0
    for h in curvatures:
        p = strength * h + localization
        a = (1 - step_size * p / 2) ** 2 + (step_size * strength / 2) ** 2 * noise
        variances = [step_size * (1 - a**t) / (1 - a) for t in range(burn_in, num_steps)]
        total += strength * h * float(np.mean(variances)) / 2
    return total


RUN = {"num_steps": 160, "burn_in": 60, "step_size": 4e-3, "localization": 20.0}


@pytest.mark.slow
def test_estimate_on_a_quadratic_is_the_exact_one_of_finite_steps():
    h = [60.0, 5.0, 0.5]
    loss = quadratic([h] * 50)
    found = learning_coefficient(loss, loss.net.theta, key=key(0), num_chains=60, chunk_size=60, **RUN)
    wanted = exact(h, strength=50 / math.log(50), **RUN)
    perfect = sum(50 / math.log(50) * x / (50 / math.log(50) * x + 20) for x in h) / 2
    value, stderr = float(found.learning_coefficient.value), float(found.learning_coefficient.stderr)
    assert abs(value - wanted) < 4 * stderr < 0.25 * wanted
    assert abs(value - perfect) > 4 * stderr  # the discretisation is in the estimate, and known
    assert (found.num_samples, found.num_parameters, found.inverse_temperature) == (50, 3, 1 / math.log(50))
    assert found.negative_share == 0
    assert found.num_diverged == 0
    assert found.num_effective > 60 * 5
    expected = 1 / (20 * (1 - 0.02))  # of a direction without curvature, the largest of the three
    assert float(found.distances.square().mean()) < 3 * expected


@pytest.mark.slow
def test_small_steps_give_the_integral_over_the_density():
    loss = quadratic([[3.0]] * 10)
    run = {"num_steps": 260, "burn_in": 60, "step_size": 5e-3, "localization": 4.0}
    found = learning_coefficient(loss, loss.net.theta, key=key(0), num_chains=60, chunk_size=60, **run)
    strength = 10 / math.log(10)
    perfect = strength * 3 / (strength * 3 + 4) / 2
    assert abs(float(found.learning_coefficient.value) - perfect) < 4 * float(found.learning_coefficient.stderr)
    assert exact([3.0], strength=strength, **run) == pytest.approx(perfect, rel=0.03)


@pytest.mark.slow
def test_minibatches_add_the_variance_of_their_curvature():
    """Halves of two rows each: mean 30, and 10 or 50 in a batch of one row."""
    loss = quadratic([[10.0], [50.0]] * 10)
    run = RUN | {"step_size": 0.01}
    found = learning_coefficient(loss, loss.net.theta, key=key(0), num_chains=60, batch_size=1, **run)
    strength = 20 / math.log(20)
    noisy, clean = (exact([30.0], strength=strength, noise=noise, **run) for noise in (400.0, 0.0))
    value, stderr = float(found.learning_coefficient.value), float(found.learning_coefficient.stderr)
    assert abs(value - noisy) < 4 * stderr
    assert abs(value - clean) > 4 * stderr


class Bigrams(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 3), nn.Linear(3, 7)

    def forward(self, input_ids):
        return self.out(self.embed(input_ids).tanh())


def language(shapes):
    net = fs.functional(seeded(0, lambda: Bigrams().double()))
    batches = []
    for i, shape in enumerate(shapes):
        ids = seeded(i, lambda shape=shape: torch.randint(7, shape))
        labels = ids.clone()
        labels[0, 2:] = -100  # unequal weights
        batches.append({"input_ids": ids, "labels": labels})
    return fs.objective(net, batches, fs.causal_lm)


def test_a_minibatch_of_all_sequences_is_the_whole_loss():
    loss = language([(3, 5), (2, 5)])
    run = {"key": key(0), "num_chains": 3, "num_steps": 9, "burn_in": 2, "step_size": 1e-2, "localization": 1.0}
    whole = learning_coefficient(loss, loss.net.theta, **run)
    parts = learning_coefficient(loss, loss.net.theta, batch_size=5, **run)
    torch.testing.assert_close(parts.traces, whole.traces, rtol=1e-9, atol=1e-12)
    assert float(whole.traces.abs().max()) > 0.01
    assert whole.num_samples == 5


@pytest.mark.slow
def test_minibatches_of_several_shapes_have_the_gradient_of_the_loss_as_their_mean():
    """Over many draws, by a z-test of every coordinate; batches of 3, 1 and 2 sequences of two lengths."""
    loss = language([(3, 5), (1, 4), (2, 5)])
    theta = loss.net.theta
    source, moved = _parts(loss, theta, key(0), 2), normal(key(1), theta)[None]
    draws = [source(moved, step) for step in range(400)]
    gradients, values = torch.cat([g for g, _ in draws]), torch.cat([v for _, v in draws])
    at = theta + moved[0]
    for found, wanted in ((gradients, torch.func.grad(loss)(at)), (values[:, None], loss(at) - loss(theta))):
        error = found.std(0) / len(found) ** 0.5
        assert bool(((found.mean(0) - wanted).abs() <= 4.5 * error + 1e-12).all())
    plain = torch.func.grad(replace(loss, batches=loss.batches[:1]))(at)
    assert bool(((gradients.mean(0) - plain).abs() > 4.5 * gradients.std(0) / 20).any())  # of the first batch alone


class Crossing(nn.Module):
    def __init__(self, powers):
        super().__init__()
        self.powers = powers
        self.w = nn.Parameter(torch.zeros(len(powers), dtype=torch.float64))

    def forward(self, x):
        product = torch.stack([w ** (2 * k) for w, k in zip(self.w, self.powers, strict=True)]).prod()
        return product.expand(len(x), 1)


def crossing(powers, n=20):
    net = fs.functional(Crossing(powers))
    return fs.objective(net, [(torch.zeros(n, 1), torch.zeros(n))], fs.custom(lambda out, _: out[:, 0]))


def by_quadrature(powers, strength, localization):
    """strength E[L] under exp(-strength L - localization |w|^2 / 2), the last coordinate integrated outside."""
    width = 9 / localization**0.5
    grids = [np.concatenate([np.geomspace(1e-9, width, 800)]) for _ in powers]
    grid = np.meshgrid(*grids, indexing="ij")
    value = np.prod([w ** (2 * k) for w, k in zip(grid, powers, strict=True)], axis=0)
    density = np.exp(-strength * value - localization / 2 * sum(w**2 for w in grid))
    top, bottom = strength * value * density, density
    for axis_grid in reversed(grids):
        top, bottom = (scipy.integrate.trapezoid(y, axis_grid, axis=-1) for y in (top, bottom))
    return float(top / bottom)


@pytest.mark.parametrize(("powers", "limit"), [((1,), 1 / 2), ((2,), 1 / 4), ((3,), 1 / 6), ((1, 2), 1 / 4)])
def test_singular_minima_tend_to_1_over_twice_the_largest_power(powers, limit):
    """Of the densities themselves, from below: the deviation falls with every power of n, by its logarithm at worst."""
    found = [by_quadrature(powers, strength, 1.0) for strength in (1e1, 1e3, 1e5, 1e7)]
    assert all(a < b for a, b in pairwise(found))
    assert found[-1] == pytest.approx(limit, rel=0.07 if len(powers) == 1 else 0.25)
    assert found[-1] < limit * (1 + 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("powers", "localization", "step_size", "num_steps"),
    [((2,), 0.05, 0.02, 700), ((3,), 0.05, 0.02, 700), ((1, 2), 2.0, 0.0025, 1800)],
)
def test_chains_give_the_integral_over_densities_with_singular_minima(powers, localization, step_size, num_steps):
    """Up to 3 % for the size of the steps; of two coordinates one has the curvature 20 w^4, and needs smaller ones."""
    loss = crossing(powers)
    found = learning_coefficient(
        loss, loss.net.theta, key=key(0), num_chains=120, chunk_size=120, num_steps=num_steps, burn_in=num_steps // 3,
        step_size=step_size, localization=localization, inverse_temperature=10 / 20,
    )  # fmt: skip
    wanted = by_quadrature(powers, 10.0, localization)
    value, stderr = float(found.learning_coefficient.value), float(found.learning_coefficient.stderr)
    assert abs(value - wanted) < 4 * stderr + 0.03 * wanted
    assert stderr < 0.06 * wanted
    assert value + 4 * stderr < 0.45 * len(powers)


def test_steps_that_are_too_large_diverge_and_give_no_number():
    h = [400.0]
    loss = quadratic([h] * 20)  # eps p = 0.01 * 2,700: a factor of 12 a step
    found = learning_coefficient(loss, loss.net.theta, key=key(0), num_steps=330, burn_in=9, step_size=0.01)
    assert found.num_diverged == 4
    assert math.isnan(float(found.learning_coefficient.value))
    assert math.isnan(found.r_hat)
    assert math.isnan(found.num_effective)
    assert "4 chains of 4 diverged (0, 1, 2, 3)" in " ".join(found.notes)
    assert "too few" in " ".join(found.notes)
    finite = learning_coefficient(loss, loss.net.theta, key=key(0), num_steps=20, burn_in=9, step_size=0.01)
    assert finite.num_diverged == 4  # on its way to infinity
    assert bool(finite.traces.isfinite().all())


def test_a_diverged_chain_is_left_out_and_named():
    loss = quadratic([[5.0]] * 20)
    whole = learning_coefficient(loss, loss.net.theta, key=key(0), num_steps=60, burn_in=20, step_size=1e-3)
    traces = whole.traces.clone()
    traces[2, 30:] = math.nan
    one = replace(whole, traces=traces, diverged=torch.tensor([False, False, True, False]))
    rest = whole.chain_estimates[[0, 1, 3]]
    assert float(one.learning_coefficient.value) == pytest.approx(float(rest.mean()))
    assert float(one.learning_coefficient.stderr) == pytest.approx(float(rest.std()) / 3**0.5)
    assert "1 chain of 4 diverged (2)" in " ".join(one.notes)
    assert math.isfinite(one.r_hat)
    three = replace(whole, traces=traces, diverged=torch.tensor([False, True, True, True]))
    assert math.isnan(float(three.learning_coefficient.value))


def test_weights_that_are_no_minimum_are_named():
    loss = quadratic([[5.0, 5.0]] * 20)
    found = learning_coefficient(
        loss, torch.ones(2).double(), key=key(0), num_steps=60, burn_in=20, step_size=1e-3, localization=1.0
    )
    assert found.negative_share > 0.5
    assert "at no minimum" in " ".join(found.notes)


def test_noise_is_a_function_of_key_chain_and_step():
    loss = language([(3, 5)])
    run = {"num_steps": 8, "burn_in": 2, "step_size": 1e-2, "localization": 1.0}
    before, state = loss.net.theta, torch.random.get_rng_state()
    four = learning_coefficient(loss, before, key=key(0), num_chains=4, **run)
    assert four == learning_coefficient(loss, before, key=key(0), num_chains=4, **run)
    two = learning_coefficient(loss, before, key=key(0), num_chains=2, chunk_size=1, **run)
    torch.testing.assert_close(four.traces[:2], two.traces, rtol=1e-9, atol=1e-12)
    other = learning_coefficient(loss, before, key=key(1), num_chains=4, **run)
    assert float((four.traces - other.traces)[:, 1:].abs().min()) > 0
    assert torch.equal(before, loss.net.theta)
    assert torch.equal(state, torch.random.get_rng_state())
    loss._verdicts.add("looped")
    loss._verdicts.discard("mapped")
    torch.testing.assert_close(
        learning_coefficient(loss, before, key=key(0), num_chains=2, **run).traces, two.traces, rtol=1e-9, atol=1e-12
    )


def test_chains_begin_at_the_weights_and_step_as_written():
    loss = language([(3, 5)])
    theta = loss.net.theta
    chains = langevin_chains(
        loss, theta, key=key(0), num_chains=1, num_steps=3, step_size=0.04, strength=7.0, localization=2.0
    )  # fmt: skip
    w, excess, distance, pull = theta, [], [], []
    for step in range(3):
        excess.append(float(loss(w) - loss(theta)))
        distance.append(float((w - theta).square().sum()))
        gradient = 7 * torch.func.grad(loss)(w)
        pull.append(float(gradient @ (gradient + 2 * (w - theta))))
        noise = normal(fs.fold_in(fs.fold_in(fs.fold_in(key(0), "noise"), 0), step), theta)
        w = w - 0.02 * (7 * torch.func.grad(loss)(w) + 2 * (w - theta)) + 0.2 * noise
    np.testing.assert_allclose(chains.excess[0], excess, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(chains.square_distance[0], distance, rtol=1e-9)
    np.testing.assert_allclose(chains.pull[0], pull, rtol=1e-9)


def autoregressive(rho, chains, num, seed=0):
    draws = np.random.default_rng(seed).normal(size=(chains, num))
    x = scipy.signal.lfilter([1.0], [1.0, -rho], draws * (1 - rho**2) ** 0.5, axis=1)
    return torch.tensor(x)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, -0.4])
def test_effective_samples_of_ar1_are_known(rho):
    found = effective_samples(autoregressive(rho, 4, 50_000))
    assert found == pytest.approx(200_000 * (1 - rho) / (1 + rho), rel=0.15)


def test_r_hat_is_1_of_one_distribution_and_sees_places_spreads_and_drifts():
    x = autoregressive(0.3, 4, 1000)
    assert 0.999 < split_r_hat(x) < 1.01
    assert split_r_hat(x + torch.tensor([0, 0, 0, 2.0])[:, None]) > 1.1
    assert split_r_hat(x * torch.tensor([1, 1, 1, 6.0])[:, None]) > 1.1  # by the distances from the median alone
    assert split_r_hat(x + torch.linspace(0, 3, 1000)) > 1.1
    assert split_r_hat(x.exp()) == pytest.approx(split_r_hat(x), abs=0.005)  # of ranks
    assert effective_samples(x + torch.tensor([0, 0, 0, 2.0])[:, None]) < 40


@given(st.integers(4, 60), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=25)
def test_diagnostics_do_not_depend_on_the_unit_or_on_the_order_of_chains(num, chains, seed):
    x = autoregressive(0.5, chains, num, seed)
    for function in (split_r_hat, effective_samples):
        assert function(4 * x.flip(0)) == pytest.approx(function(x), rel=1e-9)
    assert effective_samples(x) <= chains * num * max(math.log10(chains * num), 1) + 1e-9


def test_diagnostics_of_nothing_are_nan():
    for x in (torch.zeros(3, 10), torch.arange(6.0).view(2, 3), torch.full((2, 9), math.nan), torch.zeros(0, 9)):
        assert math.isnan(split_r_hat(x))
        assert math.isnan(effective_samples(x))


def test_sweep_has_the_estimates_of_its_settings():
    loss = quadratic([[5.0, 1.0]] * 20)
    run = {"num_chains": 3, "num_steps": 20, "burn_in": 5}
    found = learning_coefficient_sweep(
        loss, loss.net.theta, key=key(0), step_sizes=(1e-2, 1e-3, 1e-4), localizations=(9.0, 2.0), **run
    )
    assert found.step_sizes == [1e-4, 1e-3, 1e-2]
    for i, gamma in enumerate((2.0, 9.0)):
        for j, eps in enumerate(found.step_sizes):
            at = fs.fold_in(key(0), f"{eps!r} {gamma!r}")
            one = learning_coefficient(loss, loss.net.theta, key=at, step_size=eps, localization=gamma, **run)
            assert float(one.learning_coefficient.value) == float(found.estimates[i, j])
            assert float(one.learning_coefficient.stderr) == float(found.estimates_stderr[i, j])


def test_a_plateau_is_shown_and_not_merely_undisputed():
    ok = torch.ones(4, dtype=torch.bool)
    value, small = torch.tensor([1.0, 2.0, 2.02, 1.98]), torch.full((4,), 0.02)
    assert plateau(value, small, ok, tolerance=0.1) == range(1, 4)
    assert plateau(value, 10 * small, ok, tolerance=0.1) is None  # wide errors show no agreement
    assert plateau(value, small, ok.clone().index_fill(0, torch.tensor(2), False), tolerance=0.1) is None
    assert plateau(torch.tensor([1.0, 1.3, 1.7, 2.2]), small, ok, tolerance=0.1) is None
    assert plateau(torch.ones(4), small, ok, tolerance=0.1) == range(4)


SWEEP = {"num_chains": 40, "chunk_size": 40, "num_steps": 600, "burn_in": 100}


@pytest.mark.slow
def test_sweep_finds_the_plateau_of_a_quadratic_and_none_where_steps_are_too_large():
    h = [20.0, 10.0]
    loss = quadratic([h] * 20)
    strength = 20 / math.log(20)  # p = 154 and 87: eps p / 4 is 0.08 at 2e-3
    found = learning_coefficient_sweep(
        loss, loss.net.theta, key=key(0), step_sizes=(1e-3, 1.5e-3, 2e-3, 2e-2), localizations=(20.0,), **SWEEP
    )
    perfect = sum(strength * x / (strength * x + 20) for x in h) / 2
    assert float(found.learning_coefficient[0]) == pytest.approx(perfect, rel=0.1)
    assert (float(found.plateau_from[0]), float(found.plateau_to[0])) == (1e-3, 2e-3)
    assert found.notes == []
    errors = found.estimates_stderr[0, :3]
    assert float(found.learning_coefficient_stderr[0]) == pytest.approx(float(errors.square().sum().sqrt()) / 3)
    none = learning_coefficient_sweep(
        loss, loss.net.theta, key=key(0), step_sizes=(8e-3, 1.6e-2, 0.3), localizations=(20.0,), **SWEEP
    )
    assert bool(none.learning_coefficient.isnan().all())
    assert "no plateau" in none.notes[0]
    assert int(none.num_diverged[0, -1]) == 40


@pytest.mark.slow
def test_intervals_over_four_chains_cover():
    """200 repetitions of four chains; 95 % intervals by Student's t, of the exact mean of these finite chains."""
    h = [30.0, 5.0, 0.5, 0.0]
    loss = quadratic([h] * 50)
    run = RUN | {"num_steps": 260}
    many = learning_coefficient(loss, loss.net.theta, key=key(7), num_chains=800, chunk_size=800, **run)
    wanted = exact(h, strength=50 / math.log(50), **run)
    ends = [interval(Estimate.of(each)) for each in many.chain_estimates.view(200, 4)]
    share = np.mean([low < wanted < high for low, high in ends])
    assert 0.9 < share < 0.99


def test_doors():
    loss = quadratic([[5.0]] * 4)
    theta = loss.net.theta
    for wrong, text in (
        ({"num_chains": 1}, "`num_chains` must be an integer of at least 2"),
        ({"num_steps": 10, "burn_in": 9}, "`num_steps` must be an integer of at least 13"),
        ({"step_size": 0.0}, "`step_size` must be a finite number above 0"),
        ({"chunk_size": 0}, "`chunk_size` must be an integer of at least 1"),
        ({"localization": -1.0}, "`localization` must be"),
        ({"batch_size": 5}, "`batch_size` must be at most the 4 sequences"),
        ({"inverse_temperature": 0.0}, "`inverse_temperature` must be"),
    ):
        with pytest.raises(ValueError, match=text):
            learning_coefficient(loss, theta, key=key(0), **wrong)
    with pytest.raises(ValueError, match="single sequence"):
        learning_coefficient(quadratic([[5.0]]), theta, key=key(0))
    with pytest.raises(ValueError, match="`step_sizes` must be 3 different ones"):
        learning_coefficient_sweep(loss, theta, key=key(0), step_sizes=(1e-3, 1e-3))
    with pytest.raises(TypeError, match="no option `steps`"):
        learning_coefficient_sweep(loss, theta, key=key(0), steps=3)


def test_what_no_learning_coefficient_is_may_be_chance():
    traces = torch.tensor([[0.0, 0.9, 1.0, 1.1], [0.0, 1.1, 1.2, 1.3]]).double()
    made = LearningCoefficient(
        traces, 0 * traces, torch.zeros(2, dtype=torch.bool), 10, 2, 0.1, 1e-3, 1.0, 1, None, fs.key(0)
    )
    assert float(made.learning_coefficient.value) == pytest.approx(1.1)
    assert float(made.learning_coefficient.stderr) == pytest.approx(0.1)
    near, far = (" ".join(replace(made, num_parameters=num).notes) for num in (2, 1))
    assert "above 1, half the number of weights" in near
    assert "chance" in near
    assert "above 0.5, half the number of weights" in far
    assert "chance" not in far


def test_chains_that_have_not_mixed_have_no_coefficient():
    loss = quadratic([[5.0, 1.0]] * 20)
    short = learning_coefficient(loss, loss.net.theta, key=key(0), num_steps=30, burn_in=9, step_size=1e-4)
    assert short.r_hat > MIXED
    assert "not resolved" in str(short)
    assert short.unresolved == ["learning_coefficient"]
    long = learning_coefficient(
        loss, loss.net.theta, key=key(0), num_steps=500, burn_in=100, step_size=1e-2, localization=1.0
    )
    assert long.r_hat <= MIXED
    assert long.unresolved == []


SPREAD = [60.0, 5.0] + [0.5] * 30 + [0.0] * 70  # p from 786 to 20 at n = 50 and a localisation of 20


def planted(curvatures, **run):
    loss = quadratic([curvatures] * 50)
    settings = {"num_chains": 16, "chunk_size": 16, "step_size": 1e-3, "localization": 20.0}
    return learning_coefficient(loss, loss.net.theta, key=key(0), **settings | run)


def in_the_end(curvatures, step_size):
    strength = 50 / math.log(50)
    return exact(curvatures, strength=strength, localization=20.0, step_size=step_size, burn_in=5000, num_steps=5001)


def test_a_burn_in_of_less_than_a_relaxation_time_is_named_and_its_estimate_lacks_what_is_to_come():
    short = planted(SPREAD, num_steps=30, burn_in=20)
    assert short.num_relaxations == pytest.approx(0.2)
    note = next(text for text in short.notes if "directions without curvature" in text)
    for text in ("began in 100 steps", "have 33% of their variance after the 20 of", "a burn-in of 500 steps"):
        assert text in note
    made = short.learning_coefficient
    assert float(made.value) + 4 * float(made.stderr) < in_the_end(SPREAD, 1e-3)


def test_the_note_on_the_burn_in_has_the_variance_that_flat_directions_have():
    flat = planted([0.0] * 400, num_steps=24, burn_in=20)
    whole = 1 / (20 * (1 - 1e-3 * 20 / 4))
    assert float(flat.square_distances[:, 20].mean()) / 400 == pytest.approx(0.33 * whole, rel=0.08)


@pytest.mark.slow
def test_a_burn_in_of_several_relaxation_times_has_no_note_and_the_estimate_of_the_end():
    long = planted(SPREAD, num_chains=8, num_steps=900, burn_in=250, step_size=2e-3)
    assert long.num_relaxations == pytest.approx(5)
    assert long.notes == []
    made, ended = long.learning_coefficient, in_the_end(SPREAD, 2e-3)
    assert abs(float(made.value) - ended) < 4 * float(made.stderr) < 0.2 * ended
    assert not any("without curvature" in text for text in replace(long, burn_in=50).notes)
    assert any("without curvature" in text for text in replace(long, burn_in=49).notes)


def test_noise_of_minibatches_hides_from_r_hat_what_the_note_on_the_burn_in_sees():
    loss = quadratic([[1.0] * 20, [99.0] * 20] * 10)
    run = {"num_steps": 120, "burn_in": 20, "step_size": 3e-5, "localization": 100.0}
    whole, noisy = (
        learning_coefficient(loss, loss.net.theta, key=key(0), batch_size=size, **run) for size in (None, 4)
    )
    assert whole.r_hat > 1.4
    assert noisy.r_hat < 1.2
    for each in (whole, noisy):
        assert any("directions without curvature" in text for text in each.notes)


def test_without_a_localisation_flat_directions_have_no_end():
    notes = planted([5.0, 0.0], num_steps=24, burn_in=20, localization=0.0).notes
    assert any("as nothing holds them" in text for text in notes)


def test_defaults_burn_in_for_several_relaxation_times():
    default = {name: each.default for name, each in inspect.signature(learning_coefficient).parameters.items()}
    swept = {name: each.default for name, each in inspect.signature(learning_coefficient_sweep).parameters.items()}
    settings = [(default["step_size"], default["localization"])]
    settings += [(eps, gamma) for eps in swept["step_sizes"] for gamma in swept["localizations"]]
    for step_size, localization in settings:
        assert default["burn_in"] * step_size * localization / 2 >= RELAXED
        assert step_size * localization / 4 <= 0.05  # what flat directions spread too far


def test_mixed_chains_most_of_which_lies_below_the_weights_are_on_no_plateau():
    """Draws of which a share is below by 0.1, the others above by 1: by the mean alone these estimates are alike."""

    def drawn(share, seed):
        low = np.random.default_rng(seed).random((4, 3000)) < share
        traces = torch.tensor(np.where(low, -0.1, 1.0))
        diverged = torch.zeros(4, dtype=torch.bool)
        return LearningCoefficient(traces, 0 * traces, diverged, 10, 99, 0.1, 1e-3, 1000.0, 10, None, fs.key(0))

    few, many = ([drawn(share, seed) for seed in range(3)] for share in (0.4, 0.6))
    assert all(one.r_hat <= MIXED and float(one.learning_coefficient.value) > 0.2 for one in few + many)
    found = _swept([few, many], [1e-3, 2e-3, 3e-3], [1.0, 2.0], 0.2)
    assert found.learning_coefficient.isnan().tolist() == [False, True]
    assert "around a minimum" in found.notes[0]
