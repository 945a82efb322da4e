"""What a training sequence does for its own loss: by influence functions at one model, by TracIn over a training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jvp

from ..core.checks import check_choice, check_count, check_number, check_positive
from ..core.estimate import Estimate
from ..core.keys import Key
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.standard_errors import ratio_stderr
from ..core.tables import counted
from ..curvature import gradient_chunks, gradient_norms, gram
from ..curvature.blocks import Blocks
from ..curvature.outputs import total_weight
from .influence import RELATIVE, damped_solve, inverse_of
from .tracin import Rule, shared_rates


class SelfInfluence(Result):
    """How much the own loss of every training sequence is expected to rise when it is left out; by `self_influence`."""

    values: Float[Tensor, " n"] = quantity("rise of the own loss when left out", unit="loss", per="sample")
    damping: float = quantity("damping")
    method: str
    num_unscored: int = internal()

    @derived("mean rise of the own loss when left out", unit="loss")
    def mean(self) -> Estimate:
        """Over sequences, of which something is scored."""
        return Estimate.of(self.values[self.values.isfinite()])

    @derived("share of the tenth of the sequences with the largest rises in the sum of all")
    def top_share(self) -> float:
        real = self.values[self.values.isfinite()].sort(descending=True).values
        total = float(real.sum())
        return float(real[: -(-len(real) // 10)].sum()) / total if total > 0 else float("nan")

    @property
    def head(self) -> str:
        return f"self-influence ({self.method}) of {counted(len(self.values), 'sequence')}"

    @property
    def notes(self) -> list[str]:
        num = self.num_unscored
        return [f"{counted(num, 'sequence')} undefined: nothing of them is scored."] if num else []


def self_influence(
    loss: Loss,
    theta: Theta,
    *,
    key: Key | None = None,
    method: Literal["ekfac", "kfac", "gram"] = "ekfac",
    damping: float | None = None,
    num: int = 4,
    chunk_size: int = 8,
) -> SelfInfluence:
    r"""How much each sequence's own loss is expected to rise when it is left out of the training: what it alone teaches.

    $$\frac{g_z^\top (G + \lambda I)^{-1} g_z}{W\, W_z},$$

    the diagonal of `influence(loss, loss, theta).left_out`, in units of the mean token loss of the sequence; never negative.
    Large for sequences that are learnt by heart or labelled by mistake, and nothing else would teach. Arguments as there;
    conjugate gradients are not among the methods, as they would take a solve per sequence. With `gram`, the value times
    $W_z$ is the leverage of the sequence, between 0 and 1. The first order is too small for a sequence of large leverage.

    No error: the values are of these sequences; that of the mean is over them. A sequence of which nothing is scored has
    nan. Cost: the factors, 2 passes per draw of labels and forward and backward, then one backward pass and a product per
    sequence; with `gram` one n x n Gram.

    Raises ValueError as `influence`.

    Koh, Liang (2017), arXiv:1703.04730; Feldman, Zhang (2020), arXiv:2008.03703.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(1, 1, bias=False))
    >>> half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> loss = fs.objective(net, [(torch.ones(2, 1), torch.tensor([[1.0], [3.0]]))], half_square)
    >>> self_influence(loss, torch.tensor([2.0]), method="gram", damping=1.0).values       # g = (1, -1); F = 1
    tensor([0.2500, 0.2500], dtype=torch.float64)
    """
    check_choice("method", method, ("ekfac", "kfac", "gram"))
    check_count("num", num)
    if damping is not None:
        check_number("damping", damping, 0.0)
    theta = Loss.vector(loss, theta)
    weight, per = total_weight(loss, theta), loss.terms(theta)[1]
    if method == "gram":
        own = gram(loss, theta, by="none").total
        shift = RELATIVE * float(own.trace()) / weight / len(theta) if damping is None else damping
        forms = (damped_solve(own / weight, shift, own)).diagonal()
    else:
        inverse = inverse_of(loss, theta, key, method, damping, num, 0.0, 0)
        rows = gradient_chunks(loss, theta, chunk_size=chunk_size)
        forms = torch.stack([(g.double() @ inverse.solve(g)[0].double()) for chunk in rows for g in chunk])
        shift = inverse.damping
    values = forms.to(per) / (weight * per)
    return SelfInfluence(values.cpu(), shift, method, int((per == 0).sum()))


class TracInSelfInfluence(Result):
    """How much of the fall of its own loss each sequence is owed to itself, over a training; by `tracin_self_influence`."""

    values: Float[Tensor, " n"] = quantity("fall of the own loss owed to the sequence", unit="loss", per="sample")
    at_step: Float[Tensor, " s"] = quantity(
        "mean fall of the own loss owed to the sequence, per unit of learning rate",
        unit="loss",
        per="step",
        stderr="at_step_stderr",
    )
    at_step_stderr: Float[Tensor, " s"]
    by_block: Float[Tensor, " b"] = quantity(
        "mean fall of the own loss owed to the sequence", unit="loss", per="block", stderr="by_block_stderr"
    )
    by_block_stderr: Float[Tensor, " b"]
    predicted_drop: Float[Tensor, " n"] = quantity("fall of the own loss owed to all", unit="loss", per="sample")
    steps: list[int]
    learning_rate: float
    blocks: list[str] = internal()

    @derived("mean fall of the own loss owed to the sequence", unit="loss")
    def mean(self) -> Estimate:
        return Estimate.of(self._there(self.values))

    @derived("share of the fall of a sequence's loss that is owed to itself")
    def self_share(self) -> Estimate:
        """A ratio of sums over sequences, whatever the learning rate; error over sequences, the others being as they are."""
        own, every = self._there(self.values), self._there(self.predicted_drop)
        return Estimate(own.sum() / every.sum(), ratio_stderr(own, every), len(own))

    def _there(self, x: Tensor) -> Tensor:
        return x[self.values.isfinite()]

    @property
    def coords(self) -> dict[str, list[Any]]:
        return {"step": self.steps, "block": self.blocks}

    @property
    def head(self) -> str:
        return f"TracIn of {counted(len(self.values), 'sequence')} with themselves over {len(self.steps)} checkpoints"

    @property
    def notes(self) -> list[str]:
        num = int((~self.values.isfinite()).sum())
        return [f"{counted(num, 'sequence')} undefined: nothing of them is scored."] if num else []


def tracin_self_influence(
    loss: Loss,
    thetas: Iterable[Theta],
    steps: Sequence[int],
    *,
    learning_rate: float = 1.0,
    by: Blocks = "layer",
    rule: Rule = "trapezoid",
    chunk_size: int = 64,
) -> TracInSelfInfluence:
    r"""How much of the fall of each sequence's own loss it is owed itself, over the checkpoints of a training.

    $$\sum_k \eta_k \frac{\lVert g_z(\theta_k) \rVert^2}{W\, W_z},$$

    the diagonal of `tracin(loss, loss, thetas)`, to first order in steps of SGD. `predicted_drop` is its row sum: what all
    sequences together take off the loss of z. The share of the first in the second is 1 for sequences that have nothing in
    common, and about 1/N for sequences that are all alike.

    loss: on the training sequences. steps: of the checkpoints. learning_rate: the same at all steps; 1, the default, makes
    the falls those of a unit of learning rate. It is one factor: shares and ranks do not depend on it. For a schedule, and
    what holds of Adam, see `tracin`. by: blocks, whose means are given. rule: see `checkpoint_rates`.

    Errors are over sequences. Cost per checkpoint: two forward and backward passes and a forward-mode pass.

    Raises ValueError for steps that do not ascend or are not as many as the checkpoints.

    Pruthi et al. (2020), arXiv:2002.08484.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 1, bias=False))
    >>> half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> loss = fs.objective(net, [(torch.eye(2), torch.zeros(2, 1))], half_square)
    >>> thetas = [torch.tensor([3.0, 4.0]), torch.tensor([2.0, 2.0])]
    >>> found = tracin_self_influence(loss, thetas, [0, 2], learning_rate=0.1, rule="left")
    >>> found.values.tolist(), float(found.self_share.value)
    ([0.9, 1.6], 1.0)
    """
    check_positive("learning_rate", learning_rate)
    rates, points = shared_rates(learning_rate, steps, rule), list(thetas)
    if len(points) != len(steps):
        raise ValueError(f"`steps` must have one entry per checkpoint, got {len(steps)} and {len(points)} checkpoints.")
    squares, drops, blocks = [], [], list[str]()
    for theta in points:
        flat = Loss.vector(loss, theta)
        norms = gradient_norms(loss, flat, by=by, chunk_size=chunk_size)
        total = grad(lambda t: loss.terms(t)[0].sum())(flat)
        drops.append(jvp(lambda t: loss.terms(t)[0], (flat,), (total,))[1])
        squares.append(norms.values.square())
        blocks = norms.blocks
    per = loss.terms(points[0])[1]
    scale = 1 / (total_weight(loss, points[0]) * per)
    parts = torch.stack(squares).to(per) * scale  # by step, block and sequence
    own = torch.tensordot(rates.to(parts), parts, 1)
    each, there = parts.sum(1), per != 0
    return TracInSelfInfluence(
        own.sum(0).cpu(), *_over(each[:, there]), *_over(own[:, there]),
        (rates.to(parts) @ torch.stack(drops).to(parts) * scale).cpu(), list(steps), learning_rate, blocks,
    )  # fmt: skip


def _over(rows: Float[Tensor, "a n"]) -> tuple[Tensor, Tensor]:
    """Means over sequences, and their errors; nan for one sequence."""
    return rows.mean(1).cpu(), ratio_stderr(rows, torch.ones_like(rows[0])).cpu()
