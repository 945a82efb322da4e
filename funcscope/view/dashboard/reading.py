"""What the panels read: one file per question, kept as long as the file stays as it is.

A file is known by its path, its time of change and its size: a run that is still being written shows itself on the next
look, and moving to and fro over steps reads nothing twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from ...families.phases import GENERAL, MEMORISED
from ...study.analyzer import Subjects
from ...study.analyzers import ANALYZERS
from ...study.runs import CROSS, Variant, summarised

KEPT = 64
"""Files of each sort that are kept in memory."""

Stamp = tuple[int, int]


class Summary(NamedTuple):
    arrays: dict[str, np.ndarray]
    settings: dict[str, Any]


class Cost(NamedTuple):
    """Run time of one analyzer on one variant; seconds, nan where nothing is known."""

    analyzer: str
    stored: int
    total: int
    """Checkpoints that the analyzer looks at unless told; 0 where its result is one for the whole run."""
    expected: float
    """Seconds per checkpoint, were the forward passes all: their number times the seconds of one."""
    actual: float
    """Median seconds per checkpoint."""
    spent: float
    left: float
    """Seconds for the checkpoints without an artifact, at the median."""


def curves(variant: Variant) -> dict[str, np.ndarray] | None:
    """Losses and accuracies over training, or None."""
    stamp = _stamp(variant.path / "curves.npz")
    return _curves(variant, stamp) if stamp else None


def summary(variant: Variant, analyzer: str) -> Summary | None:
    """One row per step, and the settings; None where it was not written yet."""
    stamp = _stamp(variant.folder(analyzer) / "summary.npz")
    return _summary(variant, analyzer, stamp) if stamp else None


def cross(variant: Variant, analyzer: str) -> dict[str, Any] | None:
    """What concerns all checkpoints together, or None."""
    stamp = _stamp(variant.folder(analyzer) / CROSS)
    return _cross(variant, analyzer, stamp) if stamp else None


def artifact(variant: Variant, analyzer: str, step: int) -> dict[str, Any] | None:
    """The numbers of one step, or None where it has none."""
    stamp = _stamp(variant.artifact(analyzer, step))
    return _artifact(variant, analyzer, step, stamp) if stamp else None


def steps(variant: Variant) -> tuple[int, ...]:
    """Steps with an artifact of any analyzer; the checkpoints where there is none."""
    stored = {step for analyzer in variant.analyzers() for step in variant.steps(analyzer)}
    return tuple(sorted(stored)) or variant.checkpoints()


def nearest(among: tuple[int, ...], step: int) -> int:
    """The step that lies nearest, the earlier one of two.

    >>> nearest((0, 100, 200), 160), nearest((0, 100, 200), 150)
    (200, 100)
    """
    return min(among, key=lambda each: (abs(each - step), each))


class Phase(NamedTuple):
    name: str
    """`memorising`, `generalising`, or empty."""
    train: float
    test: float
    """Accuracies; nan where the curves do not reach."""


def phase(measured: Mapping[str, np.ndarray] | None, step: int) -> Phase:
    """What the curves say of a step: memorising is train accuracy above .99 with test accuracy below .5,
    generalising is both above .99.

    >>> flat = {"step": np.array([0, 9]), "train_accuracy": np.ones(2), "test_accuracy": np.array([0.1, 1.0])}
    >>> phase(flat, 5).name, phase(flat, 9).name, phase(None, 9).name
    ('memorising', 'generalising', '')
    """
    row = -1 if measured is None else int(np.searchsorted(measured["step"], step, side="right")) - 1
    if measured is None or row < 0:
        return Phase("", math.nan, math.nan)
    train, test = float(measured["train_accuracy"][row]), float(measured["test_accuracy"][row])
    name = (
        "" if not train > MEMORISED else "memorising" if test < GENERAL else "generalising" if test > MEMORISED else ""
    )
    return Phase(name, train, test)


def phases(measured: Mapping[str, np.ndarray] | None, among: tuple[int, ...]) -> tuple[int, int]:
    """The last step that memorises, or the first one where none does; and the last one."""
    memorising = [step for step in among if phase(measured, step).name == "memorising"]
    return (memorising or among)[-1 if memorising else 0], among[-1]


def cost(variant: Variant, analyzer: str) -> Cost:
    """What an analyzer took and may still take. A step that was analysed again counts once, with its last entry."""
    times = {entry.get("step"): entry for entry in variant.times(analyzer)}
    seconds = [float(entry.get("seconds", math.nan)) for entry in times.values()]
    forwards = [
        float(e.get("forwards") or math.nan) * float(e.get("forward_seconds") or math.nan) for e in times.values()
    ]
    stored = _current(variant, analyzer)
    wanted = {*stored, *planned(variant, analyzer)}
    actual = _median(seconds)
    missing = len(wanted) - len(stored)
    spent = math.fsum(each for each in seconds if math.isfinite(each)) if seconds else math.nan
    return Cost(
        analyzer, len(stored), len(wanted), _median(forwards), actual, spent, missing * actual if missing else 0.0
    )


def _current(variant: Variant, analyzer: str) -> tuple[int, ...]:
    """Steps that are stored with the settings of the summary: those that have a row in it."""
    stored = variant.steps(analyzer)
    try:
        found = summary(variant, analyzer)
    except (ValueError, OSError):
        return stored
    if found is None or len(found.arrays) < 2:
        return stored
    return tuple(sorted({*stored} & {*summarised(found.arrays)}))


def planned(variant: Variant, analyzer: str) -> tuple[int, ...]:
    """The checkpoints that an analyzer looks at unless told; none for one across checkpoints, or one we do not know."""
    one, kept = ANALYZERS.get(analyzer), variant.checkpoints()
    if one is None or one.across or not kept:
        return ()
    return tuple(one.steps(Subjects(kept, _unread, measured(variant))))


def _unread(step: int) -> Any:
    raise ValueError(f"the dashboard opens no checkpoint (step {step}).")


def measured(variant: Variant) -> dict[str, np.ndarray] | None:
    """The curves where they can be read and have accuracies: what tells the phases apart."""
    try:
        found = curves(variant)
    except (ValueError, OSError):
        return None
    return found if found and {"step", "train_accuracy", "test_accuracy"} <= found.keys() else None


def _median(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return median(finite) if finite else math.nan


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size


@lru_cache(KEPT)
def _curves(variant: Variant, _: Stamp) -> dict[str, np.ndarray] | None:
    return variant.curves()


@lru_cache(KEPT)
def _summary(variant: Variant, analyzer: str, _: Stamp) -> Summary | None:
    arrays = variant.summary(analyzer)
    return None if arrays is None else Summary(arrays, variant.settings(analyzer))


@lru_cache(KEPT)
def _artifact(variant: Variant, analyzer: str, step: int, _: Stamp) -> dict[str, Any]:
    values, settings = variant.opened(analyzer, step)
    return values | {"made_with": settings}


@lru_cache(KEPT)
def _cross(variant: Variant, analyzer: str, _: Stamp) -> dict[str, Any] | None:
    return variant.cross(analyzer)
