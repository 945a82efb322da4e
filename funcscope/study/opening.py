"""From a model's folder and a file of texts to a loss: what every study of a user's own model begins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ..core.architectures import family_of
from ..core.checks import check_count
from ..core.criterion import Criterion, causal_lm, classification, masked_lm
from ..core.keys import fold_in, key
from ..core.model import functional
from ..core.objective import Loss, objective
from ..core.store import Damaged, load
from .inputs import Data, DType, Task, Unit, load_model, load_tokenizer, make_batches, read_texts, task_of
from .inputs.tokens import max_positions
from .record import file_stem

_CRITERIA: dict[Task, Criterion] = {"causal": causal_lm, "masked": masked_lm, "classification": classification}


@dataclass(frozen=True)
class DataSpec:
    """Which texts are scored, and how the model computes: what the settings of every study have."""

    data: str
    field: str = "text"
    label_field: str | None = None
    unit: Unit = "paragraph"
    task: Task | None = None
    num_samples: int = 64
    max_seq_length: int | None = None
    """None: as many as the study says (128), or as many positions as the model has."""
    batch_size: int = 8
    packing: bool = False
    seed: int = 42
    dtype: DType = "auto"
    compute_dtype: DType = "auto"
    attention: Literal["eager", "math", "keep"] = "eager"
    device: str = "cpu"
    allow_pickle: bool = False


class Opened(NamedTuple):
    """A model that is ready to be looked at."""

    loss: Loss
    data: Data
    described: dict[str, Any]


def check_data(source: DataSpec) -> None:
    """What can be said before a model is loaded; the rest is checked where it is used."""
    for name in ("num_samples", "max_seq_length", "batch_size"):
        if getattr(source, name) is not None:
            check_count(name, getattr(source, name))
    try:
        torch.empty(0, device=source.device)
    except (RuntimeError, AssertionError) as err:
        reason = str(err).splitlines()[0]
        raise ValueError(f"the device {source.device!r} cannot be used ({reason}): pass another `device`.") from err


def open_model(source: DataSpec, folder: Path, *, length: int = 128) -> Opened:
    """The loss of the model in a local folder on the texts, cut off at `length` tokens unless the source says where.

    Raises ValueError or OSError in one line for whatever does not fit together.
    """
    model = load_model(folder, task=source.task, dtype=source.dtype, allow_pickle=source.allow_pickle)
    task = task_of(model)
    if source.attention != "keep" and family_of(model.config) is None:
        raise ValueError(
            f"how a {model.config.model_type!r} model masks its attention is not known here. With `--attention keep` the "
            "model masks itself, for losses, slopes and difference curvatures (`funcscope directional`)."
        )
    length = source.max_seq_length or min(length, max_positions(model) or length)
    data = make_batches(
        read_texts(source.data, field=source.field, label_field=source.label_field, unit=source.unit),
        load_tokenizer(folder, model),
        model,
        task=task,
        num_samples=source.num_samples,
        max_seq_length=length,
        batch_size=source.batch_size,
        packing=source.packing,
        key=fold_in(key(source.seed), "masked tokens"),
    )
    compute = None if source.compute_dtype == "auto" else getattr(torch, source.compute_dtype)
    net = functional(model.to(source.device), attention=source.attention, trainable="all", dtype=compute)
    batches = [{name: value.to(source.device) for name, value in batch.items()} for batch in data.batches]
    described = {
        "class": type(model).__name__,
        "folder": str(folder.resolve()),
        "task": task,
        "num_parameters": net.layout.num,
        "dtype": str(next(iter(net.params.values())).dtype),
        "compute_dtype": str(net.layout.dtype),
        "attention": source.attention,
        "max_seq_length": length,
    }
    return Opened(objective(net, batches, _CRITERIA[task]), data, described)


def counts(source: DataSpec, data: Data, task: str) -> dict[str, Any]:
    """What is stored of the texts: how many were used, skipped and cut."""
    names = ("num_samples", "num_tokens", "num_scored", "num_too_short", "num_truncated")
    described = {"path": source.data, "task": task, **{name: getattr(data, name) for name in names}}
    return described | {"num_batches": len(data.batches)}


def one_sequence(settings: Mapping[str, Any], num: int) -> str | None:
    """That one sequence gives no errors over texts, and how there would be more; None where there are more."""
    if num != 1:
        return None
    file = Path(settings["data"])
    if settings.get("num_samples") == 1:
        remedy = "`--num-samples` scores more."
    elif settings.get("packing"):
        remedy = "A smaller `--max-seq-length` cuts the texts into more blocks."
    elif file.suffix.lower() == ".txt" and settings.get("unit") != "line":
        remedy = f"`--unit line` makes every line of {file.name} a sequence."
    else:
        remedy = "Pass a file with more texts."
    return (
        f"There is one sequence: what other texts would change is unknown, and no error over texts is given. {remedy}"
    )


def names_of(folders: list[Path]) -> list[str]:
    """Names of the folders; those of their parents before them, where they are the same."""
    paths = [folder.resolve() for folder in folders]
    names = [file_stem(path.name) for path in paths]
    if len(set(names)) < len(names):
        names = [file_stem(f"{path.parent.name}-{path.name}") for path in paths]
    if len(set(names)) < len(names):
        names = [f"{name}-{number}" for number, name in enumerate(names, start=1)]
    return names


def free_stem(out: Path, wanted: str, folders: list[Path]) -> str:
    """The name of the files: another number behind it where results of other folders have it already."""
    stem, number = wanted, 1
    sources = [str(folder.resolve()) for folder in folders]
    while _sources(out / f"{stem}.npz") not in ([], sources):
        number += 1
        stem = f"{wanted}-{number}"
    return stem


def _sources(numbers: Path) -> list[str]:
    """The folders that stored numbers come from; none where there is nothing that can be read."""
    try:
        return [model["folder"] for model in load(numbers).meta.get("models", [])]
    except (FileNotFoundError, Damaged):
        return []
