"""Similarities. Oracles: definitions written out in numpy, every permutation of few samples, scipy's and sklearn's own."""

import math
from itertools import permutations

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcscope as fs
from funcscope.core.standard_errors import jackknife_stderr
from funcscope.representation import canonical_correlation, cka, layer_similarity, mutual_neighbours, procrustes
from funcscope.representation.calibration import null_p_value, null_point
from funcscope.representation.measures import LinearKernels, Neighbours, Projections, Rotations
from funcscope.representation.sequences import equal_rows

MEASURES = {
    "debiased_cka": cka,
    "cka": lambda *a, **k: cka(*a, **k, debiased=False),
    "cca": canonical_correlation,
    "procrustes": procrustes,
    "neighbours": mutual_neighbours,
}
every = pytest.mark.parametrize("name", MEASURES)


def normal(seed, *shape):
    return fs.normal(fs.key(seed), torch.zeros(*shape, dtype=torch.float64))


def related(seed, num, d=5, e=4):
    x = normal(seed, num, d)
    return x, x[:, :e].tanh() + 0.7 * normal(seed + 10**6, num, e)


def by_definition(name, x, y, sequence=None):
    x, y = x.numpy(), y.numpy()
    n = len(x)
    a, b = x - x.mean(0), y - y.mean(0)
    if name == "cka":
        return np.linalg.norm(a.T @ b) ** 2 / np.linalg.norm(a.T @ a) / np.linalg.norm(b.T @ b)
    if name == "debiased_cka":
        return hsic(x @ x.T, y @ y.T) / math.sqrt(hsic(x @ x.T, x @ x.T) * hsic(y @ y.T, y @ y.T))
    if name == "procrustes":
        rotation, _ = scipy.linalg.orthogonal_procrustes(*(np.pad(m, ((0, 0), (0, 9 - m.shape[1]))) for m in (a, b)))
        return np.sum(
            np.pad(a, ((0, 0), (0, 9 - a.shape[1]))) @ rotation * np.pad(b, ((0, 0), (0, 9 - b.shape[1])))
        ) / (np.linalg.norm(a) * np.linalg.norm(b))
    if name == "neighbours":
        sequence = np.arange(n) if sequence is None else sequence.numpy()
        sets = []
        for m in (x, y):
            apart = scipy.spatial.distance.cdist(m, m)
            apart[sequence[:, None] == sequence] = np.inf
            sets.append([set(row[:10]) for row in apart.argsort(1)])
        return np.mean([len(i & j) / 10 for i, j in zip(*sets, strict=True)])
    parts = []
    for m in (a, b):
        values, vectors = np.linalg.eigh(m.T @ m)
        share = np.cumsum(values[::-1]) / values.sum()
        parts.append(m @ vectors[:, ::-1][:, : int(np.searchsorted(share, 0.99)) + 1])
    (p, q), both = (m.shape[1] for m in parts), np.linalg.qr(parts[0])[0].T @ np.linalg.qr(parts[1])[0]
    return (np.linalg.svd(both)[1] ** 2).sum() / min(p, q)


def hsic(K, L):
    n = len(K)
    K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    one = np.ones(n)
    first = np.trace(K @ L) + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return (first - 2 / (n - 2) * (one @ K @ L @ one)) / (n * (n - 3))


@every
@pytest.mark.parametrize("shape", [(60, 5, 4), (24, 40, 30), (30, 3, 40)])
def test_every_similarity_is_its_definition(name, shape):
    n, d, e = shape
    x, y = normal(1, n, d), normal(2, n, e)
    y[:, :3] += x[:, :3]
    if name == "procrustes" and max(d, e) > 9:
        a, b = x - x.mean(0), y - y.mean(0)
        expected = float(torch.linalg.matrix_norm(a.T @ b, "nuc") / a.norm() / b.norm())
    else:
        expected = by_definition(name, x, y)
    found = MEASURES[name](x, y, key=fs.key(3), num=19).similarity
    assert float(found.value) == pytest.approx(float(expected), rel=1e-9)
    assert found.num == n


def test_neighbours_are_those_of_other_sequences():
    groups = torch.arange(15).repeat_interleave(4)
    shared = normal(0, 15, 1, 3).expand(15, 4, 3).flatten(0, 1)
    x, y = (
        shared + 0.01 * normal(1, 60, 3),
        normal(2, 15, 1, 3).expand(15, 4, 3).flatten(0, 1) + 0.01 * normal(3, 60, 3),
    )
    found = mutual_neighbours(x, y, groups, key=fs.key(0), num=19)
    assert float(found.similarity.value) == pytest.approx(by_definition("neighbours", x, y, groups))
    naive = by_definition("neighbours", x, y)  # tokens of a sequence are near in both, which says nothing of either
    assert naive > float(found.similarity.value) + 0.1


