"""The metrics of information on models: numpy by another way, hostile weights, classifiers, models without description."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import seeded
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

import funcscope as fs
from funcscope.information import (
    description_length,
    expected_calibration_error,
    layer_entropy,
    layer_information,
    output_calibration,
    pid_analysis,
    prediction_divergence,
    usable_information_by_layer,
)

KEY = fs.key(0)
SMALL = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 9, "n_positions": 16, "bos_token_id": 0}
SMALL["eos_token_id"] = 0


def gpt2():
    return seeded(0, lambda: GPT2LMHeadModel(GPT2Config(**SMALL)))


def tokens(num=12, length=6, seed=1):
    return torch.randint(0, 9, (num, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model, batches=None, criterion=fs.causal_lm):
    return fs.objective(fs.functional(model), [tokens()] if batches is None else batches, criterion)


@pytest.fixture
def classifier():
    """A loss over as many sequences as they have tokens, so that shapes alone cannot tell rows from positions."""
    model = seeded(0, lambda: GPT2ForSequenceClassification(GPT2Config(**SMALL, num_labels=2, pad_token_id=0)))
    return loss_of(model, [({"input_ids": tokens(6, 6)}, torch.arange(6) % 2)], fs.classification)


OF_STREAMS = pytest.mark.parametrize(
    "metric", [layer_entropy, layer_information, usable_information_by_layer, pid_analysis], ids=lambda f: f.__name__
)


@OF_STREAMS
def test_activations_that_are_not_finite_are_named_by_their_site(metric):
    model = gpt2()
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = math.nan
    loss = loss_of(model)
    with pytest.raises(
        ValueError, match=r"activations at `(resid_post|mlp_out)\.1` must be finite, and those of \d+ pos"
    ):
        metric(loss, loss.net.params, key=KEY)


@pytest.mark.parametrize("metric", [usable_information_by_layer, pid_analysis], ids=lambda f: f.__name__)
def test_one_label_for_a_sequence_is_not_one_for_a_token(metric, classifier):
    with pytest.raises(
        ValueError, match=r"must score a label at each token, shape \(6, 6\), got labels of shape \(6,\)"
    ):
        metric(classifier, classifier.net.params, key=KEY)
    with pytest.raises(ValueError, match="the loss must score labels"):
        loss = loss_of(gpt2(), [({"input_ids": tokens()}, torch.ones(12, 6, 9))], fs.mse)
        metric(loss, loss.net.params, key=KEY)


def test_outputs_of_a_classifier_are_one_per_sequence(classifier):
    net = classifier.net
    log_p, log_q = (net.apply(net.layout.unravel(x), {"input_ids": tokens(6, 6)}).double().log_softmax(-1).detach()
                    for x in (net.theta, 2 * net.theta))  # fmt: skip
    found = layer_entropy(classifier, net.params, key=KEY)
    entropies = -(log_p.exp() * log_p).sum(-1)
    assert float(found.output_entropy.value) == pytest.approx(float(entropies.mean()), rel=1e-6)
    assert float(found.output_entropy.stderr) == pytest.approx(float(entropies.std()) / 6**0.5, rel=1e-5)
    assert (found.num_tokens, found.num_rows) == (6, 36)
    apart = prediction_divergence(classifier, net, 2 * net.theta)
    assert apart.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-5)
    assert apart.num_sequences == 6


def test_calibration_needs_no_description():
    small = {
        "hidden_size": 8,
        "word_embed_proj_dim": 8,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = seeded(0, lambda: OPTForCausalLM(OPTConfig(vocab_size=9, max_position_embeddings=16, **small)).eval())
    loss = loss_of(model, [tokens()[:5], tokens()[5:]])
    found = output_calibration(loss, loss.net.params, key=KEY, num=20)
    with torch.no_grad():
        logits = model(input_ids=tokens()).logits
    _, targets = fs.causal_lm.prepare(tokens())
    assert found.nll == pytest.approx(float(loss(loss.net.theta)), rel=1e-6)
    alone = expected_calibration_error(logits, targets, key=KEY, bins=15, kind="equal_width", num=20)
    assert found.ece == pytest.approx(alone.ece, rel=1e-6)


def test_what_has_no_ceiling_has_none_near_it():
    loss = loss_of(gpt2())
    assert layer_information(loss, loss.net.params, key=KEY, dims=2).num_saturated is None
    found = layer_information(loss, loss.net.params, key=KEY, dims=1, estimator="ksg")
    assert found.num_saturated is not None
    assert found.ceiling is not None
    assert np.nanmax(found.with_next.numpy()) <= found.ceiling + 1e-9


def test_few_rows_are_probed_in_the_components_that_were_asked_for(monkeypatch):
    """Not in all units, which are the more to fit the fewer the rows are."""
    from funcscope.information import of_outputs

    asked = []

    def profile(layers, labels, **options):
        asked.append(options["pca"])
        raise StopIteration

    monkeypatch.setattr(of_outputs, "information_profile", profile)
    loss = loss_of(gpt2(), [tokens(5, 3)])
    for pca in (6, 8, None):
        with pytest.raises(StopIteration):
            usable_information_by_layer(loss, loss.net.params, key=KEY, pca=pca)
    assert asked == [6, None, None]


def test_what_is_no_loss_no_layer_and_no_model_of_the_vocabulary_is_named():
    loss = loss_of(gpt2())
    net, params = loss.net, loss.net.params
    for call in (
        lambda: layer_entropy.reading.__wrapped__(net, params, key=KEY),
        lambda: output_calibration.reading.__wrapped__(net, params, key=KEY),
        lambda: description_length.__wrapped__(net, net.theta, step=0.1),
        lambda: divergence(net, net, net),
    ):
        with pytest.raises(TypeError, match="`loss` must be a Loss, got a Functional"):
            call()
    for layer in ("a", 1.0, 2):
        with pytest.raises(ValueError, match="`layer` must be one of 0 to 1, or -1 for the last"):
            pid_analysis.reading.__wrapped__(loss, params, key=KEY, layer=layer)
    wider = seeded(0, lambda: GPT2LMHeadModel(GPT2Config(**SMALL | {"vocab_size": 12})))
    with pytest.raises(ValueError, match=r"`end` must have outputs of the same shape as `start`, \(12, 6, 9\)"):
        prediction_divergence(loss, net, fs.functional(wider))
    with pytest.raises(ValueError, match="`start` must be a flat vector"):
        prediction_divergence(loss, net.theta[1:], net)


def divergence(*args):
    """Without the check of types that the tests have."""
    return prediction_divergence.__wrapped__.__wrapped__(*args)


def padded(rows):
    """A batch of sequences of unequal lengths, as wide as its longest."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("size", [1, 4])
