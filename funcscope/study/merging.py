"""Models of one architecture become one model, folder by folder, whatever their size: a part of a leaf is in memory."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ..weights.elementwise import all_finite
from .dataset import is_dataset
from .folder import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from .merge_card import card
from .merge_checks import check_alike, check_folders, check_settings
from .merge_data import measured
from .merge_leaves import Merger
from .stored_model import StoredModel, twins
from .tensor_file import NewTensorFile, Shape, TensorFile
from .texts import DataSpec, DType, check_data

Method = Literal["linear", "slerp", "task_arithmetic", "ties", "dare", "fisher", "regmean"]
COPIED = (
    "config.json", "generation_config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "spiece.model", "sentencepiece.bpe.model", "chat_template.*", "*preprocessor_config.json",
)  # fmt: skip
SHARD_BYTES = 5_000_000_000


class MergedFolder(NamedTuple):
    """What a merge has written."""

    path: Path
    num_tensors: int
    num_parameters: int
    """Each tied weight once."""
    num_files: int
    """Of weights."""


def merge_folders(
    models: Sequence[str | Path],
    *,
    out: str | Path,
    method: Method = "linear",
    base: str | Path | None = None,
    weights: Sequence[float | int] | None = None,
    scale: float | int = 1.0,
    density: float | int = 0.2,
    scope: Literal["model", "tensor"] = "model",
    drop: float | int = 0.9,
    seed: int = 42,
    shrink: float | int = 0.9,
    fishers: Sequence[str | Path] = (),
    grams: Sequence[str | Path] = (),
    data: Sequence[DataSpec] = (),
    dtype: DType = "auto",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> MergedFolder:
    r"""One folder of a model made of several, which `from_pretrained` loads.

    method: the rule, applied to every leaf (`funcscope.weights.merge_rules` has the formulas): `linear`; `slerp`, of two
    models; from the task vectors of fine-tuned models to their `base`: `task_arithmetic`, `ties`, `dare`; from what is known
    of each model's data: `fisher` with `fishers`, `regmean` with `grams`, files of `funcscope fisher` in the order of the
    models, or with `data`, the texts of each, from which they are made for this merge alone. RegMean merges linear layers
    so, and takes the weighted mean of all else. A buffer, of which a Fisher file knows nothing, is copied.
    weights: one per model. Shares of a mean; for `slerp` the place on the circle; for `task_arithmetic` factors of the scale.
    scale: of the merged task vector; of each in `task_arithmetic`. density: share of a task vector that `ties` keeps.
    scope: `ties` ranks entries over the whole model, as the paper does, so that leaves which changed little lose more of
    theirs; or within each tensor, as mergekit does. drop, seed: of `dare`; masks are drawn for 2^21 entries at a time.
    shrink: of off-diagonals in `regmean`. dtype: of the merged weights; auto is the widest of the models.

    Every tensor is read and written 2^21 entries at a time, for RegMean a matrix at a time. A weight that is stored under
    two names stays one weight. Settings, tokenizer and generation settings are those of the base, or of the first model.
    The folder appears when it is complete; an error or an interrupt leaves nothing, a killed process a hidden folder beside.

    Raises ValueError for models of other shapes, tensors, vocabularies, for settings that do not fit, and by name for a
    tensor that is not finite; FileExistsError where `out` is a folder that is not empty.
    """
    settings = {
        "weights": None if weights is None else [float(weight) for weight in weights], "scale": scale, "density": density,
        "scope": scope, "drop": drop, "seed": seed, "shrink": shrink, "dtype": dtype, "shard_bytes": shard_bytes,
    }  # fmt: skip
    check_settings(method, len(models), base, settings)
    files = _files(method, len(models), fishers, grams, data)
    check_folders(models, base, Path(out))
    stored = [StoredModel(model) for model in models]
    origin = StoredModel(base) if base is not None else None
    every = [*([origin] if origin else []), *stored]
    check_alike(every)
    same = twins(every)
    with _staged(Path(out)) as stage:
        files = files or [
            measured(method, model, spec, stage / f"data-{i}")
            for i, (model, spec) in enumerate(zip(stored, data, strict=False))
        ]
        merger = Merger(stored, origin, method, settings, files, same)
        made = _write(merger, same, stage, progress)
        _copy(every[0].folder, stage, merger)
        (stage / "README.md").write_text(card(merger, every), encoding="utf-8")
        for file in files if data else ():
            file.path.unlink()
    return made._replace(path=Path(out))


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, which takes its place at the end; an error or an interrupt inside leaves nothing."""
    target = out.resolve()  # a folder of its own name, where `out` is a link or "."
    made_folders = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        yield stage
        stage.chmod(0o777 & ~_umask())
        stage.rename(target)  # over an empty folder, which is all that may be there
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        with suppress(OSError):
            for folder in made_folders:
                folder.rmdir()
        raise


