"""Losses of merged models. Oracles: the losses themselves at points made by hand, exact quadratics, dense matrices."""

import numpy as np
import pytest
import torch
from problems import gpt2, seeded, tokens
from torch.func import grad, hessian
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.keys import uniform
from funcscope.core.standard_errors import ratio_stderr
from funcscope.weights import merge_rules as rules
from funcscope.weights.merge_curves import USUAL, _cross_fitted, input_moments, merge_curves
from funcscope.weights.merging import merge

KEY = fs.key(0)
TASKS = ("a", "b", "c")


def data(k, num=12):
    x = fs.normal(fs.fold_in(fs.key(7), k), torch.zeros(num, 3, dtype=torch.float64))
    return x, ((x[:, k % 3] + 0.3 * x[:, 0]) > 0).long()


NET = seeded(
    0,
    lambda: fs.functional(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()),
)
LOSSES = {name: fs.objective(NET, [data(k)], fs.classification) for k, name in enumerate(TASKS)}


def trained(loss, theta, steps=30):
    for _ in range(steps):
        theta = theta - 0.5 * grad(loss)(theta)
    return theta


BASE = NET.theta
EXPERTS = {name: trained(loss, BASE) for name, loss in LOSSES.items()}


@pytest.fixture(scope="module")
def curves():
    return merge_curves(LOSSES, EXPERTS, BASE, key=KEY, num=1, coefficients=(0.0, 0.5, 1.0))


def test_losses_and_errors_are_those_of_points_made_by_hand(curves):
    thetas = list(EXPERTS.values())
    points = {"linear": sum(thetas) / 3, "task_arithmetic": BASE + sum(x - BASE for x in thetas)}
    points["ties"] = rules.ties(BASE, thetas, density=0.2)
    moments = [input_moments(loss, EXPERTS[name]) for name, loss in LOSSES.items()]
    points["regmean"] = merge(thetas, "regmean", NET.layout, grams=moments)
    for method, point in points.items():
        m = curves.methods.index(method)
        for i, c in enumerate(curves.coefficients.tolist()):
            for k, loss in enumerate(LOSSES.values()):
                there = BASE + c * (point - BASE)
                assert_close(float(curves.losses[m, i, k]), float(loss(there)))
                sums = loss.terms(there)[0] - loss.terms(BASE)[0]
                assert_close(float(curves.deltas[m, i, k]), float(sums.mean()))
                assert_close(float(curves.deltas_stderr[m, i, k]), float(sums.std() / 12**0.5))
    assert curves.methods == list(USUAL)
    assert (curves.deltas[:, 0] == 0).all()
    assert_close(curves.mean_losses, curves.losses.mean(-1))
    assert_close(curves.mean_deltas, curves.mean_losses - curves.mean_losses[:, :1])
    assert_close(curves.mean_deltas_stderr, (curves.deltas_stderr**2).mean(-1).sqrt() / 3**0.5)
    assert (curves.mean_deltas_stderr[:, 0] == 0).all()  # paired: the base is not above itself


def test_linear_and_task_arithmetic_are_one_line_in_two_units():
    found = merge_curves(
        LOSSES, EXPERTS, BASE, key=KEY, methods=("linear", "task_arithmetic"), coefficients=(0.0, 1 / 3, 1.0), num=1
    )
    assert_close(found.losses[0, 2], found.losses[1, 1])


