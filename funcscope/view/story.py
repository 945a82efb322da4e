"""What happened in a training run, in sentences over what was measured of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float

from ..core.tables import counted, numbers
from ..families.phases import MEMORISED, phases
from ..study.cache import Outcome
from ..study.results import ModelResults, Results
from .numbers import number
from .page import Table
from .section import entries, said, table

Z95 = 1.96
MAIN = ("directional_losses", "landscape_flatness", "hessian_eigenvalues", "sam_sharpness", "critical_sharpness")
"""Metrics that have a column in the table of all checkpoints."""
MOVES = {
    "mean_loss": ("loss", "the training loss"),
    "directional_losses": ("curvature_mean", "the mean curvature of the training loss along random directions"),
    "landscape_flatness": ("mean_delta_loss", "the mean loss change in a random step of one length"),
    "hessian_eigenvalues": ("max_eigenvalue", "the largest eigenvalue of the Hessian"),
    "sam_sharpness": ("relative", "the rise of the loss in a step up its gradient, divided by the loss,"),
    "critical_sharpness": ("value", "the critical sharpness"),
    "loss_landscape_2d": ("loss_max", "the largest loss on a plane of two random directions"),
}
"""By metric, the number whose way through training is told, and what it is called."""
REMARKS = {
    "directional_losses": " A cross-entropy loses its curvature when the predictions become certain: a fall alone shows no "
    "flatter solution.",
    "hessian_eigenvalues": " The network has ReLU units: kinks, which a step crosses, are not in the Hessian.",
}
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
        own = (o for o in self.results.outcomes if (o.metric, o.group) == ("training_curves", self.run[0].group))
        for result in (outcome.result for outcome in own if outcome.result is not None):
            steps = np.asarray(result.coords["step"], dtype=np.float64)
            return {"step": steps, **{e.name: numbers(e)["value"] for e in result.entries()}}  # type: ignore[index]
        return {}

    @cached_property
    def phases(self) -> tuple[int, int, int]:
        """Steps of the start, of a checkpoint that has memorised, and of the end."""
        return phases(self.steps, self.curves or None)

    def passed(self, split: str) -> int | None:
        """The first step of the curves at which the accuracy on a split is that of knowing it by heart."""
        hit: Bool[np.ndarray, " n"] = self.curves[f"{split}_accuracy"] > MEMORISED
        return int(self.curves["step"][hit][0]) if hit.any() else None

    def outcome(self, metric: str, step: int) -> Outcome | None:
        """With a result."""
        known = self.run[self.steps.index(step)].metrics.outcomes.get(metric)
        return known if known is not None and known.ok else None


def title(story: Story) -> str:
    """What the network did, in a line."""
    if not story.curves:
        return f"{counted(len(story.steps), 'checkpoint')} of a training run"
    first, then = story.passed("train"), story.passed("test")
    if first is None:
        return "Neither memorised nor generalised" if then is None else "Generalised without memorising"
    if then is None:
        return "Memorised, but did not generalise"
    return "Memorised first, generalised later" if then > first else "Learned and generalised together"


def training(story: Story) -> str:
    """When it knew the training data, and when the others."""
    if not story.curves:
        return "The curves of its training are not known."
    parts = []
    for split, name in (("train", "the training data"), ("test", "the test data, which it never sees,")):
        accuracy, step = story.curves[f"{split}_accuracy"], story.passed(split)
        best, last = (number(float(value)) for value in (np.nanmax(accuracy), accuracy[-1]))
        how = f"never passes {MEMORISED:g}: it is {best} at best"
        if step is not None:
            how = f"first passes {MEMORISED:g} at step {step:,}, and is {last} at the end"
        parts.append(f"Its accuracy on {name} {how}.")
    return " ".join(parts)


def sentence(story: Story, metric: str) -> str:
    """What became of a metric's number from memorising to the end; empty where nothing is told of it."""
    if metric == "training_curves" and story.curves:
        train, test = (number(float(story.curves[f"{split}_loss"][-1])) for split in ("train", "test"))
        return f"At the end the train loss is {train} nats and the test loss is {test} nats."
    if metric not in MOVES:
        return ""
    (name, noun), (_, before, last) = MOVES[metric], story.phases
    first, second = (story.outcome(metric, step) for step in (before, last))
    if first is None or second is None:
        return f"Steps {before:,} and {last:,}, the end, do not both have a result: no change is told."
    text = f"From step {before:,} to step {last:,}, the end, {noun} {moved(first, second, name)}."
    return text + REMARKS.get(metric, "")


def moved(first: Outcome, second: Outcome, name: str) -> str:
    """How a number went from one model to another, with both errors; which way only where they resolve it."""
    known = [said(one, units=True) for one in (first, second)]
    more = [f" (residual {each[RESIDUALS[name]]})" if name in RESIDUALS else "" for each in known]
    texts = [each.get(name, "undefined") + residual for each, residual in zip(known, more, strict=True)]
    (a, a_error), (b, b_error) = (_value(one, name) for one in (first, second))
    if math.isnan(a) or math.isnan(b) or abs(b - a) <= Z95 * math.hypot(a_error, b_error):
        return f"is {texts[0]} and {texts[1]}: the change is not resolved"
    return f"{'falls' if b < a else 'rises'} from {texts[0]} to {texts[1]}"


def checkpoints(story: Story) -> Table:
    """A row for every checkpoint: losses and accuracies of the curves, and the main numbers with their errors."""
    run = {model.name for model in story.run}
    main = (o for o in story.results.outcomes if o.subject in run and o.metric in MAIN)
    measured = table(Results(tuple(main)), rows=True)
    known = {row[0]: row[1:] for row in measured.rows}
    places = {int(step): i for i, step in enumerate(story.curves.get("step", ()))}
    curves = {name: values for name, values in story.curves.items() if name != "step"}
    rows = []
    for step in story.steps:
        losses = [number(float(each[places[step]])) if step in places else "" for each in curves.values()]
        blank = [""] * len(measured.headers[1:])
        rows.append([f"step {step:,}", *losses, *known.get(f"step {step:,}", blank)])
    return Table(["checkpoint", *(name.replace("_", " ") for name in curves), *measured.headers[1:]], rows)


def _value(outcome: Outcome, name: str) -> tuple[float, float]:
    """A number and its error, or its residual, or 0 where none is known; nan for one that is not resolved."""
    entry = entries(outcome).get(name)
    if entry is None or outcome.result is None or name in outcome.result.unresolved:
        return math.nan, math.nan
    values = numbers(entry)
    assert values is not None
    error = float(values.get("stderr_total", values.get("stderr", math.nan)))
    error = _value(outcome, RESIDUALS[name])[0] if name in RESIDUALS else error
    return float(values["value"]), 0.0 if math.isnan(error) else error
