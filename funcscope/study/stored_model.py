"""A model as it lies in its folder: names and shapes of its tensors, of which any part is read without the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..weights.elementwise import all_finite
from .digest import Sums, of_files
from .folder import local_folder, settings, weight_files
from .tensor_file import Shape, TensorFile

PART = 1 << 21
"""Entries of a tensor that are read at a time."""


class StoredModel:
    """The tensors of a local Hugging Face folder, in one file or in shards.

    given: the folder as it is to be called. Raises FileNotFoundError, NotADirectoryError or ValueError, in one line, for a
    folder without whole weights as safetensors.
    """

    def __init__(self, folder: str | Path):
        self.given = str(folder)
        self.folder = local_folder(folder)
        self.config: dict[str, Any] = settings(self.folder)
        self.files = weight_files(self.folder, allow_pickle=False)
        self._file_of: dict[str, TensorFile] = {}
        for file in map(TensorFile, self.files):
            for name in file.tensors:
                if name in self._file_of:
                    raise ValueError(f"{folder} holds `{name}` in two of its files: the checkpoint is damaged.")
                self._file_of[name] = file
        self.tensors: dict[str, Shape] = {name: file.tensors[name] for name, file in self._file_of.items()}

    @property
    def label(self) -> str:
        """What was given, or the folder's name where that was a place on this machine."""
        return self.folder.resolve().name if Path(self.given).is_absolute() else self.given

    def digest(self) -> str:
        """The SHA-256 over names and contents of the weights' files."""
        return of_files(self.files, Sums(None))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """As `TensorFile.read`. Raises ValueError, by name, where an entry is nan or infinite."""
        value = self._file_of[name].read(name, start, stop)
        if value.is_floating_point() and not all_finite(value):
            bad = int((~value.isfinite()).sum())
            raise ValueError(
                f"`{name}` of {self.given} has {bad} entries that are nan or infinite: a merge would spread them. Look at "
                "that checkpoint, or take one from before it diverged."
            )
        return value

    def check_finite(self) -> None:
        """Raises as `read` does, for any entry of any tensor."""
        for name, what in self.tensors.items():
            for at in parts(what):
                self.read(name, *at)


def parts(what: Shape, size: int = PART) -> Iterator[tuple[int, int]]:
    """The first entry and the one behind the last of each part."""
    return ((start, min(start + size, what.numel)) for start in range(0, what.numel, size))


def twins(models: Sequence[StoredModel]) -> dict[str, str]:
    """Tensors that are stored under two names, an embedding that is also the head: the later name to the earlier one.

    They have as many rows as the vocabulary, and are equal bit by bit in every model.
    """
    first = models[0]
    rows = first.config.get("vocab_size")
    tables = [name for name, what in first.tensors.items() if len(what.shape) == 2 and what.shape[0] == rows]
    same: dict[str, str] = {}
    for i, name in enumerate(tables):
        for other in tables[:i]:
            if other not in same and all(_equal(model, name, other) for model in models):
                same[name] = other
                break
    return same


def _equal(model: StoredModel, name: str, other: str) -> bool:
    what = model.tensors[name]
    return what == model.tensors[other] and all(
        torch.equal(model.read(name, *part), model.read(other, *part)) for part in parts(what)
    )
