"""What a gradient step for one task does to the loss of another: to first and to second order, and measured."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad

from ..core.checks import check_positive
from ..core.estimate import Estimate
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.standard_errors import jackknife_stderr, means
from ..curvature.gram import Blocks, gram
from ..curvature.gram_errors import LEAST
from ..curvature.gram_statistics import with_total
from ..curvature.leafwise import terms_at
from ..curvature.pair_errors import crossed_stderr
from ..curvature.scored_sequences import LeftOut, apart
from ..curvature.whitening import check_tasks

ORDERS = ["first -> second", "second -> first"]
"""The task that a step is made for, and the task whose loss it changes."""
Orders = Float[Tensor, "2"]


class TaskInterference(Result):
    """What a gradient step for one of two tasks does to the loss of the other."""

    change: Orders = quantity("loss change of the other task", unit="loss", per="pair", stderr="change_stderr")
    predicted: Orders = quantity("loss change to second order", unit="loss", per="pair")
    second_order: Orders = quantity("second order damage", unit="loss", per="pair", stderr="second_order_stderr")
    first_order: Estimate = quantity("first order loss change", unit="loss")
    log_ratio: Estimate = quantity("log ratio of second order damages")
    first_order_of_blocks: Float[Tensor, " b"] = quantity(
        "first order loss change", unit="loss", per="block", stderr="first_order_of_blocks_stderr"
    )
    second_order_of_blocks: Float[Tensor, "b 2"] = quantity(
        "second order damage", unit="loss", per=("block", "pair"), stderr="second_order_of_blocks_stderr"
    )
    learning_rate: float
    num_first: int
    num_second: int
    num_unscored: int
    num_shared: int
    num_copies: int
    change_stderr: Orders = internal()
    second_order_stderr: Orders = internal()
    first_order_of_blocks_stderr: Float[Tensor, " b"] = internal()
    second_order_of_blocks_stderr: Float[Tensor, "b 2"] = internal()
    blocks: list[str] = internal()

    @derived("loss change beside the second order", unit="loss", per="pair")
    def remainder(self) -> Orders:
        """What the prediction lacks: the difference of Hessian and Fisher matrix, and higher orders."""
        return self.change - self.predicted

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"pair": ORDERS, "block": self.blocks}

    @property
    def unresolved(self) -> list[str]:
        return ["log_ratio"] if bool(self.log_ratio.value.isnan()) else []

    @property
    def head(self) -> str:
        return (
            f"steps of {self.learning_rate:g} gradients of {self.num_first} and {self.num_second} sequences of two tasks, "
            "and the other task's loss"
        )

    @property
    def notes(self) -> list[str]:
        notes = LeftOut(self.num_unscored, self.num_shared, self.num_copies).notes
        notes.append("`predicted` and `remainder` are those of the steps made, on these data, and have no errors.")
        if bool(self.log_ratio.value.isnan()):
            notes.append("no ratio of damages: one of them is not told from 0.")
        return notes


def task_interference(
    first_loss: Loss,
    second_loss: Loss,
    theta: Theta,
    *,
    learning_rate: float = 0.01,
    by: Blocks = "layer",
    chunk_size: int = 64,
) -> TaskInterference:
    r"""How much a gradient step for task B changes the loss of task A, and the other way round.

    $$L_A(\theta - \eta g_B) - L_A(\theta) = - \eta\, g_A^\top g_B + \tfrac12 \eta^2\, g_B^\top H_A g_B + O(\eta^3), \qquad
      H_A \approx F_A = \frac{\sum_{i \in A} s_i s_i^\top}{\sum_{i \in A} w_i},$$

    s the gradients of sequences' summed losses, w their weights, g the gradients of the losses. F is the empirical Fisher
    matrix per unit of weight: the Hessian where the model is right about the labels, and where tokens of one sequence have
    gradients that do not go together; elsewhere it is what the prediction is wrong by. So the step is made, and `change` is
    the measured difference of losses, with its paired error over the sequences of the other task, the step taken as it is.
    `predicted` has the first two orders of that step, from the same gradients.

    `second_order`: of the step along the mean gradient of the population, of which g_B is an estimate. With
    $K_{ij} = \langle s_i, s_j \rangle$, n and m sequences of A and B,

    $$g_B^\top F_A g_B \approx \frac{1}{\sum_i w_i} \sum_{i \in A} \frac{(\sum_j K_{ij})^2 - \sum_j K_{ij}^2}
      {m (m - 1)\, \bar w_B^2}:$$

    with the pairs j = j left in, the noise of g_B would add $\mathrm{tr}(F_A\, \mathrm{Cov}\, g_B)$, which is above 0 where
    the mean gradient is 0 (proofs/interference_form.py). Errors: jackknife over the sequences of both tasks, up to 1.7 times
    too large where a mean gradient is 0; of `first_order`, which is the same both ways, `crossed_stderr`. `log_ratio`: of the
    damage to the second task over that to the first; nan where one is not two errors above 0. Of blocks: g and F cut to a
    block; first orders add up to that of all, second orders do not.

    A document squares B's gradient before it is put in the formula: a damage of fourth order in g_B, which no step has.

    learning_rate: eta. by, chunk_size: of `gram`. Sequences that both tasks have, copies, and what is not scored are left
    out.

    Raises ValueError for tasks of different parameters, fewer than two sequences of a task, and as `gram` does.

    Kirkpatrick et al. (2017), doi:10.1073/pnas.1611835114, for the second order; Lopez-Paz, Ranzato (2017),
    arXiv:1706.08840, for the first.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(1, 1, bias=False))
    >>> half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> tasks = [(torch.ones(2, 1), torch.tensor([[1.0], [-1.0]])), (torch.ones(2, 1), torch.tensor([[3.0], [2.0]]))]
    >>> result = task_interference(*(fs.objective(net, [task], half_square) for task in tasks), torch.zeros(1))
    >>> [round(float(x[1]), 6) for x in (result.change, result.predicted)]     # 1/2 (eta 2.5)^2 on the first, whose F = H = 1
    [0.000313, 0.000313]
    """
    check_positive("learning_rate", learning_rate)
    check_tasks(first_loss, second_loss)
    first, second, lost = apart(first_loss, second_loss, theta)
    between = gram(first, theta, other=second, by=by, chunk_size=chunk_size)
    at = [terms_at(loss, theta) for loss in (first, second)]
    weights = at[0].weights, at[1].weights
    values = with_total(between.values.double()).cpu()
    inner = -learning_rate * values.mean((1, 2)) / (weights[0].mean() * weights[1].mean())
    error = learning_rate * crossed_stderr(values, weights)
    found = _second_orders(values, weights, learning_rate)
    changes = [
        means((terms_at(hurt, _moved(made, theta, learning_rate)).sums - before.sums)[None], before.weights)
        for made, hurt, before in ((first, second, at[1]), (second, first, at[0]))
    ]
    n, m = values.shape[1:]
    return TaskInterference(
        torch.cat([each.value for each in changes]), inner[-1] + found.of_steps[-1], found.values[-1],
        Estimate(inner[-1], error[-1], n + m), Estimate(*found.log_ratio, n + m), inner[:-1].contiguous(),
        found.values[:-1].contiguous(), float(learning_rate), n, m, lost.unscored, lost.shared, lost.copies,
        torch.cat([each.stderr for each in changes]), found.stderr[-1], error[:-1].contiguous(),
        found.stderr[:-1].contiguous(), list(between.blocks),
    )  # fmt: skip


def _moved(loss: Loss, theta: Theta, learning_rate: float) -> Float[Tensor, " p"]:
    start = loss.vector(theta)
    return start - learning_rate * grad(loss)(start)


class _SecondOrders(NamedTuple):
    values: Float[Tensor, "c 2"]
    stderr: Float[Tensor, "c 2"]
    of_steps: Float[Tensor, "c 2"]
    """With the gradients of the samples in the place of their means."""
    log_ratio: tuple[Tensor, Tensor]


def _second_orders(values: Float[Tensor, "c n m"], weights: tuple[Tensor, Tensor], rate: float) -> _SecondOrders:
    """From inner products of gradients of both tasks, and the weights of their sequences."""

    def scaled(a: Tensor, b: Tensor) -> Tensor:
        """(2, ...) from mean weights."""
        return rate**2 / 2 * torch.stack([1 / (b * a.square()), 1 / (a * b.square())])

    (a, b), (fewer_a, fewer_b) = ([x.mean() for x in weights], [(x.sum() - x) / (len(x) - 1) for x in weights])
    scale, scales = scaled(a, b), (scaled(fewer_a, b), scaled(a, fewer_b))
    made, without = cross_forms(values) * scale, [x * y for x, y in zip(_left_out(values), scales, strict=True)]
    stderr = _over_both(without)
    nan = made.new_tensor(math.nan)
    log_ratio = nan, nan
    if bool((made[-1] > LEAST * stderr[-1]).all()):
        logs = [(each[-1, 0] / each[-1, 1]).log() for each in without]
        log_ratio = (made[-1, 0] / made[-1, 1]).log(), _over_both(logs)
    return _SecondOrders(made, stderr, cross_forms(values, unbiased=False) * scale, log_ratio)


def _over_both(without: list[Tensor]) -> Tensor:
    """The jackknife's error over the samples of both tasks, from values without each of them, along the last axis."""
    return sum((jackknife_stderr(each).square() for each in without), torch.zeros(())).sqrt()


