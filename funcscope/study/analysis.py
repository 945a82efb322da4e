"""Runs analyzers over the checkpoints of a variant: resumable, safe to interrupt, safe to run twice at a time.

What is stored decides what is left to do. An artifact is reused where its settings, the analyzer's version and the
checkpoint are the same, and made again where not; a file that cannot be read is set aside under another name. Every file
appears whole or not at all. Several processes share the work: each takes the steps that nobody works on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..core.checks import check_params
from ..core.running import held_statistics
from ..core.store import Damaged, save, to_json
from ..families.family import Family
from ..families.family import family as registered
from .analyzer import Analyzer, Bench, Subject, Subjects, Values
from .files import claimed, set_aside
from .runs import CROSS, Variant, keep, read, settings_of


def analyse(
    variant: Variant,
    analyzers: Iterable[Analyzer],
    *,
    steps: Sequence[int] | None = None,
    quiet: bool = False,
) -> None:
    """Run each analyzer on the variant's checkpoints (those at `steps`, or those it looks at), and write summaries.

    Analyzers across checkpoints take all of them, whatever `steps` says. A checkpoint or an analyzer that fails stops no
    other.

    Raises ValueError for a family that is not registered or has no loss where one is needed, for steps without a checkpoint,
    and, after all others are done and stored, for checkpoints that could not be analysed.
    """
    work, failures = Work(variant), []
    for analyzer in analyzers:
        try:
            work.run(analyzer, steps, quiet)
        except Unanalysed as err:
            failures.append(str(err))
    if failures:
        raise Unanalysed(" ".join(failures))


class Unanalysed(ValueError):
    """Checkpoints that could not be analysed; everything else was, and is stored."""


def told(err: Exception) -> str:
    """An error in a line, with its kind where that says more than its text."""
    text = " ".join(str(err).split()).rstrip(".")
    return text if isinstance(err, (ValueError, ArithmeticError)) and text else f"{type(err).__name__}: {text}"


class Work:
    """One variant's analysis: its network and losses, made once."""

    def __init__(self, variant: Variant):
        self.variant = variant
        self.family: Family = registered(variant.family)
        self.bench = Bench.of(self.family, variant)
        self.subjects = Subjects(variant.checkpoints(), self.subject, variant.curves())
        self._sums: dict[int, str] = {}
        if not self.subjects.steps:
            raise ValueError(f"{variant.path} has no checkpoints: train it first (`funcscope train`).")

    def subject(self, step: int) -> Subject:
        """The checkpoint of a step. Raises ValueError for one of another architecture."""
        found = self.family.checkpoint(self.bench.config, self.variant.path, step)
        layout, buffers = self.bench.net.layout, found.buffers or {}
        check_params(found.params, layout.shapes, f"checkpoint {step}")
        if missing := sorted(held_statistics(self.bench.net).keys() - buffers.keys()):
            raise ValueError(
                f"checkpoint {step} lacks the running statistics `{missing[0]}`, and those of other weights would measure "
                f"another network: let the family {self.family.name!r} keep them, `Kept(params, sha256, buffers)`."
            )
        self._sums[step] = found.sha256
        return Subject(step, layout.ravel(found.params), self.bench, buffers)

    def run(self, analyzer: Analyzer, steps: Sequence[int] | None, quiet: bool) -> None:
        """One analyzer over its steps, then its summary."""
        if analyzer.needs_loss:
            self.bench.loss(analyzer.split)  # a family without one is told before any work
        if analyzer.across:
            self._across(analyzer)
            return
        chosen = self._chosen(analyzer.steps(self.subjects) if steps is None else steps)
        forward = _Forward(self.bench, analyzer)
        failed: dict[int, str] = {}
        bar = tqdm(chosen, desc=analyzer.name.replace("_", " "), unit="step", disable=quiet, dynamic_ncols=True)
        busy = [step for step in bar if not self._claimed(analyzer, step, forward, failed, wait=False)]
        for step in busy:  # taken by another process: it stored them, or it died and they are left
            self._claimed(analyzer, step, forward, failed, wait=True)
        if analyzer.summary_keys:
            self._summarise(analyzer)
        if failed and len(failed) == len(chosen) and len(set(failed.values())) == 1:
            raise Unanalysed(f"{analyzer.name}: {failed[chosen[0]]}. Nothing was stored.")
        if failed:
            reasons = "; ".join(f"step {step}: {why}" for step, why in list(failed.items())[:3])
            raise Unanalysed(
                f"{analyzer.name}: {len(failed)} of {len(chosen)} checkpoints could not be analysed ({reasons}). "
                "The others are stored; the summary has nan at these."
            )

    def _chosen(self, steps: Sequence[int]) -> list[int]:
        if missing := sorted(set(steps) - set(self.subjects.steps)):
            raise ValueError(f"no checkpoint at step {missing[0]}: there are {_listed(self.subjects.steps)}.")
        return sorted(set(steps))

    def _claimed(self, analyzer: Analyzer, step: int, forward: _Forward, failed: dict[int, str], *, wait: bool) -> bool:
        """Make a step's artifact unless it is there; False where another process is at it."""
        path = self.variant.artifact(analyzer.name, step)
        with claimed(path, wait=wait) as mine:
            if not mine:
                return False
            try:
                self._make(analyzer, step, path, forward)
            except Exception as err:  # of this checkpoint: it is told, and the others are analysed
                failed[step] = told(err)
        return True

    def _make(self, analyzer: Analyzer, step: int, path: Path, forward: _Forward) -> None:
        subject = self.subject(step)
        wanted = self._settings(analyzer, step)
        if (stored := _stored(path)) is not None and stored == wanted:
            return
        seconds = forward.seconds  # measured once, before the clock starts
        started = time.perf_counter()
        values = analyzer.analyze(subject, **analyzer.settings)
        spent = time.perf_counter() - started
        _check_summary(analyzer, values)
        keep(path, values, wanted)
        self._clock(path, step, spent, analyzer, seconds)

    def _settings(self, analyzer: Analyzer, step: int) -> dict[str, Any]:
        """Everything that an artifact depends on."""
        if step not in self._sums:
            self.subject(step)
        return {**self._common(analyzer), "step": step, "checkpoint": self._sums[step]}

    def _common(self, analyzer: Analyzer) -> dict[str, Any]:
        return to_json(
            {"analyzer": analyzer.name, "version": analyzer.version, **self.variant.head, "settings": analyzer.settings}
        )

    def _summarise(self, analyzer: Analyzer) -> None:
        """One row per checkpoint from what is stored with these settings, by whichever process; nan for the rest."""
        folder = self.variant.folder(analyzer.name)
        with claimed(folder / "summary.npz", wait=True):
            rows: dict[int, Values] = {}
            for step in self.variant.steps(analyzer.name):
                path = self.variant.artifact(analyzer.name, step)
                if self._is_current(analyzer, step, path):
                    rows[step] = analyzer.compute_summary(read(path))
            if rows:
                head = {**self._common(analyzer), **to_json(analyzer.described(self.bench))}
                save(
                    folder / "summary.npz",
                    stacked(self.subjects.steps, rows, analyzer.summary_keys),
                    {"settings": head},
                )

    def _is_current(self, analyzer: Analyzer, step: int, path: Path) -> bool:
        """Was the artifact made with these settings from the checkpoint that is there?"""
        try:
            return step in self.subjects.steps and _stored(path) == self._settings(analyzer, step)
        except (ValueError, FileNotFoundError):  # the checkpoint cannot be read: nothing is known of it
            return False

    def _across(self, analyzer: Analyzer) -> None:
        path = self.variant.folder(analyzer.name) / CROSS
        with claimed(path, wait=True):
            try:
                sums = {str(step): self._settings(analyzer, step)["checkpoint"] for step in self.subjects.steps}
                wanted = {**self._common(analyzer), "checkpoints": sums}
                if _stored(path) == wanted:
                    return
                started = time.perf_counter()
                values = analyzer.analyze(self.subjects, **analyzer.settings)
            except Exception as err:
                raise Unanalysed(f"{analyzer.name} could not be made across the checkpoints ({told(err)}).") from err
            spent = time.perf_counter() - started
            keep(path, values, wanted)
            self._clock(path, None, spent, analyzer, _Forward(self.bench, analyzer).seconds)

    @staticmethod
    def _clock(path: Path, step: int | None, spent: float, analyzer: Analyzer, forward: float | None) -> None:
        entry = {
            "step": step, "seconds": spent, "forwards": analyzer.forwards(analyzer.settings),
            "forward_seconds": forward, "threads": torch.get_num_threads(),
        }  # fmt: skip
        _append(path.with_name("times.jsonl"), json.dumps(entry))


