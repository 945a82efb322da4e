"""TracIn: which training sequences the fall of a test loss is owed to, from gradients at checkpoints of the training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_flag
from ..core.estimate import Estimate, wide
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from ..curvature import gradient_norms, gram
from ..curvature.blocks import Blocks
from ..curvature.outputs import total_weight

Rule = Literal["left", "trapezoid"]


class TracIn(Result):
    """What every training sequence adds to the fall of the loss of every test sequence; made by `tracin`.

    Positive for a proponent: a sequence whose steps lower the test loss.
    """

    values: Float[Tensor, "b n m"] = quantity(
        "fall of the test loss owed to the sequence, by block",
        unit="loss",
        per=("block", "sample", "other sample"),
        shown=False,
    )
    total: Float[Tensor, "n m"] = quantity(
        "fall of the test loss owed to the sequence", unit="loss", per=("sample", "other sample"), shown=False
    )
    loss_drop: Float[Tensor, " m"] | None = quantity(
        "fall of the test loss from the first checkpoint to the last", unit="loss", per="other sample"
    )
    normalized: bool
    """The numbers are cosines, and no falls of a loss."""
    num_checkpoints: int
    blocks: list[str] = internal()

    @derived("fall of the test loss owed to all sequences", unit="loss", per="other sample")
    def predicted_drop(self) -> Float[Tensor, " m"] | None:
        return None if self.normalized else self.total.sum(0)

    @derived("mean fall of the test losses", unit="loss")
    def mean_loss_drop(self) -> Estimate | None:
        """Over test sequences of which something is scored."""
        return None if self.loss_drop is None else Estimate.of(self.loss_drop[self._there])

    @derived("mean fall of the test losses owed to all sequences", unit="loss")
    def mean_predicted_drop(self) -> Estimate | None:
        """Over the same test sequences."""
        return None if self.predicted_drop is None else Estimate.of(self.predicted_drop[self._there])

    @property
    def _there(self) -> Tensor:
        return self.total.isfinite().all(0)

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"block": self.blocks}

    @property
    def head(self) -> str:
        num, other = self.total.shape
        what = "mean cosines of gradients of" if self.normalized else "TracIn:"
        return f"{what} {num} training and {other} test sequences over {counted(self.num_checkpoints, 'checkpoint')}"

    @property
    def notes(self) -> list[str]:
        bad = int((~self.total.isfinite().all(0)).sum())
        return (
            [f"{counted(bad, 'test sequence')} undefined: nothing of them is scored, or a gradient is 0."]
            if bad
            else []
        )


def tracin(
    train_loss: Loss,
    test_loss: Loss,
    thetas: Iterable[Theta],
    *,
    learning_rates: Float[Tensor, " k"] | Float[Tensor, "k n"] | Sequence[float],
    by: Blocks = "none",
    normalize: bool = False,
    chunk_size: int = 64,
) -> TracIn:
    r"""How much of the fall of each test loss is owed to each training sequence, to first order in the steps of SGD.

    $$T(z, z') = \sum_k \eta_k \Big\langle \frac{g_z(\theta_k)}{W}, \frac{g_{z'}(\theta_k)}{W_{z'}} \Big\rangle, \qquad
      \sum_z T(z, z') \approx \ell_{z'}(\theta_{\text{first}}) - \ell_{z'}(\theta_{\text{last}}),$$

    g the gradient of the sum of a sequence's token losses, W the weight of all training tokens and $W_{z'}$ of the test
    sequence, so that T is in units of its mean loss. For sequences of one length, $g_z / W$ is $\nabla \ell_z / N$: the
    division by the number of training sequences is in W, and $\eta_k$ is the plain sum of the learning rates of the steps
    that checkpoint k stands for (`checkpoint_rates`). The document leaves the division to a batch share 1/B of every step,
    which is N/B times too much: most steps' batches do not have z. Exact to first order, with an error of second order in
    the learning rates: proofs/tracin_first_order.py. That both sides of the second formula agree is the check of the
    checkpoints: `mean_predicted_drop` beside `mean_loss_drop`.

    T is an expansion of the changes that plain SGD makes, and not of influence functions: those ask what other data would
    have led to, and are T of one checkpoint only where the inverse of the curvature is replaced by a multiple of the
    identity. Momentum $\mu$ multiplies the learning rates by $1/(1-\mu)$. Adam moves otherwise: of its checkpoints, T is what
    SGD would do there; a preconditioned variant is not here.

    thetas: the parameters at the checkpoints, one after the other in memory. learning_rates: $\eta_k$; or, of shape (k, n),
    for each sequence the sum over the steps whose batch had it, each divided by the batch's weight (`batch_rates`).
    by: blocks of parameters, as of `gram`. normalize: cosines of the two gradients in the place of their products, divided
    by the sum of $\eta$: a large gradient counts no more than others then. One factor on all learning rates changes no rank.

    Shapes: values (b, n, m), total (n, m), rows of training and columns of test sequences. No number is sampled. A test
    sequence of which nothing is scored has nan. Cost per checkpoint: one Gram of n x m, that is a forward and a backward
    pass over both data sets while they fit into one chunk.

    Raises ValueError where learning rates and checkpoints are not equally many, and as `gram`.

    Pruthi et al. (2020), arXiv:2002.08484.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 1, bias=False))
    >>> half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> loss = fs.objective(net, [(torch.eye(2), torch.zeros(2, 1))], half_square)
    >>> tracin(loss, loss, [torch.tensor([3.0, 4.0])], learning_rates=[0.1]).total        # gradients (3, 0), (0, 4); N = 2
    tensor([[0.4500, 0.0000],
            [0.0000, 0.8000]], dtype=torch.float64)
    """
    check_flag("normalize", normalize)
    rates = torch.as_tensor(learning_rates, dtype=torch.float64)
    ends: list[Theta] = []
    num, names, whole = 0, list[str](), torch.zeros(())
    for num, theta in enumerate(thetas, 1):
        ends = [*ends[:1], theta]
        if num > len(rates):
            break
        grams = gram(train_loss, theta, other=test_loss, by=by, chunk_size=chunk_size)
        each, names = torch.cat([grams.values, grams.total[None]]), grams.blocks
        if normalize:
            each = each / _lengths(train_loss, test_loss, theta, by, chunk_size)
        whole = whole + _share(rates[num - 1], each) * each
    if num != len(rates) or not num:
        raise ValueError(
            f"`learning_rates` must have one entry per checkpoint, got {len(rates)} and {num} checkpoints."
        )
    drop = None
    if normalize:
        whole = whole / _share(rates.sum(0), whole)
    else:
        mass = total_weight(train_loss, ends[0]) if rates.ndim == 1 else 1.0
        whole = whole / mass / test_loss.terms(ends[0])[1].to(whole)
        drop = _means(test_loss, ends[0]) - _means(test_loss, ends[1]) if num > 1 else None
    return TracIn(whole[:-1], whole[-1], drop, normalize, num, names)


def checkpoint_rates(
    learning_rates: Sequence[float] | Float[Tensor, " s"], steps: Sequence[int], *, rule: Rule = "left"
) -> Float[Tensor, " k"]:
    r"""$\eta_k$ of `tracin`: the sum of the learning rates of the steps that each checkpoint stands for.

    learning_rates: of every step of the training, the first one leading from the weights at step 0 to those at step 1.
    steps: of the checkpoints, ascending. rule: `left`: a checkpoint stands for the steps up to the next one, the last for
    none: exact to first order with a checkpoint at every step. `trapezoid`: half of the steps before and half of those behind
    it, which has the smaller error where checkpoints are far apart. Steps before the first and behind the last checkpoint
    count for none.

    Raises ValueError for steps that do not ascend or are not in the schedule.

    >>> checkpoint_rates([0.1, 0.1, 0.2, 0.2], [0, 2, 4]).tolist()
    [0.2, 0.4, 0.0]
    >>> checkpoint_rates([0.1, 0.1, 0.2, 0.2], [0, 2, 4], rule="trapezoid").tolist()
    [0.1, 0.30000000000000004, 0.2]
    """
    rates = torch.as_tensor(learning_rates, dtype=torch.float64)
    _check_steps(steps, len(rates))
    return _shared([rates[a:b].sum() for a, b in pairwise(steps)], rule)


def batch_rates(
    learning_rates: Sequence[float] | Float[Tensor, " s"],
    steps: Sequence[int],
    batches: Sequence[Sequence[int]],
    weights: Float[Tensor, " n"],
    *,
    rule: Rule = "left",
) -> Float[Tensor, "k n"]:
    r"""$\eta_{kz}$ of `tracin` where the batches are known: $\sum_s \eta_s [z \in B_s] / W_{B_s}$ over the steps of k.

    Other arguments as of `checkpoint_rates`. batches: of every step, the numbers of the training sequences that its batch
    had. weights: of every sequence, its scored tokens (`loss.terms(theta)[1]`); $W_B$ is their sum over a batch.

    >>> batch_rates([0.1, 0.1], [0, 1, 2], [[0, 1], [1]], torch.ones(3)).tolist()
    [[0.05, 0.05, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.0]]
    """
    rates, weights = torch.as_tensor(learning_rates, dtype=torch.float64), weights.double()
    if len(batches) != len(rates):
        raise ValueError(f"`batches` must have an entry per step, got {len(batches)} and {len(rates)} learning rates.")
    _check_steps(steps, len(rates))

    def of(a: int, b: int) -> Tensor:
        total = torch.zeros_like(weights)
        for rate, batch in zip(rates[a:b], batches[a:b], strict=True):
            index = torch.as_tensor(batch, dtype=torch.long)
            total.index_add_(0, index, (rate / weights[index].sum()).expand(len(index)))
        return total

    return _shared([of(a, b) for a, b in pairwise(steps)], rule)


def shared_rates(learning_rate: float, steps: Sequence[int], rule: Rule) -> Float[Tensor, " k"]:
    """`checkpoint_rates` of a learning rate that is the same at all steps."""
    _check_steps(steps, steps[-1])
    return _shared([learning_rate * torch.tensor(b - a, dtype=torch.float64) for a, b in pairwise(steps)], rule)


def _shared(intervals: list[Tensor], rule: Rule) -> Tensor:
    """What is between two checkpoints, to the first of the two or one half to each."""
    check_choice("rule", rule, ("left", "trapezoid"))
    between = torch.stack(intervals)
    none = torch.zeros_like(between[:1])
    before, behind = torch.cat([none, between]), torch.cat([between, none])
    return behind if rule == "left" else (before + behind) / 2


def _check_steps(steps: Sequence[int], num: int) -> None:
    if len(steps) < 2 or any(a >= b for a, b in pairwise(steps)) or steps[0] < 0 or steps[-1] > num:
        raise ValueError(
            f"`steps` must be two or more ascending numbers from 0 to the {num} steps of the schedule, got {list(steps)}."
        )


def _share(rate: Tensor, whole: Float[Tensor, "c n m"]) -> Tensor:
    """Of one checkpoint: one for all training sequences, or one for each."""
    if rate.ndim and rate.shape != whole.shape[1:2]:
        raise ValueError(f"`learning_rates` must have shape (k,) or (k, {whole.shape[1]}), got (k, {len(rate)}).")
    return rate.to(whole).reshape(-1, 1)


def _lengths(train: Loss, test: Loss, theta: Theta, by: Blocks, chunk_size: int) -> Float[Tensor, "c n m"]:
    """Products of the lengths of gradients, by block and, last, whole."""
    one, two = (gradient_norms(loss, theta, by=by, chunk_size=chunk_size) for loss in (train, test))
    sides = [torch.cat([each.values, each.total[None]]) for each in (one, two)]
    return sides[0][:, :, None] * sides[1][:, None]


def _means(loss: Loss, theta: Theta) -> Float[Tensor, " n"]:
    """The mean loss of every sequence."""
    with torch.no_grad():
        sums, weights = loss.terms(theta)
    dtype = wide(sums.device)
    return sums.to(dtype) / weights.to(dtype)
