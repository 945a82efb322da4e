"""Forward passes and products, told to whoever watches at the place where they happen: no metric knows of it.

Nothing is printed here, and without a watcher a tick is one look at an empty tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Literal

from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_all_functorch_interpreters

Kind = Literal["forward", "product"]
Watcher = Callable[[Kind, int], object]
"""(what, how many)"""

_WATCHERS: ContextVar[tuple[Watcher, ...]] = ContextVar("watchers", default=())


def tick(kind: Kind, num: int = 1) -> None:
    """A forward pass of one batch, or a product of an operator with one vector, is about to be computed: inside `vmap`, one
    for each that it maps over.

    num: 0 for a further part of a batch that was counted as a whole.
    """
    if watchers := _WATCHERS.get():
        num *= _mapped()
        for watcher in watchers:
            watcher(kind, num)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Inside, `watcher` is called at every tick of this thread; an exception that it raises ends the computation.

    It is told how many: a pass that `vmap` runs for several points is as many passes, one over several sequences of a batch
    is one, as is one that is differentiated; a product of `hessian_difference` is two, one for each gradient.

    >>> seen = []
    >>> with watched(lambda kind, num: seen.append((kind, num))):
    ...     tick("forward")
    >>> tick("forward")
    >>> seen
    [('forward', 1)]
    """
    token = _WATCHERS.set((*_WATCHERS.get(), watcher))
    try:
        yield
    finally:
        _WATCHERS.reset(token)


def _mapped() -> int:
    """How many points the `vmap`s around this call map over."""
    around = retrieve_all_functorch_interpreters()
    return prod(each.batch_size() for each in around if isinstance(each, VmapInterpreter))
