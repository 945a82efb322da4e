"""Oracle: the dense Fisher information of a small classifier, and of softmax regression by hand."""

import pytest
import torch
from problems import loss_of, seeded
from torch import nn

import funcscope as fs
from funcscope.curvature import exact_fisher
from funcscope.fisher import compare_methods
from funcscope.fisher.methods import METHODS
from funcscope.linalg import dense


def test_every_method_approximates_the_fisher_information():
    loss = loss_of("mlp")
    theta = loss.net.theta
    fisher = dense(exact_fisher(loss, theta), theta)
    made = compare_methods(loss, theta, key=fs.key(0), num=40, num_directions=5, rank=4)
    values = torch.linalg.eigvalsh(fisher)
    by = {name: i for i, name in enumerate(made.methods)}
    assert made.methods == list(METHODS)
    for name in ("lanczos", "diagonal", "kfac", "ekfac"):
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
