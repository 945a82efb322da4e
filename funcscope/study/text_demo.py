"""The demonstration of two tasks: train models of prose and code, then measure each of them on both."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..core.checks import check_count, check_positive
from ..core.store import write
from ..families import text
from .analyze import analyze_models
from .cache import Cache, Outcome
from .catalogue import metric
from .config import UnifiedConfig
from .engine import run as run_metrics
from .presets import INFLUENCE, TEXT
from .results import Results
from .sources import Pretrained


@dataclass(frozen=True)
class TextSettings:
    """One demonstration: the models that are trained, and how many held-out texts of each kind they are measured on."""

    config: text.Config
    num_samples: int = 32
    num_windows: int = 128
    """Of the texts that a model was trained on, drawn at random: those whose influence is measured."""
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
    modules of the standard library of which nothing was trained on; those whose influence is asked for are some that were.
    Losses are in nats per byte, as a token is a byte.
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
    measured = analyze_models([folder / name for name in text.NAMES], config)
    results = replace(measured, outcomes=(*measured.outcomes, *influences(settings, config, folder, quiet=quiet)))
    results.save(out)
    return results


TRAINED_ON = "training texts"
"""The name of the data that a model was trained on."""


def influences(settings: TextSettings, config: UnifiedConfig, folder: Path, *, quiet: bool = False) -> list[Outcome]:
    """Which training texts help held-out ones of each kind: in the base model, and in the one that was fine-tuned on it.

    The candidates are `num_windows` random windows of those that the model was trained on, as it saw them; of the base these
    are prose and code. What they help or harm is the mean loss of the held-out texts.
    """
    chosen = [metric(name).configured(task="data", **changes) for name, changes in INFLUENCE.items()]
    cache, outcomes = Cache(Path(config.output_dir) / "cache"), list[Outcome]()
    for kind in text.KINDS:
        sources = [_trained_and_held_out(settings, config, folder, name, kind) for name in (text.BASE, kind)]
        tasks = (TRAINED_ON, kind)
        outcomes += run_metrics(chosen, sources, tasks=tasks, cache=cache, options=config.options(), quiet=quiet)
    return outcomes


def _trained_and_held_out(
    settings: TextSettings, config: UnifiedConfig, folder: Path, name: str, kind: str
) -> Pretrained:
    """A model on windows that it was trained on, and on held-out texts of a kind."""
    files = {TRAINED_ON: _windows(settings, folder, name), kind: folder / "heldout" / f"{kind}.jsonl"}
    specs = {task: replace(config, dataset_name=str(file)).tasks()["data"] for task, file in files.items()}
    specs[TRAINED_ON] = replace(specs[TRAINED_ON], num_samples=settings.num_windows)
    return Pretrained(str(folder / name), specs, str(folder / name), length=settings.config.length)


def _windows(settings: TextSettings, folder: Path, name: str) -> Path:
    """The file of these, made where it is missing."""
    path, num = folder / "windows" / f"{name}-{settings.num_windows}.jsonl", settings.num_windows
    if not path.is_file():
        lines = (json.dumps({"text": each}) for each in text.windows(name, settings.config, folder, num))
        write(path, "".join(f"{line}\n" for line in lines).encode())
    return path


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
