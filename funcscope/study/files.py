"""Files that several processes make: the right to write one, and what is done with one that cannot be read."""

from __future__ import annotations

import glob
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
    lock = FileLock(locks / f"{path.name}.lock", timeout=-1 if wait else 0)
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        yield False
        return
    except OSError:  # nothing can be written here, which is said by whoever does
        yield True
        return
    try:
        for half in path.parent.glob(f".{glob.escape(path.stem)}.*.tmp"):  # its rows among them
            half.unlink(missing_ok=True)
        yield True
    finally:
        lock.release()


def set_aside(path: Path, reason: object) -> None:
    """Another name for a file that cannot be used: it is made again, and nothing is deleted."""
    taken = len(list(path.parent.glob(f"{path.name}.unreadable*")))
    aside = path.with_name(f"{path.name}.unreadable{taken or ''}")
    try:
        path.replace(aside)
    except FileNotFoundError:  # another process was faster
        return
    except OSError as err:
        reason = f"{reason} It could not be renamed: {err}"
    warnings.warn(f"{path} could not be read and is now {aside.name}: it is made again ({reason}).", stacklevel=3)
