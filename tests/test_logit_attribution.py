"""Parts of logits and of scores. Oracles: the model's own logits and scores, the sites `result` and `resid_post`."""

from inspect import unwrap

import pytest
import torch
from problems import VOCAB, tokens
from test_architectures import criterion_of
from test_circuits import EVERY, batch, net_of
from torch.testing import assert_close

import funcscope as fs
from funcscope.mechanistic import logit_attribution, logit_contributions, position_jacobian, qk_attribution
from funcscope.mechanistic.weights import Weights


def logits_before_the_cap(net, inputs):
    logits, cap = net.apply(net.params, inputs), Weights(net, net.params).softcap
    return logits if cap is None else cap * torch.atanh(logits / cap)


def chosen(x, ids):
    return x.gather(-1, ids[..., None])[..., 0]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("line", EVERY)
def test_parts_sum_to_the_logit(line, left):
    net, inputs = net_of(line), batch(left=left)
    ids = tokens(9, 3, 8)["input_ids"]
    logits = logits_before_the_cap(net, inputs)
    made = logit_contributions(net, net.params, inputs, ids)
    assert_close(made.parts.sum(0), chosen(logits, ids), rtol=1e-5, atol=1e-6)
    assert_close(made.logit, chosen(logits, ids), rtol=1e-5, atol=1e-6)
    other = (ids + 1) % VOCAB
    made = logit_contributions(net, net.params, inputs, ids, minus=other)
    assert_close(made.parts.sum(0), chosen(logits, ids) - chosen(logits, other), rtol=1e-5, atol=1e-6)
    made = logit_contributions(net, net.params, inputs, ids, centred=True)
    assert_close(made.parts.sum(0), chosen(logits, ids) - logits.mean(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("line", EVERY)
def test_parts_of_heads_are_what_they_write_and_the_bare_unembedding_does_not_sum(line):
    """The documented formula reads heads by W_U alone, without the final norm."""
    net, inputs = net_of(line), batch()
    ids, w = tokens(9, 3, 8)["input_ids"], Weights(net_of(line), net_of(line).params)
    seen = fs.trace(net, net.params, inputs, ["result", "final_scale", "attn_out", "mlp_out"])
    made = logit_contributions(net, net.params, inputs, ids)
    rows = w.unembedding[0][ids]
    u = w.final.folded(rows) / seen["final_scale"][..., None]
    if line != "gemma2":
        assert_close(made.heads, (seen["result"] * u[:, :, None]).sum(-1).movedim(3, 1), rtol=1e-5, atol=1e-7)
    assert_close(made.heads.sum(1) + made.attention_bias, (seen["attn_out"] * u).sum(-1), rtol=1e-5, atol=1e-6)
    assert_close(made.mlp, (seen["mlp_out"] * u).sum(-1), rtol=1e-5, atol=1e-7)
    bare = (fs.trace(net, net.params, inputs, ["resid_post.1"])["resid_post.1"] * rows).sum(-1)
    assert not torch.allclose(bare, made.logit, rtol=0.05)


@pytest.mark.parametrize("line", ["gpt2", "llama"])
def test_a_head_whose_output_matrix_is_zero_takes_its_result_away(line):
    net, inputs = net_of(line), batch(pad=0)
    name = {"gpt2": "transformer.h.1.attn.c_proj.weight", "llama": "model.layers.1.self_attn.o_proj.weight"}[line]
    weight = net.params[name].clone()
    (weight if line == "gpt2" else weight.T)[:8] = 0
    site = "resid_mid.1"
    before, after = (fs.trace(net, {**net.params, name: x}, inputs, [site])[site] for x in (net.params[name], weight))
    result = fs.trace(net, net.params, inputs, ["result.1"])["result.1"]
    assert_close(after - before, -result[:, :, 0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("at", ["all", "last"])
def test_metric_is_the_weighted_mean_with_its_error_over_sequences(at):
    net = net_of("gpt2")
    data = [tokens(1, 3, 8, pad=3), tokens(2, 2, 5, pad=2, left=True)]
    loss = fs.objective(net, data, fs.causal_lm)
    found = logit_attribution(loss, net.params, at=at, centred=False)
    sums, weights = [], []
    for inputs, (index, weight) in loss.batches:
        parts = logit_contributions(net, net.params, inputs, index).heads[1, 0]
        for row, w in zip(parts, weight, strict=True):
            places = w.nonzero()[:, 0] if at == "all" else w.nonzero()[-1:, 0]
            sums.append(row[places].sum())
            weights.append(len(places))
    a, b = torch.stack(sums), torch.tensor(weights).double()
    assert_close(found.heads[1, 0], a.sum() / b.sum())
    rest = a - a.sum() / b.sum() * b
    assert_close(found.heads_stderr[1, 0], (5 / 4 * rest.square().sum()).sqrt() / b.sum())
    every = found.heads.sum() + found.mlp.sum() + found.attention_bias.sum()
    every = every + found.embedding.value + found.positions.value + found.bias.value
    assert_close(every, found.logit.value)
    assert found.discrepancy < 1e-12
    again = logit_attribution(loss.split(1), net.params, at=at, centred=False)
    assert_close(again.heads, found.heads)
    assert_close(again.heads_stderr, found.heads_stderr)


def test_capped_logits_are_named_so_and_float32_is_exact_to_rounding():
    net = net_of("gemma2", torch.float32)
    loss = fs.objective(net, [batch()], fs.causal_lm)
    found = logit_attribution(loss, net.params)
    assert "capped" in found.notes[0]
    assert found.discrepancy < 2e-6
    assert "above the vocabulary's mean" in found.head
    with pytest.raises(ValueError, match="not linear"):
        bert = net_of("bert")
        made = {**batch(), "labels": batch()["input_ids"]}
        logit_attribution(fs.objective(bert, [made], criterion_of("bert")), bert.params)
    one = logit_attribution(fs.objective(net, [{"input_ids": batch(0)["input_ids"][:1]}], fs.causal_lm), net.params)
    assert one.heads_stderr.isnan().all()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("line", EVERY)
def test_parts_sum_to_the_score(line, left):
    net, inputs = net_of(line), batch(left=left)
    rotated = "rot_" if Weights(net, net.params).rotates else ""
    seen = fs.trace(net, net.params, inputs, [f"{rotated}q", f"{rotated}k", "scores"])
    for layer, row, query, key in ((0, 0, 4, 1), (1, 2, 4, 3)):
        for head in (0, 1):
            found = qk_attribution(net, net.params, inputs, layer=layer, head=head, query=query, key=key, row=row)
            q, k = seen[f"{rotated}q.{layer}"][row, query, head], seen[f"{rotated}k.{layer}"][row, key]
            score = seen.kernels[layer].scaling * q @ k[head if len(k) == 2 else 0]
            assert_close(torch.tensor(found.score).to(score), score, rtol=1e-5, atol=1e-6)
            assert_close(found.values.sum(), score.double(), rtol=1e-5, atol=1e-6)
            if line != "gemma2":
                assert_close(score, seen[f"scores.{layer}"][row, head, query, key], rtol=1e-5, atol=1e-6)
            assert found.values.shape == (len(found.names),) * 2


def test_a_query_part_is_what_moves_the_score_when_it_is_taken_out():
    """With the norm's scale as it is: the embedding's part, from a hand-made norm."""
    net, inputs = net_of("llama"), batch(pad=0)
    found = qk_attribution(net, net.params, inputs, layer=1, head=1, query=6, key=2)
    w = Weights(net, net.params)
    seen = fs.trace(net, net.params, inputs, ["tok_embed", "resid_pre.1", "rot_k.1"])
    scale = (seen["resid_pre.1"][0, 6].square().mean() + 1e-6).sqrt()
    x = seen["tok_embed"][0, 6] * net.params["model.layers.1.input_layernorm.weight"] / scale
    q = w.rotated(w.heads(1).q[1] @ x, torch.tensor(6))
    expected = q @ seen["rot_k.1"][0, 2, 0] * w.heads(1).scaling
    assert_close(found.values[0].sum(), expected, rtol=1e-5, atol=1e-7)


def test_places_that_are_not_there():
    net, inputs = net_of("gpt2"), batch()
    at = {"layer": 1, "head": 0, "query": 4, "key": 1}
    wrong = {"`head`": {"head": 2}, "`query`": {"query": 8}, "`row`": {"row": 3}, "`layer`": {"layer": 5}}
    for message, change in {**wrong, "padding": {"row": 2, "query": 7}}.items():
        with pytest.raises(ValueError, match=message):
            qk_attribution(net, net.params, inputs, **{**at, **change})
    with pytest.raises(ValueError, match="norms stand behind"):
        qk_attribution(net_of("bert"), net_of("bert").params, inputs, **at)


def test_tokens_are_one_per_position_or_one_for_all():
    net, inputs = net_of("gpt2"), {"input_ids": tokens(3, 8, 8)["input_ids"]}
    every = torch.full((8, 8), 5)
    one, whole = (
        logit_contributions(net, net.params, inputs, x, minus=y) for x, y in ((5, 6), (every, every + 1))
    )  # fmt: skip
    for a, b in zip((*one, one.parts), (*whole, whole.parts), strict=True):
        assert_close(a, b, rtol=0, atol=0)
    for bad in (every[0], every[:, :1], every[:1]):
        with pytest.raises(ValueError, match=r"`tokens` must be one token per position, of shape \(8, 8\)"):
            unwrap(logit_contributions)(net, net.params, inputs, bad)
        with pytest.raises(ValueError, match="`minus` must be one token per position"):
            unwrap(logit_contributions)(net, net.params, inputs, 5, minus=bad)
    with pytest.raises(ValueError, match="`tokens` must be an integer of at least 0"):
        unwrap(logit_contributions)(net, net.params, inputs, True)


def test_inputs_whose_embeddings_are_more_than_those_of_tokens():
    net, ids = net_of("gpt2"), batch(0)["input_ids"]
    at = {"layer": 1, "head": 0, "query": 4, "key": 1}
    typed, bare = {"input_ids": ids, "token_type_ids": ids}, {"inputs_embeds": torch.zeros(3, 8, 16).double()}
    for inputs, message in ((typed, "`token_type_ids` of 'gpt2'"), (bare, "`inputs` must have `input_ids`")):
        with pytest.raises(ValueError, match=message):
            logit_contributions(net, net.params, inputs, ids)
        with pytest.raises(ValueError, match=message):
            qk_attribution(net, net.params, inputs, **at)
        with pytest.raises(ValueError, match=message):
            position_jacobian(net, net.params, inputs, key=fs.key(0))
    with pytest.raises(ValueError, match="`token_type_ids` of 'gpt2'"):
        logit_attribution(fs.objective(net, [typed], fs.causal_lm), net.params)
