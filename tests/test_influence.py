"""Influence functions. Oracles: leave-one-out of ridge regression in numpy, dense matrices; kronfluence is in
test_influence_outsiders.py."""

import numpy as np
import pytest
import torch
from problems import seeded
from results import language, loss, second_loss, theta
from torch import nn
from torch.testing import assert_close

import funcscope as fs
from funcscope.curvature import ekfac_factors, exact_fisher, kfac_factors, per_sample_gradients
from funcscope.gradients import influence, most_influential, self_influence
from funcscope.linalg import dense

HALF_SQUARE = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)


def linear(x, y):
    net = fs.functional(seeded(0, lambda: nn.Linear(x.shape[1], 1, bias=False)).double())
    return fs.objective(net, [(torch.tensor(x), torch.tensor(y)[:, None])], HALF_SQUARE)


def ridge(x, y, strength):
    """Oracle: argmin of mean (x'w - y)^2 / 2 + strength |w|^2 / 2 over these rows, the sum being divided by 20 always."""
    return np.linalg.solve(x.T @ x / 20 + strength * np.eye(x.shape[1]), x.T @ y / 20)


def regression():
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(20, 3)), rng.normal(size=20)
    return x, x @ np.array([1.0, -2.0, 0.5]) + noise, rng.normal(size=(4, 3)), rng.normal(size=4)


def predicted(x, y, z, t, strength, method="cg"):
    at = torch.tensor(ridge(x, y, strength))
    options = {"damping": strength, "tol": 1e-12}
    return influence(linear(x, y), linear(z, t), at, method=method, **options), at.numpy()


@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_ridge_regression_without_a_row_is_where_sherman_and_morrison_say(strength):
    """The move of theta is A^-1 g_z / W over 1 - h; that of a test loss has a second order in it, and nothing else."""
    x, y, z, t = regression()
    found, at = predicted(x, y, z, t, strength)
    inverse = np.linalg.inv(x.T @ x / 20 + strength * np.eye(3))
    for i in range(20):
        rest = np.arange(20) != i
        retrained = ridge(x[rest], y[rest], strength)
        leverage = x[i] @ inverse @ x[i] / 20
        fall = ((z @ retrained - t) ** 2 - (z @ at - t) ** 2) / 2
        second = (z @ (retrained - at)) ** 2 / 2
        np.testing.assert_allclose(found.left_out[i].numpy() / (1 - leverage), fall - second, rtol=1e-8)
        assert np.abs(found.values[i].numpy() - fall).max() > 2 * np.abs(fall).max()  # the scale 1/W is part of it
    assert float(found.largest_residual) < 1e-12
    assert found.total_weight == 20


def test_the_influence_is_the_derivative_of_the_retrained_test_loss_by_the_weight():
    x, y, z, t = regression()
    found, _ = predicted(x, y, z, t, 0.1)
    for i in range(3):
        ends = []
        for eps in (1e-5, -1e-5):
            a = x.T @ x / 20 + eps * np.outer(x[i], x[i]) + 0.1 * np.eye(3)
            w = np.linalg.solve(a, x.T @ y / 20 + eps * x[i] * y[i])
            ends.append((z @ w - t) ** 2 / 2)
        np.testing.assert_allclose(found.values[i].numpy(), (ends[0] - ends[1]) / 2e-5, rtol=1e-5)


def test_a_row_weighted_up_draws_the_fit_to_itself():
    found, _ = predicted(*regression()[:2], *regression()[:2], 0.1)
    assert bool((found.values.diagonal() <= 0).all())
    assert bool((found.left_out.diagonal() >= 0).all())


def by_hand(train, test, at, matrix, damping):
    """Oracle: -g' (M + damping I)^-1 g of all pairs, by whole matrices."""
    g, h = per_sample_gradients(train, at), per_sample_gradients(test, at, reduction="mean")
    return -(g @ torch.linalg.inv(matrix + damping * torch.eye(len(at)).double()) @ h.T)


def matrix_of(method, train, at, num=4):
    if method == "cg":
        return dense(fs.ggn(train, at), at)
    if method == "gram":
        g = per_sample_gradients(train, at)
        return g.T @ g / float(train.terms(at)[1].sum())
    made = {"kfac": kfac_factors, "ekfac": ekfac_factors}[method](train, at, key=fs.key(7), num=num)
    return dense(made.matvec, at)


