"""Mechanisms inside a transformer: what its heads read and write, and what its layers say of the next token."""

from .circuits import HeadCircuits, full_circuit, qk_ov_circuits
from .logit_attribution import (
    Contributions,
    LogitAttribution,
    ScoreAttribution,
    logit_attribution,
    logit_contributions,
    qk_attribution,
)
from .weights import HeadWeights, head_weights

__all__ = [
    "Contributions",
    "HeadCircuits",
    "HeadWeights",
    "LogitAttribution",
    "ScoreAttribution",
    "full_circuit",
    "head_weights",
    "logit_attribution",
    "logit_contributions",
    "qk_attribution",
    "qk_ov_circuits",
]