@every
def test_the_null_is_that_of_permuted_sequences(name):
    groups = torch.arange(12).repeat_interleave(3)
    x, y = related(1, 36)
    found = MEASURES[name](x, y, groups, key=fs.key(3), num=30)
    shuffled = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    again = MEASURES[name](x[shuffled], y[shuffled], groups[shuffled], key=fs.key(3), num=30)  # rows in another order
    assert float(again.similarity.value) == pytest.approx(float(found.similarity.value), rel=1e-12)
    values = {
        round(float(by_definition(name, x, y.view(12, 3, 4)[list(order)].flatten(0, 1), groups)), 9)
        for order in (np.random.default_rng(seed).permutation(12) for seed in range(40))
    }
    spread = np.std(list(values)) / 6
    assert abs(float(found.null.mean()) - np.mean(list(values))) < 4 * max(spread, 1e-3)
    assert found.p_value == (1 + int((found.null >= found.similarity.value).sum())) / 31


def test_what_sequences_share_at_a_place_is_in_the_null():
    """Both have the same vector for each place in a sequence, and nothing else in common."""
    groups = torch.arange(20).repeat_interleave(4)
    x, y = (torch.tile(normal(0, 4, 5), (20, 1)) + 0.3 * normal(i + 2, 80, 5) for i in (0, 1))
    found = cka(x, y, groups, key=fs.key(0), num=99)
    assert found.null_mean > 0.95 * float(found.similarity.value) > 0.5
    assert found.p_value > 0.01
    apart = cka(x, y, key=fs.key(0), num=99)  # negative control: tokens are permuted one by one
    assert apart.null_mean < 0.05
    assert apart.p_value == 0.01


def test_all_pairings_of_few_samples_are_drawn_and_no_others():
    x, y = related(5, 4, 2, 2)
    found = cka(x, y, key=fs.key(0), num=400)
    exact = torch.tensor([by_definition("debiased_cka", x, y[list(order)]) for order in permutations(range(4))])
    apart = (found.null[:, None] - exact).abs()
    assert float(apart.min(1).values.max()) < 1e-9
    assert float(apart.min(0).values.max()) < 1e-9
    assert any("24 ways" in note for note in found.notes)


@pytest.mark.slow
@every
def test_p_values_of_independent_representations_are_uniform(name):
    p = [
        MEASURES[name](normal(2 * i, 16, 6), normal(2 * i + 1, 16, 3), key=fs.key(i), num=19).p_value for i in range(60)
    ]
    assert scipy.stats.kstest(p, "uniform").pvalue > 1e-3
    x, y = related(3, 60)
    assert MEASURES[name](x, y, key=fs.key(0), num=99).p_value == 0.01


def test_debiased_cka_of_independent_data_is_0_where_the_biased_one_is_near_1():
    """additions.md: N = 32."""
    layers = {str(i): normal(i, 32, 512) for i in range(9)}
    debiased, biased = (
        layer_similarity(layers, key=fs.key(0), measure=name, num=19) for name in ("debiased_cka", "cka")
    )
    pairs = torch.ones(9, 9).triu(1).bool()
    assert abs(float(debiased.similarity[pairs].mean())) < 0.02
    assert float(biased.similarity[pairs].min()) > 0.9
    assert biased.largest_p_value > 0.05
    found = cka(layers["0"], layers["1"], key=fs.key(1), debiased=False)
    assert found.p_value > 0.05
    assert float(found.calibrated.value) == 0.0
    assert math.isnan(float(found.calibrated.stderr))


def test_calibration_is_its_formula():
    null = torch.arange(1, 100, dtype=torch.float64) / 200
    assert float(null_point(null)) == 95 / 200  # rank ceil(.95 * 100) of 99
    assert float(null_p_value(null, torch.tensor(95.5 / 200).double())) == 0.05
    assert float(null_p_value(null, torch.tensor(2.0).double())) == 0.01
    x, y = related(1, 40)
    found = cka(x, y, key=fs.key(2))
    q = found.null.sort().values[189]
    assert found.null_quantile == float(q)
    assert float(found.calibrated.value) == pytest.approx(float((found.similarity.value - q) / (1 - q)))
    assert float(found.calibrated.stderr) == pytest.approx(float(found.similarity.stderr / (1 - q)))


@every
def test_errors_are_the_jackknife_over_sequences(name):
    groups = torch.arange(20).repeat_interleave(2)
    x, y = related(1, 40)
    found = MEASURES[name](x, y, groups, key=fs.key(3), num=19)
    without = [by_definition(name, x[groups != i], y[groups != i], groups[groups != i]) for i in range(20)]
    expected = jackknife_stderr(torch.tensor(without, dtype=torch.float64))
    assert float(found.similarity.stderr) == pytest.approx(float(expected), rel=1e-8)
    every = torch.arange(40)
    tokens = [by_definition(name, x[every != i], y[every != i], groups[every != i]) for i in range(40)]
    assert float(jackknife_stderr(torch.tensor(tokens, dtype=torch.float64))) != pytest.approx(
        float(expected), rel=1e-3
    )


FORMS = {
    "debiased_cka": LinearKernels(True), "cka": LinearKernels(False), "cca": Projections(0.99),
    "procrustes": Rotations(), "neighbours": Neighbours(10),
}  # fmt: skip


