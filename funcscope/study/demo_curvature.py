"""Curvature and sharpness of the demonstration's checkpoints, a few products each."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from ..core.keys import fold_in, key
from ..core.objective import Loss
from ..core.store import load, save, to_json
from ..curvature.hessian import hessian
from ..curvature.sam import sam_sharpness
from ..families import modular
from ..linalg.eigen import eigenpairs
from ..linalg.trace import hutchinson_trace

PRODUCTS = 16
"""For the trace."""
TOL = 1e-2
"""Residual of the largest eigenvalue, relative to it."""
EPSILON = 0.01
"""Length of SAM's step, a distance in parameter space."""
_SAM = ("absolute", "stderr", "relative", "relative_stderr", "first_order", "rounding")


def curvature_at(config: modular.Config, seed: int, loss: Loss, folder: Path, step: int) -> dict[str, float | None]:
    """Largest eigenvalue and trace of the Hessian, and SAM's sharpness, at one checkpoint: stored ones where they fit.

    Draws are the same at every step. Sharpness is undefined (nan, stored as null) where the gradient is 0.
    """
    path = folder / "curvature" / f"step_{step:05d}.npz"
    weights = load(modular.path(folder, step)).sha256
    wanted = to_json(
        {
            "step": step, "checkpoint": weights, "seed": seed, "products": PRODUCTS, "tol": TOL, "epsilon": EPSILON,
            "metric": "curvature", "version": 1,
        }
    )  # fmt: skip
    if not path.exists() or load(path).meta["settings"] != wanted:
        theta = loss.layout.ravel(modular.checkpoint(config, folder, step).params)
        matvec, root = hessian(loss, theta), fold_in(key(seed), "curvature")
        top = eigenpairs(matvec, theta, key=fold_in(root, "largest"), num=1, which="largest", tol=TOL)
        trace = hutchinson_trace(matvec, theta, key=fold_in(root, "trace"), num=PRODUCTS)
        values = {
            "hessian_max_eigenvalue": float(top.values[0]),
            "hessian_max_eigenvalue_residual": float(top.residuals[0]),
            "hessian_trace": float(trace.value),
            "hessian_trace_stderr": float(trace.stderr),
            "hessian_products": top.num_matvecs + trace.num_matvecs,
            **{f"sam_{name}": value for name, value in _sam(loss, theta).items()},
        }
        save(path, {}, {"settings": wanted, "values": values})
    return load(path).meta["values"]


def _sam(loss: Loss, theta: Tensor) -> dict[str, float]:
    try:
        found = sam_sharpness(loss, theta, epsilon=EPSILON, norm_threshold=0.0, curvature=False)
    except ValueError:  # no direction to climb in
        return dict.fromkeys(_SAM, math.nan)
    return {name: float(getattr(found, name)) for name in _SAM}
