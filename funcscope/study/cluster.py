"""Workers on many machines: an executor on Dask for studies whose folders all of them see (extra `funcscope[cluster]`)."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from threading import Event, RLock, Thread
from typing import Any
from uuid import uuid4

import torch

from ..core.checks import check_count, check_positive
from .modules import OwnModule
from .quiet import first_line
from .record import versions
from .worker import START, Terms, called, objection, pools

SCHEME = "dask"
"""How the name of such an executor begins: `dask`, or `dask:tcp://HOST:8786`."""


class Cluster(Executor):
    """Workers of a Dask scheduler, or without an address `num` of this machine's own: `analyze_models(..., executor=)`.

    A worker is a process with one task, a subject, at a time. Cells are those of a study without workers, bit for bit on
    processors of one kind: threads of torch and BLAS are as many there as here. The study's folder and the current one are
    at the same paths on all machines, by a file system that they share. A task whose worker is killed goes to another one;
    one that has lost as many as Dask's `allowed-failures` permits (3) is tried once more when nothing else runs, so that no
    other one is to blame, and is then an outcome, `failed`. What runs when the study is interrupted ends before its next
    forward pass.

    num: of local workers. patience: seconds that the scheduler and its first worker have to answer.

    Raises ModuleNotFoundError without the extra, ValueError for a scheduler that does not answer or has no workers; a study
    raises it where one of these has other packages, several threads for tasks, or does not see the folders.
    """

    def __init__(self, address: str | None = None, *, num: int = 1, patience: float | int = 10.0):
        check_count("num", num)
        check_positive("patience", float(patience))
        self._dask = _distributed()
        with ExitStack() as opened:
            if address is None:
                local = opened.enter_context(_local(self._dask, num))
                address, patience = str(local.scheduler_address), LOCAL_PATIENCE
            self.address = address
            self._client = opened.enter_context(_client(self._dask, self.address, patience))
            self._opened = opened.pop_all()
        self._terms = Terms(os.getcwd(), versions(), torch.get_num_threads(), pools())
        self._marks: dict[Path, Path] = {}
        self._running, self._suspects, self._lock = set[Piece](), deque[Piece](), RLock()
        self._over = Event()
        Thread(target=self._watch, daemon=True, name="workers of funcscope").start()

    def share(self, root: Path | None, modules: tuple[OwnModule, ...] = ()) -> None:
        """Make sure that every worker sees the folder of the cells, by a file in it that goes with `shutdown`, and imports
        these modules.

        Raises ValueError for the first that does not, and OSError where the folder cannot be written.
        """
        mark: Path | None = None
        if root is not None:
            mark = self._marks.setdefault(root.resolve(), root.resolve() / f".shared-{uuid4().hex}")
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        self._terms = replace(self._terms, mark=None if mark is None else str(mark), modules=modules)
        answers = self._client.run(objection, self._terms, on_error="return")
        for worker, said in answers.items():
            if isinstance(said, OSError):  # it has died: who takes its place is asked with its first task
                continue
            if isinstance(said, Exception):
                said = f"cannot take part ({type(said).__name__}: {first_line(said)}): install funcscope there."
            if said:
                raise ValueError(f"the Dask worker {worker} {said}")

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """A call on one of the workers."""
        piece = Piece((fn, args, kwargs))
        self._start(piece)
        return piece.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let go of the workers, after what was submitted is done; those of this machine end."""
        with self._lock:
            futures = [piece.future for piece in (*self._running, *self._suspects)]
        for future in futures if cancel_futures or not wait else ():
            future.cancel()
        _wait([future for future in futures if not future.cancelled()])
        self._over.set()
        for mark in self._marks.values():
            mark.unlink(missing_ok=True)
        self._opened.close()

    def _start(self, piece: Piece) -> None:
        with self._lock:
            self._running.add(piece)
        try:
            call = self._client.submit(called, self._terms, *piece.call, pure=False, key=f"funcscope-{uuid4().hex}")
        except Exception as err:  # it cannot be sent, or there is no way there  # noqa: BLE001
            with self._lock:
                self._running.discard(piece)
            if piece.future.set_running_or_notify_cancel():
                piece.future.set_exception(err)
            return
        piece.future.add_done_callback(lambda future: call.cancel() if future.cancelled() else None)
        call.add_done_callback(lambda done: self._ended(piece, done))

    def _ended(self, piece: Piece, call: Any) -> None:
        """What came of a call, or what is next for it."""
        value, err = None, None
        try:
            value = call.result()
        except BaseException as its:  # of the call, of the way, of the worker  # noqa: BLE001
            err = its
        call.release()  # what the worker keeps of it
        again = isinstance(err, self._dask.KilledWorker) and not piece.is_alone
        with self._lock:
            self._running.discard(piece)
            if again and not piece.future.cancelled():
                piece.is_alone = True
                self._suspects.append(piece)
        if not again and piece.future.set_running_or_notify_cancel():
            piece.future.set_exception(self._said(err)) if err else piece.future.set_result(value)
        while suspect := self._next():
            self._start(suspect)

    def _next(self) -> Piece | None:
        """What is tried alone, where nothing else runs."""
        with self._lock:
            while self._suspects and not self._running:
                if not (suspect := self._suspects.popleft()).future.cancelled():
                    return suspect
        return None

    def _said(self, err: BaseException) -> BaseException:
        """The error of a call, in words of this package where it is Dask's own."""
        if isinstance(err, self._dask.KilledWorker):
            said = (
                f"the workers that had this subject died, one after another, the last at {err.last_worker.address}: its log "
                "says of what. Where it was memory, `max_memory_gb` below what the machine has makes it an outcome."
            )
        elif isinstance(err, CancelledError):
            said = f"the Dask scheduler {self.address} is gone: start it again, and the same call goes on."
        else:
            return err
        told = RuntimeError(said)
        told.__cause__ = err
        return told

    def _watch(self) -> None:
        """Says when nobody is left who could go on."""
        since = 0.0
        while not self._over.wait(LOOK_EVERY):
            with suppress(Exception):  # of a connection that is lost, which the calls say
                is_empty = bool(self._running) and not self._client.scheduler_info()["workers"]
                since = since + LOOK_EVERY if is_empty else 0.0
            if ALONE <= since < ALONE + LOOK_EVERY:
                warnings.warn(
                    f"the Dask scheduler {self.address} has no workers left, and the study waits for some: {START}.",
                    stacklevel=1,
                )


