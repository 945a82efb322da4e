"""Units of models on texts, by readings: the numbers of the functions over arrays, whatever the batches are."""

import numpy as np
import pytest
import torch
from problems import seeded, tokens
from test_architectures import model_of
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import funcscope as fs
from funcscope.representation import (
    activation_sparsity,
    curvature_of_stream,
    dead_neurons,
    dimension_by_scale,
    feature_geometry,
    feature_matrices,
    gradient_dead,
    intrinsic_dimension,
    reconstruction_of_layers,
    residual_gains,
    similarity_of_layers,
    similarity_to_last,
    sparsity,
    stream_gains,
    superposition,
    unit_activity,
    weight_superposition,
)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def loss(request):
    net = fs.functional(model_of(request.param, torch.float64))
    return fs.objective(net, [tokens(7, 6, 9, pad=4)], fs.causal_lm)


def test_one_pass_gives_what_the_functions_give_whatever_the_batches_are(loss):
    params, batches = loss.net.params, [inputs for inputs, _ in loss.batches]
    for each in (loss, loss.split(2)):
        found = dead_neurons(each, params)
        oracle = unit_activity(loss.net, params, batches, rule="relative")
        assert found.rule == "relative"
        for name in ("frequency", "frequency_stderr", "rms", "dead", "dead_stderr", "unit_frequency", "threshold"):
            assert_close(getattr(found, name), getattr(oracle, name), rtol=1e-9, atol=1e-12, equal_nan=True)
        gains, theirs = stream_gains(each, params), residual_gains(loss.net, params, batches)
        assert_close((gains.gain, gains.gain_stderr, gains.change), (theirs.gain, theirs.gain_stderr, theirs.change))
        seen = fs.trace(loss.net, params, batches[0], ["mlp_post"])
        spread, alone = activation_sparsity(each, params), sparsity(seen.values, seen.mask)
        assert_close((spread.hoyer, spread.gini_stderr), (alone.hoyer, alone.gini_stderr))
    assert weight_superposition(loss.net, params) == superposition(feature_matrices(loss.net, params))


def test_all_of_them_share_a_pass(loss):
    params = loss.net.params
    readings = {each.__name__: each.reading(loss, params) for each in (dead_neurons, activation_sparsity, stream_gains)}
    together = fs.read(loss, params, readings)
    assert together["dead_neurons"] == dead_neurons(loss, params)
    assert together["stream_gains"] == stream_gains(loss, params)


def test_relu_without_a_gate_counts_what_is_positive():
    config = GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8, activation_function="relu")
    net = fs.functional(seeded(0, lambda: GPT2LMHeadModel(config)))
    loss = fs.objective(net, [torch.tensor([[1, 2, 3], [4, 5, 6]])], fs.causal_lm)
    assert dead_neurons(loss, net.params).rule == "positive"
    assert dead_neurons(loss, net.params, rule="relative").rule == "relative"
    gated = LlamaConfig(
        num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=12, vocab_size=9, hidden_act="relu"
    )
    net = fs.functional(seeded(0, lambda: LlamaForCausalLM(gated)))
    loss = fs.objective(net, [torch.tensor([[1, 2, 3], [4, 5, 6]])], fs.causal_lm)
    assert dead_neurons(loss, net.params).rule == "relative"


def test_models_that_are_not_described_are_refused():
    config = OPTConfig(
        num_hidden_layers=1, hidden_size=8, num_attention_heads=2, ffn_dim=12, vocab_size=9, word_embed_proj_dim=8
    )
    net = fs.functional(seeded(0, lambda: OPTForCausalLM(config)))
    loss = fs.objective(net, [torch.tensor([[1, 2, 3], [4, 5, 6]])], fs.causal_lm)
    for call in (dead_neurons, activation_sparsity, stream_gains):
        with pytest.raises(ValueError, match="not described"):
            call(loss, net.params)


def broken(**changes):
    """A loss whose second layer has a unit that is nan."""
    config = GPT2Config(n_layer=3, n_embd=4, n_head=2, vocab_size=9, n_positions=8, **changes)
    model = seeded(0, lambda: GPT2LMHeadModel(config))
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    net = fs.functional(model)
    return fs.objective(net, [torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 0]])], fs.causal_lm)


