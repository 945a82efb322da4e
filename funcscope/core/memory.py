"""Memory that has been freed and that the allocator still holds."""

from __future__ import annotations

import ctypes
import sys


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
