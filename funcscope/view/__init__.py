"""Pure renderers, result to plotly figure, and a report that puts them on one page (extra `funcscope[view]`)."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.store import load

if TYPE_CHECKING:
    from .page import Page


def show(numbers: str | PathLike[str]) -> Page:
    """Write the page of stored numbers next to their `.npz`, and return it: in a notebook it shows itself.

    Raises FileNotFoundError, and core.store.Damaged for a file that cannot be read.
    """
    from . import curvature, demo, directional  # plotly takes a second to import
    from .page import Page

    path = Path(numbers)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}: pass the `.npz` of numbers that a command or a study wrote beside its page."
        )
    kind = load(path).meta.get("kind", "demo")
    return Page({"demo": demo, "curvature": curvature}.get(kind, directional).write_page(path))
