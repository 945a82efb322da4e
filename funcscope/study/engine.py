"""The one way in which metrics run: subjects outermost, a model opened only for what is missing, every outcome kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any
from uuid import uuid4
from weakref import proxy

from tqdm.auto import tqdm

from . import digest
from .apart import apart
from .asked import check_metrics, check_names, cost, warn_of_absent
from .cache import Cache, Cell, Outcome
from .calling import Call, Needed, lost, spoken
from .cluster import Cluster
from .meter import Options
from .metric import KEY, Absent, Metric, modules_of, with_members, with_needs
from .modules import OwnModule
from .record import versions
from .sharing import Shared, is_shared
from .sources import batch_size
from .subject import Source, Subject
from .together import Together, arranged

PACKAGES = cache(versions)
BAR = "{percentage:3.0f}% |{bar}| {elapsed}, {remaining} to go{postfix}"


@dataclass(frozen=True, eq=False)
class Job:
    """All metrics of one subject: what is sent to a worker."""

    source: Source
    metrics: tuple[Metric, ...]
    tasks: tuple[str, ...]
    cache: Cache
    options: Options
    parts: Mapping[str, tuple[Outcome, ...]] = field(default_factory=dict)
    """Of several subjects together: the outcomes of each, by metric."""
    modules: tuple[OwnModule, ...] = ()
    """Of the user's own, which a worker imports first."""

    def task(self, one: Metric) -> str:
        """The data that a metric looks at here."""
        return one.task or self.tasks[0]

    def empty(self, one: Metric, **what: Any) -> Outcome:
        """An outcome before anything came of it."""
        about = {"status": "ok", "settings": spoken(one.settings), "group": self.source.group}
        return Outcome(one.name, self.source.id, self.source.step, self.task(one), **about | what)


def run(
    metrics: Sequence[Metric],
    sources: Sequence[Source],
    *,
    tasks: Sequence[str] = ("data",),
    cache: Cache | None = None,
    options: Options | None = None,
    executor: Executor | None = None,
    watch: Callable[[Outcome], object] = lambda _: None,
    quiet: bool = True,
    bases: Sequence[Source] = (),
) -> list[Outcome]:
    """Every metric on every source, from the cache or made and kept there; in the order of the sources, then of the metrics.

    Metrics of pairs and of series are measured on those that the sources make (`together.arranged`), after the others.

    tasks: names of the data, the first for metrics without a preference. executor: any of `concurrent.futures` (processes
    by `spawn`: torch does not survive a fork), or a `Cluster`; a source is one piece of work. watch: is told every outcome
    as soon as it is there. bases: what pairs compare the others with, one for each data, measured as they are. Whatever
    stops the call, what was made until then is kept, and the same call goes on from there.

    Raises ValueError where two sources or two metrics have one name, where metrics need each other, and, without
    `skip_on_error`, whatever a metric raises; as `Cluster.share` does, which is asked first.
    """
    check_metrics(metrics)
    check_names(sources)
    every = list(with_members(metrics))
    if any(one.on == "pair" for one in every):
        sources = [*(base for base in bases if base.id not in {one.id for one in sources}), *sources]
    plan = list(arranged(every, sources, bases, tasks))
    warn_of_absent(metrics, [each for _, each in plan])
    outcomes: dict[str, dict[str, Outcome]] = {}
    costs = {one.name: cost(one) for one in with_needs(every)}
    total = sum(costs[one.name] for _, each in plan for one in with_needs(each))
    with tqdm(total=total, bar_format=BAR, disable=quiet, dynamic_ncols=True) as bar:

        def announced(outcome: Outcome) -> None:
            bar.set_postfix_str(f"{outcome.metric} of {outcome.subject}", refresh=False)
            if outcome.reused:  # it says nothing about how long the others take
                bar.total = (bar.total or 0) - costs[outcome.metric]
            bar.update(0 if outcome.reused else costs[outcome.metric])
            watch(outcome)

        store, options, modules = cache or Cache(None), options or Options(), modules_of(every)
        if isinstance(executor, Cluster):
            executor.share(store.root, modules)
        for together in (False, True):  # what is made of several comes after them
            jobs = [
                Job(source, tuple(with_needs(each)), tuple(tasks), store, options, _parts(source, outcomes), modules)
                for source, each in plan
                if isinstance(source, Together) is together
            ]
            for job, made in _done(jobs, executor, announced):
                outcomes[job.source.id] = {outcome.metric: outcome for outcome in made}
    return [outcome for source, _ in plan for outcome in outcomes[source.id].values()]


