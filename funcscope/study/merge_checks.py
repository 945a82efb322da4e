"""What can be said of models before they are merged: that they are several, of one kind, with one vocabulary."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.checks import check_choice, check_count, check_number
from .folder import json_object
from .stored_model import StoredModel

METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare", "fisher", "regmean")
FROM_BASE = ("task_arithmetic", "ties", "dare")
"""Methods that merge differences to a base."""
TOKENIZERS = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
_FREE = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "id2label", "label2id",
    "_attn_implementation_autoset", "task_specific_params", "finetuning_task",
}  # fmt: skip
"""Settings in which models of one kind may differ: they do not change what the weights compute."""


def check_settings(method: str, num: int, base: object, settings: dict[str, Any]) -> None:
    """Method, number of models, base, and numbers, before anything is opened."""
    check_choice("method", method, METHODS)
    check_choice("scope", settings["scope"], ("model", "tensor"))
    if num < (1 if method in FROM_BASE else 2) or (method == "slerp" and num != 2):
        least = {"slerp": "exactly two models"}.get(
            method, "at least one model" if method in FROM_BASE else "two models or more"
        )
        raise ValueError(f"`{method}` merges {least}, got {num}: give their folders.")
    if method in FROM_BASE and base is None:
        raise ValueError(f"`{method}` needs `base`, the folder of the model that all were fine-tuned from.")
    if method not in FROM_BASE and base is not None:
        raise ValueError(f"`{method}` has no base: leave `base` out, or give that folder as one of the models.")
    if (weights := settings["weights"]) is not None and len(weights) != num:
        raise ValueError(f"`weights` must be one number for each of the {num} models, got {len(weights)}.")
    for weight in weights or ():
        check_number("weights", weight)
    if method == "slerp" and weights is not None and (min(weights) < 0 or sum(weights) == 0):
        raise ValueError(
            f"`weights` of slerp must be 0 or more, and not both 0, got {weights}: they say how far along the arc to go."
        )
    if method == "ties" and not 0 < settings["density"] <= 1:
        raise ValueError(
            f"`density` must be a share above 0, up to 1, got {settings['density']!r}: it is the share of each task "
            "vector that is kept, 0.2 in the paper."
        )
    if method == "dare" and not 0 <= settings["drop"] < 1:
        raise ValueError(
            f"`drop` must be a probability in [0, 1), got {settings['drop']!r}: it is the share of each task vector that "
            "is not kept."
        )
    check_number("scale", settings["scale"])
    check_number("shrink", settings["shrink"], 0.0, 1.0)
    check_count("shard_bytes", settings["shard_bytes"])


def check_folders(models: Sequence[str | Path], base: str | Path | None, out: Path) -> None:
    """No folder is given twice, and the merge is written to a place of its own."""
    places = [Path(model).resolve() for model in models]
    if len(set(places)) < len(places):
        raise ValueError("one of the models is given twice: give it once, with twice the weight.")
    if base is not None and Path(base).resolve() in places:
        raise ValueError(
            f"{str(base)!r} is given as a model and as its own base: its task vector is 0. Leave one of them out."
        )
    for place in [*places, *([Path(base).resolve()] if base is not None else [])]:
        if out.resolve() == place or place in out.resolve().parents:
            raise ValueError(f"`out` is {str(out)!r}, in one of the folders that are merged: choose a new folder.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"{str(out)!r} exists and is not an empty folder: choose a new one, nothing is overwritten."
        )


def check_alike(models: Sequence[StoredModel]) -> None:
    """One architecture, the same tensors of the same shapes, one vocabulary. Warns of other settings that differ."""
    first = models[0]
    for other in models[1:]:
        kinds = [model.config.get("model_type") for model in (first, other)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"{first.given} is a {kinds[0]} model and {other.given} a {kinds[1]} model: only models of one architecture "
                "have a mean."
            )
        _check_vocabularies(first, other)
        _check_tensors(first, other)
        _warn_of_settings(first, other)


def _check_tensors(first: StoredModel, other: StoredModel) -> None:
    for one, two in ((first, other), (other, first)):
        if lacking := sorted(one.tensors.keys() - two.tensors.keys()):
            raise ValueError(
                f"{two.given} lacks {len(lacking)} of the tensors of {one.given}: {_some(lacking)}. Save both by one "
                "version of transformers, as the same kind of model, with the same weights tied."
            )
    for name, what in first.tensors.items():
        if what.shape != other.tensors[name].shape:
            raise ValueError(
                f"`{name}` has the shape {what.shape} in {first.given} and {other.tensors[name].shape} in {other.given}: "
                "only models of one size and one vocabulary can be merged."
            )
        if what.dtype.is_floating_point != other.tensors[name].dtype.is_floating_point:
            raise ValueError(
                f"`{name}` is {what.dtype} in {first.given} and {other.tensors[name].dtype} in {other.given}."
            )


def _check_vocabularies(first: StoredModel, other: StoredModel) -> None:
    """Where both have a file of one name, it holds the same tokens under the same ids."""
    for name in TOKENIZERS:
        files = [model.folder / name for model in (first, other)]
        if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
            continue
        one, two = (_vocabulary(file) for file in files)
        if one == two:
            continue
        what = "other content"
        if isinstance(one, dict) and isinstance(two, dict):
            token = min((t for t in one.keys() | two.keys() if one.get(t) != two.get(t)), key=str, default=None)
            what = (
                f"{token!r} has the id {one.get(token)} and {two.get(token)}" if token is not None else "other merges"
            )
        raise ValueError(
            f"the tokenizers of {first.given} and {other.given} differ in {name} ({what}): rows of their embeddings mean "
            "other tokens. Merge models of one tokenizer."
        )


def _vocabulary(file: Path) -> Any:
    """Ids by token where the file says so, otherwise its content."""
    if file.suffix != ".json":
        return file.read_bytes()
    content = json_object(file)
    if file.name != "tokenizer.json":
        return content
    model = content.get("model") or {}
    words = model.get("vocab") or {}
    ids = words if isinstance(words, dict) else {json.dumps(token): i for i, token in enumerate(words)}
    added = {each["content"]: each["id"] for each in content.get("added_tokens") or ()}
    merges = model.get("merges") or []
    return {**ids, **added, "merges": [each.split(" ") if isinstance(each, str) else each for each in merges]}


def _warn_of_settings(first: StoredModel, other: StoredModel) -> None:
    one, two = ({k: v for k, v in model.config.items() if k not in _FREE} for model in (first, other))
    if differing := sorted(k for k in one.keys() | two.keys() if one.get(k) != two.get(k)):
        values = [f"{k} {one.get(k)!r} and {two.get(k)!r}" for k in differing]
        warnings.warn(
            f"the settings of {first.given} and {other.given} differ: {_some(values)}. The merge has those of {first.given}.",
            stacklevel=2,
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
