"""The folder of a run: variants of trained models and their checkpoints; beside them what was measured.

RUN/VARIANT/variant.json                               family, variant, configuration
RUN/VARIANT/curves.npz                                 step, train_loss, test_loss, train_accuracy, test_accuracy
RUN/VARIANT/checkpoints/step_00100.safetensors
RUN/study.json, RUN/cache                              results, as `Results.open(RUN)` brings them back
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..core.store import VERSION, Damaged, check_version, load, write

HEAD = "variant.json"
_CHECKPOINT = re.compile(r"step_(\d{5,})\.safetensors")


@dataclass(frozen=True)
class Runs:
    """A run folder, or the folder of a single variant."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"{str(self.path)!r} is not a folder: `funcscope demo` or `funcscope train` make one."
            )
        if not self.variants():
            raise ValueError(
                f"{str(self.path)!r} holds no variant (a folder with a {HEAD}): "
                "`funcscope train --out` and `funcscope demo --out` write them."
            )

    def variants(self) -> tuple[str, ...]:
        """Names of the variants, sorted."""
        if (self.path / HEAD).is_file():
            return (self.path.resolve().name,)
        return tuple(sorted(path.parent.name for path in self.path.glob(f"*/{HEAD}")))

    def variant(self, name: str) -> Variant:
        """The variant of that name: of its folder, or the one it was trained under where that is unique.

        Raises ValueError for one that is not among them, whatever path it may name.
        """
        names = self.variants()
        if name not in names:
            labelled = [each for each in names if self._at(each).label == name]
            if len(labelled) != 1:
                raise ValueError(f"no variant {name!r} in this run: it has {', '.join(names)}.")
            name = labelled[0]
        return self._at(name)

    def _at(self, name: str) -> Variant:
        return Variant(self.path if (self.path / HEAD).is_file() else self.path / name)


@dataclass(frozen=True)
class Variant:
    """One trained model with its checkpoints."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def head(self) -> dict[str, Any]:
        """What `variant.json` says. Raises Damaged, and Outdated where another version of funcscope wrote it."""
        try:
            head = json.loads((self.path / HEAD).read_text(encoding="utf-8"))
            parts = {"family": str(head["family"]), "variant": str(head["variant"]), "config": dict(head["config"])}
        except (ValueError, KeyError, TypeError) as err:
            raise Damaged(f"{self.path / HEAD} is damaged or was not written by funcscope ({err}).") from err
        check_version(self.path / HEAD, head)
        return parts

    @property
    def label(self) -> str | None:
        """The name that it was trained under; None where `variant.json` cannot be read."""
        try:
            return self.head["variant"]
        except Damaged:
            return None

    @property
    def family(self) -> str:
        return self.head["family"]

    @property
    def config(self) -> dict[str, Any]:
        return self.head["config"]

    def checkpoints(self) -> tuple[int, ...]:
        """Steps that have a checkpoint."""
        return _steps(self.path / "checkpoints")

    def curves(self) -> dict[str, np.ndarray] | None:
        """Losses and accuracies over training; None before training ended."""
        path = self.path / "curves.npz"
        return load(path).arrays if path.is_file() else None


def is_run(path: str | Path) -> bool:
    """Whether a folder holds trained variants: as `funcscope train` makes it, or that of a single one."""
    return (Path(path) / HEAD).is_file() or any(Path(path).glob(f"*/{HEAD}"))


def begin(path: Path, family: str, variant: str, config: Mapping[str, Any]) -> Variant:
    """The folder of a variant, made where it is not there. Raises ValueError where it belongs to another one."""
    here = json.loads(json.dumps({"family": family, "variant": variant, "config": dict(config)}))
    if (path / HEAD).is_file():
        head = Variant(path).head
        if (head["family"], head["config"]) != (here["family"], here["config"]):
            odd = sorted(k for k in {*head["config"], *config} if head["config"].get(k) != here["config"].get(k))
            raise ValueError(
                f"{path} belongs to another variant, {head['variant']} of {head['family']}; what differs: "
                f"{', '.join(odd) or 'the family'}. Choose another folder."
            )
    else:
        write(path / HEAD, json.dumps({"version": VERSION} | here, indent=1).encode())
    return Variant(path)


def _steps(folder: Path) -> tuple[int, ...]:
    names = (_CHECKPOINT.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return tuple(sorted(int(name[1]) for name in names if name))
