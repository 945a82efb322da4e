"""Two models along the same directions: against scipy, closed forms and brute force, and that the error bars cover."""

import inspect
import itertools
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import loss_of, problem, seeded
from scipy import stats
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.standard_errors import jackknife_stderr
from funcscope.landscape.compare import compare_directional

FULL = {"two_sided": True, "compute_gradient": True, "compute_curvature": True}
MEANS = ("loss_mean", "delta_mean", "delta_two_sided_mean", "dir_grad_mean", "curvature_mean")
SPREADS = {
    "loss_std": ("losses", lambda x: x.std()),
    "landscape_roughness": ("losses", lambda x: x.std() / x.mean().abs()),
    "curvature_std": ("curvatures", lambda x: x.std()),
}
PAIRS = st.tuples(st.integers(4, 25), st.integers(0, 10**6))


def sampled(shift=0.0, num=12, seed=3, **options):
    """A real result: the small classifier, its weights moved by `shift` times a fixed vector."""
    loss = loss_of("mlp")
    theta = loss.net.theta
    theta = theta + shift * fs.normal(fs.key(99), theta)
    return fs.directional_losses(loss, theta, key=fs.key(seed), n_samples=num, **{"span": 0.3, **FULL, **options})


TEMPLATE = sampled(num=2)


def columns(num, seed, names=("losses", "losses_negative", "slopes", "exact_curvatures")):
    """Skewed samples that two results have partly in common."""
    draws = [fs.normal(fs.fold_in(fs.key(seed), name), torch.zeros(3, num, dtype=torch.float64)) for name in names]
    first = {name: (z[0] + z[1] / 2).exp() for name, z in zip(names, draws, strict=True)}
    second = {name: (z[0] + z[2] / 2).exp() + 0.3 for name, z in zip(names, draws, strict=True)}
    return first, second


def per_direction(result):
    """The fields with one entry per direction."""
    found = {field.name: getattr(result, field.name) for field in fields(result)}
    return {name: x for name, x in found.items() if isinstance(x, torch.Tensor) and x.ndim == 1}


def filled(template, samples, **changes):
    """The template with these samples, and as many entries in whatever else it has per direction."""
    num = len(samples["losses"])
    rest = {name: x[:1].expand(num) for name, x in per_direction(template).items()}
    return replace(template, **{**rest, **samples, "residuals": None, "finer": None, **changes})


def synthetic(num, seed, baseline=0.25):
    """Two results with made-up samples."""
    first, second = columns(num, seed)
    return filled(TEMPLATE, first), filled(TEMPLATE, second, baseline_loss=baseline)


def quantity(result, name):
    negative = result.losses_negative
    return {
        "loss_mean": result.losses,
        "delta_mean": result.losses - result.baseline_loss,
        "delta_two_sided_mean": (result.losses + negative - 2 * result.baseline_loss) / 2,
        "dir_grad_mean": result.slopes,
        "curvature_mean": result.curvatures,
    }[name]


def take(result, index):
    """The result with some of its directions only, or in another order."""
    return replace(result, **{name: x[index] for name, x in per_direction(result).items()})


def alone(result):
    """The result without what is known of its sequences."""
    return replace(result, residuals=None)


def leave_one_out(statistic, *samples):
    """Oracle: the statistic recomputed without each pair."""
    num = len(samples[0])
    keep = [torch.arange(num) != i for i in range(num)]
    return jackknife_stderr(torch.stack([statistic(*(x[k] for x in samples)) for k in keep]))


# Against scipy and brute force