def value(name, x, y):
    measure, sequence = FORMS.get(name, Projections(1.0)), torch.arange(len(x))
    return float(measure.values(measure.form([x], sequence), measure.form([y], sequence)))


@given(seed=st.integers(0, 2**32), scale=st.floats(0.1, 10))
def test_invariances(seed, scale):
    x, y = related(seed, 24)
    moved = scale * x @ torch.linalg.qr(normal(seed + 1, 5, 5)).Q + 3
    for name in FORMS:
        at = value(name, x, y)
        assert value(name, moved, y) == pytest.approx(at, rel=1e-8), name
        assert value(name, y, x) == pytest.approx(at, rel=1e-8), name
        assert value(name, x, moved) == pytest.approx(1, rel=1e-9), name
        assert at < 1
    sheared = x @ (torch.eye(5, dtype=torch.float64) + torch.ones(5, 5, dtype=torch.float64).triu(1))
    assert value("whole", sheared, y) == pytest.approx(value("whole", x, y), rel=1e-8)
    assert value("cka", sheared, y) != pytest.approx(value("cka", x, y), rel=1e-6)


def test_the_angle_is_a_metric():
    angle = layer_similarity(
        {str(i): normal(i, 20, 3 + i) for i in range(4)}, key=fs.key(0), measure="procrustes", num=19
    )
    angle = angle.similarity.clamp(max=1).arccos()
    for i, j, k in permutations(range(4), 3):
        assert angle[i, j] <= angle[i, k] + angle[k, j] + 1e-9
    found = procrustes(normal(0, 20, 3), normal(1, 20, 4), key=fs.key(0), num=19)
    assert float(found.angle.value) == pytest.approx(float(angle[0, 1]))
    assert float(found.angle.stderr) == pytest.approx(float(found.similarity.stderr / angle[0, 1].sin()))
    assert cka(normal(0, 20, 3), normal(1, 20, 4), key=fs.key(0), num=19).angle is None


def test_ragged_sequences_are_represented_by_drawn_rows():
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4, 5, 5, 5])
    x, y = related(1, 15)
    one = cka(x, y, groups, key=fs.key(0))
    assert (one.per_sequence, one.similarity.num, one.num_left_out) == (1, 6, 0)
    two = cka(x, y, groups, key=fs.key(0), per_sequence=2)
    assert (two.per_sequence, two.similarity.num, two.num_left_out) == (2, 5, 1)
    assert any("1 sequence with fewer rows" in note for note in two.notes)
    places = equal_rows(groups, fs.key(0), 2)
    assert (groups[places] == torch.tensor([0, 1, 2, 4, 5])[:, None]).all()
    assert (places[:, 1] > places[:, 0]).all()
    rows = places.flatten()
    expected = by_definition("debiased_cka", x[rows], y[rows])
    assert float(two.similarity.value) == pytest.approx(float(expected), rel=1e-9)
    drawn = torch.stack([equal_rows(groups, fs.key(i), 1)[:, 0] for i in range(600)])
    counts = torch.stack([(drawn == i).sum(0)[0] for i in range(3)])
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_what_is_undefined_is_nan_with_a_note():
    x, y = related(1, 12)
    alone = cka(x, y, torch.zeros(12, dtype=torch.long), key=fs.key(0))
    assert float(alone.similarity.value) == pytest.approx(float(by_definition("debiased_cka", x, y)))
    for value in (alone.p_value, alone.null_mean, alone.null_quantile, float(alone.similarity.stderr)):
        assert math.isnan(value)
    assert any("one sequence" in note for note in alone.notes)
    for name, measure in MEASURES.items():
        flat = measure(torch.ones(12, 3), y, key=fs.key(0), num=19)
        assert name == "neighbours" or math.isnan(float(flat.similarity.value)), name
    full = canonical_correlation(normal(0, 12, 30), y, key=fs.key(0), variance=1.0)
    assert math.isnan(float(full.similarity.value))
    assert math.isnan(full.p_value)
    assert any("every pairing is as similar" in note for note in full.notes)
    assert math.isnan(float(mutual_neighbours(x[:8], y[:8], key=fs.key(0), k=9).similarity.value))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y, k: cka(x * math.nan, y, key=k), "`x` must be finite"),
        (lambda x, y, k: cka(x, y, torch.ones(3, dtype=torch.long), key=k), "`groups` must name"),
        (lambda x, y, k: cka(x, y, key=k, num=18), "`num` must be"),
        (lambda x, y, k: cka(x, y, key=k, per_sequence=2), "`per_sequence` must be at most"),
        (lambda x, y, k: canonical_correlation(x, y, key=k, variance=0.0), "`variance` must be above 0"),
        (lambda x, y, k: mutual_neighbours(x, y, key=k, k=0), "`k` must be"),
        (lambda x, y, k: layer_similarity({}, key=k), "`layers` must map"),
        (lambda x, y, k: layer_similarity({"0": x}, {"1": y[:-1]}, key=k), r"`others\['1'\]` must have a row"),
        (lambda x, y, k: layer_similarity({"0": x[0]}, key=k), "must be a tensor of rows"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*related(0, 10), fs.key(0))
