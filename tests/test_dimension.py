"""Intrinsic dimension. Oracles: sets of known dimension, formulas over all distances, likelihoods maximised by scipy."""

import math

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.keys import uniform
from funcscope.representation import gride, layer_dimensions, levina_bickel, local_pca, two_nn
from funcscope.representation.nearest import Cloud, Nearest, cloud, nearest, overlap_stderr


def normal(seed, *shape):
    return fs.normal(fs.key(seed), torch.zeros(*shape, dtype=torch.float64))


def cube(seed, num, dim):
    return uniform(fs.key(seed), torch.zeros(num, dim, dtype=torch.float64))


def torus(seed, num, dim):
    angle = 2 * math.pi * cube(seed, num, dim)
    return torch.cat([angle.sin(), angle.cos()], 1)


def distances(x, groups=None):
    """Ascending, of all others, of other sequences where groups are given."""
    apart = scipy.spatial.distance.cdist(x.numpy(), x.numpy())
    same = np.eye(len(x), dtype=bool) if groups is None else groups.numpy()[:, None] == groups.numpy()
    return np.sort(np.where(same, np.inf, apart), 1)


def by_definition(x, groups=None, discard=0.1):
    r = distances(x, groups)
    logs = np.sort(np.log(r[:, 1] / r[:, 0]))
    num, few = len(logs), len(logs) - int(discard * len(logs))
    level = -np.log(1 - np.arange(1, num)[:few] / num)
    fit = (level @ logs[: len(level)]) / (logs[: len(level)] @ logs[: len(level)])
    return [(num - 1) / logs.sum(), (few - 1) / (logs[:few].sum() + (num - few) * logs[few - 1]), fit]


@pytest.mark.parametrize("discard", [0.0, 0.1, 0.35])
def test_two_nn_is_its_definition(discard):
    groups = torch.arange(100) // 5
    x = normal(1, 100, 6)
    for each in (None, groups):
        found = two_nn(x, each, discard=discard)
        numbers = [float(value.value) for value in (found.mle, found.censored, found.fit)]
        assert numbers == pytest.approx(by_definition(x, each, discard), rel=1e-9)
        assert found.mle.num == (100 if each is None else 20)


SETS = {
    "line in 100 dimensions": (lambda i: normal(i, 400, 1) * normal(99, 1, 100), 1),
    "circle": (lambda i: torus(i, 400, 1), 1),
    "sphere": (lambda i: torch.nn.functional.normalize(normal(i, 600, 3)), 2),
    "torus": (lambda i: torus(i, 600, 2), 2),
    "plane, turned and scaled": (lambda i: 1e4 * normal(i, 400, 2) @ normal(98, 2, 50) + 1e3, 2),
    "gauss": (lambda i: normal(i, 800, 5), 5),
}


@pytest.mark.parametrize("name", SETS)
def test_sets_have_their_dimension(name):
    make, dim = SETS[name]
    found = [two_nn(make(i)) for i in range(8)]
    for estimator in ("mle", "censored", "fit"):
        values, errors = (
            torch.stack([getattr(getattr(each, estimator), w) for each in found]) for w in ("value", "stderr")
        )
        assert abs(float(values.mean()) - dim) < 3 * float(errors.square().sum().sqrt()) / 8 + 0.01 * dim, estimator


def test_trimming_the_large_ratios_is_not_two_nn():
    """Mistake 2: fences around the quartiles and mu < 10 take away exactly the large ratios."""
    for dim, least in ((2, 2.4), (5, 5.2)):
        r = distances(cube(1, 2000, dim))
        ratio = r[:, 1] / r[:, 0]
        low, high = np.quantile(ratio, [0.25, 0.75])
        inside = (ratio > low - 1.5 * (high - low)) & (ratio < high + 1.5 * (high - low)) & (ratio < 10)
        found = two_nn(cube(1, 2000, dim))
        assert 1 / np.log(ratio[inside]).mean() > least
        assert abs(float(found.mle.value) - dim) < 3 * float(found.mle.stderr) + 0.05 * dim
        assert abs(float(found.censored.value) - dim) < 3 * float(found.censored.stderr) + 0.05 * dim


def test_few_points_have_no_dimension():
    """Mistake 2: neither the width nor a number of eigenvalues stands for it."""
    for num in (1, 2, 19):
        found = two_nn(normal(0, num, 64))
        assert math.isnan(float(found.mle.value))
        assert any("resolve no dimension" in note for note in found.notes)
        for function in (gride, levina_bickel, local_pca):
            scales = function(normal(0, num, 64), neighbours=[2, 4])
            assert scales.dimension.isnan().all()
            assert any("resolve no dimension" in note for note in scales.notes)
    assert float(two_nn(normal(0, 20, 64)).mle.value) < 64


def test_high_dimensions_are_not_resolved_and_that_is_no_compression():
    """Mistake 38: 1,000 isotropic points in 1,000 dimensions."""
    found = two_nn(normal(0, 1000, 1000))
    assert float(found.mle.value) + 10 * float(found.mle.stderr) < 300
    assert any("no sign of compression" in note for note in found.notes)
    assert not any("compression" in note for note in two_nn(normal(0, 1000, 2)).notes)


