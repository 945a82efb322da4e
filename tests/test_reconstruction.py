"""Linear maps between layers. Oracles: ridge regression by its normal equations, scikit-learn's folds, linear layers."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold

import funcscope as fs
from funcscope.core.keys import uniform
from funcscope.representation import linear_reconstruction

GROUPS = torch.arange(30).repeat_interleave(3)


def normal(seed, *shape):
    return fs.normal(fs.key(seed), torch.zeros(*shape, dtype=torch.float64))


def related(seed=0, d=6, e=4):
    x = normal(seed, 90, d)
    return x, x[:, :e].tanh() + 0.5 * normal(seed + 1, 90, e)


def folds(key, num_sequences=30, num=5):
    """Each sequence's place in the order of its draw."""
    draw = uniform(fs.fold_in(key, "folds"), torch.zeros(num_sequences, dtype=torch.float64)).numpy()
    return (np.argsort(np.argsort(draw)) % num)[GROUPS.numpy()]


def ridge(x, y, train, alpha):
    """Predictions for all rows from the training ones."""
    a, b = x[train] - x[train].mean(0), y[train] - y[train].mean(0)
    scale = np.sqrt(np.square(a).mean())
    weights = np.linalg.solve(a.T @ a / scale**2 + alpha * np.eye(a.shape[1]), a.T @ b / scale)
    return (x - x[train].mean(0)) / scale @ weights + y[train].mean(0)


def test_numbers_are_those_of_the_normal_equations():
    x, y = related()
    key, alpha = fs.key(5), 3.0
    found = linear_reconstruction({"a": x, "b": y}, GROUPS, key=key, alphas=[alpha])
    fold, left, total, train_left, train_total = folds(key), np.zeros(90), np.zeros(90), 0.0, 0.0
    for i in range(5):
        train = fold != i
        apart = np.square(y.numpy() - ridge(x.numpy(), y.numpy(), train, alpha)).sum(1)
        about = np.square(y.numpy() - y.numpy()[train].mean(0)).sum(1)
        left[~train], total[~train] = apart[~train], about[~train]
        train_left, train_total = train_left + apart[train].sum(), train_total + about[train].sum()
    r2 = 1 - left.sum() / total.sum()
    assert float(found.r2) == pytest.approx(r2)
    assert float(found.r2_train) == pytest.approx(1 - train_left / train_total)
    assert float(found.mse) == pytest.approx(left.sum() / 360)
    beside = (left - (1 - r2) * total).reshape(30, 3).sum(1)
    assert float(found.r2_stderr) == pytest.approx(math.sqrt(30 / 29 * np.square(beside).sum()) / total.sum())
    assert found.r2 < found.r2_train


def test_penalties_are_chosen_on_training_sequences_alone():
    """Mistake 34: neither by the data that the share is reported of, nor by tokens whose sequence is there twice."""
    x, y = related(2)
    key, alphas = fs.key(1), [1e-3, 1.0, 30.0, 1e3]
    found = linear_reconstruction({"a": x, "b": y}, GROUPS, key=key, alphas=alphas)
    fold = folds(key)
    for i in range(5):
        train = fold != i
        groups, errors = GROUPS.numpy()[train], np.zeros(4)
        for fit, check in GroupKFold(3).split(x[train], groups=groups):
            inside = np.zeros(train.sum(), bool)
            inside[fit] = True
            for j, alpha in enumerate(alphas):
                made = inner_ridge(x.numpy()[train], y.numpy()[train], inside, alpha)
                errors[j] += np.square(made[check] - y.numpy()[train][check]).mean()
        assert float(found.alpha[0, i]) == alphas[int(errors.argmin())]
        other = y.clone()
        other[torch.from_numpy(~train)] = 100 * normal(7, int((~train).sum()), 4)
        again = linear_reconstruction({"a": x, "b": other}, GROUPS, key=key, alphas=alphas)
        assert again.alpha[0, i] == found.alpha[0, i]


def inner_ridge(x, y, inside, alpha):
    """Inputs are scaled once, by all training rows, and centred in each fold."""
    scale = np.sqrt(np.square(x - x.mean(0)).mean())
    a, b = (x[inside] - x[inside].mean(0)) / scale, y[inside] - y[inside].mean(0)
    weights = np.linalg.solve(a.T @ a + alpha * np.eye(a.shape[1]), a.T @ b)
    return (x - x[inside].mean(0)) / scale @ weights + y[inside].mean(0)


def test_a_choice_by_left_out_tokens_copies_the_sequences_they_are_of():
    """Mistake 34: RidgeCV by itself leaves out single tokens; with near-copies in a sequence it takes too small a penalty."""
    x = normal(0, 30, 1, 40).expand(30, 3, 40).flatten(0, 1) + 0.01 * normal(1, 90, 40)
    y = normal(2, 30, 1, 3).expand(30, 3, 3).flatten(0, 1)  # unrelated
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    x, y, groups, alphas = x[order], y[order], GROUPS[order], [1e-3, 1.0, 1e3, 1e5]
    found = linear_reconstruction({"a": x, "b": y}, groups, key=fs.key(0), alphas=alphas)
    scale = x.std()
    by_tokens = RidgeCV(alphas).fit((x / scale).numpy(), y.numpy()).alpha_
    assert by_tokens < 1e3 <= float(found.alpha.min())
    assert abs(float(found.r2)) < 0.2
    documented = linear_reconstruction({"a": x, "b": y}, groups, key=fs.key(0), alphas=[by_tokens])
    assert float(documented.r2) < -0.5
    assert float(documented.r2_train) > 0.5


