"""The one way to put a result on disk: arrays and settings in one file, atomic and checksummed, never pickled.

A `.safetensors` or `.npz` file carries its settings and a SHA-256 over both inside, so that one rename makes a result
appear whole or not at all. The `.json` beside it is a copy for people and other programs; nothing reads it back.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

META = "funcscope"
VERSION = 2
"""Of the names of files, columns and settings: files of another version are refused."""


class Damaged(ValueError):
    """A stored file that is truncated, altered, or not one of ours."""


class Outdated(ValueError):
    """A stored file in the format of another version of funcscope."""


class Stored(NamedTuple):
    arrays: dict[str, Any]
    """Tensors from `.safetensors`, numpy arrays from `.npz`."""
    meta: dict[str, Any]
    sha256: str
    """Checksum of the arrays and the settings: what tells one result from another of the same name."""


_UNREADABLE = (
    SafetensorError, zipfile.BadZipFile, zlib.error, tokenize.TokenError, SyntaxError,
    KeyError, TypeError, ValueError, RuntimeError, NotImplementedError, EOFError, OSError,
)  # fmt: skip
"""What the parsers raise for bytes that are not theirs."""


def save(
    path: Path, arrays: Mapping[str, Any], meta: Mapping[str, Any], *, copy: bool = True, sync: bool = True
) -> None:
    """Write arrays and settings to `path` (`.safetensors` or `.npz`), and the settings to a `.json` beside it.

    meta: anything JSON can say; non-finite numbers become null there (arrays keep them). copy: write the `.json`, too. sync:
    wait until it is on the disk; without, a power cut may leave a damaged file, which is then made again.
    Raises OSError where the folder cannot be written, and leaves what was there before; ValueError for a dtype that the
    format does not have, and where the `.json` would replace a file that is not one of ours.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Path(folder) / "a.npz", {"x": np.arange(3)}, {"step": 7})
    ...     load(Path(folder) / "a.npz").meta, sorted(os.listdir(folder))
    ({'step': 7}, ['a.json', 'a.npz'])
    """
    if taken := {META, "file"} & arrays.keys():
        raise ValueError(f"an array cannot be named {taken.pop()!r}: the format uses that name.")
    plain = to_json(meta)
    tensors = {name: _tensor(value) for name, value in arrays.items()}
    head = {"version": VERSION, "sha256": _digest(tensors, plain), "meta": plain}
    text = json.dumps(head, allow_nan=False)
    if copy:
        _check_own(path.with_suffix(".json"))
    if path.suffix == ".safetensors":
        _check_dtypes(path, tensors, {torch.complex64, torch.complex128}, ".npz")
        data = save_safetensors({name: tensor.contiguous() for name, tensor in tensors.items()}, {META: text})
    elif path.suffix == ".npz":
        _check_dtypes(path, tensors, {torch.bfloat16}, ".safetensors")
        buffer = io.BytesIO()
        parts: dict[str, Any] = {META: np.array(text)} | {name: tensor.numpy() for name, tensor in tensors.items()}
        np.savez(buffer, **parts)  # samples are noise: compressing them takes longer than most statistics
        data = buffer.getvalue()
    else:
        raise ValueError(f"a stored file ends in .safetensors or .npz, got {path.name!r}.")
    write(path, data, sync=sync)
    if not copy:
        return
    shapes = {
        name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)} for name, t in tensors.items()
    }
    write(path.with_suffix(".json"), json.dumps({**head, "arrays": shapes}, indent=1).encode())


def load(path: Path) -> Stored:
    """Arrays and settings of a file that `save` wrote.

    Raises FileNotFoundError, Damaged where the file is cut short, was changed, or is not one of ours, and Outdated for
    one in the format of another version.
    """
    data = path.read_bytes()
    try:
        arrays, text = _parse(path, data)
        head = json.loads(text)
        plain, digest = head["meta"], head["sha256"]
    except _UNREADABLE as err:
        raise Damaged(
            f"{path} is damaged or was not written by funcscope ({err}): delete it to have it made again."
        ) from err
    if _digest({name: _tensor(value) for name, value in arrays.items()}, plain) != digest:
        raise Damaged(f"{path} is damaged (its checksum does not match): delete it to have it made again.")
    check_version(path, head)
    return Stored(arrays, plain, digest)


def check_version(path: Path, head: Mapping[str, Any]) -> None:
    """Raises Outdated unless what was stored has the names of this version."""
    if head.get("version") != VERSION:
        raise Outdated(f"{path} was written by another version of funcscope, which is not read: choose a new folder.")


def write(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Replace the file in one step: a reader, or a run after a crash, sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def to_json(value: Any) -> Any:
    """The value with numpy and torch scalars, arrays and tuples as plain JSON; nan and infinities as null.

    >>> to_json({"a": (1, np.float64(0.5), float("nan"))})
    {'a': [1, 0.5, None]}
    """
    if isinstance(value, Mapping):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return to_json(value.tolist())
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}.")


def _check_dtypes(path: Path, tensors: Mapping[str, Tensor], absent: set[torch.dtype], other: str) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype in absent:
            raise ValueError(f"{path.suffix} has no {tensor.dtype}, the dtype of {name!r}: save to a {other} file.")


def _check_own(copy: Path) -> None:
    """Raises ValueError where the copy for people would replace a file of somebody else."""
    if copy.is_file() and b'"sha256"' not in copy.read_bytes():
        raise ValueError(f"{copy} is there and was not written by funcscope: choose another name for the numbers.")


def _parse(path: Path, data: bytes) -> tuple[dict[str, Any], str]:
    if path.suffix == ".safetensors":
        tensors = load_safetensors(data)
        length = int.from_bytes(data[:8], "little")
        return tensors, json.loads(data[8 : 8 + length])["__metadata__"][META]
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, str(arrays.pop(META))


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)  # two names may share one memory
    return torch.from_numpy(np.array(value, order="C"))


def _digest(tensors: Mapping[str, Tensor], meta: Any) -> str:
    sha = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
