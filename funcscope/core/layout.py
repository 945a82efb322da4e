"""The flat vector's map: which slice of theta is which parameter, and how parameters fall into blocks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .architectures import Heads
from .checks import check_flat, check_params

Params = Mapping[str, Tensor]
By = Literal["tensor", "layer", "module", "filter"] | Callable[[str], str]


class Leaf(NamedTuple):
    """One parameter tensor: where it lies in theta, and which of its dimensions counts its filters."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    owner: str
    """Class name of the module that holds the parameter."""
    filter_dim: int | None
    """Dimension along which filters (output units) are counted; None for vectors and scalars: one filter."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def slice(self) -> slice:
        """The leaf's place in theta."""
        return slice(self.offset, self.offset + self.numel)

    @property
    def within_filter(self) -> tuple[int, ...]:
        """The dimensions that run inside one filter; none for a scalar."""
        return tuple(dim for dim in range(len(self.shape)) if dim != self.filter_dim)


class View(NamedTuple):
    """The part `tensor.movedim(dim, 0)[slice]` of one leaf."""

    leaf: str
    dim: int
    slice: slice


@dataclass(frozen=True)
class Layout:
    """Names, shapes, dtypes and offsets of the trainable parameters, in the order of `named_parameters()`.

    >>> layout = Layout.of(nn.Linear(3, 2))
    >>> layout.num, layout.names
    (8, ('weight', 'bias'))
    >>> theta = layout.ravel(dict(nn.Linear(3, 2).named_parameters()))
    >>> layout.unravel(theta)["weight"].shape
    torch.Size([2, 3])
    """

    leaves: tuple[Leaf, ...]
    heads: Heads | None = field(default=None, compare=False)
    """Of the model's attention, where its configuration says."""

    @classmethod
    def of(
        cls, model: nn.Module, keep: Callable[[str], bool] = lambda _: True, dtype: torch.dtype | None = None
    ) -> Layout:
        """The layout of those parameters of `model` whose name `keep` accepts, in their own dtype or the one given.

        Tied parameters count once.
        """
        leaves, offset = [], 0
        for name, param in model.named_parameters():
            if keep(name):
                owner = model.get_submodule(name.rpartition(".")[0])
                shape = tuple(param.shape)
                filter_dim = _filter_dim(owner, shape)
                leaves.append(Leaf(name, shape, dtype or param.dtype, offset, type(owner).__name__, filter_dim))
                offset += param.numel()
        return cls(tuple(leaves), _heads(getattr(model, "config", None)))

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(leaf.name for leaf in self.leaves)

    @cached_property
    def by_name(self) -> dict[str, Leaf]:
        return {leaf.name: leaf for leaf in self.leaves}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {leaf.name: leaf.shape for leaf in self.leaves}

    @cached_property
    def num(self) -> int:
        """The number of parameters, P."""
        return sum(self._sizes)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every leaf exactly: theta's dtype unless another is given."""
        return reduce(torch.promote_types, (leaf.dtype for leaf in self.leaves))

    def ravel(self, params: Params, dtype: torch.dtype | None = None) -> Float[Tensor, " p"]:
        """One flat vector of shape (P,), in `dtype` (default: `layout.dtype`); differentiable.

        Raises ValueError for other names and other shapes: a transposed weight has as many entries.
        """
        check_params(params, self.shapes, "params")
        return torch.cat([params[name].reshape(-1).to(dtype or self.dtype) for name in self.names])

    def unravel(self, theta: Float[Tensor, " p"], *, cast: bool = True) -> dict[str, Tensor]:
        """The parameters as views of theta; cast to a leaf's own dtype where it differs, inside autodiff."""
        check_flat("theta", theta, self.num)
        parts = zip(self.leaves, theta.split(self._sizes), strict=True)
        return {leaf.name: part.view(leaf.shape).to(leaf.dtype if cast else part.dtype) for leaf, part in parts}

    def blocks(self, by: By) -> dict[str, tuple[View, ...]]:
        """Named groups of views that cover every coordinate once.

        `tensor`: one block per leaf. `layer`: one per transformer block (the prefix up to the first of `h.N`,
        `layer.N`, `layers.N`, `block.N`, `blocks.N`), `embedding`, and one per remaining module. `module`:
        `attention`, `mlp`, `embedding`, `norm`, `other`. `filter`: one per output unit (row of a weight, column of a
        Hugging Face Conv1D), vectors whole. A callable maps a leaf's name to its block's name.
        """
        groups: dict[str, list[View]] = {}
        for leaf in self.leaves:
            for group, view in _views(leaf, by):
                groups.setdefault(group, []).append(view)
        return {group: tuple(views) for group, views in groups.items()}

    def group_of(self, by: By) -> dict[str, str]:
        """The block's name of every leaf, for partitions that keep leaves whole (all but `filter`)."""
        return {leaf.name: _group(leaf, by) for leaf in self.leaves}

    @cached_property
    def _sizes(self) -> list[int]:
        return [leaf.numel for leaf in self.leaves]


def _heads(config: object) -> Heads | None:
    try:
        return Heads.of(config)
    except (ValueError, AttributeError):
        return None


def _filter_dim(owner: nn.Module, shape: tuple[int, ...]) -> int | None:
    if len(shape) < 2:
        return None
    transposed = type(owner).__name__ == "Conv1D" or "ConvTranspose" in type(owner).__name__
    return 1 if transposed else 0  # Hugging Face's Conv1D and torch's transposed convolutions store (in, out, ...)


def _views(leaf: Leaf, by: By) -> Iterator[tuple[str, View]]:
    if by == "filter" and leaf.filter_dim is not None:
        dim = leaf.filter_dim
        yield from ((f"{leaf.name}[{i}]", View(leaf.name, dim, slice(i, i + 1))) for i in range(leaf.shape[dim]))
    else:
        yield _group(leaf, by), View(leaf.name, 0, slice(None))


_BLOCK = re.compile(r"^(.*?\b(?:h|layers?|blocks?)\.\d+)\.")
_KINDS = {
    "norm": r"norm|\bln_|layer_?norm|\bbn\d*\b|batchnorm",
    "embedding": r"embed|\bwte\b|\bwpe\b|\bwpos\b",
    "attention": r"attn|attention|\b[qkvo]_proj\b",
    "mlp": r"mlp|ffn|feed_?forward|densereludense|intermediate|output\.dense|\bfc\d*\b|\b(?:gate|up|down)_proj\b",
}


def _group(leaf: Leaf, by: By) -> str:
    if callable(by):
        return by(leaf.name)
    if by in ("tensor", "filter"):
        return leaf.name
    if by not in ("layer", "module"):
        raise ValueError(f"`by` must be 'tensor', 'layer', 'module', 'filter' or a callable, got {by!r}.")
    if by == "layer" and (block := _BLOCK.match(leaf.name)):
        return block[1]
    if leaf.owner == "Embedding":
        return "embedding"
    if by == "layer":
        return leaf.name.rpartition(".")[0] or leaf.name
    text = f"{leaf.name} {leaf.owner}".lower()
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, text)), "other")
