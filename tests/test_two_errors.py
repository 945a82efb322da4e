"""Errors over directions and over data, what a finite step does to a curvature, signs, and exact curvatures by products."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import dense_hessian, loss_of, seeded
from scipy import special
from scipy import stats as scipy_stats
from torch import nn
from torch.testing import assert_close

import funcscope as fs
from funcscope.core import statistics
from funcscope.core.estimate import Crossed, Estimate, interval, p_value
from funcscope.core.standard_errors import means
from funcscope.landscape.compare import compare_directional
from funcscope.landscape.directional import prepare
from funcscope.landscape.sampling import SamplingSettings

FULL = {"two_sided": True, "compute_gradient": True, "compute_curvature": True}


def table(num, size, seed, sizes=(1.0, 1.0, 1.0)):
    """Crossed effects: a value per direction and sequence."""
    draw, data, both = (fs.normal(fs.fold_in(fs.key(seed), i), torch.zeros(num, size).double()) for i in range(3))
    return sizes[0] * draw[:, :1] + sizes[1] * data[:1] + sizes[2] * both


def crossed(x):
    value = x.mean(1)
    return Crossed.of_rows(Estimate.of(value), (x - value[:, None]) / x.numel())


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 999))
def test_the_total_error_is_that_of_the_two_way_analysis_of_variance(num, size, seed):
    """Closed form: mean squares of rows, columns and rest, the rest taken off once."""
    x = table(num, size, seed)
    rows, columns = x.mean(1), x.mean(0)
    rest = x - rows[:, None] - columns + x.mean()
    square = rest.square().sum() / ((num - 1) * (size - 1)) / (num * size)
    found = crossed(x)
    assert_close(found.stderr, rows.std() / num**0.5)
    assert_close(found.stderr_data, columns.std() / size**0.5)
    one, other = found.stderr**2, found.stderr_data**2
    assert_close(found.stderr_total**2, torch.maximum(one + other - square, torch.maximum(one, other)))
    assert min(num, size) - 1 <= found.dof + 1e-9


def test_intervals_and_p_values_agree_and_nothing_is_certain_without_an_error():
    found = crossed(table(6, 8, 3))
    p = p_value(found)
    low, high = interval(found, 1 - p)
    assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-9)
    assert math.isnan(p_value(Estimate.of(torch.ones(1))))
    assert p_value(Estimate.of(torch.zeros(3))) == 1
    assert p_value(Estimate.of(torch.ones(3))) == 0
    single = crossed(table(4, 1, 0))
    assert single.stderr_data.isnan()
    assert interval(single) == interval(Estimate(single.value, single.stderr, single.num))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1), (0, 1, 3), (1, 0, 1), (0.2, 1, 0), (0, 0, 1)])
def test_the_total_interval_covers(sizes):
    hits = [low <= 0 <= high for low, high in (interval(crossed(table(12, 24, seed, sizes))) for seed in range(400))]
    assert 0.92 <= np.mean(hits) <= 0.995


# Data errors of directional losses, against terms that are made by hand


def by_hand(loss, key, num, span):
    """Changes at both ends as sums per sequence, (num, n), and weights: theta + h d built densely."""
    theta = loss.net.theta
    rows = fs.stack(fs.directions(loss.net, key=key, num=num))
    at, weights = loss.terms(theta)
    sides = [torch.stack([loss.terms(theta + sign * span * d)[0] for d in rows]) - at for sign in (1, -1)]
    return *sides, at, weights


@pytest.mark.slow
@pytest.mark.parametrize("plan", [{"chunk": 3}, {"chunk": 1}, {"lazy": True}])
def test_errors_over_sequences_are_those_of_terms_made_by_hand(plan):
    """Oracle: linearised errors of token-weighted means (one sequence of the batch is shorter than the others)."""
    loss, span = loss_of("gpt2"), 0.2
    result = fs.directional_losses(loss, loss.net.theta, key=fs.key(5), n_samples=4, span=span, **FULL, **plan)
    up, down, at, weights = by_hand(loss, fs.key(5), 4, span)
    assert weights.unique().numel() > 1
    expected = {
        "loss_mean": up.mean(0) + at,
        "delta_mean": up.mean(0),
        "delta_mean_negative": down.mean(0),
        "curvature_mean": (up + down).mean(0) / span**2,
        "dir_grad_mean": (up - down).mean(0) / (2 * span),
        "rayleigh_mean": (up + down).mean(0) / span**2 / result.param_norm**2,
    }
    values = result.asdict()
    for name, sums in expected.items():
        assert values[f"{name}_stderr_data"] == pytest.approx(float(means(sums[None], weights).stderr), rel=1e-8)
    assert values["baseline_loss_stderr_data"] == pytest.approx(float(means(at[None], weights).stderr))
    assert values["n_sequences"] == len(weights)
    bent = result.rows("curvature")
    one = means(((up + down) / span**2)[:1], weights).stderr[0]
    assert_close((bent[0].square().sum() * len(weights) / (len(weights) - 1)).sqrt(), one, rtol=1e-8, atol=0)


def test_slopes_have_an_error_over_sequences_where_differences_are_slopes_and_none_where_they_are_not():
    """Oracle: per-sequence slopes by reverse mode, one sequence at a time."""
    loss, key = loss_of("mlp"), fs.key(5)
    near, far = (
        fs.directional_losses(loss, loss.net.theta, key=key, n_samples=4, span=span, **FULL).estimates["dir_grad_mean"]
        for span in (1e-3, 3.0)
    )
    rows = fs.per_sample_gradients(loss, loss.net.theta) @ fs.stack(fs.directions(loss.net, key=key, num=4)).mean(0)
    assert isinstance(near, Crossed)
    assert_close(near.stderr_data, means(rows[None], loss.terms(loss.net.theta)[1]).stderr[0], rtol=1e-4, atol=0)
    assert not isinstance(far, Crossed)


@pytest.mark.parametrize("name", ["loss_std", "landscape_roughness", "dir_grad_delta_corr", "curvature_p90"])
def test_errors_over_sequences_of_other_statistics_are_those_of_small_weights(name):
    """Oracle: the statistic at data with one sequence counted a little more often, by differences."""
    loss, span = loss_of("mlp"), 0.2
    result = fs.directional_losses(loss, loss.net.theta, key=fs.key(1), n_samples=9, span=span, **FULL)
    up, down, at, weights = by_hand(loss, fs.key(1), 9, span)
    at_rank = scipy_stats.beta.cdf(np.arange(10) / 9, 8 * 0.9 + 1, 9 - 8 * 0.9)
    ranks = torch.from_numpy(np.diff(at_rank))  # how likely each is the percentile of a sample of samples
    slopes = (up - down) / (2 * span)  # what a sequence adds to a slope is taken from here

    def statistic(w):
        more = lambda x: (x * w).sum(-1) / (weights * w).sum()  # noqa: E731
        loss_, slope = more(up + at), result.slopes + more(slopes) - more(slopes - 0 * at).detach()
        slope = result.slopes + more(slopes) - (slopes.sum(-1) / weights.sum())
        bent = more(up + down) / span**2
        r = lambda x, y: torch.corrcoef(torch.stack([x, y]))[0, 1]  # noqa: E731
        return {
            "loss_std": loss_.std(),
            "landscape_roughness": loss_.std() / loss_.mean(),
            "dir_grad_delta_corr": r(slope, more(up)),
            "curvature_p90": bent.sort().values @ ranks,
        }[name]

    num, h = len(weights), 1e-5
    moves = [(statistic(1 + h * e) - statistic(1 - h * e)) / (2 * h) for e in torch.eye(num).double()]
    expected = (torch.stack(moves).square().sum() * num / (num - 1)).sqrt()
    assert_close(result.estimates[name].stderr_data, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"chunk": 1}, {"two_sided": False}])
def test_flatness_has_errors_over_sequences(options):
    loss, theta = loss_of("mlp"), loss_of("mlp").net.theta
    found = fs.flatness(loss, theta, key=fs.key(2), n_directions=5, epsilon=0.3, **options)
    rows = fs.stack(fs.directions(loss.net, key=fs.key(2), num=5, normalize="global"))
    at, weights = loss.terms(theta)
    up, down = (torch.stack([loss.terms(theta + s * 0.3 * d)[0] - at for d in rows]).mean(0) for s in (1, -1))
    expected = {"mean_delta_loss": up} | (
        {"pair_mean": (up + down) / 2} if len(options) < 1 or "chunk" in options else {}
    )
    for name, sums in expected.items():
        error = means(sums[None], weights).stderr[0]
        assert_close(found.estimates[name].stderr_data, error, rtol=1e-8, atol=0)
        assert found.estimates[name].stderr_total >= found.estimates[name].stderr
    assert "flatness_ratio_stderr_data" not in found.asdict()
    if "pair_mean" in expected:
        scale = 2 * loss.layout.num / 0.09
        assert_close(found.second_order.stderr_total, scale * found.pair_mean.stderr_total)


def test_many_sequences_are_summed_in_groups_without_a_change_of_the_mean(monkeypatch):
    monkeypatch.setattr("funcscope.landscape.residuals.MOST", 1)
    net = fs.functional(seeded(0, lambda: nn.Linear(3, 2)).double())
    x = fs.normal(fs.key(0), torch.zeros(1000, 3).double())
    loss = fs.objective(net, [(x, (x[:, 0] > 0).long())], fs.classification)
    folded = fs.directional_losses(loss, net.theta, key=fs.key(0), n_samples=3)
    monkeypatch.undo()
    whole = fs.directional_losses(loss, net.theta, key=fs.key(0), n_samples=3)
    assert (folded.residuals.positive.shape, whole.residuals.positive.shape) == ((3, 64), (3, 1000))
    assert torch.equal(folded.losses, whole.losses)
    assert folded.residuals.num == 1000
    ratio = folded.estimates["delta_mean"].stderr_data / whole.estimates["delta_mean"].stderr_data
    assert 0.6 < ratio < 1.5


# Two models


def population():
    """Two nets that differ a little, and the data that texts are drawn from."""
    x = fs.normal(fs.key(1), torch.zeros(4000, 5).double())
    labels = (x[:, 0] + 0.5 * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()
    nets = [fs.functional(seeded(seed, lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))).double())
            for seed in (0, 1)]  # fmt: skip
    return nets, x, labels


def both(nets, x, labels, key, num, **options):
    make = {"n_samples": num, "span": 0.3, **FULL, **options}
    losses = [fs.objective(net, [(x, labels)], fs.classification) for net in nets]
    return [fs.directional_losses(loss, loss.net.theta, key=key, **make) for loss in losses]


def test_a_comparison_pairs_sequences():
    """Oracle: the errors of the mean difference of terms, sequence by sequence; unpaired ones would be larger."""
    nets, x, labels = population()
    first, second = both(nets, x[:32], labels[:32], fs.key(3), 12)
    every = compare_directional(first, second).differences
    got, changes, two_sided = every["delta_mean"], [], []
    for net in nets:
        loss = fs.objective(net, [(x[:32], labels[:32])], fs.classification)
        rows = fs.stack(fs.directions(net, key=fs.key(3), num=12))
        sides = [torch.stack([loss.terms(net.theta + a * d)[0] for d in rows]).mean(0) for a in (0.3, -0.3)]
        changes.append(sides[0] - loss.terms(net.theta)[0])
        two_sided.append((sides[0] + sides[1]) / 2 - loss.terms(net.theta)[0])
    gap, even = changes[1] - changes[0], two_sided[1] - two_sided[0]
    assert_close(every["delta_two_sided_mean"].difference.stderr_data, even.std() / 32**0.5)
    assert_close(got.difference.stderr_data, gap.std() / 32**0.5)
    low, high = got.interval
    total = float(got.difference.stderr_total)
    assert (high - low) / 2 == pytest.approx(scipy_stats.t.ppf(0.975, got.difference.dof) * total)
    assert got.p_value == pytest.approx(
        2 * scipy_stats.t.sf(abs(float(got.difference.value)) / total, got.difference.dof)
    )
    assert total > float(got.difference.stderr)
    values = compare_directional(first, second).asdict()
    assert values["delta_mean_p_value"] == got.p_value != got.pairs.p_value == values["delta_mean_wilcoxon_p_value"]
    assert values["delta_mean_difference_stderr_data"] == float(got.difference.stderr_data)


@pytest.mark.slow
def test_intervals_cover_the_truth_of_a_population_and_those_over_directions_alone_do_not():
    """200 keys: 40 texts from 4,000 and 16 directions; truth from all texts and 2,000 directions."""
    nets, x, labels = population()
    whole = both(nets, x, labels, fs.key(10**6), 2000, chunk=50)
    truth = {name: float(d.difference.value) for name, d in compare_directional(*whole).differences.items()}
    single = {name: float(e.value) for name, e in whole[0].estimates.items()}
    names = ("loss_mean", "delta_mean", "delta_two_sided_mean", "dir_grad_mean", "curvature_mean")
    alone = ("loss_mean", "delta_mean", "curvature_mean", "rayleigh_mean", "curvature_p50", "curvature_std")
    hits, one, narrow = (dict.fromkeys(group, 0) for group in (names, alone, names))
    for seed in range(200):
        texts = torch.from_numpy(np.random.default_rng(seed).integers(0, 4000, 40))
        results = both(nets, x[texts], labels[texts], fs.key(seed), 16)
        found = compare_directional(*results).differences
        for name in names:
            low, high = found[name].interval
            hits[name] += low <= truth[name] <= high
            d = found[name].difference
            narrow[name] += abs(float(d.value) - truth[name]) <= scipy_stats.t.ppf(0.975, 15) * float(d.stderr)
        for name in alone:
            low, high = interval(results[0].estimates[name])
            one[name] += low <= single[name] <= high
    for counts in (hits, one):
        assert all(180 <= count <= 199 for count in counts.values()), counts
    assert narrow["loss_mean"] < 170


# The step of a difference


def small(kind):
    make = {
        "tanh": lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)),
        "routed": Routed,
    }
    model, num = seeded(0, make[kind]).double(), {"tanh": 24, "routed": 600}[kind]
    x = fs.normal(fs.key(4), torch.zeros(num, 1, 6, 6).double())
    return fs.objective(fs.functional(model), [(x, torch.arange(num) % 3)], fs.classification)


class Routed(nn.Module):
    """Every sample goes through the expert that its gate likes best: the loss jumps where that changes."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(36, 3), nn.Linear(36, 9)

    def forward(self, x):
        x = x.flatten(1)
        choice = nn.functional.one_hot(self.gate(x).argmax(-1), 3).to(x.dtype)
        return (self.experts(x).unflatten(-1, (3, 3)) * choice[..., None]).sum(1)


