"""Random directions in parameter space: a leaf at a time from a key, or dense on request."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from .checks import check_choice, check_count, check_instance, check_names
from .keys import BLOCK, Distribution, Key, check_key, draw, drawn_on, fill, fold_in, on_workers
from .layout import Layout, Leaf, Params
from .leaf_rows import Part, extent, joined, row_slices, rows_of
from .model import Functional
from .philox import AT_ONCE
from .vectors import PART, dot
from .vectors import norm as norm

Normalize = Literal["filter", "layer", "global"]


@dataclass(frozen=True, eq=False)
class Scales:
    """The norms that the groups of a direction are given; measured once, at the unperturbed parameters."""

    layout: Layout
    distribution: Distribution
    targets: dict[str, Tensor]
    """By leaf: the norm of each of its filters, shaped to broadcast against it; or the norm of the leaf's group."""
    groups: dict[str, str] | None
    """By leaf: its group, where groups hold whole leaves; None where they are filters."""
    norm: float
    """The norm of every direction, by construction."""
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, eq=False)
class Direction:
    """One random direction. `leaf(name)` makes one parameter's part of it; `dense()` all of it, as a flat vector."""

    key: Key
    scales: Scales

    def __repr__(self) -> str:
        return f"Direction({self.key!r}, norm={self.norm:.4g})"

    @property
    def norm(self) -> float:
        """The norm by construction: 1, or that of the parameters that the direction moves."""
        return self.scales.norm

    def leaf(self, name: str) -> Tensor:
        """This direction's part for one parameter, in its shape; drawn anew at each call, with the same bits."""
        return joined(self.parts(name))

    def parts(self, name: str) -> Iterator[Part]:
        """The same, some 2 MiB of rows at a time: each part is the caller's to overwrite, and no more is in memory."""
        leaf, target = self.scales.layout.by_name[name], self.scales.targets[name]
        for rows, z in self._drawn(leaf):
            if self.scales.groups is None:
                yield Part(rows, _rescale(z, leaf.within_filter, target[rows] if target.ndim else target))
            else:
                yield Part(rows, z.mul_(target / self._drawn_norms[self.scales.groups[name]]))

    def dense(self) -> Float[Tensor, " p"]:
        """The whole direction as one flat vector of shape (P,)."""
        return stack([self])[0]

    def _drawn(self, leaf: Leaf) -> Iterator[Part]:
        key, slices = fold_in(self.key, leaf.name), row_slices(leaf)
        # a device waits for the launch of its kernels where they draw one part only
        together = 1 if drawn_on(key, self.scales.device).type == "cpu" else AT_ONCE // PART
        for i in range(0, len(slices), together):
            each = [extent(leaf, rows) for rows in slices[i : i + together]]
            whole = each[0][0][0], each[-1][0][1]
            z = _never_zero(draw(key, leaf.numel, self.scales.distribution, *whole, device=self.scales.device))
            for (span, shape), rows in zip(each, slices[i : i + together], strict=True):
                part = z[span[0] - whole[0] : span[1] - whole[0]]
                yield Part(rows, part.view(shape).to(self.scales.dtype))

    @cached_property
    def _drawn_norms(self) -> dict[str, float]:
        """The norm of the raw draw of each group: one more pass over all draws, as groups span several leaves."""
        return _group_norms(self.scales, lambda leaf: (z for _, z in self._drawn(leaf)))


