"""Figures, tables and pages of stored results (extra `funcscope[view]`)."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.result import Result
from ..study.cache import Outcome
from ..study.results import MANIFEST, Results

if TYPE_CHECKING:
    from .page import Page


def show(path: str | PathLike[str]) -> Page:
    """Write the page of stored results, and return it: in a notebook it shows itself.

    path: the folder of a study (with its `study.json`), whose page is `report.html` there; or a file that `Result.save`
    wrote, whose page lies beside it.

    Raises FileNotFoundError where neither is there, `core.store.Damaged` for a file that cannot be read.
    """
    from .report import write_report  # plotly takes a second to import

    path = Path(path)
    folder = path.parent if path.name == MANIFEST else path
    if folder.is_dir():
        return write_report(Results.open(folder), folder / "report.html")
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file or folder {path}: pass the folder of a study, or a stored result's `.npz`."
        )
    result = Result.load(path)
    outcome = Outcome(path.stem, path.stem, None, "data", "ok", result, group=path.stem)
    return write_report(Results((outcome,)), path.with_suffix(".html"), title=result.head)
