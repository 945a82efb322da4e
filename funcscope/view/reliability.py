"""The reliability diagram: how often a model is right where it is so and so sure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from .drawing import style
from .theme import INK, blank, set_linear

Bins = Float[np.ndarray, " k"]


def reliability(models: Mapping[str, tuple[Bins, Bins, Bins, Bins, Bins]]) -> go.Figure:
    """Accuracy over confidence, a dot per bin with its 95 % interval, as large as the bin; on the diagonal is calibrated.

    models: by name, of every bin its confidence, accuracy, lower and upper end of the accuracy's interval, and its positions.
    """
    fig = blank(430, "").update_layout(showlegend=len(models) > 1)
    for axis, name in ((fig.layout.xaxis, "confidence"), (fig.layout.yaxis, "accuracy")):
        set_linear(axis, name, "", 0.0, 1.0)
    fig.layout.xaxis.constrain = "domain"
    fig.layout.yaxis.update(scaleanchor="x", constrain="domain")
    line = {"color": INK, "width": 1.2, "dash": "dot"}
    fig.add_trace(go.Scatter(x=[0, 1], y=[0, 1], mode="lines", line=line, hoverinfo="skip", showlegend=False))
    for i, (name, (confidence, accuracy, low, high, weight)) in enumerate(models.items()):
        there = (weight > 0) & np.isfinite(accuracy)
        size = 5 + 13 * np.sqrt(weight[there] / weight.max(initial=1.0))
        error = {
            "type": "data", "symmetric": False, "array": (high - accuracy)[there], "arrayminus": (accuracy - low)[there],
            "thickness": 1.2, "width": 0, "color": style(i)[0],
        }  # fmt: skip
        fig.add_trace(
            go.Scatter(
                x=confidence[there], y=accuracy[there], error_y=error, mode="lines+markers", name=name,
                line={"color": style(i)[0], "width": 1.2}, marker={"size": size, "color": style(i)[0]},
                customdata=weight[there],
                hovertemplate="confidence %{x:.3f}<br>accuracy %{y:.3f}<br>%{customdata:,.0f} positions<extra></extra>",
            )
        )  # fmt: skip
    return fig