def test_batches_and_company_change_no_number(size):
    """One pass over one batch is one over many, padded to other widths; alone is together."""
    rows = [row[: 3 + i % 6] for i, row in enumerate(tokens(12, 8))]
    whole = loss_of(gpt2(), [padded(rows)])
    parts = loss_of(gpt2(), [padded(rows[i : i + size]) for i in range(0, 12, size)])
    options = {"key": KEY}
    metrics = {
        layer_entropy: options,
        layer_information: options | {"dims": 2},
        usable_information_by_layer: options | {"num_classes": 2, "folds": 2},
        pid_analysis: options | {"num_classes": 2, "folds": 2},
        output_calibration: options | {"num": 20},
    }
    readings = {metric.__name__: metric.reading(whole, whole.net.params, **more) for metric, more in metrics.items()}
    together = fs.read(whole, whole.net.params, readings)
    for metric, more in metrics.items():
        alone = metric(whole, whole.net.params, **more)
        assert alone == together[metric.__name__]
        split = numbers(metric(parts, parts.net.params, **more))
        assert len(split) > 3
        for name, value in numbers(alone).items():
            np.testing.assert_allclose(split[name], value, rtol=1e-4, atol=1e-6, err_msg=f"{metric.__name__} {name}")


def numbers(result):
    """All that are not whole."""
    floats = {name: value for name, value in vars(result).items() if isinstance(value, float)}
    return floats | {name: value.numpy() for name, value in result.arrays().items() if value.is_floating_point()}
