"""The demonstration: train modular addition, then watch its loss along random directions while it groks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..core.checks import check_count, check_positive
from ..core.directions import directions
from ..core.keys import fold_in, key
from ..core.objective import Loss
from ..core.restrict import restrict
from ..core.store import Stored, load, save, to_json
from ..families import modular
from ..landscape import directional_losses
from .demo_curvature import curvature_at
from .record import versions

PROFILE_POINTS = 41
PROFILE_DIRECTIONS = 8


@dataclass(frozen=True)
class Settings:
    """One demonstration: the run that is trained, and how its landscape is sampled."""

    config: modular.Config
    num_checkpoints: int = 24
    n_samples: int = 50
    span: float = 0.1
    seed: int = 42

    @property
    def name(self) -> str:
        """The name of the page and of the numbers."""
        return f"modular-addition-p{self.config.p}"


FULL = Settings(modular.Config(), num_checkpoints=30)
QUICK = Settings(modular.QUICK, n_samples=20)


def run(settings: Settings, out: Path, *, quiet: bool = False) -> Path:
    """Train (or go on, or reuse), sample at every checkpoint, and write the numbers; returns the path of the `.npz`.

    Everything is kept as it is made, under `out/<run>/`: an interrupted call loses at most the steps since the last
    checkpoint, and the next one goes on from there. Results made with other settings are made again.
    """
    config = settings.config
    folder = out / config.name
    folder.mkdir(parents=True, exist_ok=True)
    steps = modular.schedule(config, settings.num_checkpoints)
    with tqdm(total=config.steps, desc="training", unit="step", disable=quiet, dynamic_ncols=True) as bar:
        for point in modular.train(config, folder, steps):
            bar.set_postfix_str(f"test accuracy {point.test_accuracy:.3f}", refresh=False)
            bar.update(point.step - bar.n)
    loss = modular.objective(modular.network(config), config, "train")
    results, bent = [], []
    for step in tqdm(list(steps), desc="sampling", unit="checkpoint", disable=quiet, dynamic_ncols=True):
        results.append(_sampled(settings, loss, folder, step))
        bent.append(curvature_at(config, settings.seed, loss, folder, step))
    curves = modular.checkpoint(config, folder, steps[-1]).curves
    path = out / f"{settings.name}.npz"
    arrays = _stacked(results, curves) | _profiles(settings, loss, folder, _phases(steps, curves))
    save(path, arrays, _described(settings, results, bent, curves))
    return path


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


def _sampled(settings: Settings, loss: Loss, folder: Path, step: int) -> Stored:
    """The directional losses at one checkpoint: stored ones where the settings are the same."""
    path = folder / "directional" / f"step_{step:05d}.npz"
    weights = load(modular.path(folder, step)).sha256
    wanted = to_json(
        {**asdict(settings), "step": step, "checkpoint": weights, "metric": "directional_losses", "version": 1}
    )
    if path.exists() and (stored := load(path)).meta["settings"] == wanted:
        return stored
    theta = loss.layout.ravel(modular.checkpoint(settings.config, folder, step).params)
    result = directional_losses(
        loss,
        theta,
        key=key(settings.seed),  # the same draws at every step: differences over training are not noise of the draw
        n_samples=settings.n_samples,
        span=settings.span,
        two_sided=True,
        compute_gradient=True,
        compute_curvature=True,
    ).asdict()
    arrays = {name: value for name, value in result.items() if isinstance(value, np.ndarray)}
    values = {name: value for name, value in result.items() if name not in arrays}
    save(path, arrays, {"settings": wanted, "values": values})
    return load(path)


def _phases(steps: tuple[int, ...], curves: list[modular.Point]) -> tuple[int, ...]:
    """The start, the last checkpoint that has memorised without generalising, and the end."""
    by_step = {point.step: point for point in curves}
    memorised = [s for s in steps if by_step[s].train_accuracy > 0.99 and by_step[s].test_accuracy < 0.5]
    return (steps[0], memorised[len(memorised) // 2] if memorised else steps[len(steps) // 2], steps[-1])


def _profiles(settings: Settings, loss: Loss, folder: Path, steps: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The loss on lines through three checkpoints, a few directions each."""
    alphas = torch.linspace(-0.5, 0.5, PROFILE_POINTS)
    lines = []
    for step in steps:
        params = modular.checkpoint(settings.config, folder, step).params
        dirs = directions(loss.net, key=fold_in(key(settings.seed), "profiles"), num=PROFILE_DIRECTIONS, base=params)
        with torch.no_grad():
            phis = [restrict(loss, loss.layout.ravel(params), direction) for direction in dirs]
            lines.append(torch.stack([torch.func.vmap(phi, chunk_size=8)(alphas) for phi in phis]))
    return {
        "profile_alpha": alphas.numpy(),
        "profile_step": np.array(steps),
        "profile_loss": torch.stack(lines).numpy(),
    }


def _stacked(results: list[Stored], curves: list[modular.Point]) -> dict[str, np.ndarray]:
    samples = {name: np.stack([stored.arrays[name] for stored in results]) for name in results[0].arrays}
    columns = np.array(curves, dtype=np.float64).T
    traced = {f"curve_{name}": column for name, column in zip(modular.Point._fields, columns, strict=True)}
    steps = np.array([stored.meta["settings"]["step"] for stored in results])
    return {"step": steps, **samples, **traced}


def _described(
    settings: Settings, results: list[Stored], bent: list[dict[str, float | None]], curves: list[modular.Point]
) -> dict[str, Any]:
    by_step = {point.step: point._asdict() for point in curves}
    rows = [
        {**by_step[stored.meta["settings"]["step"]], **stored.meta["values"], **more}
        for stored, more in zip(results, bent, strict=True)
    ]
    return {"settings": asdict(settings), "table": rows, "versions": versions()}


def _with_error(row: dict[str, Any], name: str) -> str:
    value, stderr = row[name], row[f"{name}_stderr"]
    return "undefined" if value is None else f"{value:.3g} ± " + ("undefined" if stderr is None else f"{stderr:.1g}")


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
