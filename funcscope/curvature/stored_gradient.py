"""The gradient of a model that fills the memory: written to a file while the backward pass runs, read some rows at a time."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property, partial, reduce
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.layout import Layout, Leaf, Params
from ..core.leaf_rows import Part, extent, joined, row_slices, rows_of
from ..core.memory import without_holes
from ..core.objective import Loss, Theta, check_shapes
from ..core.vectors import dot
from .leaf_lines import LeafLine
from .leafwise import Terms, check_finite, gradient_at, one_by_one
from .lines import Line


class StoredGradient:
    """A gradient in a file, a direction for `restrict` and for sharpness along it; made by `stored_gradient`.

    The file has no name, and goes with this object or with the process.
    """

    def __init__(self, loss: Loss, theta: Theta, file: _Numbers, terms: Terms):
        self.loss, self.theta, self.terms, self._file = loss, theta, terms, file
        self._weight = float(terms.weights.sum())

    def __repr__(self) -> str:
        return f"StoredGradient(norm={self.norm:.4g}, {self._file.num_bytes / 2**30:.3g} GiB in a file)"

    def parts(self, name: str) -> Iterator[Part]:
        """The gradient of one parameter, some rows at a time; each part is the caller's to overwrite."""
        for rows, summed in self._file.parts(name):
            yield Part(rows, summed.div_(self._weight).to(self.loss.net.device))

    def leaf(self, name: str) -> Tensor:
        """The gradient of one parameter, in its shape."""
        return joined(self.parts(name))

    @cached_property
    def norm(self) -> float:
        return math.sqrt(sum(dot(x, x) for name in self.loss.layout.names for _, x in self.parts(name)))

    def is_of(self, loss: Loss, theta: Theta) -> bool:
        """Whether it is the gradient of this loss at this theta: the very objects that it was made of."""
        return loss is self.loss and theta is self.theta


def stored_gradient(loss: Loss, theta: Theta, folder: str | Path) -> StoredGradient:
    r"""$\nabla L(\theta)$ at the memory of the largest parameter: no vector of theta's length is made, but on disk.

    A parameter's gradient is written where the backward pass has made it, and freed. What it gives is a direction as random
    ones are: `restrict(loss, net.params, gradient)` is the loss along it, and `critical_sharpness(loss, net.params,
    gradient)` and `sam_sharpness(loss, net.params, gradient=gradient)` are sharpness with points that exist a leaf at a
    time. Of a model that fits, these have the same without files.

    theta: `net.params` as they are stored, so that no copy is made, or a vector; it must stay as it is while the gradient
    is used. folder: where the file lies, 4 bytes for each parameter (8 in float64) of a disk. Not a folder in memory (tmpfs):
    the file would fill what it is to spare. `tempfile.TemporaryDirectory()` is one on most systems.

    Cost: a forward and a backward pass for each batch, and the file is written once for each. The memory beside the weights
    is the graph of one batch (`split` of the loss makes these smaller) and the gradient of the largest parameter, in the
    dtype that the model computes in; matrices of a large vocabulary and their gradients exist some rows at a time. Weights
    that are cast for the computation (`dtype` of `functional`) are not kept in the graph, but cast again.

    Entries are those of the backward pass in the dtype that the model computes in, summed over batches in float32 at least.

    Raises ValueError for a folder that there is not, or without room; where the loss or an entry is not finite; and as
    `restrict` does where points cannot be made leaf by leaf.

    >>> import tempfile, funcscope as fs
    >>> net, square = fs.functional(torch.nn.Linear(1, 1, bias=False)), fs.custom(lambda out, y: (out - y) ** 2)
    >>> loss = fs.objective(net, [(torch.tensor([[3.0]]), torch.zeros(1, 1))], square)
    >>> gradient = stored_gradient(loss, {"weight": torch.ones(1, 1)}, tempfile.gettempdir())     # of (3 w)^2
    >>> gradient.leaf("weight").item(), gradient.norm
    (18.0, 18.0)
    """
    check_shapes(loss, theta)
    without_holes()  # rows come and go beside the graph, which stays
    params = {name: value.detach() for name, value in loss.leaves(theta).items()}
    dtype = reduce(torch.promote_types, (x.dtype for x in params.values()), torch.float32)
    file = _Numbers(loss.layout, dtype, folder)
    parts = [_added(one, params, file) for one in one_by_one(loss)]
    terms = Terms(*(torch.cat(each).detach().cpu().double() for each in zip(*parts, strict=True)))
    check_finite(sum(int((~x.isfinite()).sum()) for name in params for _, x in file.parts(name)), terms.mean)
    return StoredGradient(loss, theta, file, terms)


def gradient_line(loss: Loss, theta: Theta, gradient: StoredGradient | None = None) -> tuple[Line | LeafLine, Terms]:
    """The line along the gradient, made here or stored, and the terms at theta."""
    if gradient is None:
        at = Loss.wide_leaves(loss, theta)
        made, terms = gradient_at(loss, at)
        return Line(loss, at, made), terms
    if not gradient.is_of(loss, theta):
        raise ValueError(
            "`gradient` is that of another loss, or at another theta: pass the objects that it was made of, as in "
            "`sam_sharpness(loss, net.params, gradient=stored_gradient(loss, net.params, folder))`."
        )
    return LeafLine(loss, loss.leaves(theta), gradient), gradient.terms


