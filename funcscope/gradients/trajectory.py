"""How gradients turn: between the checkpoints of a run, and along a short descent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, grad_and_value

from ..core.checks import check_count, check_positive
from ..core.estimate import wide
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.standard_errors import jackknife_stderr
from ..core.tables import counted
from ..core.vectors import dot, norm
from ..curvature.gram_errors import LEAST
from ..curvature.leafwise import terms_at
from ..curvature.scored_sequences import dealt

Steps = Float[Tensor, " s"]


class AlignmentTrajectory(Result):
    """Gradients of one loss at the checkpoints of a run: how aligned neighbours are, and the updates that were made."""

    cosine_next: Steps = quantity("cosine with the next checkpoint's gradient", per="step", stderr="cosine_next_stderr")
    cosine_update: Steps = quantity("cosine of -gradient and the update", per="step", stderr="cosine_update_stderr")
    cosine_first: Steps = quantity("cosine with the first gradient", per="step", stderr="cosine_first_stderr")
    cosine_last: Steps = quantity("cosine with the last gradient", per="step", stderr="cosine_last_stderr")
    square: Steps = quantity("squared mean gradient", per="step", stderr="square_stderr")
    steps: list[int]
    num_folds: int
    cosine_next_stderr: Steps = internal()
    cosine_update_stderr: Steps = internal()
    cosine_first_stderr: Steps = internal()
    cosine_last_stderr: Steps = internal()
    square_stderr: Steps = internal()

    @property
    def coords(self) -> dict[str, list[int]]:
        return {"step": self.steps}

    @property
    def head(self) -> str:
        return f"gradients of {counted(len(self.steps), 'checkpoint')}, over {self.num_folds} folds of sequences"

    @property
    def notes(self) -> list[str]:
        notes = ["the last checkpoint has no next one, and no update."]
        resolved = self.square > LEAST * self.square_stderr
        if none := [str(step) for step, there in zip(self.steps, resolved.tolist(), strict=True) if not there]:
            notes.append(f"no cosines where a mean gradient is not told from 0: at step {', '.join(none)}.")
        return notes


def alignment_trajectory(
    loss: Loss, thetas: Iterable[Float[Tensor, " p"]], steps: Sequence[int], *, folds: int = 16
) -> AlignmentTrajectory:
    r"""Cosines of mean gradients between checkpoints, and with the updates that were made between them.

    $$\cos_{kl} = \frac{\langle \mu_k, \mu_l \rangle}{\lVert \mu_k \rVert \lVert \mu_l \rVert}, \qquad
      \cos_k^\Delta = \frac{\langle -\mu_k, \theta_{k+1} - \theta_k \rangle}{\lVert \mu_k \rVert \lVert \theta_{k+1} -
      \theta_k \rVert},$$

    from the gradients of the losses on `folds` folds of the sequences at every checkpoint, each times the fold's share of the
    scored positions, so that their mean is the gradient of the loss: inner products and squared lengths are means over pairs
    of different folds, as gradients of the same sequences share their noise. Errors are jackknifed over
    folds; a squared length that is not two errors above 0 has no cosine. Between far checkpoints, an update is the sum of
    many steps, of an optimiser that may precondition and of other data: the cosine says how much of it the gradient explains.

    loss: of the network that all have. Memory: four times `folds` gradients.

    Raises ValueError for fewer than two checkpoints, or fewer than three different sequences.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(1, 1, bias=False))
    >>> half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> loss = fs.objective(net, [(torch.tensor([[1.0], [1.1], [1.2], [0.9]]), torch.zeros(4, 1))], half_square)
    >>> found = alignment_trajectory(loss, [torch.tensor([x]) for x in (3.0, 2.0, -1.0)], [0, 1, 2])
    >>> found.cosine_next.round(decimals=1).tolist()                          # the minimum lies between the last two
    [1.0, -1.0, nan]
    >>> found.cosine_update.round(decimals=1).tolist()
    [1.0, 1.0, nan]
    """
    check_count("folds", folds, 3)
    points = [loss.vector(theta) for theta in thetas]
    if len(points) < 2 or len(points) != len(steps):
        raise ValueError(
            f"`thetas` must be of two checkpoints or more, with a step each, got {len(points)} and {len(steps)} steps."
        )
    parts = dealt(loss, points[0], folds)
    if len(parts) < 3:
        raise ValueError(f"`loss` must have three different scored sequences, got {len(parts)}: errors are over them.")

    weights = torch.stack([terms_at(part, points[0]).weights.sum() for part in parts])
    shares = weights / weights.mean()

    def gradients(theta: Tensor) -> Float[Tensor, "f p"]:
        """Whose mean is the gradient of the loss, however long the sequences of a fold are."""
        return torch.stack([share * grad(part)(theta) for share, part in zip(shares.tolist(), parts, strict=True)])

    first, last = gradients(points[0]), gradients(points[-1])
    columns: dict[str, list[tuple[Tensor, Tensor]]] = {}
    here = first
    for k, theta in enumerate(points):
        end = k + 1 == len(points)
        after = here if end else (last if k + 2 == len(points) else gradients(points[k + 1]))
        nan = torch.full((), math.nan, dtype=torch.float64)
        made = {
            "cosine_next": (nan, nan) if end else _cosine(here, after, shares),
            "cosine_update": (nan, nan) if end else _cosine_with(here, theta - points[k + 1], shares),
            "cosine_first": _cosine(here, first, shares),
            "cosine_last": _cosine(here, last, shares),
            "square": _jackknifed(_squares(here, shares)),
        }
        for name, pair in made.items():
            columns.setdefault(name, []).append(pair)
        here = after
    values = {name: torch.stack([value for value, _ in each]) for name, each in columns.items()}
    errors = {f"{name}_stderr": torch.stack([error for _, error in each]) for name, each in columns.items()}
    return AlignmentTrajectory(**values, **errors, steps=list(steps), num_folds=len(parts))


def _without(products: Float[Tensor, "f f"], shares: Float[Tensor, " f"]) -> Float[Tensor, " e"]:
    """Means over pairs of different folds: of all, and without each fold, over the mean share of the others."""
    num = len(products)
    off = products - products.diagonal().diag()
    total = off.sum()
    left = (total - off.sum(0) - off.sum(1)) / ((num - 1) * (num - 2))
    return torch.cat([total[None] / (num * (num - 1)), left * ((num - 1) / (num - shares)).square()])


def _products(a: Tensor, b: Tensor) -> Tensor:
    kind = wide(a.device)
    return (a.to(kind) @ b.to(kind).T).cpu().double()


def _squares(a: Tensor, shares: Tensor) -> Float[Tensor, " e"]:
    return _without(_products(a, a), shares)


def _jackknifed(values: Float[Tensor, " e"]) -> tuple[Tensor, Tensor]:
    return values[0], jackknife_stderr(values[1:])


def _resolved(squares: Float[Tensor, " e"]) -> bool:
    value, error = _jackknifed(squares)
    return bool(value > LEAST * error)


def _cosine(a: Float[Tensor, "f p"], b: Float[Tensor, "f p"], shares: Tensor) -> tuple[Tensor, Tensor]:
    squares = _squares(a, shares), _squares(b, shares)
    nan = torch.full((), math.nan, dtype=torch.float64)
    if not all(map(_resolved, squares)):
        return nan, nan
    return _jackknifed(_without(_products(a, b), shares) / (squares[0] * squares[1]).sqrt())


def _cosine_with(a: Float[Tensor, "f p"], vector: Float[Tensor, " p"], shares: Tensor) -> tuple[Tensor, Tensor]:
    """With a vector that has no noise."""
    squares, inner = _squares(a, shares), _products(a, vector[None])[:, 0]
    nan = torch.full((), math.nan, dtype=torch.float64)
    if not _resolved(squares) or not bool(vector.any()):
        return nan, nan
    means = torch.cat([inner.mean()[None], (inner.sum() - inner) / (len(inner) - shares)])
    return _jackknifed(means / (squares.sqrt() * _length(vector)))


class GradientTrajectory(Result):
    """A short descent: the loss along it, and how gradients turn."""

    losses: Steps = quantity("loss", unit="loss", per="step")
    norms: Steps = quantity("length of the gradient", per="step")
    cosine_next: Steps = quantity("cosine with the next gradient", per="step")
    cosine_first: Steps = quantity("cosine with the first gradient", per="step")
    learning_rate: float
    displacement: float = quantity("distance from the start")
    path_length: float = quantity("length of the path")

    @derived("share of the loss that the descent removes")
    def relative_drop(self) -> float:
        return float(1 - self.losses[-1] / self.losses[0])

    @derived("distance over length of the path")
    def straightness(self) -> float:
        """1 for a path without turns."""
        return self.displacement / self.path_length if self.path_length > 0 else math.nan

    @derived("steps after which the loss is higher")
    def num_rises(self) -> int:
        return int((self.losses.diff() > 0).sum())

    @property
    def coords(self) -> dict[str, range]:
        return {"step": range(len(self.losses))}

    @property
    def head(self) -> str:
        return f"a descent of {counted(len(self.losses) - 1, 'step')} of {self.learning_rate:g} gradients"

    @property
    def notes(self) -> list[str]:
        notes = ["a descent on these data, which nothing is drawn for: its numbers have no errors."]
        if self.num_rises:
            notes.append("the loss rises on the way: the learning rate is beyond 2 / the curvature along the path.")
        if not bool(self.losses.isfinite().all()):
            notes.append("the descent diverged: what follows is not finite.")
        return notes


def gradient_trajectory(
    loss: Loss, theta: Theta, *, steps: int = 100, learning_rate: float = 0.01
) -> GradientTrajectory:
    r"""The loss and the turning of gradients along plain descent, $\theta_{t+1} = \theta_t - \eta \nabla L(\theta_t)$.

    Consecutive cosines near 1 are a straight descent, those near -1 a bounce across a valley, at the edge of stability
    $\eta = 2 / \lambda_{\max}$. On a second task, `relative_drop` is how fast the network takes it up from here, a number for
    its plasticity: Lyle et al. (2023), arXiv:2303.01486, measure the loss after a fixed budget of steps. theta stays as it
    is; the documented name of `steps` is `gradient_trajectory_steps`.

    Raises ValueError for steps or a learning rate that are not above 0, and where the loss at theta is not finite.

    Cohen et al. (2021), arXiv:2103.00065, for the edge of stability.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(1, 1, bias=False))
    >>> half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> loss = fs.objective(net, [(torch.ones(1, 1), torch.zeros(1, 1))], half_square)
    >>> gradient_trajectory(loss, torch.tensor([4.0]), steps=2, learning_rate=1.5).norms.tolist()       # times 1 - 1.5
    [4.0, 2.0, 1.0]
    """
    check_count("steps", steps)
    check_positive("learning_rate", learning_rate)
    loss.baseline(theta)
    start = at = loss.vector(theta)
    losses, norms, nexts, firsts = [], [], [], []
    first = before = None
    length = 0.0
    for _ in range(steps + 1):
        gradient, value = grad_and_value(loss)(at)
        first = gradient if first is None else first
        losses.append(float(value))
        norms.append(_length(gradient))
        firsts.append(_plain_cosine(first, gradient))
        if before is not None:
            nexts.append(_plain_cosine(before, gradient))
            length += learning_rate * norms[-2]
        before, last, at = gradient, at, at - learning_rate * gradient
    a, b, c, d = (torch.tensor(each, dtype=torch.float64) for each in (losses, norms, [*nexts, math.nan], firsts))
    return GradientTrajectory(a, b, c, d, float(learning_rate), _length(last - start), length)


def _length(x: Tensor) -> float:
    """In a wider dtype, as squares of what float32 holds may be beyond it."""
    return norm(x.to(wide(x.device)))


def _plain_cosine(a: Tensor, b: Tensor) -> float:
    """nan where a length is 0 or not finite."""
    a, b = a.to(wide(a.device)), b.to(wide(b.device))
    size = norm(a) * norm(b)
    return dot(a, b) / size if 0 < size < math.inf else math.nan