def test_errors_are_not_those_of_independent_ratios():
    """Mistake 37: sd / sqrt(n) is for independent terms; and 20 pairs of 1,000 points are .004 % of them, 150 are .03 %."""
    found = [two_nn(torus(i, 300, 2)) for i in range(60)]
    values, errors = (torch.stack([getattr(each.mle, w) for each in found]) for w in ("value", "stderr"))
    naive = 2 / math.sqrt(300)
    assert float(values.std()) > 1.1 * naive
    assert 1.15 * naive < float(errors.mean()) < 1.4 * naive
    pairs = math.comb(1000, 2)
    assert [round(100 * num / pairs, 3) for num in (20, 150)] == [0.004, 0.03]


def test_repeated_tokens_are_left_out_and_counted():
    x = torus(0, 200, 2)
    twice = torch.cat([x, x[:150]])
    found, once = two_nn(twice), two_nn(x)
    assert (found.num_points, found.num_duplicates) == (200, 150)
    assert float(found.mle.value) == pytest.approx(float(once.mle.value), rel=1e-12)
    assert any("150 rows that equal another one" in note for note in found.notes)
    with np.errstate(divide="ignore", invalid="ignore"):
        assert not by_definition(twice)[0] > 0.1  # without: distances of 0 and infinite ratios


def test_neighbours_are_of_other_sequences():
    """Sequences that are smooth paths: the nearest rows are those beside on the path, a set of one dimension."""
    steps = torch.linspace(0, 1, 60, dtype=torch.float64)
    paths = torch.stack([a + 0.3 * steps[:, None] * b for a, b in zip(normal(0, 20, 3), normal(1, 20, 3), strict=True)])
    x, groups = paths.flatten(0, 1) + 1e-4 * normal(2, 1200, 3), torch.arange(20).repeat_interleave(60)
    inside, beside = two_nn(x, groups, within=True), two_nn(x, groups)
    assert float(inside.mle.value) > 1.5 * float(beside.mle.value) or float(inside.mle.value) < 0.8 * float(
        beside.mle.value
    )
    assert any("same sequence" in note for note in inside.notes)
    assert float(beside.mle.value) == pytest.approx(by_definition(x, groups)[0], rel=1e-6)
    assert float(inside.mle.value) == pytest.approx(by_definition(x)[0], rel=1e-6)
    alone = two_nn(x, torch.zeros(1200, dtype=torch.long))
    assert math.isnan(float(alone.mle.value))


def test_distances_are_exact_where_inner_products_round():
    x = 1e6 + cube(0, 100, 3) * 1e-3
    near = nearest(cloud(x, torch.arange(100), False), 5)
    assert_close(near.distances, torch.from_numpy(distances(x - x.mean(0))[:, :5].copy()), rtol=1e-6, atol=0)


def log_likelihood(d, ratios, num):
    """The density of the docstring."""
    half = num // 2
    density = np.log(d) + (num - half - 1) * np.log(ratios**d - 1) - (d * (num - 1) + 1) * np.log(ratios)
    return (density - scipy.special.betaln(num - half, half)).sum()


