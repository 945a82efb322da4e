"""The spectrum's summary against dense eigenvalues; blocks against the blocks of a dense matrix."""

import math

import numpy as np
import pytest
import torch
from problems import dense_hessian, loss_of

import funcscope as fs
from funcscope.curvature import block_slices, hessian_block_eigenvalues, hessian_block_traces, hessian_summary
from funcscope.curvature.summary import only
from funcscope.linalg import spectrum_summary


def spectrum(values):
    """A dense symmetric matrix with these eigenvalues, as a matvec."""
    values = torch.as_tensor(values, dtype=torch.float64)
    q = torch.linalg.qr(fs.normal(fs.key(0), torch.zeros(len(values), len(values), dtype=torch.float64)))[0]
    matrix = q @ values.diag() @ q.T
    return (lambda v: matrix @ v), torch.zeros(len(values), dtype=torch.float64)


def test_every_number_is_that_of_the_dense_spectrum():
    values = np.r_[np.linspace(-0.4, 0.4, 290), -3.0, -2.5, 4.0, 5.0, 7.0, 7.5, 9.0, 12.0, 15.0, 20.0]
    found = spectrum_summary(*spectrum(values), key=fs.key(1), num=2, tol=1e-6, num_probes=40, trace_matvecs=100)
    assert found.top_eigenvalues.tolist() == pytest.approx([20, 15])
    assert found.bottom_eigenvalues.tolist() == pytest.approx([-2.5, -3])
    assert (found.max_eigenvalue, found.min_eigenvalue, found.spectral_norm) == pytest.approx((20, -3, 20))
    frame = found.frame().set_index("quantity")
    assert frame.loc["top_eigenvalues", "rank"].tolist() == [1, 2]
    assert frame.loc["bottom_eigenvalues", "rank from below"].tolist() == [2, 1]  # the last is the smallest of all
    assert found.spectral_gap == pytest.approx(5)
    assert found.converged
    assert found.residuals.max() <= 2e-5
    assert found.has_negative_eigenvalues
    assert found.negative_curvature_ratio == pytest.approx(0.15)
    assert found.damping == pytest.approx(2e-5)
    assert found.condition_number == pytest.approx((20 + 2e-5) / 2e-5)
    assert abs(found.trace.value - values.sum()) < 4 * found.trace.stderr < 20
    size = np.abs(values) / np.abs(values).sum()
    rank = math.exp(-(size * np.log(size)).sum())
    assert abs(found.effective_rank.value - rank) < 4 * found.effective_rank.stderr < rank
    negative = found.negative_fraction
    assert abs(negative.value - (values < 0).mean()) < 4 * negative.stderr + 0.02
    assert found.num_matvecs == found.lanczos_iterations + 100 + 40 * 40


def test_a_largest_negative_eigenvalue_is_seen():
    """The documented Lanczos kept the algebraically largest values and looked for negative ones among these."""
    found = spectrum_summary(*spectrum(np.linspace(-5, 1, 60)), key=fs.key(0), num=3, tol=1e-8)
    assert found.has_negative_eigenvalues
    assert found.min_eigenvalue == pytest.approx(-5)
    assert found.spectral_norm == pytest.approx(5)
    assert float(found.negative_fraction.value) == pytest.approx(5 / 6, abs=0.05)


def test_a_semidefinite_matrix_has_no_negative_eigenvalues_and_a_damped_condition():
    values = np.r_[np.zeros(50), np.linspace(1, 2, 50)]
    found = spectrum_summary(*spectrum(values), key=fs.key(0), num=1, damping=0.5)
    assert not found.has_negative_eigenvalues
    assert float(found.negative_fraction.value) == 0
    assert found.condition_number == pytest.approx(2.5 / 0.5, rel=1e-2)
    assert math.isnan(found.spectral_gap)  # one value per end
    below = spectrum_summary(*spectrum(-values - 1), key=fs.key(0), num=1)
    assert math.isnan(below.condition_number)
    assert math.isnan(below.negative_curvature_ratio)


def test_it_has_the_documented_names():
    found = spectrum_summary(*spectrum(np.linspace(1, 9, 30)), key=fs.key(0), num=2)
    documented = {
        "top_eigenvalues", "max_eigenvalue", "min_eigenvalue", "condition_number", "trace", "spectral_gap",
        "has_negative_eigenvalues", "negative_fraction", "effective_rank", "lanczos_iterations", "residuals", "converged",
    }  # fmt: skip
    values = found.asdict()
    assert documented <= values.keys()
    assert values["trace"] == pytest.approx(150)  # more products than coordinates: exact
    assert values["trace_stderr"] == 0