@pytest.mark.parametrize("pair", ["two models", (5, 0), (30, 1), (80, 2)])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_means_intervals_and_tests_are_those_of_scipy(pair, level):
    """Outsider: scipy's paired t interval, signed-rank test, correlation."""
    first, second = (alone(sampled()), alone(sampled(0.1))) if pair == "two models" else synthetic(*pair)
    found = compare_directional(first, second, level=level)
    assert set(found.differences) == {*MEANS, *SPREADS}
    assert found.num_tests == 5
    for name in MEANS:
        x, y = (quantity(result, name).numpy() for result in (first, second))
        got, theirs = found.differences[name], stats.ttest_rel(y, x)
        interval = theirs.confidence_interval(level)
        assert_close(got.interval, (float(interval.low), float(interval.high)))
        assert_close(float(got.difference.value / got.difference.stderr), float(theirs.statistic))
        assert_close(got.p_value, float(theirs.pvalue))
        assert_close(float(got.first.value), float(x.mean()))
        assert_close(float(got.second.stderr), float(stats.sem(y)))
        assert (got.num_pairs, got.num_lost) == (len(x), 0)
        test = stats.wilcoxon(y, x, zero_method="pratt", correction=True)
        assert_close(got.pairs.wilcoxon, float(test.statistic))
        assert_close(got.pairs.p_value, float(test.pvalue))
        assert_close(float(got.pairs.correlation.value), float(stats.pearsonr(x, y).statistic))
        assert_close(got.pairing_gain, float((x.var(ddof=1) + y.var(ddof=1)) / (y - x).var(ddof=1)))
        assert_close(float(got.pairs.cohen_dz.value), float((y - x).mean() / (y - x).std(ddof=1)))


def rank_biserial(d):
    """Closed form of Kerby (2014): favourable minus unfavourable rank sum, over the sum of all ranks."""
    ranks = stats.rankdata(d.abs())
    return torch.tensor((ranks[d > 0].sum() - ranks[d < 0].sum()) / ranks.sum())


@pytest.mark.slow
@given(pair=PAIRS, coarse=st.booleans())
def test_effect_sizes_are_the_closed_forms_and_their_errors_leave_out_one_pair(pair, coarse):
    """Brute force; coarse samples have ties and zeros among their differences."""
    first, second = synthetic(*pair)
    if coarse:
        first, second = (replace(r, losses=(2 * r.losses).round() / 2) for r in (first, second))
    got = compare_directional(first, second).differences["loss_mean"].pairs
    d = second.losses - first.losses
    assert_close(got.rank_biserial.value, rank_biserial(d))
    assert_close(got.rank_biserial.stderr, leave_one_out(rank_biserial, d))
    assert_close(got.cohen_dz.value, d.mean() / d.std())
    expected = leave_one_out(lambda x: x.mean() / x.std(), d)
    if expected.isfinite():  # a sample without which all differences are equal
        assert_close(got.cohen_dz.stderr, expected)


@pytest.mark.slow
@given(num=st.integers(2, 9), seed=st.integers(0, 10**6), coarse=st.booleans())
def test_the_p_value_is_that_of_all_assignments_of_signs(num, seed, coarse):
    """Exact: the signed rank sum over all 2^n signs, zeros ranked and left out of the sums (Pratt)."""
    first, second = synthetic(num, seed)
    if coarse:
        first, second = (replace(r, losses=r.losses.round()) for r in (first, second))
    got = compare_directional(first, second).differences["loss_mean"].pairs
    d = (second.losses - first.losses).numpy()
    ranks = stats.rankdata(np.abs(d)) * (d != 0)
    signs = np.array(list(itertools.product((0, 1), repeat=num)))
    sums, observed = signs @ ranks, ranks[d > 0].sum()
    tails = np.mean(sums <= observed + 1e-9), np.mean(sums >= observed - 1e-9)
    assert got.p_value == pytest.approx(min(1, 2 * min(tails)))
    assert got.wilcoxon == min(observed, ranks.sum() - observed)


@pytest.mark.slow
@given(PAIRS)
def test_the_jackknife_of_spreads_leaves_a_direction_out_of_both(pair):
    """Brute force."""
    first, second = synthetic(*pair)
    found = compare_directional(first, second).differences
    for name, (column, statistic) in SPREADS.items():
        x, y = getattr(first, column), getattr(second, column)
        got = found[name]
        assert got.pairs is None
        assert_close(got.first.value, statistic(x))
        assert_close(got.difference.value, statistic(y) - statistic(x))
        assert_close(got.difference.stderr, leave_one_out(lambda a, b: statistic(b) - statistic(a), x, y))  # noqa: B023
        half = float(got.difference.stderr) * stats.t.ppf(0.975, pair[0] - 1)
        assert_close(got.interval, (float(got.difference.value) - half, float(got.difference.value) + half))


