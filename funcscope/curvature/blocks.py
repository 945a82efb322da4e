"""Blocks of parameters, by partition, attention head or views, and which rows and columns of a parameter they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from ..core.checks import check_instance
from ..core.heads import head_views
from ..core.layout import By, Layout, View

Blocks = By | Literal["none", "head"] | Mapping[str, Sequence[View]]


def block_views(layout: Layout, by: Blocks) -> dict[str, tuple[View, ...]]:
    """The views of every block.

    Raises ValueError for `filter`, which has as many blocks as the model has units, for `head` where the model's attention is
    not known, and for views that are none of this layout.
    """
    check_instance("layout", layout, Layout, "`net.layout`")
    if isinstance(by, Mapping):
        views = {name: tuple(each) for name, each in by.items()}
        _check_views(layout, views)
        return views
    if by == "none":
        return layout.blocks(lambda _: "all")
    if by == "head":
        return _by_head(layout)
    if not callable(by) and by not in ("tensor", "layer", "module"):
        raise ValueError(
            f"`by` must be 'none', 'tensor', 'layer', 'module', 'head', a callable or views by name, got {by!r}."
        )
    return layout.blocks(by)


def places_of(layout: Layout, views: Mapping[str, Sequence[View]]) -> dict[str, list[tuple[int, slice, slice]]]:
    """By parameter: block, and which rows and columns of the parameter as a matrix belong to it."""
    places: dict[str, list[tuple[int, slice, slice]]] = {name: [] for name in layout.names}
    whole = slice(None)
    for block, members in enumerate(views.values()):
        for view in members:
            ndim = len(layout.by_name[view.leaf].shape)
            if view.slice != whole and (view.dim > 1 or (view.dim == 1 and ndim > 2)):
                raise ValueError(
                    f"a view of `{view.leaf}` cuts dimension {view.dim}: only rows and columns can be cut."
                )
            by_row = view.dim == 0 and ndim > 1
            places[view.leaf].append((block, view.slice if by_row else whole, whole if by_row else view.slice))
    return places


def _by_head(layout: Layout) -> dict[str, tuple[View, ...]]:
    """Queries, keys, values and outputs of every head, and what is left of every layer."""
    if layout.heads is None:
        raise ValueError("`by='head'` needs a Hugging Face model with attention heads: take 'layer', or views by name.")
    heads = head_views(layout, layout.heads)
    inside = {view.leaf for views in heads.values() for view in views}
    layers = {name: tuple(v for v in views if v.leaf not in inside) for name, views in layout.blocks("layer").items()}
    return heads | {name: views for name, views in layers.items() if views}


def _check_views(layout: Layout, blocks: Mapping[str, Sequence[View]]) -> None:
    """Every block has a view, and every view an entry of a parameter of this layout."""
    if empty := [name for name, views in blocks.items() if not views] or ([] if blocks else ["by"]):
        raise ValueError(f"`by` must map names to views, at least one each, and {empty[0]!r} has none.")
    for name, views in blocks.items():
        for view in views:
            if not isinstance(view, View):
                raise TypeError(
                    f"`by` must map names to lists of views, got a {type(view).__name__} in block {name!r}: "
                    "`{'first rows': [View('0.weight', 0, slice(0, 2))]}`."
                )
            shape = layout.shapes.get(view.leaf)
            if shape is None:
                raise ValueError(f"block {name!r} has a view of {view.leaf!r}: take one of `net.layout.names`.")
            if not 0 <= view.dim < max(len(shape), 1):
                raise ValueError(f"a view of `{view.leaf}` cuts dimension {view.dim}, and its shape is {shape}.")
            if shape and not len(range(*view.slice.indices(shape[view.dim]))):
                raise ValueError(
                    f"a view of `{view.leaf}` of shape {shape} has no entry: {view.slice} of dimension {view.dim}."
                )
