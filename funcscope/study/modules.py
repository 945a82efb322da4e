"""Modules of the user's own, which register metrics and families: imported here, and first of all by workers."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .quiet import first_line

IMPORTED: dict[str, None] = {}
"""By name, those that `--import` named."""
NOT_OWN = ("funcscope", "__main__", "__mp_main__")
"""A worker has the first; what a script registers is known to processes that begin by importing it, and to no others."""


class OwnModule(NamedTuple):
    """A module, and the folder that it is looked for in where it is not found otherwise."""

    name: str
    folder: str

    def imported(self) -> None:
        """Raises ValueError for what cannot be imported, whatever its own code raises."""
        try:
            if importlib.util.find_spec(self.name.partition(".")[0]) is None and os.path.isdir(self.folder):
                sys.path.append(self.folder)
                importlib.invalidate_caches()
            importlib.import_module(self.name)
        except Exception as err:
            raise ValueError(
                f"cannot import the module {self.name!r}, which metrics or families come from ({type(err).__name__}: "
                f"{first_line(err)}): install it where workers run, or let them see its folder {self.folder!r}."
            ) from err


def import_modules(names: Iterable[str]) -> None:
    """Modules by name, those of the current folder, too; the workers of studies import them before any work."""
    for name in names:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        importlib.import_module(name)
        IMPORTED[name] = None


def own_modules(names: Iterable[str | None]) -> tuple[OwnModule, ...]:
    """Those of these names that are the user's own and imported here, each once.

    >>> own_modules(["funcscope.study.measures", "__main__", None])
    ()
    """
    there = (name for name in dict.fromkeys(names) if name is not None and name in sys.modules)
    return tuple(OwnModule(name, _folder(name)) for name in there if name.partition(".")[0] not in NOT_OWN)


def _folder(name: str) -> str:
    """Of the module, or of the package that it belongs to."""
    top = sys.modules[name.partition(".")[0]]
    file = Path(getattr(top, "__file__", None) or os.devnull).resolve()
    return str(file.parent.parent if hasattr(top, "__path__") else file.parent)
