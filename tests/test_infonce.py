"""InfoNCE: a lower bound on held-out pairs, near the truth where it is not saturated; what training pairs would give."""

from __future__ import annotations

import math

import pytest
import torch
from known_information import KEY, draws, information, pair

import funcscope as fs
from funcscope.information import (
    mutual_information_discrete,
    mutual_information_infonce,
)


def test_infonce_is_a_lower_bound_near_the_truth_and_nothing_for_independent_sides():
    x, y = pair(0, 600, 1, 0.8)
    made = mutual_information_infonce(x, y, key=KEY, num_candidates=60, steps=100)
    assert 0.7 * information(0.8) < float(made.value) < information(0.8) + 2 * float(made.stderr)
    assert float(made.ceiling) == math.log(60)
    assert not made.saturated
    none = mutual_information_infonce(x, y.flip(0), key=KEY, num_candidates=60, steps=40)
    assert float(none.value) < 2 * float(none.stderr) + 1e-3
    assert float(none.value) > -0.05
    short = [mutual_information_infonce(x, y, key=fs.key(i), num_candidates=60, steps=5) for i in (0, 0, 1)]
    assert short[0] == short[1] != short[2]


def test_on_the_pairs_that_train_it_a_critic_finds_information_where_there_is_none():
    """mistakes.md B 21: the best epoch on the training pairs is no bound; independent sides get more than a nat."""
    x, y = draws(0, 128, 30), draws(1, 128, 30)
    W = torch.zeros(30, 30, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([W], lr=0.02)
    for _ in range(60):
        scores = x @ W @ y.T
        loss = (scores.logsumexp(1) - scores.diagonal()).mean()
        (W.grad,) = torch.autograd.grad(loss, [W])
        adam.step()
    documented = math.log(128) - float(loss.detach())
    assert documented > 1
    made = mutual_information_infonce(x, y, key=KEY, critic="bilinear", steps=60)
    assert abs(float(made.value)) < 0.1


def test_deterministic_layers_saturate_and_say_so():
    """mistakes.md B 22: between layers of a deterministic network the value is log K, whatever they share."""
    x = draws(0, 200, 6)
    layers = {width: torch.tanh(x @ draws(width, 6, width)) for width in (6, 12)}
    made = [mutual_information_infonce(x, h, key=KEY, num_candidates=16, steps=120) for h in layers.values()]
    for each in made:
        assert each.saturated
        assert "ceiling" in each.notes[-1]
        assert float(each.value) <= math.log(16)
    assert abs(float(made[0].value - made[1].value)) < 0.1


def test_candidates_are_of_other_sequences():
    """Rows that are alike within a sequence would be told from their own, were they candidates."""
    groups = torch.arange(60).repeat_interleave(5)
    x = draws(0, 60, 3)[groups] + 0.01 * draws(1, 300, 3)
    made = mutual_information_infonce(x, x, key=KEY, groups=groups, num_candidates=20, steps=100)
    assert float(made.ceiling) == math.log(20)
    assert float(made.value) > 0.9 * math.log(20)  # five alike among the candidates would cost up to log 5
    few = mutual_information_infonce(x, x, key=KEY, groups=groups, steps=5)
    assert float(few.ceiling) == math.log(30)  # of a half of the sequences
    assert math.isnan(mutual_information_infonce(x[:40], x[:40], key=KEY, groups=groups[:40]).value)


def test_a_detached_partition_function_has_no_bound():
    """mistakes.md B 19: with a constant in its place, the gradient raises the score of true pairs, and nothing stops it."""
    x, y = draws(0, 200, 1), draws(1, 200, 1)
    constant = torch.zeros((), dtype=torch.float64, requires_grad=True)  # a critic that says nothing but this
    adam, average, documented = torch.optim.Adam([constant], lr=0.1), torch.zeros((), dtype=torch.float64), []
    for _ in range(300):
        joint, shuffled = constant.expand(200).mean(), constant.expand(200).logsumexp(0) - math.log(200)
        average = 0.99 * average + 0.01 * shuffled.detach()
        documented.append(float((joint - average).detach()))
        (constant.grad,) = torch.autograd.grad(average - joint, [constant])
        adam.step()
        constant_in_both = float((joint - shuffled).detach())
    assert documented[-1] > documented[100] + 1 > 5  # nats, of independent sides by a constant
    assert constant_in_both == pytest.approx(0, abs=1e-9)  # the bound itself
    made = mutual_information_infonce(x, y, key=KEY, num_candidates=50, steps=20)
    assert abs(float(made.value)) < 0.1


def test_candidates_of_the_own_sequence_would_leave_out_what_sequences_share():
    """mistakes.md B 19: shuffled within sequences, what remains is the information given the sequence: here none."""
    groups = torch.arange(40).repeat_interleave(4)
    x = torch.linspace(-2, 2, 40, dtype=torch.float64)[groups, None]
    within = torch.stack([mutual_information_discrete(groups[g], groups[g]).value for g in (groups == 0, groups == 1)])
    assert float(within.max()) == 0
    made = mutual_information_infonce(x, x, key=KEY, groups=groups, num_candidates=10, steps=60)
    assert float(made.value) > 0.5
