"""Modularity: couplings against moments by hand and those of spectra, and graphs against Newman's formula."""

from __future__ import annotations

import sys

import pytest
import torch
from problems import seeded

import funcscope as fs
from funcscope.curvature import gram
from funcscope.curvature.gram import Grams
from funcscope.fisher import gram_spectrum
from funcscope.weights import block_coupling, modularity_score, weight_modularity


def normals(seed: int, *shape: int) -> torch.Tensor:
    return seeded(seed, lambda: torch.randn(*shape, dtype=torch.float64))


def grams(*blocks: torch.Tensor) -> Grams:
    """From gradients (samples, coordinates) of each block."""
    values = torch.stack([x @ x.T for x in blocks])
    return Grams(values, "sequence", 0, [], [f"b{i}" for i in range(len(blocks))])


@pytest.mark.parametrize(
    ("num", "naive"), [(8, 0.95), (32, 0.83), (128, 0.54), pytest.param(1024, 0.13, marks=pytest.mark.slow)]
)
def test_two_independent_blocks_are_coupled_by_few_samples_only(num, naive):
    """Corrections 2.11: 150 parameters each; what is reported measures the size of the sample unless it is debiased."""
    made, plain = [], []
    for seed in range(24 if num < 100 else 4):
        result = block_coupling(
            grams(normals(200 + seed, num, 150), normals(100 + seed, num, 150)), key=fs.key(0), num=1
        )
        plain.append(result.coupling_naive[0, 1])
        made.append(result.coupling[0, 1])
        if num >= 32:
            assert abs(float(result.coupling[0, 1])) < 3.5 * float(result.coupling_stderr[0, 1])
    assert float(torch.stack(plain).mean()) == pytest.approx(naive, abs=0.015)
    if num >= 32:
        assert abs(float(torch.stack(made).mean())) <= 0.02
    assert result.notes[-1].startswith("no modularity")


def test_couplings_are_from_pairs_of_different_samples_and_those_of_spectra():
    a = 1 + normals(20, 14, 4)
    b = torch.cat([a[:, :2], 1 + normals(21, 14, 1)], 1)
    result = block_coupling(grams(a, b), key=fs.key(0), num=1)
    n = len(a)

    def square(x, y):
        return sum(float(x[i] @ x[j]) * float(y[i] @ y[j]) for i in range(n) for j in range(n) if i != j)

    aa, ab, bb = square(a, a), square(a, b), square(b, b)
    assert float(result.coupling[0, 1]) == pytest.approx(ab / (aa * bb) ** 0.5)
    assert float(result.off_block_mass.value) == pytest.approx(2 * ab / (aa + 2 * ab + bb))
    fisher = torch.cat([a, b], 1).T @ torch.cat([a, b], 1)
    off = 2 * fisher[:4, 4:].square().sum() / fisher.square().sum()
    assert result.off_block_mass_naive == pytest.approx(float(off))
    spectrum = gram_spectrum(grams(a, b), key=fs.key(0), folds=0)
    torch.testing.assert_close(result.coupling, spectrum.coupling_debiased, equal_nan=True)
    torch.testing.assert_close(result.coupling_stderr, spectrum.coupling_debiased_stderr, equal_nan=True)
    torch.testing.assert_close(result.off_block_mass.stderr, spectrum.off_block_mass_debiased.stderr)


