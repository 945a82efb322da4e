"""m-sharpness: the sharpness of the losses of m sequences each, which is what training with small batches sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..core.checks import check_count
from ..core.estimate import Estimate
from ..core.objective import Loss, Theta, check_point
from ..core.result import Result, derived, quantity
from .sam import SamSharpness, sam_sharpness


class MSharpness(Result):
    """One-step sharpness of every micro-batch of m sequences; made by `m_sharpness`."""

    values: Float[Tensor, " n"] = quantity("sharpness", unit="nats", per="micro-batch")
    """One per micro-batch, float64, nats."""
    losses: Float[Tensor, " n"] = quantity("loss", unit="nats", per="micro-batch")
    gradient_norms: Float[Tensor, " n"] = quantity("gradient norm", per="micro-batch")
    m: int
    epsilon: float
    num_left_out: int
    """Sequences in no micro-batch: the rest of a batch that is shorter than m, and micro-batches without a scored token."""
    num_forwards: float
    """Passes over as many sequences as the loss has, without a derivative; as many gradients."""

    @derived("mean sharpness", unit="nats", name="sharpness")
    def estimate(self) -> Estimate:
        """The mean over micro-batches with its standard error."""
        return Estimate.of(self.values)

    @property
    def head(self) -> str:
        return f"{self.m}-sharpness within {self.epsilon:.4g} of theta"


def m_sharpness(
    loss: Loss,
    theta: Theta,
    *,
    m: int,
    epsilon: float = 0.01,
    adaptive_epsilon: bool = False,
    norm_threshold: float = 1e-6,
) -> MSharpness:
    r"""The mean rise of the loss of m sequences, each m stepping up its own gradient.

    $$\frac1n \sum_{B} \Big[ L_B\big(\theta + \epsilon \tfrac{\nabla L_B}{\|\nabla L_B\|}\big) - L_B(\theta) \Big],
        \qquad |B| = m.$$

    Nats. m = 1 is the sharpness of single sequences; with m the whole data it is `sam_sharpness`. It falls with m, as the
    gradients of few sequences are longer and point apart, so that values of different m are different quantities. Micro-
    batches are cut in the order of the data, within each batch; means are not weighted by tokens. The standard error takes
    micro-batches as independent.

    Raises ValueError where no batch has m sequences, where its tensors cannot be cut by rows, where sequences score another
    loss in their micro-batch than in their batch, and as `sam_sharpness` does, naming the micro-batch.

    Foret, Kleiner, Mobahi, Neyshabur (2021), section 4.1.

    >>> from funcscope.core import criterion, model, objective
    >>> net = model.functional(torch.nn.Linear(1, 1, bias=False))
    >>> square = criterion.custom(lambda out, y: (out - y) ** 2)
    >>> loss = objective.objective(net, [(torch.ones(2, 1), torch.tensor([[1.0], [-3.0]]))], square)
    >>> print(m_sharpness(loss, torch.zeros(1), m=1, epsilon=0.5).estimate)           # 1.5^2 - 1^2 and 3.5^2 - 3^2
    2.25 ± 1 (n = 2)
    """
    check_point(loss, theta)
    cut = micro_batches(loss, m)
    kept = [part for part in cut if _rows(part) == m and not _unscored(part)]
    if not kept:
        raise ValueError(f"no batch has {m} sequences that are scored, so there is no micro-batch: `m` is too large.")
    found = [_of_one(i, part, theta, epsilon, adaptive_epsilon, norm_threshold) for i, part in enumerate(kept)]
    total = sum(map(_rows, cut))
    _check_alone(loss, theta, cut, dict(zip(map(id, kept), found, strict=True)))

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(one, name) for one in found], dtype=torch.float64)

    return MSharpness(
        values=column("absolute"),
        losses=column("loss"),
        gradient_norms=column("gradient_norm"),
        m=m,
        epsilon=found[0].epsilon,
        num_left_out=total - m * len(kept),
        num_forwards=m * len(kept) / total,
    )


def micro_batches(loss: Loss, m: int) -> list[Loss]:
    """The losses of m sequences each, cut from the prepared batches in order; the last of a batch may have fewer.

    Every tensor of a batch has as many rows as the batch has sequences, or one, which serves every part. Raises
    ValueError where that is not so.

    >>> from funcscope.core import criterion, model, objective
    >>> net = model.functional(torch.nn.Linear(3, 2))
    >>> loss = objective.objective(net, [(torch.zeros(5, 3), torch.zeros(5, dtype=torch.long))], criterion.classification)
    >>> [len(part.batches[0][1].index) for part in micro_batches(loss, 2)]
    [2, 2, 1]
    """
    check_count("m", m)
    return [replace(loss, batches=(part,)) for batch in loss.batches for part in _cut(batch, m)]


def _cut(batch: tuple[Any, Any], m: int) -> Iterator[tuple[Any, Any]]:
    rows = _num_rows(batch)
    if odd := sorted(set(_lengths(batch)) - {1, rows}):
        raise ValueError(
            f"micro-batches are cut by rows: all tensors of a batch must have as many, or one; got {odd[0]} and {rows}."
        )

    def part(at: int) -> tuple[Any, Any]:
        return tree_map_only(Tensor, lambda x: x[at : at + m] if x.ndim and len(x) == rows else x, batch)

    return (part(at) for at in range(0, rows, m))


def _of_one(i: int, part: Loss, theta: Theta, epsilon: float, adaptive_epsilon: bool, threshold: float) -> SamSharpness:
    try:
        found = sam_sharpness(
            part, theta, epsilon=epsilon, adaptive_epsilon=adaptive_epsilon, norm_threshold=threshold, curvature=False
        )
    except ValueError as err:
        err.add_note(f"This is micro-batch {i}, of {_rows(part)} sequences.")
        raise
    if len(found.sums) > _rows(part):
        raise ValueError(
            f"a micro-batch of {_rows(part)} rows has {len(found.sums)} losses: its rows are not its sequences."
        )
    return found


def _check_alone(loss: Loss, theta: Theta, cut: list[Loss], found: dict[int, SamSharpness]) -> None:
    """A sequence scores in its micro-batch what it scores in its batch."""
    with torch.no_grad():
        whole = loss.terms(theta)[0].cpu().double()
    first = 0
    for part in cut:
        if id(part) in found and len(whole) == sum(map(_rows, cut)):
            inside, alone = float(whole[first : first + _rows(part)].sum()), float(found[id(part)].sums.sum())
            roundoff, scale = loss.net.unit_roundoff, float(whole[first : first + _rows(part)].abs().sum())
            if abs(alone - inside) > max(32 * roundoff, min(1e-4, 1e8 * roundoff)) * scale:
                raise ValueError(
                    f"sequences {first} to {first + _rows(part) - 1} score {inside:.6g} in their batch and "
                    f"{alone:.6g} as a micro-batch: sequences see each other (statistics over the batch), or a "
                    "tensor that all share has as many rows as the batch by chance and was cut. Use a batch of another size, "
                    "or statistics that do not depend on the batch."
                )
        first += _rows(part)


def _lengths(tree: Any) -> list[int]:
    return [len(x) if x.ndim else 1 for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _num_rows(batch: tuple[Any, Any]) -> int:
    return max(_lengths(batch), default=0)


def _rows(part: Loss) -> int:
    return _num_rows(part.batches[0])


def _unscored(part: Loss) -> bool:
    weight = getattr(part.batches[0][1], "weight", None)
    return isinstance(weight, Tensor) and not bool(weight.any())