def test_units_that_are_no_numbers_are_neither_dead_nor_sparse_nor_read():
    loss = broken(activation_function="relu")
    params = loss.net.params
    activity = dead_neurons(loss, params)
    for name in ("frequency", "frequency_stderr", "dead", "dead_stderr", "once", "always"):
        assert getattr(activity, name).isnan().tolist() == [False, True, True], name
    assert activity.num_dead[2] == 0
    assert activity.unit_frequency[1].isnan().sum() == 1
    assert activity.unit_frequency_stderr[2].isnan().all()
    assert "not finite" in " ".join(activity.notes)
    spread = activation_sparsity(loss, params)
    assert spread.active.isnan().tolist() == spread.hoyer.isnan().tolist() == [False, True, True]
    assert "not finite" in " ".join(spread.notes)
    slopes = gradient_dead(loss, params)
    assert slopes.unread.isnan().all()
    assert slopes.untaught_stderr.isnan().all()
    assert "not finite" in " ".join(slopes.notes)


def test_a_layer_without_a_root_mean_square_is_named_by_the_relative_rule():
    loss = broken()
    with pytest.raises(ValueError, match=r"activations of `mlp_post.1` are not finite"):
        dead_neurons(loss, loss.net.params)
    with pytest.raises(ValueError, match=r"activations of `mlp_post.1` are not finite"):
        unit_activity(loss.net, loss.net.params, [loss.batches[0][0]], rule="relative")


@pytest.mark.parametrize(
    "call",
    [feature_geometry, intrinsic_dimension, dimension_by_scale, similarity_of_layers, reconstruction_of_layers,
     curvature_of_stream, lambda loss, params, key: similarity_to_last(loss, [loss.net.theta] * 2, [0, 1], key=key)],
)  # fmt: skip
def test_streams_that_are_not_finite_are_named_with_a_remedy_that_there_is(call):
    loss = broken()
    with pytest.raises(ValueError, match=r"the stream `resid_post.[12]` is not finite.*check the weights"):
        call(loss, loss.net.params, key=fs.key(0))


@pytest.mark.parametrize(
    ("reading", "settings", "says"),
    [
        (dimension_by_scale, {"neighbours": []}, r"`neighbours` must have numbers of neighbours in a list.*got \[\]"),
        (dimension_by_scale, {"neighbours": [3]}, r"`neighbours` must be even"),
        (similarity_of_layers, {"num": 5}, r"`num` must be an integer of at least 19, got 5"),
        (curvature_of_stream, {"k": 0}, r"`k` must be"),
        (curvature_of_stream, {"alpha": 2.0}, r"`alpha` must be"),
        (curvature_of_stream, {"num": 0}, r"`num` must be"),
    ],
)
def test_settings_are_refused_before_a_forward_pass_is_made(loss, reading, settings, says):
    with pytest.raises(ValueError, match=says):
        reading.reading(loss, loss.net.params, key=fs.key(0), **settings)


def test_settings_of_checkpoints_are_refused_before_they_are_read(loss):
    with pytest.raises(ValueError, match="`num` must be"):
        similarity_to_last(loss, iter(()), [], key=fs.key(0), num=5)


def test_a_checkpoint_whose_streams_do_not_vary_is_noted(loss):
    theta = loss.net.theta
    found = similarity_to_last(loss, [theta * 0, theta], [0, 1], key=fs.key(0), num=19)
    assert found.similarity[0].isnan().all()
    assert not found.similarity[1].isnan().any()
    assert "nan is undefined" in " ".join(found.notes)


