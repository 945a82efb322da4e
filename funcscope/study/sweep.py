"""Ablation grids: one study for every combination of settings, and what seeds say of each number."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .analyze import analyze_models
from .config import UnifiedConfig
from .results import Results
from .subject import Source

if TYPE_CHECKING:
    from pandas import DataFrame

SEED = "seed"


@dataclass(frozen=True, eq=False)
class Sweep:
    """The results of every point of a grid."""

    points: tuple[dict[str, Any], ...]
    """What was set, by name."""
    results: tuple[Results, ...]

    def to_frame(self) -> DataFrame:
        """Tidy: the frame of every study below one another, with a column for everything that was set."""
        import pandas as pd

        tables = [each.to_frame().assign(**point) for point, each in zip(self.points, self.results, strict=True)]
        names = list(self.points[0])
        frame = pd.concat(tables, ignore_index=True)
        return frame[[*names, *(name for name in frame.columns if name not in names)]]

    def over_seeds(self) -> DataFrame:
        """Every single number as its mean over the seeds with the standard error of that mean; `num` of them.

        A row for every model, metric, quantity and combination of the other settings. `stderr` is over seeds alone, sd / sqrt
        num with n - 1: nan for one seed. Numbers that are not resolved are left out, and `num` is smaller.
        """
        frame = self.to_frame()
        known = frame["value"].map(_is_number) & (
            frame["resolved"].fillna(True).astype(bool) if "resolved" in frame else True
        )
        single = frame[known]
        axes = [name for name in frame.columns if name not in _NUMBERS and name not in self.points[0]]
        by = [*(name for name in self.points[0] if name != SEED), *axes]
        grouped = single.assign(value=single["value"].astype(float)).groupby(by, dropna=False, sort=False)["value"]
        return grouped.agg(value="mean", stderr="sem", num="count").reset_index()


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


_NUMBERS = ("value", "stderr", "stderr_data", "stderr_total", "resolved", "status", "num", "low", "high", "reason")
"""Columns of a frame that say how large a number is, and not which."""


def sweep(
    model_paths: Sequence[str | Path | Source],
    config: UnifiedConfig,
    grid: Mapping[str, Sequence[Any]],
    **run_options: Any,
) -> Sweep:
    """A study for every combination of values: `{"seed": [1, 2, 3], "directional_losses.span": [0.05, 0.1]}`.

    grid: by name, a field of `UnifiedConfig` or `metric.setting`, the values that it takes. What combinations have in common
    is computed once: all share the cache of `config.output_dir`.

    Raises ValueError for an empty grid and as `analyze_models` does.
    """
    if not grid or not all(len(values) for values in grid.values()):
        raise ValueError("`grid` must have a name with values, for example {'seed': [1, 2, 3]}.")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    studies = (analyze_models(model_paths, _at(config, point), **run_options) for point in points)
    return Sweep(tuple(points), tuple(studies))


def _at(config: UnifiedConfig, point: Mapping[str, Any]) -> UnifiedConfig:
    settings = {name: dict(changes) for name, changes in (config.settings or {}).items()}
    for name, value in point.items():
        metric, dot, setting = name.partition(".")
        if dot:
            settings.setdefault(metric, {})[setting] = value
        else:
            config = replace(config, **{name: value})
    return replace(config, settings=settings)
