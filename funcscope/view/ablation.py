"""A figure of an ablation grid: one number over a setting, a line for every combination of the others."""

from __future__ import annotations

import numpy as np
import scipy

from ..study.metric import nearest
from ..study.sweep import SEED, Sweep
from .curves import Line, bars, lines
from .drawing import titled
from .names import plain
from .reading import Drawn


def sweep_figure(swept: Sweep, metric: str, quantity: str, *, along: str) -> Drawn:
    """The mean of a number over seeds with its 95 % interval (Student's t), over the values of one setting of the grid.

    along: a name of the grid. Its numbers are an axis, with a line for every combination of the other settings and models;
    names are rows. Raises ValueError for a name that is not in the grid, a metric or quantity that was not measured.
    """
    grid = [name for name in swept.points[0] if name != SEED]
    if along not in grid:
        raise ValueError(f"the grid has no setting {along!r}{nearest(along, grid)}")
    frame = swept.over_seeds()
    for column, name in (("metric", metric), ("quantity", quantity)):
        there = frame[column].dropna().unique().tolist()
        if name not in there:
            raise ValueError(f"no {column} {name!r} was measured{nearest(name, there)}")
        frame = frame[frame[column] == name]
    unit = str(frame["unit"].iloc[0] or "")
    half = scipy.stats.t.ppf(0.975, np.maximum(frame["num"] - 1, 1)) * frame["stderr"]
    frame = frame.assign(half=half).sort_values(along)
    others = [name for name in (*grid, "model") if name != along and frame[name].nunique() > 1]
    groups = frame.groupby(others, sort=False) if others else [((), frame)]
    named = [(", ".join(map(str, key if isinstance(key, tuple) else (key,))), rows) for key, rows in groups]
    label = quantity.replace("_", " ")
    if all(isinstance(x, (int, float)) for x in frame[along].tolist()):
        each = [Line(plain(name), *(rows[x].to_numpy(float) for x in (along, "value", "half"))) for name, rows in named]
        fig, notes = lines(each, name=label, unit=unit, at=along)
    else:
        rows = [plain(", ".join(filter(None, [str(x), name]))) for name, part in named for x in part[along]]
        values, halves = (np.concatenate([part[x].to_numpy(float) for _, part in named]) for x in ("value", "half"))
        each = [Line("", np.arange(len(rows)), values, halves)]
        fig, notes = bars(rows, each, name=label, unit=unit, dots=True), []
    seeds = int(frame["num"].max())
    caption = (
        f"The {label} of {metric} along {along}: means over {seeds} seeds, with 95 % intervals where there are several."
    )
    return Drawn(titled(fig, plain(f"{label[:1].upper()}{label[1:]}"), *notes), caption)