_wait = wait  # `shutdown` has an argument of that name
LOCAL_PATIENCE = 120.0
"""Seconds for workers of this machine to begin."""
LOOK_EVERY = 5.0
"""Seconds between two looks at whether there are workers."""
ALONE = 60.0
"""Seconds without workers after which that is said: those that were killed are started again meanwhile."""


def cluster(name: str, *, num: int = 1) -> Cluster:
    """The executor that is called `dask`, with `num` workers on this machine, or `dask:ADDRESS`.

    Raises ValueError as `address_of` does.
    """
    return Cluster(address_of(name, num=num), num=num)


def address_of(name: str, *, num: int = 1) -> str | None:
    """The scheduler of an executor that is named so; None for workers of this machine.

    Raises ValueError for another name, and for a number of workers beside an address, whose workers are there already.

    >>> address_of("dask:tcp://HOST:8786"), address_of("dask", num=4)
    ('tcp://HOST:8786', None)
    """
    scheme, colon, address = str(name).partition(":")
    if scheme != SCHEME or bool(colon) != bool(address):
        raise ValueError(f"`executor` must be 'dask' or 'dask:ADDRESS' (dask:tcp://HOST:8786), got {name!r}.")
    if address and num > 1:
        raise ValueError(
            f"`workers` is of this machine, and {address} has workers of its own: leave it out, got {num}."
        )
    return address or None


@dataclass(eq=False)
class Piece:
    """A call, and the future that its caller has."""

    call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
    future: Future[Any] = field(default_factory=Future)
    is_alone: bool = False
    """Whether nothing else runs beside it."""


def _distributed() -> Any:
    try:
        return import_module("distributed")
    except ModuleNotFoundError as err:
        raise ModuleNotFoundError("an executor on Dask needs distributed: pip install 'funcscope[cluster]'.") from err


@contextmanager
def _local(dask: Any, num: int) -> Iterator[Any]:
    """Workers of this machine, which Dask does not end for the memory that they use."""
    parents = {"distributed.worker.daemon": False}  # of processes of metrics' own (`hard_timeout`); read at every start
    alone = {"n_workers": num, "threads_per_worker": 1, "processes": True, "memory_limit": None}
    quiet = {"dashboard_address": "127.0.0.1:0", "silence_logs": "CRITICAL"}
    with import_module("dask").config.set(parents), dask.LocalCluster(**alone, **quiet) as local:
        yield local


@contextmanager
def _client(dask: Any, address: str, patience: float | int) -> Iterator[Any]:
    try:
        with ThreadPoolExecutor(1) as beside:  # a notebook has a loop of its own in this thread
            beside.submit(asyncio.run, _knock(address, patience)).result()
    except Exception as err:  # what a server of another kind says is read as anything
        raise ValueError(
            f"no Dask scheduler answers at {address!r} within {patience:g} s ({first_line(err)}): start it by `dask "
            "scheduler`, and pass the address that it prints, `tcp://HOST:8786`."
        ) from err
    with dask.Client(address, timeout=patience, set_as_default=False) as client:
        try:
            client.wait_for_workers(1, timeout=patience)
        except TimeoutError as err:
            raise ValueError(f"the Dask scheduler {address!r} has no workers: start some by {START}.") from err
        yield client


async def _knock(address: str, patience: float | int) -> None:
    """A connection and its greeting: a client that fails in them leaves threads behind."""
    from distributed.comm import connect

    comm = await asyncio.wait_for(connect(address, timeout=patience), patience)
    await comm.close()
