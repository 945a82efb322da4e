"""A stored comparison of two models: differences by their documented names, and the samples they are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .numbers import number, with_error
from .result import Result, short
from .samples import Mark


@dataclass(frozen=True, eq=False)
class Comparison:
    """The stored comparison by its documented names, with the samples it is made of; undefined numbers are nan."""

    first: Result
    second: Result
    values: dict[str, Any]

    @property
    def results(self) -> tuple[Result, Result]:
        return self.first, self.second

    @property
    def names(self) -> tuple[str, str]:
        return self.first.name, self.second.name

    @property
    def statistics(self) -> list[str]:
        return [name.removesuffix("_difference") for name in self.values if name.endswith("_difference")]

    @property
    def headline(self) -> str:
        """The mean change of both sides where it is there: its expectation is that of one side, its error smaller."""
        return next(name for name in ("delta_two_sided_mean", "delta_mean") if name in self.statistics)

    @property
    def level(self) -> str:
        return f"{100 * self.values['level']:g} % interval"

    def of(self, name: str) -> float:
        value = self.values.get(name)
        return math.nan if value is None else float(value)

    def gap(self, statistic: str) -> Mark:
        """The difference, second - first, and its interval."""
        return Mark(*(self.of(f"{statistic}_difference{end}") for end in ("", "_low", "_high")))

    def estimate(self, name: str) -> tuple[float, float]:
        """With the error over directions and texts together, where that is known."""
        total = self.values.get(f"{name}_stderr_total")
        return self.of(name), self.of(f"{name}_stderr") if total is None else float(total)

    @property
    def over(self) -> str:
        """What errors are over."""
        known = self.values.get(f"{self.headline}_difference_stderr_total") is not None
        return "over directions and texts together" if known else "over directions"

    def said(self, name: str) -> str:
        return with_error(*self.estimate(name))

    def interval(self, statistic: str) -> str:
        found = self.gap(statistic)
        return f"{number(found.low)} to {number(found.high)}"

    @property
    def short_names(self) -> tuple[str, str]:
        """Names for figures and headers; numbered where their short forms are the same."""
        first, second = (short(name) for name in self.names)
        return (first, second) if first != second else (f"1 {first}", f"2 {second}")
