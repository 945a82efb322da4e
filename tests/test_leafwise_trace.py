"""Traces by probes that exist a leaf at a time. Oracles: the dense probe on the dense matrix; products; closed forms."""

from __future__ import annotations

import pytest
import torch
from problems import seeded, tokens
from test_architectures import labelled, model_of
from torch import nn
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.leaf_rows import joined
from funcscope.curvature.leafwise_trace import _Signs

MAKERS = {"hessian": fs.hessian, "ggn": fs.ggn}


def text(line="gpt2", **options):
    net = fs.functional(model_of(line, torch.float64), **options)
    return fs.objective(net, [labelled(line, tokens(1, 3, 9, pad=3)), labelled(line, tokens(2, 2, 5))], fs.causal_lm)


def probe(loss, j):
    signs = _Signs(loss.layout, fs.fold_in(fs.key(0), j), torch.device("cpu"))
    return torch.cat([joined(signs.parts(name)).reshape(-1) for name in loss.layout.names])


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_forms_are_those_of_the_operator_and_add_up_over_sequences(matrix):
    loss = text()
    theta = loss.net.theta
    found = fs.curvature.leafwise_trace(loss, loss.net.params, key=fs.key(0), num=3, matrix=matrix)
    product = MAKERS[matrix](loss, theta)
    probes = torch.stack([probe(loss, j) for j in range(3)])
    assert set(probes.unique().tolist()) == {-1.0, 1.0}
    oracle = torch.stack([z @ product(z) for z in probes])
    assert_close(found.forms.values, oracle, rtol=1e-9, atol=1e-10)
    by_sequence = fs.curvature.sequence_forms(loss, theta, probes, matrix=matrix)
    assert_close(found.forms.terms, by_sequence.terms, rtol=1e-8, atol=1e-9)
    assert torch.equal(found.forms.weights, by_sequence.weights)
    assert float(found.trace.value) == pytest.approx(float(oracle.mean()), rel=1e-9)


def test_a_vector_and_the_stored_parameters_give_the_same():
    loss = text("llama", attention="blocks", remat="layer")
    one, other = (
        fs.curvature.leafwise_trace(loss, point, key=fs.key(1), num=2) for point in (loss.net.params, loss.net.theta)
    )
    assert_close(one.forms.terms, other.forms.terms, rtol=1e-6, atol=1e-6)
    whole = fs.curvature.leafwise_trace(text("llama"), loss.net.params, key=fs.key(1), num=2)
    assert_close(one.forms.terms, whole.forms.terms, rtol=1e-6, atol=1e-5)


def test_signs_are_exact_on_a_diagonal_and_bad_input_is_named():
    net = fs.functional(seeded(0, lambda: nn.Linear(3, 1, bias=False)).double())
    square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2)
    loss = fs.objective(net, [(torch.eye(3).double(), torch.zeros(3, 1).double())], square)
    for matrix in ("hessian", "ggn"):
        found = fs.curvature.leafwise_trace(loss, net.params, key=fs.key(0), num=4, matrix=matrix)
        assert found.forms.values.tolist() == pytest.approx([2.0] * 4)
        assert float(found.trace.stderr) == pytest.approx(0)
    with pytest.raises(ValueError, match="`num` must"):
        fs.curvature.leafwise_trace(loss, net.params, key=fs.key(0), num=0)
    nan = {name: torch.full_like(value, torch.nan) for name, value in net.params.items()}
    with pytest.raises(ValueError, match="6 of 6 forms, of 2 probes and 3 sequences, are not finite"):
        fs.curvature.leafwise_trace(loss, nan, key=fs.key(0), num=2)
    summed = fs.objective(
        net, [(torch.eye(3).double(), torch.zeros(1).double())], fs.custom(lambda out, y: out.sum() + y)
    )
    with pytest.raises(ValueError, match="a row for each"):
        fs.curvature.leafwise_trace(summed, net.params, key=fs.key(0), matrix="ggn")
