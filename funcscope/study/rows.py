"""Rows of an unfinished metric, on disk: what is interrupted goes on from what it has."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.store import Damaged, Outdated, load, save, to_json
from .cache import ROWS

KEEP_EVERY = 10.0
"""Seconds between two copies of unfinished rows on disk."""


def resumed(sampling: Any, path: Path | None) -> Iterator[dict[str, Tensor]]:
    """The rows that an earlier call has left, then new ones; all are on disk when this is interrupted.

    A disk that is full costs no more than the rows: they are made again by whoever goes on.
    """
    part = None if path is None else path.with_suffix(ROWS)
    plan = to_json(getattr(sampling, "plan", None))
    rows = _left(part, plan)
    yield from rows
    done, saved = sum(len(next(iter(row.values()))) for row in rows), time.monotonic()
    try:
        for row in sampling.rows(done):
            rows.append(row)
            yield row
            if part is not None and time.monotonic() - saved > KEEP_EVERY:
                _keep(part, rows, plan)
                saved = time.monotonic()
    except BaseException:
        if part is not None and rows:
            _keep(part, rows, plan)
        raise


def _left(part: Path | None, plan: Any) -> list[dict[str, Tensor]]:
    try:
        stored = None if part is None else load(part)
    except (FileNotFoundError, Damaged, Outdated):
        return []
    if stored is None or stored.meta != {"plan": plan}:
        return []
    return [{name: torch.from_numpy(column) for name, column in stored.arrays.items()}]


def _keep(part: Path, rows: list[dict[str, Tensor]], plan: Any) -> None:
    columns = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    try:
        save(part, columns, {"plan": plan}, copy=False)
    except OSError as err:
        warnings.warn(f"the rows that are done could not be stored: {err}", stacklevel=2)
