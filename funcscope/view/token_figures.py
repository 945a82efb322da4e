"""Figures on a text: where each head looks, token by token, and how much every token counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import unescape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from .names import plain
from .plane_figures import COLOURS, HOLE, SIGNED
from .theme import BLUE, INK, MUTED, blank

VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "Ġ": "␣", "▁": "␣", "Ċ": "↵"})
"""Signs for what cannot be seen, in texts and in vocabularies."""
MOST_LABELS = 40
"""Tokens that an axis names; of more, it names some."""
PER_LINE = 60
"""Letters of a line of coloured text."""


def attention_viewer(
    patterns: Float[np.ndarray, "l h t t"], tokens: Sequence[str], *, start: tuple[int, int] = (0, 0)
) -> go.Figure:
    """The attention pattern of one head at a time, queries down and keys across; a menu picks the layer and the head.

    patterns: of one sequence, by layer and head, each row of queries a distribution over keys. tokens: their texts.
    start: layer and head that are shown first. What a causal pattern has above its diagonal is left open. All heads have
    one scale, from 0 to 1.

    Raises ValueError where the tokens are not as many as the patterns have positions, and for a head that is not there.
    """
    patterns = np.asarray(patterns, np.float64)
    if patterns.ndim != 4 or patterns.shape[2:] != (len(tokens), len(tokens)):
        raise ValueError(
            f"`patterns` must be of shape (layers, heads, {len(tokens)}, {len(tokens)}), as there are {len(tokens)} tokens, "
            f"got {patterns.shape}: take one sequence, without its padding."
        )
    layers, heads = patterns.shape[:2]
    if not (0 <= start[0] < layers and 0 <= start[1] < heads):
        raise ValueError(f"`start` must name one of {layers} layers and {heads} heads, got {start}.")
    is_causal = not np.triu(patterns, 1).any()
    open_above = np.triu(np.ones((len(tokens),) * 2, bool), 1) & is_causal
    each = {(i, j): np.where(open_above, np.nan, patterns[i, j]) for i in range(layers) for j in range(heads)}
    texts = [f"{at} {visible(token)}" for at, token in enumerate(tokens)]
    fig = blank(560, "").update_layout(plot_bgcolor=HOLE, margin={"l": 90, "r": 20, "b": 80, "t": 70})
    bar = {"title": {"text": "attention", "font": {"size": 13, "color": MUTED}}, "thickness": 13, "outlinewidth": 0}
    fig.add_trace(
        go.Heatmap(
            z=each[start], zmin=0, zmax=1, colorscale=COLOURS, name="attention", hoverongaps=False,
            text=[[f"from {query}<br>to {key}" for key in texts] for query in texts],
            hovertemplate="%{text}<br>attention %{z:.3f}<extra></extra>", colorbar=bar,
        )
    )  # fmt: skip
    at = range(0, len(tokens), math.ceil(len(tokens) / MOST_LABELS))
    ticks = {
        "tickvals": [*at], "ticktext": [visible(tokens[i]) for i in at], "showgrid": False, "tickfont": {"size": 10},
        "constrain": "domain", "automargin": True,
    }  # fmt: skip
    fig.layout.xaxis.update(ticks, title={"text": "key: looked at"}, tickangle=-90)
    fig.layout.yaxis.update(ticks, title={"text": "query: looks"}, autorange="reversed", scaleanchor="x")
    choices = [
        {"label": f"layer {i}, head {j}", "method": "restyle", "args": [{"z": [values]}, [0]]}
        for (i, j), values in each.items()
    ]
    menu = {
        "buttons": choices, "active": start[0] * heads + start[1], "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom",
        "bgcolor": "white", "font": {"size": 12, "color": INK}, "showactive": True,
    }  # fmt: skip
    return fig.update_layout(updatemenus=[menu])


def lens_table(
    probability: Float[np.ndarray, "l t"],
    predictions: Sequence[Sequence[str]],
    tokens: Sequence[str],
    target: Float[np.ndarray, "l t"],
    entropy: Float[np.ndarray, "l t"],
) -> go.Figure:
    """The most probable next token of every layer (upward) at every position, as dark as it is probable; numbers on hover.

    probability: of that token. target: of the token that is next. entropy: in nats.
    """
    layers, num = probability.shape
    texts = [[visible(token)[:10] for token in row] for row in predictions]
    hover = [
        [
            f"after {t} {visible(tokens[t])}<br>{visible(predictions[i][t])}: {probability[i, t]:.3f}"
            f"<br>the next token: {target[i, t]:.3f}<br>entropy {entropy[i, t]:.2f} nats"
            for t in range(num)
        ]
        for i in range(layers)
    ]
    fig = blank(130 + 34 * max(layers, 4), "").update_layout(margin={"l": 60, "r": 20, "b": 90, "t": 30})
    fig.add_trace(
        go.Heatmap(
            z=probability, zmin=0, zmax=1, colorscale=[[0, "white"], [1, BLUE]],
            text=texts, texttemplate="%{text}", textfont={"size": 10}, hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>", name="logit lens", xgap=1, ygap=1,
            colorbar={"title": {"text": "probability", "font": {"size": 13, "color": MUTED}}, "thickness": 13},
        )
    )  # fmt: skip
    ticks = {"showgrid": False, "tickfont": {"size": 10}}
    fig.layout.xaxis.update(
        ticks, tickvals=[*range(num)], ticktext=[visible(token) for token in tokens], tickangle=-90, automargin=True,
        title={"text": "token that is read"},
    )  # fmt: skip
    fig.layout.yaxis.update(ticks, title={"text": "layer"}, tickvals=[*range(layers)])
    return fig


def attribution_text(
    tokens: Sequence[str],
    attribution: Float[np.ndarray, " t"],
    *,
    unit: str = "",
    stderr: Float[np.ndarray, " t"] | None = None,
) -> go.Figure:
    """A text whose tokens are coloured by what each adds (vermilion) or takes away (blue); values and errors on hover.

    The scale is symmetric, so that white is zero, and ends at the largest absolute value. A token whose attribution is not
    finite is grey. Tokens that are lines on their own (newlines) end a line.

    Raises ValueError where there are not as many numbers as tokens.
    """
    values = np.asarray(attribution, np.float64)
    if values.shape != (len(tokens),) or not len(tokens):
        raise ValueError(
            f"`attribution` must have a number for each of {len(tokens)} tokens, got shape {values.shape}."
        )
    most = float(np.abs(values[np.isfinite(values)]).max(initial=0.0)) or 1.0
    boxes = placed([visible(token) for token in tokens], ["\n" in token or "Ċ" in token for token in tokens])
    num_lines = 1 + max(line for line, _, _ in boxes)
    fig = blank(150 + 30 * num_lines, "").update_layout(margin={"l": 14, "r": 14, "t": 20, "b": 70})
    for (line, left, right), value in zip(boxes, values, strict=True):
        corners = {
            "x0": left,
            "x1": right,
            "y0": line - 0.42,
            "y1": line + 0.42,
            "line": {"width": 0},
            "layer": "below",
        }
        fig.add_shape(corners, type="rect", fillcolor=shade(value / most))
    colours = ["white" if value < -0.7 * most else INK for value in values]  # black is read better on vermilion
    font = {"family": "ui-monospace, Menlo, Consolas, monospace", "size": 12, "color": colours}
    fig.add_trace(
        go.Scatter(
            x=[(left + right) / 2 for _, left, right in boxes], y=[line for line, _, _ in boxes], mode="markers+text",
            text=[visible(token) for token in tokens], textposition="middle center", textfont=font,
            hovertext=_attributed(tokens, values, stderr, unit), hovertemplate="%{hovertext}<extra></extra>",
            showlegend=False, name="attribution", marker=_signed_scale(values, most, unit),
        )
    )  # fmt: skip
    hidden = {"visible": False}
    fig.layout.xaxis.update(hidden, range=[-0.5, max(PER_LINE, max(right for _, _, right in boxes)) + 0.5])
    fig.layout.yaxis.update(hidden, range=[num_lines - 0.5, -0.5])
    return fig


def _attributed(
    tokens: Sequence[str], values: Float[np.ndarray, " t"], stderr: Float[np.ndarray, " t"] | None, unit: str
) -> list[str]:
    """What a hover says of each token."""
    errors = [""] * len(tokens) if stderr is None else [f" ± {error:.2g}" for error in np.asarray(stderr, np.float64)]
    return [
        f"{at} {visible(token)}<br>{f'{value:+.3g}{error} {plain(unit)}' if np.isfinite(value) else 'undefined'}"
        for at, (token, value, error) in enumerate(zip(tokens, values, errors, strict=True))
    ]


def _signed_scale(values: Float[np.ndarray, " t"], most: float, unit: str) -> dict[str, Any]:
    """Markers that are not seen, for the sake of their scale of colours."""
    bar = {
        "orientation": "h", "thickness": 10, "len": 0.5, "y": 0, "yanchor": "top", "ypad": 20, "outlinewidth": 0,
        "title": {"text": plain(f"attribution ({unit})" if unit else "attribution"), "side": "bottom"},
    }  # fmt: skip
    return {
        "size": 18, "opacity": 0, "color": np.where(np.isfinite(values), values, 0.0), "cmin": -most, "cmax": most,
        "colorscale": [list(stop) for stop in SIGNED], "showscale": True, "colorbar": bar,
    }  # fmt: skip


def visible(token: str) -> str:
    """A token's text with signs for what cannot be seen; never markup.

    >>> visible(" the"), visible("Ġthe"), visible("<b>")
    ('␣the', '␣the', '&lt;b&gt;')
    """
    return plain(token.translate(VISIBLE)) or "∅"


def placed(texts: Sequence[str], breaks: Sequence[bool]) -> list[tuple[int, float, float]]:
    """Line, left and right end of each text, in letters of equal width, in lines of at most `PER_LINE`.

    >>> placed(["ab", "c", "d"], [False, True, False])
    [(0, 0.0, 2.8), (0, 3.0, 4.8), (1, 0.0, 1.8)]
    """
    boxes, line, x = [], 0, 0.0
    for text, is_break in zip(texts, breaks, strict=True):
        width = _letters(text) + 0.8
        if x and x + width > PER_LINE:
            line, x = line + 1, 0.0
        boxes.append((line, x, round(x + width, 6)))
        line, x = (line + 1, 0.0) if is_break else (line, round(x + width + 0.2, 6))
    return boxes


def shade(share: float) -> str:
    """The colour of a share of the largest, from -1 to 1; grey for what is not finite.

    >>> shade(0.0), shade(1.0), shade(float("nan"))
    ('rgb(255,255,255)', 'rgb(213,94,0)', '#e3e3e3')
    """
    if not math.isfinite(share):
        return HOLE
    end = SIGNED[2 if share > 0 else 0][1]
    parts = (int(end[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgb({','.join(str(round(255 + (part - 255) * abs(share))) for part in parts)})"


def _letters(text: str) -> int:
    """As they are seen: an escaped sign is one."""
    return len(unescape(text))
