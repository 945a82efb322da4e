"""Gram-Schmidt within groups of coordinates, in float64 and in place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.directions import Scales
from ..core.estimate import wide
from ..core.keys import Key, draw, fold_in, normal
from ..core.layout import Leaf

BLOCK = 2**20
"""Coordinates that are widened to float64 at a time."""
DEPENDENT = 1e-12
"""A remainder whose square is below this share of the draw's is rounding: the draw depends on those before it."""


class Group(NamedTuple):
    """Groups of one shape: of each vector, parts (n, g, ...) that are views of it, and the norms (g,) of the g groups."""

    name: str
    parts: list[Tensor]
    norms: Tensor

    @property
    def size(self) -> int:
        """Coordinates of one group."""
        return sum(math.prod(part.shape[2:]) for part in self.parts)


def gram(vectors: Float[Tensor, "k p"], origin: Float[Tensor, " p"] | None = None) -> Float[Tensor, "k k"]:
    """All inner products of the vectors, of their differences to `origin` where given; in float64, block by block."""
    return torch.stack([part @ part.T for part in blocks(vectors, origin)]).sum(0)


def blocks(vectors: Float[Tensor, "k p"], origin: Float[Tensor, " p"] | None = None) -> Iterator[Float[Tensor, "k b"]]:
    """The vectors, or their differences to `origin`, some coordinates at a time in float64."""
    for first in range(0, vectors.shape[1], BLOCK):
        part = vectors[:, first : first + BLOCK].to(wide(vectors.device))
        yield part if origin is None else part - origin[first : first + BLOCK].to(part)


