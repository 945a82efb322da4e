"""What a gradient is like: how it flows through a model, how much of it is noise, how far it steps, how it is spread."""

from .aggregation import Aggregation, aggregation_weights, gradient_aggregation
from .alignment import GradientAlignment, gradient_alignment, gram_alignment
from .dispersion import GradientDispersion, dispersion_of, gradient_dispersion
from .flow import GradientFlow, gradient_flow
from .noise import GradientNoise, TwoBatchNoise, gradient_noise, gram_noise, two_batch_noise
from .pathology import GradientPathology, gradient_pathology
from .trajectory import AlignmentTrajectory, GradientTrajectory, alignment_trajectory, gradient_trajectory

__all__ = [
    "Aggregation",
    "AlignmentTrajectory",
    "GradientAlignment",
    "GradientDispersion",
    "GradientFlow",
    "GradientNoise",
    "GradientPathology",
    "GradientTrajectory",
    "TwoBatchNoise",
    "aggregation_weights",
    "alignment_trajectory",
    "dispersion_of",
    "gradient_aggregation",
    "gradient_alignment",
    "gradient_dispersion",
    "gradient_flow",
    "gradient_noise",
    "gradient_pathology",
    "gradient_trajectory",
    "gram_alignment",
    "gram_noise",
    "two_batch_noise",
]
