"""Lenses. Oracles: the definitions on whole logits, dense Jacobians by `torch.func.jacrev`, the model's own loss."""

import pytest
import torch
from problems import tokens
from test_architectures import criterion_of
from test_circuits import EVERY, batch, net_of
from test_logit_attribution import chosen
from torch.func import jacrev
from torch.testing import assert_close

import funcscope as fs
from funcscope import mechanistic
from funcscope.mechanistic import jacobian_lens, logit_lens, mean_jacobians, position_jacobian
from funcscope.mechanistic.weights import Weights

NUMBERS = ("kl", "log_prob", "rank", "agreement", "entropy")


def loss_on(net):
    return fs.objective(net, [tokens(1, 3, 7, pad=3), tokens(2, 2, 5, pad=2, left=True)], fs.causal_lm)


def by_definition(net, loss, turn=lambda _, h: h):
    """(number, layer, sequence) sums and the weights, from the logits of all positions."""
    w, sums, weights = Weights(net, net.params), [], []
    for inputs, (index, weight) in loss.batches:
        seen = fs.trace(net, net.params, inputs, ["resid_pre", f"resid_post.{w.num_layers - 1}"])
        streams = [*seen["resid_pre"], seen[f"resid_post.{w.num_layers - 1}"]]
        p = torch.stack([w.logits(w.final(turn(i, h))).softmax(-1) for i, h in enumerate(streams)])
        target = torch.stack([chosen(each, index) for each in p])
        numbers = [
            (p[-1] * (p[-1] / p).log()).sum(-1), target.log(), 1.0 + (p > target[..., None]).sum(-1),
            (p.argmax(-1) == p[-1].argmax(-1)).double(), -(p * p.log()).sum(-1),
        ]  # fmt: skip
        sums.append((torch.stack(numbers) * weight).sum(-1))
        weights.append(weight.sum(1))
    return torch.cat(sums, -1), torch.cat(weights).double()