def two_pairs(num: int = 60) -> Grams:
    """Six blocks: the gradients of three have one factor in common, those of the other three another one."""
    factors = normals(30, num, 2)
    return grams(*(torch.cat([2 * factors[:, i // 3, None], 0.5 * normals(31 + i, num, 3)], 1) for i in range(6)))


def newman(weights: torch.Tensor, places: torch.Tensor) -> float:
    """A double loop over nodes."""
    total, degrees = float(weights.sum()), weights.sum(1)
    n = len(weights)
    return sum(
        float(weights[a, b] - degrees[a] * degrees[b] / total) / total
        for a in range(n) for b in range(n) if places[a] == places[b]
    )  # fmt: skip


def test_blocks_with_a_common_factor_are_a_community_and_the_modularity_is_newmans():
    result = block_coupling(two_pairs(), key=fs.key(0), num=39)
    assert result.community.tolist() == [0, 0, 0, 1, 1, 1]
    weights = result.coupling.clamp(min=0)
    weights = weights - weights.diagonal().diag()
    assert result.modularity == pytest.approx(newman(weights, result.community))
    assert result.modularity > result.null_quantile > result.null_mean > 0
    assert result.p_value < 0.2  # of 10 ways to put six blocks into two threes, one is this


def test_a_search_finds_communities_where_there_are_none():
    """All blocks have the same factor: couplings differ by chance alone, and so do permuted ones."""
    values = []
    for seed in range(12):
        factor = normals(40 + seed, 40, 1)
        same = grams(*(torch.cat([factor, normals(100 + 10 * seed + i, 40, 3)], 1) for i in range(6)))
        values.append(block_coupling(same, key=fs.key(seed), num=9).p_value)
    assert sum(p <= 0.1 for p in values) <= 4


def test_what_is_not_resolved_is_in_no_graph():
    factors = 1 + 0.3 * normals(30, 12, 1)
    blocks = [torch.cat([2 * factors, 0.3 * normals(31 + i, 12, 3)], 1) for i in range(3)]
    one_outlier = normals(50, 12, 40) * torch.tensor([100.0] + 11 * [1.0])[:, None]
    result = block_coupling(grams(*blocks, one_outlier), key=fs.key(0), num=3)
    assert result.community.isnan().tolist() == [False, False, False, True]
    assert result.coupling[3].isnan().all()
    assert "in b3" in result.notes[0]
    none = block_coupling(grams(one_outlier, one_outlier), key=fs.key(0), num=3)
    assert set(none.unresolved) == {"off_block_mass", "modularity", "null_mean", "null_quantile", "p_value"}


def classifier(copies: int = 0) -> fs.Loss:
    net = fs.functional(
        seeded(0, lambda: torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double())
    )
    x, y = normals(60, 12, 4), seeded(61, lambda: torch.randint(0, 3, (12,)))
    return fs.objective(net, [(torch.cat([x, x[:copies]]), torch.cat([y, y[:copies]]))], fs.classification)


def test_a_model_has_the_couplings_of_its_grams_and_copies_are_no_samples():
    loss = classifier()
    theta = loss.net.theta
    result = modularity_score(loss, theta, key=fs.key(0), by="tensor", num=3)
    oracle = block_coupling(gram(loss, theta, by="tensor"), key=fs.key(0), num=3)
    torch.testing.assert_close(result.coupling, oracle.coupling, equal_nan=True)
    copied = modularity_score(classifier(copies=5), theta, key=fs.key(0), by="tensor", num=3)
    torch.testing.assert_close(copied.coupling, result.coupling, equal_nan=True)
    assert (copied.num_sequences, copied.num_left_out) == (12, 5)
    assert copied.notes[0].startswith("5 sequences left out")
    assert result.modularity == pytest.approx(oracle.modularity, nan_ok=True)


def test_weights_in_parts_have_the_modularity_of_parts_and_random_ones_that_of_permuted_ones():
    dense = [normals(70, 12, 10).abs(), normals(71, 8, 12).abs()]
    random = weight_modularity(dense, key=fs.key(0), num=19)
    assert random.modularity > 0.05  # and yet there is nothing
    assert random.p_value > 0.05
    mask = [torch.block_diag(*2 * [torch.ones(6, 5)]), torch.block_diag(*2 * [torch.ones(4, 6)])]
    parted = [x * (0.1 + m) for x, m in zip(dense, mask, strict=True)]
    result = weight_modularity([-x for x in parted], key=fs.key(0), num=19)
    assert result.p_value == 0.05
    assert result.num_communities == 2
    adjacency = torch.zeros(30, 30, dtype=torch.float64)
    adjacency[10:22, :10], adjacency[22:, 10:22] = parted
    adjacency = adjacency + adjacency.T
    places = torch.tensor(5 * [0] + 5 * [1] + 6 * [0] + 6 * [1] + 4 * [0] + 4 * [1])
    assert result.modularity == pytest.approx(newman(adjacency, places))


def test_what_has_no_graph_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"got the shapes \[\(3, 2\), \(2, 4\)\]"):
        weight_modularity([torch.ones(3, 2), torch.ones(2, 4)], key=fs.key(0))
    with pytest.raises(ValueError, match="not 0"):
        weight_modularity([torch.zeros(3, 2)], key=fs.key(0))
    with pytest.raises(ValueError, match="three sequences at least, got 2"):
        block_coupling(grams(normals(0, 2, 3)), key=fs.key(0))
    with pytest.raises(ValueError, match=r"\(n, n\)"):
        block_coupling(Grams(normals(1, 1, 3, 4), "sequence", 0, [], ["all"]), key=fs.key(0))
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ModuleNotFoundError, match="pip install networkx"):
        weight_modularity([torch.ones(3, 2)], key=fs.key(0))
