"""Second derivatives of the loss as matvecs over the flat vector, and what is read off them."""

from .ascent_sharpness import SamSharpness, asam_sharpness, sam_sharpness
from .audit import Audit, Way, audit
from .average_sharpness import AverageSharpness, average_sharpness
from .batch_dependence import BatchDependence, batch_dependence
from .critical import CriticalSharpness, critical_sharpness, relative_critical_sharpness
from .culprits import Culprit
from .data_error import EigenvalueDifferences, EigenvalueErrors, compare_eigenvalues, eigenvalue_errors
from .directional import DifferenceStep, DirectionalCurvatures, difference_step, directional_curvatures
from .edge_of_stability import EdgeOfStability, edge_of_stability, stability_threshold
from .fisher import FisherDiagonal, empirical_fisher, exact_fisher, fisher_diagonal_mc, fisher_mc
from .gram import Grams, Norms, gradient_norms, gram, gram_matvec
from .hessian import ggn, hessian, hessian_difference
from .kfac import Kfac
from .kfac_factors import ekfac_factors, kfac_factors
from .laplace import ewc_penalty, laplace_variance, natural_gradient
from .leafwise_trace import leafwise_trace
from .m_sharpness import MSharpness, m_sharpness
from .routing import RoutingChanges, routing_changes
from .rows import gradient_chunks, micro_batches, per_sample_gradients
from .sequence_forms import SequenceForms, TraceErrors, sequence_forms, trace_errors
from .shards import sharded, sharded_gram
from .sharpness_comparison import Eigenvalue, SharpnessComparison, compare_sharpness
from .stored_gradient import StoredGradient, stored_gradient
from .summary import block_slices, hessian_block_eigenvalues, hessian_block_traces, hessian_summary

__all__ = [
    "Audit",
    "AverageSharpness",
    "BatchDependence",
    "CriticalSharpness",
    "Culprit",
    "DifferenceStep",
    "DirectionalCurvatures",
    "EdgeOfStability",
    "Eigenvalue",
    "EigenvalueDifferences",
    "EigenvalueErrors",
    "FisherDiagonal",
    "Grams",
    "Kfac",
    "MSharpness",
    "Norms",
    "RoutingChanges",
    "SamSharpness",
    "SequenceForms",
    "SharpnessComparison",
    "StoredGradient",
    "TraceErrors",
    "Way",
    "asam_sharpness",
    "audit",
    "average_sharpness",
    "batch_dependence",
    "block_slices",
    "compare_eigenvalues",
    "compare_sharpness",
    "critical_sharpness",
    "difference_step",
    "directional_curvatures",
    "edge_of_stability",
    "eigenvalue_errors",
    "ekfac_factors",
    "empirical_fisher",
    "ewc_penalty",
    "exact_fisher",
    "fisher_diagonal_mc",
    "fisher_mc",
    "ggn",
    "gradient_chunks",
    "gradient_norms",
    "gram",
    "gram_matvec",
    "hessian",
    "hessian_block_eigenvalues",
    "hessian_block_traces",
    "hessian_difference",
    "hessian_summary",
    "kfac_factors",
    "laplace_variance",
    "leafwise_trace",
    "m_sharpness",
    "micro_batches",
    "natural_gradient",
    "per_sample_gradients",
    "relative_critical_sharpness",
    "routing_changes",
    "sam_sharpness",
    "sequence_forms",
    "sharded",
    "sharded_gram",
    "stability_threshold",
    "stored_gradient",
    "trace_errors",
]
