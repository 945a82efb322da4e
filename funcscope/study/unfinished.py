"""What an interrupted study leaves on disk, and whether the next call may go on from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..core.store import Damaged, Stored, load


def unfinished(out: Path, stem: str, part: int | str) -> Path:
    """Where a part of an unfinished study lies.

    >>> unfinished(Path("out"), "gpt2", 1).name
    'gpt2.1.unfinished.npz'
    """
    return out / f"{stem}.{part}.unfinished.npz"


def kept(out: Path) -> list[Path]:
    """The parts of interrupted studies in a folder."""
    return sorted(out.glob("*.unfinished.npz"))


def files_of(folder: Path, data: Path) -> list[tuple[str, int, int]]:
    """What tells one model and one set of texts from another: names, sizes and times of their files."""
    files = [*sorted(path for path in folder.resolve().iterdir() if path.is_file()), data.resolve()]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def reusable(part: Path, wanted: dict[str, Any], tolerance: float) -> Stored | None:
    """A stored part of the same files and settings; the loss at theta, up to rounding, must be the same too.

    wanted: what the part must have in its settings, `baseline` among it; it may have more.
    """
    try:
        stored = load(part)
    except (FileNotFoundError, Damaged):
        return None
    exact = {name: value for name, value in wanted.items() if name != "baseline"}
    if {name: stored.meta.get(name) for name in exact} != exact:
        return None
    same = math.isclose(stored.meta["baseline"], wanted["baseline"], rel_tol=tolerance)
    return stored if same else None


def remove(part: Path) -> None:
    """Delete a part, with the copy for people beside it."""
    for ending in (".npz", ".json"):
        part.with_suffix(ending).unlink(missing_ok=True)