def _added(loss: Loss, params: Params, file: _Numbers) -> tuple[Tensor, Tensor]:
    """The terms of one batch; the gradient of their sum goes to the file."""
    anchor = torch.zeros((), requires_grad=True, device=loss.net.device)
    casts = _Casts(params, {leaf.name: leaf.dtype for leaf in loss.layout.leaves})

    def part(name: str, value: Tensor, rows: slice | None = None) -> Tensor:
        return casts.watched(_Leaf.apply(anchor, casts.of(name, value), partial(file.add, name, rows=rows)), name, rows)

    def leaf(name: str, _: Tensor) -> Tensor:
        return part(name, params[name])

    def some_rows(name: str, _: Tensor) -> Iterator[Part]:
        return (Part(rows, part(name, x, rows)) for rows, x in rows_of(params[name], loss.layout.by_name[name]))

    with torch.enable_grad():
        with casts.not_kept():
            sums, weights = loss.terms_at_leaves(leaf, some_rows)
        total = sums.sum()
        if total.requires_grad:
            torch.autograd.grad(total, anchor, allow_unused=True)
    return sums, weights


class _Leaf(torch.autograd.Function):
    """A parameter's value, whose gradient goes elsewhere; the graph hangs on the anchor."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, value: Tensor, give: Callable[[Tensor], None]) -> Tensor:
        ctx.give = give
        ctx.set_materialize_grads(False)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None, None]:
        if gradients[0] is not None:
            ctx.give(gradients[0])
        return None, None, None


class _Casts:
    """Weights in the dtypes that they are used in. A graph keeps the name of one that was cast, and casts it again."""

    def __init__(self, params: Params, dtypes: dict[str, torch.dtype]):
        self.params, self.dtypes = params, dtypes
        self.alive: dict[int, tuple[weakref.ref[Tensor], str, slice | None]] = {}

    def of(self, name: str, value: Tensor) -> Tensor:
        return value.to(self.dtypes[name])

    def watched(self, cast: Tensor, name: str, rows: slice | None) -> Tensor:
        if self.params[name].dtype != cast.dtype:
            self.alive[cast.untyped_storage().data_ptr()] = weakref.ref(cast), name, rows
        return cast

    def not_kept(self) -> AbstractContextManager[None]:
        return torch.autograd.graph.saved_tensors_hooks(self._named, self._made)  # type: ignore[return-value]

    def _named(self, x: Tensor) -> Any:
        ref, *which = self.alive.get(x.untyped_storage().data_ptr(), (None,))
        if ref is None or ref() is None:  # a weight that is gone may have left its place to anything
            return x
        return which, x.size(), x.stride(), x.storage_offset()

    def _made(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        (name, rows), *strided = kept
        value = self.params[name]
        return self.of(name, value if rows is None else value[rows]).as_strided(*strided)


class _Numbers:
    """A number for each parameter in a file without a name, which the system takes back with the object; zeros at first."""

    def __init__(self, layout: Layout, dtype: torch.dtype, folder: str | Path):
        self.layout, self.dtype, self.num_bytes = layout, dtype, layout.num * dtype.itemsize
        self.begun: set[tuple[str, int]] = set()
        self.lock = Lock()
        if not Path(folder).is_dir():
            raise ValueError(f"`folder` must be a folder on a disk, {str(folder)!r} is none: `tempfile.gettempdir()`.")
        if (free := shutil.disk_usage(folder).free) < self.num_bytes:
            raise ValueError(
                f"the gradient takes {self.num_bytes / 2**30:.1f} GiB of `folder`, and {folder} has {free / 2**30:.1f} left: "
                "pass a folder on another disk."
            )
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed with the object)
        weakref.finalize(self, self.file.close)
        self.file.truncate(self.num_bytes)

    def parts(self, name: str) -> Iterator[Part]:
        leaf = self.layout.by_name[name]
        return (Part(rows, self._read(leaf, rows)) for rows in row_slices(leaf))

    def _read(self, leaf: Leaf, rows: slice) -> Tensor:
        (start, stop), shape = extent(leaf, rows)
        values = np.empty(
            (stop - start) * self.dtype.itemsize, np.uint8
        )  # a tensor of torch.func has no memory to fill
        with self.lock:
            self.file.seek((leaf.offset + start) * self.dtype.itemsize)
            size = self.file.readinto(values.data)
        if size != len(values):
            raise OSError(f"the file of the gradient ends within `{leaf.name}`: {size} of {len(values)} bytes.")
        return torch.from_numpy(values).view(self.dtype).view(shape)

    @torch.no_grad()
    def add(self, name: str, gradient: Tensor, rows: slice | None = None) -> None:
        """Adds to what the file has of a leaf, or of some rows of it: one of its `row_slices`."""
        leaf = self.layout.by_name[name]
        for part in rows_of(gradient, leaf) if rows is None else [Part(rows, gradient)]:
            new = part.values.to("cpu", self.dtype)
            if (name, part.rows.start) in self.begun:
                new = new + self._read(leaf, part.rows)
            self.begun.add((name, part.rows.start))
            with self.lock:
                self.file.seek((leaf.offset + extent(leaf, part.rows)[0][0]) * self.dtype.itemsize)
                self.file.write(new.reshape(-1).view(torch.uint8).numpy().data)
