"""What the commands have in common: checks before any work, and the files that are named at the end."""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import asdict
from pathlib import Path

from ..study.inputs import Data
from ..study.listing import wrapped
from ..study.opening import DataSpec, one_sequence


def print_data(settings: DataSpec, data: Data, width: int) -> None:
    """What is scored, and what a single sequence leaves unknown."""
    for line in (str(data), one_sequence(asdict(settings), data.num_samples)):
        if line:
            print(wrapped(line, width))


def print_files(page: Path, numbers: Path) -> None:
    print(f"page     {page}\nnumbers  {numbers} and {numbers.with_suffix('.json').name}")


def check_plotly(what: str = "page", package: str = "plotly") -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"the {what} needs {package}, which is not installed: pip install 'funcscope[view]'")


def check_writable(folder: Path) -> None:
    """Before any work: can the folder be made and written?"""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as err:
        raise OSError(f"cannot write to {str(folder)!r} ({err.strerror}): choose another folder with --out.") from err
