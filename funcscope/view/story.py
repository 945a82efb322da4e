"""What happened in a training run, in sentences over what was measured of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float

from ..core.tables import Entry, numbers
from ..families.phases import MEMORISED, phases
from ..study.cache import Outcome
from ..study.results import ModelResults, Results
from .numbers import number
from .page import Table
from .section import table, told

Z95 = 1.96
MAIN = ("directional_losses", "landscape_flatness", "hessian_eigenvalues", "sam_sharpness", "critical_sharpness")
"""Metrics that have a column in the table of all checkpoints."""
MOVES = {
    "mean_loss": ("loss", "the training loss", ""),
    "directional_losses": (
        "curvature_mean",
        "the mean curvature of the training loss along random directions",
        "A cross-entropy loses its curvature when the predictions become certain: a fall of the curvature alone does not show "
        "a flatter solution.",
    ),
    "landscape_flatness": (
        "mean_delta_loss",
        "the mean loss change in a random step",
        "The step has one length while the norm of the weights changes.",
    ),
    "hessian_eigenvalues": (
        "max_eigenvalue",
        "the largest eigenvalue of the Hessian",
        "The network has ReLU units: this is the Hessian of its linear pieces, and the kinks between them, which a finite step "
        "crosses, are not in it.",
    ),
    "sam_sharpness": ("relative", "the rise of the loss in a step up its gradient, divided by the loss,", ""),
    "critical_sharpness": ("value", "the critical sharpness", ""),
    "loss_landscape_2d": (
        "loss_max",
        "the largest loss on a plane of two random directions",
        "The draws are the same at every step and scaled to its own weights.",
    ),
}
"""By metric, the number whose way through training is told, what it is called, and what must be said beside it."""
RESIDUALS = {"max_eigenvalue": "max_residual"}


@dataclass(frozen=True, eq=False)
class Story:
    """The first training run of a study. Raises ValueError where there is none."""

    results: Results

    @cached_property
    def run(self) -> list[ModelResults]:
        """Its checkpoints in the order of their steps."""
        runs = [each for each in self.results.groups.values() if each[0].step is not None]
        if not runs:
            raise ValueError("there is no training run in this study: a story is about checkpoints with steps.")
        return runs[0]

    @property
    def steps(self) -> list[int]:
        return [model.step or 0 for model in self.run]

    @cached_property
    def curves(self) -> dict[str, Float[np.ndarray, " n"]]:
        """Losses and accuracies over training; empty where they were not measured."""
        of_group = (o for o in self.results.outcomes if o.metric == "training_curves" and o.group == self.run[0].group)
        result = next((outcome.result for outcome in of_group if outcome.result is not None), None)
        if result is None:
            return {}
        known = {entry.name: numbers(entry) for entry in result.entries()}
        values = {name: each["value"] for name, each in known.items() if each is not None}
        return {"step": np.asarray(result.coords["step"], dtype=np.float64), **values}

    @cached_property
    def phases(self) -> tuple[int, int, int]:
        """Steps of the start, of a checkpoint that has memorised, and of the end."""
        return phases(self.steps, self.curves or None)

    @cached_property
    def memorised(self) -> int | None:
        """The first step of the curves at which the training accuracy is that of memorising."""
        return self._first(self.curves["train_accuracy"] > MEMORISED) if self.curves else None

    @cached_property
    def generalised(self) -> int | None:
        """The first at which the test accuracy is."""
        return self._first(self.curves["test_accuracy"] > MEMORISED) if self.curves else None

    def outcome(self, metric: str, step: int) -> Outcome | None:
        """With a result."""
        known = self.run[self.steps.index(step)].metrics.outcomes.get(metric)
        return known if known is not None and known.ok else None

    def _first(self, hit: Bool[np.ndarray, " n"]) -> int | None:
        return int(self.curves["step"][hit][0]) if hit.any() else None


def title(story: Story) -> str:
    """What the network did, in a line."""
    first, then = story.memorised, story.generalised
    if not story.curves:
        return f"{len(story.steps)} checkpoints of a training run"
    if first is None:
        return "Neither memorised nor generalised" if then is None else "Generalised without memorising"
    if then is None:
        return "Memorised, but did not generalise"
    return "Memorised first, generalised later" if then > first else "Learned and generalised together"


def training(story: Story) -> str:
    """When it knew the training data, and when the others."""
    if not story.curves:
        return "The curves of its training are not known."
    best = {name: number(float(np.nanmax(story.curves[f"{name}_accuracy"]))) for name in ("train", "test")}
    end = {name: number(float(values[-1])) for name, values in story.curves.items()}
    first, then = story.memorised, story.generalised
    text = (
        f"Its accuracy on the training data first passes {MEMORISED:g} at step {first:,}."
        if first is not None
        else f"Its accuracy on the training data never passes {MEMORISED:g}: it is {best['train']} at best."
    )
    if then is None:
        return f"{text} On the test data, which it never sees, it is {best['test']} at best."
    later = f", {then - first:,} steps later" if first is not None and then > first else ""
    return f"{text} On the test data, which it never sees, it does so at step {then:,}{later}; at the end it is {end['test_accuracy']}."


def sentence(story: Story, metric: str) -> str:
    """What became of a metric's number from memorising to the end; empty where nothing is told of it."""
    if metric == "training_curves":
        return training(story)
    if metric not in MOVES:
        return ""
    name, noun, remark = MOVES[metric]
    _, before, last = story.phases
    ends = [story.outcome(metric, step) for step in (before, last)]
    if any(end is None for end in ends):
        lost = " and ".join(f"step {step:,}" for end, step in zip(ends, (before, last), strict=True) if end is None)
        return f"There is no result at {lost}, so that nothing is said of {noun.rstrip(',')}. {remark}".strip()
    return f"From step {before:,} to step {last:,}, the end, {noun} {moved(*ends, name)}. {remark}".strip()  # type: ignore[arg-type]


