"""Signal and noise of gradients: simulated samples of known mean and covariance, per-sample gradients by numpy, and doors."""

import math

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import loss_of, seeded
from torch import nn
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.layout import View
from funcscope.core.standard_errors import jackknife_stderr
from funcscope.curvature import Grams, per_sample_gradients
from funcscope.curvature.blocks import block_views
from funcscope.curvature.whitening import cut_views
from funcscope.gradients import gradient_noise, gram_noise, two_batch_noise


def grams_of(samples):
    """Of many data sets at once, each a block of its own: (repetitions, n, d)."""
    names = [str(i) for i in range(len(samples))]
    return Grams(samples @ samples.mT, "sequence", 0, [], names)


def drawn(seed, *shape):
    return fs.normal(fs.key(seed), torch.zeros(shape, dtype=torch.float64))


MEAN = torch.linspace(-1, 1, 20, dtype=torch.float64)
SD = torch.linspace(0.5, 3, 20, dtype=torch.float64)
REPETITIONS = 400


@pytest.mark.parametrize(("num", "scale"), [(5, 1.0), (12, 1.0), (24, 0.0)])
def test_square_and_trace_of_normal_samples_are_unbiased_and_their_errors_cover(num, scale):
    """Oracle: the mean and covariance that the samples are drawn with."""
    samples = scale * MEAN + SD * drawn(num, REPETITIONS, num, 20)
    noise = gram_noise(grams_of(samples), torch.ones(num))
    square, trace = scale**2 * MEAN.square().sum(), SD.square().sum()
    for value, error, truth in (
        (noise.square, noise.square_stderr, square),
        (noise.trace, noise.trace_stderr, trace),
        (noise.snr_square, noise.snr_square_stderr, num * square / trace),
    ):
        spread = value.std()
        if value is not noise.snr_square:  # a ratio is unbiased to first order only
            assert abs(value.mean() - truth) < 4 * spread / REPETITIONS**0.5
        quantile = scipy.stats.t.ppf(0.975, num - 1)
        covered = ((value - truth).abs() < quantile * error).double().mean()
        assert 0.88 < covered < 0.995
        assert 0.75 < error.square().mean().sqrt() / spread < 1.35
    plain = samples.mean(1).square().sum(1)
    assert (plain.mean() - square - trace / num).abs() < 4 * plain.std() / REPETITIONS**0.5
    assert plain.mean() - square > 10 * plain.std() / REPETITIONS**0.5  # the square of the sample's mean is too large


def test_the_documented_ratio_grows_with_the_number_of_coordinates_and_this_one_does_not():
    """The documented SNR: the norm of the mean gradient over the mean of the coordinates' standard deviations."""
    num, documented = 5, []
    c4 = math.sqrt(2 / (num - 1)) * math.gamma(num / 2) / math.gamma((num - 1) / 2)
    for dims in (100, 10_000, 1_000_000):
        samples = fs.normal(fs.key(dims), torch.zeros(1, num, dims, dtype=torch.float64))
        documented.append(float(samples.mean(1).norm() / samples.std(1).mean()))
        assert documented[-1] == pytest.approx(math.sqrt(dims / num) / c4, rel=0.15 if dims == 100 else 0.02)
        noise = gram_noise(grams_of(samples), torch.ones(num))
        assert abs(noise.total_snr_square.value) < 4 * noise.total_snr_square.stderr
        assert noise.total_snr_square.value < 0.7
        assert noise.noise_scale.isnan().all()
    assert documented[0] > 3
    assert documented[-1] > 400  # "reliable above 3", of noise alone


