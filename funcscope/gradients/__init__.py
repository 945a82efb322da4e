"""What a gradient is like: how it flows through a model, how much of it is noise, how far it steps, how it is spread."""

from .aggregation import Aggregation, aggregation_weights, gradient_aggregation
from .alignment import GradientAlignment, gradient_alignment, gram_alignment
from .dispersion import GradientDispersion, dispersion_of, gradient_dispersion
from .flow import GradientFlow, gradient_flow
from .influence import Influence, influence
from .influential_texts import MostInfluential, most_influential
from .lds import DatamodelingScore, half_subsets, linear_datamodeling_score
from .noise import GradientNoise, TwoBatchNoise, gradient_noise, gram_noise, two_batch_noise
from .pathology import GradientPathology, gradient_pathology
from .self_influence import SelfInfluence, TracInSelfInfluence, self_influence, tracin_self_influence
from .tracin import TracIn, batch_rates, checkpoint_rates, tracin
from .trajectory import AlignmentTrajectory, GradientTrajectory, alignment_trajectory, gradient_trajectory

__all__ = [
    "Aggregation",
    "AlignmentTrajectory",
    "DatamodelingScore",
    "GradientAlignment",
    "GradientDispersion",
    "GradientFlow",
    "GradientNoise",
    "GradientPathology",
    "GradientTrajectory",
    "Influence",
    "MostInfluential",
    "SelfInfluence",
    "TracIn",
    "TracInSelfInfluence",
    "TwoBatchNoise",
    "aggregation_weights",
    "alignment_trajectory",
    "batch_rates",
    "checkpoint_rates",
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
    "half_subsets",
    "influence",
    "linear_datamodeling_score",
    "most_influential",
    "self_influence",
    "tracin",
    "tracin_self_influence",
    "two_batch_noise",
]
