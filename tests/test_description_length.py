"""Two-part codes. Oracles: Kraft sums over whole sample spaces, `math.comb`, the loss itself at the quantised weights."""

import lzma
import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import seeded
from torch import nn

import funcscope as fs
from funcscope.core.keys import key, normal
from funcscope.information import compressed_weights, description_length, universal_integer_bits
from funcscope.information.description_length import integer_bits, quantised


def problem(num=40, seed=0):
    model = seeded(seed, lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    x = normal(key(seed), torch.zeros(num, 3, dtype=torch.float64))
    net = fs.functional(model)
    loss = fs.objective(net, [(x, (x[:, 0] > 0).long())], fs.classification)
    return loss, normal(key(seed + 1), net.theta)


def test_integer_lengths_are_those_of_a_code_by_the_constant_alone():
    """E35: the lengths without log2 2.865 have a Kraft sum above 2."""
    term = np.log2(np.arange(1, 300_001))
    documented = np.zeros_like(term)
    while (term > 0).any():
        documented += np.maximum(term, 0)
        term = np.log2(np.maximum(term, 1))
    assert (2.0**-documented).sum() == pytest.approx(2.35, abs=0.005)
    for n in (1, 2, 3, 7, 16, 17, 1000, 300_000):
        assert universal_integer_bits(n) == pytest.approx(math.log2(2.8651085) + documented[n - 1], rel=1e-12)
    assert 0.8 < (2.0 ** -(documented + universal_integer_bits(1))).sum() < 1
    with pytest.raises(ValueError, match="at least 1"):
        universal_integer_bits(0)


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=30))
def test_bits_of_integers_are_counts_of_histograms_and_of_arrangements(values):
    book, place = integer_bits(np.array(values))
    num, levels = len(values), max(values) - min(values) + 1
    counts = [values.count(v) for v in set(values)]
    arrangements = math.factorial(num) // math.prod(math.factorial(c) for c in counts)
    zigzag = [0]
    while min(values) not in zigzag:
        zigzag += [-(len(zigzag) // 2 + 1), len(zigzag) // 2 + 1]
    first = universal_integer_bits(zigzag.index(min(values)) + 1) + universal_integer_bits(levels)
    assert place == pytest.approx(math.log2(arrangements), abs=1e-9)
    assert book == pytest.approx(32 + first + math.log2(math.comb(num + levels - 1, levels - 1)), abs=1e-9)


@pytest.mark.parametrize(("num", "levels"), [(1, 3), (3, 2), (4, 3), (5, 2)])
def test_codes_of_all_sequences_fill_the_code_space(num, levels):
    """Over all sequences of n symbols, the shares 2^-L add up to 1: exactly, of whole numbers."""
    total = Fraction(0)
    for word in product(range(levels), repeat=num):
        counts = [word.count(k) for k in range(levels)]
        arrangements = math.factorial(num) // math.prod(map(math.factorial, counts))
        total += Fraction(1, arrangements * math.comb(num + levels - 1, levels - 1))
    assert total == 1


def test_weights_are_not_clipped():
    """E35: a step of sigma sqrt(12) / 2^b and a clamp at 2^(b-1) - 1 cut off at 1.72 sigma, 8.6 % of normal weights."""
    w = normal(key(0), torch.zeros(20_000, dtype=torch.float64))
    bits = 8
    delta = float(w.std()) * 12**0.5 / 2**bits
    assert (2 ** (bits - 1) - 1) * delta / float(w.std()) == pytest.approx(1.72, abs=0.005)
    clamped = (w / delta).round().clamp(-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) * delta
    assert float(((w - clamped).abs() > delta).double().mean()) == pytest.approx(0.086, abs=0.006)
    made = quantised(w, delta / float(w.square().mean().sqrt()))
    assert float((w - made.values).abs().max()) <= made.step / 2 * (1 + 1e-9)


@given(st.floats(0.001, 2), st.integers(0, 1000))
def test_labels_are_coded_by_the_quantised_model(step, seed):
    """E35: data bits of the full weights are of a model that the receiver does not have."""
    loss, theta = problem(seed=seed)
    found = description_length(loss, theta, step=step)
    leaves = {name: quantised(value, step).values for name, value in loss.layout.unravel(theta).items()}
    assert found.data_bits == pytest.approx(float(loss(leaves)) * 40 / math.log(2), rel=1e-9)
    assert found.distortion_bits == pytest.approx(float(loss(leaves) - loss(theta)) * 40 / math.log(2), abs=1e-8)
    assert found.total_bits == pytest.approx(found.weight_bits + found.data_bits, rel=1e-12)
    assert found.weight_bits == pytest.approx(float(found.leaf_bits.sum()), rel=1e-12)
    assert (found.num_tokens, found.num_parameters) == (40, 26)
    assert found.bits_per_token * 40 == pytest.approx(found.data_bits, rel=1e-12)


def test_error_of_the_distortion_is_that_of_paired_sums():
    loss, theta = problem()
    found = description_length(loss, theta, step=0.5)
    leaves = {name: quantised(value, 0.5).values for name, value in loss.layout.unravel(theta).items()}
    apart = (loss.terms(leaves)[0] - loss.terms(theta)[0]) / math.log(2)
    assert found.distortion_bits_stderr == pytest.approx(float(apart.std()) * 40**0.5, rel=1e-9)


def test_a_finer_step_costs_weights_and_spares_labels():
    loss, theta = problem()
    steps = [2.0, 0.5, 0.1, 0.01]
    made = [description_length(loss, theta, step=step) for step in steps]
    weights = [each.weight_bits for each in made]
    assert weights == sorted(weights)
    assert abs(made[-1].distortion_bits) < 0.2 < abs(made[0].distortion_bits)
    rate = (weights[-1] - weights[-2]) / (26 * math.log2(10))
    assert 0.5 < rate < 2.5  # bits per weight and halving, besides the histograms of few weights


def test_bits_per_weight_of_many_normal_weights_are_their_entropy():
    """Differential entropy of a standard normal less log2 of the step: 2.05 + 2 bits at a quarter."""
    w = normal(key(3), torch.zeros(50_000, dtype=torch.float64))
    book, place = integer_bits(quantised(w, 0.25).integers)
    entropy = 0.5 * math.log2(2 * math.pi * math.e) + 2
    assert (book + place) / 50_000 == pytest.approx(entropy, abs=0.02)
    made = compressed_weights({"w": w.float()}, step=0.25)
    assert made.entropy_per_parameter == pytest.approx(entropy, abs=0.02)
    assert entropy < made.bits_per_parameter < entropy + 1.2
    assert made.raw_bits_per_parameter > 28  # of 32: mantissas are noise


def test_compressed_bits_are_lzmas_of_the_narrowest_integers():
    params = {"a": torch.tensor([[1.0, -3.0], [0.5, 2.0]]), "b": torch.zeros(3)}
    made = compressed_weights(params, step=0.5)
    each = [quantised(value, 0.5).integers for value in params.values()]
    small = b"".join(x.astype(np.int8).tobytes() for x in each)
    assert made.bits_per_parameter == 8 * len(lzma.compress(small)) / 7
    raw = b"".join(value.numpy().tobytes() for value in params.values())
    assert made.raw_bits_per_parameter == 8 * len(lzma.compress(raw)) / 7
    half = compressed_weights({"a": torch.ones(64, dtype=torch.bfloat16)}, step=1.0)
    assert half.num_parameters == 64


def test_tokens_of_a_language_model_are_counted_with_the_shift():
    net = fs.functional(seeded(0, lambda: nn.Embedding(9, 9)))
    ids = seeded(1, lambda: torch.randint(9, (6, 5)))
    loss = fs.objective(net, [ids], fs.causal_lm)
    found = description_length(loss, loss.net.params, step=0.05)
    assert found.num_tokens == 6 * 4  # six sequences of five tokens
    assert found.data_bits == pytest.approx(24 * found.bits_per_token, rel=1e-12)
    assert "24 tokens" in found.head
    assert "no other number" in " ".join(found.notes)


def test_doors():
    loss, theta = problem()
    with pytest.raises(ValueError, match="`step` must be a finite number above 0"):
        description_length(loss, theta, step=0.0)
    with pytest.raises(ValueError, match="`a` must be finite"):
        compressed_weights({"a": torch.tensor([math.nan])}, step=1.0)
    with pytest.raises(ValueError, match="a weight at least"):
        compressed_weights({}, step=1.0)
    squares = fs.custom(lambda out, y: (out[:, 0] - y).square())
    other = fs.objective(loss.net, [(torch.ones(2, 3).double(), torch.ones(2).double())], squares)
    with pytest.raises(ValueError, match="cross-entropy in nats"):
        description_length(other, theta, step=1.0)


@pytest.mark.parametrize("step", [1e-50, 1e-18, 1e39])
def test_steps_that_no_float32_or_no_integer_can_hold_are_refused(step):
    """Divided by 0, and rounded to the largest integer, weights have a code of nonsense."""
    loss, theta = problem()
    with pytest.raises(ValueError, match=r"`step` must give a float32 above 0"):
        description_length(loss, theta, step=step)
    with pytest.raises(ValueError, match=r"of `w`"):
        compressed_weights({"w": torch.tensor([1.0, 2.0])}, step=step)
    assert math.isfinite(compressed_weights({"w": torch.tensor([1.0, 2.0])}, step=1e-14).bits_per_parameter)


def test_weights_without_a_code_are_named():
    loss, theta = problem()
    name = loss.net.layout.names[0]
    with pytest.raises(ValueError, match=f"`{name}` must be finite"):
        description_length(loss, theta * math.nan, step=0.1)


def test_lengths_are_of_integers():
    with pytest.raises(ValueError, match=r"`n` must be an integer of at least 1, got 1\.5"):
        universal_integer_bits.__wrapped__(1.5)
    assert universal_integer_bits(10**400) == pytest.approx(math.log2(10) * 400, rel=0.02)