def _parts(source: Source, outcomes: Mapping[str, Mapping[str, Outcome]]) -> dict[str, tuple[Outcome, ...]]:
    """What was measured of the members, by metric."""
    if not isinstance(source, Together):
        return {}
    members = [outcomes[one.id] for one in source.sources if one.id in outcomes]
    names = dict.fromkeys(name for each in members for name in each)
    return {name: tuple(each[name] for each in members if name in each) for name in names}


def _done(
    jobs: Sequence[Job], executor: Executor | None, watch: Callable[[Outcome], object]
) -> Iterator[tuple[Job, list[Outcome]]]:
    if executor is None:
        yield from ((job, _each(job, watch)) for job in jobs)
        return
    futures = {executor.submit(_each, job): job for job in jobs}
    try:
        for future in as_completed(futures):
            try:
                made = future.result()
            except Exception as err:  # of the worker, or of the way there: a metric's own is an outcome  # noqa: BLE001
                made = _lost(futures[future], err)
            for outcome in made:
                watch(outcome)
            yield futures[future], made
    finally:
        for future in futures:
            future.cancel()


def _each(job: Job, watch: Callable[[Outcome], object] = lambda _: None) -> list[Outcome]:
    """The outcomes of one subject. What another process is making is waited for, after everything else."""
    made = dict[str, Outcome]()
    try:
        bench = Bench(job)
    except Exception as err:  # noqa: BLE001
        without = _lost(job, err)
        for each in without:
            watch(each)
        return without
    for wait in (False, True):
        for one in job.metrics:
            if one.name not in made and (outcome := bench.outcome(one, made, wait=wait)):
                made[one.name] = outcome
                watch(outcome)
    return [made[one.name] for one in job.metrics]


def _lost(job: Job, err: Exception) -> list[Outcome]:
    if not job.options.skip_on_error:
        raise err
    return [job.empty(one, **lost(err)) for one in job.metrics]


