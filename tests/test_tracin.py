"""TracIn. Oracles: sums of products of gradients from single backward passes, and trainings that are carried out."""

import pytest
import torch
from problems import mlp, seeded
from results import language, loss, second_loss, theta
from torch.func import grad
from torch.testing import assert_close

import funcscope as fs
from funcscope.curvature import per_sample_gradients
from funcscope.gradients import batch_rates, checkpoint_rates, tracin, tracin_self_influence


def rows(one, at):
    """Gradients of the sums of single sequences, each from a backward pass of its own."""
    return torch.stack([grad(lambda t, i=i: one.terms(t)[0][i])(at) for i in range(len(one.terms(at)[0]))])


def task(num, seed, net=None):
    """A classifier of a few points, whose labels hang on them."""
    net = fs.functional(seeded(0, mlp).double()) if net is None else net
    x = fs.normal(fs.key(seed), torch.zeros(num, 4, dtype=torch.float64))
    return fs.objective(net, [(x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long())], fs.classification)


def trained(train, rate, steps):
    """Weights after every step of gradient descent."""
    points = [train.net.theta]
    for _ in range(steps):
        points.append(points[-1] - rate * grad(train)(points[-1]))
    return points


def falls(test, points):
    ends = [(lambda s, w: s / w)(*test.terms(point)) for point in (points[0], points[-1])]
    return ends[0] - ends[1]


def padded():
    """Sequences of one model that have different numbers of scored tokens."""
    ids = torch.tensor([[1, 2, 3, 4, 5], [2, 2, 7, 0, 0], [8, 1, 0, 0, 0]])
    return fs.objective(language().net, [{"input_ids": ids, "attention_mask": (ids > 0).long()}], fs.causal_lm)


def test_it_is_the_weighted_sum_of_products_of_gradients_by_block():
    one, two, points = language(), padded(), [language().net.theta, 0.9 * language().net.theta]
    found = tracin(one, two, points, learning_rates=[0.3, 0.2], by="tensor")
    weights, total = two.terms(points[0])[1], float(one.terms(points[0])[1].sum())
    assert weights.tolist() == [4, 2, 1]
    whole = torch.zeros(6, 3, dtype=torch.float64)
    blocks = torch.zeros(len(one.layout.leaves), 6, 3, dtype=torch.float64)
    for rate, point in zip((0.3, 0.2), points, strict=True):
        g, h = rows(one, point), rows(two, point)
        whole += rate * (g / total) @ (h / weights[:, None]).T
        blocks += torch.stack([
            rate * (g[:, leaf.slice] / total) @ (h[:, leaf.slice] / weights[:, None]).T for leaf in one.layout.leaves
        ])  # fmt: skip
    assert found.blocks == [leaf.name for leaf in one.layout.leaves]
    assert_close(found.values, blocks)
    assert_close(found.total, whole)
    assert_close(found.values.sum(0), found.total)


def test_the_normalised_variant_is_the_mean_cosine_and_ignores_the_length_of_a_gradient():
    points, rates = [theta(), 0.5 * theta()], torch.tensor([1.0, 3.0], dtype=torch.float64)
    found = tracin(loss(), second_loss(), points, learning_rates=rates, normalize=True, by="tensor")
    whole = torch.zeros(6, 6, dtype=torch.float64)
    for share, point in zip(rates / 4, points, strict=True):
        g, h = (torch.nn.functional.normalize(rows(each, point)) for each in (loss(), second_loss()))
        whole += share * g @ h.T
    assert_close(found.total, whole)
    assert bool((found.values.abs() <= 1 + 1e-12).all())
    assert found.loss_drop is None
    assert found.predicted_drop is None
    assert float((found.values.sum(0) - found.total).abs().max()) > 0.1  # cosines of blocks do not add up


def test_all_sequences_together_are_owed_the_fall_of_the_loss_by_small_steps():
    train, test = task(12, 1), task(5, 2)
    gaps = []
    for rate in (0.08, 0.04):
        steps = round(0.24 / rate)
        points = trained(train, rate, steps)
        made = tracin(train, test, points, learning_rates=checkpoint_rates([rate] * steps, range(steps + 1)))
        assert_close(made.loss_drop, falls(test, points))
        gaps.append(float((made.predicted_drop - made.loss_drop).norm() / made.loss_drop.norm()))
    assert gaps[1] < 0.05
    assert gaps[1] == pytest.approx(gaps[0] / 2, rel=0.15)  # an error of second order in each step
    assert abs(float(made.mean_predicted_drop.value) - float(made.mean_loss_drop.value)) < 0.02


