"""Mechanisms inside a transformer: what its heads read and write, and what its layers say of the next token."""

from .circuits import HeadCircuits, full_circuit, qk_ov_circuits
from .weights import HeadWeights, head_weights

__all__ = ["HeadCircuits", "HeadWeights", "full_circuit", "head_weights", "qk_ov_circuits"]
