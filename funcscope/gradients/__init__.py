"""What a gradient is like: how it flows through a model, how much of it is noise, how far it steps, how it is spread."""

from .dispersion import GradientDispersion, dispersion_of, gradient_dispersion
from .flow import GradientFlow, gradient_flow
from .noise import GradientNoise, TwoBatchNoise, gradient_noise, gram_noise, two_batch_noise
from .pathology import GradientPathology, gradient_pathology

__all__ = [
    "GradientDispersion",
    "GradientFlow",
    "GradientNoise",
    "GradientPathology",
    "TwoBatchNoise",
    "dispersion_of",
    "gradient_dispersion",
    "gradient_flow",
    "gradient_noise",
    "gradient_pathology",
    "gram_noise",
    "two_batch_noise",
]
