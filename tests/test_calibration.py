"""Calibration. Oracles: definitions in numpy loops, closed forms of the null value, models that are calibrated by design."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.keys import fold_in, key, normal, uniform
from funcscope.core.softmax import Labels, draw_labels
from funcscope.core.standard_errors import ratio_stderr
from funcscope.information import (
    calibration,
    calibration_sums,
    confidence_of,
    equal_mass_edges,
    equal_width_edges,
    expected_calibration_error,
)

KEY = key(0)


def data(seed, b=6, t=5, v=4, scale=2.0):
    """Logits, and labels that have little to do with them; some positions are not scored."""
    k = key(seed)
    logits = scale * normal(fold_in(k, 0), torch.zeros(b, t, v, dtype=torch.float64))
    index = (uniform(fold_in(k, 1), torch.zeros(b, t)) * v).long()
    return logits, Labels(index, (uniform(fold_in(k, 2), torch.zeros(b, t)) < 0.8).float())


def calibrated(seed, b=40, t=10, v=5):
    """Labels drawn from the predictions themselves."""
    logits = 2 * normal(fold_in(key(seed), 0), torch.zeros(b, t, v, dtype=torch.float64))
    return logits, draw_labels(logits, Labels(torch.zeros(b, t, dtype=torch.long), torch.ones(b, t)), key(seed + 1))


def by_definition(logits, targets, edges):
    """ECE and, per bin, weight, accuracy and confidence."""
    p = torch.softmax(logits, -1).numpy()
    ece, rows, total = 0.0, [], float(targets.weight.sum())
    for low, high in pairwise(edges):
        members = [
            (float(p[i, t].max()), float(p[i, t].argmax() == targets.index[i, t]), float(targets.weight[i, t]))
            for i in range(p.shape[0])
            for t in range(p.shape[1])
            if targets.weight[i, t] and float(low) < p[i, t].max() <= float(high)
        ]
        c, a, w = (np.array(x) for x in zip(*members, strict=True)) if members else 3 * (np.zeros(0),)
        if len(w):
            rows.append((w.sum(), (a * w).sum() / w.sum(), (c * w).sum() / w.sum()))
            ece += w.sum() / total * abs(rows[-1][1] - rows[-1][2])
        else:
            rows.append((0.0, math.nan, math.nan))
    return ece, np.array(rows)


@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from(["equal_width", "equal_mass"]))
def test_calibration_error_and_table_are_their_definitions(seed, bins, kind):
    logits, targets = data(seed)
    targets = targets._replace(weight=targets.weight * (1 + torch.arange(5)))
    found = expected_calibration_error(logits, targets, key=KEY, bins=bins, kind=kind, num=10)
    ece, rows = by_definition(logits, targets, found.edges)
    assert found.ece == pytest.approx(ece, rel=1e-9)
    for i, name in enumerate(("weight", "accuracy", "confidence")):
        np.testing.assert_allclose(getattr(found, f"bin_{name}").numpy(), rows[:, i], rtol=1e-9, atol=1e-12)
    there = found.bin_weight > 0
    assert (found.bin_low[there] <= found.bin_accuracy[there] + 1e-9).all()
    assert (found.bin_high[there] >= found.bin_accuracy[there] - 1e-9).all()


def test_scores_are_their_definitions_with_errors_over_sequences():
    logits, targets = data(1)
    found = expected_calibration_error(logits, targets, key=KEY, bins=3)
    p, y = logits.softmax(-1), torch.nn.functional.one_hot(targets.index, 4)
    each = {
        "brier": (p - y).square().sum(-1),
        "nll": -(p * y).sum(-1).log(),
        "accuracy": (p.argmax(-1) == targets.index).double(),
        "overconfidence": p.amax(-1) - (p.argmax(-1) == targets.index).double(),
    }
    weights = targets.weight.double().sum(1)
    for name, values in each.items():
        sums = (values * targets.weight).sum(1)
        assert getattr(found, name) == pytest.approx(float(sums.sum() / weights.sum()), rel=1e-9)
        assert getattr(found, f"{name}_stderr") == pytest.approx(float(ratio_stderr(sums, weights)), rel=1e-9)


@pytest.mark.parametrize("kind", ["equal_width", "equal_mass"])
def test_chunks_batches_and_padding_change_nothing(kind):
    logits, targets = data(2)
    edges = equal_mass_edges(confidence_of(logits, targets), 4) if kind == "equal_mass" else equal_width_edges(4)
    whole = calibration(calibration_sums(logits, targets, edges), key=KEY)
    hidden = torch.where(targets.weight[..., None] != 0, logits, torch.nan)
    parts = [
        calibration_sums(hidden[i : i + 3], Labels(*(x[i : i + 3] for x in targets)), edges, chunk=2) for i in (0, 3)
    ]
    merged = calibration(parts[1].merge(parts[0]), key=KEY)
    for name in ("ece", "ece_stderr", "ece_null", "squared_error", "brier", "brier_stderr"):
        assert getattr(merged, name) == pytest.approx(getattr(whole, name), rel=1e-9)
    assert_close(merged.bin_accuracy, whole.bin_accuracy, equal_nan=True)
    with pytest.raises(ValueError, match="the same `edges`"):
        parts[0].merge(calibration_sums(logits, targets, equal_width_edges(5)))


@pytest.mark.parametrize(("right", "num"), [(0, 8), (3, 8), (8, 8), (17, 40)])
def test_intervals_of_independent_rows_are_wilsons(right, num):
    """Rows of their own: the error of the accuracy is that of a binomial, but for n - 1."""
    logits = torch.tensor([[0.0, 1.0]]).repeat(num, 1).double()
    targets = Labels((torch.arange(num) < right).long(), torch.ones(num))
    found = expected_calibration_error(logits, targets, key=KEY, bins=1, kind="equal_width", num=2)
    size = num if right in (0, num) else num - 1
    p, z = right / num, scipy.stats.norm.ppf(0.975)
    root = np.roots([1 + z**2 / size, -(2 * p + z**2 / size), p**2])  # (p - r)^2 = z^2 r (1 - r) / n
    assert [float(found.bin_low[0]), float(found.bin_high[0])] == pytest.approx(sorted(root.real), abs=1e-6)
    assert bool(found.bin_accuracy_stderr.isnan()) == (right in (0, num))


def test_bins_of_equal_mass_are():
    logits, targets = calibrated(3)
    found = expected_calibration_error(logits, targets, key=KEY, bins=8)
    assert found.bin_weight.tolist() == [50.0] * 8
    same = equal_mass_edges(torch.ones(9), 4)
    assert same.tolist() == [0.0, 1.0]  # no bins between equal confidences


def test_null_value_is_its_closed_form_and_that_of_drawn_answers():
    """E|N(0, v)| = sqrt(2 v / pi); labels that are drawn anew give the same mean without the normal distribution."""
    logits, targets = calibrated(4)
    edges = equal_width_edges(6)
    sums = calibration_sums(logits, targets, edges)
    found = calibration(sums, key=KEY, num=4000)
    closed = float((2 * sums.variance / math.pi).sqrt().sum()) / 400
    assert abs(found.ece_null - closed) < 4 * found.ece_null_stderr
    drawn = torch.tensor([
        calibration(calibration_sums(logits, draw_labels(logits, targets, key(100 + i)), edges), key=KEY, num=2).ece
        for i in range(60)
    ])  # fmt: skip
    assert abs(float(drawn.mean()) - closed) < 4 * float(drawn.std()) / 60**0.5
    assert float(drawn.quantile(0.95)) == pytest.approx(found.ece_null_95, rel=0.2)


@pytest.mark.slow
def test_p_values_of_calibrated_models_are_uniform_and_the_debiased_error_is_zero_in_the_mean():
    runs = []
    for seed in range(200):
        logits, targets = calibrated(10 * seed)
        sums = calibration_sums(logits, targets, equal_width_edges(6))
        runs.append(calibration(sums, key=key(seed), num=199))
    p = torch.tensor([run.p_value for run in runs])
    assert abs(float((p <= 0.1).double().mean()) - 0.1) < 3 * (0.09 / 200) ** 0.5
    debiased = torch.tensor([run.squared_error for run in runs], dtype=torch.float64)
    naive = torch.stack([
        (run.bin_weight / 400 * (run.bin_accuracy - run.bin_confidence).square()).nansum() for run in runs
    ])  # fmt: skip
    assert abs(float(debiased.mean())) < 4 * float(debiased.std()) / 200**0.5
    assert float(naive.mean()) > 10 * float(naive.std()) / 200**0.5


def test_a_confident_model_is_found_out():
    logits, targets = calibrated(5)
    found = expected_calibration_error(2 * logits, targets, key=KEY)
    right = expected_calibration_error(logits, targets, key=KEY)
    assert found.ece > found.ece_null_95
    assert found.p_value < 0.002 < right.p_value
    assert found.overconfidence > 5 * found.overconfidence_stderr
    assert found.squared_error > 10 * abs(right.squared_error)


def test_error_of_the_calibration_error_is_that_over_sequences():
    """Sequences of an overconfident model, drawn again: the spread of ECE is its standard error."""
    runs = []
    for seed in range(40):
        logits, targets = calibrated(7 * seed + 1, b=60, t=6)
        sums = calibration_sums(3 * logits, targets, equal_width_edges(2))
        runs.append(calibration(sums, key=KEY, num=2))
    spread = torch.tensor([run.ece for run in runs]).std()
    stderr = torch.tensor([run.ece_stderr for run in runs]).mean()
    assert float(stderr / spread) == pytest.approx(1, abs=0.35)  # three errors of a spread of 40


def test_labels_are_the_next_tokens_and_padding_is_none():
    """Mistake 25: argmax at t against label t, and -100 as a class that is never right."""
    ids = torch.tensor([[0, 1, 2, 3, 4], [2, 3, 4, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    logits = 20 * torch.nn.functional.one_hot((ids + 1) % 5, 5).double()  # sure of the successor, which comes
    _, targets = fs.causal_lm.prepare({"input_ids": ids, "attention_mask": mask})
    found = expected_calibration_error(logits, targets, key=KEY)
    assert (found.accuracy, found.num_sequences, float(found.bin_weight.sum())) == (1.0, 2, 6.0)
    assert found.ece < 1e-6
    labels = ids.masked_fill(mask == 0, -100)
    documented = (logits.softmax(-1).amax(-1).mean() - (logits.argmax(-1) == labels).double().mean()).abs()
    assert documented > 0.99


def test_half_precision_has_no_floor_under_probabilities():
    """Mistake 25: in bf16 the surprisal was -log max(p, 1e-4), 9.2 nats at most."""
    logits = torch.tensor([[[0.0, 20.0]], [[0.0, 20.0]]], dtype=torch.bfloat16)
    targets = Labels(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
    found = expected_calibration_error(logits, targets, key=KEY)
    documented = float(-logits.softmax(-1)[..., 0].clamp_min(1e-4).log().mean())
    assert found.nll == pytest.approx(20, rel=1e-6)
    assert documented < 9.3


def test_what_cannot_be_known_is_nan_and_said():
    logits, targets = data(6)
    lost = expected_calibration_error(logits * torch.nan, targets, key=KEY, kind="equal_width")
    assert math.isnan(lost.ece)
    assert math.isnan(lost.p_value)
    assert "nan" in lost.notes[1]
    one = expected_calibration_error(logits[:1], Labels(*(x[:1] for x in targets)), key=KEY, bins=3)
    assert math.isnan(one.brier_stderr)
    assert "single sequence" in one.notes[-1]
    rows = expected_calibration_error(logits[:, 0], Labels(targets.index[:, 0], torch.ones(6)), key=KEY, bins=2)
    assert rows.num_sequences == 6  # a classifier's: every row its own


def test_doors():
    logits, targets = data(0)
    with pytest.raises(ValueError, match="one per row of `logits`"):
        calibration_sums(logits[:, :-1], targets, equal_width_edges())
    with pytest.raises(ValueError, match="`edges` must rise from 0 to 1"):
        calibration_sums(logits, targets, torch.tensor([0.0, 0.5]))
    with pytest.raises(ValueError, match="`kind` must be one of"):
        expected_calibration_error.__wrapped__(logits, targets, key=KEY, kind="both")
    with pytest.raises(ValueError, match="must hold probabilities"):
        equal_mass_edges(torch.tensor([0.5, torch.nan]))
    with pytest.raises(ValueError, match="`labels` hold 9"):
        calibration_sums(logits, targets._replace(index=targets.index + 9 - targets.index.max()), equal_width_edges())


def test_a_label_that_cannot_occur_is_said():
    logits, targets = data(3)
    logits = logits.index_put((torch.tensor(0), torch.tensor(0), targets.index[0, 0]), torch.tensor(-math.inf).double())
    found = expected_calibration_error(logits, Labels(targets.index, torch.ones_like(targets.weight)), key=KEY, bins=2)
    assert math.isinf(found.nll)
    assert math.isnan(found.nll_stderr)
    assert any("probability 0" in note for note in found.notes)
    assert math.isfinite(found.ece)


def test_outputs_that_are_no_numbers_are_neither_right_nor_wrong():
    logits, targets = data(3)
    found = expected_calibration_error(logits * torch.nan, targets, key=KEY, kind="equal_width")
    assert math.isnan(found.accuracy)
    assert found.bin_accuracy.isnan().all()


def test_bins_of_a_single_sequence_leave_the_squared_error_unknown_and_say_so():
    """One sequence is sure at a position, all others are not anywhere."""
    logits = torch.zeros(4, 3, 2)
    logits[0, 0, 0] = 9.0
    found = expected_calibration_error(
        logits, Labels(torch.zeros(4, 3, dtype=torch.long), torch.ones(4, 3)), key=KEY, bins=3, kind="equal_width"
    )
    assert math.isnan(found.squared_error)
    assert found.num_alone == 1
    assert any("of one sequence alone" in note and "squared_error" in note for note in found.notes)
