"""What an audit of derivatives says: ways and their verdicts, and the modules that break them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from ..core.keys import Key
from ..core.pack import storable
from ..core.result import Result, derived

Verdict = Literal["right", "wrong", "missing", "undecided"]


@storable
@dataclass(frozen=True)
class Way:
    """One way to a number, compared with another that does not share its faults.

    order: of the derivative; 0 for values. deviation: the largest difference from the judge, relative to the larger of both;
    allowed: what the judge's error and rounding explain, relative to the same. nan where nothing was compared.
    """

    name: str
    order: int
    verdict: Verdict
    deviation: float
    allowed: float
    reason: str = ""


@storable
@dataclass(frozen=True)
class Culprit:
    """A module, or the criterion, whose own derivatives are wrong or missing, and not because of a part of it.

    operations: the functions of torch that break alone what the module breaks; all that it calls where none does alone.
    """

    module: str
    kind: str
    operations: tuple[str, ...]
    wrong: tuple[str, ...]
    missing: tuple[str, ...]


class Audit(Result):
    """Which derivatives of a loss are right, judged by differences of its values. Made by `audit`."""

    ways: tuple[Way, ...]
    culprits: tuple[Culprit, ...]
    num_directions: int
    has_kinks: bool
    values_dtype: torch.dtype
    key: Key

    @property
    def right(self) -> bool:
        """No way is wrong; some may be missing or undecided."""
        return all(way.verdict != "wrong" for way in self.ways)

    def named(self, verdict: Verdict, order: int | None = None) -> tuple[str, ...]:
        """The ways of one verdict, of one order or of all."""
        return tuple(way.name for way in self.ways if way.verdict == verdict and order in (None, way.order))

    @derived("order of the derivative", per="way")
    def order(self) -> list[int]:
        return [way.order for way in self.ways]

    @derived("verdict", per="way")
    def verdict(self) -> list[str]:
        return [way.verdict for way in self.ways]

    @derived("deviation from the judge, relative", per="way")
    def deviation(self) -> list[float]:
        return [way.deviation for way in self.ways]

    @derived("deviation that is explained, relative", per="way")
    def allowed(self) -> list[float]:
        return [way.allowed for way in self.ways]

    @derived("reason", per="way")
    def reason(self) -> list[str]:
        return [way.reason for way in self.ways]

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"way": [way.name for way in self.ways]}

    @property
    def notes(self) -> list[str]:
        return [*map(_line, self.culprits), *self._advice()]

    def asdict(self) -> dict[str, Any]:
        """Plain numbers and names."""
        parts = {"ways": [asdict(way) for way in self.ways], "culprits": [asdict(each) for each in self.culprits]}
        return super().asdict() | parts | {"values_dtype": str(self.values_dtype).removeprefix("torch.")}

    @property
    def head(self) -> str:
        pieces = ", piecewise smooth" if self.has_kinks else ""
        dtype = str(self.values_dtype).removeprefix("torch.")
        return f"derivatives along {self.num_directions} directions, judged by differences of values in {dtype}{pieces}"

    def _advice(self) -> list[str]:
        if self.right:
            return []
        sound = [
            way for way in ("hessian", "hessian, keep=False", "hessian_difference") if way in self.named("right", 2)
        ]
        return [f"second derivatives that can be trusted: {', '.join(sound) or 'none'}"]


def _line(culprit: Culprit) -> str:
    faults = [f"{what}: {', '.join(ways)}" for what in ("wrong", "missing") if (ways := getattr(culprit, what))]
    return f"{culprit.module} ({culprit.kind}) calls {', '.join(culprit.operations)}; {'; '.join(faults)}"
