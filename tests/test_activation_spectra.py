"""Ranks of activations. Oracles: the ranks of matrices, the jackknife written out, populations of known spectra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import problem, tokens
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.standard_errors import jackknife_stderr
from funcscope.linalg.ranks import matrix_ranks
from funcscope.representation import activation_spectra, moments_spectra
from funcscope.representation.spectrum import RANKS


def normal(seed, *shape):
    return fs.normal(fs.key(seed), torch.zeros(*shape, dtype=torch.float64))


def of(x, groups=None):
    found = activation_spectra({"x": x}, groups)
    return {name: float(getattr(found, name)) for name in RANKS}


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (2, 3)])
def test_ranks_are_those_of_the_centred_rows(shape):
    x = normal(0, *shape) + 5
    found, centred = of(x), x - x.mean(0)
    ranks = matrix_ranks(centred)
    assert found["effective_rank"] == pytest.approx(ranks.effective_rank)
    assert found["spectral_rank"] == pytest.approx(ranks.spectral_rank)
    assert found["participation_ratio"] == pytest.approx(ranks.participation_ratio)
    norms = torch.linalg.matrix_norm(centred), torch.linalg.matrix_norm(centred, 2)
    assert found["stable_rank"] == pytest.approx(float((norms[0] / norms[1]) ** 2))
    spectrum = activation_spectra({"x": x})
    expected = torch.linalg.eigvalsh(x.T.cov()).flip(0)
    assert_close(spectrum.eigenvalues[0], expected, rtol=1e-9, atol=1e-9)
    assert float(spectrum.total_variance) == pytest.approx(float(x.var(0).sum()))


def test_the_participation_ratio_is_of_eigenvalues():
    """Mistake 12: of the singular values (10, 1, 1, 1) it is 1.06; the same formula on themselves gives 1.64."""
    left = torch.linalg.qr(normal(0, 9, 4) - normal(0, 9, 4).mean(0)).Q
    sigma = torch.tensor([10.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    found = of(left * sigma)["participation_ratio"]
    assert found == pytest.approx(103**2 / 10003)
    assert round(found, 2) == 1.06
    assert round(float(sigma.sum() ** 2 / sigma.square().sum()), 2) == 1.64


def test_few_samples_of_equal_eigenvalues():
    """definitions.md: D / (1 + D / N), not D; debiased, D."""
    found = activation_spectra({str(i): normal(i, 60, 120) for i in range(6)})
    assert float(found.participation_ratio.mean()) == pytest.approx(120 / (1 + 120 / 60), rel=0.03)
    assert abs(float(found.debiased_participation_ratio.mean()) - 120) < 12
    assert any("fewer than units" in note for note in found.notes)
    assert not any("fewer than units" in note for note in activation_spectra({"x": normal(0, 60, 12)}).notes)


def test_errors_are_the_jackknife_over_sequences():
    groups = torch.arange(12).repeat_interleave(3)
    x = normal(0, 12, 1, 5).expand(12, 3, 5).flatten(0, 1) + 0.3 * normal(1, 36, 5)
    found = activation_spectra({"x": x}, groups)
    without = [of(x[groups != i]) for i in range(12)]
    tokens = activation_spectra({"x": x})
    for name in RANKS:
        expected = jackknife_stderr(torch.tensor([each[name] for each in without]))
        stderr = float(getattr(found, f"{name}_stderr"))
        assert stderr == pytest.approx(float(expected), rel=1e-5)
        assert float(getattr(tokens, f"{name}_stderr")) < 0.8 * stderr  # tokens are not independent


def test_many_sequences_are_left_out_in_blocks():
    x = normal(0, 100, 3)
    found = activation_spectra({"x": x})
    block = torch.arange(100) % 32
    without = torch.tensor([of(x[block != i])["participation_ratio"] for i in range(32)])
    assert float(found.participation_ratio_stderr) == pytest.approx(float(jackknife_stderr(without)), rel=1e-5)


def test_layers_are_each_by_itself_and_may_differ_in_width():
    layers = {"0": normal(0, 20, 3), "1": normal(1, 20, 7)}
    found = activation_spectra(layers)
    for i, x in enumerate(layers.values()):
        for name, value in of(x).items():
            assert float(getattr(found, name)[i]) == pytest.approx(value)
    assert found.eigenvalues.shape == (2, 7)
    assert found.eigenvalues[0, 3:].isnan().all()
    assert not found.eigenvalues[1].isnan().any()


def test_moments_of_a_corpus_give_the_same_ranks():
    net = fs.functional(problem("gpt2").model)
    batch = tokens(7, 6, 9, pad=4)
    sites = ["resid_post.0", "resid_post.1"]
    seen = fs.streamed(net, net.params, [batch], sites)
    found = moments_spectra(seen.moments)
    trace = fs.trace(net, net.params, batch, sites)
    rows = activation_spectra({name: trace[name][trace.mask].detach() for name in sites})
    for name in RANKS[:-1]:
        assert_close(getattr(found, name), getattr(rows, name), rtol=1e-5, atol=1e-6)
        assert getattr(found, f"{name}_stderr").isnan().all()
    assert found.debiased_participation_ratio.isnan().all()
    assert any("no errors" in note for note in found.notes)
    diagonal = fs.streamed(net, net.params, [batch], sites, diagonal=True)
    with pytest.raises(ValueError, match="diagonal=False"):
        moments_spectra(diagonal.moments)
    with pytest.raises(ValueError, match="must have a site"):
        moments_spectra({})


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32), scale=st.floats(1e-3, 1e3), dim=st.integers(1, 5))
def test_order_and_invariance(seed, scale, dim):
    x = normal(seed, 12, dim)
    moved = scale * x @ torch.linalg.qr(normal(seed + 1, dim, dim)).Q + 1
    one, other = of(x), of(moved)
    for name in RANKS:
        assert one[name] == pytest.approx(other[name], rel=1e-6)
    ordered = [one[name] for name in ("stable_rank", "participation_ratio", "spectral_rank", "effective_rank")]
    assert all(a <= b * (1 + 1e-12) for a, b in zip([1, *ordered], [*ordered, dim], strict=True))


def test_what_does_not_vary_has_no_ranks():
    found = activation_spectra({"x": torch.ones(5, 3)}, torch.zeros(5, dtype=torch.long))
    assert all(getattr(found, name).isnan().all() for name in RANKS)
    assert any("does not vary" in note for note in found.notes)
    assert any("one sequence" in note for note in found.notes)
    with pytest.raises(ValueError, match=r"`layers\['y'\]` must have a row"):
        activation_spectra({"x": torch.ones(5, 3), "y": torch.ones(4, 3)})


@pytest.mark.parametrize("value", [0.1, 2.7, 1 / 3])
@pytest.mark.parametrize("width", [3, 50])
def test_a_layer_that_does_not_vary_has_no_ranks_of_its_rounding(value, width):
    found = activation_spectra({"still": torch.full((33, width), value, dtype=torch.float64)})
    for name in (
        "participation_ratio",
        "spectral_rank",
        "effective_rank",
        "stable_rank",
        "debiased_participation_ratio",
    ):
        assert getattr(found, name).isnan().all()
    assert float(found.total_variance) == 0
    assert any("does not vary" in note for note in found.notes)
