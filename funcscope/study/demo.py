"""The demonstration: train modular addition, then watch its loss along random directions while it groks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core.checks import check_count, check_positive
from ..core.store import save
from ..families import modular
from ..families.family import Setup
from ..families.phases import phases
from .analysis import analyse
from .analyzer import Analyzer
from .analyzers import (
    DIRECTIONAL_LOSSES,
    EFFECTIVE_DIMENSIONALITY,
    FLATNESS_PROFILE,
    HESSIAN_CURVATURE,
    LANDSCAPE_FLATNESS,
    LOSS_PLANE,
    PHASE_LINES,
    PHASE_PATH,
    TRAJECTORY_PLANE,
)
from .numbers import is_known, number, with_error
from .record import versions
from .runs import Variant
from .training import trained

EPSILON = 0.1
"""Length of the step of flatness, a distance in parameter space."""
PLANE_SPAN = 0.5
"""Of the planes at the phases: half of the weights' norm to each side."""


@dataclass(frozen=True)
class Settings:
    """One demonstration: the run that is trained, and how its landscape is sampled."""

    config: modular.Config
    num_checkpoints: int = 24
    n_samples: int = 50
    span: float = 0.1
    seed: int = 42
    plane_points: int = 25

    @property
    def name(self) -> str:
        """The name of the page and of the numbers."""
        return f"modular-addition-p{self.config.p}"


FULL = Settings(modular.Config(), num_checkpoints=30)
QUICK = Settings(modular.QUICK, n_samples=20)


def run(settings: Settings, out: Path, *, quiet: bool = False) -> Path:
    """Train (or go on, or reuse), analyse every checkpoint, and write the numbers; returns the path of the `.npz`.

    Everything is kept as it is made, under `out/<run>/`: an interrupted call loses at most the steps since the last
    checkpoint, and the next one goes on from there. Results made with other settings are made again.
    """
    config = settings.config
    setup = Setup(config, modular.schedule(config, settings.num_checkpoints))
    variant = trained(modular.FAMILY, setup, out, name=settings.name, quiet=quiet)
    analyse(variant, analyzers_of(settings), steps=None, quiet=quiet)
    path = out / f"{settings.name}.npz"
    arrays = _stacked(variant, setup.checkpoints) | _landscape(variant)
    meta = {
        "settings": asdict(settings),
        "table": _rows(variant, setup.checkpoints),
        "phases": phases(variant.checkpoints(), variant.curves()),
        "axis_names": {
            "trajectory_": (variant.cross(TRAJECTORY_PLANE.name) or {})["axis_names"],
            "plane_": variant.load(LOSS_PLANE.name, setup.checkpoints[-1])["axis_names"],
        },
        "matrices": variant.settings(EFFECTIVE_DIMENSIONALITY.name)["matrices"],
        "versions": versions(),
    }
    save(path, arrays, meta)
    return path


def analyzers_of(settings: Settings) -> tuple[Analyzer, ...]:
    """What is measured, all of it on the training loss: the landscape that the optimiser sees."""
    common = {"split": "train", "seed": settings.seed}
    return (
        DIRECTIONAL_LOSSES.configured(n_samples=settings.n_samples, span=settings.span, **common),
        HESSIAN_CURVATURE.configured(**common),
        LANDSCAPE_FLATNESS.configured(n_directions=settings.n_samples, epsilon=EPSILON, **common),
        FLATNESS_PROFILE.configured(n_directions=settings.n_samples, **common),
        EFFECTIVE_DIMENSIONALITY,
        LOSS_PLANE.configured(span=PLANE_SPAN, num=settings.plane_points, **common),
        PHASE_LINES.configured(**common),
        TRAJECTORY_PLANE.configured(num=settings.plane_points, split="train"),
        PHASE_PATH.configured(split="train"),
    )


