"""Loss against sparsity: values, errors, areas, critical sparsities, random masks, heads and neurons."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from problems import gpt2, llama, seeded, tokens
from torch import nn

import funcscope as fs
from funcscope.core.keys import fold_in, uniform
from funcscope.weights import prunable_leaves, pruning_robustness, saliency, sparse_mask, structured_pruning
from funcscope.weights.sequence_scores import sequence_scores

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)


def linear(targets: list[float]) -> tuple[fs.Loss, torch.Tensor]:
    """Identity inputs, weights that fit exactly: pruning weight k costs its square over n."""
    num = len(targets)
    net = fs.functional(seeded(0, lambda: nn.Linear(num, 1, bias=False)).double())
    y = torch.tensor(targets, dtype=torch.float64)
    return fs.objective(net, [(torch.eye(num, dtype=torch.float64), y[:, None])], fs.mse), y


def classifier(num: int = 60) -> fs.Loss:
    """Trained a little, so that its weights matter."""
    model = seeded(0, lambda: nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))).double()
    x = seeded(1, lambda: torch.randn(num, 6, dtype=torch.float64))
    y = x[:, :3].argmax(1)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return fs.objective(fs.functional(model), [(x[:40], y[:40]), (x[40:], y[40:])], fs.classification)


def language(make=gpt2) -> fs.Loss:
    net = fs.functional(seeded(0, make).double())
    return fs.objective(net, [tokens(1, 3, 6, pad=2), tokens(2, 2, 5)], fs.causal_lm)


def test_curve_area_and_critical_sparsity_of_a_model_whose_losses_are_known():
    loss, theta = linear([1.0, -2.0, 3.0, -4.0])
    made = pruning_robustness(loss, theta, key=fs.key(0), scores=["magnitude"], sparsities=GRID, threshold=2.0)
    expected = np.array([0, 1, 5, 14, 30]) / 4
    np.testing.assert_allclose(made.delta_loss[0], expected)
    assert float(made.area[0]) == pytest.approx(np.trapezoid(expected, GRID))
    assert float(made.critical_sparsity[0]) == pytest.approx(np.interp(2.0, expected, GRID))
    assert made.num_forwards == 1 + 4 + 3 * 3  # all pruned is the same for all, nothing pruned is known
    assert made.perplexity_ratio is None  # squares are no nats
    assert made.accuracy is None


def test_nothing_pruned_is_the_model_and_all_pruned_has_zeros():
    loss = language()
    theta = loss.net.theta
    made = pruning_robustness(loss, theta, key=fs.key(0), sparsities=(0.0, 0.3, 1.0))
    assert made.scores == ["magnitude", "taylor", "obd", "wanda", "random"]
    assert made.delta_loss[:, 0].tolist() == [0.0] * 5
    assert made.delta_loss_stderr[:, 0].tolist() == [0.0] * 5
    zeroed = theta.clone()
    for leaf in prunable_leaves(loss.layout):
        zeroed[leaf.slice] = 0
    assert (zeroed != 0).sum() > 100  # norms, biases, embeddings stay
    for curve in made.loss:
        assert float(curve[-1]) == pytest.approx(float(loss(zeroed)))
    assert made.baseline_loss == pytest.approx(float(loss(theta)))
    torch.testing.assert_close(made.perplexity_ratio, made.delta_loss.exp())
    assert made.density[:, 0].eq(1).all()
    assert made.density[:, 2].eq(0).all()
    sizes = torch.tensor([sum(x.numel for x in prunable_leaves(loss.layout) if f"h.{i}." in x.name) for i in (0, 1)])
    share = (made.density[0, 1] * sizes).sum() / sizes.sum()
    assert float(share) == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
def test_differences_are_paired_over_sequences(score):
    loss = language()
    theta = loss.net.theta
    made = pruning_robustness(loss, theta, key=fs.key(0), scores=[score], sparsities=(0.0, 0.5, 0.9))
    scope = "row" if score == "wanda" else "global"
    for k, sparsity in enumerate((0.0, 0.5, 0.9)):
        mask = sparse_mask(saliency(loss, theta, score), loss.layout, sparsity=sparsity, scope=scope)
        (a, w), (b, _) = (tuple(x.numpy() for x in loss.terms(t)) for t in (theta * mask, theta))
        delta = (a - b).sum() / w.sum()
        beside = (a - b) - delta * w
        error = np.sqrt(len(w) / (len(w) - 1) * (beside**2).sum()) / w.sum()
        assert float(made.delta_loss[0, k]) == pytest.approx(delta, abs=1e-12)
        assert float(made.delta_loss_stderr[0, k]) == pytest.approx(error, abs=1e-12)
        unpaired = np.sqrt(len(w) / (len(w) - 1) * ((a - a.sum() / w.sum() * w) ** 2).sum()) / w.sum()
        assert unpaired > 1.5 * error


def test_random_masks_have_errors_over_draws_and_over_data():
    loss, key = classifier(), fs.key(5)
    theta = loss.net.theta
    made = pruning_robustness(
        loss, theta, key=key, scores=["magnitude"], sparsities=(0.3, 0.6), num_random=5, by="tensor"
    )
    draws = [uniform(fold_in(fold_in(key, "random"), i), theta) for i in range(5)]
    masks = [[sparse_mask(draw, loss.layout, sparsity=s) for s in (0.3, 0.6)] for draw in draws]
    values = np.array([[float(loss(theta * m) - loss(theta)) for m in row] for row in masks])
    np.testing.assert_allclose(made.delta_loss[1], values.mean(0), atol=1e-12)
    np.testing.assert_allclose(made.random_stderr_draws, values.std(0, ddof=1) / 5**0.5)
    assert float(made.random_area.value) == pytest.approx(values.mean(), abs=1e-12)
    sums = np.stack(
        [np.stack([(loss.terms(theta * m)[0] - loss.terms(theta)[0]).numpy() for m in row]) for row in masks]
    )
    data = sums.mean(0).std(1, ddof=1) / 60**0.5
    np.testing.assert_allclose(made.random_stderr_data, data)
    assert (made.delta_loss_stderr[1] >= torch.maximum(made.random_stderr_draws, made.random_stderr_data) - 1e-12).all()
    assert float(made.random_area.value) > float(made.area[0])
    torch.testing.assert_close(made.density[1].mean(1) < 1, torch.tensor([True, True]))


def test_errors_of_areas_and_critical_sparsities_are_those_of_a_bootstrap():
    loss = classifier(400)
    theta, grid = loss.net.theta, (0.0, 0.2, 0.4, 0.6, 0.8)
    made = pruning_robustness(loss, theta, key=fs.key(0), scores=["magnitude"], sparsities=grid, threshold=0.3)
    sums = np.stack([loss.terms(theta * sparse_mask(theta.abs(), loss.layout, sparsity=s))[0].numpy() for s in grid])
    change, rng = sums - sums[0], np.random.default_rng(0)
    areas, places = [], []
    for _ in range(800):
        curve = change[:, rng.integers(0, 400, 400)].mean(1)
        areas.append(np.trapezoid(curve, grid) / 0.8)
        first = int(np.argmax(curve >= 0.3))
        places.append(np.interp(0.3, curve[first - 1 : first + 1], grid[first - 1 : first + 1]))
    assert float(made.area_stderr[0]) == pytest.approx(np.std(areas), rel=0.15)
    assert float(made.critical_sparsity_stderr[0]) == pytest.approx(np.std(places), rel=0.2)
    assert float(made.area[0]) == pytest.approx(np.mean(areas), abs=4 * np.std(areas) / 800**0.5)


def test_documented_scores_of_robustness_say_nothing():
    """E31: the mildest pruning wins, the area ends at .8, and one outlier moves a quantile from a histogram by points."""
    loss = classifier()
    theta, grid = loss.net.theta, tuple(i / 10 for i in range(1, 10))
    made = pruning_robustness(loss, theta, key=fs.key(0), scores=["magnitude", "gradient"], sparsities=grid)
    retention = made.baseline_loss / made.loss
    assert retention[:2].argmax(1).tolist() == [0, 0]  # whatever the score, the winning ticket is that of 10 %
    assert np.trapezoid(np.ones(9), grid) == pytest.approx(0.8)  # and the best of areas
    free, weights = linear([0.0] * 10)
    whole = pruning_robustness(free, weights, key=fs.key(0), scores=["magnitude"], sparsities=grid)
    assert float(whole.area[0]) == 0
    fixed, weights = linear([0.0] * 9 + [3.0])  # the largest goes last: a curve that is the same from there on
    ends = pruning_robustness(fixed, weights, key=fs.key(0), scores=["fisher"], sparsities=(0.95, 1.0))
    assert float(ends.area[0]) == pytest.approx(float(ends.delta_loss[0, 0]))  # a mean, whatever the range

    score = torch.cat([torch.linspace(0, 1, 999), torch.tensor([200.0])])
    counts = torch.histc(score, bins=1000, min=0, max=200)
    edge = (int((counts.cumsum(0) < 500).sum()) + 1) * 0.2
    assert float((score > edge).double().mean()) < 0.45  # half was to be kept
    layout = fs.functional(seeded(0, lambda: nn.Linear(1000, 1, bias=False))).layout
    assert int(sparse_mask(score, layout, sparsity=0.5).sum()) == 500


def test_accuracy_is_that_of_the_position_that_predicts_the_label():
    loss = language(llama)
    theta = loss.net.theta
    made = pruning_robustness(loss, theta, key=fs.key(0), scores=["magnitude"], sparsities=(0.0, 0.5))
    mask = sparse_mask(theta.abs(), loss.layout, sparsity=0.5)
    for k, at in enumerate((theta, theta * mask)):
        hits = unshifted = total = 0
        for batch in (tokens(1, 3, 6, pad=2), tokens(2, 2, 5)):
            best = loss.net.apply(loss.layout.unravel(at), batch).argmax(-1)
            there = batch["attention_mask"][:, 1:].bool()
            hits += int((best[:, :-1] == batch["input_ids"][:, 1:])[there].sum())
            unshifted += int((best[:, 1:] == batch["input_ids"][:, 1:])[there].sum())
            total += int(there.sum())
        assert float(made.accuracy[0, k]) == pytest.approx(hits / total)
        assert (unshifted != hits) or k  # a document counts these


def test_a_network_of_zeros_knows_no_label():
    """All outputs are alike: by the first of them, every label 0 would be known."""
    net = fs.functional(seeded(0, lambda: nn.Linear(3, 4, bias=False)).double())
    x = seeded(1, lambda: torch.randn(8, 3, dtype=torch.float64))
    loss = fs.objective(net, [(x, torch.zeros(8, dtype=torch.long))], fs.classification)
    made = pruning_robustness(loss, net.theta, key=fs.key(0), scores=["magnitude"], sparsities=(0.0, 1.0), num_random=2)
    assert made.accuracy[:, 1].tolist() == [0.25, 0.25]
    best = net.apply(net.params, x).argmax(-1)
    assert float(made.accuracy[0, 0]) == float((best == 0).double().mean())
    two = net.theta.clone().view(4, 3)
    two[1] = two[0]  # of two that are always alike, each is known half of the time
    halves = sequence_scores(loss, two.flatten()).hits
    assert set(halves.tolist()) <= {0.0, 0.5}
    assert float(sequence_scores(loss, torch.full((12,), math.nan).double()).hits.sum()) == 0


def test_a_sequence_that_scores_nothing_is_no_sample():
    net = fs.functional(seeded(0, lambda: nn.Linear(3, 4)).double())
    x, y = seeded(1, lambda: torch.randn(6, 3, dtype=torch.float64)), torch.tensor([0, 1, 2, 3, -100, -100])
    settings = {"key": fs.key(0), "scores": ["magnitude"], "sparsities": (0.0, 0.5, 1.0), "num_random": 2}
    found, scored = (
        pruning_robustness(fs.objective(net, [(x[:num], y[:num])], fs.classification), net.theta, **settings)
        for num in (6, 4)
    )
    assert found.num_sequences == scored.num_sequences == 4
    torch.testing.assert_close(found.perplexity_ratio_stderr, found.delta_loss.exp() * found.delta_loss_stderr)
    for name in ("delta_loss_stderr", "area_stderr", "accuracy_stderr", "random_stderr_data"):
        torch.testing.assert_close(getattr(found, name), getattr(scored, name))


def test_what_a_curve_does_not_reach_has_no_critical_sparsity():
    loss, theta = linear([1.0, 2.0])
    made = pruning_robustness(loss, theta, key=fs.key(0), scores=["magnitude"], sparsities=(0.0, 0.5), threshold=9.0)
    assert math.isnan(float(made.critical_sparsity[0]))
    assert any("magnitude does not reach 9" in note for note in made.notes)
    late = pruning_robustness(loss, theta, key=fs.key(0), scores=["magnitude"], sparsities=(0.5, 1.0), threshold=0.1)
    assert math.isnan(float(late.critical_sparsity[0]))
    assert any("starts at or above 0.1" in note for note in late.notes)
    one = fs.objective(loss.net, [(torch.ones(1, 2).double(), torch.ones(1, 1).double())], fs.mse)
    alone = pruning_robustness(one, theta, key=fs.key(0), scores=["magnitude"], num_random=1)
    assert alone.delta_loss_stderr[0, 3:].isnan().all()
    assert {"There is one sequence, and no error over sequences."} < set(alone.notes)


def test_scores_may_come_from_other_data():
    loss, theta = linear([1.0, 2.0, 3.0, 4.0])
    inputs = torch.diag(torch.tensor([9.0, 1.0, 1.0, 1.0])).double()
    other = fs.objective(loss.net, [(inputs, torch.zeros(4, 1).double())], fs.mse)
    made = pruning_robustness(
        loss, theta, key=fs.key(0), scores=["wanda"], sparsities=(0.0, 0.25, 0.5), calibration=other
    )
    np.testing.assert_allclose(made.delta_loss[0], [0, 4 / 4, (4 + 9) / 4])  # the first weight's input was the largest


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sparsities": (0.5, 0.5)}, "`sparsities` must be two numbers or more that increase"),
        ({"sparsities": (0.0, 1.5)}, "`sparsities` must be a finite number"),
        ({"scores": []}, "`scores` must be a list of different names"),
        ({"scores": ["magnitude", "magnitude"]}, "`scores` must be a list of different names"),
        ({"threshold": -1.0}, "`threshold`"),
        ({"num_random": 0}, "`num_random`"),
        ({"prunable": ["x"]}, "`prunable` holds names"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings, says):
    loss, theta = linear([1.0, 2.0])
    with pytest.raises(ValueError, match=says):
        pruning_robustness(loss, theta, key=fs.key(0), **{"scores": ["magnitude"], **settings})


# Heads and neurons


@pytest.mark.parametrize(("units", "num"), [("heads", 4), ("neurons", 96)])
def test_whole_units_are_removed_the_least_important_first(units, num):
    loss = language()
    theta = loss.net.theta
    made = structured_pruning(loss, theta, key=fs.key(0), units=units, scores=["magnitude"], sparsities=GRID)
    assert (made.num_prunable, made.pruned) == (num, units)
    assert made.delta_loss[:, 0].eq(0).all()
    gone = theta.clone()
    for name, leaf in loss.layout.by_name.items():
        inside = name.endswith(("weight", "c_attn.bias", "c_fc.bias"))
        if inside and (".attn." if units == "heads" else ".mlp.") in name:
            gone[leaf.slice] = 0
    assert float(made.loss[0, -1]) == pytest.approx(float(loss(gone)))
    assert made.delta_loss[0, 1:].abs().min() > 0


def test_neurons_are_ranked_by_sums_over_rows_and_columns():
    model = nn.Sequential()
    model.add_module("fc1", seeded(0, lambda: nn.Linear(3, 4, bias=False)))
    model.add_module("fc2", seeded(1, lambda: nn.Linear(4, 2, bias=False)))
    with torch.no_grad():
        model.fc1.weight.copy_(torch.tensor([[1.0] * 3, [0.1] * 3, [0.5] * 3, [0.0] * 3]))
        model.fc2.weight.copy_(torch.tensor([[0.0, 5.0, 0.1, 0.2], [0.0, 5.0, 0.1, 0.2]]))
    net = fs.functional(model.double())
    loss = fs.objective(net, [(torch.eye(3).double(), torch.tensor([0, 1, 0]))], fs.classification)
    made = structured_pruning(
        loss, net.theta, key=fs.key(0), units="neurons", scores=["magnitude"], sparsities=(0.0, 0.5, 0.75), by="tensor"
    )
    kept = torch.tensor([0.0, 1.0, 0.0, 0.0]).double()  # sums: 3, 10.3, 1.7, .4
    half = torch.tensor([1.0, 1.0, 0.0, 0.0]).double()
    for k, mask in ((1, half), (2, kept)):
        logits = (torch.eye(3).double() @ net.params["fc1.weight"].T * mask) @ net.params["fc2.weight"].T
        expected = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0]))
        assert float(made.loss[0, k]) == pytest.approx(float(expected))
    assert made.density[0].tolist() == [[1.0, 1.0], [0.5, 0.5], [0.25, 0.25]]


@pytest.mark.slow
def test_scores_that_know_the_loss_cost_less_than_magnitudes_on_a_trained_model(tmp_path):
    """A byte-level Llama on held-out texts, without its head: `taylor` and `obd` beside the largest weights and chance."""
    from transformers import AutoModelForCausalLM

    from funcscope.families import text

    config = text.Config(
        hidden_size=32, intermediate_size=88, num_layers=2, num_heads=2, num_kv_heads=2, length=64, train_bytes=300_000,
        heldout_bytes=20_000, steps=300, tuning_steps=1,
    )  # fmt: skip
    for _ in text.train(config, tmp_path):
        pass
    net = fs.functional(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    encoded = [text.tokenizer().encode(each).ids[:64] for each in text.read(tmp_path / "heldout" / "prose.jsonl")]
    rows = torch.tensor([ids for ids in encoded if len(ids) == 64][:24])
    loss = fs.objective(net, [rows], fs.causal_lm)
    body = [leaf.name for leaf in prunable_leaves(loss.layout) if not leaf.name.startswith("lm_head")]
    made = pruning_robustness(
        loss,
        net.theta,
        key=fs.key(0),
        scores=("magnitude", "taylor", "obd"),
        sparsities=(0.0, 0.5, 0.7, 0.8),
        prunable=body,
    )
    magnitude, taylor, obd, random = made.delta_loss[:, 1:]
    errors = made.delta_loss_stderr[:, 1:]
    for better in (taylor, obd):
        assert (better < magnitude).all()
        assert (magnitude - better)[1:].min() > 2 * float(errors[0].max())
    assert (random > 2 * magnitude)[0]
    assert (random > magnitude + 2 * errors[3]).all()


def test_a_score_without_a_number_is_named_with_what_to_do():
    class Bilinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.form = nn.Linear(2, 2, bias=False)

        def forward(self, x):
            return torch.einsum("bi,ij->bj", x, self.form.weight)

    net = fs.functional(seeded(0, Bilinear))
    loss = fs.objective(net, [(torch.eye(2), torch.tensor([0, 1]))], fs.classification)
    with pytest.raises(ValueError, match=r"'wanda' has no number for `form.weight`.*take 'wanda' out of `scores`"):
        pruning_robustness(loss, net.theta, key=fs.key(0))
    made = pruning_robustness(loss, net.theta, key=fs.key(0), scores=["magnitude"], sparsities=(0.0, 0.5))
    assert made.scores == ["magnitude", "random"]
