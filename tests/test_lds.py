"""The linear datamodeling score. Oracles: ranks by hand, scipy, a model whose losses are sums of scores."""

import math

import pytest
import torch
from scipy.stats import spearmanr

import funcscope as fs
from funcscope.gradients import half_subsets, linear_datamodeling_score


def normal(key, *shape):
    return fs.normal(fs.key(key), torch.zeros(shape, dtype=torch.float64))


def linear(noise, num=40, repeats=1):
    """Losses that are sums of the scores of the samples that are in, and noise of so many of their deviations."""
    scores, subsets = normal(0, 20, 6), half_subsets(20, key=fs.key(1), num=num)
    truth = subsets.double() @ scores
    return scores, subsets, truth, truth + noise * truth.std(0) * normal(2, repeats, num, 6)


def score(scores, subsets, losses, **options):
    return linear_datamodeling_score(scores, subsets, losses, key=fs.key(3), **options)


def test_by_hand():
    subsets = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    scores = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 2.0], [4.0, 5.0]])
    losses = torch.tensor([[10.0, 4.0], [30.0, 3.0], [20.0, 2.0], [40.0, 1.0]])
    found = score(scores, subsets, losses)
    # ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * 2 / (4 * 15); ranks 1 2.5 2.5 4 and 4 3 2 1: -4.5 / sqrt(4.5 * 5)
    torch.testing.assert_close(found.correlations, torch.tensor([0.8, -4.5 / math.sqrt(22.5)], dtype=torch.float64))
    assert float(found.score.value) == pytest.approx((0.8 - 4.5 / math.sqrt(22.5)) / 2)


def test_every_column_is_scipys():
    scores, subsets, _, losses = linear(1.0)
    found = score(scores, subsets, losses)
    for i in range(6):
        expected = spearmanr((subsets.double() @ scores)[:, i], losses[0, :, i]).statistic
        assert float(found.correlations[i]) == pytest.approx(expected)


def test_the_true_scores_of_a_linear_model_have_1_and_others_less():
    scores, subsets, truth, _ = linear(0.0)
    assert float(score(scores, subsets, truth).score.value) == pytest.approx(1)
    assert float(score(-scores, subsets, truth).score.value) == pytest.approx(-1)
    assert float(score(3 * scores + 7, subsets, truth).score.value) == pytest.approx(1)  # all subsets are of one size
    assert abs(float(score(normal(9, 20, 6), subsets, truth).score.value)) < 0.3
    uneven = subsets.clone()
    uneven[::2, :10] = True
    moved = score(3 * scores + 7, uneven, uneven.double() @ scores).score.value
    assert float(moved) < 0.9  # negative control


def test_interval_and_error_are_over_test_samples():
    found = score(*linear(1.0)[:2], linear(1.0)[3])
    x = found.correlations
    assert float(found.score.stderr) == pytest.approx(float(x.std() / 6**0.5))
    assert found.low < float(found.score.value) < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(x.std(correction=0) / 6**0.5), rel=0.15)
    wide = score(*linear(1.0)[:2], linear(1.0)[3], level=0.99)
    assert wide.low < found.low
    assert wide.high > found.high


def test_the_ceiling_is_what_a_perfect_prediction_has():
    scores, subsets, _, losses = linear(1.0, num=400, repeats=4)
    found = score(scores, subsets, losses)
    assert float(found.ceiling.value) == pytest.approx(float(found.score.value), abs=0.03)
    assert float(found.ceiling.value) == pytest.approx(
        math.sqrt(4 / 5), abs=0.04
    )  # mean of four with noise of 1/4 its variance
    assert score(scores, subsets, losses[:1]).ceilings is None
    single = float(score(scores, subsets, losses[:1]).score.value)
    assert single < float(found.score.value) - 0.1  # repeats are worth it
    assert found.num_repeats == 4


def test_a_sample_without_spread_is_left_out_and_said():
    scores, subsets, truth, _ = linear(0.0)
    scores = scores.clone()
    scores[:, 2] = 0.0
    found = score(scores, subsets, truth)
    assert found.correlations.isnan().tolist() == [i == 2 for i in range(6)]
    assert float(found.score.value) == pytest.approx(1)
    assert found.score.num == 5
    assert "1 of 6 test samples" in found.notes[0]


def test_half_subsets_have_every_sample_equally_often_and_hang_on_the_key():
    found = half_subsets(11, key=fs.key(0), num=400)
    assert found.sum(1).tolist() == [5] * 400
    shares = found.double().mean(0)
    assert float((shares - 5 / 11).abs().max()) < 4 * math.sqrt(5 / 11 * 6 / 11 / 400)
    assert torch.equal(found, half_subsets(11, key=fs.key(0), num=400))
    assert not torch.equal(found, half_subsets(11, key=fs.key(1), num=400))
    assert half_subsets(10, key=fs.key(0), num=2, share=0.75).sum(1).tolist() == [7, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subsets": torch.ones(5, 3, dtype=torch.bool)}, "rows of `scores`"),
        ({"subsets": torch.ones(5, 4)}, "rows of `scores`"),
        ({"losses": torch.ones(5, 3)}, "one per subset and test sample"),
        ({"losses": torch.full((5, 2), math.nan)}, "`retrained_losses` must be finite"),
        ({"scores": torch.full((4, 2), math.inf)}, "`scores` must be finite"),
        ({"subsets": torch.ones(2, 4, dtype=torch.bool), "losses": torch.ones(2, 2)}, "three or more, got 2"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    given = {
        "scores": torch.ones(4, 2),
        "subsets": torch.ones(5, 4, dtype=torch.bool),
        "losses": torch.ones(5, 2),
    } | change
    with pytest.raises(ValueError, match=message):
        score(*given.values())
