"""Steps that the dtype does not resolve, the baseline by the plan of the losses, and errors where some are missing."""

import math

import pytest
import torch
from problems import dense_hessian, seeded
from torch import nn
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.estimate import Crossed, Estimate, p_value
from funcscope.core.standard_errors import crossed
from funcscope.landscape.compare import compare_directional

BENT = {"two_sided": True, "compute_curvature": True}
PLANS = [{}, {"chunk": 1}, {"lazy": True}]


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 5)), nn.Conv2d(1, 6, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(120, 5)
    )


def problem(num=100, dtype=torch.float32, seed=0):
    x = fs.normal(fs.key(4), torch.zeros(num, 20).double())
    net = fs.functional(seeded(seed, cnn), dtype=dtype) if dtype != torch.float32 else fs.functional(seeded(seed, cnn))
    return fs.objective(net, [(x.to(dtype), torch.arange(num) % 5)], fs.classification)


def sampled(loss, span, num=12, **options):
    return fs.directional_losses(loss, loss.net.theta, key=fs.key(0), n_samples=num, span=span, **options)


@pytest.mark.parametrize("plan", PLANS)
def test_weights_that_do_not_move_leave_the_loss_where_it_was_and_nothing_is_tested(plan):
    loss = problem()
    still = sampled(loss, 1e-12, **BENT, **plan)
    assert still.unmoved == 1
    assert not still.deltas.any()
    assert not still.curvatures.any()
    assert "float64" in still.resolution_note
    values = still.asdict()
    for name in ("delta_mean", "curvature_mean", "loss_std", "curvature_p90", "landscape_roughness"):
        assert math.isnan(values[f"{name}_stderr"])
        assert math.isnan(p_value(still.estimates[name]))
    assert math.isnan(values["delta_sign_p_value"])
    assert math.isnan(values["curvature_sign_p_value"])
    assert values["loss_mean_stderr_data"] > 0
    assert "not resolved" in str(still)
    moved = sampled(loss, 0.1, **BENT, **plan)
    assert (moved.unmoved, moved.resolution_note) == (0, None)
    assert all(estimate.stderr.isfinite() for estimate in moved.estimates.values())


@pytest.mark.parametrize("span", [1e-9, 1e-8, 1e-7, 1e-6])
def test_the_share_of_weights_that_do_not_move_is_counted(span):
    """Oracle: theta + h d added densely, and compared."""
    loss = problem()
    theta, direction = loss.net.theta, fs.stack(fs.directions(loss.net, key=fs.key(0), num=1))[0]
    share = ((theta + span * direction) == theta)[direction != 0].double().mean()
    assert sampled(loss, span).unmoved == pytest.approx(float(share), abs=2 / len(theta))


def test_changes_below_the_rounding_of_the_loss_are_unresolved_in_float32_and_resolved_in_float64():
    narrow, wide = problem(), problem(dtype=torch.float64)
    one, other = sampled(narrow, 1e-6, **BENT), sampled(wide, 1e-6, **BENT)
    assert one.unmoved < 0.5
    assert one.resolution_note is not None
    assert other.resolution_note is None
    off = (one.deltas - other.deltas).abs().max()  # what rounding does here, which is said to drown a mean of that size
    assert abs(other.deltas.mean()) < off
    assert one.loss_rounding / 30 < off < 3 * one.loss_rounding
    exact = sampled(narrow, 1e-6, compute_curvature=True, curvature="exact")
    assert exact.estimates["curvature_mean"].stderr.isfinite()
    assert exact.estimates["delta_mean"].stderr.isnan()


@pytest.mark.parametrize("options", [{}, {"chunk": 1}, {"two_sided": False}])
def test_flatness_is_not_resolved_where_weights_do_not_move(options):
    loss = problem()
    make = {"key": fs.key(0), "n_directions": 12, **options}
    still, moved = (
        fs.flatness_profile(loss, loss.net.theta, epsilons=(epsilon,), **make)[0] for epsilon in (1e-12, 0.1)
    )
    assert still.unmoved == 1
    assert not still.delta_losses.any()
    assert all(estimate.stderr.isnan() for estimate in still.estimates.values())
    assert "float64" in still.resolution_note
    assert still.resolution_note in " ".join(str(still).split())
    assert moved.resolution_note is None
    assert all(estimate.stderr.isfinite() for estimate in moved.estimates.values())


@pytest.mark.slow
def test_two_unresolved_results_are_not_tested_against_each_other_and_a_resolved_one_is():
    first, second = problem(), problem(seed=1)
    still = [sampled(loss, 1e-12, **BENT) for loss in (first, second)]
    found = compare_directional(*still).differences["delta_mean"]
    assert math.isnan(found.p_value)
    assert math.isnan(found.pairs.p_value)
    moved = [sampled(loss, 0.1, **BENT) for loss in (first, second)]
    assert 0 <= compare_directional(*moved).differences["delta_mean"].p_value <= 1


def test_a_comparison_along_one_direction_has_an_error_over_sequences_and_none_over_directions():
    pair = [sampled(problem(seed=seed), 0.1, num=1, **BENT) for seed in (0, 1)]
    found = compare_directional(*pair)
    difference = found.differences["delta_mean"]
    assert difference.has_data_error
    assert difference.difference.stderr.isnan()
    assert math.isnan(difference.p_value)
    single = [sampled(problem(num=1, seed=seed), 0.1, **BENT) for seed in (0, 1)]
    assert not compare_directional(*single).differences["delta_mean"].has_data_error