def directions(
    net: Functional,
    *,
    key: Key,
    num: int,
    normalize: Normalize = "filter",
    distribution: Distribution = "normal",
    unit_norm: bool = False,
    zero_vectors: bool = False,
    base: Params | None = None,
) -> tuple[Direction, ...]:
    r"""`num` independent random directions, scaled group by group to the parameters.

    Draw z with independent standard normal (or +-1) entries, partition the coordinates into groups G, and set
    $d_G = z_G \, \|\theta_G\| / \|z_G\|$. A group with $\|\theta_G\| = 0$ gets $d_G = 0$.

    normalize: `filter`: one group per output unit (row of a weight; column of a Hugging Face Conv1D; whole vectors),
    Li et al. (2018). `layer`: one per transformer block, embedding and head apart. `global`: $d = z / \|z\|$.
    So $\|d\| = \|\theta\|$ for `filter` and `layer`, and 1 for `global`. Mean curvature: proofs/expected_curvature.py.
    unit_norm: divide the whole direction by its norm: only the unit of the step changes, no ratio between groups.
    zero_vectors: no step in biases and norm parameters (1-D leaves), Li et al.'s option; then $\|d\| < \|\theta\|$.
    base: the parameters whose norms are used; default `net.params`. Direction i depends on `fold_in(key, i)` only.

    Li, Xu, Taylor, Studer, Goldstein (2018), Visualizing the loss landscape of neural nets, section 4.

    >>> from funcscope.core.keys import key
    >>> from funcscope.core.model import functional
    >>> net = functional(torch.nn.Linear(3, 2))
    >>> d, = directions(net, key=key(0), num=1)
    >>> torch.allclose(d.leaf("weight").norm(dim=1), net.params["weight"].norm(dim=1))
    True
    """
    if not isinstance(net, Functional):
        raise TypeError(
            f"`net` must be what `functional` returns, got a {type(net).__name__}: `functional(model)`, `loss.net`."
        )
    check_key(key)
    check_choice("normalize", normalize, get_args(Normalize))
    check_choice("distribution", distribution, get_args(Distribution))
    check_count("num", num)
    base = net.params if base is None else base
    check_names(base, net.layout.names, "base")
    scales = _scales(net.layout, base, normalize, distribution, zero_vectors, unit_norm)
    return tuple(Direction(fold_in(key, i), scales) for i in range(num))


def stack(directions: Sequence[Direction]) -> Float[Tensor, "n p"]:
    """Several directions of one `directions(...)` call as rows of a matrix, prepared together."""
    check_instance(
        "directions", directions, Sequence, "a list of directions, `fs.directions(net, key=fs.key(0), num=2)`"
    )
    check_count("the number of directions", len(directions))
    for direction in directions:
        check_instance("directions[i]", direction, Direction, "`fs.directions(net, key=fs.key(0), num=2)` makes them")
    scales = directions[0].scales
    if any(direction.scales is not scales for direction in directions):
        return torch.stack([direction.dense() for direction in directions])
    leaves = scales.layout.leaves
    place = drawn_on(directions[0].key, scales.device)
    with torch.inference_mode(False):  # workers may not write to an inference tensor
        raw = torch.empty(len(directions), scales.layout.num, device=place)

    def part(first: int) -> None:
        for row, direction in zip(raw[first : first + share], directions[first : first + share], strict=True):
            for leaf, out in zip(leaves, row.split([leaf.numel for leaf in leaves]), strict=True):
                fill(fold_in(direction.key, leaf.name), out, scales.distribution)
                if len(out) == 1:
                    out.copy_(_never_zero(out))

    # small leaves are bound by Python: a second worker would only wait for the interpreter
    share = 1 if scales.layout.num > BLOCK * len(leaves) else len(directions)
    starts = range(0, len(directions), share)
    if place.type == "cpu":
        on_workers(part, starts)
    else:  # in order, on the stream of kernels of the calling thread
        for start in starts:
            part(start)
    return _scaled(raw, scales)


def _scaled(raw: Tensor, scales: Scales) -> Tensor:
    """The rows of raw draws with the norms of their groups; in place where dtype and device allow."""
    layout, out = scales.layout, raw.to(scales.device, scales.dtype)
    if scales.groups is None:
        for leaf in layout.leaves:
            part = out[:, leaf.slice].view(len(out), *leaf.shape)
            _rescale(part, tuple(dim + 1 for dim in leaf.within_filter), scales.targets[leaf.name])
        return out
    for row in out:
        drawn = _group_norms(scales, lambda leaf, row=row: _cut(row[leaf.slice].view(leaf.shape), leaf))  # type: ignore[misc]
        for leaf in layout.leaves:
            row[leaf.slice] *= scales.targets[leaf.name] / drawn[scales.groups[leaf.name]]
    return out