def test_a_large_common_level_costs_no_digits():
    """Losses of size 10^6 with a scatter of 1: sums of squares would leave four digits of it."""
    first, second = synthetic(20, 5)
    raised = [replace(r, losses=r.losses + 2.0**20, baseline_loss=r.baseline_loss + 2.0**20) for r in (first, second)]
    low, high = (compare_directional(*pair).differences for pair in ((first, second), raised))
    for name in ("delta_mean", "loss_std"):
        assert_close(low[name].difference.stderr, high[name].difference.stderr, rtol=1e-8, atol=0)
        assert_close(low[name].interval, high[name].interval, rtol=1e-7, atol=1e-8)


# Laws


@pytest.mark.slow
@given(PAIRS)
def test_swapping_the_two_flips_every_sign(pair):
    first, second = synthetic(*pair)
    there, back = (compare_directional(*pair).differences for pair in ((first, second), (second, first)))
    for name, a in there.items():
        b = back[name]
        assert_close(a.difference.value, -b.difference.value)
        assert_close(a.difference.stderr, b.difference.stderr)
        assert_close(a.interval, (-b.interval[1], -b.interval[0]))
        assert_close((a.first.value, a.second.value), (b.second.value, b.first.value))
        assert_close(a.pairing_gain, b.pairing_gain)
        if name in MEANS:
            assert_close(a.pairs.rank_biserial.value, -b.pairs.rank_biserial.value)
            assert_close(a.pairs.cohen_dz.value, -b.pairs.cohen_dz.value)
            assert_close((a.pairs.wilcoxon, a.pairs.p_value), (b.pairs.wilcoxon, b.pairs.p_value))


@pytest.mark.slow
@given(PAIRS)
def test_a_result_compared_with_itself_differs_by_nothing(pair):
    first, _ = synthetic(*pair)
    found = compare_directional(first, first)
    for name, got in found.differences.items():
        assert (float(got.difference.value), float(got.difference.stderr), got.interval) == (0, 0, (0, 0))
        assert got.pairing_gain == math.inf
        if name in MEANS:
            assert (got.pairs.wilcoxon, got.pairs.p_value, float(got.pairs.rank_biserial.value)) == (0, 1, 0)
            assert got.pairs.cohen_dz.value.isnan()
            assert_close(float(got.pairs.correlation.value), 1.0)


@pytest.mark.slow
@given(PAIRS)
def test_the_order_of_the_pairs_says_nothing(pair):
    first, second = synthetic(*pair)
    order = torch.tensor(np.random.default_rng(pair[1]).permutation(pair[0]))
    plain = compare_directional(first, second).asdict()
    shuffled = compare_directional(take(first, order), take(second, order)).asdict()
    assert plain.keys() == shuffled.keys()
    for name, value in plain.items():
        assert shuffled[name] == (pytest.approx(value) if isinstance(value, float) else value)
    apart = compare_directional(first, take(second, order.roll(1))).asdict()
    assert apart["loss_mean_difference"] == pytest.approx(plain["loss_mean_difference"])  # the mean does not know
    assert apart["loss_mean_difference_stderr"] != plain["loss_mean_difference_stderr"]  # its error does


@pytest.mark.slow
@given(PAIRS, st.floats(0.1, 10), st.floats(-3, 3))
def test_units_and_levels_of_the_loss_act_as_they_should(pair, scale, level):
    first, second = synthetic(*pair)
    moved = [
        replace(r, losses=scale * r.losses + level, baseline_loss=scale * r.baseline_loss) for r in (first, second)
    ]
    a, b = (compare_directional(*pair).differences["loss_mean"] for pair in ((first, second), moved))
    assert_close(scale * a.difference.value, b.difference.value)
    assert_close(scale * a.difference.stderr, b.difference.stderr)
    assert_close(a.pairs.cohen_dz.value, b.pairs.cohen_dz.value)
    assert_close(a.pairs.p_value, b.pairs.p_value)
    assert_close(a.pairing_gain, b.pairing_gain)


# What is lost, and what is undefined


