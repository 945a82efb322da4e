"""What tells weights and data apart by their content. Sums of files are remembered by size and time of change."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from ..core.content import of_tensors
from ..core.pack import pack
from ..core.store import to_json, write
from .files import claimed

TICK = 50_000_000
"""Nanoseconds within which two changes of a file may have one time."""


class Sums:
    """SHA-256 of files; those that have the size, times and place of before are not read again.

    A file that changed just before is read each time: it may change again within one tick of its clock.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "a"
    ...     _ = file.write_text("abc")
    ...     Sums(Path(folder) / "sums.json").of(file)[:8]
    'ba7816bf'
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._known: dict[str, list[Any]] = self._read()

    def of(self, file: Path) -> str:
        """The sum of one file."""
        name, stat = str(file.resolve()), file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self._known.get(name)
        if known and known[:4] == stamp:
            return known[4]
        with file.open("rb") as content:
            total = hashlib.file_digest(content, "sha256").hexdigest()
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > TICK:
            self._known[name] = [*stamp, total]
            self._write()
        return total

    def _write(self) -> None:
        if self.path is not None:
            with suppress(OSError), claimed(self.path, wait=True):  # where nothing can be written, files are read again
                write(self.path, json.dumps(self._read() | self._known).encode())

    def _read(self) -> dict[str, list[Any]]:
        try:
            known = json.loads(self.path.read_text()) if self.path is not None else {}
        except (OSError, ValueError):  # no sums, or half of them: they are taken again
            return {}
        return {name: row for name, row in known.items() if isinstance(row, list) and len(row) == 5}


def of_files(files: Iterable[Path], sums: Sums) -> str:
    """One sum over the names and contents of files, wherever they are."""
    return of_json([[file.name, sums.of(file)] for file in files])


def of_json(value: Any) -> str:
    """The sum of anything that JSON can say, whatever the order of its names."""
    return hashlib.sha256(json.dumps(to_json(value), sort_keys=True).encode()).hexdigest()


def identity(value: Any) -> Any:
    """What a setting is, for JSON: what differs is kept apart, and what cannot be known, as a function, equals nothing.

    >>> identity({"span": float("inf"), "steps": (1, 2)}), identity(None), identity(len) == identity(len)
    ({'span': {'float': 'inf'}, 'steps': [1, 2]}, None, False)
    """
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: identity(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return [identity(each) for each in value]
    if isinstance(value, np.generic):
        return identity(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    try:
        arrays, tree = pack(value)
        return {"packed": tree, "of": of_tensors(map(torch.as_tensor, arrays.values()))}
    except (TypeError, ValueError):
        return {"not known": uuid4().hex}