@pytest.mark.slow
def test_forms_of_some_directions_give_the_error_of_a_mean_over_all():
    """Crossed effects of known variances: mean squares over 300 tables are the closed forms."""
    num, few, size, (sd, ss, both) = 20, 4, 15, (1.0, 1.5, 4.0)
    data, total, naive = [], [], []
    for seed in range(300):
        d, s, z = (fs.normal(fs.fold_in(fs.key(seed), i), torch.zeros(num, size).double()) for i in range(3))
        x = sd * d[:, :1] + ss * s[:1] + both * z
        rows = (x - x.mean(1, keepdim=True)) / size
        rows[few:] = math.nan
        found = crossed(Estimate.of, [x.mean(1)], [rows])
        data.append(float(found.stderr_data) ** 2)
        total.append(float(found.stderr_total) ** 2)
        naive.append(float(rows[:few].mean(0).square().sum()) * size / (size - 1))
    truth = ss**2 / size + both**2 / (num * size)
    assert sum(data) / 300 == pytest.approx(truth, rel=0.15)
    assert sum(total) / 300 == pytest.approx(truth + sd**2 / num, rel=0.15)
    assert sum(naive) / 300 > 1.5 * truth  # negative control: of those directions alone


def test_spreads_and_percentiles_have_no_error_over_sequences_from_some_directions(monkeypatch):
    """Oracle for the rest: forms of the dense Hessians of single sequences."""
    loss = problem(8, torch.float64)
    every = sampled(loss, 0.1, compute_curvature=True, curvature="exact")
    monkeypatch.setattr("funcscope.landscape.directional.CHUNKED_UP_TO", 0)
    some = sampled(loss, 0.1, compute_curvature=True, curvature="exact")
    assert (every.num_second_jvps, some.num_second_jvps) == (12, 3)
    assert_close(every.curvatures, some.curvatures)
    rows = fs.stack(fs.directions(loss.net, key=fs.key(0), num=12))
    (x, y), forms = loss.batches[0], []
    for i in range(8):
        one = fs.objective(loss.net, [(x[i : i + 1], y.index[i : i + 1])], fs.classification)
        forms.append(((rows @ dense_hessian(one, loss.net.theta)) * rows).sum(1))
    each = torch.stack(forms, 1)
    assert_close(every.rows("curvature"), (each - each.mean(1, keepdim=True)) / 8)
    assert_close(every.estimates["curvature_mean"].stderr_data, each.mean(0).std() / 8**0.5)
    assert some.estimates["curvature_mean"].stderr_data.isfinite()
    for name in ("curvature_std", "curvature_p10", "curvature_p50", "curvature_p90"):
        assert every.estimates[name].stderr_total.isfinite()
        assert math.isnan(some.asdict()[f"{name}_stderr_data"])


def test_the_bias_of_few_sequences_is_in_the_total_error():
    """Closed form for a variance: g / (g - 1) times the sum of the variances of what each sequence adds."""
    x, rows = (fs.normal(fs.key(i), torch.zeros(9, 6).double()) for i in range(2))
    x, rows = x[:, 0], rows - rows.mean(1, keepdim=True)
    found = crossed(lambda x: Estimate(x.var(), x.new_tensor(0.3), len(x)), [x], [rows])
    without = Crossed.of_rows(found, 2 * (x - x.mean())[:, None] / 8 * rows)
    bias = 6 / 5 * rows.var(0).sum()
    assert_close(found.stderr_total**2, without.stderr_total**2 + bias**2)
    mean = crossed(Estimate.of, [x], [rows])
    assert_close(mean.stderr_total, Crossed.of_rows(mean, rows / 9).stderr_total)


@pytest.fixture(scope="module")
def single():
    """A small classifier in float32: short steps are below what its losses resolve."""
    model = seeded(0, lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)))
    inputs = fs.normal(fs.key(1), torch.zeros(6, 3))
    return fs.objective(fs.functional(model), [(inputs, torch.tensor([0, 1, 0, 1, 1, 0]))], fs.classification)


@pytest.mark.parametrize(
    ("measure", "names"),
    [
        (
            lambda loss, size: fs.flatness(loss, loss.net.theta, key=fs.key(0), epsilon=size),
            ["pair_mean", "second_order"],
        ),
        (
            lambda loss, size: fs.average_sharpness(loss, loss.net.theta, key=fs.key(0), num=20, epsilon=size),
            ["sharpness"],
        ),
        (lambda loss, size: fs.sam_sharpness(loss, loss.net.theta, epsilon=size / 1e3), ["absolute", "relative"]),
    ],
)
def test_what_rounding_hides_is_unresolved_says_why_and_is_marked_in_frames(single, measure, names):
    short, long = measure(single, 1e-5), measure(single, 0.1 if names != ["absolute", "relative"] else 1e2)
    assert set(names) <= set(short.unresolved)
    assert not set(names) & set(long.unresolved)
    assert any("rounding" in note or "resolved" in note for note in short.notes)
    frame = short.frame().set_index("quantity")
    assert not frame.loc[names, "resolved"].any()


def test_curvatures_whose_signs_rounding_decides_are_unresolved(single):
    def sampled(span):
        settings = {"two_sided": True, "compute_gradient": False, "compute_curvature": True}
        return fs.directional_losses(single, single.net.theta, key=fs.key(0), n_samples=8, span=span, **settings)

    assert {"curvature_mean", "curvature_p90", "rayleigh_mean"} <= set(sampled(1e-4).unresolved)
    assert not {"curvature_mean", "curvature_p90"} & set(sampled(0.3).unresolved)


@pytest.mark.parametrize("name", ["two_sided", "relative", "lazy"])
def test_a_word_is_no_flag(single, name):
    call = fs.directional_losses if name == "lazy" else fs.flatness
    with pytest.raises(TypeError):
        call(single, single.net.theta, key=fs.key(0), **{name: "no"})