class Bench:
    """One subject, opened when the first metric is missing."""

    def __init__(self, job: Job):
        for module in job.modules:
            module.imported()
        if absent := [one.call.said for one in job.metrics if isinstance(one.call, Absent)]:
            raise ValueError(absent[0])
        self.job, self.cache, self.options = job, job.cache, job.options
        self.sums = job.cache.sums
        self.weights = job.source.digest(self.sums) or f"not known, {uuid4().hex}"
        self.packages = PACKAGES()
        me = proxy(self)  # a ring would hold the model until a collection
        self.shared = Shared(
            lambda one: me._beside(one), job.options.key, alone=job.options.timeout_seconds is not None
        )
        self._data: dict[str, str] = {}
        self._broken: Exception | None = None

    @cached_property
    def subject(self) -> Subject:
        return self.job.source.open()

    def outcome(self, one: Metric, made: Mapping[str, Outcome], *, wait: bool) -> Outcome | None:
        """Stored, or made; None where another process is at it, or at something that it needs."""
        if one.on == "model" and {each.name for each in self.job.metrics} & {*one.needs} - made.keys():
            return None
        needed = {
            name: (made[name],) if one.on == "model" else self.job.parts[name]
            for name in one.needs
            if name in (made if one.on == "model" else self.job.parts)
        }
        try:
            cell = self._cell(one, needed)
        except Exception as err:  # noqa: BLE001
            return self._unbegun(one, err)
        if stored := self._stored(cell):
            return stored
        with self.cache.claim(cell, wait=wait) as mine:
            if not mine:
                return None
            return self._stored(cell) or self._put(cell, self._made(one, needed, cell))

    def _cell(self, one: Metric, needed: Needed) -> Cell:
        task = self.job.task(one)
        if task not in self._data:
            self._data[task] = self.job.source.data_digest(task, self.sums)
        content = {
            "version": one.version, "settings": digest.identity(one.settings), "weights": self.weights, "task": task,
            "data": self._data[task], "packages": self.packages,
            "seed": self.options.seed if KEY in one.needs else None,
            "of": {name: digest.of_json([each.content for each in parts]) for name, parts in needed.items()},
        }  # fmt: skip
        if KEY in one.needs and self.options.stream != "cpu":
            content["stream"] = self.options.stream
        if one.by_batch:
            content["batches"] = batch_size(self.job.source, task)
        return Cell(one.name, self.job.source.id, content)

    def _stored(self, cell: Cell) -> Outcome | None:
        if self.options.force:
            return None
        stored = self.cache.get(cell)
        again = stored is not None and not stored.ok and (stored.status != "failed" or self.options.retry_failed)
        return None if again else stored and replace(stored, step=self.job.source.step, group=self.job.source.group)

    def _put(self, cell: Cell, outcome: Outcome) -> Outcome:
        """The outcome, which goes on without a place on the disk where there is none."""
        if not outcome.content:
            return outcome
        try:
            self.cache.put(cell, outcome)
        except OSError as err:
            warnings.warn(
                f"{cell.metric} of {cell.subject} could not be stored ({err}): it is in the results of this call, and the "
                "next one makes it again.",
                stacklevel=2,
            )
        except (ValueError, TypeError, RuntimeError) as err:  # an array that the format does not have
            if not self.options.skip_on_error:
                raise
            return self._put(cell, replace(outcome, result=None, **lost(err)))
        return outcome

    def _unbegun(self, one: Metric, err: Exception) -> Outcome:
        """The outcome of what the metric is not to blame for; nothing of it is stored, and the next study tries again."""
        if not self.options.skip_on_error:
            raise err
        said = lost(err)
        return self.job.empty(one, **said | {"error": f"{one.name} did not begin: {said['error']}"})

    def _made(self, one: Metric, needed: Needed, cell: Cell) -> Outcome:
        empty = self.job.empty(one, content=cell.content)
        if bad := [each for parts in needed.values() for each in parts if not each.ok]:
            return replace(empty, status="skipped", error=f"it needs {bad[0].metric}, which has no result.")
        if self.options.hard_timeout and (outcome := apart(self, one, needed, cell)):
            return outcome
        try:
            if self._broken is not None:
                raise self._broken
            subject, task = self.subject, self.job.task(one)
            loss = subject.loss(task) if "loss" in one.needs else None
        except Exception as err:  # noqa: BLE001
            self._broken = err if "subject" not in vars(self) else self._broken
            return self._unbegun(one, err)
        call = Call(one, subject, loss, task, needed, self.options, self.cache.path(cell), shared=self.shared)
        outcome = call.outcome(empty)
        if call.edited:
            self._reopen(one, subject)
        return outcome

    def _beside(self, one: Metric) -> list[Metric]:
        """Those that come later in this job and would make the same pass."""
        later = self.job.metrics[self.job.metrics.index(one) + 1 :]
        task = self.job.task(one)
        alike = (each for each in later if is_shared(each) and self.job.task(each) == task)
        return [each for each in alike if not self._stored(self._cell(each, {}))]

    def _reopen(self, one: Metric, before: Subject) -> None:
        """What a metric has written into is not used again."""
        del self.subject
        try:
            if self.subject.theta.data_ptr() == before.theta.data_ptr():
                raise ValueError(f"{one.name} has changed the model or the data in memory.")
        except Exception as err:  # noqa: BLE001
            self._broken = err
