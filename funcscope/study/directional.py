"""A user's own model, from its folder and a file of texts: directional losses, and two models on the same directions."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..core.checks import check_choice, check_count
from ..core.directions import Normalize
from ..core.keys import Distribution, key
from ..core.objective import Loss
from ..core.store import save, to_json
from ..landscape.compare import compare_directional
from ..landscape.compare_result import Comparison
from ..landscape.directional import Sampling, prepare
from ..landscape.directional_result import DirectionalLosses
from ..landscape.sampling import SamplingSettings
from .inputs import Data
from .opening import DataSpec, check_data, counts, free_stem, names_of, open_model
from .pace import pace_of
from .record import versions
from .unfinished import files_of, remove, reusable, unfinished

Curvature = Literal["difference", "exact", "none"]
KEEP_EVERY = 10.0
"""Seconds between two copies of the unfinished samples on disk."""


@dataclass(frozen=True)
class Settings(DataSpec):
    """One study: the texts that are scored, how the model computes, and how its landscape is sampled."""

    n_samples: int = 50
    span: float = 0.1
    normalize: Normalize = "filter"
    distribution: Distribution = "normal"
    curvature: Curvature = "difference"
    slopes: bool = True


class Study(NamedTuple):
    """What `run` has made."""

    numbers: Path
    results: tuple[DirectionalLosses, ...]
    comparison: Comparison | None
    data: Data


def run(
    settings: Settings, model: str | Path, out: Path, *, other: str | Path | None = None, quiet: bool = False
) -> Study:
    """Sample one model, or two on the same directions, and write the numbers to `out` as `.npz` and `.json`.

    Two models must have the same parameters by name and shape, and read the same tokens: both are checked before any
    sample is taken. They are in memory one after the other. An interrupted call keeps its samples; the same command
    goes on from there.

    Raises ValueError or OSError in one line for whatever does not fit together.
    """
    _check(settings)
    folders = [Path(model)] if other is None else [Path(model), Path(other)]
    if len(folders) == 2:
        _check_alike(settings, folders)
    names = names_of(folders)
    stem = free_stem(out, "-vs-".join(names), folders)
    started, results, described = time.perf_counter(), [], []
    for number, (folder, name) in enumerate(zip(folders, names, strict=True), start=1):
        opened = open_model(settings, folder)
        partial, files = unfinished(out, stem, number), files_of(folder, Path(settings.data))
        results.append(_sampled(settings, opened.loss, partial, files, name, quiet))
        notes = list(results[-1].notes)
        described.append({"name": name, **opened.described, "values": _scalars(results[-1]), "notes": notes})
        data = opened.data
        del opened  # before the next model is loaded
    comparison = compare_directional(*results, names=tuple(names)) if len(results) == 2 else None  # type: ignore[arg-type]
    meta = {
        "kind": "directional" if comparison is None else "comparison",
        "settings": asdict(settings),
        "models": described,
        "data": counts(settings, data, described[0]["task"]),
        "seconds": time.perf_counter() - started,
        "versions": versions(),
    }
    numbers = out / f"{stem}.npz"
    save(numbers, _arrays(results), meta | ({"comparison": comparison.asdict()} if comparison else {}))
    for number in range(1, len(folders) + 1):
        remove(unfinished(out, stem, number))
    return Study(numbers, tuple(results), comparison, data)


def _check(settings: Settings) -> None:
    """What can be said before a model is loaded; the rest is checked where it is used."""
    for name, allowed in (("curvature", Curvature), ("normalize", Normalize), ("distribution", Distribution)):
        check_choice(name, getattr(settings, name), get_args(allowed))
    check_count("n_samples", settings.n_samples)
    check_data(settings)
    if settings.attention == "keep" and settings.curvature == "exact":
        raise ValueError(
            "fused attention has no second derivative: `curvature` 'exact' needs `attention` 'eager' or 'math'."
        )


def _check_alike(settings: Settings, folders: list[Path]) -> None:
    """Pairs need the same coordinates and the same tokens."""
    shapes: list[dict[str, tuple[int, ...]]] = []
    tokens: list[list[dict[str, Tensor]]] = []
    for folder in folders:
        opened = open_model(settings, folder)
        shapes.append(opened.loss.layout.shapes)
        tokens.append(opened.data.batches)
        del opened
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{folders[0]} and {folders[1]} cannot be paired: {_first_difference(*shapes)}. "
            "Models of different shape have no directions in common; run the command once for each."
        )
    if not _same([_tokens(batch) for batch in tokens[0]], [_tokens(batch) for batch in tokens[1]]):
        raise ValueError(
            f"the tokenizers of {folders[0]} and {folders[1]} make different tokens of {settings.data!r}, so that their "
            "losses are about different things: give both folders the same tokenizer."
        )
    if not _same(*([{"labels": batch["labels"]} for batch in batches] for batches in tokens)):
        raise ValueError(
            f"{folders[0]} and {folders[1]} have different labels for the texts of {settings.data!r}: give both the same "
            "mask token, and the same `label2id` in config.json."
        )


def _first_difference(first: dict[str, tuple[int, ...]], second: dict[str, tuple[int, ...]]) -> str:
    if only := sorted(first.keys() ^ second.keys()):
        return f"{len(only)} parameters are in one of them only, {only[0]!r} for example"
    name = next(name for name in first if first[name] != second[name])
    return f"{name!r} has shape {first[name]} in one and {second[name]} in the other"


def _tokens(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Real tokens and where they are: the id that stands at padding is each model's own affair."""
    mask = batch["attention_mask"]
    return {"attention_mask": mask, "input_ids": batch["input_ids"].masked_fill(mask == 0, 0)}