def test_without_the_division_by_the_size_of_the_data_the_falls_are_that_many_times_too_large():
    """E37 and the correction of 2.12: a share 1/B of every step, whether its batch had z or not, is N/B times too much."""
    train, test, rate, steps, size = task(12, 1), task(5, 2), 0.04, 5, 3
    points = trained(train, rate, steps)
    found = tracin(train, test, points, learning_rates=[rate] * steps + [0.0])
    documented = sum(rate / size * rows(train, point) @ rows(test, point).T for point in points[:-1]).sum(0)
    actual = falls(test, points)
    assert float((found.predicted_drop - actual).norm() / actual.norm()) < 0.03
    assert_close(documented, 12 / size * found.predicted_drop)


def test_known_batches_give_each_sequence_the_steps_that_had_it():
    train, test, rate, steps = task(9, 1), task(5, 2), 0.01, 6
    batches = [[(3 * s + i) % 9 for i in range(3)] for s in range(steps)]
    x, y = train.batches[0][0], train.batches[0][1].index
    alone = [fs.objective(train.net, [(x[batch], y[batch])], fs.classification) for batch in batches[:3]]
    points = [train.net.theta]
    for step in range(steps):
        points.append(points[-1] - rate * grad(alone[step % 3])(points[-1]))
    rates = batch_rates([rate] * steps, range(steps + 1), batches, torch.ones(9))
    assert_close(rates.sum(0), torch.full((9,), rate * steps / 9, dtype=torch.float64))
    made = tracin(train, test, points, learning_rates=rates)
    assert float((made.predicted_drop - falls(test, points)).norm() / falls(test, points).norm()) < 0.02
    first = tracin(train, test, points[:2], learning_rates=rates[:2] * torch.tensor([[1.0], [0.0]]))
    assert float(first.total[3:].abs().max()) == 0.0  # the first batch had the first three
    assert_close(first.predicted_drop, (rate * grad(alone[0])(points[0]) @ rows(test, points[0]).T))


@pytest.mark.slow
def test_far_checkpoints_do_better_by_the_trapezoid():
    train, test, rate, steps = task(12, 1), task(5, 2), 0.02, 60
    points, at = trained(train, rate, steps)[::30], [0, 30, 60]
    off = {}
    for rule in ("left", "trapezoid"):
        made = tracin(train, test, points, learning_rates=checkpoint_rates([rate] * steps, at, rule=rule))
        off[rule] = float((made.predicted_drop - made.loss_drop).norm() / made.loss_drop.norm())
    assert off["trapezoid"] < off["left"] / 4


def test_one_factor_on_the_learning_rates_changes_no_rank():
    """E37: a normalisation to mean 1 weighs checkpoints as before, and not equally."""
    rates, points = torch.tensor([0.3, 0.1], dtype=torch.float64), [theta(), 0.5 * theta()]
    one, mean_1, equal = (
        tracin(loss(), second_loss(), points, learning_rates=x).total for x in (rates, rates / rates.mean(), [1.0, 1.0])
    )
    assert_close(mean_1, one / 0.2)
    assert not torch.allclose(mean_1, equal, rtol=0.01)


def test_a_proponent_is_positive_and_no_reference_set_is_part_of_the_data():
    """E37: the first samples are no reference of themselves: the diagonal is what biases it."""
    points = trained(task(12, 1), 0.1, 2)
    own = tracin(task(12, 1), task(12, 1), points, learning_rates=[0.1] * 2 + [0.0]).total
    assert bool((own.diagonal() > 0).all())
    biased = own[:, :4].mean(1)  # the documented score: against the mean of the first four, themselves among the scored
    assert float(biased[:4].mean() / biased[4:].mean()) > 1.5
    clean = (own - own.diagonal().diag())[:4, :4].sum() / 12
    assert float(clean / biased[4:].mean()) < 1.3


