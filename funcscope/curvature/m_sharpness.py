"""m-sharpness: the sharpness of the losses of m sequences each, which is what training with small batches sees."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.apart import coupled, tolerance
from ..core.estimate import Estimate
from ..core.objective import Loss, Theta, check_point
from ..core.result import Result, derived, quantity
from .ascent_sharpness import SamSharpness, sam_sharpness
from .leafwise import terms_at
from .rows import micro_batches, sizes_of


class MSharpness(Result):
    """One-step sharpness of every micro-batch of m sequences; made by `m_sharpness`."""

    values: Float[Tensor, " n"] = quantity("sharpness", unit="loss", per="micro-batch")
    """One per micro-batch, float64, nats."""
    losses: Float[Tensor, " n"] = quantity("loss", unit="loss", per="micro-batch")
    gradient_norms: Float[Tensor, " n"] = quantity("gradient norm", per="micro-batch")
    m: int
    epsilon: float
    num_left_out: int
    """Sequences in no micro-batch: the rest of a batch that is shorter than m, and micro-batches without a scored token."""
    num_forwards: float
    """Passes over as many sequences as the loss has, without a derivative; as many gradients."""

    @derived("mean sharpness", unit="loss", name="sharpness")
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

    >>> import funcscope as fs
    >>> net, square = fs.functional(torch.nn.Linear(1, 1, bias=False)), fs.custom(lambda out, y: (out - y) ** 2)
    >>> loss = fs.objective(net, [(torch.ones(2, 1), torch.tensor([[1.0], [-3.0]]))], square)
    >>> print(m_sharpness(loss, torch.zeros(1), m=1, epsilon=0.5).estimate)           # 1.5^2 - 1^2 and 3.5^2 - 3^2
    2.25 ± 1 (n = 2)
    """
    check_point(loss, theta)
    parts = micro_batches(loss, m)
    sums, weights = terms_at(loss, theta)
    sizes = sizes_of(parts, len(sums))
    each: list[SamSharpness] = []
    options: Any = {"epsilon": epsilon, "adaptive_epsilon": adaptive_epsilon, "norm_threshold": norm_threshold}
    for i, part in enumerate(parts):
        own = slice(sum(sizes[:i]), sum(sizes[: i + 1]))
        if sizes[i] == m and bool(weights[own].any()):
            try:
                each.append(sam_sharpness(part, theta, **options, curvature=False))
            except ValueError as err:
                err.add_note(f"This is micro-batch {len(each)}, of {m} sequences.")
                raise
            _check_alone(loss, each[-1], sums[own], own)
    if not each:
        raise ValueError(f"no batch has {m} sequences that are scored, so there is no micro-batch: `m` is too large.")

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(one, name) for one in each], dtype=torch.float64)

    return MSharpness(
        values=column("absolute"),
        losses=column("loss"),
        gradient_norms=column("gradient_norm"),
        m=m,
        epsilon=each[0].epsilon,
        num_left_out=sum(sizes) - m * len(each),
        num_forwards=m * len(each) / sum(sizes),
    )


def _check_alone(loss: Loss, alone: SamSharpness, sums: Tensor, own: slice) -> None:
    """A sequence scores in its micro-batch what it scores in its batch."""
    if abs(float(alone.sums.sum() - sums.sum())) > tolerance(loss) * float(sums.abs().sum()):
        raise ValueError(
            f"sequences {own.start} to {own.stop - 1} score {float(sums.sum()):.6g} in their batch and "
            f"{float(alone.sums.sum()):.6g} as a micro-batch: {coupled()}"
        )
