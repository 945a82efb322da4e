"""What a reader of directional losses should know and would not see in the table, said from the numbers."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from .precision import Realised

LOW_CORRELATION = 0.3
"""Below this the result carries a note on why slopes do not predict loss changes."""


def low_correlation(corr: float, deltas: Float[Tensor, " n"], slopes: Float[Tensor, " n"], span: float) -> str | None:
    """Why the slopes do not predict the loss changes; None where they do."""
    if corr >= LOW_CORRELATION:
        return None
    both = slopes.isfinite() & deltas.isfinite()
    num = int(both.sum())
    lost = len(both) - num
    if num < 3:
        return f"gradient-delta correlation undefined: directions with a finite slope and loss: {num}, without: {lost}."
    if math.isnan(corr):
        return "gradient-delta correlation undefined: over directions, the slope or the loss change does not vary."
    reasons = _reasons(corr, deltas[both], slopes[both], span)
    if lost:
        reasons.append(f"{lost} of {len(both)} directions have no finite loss or slope.")
    reasons = reasons or ["the loss change is not linear in the slope at this span."]
    return f"low gradient-delta correlation {corr:.2f}: " + " ".join(reasons)


def _reasons(corr: float, deltas: Float[Tensor, " n"], slopes: Float[Tensor, " n"], span: float) -> list[str]:
    first = span * slopes
    linear, other = float(first.std()), float((deltas - first).std())
    reasons = []
    if other > linear:
        reasons.append(
            f"over directions, the linear part of the loss change has sd {linear:.2g}, what curvature and higher orders add "
            f"{other:.2g}: at this span the slope is not what moves the loss. In a quadratic region "
            f"a span below {span * linear / other:.2g} makes the linear part the larger one."
        )
    noise = 1 / math.sqrt(len(deltas) - 1)
    if abs(corr) < 2 * noise:
        reasons.append(
            f"{len(deltas)} directions leave a chance scatter of ±{noise:.2f} in the correlation: take more."
        )
    return reasons


def undecided_signs(few: int, num: int, floor: float, *, half: bool) -> str:
    """That rounding may decide signs of curvatures, and what to do."""
    remedy = "compute in float32 (`functional(model, dtype=torch.float32)`)" if half else "pass `curvature='exact'`"
    return (
        f"rounding may decide the sign of {few} of {num} curvatures: it moves each by about {floor:.2g}. Take a larger "
        f"span, or {remedy}."
    )


def half_precision(displacement: float, realised: Realised) -> str:
    """What half precision makes of the step."""
    return (
        f"half precision: asked to move by {displacement:.4g}, moves by {realised.displacement:.4g} "
        f"(error {realised.error:.1%} of the step, {realised.unmoved:.1%} of the weights do not move)"
    )
