"""How a study runs and what its metrics use: options, counts, the clock, memory."""

from __future__ import annotations

import gc
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..core.keys import Key, Stream, key
from ..core.memory import hand_back, highest_gb, restart_highest
from ..core.progress import Kind


@dataclass(frozen=True)
class Options:
    """How a study runs; of these only the seed and the stream of draws are part of what a number is."""

    deterministic: bool = True
    """Of cuDNN, inside metrics."""
    seed: int = 42
    """Of all draws: each metric is given `fs.key(seed)`."""
    stream: Stream = "cpu"
    """The stream of that key: "device" draws where the weights are, and its normal numbers are others."""
    force: bool = False
    """Make everything again, whatever is stored."""
    retry_failed: bool = False
    """Try again what failed before; what ran out of time or memory is always tried again."""
    skip_on_error: bool = True
    """A metric that fails is an outcome, and the others go on. Otherwise its error ends the study."""
    timeout_seconds: float | None = None
    """For one metric on one subject, after the model is opened. On the main thread of a process it ends any Python code; on
    others it is looked at before every forward pass and product."""
    hard_timeout: bool = False
    """Each metric in a process of its own, which is killed: calls into C that never return, too. The model is opened there;
    what cannot be pickled stays here. `plan["timeout"]` of an outcome says which of the three it was."""
    min_batch_size: int = 4
    """The smallest batch of sequences that is tried where memory runs out."""
    max_memory_gb: float | None = None
    """Of the process, or of the device's allocator. A metric that is above it is made again with less at a time, as long as
    there is less, and ends as out of memory then. Looked at before every forward pass and product; a peak between two of
    them is said in `plan["peak"]` of the outcome."""
    cleanup: bool = True
    """Empty the device's cache after every metric. On the CPU garbage is collected and freed memory given back where memory
    ran out, and before a metric where more than half of `max_memory_gb` is in use."""
    log_memory: bool = False

    @property
    def key(self) -> Key:
        """What metrics that draw are given."""
        return key(self.seed, stream=self.stream)


class Expired(BaseException):
    """The time for a metric is over; no `except Exception` in a metric holds it."""


class Full(MemoryError):
    """More memory is in use than was allowed."""


class Meter:
    """Counts what a metric evaluates, and ends it where its time or memory is over."""

    def __init__(self, options: Options):
        self.forwards = self.products = 0
        self.options, self.started = options, time.monotonic()
        self.looked = -LOOK_EVERY
        most = options.max_memory_gb
        if most is not None and memory_gb() > most / 2:
            cleanup_memory()
        self.before = memory_gb()
        if most is not None and highest_gb() > most:  # of what came before
            restart_highest()

    def __call__(self, kind: Kind, num: int) -> None:
        if kind == "forward":
            self.forwards += num
        else:
            self.products += num
        limit, most, since = self.options.timeout_seconds, self.options.max_memory_gb, time.monotonic() - self.started
        if limit is not None and since > limit:
            raise Expired(over(limit))
        if most is not None and since - self.looked >= LOOK_EVERY:
            self.looked = since
            self._look(most)

    def _look(self, most: float) -> None:
        if memory_gb() <= most:
            return
        hand_back()  # what is freed and still held by the allocator is in nobody's use
        if (used := memory_gb()) > most:
            raise Full(
                f"{_above(used, most)} GB are in use, {self.before:.2f} GB of them since before the metric began; "
                f"the memory limit is {most:g} GB. Allow more by `max_memory_gb`, or pass a smaller `batch_size` or shorter "
                "sequences."
            )

    @property
    def exceeded(self) -> str:
        """What is said of a peak that was above what is allowed."""
        most = self.options.max_memory_gb
        if most is None or not (peak := highest_gb()) > most:
            return ""
        return f"{_above(peak, most)} GB in use, above the memory limit of {most:g} GB"


def _above(used: float, most: float) -> str:
    """A number with as many digits as it takes to be above another."""
    return next(text for digits in range(2, 20) if float(text := f"{used:.{digits}f}") > most)


LOOK_EVERY = 0.01
"""Seconds between two looks at the memory in use, which cost more than a pass of a small model."""


def over(limit: float | None) -> str:
    """What is said where the time of a metric is over."""
    return f"not done after {limit:g} s: pass a larger `timeout_seconds`, or ask for less."


@contextmanager
def alarm(limit: float | None) -> Iterator[str]:
    """Ends what runs inside after so many seconds, wherever Python is, and says `signal`; `cooperative` where it cannot.

    An alarm that was set before goes on afterwards, with the time that it had.
    """
    if limit is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield "" if limit is None else "cooperative"
        return

    def ring(*_: object) -> None:
        raise Expired(over(limit))

    before, earlier = signal.signal(signal.SIGALRM, ring), signal.setitimer(signal.ITIMER_REAL, max(limit, 1e-6))
    try:
        try:
            yield "signal"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, *earlier)


def memory_gb() -> float:
    """GB that torch has allocated on the current device; on the CPU what the process holds."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e9
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e9
    except OSError:  # no /proc: the most that it ever held
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


_FULL = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""What torch's allocators and libraries say in errors of a general kind."""


def is_full(err: BaseException) -> bool:
    """Whether memory ran out."""
    said = str(err).lower()
    return isinstance(err, (MemoryError, torch.OutOfMemoryError)) or any(words in said for words in _FULL)


def cleanup_memory(verbose: bool = False, reason: str = "") -> None:
    """Collect garbage, give freed memory back, empty the device's cache. verbose: print what is in use afterwards."""
    gc.collect()
    hand_back()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    if verbose:
        tqdm.write(_memory_line(reason or "cleanup"), file=sys.stderr)


class MemoryLog:
    """The documented lines about memory before and after a metric, where they are asked for; cleans up after it."""

    def __init__(self, name: str, options: Options):
        self.name, self.options = name, options

    def __enter__(self) -> None:
        self._say("Before")

    def __exit__(self, *_: object) -> None:
        self._say("After")
        if self.options.cleanup and torch.cuda.is_available():
            cleanup_memory()

    def _say(self, when: str) -> None:
        if self.options.log_memory:
            tqdm.write(_memory_line(f"{when} {self.name}"), file=sys.stderr)


def _memory_line(when: str) -> str:
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return f"[GPU Memory] {when}: {memory_gb():.1f}GB allocated, {free / 1e9:.1f}GB free"
    return f"[Memory] {when}: {memory_gb():.1f}GB in use"
