"""A progress bar around any call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from tqdm.auto import tqdm

from ..core.progress import Kind, watched

_SHOWN: ContextVar[bool] = ContextVar("shown", default=False)


@dataclass
class Counts:
    """What was evaluated so far inside `progress`."""

    forwards: int = 0
    """Forward passes of one batch at one point, those of gradients included."""
    products: int = 0
    """Products of an operator with one vector."""

    def add(self, kind: Kind, num: int) -> None:
        if kind == "forward":
            self.forwards += num
        else:
            self.products += num


@contextmanager
def progress(*, total: int | None = None, quiet: bool = False) -> Iterator[Counts]:
    """A bar that counts the forward passes and products of whatever runs inside; yields the counts.

    total: how many of both there will be, where that is known (`num_forwards`, `num_matvecs` of an earlier result): the
    bar then says how long it will take. quiet: counts only, no bar; so does an inner one of two. On the terminal and in
    notebooks; threads that are started inside are not seen.

    >>> import torch
    >>> from funcscope.core import criterion, model, objective
    >>> net = model.functional(torch.nn.Linear(3, 2))
    >>> loss = objective.objective(net, (torch.eye(3), torch.tensor([0, 1, 0])), criterion.classification)
    >>> with progress(quiet=True) as counts:
    ...     _ = loss(net.theta), loss(net.theta)
    >>> counts
    Counts(forwards=2, products=0)
    """
    counts, hidden = Counts(), quiet or _SHOWN.get()
    token = _SHOWN.set(not hidden or _SHOWN.get())
    try:
        with tqdm(total=total, disable=hidden, unit=" evaluations", dynamic_ncols=True) as bar:

            def count(kind: Kind, num: int) -> None:
                counts.add(kind, num)
                bar.set_postfix(forwards=counts.forwards, products=counts.products, refresh=False)
                bar.update(num)

            with watched(counts.add if hidden else count):
                yield counts
    finally:
        _SHOWN.reset(token)
