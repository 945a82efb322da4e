"""A spectrum's numbers as arrays and settings, and back: what the store keeps and the page reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.keys import Key
from ..linalg.eigen import Eigenpairs
from ..linalg.quadrature import SpectralDensity
from ..linalg.summary import SpectrumSummary
from ..linalg.trace import TraceEstimate

Part = tuple[dict[str, np.ndarray], dict[str, Any]]
"""Arrays and settings."""


def of_ends(ends: Eigenpairs) -> Part:
    arrays = {name: getattr(ends, name).cpu().numpy() for name in ("values", "residuals", "converged")}
    return _named("end", arrays), {"which": ends.which, "tol": ends.tol, "num_matvecs": ends.num_matvecs}


def of_trace(trace: TraceEstimate) -> Part:
    return {"trace_samples": trace.samples.numpy()}, {"method": trace.method, "num_matvecs": trace.num_matvecs}


def of_density(density: SpectralDensity) -> Part:
    arrays = {name: getattr(density, name).cpu().numpy() for name in ("nodes", "weights")}
    plain = ("num_parameters", "num_matvecs", "steps", "rounding")
    return arrays, {name: getattr(density, name) for name in plain}


def summary_of(arrays: Mapping[str, np.ndarray], told: Mapping[str, Mapping[str, Any]], key: Key) -> SpectrumSummary:
    """The summary of which `arrays` and `told` (by stage: ends, trace, density) were stored.

    The condition number's damping is the tolerance times the largest |eigenvalue|, as in `linalg.spectrum_summary`.
    """
    ends = _ends(arrays, told["ends"], key)
    density = SpectralDensity(_tensor(arrays, "nodes"), _tensor(arrays, "weights"), key=key, **told["density"])
    damping = ends.tol * float(ends.values.abs().max())
    return SpectrumSummary(ends, trace_of(arrays, told["trace"]), density, damping, density.num_parameters, key)


def trace_of(arrays: Mapping[str, np.ndarray], told: Mapping[str, Any]) -> TraceEstimate:
    """The trace of which the samples were stored."""
    return TraceEstimate.of_samples(_tensor(arrays, "trace_samples"), told["num_matvecs"], told["method"])


def _ends(arrays: Mapping[str, np.ndarray], told: Mapping[str, Any], key: Key) -> Eigenpairs:
    values, residuals, converged = (_tensor(arrays, f"end_{name}") for name in ("values", "residuals", "converged"))
    return Eigenpairs(values, residuals, converged, None, told["num_matvecs"], told["which"], told["tol"], key)


def _named(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}_{name}": x for name, x in arrays.items()}


def _tensor(arrays: Mapping[str, np.ndarray], name: str) -> Tensor:
    return torch.from_numpy(np.array(arrays[name]))
