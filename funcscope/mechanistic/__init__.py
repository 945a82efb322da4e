"""Mechanisms inside a transformer: what its heads read and write, and what its layers say of the next token."""

from .weights import HeadWeights, head_weights

__all__ = ["HeadWeights", "head_weights"]