def _left_out(values: Float[Tensor, "c n m"]) -> list[Tensor]:
    """`cross_forms` without each row (c, 2, n), and without each column (c, 2, m); nan where one is left."""

    def parts(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Without a row, and without one of the columns that pairs are of."""
        num, of = rows.shape[-2:]
        sums, squares = rows.sum(-1), rows.square()
        each = sums.square() - squares.sum(-1)
        whole = each.sum(-1, keepdim=True)
        fewer = whole - 2 * (sums[..., None] * rows).sum(-2) + 2 * squares.sum(-2)
        no_row = (whole - each) / ((num - 1) * of * (of - 1) or math.nan)
        return no_row, fewer / (num * (of - 1) * (of - 2) or math.nan)

    (columns, rows), (other_rows, other_columns) = parts(values.mT), parts(values)
    return [torch.stack([rows, other_rows], 1), torch.stack([columns, other_columns], 1)]


def cross_forms(values: Float[Tensor, "c n m"], *, unbiased: bool = True) -> Float[Tensor, "c 2"]:
    r"""$\mu_A^\top S_B \mu_A$ and $\mu_B^\top S_A \mu_B$ from $K = A B^\top$, S the second moments of the rows of A and B.

    Without bias, from pairs of different rows; else of the rows' means. See proofs/interference_form.py.

    >>> cross_forms(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])).tolist()              # (1 3 + 2 4) / 2, (1 2 + 3 4) / 2
    [[5.5, 7.0]]
    """

    def form(rows: Tensor) -> Tensor:
        num = rows.shape[-1]
        sums = rows.sum(-1).square()
        if not unbiased:
            return sums.mean(-1) / num**2
        return (sums - rows.square().sum(-1)).mean(-1) / (num * (num - 1))

    return torch.stack([form(values.mT), form(values)], -1)