def test_the_best_coefficient_is_chosen_on_other_sequences(curves):
    for m in range(len(curves.methods)):
        means = curves.losses[m].mean(-1)
        assert curves.best_index[m] == int(means.argmin())
        assert float(curves.best_coefficient[m]) == float(curves.coefficients[means.argmin()])
    m = curves.methods.index("linear")
    point = sum(EXPERTS.values()) / 3
    rows = {
        name: torch.stack([loss.terms(BASE + c * (point - BASE))[0] for c in curves.coefficients.tolist()])
        for name, loss in LOSSES.items()
    }
    chosen = [int(torch.stack([x[:, half::2].mean(1) for x in rows.values()]).mean(0).argmin()) for half in (0, 1)]
    values = []
    for x in rows.values():
        fitted = x[0].clone()
        fitted[0::2], fitted[1::2] = x[chosen[1]][0::2], x[chosen[0]][1::2]
        values.append((float(fitted.mean()), float(fitted.std() / 12**0.5)))
    assert_close(float(curves.best_loss[m]), float(np.mean([v for v, _ in values])))
    assert_close(float(curves.best_loss_stderr[m]), float(np.sqrt(sum(e**2 for _, e in values)) / 3))
    alone = [torch.stack([loss.terms(x)[0] for x in (BASE, *EXPERTS.values())]) for loss in LOSSES.values()]
    best = [int(torch.stack([x[:, half::2].mean(1) for x in alone]).mean(0).argmin()) for half in (1, 0)]
    above = []
    for x, a in zip(rows.values(), alone, strict=True):
        own = torch.stack([x[chosen[1 - i % 2], i] - a[best[i % 2], i] for i in range(12)])
        above.append((float(own.mean()), float(own.std() / 12**0.5)))
    assert_close(float(curves.gain[m]), float(np.mean([v for v, _ in above])))
    assert_close(float(curves.gain_stderr[m]), float(np.sqrt(sum(e**2 for _, e in above)) / 3))


@pytest.mark.slow
def test_the_best_of_many_single_models_is_not_chosen_on_what_measures_it():
    """Labels are coins, and all models alike: what is best on the same sequences is below what it is on others."""
    net = seeded(0, lambda: fs.functional(torch.nn.Linear(2, 2, bias=False).double()))
    turns = uniform(fs.key(1), torch.zeros(40, 6, dtype=torch.float64)) * 2 * torch.pi
    many, above = torch.stack([turns.cos(), turns.sin(), -turns.cos(), -turns.sin()], -1), []
    for i, models in enumerate(many):
        losses = {}
        for k in range(5):
            x = fs.normal(fs.fold_in(fs.fold_in(KEY, i), k), torch.zeros(30, 3, dtype=torch.float64))
            losses[str(k)] = fs.objective(net, [(x[:, :2], (x[:, 2] > 0).long())], fs.classification)
        experts = dict(zip(losses, models[:5], strict=True))
        found = merge_curves(losses, experts, models[5], key=KEY, methods=("linear",), coefficients=(0.0,), num=1)
        documented = found.mean_losses[0, 0] - found.single_losses.mean(1).min()
        above.append([float(found.gain[0] / found.gain_stderr[0]), float(documented / found.gain_stderr[0])])
    ours, theirs = torch.tensor(above).nan_to_num().T
    assert abs(ours.mean()) < 3 * ours.std() / 40**0.5 < theirs.mean()


def test_what_is_not_finite_is_never_the_best():
    huge = {
        name: fs.objective(NET, [(x, x[:, :2])], fs.mse)
        for name, (x, _) in zip(TASKS, map(data, range(3)), strict=True)
    }
    found = merge_curves(huge, EXPERTS, BASE, key=KEY, methods=("linear",), coefficients=(0.0, 1.0, 1e308), num=1)
    assert not found.losses[0, 2].isfinite().any()
    assert found.best_index[0] < 2
    assert found.best_loss.isfinite().all()
    assert any("not finite" in note for note in found.notes)


@pytest.mark.parametrize("labels", [[1], [1, -100, -100]])
def test_one_sequence_has_no_other_half(labels):
    losses = {
        name: fs.objective(NET, [(data(k, len(labels))[0], torch.tensor(labels))], fs.classification)
        for k, name in enumerate(TASKS)
    }
    found = merge_curves(losses, EXPERTS, BASE, key=KEY, methods=("linear", "dare"), num=1, coefficients=(0.0, 1.0))
    for each in (found.best_loss, found.best_loss_stderr, found.gain, found.gain_stderr, found.mean_deltas_stderr):
        assert each.isnan().all()
    assert found.mean_deltas.isfinite().all()
    assert any("one sequence" in note for note in found.notes)
    assert any("one draw of masks" in note for note in found.notes)