def test_a_budget_that_is_too_small_is_said():
    found = spectrum_summary(*spectrum(np.linspace(-1, 1, 400)), key=fs.key(0), num=3, tol=1e-9, max_matvecs=8)
    assert not found.converged
    assert "NOT all converged" in str(found)


@pytest.mark.slow
def test_hessian_summary_is_that_of_the_dense_hessian():
    loss = loss_of("mlp")
    theta = loss.net.theta
    dense = torch.linalg.eigvalsh(dense_hessian(loss, theta)).flip(0)
    found = hessian_summary(loss, theta, key=fs.key(0), num=3, tol=1e-8)
    torch.testing.assert_close(found.ends.values, torch.cat([dense[:3], dense[-3:]]), rtol=1e-7, atol=1e-9)
    assert float(found.trace.value) == pytest.approx(float(dense.sum()))
    semidefinite = hessian_summary(loss, theta, key=fs.key(0), num=3, matrix="ggn", keep=False)
    assert semidefinite.min_eigenvalue > -1e-12
    with pytest.raises(ValueError, match="both"):
        hessian_summary(loss, theta, key=fs.key(0), num=30)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["tensor", "layer", "module"])
def test_block_traces_are_those_of_the_dense_blocks(by):
    loss = loss_of("mlp")
    theta = loss.net.theta
    dense = dense_hessian(loss, theta)
    found = hessian_block_traces(loss, theta, key=fs.key(2), by=by, num=400)
    slices = block_slices(loss.layout, by)
    assert sum(s.stop - s.start for block in slices.values() for s in block) == len(theta)
    for name, estimate in found.estimates.items():
        exact = sum(dense.diagonal()[s].sum() for s in slices[name])
        assert abs(estimate.value - exact) < 4 * estimate.stderr
    total = sum(estimate.value for estimate in found.estimates.values())
    assert float(total) == pytest.approx(float(found.total.value))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "gpt2"])
@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_block_eigenvalues_are_those_of_the_dense_blocks(name, matrix):
    loss = loss_of(name)
    theta = loss.net.theta
    wanted = {"mlp": ["0", "2"], "gpt2": ["transformer.h.1", "transformer.ln_f"]}[name]
    layers = loss.layout.group_of("layer")
    found = hessian_block_eigenvalues(
        loss,
        theta,
        key=fs.key(0),
        num=2,
        matrix=matrix,
        tol=1e-7,
        max_matvecs=400,
        by=lambda leaf: layers[leaf] if layers[leaf] in wanted else "rest",
    )
    whole = fs.curvature.hessian(loss, theta) if matrix == "hessian" else fs.curvature.ggn(loss, theta)
    for block in wanted:
        at = [i for s in block_slices(loss.layout, "layer")[block] for i in range(s.start, s.stop)]
        at = at if len(at) < 40 or name == "mlp" else None
        if at is None:
            continue  # the large block: below, by its residual
        eye = torch.zeros(len(at), len(theta), dtype=torch.float64)
        eye[range(len(at)), at] = 1
        with torch.no_grad():
            dense = torch.stack([whole(row)[at] for row in eye])
        values = torch.linalg.eigvalsh((dense + dense.T) / 2)
        top = values[values.abs().argsort(descending=True)[:2]].sort(descending=True).values
        torch.testing.assert_close(found[block].values, top, rtol=1e-6, atol=1e-10)
    assert all(pairs.converged.all() for pairs in found.values())


def test_the_loss_of_some_parameters_is_the_loss():
    loss = loss_of("gpt2")
    theta = loss.net.theta * 1.5
    part = only(loss, theta, ["transformer.h.0.attn.c_attn.weight", "transformer.wpe.weight"])
    assert part.layout.names == ("transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight")
    torch.testing.assert_close(part(part.net.theta), loss(theta))
    assert part.layout.num == sum(x.numel() for x in part.net.params.values()) < loss.layout.num
    with pytest.raises(ValueError, match="not among"):
        only(loss, theta, ["nothing"])


def test_an_end_that_is_not_converged_says_so_beside_its_residual():
    matvec, like = spectrum(np.linspace(-1, 1, 400))
    early = spectrum_summary(matvec, like, key=fs.key(0), num=1, tol=1e-9, max_matvecs=6)
    assert {"max_eigenvalue", "min_eigenvalue"} <= set(early.unresolved)
    assert "not converged" in str(early)
    assert abs(early.max_eigenvalue - 1) <= early.max_residual  # an eigenvalue lies within the residual
    assert early.max_residual == float(early.ends.residuals[0])
    late = spectrum_summary(*spectrum(np.r_[np.zeros(50), 3.0]), key=fs.key(0), num=1)
    assert "max_eigenvalue" not in late.unresolved