def _files(
    method: str, num: int, fishers: Sequence[str | Path], grams: Sequence[str | Path], data: Sequence[DataSpec]
) -> list[TensorFile]:
    """What was given for each model. Raises ValueError where it does not fit the method, or the number of models."""
    if data:
        if method not in ("fisher", "regmean"):
            raise ValueError(
                f"`data` is for the methods fisher and regmean, got it with {method!r}, which sees no text."
            )
        if fishers or grams:
            raise ValueError("give either texts, `data`, or the files that were made of them, and not both.")
        if len(data) != num:
            raise ValueError(
                f"`data` must be one file of texts for each of the {num} models, in their order, got {len(data)}."
            )
        for spec in data:
            check_data(spec)
            if not is_dataset(spec.data) and not Path(spec.data).is_file():
                raise FileNotFoundError(f"there is no file {spec.data!r}: `data` takes files of texts.")
        return []
    for name, given, its in (("fishers", fishers, "fisher"), ("grams", grams, "regmean")):
        if given and method != its:
            raise ValueError(f"`{name}` are for the method {its!r}, got them with {method!r}.")
        if method == its and len(given) != num:
            raise ValueError(
                f"`{its}` needs a file for each of the {num} models (`{name}`, by `funcscope fisher`) or its texts "
                f"(`data`), got {len(given)}."
            )
    return [TensorFile(Path(file)) for file in (*fishers, *grams)]


def _write(
    merger: Merger, same: dict[str, str], stage: Path, progress: Callable[[int, int], None] | None
) -> MergedFolder:
    shapes = {name: merger.shape(name) for name in merger.models[0].tensors}
    shards = _shards(shapes, merger.settings["shard_bytes"])
    file_of = {
        name: f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i, each in enumerate(shards) for name in each
    }
    if len(shards) == 1:
        file_of = dict.fromkeys(shapes, SAFE_WEIGHTS_NAME)
    total, done = sum(what.num_bytes for what in shapes.values()), 0
    copies = {name: [name, *(twin for twin, other in same.items() if other == name)] for name in shapes}
    with ExitStack() as stack:
        files = {
            file: stack.enter_context(
                NewTensorFile(stage / file, {k: v for k, v in shapes.items() if file_of[k] == file}, {"format": "pt"})
            )
            for file in dict.fromkeys(file_of.values())
        }
        for name, what in shapes.items():
            if name in same:
                continue
            pieces = merger.merged(name) if what.dtype.is_floating_point else merger.copied(name)
            for start, value in pieces:
                _check_range(name, value, what.dtype)
                for each in copies[name]:
                    files[file_of[each]].write(each, value, start)
            done += what.num_bytes * len(copies[name])
            if progress is not None:
                progress(done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (stage / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    num = sum(what.numel for name, what in shapes.items() if name not in same)
    return MergedFolder(stage, len(shapes), num, len(shards))


def _shards(shapes: dict[str, Shape], most: int) -> list[list[str]]:
    """Names by file, in their order: a file has at most so many bytes, or one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, what in shapes.items():
        if shards[-1] and size + what.num_bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += what.num_bytes
    return shards


def _check_range(name: str, value: torch.Tensor, dtype: torch.dtype) -> None:
    """What is finite stays finite in the dtype that it is written in."""
    if dtype.is_floating_point and not all_finite(value.to(dtype)):
        raise ValueError(
            f"merged entries of `{name}` are beyond the range of {dtype}: pass `dtype` 'float32', or a lower scale."
        )


def _copy(folder: Path, stage: Path, merger: Merger) -> None:
    """Settings and tokenizer; code and weights are not among them."""
    for file in sorted({file for pattern in COPIED for file in folder.glob(pattern) if file.is_file()}):
        if file.suffix not in (".safetensors", ".py", ".bin"):
            shutil.copyfile(file, stage / file.name)
    config: dict[str, Any] = json.loads((stage / CONFIG_NAME).read_text(encoding="utf-8"))
    dtypes = {merger.shape(name).dtype for name in merger.names()}
    if len(dtypes) == 1:
        name = str(dtypes.pop()).removeprefix("torch.")
        for entry in {"dtype", "torch_dtype"} & config.keys():
            config[entry] = name
        (stage / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
