"""What tells weights and data apart by their content. Sums of files are remembered by size and time of change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.store import to_json, write


class Sums:
    """SHA-256 of files; those that have the size, time and place of before are not read again.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "a"
    ...     _ = file.write_text("abc")
    ...     Sums(Path(folder) / "sums.json").of(file)[:8]
    'ba7816bf'
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._known: dict[str, list[Any]] = self._read()

    def of(self, file: Path) -> str:
        """The sum of one file."""
        name, stat = str(file.resolve()), file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._known.get(name)
        if known and known[:3] == stamp:
            return known[3]
        with file.open("rb") as content:
            total = hashlib.file_digest(content, "sha256").hexdigest()
        self._known[name] = [*stamp, total]
        if self.path is not None:
            write(self.path, json.dumps(self._read() | self._known).encode())
        return total

    def _read(self) -> dict[str, list[Any]]:
        try:
            known = json.loads(self.path.read_text()) if self.path is not None else {}
        except (OSError, ValueError):  # no sums, or half of them: they are taken again
            return {}
        return {name: row for name, row in known.items() if isinstance(row, list) and len(row) == 4}


def of_files(files: Iterable[Path], sums: Sums) -> str:
    """One sum over the names and contents of files, wherever they are."""
    return of_json([[file.name, sums.of(file)] for file in files])


def of_json(value: Any) -> str:
    """The sum of anything that JSON can say, whatever the order of its names."""
    return hashlib.sha256(json.dumps(to_json(value), sort_keys=True).encode()).hexdigest()


def of_tensors(tensors: Iterable[Tensor]) -> str:
    """One sum over dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        total.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        if plain.numel():
            total.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
