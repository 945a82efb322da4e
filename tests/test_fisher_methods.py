"""Oracle: the dense Fisher information of a small classifier, and of softmax regression by hand."""

import pytest
import torch
from problems import loss_of, seeded
from torch import nn
from torch.testing import assert_close

import funcscope as fs
from funcscope.curvature import exact_fisher
from funcscope.curvature.kfac_factors import scored_losses
from funcscope.fisher import compare_methods
from funcscope.fisher.methods import METHODS
from funcscope.linalg import dense


@pytest.mark.slow
def test_every_method_approximates_the_fisher_information():
    loss = loss_of("mlp")
    theta = loss.net.theta
    fisher = dense(exact_fisher(loss, theta), theta)
    made = compare_methods(loss, theta, key=fs.key(0), num=16, num_directions=5, rank=4)
    values = torch.linalg.eigvalsh(fisher)
    by = {name: i for i, name in enumerate(made.methods)}
    assert made.methods == list(METHODS)
    for name in METHODS:
        at = by[name]
        assert abs(made.trace[at] - fisher.trace()) < 4 * made.trace_stderr[at], name
    assert abs(made.max_eigenvalue[by["lanczos"]] - values[-1]) < 1e-3 * values[-1]
    assert made.max_eigenvalue[by["diagonal"]] < values[-1]
    assert made.disagreement[by["ekfac"]] < made.disagreement[by["diagonal"]]
    assert (made.disagreement >= 0).all()
    assert (made.seconds > 0).all()


def test_the_gram_of_drawn_labels_is_unbiased():
    loss = loss_of("mlp")
    theta = loss.net.theta
    fisher = dense(exact_fisher(loss, theta), theta)
    traces = torch.stack(
        [
            compare_methods(loss, theta, key=fs.key(i), num=1, num_directions=1, rank=1, methods=("gram",)).trace[0]
            for i in range(12)
        ]
    )
    assert abs(traces.mean() - fisher.trace()) < 4 * traces.std() / 12**0.5


def test_the_grams_errors_are_over_draws_at_these_data_and_over_sequences_by_loops():
    loss = loss_of("mlp")
    theta, key = loss.net.theta, fs.key(3)
    made = compare_methods(loss, theta, key=key, num=3, num_directions=2, rank=1, methods=("gram", "kfac"))
    drawn = scored_losses(loss, theta, fs.fold_in(key, "gram"), "model", 3)[1]
    squares = torch.stack([fs.per_sample_gradients(one, theta).square().sum(1) for one in drawn])
    n = squares.shape[1]
    assert_close(made.trace[0], squares.mean(0).sum() / n)
    assert_close(made.trace_stderr[0], squares.mean(1).std() / 3**0.5)
    assert_close(made.trace_data_stderr[0], squares.mean(0).std() / n**0.5)
    assert made.trace_data_stderr[1].isnan()
    assert "trace_data_stderr" not in str(made)
    assert any("a bias that more draws do not remove" in note for note in made.notes)
    alone = compare_methods(loss, theta, key=key, num=1, num_directions=1, methods=("gram", "diagonal"))
    assert alone.trace_stderr.isnan().all()
    assert "over draws of labels or probes at these data" in alone.notes[0]


@pytest.mark.slow
def test_the_trace_of_kfac_has_a_bias_that_more_draws_do_not_remove_and_that_of_ekfac_has_none():
    """Inputs that say how sure the model is."""
    net = fs.functional(seeded(0, lambda: nn.Linear(2, 2)).double())
    x = torch.tensor([[0.1, 0.0], [4.0, 0.0]], dtype=torch.float64).repeat(200, 1)
    loss = fs.objective(net, [(x, torch.zeros(400, dtype=torch.long))], fs.classification)
    made = compare_methods(loss, net.theta, key=fs.key(0), num=6, num_directions=1, methods=("kfac", "ekfac"))
    exact = dense(exact_fisher(loss, net.theta), net.theta).trace()
    off = (made.trace - exact).abs() / made.trace_stderr
    assert off[0] > 6
    assert off[1] < 3


@pytest.mark.slow
def test_errors_of_all_traces_are_what_other_draws_at_these_data_have():
    loss = loss_of("mlp")
    methods = ("diagonal", "kfac", "gram")
    made = [
        compare_methods(loss, loss.net.theta, key=fs.key(i), num=4, num_directions=1, methods=methods)
        for i in range(60)
    ]
    spread = torch.stack([each.trace for each in made]).std(0)
    claimed = torch.stack([each.trace_stderr for each in made]).square().mean(0).sqrt()
    assert bool(((claimed / spread > 0.8) & (claimed / spread < 1.25)).all()), claimed / spread
    over_data = torch.stack([each.trace_data_stderr[2] for each in made]).mean()
    assert abs(over_data / spread[2] - 1) > 0.25  # negative control: another error


@pytest.mark.slow
def test_one_matrix_that_kfac_has_exactly():
    """One linear layer and one datum: F is x x' (x) (diag p - p p')."""
    net = fs.functional(seeded(0, lambda: nn.Linear(3, 4)).double())
    x = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    loss = fs.objective(net, [(x, torch.tensor([1]))], fs.classification)
    made = compare_methods(
        loss, net.theta, key=fs.key(0), num=100, num_directions=1, rank=3, methods=("lanczos", "kfac")
    )
    p = net.apply(net.params, x)[0].softmax(0)
    trace = (p.diag() - p.outer(p)).trace() * (x.square().sum() + 1)
    assert abs(made.trace[1] - trace) < 4 * made.trace_stderr[1]
    assert made.disagreement[0] < 1e-3
    assert made.disagreement[1] < 0.5


def test_a_method_that_does_not_exist():
    loss = loss_of("mlp")
    with pytest.raises(ValueError, match="num_directions"):
        compare_methods(loss, loss.net.theta, key=fs.key(0), num_directions=0)