def test_pairs_are_dropped_together_and_counted():
    first, second = synthetic(10, 4)
    first.losses[2], second.losses[2:4], second.slopes[9] = math.nan, math.inf, math.nan
    second.losses_negative[0] = -math.inf
    found = compare_directional(first, second)
    keep = torch.tensor([0, 1, 4, 5, 6, 7, 8, 9])
    expected = compare_directional(take(first, keep), take(second, keep))
    for name in ("loss_mean", "delta_mean", "loss_std", "landscape_roughness"):
        got, wanted = found.differences[name], expected.differences[name]
        assert (got.num_pairs, got.num_lost) == (8, 2)
        assert_close(got.interval, wanted.interval)
        assert_close((got.first.value, got.second.value), (wanted.first.value, wanted.second.value))
    lost = {name: difference.num_lost for name, difference in found.differences.items()}
    assert (lost["delta_two_sided_mean"], lost["dir_grad_mean"], lost["curvature_mean"]) == (3, 1, 0)
    assert "pairs lost to non-finite values: loss_mean 2, delta_mean 2, delta_two_sided_mean 3" in " ".join(
        str(found).split()
    )
    assert found.asdict()["loss_mean_n_lost"] == 2
    assert "lost" not in str(compare_directional(*synthetic(10, 4)))


def numbers(found):
    return {name: value for name, value in found.asdict().items() if isinstance(value, float)}


@pytest.mark.parametrize("num", [0, 1, 2])
def test_too_few_pairs_are_undefined_and_not_zero(num):
    first, second = synthetic(5, 4)
    first.losses[num:] = math.nan
    found = numbers(compare_directional(first, second))
    assert compare_directional(first, second).differences["loss_mean"].num_lost == 5 - num
    undefined = {name for name, value in found.items() if name.startswith("loss_mean") and math.isnan(value)}
    errors = {f"loss_mean_{name}" for name in ("rank_biserial_stderr", "cohen_dz_stderr", "correlation")}
    errors |= {"loss_mean_correlation_stderr"}
    tests = {f"loss_mean_{name}" for name in ("wilcoxon", "p_value", "rank_biserial", "cohen_dz", "pairing_gain")}
    tests |= {f"loss_mean_difference{end}" for end in ("_stderr", "_low", "_high")} | {"loss_mean_wilcoxon_p_value"}
    tests |= {"loss_mean_sign_p_value"} if num < 1 else set()
    tests |= {"loss_mean_first_stderr", "loss_mean_second_stderr"}
    means = {"loss_mean_first", "loss_mean_second", "loss_mean_difference"}
    assert undefined == errors | (tests if num < 2 else set()) | (means if num < 1 else set())
    assert math.isnan(found["loss_std_difference_stderr"])
    assert math.isnan(found["loss_std_difference_low"])
    assert math.isnan(found["loss_std_difference"]) == (num < 2)


def test_a_difference_that_does_not_vary_is_beyond_all_errors():
    first, _ = synthetic(8, 1)
    steps = torch.arange(8, dtype=torch.float64)
    first, second = replace(first, losses=steps), replace(first, losses=steps + 2)
    got = compare_directional(first, second).differences["loss_mean"]
    assert got.interval == (2, 2)
    assert (float(got.pairs.cohen_dz.value), got.pairing_gain) == (math.inf, math.inf)
    assert float(got.pairs.rank_biserial.value) == 1


def test_what_one_of_the_two_lacks_is_absent():
    first, second = sampled(), sampled(0.1, compute_gradient=False, two_sided=False, compute_curvature=False)
    assert list(compare_directional(first, second).differences) == [
        "loss_mean", "delta_mean", "loss_std", "landscape_roughness",
    ]  # fmt: skip
    exact = sampled(0.1, curvature="exact", two_sided=False)
    assert "delta_two_sided_mean" not in compare_directional(exact, exact).differences
    assert "curvature_mean" in compare_directional(exact, exact).differences


# Error bars, and what pairing is worth


BARE = sampled(num=2, two_sided=False, compute_gradient=False, compute_curvature=False)


