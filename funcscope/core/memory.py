"""Memory of the process: what is freed and still held, and how much a call takes."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def hand_back() -> None:
    """Give freed memory back to the system, where the allocator offers that (glibc).

    Leaves that are made a few rows at a time leave holes of all sizes in the heap: some hundred MiB that the process would
    otherwise count as its own.

    >>> hand_back()
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent in musl
        if trim is not None:
            trim(0)


def without_holes() -> None:
    """Have the allocator (glibc's) take numbers of 1 MiB and more from the system and give them back at once, from here on.

    By itself it keeps what was freed for the next one of that size. Temporary tensors of many sizes beside small ones that
    stay leave holes of all sizes then: several times what is in use.
    """
    if sys.platform == "linux":
        tune = getattr(ctypes.CDLL(None), "mallopt", None)
        if tune is not None:
            tune(-3, 1 << 20)  # M_MMAP_THRESHOLD


def peak_growth(call: Callable[[], T]) -> tuple[T, float]:
    """What a call gives, and the MiB by which the process is larger at its peak during the call than before it.

    That of Linux's resident set; nan where the system does not tell. What other threads do meanwhile is counted, too.

    >>> value, grown = peak_growth(lambda: bytearray(1 << 26)[0])
    >>> value, grown != grown or grown > 32
    (0, True)
    """
    if not _restarted():
        return call(), math.nan
    hand_back()  # what is held and free would be used first, and not be counted
    _restarted()
    before = _resident("VmRSS")
    value = call()
    return value, max(0.0, _resident("VmHWM") - before)


def highest_gb() -> float:
    """The most GB that torch has had from the current device at once; on the CPU the most that the process has held.

    Since the process began, or since `restart_highest`; nan where the system does not tell.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        return _resident("VmHWM") * 2**20 / 1e9
    except (OSError, StopIteration):
        return math.nan


def restart_highest() -> None:
    """Have `highest_gb` begin with what is held, where the system offers that."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        _restarted()


def _restarted() -> bool:
    """Whether the peak of the resident set starts anew, as Linux can have it."""
    reset = Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        return False
    reset.write_text("5")
    return True


def _resident(field: str) -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