def bent(loss, span, **options):
    return fs.directional_losses(
        loss, loss.net.theta, key=fs.key(1), n_samples=20, span=span, two_sided=True, compute_curvature=True, **options
    )


def test_the_bias_of_a_second_difference_is_seen_and_the_exact_way_has_none():
    """Oracle: forms of the dense Hessian along the same directions."""
    loss = small("tanh")
    rows = fs.stack(fs.directions(loss.net, key=fs.key(1), num=20))
    truth = ((rows @ dense_hessian(loss, loss.net.theta)) * rows).sum(1)
    coarse, fine, exact = bent(loss, 0.2), bent(loss, 0.02), bent(loss, 0.2, curvature="exact")
    assert_close(exact.curvatures, truth)
    num = len(coarse.finer)
    for result, slack in ((coarse, 0.2), (fine, 0.01)):
        assert result.truncation.status == "smooth"
        off = float((result.curvatures - truth)[:num].mean())
        assert float(result.truncation.bias.value) == pytest.approx(off, rel=slack)
    assert fine.truncation.settling == pytest.approx(0.25, abs=0.01)
    assert "exact" in bent(loss, 1.0).step_note
    assert fine.step_note is None
    assert exact.truncation is None
    values = coarse.asdict()
    assert values["curvature_truncation"] == float(coarse.truncation.bias.value)
    assert values["num_forwards"] == 9 + 40 + 4 * num


