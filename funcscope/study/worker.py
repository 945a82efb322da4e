"""On a worker of a Dask scheduler: whether it has what a study needs, and a call with the folder and threads of the study."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.progress import watched
from .modules import OwnModule
from .record import versions

START = "`dask worker ADDRESS --nworkers N --nthreads 1 --memory-limit 0`"


@dataclass(frozen=True)
class Terms:
    """What a worker has in common with the study."""

    folder: str
    """The current one, which relative paths are of."""
    packages: Mapping[str, str]
    threads: int
    """Of torch: sums are added in another order by another number of them."""
    pools: Mapping[str, int]
    """Threads of BLAS and OpenMP, by kind."""
    mark: str | None = None
    """A file in the folder of the cells."""
    modules: tuple[OwnModule, ...] = ()
    """Of the user's own."""


def pools() -> dict[str, int]:
    from threadpoolctl import threadpool_info

    return {each["user_api"]: each["num_threads"] for each in threadpool_info()}


def objection(terms: Terms, dask_worker: Any) -> str:
    """Why a worker cannot take part, with the remedy; empty where it can."""
    if (num := dask_worker.state.nthreads) != 1:
        return f"takes {num} tasks at a time, whose memory and threads cannot be told apart: start it by {START}."
    here = versions()
    for name, other in terms.packages.items():
        if here[name] != other:
            return f"has {name} {here[name]}, and the study {other}: install the same on all machines."
    if not os.path.isdir(terms.folder):
        return f"does not see the folder {terms.folder!r}: start the study in one that all machines share."
    if terms.mark is not None and not os.path.exists(terms.mark):
        folder = str(Path(terms.mark).parent)
        return f"does not see the study's folder {folder!r}: choose one (`output_dir`) that all machines share."
    try:
        for module in terms.modules:
            module.imported()
    except ValueError as err:
        return str(err)
    return ""


def called(terms: Terms, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On a worker: the call, with the study's folder and threads."""
    from distributed import get_worker
    from distributed.worker import thread_state
    from threadpoolctl import threadpool_limits

    worker = get_worker()
    if said := objection(terms, worker):
        raise ValueError(f"the Dask worker {worker.address} {said}")
    os.chdir(terms.folder)
    with threadpool_limits(dict(terms.pools)), watched(Stop(worker, thread_state.key)):
        torch.set_num_threads(terms.threads)  # last: its pool is one of several that share a name
        return fn(*args, **kwargs)


class Stopped(BaseException):
    """Nobody waits for this task; no `except Exception` in a metric holds it."""


class Stop:
    """Ends a task that was cancelled, before a forward pass or a product."""

    def __init__(self, worker: Any, key: Any):
        self.worker, self.key, self.looked = worker, key, time.monotonic()

    def __call__(self, *_: object) -> None:
        if time.monotonic() - self.looked < LOOK_EVERY:
            return
        self.looked = time.monotonic()
        task = self.worker.state.tasks.get(self.key)
        if task is None or task.state in ("cancelled", "released", "forgotten"):
            raise Stopped


LOOK_EVERY = 0.1
"""Seconds between two looks at whether a task was cancelled."""
