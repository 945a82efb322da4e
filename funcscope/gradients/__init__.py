"""Gradients of the loss: how they flow through the blocks, what of them is noise, which samples and tasks they come from."""

from .aggregation import Aggregation, aggregation_weights, gradient_aggregation
from .alignment import GradientAlignment, gradient_alignment, gram_alignment

__all__ = [
    "Aggregation",
    "GradientAlignment",
    "aggregation_weights",
    "gradient_aggregation",
    "gradient_alignment",
    "gram_alignment",
]
