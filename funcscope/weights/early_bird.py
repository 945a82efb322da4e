"""When in training the largest weights are the ones that stay: distances between masks of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count, check_instance, check_number, check_positive
from ..core.layout import Layout
from ..core.objective import Loss
from ..core.result import Result, derived, quantity
from ..core.tables import counted
from .prunable import Prunable, Scope, prunable_leaves, sparse_mask
from .task_vectors import flat_of

_COLUMNS = 2**16
"""Weights whose masks are numbers at a time: float32 counts them exactly."""


class EarlyBird(Result):
    """Normalised Hamming distances between the masks of checkpoints, and when the last few are small."""

    distance: Float[Tensor, "s s"] = quantity(
        "share of weights whose mask differs", per=("step", "other step"), shown=False
    )
    window_distance: Float[Tensor, " s"] = quantity("largest of the last distances", per="step")
    """nan before there are as many as the window."""
    emergence_step: float = quantity("step at which the masks have settled")
    """nan where they have not, and where the rule says nothing."""
    chance_distance: float = quantity("distance of random masks")
    steps: list[int]
    density: float
    window: int
    limit: float
    num_prunable: int
    scope: str

    @derived("distance to the checkpoint before", per="step")
    def successive_distance(self) -> Float[Tensor, " s"]:
        """nan for the first."""
        return torch.cat([self.distance.new_tensor([math.nan]), self.distance.diagonal(-1)])

    @derived("distance to the last checkpoint", per="step")
    def distance_to_last(self) -> Float[Tensor, " s"]:
        return self.distance[-1]

    @derived("distance to the last checkpoint by that of random masks", per="step")
    def relative_distance_to_last(self) -> Float[Tensor, " s"]:
        """0 for the same mask, 1 for one that knows nothing of it, whatever the density."""
        return self.distance[-1] / self.chance_distance if self.chance_distance else self.distance[-1] * math.nan

    @property
    def coords(self) -> dict[str, Sequence[Any]]:
        return {"step": self.steps, "other step": self.steps}

    @property
    def head(self) -> str:
        what = f"{self.density:.3g} of {self.num_prunable:,} weights ({self.scope})"
        return f"masks of {what} at {counted(len(self.steps), 'checkpoint')}: largest of {self.window} distances"

    @property
    def notes(self) -> list[str]:
        made = []
        if self.limit >= self.chance_distance:
            made.append(
                f"Random masks of this density are {self.chance_distance:.3g} apart, below the limit of {self.limit:g}, so "
                "that the rule says nothing: take another density or a smaller limit."
            )
        elif len(self.steps) <= self.window:
            made.append(
                f"A window of {self.window} distances needs {self.window + 1} checkpoints, and there are fewer."
            )
        elif math.isnan(self.emergence_step):
            made.append(
                f"The largest of {self.window} distances does not fall below {self.limit:g}: the masks have not settled."
            )
        return made


def early_bird(
    loss: Loss | Layout,
    thetas: Iterable[Float[Tensor, " p"]],
    steps: Sequence[int],
    *,
    density: float = 0.5,
    window: int = 5,
    limit: float = 0.1,
    scope: Scope = "global",
    prunable: Prunable = "linear",
) -> EarlyBird:
    r"""How far apart the masks of the largest weights are at successive checkpoints, and the step at which they have settled.

    $$d(s, t) = \frac1n \sum_k [m_k(s) \ne m_k(t)], \qquad d_0 = 2 \rho (1 - \rho),$$

    with m the mask of the $\rho n$ largest of n prunable weights and $d_0$ what random masks of that density have
    (proofs/mask_distance.py). The step of emergence is the first at which the largest of the last `window` distances between
    successive checkpoints is below `limit`. At $d_0 \le$ `limit` random masks would pass: with the usual 0.1, at densities
    below 5.3 % and above 94.7 %, where nothing is said. How fast masks change between checkpoints depends on how far apart
    these are: a result is of its steps.

    Nothing is drawn and nothing evaluated; there is no error, as there is one training.

    loss: of the network that all have, or its layout. thetas: parameters by step. density: of what is kept, $\rho$.
    scope and prunable: as `sparse_mask`.

    Documents compare orders instead: Spearman's correlation of argsorted positions, which are no ranks (.02 where that of
    the ranks is .9998), or that of two sorted arrays, which is near 1 whatever they are.

    Raises ValueError for fewer than two checkpoints, steps that do not increase, and thetas of another length, or that are
    not finite.

    You et al. (2020), Drawing early-bird tickets, arXiv:1909.11957.

    >>> layout = Layout.of(torch.nn.Linear(4, 1, bias=False))
    >>> thetas = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 2.0, 3.0, 4.0]), torch.tensor([6.0, 2.0, 3.0, 7.0])]
    >>> made = early_bird(layout, thetas, [0, 10, 20], window=1)
    >>> made.successive_distance.tolist(), made.chance_distance, made.emergence_step
    ([nan, 0.5, 0.0], 0.5, 20.0)
    """
    layout = loss.layout if isinstance(loss, Loss) else loss
    check_instance("loss", layout, Layout, "`fs.objective(...)`, or `net.layout`")
    check_number("density", density, 0.0, 1.0)
    check_count("window", window)
    check_positive("limit", limit)
    each, steps = [magnitude_mask(theta, layout, density, scope, prunable) for theta in thetas], list(map(int, steps))
    if len(each) < 2 or len(each) != len(steps):
        raise ValueError(f"`thetas` must be of two checkpoints or more, got {len(each)}, and {len(steps)} steps.")
    if not all(a < b for a, b in pairwise(steps)):
        raise ValueError(f"`steps` must increase, got {steps}.")
    masks = torch.stack(each)
    both = sum((part.float() @ part.float().T).double().cpu() for part in masks.split(_COLUMNS, dim=1))
    assert isinstance(both, Tensor)
    kept = both.diagonal()
    distance = (kept[:, None] + kept - 2 * both) / masks.shape[1]
    share = float(kept[0]) / masks.shape[1]
    chance = 2 * share * (1 - share)
    moving = _largest_of_last(distance.diagonal(-1), window, len(steps))
    settled = (moving < limit).nonzero()[:, 0]
    at = float(steps[int(settled[0])]) if len(settled) and limit < chance else math.nan
    return EarlyBird(distance, moving, at, chance, steps, share, window, float(limit), masks.shape[1], scope)


def magnitude_mask(theta: Tensor, layout: Layout, density: float, scope: Scope, prunable: Prunable) -> Tensor:
    """Which of the prunable weights alone, in their order, are among the largest."""
    mask = sparse_mask(
        flat_of("thetas", theta, layout).abs(), layout, sparsity=1 - density, scope=scope, prunable=prunable
    )
    return torch.cat([mask[leaf.slice] for leaf in prunable_leaves(layout, prunable)])


def _largest_of_last(successive: Float[Tensor, " t"], window: int, num: int) -> Float[Tensor, " s"]:
    made = torch.full((num,), math.nan, dtype=torch.float64)
    if len(successive) >= window:
        made[window:] = successive.unfold(0, window, 1).amax(1)
    return made