def _same(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


def _sampled(
    settings: Settings, loss: Loss, partial: Path, files: list[Any], name: str, quiet: bool
) -> DirectionalLosses:
    sampling = prepare(
        loss,
        loss.net.params,
        SamplingSettings(
            key=key(settings.seed),
            num=settings.n_samples,
            lengths=(settings.span,),
            normalize=settings.normalize,
            distribution=settings.distribution,
            slope="auto" if settings.slopes else None,
            curvature=None if settings.curvature == "none" else settings.curvature,
        ),
    )
    with tqdm(total=settings.n_samples, desc=name, unit="direction", disable=quiet, dynamic_ncols=True) as bar:
        rows = []

        def announce(num: int) -> None:
            if not quiet:
                pace = pace_of(loss, loss.net.params)
                passes = 2 + 3 * bool(sampling.settings["num_jvps"]) + 10 * (settings.curvature == "exact")
                lines = [pace.estimate(num, "directions", passes), pace.note]
                bar.write("\n".join(filter(None, lines)), file=sys.stderr)

        for row in _resumed(settings, sampling, partial, files, announce):
            rows.append(row)
            bar.update(len(row["losses"]))
    return sampling.result(rows)


def _resumed(
    settings: Settings, sampling: Sampling, partial: Path, files: list[Any], announce: Callable[[int], None]
) -> Iterator[dict[str, Tensor]]:
    """The rows that an earlier call has left, then new ones; all are on disk when this ends or is interrupted.

    announce: is told how many directions are to come, before the first.
    """
    baseline = sampling.settings["baseline_loss"]
    wanted = to_json(
        {
            "settings": asdict(settings),
            "plan": sampling.plan,
            "files": files,
            "versions": versions(),
            "baseline": baseline,
        }
    )
    left = reusable(partial, wanted, max(1e-6, sampling.settings["unit_roundoff"]))
    rows = [] if left is None else [{name: torch.from_numpy(x) for name, x in left.arrays.items()}]
    yield from rows
    done, saved = sum(len(row["losses"]) for row in rows), time.monotonic()
    if done < settings.n_samples:
        announce(settings.n_samples - done)
    try:
        for row in sampling.rows(done):
            rows.append(row)
            yield row
            if time.monotonic() - saved > KEEP_EVERY:
                _keep(partial, rows, wanted)
                saved = time.monotonic()
    finally:
        _keep(partial, rows, wanted)


def _keep(partial: Path, rows: list[dict[str, Tensor]], wanted: dict[str, Any]) -> None:
    if rows:
        save(partial, {name: torch.cat([row[name] for row in rows]) for name in rows[0]}, wanted)


def _scalars(result: DirectionalLosses) -> dict[str, Any]:
    return {name: value for name, value in result.asdict().items() if not isinstance(value, np.ndarray)}


def _arrays(results: list[DirectionalLosses]) -> dict[str, np.ndarray]:
    prefixes = ("",) if len(results) == 1 else ("first_", "second_")
    return {
        f"{prefix}{name}": value
        for prefix, result in zip(prefixes, results, strict=True)
        for name, value in result.asdict().items()
        if isinstance(value, np.ndarray)
    }