def orthonormalise(vectors: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
    """Gram-Schmidt over whole vectors, linearly independent ones, in their dtype."""
    parts = [vectors.clone()[:, None]]
    first, second, _ = _triangular(parts)
    _apply(parts, first, second)
    return parts[0][:, 0]


def orthogonalise(vectors: Float[Tensor, "n p"], scales: Scales, key: Key) -> int:
    """Make the draws orthogonal within each group of `scales` and give each group its norm; in place.

    Returns how many coordinates were pooled. proofs/grouped_orthogonality.py.
    """
    num, groups = len(vectors), list(_groups(vectors, scales))
    small, ordinary = [g for g in groups if g.size < num], [g for g in groups if g.size >= num]
    chosen = [(group, group.norms > 0) for group in small]
    if 0 < sum(group.size * int(moves.sum()) for group, moves in chosen) < num:
        chosen.append(_smallest(ordinary, num))
    for group in ordinary:
        _settle(group, key)
    if not (pooled := [x for group, moves in chosen for part in group.parts for x in _places(part)[moves]]):
        return 0
    index = torch.cat([x.flatten() for x in pooled]).to(vectors.device)
    norm = math.sqrt(sum(float(group.norms[moves].double().square().sum()) for group, moves in chosen))
    drawn = draw(fold_in(key, "pool"), num * len(index), "normal", device=vectors.device).view(num, 1, -1).to(vectors)
    _settle(Group("pool", [drawn], drawn.new_tensor([norm])), key)
    vectors[:, index] = drawn[:, 0]
    return len(index)


def _groups(vectors: Tensor, scales: Scales) -> Iterator[Group]:
    """Views of the vectors, group by group; filters of a leaf together, some of them at a time."""
    num, leaves = len(vectors), [leaf for leaf in scales.layout.leaves if leaf.numel]
    if scales.groups is None:
        for leaf in leaves:
            yield from _filters(vectors[:, leaf.slice].view(num, *leaf.shape), leaf, scales.targets[leaf.name])
        return
    members: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        members.setdefault(scales.groups[leaf.name], []).append(leaf)
    for name, own in members.items():
        yield Group(name, [vectors[:, None, leaf.slice] for leaf in own], scales.targets[own[0].name].reshape(1))


def _filters(view: Tensor, leaf: Leaf, norms: Tensor) -> Iterator[Group]:
    """The filters of (num, *shape), which may be columns; no copy is made."""
    if leaf.filter_dim is None:
        yield Group(leaf.name, [view[:, None]], norms.reshape(1))
        return
    rows, norms = view.movedim(leaf.filter_dim + 1, 1), norms.reshape(-1)
    step = max(1, BLOCK // rows[0, 0].numel())
    for first in range(0, rows.shape[1], step):
        yield Group(f"{leaf.name}[{first}]", [rows[:, first : first + step]], norms[first : first + step])


def _smallest(ordinary: list[Group], num: int) -> tuple[Group, Tensor]:
    """One of the smallest groups that move: it joins a pool that is too small by itself."""
    moving = [group for group in ordinary if bool((group.norms > 0).any())]
    if not moving:
        raise ValueError(f"fewer than {num} coordinates may move: there are no `num` = {num} orthogonal directions.")
    group = min(moving, key=lambda group: group.size)
    first = int((group.norms > 0).nonzero()[0])
    return group, torch.arange(len(group.norms), device=group.norms.device) == first


def _places(part: Tensor) -> Tensor:
    """The coordinates (g, ...) that a view of the vectors (n, g, ...) shows."""
    index = torch.tensor(part.storage_offset())
    for size, stride in zip(part.shape[1:], part.stride()[1:], strict=True):
        index = index[..., None] + stride * torch.arange(size)
    return index


def _settle(group: Group, key: Key) -> None:
    """Orthogonal parts with the group's norm, drawn again where they are linearly dependent."""
    moves = group.norms > 0
    first, second, dependent = _triangular(group.parts)
    attempt = 0
    while bool((again := dependent & moves).any()):
        for i, part in enumerate(group.parts):
            name = f"again {group.name} {i} {attempt}"
            drawn = normal(fold_in(key, name), part)
            part.copy_(torch.where(again.view(1, -1, *[1] * (part.ndim - 2)), drawn, part))
        first, second, dependent = _triangular(group.parts)
        attempt += 1
    norms = torch.where(moves, group.norms, 0).to(second)
    _apply(group.parts, first, torch.where(moves[:, None, None], norms[:, None, None] * second, 0))


def _triangular(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Lower triangular matrices (g, n, n) that make each group orthonormal one after the other; dependent groups (g,).

    Gram-Schmidt by the Cholesky factor of the Gram matrix, twice: the second takes out what the first left by rounding,
    and their product would bring it back.
    """
    factor, dependent = _factor(_gram(parts, None))
    first = _inverse(factor)
    return first, _inverse(_factor(_gram(parts, first))[0]), dependent


def _factor(square: Tensor) -> tuple[Tensor, Tensor]:
    factor, info = torch.linalg.cholesky_ex(square)
    size, rest = square.diagonal(dim1=1, dim2=2), factor.diagonal(dim1=1, dim2=2).square()
    dependent = (info > 0) | ~(rest > DEPENDENT * size).all(1)
    eye = torch.eye(square.shape[1], dtype=square.dtype, device=square.device)
    return torch.where(dependent[:, None, None], eye, factor), dependent


def _inverse(factor: Tensor) -> Tensor:
    eye = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device).expand_as(factor)
    return torch.linalg.solve_triangular(factor, eye, upper=False)


def _gram(parts: list[Tensor], transform: Tensor | None) -> Tensor:
    """Inner products (g, n, n) of the groups' parts, transformed first where a matrix is given."""
    moved = (z if transform is None else transform @ z for z in map(_wide, _pieces(parts)))
    return torch.stack([z @ z.mT for z in moved]).sum(0)


def _apply(parts: list[Tensor], first: Tensor, second: Tensor) -> None:
    for piece in _pieces(parts):
        piece.copy_((second @ (first @ _wide(piece))).transpose(0, 1).reshape(piece.shape))


def _pieces(parts: list[Tensor]) -> Iterator[Tensor]:
    """The parts, some coordinates at a time where a group is one long vector."""
    for part in parts:
        yield from part.split(BLOCK, 2) if part.ndim == 3 and part.shape[1] == 1 else (part,)


def _wide(part: Tensor) -> Tensor:
    """(g, n, m) in float64."""
    return part.flatten(2).transpose(0, 1).to(wide(part.device))
