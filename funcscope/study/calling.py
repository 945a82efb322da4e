"""One call of a metric: its memory, its time, and what is said where it ends without a result."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.objective import Loss
from ..core.progress import watched
from ..core.result import Result
from ..core.store import to_json
from .cache import Outcome, Status
from .chunk_plan import CHUNKED, ChunkPlan, chunk_plan
from .memory_plan import GIB, MemoryPlan, in_remat, memory_plan
from .meter import Expired, Full, MemoryLog, Meter, Options, alarm, cleanup_memory, is_full, memory_gb
from .metric import KEY, Metric, check_result
from .quiet import TURNS
from .rows import resumed
from .sharing import Shared, is_shared
from .subject import Subject

Needed = Mapping[str, tuple[Outcome, ...]]
"""The outcomes of the metrics that a metric needs; of a pair or a series, those of each subject."""
FIRST_CHUNK = 8
"""What is halved where memory runs out and the metric chose its chunk itself."""


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
    plan: dict[str, Any] = field(default_factory=dict)
    size: int | None = None
    """Of the batches, where memory ran out."""
    memory: MemoryPlan | None = None
    """How products are made, where there is a choice."""
    chunked: ChunkPlan | None = None
    """How many are in memory at a time, where those that the metric has by itself would not fit."""
    shared: Shared = field(default_factory=Shared)
    edited: bool = False
    """Whether it wrote into what it was given."""
    elsewhere: float = 0.0
    """Seconds of its work that another call took, less those that this one took for others."""

    def outcome(self, empty: Outcome) -> Outcome:
        """The result, or the reason why there is none. Raises what the metric raises, without `skip_on_error`."""
        started, meter, held = time.perf_counter(), Meter(self.options), ""
        self.plan = dict(self.one.plan)
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
        why = "; ".join(each.why for each in (self.memory, self.chunked) if each is not None and each.why)
        plan = {"batch_size": self.size, "timeout": held or None, "memory": why or None}
        told = self.plan | {name: value for name, value in plan.items() if value is not None}
        seconds = max(0.0, time.perf_counter() - started + self.elsewhere)
        cost = {"seconds": seconds, "forwards": meter.forwards, "products": meter.products}
        return replace(outcome, plan=spoken(told), cost=cost)

    def _result(self) -> Result:
        """The result; chunk, then batches are halved as often as memory runs out."""
        one, drawn = self.one, {KEY: self.options.key} if KEY in self.one.needs else {}
        while True:
            needs: list[Any] | None = None
            value: Any = None
            try:
                self._plan_memory()
                needs = [self._need(name) for name in one.needs if name != KEY]
                with torch.backends.cudnn.flags(benchmark=False, deterministic=self.options.deterministic):
                    value = self._called(needs, drawn)
                if not isinstance(value, Result) and hasattr(value, "rows"):
                    value = value.result(list(resumed(value, self.path)))
                return check_result(one, value)
            except (RuntimeError, MemoryError) as err:
                if not is_full(err) or not self._shrunk(halved=not isinstance(err, Full)):
                    raise
            cleanup_memory()

    def _called(self, needs: list[Any], drawn: dict[str, Any]) -> Any:
        one = self.one
        if not is_shared(one):
            return one.call(*needs, **drawn, **one.settings, **self.plan)
        value, self.elsewhere = self.shared.result(one, needs[0], needs[1], self.plan)
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
        return self._loss() if name == "loss" and self.loss is not None else self.subject.need(name, self.task)

    def _loss(self) -> Any:
        """In batches and layers that fit."""
        value = self.subject.need("loss", self.task)
        value = value if self.size is None else value.split(self.size)
        return in_remat(value) if self.memory and self.memory.remat else value

    def _plan_memory(self) -> None:
        """How products are made, or how many are in memory at a time, as far as that is left open and memory is limited."""
        one, limit = self.one, self.options.max_memory_gb
        if limit is None:
            return
        if "keep" in one.plan and self.loss is not None:
            loss = self.loss if self.size is None else self.loss.split(self.size)
            fixed, parts = (
                {name: one.plan[name] for name in one.asked & {"keep", "head_chunk"}},
                "head_chunk" in one.plan,
            )
            self.memory = memory_plan(loss, self.subject.theta, self._left(limit), fixed=fixed, parts=parts)
            if self.memory is not None:
                chosen = {"keep": self.memory.keep, "head_chunk": self.memory.head_chunk}
                self.plan |= {name: chosen[name] for name in chosen.keys() & one.plan.keys()}
        elif self.chunked is None and self.plan == one.plan and one.name in CHUNKED:
            self.chunked = chunk_plan(one, self._losses(), self.subject.theta, self._left(limit))
            if self.chunked is not None:
                self.plan[self.chunked.name] = self.chunked.chunk

    def _left(self, limit: float) -> float:
        """GiB that are not in use."""
        return (limit - memory_gb()) * 1e9 / GIB

    def _losses(self) -> list[Loss]:
        """Everything that the metric evaluates."""
        if self.loss is not None:
            return [self._loss()]
        given = [self.subject.need(name, self.task) for name in self.one.needs if name.endswith(("_loss", "_losses"))]
        return [loss for each in given for loss in (each.values() if isinstance(each, Mapping) else [each])]

    def _named(self, error: str) -> str:
        """What is said of several subjects, which the function knows as its arguments, by their own names."""
        if names := self.subject.own.get("names"):
            arguments = {f"thetas[{i}]": name for i, name in enumerate(names)}
            arguments |= {"start": names[0], "end": names[-1], "loss.net": names[-1]}
            for argument, name in arguments.items():
                error = error.replace(f"`{argument}`", name)
        return error

    def _shrunk(self, *, halved: bool) -> bool:
        """Whether a pass of its own, a smaller chunk, or smaller batches (both if `halved`) are tried next."""
        if is_shared(self.one) and not self.shared.alone:
            self.shared.alone = True
            return True
        if not halved:
            return False
        for name in ("chunk", "chunk_size"):
            chunk = self.plan.get(name, 1) or FIRST_CHUNK
            if chunk > 1:
                self.plan[name] = chunk // 2
                return True
        if self.loss is None or self.one.by_batch:
            return False
        now = self.loss.batch_size if self.size is None else self.size
        smaller = max(self.options.min_batch_size, now // 2)
        if smaller >= now or self.loss.split(smaller).batch_size >= self.loss.split(now).batch_size:
            return False
        self.size = smaller
        return True

    def _edits(self) -> list[int]:
        """How often each tensor that a metric is given was written into."""
        given: list[Tensor] = [self.subject.theta, *self.subject.net.params.values()]
        given += self.loss.tensors() if self.loss else []
        return [each._version for each in given if not each.is_inference()]


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
