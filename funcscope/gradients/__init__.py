"""What a gradient is like: how it flows through a model, how much of it is noise, how far it steps, how it is spread."""

from .noise import GradientNoise, TwoBatchNoise, gradient_noise, gram_noise, two_batch_noise

__all__ = [
    "GradientNoise",
    "TwoBatchNoise",
    "gradient_noise",
    "gram_noise",
    "two_batch_noise",
]