def correlated(num, gap=0.5, common=2.0, spread=1.0, relation=0.8):
    """Normal losses with correlation `relation`; the second has mean larger by `gap` and `spread` times the scatter."""

    def make(seed):
        z = fs.normal(fs.key(seed), torch.zeros(2, num, dtype=torch.float64))
        first = common * z[0]
        second = gap + spread * common * (relation * z[0] + (1 - relation**2) ** 0.5 * z[1])
        return filled(BARE, {"losses": first + 9}), filled(BARE, {"losses": second + 9})

    return make


@pytest.mark.slow
def test_the_paired_interval_covers_as_often_as_it_says():
    """One look at 400 repetitions of 12 normal pairs, where the t interval is exact: binomial z below 4."""
    repetitions, level, make = 400, 0.95, correlated(12)
    found = [compare_directional(*make(i)).differences["loss_mean"].interval for i in range(repetitions)]
    hits, wrong = (sum(low <= truth <= high for low, high in found) for truth in (0.5, -0.5))
    scatter = (repetitions * level * (1 - level)) ** 0.5
    assert abs(hits - level * repetitions) < 4 * scatter
    assert abs(wrong - level * repetitions) > 4 * scatter  # another truth is told apart


@pytest.mark.slow
def test_the_paired_jackknife_covers_and_an_unpaired_error_would_not():
    """400 repetitions of 40 pairs, the truth being 2 x 1.5 - 2 = 1; approximate, so between 0.91 and 0.98."""
    repetitions, z = 400, stats.norm.ppf(0.975)
    make = correlated(40, spread=1.5, relation=0.95)
    found = [compare_directional(*make(i)).differences["loss_std"] for i in range(repetitions)]
    hits = np.mean([low <= 1 <= high for low, high in (f.interval for f in found)])
    assert 0.91 <= hits <= 0.98
    apart = [math.hypot(float(f.first.stderr), float(f.second.stderr)) for f in found]
    errors = [abs(float(f.difference.value) - 1) for f in found]
    assert np.mean(np.array(errors) < z * np.array(apart)) > 0.99  # errors added as if unpaired are far too wide


@pytest.mark.slow
def test_the_p_value_is_uniform_where_nothing_differs_and_the_gain_is_what_theory_says():
    """Under H0 with 20 pairs, p <= 0.05 in at most 5 %: one look, z below 4; gain = (1 + 1) / (2 - 2 r)."""
    repetitions, relation = 400, 0.8
    make = correlated(20, gap=0.0, relation=relation)
    found = [compare_directional(*make(i)).differences["loss_mean"] for i in range(repetitions)]
    hits = sum(f.pairs.p_value <= 0.05 for f in found)
    assert abs(hits - 0.05 * repetitions) < 4 * (repetitions * 0.05 * 0.95) ** 0.5
    gains = np.log([f.pairing_gain for f in found])
    wanted = math.log(1 / (1 - relation))
    assert abs(gains.mean() - wanted) < 4 * gains.std() / repetitions**0.5 + 0.06  # the log of a ratio is biased by 1/n
    z = [float(f.pairs.rank_biserial.value / f.pairs.rank_biserial.stderr) for f in found]
    assert 0.9 <= np.mean(np.abs(z) < stats.t.ppf(0.975, 19)) <= 0.985


def test_the_documents_test_misses_a_difference_that_the_paired_one_sees():
    """Mann-Whitney on 50 pairs with correlation 0.99 and a difference of a seventh of the scatter."""
    first, second = correlated(50, gap=0.3, relation=0.99)(7)
    got = compare_directional(first, second).differences["loss_mean"]
    unpaired = stats.mannwhitneyu(first.losses, second.losses)
    assert unpaired.pvalue > 0.2
    assert got.pairs.p_value < 1e-3
    assert got.interval[0] > 0
    assert got.pairing_gain > 20