def test_tasks_of_the_same_sequences_are_not_independent():
    """Two names of one task: the mean of both losses is that of one, and so is its error."""
    same = {"a": LOSSES["a"], "b": LOSSES["a"]}
    both = dict.fromkeys(same, EXPERTS["a"])
    found = merge_curves(same, both, BASE, key=KEY, methods=("linear",), num=1, coefficients=(0.0, 1.0))
    change = LOSSES["a"].terms(EXPERTS["a"])[0] - LOSSES["a"].terms(BASE)[0]
    assert_close(found.mean_deltas_stderr[0, 1], change.std() / 12**0.5)
    assert_close(found.mean_losses_stderr, found.losses_stderr[..., 0])
    assert_close(found.best_loss_stderr[0], found.losses_stderr[0, found.best_index[0], 0])
    assert any("12 sequences in common" in note for note in found.notes)


def test_what_one_half_chooses_is_measured_on_the_other():
    """What is good for every other sequence is bad for the rest: nothing chosen on others is good."""
    ours = torch.tensor([[0.0, 9, 0, 9], [9, 0, 9, 0]]).double()
    singles = torch.tensor([[5.0, 8, 5, 8], [8, 5, 8, 5]]).double()
    found = _cross_fitted(0, [ours[None]], [torch.ones(4).double()], [singles], 0)
    assert found == (9.0, 0.0, 1.0, 0.0)


def test_halves_are_of_the_sequences_that_are_scored():
    x, y = data(0)
    spread, labels = torch.zeros(24, 3, dtype=torch.float64), torch.full((24,), -100)
    spread[::2], labels[::2] = x, y  # every other sequence scores nothing: all that are scored have even places
    some = LOSSES | {"a": fs.objective(NET, [(spread, labels)], fs.classification)}
    found, whole = (
        merge_curves(each, EXPERTS, BASE, key=KEY, methods=("linear",), num=1, coefficients=(0.0, 0.5, 1.0))
        for each in (some, LOSSES)
    )
    assert_close(found.best_loss, whole.best_loss)
    assert_close(found.gain_stderr, whole.gain_stderr)


def test_quadratics_are_those_of_dense_matrices(curves):
    point = BASE + curves.best_coefficient[0] * (sum(EXPERTS.values()) / 3 - BASE)
    for k, (name, loss) in enumerate(LOSSES.items()):
        delta = point - EXPERTS[name]
        columns = [fs.ggn(loss, EXPERTS[name])(each) for each in torch.eye(NET.layout.num).double()]
        assert_close(curves.quadratic[0, k], delta @ torch.stack(columns) @ delta / 2)
        assert_close(curves.slope[0, k], delta @ grad(loss)(EXPERTS[name]))
        change = loss.terms(point)[0] - loss.terms(EXPERTS[name])[0]
        assert_close(curves.increase[0, k], change.mean())
        assert_close(curves.increase_stderr[0, k], ratio_stderr(change, torch.ones(12).double()))
    assert_close(curves.diagonal_ratio, curves.diagonal / curves.quadratic)