def test_modules_of_any_network_have_a_geometry_and_a_past():
    layers = (torch.nn.Linear, torch.nn.Tanh)
    hidden = seeded(0, lambda: torch.nn.Sequential(layers[0](3, 5), layers[1](), layers[0](5, 2)).double())
    net = fs.functional(hidden)
    x = fs.normal(fs.key(1), torch.zeros(60, 3, dtype=torch.float64))
    loss = fs.objective(net, [(x, (x[:, 0] > 0).long())], fs.classification)
    inside = torch.tanh(hidden[0](x)).detach()
    for each in (loss, loss.split(7)):
        found = feature_geometry(each, net.params, key=fs.key(2), sites=["module:1", "module:2"])
        assert found.layers == ("module:1", "module:2")
        assert found.num_rows == found.num_sequences == 60
        spectrum = torch.linalg.eigvalsh(inside.T.cov())
        oracle = spectrum.sum().square() / spectrum.square().sum()
        assert float(found.participation_ratio[0]) == pytest.approx(float(oracle))
    ahead = similarity_to_last(loss, [0.5 * net.theta, net.theta], [0, 9], key=fs.key(3), num=19, sites=["module:1"])
    assert ahead.layers == ("module:1",)
    assert float(ahead.similarity[1, 0]) == pytest.approx(1)
    with pytest.raises(ValueError, match="not described"):
        feature_geometry(loss, net.params, key=fs.key(2))
    with pytest.raises(ValueError, match="there is no module 'nine'"):
        feature_geometry(loss, net.params, key=fs.key(2), sites=["module:nine"])


def unbiased_hsic(k, other):
    """Song et al. (2012), by its sums over different samples."""
    n = len(k)
    k, other = k - np.diag(np.diag(k)), other - np.diag(np.diag(other))
    sums = (k @ other).trace() + k.sum() * other.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ other).sum()
    return sums / (n * (n - 3))


def test_similarity_to_the_last_checkpoint_is_debiased_cka_of_the_same_positions():
    net = fs.functional(model_of("gpt2", torch.float64))
    ids = torch.arange(30)[:, None]  # a token each, so that the sample has every position
    loss = fs.objective(net, [{"input_ids": ids, "labels": ids}], fs.masked_lm)
    thetas = [net.theta + 0.3 * fs.normal(fs.key(i), net.theta) for i in (1, 2)] + [net.theta]
    found = similarity_to_last(loss, thetas, [0, 3, 9], key=fs.key(4), num=39)
    kernels = []
    for theta in thetas:
        x = fs.trace(net, net.layout.unravel(theta), loss.batches[0][0], ["resid_post.1"])["resid_post.1"]
        x = x[:, 0].detach().numpy()
        kernels.append((x - x.mean(0)) @ (x - x.mean(0)).T)
    own = [unbiased_hsic(k, k) for k in kernels]
    oracle = [unbiased_hsic(k, kernels[-1]) / np.sqrt(o * own[-1]) for k, o in zip(kernels, own, strict=True)]
    assert_close(found.similarity[:, -1], torch.tensor(oracle), rtol=1e-9, atol=1e-12)
    assert found.num_sequences == 30
    above = (found.similarity - found.null_quantile) / (1 - found.null_quantile)
    assert_close(found.calibrated, above.clamp(min=0))


class Recurrent(torch.nn.Module):
    """Reads a sequence, and gives two numbers for it."""

    def __init__(self):
        super().__init__()
        self.gru, self.norm, self.out = (
            torch.nn.GRU(3, 6, batch_first=True),
            torch.nn.BatchNorm1d(6),
            torch.nn.Linear(6, 2),
        )

    def forward(self, x):
        return self.out(self.norm(self.gru(x)[0][:, -1]))


def test_networks_of_ones_own_with_sequences_batch_norm_and_a_squared_error():
    model = seeded(0, lambda: Recurrent().double().eval())
    net, x = fs.functional(model), fs.normal(fs.key(5), torch.zeros(20, 7, 3, dtype=torch.float64))
    loss = fs.objective(net, [(x, fs.normal(fs.key(6), torch.zeros(20, 2, dtype=torch.float64)))], fs.mse)
    states = model.gru(x)[0].detach()
    for each in (loss, loss.split(6)):
        of_states = feature_geometry(each, net.params, key=fs.key(7), sites=["module:gru"])
        assert (of_states.num_rows, of_states.num_sequences) == (140, 20)
        spectrum = torch.linalg.eigvalsh(states.flatten(0, 1).T.cov())
        assert float(of_states.participation_ratio[0]) == pytest.approx(
            float(spectrum.sum() ** 2 / (spectrum**2).sum())
        )
        last = feature_geometry(each, net.params, key=fs.key(7), sites=["module:norm"])
        assert last.num_rows == 20
    with pytest.raises(ValueError, match="`module:norm` has the shape"):
        feature_geometry(loss, net.params, key=fs.key(7), sites=["module:gru", "module:norm"])
