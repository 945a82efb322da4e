"""How a metric is made to fit: chosen before it begins by what is expected of it, and made less of where memory runs out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from ..core.objective import Loss
from .chunk_plan import CHUNKED, CHUNKS, ChunkPlan, chunk_plan
from .memory_plan import GIB, MemoryPlan, in_remat, memory_plan
from .meter import Options, memory_gb
from .metric import Metric

FIRST_CHUNK = 8
"""What is halved where memory runs out and the metric chose its chunk itself."""

WORTH = 0.9
"""Where nothing is expected to fit, batches are halved as far as that is worth it: to within this of the least."""
Plan = TypeVar("Plan", MemoryPlan, ChunkPlan)


@dataclass
class Fitting:
    """Batches, layers, chunks and kept graphs of one metric: no number depends on them beyond rounding."""

    one: Metric
    options: Options
    losses: Callable[[], Sequence[Loss]]
    """All that it evaluates, in the batches of the subject."""
    theta: Callable[[], Tensor]
    plan: dict[str, Any] = field(default_factory=dict)
    size: int | None = None
    """Of the batches, where memory ran out."""
    ways: MemoryPlan | None = None
    """How products are made, where there is a choice."""
    chunked: ChunkPlan | None = None
    """How many are in memory at a time, where those that the metric has by itself would not fit."""
    below: float = math.inf
    """GiB of expected need at which memory ran out: what is expected to need as much is not tried again."""
    said: list[str] = field(default_factory=list)
    """What was too much, by what was expected or by what came."""

    def __post_init__(self) -> None:
        self.plan = dict(self.one.plan)

    def choose(self) -> None:
        """How products are made, or how many are in memory at a time, as far as that is left open and memory is limited."""
        if self.options.max_memory_gb is None:
            return
        if self._has_ways:
            self.ways = self._in_batches(self._ways, min(self._left, self.below))
            if self.ways is not None:
                chosen = {"keep": self.ways.keep, "head_chunk": self.ways.head_chunk}
                self.plan |= {name: chosen[name] for name in chosen.keys() & self.one.plan.keys()}
        elif self.chunked is None and self.plan == self.one.plan and self.one.name in CHUNKED:
            self.chunked = self._in_batches(self._chunk, self._left)
            if self.chunked is not None:
                self.plan[self.chunked.name] = self.chunked.chunk

    def shrink(self) -> bool:
        """Whether products made in another way, a smaller chunk, or smaller batches are tried next."""
        return self._other_way() or self._smaller_chunk() or self._smaller_batches()

    def fitted(self, loss: Loss) -> Loss:
        """A loss in batches and layers that fit."""
        loss = self._split(loss)
        return in_remat(loss) if self.ways is not None and self.ways.remat else loss

    @property
    def why(self) -> str:
        """What was expected, and what ran out of memory all the same."""
        expected = [each.why for each in (self.ways, self.chunked) if each is not None and each.why]
        return " ".join([*expected, *self.said])

    @property
    def _has_ways(self) -> bool:
        return "keep" in self.one.plan and "loss" in self.one.needs

    @property
    def _left(self) -> float:
        """GiB that are not in use."""
        return ((self.options.max_memory_gb or math.inf) - memory_gb()) * 1e9 / GIB

    def _ways(self, gib: float) -> MemoryPlan | None:
        one = self.one
        fixed = {name: one.plan[name] for name in one.asked & {"keep", "head_chunk"}}
        loss, *_ = self._divided()
        return memory_plan(loss, self.theta(), gib, fixed=fixed, parts="head_chunk" in one.plan)

    def _chunk(self, gib: float) -> ChunkPlan | None:
        return chunk_plan(self.one, self._divided(), self.theta(), gib)

    def _in_batches(self, plan_for: Callable[[float], Plan | None], gib: float) -> Plan | None:
        """A plan for the largest batches, halved as often as it takes, that is expected to fit; else one near the least."""
        tried = [(self.size, plan_for(gib))]
        while (plan := tried[-1][1]) is not None and plan.gib > gib and (smaller := self._half()):
            self.size = smaller
            tried.append((smaller, plan_for(gib)))
        needs = [0.0 if plan is None else plan.gib for _, plan in tried]  # None: it fits as it is
        last = next(i for i, need in enumerate(needs) if need <= max(gib, min(needs) / WORTH))
        self.size, plan = tried[last]
        if last:
            self.said.append(f"Batches of more than {tried[last][0]} would take {needs[last - 1]:.2g} GiB.")
        return plan

    def _other_way(self) -> bool:
        """Whether there is a way that is expected to need less than the one that ran out."""
        if self.ways is None or not self._has_ways:
            return False
        below = math.nextafter(self.ways.gib, 0.0)
        other = self._ways(below)
        if other is None or other.gib > below:
            return False
        self.below = below
        self.said.append(f"Memory ran out {self.ways.name}.")
        return True

    def _smaller_chunk(self) -> bool:
        for name in CHUNKS:
            chunk = self.plan.get(name, 1) or FIRST_CHUNK
            if chunk > 1:
                self.said.append(f"Memory ran out with {chunk} at a time.")
                self.plan[name] = chunk // 2
                return True
        return False

    def _smaller_batches(self) -> bool:
        if not (smaller := self._half()):
            return False
        self.said.append(f"Memory ran out with batches of {self._size}.")
        self.size = smaller
        return True

    @property
    def _size(self) -> int:
        return self.size or max(loss.batch_size for loss in self.losses())

    def _half(self) -> int:
        """The next smaller size of batches; 0 where there is none."""
        if self.one.by_batch or not (losses := self.losses()):
            return 0
        smaller = max(self.options.min_batch_size, self._size // 2)
        rest = [loss.split(smaller).batch_size < self._split(loss).batch_size for loss in losses]
        return smaller if smaller < self._size and any(rest) else 0

    def _divided(self) -> list[Loss]:
        return [self._split(loss) for loss in self.losses()]

    def _split(self, loss: Loss) -> Loss:
        return loss if self.size is None else loss.split(self.size)
