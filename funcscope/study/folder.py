"""A local Hugging Face folder, looked at before anything is loaded from it: its settings, its weights, their dtype."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .quiet import one_line

CONFIG_NAME, ADAPTER_CONFIG_NAME = "config.json", "adapter_config.json"
SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
WEIGHTS_NAME, WEIGHTS_INDEX_NAME = "pytorch_model.bin", "pytorch_model.bin.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CONSTANT = "rotary_emb.inv_freq"  # float32 in old checkpoints of any dtype, and read from none


def local_folder(folder: str | Path) -> Path:
    """The folder as a path. Raises NotADirectoryError for a file, FileNotFoundError where there is nothing."""
    path = Path(folder)
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(
            f"a model is a local Hugging Face folder, and {str(folder)!r} is a file: pass the folder that holds it."
        )
    raise FileNotFoundError(
        f"a model is a local Hugging Face folder, and there is no {str(folder)!r}: only local folders are read, "
        "names on the hub and names with `..` are not resolved. Download the model first and pass the path of its folder."
    )


def settings(path: Path) -> dict[str, Any]:
    """The content of `config.json`, for a folder that holds a whole model that can be read without running its code."""
    if (path / ADAPTER_CONFIG_NAME).is_file():
        raise ValueError(
            f"{path} holds an adapter: merge it into its model (`merge_and_unload`) and save that in a folder of its own."
        )
    if not (path / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{path} has no {CONFIG_NAME}: a Hugging Face folder has one beside its weights.")
    config = json_object(path / CONFIG_NAME)
    if not isinstance(config.get("architectures") or [], list):
        raise ValueError(f"{path / CONFIG_NAME} must list its `architectures`, got {config['architectures']!r}.")
    if "transformers_weights" in config:
        raise ValueError(
            f"{path / CONFIG_NAME} chooses its own file of weights (`transformers_weights`), which is not followed: "
            f"name that file {SAFE_WEIGHTS_NAME} and take the entry out."
        )
    if config.get("quantization_config") is not None:
        raise ValueError(f"{path} holds quantised weights, which have no derivatives: pass the unquantised model.")
    if any(path.glob("shard-*-model-*-of-*.safetensors")):
        raise ValueError(f"{path} holds a distributed checkpoint: save the model with `save_pretrained` and pass that.")
    return config


def json_object(file: Path) -> dict[str, Any]:
    """A file that holds one JSON object; ValueError otherwise."""
    with one_line(f"{file} is not JSON: it is damaged or another kind of file"):
        value = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(value).__name__}: it is another kind of file.")
    return value


def weight_files(path: Path, *, allow_pickle: bool) -> list[Path]:
    """The files that hold the weights: safetensors, whole or in shards; pickles only where they are allowed.

    Raises FileNotFoundError where there are none or a shard is missing, ValueError for pickles that are not allowed
    and for an index that is none or names files outside its folder.
    """
    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if not (present := [name for name in (whole, index) if (path / name).is_file()]):
            continue
        if whole == WEIGHTS_NAME and not allow_pickle:
            raise ValueError(
                f"{path} holds its weights as a pickle ({present[0]}), a format that can carry code: save them as "
                "safetensors, or pass `allow_pickle=True`, by which tensors are read and nothing else."
            )
        return [path / whole] if whole in present else _shards(path / index, Path(whole).suffix)
    found = ", ".join(sorted(file.name for file in path.iterdir())[:5])
    raise FileNotFoundError(
        f"{path} has no weights: {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME} is looked for, it holds {found}."
    )


def _shards(index: Path, suffix: str) -> list[Path]:
    content = json_object(index)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names or not isinstance(content.get("metadata"), dict):
        raise ValueError(f"{index} is no index of shards: it must have a `metadata` and a `weight_map` with entries.")
    for name in {str(name): name for name in names.values()}.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(suffix):
            raise ValueError(f"{index} names the shard {name!r}: shards are {suffix} files in the folder of the index.")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(
                f"{index} names the shard {name!r}, which is not there: the checkpoint is incomplete."
            )
    return [index.parent / name for name in sorted(set(names.values()))]


def stored_dtype(files: list[Path]) -> torch.dtype:
    """The dtype that the weights are stored in: the widest where there are several, so that nothing is rounded.

    Only headers are read. Raises ValueError for a damaged file and for quantised weights.
    """
    found: set[torch.dtype] = set()
    for file in files:
        with one_line(f"{file} is damaged or cut short: copy or download it again"):
            stored = set(_safe_dtypes(file) if file.suffix == ".safetensors" else _pickle_dtypes(file))
        if quantised := sorted(str(dtype) for dtype in stored if isinstance(dtype, str)):
            raise ValueError(
                f"{file} holds weights in {quantised[0]}, which have no derivatives: pass unquantised ones."
            )
        found |= {dtype for dtype in stored if isinstance(dtype, torch.dtype)}
    if not found:
        raise ValueError(f"{files[0]} holds no floating-point weights: it is no checkpoint of a model.")
    return reduce(torch.promote_types, sorted(found, key=str))


def _safe_dtypes(file: Path) -> Iterator[torch.dtype | str]:
    """The floating dtypes in a file; as a string where it is one that no model computes in."""
    with safe_open(file, framework="pt") as content:
        for name in content.offset_keys():
            stored = content.get_slice(name).get_dtype()
            if stored.startswith(("F", "BF")) and not name.endswith(_CONSTANT):
                yield _DTYPES.get(stored, stored)


def _pickle_dtypes(file: Path) -> Iterator[torch.dtype | str]:
    for name, tensor in torch.load(file, map_location="meta", weights_only=True).items():
        if tensor.is_floating_point() and not name.endswith(_CONSTANT):
            yield tensor.dtype if tensor.dtype in _DTYPES.values() else str(tensor.dtype)
