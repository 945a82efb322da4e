"""Other libraries at the door: their errors become one line of ours, their warnings and progress bars stay silent."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pickle import UnpicklingError
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError

_UNREADABLE = (
    SafetensorError, UnpicklingError, ArithmeticError, AssertionError, AttributeError, EOFError,
    ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What parsers and constructors raise for files that are not theirs, or that say what cannot be."""
_THEIRS = ("StrictDataclassError", "DatasetsError")
"""Classes of huggingface_hub and datasets, which are kinds of none of these."""


class one_line(AbstractContextManager[None]):  # noqa: N801, used as a function
    """Raises `ValueError("what (cause)")`, in one line, for what a library says about a file that it cannot read.

    That includes errors of the bare class `Exception`, which the tokenizers library raises; an interrupt and a lack of
    memory pass.

    >>> with one_line("x.json is not JSON"):
    ...     raise ValueError("line one\\nline two")
    Traceback (most recent call last):
    ValueError: x.json is not JSON (line one).
    """

    def __init__(self, what: str):
        self.what = what

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        theirs = any(base.__name__ in _THEIRS for base in type(err).__mro__)
        if err is not None and (kind is Exception or theirs or isinstance(err, _UNREADABLE)):
            raise ValueError(f"{self.what} ({first_line(err)}).") from err


def first_line(err: BaseException) -> str:
    """What an error says, in one line without a full stop: its first line, and the next where that is its heading."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()] or [type(err).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return (text if len(text) <= 160 else text[:157] + "...").rstrip(".:")


_ALONE = threading.RLock()
"""transformers loads by changes to the whole process: two threads at it would take each other's weights for missing."""


class Turns:
    """Threads that compute, any number, or one that loads in another dtype: torch's default is then that of all threads.

    A thread that loads in the middle of its own computation does not wait for that.
    """

    def __init__(self) -> None:
        self._turn, self._own = threading.Condition(), threading.local()
        self._computing = self._waiting = 0
        self._loads = False

    @contextmanager
    def computing(self) -> Iterator[None]:
        depth = getattr(self._own, "depth", 0)
        if not depth:
            self._enter()
        self._own.depth = depth + 1
        try:
            yield
        finally:
            self._own.depth = depth
            if not depth:
                self._leave()

    @contextmanager
    def loading(self, dtype: torch.dtype) -> Iterator[None]:
        with self.computing():
            usual = dtype == torch.get_default_dtype()
        if usual:
            yield
            return
        inside = getattr(self._own, "depth", 0)
        if inside:
            self._leave()
        with self._turn:
            self._waiting += 1
            self._turn.wait_for(lambda: not (self._computing or self._loads))
            self._waiting, self._loads = self._waiting - 1, True
        try:
            yield
        finally:
            with self._turn:
                self._loads = False
                self._turn.notify_all()
            if inside:
                self._enter()

    def _enter(self) -> None:
        with self._turn:
            self._turn.wait_for(lambda: not (self._loads or self._waiting))
            self._computing += 1

    def _leave(self) -> None:
        with self._turn:
            self._computing -= 1
            self._turn.notify_all()


TURNS = Turns()


@contextmanager
def quiet() -> Iterator[None]:
    """No log line, warning, progress bar of transformers inside, nor another thread; afterwards everything is as it was."""
    with _ALONE:
        yield from _silenced()


def _silenced() -> Iterator[None]:
    from transformers.utils import logging as hf_logging  # takes longer to import than torch

    level, hook = hf_logging.get_verbosity(), hf_logging.set_tqdm_hook(_disabled)
    hf_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|huggingface_hub)\b")
            yield
    finally:
        hf_logging.set_verbosity(level)
        hf_logging.set_tqdm_hook(hook)


def _disabled(make: Callable[..., Any], args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    return make(*args, **{**settings, "disable": True})