def moved(first: Outcome, second: Outcome, name: str) -> str:
    """How a number went from one model to another, with both errors; which way only where they resolve it."""
    texts = [told(one, name) + _residual(one, name) for one in (first, second)]
    (a, a_error), (b, b_error) = (_value(one, name) for one in (first, second))
    if math.isnan(a) or math.isnan(b) or abs(b - a) <= Z95 * math.hypot(a_error, b_error):
        return f"is {texts[0]} and {texts[1]}: the change is not resolved"
    return f"{'falls' if b < a else 'rises'} from {texts[0]} to {texts[1]}"


def checkpoints(story: Story) -> Table:
    """A row for every checkpoint: losses and accuracies of the curves, and the main numbers with their errors."""
    run = {model.name for model in story.run}
    own = Results(tuple(o for o in story.results.outcomes if o.subject in run))
    measured = table(own, [name for name in MAIN if any(o.metric == name for o in own.outcomes)])
    places = {int(step): i for i, step in enumerate(story.curves.get("step", ()))}
    names = [name for name in story.curves if name != "step"]
    heads, *rest = measured.headers
    rows = [
        [
            str(row[0]),
            *(number(float(story.curves[name][places[step]])) if step in places else "" for name in names),
            *row[1:],
        ]
        for step, row in zip(story.steps, measured.rows, strict=True)
    ]
    return Table([heads, *(name.replace("_", " ") for name in names), *rest], rows)


def _value(outcome: Outcome, name: str) -> tuple[float, float]:
    """A number and its error, or its residual; nan for one that is not resolved, 0 where no error is known."""
    assert outcome.result is not None
    entries: dict[str, Entry] = {entry.name: entry for entry in outcome.result.entries()}
    if name not in entries or name in outcome.result.unresolved:
        return math.nan, math.nan
    values = numbers(entries[name]) or {"value": math.nan}
    error = float(values.get("stderr_total", values.get("stderr", math.nan)))
    if name in RESIDUALS:
        error = _value(outcome, RESIDUALS[name])[0]
    return float(values["value"]), 0.0 if math.isnan(error) else error


def _residual(outcome: Outcome, name: str) -> str:
    return f" (residual {told(outcome, RESIDUALS[name])})" if name in RESIDUALS else ""