@pytest.mark.slow
@pytest.mark.parametrize("span", [0.1, 0.03, 0.01])
def test_jumps_are_not_taken_for_curvature(span):
    """Oracle: the derivative of the smooth pieces, factors away from the differences."""
    loss = small("routed")
    result, exact = bent(loss, span), bent(loss, span, curvature="exact")
    assert result.truncation.status == "rough"
    assert "not resolved" in result.step_note
    assert "not resolved" in str(result)
    value, truth = (float(r.estimates["curvature_mean"].value) for r in (result, exact))
    assert abs(value) > 2 * abs(truth)
    plain = small("tanh")
    assert bent(plain, span).truncation.status == "smooth"


def test_rounding_is_not_taken_for_jumps():
    loss = loss_of("gpt2", torch.float32)
    result = bent(loss, 1e-3)
    assert result.truncation.status == "rounding"
    assert "jumps" not in (result.step_note or "")


def test_a_step_longer_than_the_weights_is_said():
    loss = loss_of("mlp")
    make = {"key": fs.key(0), "n_samples": 3}
    assert "relative step 1.5" in str(fs.directional_losses(loss, loss.net.theta, span=1.5, **make))
    assert "own length" not in str(fs.directional_losses(loss, loss.net.theta, span=0.9, **make))
    assert "own length" in str(
        fs.flatness(loss, loss.net.theta, key=fs.key(0), epsilon=2.0, relative=True, n_directions=2)
    )
    far = [fs.directional_losses(loss, theta, span=1.5, **make) for theta in (loss.net.theta, 2 * loss.net.theta)]
    assert "own length" in str(compare_directional(*far))


