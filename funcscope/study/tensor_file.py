"""The safetensors format, a part of a tensor at a time, for models that are larger than memory.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape and first and last byte),
and the bytes. The library reads single tensors from a file that it maps, and pages once read count as memory of the process
until the file is closed; it writes a file from tensors that are all in memory. Here both take memory of the part alone.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from .quiet import one_line

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Shape(NamedTuple):
    """What a tensor is before it has entries."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


class TensorFile:
    """A safetensors file, of which parts of tensors are read; nothing of it stays in memory.

    Raises FileNotFoundError, and ValueError in one line for a file that is damaged or has a dtype that no model computes in.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {str(path)!r}.")
        with (
            one_line(f"{path} is damaged or no safetensors file: copy or make it again"),
            safe_open(path, "pt") as content,
        ):
            self.metadata: dict[str, str] = content.metadata() or {}
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        self.tensors: dict[str, Shape] = {}
        self._starts: dict[str, int] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"{path} holds `{name}` in {entry['dtype']}: pass unquantised weights.")
                self.tensors[name] = Shape(DTYPES[entry["dtype"]], tuple(entry["shape"]))
                self._starts[name] = 8 + length + entry["data_offsets"][0]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries `start` to `stop` of a tensor in its flat order; whole, in its shape, where neither is given."""
        what = self.tensors[name]
        last = what.numel if stop is None else min(stop, what.numel)
        with self.path.open("rb", buffering=0) as file:
            flat = _read(file, self._starts[name] + start * what.dtype.itemsize, last - start, what.dtype, self.path)
        return flat.view(what.shape) if stop is None and start == 0 else flat


class NewTensorFile:
    """A safetensors file of known names and shapes, all zeros, which is filled in any order and appears when it is closed.

    As a context: an error or an interrupt inside leaves nothing.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with NewTensorFile(Path(folder) / "a.safetensors", {"x": Shape(torch.float32, (2, 2))}) as file:
    ...         file.write("x", torch.tensor([1.0, 2.0]), start=2)
    ...         file.add("x", torch.ones(4))
    ...     TensorFile(Path(folder) / "a.safetensors").read("x")
    tensor([[1., 1.],
            [2., 3.]])
    """

    def __init__(self, path: Path, tensors: Mapping[str, Shape], metadata: Mapping[str, str] | None = None):
        self.path, self.tensors = path, dict(tensors)
        header, self._starts, size = _header(self.tensors, metadata or {})
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, self._part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        self._file: BinaryIO = os.fdopen(handle, "r+b", buffering=0)
        try:
            _write(self._file, 0, header)
            self._file.truncate(size)
        except BaseException:
            self.discard()
            raise

    def write(self, name: str, value: Tensor, start: int = 0) -> None:
        """Entries from `start` on, in the flat order of the tensor."""
        dtype, flat = self.tensors[name].dtype, value.detach().reshape(-1)
        if start + len(flat) > self.tensors[name].numel:
            raise ValueError(
                f"`{name}` has {self.tensors[name].numel} entries, and {start + len(flat)} were to be written."
            )
        if len(flat):
            raw = flat.to("cpu", dtype).contiguous().view(torch.uint8).numpy()
            _write(self._file, self._starts[name] + start * dtype.itemsize, raw)

    def add(self, name: str, value: Tensor, start: int = 0, *, size: int = 1 << 20) -> None:
        """The sum of what is there and a value, from an entry on, `size` entries at a time."""
        flat = value.detach().reshape(-1)
        for first in range(0, len(flat), size):
            part = flat[first : first + size].cpu()
            at = start + first
            self.write(name, self.read(name, at, at + len(part)).add_(part), at)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """As `TensorFile.read`, flat."""
        what = self.tensors[name]
        last = what.numel if stop is None else min(stop, what.numel)
        at = self._starts[name] + start * what.dtype.itemsize
        return _read(self._file, at, last - start, what.dtype, self.path)

    def close(self) -> None:
        """Everything is on the disk, and the file is there under its name."""
        os.fsync(self._file.fileno())
        self._file.close()
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(self._part, 0o666 & ~umask)
        os.replace(self._part, self.path)

    def discard(self) -> None:
        """Nothing of it stays."""
        self._file.close()
        Path(self._part).unlink(missing_ok=True)

    def __enter__(self) -> NewTensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def _header(tensors: Mapping[str, Shape], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The first bytes of a file, where each tensor begins, and the size of the whole; wide dtypes first: all are aligned."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at, starts = 0, {}
    for name, what in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        starts[name] = at
        at += what.num_bytes
        content[name] = {
            "dtype": _NAMES[what.dtype], "shape": list(what.shape), "data_offsets": [starts[name], at],
        }  # fmt: skip
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: first + start for name, start in starts.items()}, first + at


def _read(file: BinaryIO, at: int, num: int, dtype: torch.dtype, path: Path) -> Tensor:
    flat = torch.empty(max(num, 0), dtype=dtype)
    if not len(flat):
        return flat
    view = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    file.seek(at)
    while view:
        got = file.readinto(view)  # type: ignore[attr-defined]  # of a raw file, which may give less than it is asked for
        if not got:
            raise ValueError(f"{path} is cut short: copy or make it again.")
        view = view[got:]
    return flat


def _write(file: BinaryIO, at: int, data: Any) -> None:
    view = memoryview(data)
    file.seek(at)
    while view:
        view = view[file.write(view) :]