@pytest.mark.slow
def test_self_influence_is_the_diagonal_and_its_share_does_not_hang_on_the_learning_rate():
    train, rate = padded(), 0.1
    points = [train.net.theta, 0.9 * train.net.theta]
    whole = tracin(train, train, points, learning_rates=[0.5, 0.5])
    found = tracin_self_influence(train, points, [0, 10], learning_rate=rate)
    assert_close(found.values, whole.total.diagonal())
    assert_close(found.predicted_drop, whole.predicted_drop)
    assert_close(found.by_block.sum(), found.values.mean())
    first = tracin(train, train, points[:1], learning_rates=[1.0]).total.diagonal()
    assert_close(found.at_step[0], first.mean())
    assert_close(found.at_step_stderr[0], first.std() / 3**0.5)
    other = tracin_self_influence(train, points, [0, 10])
    assert float(other.self_share.value) == pytest.approx(float(found.self_share.value))
    assert float(found.self_share.value) == pytest.approx(float(whole.total.diagonal().sum() / whole.total.sum()))
    each = found.values
    assert float(found.mean.stderr) == pytest.approx(float(each.std() / 3**0.5))


def test_sequences_without_anything_in_common_and_copies_have_the_extreme_shares():
    net = fs.functional(seeded(0, lambda: torch.nn.Linear(3, 1, bias=False)).double())
    y = torch.ones(3, 1, dtype=torch.float64)
    for x, share in ((torch.eye(3).double(), 1.0), (torch.ones(3, 3).double(), 1 / 3)):
        one = fs.objective(net, [(x, y)], fs.mse)
        found = tracin_self_influence(one, [torch.zeros(3).double(), torch.zeros(3).double()], [0, 1])
        assert float(found.self_share.value) == pytest.approx(share)


@pytest.mark.slow
def test_a_sequence_that_is_not_scored_is_undefined_as_a_test_and_owed_nothing_in_training():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    labels = torch.tensor([[1, 2, 3], [-100, -100, -100]])
    half = fs.objective(language().net, [{"input_ids": ids, "labels": labels}], fs.causal_lm)
    made = tracin(half, half, [language().net.theta], learning_rates=[1.0])
    assert bool(made.total[:, 1].isnan().all())
    assert "undefined" in made.notes[0]
    assert float(made.total[1, 0]) == 0
    own = tracin_self_influence(half, 2 * [language().net.theta], [0, 1])
    assert own.values.isnan().tolist() == [False, True]
    assert "undefined" in own.notes[0]
    assert float(own.mean.value) == pytest.approx(float(own.values[0]))


def test_rates_are_sums_over_the_steps_between_checkpoints():
    schedule = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert_close(checkpoint_rates(schedule, [1, 3, 5]), torch.tensor([0.5, 0.9, 0.0]).double())
    assert_close(checkpoint_rates(schedule, [1, 3, 5], rule="trapezoid"), torch.tensor([0.25, 0.7, 0.45]).double())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tracin(loss(), loss(), [theta()], learning_rates=[1.0, 2.0]), "one entry per checkpoint, got 2 and 1"),
        (lambda: tracin(loss(), loss(), [theta(), theta()], learning_rates=[1.0]), "got 1 and 2 checkpoints"),
        (lambda: tracin(loss(), loss(), [theta()], learning_rates=torch.ones(1, 4)), r"shape \(k,\) or \(k, 6\)"),
        (lambda: tracin(loss(), language(), [theta()], learning_rates=[1.0]), "flat vector"),
        (lambda: checkpoint_rates([0.1, 0.1], [0, 3]), "ascending numbers from 0 to the 2 steps"),
        (lambda: checkpoint_rates([0.1, 0.1], [1, 1]), "ascending"),
        (lambda: batch_rates([0.1], [0, 1], [[0], [1]], torch.ones(2)), "an entry per step, got 2 and 1"),
        (lambda: tracin_self_influence(loss(), [theta()], [0, 1]), "got 2 and 1 checkpoints"),
        (lambda: tracin_self_influence(loss(), 2 * [theta()], [0, 1], learning_rate=0.0), "`learning_rate`"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_rows_of_the_oracle_are_those_of_the_library():
    assert_close(rows(padded(), padded().net.theta), per_sample_gradients(padded(), padded().net.theta))


def test_mean_falls_are_of_test_sequences_that_are_scored():
    ids, labels = torch.tensor([[1, 2, 3], [4, 0, 2]]), torch.tensor([[1, 2, 3], [-100, -100, -100]])
    net = language().net
    both = fs.objective(net, [{"input_ids": ids, "labels": labels}], fs.causal_lm)
    found = tracin(both, both, [net.theta, 0.9 * net.theta], learning_rates=[0.1, 0.1])
    for mean, each in ((found.mean_loss_drop, found.loss_drop), (found.mean_predicted_drop, found.predicted_drop)):
        assert mean.num == 1
        assert float(mean.value) == float(each[0])
        assert each[1].isnan()
