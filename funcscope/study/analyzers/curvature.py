"""Largest eigenvalue and trace of the Hessian, and sharpness, at every checkpoint."""

from __future__ import annotations

import math

from torch import Tensor

from ...core.keys import fold_in, key
from ...core.objective import Loss
from ...curvature.ascent_sharpness import sam_sharpness
from ...curvature.hessian import hessian
from ...linalg.eigen import eigenpairs
from ...linalg.trace import hutchinson_trace
from ..analyzer import Analyzer, Subject, Values

_SAM = ("absolute", "stderr", "relative", "relative_stderr", "first_order", "rounding")
SUMMARY = (
    "hessian_max_eigenvalue", "hessian_max_eigenvalue_residual", "hessian_trace", "hessian_trace_stderr",
    *(f"sam_{name}" for name in _SAM),
)  # fmt: skip
PRODUCT = 6
"""Forward passes that one product costs."""


def analyze(subject: Subject, *, products: int, tol: float, epsilon: float, split: str, seed: int) -> Values:
    """`products` random signs for the trace, a residual of `tol` for the eigenvalue, a step of `epsilon` for SAM.

    Draws are the same at every checkpoint. Sharpness is nan where the gradient is 0.
    """
    loss, theta = subject.loss(split), subject.theta
    matvec, root = hessian(loss, theta), fold_in(key(seed), "curvature")
    top = eigenpairs(matvec, theta, key=fold_in(root, "largest"), num=1, which="largest", tol=tol)
    trace = hutchinson_trace(matvec, theta, key=fold_in(root, "trace"), num=products)
    return {
        "hessian_max_eigenvalue": float(top.values[0]),
        "hessian_max_eigenvalue_residual": float(top.residuals[0]),
        "hessian_trace": float(trace.value),
        "hessian_trace_stderr": float(trace.stderr),
        "hessian_products": top.num_matvecs + trace.num_matvecs,
        **{f"sam_{name}": value for name, value in _sam(loss, theta, epsilon).items()},
    }


def _sam(loss: Loss, theta: Tensor, epsilon: float) -> dict[str, float]:
    try:
        found = sam_sharpness(loss, theta, epsilon=epsilon, norm_threshold=0.0, curvature=False)
    except ValueError:  # no direction to climb in
        return dict.fromkeys(_SAM, math.nan)
    return {name: float(getattr(found, name)) for name in _SAM}


HESSIAN_CURVATURE = Analyzer(
    name="hessian_curvature",
    analyze=analyze,
    summary_keys=SUMMARY,
    compute_summary=lambda values: {name: values[name] for name in SUMMARY},
    settings={"products": 16, "tol": 1e-2, "epsilon": 0.01, "split": "train", "seed": 42},
    forwards=lambda settings: PRODUCT * (settings["products"] + 20) + 6,
)
