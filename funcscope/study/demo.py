"""The demonstration: train modular addition, then watch its loss landscape while it groks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.checks import check_count, check_positive
from ..families import modular
from ..families.family import Setup
from .analyze import analyze_models
from .config import UnifiedConfig
from .presets import RUN
from .results import Results
from .training import trained


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
        return f"modular-addition-p{self.config.p}"


MODULES = ("module:o_proj", "module:mlp_in", "module:mlp_out")
"""Of the network: what attention writes, its units before the nonlinearity, and what these write."""
GEOMETRY: dict[str, dict[str, Any]] = {
    "feature_geometry": {"sites": MODULES, "size": 512},
    "intrinsic_dimension": {"sites": MODULES, "size": 512},
    "similarity_to_last": {"sites": MODULES, "size": 256},
}
"""Metrics of activations, which take modules of a network that is no described transformer."""
FULL = Settings(modular.Config(), num_checkpoints=30)
QUICK = Settings(modular.QUICK, n_samples=20)


def run(settings: Settings, out: Path, *, quiet: bool = False) -> Results:
    """Train (or go on, or reuse), and measure every checkpoint on the training loss, which is what the optimiser sees.

    Everything is kept as it is made, under `out`: an interrupted call loses at most the steps since the last checkpoint, and
    the next one goes on from there. Results made with other settings are made again.
    """
    setup = Setup(settings.config, modular.schedule(settings.config, settings.num_checkpoints))
    variant = trained(modular.FAMILY, setup, out, name=settings.name, quiet=quiet)
    own: dict[str, dict[str, Any]] = {
        "directional_losses": {"n_samples": settings.n_samples, "span": settings.span},
        "landscape_flatness": {"n_directions": settings.n_samples},
        "flatness_profile": {"n_directions": settings.n_samples},
        "loss_landscape_2d": {"n_points": settings.plane_points},
        "trajectory_plane": {"num": settings.plane_points},
    }
    config = UnifiedConfig(
        metrics=(*RUN, *GEOMETRY),
        settings={name: {**changes, **own.get(name, {})} for name, changes in {**RUN, **GEOMETRY}.items()},
        seed=settings.seed,
        output_dir=str(out),
        verbose=not quiet,
    )
    return analyze_models([variant.path], config)


def adjusted(
    settings: Settings, *, n_samples: int | None = None, span: float | None = None, seed: int | None = None
) -> Settings:
    """The settings with those given replaced; a seed is that of the split, the initialisation and the directions."""
    check_count("samples", settings.n_samples if n_samples is None else n_samples)
    check_positive("span", settings.span if span is None else span)
    changed = {"n_samples": n_samples, "span": span, "seed": seed}
    settings = replace(settings, **{name: value for name, value in changed.items() if value is not None})  # type: ignore[arg-type]
    return settings if seed is None else replace(settings, config=replace(settings.config, seed=seed))
