"""Several subjects as one: one model on two data sets, two models, or a training run; and which metric looks at which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..families.phases import phases
from . import digest
from .digest import Sums
from .metric import Metric
from .sources import Pretrained
from .subject import Source, Subject


@dataclass(frozen=True, eq=False)
class Members(Sequence[Subject]):
    """Subjects that are opened one at a time, each time that they are asked for: memory holds as many as are in use."""

    sources: tuple[Source, ...]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, place: Any) -> Any:
        return Members(self.sources[place]) if isinstance(place, slice) else self.sources[place].open()


@dataclass(frozen=True)
class Together:
    """Two subjects or more that are looked at together. Their data are those of the last, whose loss it is."""

    sources: tuple[Source, ...]
    name: str
    group: str = ""
    on: str = "series"
    """What metrics say that they are about: `pair` or `series`."""

    @property
    def id(self) -> str:
        return self.name

    @property
    def step(self) -> int | None:
        return None

    def digest(self, sums: Sums) -> str | None:
        each = [source.digest(sums) for source in self.sources]
        curves = self.curves()
        known = None if curves is None else {name: np.asarray(value).tolist() for name, value in curves.items()}
        names = [[source.id, source.step] for source in self.sources]
        return None if None in each else digest.of_json([each, names, known])

    def data_digest(self, task: str, sums: Sums) -> str:
        return digest.of_json([source.data_digest(task, sums) for source in self.sources])

    def curves(self) -> Mapping[str, np.ndarray] | None:
        return curves_of(self.sources[-1])

    def open(self) -> Subject:
        last, curves = self.sources[-1].open(), self.curves()
        steps = [source.step for source in self.sources]
        own = {"members": Members(self.sources), "steps": steps, "names": [source.id for source in self.sources]}
        return replace(last, own={**last.own, **own, **({} if curves is None else {"curves": curves})})


PARTS = {"fisher", "landscape"}
"""Tasks that the fields of a configuration make for single metrics: parts of the same data."""


@dataclass(frozen=True)
class OnTasks:
    """One model that is looked at on two data sets together."""

    source: Source
    names: tuple[str, str]
    """Of the data sets."""
    each: str = "{name}"
    """How the source calls the task of one of them, where data sets have parts."""

    @property
    def id(self) -> str:
        return f"{self.source.id} on {' and '.join(self.names)}"

    @property
    def step(self) -> int | None:
        return self.source.step

    @property
    def group(self) -> str:
        return self.source.group if self.each == "{name}" else f"{self.source.group} on {' and '.join(self.names)}"

    def digest(self, sums: Sums) -> str | None:
        return self.source.digest(sums)

    def data_digest(self, task: str, sums: Sums) -> str:
        return digest.of_json([self.names, *(self.source.data_digest(each, sums) for each in self.names_of(task))])

    def names_of(self, task: str) -> tuple[str, str]:
        """What the source calls this part of each data set."""
        first, second = (self.each.format(name=name, task=task) for name in self.names)
        return first, second

    def open(self) -> Subject:
        subject = self.source.open()
        return replace(subject, own={**subject.own, "names_of": self.names_of})


@dataclass(frozen=True)
class Experts:
    """Models that were fine-tuned from one base, each on a data set of its own, with the losses of all of these."""

    source: Source
    """The base, on all data sets."""
    members: tuple[Source, ...]
    names: tuple[str, ...]
    """Of the data sets, in the order of the models that were fine-tuned on them."""
    each: str = "{name}"
    """How the base calls the task of one of them, where data sets have parts."""

    @property
    def id(self) -> str:
        return f"{self.source.id} with {', '.join(self.names)}"

    @property
    def step(self) -> int | None:
        return None

    @property
    def group(self) -> str:
        return self.id

    def digest(self, sums: Sums) -> str | None:
        every = [one.digest(sums) for one in (self.source, *self.members)]
        return None if None in every else digest.of_json(every)

    def data_digest(self, task: str, sums: Sums) -> str:
        return digest.of_json([self.names, *(self.source.data_digest(each, sums) for each in self.names_of(task))])

    def names_of(self, task: str) -> tuple[str, ...]:
        """What the base calls this part of each data set."""
        return tuple(self.each.format(name=name, task=task) for name in self.names)

    def open(self) -> Subject:
        subject = self.source.open()
        about = {"names_of": self.names_of, "task_names": self.names, "members": Members(self.members)}
        return replace(subject, own={**subject.own, **about})


class Whole(NamedTuple):
    """A model with all data sets that it is measured on."""

    source: Source
    names: tuple[str, ...]
    each: str


def wholes(sources: Sequence[Source], tasks: Sequence[str]) -> list[Whole]:
    """Every model once: sources of one folder on several data sets are one, and so is a source that has several tasks."""
    folders: dict[tuple[Any, ...], list[Pretrained]] = {}
    for source in sources:
        if isinstance(source, Pretrained) and source.on:
            folders.setdefault((source.folder, source.at, source.length), []).append(source)
    made, seen = list[Whole](), set[tuple[Any, ...]]()
    for source in sources:
        if not (isinstance(source, Pretrained) and source.on):
            known = getattr(source, "losses", getattr(source, "tasks", tasks))
            made.append(Whole(source, tuple(task for task in tasks if task in known and task not in PARTS), "{name}"))
        elif (folder := (source.folder, source.at, source.length)) not in seen:
            seen.add(folder)
            members = folders[folder]
            every = {f"{each.on}/{task}": spec for each in members for task, spec in each.tasks.items()}
            model = replace(source, tasks=every, on="", name=source.id.removesuffix(f" on {source.on}"))
            made.append(Whole(model, tuple(each.on for each in members), "{name}/{task}"))
    return made


def on_tasks(sources: Sequence[Source], tasks: Sequence[str]) -> Iterator[OnTasks]:
    """Every model on every two data sets."""
    for one in wholes(sources, tasks):
        for first, second in combinations(one.names, 2):
            model = one.source
            if isinstance(model, Pretrained) and one.each != "{name}":
                of_both = tuple(f"{name}/" for name in (first, second))
                model = replace(model, tasks={task: s for task, s in model.tasks.items() if task.startswith(of_both)})
            yield OnTasks(model, (first, second), one.each)


def experts(sources: Sequence[Source], bases: Sequence[Source], tasks: Sequence[str]) -> Iterator[Experts]:
    """The base (the first model where none is named) with those that were fine-tuned from it, one on each data set.

    A model is of the data set that has the name of its folder; where that is not so of all, the models are in the order of
    the data sets, one for each. Where neither holds, there are no experts.
    """
    named = {one.id for one in bases}
    known = wholes([*bases, *(one for one in sources if one.id not in named)], tasks)
    models = [one for one in known if one.source.step is None]
    if not models or len(models[0].names) < 2:
        return
    base, *others = models
    by_name = {Path(one.source.id).name: one.source for one in others}
    if set(base.names) <= by_name.keys():
        yield Experts(base.source, tuple(by_name[name] for name in base.names), base.names, base.each)
    elif len(others) == len(base.names):
        yield Experts(base.source, tuple(one.source for one in others), base.names, base.each)


def curves_of(source: Source) -> Mapping[str, np.ndarray] | None:
    """Losses and accuracies over the training that a checkpoint comes from, where they are known."""
    known = getattr(source, "curves", None)
    return None if known is None else known()


def groups_of(sources: Sequence[Source]) -> dict[str, list[Source]]:
    """The training runs that the sources are checkpoints of, in the order of their steps; a model without a step alone."""
    groups: dict[str, list[Source]] = {}
    for source in sources:
        groups.setdefault(source.group if source.step is not None else source.id, []).append(source)
    return {name: sorted(each, key=lambda one: one.step or 0) for name, each in groups.items()}


def phases_of(sources: Sequence[Source]) -> list[Source]:
    """The start, the checkpoint that has memorised, and the end of a run; all where they are few."""
    if len(sources) <= 3:
        return list(sources)
    steps = [source.step or 0 for source in sources]
    chosen = phases(steps, curves_of(sources[-1]))
    return [sources[steps.index(step)] for step in dict.fromkeys(chosen)]


def arranged(
    metrics: Sequence[Metric], sources: Sequence[Source], bases: Sequence[Source] = (), tasks: Sequence[str] = ()
) -> Iterator[tuple[Source, list[Metric]]]:
    """Which metrics are measured on which subjects: models first, then these on two data sets, pairs and series of them.

    A metric at the `phases` looks at three checkpoints of a run. A pair is the checkpoint that has memorised and the last
    one of a run; of models without a step, the first and each other one. A series is a run, or all models without a step.
    Models on several data are together with those on the same alone. bases: what each other one is a pair with instead.
    """
    groups = groups_of(sources)
    at_phases = {id(one) for group in groups.values() for one in phases_of(group)}
    alone = [metric for metric in metrics if metric.on == "model"]
    for source in sources:
        chosen = [metric for metric in alone if metric.at == "every" or id(source) in at_phases]
        if chosen:
            yield source, chosen
    pairs = _with_bases(bases, sources) if bases else _pairs(groups)
    several, merged = on_tasks(sources, tasks), experts(sources, bases, tasks)
    for on, sets in (("tasks", several), ("experts", merged), ("pair", pairs), ("series", _series(groups))):
        if about := [metric for metric in metrics if metric.on == on]:
            yield from ((one, about) for one in sets)


def _pairs(groups: Mapping[str, list[Source]]) -> Iterator[Together]:
    for name, sources in groups.items():
        if len(sources) > 1:
            memorised, last = phases_of(sources)[-2:]
            yield _pair(memorised, last, name)
    for first, *others in _models(groups).values():
        yield from (_pair(first, other, first.id) for other in others)


def _with_bases(bases: Sequence[Source], sources: Sequence[Source]) -> Iterator[Together]:
    of_data, names = {data_of(base): base for base in bases}, {base.id for base in bases}
    for one in sources:
        if one.id not in names:
            base = of_data.get(data_of(one), bases[0])
            yield _pair(base, one, base.id)


def _pair(first: Source, second: Source, group: str) -> Together:
    return Together((first, second), f"{first.id} to {second.id}", group, "pair")


def _series(groups: Mapping[str, list[Source]]) -> Iterator[Together]:
    yield from (Together(tuple(each), name, name) for name, each in groups.items() if len(each) > 1)
    for data, models in _models(groups).items():
        if len(models) > 1:
            name = f"all models on {data}" if data else "all models"
            yield Together(tuple(models), name, name)


def _models(groups: Mapping[str, list[Source]]) -> dict[str, list[Source]]:
    """Those that are of no run, by the name of their data."""
    by_data: dict[str, list[Source]] = {}
    for each in groups.values():
        if len(each) == 1:
            by_data.setdefault(data_of(each[0]), []).append(each[0])
    return by_data


def data_of(source: Source) -> str:
    """The name of its data, where there are several."""
    return getattr(source, "on", "")
