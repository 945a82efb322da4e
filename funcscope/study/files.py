"""Files that several processes make: the right to write one, and what is done with one that cannot be read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """The sole right to write a file, given up when the process ends, however it ends; what was left half written goes.

    False where another process has it and this one does not wait.
    """
    locks = path.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{path.name}.lock", timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        for half in path.parent.glob(f".{path.name}.*.tmp"):
            half.unlink(missing_ok=True)
        yield True
    finally:
        lock.release()


def set_aside(path: Path, reason: object) -> None:
    """Another name for a file that cannot be used: it is made again, and nothing is deleted."""
    taken = len(list(path.parent.glob(f"{path.name}.unreadable*")))
    aside = path.with_name(f"{path.name}.unreadable{taken or ''}")
    path.replace(aside)
    warnings.warn(f"{path} could not be read and is now {aside.name}: it is made again ({reason}).", stacklevel=3)