@pytest.mark.parametrize("line", EVERY)
def test_logit_lens_is_its_definition_and_ends_at_the_model(line):
    net = net_of(line)
    loss = loss_on(net)
    found, (sums, weights) = logit_lens(loss, net.params, chunk=4), by_definition(net, loss)
    for name, each in zip(NUMBERS, sums, strict=True):
        assert_close(getattr(found, name), each.sum(-1) / weights.sum(), rtol=1e-5, atol=1e-6)
        rest = each - each.sum(-1, keepdim=True) / weights.sum() * weights
        stderr = (5 / 4 * rest.square().sum(-1)).sqrt() / weights.sum()
        assert_close(getattr(found, f"{name}_stderr"), stderr, rtol=1e-4, atol=1e-6)
    assert_close(found.log_prob[-1], -loss(net.params).double(), rtol=1e-5, atol=0)
    assert (found.kl[-1], found.agreement[-1]) == (0, 1)
    assert found.kl[0] > 1e-3
    whole = logit_lens(loss.split(1), net.params)
    assert_close(whole.entropy_stderr, found.entropy_stderr, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("line", EVERY)
def test_bare_token_ids_are_read_as_a_mapping_of_them(line):
    net, ids = net_of(line), tokens(1, 2, 7)["input_ids"]
    bare, named = (logit_lens(fs.objective(net, [x], fs.causal_lm), net.params) for x in (ids, {"input_ids": ids}))
    assert_close(bare.log_prob, named.log_prob)
    seen = fs.trace(net, net.params, ids, ["logits"])
    assert_close(seen["logits"], net.apply(net.params, ids), rtol=1e-5, atol=1e-6)


def dense_jacobians(net, inputs):
    """d h_L / d h_l of one sequence, (L, t, D, t, D), from the pass as it is."""
    num = Weights(net, net.params).num_layers
    seen = fs.trace(net, net.params, inputs, ["resid_pre"])["resid_pre"]
    made = []
    for layer in range(num):
        site = "resid_pre.0" if layer == 0 else f"resid_post.{layer - 1}"

        def last(h, site=site):
            return fs.apply_with(net, net.params, inputs, {site: h}, [f"resid_post.{num - 1}"])[1][
                f"resid_post.{num - 1}"
            ][0]

        made.append(jacrev(last)(seen[layer])[:, :, 0])
    return torch.stack(made)


@pytest.mark.parametrize("line", EVERY)
def test_mean_jacobian_is_the_mean_of_the_dense_ones_at_the_same_position(line):
    net = net_of(line)
    inputs = tokens(1, 2, 5, pad=1)
    loss = fs.objective(net, [inputs], fs.causal_lm)
    found = mean_jacobians(loss, net.params, key=fs.key(0), chunk_size=5)
    ((_, (_, weight)),) = loss.batches
    sums = []
    for row in range(2):
        dense = dense_jacobians(net, {name: value[row : row + 1] for name, value in inputs.items()})
        own = dense.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # layer, position, D, D
        sums.append((own * weight[row, :, None, None]).sum(1))
    a, b = torch.stack(sums).double(), weight.sum(1).double()
    mean = a.sum(0) / b.sum()
    assert_close(found.jacobians, mean, rtol=1e-4, atol=2e-5 if line != "gpt2" else 1e-9)
    rest = a - mean * b[:, None, None, None]
    stderr = (2 * rest.square().sum(0)).sqrt() / b.sum()
    assert_close(found.stderr_norm, stderr.flatten(1).norm(dim=1), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_probes_are_unbiased_and_their_error_is_what_it_says():
    net = net_of("gpt2")
    loss = fs.objective(net, [tokens(1, 8, 7)], fs.causal_lm)
    exact = mean_jacobians(loss, net.params, key=fs.key(0))
    runs = [mean_jacobians(loss, net.params, key=fs.key(i), method="probes", num=4) for i in range(8)]
    off = torch.stack([run.jacobians - exact.jacobians for run in runs])
    size, mean = off.flatten(2).norm(dim=2), off.mean(0).flatten(1).norm(dim=1)
    assert (mean < 1.5 * size.mean(0) / 8**0.5).all()
    stderr = torch.stack([run.stderr_norm for run in runs]).mean(0)
    both = (size.square().mean(0) + exact.stderr_norm.square()).sqrt()  # of probes, and of sequences
    assert_close(stderr, both, rtol=0.2, atol=0)


@pytest.mark.parametrize("line", [*EVERY[:2]])
def test_jacobian_lens_is_the_logit_lens_of_the_turned_stream(line):
    net = net_of(line)
    loss = loss_on(net)
    turn = mean_jacobians(loss, net.params, key=fs.key(0)).jacobians
    found = jacobian_lens(loss, net.params, key=fs.key(0))
    sums, weights = by_definition(net, loss, lambda i, h: h if i == len(turn) else h @ turn[i].to(h).T)
    for name, each in zip(NUMBERS, sums, strict=True):
        assert_close(getattr(found, name), each.sum(-1) / weights.sum(), rtol=1e-4, atol=1e-5)
    assert found.jacobian_norm[-1] == 4
    assert "same sequences" in found.notes[0]
    sampled = jacobian_lens(loss, net.params, key=fs.key(0), method="probes", num=2)
    assert (sampled.jacobian_error[:-1] > found.jacobian_error[:-1]).all()
    assert "sampling error" in sampled.notes[0]


@pytest.mark.parametrize("line", ["gpt2", "llama", "bert"])
def test_position_jacobian_is_the_norm_of_the_dense_one(line):
    net, inputs = net_of(line), tokens(5, 2, 5, pad=2, left=True)
    found = position_jacobian(net, net.params, inputs, key=fs.key(0), layer=0)
    embed = fs.trace(net, net.params, inputs, ["tok_embed"])["tok_embed"]

    def last(e):
        return fs.apply_with(net, net.params, inputs, {"tok_embed": e}, ["resid_post.0"])[1]["resid_post.0"]

    dense = jacrev(last)(embed)  # b t D b t D
    for row in range(2):
        norm = dense[row, :, :, row].square().sum((1, 3)).sqrt().double()
        real = inputs["attention_mask"][row].bool()
        assert_close(found.values[row][real][:, real], norm[real][:, real], rtol=1e-5, atol=1e-6)
        assert found.values[row][~real].isnan().all()
    assert not found.values_stderr.nan_to_num().any()
    at = found.coords["distance"].index(1)
    pairs = torch.cat([found.values[row].diagonal(-1) for row in range(2)])
    assert_close(found.by_distance[at], pairs[pairs.isfinite()].mean())
    assert found.by_distance_stderr[at] > 0


@pytest.mark.slow
def test_probes_of_a_position_have_the_frobenius_norm_and_the_documented_scale_has_not():
    net, inputs = net_of("gpt2"), tokens(5, 1, 4)
    exact = position_jacobian(net, net.params, inputs, key=fs.key(0))
    found = position_jacobian(net, net.params, inputs, key=fs.key(1), method="probes", num=400, chunk_size=50)
    there = exact.values > 0
    z = ((found.values - exact.values) / found.values_stderr)[there]
    assert z.abs().max() < 4
    assert 0.3 < z.square().mean() < 3
    documented = found.values / 16**0.5  # probes of length 1
    assert (((documented - exact.values) / found.values_stderr)[there].abs() > 10).all()
    assert not found.values[~there].any()
    one = position_jacobian(net, net.params, inputs, key=fs.key(1), method="probes", num=1)
    assert one.values_stderr[there].isnan().all()


def test_what_has_no_lens_says_so():
    bert = net_of("bert")
    made = {**batch(), "labels": batch()["input_ids"]}
    loss = fs.objective(bert, [made], criterion_of("bert"))
    for call in (logit_lens, lambda *at: jacobian_lens(*at, key=fs.key(0))):
        with pytest.raises(ValueError, match="not linear"):
            call(loss, bert.params)
    with pytest.raises(ValueError, match="`layer` must be"):
        position_jacobian(bert, bert.params, batch(), key=fs.key(0), layer=2)
    net = net_of("gpt2")
    one = logit_lens(fs.objective(net, [tokens(1, 1, 5)], fs.causal_lm), net.params)
    assert one.kl_stderr.isnan().all()


def test_weights_that_are_not_finite_have_no_rank_no_agreement_and_a_note():
    """nan is above nothing: its rank would be 1, and its first token the last layer's own."""
    net = net_of("gpt2")
    loss = fs.objective(net, [batch()], fs.causal_lm)
    params = {name: value.clone() for name, value in net.params.items()}
    params["transformer.h.1.mlp.c_proj.bias"][0] = torch.nan
    found = logit_lens(loss, params)
    assert found.rank[:2].isfinite().all()
    for name in ("kl", "log_prob", "rank", "agreement", "entropy"):
        assert getattr(found, name)[2].isnan()
    assert found.agreement.isnan().all()  # with what the last layer says
    results = [
        found, jacobian_lens(loss, params, key=fs.key(0), method="probes"), mechanistic.logit_attribution(loss, params),
        mechanistic.ablation_effects(loss, params), mechanistic.induction_heads(net, params, key=fs.key(0), num=4, period=3),
    ]  # fmt: skip
    for each in results:
        assert any("not finite" in note for note in each.notes), type(each)
    assert results[2].discrepancy != results[2].discrepancy
    assert not any("not finite" in note for note in logit_lens(loss, net.params).notes)
    pairs = (net, params, batch(), tokens(9, 3, 8, pad=3), lambda logits: logits[:, -1, 3])
    assert "not finite" in mechanistic.edge_attribution(*pairs).notes[0]
    with pytest.raises(
        ValueError, match=r"`transformer\.h\.1\.mlp\.c_proj\.bias` is not finite, where circuits are not defined"
    ):
        mechanistic.qk_ov_circuits(net, params)
    params["transformer.h.0.attn.c_attn.bias"][0] = torch.nan
    assert any("patterns are not finite" in note for note in mechanistic.attention_patterns(loss, params).notes)
