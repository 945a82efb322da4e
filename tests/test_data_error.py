"""Errors over data: per-sequence forms against dense Hessians and value differences, leave-one-out eigenvalues, coverage."""

import dataclasses
import math

import pytest
import torch
from problems import dense_hessian, infinitesimal_jackknife, loss_of, mlp, problem, seeded
from torch import nn
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.standard_errors import ratio_interval, ratio_stderr
from funcscope.curvature import hessian_summary
from funcscope.curvature.rows import micro_batches
from funcscope.curvature.sequence_forms import SequenceForms
from funcscope.study.analyze import analyze_models
from funcscope.study.config import UnifiedConfig
from funcscope.study.measures import fisher_information
from funcscope.study.sources import InMemory

OPERATORS = {"hessian": fs.hessian, "ggn": fs.ggn}


def population(num, seed=0):
    """Points of three classes, some of them hard, and a network."""
    x = fs.normal(fs.fold_in(fs.key(seed), "x"), torch.zeros(num, 4, dtype=torch.float64))
    y = (x[:, 0] + 0.7 * fs.normal(fs.fold_in(fs.key(seed), "y"), x[:, 0]) > 0).long() + (x[:, 1] > 1).long()
    return x, y, fs.functional(seeded(3, mlp).double())


def top(loss, num=2, **options):
    theta = loss.net.theta
    return fs.eigenpairs(
        fs.hessian(loss, theta), theta, key=fs.key(1), num=num, which="largest", tol=1e-9, vectors=True
    )


@pytest.fixture(scope="module")
def sampled():
    x, y, net = population(60)
    return fs.objective(net, (x, y), fs.classification)


