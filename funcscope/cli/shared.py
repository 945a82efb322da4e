"""What the commands have in common: checks before any work."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path


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
