"""Gradients of the loss: how they flow through the blocks, what of them is noise, which samples and tasks they come from."""

from .alignment import GradientAlignment, gradient_alignment, gram_alignment

__all__ = ["GradientAlignment", "gradient_alignment", "gram_alignment"]
