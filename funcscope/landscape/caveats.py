"""What a reader of directional losses should know and would not see in the table, said from the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..core.estimate import Estimate, interval
from ..core.statistics import largest_share, signs
from .truncation import Truncation

LOW_CORRELATION = 0.3
"""Below this the result carries a note on why slopes do not predict loss changes."""
FEW_UNMOVED, MOST_UNMOVED = 0.01, 0.5
"""Shares of the weights that stay where they are: above the first it is said, above the second no step is resolved."""
FEW_SEQUENCES = 50
"""Below this, intervals over sequences lean on how skewed the data are."""


_SIMPLE: dict[str, tuple[Callable[..., bool], str]] = {
    "nonfinite": (
        lambda positive, negative, **_: positive + negative > 0,
        "non-finite losses: {positive} at +{step}, {negative} at -{step}",
    ),
    "half precision": (
        lambda moved, **_: moved is not None,
        "half precision: asked to move by {intended:.4g}, moves by {moved.displacement:.4g} "
        "(error {moved.error:.1%} of the step, {moved.unmoved:.1%} of the weights do not move)",
    ),
    "partly moved": (
        lambda share: FEW_UNMOVED < share <= MOST_UNMOVED,
        "{share:.0%} of the weights do not move at all at this step, which is below the resolution of their dtype.",
    ),
    "large step": (
        lambda relative: relative > 1,
        "relative step {relative:.3g}: the weights move by more than their own length. These are losses of other "
        "networks, and no neighbourhood of this one.",
    ),
    "signs": (
        lambda few, **_: few > 0,
        "rounding may decide the sign of {few} of {num} curvatures: it moves each by about {floor:.2g}. Take a larger "
        "span, or {remedy}.",
    ),
    "no data error": (
        lambda names: names != "",
        "no error over sequences, as their own terms are not known along every direction; intervals are about these data "
        "alone: {names}",
    ),
}
"""What is said, and when, from the values that are named."""


def note(name: str, **values: Any) -> str | None:
    """The text of that name; None where it does not apply."""
    applies, text = _SIMPLE[name]
    return text.format(**values) if applies(**values) else None


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


def curvature_and_step(truncation: Truncation, mean: Estimate, step: float) -> str | None:
    """What shorter steps say of a mean of second differences; None where the step does not matter."""
    if truncation.status == "rough":
        moved = truncation.settling
        return (
            f"the curvature is not resolved: along {len(truncation.whole)} directions, halving the step {step:.3g} once more "
            f"moves the second differences {moved:.2g} times as far as halving it once (a smooth loss: a quarter). The loss "
            "jumps or has kinks at this scale (routing, sampling, ReLU), and the value depends on the step. "
            "`curvature='exact'` is the derivative of the smooth pieces and has no jumps in it."
        )
    if not truncation.dominates(mean, _total(mean)):
        return None
    bias = truncation.bias
    return (
        f"the step, not the sampling, decides the mean curvature: at {step:.3g} it is off by about {float(bias.value):.2g} ± "
        f"{float(bias.stderr):.1g} (from half the step along {bias.num} directions). Take a smaller span, or "
        "`curvature='exact'`, which takes no step."
    )


def few_sequences(num: int) -> str | None:
    """That an interval over few sequences may cover less than it says."""
    if not 1 < num < FEW_SEQUENCES:
        return None
    return (
        f"{num} sequences: errors over sequences assume that {num} of them show how they scatter. Where a few carry most of "
        f"the loss, 95 % intervals cover less (about {'80' if num < 15 else '90'} % for lognormal losses)."
    )


def unresolved(what: str, mean: Estimate, samples: Float[Tensor, " n"]) -> str | None:
    """What signs and tails say where the t interval of a mean holds 0; None where it does not, or there is no interval."""
    low, high = interval(mean)
    if not low <= 0 <= high or len(samples) < 2 or not samples.any():
        return None
    above, below, p = signs(samples)
    text = (
        f"mean {what}: its 95 % interval by Student's t holds 0 ({low:.3g} to {high:.3g}). It is positive along {above} and "
        f"negative along {below} of {len(samples)} directions (sign test over directions, p = {p:.2g})."
    )
    share = largest_share(samples)
    heavy = len(samples) > 2 and share > 0.5
    return f"{text} One direction makes {share:.0%} of the sum: the interval does not hold." if heavy else text


def _total(mean: Estimate) -> float:
    low, high = interval(mean, 0.6827)
    return (high - low) / 2


def unresolved_step(share: float, change: Estimate, rounding: float) -> str | None:
    """Why the change of the loss at a step is not resolved, with what to do; None where it is."""
    remedy = "take a larger step, or compute in float64 (`functional(model, dtype=torch.float64)`)"
    if share > MOST_UNMOVED:
        return f"the step is not resolved: {share:.0%} of the weights do not move at all in their dtype; {remedy}."
    value, error = abs(float(change.value)), float(change.stderr)
    if not value <= rounding or error > rounding:
        return None
    return (
        f"the change of the loss is not resolved: a mean of {float(change.value):.2g} is no more than rounding of the loss "
        f"in its dtype ({rounding:.1g}) makes; {remedy}."
    )
