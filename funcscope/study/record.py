"""What is written down with every result: versions, and names that are safe for files."""

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
