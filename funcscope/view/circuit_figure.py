"""A circuit as a graph: layers from the bottom to the top, heads and MLPs as nodes, edges as wide as their share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from .names import plain
from .numbers import number, with_error
from .theme import BLUE, INK, VERMILION, blank

WIDEST = 9
"""Pixels of the edge of the largest weight."""
BOW = 0.35
"""How far edges that have the same ends lie apart."""


class _Place(NamedTuple):
    level: int
    """Of the drawing: the embedding's is 0, and each layer has one of heads and one of its MLP."""
    is_head: bool
    text: str
    layer: str = ""


def circuit_graph(
    nodes: Sequence[str],
    edges: Sequence[tuple[str, str]],
    weights: Float[np.ndarray, " e"],
    *,
    stderr: Float[np.ndarray, " e"] | None = None,
) -> go.Figure:
    """Which part of a transformer writes what another one reads, as `edge_attribution` names them, layers upward.

    nodes: `embed`, `a0.1` (layer 0, head 1), `m0` (the MLP of layer 0), `logits`; those without an edge are not drawn. edges:
    senders and receivers, the latter with an ending for a head's query, key or value (`a1.0.q`). An edge is vermilion where
    its weight is above 0 and blue below, and as wide as its size; hovers have the numbers. Weights
    that are not finite are not drawn.

    Raises ValueError for other names, ends that are no node, and where there are not as many weights as edges.

    >>> fig = circuit_graph(["embed", "a0.1", "logits"], [("embed", "a0.1.v"), ("a0.1", "logits")], np.array([0.5, -0.2]))
    >>> [trace.text for trace in fig.data if trace.name == "nodes"]
    [('embed', '0.1', 'logits')]
    """
    weights = np.asarray(weights, np.float64)
    errors = np.full(weights.shape, np.nan) if stderr is None else np.asarray(stderr, np.float64)
    if weights.shape != (len(edges),) or errors.shape != weights.shape:
        raise ValueError(f"`weights` must have a number for each of {len(edges)} edges, got shape {weights.shape}.")
    ends = [(sender, re.sub(r"\.[qkv]$", "", receiver)) for sender, receiver in edges]
    if unknown := [name for pair in ends for name in pair if name not in nodes]:
        raise ValueError(f"`nodes` must have the ends of all edges, and {unknown[0]!r} is not among them.")
    finite = np.isfinite(weights)
    used = {name for pair, is_there in zip(ends, finite, strict=True) if is_there for name in pair}
    at = _positions([name for name in nodes if name in used])
    top = max((y for _, y, _ in at.values()), default=1)
    fig = blank(190 + 46 * top, "layer").update_layout(showlegend=False, hovermode="closest", margin={"b": 24})
    most, twins = float(np.abs(weights[finite]).max(initial=0.0)) or 1.0, Counter[tuple[str, str]]()
    for i in np.argsort(np.abs(weights), kind="stable"):  # the widest on top
        if finite[i]:
            fig.add_traces(_edge(at, ends[i], twins[ends[i]], edges[i], weights[i], errors[i], most))
            twins[ends[i]] += 1
    fig.add_trace(_dots(at))
    wide = max((abs(x) for x, _, _ in at.values()), default=0) + 0.8
    fig.layout.xaxis.update(visible=False, range=[-wide, wide])
    layers: dict[str, int] = {}
    for y, layer in sorted((y, place.layer) for _, y, place in at.values() if place.layer):
        layers.setdefault(layer, y)
    fig.layout.yaxis.update(tickvals=[*layers.values()], ticktext=[*layers], range=[-0.6, top + 0.6])
    fig.layout.yaxis.update(showgrid=False, zeroline=False)
    return fig


def _positions(nodes: Sequence[str]) -> dict[str, tuple[float, int, _Place]]:
    """Across and up, without levels on which nothing is."""
    places = {name: _place(name) for name in nodes}
    levels = sorted({each.level for each in places.values()})
    at: dict[str, tuple[float, int, _Place]] = {}
    for y, level in enumerate(levels):
        row = [name for name, each in places.items() if each.level == level]
        shift = 0.5 * (1 if y % 2 else -1) * (len(row) == 1 and 0 < y < len(levels) - 1)  # no edge runs through a node
        at |= {name: (i - (len(row) - 1) / 2 + shift, y, places[name]) for i, name in enumerate(row)}
    return at


def _place(name: str) -> _Place:
    if name in ("embed", "logits"):
        return _Place(0 if name == "embed" else 10**9, False, name)
    if not (known := re.fullmatch(r"([am])(\d+)(?:\.(\d+))?", name)) or (known[1] == "a") != (known[3] is not None):
        raise ValueError(f"`nodes` must be named as `embed`, `a0.1`, `m0` and `logits`, got {name!r}.")
    layer, is_head = int(known[2]), known[1] == "a"
    return _Place(
        1 + 2 * layer + (not is_head), is_head, f"{layer}.{known[3]}" if is_head else f"MLP {layer}", known[2]
    )


def _edge(
    at: dict[str, tuple[float, int, _Place]], ends: tuple[str, str], twin: int, names: tuple[str, str], weight: float,
    stderr: float, most: float,
) -> list[go.Scatter]:  # fmt: skip
    """A curve that bows outward the more levels it passes, and an unseen mark in its middle that has the numbers."""
    (x0, y0, _), (x1, y1, _) = (at[name] for name in ends)
    side = 1.0 if x0 + x1 >= 0 else -1.0
    bow = side * 0.35 * max(0, abs(y1 - y0) - 1) + BOW * (-1) ** twin * ((twin + 1) // 2)
    t = np.linspace(0, 1, 25)
    x, y = x0 + (x1 - x0) * t + 2 * bow * t * (1 - t), y0 + (y1 - y0) * t
    colour = VERMILION if weight > 0 else BLUE
    line = {"color": colour, "width": max(0.6, WIDEST * abs(weight) / most)}
    size = with_error(weight, stderr) if np.isfinite(stderr) else number(weight)
    text = f"{plain(names[0])} to {plain(names[1])}<br>share {size}"
    curve = go.Scatter(x=x, y=y, mode="lines", line=line, opacity=0.6, hoverinfo="skip", name=" -> ".join(names))
    mark = {"size": 12, "color": colour, "opacity": 0}
    middle = go.Scatter(x=x[12:13], y=y[12:13], mode="markers", marker=mark, hovertext=[text], name="share")
    return [curve, middle.update(hovertemplate="%{hovertext}<extra></extra>")]


def _dots(at: dict[str, tuple[float, int, _Place]]) -> go.Scatter:
    """Heads are circles, all others squares."""
    shapes = ["circle" if place.is_head else "square" for _, _, place in at.values()]
    mark = {"symbol": shapes, "size": 30, "color": "white", "line": {"width": 1.4, "color": INK}}
    return go.Scatter(
        x=[x for x, _, _ in at.values()], y=[y for _, y, _ in at.values()], mode="markers+text", marker=mark, name="nodes",
        text=[place.text for _, _, place in at.values()], textfont={"size": 10, "color": INK}, hovertext=[*at],
        hovertemplate="%{hovertext}<extra></extra>",
    )  # fmt: skip