def test_with_weights_they_are_those_of_the_weighted_mean_and_cover():
    """Oracle: g = w G + w^2 a + noise with weights of two sizes, with known moments; a ties residuals to weights."""
    num, G, a = 40, 0.3 * torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    a[0] = 0.5
    weights = seeded(0, lambda: torch.randint(0, 2, (150, num))).double() * 3 + 1  # 1 or 4
    each = weights[..., None]
    samples = each * G + each.square() * a + each.sqrt() * drawn(3, 150, num, 6)
    first, second, third, fourth = (((1 + 4**k) / 2) for k in (1, 2, 3, 4))
    mean = G + a * second / first
    trace = (fourth - 2 * second / first * third + second**3 / first**2) * a.square().sum() + 6 * first
    found = [gram_noise(grams_of(x[None]), w) for x, w in zip(samples, weights, strict=True)]
    for name, truth in (("square", mean.square().sum()), ("trace", trace / first**2)):
        values, errors = (torch.cat([getattr(each, f"{name}{end}") for each in found]) for end in ("", "_stderr"))
        assert values.mean() == pytest.approx(float(truth), rel=0.03)
        covered = ((values - truth).abs() < scipy.stats.t.ppf(0.975, num - 1) * errors).double().mean()
        assert 0.9 < covered < 0.995


def test_errors_with_weights_are_those_of_the_jackknife():
    """Oracle: every sequence left out in turn; a residual that goes with the weight moves the trace by way of the mean."""
    num = 60
    weights = 1 + 9 * torch.arange(num, dtype=torch.float64) / num
    samples = weights[:, None].square() * torch.tensor([0.3, 0.0]) + weights[:, None].sqrt() * drawn(5, num, 2) + 2
    noise = gram_noise(grams_of(samples[None]), weights)
    rest = [torch.arange(num) != i for i in range(num)]
    left = [gram_noise(grams_of(samples[k][None]), weights[k]) for k in rest]
    for name in ("square", "trace", "noise_scale"):
        values = torch.cat([getattr(each, name) for each in left])
        assert_close(getattr(noise, f"{name}_stderr")[0], jackknife_stderr(values), rtol=0.08, atol=0)


@given(seed=st.integers(0, 2**32), factor=st.floats(0.1, 10), num=st.integers(3, 9))
def test_units_and_scales(seed, factor, num):
    samples, weights = drawn(seed, 2, num, 3) + 3, 1 + drawn(seed + 1, num).square()
    one = gram_noise(grams_of(samples), weights)
    other = gram_noise(grams_of(factor * samples), factor * weights)  # another unit of weight
    longer = gram_noise(grams_of(factor * samples), weights)  # a loss in another unit
    for name in ("square", "trace", "snr_square", "noise_scale", "square_stderr", "trace_stderr"):
        assert_close(getattr(one, name), getattr(other, name), equal_nan=True)
        power = 0 if name in ("snr_square", "noise_scale") else 2
        assert_close(factor**power * getattr(one, name), getattr(longer, name), equal_nan=True)
    assert_close(one.noise_scale, torch.where(one.noise_scale.isnan(), math.nan, num / one.snr_square), equal_nan=True)


@pytest.mark.parametrize(("name", "by"), [("gpt2", "layer"), pytest.param("llama", "head", marks=pytest.mark.slow)])
def test_of_a_model_it_is_what_per_sample_gradients_say(name, by):
    """Oracle: numpy on rows of `per_sample_gradients`, sequences of unlike numbers of scored tokens."""
    loss = loss_of(name)
    theta = loss.net.theta
    noise = gradient_noise(loss, theta, by=by)
    weights = loss.terms(theta)[1].numpy()
    assert len(set(weights)) > 1
    n, W = len(weights), weights.sum()
    rows = per_sample_gradients(loss, theta)
    pairs = W**2 - (weights**2).sum()
    total = np.zeros(2)
    for i, views in enumerate(block_views(loss.layout, by).values()):
        g = torch.stack([cut_views(row, loss.layout, views) for row in rows]).numpy()
        r = g - weights[:, None] * g.sum(0) / W
        square = ((g.sum(0) ** 2).sum() - (g**2).sum()) / pairs
        trace = n * (r**2).sum() / pairs
        assert_close(float(noise.square[i]), square)
        assert_close(float(noise.trace[i]), trace)
        total += square, trace
    assert_close(float(noise.total_square.value), total[0])
    assert_close(float(noise.total_trace.value), total[1])
    assert noise.mean_weight == pytest.approx(weights.mean())
    gradient = torch.func.grad(loss)(theta).square().sum()
    mean_square = float(noise.total_square.value) * pairs / W**2 + float((rows**2).sum()) / W**2
    assert_close(float(gradient), mean_square)


