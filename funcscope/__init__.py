"""A microscope for trained networks, made of pure functions.

A model is a function `apply(params, inputs)`, a loss is `loss(theta)` over one flat vector, and every metric is its
values, its derivatives, its samples. Nothing is edited in place, so nothing has to be restored.
"""

from . import curvature, landscape, linalg
from .core.criterion import Criterion, causal_lm, classification, criterion_of, custom, masked_lm, seq2seq_lm
from .core.directions import Direction, directions, stack
from .core.estimate import Estimate
from .core.keys import Key, fold_in, key, normal, rademacher
from .core.layout import Layout
from .core.model import Functional, functional
from .core.objective import Loss, objective
from .core.restrict import grid, restrict
from .curvature import (
    asam_sharpness,
    average_sharpness,
    compare_sharpness,
    critical_sharpness,
    empirical_fisher,
    exact_fisher,
    fisher_mc,
    ggn,
    hessian,
    hessian_block_eigenvalues,
    hessian_block_traces,
    hessian_difference,
    hessian_summary,
    m_sharpness,
    per_sample_gradients,
    relative_critical_sharpness,
    sam_sharpness,
)
from .landscape import (
    Comparison,
    DirectionalLosses,
    compare_directional,
    difference_step,
    directional_curvatures,
    directional_losses,
)
from .linalg import (
    conjugate_gradient,
    eigenpairs,
    hutchinson_trace,
    hutchpp_trace,
    spectral_density,
    spectrum_summary,
    xtrace,
)

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "Criterion",
    "Direction",
    "DirectionalLosses",
    "Estimate",
    "Functional",
    "Key",
    "Layout",
    "Loss",
    "asam_sharpness",
    "average_sharpness",
    "causal_lm",
    "classification",
    "compare_directional",
    "compare_sharpness",
    "conjugate_gradient",
    "criterion_of",
    "critical_sharpness",
    "curvature",
    "custom",
    "difference_step",
    "directional_curvatures",
    "directional_losses",
    "directions",
    "eigenpairs",
    "empirical_fisher",
    "exact_fisher",
    "fisher_mc",
    "fold_in",
    "functional",
    "ggn",
    "grid",
    "hessian",
    "hessian_block_eigenvalues",
    "hessian_block_traces",
    "hessian_difference",
    "hessian_summary",
    "hutchinson_trace",
    "hutchpp_trace",
    "key",
    "landscape",
    "linalg",
    "m_sharpness",
    "masked_lm",
    "normal",
    "objective",
    "per_sample_gradients",
    "rademacher",
    "relative_critical_sharpness",
    "restrict",
    "sam_sharpness",
    "seq2seq_lm",
    "spectral_density",
    "spectrum_summary",
    "stack",
    "xtrace",
]
