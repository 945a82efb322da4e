"""An analyzer: a pure function of one checkpoint, and what is to be said of its result. Data; the executor runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from ..core.keys import key
from ..core.model import Functional
from ..core.objective import Loss
from ..families.family import Family
from ..landscape.sampling import CommonDirections, common_directions
from .runs import Variant

Values = Mapping[str, Any]

KEPT_UP_TO = 2**27
"""Numbers that the directions of all checkpoints may have: 512 MiB of float32."""


@dataclass(frozen=True, eq=False)
class Bench:
    """A variant's network and its losses, made once and shared by all checkpoints."""

    family: Family
    config: Any
    net: Functional
    _losses: dict[str, Loss] = field(default_factory=dict)
    _directions: dict[tuple[int, int], CommonDirections] = field(default_factory=dict)

    @classmethod
    def of(cls, family: Family, variant: Variant) -> Bench:
        config = family.configured(variant.config)
        return cls(family, config, family.network(config))

    def loss(self, split: str) -> Loss:
        if split not in self._losses:
            self._losses[split] = self.family.loss(self.net, self.config, split)
        return self._losses[split]

    def directions(self, seed: int, num: int) -> CommonDirections | None:
        """Unit directions for all checkpoints, drawn once; None where they are too large to keep."""
        if num * self.net.layout.num > KEPT_UP_TO:
            return None
        if (seed, num) not in self._directions:
            self._directions[seed, num] = common_directions(self.net, key=key(seed), num=num)
        return self._directions[seed, num]


@dataclass(frozen=True, eq=False)
class Subject:
    """One checkpoint as analyzers see it."""

    step: int
    theta: Tensor
    """The flat vector of its parameters."""
    bench: Bench
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    """Those that belong to theta, as far as the family keeps any: the running statistics."""

    @property
    def net(self) -> Functional:
        """The variant's network with the buffers of this checkpoint; its own parameters are the untrained ones."""
        return self.bench.net.with_buffers(self.buffers) if self.buffers else self.bench.net

    @property
    def trained(self) -> Functional:
        """The network of this checkpoint, parameters and buffers."""
        return replace(self.net, params=self.net.layout.unravel(self.theta))

    def loss(self, split: str) -> Loss:
        """The family's loss on `train`, `test` or `probe` (all data), with the buffers of this checkpoint.

        ValueError where the family has none.
        """
        loss = self.bench.loss(split)
        return loss.with_buffers(self.buffers) if self.buffers else loss


@dataclass(frozen=True, eq=False)
class Subjects:
    """All checkpoints of a variant, loaded one at a time."""

    steps: tuple[int, ...]
    _load: Callable[[int], Subject]
    curves: Mapping[str, np.ndarray] | None

    def __getitem__(self, step: int) -> Subject:
        return self._load(step)

    def __iter__(self) -> Iterator[Subject]:
        return (self._load(step) for step in self.steps)


@dataclass(frozen=True, eq=False)
class Analyzer:
    """What is measured at every checkpoint: adding one is making one of these.

    Results are plain numbers, strings and numpy arrays. They must depend on the arguments alone: a run that was interrupted,
    split over processes or done again stores the same bytes.
    """

    name: str
    """Small letters, digits, underscores: also the name of its folder."""
    analyze: Callable[..., Values]
    """(subject, **settings) -> values of one checkpoint; where `across`, (subjects, **settings) -> values of the variant."""
    summary_keys: tuple[str, ...] = ()
    compute_summary: Callable[[Values], Values] = lambda _: {}
    """Values of one checkpoint -> its row of the summary: the `summary_keys`, each of one shape at all checkpoints."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of `analyze`, with their defaults."""
    forwards: Callable[[Mapping[str, Any]], float] = lambda _: 1.0
    """What one checkpoint costs, in forward passes over the data of its loss: known before it runs."""
    steps: Callable[[Subjects], Sequence[int]] = lambda subjects: subjects.steps
    """Which checkpoints it looks at unless told."""
    described: Callable[[Bench], Mapping[str, Any]] = lambda _: {}
    """Names that belong to the rows of its arrays, written beside the settings."""
    needs_loss: bool = True
    across: bool = False
    """One result for the whole variant instead of one for each checkpoint."""
    version: int = 1
    """To be raised when the function changes: stored results of another version are made again."""

    def __repr__(self) -> str:
        return f"Analyzer({self.name!r}, {dict(self.settings)})"

    def configured(self, **changes: Any) -> Analyzer:
        """The same with other settings. Raises ValueError for a setting that it does not have."""
        if unknown := sorted(changes.keys() - self.settings.keys()):
            raise ValueError(f"{self.name} has no setting {unknown[0]!r}: it has {', '.join(self.settings) or 'none'}.")
        return replace(self, settings={**self.settings, **changes})

    @property
    def split(self) -> str:
        """The data that its loss is over, where it takes any."""
        return self.settings.get("split", "probe")
