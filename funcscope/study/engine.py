"""The one way in which metrics run: subjects outermost, a model opened only for what is missing, every outcome kept."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import torch
from tqdm.auto import tqdm

from ..core.keys import key
from ..core.progress import watched
from ..core.result import Result
from ..core.store import to_json
from . import digest
from .cache import Cache, Cell, Outcome, Status
from .meter import Expired, Full, MemoryLog, Meter, Options, cleanup_memory, is_full
from .metric import KEY, Metric, check_result, with_members, with_needs
from .record import versions
from .rows import resumed
from .subject import Source, Subject
from .together import Together, arranged

Needed = Mapping[str, tuple[Outcome, ...]]
"""The outcomes of the metrics that a metric needs; of a pair or a series, those of each subject."""
FIRST_CHUNK = 8
"""What is halved where memory runs out and the metric chose its chunk itself."""


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
    base: Source | None = None,
) -> list[Outcome]:
    """Every metric on every source, from the cache or made and kept there; in the order of the sources, then of the metrics.

    Metrics of pairs and of series are measured on those that the sources make (`together.arranged`), after the others.

    tasks: names of the data, the first for metrics without a preference. executor: any of `concurrent.futures` (processes
    by `spawn`: torch does not survive a fork); a source is one piece of work. watch: is told every outcome as soon as it is
    there. base: what pairs compare the others with, measured as they are. Whatever stops the call, what was made until then
    is kept, and the same call goes on from there.

    Raises ValueError where two sources have one name, and, without `skip_on_error`, whatever a metric raises.
    """
    _check_names(sources)
    every = list(with_members(metrics))
    if base is not None and base.id not in {one.id for one in sources} and any(one.on == "pair" for one in every):
        sources = [base, *sources]
    plan = list(arranged(every, sources, base))
    outcomes: dict[str, dict[str, Outcome]] = {}
    total = sum(len(list(with_needs(each))) for _, each in plan)
    with tqdm(total=total, unit="metric", disable=quiet, dynamic_ncols=True) as bar:

        def announced(outcome: Outcome) -> None:
            bar.set_postfix_str(f"{outcome.metric} of {outcome.subject}", refresh=False)
            bar.update()
            watch(outcome)

        cache, options = cache or Cache(None), options or Options()
        for together in (False, True):  # what is made of several comes after them
            jobs = [
                Job(source, tuple(with_needs(each)), tuple(tasks), cache, options, _parts(source, outcomes))
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
            made = future.result()
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
        bench = _Bench(job)
    except Exception as err:
        if not job.options.skip_on_error:
            raise
        lost = [
            Outcome(
                one.name, job.source.id, job.source.step, one.task or job.tasks[0], group=job.source.group, **_told(err)
            )
            for one in job.metrics
        ]
        for each in lost:
            watch(each)
        return lost
    for wait in (False, True):
        for one in job.metrics:
            if one.name not in made and (outcome := bench.outcome(one, made, wait=wait)):
                made[one.name] = outcome
                watch(outcome)
    return [made[one.name] for one in job.metrics]


class _Bench:
    """One subject, opened when the first metric is missing."""

    def __init__(self, job: Job):
        self.job, self.cache, self.options = job, job.cache, job.options
        self.sums = job.cache.sums
        self.weights = job.source.digest(self.sums) or f"not known, {uuid4().hex}"
        self._subject: Subject | None = None

    @property
    def subject(self) -> Subject:
        if self._subject is None:
            self._subject = self.job.source.open()
        return self._subject

    def outcome(self, one: Metric, made: Mapping[str, Outcome], *, wait: bool) -> Outcome | None:
        """Stored, or made; None where another process is at it, or at something that it needs."""
        if one.on == "model" and {each.name for each in self.job.metrics} & {*one.needs} - made.keys():
            return None
        needed = {
            name: (made[name],) if one.on == "model" else self.job.parts[name]
            for name in one.needs
            if name in (made if one.on == "model" else self.job.parts)
        }
        cell = self._cell(one, needed)
        if stored := self._stored(cell):
            return stored
        with self.cache.claim(cell, wait=wait) as mine:
            if not mine:
                return None
            if stored := self._stored(cell):
                return stored
            outcome = self._made(one, needed, cell)
            self.cache.put(cell, outcome)
        return outcome

    def _cell(self, one: Metric, needed: Needed) -> Cell:
        task = self._task(one)
        content = {
            "version": one.version, "settings": to_json(one.settings), "weights": self.weights, "task": task,
            "data": self.job.source.data_digest(task, self.sums), "packages": versions(),
            "seed": self.options.seed if KEY in one.needs else None,
            "of": {name: digest.of_json([each.content for each in parts]) for name, parts in needed.items()},
        }  # fmt: skip
        return Cell(one.name, self.job.source.id, content)

    def _task(self, one: Metric) -> str:
        return one.task or self.job.tasks[0]

    def _stored(self, cell: Cell) -> Outcome | None:
        if self.options.force:
            return None
        stored = self.cache.get(cell)
        again = stored is not None and not stored.ok and (stored.status != "failed" or self.options.retry_failed)
        return None if again else stored and replace(stored, step=self.job.source.step, group=self.job.source.group)

    def _made(self, one: Metric, needed: Needed, cell: Cell) -> Outcome:
        source = self.job.source
        empty = Outcome(
            one.name,
            source.id,
            source.step,
            self._task(one),
            "ok",
            settings=to_json(one.settings),
            content=cell.content,
            group=source.group,
        )
        if bad := [each for parts in needed.values() for each in parts if not each.ok]:
            return replace(empty, status="skipped", error=f"it needs {bad[0].metric}, which has no result.")
        started, meter = time.perf_counter(), Meter(self.options)
        plan = dict(one.plan)
        try:
            with watched(meter), MemoryLog(one.name, self.options):
                result, plan = self._called(one, needed, cell)
            unit = self.subject.loss(self._task(one)).criterion.unit if "loss" in one.needs else empty.unit
            outcome = replace(empty, result=result, plan=to_json(plan), unit=unit)
        except Exception as err:
            if not self.options.skip_on_error:
                raise
            outcome = replace(empty, **_told(err))
        cost = {"seconds": time.perf_counter() - started, "forwards": meter.forwards, "products": meter.products}
        return replace(outcome, cost=cost)

    def _called(self, one: Metric, needed: Needed, cell: Cell) -> tuple[Result, dict[str, Any]]:
        """The result, and the plan that it was made by: chunk, then batches halved as often as memory ran out."""
        drawn = {KEY: key(self.options.seed)} if KEY in one.needs else {}
        plan, size = dict(one.plan), None
        while True:
            needs: list[Any] | None = None
            value: Any = None
            try:
                needs = [self._need(name, one, needed, size) for name in one.needs if name != KEY]
                with torch.backends.cudnn.flags(benchmark=False, deterministic=self.options.deterministic):
                    value = one.call(*needs, **drawn, **one.settings, **plan)
                if not isinstance(value, Result) and hasattr(value, "rows"):
                    value = value.result(list(resumed(value, self.cache.path(cell))))
                return check_result(one, value), plan | ({} if size is None else {"batch_size": size})
            except (RuntimeError, MemoryError) as err:
                smaller = self._smaller(one, plan, size) if is_full(err) and not isinstance(err, Full) else None
                if smaller is None:
                    raise
            plan, size = smaller
            cleanup_memory()

    def _need(self, name: str, one: Metric, needed: Needed, size: int | None) -> Any:
        if name in needed:
            results = tuple(each.result for each in needed[name])
            return results[0] if one.on == "model" else results
        value = self.subject.need(name, self._task(one))
        return value.split(size) if name == "loss" and size is not None else value

    def _smaller(self, one: Metric, plan: dict[str, Any], size: int | None) -> tuple[dict[str, Any], int | None] | None:
        """Chunk and batches that are tried next where memory ran out; None where nothing is left."""
        chunk = plan.get("chunk", 1) or FIRST_CHUNK
        if chunk > 1:
            return {**plan, "chunk": chunk // 2}, size
        if "loss" not in one.needs:
            return None
        loss = self.subject.loss(self._task(one))
        now = loss.batch_size if size is None else size
        smaller = max(self.options.min_batch_size, now // 2)
        return (
            (plan, smaller) if smaller < now and loss.split(smaller).batch_size < loss.split(now).batch_size else None
        )


def _told(err: Exception) -> dict[str, Any]:
    status: Status = "timeout" if isinstance(err, Expired) else "out of memory" if is_full(err) else "failed"
    kind = type(err)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    lines = "".join(traceback.format_exception(err))
    return {"status": status, "error": str(err) or name, "error_type": name, "traceback": lines}


def _check_names(sources: Sequence[Source]) -> None:
    names = [source.id for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two subjects are called {name!r}: give one of them another name, `name=`.")
