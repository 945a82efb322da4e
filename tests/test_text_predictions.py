"""Predictions and attributions on one text: those of the metrics over data, token by token, without padding."""

import pytest
import torch
from problems import tokens
from test_architectures import model_of
from torch.testing import assert_close

import funcscope as fs
from funcscope.mechanistic import attribution_on_text, lens_on_text, logit_lens, token_attribution
from funcscope.view.token_figures import lens_table


def net_and_batch(line, *, left):
    return fs.functional(model_of(line, torch.float64)), tokens(7, 3, 9, pad=4, left=left)


@pytest.mark.parametrize("line", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("left", [True, False])
def test_means_of_the_table_are_those_of_the_lens(line, left):
    net, batch = net_and_batch(line, left=left)
    loss = fs.objective(net, [batch], fs.causal_lm)
    at = int((batch["attention_mask"] == 0).any(1).nonzero()[0])
    made = lens_on_text(loss, net.params, sequence=at)
    alone = fs.objective(net, [{name: x[at : at + 1] for name, x in batch.items()}], fs.causal_lm)
    whole = logit_lens(alone, net.params)
    assert_close(made.target_probability[:, :-1].log().mean(1).double(), whole.log_prob.cpu(), rtol=1e-5, atol=1e-6)
    assert_close(made.entropy[:, :-1].mean(1).double(), whole.entropy.cpu(), rtol=1e-5, atol=1e-6)
    assert bool(made.target_probability[:, -1].isnan().all())
    real = batch["input_ids"][at][batch["attention_mask"][at].bool()]
    assert made.tokens == [str(i) for i in real.tolist()]
    if line != "gpt2" or not left:  # its positions count the padding before a text
        _check_alone(net, real, made)


def _check_alone(net, real, made):
    logits = net.apply(net.params, real[None])[0]
    assert made.predictions[-1] == [str(i) for i in logits.argmax(-1).tolist()]
    assert_close(made.probability[-1].double(), logits.softmax(-1).max(-1).values.detach(), rtol=1e-5, atol=1e-6)


def test_attributions_are_those_of_the_text_without_its_padding():
    net, batch = net_and_batch("gpt2", left=False)
    loss = fs.objective(net, [batch], fs.causal_lm)
    at = int((batch["attention_mask"] == 0).any(1).nonzero()[0])
    real = batch["input_ids"][at][batch["attention_mask"][at].bool()]
    made = attribution_on_text(loss, net.params, lambda ids: [f"t{i}" for i in ids], sequence=at)
    alone = token_attribution(net, net.params, {"input_ids": real[None]}, tol=1e-2)
    assert_close(made.attribution, alone.attributions[0])
    assert made.predicted == f"t{int(net.apply(net.params, real[None])[0, -1].argmax())}"
    assert made.tokens == [f"t{i}" for i in real.tolist()]
    off = abs(float(made.attribution.sum()) - (made.log_prob - made.baseline_log_prob))
    assert off <= 1e-2 * abs(made.log_prob - made.baseline_log_prob) + 1e-9


def test_what_is_not_there_is_said():
    net, batch = net_and_batch("gpt2", left=True)
    loss = fs.objective(net, [batch], fs.causal_lm)
    for call in (lens_on_text, attribution_on_text):
        with pytest.raises(ValueError, match="`sequence` must be one of the 3 of the data, from 0 on, got 9"):
            call(loss, net.params, sequence=9)
    with pytest.raises(ValueError, match="`num` must be"):
        lens_on_text(loss, net.params, num=0)
    bert, text = fs.functional(model_of("bert", torch.float64)), tokens(1, 2, 6)
    with pytest.raises(ValueError, match="not linear"):
        lens_on_text(fs.objective(bert, [text | {"labels": text["input_ids"]}], fs.masked_lm), bert.params)


def test_the_table_has_every_prediction():
    net, batch = net_and_batch("gpt2", left=True)
    made = lens_on_text(fs.objective(net, [batch], fs.causal_lm), net.params, lambda ids: ["<b>"] * len(ids))
    values = (x.numpy() for x in (made.target_probability, made.entropy))
    fig = lens_table(made.probability.numpy(), made.predictions, made.tokens, *values)
    (heat,) = fig.data
    assert {text for row in heat.text for text in row} == {"&lt;b&gt;"}
    assert f"{float(made.entropy[0, 0]):.2f} nats" in heat.hovertext[0][0]
