"""Activity of units. Oracles: loops over tokens, units that are built dead, dense gradients, the model's own sites."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import seeded, tokens
from test_circuits import net_of
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

import funcscope as fs
from funcscope.core.keys import uniform
from funcscope.core.standard_errors import ratio_stderr
from funcscope.representation import gradient_dead, unit_activity, unit_sums
from funcscope.representation.sequence_sums import Ratios, Reached
from funcscope.representation.units import activity_of


def relu_model():
    """Two layers, of whose first MLP unit 0 never fires (bias) and unit 1 is read by nothing; of the second unit 2 always."""
    config = GPT2Config(
        n_layer=2, n_embd=8, n_head=2, n_inner=10, vocab_size=40, n_positions=16, activation_function="relu",
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = seeded(0, lambda: GPT2LMHeadModel(config).double())
    with torch.no_grad():
        for layer, unit, bias in ((0, 0, -50.0), (1, 2, 50.0)):
            model.transformer.h[layer].mlp.c_fc.bias[unit] = bias
        model.transformer.h[0].mlp.c_proj.weight[1] = 0.0
    return fs.functional(model)


def data():
    return [tokens(1, 4, 7, pad=3), tokens(2, 3, 5, pad=2, left=True)]


def values_of(net, batches, kind):
    """(tokens, layers, units) of real tokens, and the number of the sequence of each."""
    rows, sequence, start = [], [], 0
    for inputs in batches:
        seen, mask = fs.trace(net, net.params, inputs, [kind])[kind], inputs["attention_mask"].bool()
        for row in range(len(mask)):
            rows.append(seen[:, row, mask[row]].movedim(1, 0))
            sequence += [start + row] * int(mask[row].sum())
        start += len(mask)
    return torch.cat(rows), torch.tensor(sequence)


def by_sequence(x, sequence):
    return torch.zeros(int(sequence.max()) + 1, *x.shape[1:], dtype=torch.float64).index_add(0, sequence, x.double())


@pytest.mark.parametrize("rule", ["positive", "relative"])
def test_activity_is_its_definition_over_real_tokens(rule):
    net = relu_model()
    a, sequence = values_of(net, data(), "mlp_post")
    found = unit_activity(net, net.params, data(), rule=rule)
    rms = a.square().mean((0, 2)).sqrt()
    active = a > 0 if rule == "positive" else a.abs() > 1e-2 * rms[:, None]
    assert_close(found.unit_frequency, active.double().mean(0))
    assert_close(found.frequency, active.double().mean((0, 2)))
    assert_close(found.rms, rms)
    assert_close(found.unit_mean, a.mean(0))
    assert_close(found.unit_rms, a.square().mean(0).sqrt())
    counts = torch.bincount(sequence).double()
    sums = by_sequence(active.double().mean(2), sequence)
    assert_close(found.frequency_stderr, ratio_stderr(sums.T, counts))
    squares = by_sequence(a.square().mean(2), sequence)
    assert_close(found.rms_stderr, ratio_stderr(squares.T, counts) / (2 * rms))
    assert_close(found.unit_frequency_stderr[1], ratio_stderr(by_sequence(active[:, 1], sequence).T, counts))
    assert found.num_tokens == len(a)
    assert found.num_sequences == 7
    assert found.bound_tokens == 3 / len(a)
    assert found.bound_sequences == 3 / 7
    dead = ~active.any(0)
    assert_close(found.num_dead, dead.sum(1))
    assert_close(found.dead, dead.double().mean(1))
    assert_close(found.always, active.all(0).double().mean(1))
    left_out = torch.stack([(~active[sequence != s].any(0)).double().mean(1) for s in range(7)])
    jackknife = (6 / 7 * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
    assert_close(found.dead_stderr, jackknife)
    always = torch.stack([active[sequence != s].all(0).double().mean(1) for s in range(7)])
    assert_close(found.always_stderr, (6 / 7 * (always - always.mean(0)).square().sum(0)).sqrt())


@pytest.mark.parametrize("rule", ["positive", "relative"])
def test_the_split_into_batches_decides_nothing(rule):
    net = relu_model()
    rows = [(inputs, i) for inputs in data() for i in range(len(inputs["input_ids"]))]
    single = [{name: value[i : i + 1] for name, value in inputs.items()} for inputs, i in rows]
    one, other = (unit_activity(net, net.params, each, rule=rule) for each in (data(), single))
    for name in ("frequency", "frequency_stderr", "rms", "dead", "dead_stderr", "once", "always_stderr", "unit_rms"):
        assert_close(getattr(one, name), getattr(other, name), rtol=1e-7, atol=1e-9, equal_nan=True)


def test_dead_by_the_output_before_the_nonlinearity_takes_dead_units_for_alive():
    """The documented count: units whose mean |output of the linear layer| is below 1e-6."""
    net = relu_model()
    pre, _ = values_of(net, data(), "mlp_pre")
    documented = pre.abs().mean(0) < 1e-6
    assert not documented.any()  # also the unit at about -50
    found = unit_activity(net, net.params, data())
    assert found.unit_frequency[0, 0] == 0
    assert found.num_dead[0] >= 1
    assert found.unit_frequency[1, 2] == 1


def test_gelu_units_are_hardly_ever_zero_and_take_the_relative_rule():
    a = torch.nn.functional.gelu(torch.full((1, 50, 1), -3.0).expand(1, 50, 4)).clone()
    a[..., 1:] = 2.0
    mask = torch.ones(1, 50, dtype=torch.bool)
    assert a.abs().min() > 0  # "zero activation" would find none
    rms = float(a.double().square().mean().sqrt())
    sums = unit_sums(a, mask, rule="relative", threshold=1e-2 * rms)
    assert activity_of({"a": sums}, rule="relative").num_dead.tolist() == [1]


def test_saturated_units_are_at_a_flat_end():
    a = torch.tensor([[[0.999, 0.0, -1.0], [0.995, 0.5, 0.97], [1.0, -0.999, 0.0]]])
    sums = unit_sums(a, torch.ones(1, 3, dtype=torch.bool), bounds=(-1.0, 1.0))
    found = activity_of({"tanh": sums}, rule="positive", flat=True)
    assert_close(found.unit_flat[0], torch.tensor([1.0, 1 / 3, 1 / 3], dtype=torch.float64))
    assert_close(found.flat, torch.tensor([5 / 9], dtype=torch.float64))


def test_the_bound_of_three_over_n_holds_95_percent():
    for num in (10, 100, 10000):
        at_bound = (1 - 3 / num) ** num  # the probability that such a unit is never seen
        assert 0.02 < at_bound < 0.05
    assert (1 - 2.5 / 10000) ** 10000 > 0.05  # 2.5 / N would not hold it


def test_the_bound_by_tokens_fails_where_tokens_of_a_sequence_go_together_and_the_one_by_sequences_holds():
    length, num, frequency = 20, 30, 0.05  # fires in whole sequences or not at all
    unseen = (1 - frequency) ** num  # no sequence of 30 has it
    assert unseen > 0.2
    assert 3 / (length * num) < frequency < 3 / num


def test_gradients_of_units_are_the_dense_ones():
    net = relu_model()
    loss = fs.objective(net, data(), fs.causal_lm)
    found = gradient_dead(loss, net.params)
    largest = {kind: torch.zeros(2, 10, dtype=torch.float64) for kind in ("mlp_post", "mlp_pre")}
    for inputs, targets in loss.batches:
        for kind, most in largest.items():
            for layer in range(2):
                site = f"{kind}.{layer}"
                seen = fs.trace(net, net.params, inputs, [site])
                value = seen[site].detach().requires_grad_()
                out, _ = fs.apply_with(net, net.params, inputs, {site: value})
                each, weight = loss.criterion.token_loss(out, targets)
                (each * weight).sum().backward()
                sizes = value.grad.abs()[seen.mask].amax(0)
                most[layer] = torch.maximum(most[layer], sizes)
    assert_close(found.largest_post, largest["mlp_post"])
    assert_close(found.largest_pre, largest["mlp_pre"])
    assert_close(found.unread, (largest["mlp_post"] == 0).double().mean(1))
    assert_close(found.untaught, (largest["mlp_pre"] == 0).double().mean(1))


def test_a_unit_that_never_fires_is_not_without_gradient_behind_the_nonlinearity():
    net = relu_model()
    found = gradient_dead(fs.objective(net, data(), fs.causal_lm), net.params)
    assert found.largest_post[0, 0] > 0  # dead, and its output would matter
    assert found.largest_pre[0, 0] == 0
    assert found.largest_post[0, 1] == 0  # read by nothing
    assert found.largest_pre[0, 1] == 0
    assert found.unread.tolist() == [0.1, 0.0]
    assert found.untaught[0] >= 0.2


@pytest.mark.parametrize("line", ["llama", pytest.param("bert", marks=pytest.mark.slow)])
def test_other_families_have_units(line):
    net = net_of(line)
    found = unit_activity(net, net.params, data(), rule="relative")
    a, _ = values_of(net, data(), "mlp_post")
    rms = a.double().square().mean(0).sqrt()
    assert_close(found.unit_rms, rms, rtol=1e-6, atol=1e-9)
    threshold = 1e-2 * rms.square().mean(1, keepdim=True).sqrt()
    assert_close(found.unit_frequency, (a.double().abs() > threshold).double().mean(0))
    if line == "llama":  # of either sign: the product with the other branch
        assert (a < 0).double().mean() > 0.2


def test_units_refuse_what_they_cannot_count():
    a, mask = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="`threshold`"):
        unit_sums(a, mask, threshold=-1.0)
    with pytest.raises(ValueError, match="`bounds`"):
        unit_sums(a, mask, bounds=(1.0, -1.0))
    with pytest.raises(ValueError, match="thresholds"):
        unit_sums(a, mask).merge(unit_sums(a, mask, threshold=1.0))
    with pytest.raises(ValueError, match="no token"):
        activity_of({"a": unit_sums(a, ~mask)}, rule="positive")
    plain = fs.functional(seeded(0, lambda: torch.nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="not described"):
        unit_activity(plain, plain.params, [torch.zeros(1, 3)])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), num=st.integers(2, 9), cut=st.integers(0, 9))
def test_sums_of_parts_are_the_sums_of_the_whole(seed, num, cut):
    a = fs.normal(fs.key(seed), torch.zeros(3, num, dtype=torch.float64))
    b = uniform(fs.key(seed + 1), torch.zeros(num, dtype=torch.float64)).mul(4).floor()
    a = torch.where(b > 0, a, 0.0)
    whole, parts = Ratios.of(a, b), Ratios.of(a[:, :cut], b[:cut]).merge(Ratios.of(a[:, cut:], b[cut:]))
    assert_close(whole.stderr, parts.stderr, rtol=1e-6, atol=1e-9, equal_nan=True)
    assert_close(whole.stderr, ratio_stderr(a, b), rtol=1e-6, atol=1e-9, equal_nan=True)
    hit = a.T > 0.5
    one, other = Reached.of(hit), Reached.of(hit[:cut]).merge(Reached.of(hit[cut:]))
    assert torch.equal(one.hits, other.hits)
    assert torch.equal(one.last[one.hits > 0], other.last[other.hits > 0])
    never = [(~hit[torch.arange(num) != s].any(0)).double().mean() for s in range(num)]
    spread = (num - 1) / num * (torch.stack(never) - torch.stack(never).mean()).square().sum()
    assert_close(other.never.stderr, spread.sqrt())


def test_one_sequence_has_no_error():
    sums = Ratios.of(torch.ones(1, 1), torch.ones(1))
    assert math.isnan(float(sums.stderr))
    assert math.isnan(float(Reached.of(torch.ones(1, 2, dtype=torch.bool)).never.stderr))
