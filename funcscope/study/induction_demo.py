"""The demonstration of induction heads: train models that grow them and one that cannot, and measure their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.checks import check_count, check_positive
from ..families import induction
from ..families.family import Setup
from .analyze import analyze_models
from .config import UnifiedConfig
from .presets import INDUCTION
from .results import Results
from .training import trained


@dataclass(frozen=True)
class InductionSettings:
    """One demonstration: the models that are trained, by name, and how their landscapes are sampled."""

    configs: Mapping[str, induction.Config] = field(default_factory=lambda: dict(induction.CONFIGS))
    gap: int = 50
    """Steps between two checkpoints."""
    n_samples: int = 20
    span: float = 0.1
    seed: int = 42

    @property
    def name(self) -> str:
        return "induction"


FULL = InductionSettings()
QUICK = InductionSettings(
    {name: replace(config, steps=300, num_scored=64) for name, config in induction.CONFIGS.items() if not config.mlp},
    gap=75,
    n_samples=5,
)


def run(settings: InductionSettings, out: Path, *, quiet: bool = False) -> Results:
    """Train (or go on, or reuse) the models, and measure every checkpoint on sequences of two copies of a random block.

    Everything is kept as it is made, under `out`; an interrupted call goes on from there.
    """
    folders = [
        trained(
            induction.FAMILY, Setup(config, induction.schedule(config, settings.gap)), out, name=name, quiet=quiet
        ).path
        for name, config in settings.configs.items()
    ]
    own: dict[str, dict[str, Any]] = {
        "directional_losses": {"n_samples": settings.n_samples, "span": settings.span},
        "landscape_flatness": {"n_directions": settings.n_samples},
    }
    config = UnifiedConfig(
        metrics=tuple(INDUCTION),
        settings={name: {**changes, **own.get(name, {})} for name, changes in INDUCTION.items()},
        split="probe",
        seed=settings.seed,
        output_dir=str(out),
        verbose=not quiet,
    )
    return analyze_models(folders, config)


def adjusted(settings: InductionSettings, **changes: Any) -> InductionSettings:
    """The settings with those of `n_samples`, `span` and `seed` that are given; a seed is of data, weights and draws."""
    given = {name: value for name, value in changes.items() if value is not None}
    check_count("samples", given.get("n_samples", settings.n_samples))
    check_positive("span", given.get("span", settings.span))
    settings = replace(settings, **given)
    if "seed" not in given:
        return settings
    return replace(settings, configs={name: replace(one, seed=given["seed"]) for name, one in settings.configs.items()})
