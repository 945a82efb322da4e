"""One forward pass for all metrics of a subject that need one and the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ..core.keys import Key
from ..core.layout import Params
from ..core.objective import Loss
from ..core.reading import Passed, Reading, passed
from .meter import is_full
from .metric import KEY, Metric

NEEDED = ("loss", "params")


def is_shared(one: Metric) -> bool:
    """Whether it is made of one forward pass, which others can look at, too."""
    return hasattr(one.call, "reading") and one.needs in (NEEDED, (*NEEDED, KEY)) and not one.by_batch


@dataclass
class Shared:
    """What passes over the data of a subject have left for metrics whose turn has not come."""

    waiting: Callable[[Metric], Iterable[Metric]] = lambda _: ()
    """Those that would look at the same pass as this one."""
    key: Key | None = None
    """For those that need one."""
    alone: bool = False
    """Every metric makes its own pass: memory ran out, or each has a time of its own."""
    made: dict[str, tuple[Reading[Any], Passed]] = field(default_factory=dict)

    def result(self, one: Metric, loss: Loss, params: Params, plan: dict[str, Any]) -> tuple[Any, float]:
        """The result of a metric, and the seconds by which its own work differs from what this call takes.

        Raises what the metric raises, and what ran out of memory in the pass that it leads.
        """
        if one.name in self.made:
            reading, own = self.made.pop(one.name)
            elsewhere = own.seconds
        else:
            reading, own, elsewhere = self._led(one, loss, params, plan)
        if own.error is not None:
            raise own.error
        return reading.result(own.kept), elsewhere

    def _led(self, one: Metric, loss: Loss, params: Params, plan: dict[str, Any]) -> tuple[Reading[Any], Passed, float]:
        readings = {one.name: self._reading(one, loss, params, plan)}
        for other in () if self.alone else self.waiting(one):
            try:
                readings[other.name] = self._reading(other, loss, params, dict(other.plan))
            except Exception:  # it raises again when its turn comes  # noqa: BLE001
                continue
        made = passed(loss, params, readings)
        for each in made.values():
            if each.error is not None and is_full(each.error):
                raise each.error
        own = made.pop(one.name)
        self.made |= {name: (readings[name], each) for name, each in made.items()}
        return readings[one.name], own, -sum((each.seconds for each in made.values()), 0.0)

    def _reading(self, one: Metric, loss: Loss, params: Params, plan: dict[str, Any]) -> Reading[Any]:
        drawn = {KEY: self.key} if KEY in one.needs else {}
        return one.call.reading(loss, params, **drawn, **one.settings, **plan)  # type: ignore[attr-defined, no-any-return]