def test_few_tokens_are_named_beside_relations_that_are_not_linear():
    """Mistake 34: R^2 < 0 with a linear relation, of which there are fewer tokens than units."""
    weights = normal(3, 120, 5)
    few, many = (
        linear_reconstruction({"a": x, "b": x @ weights + 4 * normal(5, num, 5)}, key=fs.key(0), alphas=[1e-3])
        for num, x in ((100, normal(4, 100, 120)), (900, normal(4, 900, 120)))
    )
    assert float(few.r2) < 0.6 < 0.8 < float(many.r2)
    assert any("too few tokens" in note for note in few.notes)
    assert not many.notes or "too few" not in " ".join(many.notes)
    x = normal(6, 300, 2)
    square = linear_reconstruction({"a": x, "b": x.square()}, key=fs.key(0), alphas=[1e-3])
    assert float(square.r2) < 0
    assert any("not linear, or too few tokens" in note for note in square.notes)


def test_every_layer_is_predicted_from_the_one_before():
    x, y = related()
    layers = {"0": x, "1": y, "2": y @ normal(9, 4, 3), "3": torch.ones(90, 2).double()}
    found = linear_reconstruction(layers, GROUPS, key=fs.key(0), alphas=[1e-6, 1.0])
    assert found.layers == ("1", "2", "3")
    assert float(found.r2[1]) > 1 - 1e-9
    assert math.isnan(float(found.r2[2]))
    one = linear_reconstruction({"0": x, "1": y}, GROUPS, key=fs.key(0), alphas=[1e-6, 1.0])
    assert float(found.r2[0]) == pytest.approx(float(one.r2))
    assert any("end of those that were tried" in note for note in found.notes)


def test_units_of_the_inputs_do_not_matter():
    x, y = related()
    one, other = (
        linear_reconstruction({"a": scale * x + shift, "b": 3 * y}, GROUPS, key=fs.key(0), alphas=[1.0, 10.0])
        for scale, shift in ((1.0, 0.0), (1e4, 7.0))
    )
    assert float(one.r2) == pytest.approx(float(other.r2), rel=1e-9)


def test_few_sequences_have_no_held_out_share():
    x, y = related()
    found = linear_reconstruction({"a": x, "b": y}, GROUPS // 10, key=fs.key(0))
    assert math.isnan(float(found.r2))
    assert any("fewer than 4 sequences" in note for note in found.notes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y, k: linear_reconstruction({"a": x}, key=k), "`layers` must be two"),
        (lambda x, y, k: linear_reconstruction({"a": x, "b": y[1:]}, key=k), "must have a row"),
        (lambda x, y, k: linear_reconstruction({"a": x, "b": y}, key=k, alphas=[0.0]), "`alphas` must be"),
        (lambda x, y, k: linear_reconstruction({"a": x, "b": y}, key=k, alphas=[]), "`alphas` must have"),
        (lambda x, y, k: linear_reconstruction({"a": x, "b": y}, key=k, folds=1), "`folds` must be"),
    ],
)
def test_invalid_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*related(), fs.key(0))


@pytest.mark.parametrize(
    "d", [6, 45, 70, 100]
)  # units: fewer than rows of each inner fold, of each fold, than all, more
def test_maps_of_all_penalties_from_one_decomposition_are_scikit_learns(d):
    x = normal(0, 90, d)
    y = x[:, :5].tanh() + 0.5 * normal(1, 90, 5)
    key, alphas = fs.key(2), [1e-3, 0.1, 1.0, 10.0, 100.0]
    found = linear_reconstruction({"a": x, "b": y}, GROUPS, key=key, alphas=alphas)
    fold, left = folds(key), 0.0
    for i in range(5):
        train = fold != i
        inputs = ((x - x[train].mean(0)) / x[train].var(0, correction=0).mean().sqrt()).numpy()
        inside = list(GroupKFold(3).split(inputs[train], groups=GROUPS.numpy()[train]))
        model = RidgeCV(alphas, scoring="neg_mean_squared_error", cv=inside).fit(inputs[train], y.numpy()[train])
        assert model.alpha_ == float(found.alpha[0, i])
        left += np.square(y.numpy()[~train] - model.predict(inputs[~train])).sum()
    assert float(found.mse) == pytest.approx(left / (90 * 5), rel=1e-9)


def test_a_penalty_is_chosen_where_errors_are_below_the_rounding_of_their_sums():
    x = normal(3, 90, 6)
    alphas = [1e-9, 1e-8, 1e-7]
    found = linear_reconstruction({"a": x, "b": x @ normal(4, 6, 4)}, GROUPS, key=fs.key(0), alphas=alphas)
    assert found.alpha.tolist() == [[1e-9] * 5]


@pytest.mark.parametrize("value", [0.1, 2.7, 1 / 3])
def test_a_layer_that_does_not_vary_has_no_share_of_its_rounding(value):
    layers = {"x": normal(0, 33, 5), "still": torch.full((33, 2), value, dtype=torch.float64)}
    found = linear_reconstruction(layers, key=fs.key(0))
    assert found.r2.isnan().all()
    assert any("does not vary" in note for note in found.notes)