@pytest.mark.parametrize("name", ["gpt2", "mlp", "cnn"])
def test_every_sequence_has_the_second_difference_of_its_own_loss(name):
    """The judge is values: a fourth-order difference of `terms` along the vector."""
    loss = loss_of(name)
    theta = loss.net.theta
    v = fs.normal(fs.key(1), theta)
    v /= v.norm()
    h = 2e-3
    f = {a: loss.terms(theta + a * h * v)[0] for a in (-2, -1, 0, 1, 2)}
    second = (16 * (f[1] + f[-1]) - f[2] - f[-2] - 30 * f[0]) / (12 * h**2)
    forms = fs.sequence_forms(loss, theta, v[None])
    assert_close(forms.terms[0], second, rtol=1e-5, atol=1e-6)
    alone = fs.sequence_forms(loss, theta, v[None], chunk_size=1)
    assert_close(alone.terms, forms.terms, rtol=1e-9, atol=1e-10)
    scored = loss.terms(theta)[1]
    assert torch.equal(forms.weights, scored)
    assert_close(float(forms.stderr[0]), infinitesimal_jackknife(second, scored.double()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("matrix", OPERATORS)
@pytest.mark.parametrize("name", ["bert", "cnn"])
def test_sequences_add_up_to_the_operator(name, matrix):
    loss = loss_of(name)
    theta = loss.net.theta
    v = torch.stack([fs.normal(fs.fold_in(fs.key(2), i), theta) for i in range(2)])
    product = OPERATORS[matrix](loss, theta)
    whole = torch.stack([x @ product(x) for x in v])
    for chunk in (1, None):
        forms = fs.sequence_forms(loss, theta, v, matrix=matrix, chunk_size=chunk)
        assert_close(forms.values, whole, rtol=1e-7, atol=1e-9)


def test_groups_of_sequences_are_the_sums_of_their_sequences():
    x, y, net = population(300)
    loss = fs.objective(net, [(x[:290], y[:290]), (x[290:], y[290:])], fs.classification)
    v = fs.normal(fs.key(0), net.theta)[None]
    single = fs.sequence_forms(loss, net.theta, v, group=1)
    grouped = fs.sequence_forms(loss, net.theta, v)
    assert (single.terms.shape[1], grouped.group, grouped.terms.shape[1]) == (300, 3, 97 + 4)
    sums = torch.stack([part.sum() for part in single.terms[0, :290].split(3)])
    assert_close(grouped.terms[0, :97], sums, rtol=1e-9, atol=1e-10)
    assert_close(grouped.values, single.values)
    assert_close(grouped.stderr, single.stderr, rtol=0.25, atol=0)
    assert not single.paired_with(grouped)
    pairs = top(loss)
    by_group, alone = (fs.eigenvalue_errors(loss, net.theta, pairs, group=group) for group in (None, 1))
    assert_close(by_group.stderr, alone.stderr, rtol=0.25, atol=0)
    assert_close(by_group.bias, alone.bias, rtol=0.25, atol=0)


def test_a_sequence_without_a_scored_token_is_no_sample():
    model, batches, criterion = problem("gpt2")
    net = fs.functional(model)
    silent = {"input_ids": batches[1]["input_ids"], "labels": torch.full_like(batches[1]["input_ids"], -100)}
    v = fs.normal(fs.key(0), net.theta)[None]
    whole, more = (
        fs.sequence_forms(fs.objective(net, b, criterion), net.theta, v) for b in (batches, [*batches, silent])
    )
    assert_close(more.terms, whole.terms)
    assert_close(more.stderr, whole.stderr)


def test_the_error_is_that_of_eigenvalues_of_dense_hessians_with_one_sequence_left_out(sampled):
    """What the jackknife of the eigenvalue itself says, sixty dense eigenproblems, is the first order up to the second."""
    loss, theta = sampled, sampled.net.theta
    found = fs.eigenvalue_errors(loss, theta, top(loss))
    dense = [dense_hessian(part, theta) for part in micro_batches(loss, 1)]
    whole = torch.stack(dense).mean(0)
    assert_close(found.values, torch.linalg.eigvalsh(whole).flip(0)[:2], rtol=1e-8, atol=0)
    left = torch.stack([torch.linalg.eigvalsh((60 * whole - H) / 59).flip(0)[:2] for H in dense])
    jackknife = (59 / 60 * (left - left.mean(0)).square().sum(0)).sqrt()
    assert_close(found.stderr, jackknife, rtol=0.1, atol=0)
    assert (found.stderr > 0.03 * found.values).all()
    bias = 59 * (left.mean(0) - found.values)  # the jackknife's own estimate of the bias
    assert_close(-bias[0], -found.bias[0], rtol=0.6, atol=0)
    assert found.bias[0] > 0


def test_the_gauss_newton_matrix_has_errors_too(sampled):
    theta = sampled.net.theta
    pairs = fs.eigenpairs(fs.ggn(sampled, theta), theta, key=fs.key(1), num=2, tol=1e-8, vectors=True)
    found = fs.eigenvalue_errors(sampled, theta, pairs, matrix="ggn")
    assert_close(found.forms.values, pairs.values, rtol=1e-7, atol=0)


def test_where_the_second_order_is_not_below_the_first_there_is_no_interval(sampled):
    """The smallest eigenvalues of a semidefinite matrix are 0: what couples them to the rest is no small change."""
    theta = sampled.net.theta
    ends = fs.eigenpairs(fs.ggn(sampled, theta), theta, key=fs.key(1), num=2, which="both", tol=1e-9, vectors=True)
    found = fs.eigenvalue_errors(sampled, theta, ends, matrix="ggn")
    assert found.first_order.tolist()[0]
    assert not found.first_order[-1]
    assert found.intervals()[-1].isnan().all()
    low, high = found.intervals()[found.first_order].T
    assert (low < high).all()
    gap = fs.compare_eigenvalues(found, found)
    assert gap.intervals()[-1].isnan().all()
    assert not gap.resolved[-1]


def test_rows_that_are_coupled_by_statistics_of_the_batch_are_refused():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = seeded(0, mlp).double()

        def forward(self, x):
            out = self.inner(x)
            return out - out.mean(0)

    x, y, _ = population(6)
    loss = fs.objective(fs.functional(Centred()), (x, y), fs.classification)
    with pytest.raises(ValueError, match="coupled"):
        fs.trace_errors(loss, loss.net.theta, key=fs.key(0), num=2)
    fs.trace_errors(loss, loss.net.theta, key=fs.key(0), num=2, check=False)  # the control: the check refuses


def test_two_models_are_compared_in_pairs_over_the_same_sequences(sampled):
    net, x, y = sampled.net, *population(60)[:2]
    near = net.theta * 1.02
    other = fs.objective(net, (x, y), fs.classification)
    first = fs.eigenvalue_errors(sampled, net.theta, top(sampled, 1))
    pairs = fs.eigenpairs(fs.hessian(other, near), near, key=fs.key(1), num=1, which="largest", tol=1e-9, vectors=True)
    second = fs.eigenvalue_errors(other, near, pairs)
    found = fs.compare_eigenvalues(first, second)
    assert found.paired
    assert_close(found.values, second.values - first.values)
    terms = second.forms.terms[0] - first.forms.terms[0]
    assert_close(found.stderr[0], terms.std() / 60**0.5)
    assert float(found.stderr[0]) < 0.2 * math.hypot(float(first.stderr[0]), float(second.stderr[0]))
    half = fs.objective(net, (x[:30], y[:30]), fs.classification)
    apart = fs.compare_eigenvalues(first, fs.eigenvalue_errors(half, net.theta, top(half, 1)))
    assert not apart.paired
    assert float(apart.stderr[0]) > float(first.stderr[0])
    assert not bool(apart.resolved[0])
    assert "not resolved" in str(apart)
    assert "paired" in str(found)


def test_the_trace_is_hutchinsons_with_an_error_that_more_probes_do_not_take_away(sampled):
    theta = sampled.net.theta
    few, many = (fs.trace_errors(sampled, theta, key=fs.key(5), num=num) for num in (4, 64))
    plain = fs.hutchinson_trace(fs.hessian(sampled, theta), theta, key=fs.key(5), num=4)
    assert_close(float(few.trace.value), float(plain.value), rtol=1e-9, atol=0)
    assert_close(float(few.trace.stderr), float(plain.stderr), rtol=1e-9, atol=0)
    dense = torch.stack([dense_hessian(part, theta).trace() for part in micro_batches(sampled, 1)])
    whole = float(dense.std() / 60**0.5)  # and 1/64 of the interaction
    assert_close(float(many.trace.stderr_data), whole, rtol=0.25, atol=0)
    assert many.trace.stderr < 0.5 * few.trace.stderr
    assert max(many.trace.stderr, many.trace.stderr_data) <= many.trace.stderr_total
    assert many.trace.stderr_total <= math.hypot(many.trace.stderr, many.trace.stderr_data)
    same = few.minus(few)
    assert (float(same.value), float(same.stderr)) == (0, 0)
    with pytest.raises(ValueError, match="in pairs"):
        few.minus(many)


def test_the_joint_error_of_a_mean_over_vectors_and_sequences_counts_their_interaction_once():
    """Crossed random effects of known variances: the mean square of the error is the closed form."""
    k, n, sv, ss, svs = 12, 20, 1.0, 2.0, 6.0
    squares, joint = [], []
    for i in range(200):
        draw = [fs.fold_in(fs.fold_in(fs.key(9), i), name) for name in ("v", "s", "vs")]
        v, s = (fs.normal(draw[j], torch.zeros(size, dtype=torch.float64)) for j, size in ((0, k), (1, n)))
        table = sv * v[:, None] + ss * s + svs * fs.normal(draw[2], torch.zeros(k, n, dtype=torch.float64))
        mean = SequenceForms(table, torch.ones(n, dtype=torch.float64)).mean
        squares.append(float(mean.value) ** 2)
        joint.append(float(mean.stderr_total) ** 2)
    exact = sv**2 / k + ss**2 / n + svs**2 / (k * n)
    assert_close(sum(joint) / 200, exact, rtol=0.15, atol=0)
    assert_close(sum(squares) / 200, exact, rtol=0.25, atol=0)
    twice = exact + svs**2 / (k * n)  # negative control: a plain sum of the two would be off by this
    assert twice > 1.3 * exact


def test_one_sequence_has_no_error(sampled):
    net, x, y = sampled.net, *population(60)[:2]
    one = fs.objective(net, (x[:1], y[:1]), fs.classification)
    found = fs.eigenvalue_errors(one, net.theta, top(one, 1))
    assert math.isnan(float(found.stderr[0]))
    assert found.intervals().isnan().all()
    assert math.isnan(fs.trace_errors(one, net.theta, key=fs.key(0), num=2).trace.stderr_data)


def test_a_ratio_has_the_t_interval_of_a_certain_denominator_and_none_where_it_may_be_0():
    a = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    low, high = ratio_interval(a, torch.full_like(a, 2.0))
    half = 3.1824463 * float(a.std()) / 2 / 2
    assert_close((low, high), (2 - half, 2 + half), rtol=1e-6, atol=0)
    b = torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    assert all(math.isnan(end) for end in ratio_interval(a, b))
    assert all(math.isnan(end) for end in ratio_interval(a[:1], a[:1]))
    assert bool(ratio_stderr(a[:1], a[:1]).isnan())


@pytest.mark.slow
def test_the_interval_covers_the_population_and_the_bias_is_what_is_estimated():
    """200 samples of 40 out of 4,000 sequences."""
    x, y, net = population(4000, seed=2)
    whole = fs.objective(net, (x, y), fs.classification)
    truth = float(torch.linalg.eigvalsh(dense_hessian(whole, net.theta))[-1])
    hits, values, biases = 0, [], []
    for i in range(200):
        rows = seeded(1000 + i, lambda: torch.randperm(4000)[:40])
        loss = fs.objective(net, (x[rows], y[rows]), fs.classification)
        found = fs.eigenvalue_errors(loss, net.theta, top(loss, 3))
        low, high = found.intervals()[0].tolist()
        hits += low <= truth <= high
        values.append(float(found.values[0]))
        biases.append(float(found.bias[0]))
    v, b = (torch.tensor(x, dtype=torch.float64) for x in (values, biases))
    assert 180 <= hits <= 199
    excess, error = float(v.mean()) - truth, float(v.std()) / 200**0.5
    assert excess > 2 * error  # the top eigenvalue of a sample is biased upwards
    assert abs(excess - float(b.mean())) < 3 * error + 0.5 * excess


@pytest.mark.slow
def test_the_joint_interval_covers_the_trace_of_the_population():
    x, y, net = population(4000, seed=2)
    truth = float(dense_hessian(fs.objective(net, (x, y), fs.classification), net.theta).trace())
    hits = alone = 0
    for i in range(200):
        rows = seeded(1000 + i, lambda: torch.randperm(4000)[:12])
        loss = fs.objective(net, (x[rows], y[rows]), fs.classification)
        mean = fs.trace_errors(loss, net.theta, key=fs.fold_in(fs.key(12), i), num=64, check=False).trace
        hits += abs(mean.value - truth) < 2.2 * mean.stderr_total
        alone += abs(mean.value - truth) < 2.2 * mean.stderr
    assert 180 <= hits <= 198
    assert alone < 170  # negative control: the error over probes alone does not cover


@pytest.mark.slow
def test_a_float64_model_that_takes_norms_in_float32_is_held_to_float32():
    loss = loss_of("llama")
    theta = loss.net.theta + 0.3 * seeded(1, lambda: torch.randn(loss.layout.num, dtype=torch.float64))
    pairs = fs.eigenpairs(fs.hessian(loss, theta), theta, key=fs.key(0), num=1, which="both", tol=1e-9, vectors=True)
    exact = dataclasses.replace(pairs, residuals=0 * pairs.residuals)  # as of an iteration that went on to the end
    errors = fs.eigenvalue_errors(loss, theta, exact)
    assert_close(errors.forms.values, pairs.values, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="add up to"):  # what is off by more is refused as before
        fs.eigenvalue_errors(loss, theta, dataclasses.replace(exact, values=pairs.values * 1.01))


@pytest.mark.slow
def test_noise_of_float32_in_a_float64_model_makes_no_negative_eigenvalues():
    loss = loss_of("llama")
    theta = loss.net.theta + 0.3 * seeded(1, lambda: torch.randn(loss.layout.num, dtype=torch.float64))
    fisher = hessian_summary(loss, theta, key=fs.key(0), num=1, matrix="ggn", num_probes=2, steps=60, trace_matvecs=8)
    assert fisher.density.rounding == 2**-11.5
    assert float(fisher.negative_fraction.value) == 0
    same = fisher_information(loss, theta, key=fs.key(0), num=1, num_probes=2, steps=60, trace_matvecs=8)
    assert same.density.rounding == 2**-11.5
    assert float(same.negative_fraction.value) == 0


@pytest.mark.slow
def test_a_loss_in_memory_on_one_task_has_a_landscape_and_a_fisher_information(tmp_path):
    source = InMemory({"data": loss_of("mlp")}, name="one")
    sizes = {"loss_landscape_n_points": 3, "fisher_top_k": 2, "output_dir": str(tmp_path), "verbose": False}
    study = analyze_models([source], UnifiedConfig(metrics=("loss_landscape_2d", "fisher_information"), **sizes))
    assert not study.failed, study
