"""How rough a grid of losses is, and how far from a quadratic."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.result import derived


def _statistic(label: str, name: str, unit: str = "") -> Any:
    return derived(label, unit=unit)(lambda self: self.statistics[name])


class GridStatistics:
    """Of a result with a grid of losses and the coefficients along its axes."""

    grid_losses: Any
    places: tuple[Tensor, ...]

    @cached_property
    def statistics(self) -> dict[str, float]:
        """Of the finite losses, by their documented names; see `loss_plane`."""
        return statistics(self.grid_losses, *self.places)

    loss_mean = _statistic("mean of the losses", "loss_mean", "loss")
    loss_std = _statistic("standard deviation of the losses", "loss_std", "loss")
    loss_min = _statistic("lowest finite loss", "loss_min", "loss")
    loss_max = _statistic("highest finite loss", "loss_max", "loss")
    roughness = _statistic("roughness: mean slope along the axes", "roughness", "loss per coefficient")
    normalized_roughness = _statistic("roughness over the mean loss", "normalized_roughness", "per coefficient")
    normalized_roughness_range = _statistic(
        "roughness over the range of the loss", "normalized_roughness_range", "per coefficient"
    )
    quad_residual = _statistic("part of the deviation that is not quadratic", "quad_residual")


def statistics(grid: Float[Tensor, "n m"], first: Float[Tensor, " n"], second: Float[Tensor, " m"]) -> dict[str, float]:
    """Statistics of the finite losses by their documented names: `loss_plane` has the formulas."""
    finite, edges, nan = grid[grid.isfinite()], slopes(grid, first, second), math.nan
    mean, low, high = (float(f(finite)) if len(finite) else nan for f in (torch.mean, torch.min, torch.max))
    roughness = float(edges.mean()) if len(edges) else nan
    return {
        "loss_mean": mean,
        "loss_std": float(finite.std()) if len(finite) > 1 else nan,
        "loss_min": low,
        "loss_max": high,
        "roughness": roughness,
        "normalized_roughness": roughness / abs(mean) if mean else nan,
        "normalized_roughness_range": roughness / (high - low) if high > low else nan,
        "quad_residual": quadratic_residual(grid, first, second),
    }


def slopes(
    grid: Float[Tensor, "n m"], first: Float[Tensor, " n"], second: Float[Tensor, " m"]
) -> Float[Tensor, " edges"]:
    """|difference| / step of every edge of the grid whose two ends are finite, along both axes."""
    down = grid.diff(dim=0).abs() / first.diff()[:, None]
    across = grid.diff(dim=1).abs() / second.diff()
    edges = torch.cat([down.flatten(), across.flatten()])
    return edges[edges.isfinite()]


def quadratic_residual(grid: Float[Tensor, "n m"], first: Float[Tensor, " n"], second: Float[Tensor, " m"]) -> float:
    """Root of the share of the variance over finite points that no quadratic in both coordinates explains.

    nan where all losses are equal, and where there are no more points than coefficients that they determine.

    >>> x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    >>> quadratic_residual((x[:, None] - 2 * x) ** 2 + x, x, x) < 1e-12
    True
    """
    x, y = torch.meshgrid(_unit(first), _unit(second), indexing="ij")
    finite = grid.isfinite()
    x, y, z = x[finite], y[finite], grid[finite]
    design = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=1)
    if len(z) == 0 or len(z) <= int(torch.linalg.matrix_rank(design)) or bool((z == z[0]).all()):
        return math.nan
    z = (z - z.mean()) / (z - z.mean()).abs().max()  # so that squares neither vanish nor overflow
    rest = z - design @ torch.linalg.lstsq(design, z[:, None], driver="gelsd").solution[:, 0]
    return float((rest.square().sum() / z.square().sum()).sqrt())


def _unit(values: Tensor) -> Tensor:
    """The same on [-1, 1]: powers of a small span would lose the quadratic to the rounding of the constant."""
    low, high = values.min(), values.max()
    return (2 * values - low - high) / (high - low)
