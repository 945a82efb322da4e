"""A microscope for trained networks, made of pure functions.

A model is a function `apply(params, inputs)`, a loss is `loss(theta)` over one flat vector, and every metric is its
values, its derivatives, its samples. Nothing is edited in place, so nothing has to be restored.
"""

import os

# Threads of OpenMP wait by spinning unless told otherwise before torch loads it: beside another busy process a small
# operation then takes a hundred times as long as on one thread.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from . import curvature, fisher, gradients, information, landscape, linalg, mechanistic, representation, weights
from .core.criterion import Criterion, causal_lm, classification, criterion_of, custom, masked_lm, seq2seq_lm
from .core.directions import Direction, directions, stack
from .core.estimate import Estimate
from .core.keys import Key, fold_in, key, normal, rademacher
from .core.layout import Layout
from .core.losses import binary_cross_entropy, cross_entropy, mse
from .core.model import Functional, functional
from .core.objective import Loss, objective
from .core.processes import Processes, processes
from .core.reading import read
from .core.remat import remat
from .core.restrict import grid, restrict
from .core.result import Result, derived, internal, quantity
from .core.running import running_statistics
from .core.sharded_model import sharded_functional
from .core.sharded_objective import sharded_objective
from .core.streams import reservoir, streamed
from .core.trace import Patch, Trace, apply_with, pattern_blocks, sites_of, trace
from .curvature import (
    Audit,
    asam_sharpness,
    audit,
    average_sharpness,
    batch_dependence,
    compare_eigenvalues,
    compare_sharpness,
    critical_sharpness,
    eigenvalue_errors,
    empirical_fisher,
    exact_fisher,
    fisher_mc,
    ggn,
    gradient_norms,
    gram,
    gram_matvec,
    hessian,
    hessian_block_eigenvalues,
    hessian_block_traces,
    hessian_difference,
    hessian_summary,
    m_sharpness,
    per_sample_gradients,
    relative_critical_sharpness,
    sam_sharpness,
    sequence_forms,
    sharded,
    sharded_gram,
    trace_errors,
)
from .fisher import GramSpectrum, fisher_spectrum, gradient_gram, gram_spectrum
from .landscape import (
    Axes,
    BarrierMatrix,
    CommonDirections,
    Comparison,
    Connection,
    DifferenceStep,
    DirectionalLosses,
    Flatness,
    LossLines,
    LossPath,
    LossPlane,
    Trajectory,
    barrier_matrix,
    bezier,
    bezier_path,
    common_directions,
    compare_directional,
    connect,
    difference_step,
    directional_curvatures,
    directional_losses,
    eigenvector_axes,
    flatness,
    flatness_profile,
    linear_path,
    loss_lines,
    loss_plane,
    plane_directions,
    principal_directions,
    project,
    sharded_directional_losses,
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
from .study.analyze import analyze_models
from .study.cluster import Cluster
from .study.config import UnifiedConfig
from .study.meter import cleanup_memory
from .study.metric import Metric, register
from .study.progress import progress
from .study.results import Results
from .study.sources import InMemory, Pretrained
from .study.sweep import sweep
from .study.unified import MetricRegistry, ResultCache, UnifiedModelAnalysis, UnifiedModelAnalyzer

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "Axes",
    "BarrierMatrix",
    "Cluster",
    "CommonDirections",
    "Comparison",
    "Connection",
    "Criterion",
    "DifferenceStep",
    "Direction",
    "DirectionalLosses",
    "Estimate",
    "Flatness",
    "Functional",
    "GramSpectrum",
    "InMemory",
    "Key",
    "Layout",
    "Loss",
    "LossLines",
    "LossPath",
    "LossPlane",
    "Metric",
    "MetricRegistry",
    "Patch",
    "Pretrained",
    "Processes",
    "Result",
    "ResultCache",
    "Results",
    "Trace",
    "Trajectory",
    "UnifiedConfig",
    "UnifiedModelAnalysis",
    "UnifiedModelAnalyzer",
    "analyze_models",
    "apply_with",
    "asam_sharpness",
    "audit",
    "average_sharpness",
    "barrier_matrix",
    "batch_dependence",
    "bezier",
    "bezier_path",
    "binary_cross_entropy",
    "causal_lm",
    "classification",
    "cleanup_memory",
    "common_directions",
    "compare_directional",
    "compare_eigenvalues",
    "compare_sharpness",
    "conjugate_gradient",
    "connect",
    "criterion_of",
    "critical_sharpness",
    "cross_entropy",
    "curvature",
    "custom",
    "derived",
    "difference_step",
    "directional_curvatures",
    "directional_losses",
    "directions",
    "eigenpairs",
    "eigenvalue_errors",
    "eigenvector_axes",
    "empirical_fisher",
    "exact_fisher",
    "fisher",
    "fisher_mc",
    "fisher_spectrum",
    "flatness",
    "flatness_profile",
    "fold_in",
    "functional",
    "ggn",
    "gradient_gram",
    "gradient_norms",
    "gradients",
    "gram",
    "gram_matvec",
    "gram_spectrum",
    "grid",
    "hessian",
    "hessian_block_eigenvalues",
    "hessian_block_traces",
    "hessian_difference",
    "hessian_summary",
    "hutchinson_trace",
    "hutchpp_trace",
    "information",
    "internal",
    "key",
    "landscape",
    "linalg",
    "linear_path",
    "loss_lines",
    "loss_plane",
    "m_sharpness",
    "masked_lm",
    "mechanistic",
    "mse",
    "normal",
    "objective",
    "pattern_blocks",
    "per_sample_gradients",
    "plane_directions",
    "principal_directions",
    "processes",
    "progress",
    "project",
    "quantity",
    "rademacher",
    "read",
    "register",
    "relative_critical_sharpness",
    "remat",
    "representation",
    "reservoir",
    "restrict",
    "running_statistics",
    "sam_sharpness",
    "seq2seq_lm",
    "sequence_forms",
    "sharded",
    "sharded_directional_losses",
    "sharded_functional",
    "sharded_gram",
    "sharded_objective",
    "sites_of",
    "spectral_density",
    "spectrum_summary",
    "stack",
    "streamed",
    "sweep",
    "trace",
    "trace_errors",
    "weights",
    "xtrace",
]