@pytest.mark.parametrize("method", ["cg", "ekfac", "kfac", "gram"])
def test_every_method_is_the_inverse_of_its_matrix(method):
    matrix = matrix_of(method, loss(), theta())
    expected = by_hand(loss(), second_loss(), theta(), matrix, 0.05)
    found = influence(loss(), second_loss(), theta(), key=fs.key(7), method=method, damping=0.05, tol=1e-11)
    assert_close(found.values, expected, rtol=1e-7, atol=1e-10)
    mean = influence(loss(), second_loss(), theta(), key=fs.key(7), method=method, test="mean", damping=0.05, tol=1e-11)
    assert_close(mean.values[:, 0], expected.mean(1), rtol=1e-7, atol=1e-10)
    assert (found.residual is None) == (method != "cg")
    shift = 0.1 * float(matrix.trace()) / len(theta())
    default = influence(loss(), second_loss(), theta(), key=fs.key(7), method=method, num=4)
    assert default.damping == pytest.approx(shift, rel=0.7 if method == "cg" else 1e-9)  # four probes of the trace


def test_identity_in_the_place_of_the_curvature_gives_tracin_of_one_checkpoint_and_the_curvature_does_not():
    """E37: TracIn is no first-order approximation of influence functions."""
    train, test = loss(), second_loss()
    dots = per_sample_gradients(train, theta()) @ per_sample_gradients(test, theta(), reduction="mean").T
    far = influence(train, test, theta(), damping=1e6, tol=1e-10)
    assert_close(-1e6 * far.values, dots, rtol=1e-4, atol=1e-6)
    near = influence(train, test, theta(), damping=1e-3, tol=1e-10).values.flatten()
    assert float(torch.corrcoef(torch.stack([-near, dots.flatten()]))[0, 1]) < 0.9
    net = fs.objective(fs.functional(seeded(0, lambda: nn.Linear(2, 1, bias=False)).double()), [
        (torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double(), torch.zeros(2, 1).double())], HALF_SQUARE)  # fmt: skip
    at = torch.ones(2, dtype=torch.float64)
    exact = influence(net, net, at, damping=0.0, tol=1e-12).values.diagonal()
    assert_close(exact, torch.tensor([-18.0, -2.0]).double())  # 2 e^2, e = (3, 1), whatever the scale of x
    assert per_sample_gradients(net, at).square().sum(1).tolist() == [81.0, 1.0]


@pytest.mark.slow
def test_tokens_count_by_their_weights():
    """Sequences of 4, 2 and 1 scored tokens: g is of sums in training and of means in tests, W = 7."""
    ids = torch.tensor([[1, 2, 3, 4, 5], [2, 2, 7, 0, 0], [8, 1, 0, 0, 0]])
    one = fs.objective(language().net, [{"input_ids": ids, "attention_mask": (ids > 0).long()}], fs.causal_lm)
    at = one.net.theta
    found = influence(one, one, at, method="gram", damping=0.01)
    assert_close(found.values, by_hand(one, one, at, matrix_of("gram", one, at), 0.01), rtol=1e-8, atol=1e-12)
    assert_close(found.left_out, -found.values / 7)
    own = self_influence(one, at, method="gram", damping=0.01)
    assert_close(own.values, found.left_out.diagonal())
    leverage = own.values * torch.tensor([4.0, 2.0, 1.0]).double()
    assert bool(((leverage > 0) & (leverage < 1)).all())


@pytest.mark.parametrize("method", ["ekfac", "gram"])
def test_self_influence_is_the_diagonal_of_what_is_left_out(method):
    found = self_influence(loss(), theta(), key=fs.key(7), method=method)
    whole = influence(loss(), loss(), theta(), key=fs.key(7), method=method)
    assert_close(found.values, whole.left_out.diagonal(), rtol=1e-6, atol=1e-12)
    assert found.damping == pytest.approx(whole.damping)
    assert float(found.mean.stderr) == pytest.approx(float(found.values.std() / 6**0.5))
    assert found.top_share == pytest.approx(float(found.values.max() / found.values.sum()))


def test_the_ggn_of_a_classifier_is_its_fisher_matrix_so_that_both_solves_agree():
    fisher = exact_fisher(loss(), theta())
    fisher = fisher if isinstance(fisher, torch.Tensor) else dense(fisher, theta())
    found = influence(loss(), second_loss(), theta(), damping=0.05, tol=1e-11)
    assert_close(found.values, by_hand(loss(), second_loss(), theta(), fisher, 0.05), rtol=1e-7, atol=1e-10)


