"""Forward passes and products, told to whoever watches at the place where they happen: no metric knows of it.

Nothing is printed here, and without a watcher a tick is one look at an empty tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Kind = Literal["forward", "product"]
Watcher = Callable[[Kind], object]

_WATCHERS: ContextVar[tuple[Watcher, ...]] = ContextVar("watchers", default=())


def tick(kind: Kind) -> None:
    """One forward pass of one batch, or one product of an operator with one vector, is about to be computed."""
    for watcher in _WATCHERS.get():
        watcher(kind)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Inside, `watcher` is called at every tick of this thread; an exception that it raises ends the computation.

    A pass that `vmap` runs for several points or sequences is one tick, as is one that is differentiated; products of
    `hessian_difference` are two, one for each gradient.

    >>> seen = []
    >>> with watched(seen.append):
    ...     tick("forward")
    >>> tick("forward")
    >>> seen
    ['forward']
    """
    token = _WATCHERS.set((*_WATCHERS.get(), watcher))
    try:
        yield
    finally:
        _WATCHERS.reset(token)
