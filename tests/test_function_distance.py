"""Distances in weights and in predictions. Oracles: numpy with whole softmaxes, scipy, the room of divergences."""

import math

import numpy as np
import pytest
import torch
from problems import gpt2, seeded, tokens
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, softmax
from torch.testing import assert_close

import funcscope as fs
from funcscope.information import divergence_sums, output_divergence
from funcscope.weights import elasticity, function_distance, weight_distance


def language():
    net = fs.functional(seeded(0, gpt2).double())
    return fs.objective(net, [tokens(1, 3, 7, pad=3), tokens(2, 2, 5)], fs.causal_lm)


LOSS = language()
BASE = LOSS.net.theta
OTHER, THIRD = (BASE + 0.3 * fs.normal(fs.key(k), BASE) for k in range(2))


def by_hand(loss, first, second, number):
    """Sums and weights per sequence, of numpy's softmax."""
    sums, weights = [], []
    for inputs, (_, weight) in loss.batches:
        p, q = (loss.net.apply(loss.params(x), inputs).detach().numpy() for x in (first, second))
        for i in range(len(weight)):
            at = weight[i].numpy() != 0
            sums.append(sum(number(a, b) for a, b in zip(p[i][at], q[i][at], strict=True)))
            weights.append(at.sum())
    return np.array(sums), np.array(weights)


def kl(a, b):
    return (softmax(a) * (log_softmax(a) - log_softmax(b))).sum()


NUMBERS = {
    "kl": kl, "kl_reverse": lambda a, b: kl(b, a), "js": lambda a, b: jensenshannon(softmax(a), softmax(b)) ** 2,
    "disagreement": lambda a, b: float(a.argmax() != b.argmax()),
}  # fmt: skip


def test_divergences_are_means_over_scored_positions_with_errors_over_sequences():
    found = function_distance(LOSS, BASE, OTHER, chunk=2)
    for name, number in NUMBERS.items():
        sums, weights = by_hand(LOSS, BASE, OTHER, number)
        value = sums.sum() / weights.sum()
        assert_close(getattr(found, name), value, rtol=1e-9, atol=1e-12)
        rest = sums - value * weights
        assert_close(
            getattr(found, f"{name}_stderr"), math.sqrt(5 / 4 * (rest**2).sum()) / weights.sum(), rtol=1e-8, atol=1e-12
        )
    assert found.num_sequences == 5
    outs = [
        (LOSS.net.apply(LOSS.params(BASE), x), LOSS.net.apply(LOSS.params(OTHER), x), y.weight) for x, y in LOSS.batches
    ]
    first, second = (divergence_sums(*each) for each in outs)
    assert_close(found.js, output_divergence(first.merge(second)).js)
    assert_close(function_distance(LOSS.split(1), BASE, OTHER).js, found.js)
    swapped = function_distance(LOSS, OTHER, BASE)
    assert_close((swapped.kl, swapped.js), (found.kl_reverse, found.js))


def test_a_model_is_at_distance_zero_of_itself_and_far_logits_are_finite():
    same = function_distance(LOSS, BASE, BASE)
    assert (same.kl, same.js, same.disagreement) == (0, pytest.approx(0, abs=1e-15), 0)
    net = seeded(0, lambda: fs.functional(torch.nn.Linear(1, 2, bias=False)))
    loss = fs.objective(net, [(torch.ones(3, 1), torch.tensor([0, 1, -100]))], fs.classification)
    far = function_distance(loss, torch.tensor([500.0, -500.0]), torch.tensor([-500.0, 500.0]))
    assert (far.kl, far.disagreement, far.num_sequences) == (1000, 1, 2)
    assert_close(far.js, math.log(2))
    p = torch.tensor([500.0, -500.0]).softmax(0)
    assert (p * p.log()).isnan().any()  # what a document computes: 0 times minus infinity


def test_elasticity_is_its_formula_and_its_error_the_jackknife():
    found = elasticity(LOSS, BASE, OTHER, THIRD)
    (changed, weights), (restored, _) = (by_hand(LOSS, BASE, x, kl) for x in (OTHER, THIRD))

    def value(keep):
        c, r = (x[keep].sum() / weights[keep].sum() for x in (changed, restored))
        return (math.exp(-r) - math.exp(-c)) / (1 - math.exp(-c))

    assert_close(found.elasticity, value(np.arange(5)), rtol=1e-8, atol=1e-10)
    out = np.array([value(np.delete(np.arange(5), i)) for i in range(5)])
    assert_close(found.elasticity_stderr, float(np.sqrt(4 / 5 * ((out - out.mean()) ** 2).sum())), rtol=1e-6, atol=1e-9)
    assert elasticity(LOSS, BASE, OTHER, BASE).elasticity == pytest.approx(1)
    assert elasticity(LOSS, BASE, OTHER, OTHER).elasticity == pytest.approx(0, abs=1e-12)
    nothing = elasticity(LOSS, BASE, BASE, OTHER)
    assert math.isnan(nothing.elasticity)
    assert "nothing to undo" in " ".join(nothing.notes)
    assert elasticity(LOSS, BASE, BASE + 0.1 * (OTHER - BASE), OTHER).elasticity < 0