def regression(inputs, targets):
    net = fs.functional(seeded(0, lambda: nn.Linear(2, 1, bias=False).double()))
    half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    return fs.objective(net, [(inputs, targets)], half_square)


def test_a_signal_in_noise_is_resolved_and_tokens_are_sequences_times_their_weight():
    x = torch.tensor([[1.0, 0.0]] * 8, dtype=torch.float64)
    y = torch.tensor([[1.0], [1.2], [0.9], [1.1], [0.8], [1.05], [0.95], [1.0]], dtype=torch.float64)
    noise = gradient_noise(regression(x, y), torch.zeros(2, dtype=torch.float64), by="tensor")
    assert float(noise.trace[0]) == pytest.approx(float(y.var()))
    assert float(noise.noise_scale[0]) == pytest.approx(float(y.var() / (y.mean() ** 2 - y.var() / 8)))
    assert float(noise.total_noise_scale_tokens.value) == float(noise.total_noise_scale.value) * noise.mean_weight
    assert noise.num_copies == 1
    assert "1 copy of other sequences" in noise.notes[0]


def test_two_batches_say_what_all_pairs_say():
    """Oracle: the mean over all batches of two sizes, of four samples."""
    samples = drawn(9, 4, 3) + 1
    noise = gram_noise(grams_of(samples[None]), torch.ones(4))
    squares = [samples[[i, j]].mean(0).square().sum() for i in range(4) for j in range(i)]
    small = samples.square().sum(1).mean()
    made = two_batch_noise(float(small), float(torch.stack(squares).mean()), small=1, large=2)
    assert made.square == pytest.approx(float(noise.square))
    assert made.trace == pytest.approx(float(noise.trace))
    assert math.isnan(two_batch_noise(9.0, 1.0, small=1, large=2).noise_scale)
    with pytest.raises(ValueError, match="`large` must be an integer of at least 3"):
        two_batch_noise(1.0, 1.0, small=2, large=2)


def test_doors_and_notes():
    x = drawn(1, 2, 2)
    two = gradient_noise(regression(x, x[:, :1]), torch.ones(2, dtype=torch.float64), by="tensor")
    assert two.square_stderr.isnan().all()
    assert two.noise_scale.isnan().all()
    assert any("Two sequences" in note for note in two.notes)
    assert any("not told from 0" in note for note in two.notes)
    with pytest.raises(ValueError, match="at least two sequences"):
        gradient_noise(regression(x[:1], x[:1, :1]), torch.ones(2, dtype=torch.float64))
    grams = grams_of(x[None])
    for wrong in (torch.ones(3), torch.tensor([1.0, 0.0])):
        with pytest.raises(ValueError, match="`weights` must be 2 numbers above 0"):
            gram_noise(grams, wrong)
    with pytest.raises(ValueError, match="no samples"):
        gram_noise(Grams(grams.values, "token", 0, [], ["a"]), torch.ones(2))
    views = {"one": [View("weight", 0, slice(None))], "two": [View("weight", 1, slice(0, 1))]}
    with pytest.raises(ValueError, match="earlier view"):
        gradient_noise(regression(x, x[:, :1]), torch.ones(2, dtype=torch.float64), by=views)


def test_a_noise_scale_in_positions_is_that_in_sequences_times_their_mean_weight():
    rows = 3 + fs.normal(fs.key(5), torch.zeros(12, 2, dtype=torch.float64))
    noise = gram_noise(Grams((rows @ rows.T)[None], "sequence", 0, [], ["all"]), torch.full((12,), 4.0))
    one, other = noise.total_noise_scale, noise.total_noise_scale_tokens
    assert float(one.stderr) > 0
    assert float(other.value) == pytest.approx(4 * float(one.value))
    assert float(other.stderr) == pytest.approx(4 * float(one.stderr))
