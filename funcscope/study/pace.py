"""How long a forward pass takes, how long a study will, and whether threads only wait for each other."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from ..core.objective import Loss, Theta

SLOWER = 3.0
"""A pass on all threads that takes so many times what it takes on one is waiting for threads that do not run."""


class Pace(NamedTuple):
    """How long a forward pass takes."""

    seconds: float
    alone: float
    """The same on one thread."""
    threads: int

    @property
    def note(self) -> str:
        """What to do where threads only wait for each other; empty where they do not."""
        if self.seconds < SLOWER * self.alone:
            return ""
        return (
            f"a forward pass takes {self.seconds:.2g} s on {self.threads} threads and {self.alone:.2g} s on one: other "
            "programs use the cores, and threads wait for each other. Start with OMP_NUM_THREADS=1 in the environment."
        )

    def estimate(self, num: int, what: str, passes: int) -> str:
        """How long `num` evaluations take, each as long as so many forward passes.

        >>> Pace(0.5, 0.5, 1).estimate(50, "products", 6)
        'about 50 products, each some 6 forward passes of 0.5 s: 150 s'
        """
        what = what.removesuffix("s") if num == 1 else what
        each = f"about {num} {what}, each some {passes} forward passes of {self.seconds:.2g} s"
        return f"{each}: {duration(num * passes * self.seconds)}"


@torch.no_grad()
def pace_of(loss: Loss, theta: Theta) -> Pace:
    """A forward pass, timed on all threads and on one; the first, which pays for what torch sets up, is not timed."""
    loss(theta)
    seconds, threads = _timed(loss, theta), torch.get_num_threads()
    if threads == 1 or loss.net.device.type != "cpu":
        return Pace(seconds, seconds, threads)
    torch.set_num_threads(1)
    try:
        return Pace(seconds, _timed(loss, theta), threads)
    finally:
        torch.set_num_threads(threads)


def duration(seconds: float) -> str:
    """A time in the unit that suits it.

    >>> duration(0.2), duration(150.0), duration(900.0), duration(9000.0)
    ('1 s', '150 s', '15 minutes', '2.5 hours')
    """
    if seconds < 180:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _timed(loss: Loss, theta: Theta) -> float:
    started = time.perf_counter()
    float(loss(theta))
    return time.perf_counter() - started
