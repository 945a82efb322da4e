"""The demonstration of two tasks: train models of prose and code, then measure each of them on both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..core.checks import check_count, check_positive
from ..families import text
from .analyze import analyze_models
from .config import UnifiedConfig
from .presets import TEXT
from .results import Results


@dataclass(frozen=True)
class TextSettings:
    """One demonstration: the models that are trained, and how many held-out texts of each kind they are measured on."""

    config: text.Config
    num_samples: int = 32
    n_samples: int = 10
    """Random directions of the loss."""
    span: float = 0.1
    seed: int = 42

    @property
    def name(self) -> str:
        return "text"


FULL = TextSettings(text.Config())
QUICK = TextSettings(
    text.Config(hidden_size=32, intermediate_size=88, num_layers=2, length=64, steps=400, tuning_steps=150),
    num_samples=24,
    n_samples=5,
)


def run(settings: TextSettings, out: Path, *, quiet: bool = False) -> Results:
    """Train (or go on, or reuse) the base model and those of prose and code, and measure each of them on both kinds of text.

    Everything is kept as it is made, under `out`; an interrupted call goes on from there. The texts are held out: those of
    modules of the standard library of which nothing was trained on. Losses are in nats per byte, as a token is a byte.
    """
    folder = out / settings.config.name
    trained(settings.config, folder, quiet=quiet)
    own = {"directional_losses": {"n_samples": settings.n_samples, "span": settings.span}}
    config = UnifiedConfig(
        dataset_name={kind: str(folder / "heldout" / f"{kind}.jsonl") for kind in text.KINDS},
        base_model=str(folder / text.BASE),
        metrics=tuple(TEXT),
        settings={name: {**changes, **own.get(name, {})} for name, changes in TEXT.items()},
        num_samples=settings.num_samples,
        fisher_n_samples=settings.num_samples,
        max_seq_length=settings.config.length,
        batch_size=16,
        seed=settings.seed,
        output_dir=str(out),
        verbose=not quiet,
    )
    return analyze_models([folder / name for name in text.NAMES], config)


def trained(config: text.Config, folder: Path, *, quiet: bool = False) -> None:
    """All three models in their folders, with a bar over the steps of them."""
    before = dict(zip(text.NAMES, (0, config.steps, config.steps + config.tuning_steps), strict=True))
    total = config.steps + config.tuning_steps * len(text.KINDS)
    with tqdm(total=total, desc="training", unit="step", disable=quiet, dynamic_ncols=True) as bar:
        for point in text.train(config, folder):
            bar.set_postfix_str(f"{point.model}, {point.loss:.2f} nats per byte", refresh=False)
            bar.update(before[point.model] + point.step - bar.n)
        bar.update(total - bar.n)


def adjusted(settings: TextSettings, **changes: Any) -> TextSettings:
    """The settings with those of `n_samples`, `span` and `seed` that are given; a seed is of texts, weights and draws."""
    given = {name: value for name, value in changes.items() if value is not None}
    check_count("samples", given.get("n_samples", settings.n_samples))
    check_positive("span", given.get("span", settings.span))
    settings = replace(settings, **given)
    return replace(settings, config=replace(settings.config, seed=given["seed"])) if "seed" in given else settings