def test_solves_that_stop_early_say_so():
    found = influence(loss(), second_loss(), theta(), damping=1e-6, tol=1e-12, max_steps=2)
    assert found.num_unsolved == 6
    assert float(found.largest_residual) > 1e-6
    assert "did not come to the tolerance" in found.notes[0]
    exact = by_hand(loss(), second_loss(), theta(), matrix_of("cg", loss(), theta()), 1e-6)
    bound = found.residual / 1e-6 * per_sample_gradients(second_loss(), theta()).norm(dim=1)
    off = (found.values - exact).abs() / per_sample_gradients(loss(), theta()).norm(dim=1)[:, None]
    assert bool((off <= bound * (1 + 1e-9)).all())


@pytest.mark.slow
def test_a_test_sequence_that_is_not_scored_is_undefined_and_one_in_training_moves_nothing():
    ids, labels = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 2, 3], [-100, -100, -100]])
    half = fs.objective(language().net, [{"input_ids": ids, "labels": labels}], fs.causal_lm)
    for method in ("cg", "gram"):
        found = influence(half, half, half.net.theta, method=method, damping=1.0, tol=0.1)
        assert found.values.isnan().tolist() == [[False, True], [False, True]]
        assert float(found.values[1, 0]) == 0
        assert "undefined" in found.notes[0]
    assert self_influence(half, half.net.theta, method="gram").values.isnan().tolist() == [False, True]


def test_most_influential_texts_are_the_ends_of_the_list_with_their_words():
    letters = lambda ids: [chr(96 + i) for i in ids]  # noqa: E731
    ids = torch.tensor([[1, 2, 3, 4], [2, 3, 4, 0], [4, 3, 2, 1], [1, 1, 1, 0], [5, 6, 7, 8]])
    train = fs.objective(language().net, [{"input_ids": ids, "attention_mask": (ids > 0).long()}], fs.causal_lm)
    test = fs.objective(language().net, [{"input_ids": ids[:1]}], fs.causal_lm)
    found = most_influential(train, test, train.net.theta, letters, damping=0.1, num_texts=2)
    whole = influence(train, test, train.net.theta, damping=0.1, test="mean").left_out[:, 0]
    order = whole.argsort(descending=True).tolist()
    words = ["abcd", "bcd", "dcba", "aaa", "efgh"]
    assert found.helpful == [words[i] for i in order[:2]]
    assert found.harmful == [words[i] for i in order[:-3:-1]]
    assert_close(found.rise, whole[[*order[:2], *order[:-3:-1]]])
    assert found.num_helpful == int((whole > 0).sum())
    assert found.helpful[0] == "abcd"  # the test text itself
    assert f"helpful 1 (#{order[0]}): abcd" in str(found)


def test_texts_of_data_without_tokens_are_their_places():
    found = most_influential(loss(), second_loss(), theta(), damping=0.1, num_texts=9)
    assert len(found.helpful) == len(found.harmful) == 3
    assert all(name.startswith("sequence ") for name in found.passages)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: influence(loss(), loss(), theta()), TypeError, "`key` must be a key"),
        (lambda: influence(loss(), loss(), theta(), method="ekfac"), TypeError, "`key` must be a key"),
        (lambda: self_influence(loss(), theta()), TypeError, "`key` must be a key"),
        (lambda: influence(loss(), loss(), theta(), damping=-1.0), ValueError, "`damping` must be a finite number"),
        (lambda: influence(loss(), loss(), theta(), method="ekfac", key=fs.key(0), damping=0.0), ValueError, "above 0"),
        (lambda: influence(loss(), language(), theta()), ValueError, "flat vector"),
        (lambda: most_influential(loss(), loss(), theta(), damping=0.1, num_texts=0), ValueError, "`num_texts`"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_texts_at_the_helpful_end_that_do_not_help_are_counted():
    net = fs.functional(seeded(0, lambda: torch.nn.Linear(1, 1, bias=False).double()))
    half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    one = torch.ones(4, 1).double()
    train = fs.objective(net, [(one, torch.tensor([[1.0], [2.0], [3.0], [4.0]]).double())], half_square)
    test = fs.objective(net, [(one[:1], torch.tensor([[-9.0]]).double())], half_square)
    found = most_influential(train, test, torch.zeros(1).double(), damping=0.1, key=fs.key(0), num_texts=2)
    assert found.num_helpful == 0  # all pull away from it
    assert found.notes == ["2 of the 2 texts at the helpful end do not lower the test loss."]
