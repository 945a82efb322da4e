"""Operators on models, criteria and batches that are not the usual ones, and on inputs that change."""

import threading
import warnings

import pytest
import torch
from problems import CATALOGUE, dense_hessian, gpt2, loss_of, problem, relative, seeded
from torch import nn
from torch.func import vmap
from transformers import GPT2LMHeadModel

import funcscope as fs
from funcscope.core.criterion import Labels
from funcscope.curvature import fisher_diagonal_mc, gradient_chunks, hessian_block_eigenvalues
from funcscope.linalg import conjugate_gradient, dense, to_scipy


def probe(theta, seed=0):
    return fs.normal(fs.key(seed), theta)


class HalvedForCausalLM(GPT2LMHeadModel):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits / 2
        return out


def halved():
    model = seeded(0, gpt2)
    model.__class__ = HalvedForCausalLM
    return model


def hooked():
    model = seeded(0, gpt2)
    model.lm_head.register_forward_hook(lambda module, inputs, out: out / 2)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", [halved, hooked])
def test_a_head_that_is_more_than_a_linear_map_is_not_taken_apart(make):
    loss = fs.objective(fs.functional(make().double()), CATALOGUE["gpt2"][1], fs.causal_lm)
    assert loss.net.head is None
    v = probe(loss.net.theta)
    for operator in (fs.hessian, fs.ggn):
        assert relative(operator(loss, loss.net.theta)(v), operator(loss, loss.net.theta, keep=False)(v)) < 1e-9


@pytest.mark.slow
def test_weights_are_those_that_the_criterion_returns():
    """Targets that have a `weight` of their own shape, and weights that are made of it."""
    x, y = seeded(1, lambda: (torch.randn(5, 3).double(), torch.randn(5, 2).double()))
    own = fs.custom(lambda out, t: ((out - t.index).square(), t.weight[:, None].expand(5, 2)))
    net = fs.functional(seeded(0, lambda: nn.Linear(3, 2)).double())
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0]).double()
    loss = fs.objective(net, [(x, Labels(y, weight))], own)
    per_row = fs.Criterion(
        "mean of rows",
        fs.causal_lm.prepare,
        lambda out, t: (lambda loss, w: (loss, w / w.sum(-1, keepdim=True).clamp(min=1)))(
            *fs.causal_lm.token_loss(out, t)
        ),
    )
    rows = fs.objective(fs.functional(seeded(0, gpt2).double()), CATALOGUE["gpt2"][1], per_row)
    for case in (loss, rows):
        theta, v = case.net.theta, probe(case.net.theta)
        wanted = torch.func.jvp(torch.func.grad(case), (theta,), (v,))[1]
        for keep in (True, False):
            assert relative(fs.hessian(case, theta, keep=keep)(v), wanted) < 1e-9


def test_scores_of_positions_are_refused_where_losses_share_outputs():
    x = seeded(1, lambda: torch.randn(4, 3).double())
    label = torch.tensor([[0, 1, 2], [1, 1, 0], [2, 0, 0], [0, 2, 1]])
    shaped = seeded(0, lambda: nn.Sequential(nn.Linear(3, 9), nn.Unflatten(1, (3, 3))))  # (B, classes, T)
    crossed = fs.custom(lambda out, y: nn.functional.cross_entropy(out, y, reduction="none"))
    loss = fs.objective(fs.functional(shaped.double()), [(x, label)], crossed)
    theta, v = loss.net.theta, probe(loss.net.theta)
    with pytest.raises(ValueError, match="not one per position"):
        fs.empirical_fisher(loss, theta, unit="token")
    rows = fs.per_sample_gradients(loss, theta)
    assert relative(fs.empirical_fisher(loss, theta)(v), rows.T @ (rows @ v) / 4) < 1e-12
    coupled = fs.custom(lambda out, y: -out.log_softmax(-1) * y)
    soft = fs.objective(
        fs.functional(seeded(0, lambda: nn.Linear(3, 2)).double()), [(x, x[:, :2].softmax(-1))], coupled
    )
    with pytest.raises(ValueError, match="not one per position"):
        fs.empirical_fisher(soft, soft.net.theta, unit="token")


@pytest.mark.parametrize("make", [fs.hessian, fs.ggn, fs.empirical_fisher, fs.hessian_difference])
def test_what_an_operator_holds_may_not_change(make):
    model, batches, criterion = problem("mlp")
    batches = [tuple(x.clone() for x in batch) for batch in batches]
    frozen = fs.functional(model, trainable=lambda name: name.startswith("2"))
    for what in ("theta", "batch", "frozen"):
        loss = fs.objective(frozen, batches, criterion)
        theta = loss.net.theta
        matvec, v = make(loss, theta), probe(theta)
        matvec(v)
        with torch.no_grad():
            {"theta": theta, "batch": loss.batches[0][0], "frozen": model[0].weight}[what].mul_(1.0)
        with pytest.raises(RuntimeError, match="changed in place"):
            matvec(v)
        assert make(loss, theta)(v).isfinite().all()