def table(meta: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the printed table, from the settings stored with the numbers."""
    headers = ["step", "train loss", "test loss", "train acc", "test acc", "roughness", "curvature", "grad-delta corr"]
    rows = [
        [
            str(row["step"]),
            f"{row['train_loss']:.3g}",
            f"{row['test_loss']:.3g}",
            f"{row['train_accuracy']:.3f}",
            f"{row['test_accuracy']:.3f}",
            _with_error(row, "landscape_roughness"),
            _with_error(row, "curvature_mean"),
            _with_error(row, "dir_grad_delta_corr"),
        ]
        for row in meta["table"]
    ]
    return headers, rows


def _stacked(variant: Variant, steps: Sequence[int]) -> dict[str, np.ndarray]:
    """Samples of the directional losses, a row per checkpoint, and the curves."""
    results = [variant.load(DIRECTIONAL_LOSSES.name, step) for step in steps]
    samples = {
        name: np.stack([found[name] for found in results])
        for name, value in results[0].items()
        if isinstance(value, np.ndarray)
    }
    curves = variant.curves() or {}
    return {"step": np.array(steps), **samples, **{f"curve_{name}": values for name, values in curves.items()}}


def _landscape(variant: Variant) -> dict[str, np.ndarray]:
    """Flatness and dimensionality over training, planes at its phases, the plane and the path through it."""
    found: dict[str, Any] = {}
    for prefix, name in (("flatness", LANDSCAPE_FLATNESS.name), ("dimensionality", EFFECTIVE_DIMENSIONALITY.name)):
        found |= {f"{prefix}_{key}": value for key, value in (variant.summary(name) or {}).items()}
    for prefix, name in (
        ("profile", PHASE_LINES.name), ("trajectory", TRAJECTORY_PLANE.name), ("path", PHASE_PATH.name)
    ):  # fmt: skip
        found |= {f"{prefix}_{key}": value for key, value in (variant.cross(name) or {}).items()}
    for step in phases(variant.checkpoints(), variant.curves()):
        found |= {f"plane_{step}_{key}": value for key, value in variant.load(LOSS_PLANE.name, step).items()}
        found |= {f"lengths_{step}_{key}": value for key, value in variant.load(FLATNESS_PROFILE.name, step).items()}
        flat = variant.load(LANDSCAPE_FLATNESS.name, step)
        found |= {f"changes_{step}_{key}": flat[key] for key in ("delta_losses", "delta_losses_negative")}
    return {name: np.asarray(value) for name, value in found.items() if not isinstance(value, (str, list, type(None)))}


def _rows(variant: Variant, steps: Sequence[int]) -> list[dict[str, Any]]:
    """The table: the point of the curves, and every number that was found, at each checkpoint."""
    curves = variant.curves() or {}
    places = {int(step): i for i, step in enumerate(curves["step"])}
    rows = []
    for step in steps:
        point = {name: values[places[step]].item() for name, values in curves.items()} | {"step": step}
        found = variant.load(DIRECTIONAL_LOSSES.name, step) | variant.load(HESSIAN_CURVATURE.name, step)
        rows.append(point | {name: value for name, value in found.items() if not isinstance(value, np.ndarray)})
    return rows


def _with_error(row: dict[str, Any], name: str) -> str:
    value, stderr = row[name], row[f"{name}_stderr"]
    return f"{number(value)} ± undefined" if is_known(value) and not is_known(stderr) else with_error(value, stderr)


def adjusted(
    settings: Settings, *, n_samples: int | None = None, span: float | None = None, seed: int | None = None
) -> Settings:
    """The settings with those given replaced; a seed is that of the split, the initialisation and the directions."""
    check_count("samples", settings.n_samples if n_samples is None else n_samples)
    check_positive("span", settings.span if span is None else span)
    changed = {"n_samples": n_samples, "span": span, "seed": seed}
    settings = replace(settings, **{name: value for name, value in changed.items() if value is not None})  # type: ignore[arg-type]
    return settings if seed is None else replace(settings, config=replace(settings.config, seed=seed))


def checkpoints(settings: Settings, out: Path) -> Iterator[Path]:
    """The checkpoints of this run that are on disk."""
    yield from sorted((out / settings.config.name / "checkpoints").glob("step_*.safetensors"))