def test_gride_is_the_maximum_of_its_likelihood_and_two_nn_at_two():
    x = normal(0, 300, 4)
    found, r = gride(x, neighbours=[2, 4, 16]), distances(x)
    for k, value in zip(found.neighbours, found.dimension, strict=True):
        ratios = r[:, k - 1] / r[:, k // 2 - 1]
        best = scipy.optimize.minimize_scalar(
            lambda d, ratios=ratios, k=k: -log_likelihood(d, ratios, k), bounds=(0.5, 20), method="bounded",
            options={"xatol": 1e-9},
        )  # fmt: skip
        assert float(value) == pytest.approx(best.x, rel=1e-6)
    once = two_nn(x)
    assert float(found.dimension[0]) == pytest.approx(float(once.mle.value) * 300 / 299, rel=1e-9)
    assert float(found.dimension_stderr[0]) == pytest.approx(float(once.mle.stderr) * 300 / 299, rel=1e-2)
    assert_close(found.distance, torch.tensor([r[:, k - 1].mean() for k in (2, 4, 16)]))
    whole = scipy.integrate.quad(lambda m: np.exp(log_likelihood(3.0, np.array([m]), 8)), 1, np.inf)[0]
    assert whole == pytest.approx(1)  # the oracle is a density


def test_levina_bickel_pools_inverse_dimensions():
    x = normal(0, 200, 3)
    found, r = levina_bickel(x, neighbours=[2, 10]), distances(x)
    logs = np.log(r[:, 9:10] / r[:, :9]).sum()
    assert float(found.dimension[1]) == pytest.approx((200 * 9 - 1) / logs)
    assert float(found.dimension[0]) == pytest.approx(float(two_nn(x).mle.value), rel=1e-9)
    means = (9 / np.log(r[:, 9:10] / r[:, :9]).sum(1)).mean()
    assert means > 1.05 * float(found.dimension[1])  # the mean of the points' own estimates


def test_local_pca_counts_components_of_neighbourhoods():
    x = torus(0, 150, 2) + 0.01 * normal(1, 150, 4)
    found = local_pca(x, neighbours=[8, 20], variance=0.9)
    order = scipy.spatial.distance.cdist(x, x).argsort(1)
    for k, value in zip(found.neighbours, found.dimension, strict=True):
        counts = []
        for row in order:
            around = x[row[1 : k + 1]].numpy()
            values = np.linalg.svd(around - around.mean(0))[1] ** 2
            counts.append(1 + int((np.cumsum(values) / values.sum() < 0.9).sum()))
        assert float(value) == pytest.approx(np.mean(counts))


def test_errors_of_shared_neighbours_are_their_formula():
    points = cloud(normal(0, 60, 3), torch.arange(60) // 3, False)
    near, moves = nearest(points, 4), normal(1, 60, 2)
    counts = np.zeros((20, 60))
    for i in range(60):
        for j in (i, *near.indices[i].tolist()):
            counts[i // 3, j] += 1
    shared = counts @ counts.T
    weights = shared / np.sqrt(np.outer(shared.diagonal(), shared.diagonal()))
    z = (moves - moves.mean(0)).view(20, 3, 2).sum(1).numpy()
    expected = np.sqrt(np.einsum("sm,st,tm->m", z, weights, z) / (1 - weights.mean()))
    assert_close(overlap_stderr(moves, points, near, 4), torch.from_numpy(expected), rtol=1e-10, atol=0)
    apart = Cloud(points.x, torch.arange(60), False, 0)  # nothing is shared: sd / sqrt(n) of independent points
    nobody = Nearest(torch.zeros(60, 1), torch.arange(60)[:, None])
    mean = overlap_stderr(moves / 60, apart, nobody, 1)
    assert_close(mean, moves.std(0) / math.sqrt(60), rtol=1e-10, atol=0)


@settings(max_examples=6)
@given(seed=st.integers(0, 2**32), scale=st.floats(1e-3, 1e3))
def test_rotations_shifts_and_scaling_change_nothing(seed, scale):
    x = normal(seed, 40, 3)
    moved = scale * x @ torch.linalg.qr(normal(seed + 1, 3, 3)).Q + 1
    one, other = (
        torch.cat([f(each, neighbours=[4]).dimension for f in (gride, levina_bickel, local_pca)]) for each in (x, moved)
    )
    assert_close(one, other, rtol=1e-6, atol=0)


def test_layers_are_each_by_itself():
    groups = torch.arange(60) // 2
    layers = {"0": normal(0, 60, 3), "1": normal(1, 60, 1).repeat(1, 4), "2": torch.ones(60, 2).double()}
    found = layer_dimensions(layers, groups)
    for i, x in enumerate(layers.values()):
        one = two_nn(x, groups)
        for name in ("mle", "censored", "fit"):
            value, stderr = float(getattr(found, name)[i]), float(getattr(found, f"{name}_stderr")[i])
            assert value == pytest.approx(float(getattr(one, name).value), nan_ok=True)
            assert stderr == pytest.approx(float(getattr(one, name).stderr), nan_ok=True)
        assert float(found.num_points[i]) == one.num_points


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: two_nn(x, discard=1.0), "`discard` must be"),
        (lambda x: two_nn(x * math.inf), "`x` must be finite"),
        (lambda x: two_nn(x, torch.ones(2)), "`groups` must name"),
        (lambda x: gride(x, neighbours=[3]), "`neighbours` must be even"),
        (lambda x: gride(x, neighbours=[]), "`neighbours` must have"),
        (lambda x: levina_bickel(x, neighbours=[1]), "`neighbours` must be"),
        (lambda x: local_pca(x, variance=0.0), "`variance` must be"),
    ],
)
def test_invalid_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(normal(0, 30, 2))


@pytest.mark.outsider
def test_scikit_dimension_finds_the_same():
    skdim = pytest.importorskip("skdim")
    x = normal(0, 500, 4)
    r = distances(x)
    mle = skdim.id.MLE(K=10, neighborhood_based=True).fit(x.numpy(), n_neighbors=10)
    inverse = (1 / mle.dimension_pw_).mean()
    assert float(levina_bickel(x, neighbours=[10]).dimension) == pytest.approx(1 / inverse, rel=1e-3)
    theirs = skdim.id.TwoNN(discard_fraction=0.1).fit(x.numpy()).dimension_
    assert float(two_nn(x).fit.value) == pytest.approx(theirs, rel=0.02)
    assert r.shape == (500, 500)


def test_notes_of_layers_are_true_of_the_layers_that_they_are_about():
    wide, line = normal(0, 400, 40), normal(1, 25, 1).repeat(16, 1)
    found = layer_dimensions({"wide": wide, "line": line})
    assert found.num_points.tolist() == [400, 25]
    notes = " ".join(found.notes)
    assert "up to 375 rows that equal another one" in notes
    assert (
        "400 points resolve dimensions up to about 5.2" in notes
    )  # not the 25 of the line, whose dimension is resolved
    one = layer_dimensions({"line": torch.cat([line[:25], line[:1]])})
    assert "1 row that equals another one (repeated tokens) is left out." in one.notes