def _rescale(z: Tensor, within: tuple[int, ...], target: Tensor) -> Tensor:
    """Each filter of z, whose own dimensions are `within`, gets its target norm; in place."""
    drawn = _filter_norms(z, within)
    if bool((drawn == 0).any()):  # filters of one entry each: see `_never_zero`
        z += drawn == 0
        drawn = _filter_norms(z, within)
    return z.mul_(target / drawn)


def _filter_norms(z: Tensor, within: tuple[int, ...]) -> Tensor:
    """Euclidean norms over the dimensions `within`, kept as dimensions of size 1."""
    if not within:
        return z.abs()
    if within[-1] == z.ndim - 1 and len(within) == z.ndim - within[0]:
        return torch.linalg.vector_norm(z, dim=within, keepdim=True)
    # torch's vector_norm is some 25 times slower along columns than along rows; slabs of squares stay in the cache
    slab = max(1, BLOCK // (z[:1].numel() if within[0] == 0 else z[0, :1].numel()))
    return sum(part.square().sum(within, keepdim=True) for part in z.split(slab, within[0])).sqrt()


def _cut(value: Tensor, leaf: Leaf) -> Iterator[Tensor]:
    """A leaf's value in the parts that it is drawn in: norms are sums over these, in this order, wherever it comes from."""
    return (part.values for part in rows_of(value, leaf))


def _group_norms(scales: Scales, parts: Callable[[Leaf], Iterable[Tensor]]) -> dict[str, float]:
    assert scales.groups is not None
    squares: dict[str, float] = {}
    for leaf in scales.layout.leaves:
        group = scales.groups[leaf.name]
        squares[group] = squares.get(group, 0.0) + sum(dot(x, x) for x in parts(leaf))
    return {group: math.sqrt(square) for group, square in squares.items()}


def _never_zero(z: Tensor) -> Tensor:
    """A normal draw is an exact 0 once in 2^24; alone in its group, it needs a direction all the same."""
    return z if z.numel() != 1 or bool(z) else torch.ones_like(z)


def _scales(
    layout: Layout,
    base: Params,
    normalize: Normalize,
    distribution: Distribution,
    zero_vectors: bool,
    unit_norm: bool,
) -> Scales:
    dtype = torch.promote_types(layout.dtype, torch.float32)
    device = base[layout.names[0]].device
    moved = {leaf.name: not zero_vectors or len(leaf.shape) > 1 for leaf in layout.leaves}

    def values(leaf: Leaf) -> Iterator[Tensor]:  # a part at a time: a second set of weights would not fit
        return (part.to(dtype) for part in _cut(base[leaf.name].detach(), leaf))

    groups = None
    if normalize == "filter":
        targets = {}
        for leaf in layout.leaves:
            shape = tuple(1 if dim in leaf.within_filter else size for dim, size in enumerate(leaf.shape))
            norms = torch.empty(shape, dtype=dtype, device=device)  # first: between the parts it would scatter them
            for rows, part in zip(row_slices(leaf), values(leaf), strict=True):
                norms[rows if 0 not in leaf.within_filter and shape else ...] = _filter_norms(part, leaf.within_filter)
            targets[leaf.name] = norms.mul_(moved[leaf.name])
        total = sum(float(norms.cpu().double().square().sum()) for norms in targets.values())
    else:
        whole = layout.group_of("layer") if normalize == "layer" else dict.fromkeys(layout.names, "all")
        groups = {name: whole[name] if moved[name] else "still" for name in layout.names}
        sizes = _group_norms(Scales(layout, distribution, {}, groups, 0.0, dtype, device), values) | {"still": 0.0}
        if normalize == "global":
            sizes["all"] = 1.0
        targets = {name: torch.tensor(sizes[groups[name]], dtype=dtype, device=device) for name in layout.names}
        total = sum(size**2 for size in sizes.values())
    if not any(moved.values()):
        raise ValueError("`zero_vectors` leaves nothing to move: every parameter is a vector.")
    if total == 0:
        raise ValueError(f"every parameter is 0, so `normalize={normalize!r}` leaves no direction; use 'global'.")
    size = math.sqrt(total)
    if unit_norm:
        targets = {name: target / size for name, target in targets.items()}
    return Scales(layout, distribution, targets, groups, 1.0 if unit_norm else size, dtype, device)