# Exact curvatures


class Fused(nn.Module):
    """A fused norm that is called directly: `jvp` of `jvp` takes its saved mean for a constant."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.layer_norm(self.first(x), (5,)))


class Determinant(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3) + 0.3 * torch.randn(3, 3))

    def forward(self, x):
        return x * torch.linalg.solve(self.weight, x.T).T * torch.linalg.det(self.weight)


@pytest.mark.parametrize("make", [Fused, Determinant])
@pytest.mark.parametrize("plan", [{}, {"lazy": True}])
def test_exact_curvatures_are_right_where_second_forward_derivatives_are_not(make, plan):
    """Oracle: differences of values in float64, with Richardson's extrapolation."""
    model = seeded(0, make).double()
    size = 4 if make is Fused else 3
    x = fs.normal(fs.key(0), torch.zeros(6, size).double())
    loss = fs.objective(fs.functional(model), [(x, torch.arange(6) % 3)], fs.classification)
    theta, make_ = loss.net.theta, {"key": fs.key(2), "n_samples": 3, "compute_curvature": True}
    exact = fs.directional_losses(
        loss, theta, curvature="exact", compute_gradient=True, two_sided=True, **make_, **plan
    )
    c = [fs.directional_losses(loss, theta, two_sided=True, span=h, **make_).curvatures for h in (2e-3, 1e-3)]
    assert_close(exact.curvatures, (4 * c[1] - c[0]) / 3, rtol=1e-5, atol=1e-7)
    assert (exact.num_matvecs, exact.num_second_jvps) == (3, 3)