def test_weight_distance_is_relative_tensor_by_tensor():
    found = weight_distance(BASE, OTHER, LOSS.layout)
    ends = [LOSS.layout.unravel(x) for x in (BASE, OTHER)]
    relative = []
    for i, name in enumerate(LOSS.layout.names):
        a, b = (x[name].numpy() for x in ends)
        assert_close(float(found.distances[i]), float(np.linalg.norm(a - b)))
        relative.append(np.linalg.norm(a - b) / np.linalg.norm(a) if np.linalg.norm(a) else math.nan)
    assert_close(found.relative, torch.tensor(relative), equal_nan=True)
    assert found.relative.isnan().any()  # biases that are 0
    assert_close(found.rms_relative, math.sqrt(np.nanmean(np.square(relative))))
    assert_close(found.total_relative, float((OTHER - BASE).norm() / BASE.norm()))
    with pytest.raises(ValueError, match="finite"):
        weight_distance(BASE * math.nan, OTHER, LOSS.layout)


def test_outputs_that_are_no_logits_are_refused():
    net = seeded(0, lambda: fs.functional(torch.nn.Linear(1, 1)))
    loss = fs.objective(net, [(torch.ones(2, 1), torch.zeros(2, 1))], fs.mse)
    with pytest.raises(ValueError, match="labels"):
        function_distance(loss, net.theta, net.theta)


def permuted() -> tuple[fs.Loss, torch.Tensor, torch.Tensor]:
    """A loss, and two models that are one function, with hidden units in another order."""
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        net = fs.functional(torch.nn.Sequential(torch.nn.Linear(4, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3)))
    batches = [(torch.randn(6, 4, generator=g), torch.randint(0, 3, (6,), generator=g))]
    start = torch.randn(net.theta.shape, generator=g)
    one, bias, two, last = start.split([160, 40, 120, 3])
    order = torch.arange(39, -1, -1)
    end = torch.cat([one.view(40, 4)[order].flatten(), bias[order], two.view(3, 40)[:, order].flatten(), last])
    return fs.objective(net, batches, fs.classification), start, end


def test_a_change_of_rounding_alone_is_nothing_to_undo():
    """The quotient of two roundings is a number of any size, and sequences do not say so."""
    loss, start, same = permuted()
    found = elasticity(loss, start, same, start + 0.3)
    assert found.kl_changed <= found.rounding < 1e-9
    assert math.isnan(found.elasticity)
    assert math.isnan(found.elasticity_stderr)
    assert "rounding" in " ".join(found.notes)
    assert elasticity(
        loss, start, start + 1e-3 * start.sign() * torch.arange(len(start)), start
    ).elasticity == pytest.approx(1)
    assert "no divergence is resolved" in " ".join(function_distance(loss, start, same).notes)


def test_predictions_that_are_nan_have_no_first_choice():
    loss, start, _ = permuted()
    broken = start.clone()
    broken[0] = math.nan
    found = function_distance(loss, start, broken)
    assert math.isnan(found.kl)
    assert math.isnan(found.disagreement)
    assert "look at its weights" in " ".join(found.notes)
    assert "look at its weights" in " ".join(elasticity(loss, start, broken, start).notes)


class LogOdds(torch.nn.Module):
    """Logits that are logarithms of weights: -inf at 0."""

    def __init__(self):
        super().__init__()
        self.odds = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        return x * self.odds.log()


def test_a_model_that_rules_a_class_out_is_infinitely_far_and_named():
    net = fs.functional(LogOdds())
    loss = fs.objective(net, [(torch.ones(2, 1).double(), torch.tensor([0, 1]))], fs.classification)
    every, two = torch.ones(3).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    for first, second, kl in ((every, two, math.inf), (two, every, math.log(1.5))):
        found = function_distance(loss, first, second)
        assert found.kl == pytest.approx(kl)
        assert found.js == pytest.approx(jensenshannon([1, 1, 1], [1, 1, 0]) ** 2)  # scipy scales to 1
        assert any("a divergence is infinite" in text for text in found.notes)
    assert function_distance(loss, two, two).kl == function_distance(loss, two, two).js == 0