def test_operators_work_in_threads():
    loss = loss_of("mlp")
    theta, v = loss.net.theta, probe(loss.net.theta)
    matvecs = [operator(loss, theta, keep=keep) for operator in (fs.hessian, fs.ggn) for keep in (True, False)]
    wanted, errors = [matvec(v) for matvec in matvecs], []

    def work():
        for _ in range(10):
            for matvec, right in zip(matvecs, wanted, strict=True):
                try:
                    errors.append(relative(matvec(v), right))
                except Exception as err:  # noqa: BLE001
                    errors.append(err)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [error for error in errors if not isinstance(error, float) or error > 1e-12] == []


def test_a_head_alone_can_be_mapped_and_no_warning_filter_is_touched():
    model = seeded(0, CATALOGUE["llama"][0]).double()
    loss = fs.objective(fs.functional(model, trainable=["lm_head.weight"]), CATALOGUE["llama"][1], fs.causal_lm)
    theta = loss.net.theta
    vs = torch.stack([probe(theta, seed) for seed in range(3)])
    before = list(warnings.filters)
    for make in (fs.hessian, fs.ggn):
        for chunk in (None, 4):
            matvec = make(loss, theta, head_chunk=chunk)
            torch.testing.assert_close(vmap(matvec)(vs), torch.stack([matvec(v) for v in vs]), rtol=1e-9, atol=1e-12)
    assert warnings.filters == before


def test_half_precision_keeps_small_weights_and_many_chunks():
    x, y = seeded(1, lambda: (torch.randn(2000, 8), torch.randint(0, 50, (2000,))))
    model = seeded(0, lambda: nn.Linear(8, 50))
    exact = fs.objective(fs.functional(model), [(x, y)], fs.classification)
    half = fs.objective(fs.functional(seeded(0, lambda: nn.Linear(8, 50)).half()), [(x.half(), y)], fs.classification)
    v = torch.nn.functional.normalize(probe(exact.net.theta), dim=0)
    for make in (fs.hessian, fs.ggn):
        assert relative(make(half, half.net.theta)(v), make(exact, exact.net.theta)(v)) < 5e-3
    coarse = loss_of("gpt2", torch.bfloat16)
    v = probe(coarse.net.theta)
    fine, one = (fs.ggn(coarse, coarse.net.theta, head_chunk=chunk)(v) for chunk in (100, 1))
    assert relative(one, fine) < 0.03


def test_gradients_of_mappings_and_shared_tensors():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x, scale):
            return self.linear(x) * scale

    x, y = seeded(1, lambda: (torch.randn(4, 3).double(), torch.randn(4, 2).double()))
    half_square = fs.custom(lambda out, t: (out - t["y"]).square().sum(-1) / 2)
    net = fs.functional(seeded(0, Scaled).double())
    loss = fs.objective(net, [({"x": x, "scale": torch.tensor([2.0, 3.0]).double()}, {"y": y})], half_square)
    rows = torch.cat(list(gradient_chunks(loss, net.theta)))
    assert relative(rows.sum(0), 4 * torch.func.grad(loss)(net.theta)) < 1e-12


def test_conjugate_gradients_and_dense_refuse_or_copy():
    with pytest.raises(ValueError, match="`b` must be finite"):
        conjugate_gradient(lambda v: 2 * v, torch.tensor([1.0, float("nan")]))
    buffer, d = torch.empty(4, dtype=torch.float64), torch.arange(1.0, 5).double()

    def reused(v):
        return torch.mul(d, v, out=buffer)

    assert dense(reused, d).diagonal().tolist() == [1, 2, 3, 4]
    operator = to_scipy(reused, d)
    first = operator @ d.numpy()
    operator @ (2 * d.numpy())
    assert first.tolist() == [1, 4, 9, 16]


def test_blocks_of_one_and_weights_below_zero():
    loss = loss_of("mlp")
    theta = loss.net.theta
    net = fs.functional(seeded(0, lambda: nn.Linear(3, 1)).double())
    data = seeded(2, lambda: (torch.randn(6, 3).double(), torch.randn(6, 1).double()))
    single = fs.objective(net, [data], fs.custom(lambda out, y: (out - y).square()))
    found = hessian_block_eigenvalues(single, net.theta, key=fs.key(0), by="tensor", which="both")
    assert found["bias"].values.tolist() == pytest.approx([float(dense_hessian(single, net.theta)[3, 3])])
    negative = tuple((inputs, targets._replace(weight=-targets.weight)) for inputs, targets in loss.batches)
    with pytest.raises(ValueError, match="at least 0"):
        fisher_diagonal_mc(fs.Loss(loss.net, negative, loss.criterion), theta, key=fs.key(0))


def test_a_stencil_that_leaves_the_finite_region_keeps_what_it_saw():
    net = fs.functional(seeded(0, lambda: nn.Linear(1, 1, bias=False)).double())
    one = torch.ones(1, 1, dtype=torch.float64)
    cut = fs.custom(lambda out, y: torch.where(out.abs() < 1.4, out, out / 0))
    loss = fs.objective(net, [(one, 0 * one)], cut)
    d = fs.directions(net, key=fs.key(0), num=1, normalize="global")[0]
    found = fs.difference_step(loss, torch.ones(1, dtype=torch.float64), d)
    assert found.status == "flat"
    assert found.step == found.reach == 0.125