class _Forward:
    """Seconds of one forward pass over the data of an analyzer's loss: the median of three, when first asked."""

    def __init__(self, bench: Bench, analyzer: Analyzer):
        self.bench, self.split = bench, analyzer.split if analyzer.needs_loss else None

    @cached_property
    def seconds(self) -> float | None:
        """None for what takes no loss."""
        if self.split is None:
            return None
        loss, params = self.bench.loss(self.split), self.bench.net.params
        return median(self._one(loss, params) for _ in range(3))

    @staticmethod
    @torch.no_grad()
    def _one(loss: Any, params: Any) -> float:
        started = time.perf_counter()
        loss(params)
        return time.perf_counter() - started


def stacked(steps: Sequence[int], rows: dict[int, Values], keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns over all steps; a key's rows are nan where a step has none.

    >>> stacked([0, 5], {5: {"x": 2.0}}, ["x"])
    {'step': array([0, 5]), 'x': array([nan,  2.])}
    """
    columns: dict[str, np.ndarray] = {"step": np.array(steps)}
    for key in keys:
        shape = np.shape(next(iter(rows.values()))[key])
        columns[key] = np.full((len(steps), *shape), np.nan)
        for i, step in enumerate(steps):
            if step in rows:
                columns[key][i] = rows[step][key]
    return columns


def _stored(path: Path) -> dict[str, Any] | None:
    """The settings of a stored artifact; a file that cannot be read is set aside, nothing is deleted."""
    try:
        return settings_of(path)
    except FileNotFoundError:
        return None
    except Damaged as err:
        set_aside(path, err)
        return None


def _check_summary(analyzer: Analyzer, values: Values) -> None:
    row = analyzer.compute_summary(values)
    if set(row) != set(analyzer.summary_keys):
        raise TypeError(
            f"`compute_summary` of {analyzer.name} gives {sorted(row)}, "
            f"its `summary_keys` are {sorted(analyzer.summary_keys)}."
        )


def _append(path: Path, line: str) -> None:
    """One line at the end of a file, in one write."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(handle, f"{line}\n".encode())
    finally:
        os.close(handle)


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) if len(steps) <= 8 else f"{len(steps)}, from {steps[0]} to {steps[-1]}"
