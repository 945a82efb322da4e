"""What is written down with every result: versions, names that are safe for files, times."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Of the packages that the numbers depend on."""
    packages = {name: version(name) for name in ("funcscope", "torch", "transformers", "numpy")}
    return {"python": platform.python_version(), **packages}


def file_stem(name: str) -> str:
    """A name as part of a file's name: letters, digits, dot, dash, underscore, 60 bytes.

    >>> file_stem("../my model"), file_stem("...")
    ('my-model', 'model')
    """
    cleaned = re.sub(r"[^\w.-]+", "-", name).strip(".-")
    return cleaned.encode()[:60].decode(errors="ignore") or "model"


def duration(seconds: float) -> str:
    """A time in the unit that suits it.

    >>> duration(0.2), duration(150.0), duration(900.0), duration(9000.0)
    ('1 s', '150 s', '15 minutes', '2.5 hours')
    """
    if seconds < 180:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
