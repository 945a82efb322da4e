"""A user's own model, from its folder and a file of texts: directional losses, and two models on the same directions."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..core.checks import check_choice, check_count
from ..core.criterion import Criterion, causal_lm, classification, masked_lm
from ..core.directions import Normalize
from ..core.keys import Distribution, fold_in, key
from ..core.masks import KNOWN
from ..core.model import functional
from ..core.objective import Loss, objective
from ..core.store import Damaged, load, save, to_json
from ..landscape.compare import Comparison, compare_directional
from ..landscape.directional import Sampling, prepare
from ..landscape.samples import DirectionalLosses
from .inputs import Data, DType, Task, Unit, load_model, load_tokenizer, make_batches, read_texts, task_of
from .inputs.tokens import max_positions
from .record import file_stem, versions

Curvature = Literal["difference", "exact", "none"]
KEEP_EVERY = 10.0
"""Seconds between two copies of the unfinished samples on disk."""

_CRITERIA: dict[Task, Criterion] = {"causal": causal_lm, "masked": masked_lm, "classification": classification}


@dataclass(frozen=True)
class Settings:
    """One study: the texts that are scored, how the model computes, and how its landscape is sampled."""

    data: str
    field: str = "text"
    label_field: str | None = None
    unit: Unit = "paragraph"
    task: Task | None = None
    num_samples: int = 64
    max_seq_length: int | None = None
    """None: 128, or as many positions as the model has."""
    batch_size: int = 8
    packing: bool = False
    n_samples: int = 50
    span: float = 0.1
    normalize: Normalize = "filter"
    distribution: Distribution = "normal"
    curvature: Curvature = "difference"
    slopes: bool = True
    seed: int = 42
    dtype: DType = "auto"
    compute_dtype: DType = "auto"
    attention: Literal["eager", "math", "keep"] = "eager"
    device: str = "cpu"
    allow_pickle: bool = False


class Study(NamedTuple):
    """What `run` has made."""

    numbers: Path
    results: tuple[DirectionalLosses, ...]
    comparison: Comparison | None
    data: Data


class _Opened(NamedTuple):
    """A model that is ready to be sampled."""

    loss: Loss
    data: Data
    described: dict[str, Any]


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
    names = _names(folders)
    stem = _free_stem(out, names, folders)
    started, results, described = time.perf_counter(), [], []
    for number, (folder, name) in enumerate(zip(folders, names, strict=True), start=1):
        opened = _open(settings, folder)
        partial, files = _partial(out, stem, number), _files(folder, Path(settings.data))
        results.append(_sampled(settings, opened.loss, partial, files, name, quiet))
        described.append({"name": name, **opened.described, "values": _scalars(results[-1])})
        data = opened.data
        del opened  # before the next model is loaded
    comparison = compare_directional(*results, names=tuple(names)) if len(results) == 2 else None  # type: ignore[arg-type]
    meta = {
        "kind": "directional" if comparison is None else "comparison",
        "settings": asdict(settings),
        "models": described,
        "data": _counts(settings, data, described[0]["task"]),
        "seconds": time.perf_counter() - started,
        "versions": versions(),
    }
    numbers = out / f"{stem}.npz"
    save(numbers, _arrays(results), meta | ({"comparison": comparison.asdict()} if comparison else {}))
    for number in range(1, len(folders) + 1):
        for ending in (".npz", ".json"):
            _partial(out, stem, number).with_suffix(ending).unlink(missing_ok=True)
    return Study(numbers, tuple(results), comparison, data)


def kept(out: Path) -> list[Path]:
    """The samples of interrupted studies in a folder."""
    return sorted(out.glob("*.unfinished.npz"))


def _partial(out: Path, stem: str, number: int) -> Path:
    return out / f"{stem}.{number}.unfinished.npz"


def _files(folder: Path, data: Path) -> list[tuple[str, int, int]]:
    """What tells one model and one set of texts from another: names, sizes and times of their files."""
    files = [*sorted(path for path in folder.resolve().iterdir() if path.is_file()), data.resolve()]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _check(settings: Settings) -> None:
    """What can be said before a model is loaded; the rest is checked where it is used."""
    for name, allowed in (("curvature", Curvature), ("normalize", Normalize), ("distribution", Distribution)):
        check_choice(name, getattr(settings, name), get_args(allowed))
    for name in ("n_samples", "num_samples", "max_seq_length", "batch_size"):
        if getattr(settings, name) is not None:
            check_count(name, getattr(settings, name))
    if settings.attention == "keep" and settings.curvature == "exact":
        raise ValueError(
            "fused attention has no second derivative: `curvature` 'exact' needs `attention` 'eager' or 'math'."
        )
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as err:
        reason = str(err).splitlines()[0]
        raise ValueError(f"the device {settings.device!r} cannot be used ({reason}): pass another `device`.") from err


def _open(settings: Settings, folder: Path) -> _Opened:
    model = load_model(folder, task=settings.task, dtype=settings.dtype, allow_pickle=settings.allow_pickle)
    task, family = task_of(model), model.config.model_type
    if settings.attention != "keep" and family not in KNOWN:
        raise ValueError(
            f"how a {family!r} model masks its attention is not known here; known are {', '.join(sorted(KNOWN))}. "
            "With `--attention keep` the model masks itself, for losses, slopes and difference curvatures."
        )
    data = make_batches(
        read_texts(settings.data, field=settings.field, label_field=settings.label_field, unit=settings.unit),
        load_tokenizer(folder, model),
        model,
        task=task,
        num_samples=settings.num_samples,
        max_seq_length=settings.max_seq_length or min(128, max_positions(model) or 128),
        batch_size=settings.batch_size,
        packing=settings.packing,
        key=fold_in(key(settings.seed), "masked tokens"),
    )
    compute = None if settings.compute_dtype == "auto" else getattr(torch, settings.compute_dtype)
    net = functional(model.to(settings.device), attention=settings.attention, trainable="all", dtype=compute)
    batches = [{name: value.to(settings.device) for name, value in batch.items()} for batch in data.batches]
    described = {
        "class": type(model).__name__,
        "folder": str(folder.resolve()),
        "task": task,
        "num_parameters": net.layout.num,
        "dtype": str(next(iter(net.params.values())).dtype),
        "compute_dtype": str(net.layout.dtype),
        "attention": settings.attention,
    }
    return _Opened(objective(net, batches, _CRITERIA[task]), data, described)


def _check_alike(settings: Settings, folders: list[Path]) -> None:
    """Pairs need the same coordinates and the same tokens."""
    shapes: list[dict[str, tuple[int, ...]]] = []
    tokens: list[list[dict[str, Tensor]]] = []
    for folder in folders:
        opened = _open(settings, folder)
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


def _names(folders: list[Path]) -> list[str]:
    """Names of the folders; those of their parents before them, where they are the same."""
    paths = [folder.resolve() for folder in folders]
    names = [file_stem(path.name) for path in paths]
    if len(set(names)) < len(names):
        names = [file_stem(f"{path.parent.name}-{path.name}") for path in paths]
    if len(set(names)) < len(names):
        names = [f"{name}-{number}" for number, name in enumerate(names, start=1)]
    return names


def _free_stem(out: Path, names: list[str], folders: list[Path]) -> str:
    """The name of the files: another number behind it where results of other folders have it already."""
    stem, number = "-vs-".join(names), 1
    wanted = [str(folder.resolve()) for folder in folders]
    while _sources(out / f"{stem}.npz") not in ([], wanted):
        number += 1
        stem = f"{'-vs-'.join(names)}-{number}"
    return stem


def _sources(numbers: Path) -> list[str]:
    """The folders that stored numbers come from; none where there is nothing that can be read."""
    try:
        return [model["folder"] for model in load(numbers).meta.get("models", [])]
    except (FileNotFoundError, Damaged):
        return []


def _sampled(
    settings: Settings, loss: Loss, partial: Path, files: list[Any], name: str, quiet: bool
) -> DirectionalLosses:
    sampling = prepare(
        loss,
        loss.net.params,
        key=key(settings.seed),
        n_samples=settings.n_samples,
        span=settings.span,
        normalize=settings.normalize,
        distribution=settings.distribution,
        relative_span=False,
        global_renorm=False,
        two_sided=True,
        compute_gradient=settings.slopes,
        compute_curvature=settings.curvature != "none",
        curvature="exact" if settings.curvature == "exact" else "difference",
        slope="auto",
        chunk=None,
        lazy=None,
    )
    with tqdm(total=settings.n_samples, desc=name, unit="direction", disable=quiet, dynamic_ncols=True) as bar:
        rows = []
        for row in _resumed(settings, sampling, partial, files):
            rows.append(row)
            bar.update(len(row["losses"]))
    return sampling.result(rows)


def _resumed(settings: Settings, sampling: Sampling, partial: Path, files: list[Any]) -> Iterator[dict[str, Tensor]]:
    """The rows that an earlier call has left, then new ones; all are on disk when this ends or is interrupted."""
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
    rows = _left(partial, wanted, max(1e-6, sampling.settings["unit_roundoff"]))
    yield from rows
    saved = time.monotonic()
    try:
        for row in sampling.rows(sum(len(row["losses"]) for row in rows)):
            rows.append(row)
            yield row
            if time.monotonic() - saved > KEEP_EVERY:
                _keep(partial, rows, wanted)
                saved = time.monotonic()
    finally:
        _keep(partial, rows, wanted)


def _left(partial: Path, wanted: dict[str, Any], tolerance: float) -> list[dict[str, Tensor]]:
    """Samples of the same files and settings; the loss at theta, up to rounding, must be the same too."""
    try:
        stored = load(partial)
    except (FileNotFoundError, Damaged):
        return []
    if stored.meta | {"baseline": 0} != wanted | {"baseline": 0}:
        return []
    if not math.isclose(stored.meta["baseline"], wanted["baseline"], rel_tol=tolerance):
        return []
    return [{name: torch.from_numpy(x) for name, x in stored.arrays.items()}]


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


def _counts(settings: Settings, data: Data, task: str) -> dict[str, Any]:
    counts = ("num_samples", "num_tokens", "num_scored", "num_too_short", "num_truncated")
    described = {"path": settings.data, "task": task, **{name: getattr(data, name) for name in counts}}
    return described | {"num_batches": len(data.batches)}
