"""What a finite step does to second differences: from the same differences at a half and a quarter of the step."""

from __future__ import annotations

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from ..core.estimate import Estimate
from ..core.result import Result, derived, quantity

STEPS = (1 / 2, -1 / 2, 1 / 4, -1 / 4)
"""Shares of the step at which the first directions are evaluated, too."""
MOST = 16


def num_refined(num: int) -> int:
    """How many of `num` directions are evaluated at shorter steps: a tenth, 3 at the least."""
    return min(num, max(3, num // 10), MOST)


class Truncation(Result):
    r"""Second differences c of a few directions at the steps h, h/2 and h/4.

    Where the loss has four derivatives, $c(h) = L'' + a h^2 + O(h^4)$: halving the step moves c by 3/4 of its error, halving
    it again by a quarter of that. Where it jumps or has kinks (routing, ReLU), differences grow as the step shrinks.
    Richardson (1911), doi:10.1098/rsta.1911.0009.

    >>> import torch
    >>> two = torch.tensor([2.0, 2.0])
    >>> smooth = Truncation(two + 1.6, two + 0.4, two + 0.1, noise=0.0)          # 2 + 1.6 (h / h_0)^2
    >>> print(smooth.bias, smooth.status)
    1.6 ± 0 (n = 2) smooth
    >>> Truncation(two, 4 * two, 16 * two, noise=0.0).status                     # a jump, over h^2
    'rough'
    """

    whole: Float[Tensor, " m"] = quantity("second difference at h", per="direction")
    half: Float[Tensor, " m"] = quantity("second difference at h/2", per="direction")
    quarter: Float[Tensor, " m"] = quantity("second difference at h/4", per="direction")
    noise: float = quantity("what rounding may do at h")
    """What rounding may do to a difference at h; four times as much at h/2, sixteen times at h/4."""

    @derived("what the step adds to the mean")
    def bias(self) -> Estimate:
        r"""$\tfrac43 (c(h) - c(h/2))$: by how much the step makes the mean too large, with its error over directions."""
        return Estimate.of(4 / 3 * (self.whole - self.half))

    @derived("second halving over the first")
    def settling(self) -> float:
        """Root mean square of c(h/2) - c(h/4) over that of c(h) - c(h/2): 1/4 for a smooth loss and a small step."""
        first = _rms(self.whole - self.half)
        return _rms(self.half - self.quarter) / first if first else math.nan

    @derived("status")
    def status(self) -> Literal["smooth", "rough", "rounding", "undefined"]:
        """`rough`: halving the step again moves the differences by more, not by less, and not because of rounding.

        `rounding`: the second halving moves them by no more than rounding may. `undefined`: no direction is finite at all.
        """
        if not len(self.whole):
            return "undefined"
        if _rms(self.half - self.quarter) <= 16 * self.noise or not self.noise < math.inf:
            return "rounding"
        return "rough" if self.settling > 1 else "smooth"

    def dominates(self, estimate: Estimate, stderr: float) -> bool:
        """Whether the bias is larger than rounding and its own error, and larger than the error of the mean."""
        value, error = abs(float(self.bias.value)), float(self.bias.stderr)
        seen = value > max(4 / 3 * 5 * self.noise, error if math.isfinite(error) else 0.0)
        return seen and value > max(stderr if math.isfinite(stderr) else 0.0, 1e-3 * abs(float(estimate.value)))


def central_second_difference(
    positive: Float[Tensor, " n"], negative: Float[Tensor, " n"], centre: float, step: float
) -> Float[Tensor, " n"]:
    r"""$(L^+ + L^- - 2 L_0) / h^2$, the second derivative up to $h^2 L^{(4)} / 12$; float64.

    Truncation, rounding and the best step: proofs/central_difference.py.

    >>> import torch
    >>> central_second_difference(torch.tensor([4.0]), torch.tensor([0.0]), 1.0, 1.0)       # (1 + a)^2
    tensor([2.], dtype=torch.float64)
    """
    return (positive.double() + negative.double() - 2 * centre) / step**2


def rounding_bound(level: float, step: float, unit_roundoff: float) -> float:
    r"""The most that relative errors of `unit_roundoff` in three losses of size `level` do to the second difference.

    $4 u |L| / h^2$. A float32 network rounds at every layer, so that its losses may be off by a few u more; averaging
    over tokens works the other way. Take it as the order of magnitude. proofs/central_difference.py.

    >>> rounding_bound(2.0, 0.5, 2.0**-24) == 8 * 2.0**-24 / 0.25
    True
    """
    return 4 * unit_roundoff * abs(level) / step**2


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
