"""Gradients of the loss: how they flow through the blocks, what of them is noise, which samples and tasks they come from."""

from .aggregation import Aggregation, aggregation_weights, gradient_aggregation
from .alignment import GradientAlignment, gradient_alignment, gram_alignment
from .trajectory import AlignmentTrajectory, GradientTrajectory, alignment_trajectory, gradient_trajectory

__all__ = [
    "Aggregation",
    "AlignmentTrajectory",
    "GradientAlignment",
    "GradientTrajectory",
    "aggregation_weights",
    "alignment_trajectory",
    "gradient_aggregation",
    "gradient_alignment",
    "gradient_trajectory",
    "gram_alignment",
]