def test_exact_curvatures_have_an_error_over_sequences():
    """Oracle: d'H_s d of every sequence along every direction, from dense Hessians of single sequences."""
    nets, x, labels = population()
    x, labels = x[:10], labels[:10]
    loss = fs.objective(nets[0], [(x, labels)], fs.classification)
    result = fs.directional_losses(loss, nets[0].theta, key=fs.key(0), n_samples=3, compute_curvature=True,
                                   curvature="exact")  # fmt: skip
    rows = fs.stack(fs.directions(nets[0], key=fs.key(0), num=3))
    forms = [((rows @ dense_hessian(fs.objective(nets[0], [(x[i : i + 1], labels[i : i + 1])], fs.classification),
                                    nets[0].theta)) * rows).sum(1) for i in range(10)]  # fmt: skip
    each = torch.stack(forms, 1)
    found = result.estimates["curvature_mean"]
    assert_close(found.value, each.mean())
    assert_close(found.stderr_data, each.mean(0).std() / 10**0.5)


# Signs, percentiles, and going on where a run has ended


@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0]), min_size=1, max_size=12))
def test_the_sign_test_is_the_sum_over_all_signs(values):
    """Exact: the share of all assignments of signs that are at least as far from half and half."""
    found = statistics.signs(torch.tensor(values).double())
    num = found.num_above + found.num_below
    assert (found.num_above, found.num_below) == (sum(v > 0 for v in values), sum(v < 0 for v in values))
    far = abs(found.num_above - num / 2)
    share = sum(math.comb(num, k) for k in range(num + 1) if abs(k - num / 2) >= far) / 2**num
    assert found.p_value == pytest.approx(share)


