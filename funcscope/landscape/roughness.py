"""How rough a grid of losses is, and how far from a quadratic."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


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
