"""Other people's libraries as oracles: the same matrices by curvlinops and hessian-eigenthings (bench/install_peers.sh)."""

import pytest
import torch
from problems import gpt2, mlp, relative, seeded, tokens
from torch import nn

import funcscope as fs

pytestmark = [pytest.mark.outsider, pytest.mark.filterwarnings("ignore")]


class Logits(nn.Module):
    """The scored logits of a causal model, one row per token that has a successor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).logits[:, :-1].flatten(0, 1)


def language_model():
    model = seeded(0, gpt2).double().eval()
    model.set_attn_implementation("eager")
    ids = tokens(3, 3, 6)["input_ids"]
    return model, ids, fs.objective(fs.functional(model), {"input_ids": ids}, fs.causal_lm)


def test_gauss_newton_and_hessian_are_those_of_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    model, ids, loss = language_model()
    scored, theta = Logits(model), loss.net.theta
    arguments = (scored, nn.CrossEntropyLoss(), list(scored.parameters()), [(ids, ids[:, 1:].flatten())])
    v = fs.normal(fs.key(0), theta)
    theirs = curvlinops.GGNLinearOperator(*arguments, check_deterministic=False)
    assert relative(fs.ggn(loss, theta)(v), theirs @ v) < 1e-10
    # their Hessian is not right through torch's fused layer norm: compared where there is none
    net = seeded(0, mlp).double()
    x, y = seeded(1, lambda: (torch.randn(7, 4).double(), torch.randint(0, 3, (7,))))
    loss = fs.objective(fs.functional(net), [(x, y)], fs.classification)
    theta, v = loss.net.theta, fs.normal(fs.key(1), loss.net.theta)
    arguments = (net, nn.CrossEntropyLoss(), list(net.parameters()), [(x, y)])
    theirs = curvlinops.HessianLinearOperator(*arguments, check_deterministic=False)
    assert relative(fs.hessian(loss, theta)(v), theirs @ v) < 1e-10
    empirical = curvlinops.EFLinearOperator(*arguments, check_deterministic=False)
    assert relative(fs.empirical_fisher(loss, theta, unit="sequence")(v), empirical @ v) < 1e-10


def test_hessian_is_that_of_hessian_eigenthings():
    peer = pytest.importorskip("hessian_eigenthings")
    model, ids, loss = language_model()
    v = fs.normal(fs.key(0), loss.net.theta)
    theirs = peer.HessianOperator(model, [{"input_ids": ids, "labels": ids}], peer.hf_lm_loss())
    found = fs.hessian(loss, loss.net.theta)(v)
    assert relative(found, theirs.matvec(v)) < 1e-6  # Hugging Face's own loss is taken in float32
    assert relative(2 * found, theirs.matvec(v)) > 0.1  # negative control