def test_two_really_different_models():
    """A network and the same one after training: lower by the difference of their losses, along nearly all directions."""
    model, batches, criterion = problem("mlp")
    before = fs.objective(fs.functional(model), batches, criterion)

    def trained():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for _ in range(60):
            optimizer.zero_grad()
            out = model(batches[0][0])
            torch.nn.functional.cross_entropy(out, batches[0][1]).backward()
            optimizer.step()
        return model

    theta = before.net.theta
    after = fs.objective(fs.functional(seeded(0, trained)), batches, criterion)
    make = {"key": fs.key(42), "n_samples": 40, "span": 0.2, **FULL}
    base = fs.directional_losses(before, theta, **make)
    tuned = fs.directional_losses(after, after.net.theta, **make)
    found = compare_directional(base, tuned, names=("base", "finetuned"))
    got = found.differences["loss_mean"]
    assert_close(got.difference.value, (tuned.losses - base.losses).mean())
    assert got.interval[1] < 0
    assert got.pairs.rank_biserial.value < -0.5
    assert found.baseline_losses == (base.baseline_loss, tuned.baseline_loss)
    two_sided, curvature = found.differences["delta_two_sided_mean"], found.differences["curvature_mean"]
    assert_close(curvature.difference.value, two_sided.difference.value * 2 / 0.2**2)  # one test under two names
    assert_close(curvature.pairs.p_value, two_sided.pairs.p_value)


def test_partners_have_the_same_draw():
    """The premise of pairing: with `global` the same vector, with `filter` the same one up to the norms of the filters."""
    loss = loss_of("mlp")
    theta = loss.net.theta
    moved = loss.layout.unravel(theta + fs.normal(fs.key(1), theta))
    for normalize in ("global", "filter", "layer"):
        make = {"key": fs.key(5), "num": 3, "normalize": normalize}
        for ours, theirs in zip(
            fs.directions(loss.net, **make), fs.directions(loss.net, **make, base=moved), strict=True
        ):
            for name in ("0.weight", "2.weight"):
                a, b = (torch.nn.functional.normalize(d.leaf(name), dim=1) for d in (ours, theirs))
                assert_close(a, b)
            if normalize == "global":
                assert_close(ours.dense(), theirs.dense())


# The face


def test_it_prints_itself_with_its_names_and_what_the_p_values_are():
    found = compare_directional(sampled(), sampled(0.1), names=("base", "<fine & tuned>"))
    assert "not corrected for 5 quantities tested" in " ".join(str(found).split())
    page = found._repr_html_()
    assert "&lt;fine &amp; tuned&gt;" in page
    assert "<fine" not in page


@pytest.mark.slow
def test_results_that_are_not_paired_are_refused():
    first, raw = sampled(), inspect.unwrap(compare_directional)
    exact = sampled(curvature="exact")
    other = [
        (sampled(seed=4), r"`key` must be the same in both results .*seed=3\) and Key\(.*seed=4\): sample both"),
        (sampled(num=13), r"`n_samples` must be the same in both results .* got 12 and 13"),
        (sampled(span=0.2), r"`span` must be the same in both results .* got 0.3 and 0.2: sample both models with one"),
        (sampled(normalize="layer"), r"`normalize` must be .* got 'filter' and 'layer'"),
        (sampled(distribution="rademacher"), r"`distribution` must be .* got 'normal' and 'rademacher'"),
        (sampled(relative_span=True), r"`relative_span` must be .* got False and True"),
        (replace(first, global_renorm=True), r"`global_renorm` must be .* got False and True"),
        (exact, r"`curvature` must be .* got 'difference' and 'exact'"),
    ]
    for second, message in other:
        with pytest.raises(ValueError, match=message) as caught:
            compare_directional(first, second)
        assert "\n" not in str(caught.value)
    for options, message in [
        ({"level": 95}, r"`level` must lie between 0 and 1, got 95: 0.95 for a 95 % interval"),
        ({"level": math.nan}, r"`level` must lie between 0 and 1, got nan"),
        ({"names": ("a", "a")}, r"`names` must be two different names, got \('a', 'a'\)"),
        ({"names": ("a", "b", "c")}, r"`names` must be two different names"),
    ]:
        with pytest.raises(ValueError, match=message):
            raw(first, first, **options)
    without = sampled(curvature="exact", compute_curvature=False)
    assert "curvature_mean" not in compare_directional(exact, without).differences
    relative = [sampled(shift, normalize="global", relative_span=True) for shift in (0.0, 0.5)]
    assert relative[0].actual_span != relative[1].actual_span
    assert compare_directional(*relative).num_tests == 5