def test_three_enormous_rises_are_not_called_indistinguishable_from_zero_alone():
    loss = loss_of("mlp")
    result = fs.directional_losses(loss, loss.net.theta, key=fs.key(0), n_samples=3)
    rises = torch.tensor([1e10, 2e10, 9e12], dtype=torch.float64)
    heavy = replace(result, losses=result.baseline_loss + rises, residuals=None)
    low, high = interval(heavy.estimates["delta_mean"])
    assert low < 0 < high
    text = " ".join(str(heavy).split())
    assert "positive along 3 and negative along 0 of 3 directions (sign test over directions, p = 0.25)" in text
    assert "One direction makes 100% of the sum" in text
    assert heavy.asdict()["delta_sign_p_value"] == 0.25


@pytest.mark.parametrize(("num", "q"), [(5, 0.5), (5, 0.25), (4, 1.0), (3, 0.5), (2, 0.0)])
def test_percentile_errors_are_the_scatter_under_resampling(num, q):
    """Exhaustive: the order statistic in all n^n samples with replacement."""
    x = fs.normal(fs.key(num), torch.zeros(num).double()).exp()
    grids = torch.cartesian_prod(*[torch.arange(num)] * num)
    resampled = x[grids].sort(1).values[:, round((num - 1) * q)]
    assert_close(statistics.quantile(x, q).stderr, resampled.std(unbiased=False))


@given(st.integers(2, 40), st.sampled_from([0.1, 0.5, 0.9]), st.sampled_from(["equal", "outlier", "ties", "plain"]))
def test_percentile_errors_exist_from_two_samples_on(num, q, kind):
    x = fs.normal(fs.key(num), torch.zeros(num).double())
    x = {"equal": 0 * x + 3.3, "outlier": x + 1e12 * (x == x.max()), "ties": x.round(), "plain": x}[kind]
    found = statistics.quantile(x, q)
    assert found.stderr.isfinite()
    assert (found.stderr == 0) == (x.unique().numel() == 1)


def test_the_weights_of_a_percentile_add_up():
    edges = np.arange(8) / 7
    weights = np.diff(special.betainc(0.1 * 6 + 1, 7 - 0.1 * 6, edges))
    assert weights.sum() == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"chunk": 4}, {"curvature": "exact", "chunk": 2}, {"lazy": True}])
def test_going_on_gives_the_same_bits_as_going_through(options):
    loss = loss_of("mlp")
    make = {"key": fs.key(1), "num": 10, "lengths": (0.2,), "slope": "auto", "curvature": "difference"}
    sampling = prepare(loss, loss.net.theta, SamplingSettings(**(make | options)))
    whole = sampling.run()
    first = next(iter(sampling.rows()))
    again = sampling.result([first, *sampling.rows(len(first["losses"]))])
    assert whole.asdict().keys() == again.asdict().keys()
    for name, value in whole.asdict().items():
        np.testing.assert_array_equal(value, again.asdict()[name], err_msg=name)
