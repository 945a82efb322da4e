"""Where outcomes are kept: one file each, named by what went in. The one thing that decides what may be used again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from ..core.pack import Packed, unpack
from ..core.result import Result
from ..core.store import Damaged, Outdated, load, save, to_json
from . import digest
from .digest import Sums
from .files import claimed, set_aside
from .record import file_stem

ROWS = ".rows.npz"
"""How the file of unfinished rows ends, beside that of its cell."""
Status = Literal["ok", "failed", "timeout", "out of memory", "skipped"]


@dataclass(frozen=True)
class Cell:
    """One metric on one subject with everything that its numbers depend on."""

    metric: str
    subject: str
    """Its name, for people: two subjects of one name have different contents below, and never share a cell."""
    content: dict[str, Any]
    """Version and settings of the metric, seed, digests of weights and data, packages."""

    @property
    def name(self) -> str:
        return f"{self.metric}-{digest.of_json([self.metric, self.content])[:20]}"


@dataclass(frozen=True)
class Outcome:
    """What came of one metric on one subject: a result, or the reason why there is none."""

    metric: str
    subject: str
    step: int | None
    task: str
    status: Status
    result: Result | None = None
    error: str = ""
    error_type: str = ""
    traceback: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    """What it was made with beside its settings, after halving where memory ran out."""
    cost: dict[str, float] = field(default_factory=dict)
    """`seconds`, `forwards` and `products`."""
    content: dict[str, Any] = field(default_factory=dict)
    """That of its cell."""
    unit: str = "loss"
    """Of the loss."""
    group: str = ""
    """The training run that the subject is of."""
    reused: bool = False

    def in_unit(self, unit: str) -> str:
        """A quantity's unit with that of this loss, in the characters of print."""
        named = self.unit + unit.removeprefix("loss") if unit.startswith("loss") else unit
        return named.replace("^2", "²")

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def reason(self) -> str:
        """Why there is no result; with the kind of the error, where the metric failed and is not ended."""
        kind = self.error_type.rpartition(".")[2] if self.status == "failed" else ""
        return f"{kind}: {self.error}".strip(": ")


def plain(outcome: Outcome) -> dict[str, Any]:
    """What is said of an outcome beside its result and what went in."""
    return {each.name: getattr(outcome, each.name) for each in fields(Outcome) if each.name not in _APART}


_APART = ("result", "reused", "content")


@dataclass(frozen=True, eq=False)
class Cache:
    """Outcomes under a folder, `root/SUBJECT/METRIC-HASH.npz`; with None for a root nothing is kept.

    Files are checked when they are read: one that is damaged, or not ours, is set aside and made again. Several processes
    may share a folder. max_mb: above it, the outcomes that were not used for the longest time go.
    """

    root: Path | None
    max_mb: float | None = None

    @property
    def sums(self) -> Sums:
        return Sums(None if self.root is None else self.root / "sums.json")

    def path(self, cell: Cell) -> Path | None:
        return None if self.root is None else self.root / _folder(cell.subject) / f"{cell.name}.npz"

    def get(self, cell: Cell) -> Outcome | None:
        """What is stored of this cell."""
        path = self.path(cell)
        if path is None or not path.is_file():
            return None
        try:
            stored = load(path)
            meta, known = stored.meta, to_json(cell.content)
            if meta["content"] != known:
                raise Damaged(f"{path} belongs to other contents.")
            known_outcome = {**meta["outcome"], "content": cell.content, "reused": True}
            outcome = Outcome(**known_outcome)
        except FileNotFoundError:  # another process made room
            return None
        except (Damaged, Outdated, KeyError, TypeError) as err:
            set_aside(path, err)
            return None
        try:
            result = None if (tree := meta["result"]) is None else unpack(Packed(dict(stored.arrays), tree))
        except (
            ValueError
        ):  # of a class that is not imported, or has other fields: made again, and until then left alone
            return None
        with suppress(OSError):
            os.utime(path)  # used: the last to go
        return replace(outcome, result=result)

    def put(self, cell: Cell, outcome: Outcome) -> None:
        """Store an outcome, whole or not at all; the rows of one that is finished go. Raises OSError where it cannot."""
        path, result = self.path(cell), outcome.result
        if path is None:
            return
        meta = {"content": cell.content, "outcome": plain(outcome), "result": None if result is None else result.meta()}
        save(path, {} if result is None else result.arrays(), meta, copy=False, sync=False)
        if outcome.status in ("ok", "failed"):
            path.with_suffix(ROWS).unlink(missing_ok=True)
        self._shrink(keep=path)

    @contextmanager
    def claim(self, cell: Cell, *, wait: bool) -> Iterator[bool]:
        """The sole right to make a cell; given up when the process ends, however it ends. False where another has it."""
        path = self.path(cell)
        if path is None:
            yield True
            return
        with claimed(path, wait=wait) as mine:
            yield mine

    def entries(self) -> list[Path]:
        """The files of all outcomes, those of unfinished ones among them."""
        return [] if self.root is None else sorted(self.root.glob("*/*.npz"))

    def get_stats(self) -> dict[str, int | float]:
        """`num_entries` and `total_size_mb`, as documented."""
        sizes = [size for _, size, _ in self._files()]
        return {"num_entries": len(sizes), "total_size_mb": sum(sizes) / 2**20}

    def _files(self) -> list[tuple[int, int, Path]]:
        """Time of use, size and path of every file, the oldest first; other processes may remove some meanwhile."""
        files = []
        for path in self.entries():
            with suppress(FileNotFoundError):
                stat = path.stat()
                files.append((stat.st_mtime_ns, stat.st_size, path))
        return sorted(files)

    def clear_model_cache(self, subject: str) -> None:
        """Remove what is stored of one subject; nothing where nothing is."""
        if self.root is not None:
            shutil.rmtree(self.root / _folder(subject), ignore_errors=True)

    def clear_all(self) -> None:
        """Remove every outcome."""
        for folder in {path.parent for path in self.entries()}:
            shutil.rmtree(folder, ignore_errors=True)

    def _shrink(self, keep: Path) -> None:
        if self.max_mb is None:
            return
        files = self._files()
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total > self.max_mb * 2**20 and path != keep:
                path.unlink(missing_ok=True)
                total -= size


def _folder(subject: str) -> str:
    """The last part of the name, to be found by, and what tells it from others that end alike."""
    return f"{file_stem(Path(subject).name)}-{digest.of_json(subject)[:8]}"
