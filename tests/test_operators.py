"""Oracles of the operators: dense matrices from `jacfwd` of `grad` and from Jacobians, in float64, over the catalogue."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import CATALOGUE, EVERY, IN_FLOAT32, LANGUAGE, dense_hessian, loss_of, relative, seeded, tokens
from torch import nn
from torch.func import jacrev, vmap
from transformers import GPT2Config, GPT2LMHeadModel

import funcscope as fs
from funcscope.curvature import (
    empirical_fisher,
    exact_fisher,
    fisher_diagonal_mc,
    fisher_mc,
    ggn,
    gradient_chunks,
    hessian,
    hessian_difference,
    per_sample_gradients,
)

EXACT = ("gpt2", "bert", "mlp", "cnn")
"""Families that compute in float64 throughout: the others' own float32 parts limit agreement, not the operators."""


def tolerance(name):
    return 1e-5 if name in IN_FLOAT32 else 1e-9


def columns(matvec, num, only=None):
    """The matrix, or some columns of it."""
    eye = torch.eye(num, dtype=torch.float64)
    with torch.no_grad():
        return vmap(matvec, chunk_size=100)(eye if only is None else eye[list(only)]).T


def probes(theta, num=3):
    return [fs.normal(fs.fold_in(fs.key(7), i), theta) for i in range(num)]


def pieces(loss):
    """(outputs, scored residuals' weights, Jacobian rows) of every batch, by `jacrev` of the plain model."""
    for inputs, targets in loss.batches:
        out = loss.net.apply(loss.params(loss.net.theta), inputs)
        jacobian = jacrev(lambda t, inputs=inputs: loss.net.apply(loss.params(t), inputs))(loss.net.theta)
        classes = out.shape[-1]
        yield out.reshape(-1, classes), targets, jacobian.reshape(-1, classes, loss.layout.num)


def dense_ggn(loss):
    total, weights = 0, 0
    for out, targets, jacobian in pieces(loss):
        for z, w, j in zip(out, targets.weight.reshape(-1).double(), jacobian, strict=True):
            p = z.softmax(0)
            total, weights = total + w * j.T @ (p.diag() - p.outer(p)) @ j, weights + w
    return total / weights


def dense_scores(loss):
    """Per batch: gradients of every position's log-loss at the data's label, (rows, positions, P), and weights."""
    for out, targets, jacobian in pieces(loss):
        label = torch.nn.functional.one_hot(targets.index.reshape(-1), out.shape[-1])
        scores = ((out.softmax(-1) - label)[..., None] * jacobian).sum(1)
        shape = targets.weight.shape if targets.weight.ndim > 1 else (*targets.weight.shape, 1)
        yield scores.reshape(*shape, -1), targets.weight.reshape(shape).double()


