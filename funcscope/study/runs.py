"""The folder of a run: variants of trained models, their checkpoints, and what analyzers found at each of them.

    RUN/VARIANT/variant.json                               family, variant, configuration
    RUN/VARIANT/curves.npz                                 step, train_loss, test_loss, train_accuracy, test_accuracy
    RUN/VARIANT/checkpoints/step_00100.safetensors
    RUN/VARIANT/artifacts/ANALYZER/step_00100.npz          one checkpoint's numbers, with the settings inside
    RUN/VARIANT/artifacts/ANALYZER/summary.npz             one row per checkpoint; nan where there is none
    RUN/VARIANT/artifacts/ANALYZER/across_steps.npz        what concerns all checkpoints together
    RUN/VARIANT/artifacts/ANALYZER/times.jsonl             how long each checkpoint took

Reading is lazy: a question opens the one file that answers it.
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
from torch import Tensor

from ..core.store import VERSION, Damaged, check_version, load, save, write

HEAD, CROSS = "variant.json", "across_steps.npz"
NAME = r"[a-z][a-z0-9_]*"
"""What an analyzer's name looks like."""
_ARTIFACT = re.compile(r"step_(\d{5,})\.npz")
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
    """One trained model with its checkpoints and artifacts."""

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
        return _numbers(self.path / "checkpoints", _CHECKPOINT)

    def curves(self) -> dict[str, np.ndarray] | None:
        """Losses and accuracies over training; None before training ended."""
        path = self.path / "curves.npz"
        return load(path).arrays if path.is_file() else None

    def analyzers(self) -> tuple[str, ...]:
        """Names of the analyzers that have stored something."""
        folders = (path for path in (self.path / "artifacts").glob("*") if path.is_dir())
        return tuple(
            sorted(
                path.name
                for path in folders
                if re.fullmatch(NAME, path.name) and (self.steps(path.name) or (path / CROSS).is_file())
            )
        )

    def steps(self, analyzer: str) -> tuple[int, ...]:
        """Steps that have an artifact of that analyzer."""
        return _numbers(self.folder(analyzer), _ARTIFACT)

    def folder(self, analyzer: str) -> Path:
        """Where an analyzer's artifacts lie."""
        if not re.fullmatch(NAME, analyzer):
            raise ValueError(f"an analyzer is named by small letters, digits and underscores, got {analyzer!r}.")
        return self.path / "artifacts" / analyzer

    def artifact(self, analyzer: str, step: int) -> Path:
        return self.folder(analyzer) / f"step_{int(step):05d}.npz"

    def load(self, analyzer: str, step: int) -> dict[str, Any]:
        """Arrays, numbers and strings of one artifact.

        Raises FileNotFoundError, and core.store.Damaged for a file that is not one of ours.
        """
        return read(self.artifact(analyzer, step))

    def opened(self, analyzer: str, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same, and the analyzer's settings that it was made with."""
        return _opened(self.artifact(analyzer, step))

    def summary(self, analyzer: str) -> dict[str, np.ndarray] | None:
        """One row per checkpoint: `step`, and the analyzer's summary keys; None where it was not written yet."""
        path = self.folder(analyzer) / "summary.npz"
        return load(path).arrays if path.is_file() else None

    def cross(self, analyzer: str) -> dict[str, Any] | None:
        """What an analyzer found across all checkpoints; None where it was not run."""
        path = self.folder(analyzer) / CROSS
        return read(path) if path.is_file() else None

    def settings(self, analyzer: str) -> dict[str, Any]:
        """The settings of the summary, with what the analyzer wrote beside them; empty without one."""
        path = self.folder(analyzer) / "summary.npz"
        return settings_of(path) if path.is_file() else {}

    def times(self, analyzer: str) -> list[dict[str, Any]]:
        """One entry per checkpoint that was analysed, in the order of time; lines that are no such entries are left out."""
        path = self.folder(analyzer) / "times.jsonl"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        entries = (_parsed(line) for line in lines)
        return [e for e in entries if isinstance(e, dict) and isinstance(e.get("seconds"), (int, float))]


def summarised(summary: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """The steps that have a row in a summary: those that were analysed with its settings."""
    steps = summary["step"]
    columns = [np.isfinite(each.reshape(len(steps), -1)).any(1) for key, each in summary.items() if key != "step"]
    return tuple(steps[np.any(columns, axis=0)].tolist()) if columns else ()


def begin(path: Path, family: str, variant: str, config: Mapping[str, Any]) -> Variant:
    """The folder of a variant, made where it is not there. Raises ValueError where it belongs to another one."""
    wanted = json.loads(json.dumps({"family": family, "variant": variant, "config": dict(config)}))
    if (path / HEAD).is_file():
        head = Variant(path).head
        if (head["family"], head["config"]) != (wanted["family"], wanted["config"]):
            odd = sorted(k for k in {*head["config"], *config} if head["config"].get(k) != wanted["config"].get(k))
            raise ValueError(
                f"{path} belongs to another variant, {head['variant']} of {head['family']}; what differs: "
                f"{', '.join(odd) or 'the family'}. Choose another folder."
            )
    else:
        write(path / HEAD, json.dumps({"version": VERSION} | wanted, indent=1).encode())
    return Variant(path)


def keep(path: Path, values: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Store one artifact: numbers and arrays as arrays, anything else beside the settings."""
    values = {
        name: value.detach().cpu().numpy() if isinstance(value, Tensor) else value for name, value in values.items()
    }
    arrays = {name: np.asarray(value) for name, value in values.items() if _numeric(value)}
    other = {name: value for name, value in values.items() if name not in arrays}
    save(path, arrays, {"settings": settings, "values": other}, copy=False)


def read(path: Path) -> dict[str, Any]:
    """What `keep` stored: numbers as numbers again."""
    return _opened(path)[0]


def settings_of(path: Path) -> dict[str, Any]:
    """The settings that a file was stored with. Raises Damaged for a file of ours that is no artifact."""
    return _settings(path, load(path).meta)


def _opened(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    stored = load(path)
    numbers = {name: value.item() if not value.ndim else value for name, value in stored.arrays.items()}
    return numbers | stored.meta.get("values", {}), dict(_settings(path, stored.meta).get("settings", {}))


def _settings(path: Path, meta: Any) -> dict[str, Any]:
    if not isinstance(meta, dict) or not isinstance(meta.get("settings"), dict):
        raise Damaged(f"{path} is no artifact of an analyzer: it has no settings.")
    return meta["settings"]


def _numeric(value: Any) -> bool:
    return isinstance(value, (int, float, np.generic)) or (isinstance(value, np.ndarray) and value.dtype.kind in "bifu")


def _numbers(folder: Path, pattern: re.Pattern[str]) -> tuple[int, ...]:
    names = (pattern.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return tuple(sorted(int(found[1]) for found in names if found))


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
