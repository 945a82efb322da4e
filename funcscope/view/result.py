"""One model's stored directional losses: its numbers with their errors, its samples, and the units they are in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from ..core.store import Stored
from .numbers import setting, with_error
from .samples import Mark

Column = Float[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Result:
    """What `DirectionalLosses.asdict` has said of one model, after a round trip through the store."""

    model: dict[str, Any]
    arrays: dict[str, np.ndarray]
    """By their names in the result; what was not asked for is absent."""

    @property
    def name(self) -> str:
        return self.model["name"]

    @property
    def values(self) -> dict[str, Any]:
        """Documented names; undefined numbers are None."""
        return self.model["values"]

    @property
    def num(self) -> int:
        """Directions, those without a finite loss included."""
        return len(self.arrays["losses"])

    @property
    def span(self) -> float:
        """The step h that was taken, in the unit of the coefficient."""
        return float(self.values["actual_span"])

    @property
    def is_relative(self) -> bool:
        """Whether h is a share of the norm of the weights: directions are as long as they are."""
        return not self.values["global_renorm"]

    @property
    def step(self) -> str:
        """How far the weights move, for a sentence."""
        if self.is_relative or self.values["relative_span"]:
            return f"a relative step of {setting(self.values['relative_step'])}"
        return f"a distance of {setting(self.span)}"

    @property
    def unit(self) -> str:
        """Of the coefficient that slopes and curvatures are derivatives by."""
        return "relative step" if self.is_relative else "unit of distance"

    @property
    def side(self) -> str:
        """The name of the end L(theta + h d)."""
        return f"+{setting(self.span)}"

    @property
    def is_exact(self) -> bool:
        """Whether curvatures are second derivatives, not differences."""
        return bool(self.values["num_second_jvps"] or self.values.get("num_matvecs"))

    @cached_property
    def changes(self) -> dict[str, Column]:
        """Loss changes in nats, by the end of the step: +h, and -h where it was asked for."""
        ends = {self.side: "losses", f"−{setting(self.span)}": "losses_negative"}
        base = self.values["baseline_loss"]
        return {side: self.column(name) - base for side, name in ends.items() if name in self.arrays}

    @property
    def mean_changes(self) -> dict[str, Mark]:
        """The mean of each of `changes`, with its interval, from the stored statistics."""
        base = self.values["baseline_loss"]
        names = ("delta_mean", "delta_mean_negative")
        if self.has("losses_negative") and "delta_mean_negative" not in self.values:
            value, stderr = self.of("loss_mean_negative")
            marks = [self._mark("delta_mean", self.changes[self.side])]
            marks.append(mark(value - base, stderr, _count(self.column("losses_negative"))))
            return dict(zip(self.changes, marks, strict=True))
        return {
            side: self._mark(name, values) for name, (side, values) in zip(names, self.changes.items(), strict=False)
        }

    def column(self, name: str) -> Column:
        """Samples of every direction; nan where they are not finite."""
        values = self.arrays[name].astype(np.float64)
        return np.where(np.isfinite(values), values, np.nan)

    def has(self, name: str) -> bool:
        return name in self.arrays

    def of(self, name: str) -> tuple[float, float]:
        """A stored statistic and its standard error, over directions and texts where both are known; nan where undefined."""
        value, stderr = self.values.get(name), self.values.get(f"{name}_stderr")
        total = self.values.get(f"{name}_stderr_total")
        stderr = stderr if total is None else total
        return math.nan if value is None else float(value), math.nan if stderr is None else float(stderr)

    def said(self, name: str) -> str:
        """A stored statistic with its standard error, as text."""
        return with_error(*self.of(name))

    def mean(self, name: str, samples: str) -> Mark:
        """A stored mean with its 95 % interval, `samples` being the array that it is over."""
        return self._mark(name, self.column(samples))

    @property
    def over(self) -> str:
        """What the errors are over."""
        known = self.values.get("delta_mean_stderr_total") is not None
        return "over directions and texts together" if known else "over directions"

    def _mark(self, name: str, values: Column) -> Mark:
        known = self.values.get(f"{name}_stderr_total") is not None
        return mark(*self.of(name), self.values[f"{name}_dof"] + 1 if known else _count(values))


def read(stored: Stored) -> tuple[Result, ...]:
    """The models of a stored result: one, or two of which the arrays are told apart by their first word."""
    models = stored.meta["models"]
    prefixes = ("",) if len(models) == 1 else ("first_", "second_")
    return tuple(
        Result(model, {name.removeprefix(prefix): x for name, x in stored.arrays.items() if name.startswith(prefix)})
        for model, prefix in zip(models, prefixes, strict=True)
    )


def mark(value: float, stderr: float, num: float | int) -> Mark:
    """A mean over `num` directions with its 95 % interval, by Student's t; without one for fewer than two.

    num: one more than the degrees of freedom.

    >>> [round(x, 2) for x in mark(1.0, 0.1, 3)], [round(x, 2) for x in mark(1.0, 0.1, 10**6)]
    ([1.0, 0.57, 1.43], [1.0, 0.8, 1.2])
    """
    half = float(stats.t.ppf(0.975, num - 1)) * stderr if num > 1 else math.nan
    return Mark(value, value - half, value + half)


def is_resolved(found: Mark) -> bool:
    """Whether the interval leaves 0 out."""
    return found.low > 0 or found.high < 0


def short(name: str, most: int = 22) -> str:
    """A name for a figure: its beginning and its end.

    >>> short("llama"), short("llama-finetuned-on-everything-step-1000")
    ('llama', 'llama-fin…ng-step-1000')
    """
    if len(name) <= most:
        return name
    head = most // 2 - 2
    return f"{name[:head]}…{name[head + 1 - most :]}"


def lost(columns: dict[str, Column], what: str) -> str:
    """How many samples are not finite, side by side."""
    found = [(side, int((~np.isfinite(x)).sum()), len(x)) for side, x in columns.items()]
    if not any(few for _, few, _ in found):
        return f"Every {what} is finite."
    many = ", ".join(f"{few} of {num}" + (f" at {side}" if side else "") for side, few, num in found if few)
    return f"Not finite, not drawn and left out of every statistic: {many}."


def _count(values: Column) -> int:
    return int(np.isfinite(values).sum())
