"""One call of a metric: its memory, its time, and what is said where it ends without a result."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.checks import said_not_finite
from ..core.objective import Loss
from ..core.progress import watched
from ..core.result import Result
from ..core.store import to_json
from .cache import Outcome, Status
from .fitting import Fitting
from .meter import Expired, MemoryLog, Meter, Options, alarm, cleanup_memory, is_full
from .metric import KEY, Metric, check_result
from .quiet import TURNS
from .rows import resumed
from .sharing import Shared, is_shared
from .subject import Subject

Needed = Mapping[str, tuple[Outcome, ...]]
"""The outcomes of the metrics that a metric needs; of a pair or a series, those of each subject."""
LOSSES = ("loss", "first_loss", "second_loss", "task_losses")
"""Of what a metric asks for, what has batches."""


@dataclass
class Call:
    """A metric with everything that it is given."""

    one: Metric
    subject: Subject
    loss: Loss | None
    task: str
    needed: Needed
    options: Options
    path: Path | None
    """Of its cell; unfinished rows are beside it."""
    shared: Shared = field(default_factory=Shared)
    edited: bool = False
    """Whether it wrote into what it was given."""
    elsewhere: float = 0.0
    """Seconds of its work that another call took, less those that this one took for others."""

    def __post_init__(self) -> None:
        subject = self.subject  # a ring through this call would hold it until a collection
        losses = partial(evaluated, self.one, subject, self.task)
        self.fitting = Fitting(self.one, self.options, losses, lambda: subject.theta)

    def outcome(self, empty: Outcome) -> Outcome:
        """The result, or the reason why there is none. Raises what the metric raises, without `skip_on_error`."""
        started, meter, held = time.perf_counter(), Meter(self.options), ""
        before = self._edits()
        try:
            with (
                TURNS.computing(),
                watched(meter),
                MemoryLog(self.one.name, self.options),
                alarm(self.options.timeout_seconds) as held,
            ):
                result = self._result()
            outcome = replace(empty, result=result, unit=self._unit(empty.unit))
            self.edited = self._edits() != before
            if self.edited:
                raise ValueError(f"{self.one.name} has changed what it was given: work on a copy, `theta.clone()`.")
        except (Exception, Expired) as err:
            if not self.options.skip_on_error:
                raise
            self.edited = self._edits() != before
            said = lost(err)
            outcome = replace(empty, **said | {"error": self._named(said["error"])})
        plan = {"timeout": held, "memory": self.fitting.why, "peak": meter.exceeded}
        told = self.fitting.plan | ({} if self.fitting.size is None else {"batch_size": self.fitting.size})
        told |= {name: text for name, text in plan.items() if text}
        seconds = max(0.0, time.perf_counter() - started + self.elsewhere)
        cost = {"seconds": seconds, "forwards": meter.forwards, "products": meter.products}
        return replace(outcome, plan=spoken(told), cost=cost)

    def _result(self) -> Result:
        """The result; made with less at a time as often as memory runs out."""
        one, drawn = self.one, {KEY: self.options.key} if KEY in self.one.needs else {}
        needs: list[Any] | None = None
        value: Any = None
        while True:
            try:
                self.fitting.choose()
                needs = [self._need(name) for name in one.needs if name != KEY]
                with torch.backends.cudnn.flags(benchmark=False, deterministic=self.options.deterministic):
                    value = self._called(needs, drawn)
                if not isinstance(value, Result) and hasattr(value, "rows"):
                    value = value.result(list(resumed(value, self.path)))
                return check_result(one, value)
            except (RuntimeError, MemoryError) as err:
                if not is_full(err) or not self._shrunk():
                    raise
            needs = value = None
            cleanup_memory()

    def _called(self, needs: list[Any], drawn: dict[str, Any]) -> Any:
        one = self.one
        if not is_shared(one):
            return one.call(*needs, **drawn, **one.settings, **self.fitting.plan)
        value, self.elsewhere = self.shared.result(one, needs[0], needs[1], self.fitting.plan)
        return value

    def _unit(self, other: str) -> str:
        """Of its loss; without one, of the results that it is made of, or of what its subject says."""
        if self.loss is not None:
            return self.loss.criterion.unit
        units = {loss.criterion.unit for loss in self.subject.losses.values()}
        if len(units) == 1 and {"first_loss", "task_losses"} & {*self.one.needs}:
            return units.pop()
        known = self.subject.own.get("unit", other)
        return next((each.unit for parts in self.needed.values() for each in parts), known)

    def _need(self, name: str) -> Any:
        if name in self.needed:
            results = tuple(each.result for each in self.needed[name])
            return results[0] if self.one.on == "model" else results
        value = self.subject.need(name, self.task)
        if name not in LOSSES:
            return value
        fitted = self.fitting.fitted
        return {key: fitted(each) for key, each in value.items()} if isinstance(value, Mapping) else fitted(value)

    def _named(self, error: str) -> str:
        """What is said of several subjects, which the function knows as its arguments, by their own names; of weights that
        make every number nan, the first."""
        broken = said_not_finite(self.subject.net.params)
        error += "" if broken in error else broken
        if names := self.subject.own.get("names"):
            arguments = {f"thetas[{i}]": name for i, name in enumerate(names)}
            arguments |= {"start": names[0], "end": names[-1], "loss.net": names[-1]}
            for argument, name in arguments.items():
                error = error.replace(f"`{argument}`", name)
        return error

    def _shrunk(self) -> bool:
        """Whether a pass of its own, or less at a time, is tried next."""
        if is_shared(self.one) and not self.shared.alone:
            self.shared.alone = True
            return True
        return self.fitting.shrink()

    def _edits(self) -> list[int]:
        """How often each tensor that a metric is given was written into."""
        given: list[Tensor] = [self.subject.theta, *self.subject.net.params.values()]
        given += self.loss.tensors() if self.loss else []
        return [each._version for each in given if not each.is_inference()]


def evaluated(one: Metric, subject: Subject, task: str) -> list[Loss]:
    """Every loss that a metric evaluates."""
    given = [subject.need(name, task) for name in one.needs if name in LOSSES]
    return [loss for each in given for loss in (each.values() if isinstance(each, Mapping) else [each])]


def lost(err: BaseException) -> dict[str, Any]:
    """What an outcome says of an error."""
    status: Status = "timeout" if isinstance(err, Expired) else "out of memory" if is_full(err) else "failed"
    kind = type(err)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    lines = "".join(traceback.format_exception(err))
    return {"status": status, "error": str(err) or name, "error_type": name, "traceback": lines}


def spoken(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for people, those without a JSON form by their name."""
    said = {}
    for name, value in settings.items():
        try:
            said[name] = to_json(value)
        except TypeError:
            said[name] = getattr(value, "__qualname__", None) or str(value)
    return said
