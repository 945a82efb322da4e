"""Plasticity. Oracles: gradient descent on a quadratic in closed form, torch's AdamW, units that are dead."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problems import seeded
from torch import nn

import funcscope as fs
from funcscope.weights import masked_training, plasticity
from funcscope.weights.plasticity import new_tasks, some_sequences

CLASSES = 4


def normal(seed: int, *shape: int) -> torch.Tensor:
    return seeded(seed, lambda: torch.randn(*shape, dtype=torch.float64))


def regression(num: int = 40, inputs: int = 5) -> fs.Loss:
    """Two batches of unlike sizes; the old targets are far from noise."""
    x, net = normal(1, num, inputs), fs.functional(seeded(0, lambda: nn.Linear(inputs, 1, bias=False)).double())
    return fs.objective(net, [(x[:7], 100 + x[:7, :1]), (x[7:], 100 + x[7:, :1])], fs.mse)


def network(bias: float, hidden: int = 32) -> fs.Functional:
    """Rectified units with a given bias and no other way from the inputs to the outputs."""
    first, last = nn.Linear(8, hidden), nn.Linear(hidden, CLASSES, bias=False)
    nn.init.constant_(first.bias, bias)
    return fs.functional(nn.Sequential(first, nn.ReLU(), last).double())


def classes(net: fs.Functional, num: int = 20) -> fs.Loss:
    x = normal(2, num, 8)
    return fs.objective(
        net, [(x[:12], torch.zeros(12).long()), (x[12:], torch.zeros(num - 12).long())], fs.classification
    )


def alive() -> fs.Loss:
    return classes(seeded(3, lambda: network(0.0)))


def whole(loss: fs.Loss) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = (torch.cat([batch[i] for batch in loss.batches]) for i in range(2))
    return inputs, targets[:, 0]


def descended(x: torch.Tensor, y: torch.Tensor, theta: torch.Tensor, rate: float, steps: int) -> float:
    """The mean square after steps of gradient descent, by the eigenvectors of its Hessian."""
    values, vectors = torch.linalg.eigh(2 * x.T @ x / len(x))
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    end = best + vectors @ ((1 - rate * values) ** steps * (vectors.T @ (theta - best)))
    return float((x @ end - y).square().mean())


# Closed forms


def test_what_remains_of_noise_after_gradient_descent_is_the_closed_form():
    loss, theta = regression(), normal(4, 5)
    how = {"steps": 9, "learning_rate": 0.1, "optimiser": "sgd", "momentum": 0.0, "batch_size": None}
    made = plasticity(loss, theta, key=fs.key(0), num=3, **how)
    tasks = new_tasks(some_sequences(loss, theta, fs.fold_in(fs.key(0), "sequences"), 64), theta, fs.key(0), 3)
    for i, (task, silent) in enumerate(tasks):
        x, y = whole(task)
        assert torch.equal(x, whole(loss)[0])
        assert float(made.losses[i, 0]) == pytest.approx(float((x @ theta - y).square().mean()))
        assert float(made.losses[i, 1]) == pytest.approx(descended(x, y, theta, 0.1, 9))
        assert silent == pytest.approx(float(y.square().mean()))
    for found, values in (
        (made.initial_loss, made.losses[:, 0]),
        (made.remaining_loss, made.losses[:, 1]),
        (made.loss_reduction, made.losses[:, 0] - made.losses[:, 1]),
    ):
        assert float(found.value) == pytest.approx(float(values.mean()))
        assert float(found.stderr) == pytest.approx(float(values.std() / 3**0.5))
        assert float(found.stderr_data) > 0
    assert made.silent_loss == pytest.approx(sum(silent for _, silent in tasks) / 3)
    assert made.memorised_share is None  # no floor is said of squared errors
    assert (made.notes, made.unresolved, made.num_sequences) == ([], [], 40)


def test_the_mean_over_targets_is_that_of_noise_of_variance_one_half():
    """From 0, a direction of eigenvalue h keeps (1 - rate h)^2k of its share of the noise; what no weight reaches stays."""
    loss, num, rate, steps = regression(12), 60, 0.1, 4
    made = plasticity(
        loss, torch.zeros(5).double(), key=fs.key(5), num=num, steps=steps, learning_rate=rate, optimiser="sgd",
        momentum=0.0, batch_size=None,
    )  # fmt: skip
    x, _ = whole(loss)
    values = torch.linalg.eigvalsh(2 * x.T @ x / len(x))
    expected = 0.5 * float(((1 - rate * values) ** (2 * steps)).sum() + len(x) - 5) / len(x)
    assert abs(float(made.remaining_loss.value) - expected) < 4 * float(made.remaining_loss.stderr)
    assert abs(float(made.initial_loss.value) - 0.5) < 4 * float(made.initial_loss.stderr)
    assert float(made.remaining_loss.stderr) < 0.03
    assert made.silent_loss == pytest.approx(float(made.initial_loss.value))


def test_training_is_that_of_torch_on_the_same_targets():
    loss = alive()
    theta = loss.net.theta
    made = plasticity(
        loss, theta, key=fs.key(0), num=2, steps=12, learning_rate=0.02, weight_decay=0.1, batch_size=None
    )
    for i, (task, _) in enumerate(new_tasks(loss, theta, fs.key(0), 2)):
        point = theta.clone().requires_grad_()
        optimiser = torch.optim.AdamW([point], lr=0.02, weight_decay=0.1)
        for _ in range(12):
            optimiser.zero_grad()
            task(point).backward()
            optimiser.step()
        assert made.losses[i].tolist() == pytest.approx([float(task(theta)), float(task(point.detach()))])
        assert float(made.losses[i, 1]) < float(made.losses[i, 0])


def test_dead_units_learn_nothing_and_others_memorise():
    how = {"key": fs.key(0), "num": 2, "steps": 60, "learning_rate": 0.05}
    dead, fresh = classes(seeded(3, lambda: network(-100.0))), alive()
    stuck, learnt = plasticity(dead, dead.net.theta, **how), plasticity(fresh, fresh.net.theta, **how)
    for name in ("initial_loss", "remaining_loss"):
        assert float(getattr(stuck, name).value) == pytest.approx(math.log(CLASSES), rel=1e-14)
    assert float(stuck.loss_reduction.value) == 0
    assert float(stuck.memorised_share.value) == pytest.approx(0, abs=1e-14)
    assert stuck.unresolved == ["loss_reduction"]
    assert stuck.notes == [
        "Whether training lowered the loss on new targets is not resolved: the change is within two errors."
    ]
    assert float(learnt.memorised_share.value) > 0.95
    assert learnt.notes == []
    assert float(learnt.loss_reduction.value) > 10 * float(learnt.loss_reduction.stderr_total)


def test_a_network_that_is_sure_of_the_old_targets_has_more_to_unlearn():
    loss = alive()
    sure = masked_training(loss, steps=200, learning_rate=0.05)(
        loss.net.theta, torch.ones_like(loss.net.theta).bool(), fs.key(1)
    )
    made = plasticity(loss, sure, key=fs.key(0), num=3, steps=3)
    assert made.silent_loss == pytest.approx(math.log(CLASSES))
    assert float(made.initial_loss.value) > 2 * made.silent_loss
    assert float(made.memorised_share.value) < 0
    share, remaining = made.memorised_share, made.remaining_loss
    assert float(share.value) == pytest.approx(1 - float(remaining.value) / math.log(CLASSES))
    for name in ("stderr", "stderr_data", "stderr_total"):
        assert float(getattr(share, name)) == pytest.approx(float(getattr(remaining, name)) / math.log(CLASSES))


# Targets and sequences


def test_new_targets_are_uniform_where_something_is_scored_and_the_same_at_every_theta():
    net = fs.functional(
        seeded(0, lambda: nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6))).double(), output=lambda x: x
    )
    ids = seeded(1, lambda: torch.randint(0, 6, (300, 5)))
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[::3, 2:], targets[7] = -100, -100
    loss = fs.objective(net, [(inputs[:100], targets[:100]), (inputs[100:], targets[100:])], fs.classification)
    ((task, silent), (other, _)), ((again, _), _) = (
        new_tasks(loss, theta, fs.key(0), 2) for theta in (net.theta, 50 * net.theta)
    )
    assert silent == pytest.approx(math.log(6))
    counts = torch.zeros(6)
    for old, one, same, another in zip(*(each.batches for each in (loss, task, again, other)), strict=True):
        assert one[0] is old[0]
        assert torch.equal(one[1].weight, old[1].weight)
        assert torch.equal(one[1].index, same[1].index)
        assert not torch.equal(one[1].index, another[1].index)
        counts += one[1].index[one[1].weight > 0].bincount(minlength=6)
    expected = float(counts.sum()) / 6
    assert float(((counts - expected).square() / expected).sum()) < 20.5  # chi squared of 5, p = .001
    first, second = (batch[1].index for batch in task.batches)
    assert not torch.equal(first, second[:100])
    chosen = some_sequences(loss, net.theta, fs.key(1), 299)  # one of 300 scores nothing
    assert sum(len(labels.weight) for _, labels in chosen.batches) == 299
    assert all(bool(labels.weight.any(1).all()) for _, labels in chosen.batches)


def test_outputs_of_zero_take_no_memory_and_positions_keep_their_weights():
    sizes, weights = [], torch.tensor([1.0, 2.0, 3.0, 4.0])
    criterion = fs.cross_entropy(weight=weights)

    def watched(out, targets, key):
        sizes.append(out.untyped_storage().nbytes())
        return criterion.sample(out, targets, key)

    net, labels = fs.functional(seeded(0, lambda: nn.Linear(8, CLASSES)).double()), torch.arange(20) % CLASSES
    loss = fs.objective(net, [(normal(2, 20, 8), labels)], replace(criterion, sample=watched))
    ((task, silent),) = new_tasks(loss, net.theta, fs.key(0), 1)
    assert sizes == [8]
    assert silent == pytest.approx(math.log(CLASSES))
    assert torch.equal(task.batches[0][1].weight, weights[labels])
    assert not torch.equal(task.batches[0][1].index, labels)


def test_sequences_are_drawn_by_the_key_alone_and_numbers_are_of_them():
    loss = alive()
    theta = loss.net.theta
    some, same, others = (
        some_sequences(loss, point, fs.key(i), 6) for point, i in ((theta, 0), (-theta, 0), (theta, 1))
    )
    inputs = [torch.cat([x for x, _ in each.batches]) for each in (some, same, others)]
    assert [len(each) for each in inputs] == [6, 6, 6]
    assert torch.equal(inputs[0], inputs[1])
    assert not torch.equal(inputs[0], inputs[2])
    assert {tuple(x.tolist()) for x in inputs[0]} <= {
        tuple(x.tolist()) for x in torch.cat([x for x, _ in loss.batches])
    }
    made = plasticity(loss, theta, key=fs.key(0), num=2, steps=2, sequences=6)
    assert made.num_sequences == 6
    assert plasticity(loss, theta, key=fs.key(0), num=2, steps=2, sequences=None).num_sequences == 20


def test_the_key_decides_targets_and_batches_and_draws_differ():
    loss = alive()
    theta = loss.net.theta
    one, again, other = (plasticity(loss, theta, key=fs.key(i), num=2, steps=3, batch_size=4) for i in (0, 0, 1))
    assert torch.equal(one.losses, again.losses)
    assert not torch.equal(one.losses, other.losses)
    assert float(one.losses[0, 0]) != float(one.losses[1, 0])
    task = new_tasks(some_sequences(loss, theta, fs.fold_in(fs.key(0), "sequences"), 64), theta, fs.key(0), 2)[1][0]
    train = masked_training(task, steps=3, batch_size=4)
    end = train(theta, torch.ones_like(theta).bool(), fs.fold_in(fs.fold_in(fs.key(0), 1), "batches"))
    assert float(one.losses[1, 1]) == pytest.approx(float(task(end)))


def test_a_binary_cross_entropy_starts_at_one_bit():
    net = fs.functional(seeded(0, lambda: nn.Linear(6, 1)).double())
    loss = fs.objective(net, [(normal(1, 4, 6), torch.ones(4, 1).double())], fs.binary_cross_entropy)
    made = plasticity(loss, net.theta, key=fs.key(0), num=2, steps=150, learning_rate=0.1, batch_size=None)
    assert made.silent_loss == pytest.approx(math.log(2))
    assert float(made.memorised_share.value) > 0.9


# What is not a number


def test_training_that_diverges_is_counted_and_has_no_number():
    loss = regression()
    made = plasticity(
        loss, normal(4, 5), key=fs.key(0), num=2, steps=60, learning_rate=1e6, optimiser="sgd", batch_size=None
    )
    assert made.num_diverged == 2
    assert made.unresolved == ["remaining_loss", "loss_reduction"]
    assert made.notes[-1].startswith("Training diverged in 2 of 2 draws")
    assert math.isfinite(float(made.initial_loss.value))
    assert not math.isfinite(float(made.remaining_loss.value))
    assert "not resolved" in str(made)
    shared = replace(made, memorised_share=made.remaining_loss)
    assert shared.unresolved == ["remaining_loss", "loss_reduction", "memorised_share"]


def test_training_that_raises_its_loss_and_single_draws_are_said():
    loss = regression(200)
    how = {"steps": 2, "optimiser": "sgd", "momentum": 0.0, "batch_size": None}
    raised = plasticity(loss, torch.zeros(5).double(), key=fs.key(0), num=12, learning_rate=5.0, **how)
    assert raised.notes == ["Training raised the loss that it was to lower: take a smaller `learning_rate`."]
    single = plasticity(loss, torch.zeros(5).double(), key=fs.key(0), num=1, learning_rate=1e-9, sequences=1, **how)
    assert single.notes[:2] == [
        "There is one draw, and no error over draws.",
        "There is one sequence, and no error over data.",
    ]
    assert single.unresolved == ["loss_reduction"]  # no error at all bounds nothing


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "`steps` must be an integer of at least 1, got 0"),
        ({"learning_rate": 0.0}, "`learning_rate` must be a finite number above 0"),
        ({"learning_rate": -1.0}, "`learning_rate` must be a finite number above 0"),
        ({"num": 0}, "`num` must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1"),
        ({"sequences": 0}, "`sequences` must be an integer of at least 1"),
        ({"momentum": 1.5}, "`momentum` must be a finite number in"),
        ({"weight_decay": -0.1}, "`weight_decay` must be a finite number of at least 0"),
    ],
)
def test_settings_out_of_their_range_are_refused_before_any_pass(wrong, said):
    loss = alive()
    with fs.progress() as seen, pytest.raises(ValueError, match=said):
        plasticity(loss, loss.net.theta, key=fs.key(0), **wrong)
    assert seen.forwards == 0


def test_weights_that_are_not_finite_and_criteria_that_draw_nothing_are_refused():
    loss = alive()
    with pytest.raises(ValueError, match="`theta` must be finite"):
        plasticity(loss, loss.net.theta * math.nan, key=fs.key(0))
    with pytest.raises(ValueError, match=r"criterion that draws targets.*Criterion.classification. has no `sample`"):
        plasticity(replace(loss, criterion=replace(loss.criterion, sample=None)), loss.net.theta, key=fs.key(0))
