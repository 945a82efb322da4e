"""What happened in a stored demonstration, as numbers and sentences that are computed from the stored arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ..core.store import Stored
from .numbers import number, with_error

GENERAL = 0.99
"""Test accuracy above which the network counts as generalising."""
SAM_STEP = 0.01
"""Length of the step of SAM's sharpness, as `study.analyzers.curvature` takes it."""


@dataclass(frozen=True, eq=False)
class Story:
    """The stored result of `study.demo.run`, and the phases of its training."""

    stored: Stored

    @property
    def settings(self) -> dict[str, Any]:
        return self.stored.meta["settings"]

    @property
    def config(self) -> dict[str, Any]:
        return self.settings["config"]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per checkpoint; undefined values are None."""
        return self.stored.meta["table"]

    @property
    def num_pairs(self) -> tuple[int, int]:
        """Pairs to train on, and all pairs."""
        total = self.config["p"] ** 2
        return round(self.config["train_fraction"] * total), total

    def array(self, name: str) -> np.ndarray:
        return self.stored.arrays[name]

    def column(self, name: str) -> Float[np.ndarray, " k"]:
        """A number per checkpoint, nan where it is undefined."""
        return np.array([math.nan if row[name] is None else row[name] for row in self.rows], dtype=np.float64)

    def deltas(self, name: str) -> Float[np.ndarray, "k n"]:
        """Change of the loss (nats) at one end of the span, per checkpoint and direction."""
        return self.array(name) - self.column("baseline_loss")[:, None]

    @cached_property
    def memorised(self) -> int | None:
        """The first step on the curves at which every training pair is right."""
        return self._first(self.array("curve_train_accuracy") >= 1)

    @cached_property
    def generalised(self) -> int | None:
        """The first step on the curves at which the test accuracy is above 0.99."""
        return self._first(self.array("curve_test_accuracy") > GENERAL)

    @cached_property
    def reference(self) -> int | None:
        """The first checkpoint, by index, that has memorised; None where there is none before the last."""
        if self.memorised is None:
            return None
        later = [i for i, row in enumerate(self.rows[:-1]) if row["step"] >= self.memorised]
        return later[0] if later else None

    @property
    def marks(self) -> tuple[tuple[int, str], ...]:
        """The phases, for the axis of steps."""
        found = ((self.memorised, "memorised"), (self.generalised, "generalised"))
        return tuple((step, name) for step, name in found if step is not None)

    def _first(self, hit: Bool[np.ndarray, " n"]) -> int | None:
        return int(self.array("curve_step")[hit][0]) if hit.any() else None


def title(story: Story) -> str:
    """What the network did, in a line."""
    if story.memorised is None:
        return "Neither memorised nor generalised" if story.generalised is None else "Generalised without memorising"
    if story.generalised is None:
        return "Memorised, but did not generalise"
    return (
        "Memorised first, generalised later"
        if story.generalised > story.memorised
        else "Learned and generalised together"
    )


def lede(story: Story) -> list[str]:
    """The run in a few sentences, then what became of the curvature."""
    train, total = story.num_pairs
    return [
        f"A one-layer transformer learns (a + b) mod {story.config['p']} from {train:,} of the {total:,} pairs. "
        f"{_memorising(story)} {_generalising(story)}",
        curvature_change(story),
    ]


def no_generalisation(story: Story) -> str:
    return f"did not generalise within {story.config['steps']:,} steps"


def _memorising(story: Story) -> str:
    if story.memorised is None:
        best = float(np.nanmax(story.array("curve_train_accuracy")))
        return f"It never had all of them right: its best train accuracy is {best:.3f}."
    return f"At step {story.memorised:,} it has every one of them right."


def _generalising(story: Story) -> str:
    accuracy = story.array("curve_test_accuracy")
    if story.generalised is None:
        return (
            f"It {no_generalisation(story)}: on the other pairs its best accuracy is {float(np.nanmax(accuracy)):.3f}."
        )
    text = (
        f"On the other pairs, which it never sees, its accuracy first passes {GENERAL:g} at step {story.generalised:,}"
    )
    if story.memorised is not None and story.generalised > story.memorised:
        text += f", {story.generalised - story.memorised:,} steps later"
    return f"{text}; at the end it is {accuracy[-1]:.3f}."


def curvature_ratio(story: Story) -> tuple[float, float]:
    """Mean curvature at the first memorised checkpoint over that at the end, with its standard error.

    The directions are the same draws at both, so that the error is that of pairs: sd(x - r y) / (sqrt(n) mean(y)).
    nan where no checkpoint before the last has memorised, or a mean is not positive.
    """
    if story.reference is None:
        return math.nan, math.nan
    before, after = story.array("curvatures")[story.reference], story.array("curvatures")[-1]
    both = np.isfinite(before) & np.isfinite(after)
    x, y = before[both], after[both]
    if len(x) < 2 or x.mean() <= 0 or y.mean() <= 0:
        return math.nan, math.nan
    times = x.mean() / y.mean()
    return float(times), float((x - times * y).std(ddof=1) / math.sqrt(len(x)) / y.mean())


def curvature_change(story: Story) -> str:
    """The curvature at the first memorised checkpoint and at the end, alone and divided by the loss."""
    times, _ = curvature_ratio(story)
    if story.reference is None or math.isnan(times):
        return (
            f"At the end the mean curvature of the training loss is {curvature_at(story, -1)} nats per relative step²."
        )
    before, after = (f"step {story.rows[i]['step']:,}" for i in (story.reference, -1))
    value, stderr = per_nat(story)
    start, end = (with_error(value[i], stderr[i]) for i in (story.reference, -1))
    return (
        f"From {before}, the first checkpoint that has memorised, to {after} the mean curvature of the training loss "
        f"{'falls' if times > 1 else 'rises'} from {curvature_at(story, story.reference)} to {curvature_at(story, -1)} "
        f"nats per relative step². Divided by the loss it goes from {start} to {end}{_way(story)}."
    )


def sharpness_change(story: Story) -> str:
    """Hessian and sharpness at the first memorised checkpoint (or the first of all) and at the end, alone and per loss."""
    first = story.reference or 0
    top, trace, loss = (story.column(name) for name in ("hessian_max_eigenvalue", "hessian_trace", "baseline_loss"))
    traces = [with_error(trace[i], story.column("hessian_trace_stderr")[i]) for i in (first, -1)]
    rises = [_rise(story.rows[i]) for i in (first, -1)]
    per = ratio(top, loss)
    return (
        f"From step {story.rows[first]['step']:,} to step {story.rows[-1]['step']:,} the largest eigenvalue of the Hessian "
        f"{_moves(top[first], top[-1])} from {number(top[first])} to {number(top[-1])} nats per unit of distance², and its "
        f"trace {_moves(trace[first], trace[-1])} from {traces[0]} to {traces[1]}. Divided by the loss the eigenvalue "
        f"{_moves(per[first], per[-1])} from {number(per[first])} to {number(per[-1])}; a step of {SAM_STEP:g} up the "
        f"gradient raises the loss by {rises[0]} of itself at first and by {rises[1]} at the end."
    )


def curvature_at(story: Story, index: int) -> str:
    row = story.rows[index]
    return with_error(row["curvature_mean"], row["curvature_mean_stderr"])


def curvature_peak(story: Story) -> str:
    """The checkpoint with the largest mean curvature."""
    if (peak := largest(story.column("curvature_mean"))) is None:
        return "The mean curvature is undefined at every checkpoint."
    return (
        f"The mean curvature is largest at step {story.rows[peak]['step']:,}, {curvature_at(story, peak)} nats per "
        f"relative step². At the end it is {curvature_at(story, -1)}."
    )


def curvature_and_loss(story: Story) -> str:
    """Why the curvature is also shown next to the loss that it goes to zero with."""
    text = (
        "A cross-entropy loses its curvature when the predictions become certain, so a fall of the curvature alone "
        "does not show a flatter solution. The second figure divides it by the training loss"
    )
    if story.reference is None:
        return f"{text}."
    before, after = story.rows[story.reference], story.rows[-1]
    return (
        f"{text}, which goes from {number(before['train_loss'])} nats at step {before['step']:,} to "
        f"{number(after['train_loss'])} nats at step {after['step']:,}."
    )


def per_nat(story: Story) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Mean curvature over training loss per checkpoint, and its standard error."""
    loss = story.column("baseline_loss")
    return ratio(story.column("curvature_mean"), loss), ratio(story.column("curvature_mean_stderr"), loss)


def ratio(above: Float[np.ndarray, " k"], below: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """above / below, undefined (nan) where below is 0."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


def largest(values: Float[np.ndarray, " n"]) -> int | None:
    """The index of the largest value that is not nan; None where there is none."""
    return None if np.isnan(values).all() else int(np.nanargmax(values))


def _rise(row: dict[str, Any]) -> str:
    """A relative sharpness; without one where there is no gradient to climb."""
    if row["sam_relative"] is None:
        return "an undefined share"
    stderr = row["sam_relative_stderr"]
    return f"{with_error(100 * row['sam_relative'], None if stderr is None else 100 * stderr)} %"


def _moves(before: float, after: float) -> str:
    return "falls" if after < before else "rises" if after > before else "goes"


def _way(story: Story) -> str:
    """Where the curvature per nat is largest, if it is larger there than at both ends by more than chance."""
    value, stderr = (column[story.reference :] for column in per_nat(story))
    peak = largest(value)
    if peak is None or any(value[peak] - value[i] <= 1.96 * math.hypot(stderr[peak], stderr[i]) for i in (0, -1)):
        return ""
    step = story.rows[(story.reference or 0) + peak]["step"]
    return f", by way of {with_error(value[peak], stderr[peak])} at step {step:,}"
