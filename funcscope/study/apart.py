"""A metric in a process of its own, which can be ended whatever it does."""

from __future__ import annotations

import pickle
from dataclasses import replace
from multiprocessing import current_process, get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from .calling import Needed, lost
from .meter import Expired, over
from .metric import Metric

if TYPE_CHECKING:
    from .cache import Cell, Outcome
    from .engine import Bench

GRACE = 1.0
"""Seconds that a metric has after its time to end by itself, with its rows kept."""


def apart(bench: Bench, one: Metric, needed: Needed, cell: Cell) -> Outcome | None:
    """What comes of a metric in a process of its own, killed when its time is over; None where it cannot be sent there.

    Raises ValueError in a process that may have none below it.
    """
    if current_process().daemon:
        raise ValueError(
            "`hard_timeout` needs workers that may start processes: set DASK_DISTRIBUTED__WORKER__DAEMON=false where "
            "`dask worker` is started."
        )
    limit = bench.options.timeout_seconds
    options = replace(bench.options, hard_timeout=False, skip_on_error=True)
    try:
        sent = pickle.dumps((replace(bench.job, options=options), one, needed, cell))
    except (pickle.PicklingError, TypeError, AttributeError, ValueError):
        return None
    spawn = get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_child, args=(there, sent), daemon=True)
    process.start()
    there.close()
    begun = False
    try:
        begun = here.recv() == "ready"
        if not begun:
            return None
        arrived = here.poll(None if limit is None else limit + GRACE)
        outcome = pickle.loads(here.recv_bytes()) if arrived else Expired(over(limit))
    except (EOFError, OSError):
        if not begun:
            return None
        process.join()
        outcome = RuntimeError(f"the process of {one.name} ended by itself, with code {process.exitcode}.")
    finally:
        process.kill()
        process.join()
        here.close()
    return _told(bench, one, cell, outcome)


def _told(bench: Bench, one: Metric, cell: Cell, outcome: Any) -> Outcome:
    if isinstance(outcome, BaseException):
        if not bench.options.skip_on_error:
            raise outcome
        outcome = bench.job.empty(one, content=cell.content, **lost(outcome))
    elif not outcome.ok and not bench.options.skip_on_error:
        raise RuntimeError(f"{outcome.error_type}: {outcome.error}\n{outcome.traceback}")
    return replace(outcome, plan={**outcome.plan, "timeout": "process"})


def _child(pipe: Connection, sent: bytes) -> None:
    from .engine import Bench

    try:
        job, one, needed, cell = pickle.loads(sent)
        bench = Bench(job)
        _ = bench.subject
    except Exception:  # what cannot be opened here is opened, and said, in the first process  # noqa: BLE001
        pipe.send("not here")
        return
    pipe.send("ready")
    pipe.send_bytes(pickle.dumps(bench._made(one, needed, cell)))