def test_fisher_merging_is_best_where_losses_are_diagonal_quadratics_and_not_where_they_are_not():
    """Squares of a linear model: the Fisher information is the Hessian; diagonal where inputs are orthogonal."""
    net = seeded(0, lambda: fs.functional(torch.nn.Linear(3, 1, bias=False).double()))
    gains = {}
    turned = torch.linalg.qr(fs.normal(KEY, torch.zeros(3, 3).double())).Q
    for name, turn in {"diagonal": torch.eye(3).double(), "turned": turned}.items():
        scales = {"a": torch.tensor([3.0, 1.0, 0.2]).double(), "b": torch.tensor([0.2, 1.0, 3.0]).double()}
        experts = {task: fs.normal(fs.fold_in(KEY, task), torch.zeros(3).double()) for task in scales}
        inputs = {task: scale.diag() @ turn for task, scale in scales.items()}
        losses = {task: fs.objective(net, [(x, x @ experts[task][:, None])], fs.mse) for task, x in inputs.items()}
        fishers = {task: hessian(loss)(experts[task]).diagonal() for task, loss in losses.items()}
        options = {
            "methods": ("linear", "fisher", "regmean"),
            "coefficients": (1.0,),
            "fishers": fishers,
            "shrink": 1.0,
        }
        grams = {task: {"weight": x.T @ x} for task, x in inputs.items()}
        found = merge_curves(losses, experts, torch.zeros(3).double(), key=KEY, grams=grams, **options)
        assert_close(found.quadratic, found.increase)  # the loss is its quadratic
        assert_close(found.slope, torch.zeros_like(found.slope))
        gains[name] = found
    exact = gains["diagonal"]
    assert_close(exact.diagonal, exact.increase)
    assert_close(exact.mean_losses[1], exact.mean_losses[2], rtol=1e-6, atol=0)
    assert exact.mean_losses[1] < exact.mean_losses[0]
    turned = gains["turned"]
    assert turned.mean_losses[2] < turned.mean_losses[1] - 1e-3  # the least squares see what the diagonal does not
    assert (turned.diagonal - turned.quadratic).abs().max() > 1e-2


def test_moments_of_inputs_are_those_of_a_language_model_over_scored_positions():
    net = fs.functional(seeded(0, gpt2).double())
    batch = tokens(1, 3, 7, pad=3)
    loss = fs.objective(net, [batch], fs.causal_lm)
    found = input_moments(loss, net.theta)
    sites = fs.trace(net, net.params, loss.batches[0][0], ["mlp_post.1"])
    x = sites["mlp_post.1"]
    x = x[0] if x.ndim == 4 else x
    scored = batch["attention_mask"][:, 1:].bool()  # the last layer's MLP acts where a token is predicted
    rows = x[:, :-1][scored]
    name = next(name for name in found if name.endswith("h.1.mlp.c_proj.weight"))
    assert_close(found[name], rows.T @ rows / len(rows), rtol=1e-9, atol=1e-12)
    whole = x.flatten(0, 1)
    assert not torch.allclose(found[name], whole.T @ whole / len(whole))  # padding is no input
    assert "transformer.wte.weight" not in found


@pytest.mark.slow
def test_a_merge_of_language_models_has_all_methods():
    net = fs.functional(seeded(0, gpt2))
    losses = {name: fs.objective(net, [tokens(k, 4, 6)], fs.causal_lm) for k, name in enumerate("ab")}
    experts = {name: net.theta - 0.5 * grad(loss)(net.theta) for name, loss in losses.items()}
    found = merge_curves(losses, experts, net.theta, key=KEY, methods=("slerp", *USUAL), coefficients=(0.0, 1.0), num=1)
    assert found.losses.isfinite().all()
    assert found.increase_stderr.isfinite().all()
    assert (found.losses[:, 0] == found.losses[0, 0]).all()
    again = merge_curves(losses, experts, net.theta, key=KEY, methods=("dare",), coefficients=(1.0,), num=1)
    assert_close(again.losses[0, 0], found.losses[found.methods.index("dare"), 1])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"experts": {"a": BASE}}, "`experts`"),
        ({"coefficients": (1.0, 0.5)}, "increase"),
        ({"coefficients": ()}, "increase"),
        ({"density": 0.0}, "density"),
        ({"methods": ("slerp",)}, "two models"),
        ({"base": BASE[1:]}, "`base`"),
    ],
)
def test_what_cannot_be_merged_is_refused(changes, says):
    given = {"losses": LOSSES, "experts": EXPERTS, "base": BASE, "key": KEY, "num": 1} | changes
    with pytest.raises(ValueError, match=says):
        merge_curves(**given)