@pytest.mark.parametrize("name", ["gpt2", "mlp", "cnn"])
def test_hessian_is_the_dense_one(name):
    """GPT-2 of 1,000 parameters, every column of its Hessian by forward over reverse mode."""
    loss = small_gpt2() if name == "gpt2" else loss_of(name)
    theta = loss.net.theta
    dense = dense_hessian(loss, theta)
    for matvec in (hessian(loss, theta), hessian(loss, theta, head_chunk=2) if name == "gpt2" else None):
        assert matvec is None or relative(columns(matvec, len(theta)), dense) < 1e-9
    some = range(0, loss.layout.num, max(1, loss.layout.num // 20))
    assert relative(columns(hessian(loss, theta, keep=False), len(theta), some), dense[:, list(some)]) < 1e-9


def small_gpt2():
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=4, bos_token_id=1, eos_token_id=1)
    model = seeded(0, lambda: GPT2LMHeadModel(config)).double()
    batches = [
        {
            "input_ids": tokens(i, rows, 4)["input_ids"] % 11,
            "attention_mask": tokens(i, rows, 4, pad=pad)["attention_mask"],
        }
        for i, (rows, pad) in enumerate([(2, 1), (1, 0)])
    ]
    return fs.objective(fs.functional(model), batches, fs.causal_lm)


@pytest.mark.parametrize("name", EVERY)
def test_all_ways_to_a_hessian_product_agree(name):
    loss = loss_of(name)
    theta = loss.net.theta
    v = probes(theta, 1)[0]
    with torch.enable_grad():
        wanted = torch.func.jvp(torch.func.grad(loss), (theta,), (v,))[1]
    ways = {"kept": hessian(loss, theta), "rebuilt": hessian(loss, theta, keep=False)}
    if loss.net.head is not None:
        ways |= {f"chunk {n}": hessian(loss, theta, head_chunk=n) for n in (1, 5, 1000)}
    for way, matvec in ways.items():
        assert relative(matvec(v), wanted) < tolerance(name), way
        with torch.no_grad():
            assert relative(matvec(v), wanted) < tolerance(name), way
    rough = 2e-2 if name in IN_FLOAT32 else 1e-5
    assert relative(hessian_difference(loss, theta, step=1e-4 if rough < 1e-3 else 1e-2)(v), wanted) < rough


def test_a_head_with_a_bias_is_differentiated_in_it_too():
    model = seeded(0, CATALOGUE["llama"][0])
    model.lm_head = seeded(1, lambda: nn.Linear(12, 40))
    loss = fs.objective(fs.functional(model.double()), CATALOGUE["llama"][1], fs.causal_lm)
    assert loss.net.head.bias == "lm_head.bias"
    theta = loss.net.theta
    v = probes(theta, 1)[0]
    wanted = hessian(loss, theta, keep=False)(v)
    gauss_newton = ggn(loss, theta, keep=False)(v)
    for chunk in (None, 3):
        assert relative(hessian(loss, theta, head_chunk=chunk)(v), wanted) < tolerance("llama")
        assert relative(ggn(loss, theta, head_chunk=chunk)(v), gauss_newton) < tolerance("llama")


@pytest.mark.parametrize("name", ["gpt2", "mlp", "cnn"])
def test_gauss_newton_is_the_dense_one(name):
    loss = small_gpt2() if name == "gpt2" else loss_of(name)
    dense, theta = dense_ggn(loss), loss.net.theta
    ways = [ggn(loss, theta), ggn(loss, theta, keep=False), exact_fisher(loss, theta)]
    if loss.net.head is not None:
        ways += [ggn(loss, theta, head_chunk=3), ggn(loss, theta, head_chunk=3, keep=False)]
    for matvec in ways:
        for v in probes(theta):
            assert relative(matvec(v), dense @ v) < 1e-9


@pytest.mark.parametrize("name", [n for n in LANGUAGE if n not in ("gpt2", "t5")])
def test_gauss_newton_of_other_families_by_jvp_and_vjp_of_the_untouched_model(name):
    loss = loss_of(name)
    theta = loss.net.theta
    v, wanted, weights = probes(theta, 1)[0], 0, 0
    for inputs, targets in loss.batches:
        of = lambda t, inputs=inputs: loss.net.apply(loss.params(t), inputs)  # noqa: E731
        out, moved = torch.func.jvp(of, (theta,), (v,))
        p = out.softmax(-1)
        u = targets.weight[..., None] * (p * moved - p * (p * moved).sum(-1, keepdim=True))
        wanted, weights = wanted + torch.func.vjp(of, theta)[1](u)[0], weights + targets.weight.double().sum()
    for matvec in (ggn(loss, theta), ggn(loss, theta, keep=False)):
        assert relative(matvec(v), wanted / weights) < tolerance(name)


@pytest.mark.parametrize("name", ["gpt2", "mlp", "cnn"])
@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_empirical_fisher_is_the_dense_one(name, unit):
    loss = loss_of(name)
    theta = loss.net.theta
    found = list(dense_scores(loss))
    if unit == "token":
        total = sum(weight.sum() for _, weight in found)
        dense = sum(torch.einsum("btp,bt,btq->pq", s, w, s) for s, w in found) / total
    else:
        rows = torch.cat([(s * w[..., None]).sum(1) for s, w in found])
        dense = rows.T @ rows / len(rows)
        torch.testing.assert_close(per_sample_gradients(loss, theta), rows, rtol=1e-9, atol=1e-12)
    for keep in (True, False):
        matvec = empirical_fisher(loss, theta, unit=unit, keep=keep)
        for v in probes(theta, 2):
            assert relative(matvec(v), dense @ v) < 1e-9


@pytest.mark.slow
def test_per_sample_gradients_add_up_to_the_gradient_in_any_chunks():
    for name in CATALOGUE:
        loss = loss_of(name)
        theta = loss.net.theta
        sums, weights = loss.terms(theta)
        whole = per_sample_gradients(loss, theta)
        assert whole.shape == (len(sums), len(theta))
        wanted = torch.func.grad(loss)(theta) * weights.sum()
        assert relative(whole.sum(0), wanted) < (1e-4 if name in IN_FLOAT32 else 1e-9), name
        chunks = list(gradient_chunks(loss, theta, chunk_size=2))
        assert max(map(len, chunks)) == 2
        torch.testing.assert_close(torch.cat(chunks), whole, rtol=1e-4, atol=1e-5 if name in IN_FLOAT32 else 1e-9)
        means = per_sample_gradients(loss, theta, reduction="mean", chunk_size=3)
        torch.testing.assert_close(means * weights[:, None], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sampled_fisher_is_the_exact_one_in_expectation():
    """z-tests on the estimator's own errors, over independent keys, entry by entry of some quadratic forms."""
    loss = small_gpt2()
    theta = loss.net.theta
    exact = exact_fisher(loss, theta)
    vs = probes(theta, 3)
    with torch.no_grad():
        samples = (fisher_mc(loss, theta, key=fs.key(seed), num=4) for seed in range(30))
        forms = torch.tensor([[float(v @ matvec(v)) for v in vs] for matvec in samples])
    wanted = torch.tensor([float(v @ exact(v)) for v in vs])
    z = (forms.mean(0) - wanted) / (forms.std(0) / 30**0.5)
    assert float(z.abs().max()) < 4
    data = torch.tensor([float(v @ empirical_fisher(loss, theta, unit="token")(v)) for v in vs])
    assert float(((forms.mean(0) - data) / (forms.std(0) / 30**0.5)).abs().max()) > 6  # negative control


@pytest.mark.slow
def test_sampled_diagonal_is_the_exact_one_within_its_error():
    loss = loss_of("mlp")
    theta = loss.net.theta
    exact = columns(exact_fisher(loss, theta), len(theta)).diagonal()
    found = fisher_diagonal_mc(loss, theta, key=fs.key(3), num=150)
    z = (found.value - exact) / found.stderr
    assert float(z.abs().max()) < 4.5
    assert float(z.std()) == pytest.approx(1, abs=0.45)
    assert abs(float(found.trace) - float(exact.sum())) < 4 * float(found.stderr.norm()) * len(theta) ** 0.5
    assert fisher_diagonal_mc(loss, theta, key=fs.key(3), num=1).stderr.isnan().all()


@pytest.mark.slow
def test_draws_do_not_depend_on_the_batches():
    model = seeded(0, CATALOGUE["gpt2"][0]).double()
    batch = tokens(1, 4, 8)
    split = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    one, two = (fs.objective(fs.functional(model), batches, fs.causal_lm) for batches in ([batch], split))
    v = probes(one.net.theta, 1)[0]
    for make in (
        lambda loss: fisher_mc(loss, loss.net.theta, key=fs.key(5), num=2),
        lambda loss: empirical_fisher(loss, loss.net.theta),
        lambda loss: ggn(loss, loss.net.theta),
        lambda loss: hessian(loss, loss.net.theta),
    ):
        assert relative(make(two)(v), make(one)(v)) < 1e-12


@pytest.mark.slow
@given(seed=st.integers(0, 2**32), a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_operators_are_linear_and_symmetric(seed, a, b):
    u, v = (fs.normal(fs.fold_in(fs.key(seed), name), MLP.net.theta) for name in "uv")
    for matvec in MATVECS:
        torch.testing.assert_close(matvec(a * u + b * v), a * matvec(u) + b * matvec(v), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(u @ matvec(v), v @ matvec(u), rtol=1e-9, atol=1e-12)
    for matvec in MATVECS[1:]:
        assert v @ matvec(v) >= -1e-12


MLP = loss_of("mlp")
MATVECS = [
    hessian(MLP, MLP.net.theta),
    ggn(MLP, MLP.net.theta),
    fisher_mc(MLP, MLP.net.theta, key=fs.key(1)),
    empirical_fisher(MLP, MLP.net.theta),
]


@pytest.mark.slow
def test_matvecs_can_be_mapped_over_vectors():
    loss = loss_of("gpt2")
    theta = loss.net.theta
    vs = torch.stack(probes(theta))
    for matvec in (
        hessian(loss, theta),
        hessian(loss, theta, keep=False),
        hessian(loss, theta, head_chunk=4),
        ggn(loss, theta),
        ggn(loss, theta, head_chunk=4),
        empirical_fisher(loss, theta),
    ):
        torch.testing.assert_close(vmap(matvec)(vs), torch.stack([matvec(v) for v in vs]), rtol=1e-9, atol=1e-12)


def test_weights_between_zero_and_one_are_weights():
    """Softmax regression: z = W x, so that every matrix is written down by hand."""
    x, label = seeded(2, lambda: (torch.randn(6, 2).double(), torch.randint(0, 3, (6,))))
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.25, 1.0], dtype=torch.float64)
    weighted = fs.custom(lambda out, y: (nn.functional.cross_entropy(out, y[0], reduction="none"), y[1]))
    net = fs.functional(seeded(0, lambda: nn.Linear(2, 3, bias=False)).double())
    loss = fs.objective(net, [(x, (label, weight))], weighted)
    p = (x @ net.params["weight"].T).softmax(-1)
    scores = torch.einsum("ni,nj->nij", p - nn.functional.one_hot(label, 3), x).flatten(1)
    outer = torch.einsum("ni,ij->nij", p, torch.eye(3).double()) - torch.einsum("ni,nj->nij", p, p)
    fisher_dense = sum(w * torch.kron(m, a.outer(a)) for w, m, a in zip(weight, outer, x, strict=True)) / weight.sum()
    for matvec in (hessian(loss, net.theta), ggn(loss, net.theta), hessian(loss, net.theta, keep=False)):
        torch.testing.assert_close(columns(matvec, 6), fisher_dense, rtol=1e-12, atol=1e-14)
    by_token = torch.einsum("np,n,nq->pq", scores, weight, scores) / weight.sum()
    torch.testing.assert_close(columns(empirical_fisher(loss, net.theta, unit="token"), 6), by_token)
    rows = scores * weight[:, None]
    torch.testing.assert_close(columns(empirical_fisher(loss, net.theta), 6), rows.T @ rows / 5)


def test_a_kernel_without_second_derivative_is_named():
    loss = loss_of("llama", torch.float32, attention="keep")
    theta = loss.net.theta
    with pytest.raises(ValueError, match=r"second derivatives.*attention='keep'.*hessian_difference"):
        hessian(loss, theta)(theta)
    with pytest.raises(ValueError, match="second derivatives"):
        hessian(loss, theta, keep=False)(theta)
    eager = loss_of("llama", torch.float32)
    assert relative(hessian_difference(loss, theta)(theta), hessian(eager, theta)(theta)) < 0.05


@pytest.mark.slow
def test_parameters_and_vector_are_left_alone_and_dict_is_vector():
    loss = loss_of("gpt2")
    theta, v = loss.net.theta, probes(loss.net.theta, 1)[0]
    before = theta.clone(), v.clone()
    for make in (hessian, ggn, empirical_fisher):
        assert torch.equal(make(loss, theta)(v), make(loss, loss.net.params)(v))
    assert torch.equal(theta, before[0])
    assert torch.equal(v, before[1])
    assert not hessian(loss, theta)(v).requires_grad
